"""Text classifiers trained under perturbed attention: tasks, runs, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional

from reattend.attention.statistics import entropy
from reattend.data import glove, texts
from reattend.data.texts import TextSet
from reattend.data.word_tokens import words
from reattend.text_matching.attention_iat import (
    PAD,
    AttentionClassifier,
    Technique,
    Texts,
    adversarial,
    log_odds,
    nearest_words,
    normalised,
    pearson,
    random_perturbation,
    total_variation,
    training_loss,
    word_importance,
)
from reattend.training.loop import BestCheckpoint, TrainingPlan, train
from reattend.trunks.encoders import length_batches

SIDES = ("train", "validation", "test")
SPORTS = ["rec.sport.baseball", "rec.sport.hockey"]
SOURCES = {  # where from, most words of a text, whether longer ones are cut (or else left out)
    "reviews": (texts.movie_reviews, 24, False),
    "newsgroups": (lambda: texts.newsgroups(SPORTS), 24, True),
    "questions": (texts.trec_questions, 16, False),
    "spam": (texts.sms_spam, 24, True),
}
IMPORTANCE = {  # of a word: whether times the input, whether with attention held fixed
    "gradient": (False, False),
    "gradient x input": (True, False),
    "gradient, attention fixed": (False, True),
}
SHIFTS = ("adversarial", "random")


@dataclass(frozen=True)
class Task:
    """One classification task, ready for training.

    Attributes:
        sides: numbered texts of each side.
        vocabulary: word of each number; 0 is padding, 1 a word without a vector.
        table: word vectors, normalised by frequency in the training texts.
        neighbours: nearest words of each word.
        class_weights: of the loss, for two classes.
    """

    classes: tuple[str, ...]
    sides: dict[str, Texts]
    vocabulary: list[str]
    table: Float[Tensor, "words 50"]
    neighbours: Int[Tensor, "words near"]
    class_weights: Float[Tensor, " classes"] | None

    def points(self, targets: Int[Tensor, " texts"], predicted: Int[Tensor, " texts"]) -> float:
        """F1 of the second of two classes, else accuracy, in %."""
        if len(self.classes) == 2:
            return 100 * float(f1_score(targets, predicted, zero_division=0))
        return accuracy(targets, predicted)

    def linear_score(self) -> float:
        """Test score of a logistic regression on the mean word vector."""

        def means(side: Texts) -> np.ndarray:
            total = functional.embedding(side.first, self.table).sum(1)
            return (total / side.mask.sum(1, keepdim=True)).numpy()

        balanced = None if self.class_weights is None else "balanced"
        model = LogisticRegression(max_iter=2000, class_weight=balanced)
        model.fit(means(self.sides["train"]), self.sides["train"].targets.numpy())
        test = self.sides["test"]
        return self.points(test.targets, torch.from_numpy(model.predict(means(test))))


def accuracy(targets: Int[Tensor, " texts"], predicted: Int[Tensor, " texts"]) -> float:
    """Share of right answers, %."""
    return 100 * (predicted == targets).double().mean().item()


def numbered(
    lists: Sequence[Sequence[str]], number: Mapping[str, int]
) -> Int[Tensor, "texts length"]:
    """Token numbers of lists of words, PAD behind the shorter ones; 1 for a word without a vector."""
    longest = max(map(len, lists))
    rows = [[number.get(w, 1) for w in ws] + [PAD] * (longest - len(ws)) for ws in lists]
    return torch.tensor(rows)


def read_tasks(names: Sequence[str], counts: Mapping[str, int]) -> dict[str, Task]:
    """The tasks of `SOURCES` of these names, with at most `counts` texts of each side."""
    raw = {name: _read(name, counts) for name in names}
    lists = (ws for _, sides in raw.values() for found, _ in sides.values() for ws in found)
    every = sorted({w for ws in lists for w in ws})
    vectors, found = glove.vectors(every)
    known = {w: vector for w, vector, has in zip(every, vectors, found, strict=True) if has}
    return {name: _prepare(classes, sides, known) for name, (classes, sides) in raw.items()}


Side = tuple[list[list[str]], Tensor]
"""Words of each text, classes."""


def _read(name: str, counts: Mapping[str, int]) -> tuple[tuple[str, ...], dict[str, Side]]:
    source, longest, cut = SOURCES[name]
    data: TextSet = source()
    sides = {}
    for side, count in counts.items():
        found, labels = data.of(side)
        split = [words(text) for text in found]
        fit = [i for i, ws in enumerate(split) if len(ws) >= 3 and (cut or len(ws) <= longest)]
        sides[side] = ([split[i][:longest] for i in fit[:count]], labels[fit[:count]])
    return data.classes, sides


def _prepare(
    classes: tuple[str, ...], sides: Mapping[str, Side], known: Mapping[str, Tensor]
) -> Task:
    vocabulary = sorted(
        {w for lists, _ in sides.values() for ws in lists for w in ws if w in known}
    )
    number = {word: k + 2 for k, word in enumerate(vocabulary)}
    rows = torch.tensor([number[w] for ws in sides["train"][0] for w in ws if w in number])
    count = torch.bincount(rows, minlength=len(number) + 2)[2:].float()
    vectors = torch.stack([known[word] for word in vocabulary])
    table = torch.cat([torch.zeros(2, 50), normalised(vectors, count / count.sum())])
    numbers = {side: Texts(numbered(ws, number), targets) for side, (ws, targets) in sides.items()}
    share = torch.bincount(numbers["train"].targets, minlength=len(classes)) / len(numbers["train"])
    weights = 0.5 / share if len(classes) == 2 else None
    return Task(classes, numbers, ["", "?", *vocabulary], table, nearest_words(table, 5), weights)


@dataclass(frozen=True)
class Run:
    """A trained model with its scores, in %; `accuracy` is the test accuracy."""

    model: AttentionClassifier
    validation: float
    test: float
    accuracy: float


@dataclass
class Trainer:
    """Trains one technique on one task with one seed; the same training is done once.

    A seed fixes initial weights, the order of the batches and random perturbations, so that techniques
    are paired by seed. The state with the best validation score, asked `checks` times at equal
    distances, is kept; asked once, that is the last state.

    Attributes:
        tasks: by name.
        rates: learning rate by task.
    """

    tasks: Mapping[str, Task]
    hidden: int
    trainable: bool
    steps: int
    batch: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rates: dict[str, float] = field(default_factory=dict)
    _done: dict[tuple, Run] = field(default_factory=dict)

    def run(
        self, name: str, technique: Technique, seed: int, rate: float | None = None, checks: int = 3
    ) -> Run:
        """The trained model; `rate` is that of the task unless given."""
        rate = self.rates[name] if rate is None else rate
        if technique.place == "nothing":
            technique = Technique()  # whatever its size
        key = (name, technique, seed, rate, checks)
        if key not in self._done:
            self._done[key] = self._train(*key)
        return self._done[key]

    def _train(self, name: str, technique: Technique, seed: int, rate: float, checks: int) -> Run:
        task = self.tasks[name]
        torch.manual_seed(seed)
        model = AttentionClassifier(
            task.table, self.hidden, len(task.classes), False, self.trainable, task.neighbours
        ).to(self.device)
        noise = torch.Generator(self.device).manual_seed(seed)
        weights = None if task.class_weights is None else task.class_weights.to(self.device)
        best = BestCheckpoint(lambda m: task.points(*self._answers(m, task.sides["validation"])))
        train(
            model,
            self._batches(task, seed),
            lambda model, batch: training_loss(model, batch, technique, weights, noise),
            TrainingPlan(self.steps, rate, weight_decay=1e-5, clip=float("inf")),
            stop=best,
            check_every=self.steps // checks,
        )
        best.restore(model)
        answers = self._answers(model, task.sides["test"])
        return Run(model, best.best, task.points(*answers), accuracy(*answers))

    def _batches(self, task: Task, seed: int) -> Iterator[Texts]:
        side = task.sides["train"]
        for rows in length_batches(side.mask.sum(1), self.batch, 1_000 + seed):
            yield side.take(rows).to(self.device)

    @torch.no_grad()
    def _answers(self, model: AttentionClassifier, side: Texts) -> tuple[Tensor, Tensor]:
        """Targets and predicted classes of a side."""
        parts = torch.arange(len(side)).split(512)
        found = [model(side.take(rows).to(self.device))[0].argmax(-1).cpu() for rows in parts]
        return side.targets, torch.cat(found)


# Measurements -------------------------------------------------------------------------------------


def importance(
    model: AttentionClassifier, probe: Texts, *, times_input: bool = False, fixed: bool = False
) -> Float[Tensor, "texts length"]:
    """Size of the gradient of the log-odds of the predicted class at every word.

    Args:
        times_input: of gradient times input instead.
        fixed: with the attention weights held fixed.
    """

    def output(embedded: Tensor) -> Tensor:
        return log_odds(model.read(model.encode(probe, embedded), fixed=fixed)[0])

    return word_importance(output, model.embed(probe), times_input)


def shift(model: AttentionClassifier, probe: Texts, kind: str, size: float, seed: int) -> float:
    """Total variation between predictions with and without perturbed scores, mean over texts.

    Args:
        kind: "adversarial" (it knows the label) or "random".
        size: epsilon.
        seed: of the random one.
    """
    with torch.no_grad():
        encoded = model.encode(probe, model.embed(probe))
    if kind == "random":
        noise = torch.Generator(probe.first.device).manual_seed(seed)
        r = random_perturbation(probe.mask, size, noise)
    else:
        zero = torch.zeros_like(encoded.scores, requires_grad=True)
        logits = model.read(encoded, zero)[0]
        loss = functional.cross_entropy(logits, probe.targets, reduction="sum")
        r = adversarial(torch.autograd.grad(loss, zero)[0], size)
    with torch.no_grad():
        before, after = (model.read(encoded, x)[0].softmax(-1) for x in (None, r))
    return total_variation(before, after).mean().item()


def measure(
    model: AttentionClassifier, probe: Texts, sizes: Sequence[float], seed: int
) -> dict[str, float]:
    """Agreement of attention and importance, entropy in nats, shifts; means over texts.

    Args:
        probe: the texts.
        sizes: epsilon of the perturbations of the trained model.
        seed: of the random ones.
    """
    with torch.no_grad():
        weights = model(probe)[1]
    found = {"entropy": entropy(weights).mean().item()}
    for name, (times_input, fixed) in IMPORTANCE.items():
        how = importance(model, probe, times_input=times_input, fixed=fixed)
        agreement = pearson(weights, how, probe.mask)
        found[f"correlation, {name}"] = agreement.nanmean().item()
    for kind in SHIFTS:
        for size in sizes:
            found[f"shift, {kind}, {size:g}"] = shift(model, probe, kind, size, seed)
    return found
