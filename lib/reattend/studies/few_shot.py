"""Few-shot classification on the frozen vectors of a black box: the baselines, and fitting CrossTune.

Every classifier takes unit vectors of the shots, their labels and unit vectors of other texts, and
gives one score for each of these and each class, the largest being its answer. Descriptions of the
classes, where they are given, count as one more example of each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor
from torch.nn import functional as F

from reattend.text_matching.crosstune import CrossTune, label_loss
from reattend.training.loop import TrainingLog, TrainingPlan, train


@dataclass(frozen=True)
class ScorerPlan:
    """How a CrossTune scorer starts and is trained: full batches of all shots, a fixed number of steps."""

    heads: int
    scale: float
    steps: int
    learning_rate: float
    noise: float = 0.01
    weight_decay: float = 0.01


def fit_scorer(
    shots: Float[Tensor, "shots width"],
    labels: Int[Tensor, " shots"],
    label_vectors: Float[Tensor, "classes width"],
    plan: ScorerPlan,
    seed: int,
) -> tuple[CrossTune, TrainingLog]:
    """A scorer trained on the shots; `seed` is that of its start."""
    generator = Generator().manual_seed(seed)
    scorer = CrossTune(shots.shape[1], plan.heads, plan.scale, plan.noise, generator)

    def loss(scorer: CrossTune, step: None) -> Tensor:
        return label_loss(scorer(shots, label_vectors), labels)

    recipe = TrainingPlan(plan.steps, plan.learning_rate, plan.weight_decay)
    return scorer, train(scorer.to(shots.device), iter(lambda: None, 0), loss, recipe)


def prototypes(
    shots: Float[Tensor, "shots width"],
    labels: Int[Tensor, " shots"],
    others: Float[Tensor, "items width"],
    descriptions: Float[Tensor, "classes width"] | None = None,
    weight: float = 1.0,
) -> Float[Tensor, "items classes"]:
    """Cosine with the mean vector of each class.

    Args:
        weight: how many examples a description counts for.
    """
    sums = F.one_hot(labels).to(shots.dtype).T @ shots
    if descriptions is not None:
        sums = sums + weight * descriptions
    return others @ F.normalize(sums, dim=-1).T


def neighbours(
    shots: Float[Tensor, "shots width"],
    labels: Int[Tensor, " shots"],
    others: Float[Tensor, "items width"],
    sizes: Sequence[int] = (1, 3, 5, 9, 15),
) -> Float[Tensor, "items classes"]:
    """Votes of the nearest shots, weighted by their cosines (as exp(10 cosine)).

    How many vote is the size that is right most often on the shots themselves, each left out in turn;
    the smallest of equals.
    """
    votes = F.one_hot(labels).to(shots.dtype)

    def count(cosines: Tensor, size: int) -> Tensor:
        near = cosines.topk(size, dim=-1)
        return torch.einsum("is,isc->ic", (10 * near.values).exp(), votes[near.indices])

    among = (shots @ shots.T).fill_diagonal_(-torch.inf)
    possible = [size for size in sizes if size < len(shots)]
    right = [(count(among, size).argmax(1) == labels).sum().item() for size in possible]
    return count(others @ shots.T, possible[int(np.argmax(right))] if possible else 1)


def probe(
    shots: Float[Tensor, "shots width"],
    labels: Int[Tensor, " shots"],
    folds: Int[Tensor, " shots"],
    others: Float[Tensor, "items width"],
    strengths: Sequence[float],
    descriptions: Float[Tensor, "classes width"] | None = None,
    weight: float = 1.0,
) -> Float[Tensor, "items classes"]:
    """Class probabilities of a logistic regression with an L2 penalty.

    Args:
        folds: of each shot. With two or more the penalty is the one with the best mean
            log-probability of held-out shots; with one, the middle of `strengths`.
        strengths: inverse penalties to choose from, in order.
        weight: how many examples a description counts for; descriptions are always trained on.
    """
    more = shots[:0] if descriptions is None else descriptions
    more_labels = torch.arange(len(more))
    # What lies outside the span of the training vectors does not matter: a rotation into it is exact.
    basis = torch.linalg.qr(torch.cat([shots, more]).double().T).Q.numpy()
    x, extra, rest = (part.double().numpy() @ basis for part in (shots, more, others))
    y, fold = labels.numpy(), folds.numpy()

    def fitted(strength: float, inside: np.ndarray) -> LogisticRegression:
        weights = np.r_[np.ones(inside.sum()), np.full(len(extra), weight)]
        model = LogisticRegression(C=strength, tol=1e-6, max_iter=500)
        return model.fit(np.r_[x[inside], extra], np.r_[y[inside], more_labels.numpy()], weights)

    best = strengths[len(strengths) // 2]
    if len(np.unique(fold)) > 1:
        scores = [
            np.mean([_right(fitted(s, fold != f), x[fold == f], y[fold == f]) for f in set(fold)])
            for s in strengths
        ]
        best = strengths[int(np.argmax(scores))]
    everything = fitted(best, np.ones(len(y), dtype=bool))
    return torch.from_numpy(everything.predict_proba(rest))


def _right(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> float:
    """Mean log-probability of the right classes."""
    return model.predict_log_proba(x)[np.arange(len(y)), y].mean()


def probe_teacher(strength: float):
    """A teacher for the switch: a logistic regression of fixed inverse penalty on the vectors given."""

    def teacher(texts: Tensor, labels: Tensor, others: Tensor) -> Tensor:
        return probe(texts, labels, torch.zeros_like(labels), others, [strength])

    return teacher


def search_prompt(
    logits: Float[Tensor, "prompts items classes"],
    shots: Int[Tensor, " shots"],
    labels: Int[Tensor, " shots"],
) -> tuple[Float[Tensor, "items classes"], int, bool]:
    """The prompt under which a language model gives the shots' labels the highest probability.

    Gradient-free: the model is asked with every prompt, and what it answers is compared. Each prompt
    is tried as it is and calibrated, that is, divided by its mean answer over the shots, without
    their labels, since small models favour one label word.

    Args:
        logits: of the label words under each prompt, for every text.
        shots: positions of the shots among the texts.

    Returns:
        Scores of all texts under the best one, its number, and whether it is calibrated.
    """
    plain = logits.log_softmax(-1)
    prior = plain[:, shots].exp().mean(1, keepdim=True).log()
    tried = torch.stack([plain, (plain - prior).log_softmax(-1)])
    right = tried[:, :, shots].gather(-1, labels.expand(*tried.shape[:2], -1)[..., None])
    calibrated, prompt = divmod(int(right.mean((2, 3)).argmax()), len(logits))
    return tried[calibrated, prompt], prompt, bool(calibrated)


def exchanged(labels: Int[Tensor, " items"], share: float, seed: int) -> Int[Tensor, " items"]:
    """The labels with a share of them, chosen at random, replaced by another class of the same set."""
    generator = Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, classes, (len(wrong),), generator=generator)
    result = labels.clone()
    result[wrong] = (labels[wrong] + shift) % classes
    return result


def shuffled(vectors: Float[Tensor, "classes width"], seed: int) -> Float[Tensor, "classes width"]:
    """The label vectors in a random order in which none keeps its place.

    Raises:
        ValueError: for a single class.
    """
    if len(vectors) < 2:
        raise ValueError("one label vector cannot change its place")
    generator, places = Generator().manual_seed(seed), torch.arange(len(vectors))
    order = places
    while (order == places).any():
        order = torch.randperm(len(vectors), generator=generator)
    return vectors[order]


def random_units(classes: int, width: int, seed: int) -> Float[Tensor, "{classes} {width}"]:
    """Random unit vectors in the place of label vectors."""
    drawn = torch.randn(classes, width, generator=Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1)


def accuracy(scores: Float[Tensor, "items classes"], labels: Int[Tensor, " items"]) -> float:
    """Right answers, %."""
    return 100 * (scores.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def judge(
    scorer: CrossTune,
    texts: Float[Tensor, "items width"],
    label_vectors: Float[Tensor, "classes width"],
    labels: Int[Tensor, " items"],
) -> tuple[float, float]:
    """Accuracy of a scorer in %, and its mean log-probability of the right label in nats."""
    p = scorer(texts, label_vectors)
    return accuracy(p, labels), -label_loss(p, labels).item()
