"""Retrieval sets of real texts: queries, one right document each, and near misses of that document."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

from reattend.data.images import split_of
from reattend.data.wordnet import nouns


@dataclass(frozen=True)
class RetrievalSet:
    """Queries of one side of a split; `documents[i]` is the only right answer to `queries[i]`.

    Attributes:
        siblings: documents that are easily taken for it, empty where there are none; never a right
            answer of another query of the set, on whichever side.
    """

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    siblings: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.queries)


def word_glosses(split: str, count: int | None = None, longest: int = 16) -> RetrievalSet:
    """Find the definition of a noun, in WordNet: nouns of one sense, in lower case, mixed.

    A noun with several senses has several right definitions, and names ask for memory: both are left
    out, as are definitions that two nouns share. The hash of a sense decides the side of the split, as in
    `reattend.data.pairs`. The siblings of a sense have the same sense above them; their definitions serve
    as negatives where their nouns are in no set (because they have several senses, or are names).

    Args:
        split: "train", "validation" or "test".
        count: most queries; the first of a larger count are those of a smaller one.
        longest: most words in a definition; three at least.

    Raises:
        ValueError: for a split without queries.
    """
    known, askable = nouns(), _askable(longest)
    chosen = [n for n in sorted(askable) if split_of(f"synset {n}") == split]
    if not chosen:
        raise ValueError(f"no query is in the split '{split}': take train, validation or test")
    random.Random(0).shuffle(chosen)
    chosen = chosen[:count]

    def siblings(number: int) -> tuple[str, ...]:
        beside = {c for parent in known[number].hypernyms for c in known.children[parent]}
        return tuple(known[n].definition for n in sorted(beside - askable))

    return RetrievalSet(
        tuple(known[n].words[0] for n in chosen),
        tuple(known[n].definition for n in chosen),
        tuple(siblings(n) for n in chosen),
    )


@cache
def _askable(longest: int) -> frozenset[int]:
    """Senses whose first word is a query; definitions have 3 to `longest` words."""
    known = nouns()
    senses = Counter(word.lower() for synset in known.synsets.values() for word in synset.words)
    meant = Counter(synset.definition for synset in known.synsets.values())

    def fits(word: str, definition: str) -> bool:
        plain = word.replace(" ", "").isalpha() and word == word.lower() and senses[word] == 1
        return plain and meant[definition] == 1 and 3 <= len(definition.split()) <= longest

    return frozenset(n for n, s in known.synsets.items() if fits(s.words[0], s.definition))
