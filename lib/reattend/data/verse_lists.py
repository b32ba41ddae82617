"""Candidate lists of real paraphrases: a verse in modern wording, and verses in old wording to choose from.

The candidates are neighbours of the right verse, so they share its topic, names and style.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from reattend.data.bible import aligned_verses
from reattend.data.images import split_of

STRETCH = 480  # consecutive verses, about a book, on one side of the split together


@dataclass(frozen=True)
class VerseList:
    """A query with its candidate documents, one of which, `right`, says the same."""

    query: str
    documents: tuple[str, ...]
    right: int


def verse_lists(
    count: int, documents: int, split: str, seed: int, words: int = 12, window: int = 30
) -> list[VerseList]:
    """`count` lists with different queries from one side of the split.

    The query is the beginning of a World English verse, the documents are beginnings of King James verses
    from the `window` around it, in random order. All texts have `words` words, and no two documents are alike.

    Raises:
        ValueError: when the side does not have as many verses that qualify.
    """
    verses = aligned_verses()
    rng = random.Random(f"verse lists {split} {seed}")
    lists: list[VerseList] = []
    order = [i for i in range(len(verses)) if split_of(f"stretch {i // STRETCH}") == split]
    rng.shuffle(order)
    seen: set[str] = set()
    for i in order:
        if len(lists) == count:
            return lists
        start = max(i // STRETCH * STRETCH, i - window // 2)
        around = range(start, min((i // STRETCH + 1) * STRETCH, start + window + 1, len(verses)))
        query, right = (_beginning(text, words) for text in reversed(verses[i]))
        others = {_beginning(verses[j][0], words) for j in around if j != i} - {None, right}
        if query is None or right is None or query in seen or len(others) < documents - 1:
            continue
        seen.add(query)
        chosen = [right, *rng.sample(sorted(others), documents - 1)]
        rng.shuffle(chosen)
        lists.append(VerseList(query, tuple(chosen), chosen.index(right)))
    raise ValueError(f"the {split} side has {len(lists)} such lists; {count} are wanted")


def _beginning(text: str, words: int) -> str | None:
    """The first words; None for a shorter text, whose length would give it away."""
    found = text.split()
    return " ".join(found[:words]) if len(found) >= words else None
