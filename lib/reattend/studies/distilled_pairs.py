"""Students of pair tasks on frozen states of sentences and what they are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from reattend.backbones.pretrained import minilm
from reattend.backbones.trained.pair_teachers import SPLITS, TeacherTask
from reattend.data import glove
from reattend.text_matching import dse
from reattend.text_matching.dse import PairHead, Siamese, StoredSentences
from reattend.trunks.encoders import fine_tune, tokenise

EXCHANGED = "teacher exchanged"
"""The placebo among the arms; the other arms are values of alpha."""

Arm = float | str


class SentenceEncoder:
    """A cut of MiniLM: stores what its frozen layers say of sentences, and makes new students.

    Args:
        layers: first layers of MiniLM that are kept.
        trained, top: as in `reattend.text_matching.dse.Siamese`.
        length: most tokens of a sentence.
        projection: width of a student's linear layer on top of the pooling; 0: none.
        device: where everything lives.
    """

    def __init__(
        self,
        layers: int,
        *,
        trained: int,
        top: int,
        length: int,
        projection: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer, self.model = minilm.load(layers)
        self.model.to(device)
        self.shape = {"trained": trained, "top": top}
        self.length, self.projection, self.device = length, projection or None, device

    def store(self, sentences: Sequence[str]) -> StoredSentences:
        """What the frozen layers say of each sentence."""
        tokens = tokenise(self.tokenizer, sentences, length=self.length)
        ids, mask = tokens.ids.to(self.device), tokens.mask.to(self.device)
        return dse.store_frozen(self.model, ids, mask, **self.shape)

    def student(self, outputs: int) -> Siamese:
        """A new student, from the generic encoder and not the teacher."""
        made = Siamese(copy.deepcopy(self.model), outputs, **self.shape, projection=self.projection)
        return made.to(self.device)

    def untrained(self, stored: StoredSentences) -> Tensor:
        """u of every sentence before any training, without a projection."""
        bare = Siamese(self.model, 1, **self.shape).to(self.device)
        return bare.embed_all(stored)


class PairTask:
    """Pairs of one task as rows of stored sentences, with labels and the teacher's logits.

    The logits are divided by their standard deviation over the training pairs.

    Args:
        made: the pairs and the teacher's raw logits.
        sizes: most train, validation and test pairs.
        encoder: reads the sentences.
    """

    def __init__(self, made: TeacherTask, sizes: Sequence[int], encoder: SentenceEncoder) -> None:
        self.made, self.kind = made, made.kind
        sides = {
            side: [part[:limit] for part in made.of(side)]
            for side, limit in zip(SPLITS, sizes, strict=True)
        }
        both = chain.from_iterable(first + second for first, second, *_ in sides.values())
        self.sentences = list(dict.fromkeys(both))
        place = {text: row for row, text in enumerate(self.sentences)}
        self.rows, self.labels, self.teacher = {}, {}, {}
        for side, (first, second, targets, logits) in sides.items():
            pairs = [[place[text] for text in texts] for texts in (first, second)]
            self.rows[side] = torch.tensor(pairs, device=encoder.device)
            self.labels[side] = targets.to(encoder.device)
            self.teacher[side] = dse.teacher_targets(logits, self.kind).to(encoder.device)
        spread = self.teacher["train"].std()
        self.teacher = {side: logits / spread for side, logits in self.teacher.items()}
        self.outputs = self.teacher["test"].shape[1]
        self.stored = encoder.store(self.sentences)

    def decided(self, z: Float[Tensor, "pairs outputs"], side: str = "test") -> np.ndarray:
        """What a score is made of: whether each pair is right, or the predicted similarity [pairs]."""
        if self.kind == "regression":
            return z[:, 0].double().cpu().numpy()
        guess = (z[:, 0] > 0) if self.kind == "binary" else z.argmax(1)
        return (guess == self.labels[side]).double().cpu().numpy()

    def score(self, decided: np.ndarray, side: str = "test") -> np.ndarray:
        """Accuracy in %, or 100 x Pearson's r for regression.

        Args:
            decided: [pairs], or [pairs, seeds].

        Returns:
            one number for each seed.
        """
        x = decided.reshape(len(decided), -1)
        if self.kind != "regression":
            return 100 * x.mean(0)
        y = self.labels[side].double().cpu().numpy()
        x, y = x - x.mean(0), y - y.mean()
        return 100 * (y @ x) / np.sqrt((x**2).sum(0) * (y**2).sum() + 1e-12)

    def trivial(self, side: str = "test") -> float:
        """The score of an answer that is always the same: the largest class in %, 0 for regression."""
        if self.kind == "regression":
            return 0.0
        return 100 * self.labels[side].long().bincount().max().item() / len(self.labels[side])

    def by_threshold(self, embedded: Float[Tensor, "sentences width"]) -> dict[str, np.ndarray]:
        """`decided` on every side by the cosine of u and v alone.

        For classes a logistic model of the cosine and its square is fitted on the training pairs.
        """
        cosine = {
            side: functional.cosine_similarity(embedded[a], embedded[b]).double().cpu().numpy()
            for side, (a, b) in self.rows.items()
        }
        if self.kind == "regression":
            return cosine
        features = {side: np.stack([c, c**2], 1) for side, c in cosine.items()}
        labels = {side: y.cpu().numpy() for side, y in self.labels.items()}
        fitted = LogisticRegression(C=1e4).fit(features["train"], labels["train"])
        return {
            side: (fitted.predict(features[side]) == labels[side]).astype(float) for side in SPLITS
        }


@dataclass(frozen=True)
class TrainedPair:
    """A head and the embeddings it reads; `student` is None where these are no student's."""

    head: PairHead
    embedded: Float[Tensor, "sentences embedding"]
    student: Siamese | None = None

    @torch.no_grad()
    def logits(
        self, task: PairTask, side: str = "test", *, flip: bool = False
    ) -> Float[Tensor, "pairs outputs"]:
        """z of every pair of a side; `flip` exchanges the two sentences."""
        first, second = task.rows[side].flip(0) if flip else task.rows[side]
        return self.head(self.embedded[first], self.embedded[second])

    def score(self, task: PairTask, side: str = "test") -> float:
        """As `PairTask.score`, one number."""
        return task.score(task.decided(self.logits(task, side), side), side).item()


@dataclass(frozen=True)
class Fit:
    """How students and heads are trained: passes over the pairs, pairs in a batch."""

    epochs: float
    batch: int

    def train(
        self,
        task: PairTask,
        model: nn.Module,
        loss: Callable[[nn.Module, Tensor, Tensor, Int[Tensor, " batch"]], Tensor],
        rate: float,
        seed: int,
    ) -> None:
        """Train on the training pairs of a task; `loss(model, first rows, second rows, index)`."""
        first, second = task.rows["train"]

        def of_batch(model: nn.Module, index: Tensor) -> Tensor:
            index = index.to(first.device)
            return loss(model, first[index], second[index], index)

        fine_tune(
            model,
            len(first),
            of_batch,
            epochs=self.epochs,
            batch=self.batch,
            learning_rate=rate,
            seed=seed,
        )

    def student(
        self, encoder: SentenceEncoder, task: PairTask, arm: Arm, rate: float, seed: int
    ) -> TrainedPair:
        """A student of one arm: alpha, or the placebo with the teacher's logits exchanged."""
        torch.manual_seed(seed)
        labels, teacher = task.labels["train"], task.teacher["train"]
        alpha = 0.5 if arm == EXCHANGED else float(arm)
        if arm == EXCHANGED:
            teacher = dse.exchange_equal(teacher, labels, task.kind, seed)

        def loss(model: nn.Module, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
            z = model(task.stored[first], task.stored[second])
            return dse.dse_loss(z, labels[index], teacher[index], alpha, task.kind)

        student = encoder.student(task.outputs)
        self.train(task, student, loss, rate, seed)
        return TrainedPair(student.head, student.embed_all(task.stored), student)

    def head_on(
        self, means: Float[Tensor, "sentences width"], task: PairTask, rate: float, seed: int
    ) -> TrainedPair:
        """The same head on fixed embeddings, trained on labels."""
        torch.manual_seed(seed)
        labels = task.labels["train"]

        def loss(model: nn.Module, first: Tensor, second: Tensor, index: Tensor) -> Tensor:
            return dse.task_loss(model(means[first], means[second]), labels[index], task.kind)

        head = PairHead(means.shape[1], task.outputs).to(means.device)
        self.train(task, head, loss, rate, seed)
        return TrainedPair(head, means)


def best_rate(
    make: Callable[[float, int], TrainedPair], task: PairTask, rates: Sequence[float]
) -> tuple[float, TrainedPair]:
    """The learning rate with the best validation score for seed 0, and what it gave.

    Args:
        make: trains for a rate and a seed.
    """
    tried = {rate: make(rate, 0) for rate in rates}
    return max(tried.items(), key=lambda item: item[1].score(task, "validation"))


def glove_means(sentences: Sequence[str]) -> Float[Tensor, "sentences 50"]:
    """Mean of the GloVe vectors of a sentence's known words; zeros where none is known."""

    def words_of(text: str) -> list[str]:
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()

    words = sorted({word for text in sentences for word in words_of(text)})
    vectors, known = glove.vectors(words)
    table = {w: v for w, v, there in zip(words, vectors, known, strict=True) if there}
    nothing = torch.zeros(vectors.shape[1])
    return torch.stack(
        [
            torch.stack([table[w] for w in words_of(text) if w in table] or [nothing]).mean(0)
            for text in sentences
        ]
    )
