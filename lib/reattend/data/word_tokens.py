"""Word-level tokens of real prose, with rare words anonymised anew in every row.

A small model cannot learn tens of thousands of words, and a word that is merely unknown cannot be
recalled. So rare words become symbols `<0>`, `<1>`, ... drawn at random for each row, the same
symbol for the same word within the row, as entities were anonymised by Hermann et al. (2015,
arXiv 1506.03340): what a symbol stands for can be read in the row and nowhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Generator, Tensor

UNKNOWN, END = 0, 1
SPECIAL = ("<unknown>", "<end>")


def words(text: str) -> list[str]:
    """Lower-case words, numbers and punctuation marks, in order."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


class Vocabulary:
    """All words of some texts, the most frequent first; any other word is token 0, UNKNOWN.

    Token 1, END, closes a document. Ties of frequency are broken alphabetically.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts = Counter(word for text in texts for word in words(text))
        self.entries = [*SPECIAL, *sorted(counts, key=lambda word: (-counts[word], word))]
        self._tokens = {word: token for token, word in enumerate(self.entries)}

    def __len__(self) -> int:
        return len(self.entries)

    def encode(self, text: str) -> Int[Tensor, " tokens"]:
        """Tokens of a text, without END."""
        return torch.tensor([self._tokens.get(w, UNKNOWN) for w in words(text)], dtype=torch.long)

    def decode(self, tokens: Int[Tensor, " tokens"]) -> list[str]:
        """The word of each token."""
        return [self.entries[token] for token in tokens.tolist()]


@runtime_checkable
class Tokenizer(Protocol):
    """Anything that turns a text into tokens, with token 1, END, left free to close a document."""

    def encode(self, text: str) -> Int[Tensor, " tokens"]:
        """Tokens of a text, without END."""


def token_stream(texts: Iterable[str], tokenizer: Tokenizer) -> Int[Tensor, " tokens"]:
    """All texts in one row, END after each."""
    end = torch.tensor([END])
    return torch.cat([part for text in texts for part in (tokenizer.encode(text), end)])


def random_windows(
    stream: Int[Tensor, " tokens"], rows: int, length: int, generator: Generator
) -> Iterator[Int[Tensor, "rows length"]]:
    """Endless batches of windows that start anywhere in the stream; documents may meet in one.

    Raises ValueError when the stream is shorter than a window.
    """
    if len(stream) < length:
        raise ValueError(f"a stream of {len(stream)} tokens has no window of {length}")
    within = torch.arange(length)
    while True:
        starts = torch.randint(len(stream) - length + 1, (rows, 1), generator=generator)
        yield stream[starts + within]


def document_rows(
    texts: Iterable[str], tokenizer: Tokenizer, length: int
) -> Int[Tensor, "documents length"]:
    """The first `length` tokens of every text that has as many; one row per document.

    Raises ValueError when no text is long enough.
    """
    encoded = [tokenizer.encode(text) for text in texts]
    rows = [tokens[:length] for tokens in encoded if len(tokens) >= length]
    if not rows:
        raise ValueError(f"no text has {length} tokens")
    return torch.stack(rows)


def anonymise(
    rows: Int[Tensor, "rows length"], common: int, symbols: int, generator: Generator
) -> Int[Tensor, "rows length"]:
    """Keep tokens below `common`; each rarer one becomes one of `symbols` symbols of its row.

    The result lies in 0 .. common + symbols - 1. Within a row, equal tokens stay equal and different
    ones stay different; where a row has more rare words than there are symbols, those left over
    become UNKNOWN.
    """
    out = rows.clone()
    for row in out:
        rare = row >= common
        kinds, which = row[rare].unique(return_inverse=True)
        pool = torch.full((max(len(kinds), symbols),), UNKNOWN)
        pool[:symbols] = common + torch.randperm(symbols, generator=generator)
        row[rare] = pool[torch.randperm(len(pool), generator=generator)][which]
    return out
