"""Multi-query associative recall: the synthetic task of Zoology (arXiv 2312.04927, section 4).

A row starts with key-value pairs, `k1 v1 k2 v2 ...`; later each key is asked once more, and the
model must name its value at that position. Earlier tests of recall asked one query over a small
vocabulary; language asks many, at varying distances, over a large one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

FILLER = 0
IGNORED = -100


@dataclass(frozen=True)
class RecallTask:
    """Shape of one task: `pairs` key-value pairs in rows of `length` tokens.

    Keys are tokens 1 .. vocabulary/2 - 1, values vocabulary/2 .. vocabulary - 1, filler is 0.
    `power` is the exponent a of the gaps: p(gap g) proportional to a (g + 1)^(a - 1).
    `queries` of the pairs are asked; None asks all of them.
    Raises ValueError when the pairs do not fit.
    """

    vocabulary: int
    length: int
    pairs: int
    queries: int | None = None
    power: float = 0.01

    def __post_init__(self):
        asked = self.pairs if self.queries is None else self.queries
        needed = 2 * (self.pairs + asked)
        if needed > self.length:
            raise ValueError(
                f"{self.pairs} pairs and {asked} queries need {needed} tokens > {self.length}"
            )
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(f"{self.pairs} distinct keys from a vocabulary of {self.vocabulary}")
        if self.queries is not None and not 1 <= self.queries <= self.pairs:
            raise ValueError(f"{self.queries} queries for {self.pairs} pairs")

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the values."""
        return 1 / (self.vocabulary - self.vocabulary // 2)


def draw_without_replacement(
    weights: Float[Tensor, " items"], rows: int, count: int, generator: Generator
) -> Int[Tensor, "rows count"]:
    """For each row, `count` distinct indices, in the order of successive weighted draws.

    An exponential race: item i arrives at time E_i / w_i with E_i ~ Exp(1). The first arrivals are
    distributed exactly as successive draws without replacement with probabilities ~ w.
    """
    arrivals = torch.empty(rows, len(weights), dtype=torch.float64).exponential_(
        generator=generator
    )
    return (arrivals / weights).topk(count, largest=False, sorted=True).indices


def recall_batch(
    task: RecallTask, rows: int, generator: Generator
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Fresh examples: tokens, and labels that sit on the position of the query.

    Labels are -100 (ignored) everywhere else. The value itself does not follow the query.
    """
    half, pairs = task.vocabulary // 2, task.pairs
    queries = pairs if task.queries is None else task.queries
    keys = 1 + draw_without_replacement(torch.ones(half - 1), rows, pairs, generator)
    values = half + draw_without_replacement(
        torch.ones(task.vocabulary - half), rows, pairs, generator
    )

    tokens = torch.full((rows, task.length), FILLER)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values

    slots = (task.length - 2 * pairs) // 2
    weights = task.power * (torch.arange(slots, dtype=torch.float64) + 1) ** (task.power - 1)
    gaps = draw_without_replacement(weights, rows, queries, generator)
    asked = 2 * pairs + 2 * gaps
    if task.queries is None:  # as published: the i-th pair is asked at the i-th gap drawn
        which = torch.arange(pairs).expand(rows, pairs)
    else:
        which = draw_without_replacement(torch.ones(pairs), rows, queries, generator)
    tokens.scatter_(1, asked, keys.gather(1, which))
    labels = torch.full((rows, task.length), IGNORED)
    labels.scatter_(1, asked, values.gather(1, which))
    return tokens, labels


def recall_accuracy(
    predictions: Int[Tensor, "rows length"], labels: Int[Tensor, "rows length"]
) -> Float[Tensor, " rows"]:
    """Share of the asked keys answered rightly, for each row."""
    asked = labels != IGNORED
    right = (predictions == labels) & asked
    return right.sum(1).double() / asked.sum(1)
