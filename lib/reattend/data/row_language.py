"""The row language: each row is a walk over a table of its own, so that prediction is look-up.

Every row draws, for each token of the vocabulary, the tokens that may follow it, and walks on this
table. Nothing is to be learned about the tokens; what follows one can only be read where it stood
before in the same row. So attention matters, and a model that mixes no tokens stays near chance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor


@dataclass(frozen=True)
class RowLanguage:
    """Rows of `length` tokens over a vocabulary.

    Args:
        chances: probabilities of a token's successors, which are distinct. Several kinds, each with its own
            number of successors, are dealt to the tokens in turn: token t is of kind t modulo kinds.

    Raises:
        ValueError: when chances do not sum to one, or a token has more successors than there are tokens.
    """

    vocabulary: int = 32
    length: int = 128
    chances: Sequence[Sequence[float]] = ((0.8, 0.15, 0.05),)

    def __post_init__(self):
        for kind in self.chances:
            if abs(sum(kind) - 1) > 1e-6 or min(kind) < 0:
                raise ValueError(f"chances must be probabilities that sum to 1, got {kind}")
            if len(kind) > self.vocabulary:
                raise ValueError(f"{len(kind)} successors from a vocabulary of {self.vocabulary}")

    @property
    def transitions(self) -> Float[Tensor, "vocabulary most"]:
        """The chances of each token's successors, zero where it has fewer than the most."""
        kinds = torch.zeros(len(self.chances), max(map(len, self.chances)))
        for row, chances in zip(kinds, self.chances, strict=True):
            row[: len(chances)] = torch.tensor(chances)
        return kinds[torch.arange(self.vocabulary) % len(kinds)]

    def tables(self, rows: int, generator: Generator) -> Int[Tensor, "rows vocabulary most"]:
        """Random successors of every token, for each row."""
        most = max(map(len, self.chances))
        order = torch.rand(rows, self.vocabulary, self.vocabulary, generator=generator)
        return order.topk(most, dim=-1).indices

    def walk(
        self, tables: Int[Tensor, "rows vocabulary most"], generator: Generator
    ) -> Int[Tensor, "rows length"]:
        """A walk over each table from a random token."""
        rows, index = len(tables), torch.arange(len(tables))
        limits = self.transitions.cumsum(-1)
        limits[:, -1] = 1.0  # whatever the sum rounds to
        draws = torch.rand(self.length, rows, generator=generator)
        tokens = [torch.randint(self.vocabulary, (rows,), generator=generator)]
        for draw in draws[1:]:
            here = tokens[-1]
            chosen = torch.searchsorted(limits[here], draw[:, None], right=True)[:, 0]
            tokens.append(tables[index, here, chosen])
        return torch.stack(tokens, dim=1)

    def draw(self, rows: int, seed: int) -> Int[Tensor, "rows length"]:
        """Rows, each on a table of its own."""
        generator = Generator().manual_seed(seed)
        return self.walk(self.tables(rows, generator), generator)

    def draw_fixed(self, rows: int, table_seed: int, seed: int) -> Int[Tensor, "rows length"]:
        """Rows that all walk on one table, which a model can learn by heart."""
        table = self.tables(1, Generator().manual_seed(table_seed))
        return self.walk(table.expand(rows, -1, -1), Generator().manual_seed(seed))

    @property
    def entropy(self) -> float:
        """Nats of a prediction that knows the table, for tokens equally often."""
        return torch.special.entr(self.transitions).sum(-1).mean().item()


def fresh_rows(
    language: RowLanguage, batch: int, seed: int, drawn: int = 1024
) -> Iterator[Int[Tensor, "batch length"]]:
    """Batches of rows that never come again; `drawn` rows are made at a time."""
    for part in count((seed + 1) * 10**6):
        yield from language.draw(drawn // batch * batch, part).split(batch)


def counts_nats(
    tokens: Int[Tensor, "rows length"], vocabulary: int, smoothing: float
) -> Float[Tensor, "rows predictions"]:
    """What counting in the row achieves: -log of the smoothed share of each next token.

    Token t + 1 is predicted by how often it followed token t earlier in the row; `smoothing` is added to
    each count. Column t is the prediction of token t + 1, for t from 0.
    """
    here, following = tokens[:, :-1], tokens[:, 1:]
    earlier = torch.ones(2 * here.shape[1:], dtype=torch.bool).tril(-1)
    same = (here[:, :, None] == here[:, None]) & earlier
    hits = (same & (following[:, :, None] == following[:, None])).sum(-1)
    return -((hits + smoothing) / (same.sum(-1) + smoothing * vocabulary)).log()


def best_counts_nats(tokens: Int[Tensor, "rows length"], vocabulary: int) -> float:
    """Mean nats of `counts_nats` over the second half of the rows, at the best of a grid of smoothings."""
    half = tokens.shape[1] // 2
    grid = [2.0**-k for k in range(2, 9)]
    return min(counts_nats(tokens, vocabulary, s)[:, half:].mean().item() for s in grid)
