"""Candidate lists of real paraphrases: a verse in modern wording, and verses in old wording to choose from.

The candidates are neighbours of the right verse, so they share its topic, names and style.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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


@dataclass(frozen=True)
class NestedLists:
    """One query's lists of growing length: each holds the documents of the shorter ones.

    Attributes:
        others: wrong documents in the order in which they are added.
        numbers: how many documents each list has, the right one among them.
        places: where the right document stands in each list.
    """

    query: str
    right: str
    others: tuple[str, ...]
    numbers: tuple[int, ...]
    places: tuple[int, ...]

    def at(self, number: int) -> VerseList:
        """The list of `number` documents: the right one takes the place of another, which goes first."""
        documents, place = (
            [self.right, *self.others[: number - 1]],
            self.places[self.numbers.index(number)],
        )
        documents[0], documents[place] = documents[place], documents[0]
        return VerseList(self.query, tuple(documents), place)


def nested_lists(
    count: int,
    numbers: Sequence[int],
    split: str,
    seed: int,
    encode: Callable[[Sequence[str]], Float[Tensor, "texts width"]],
    words: int = 6,
    pool: int = 2_400,
) -> tuple[list[NestedLists], Float[Tensor, "lists documents"]]:
    """Lists of hard wrong documents, and the encoder's cosines of each query with the right one and the others.

    Texts are beginnings of verses, as in `verse_lists`, that no other verse of either side has. The
    wrong documents of a query are those nearest to its right document under the encoder, out of `pool`
    of the same side of the split, and are added in random order, so that a longer list is harder for its
    length alone. In each list the right document has a place of its own, drawn evenly.

    Args:
        numbers: of documents, growing.
        encode: gives unit vectors.

    Raises:
        ValueError: when the side does not have as many verses that qualify.
    """
    rng = random.Random(f"nested lists {split} {seed}")
    verses = aligned_verses()
    beginnings = [tuple(_beginning(text, words) for text in verse) for verse in verses]
    counts = [Counter(texts) for texts in zip(*beginnings, strict=True)]
    order = [i for i in range(len(verses)) if split_of(f"stretch {i // STRETCH}") == split]
    rng.shuffle(order)
    alone = [
        beginnings[i]
        for i in order
        if None not in beginnings[i]
        and all(seen[text] == 1 for seen, text in zip(counts, beginnings[i], strict=True))
    ]
    found = dict(alone[:pool])
    if len(found) < max(count, numbers[-1]):
        raise ValueError(f"the {split} side has {len(found)} such texts, too few")
    documents = list(found)
    vectors = encode(documents)
    near = vectors[:count] @ vectors.T
    near[range(count), range(count)] = 2.0  # itself first
    chosen = near.topk(numbers[-1]).indices[:, 1:].tolist()
    queries = encode([found[text] for text in documents[:count]])
    lists, cosines = [], []
    for row, others in enumerate(chosen):
        rng.shuffle(others)
        places = tuple(rng.randrange(number) for number in numbers)
        texts = tuple(documents[i] for i in others)
        right = documents[row]
        lists.append(NestedLists(found[right], right, texts, tuple(numbers), places))
        cosines.append(vectors[[row, *others]] @ queries[row])
    return lists, torch.stack(cosines)


def _beginning(text: str, words: int) -> str | None:
    """The first words; None for a shorter text, whose length would give it away."""
    found = text.split()
    return " ".join(found[:words]) if len(found) >= words else None
