"""Two English translations of the Bible, verse by verse: real paraphrases, aligned by their number.

The texts come in the SWORD project's compressed format: per testament an index of verses (book's block,
start and size, ten bytes each), an index of blocks, and the zlib blocks, one a book. The two modules
count the verses of some books differently; those books are left out.
"""

from __future__ import annotations

import re
import zlib
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

import numpy as np

from reattend.assets.store import asset_path

MODULES = "usr/share/sword/modules/texts/ztext"
_VERSE = np.dtype([("block", "<u4"), ("start", "<u4"), ("size", "<u2")])
_BLOCK = np.dtype([("start", "<u4"), ("packed", "<u4"), ("size", "<u4")])


@cache
def aligned_verses() -> tuple[tuple[str, str], ...]:
    """(King James, World English) wording of each verse, in order, of the books that agree."""
    pairs: list[tuple[str, str]] = []
    for testament in ("ot", "nt"):
        archaic = _books(asset_path("bible_kjv") / MODULES / "engKJV2006eb", testament)
        modern = _books(asset_path("bible_web") / MODULES / "engWEB2015eb", testament)
        # Books are in the same order, but one module has books between that the other has not.
        counts = SequenceMatcher(None, [*map(len, archaic)], [*map(len, modern)], autojunk=False)
        for first, second, size in counts.get_matching_blocks():
            for a, b in zip(
                archaic[first : first + size], modern[second : second + size], strict=True
            ):
                pairs += [pair for pair in zip(a, b, strict=True) if all(map(_is_verse, pair))]
    return tuple(pairs)


def _is_verse(text: str) -> bool:
    """Not empty, and without a book's glossary behind it (the longest verse has 90 words)."""
    return 0 < len(text.split()) <= 100


def _books(folder: Path, testament: str) -> list[list[str]]:
    """The verses of each book, without markup; entries without text (headings) left out."""
    verses = np.frombuffer((folder / f"{testament}.bzv").read_bytes(), _VERSE)
    blocks = np.frombuffer((folder / f"{testament}.bzs").read_bytes(), _BLOCK)
    packed = (folder / f"{testament}.bzz").read_bytes()
    books = []
    for number, block in enumerate(blocks):
        text = zlib.decompress(packed[block["start"] : block["start"] + block["packed"]])
        entries = verses[(verses["block"] == number) & (verses["size"] > 0)]
        raw = [text[e["start"] : e["start"] + e["size"]].decode("utf8", "replace") for e in entries]
        books.append([plain(verse) for verse in raw])
    return [book for book in books if len(book) > 1]


def plain(markup: str) -> str:
    """The words of a verse: footnotes, titles, tags and paragraph signs taken out."""
    text = re.sub(r"<(note|title)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>|¶", "", text)
    return re.sub(r"\s+", " ", text).strip()


def twice_told(length: int) -> list[str]:
    """Passages of at least `length` words in which every verse comes twice: King James, then World English.

    Consecutive verses, so a passage may run from one chapter or book into the next. What the second wording
    says can be read in the first.
    """
    passages: list[str] = []
    verses: list[str] = []
    words = 0
    for pair in aligned_verses():
        verses.extend(pair)
        words += sum(len(text.split()) for text in pair)
        if words >= length:
            passages.append(" ".join(verses))
            verses, words = [], 0
    return passages
