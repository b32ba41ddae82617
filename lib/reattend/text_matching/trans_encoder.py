"""Trans-Encoder: unsupervised sentence-pair models by self- and mutual distillation (arXiv 2109.13059).

Unlabelled pairs (a_i, b_i) are scored in two forms of one pretrained encoder: a bi-encoder f embeds
each text alone and compares by cosine, a cross-encoder g reads both texts at once. Each form labels
the pairs for the other, cycle after cycle (section 2 of the paper):

    y_i = cos(f(a_i), f(b_i))        g <- argmin BCE(g(a_i, b_i), y_i), from the raw encoder
    s_i = sigma(g(a_i, b_i))         f <- argmin (cos(f(a_i), f(b_i)) - s_i)^2, from the contrastive one

In mutual distillation several encoders run side by side and learn from the mean of their labels. The
start is a bi-encoder tuned by contrast on single texts (Mirror-BERT, arXiv 2104.08027). How a model is
trained (optimiser, epochs, batches) is left to the caller: see `Student`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional

from reattend.trunks.encoders import CachedStates, TextEncoder, Tokens, masked_mean

# The contrastive start (Mirror-BERT) --------------------------------------------------------------


def mask_spans(
    texts: Sequence[str],
    generator: Generator,
    *,
    span: int = 5,
    shortest: int = 30,
    mask: str = "[MASK]",
) -> list[str]:
    """Replace one random run of characters of each text by the mask token.

    Args:
        texts: any texts.
        generator: of the places.
        span: characters that are replaced, counted in characters, not tokens, as in the authors' code.
        shortest: a text of fewer characters stays as it is.
        mask: what replaces them.

    Raises:
        ValueError: when the span does not fit into the shortest text that is changed.
    """
    if not 1 <= span <= shortest:
        raise ValueError(f"span must lie in 1..{shortest} (shortest), got {span}")
    places = torch.rand(len(texts), generator=generator, dtype=torch.float64).tolist()
    changed = []
    for text, place in zip(texts, places, strict=True):
        start = int(place * (len(text) - span + 1))
        changed.append(
            text[:start] + mask + text[start + span :] if len(text) >= shortest else text
        )
    return changed


def nt_xent(
    first: Float[Tensor, "texts width"], second: Float[Tensor, "views width"], temperature: float
) -> Float[Tensor, ""]:
    """Contrastive loss over the 2B embeddings of two views of B texts, symmetric.

    Each embedding must pick its other view among the 2B - 1 others by cosine over `temperature`.
    Equal embeddings give log(2B - 1).

    Raises:
        ValueError: when the views differ in shape, for fewer than two texts or a temperature <= 0.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"views must have one shape, got {tuple(first.shape)}, {tuple(second.shape)}"
        )
    if len(first) < 2:
        raise ValueError("contrast needs at least two texts")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    count = len(first)
    unit = functional.normalize(torch.cat([first, second]), dim=-1)
    logits = unit @ unit.T / temperature
    itself = torch.eye(2 * count, dtype=torch.bool, device=logits.device)
    partner = torch.arange(2 * count, device=logits.device).roll(count)
    return functional.cross_entropy(logits.masked_fill(itself, -torch.inf), partner)


# Labels -------------------------------------------------------------------------------------------


def bi_labels(cosines: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """What a bi-encoder tells the cross-encoder: the raw cosine, not rescaled, clamped to [0, 1].

    The clamp is ours: with a negative target the cross-entropy has no minimum. No gradient flows back
    to the teacher.
    """
    return cosines.detach().clamp(0, 1)


def cross_labels(logits: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """What a cross-encoder tells the bi-encoder: sigma(logit) in (0, 1), of one order of the pair."""
    return logits.detach().sigmoid()


def mean_labels(labels: Sequence[Float[Tensor, " pairs"]]) -> Float[Tensor, " pairs"]:
    """Mutual distillation: the mean of the labels of several teachers (of one: its own labels)."""
    return torch.stack(list(labels)).mean(0)


def both_orders(
    labels: Float[Tensor, " pairs"],
) -> tuple[Int[Tensor, " doubled"], Int[Tensor, " doubled"], Float[Tensor, " doubled"]]:
    """Training items of the cross-encoder: every pair as (a, b) and as (b, a), with one label.

    Returns:
        Positions of the first and of the second text in the list [a_1 .. a_n, b_1 .. b_n], and the
        labels; the n pairs in their order come first, then the same pairs swapped.
    """
    count = len(labels)
    forward = torch.arange(2 * count, device=labels.device)
    return forward, forward.roll(-count), labels.repeat(2)


# The cross-encoder --------------------------------------------------------------------------------


def segment_masks(
    pairs: Tokens,
) -> tuple[Bool[Tensor, "pairs length"], Bool[Tensor, "pairs length"]]:
    """Where the tokens of the first and of the second text stand in [CLS] a [SEP] b [SEP].

    [CLS] is in neither; each [SEP] belongs to the text it ends.
    """
    second = (pairs.segments == 1) & pairs.mask
    first = (pairs.segments == 0) & pairs.mask
    first[:, 0] = False
    return first, second


class SegmentCrossEncoder(nn.Module):
    """Reads [CLS] a [SEP] b [SEP] at once; one logit from the means u and v of both texts' states.

    The paper's head is linear on the pooled [CLS]. This one is linear on [u; v; |u - v|; u * v], the
    states still those of joint reading: a small encoder whose [CLS] carries little learns to compare
    within tens of steps.

    Args:
        encoder: reads the pairs; its states of both texts have seen each other.
        prior: mean label, in (0, 1): the score before training.
        dropout: on the features.

    Raises:
        ValueError: for a prior outside (0, 1).
    """

    def __init__(self, encoder: TextEncoder, prior: float = 0.5, dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 < prior < 1:
            raise ValueError(f"prior must lie in (0, 1), got {prior}")
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * encoder.width, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.constant_(self.head.bias, math.log(prior / (1 - prior)))

    def forward(
        self,
        pairs: Tokens | CachedStates,
        first: Bool[Tensor, "pairs longest"],
        second: Bool[Tensor, "pairs longest"],
    ) -> Float[Tensor, " pairs"]:
        """Logits; the masks (see `segment_masks`) may be longer than the longest of these pairs."""
        states = self.encoder(pairs)[-1]
        length = states.shape[1]
        u, v = (masked_mean(states, mask[:, :length]) for mask in (first, second))
        features = torch.cat([u, v, (u - v).abs(), u * v], -1)
        return self.head(self.dropout(features))[:, 0]


# Losses -------------------------------------------------------------------------------------------


def cross_loss(
    logits: Float[Tensor, " pairs"],
    labels: Float[Tensor, " pairs"],
    kind: str = "bce",
) -> Float[Tensor, ""]:
    """Bi -> cross: soft binary cross-entropy -mean(y log sigma(x) + (1 - y) log(1 - sigma(x))).

    Its gradient in x is (sigma(x) - y) / pairs and its least value the entropy of the labels. "mse" is
    the ablation mean (sigma(x) - y)^2, whose gradient has the further factor 2 sigma(x)(1 - sigma(x)).

    Raises:
        ValueError: for labels outside [0, 1] or an unknown kind.
    """
    if ((labels < 0) | (labels > 1)).any():
        raise ValueError("labels must lie in [0, 1]; see bi_labels")
    if kind == "bce":
        return functional.binary_cross_entropy_with_logits(logits, labels)
    if kind == "mse":
        return functional.mse_loss(logits.sigmoid(), labels)
    raise ValueError(f"unknown loss '{kind}'; there are: bce, mse")


def bi_loss(
    first: Float[Tensor, "pairs width"],
    second: Float[Tensor, "pairs width"],
    labels: Float[Tensor, " pairs"],
) -> Float[Tensor, ""]:
    """Cross -> bi: mean squared difference of the cosine of two embeddings and the label."""
    return functional.mse_loss(functional.cosine_similarity(first, second, dim=-1), labels)


def label_entropy(labels: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """Mean entropy of soft labels in nats: the least value of the soft cross-entropy."""
    return (torch.special.entr(labels) + torch.special.entr(1 - labels)).mean()


def asymmetry(
    forward: Float[Tensor, " pairs"], backward: Float[Tensor, " pairs"]
) -> Float[Tensor, ""]:
    """Mean difference of a score when the texts change places, over its standard deviation."""
    return (forward - backward).abs().mean() / torch.cat([forward, backward]).std()


# The alternation ----------------------------------------------------------------------------------


@runtime_checkable  # tests check types at run time
class Student(Protocol):
    """One pretrained encoder in both forms. The four methods say how it labels and how it is trained.

    Training starts anew every cycle: a cross-encoder from the raw pretrained weights, a bi-encoder from
    the contrastively tuned ones, never from the model of the last cycle.
    """

    def label_with_bi(self, bi: nn.Module) -> Float[Tensor, " pairs"]:
        """`bi_labels` of all training pairs."""
        ...

    def train_cross(self, labels: Float[Tensor, " pairs"], cycle: int) -> nn.Module:
        """A cross-encoder trained on both orders of all pairs with `cross_loss`."""
        ...

    def label_with_cross(self, cross: nn.Module) -> Float[Tensor, " pairs"]:
        """`cross_labels` of all training pairs, in one order."""
        ...

    def train_bi(self, labels: Float[Tensor, " pairs"], cycle: int) -> nn.Module:
        """A bi-encoder trained on all pairs with `bi_loss`."""
        ...


@dataclass(frozen=True)
class Cycle:
    """The two models that one cycle made of one encoder, and the labels that each learnt from."""

    cross: nn.Module
    bi: nn.Module
    labels_for_cross: Float[Tensor, " pairs"]
    labels_for_bi: Float[Tensor, " pairs"]


def alternate(
    students: Sequence[Student], starts: Sequence[nn.Module], cycles: int
) -> list[list[Cycle]]:
    """Bi -> cross -> bi, `cycles` times (algorithm 1 of the paper; with several students, mutual).

    Args:
        students: one for self-distillation; several learn from the mean of their labels.
        starts: the contrastively tuned bi-encoder of each student.
        cycles: how many times to go round.

    Returns:
        For every student its cycles, first to last.

    Raises:
        ValueError: without students, when there is not one start for each, or for cycles < 1.
    """
    if not students or len(students) != len(starts):
        raise ValueError(
            f"one start for each student: got {len(students)} students, {len(starts)} starts"
        )
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got {cycles}")
    made: list[list[Cycle]] = [[] for _ in students]
    encoders = list(starts)
    for cycle in range(cycles):
        labelled = zip(students, encoders, strict=True)
        for_cross = mean_labels([student.label_with_bi(bi) for student, bi in labelled])
        crosses = [student.train_cross(for_cross, cycle) for student in students]
        labelled = zip(students, crosses, strict=True)
        for_bi = mean_labels([student.label_with_cross(cross) for student, cross in labelled])
        encoders = [student.train_bi(for_bi, cycle) for student in students]
        for own, cross, bi in zip(made, crosses, encoders, strict=True):
            own.append(Cycle(cross, bi, for_cross, for_bi))
    return made


def best_cycle(development: Sequence[float]) -> int:
    """Position of the cycle with the best score on the development pairs; the first of equals.

    Raises:
        ValueError: without any cycle.
    """
    if not development:
        raise ValueError("no cycle to choose from")
    return max(range(len(development)), key=development.__getitem__)
