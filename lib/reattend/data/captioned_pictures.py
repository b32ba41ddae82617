"""Real pictures with English captions: Tux Paint stamps, Open Clip Art, emoji of two vendors.

Stamps have captions, clip-art has titles, emoji have their Unicode names. A title of the clip-art counts as
a caption when the keywords or folders that its author filed it under share a word with it (this leaves out
Italian titles and those of whole series), and when at most eight pictures have it.

The split is drawn by *concept*: pictures of one emoji (whoever draws it), pictures whose captions have the
same words, and pictures that are the same pixel by pixel have one concept, and a concept lies on one side.
So no caption of a test picture is seen in training; single words of it may be. Of one in five emoji on the
training side one vendor's drawing is held out as well (split "vendor"): the caption has been seen and so has
the vendor's style, this drawing has not.
"""

from __future__ import annotations

import hashlib
import html
import re
import struct
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from reattend.assets.store import asset_path
from reattend.data.images import VENDORS, emoji, split_of, stamps

SPLITS = ("train", "validation", "test", "vendor")
SOURCES = ("stamp", "clip-art", *VENDORS)
CLIP_ART = "usr/share/openclipart"
HELD_OUT_EMOJI = 0.2  # share of the emoji on the training side of which one drawing is held out
MOST_OF_A_TITLE = 8  # pictures; more share the title of a series
MOST_PIXELS = 4_000_000  # of a clip-art picture; the largest has 600 million
# Playing cards, pieces of puzzles and numbered stick men have the titles of their series alone.
SERIES = ("recreation/games/cards", "recreation/games/jigsaw", "people/stickmen")
LITTLE = frozenset(
    {"a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"}
)


@dataclass(frozen=True)
class CaptionedPictures:
    """Square pictures on white, with what they show.

    Attributes:
        pixels: colours, 0..255, composited on white.
        alpha: opacity of the object in each pixel, 0..255.
        captions: an English phrase for each picture, lower case, words only; several pictures may share one.
        concepts: what a picture shows; all pictures of a concept are on one side of the split.
        sources: "stamp", "clip-art", "google" or "twitter" for each picture.
        splits: "train", "validation", "test" or "vendor" for each picture.
    """

    pixels: UInt8[Tensor, "pictures 3 size size"]
    alpha: UInt8[Tensor, "pictures size size"]
    captions: tuple[str, ...]
    concepts: tuple[str, ...]
    sources: tuple[str, ...]
    splits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def indices(self, split: str) -> Int[Tensor, " chosen"]:
        """Positions of the pictures of one split.

        Raises:
            ValueError: for an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split '{split}'; there are: {', '.join(SPLITS)}")
        return torch.tensor([i for i, s in enumerate(self.splits) if s == split], dtype=torch.long)


def captioned_pictures(size: int = 112, limit: int | None = None) -> CaptionedPictures:
    """About 5,300 pictures with 3,100 captions: stamps, clip-art, emoji of one vendor, then of the other.

    Args:
        size: side of the pictures in pixels.
        limit: keep only the first `limit` pictures of each class of stamps and emoji and of each top folder
            of the clip-art, for small runs.
    """
    cut_outs, faces = stamps(size, limit=limit), emoji(size, limit)
    titles = clip_art_titles(limit)
    folder = asset_path("clip_art") / CLIP_ART / "png"
    drawn = np.stack([read_picture(folder / f"{name}.png", size) for name in titles])
    drawn = torch.from_numpy(drawn).permute(0, 3, 1, 2)
    things = [f"stamp {name}" for name in cut_outs.identities]
    things += [f"clip-art {name}" for name in titles]
    things += [f"emoji {name}" for name in faces.identities]
    # `emoji` lists all drawings of one vendor, then those of the other, of the same emoji.
    of_each_vendor = len(faces) // len(VENDORS)
    sources = ["stamp"] * len(cut_outs) + ["clip-art"] * len(titles)
    sources += [vendor for vendor in VENDORS for _ in range(of_each_vendor)]
    pixels = torch.cat([cut_outs.pixels, drawn[:, :3], faces.pixels])
    alpha = torch.cat([cut_outs.alpha, drawn[:, 3], faces.alpha])
    captions = [plain_words(t) for t in (*cut_outs.captions, *titles.values(), *faces.captions)]
    # What is white on white shows nothing.
    shown = (pixels != 255).flatten(1).any(1).nonzero()[:, 0]
    pixels, alpha = pixels[shown], alpha[shown]
    captions, things, sources = (
        [values[i] for i in shown.tolist()] for values in (captions, things, sources)
    )
    concepts = concepts_of(captions, things, [picture.numpy().tobytes() for picture in pixels])
    splits = tuple(map(_split, concepts, sources))
    return CaptionedPictures(pixels, alpha, tuple(captions), concepts, tuple(sources), splits)


def plain_words(text: str) -> str:
    """A caption in lower case with nothing but words: "Lemon_(Whole) 2" becomes "lemon whole"."""
    return " ".join(re.findall(r"[^\W\d_]+", re.sub(r"(?<=\w)['’]s?\b", "", text.lower())))


def concepts_of(captions: Sequence[str], *others: Sequence[Hashable]) -> tuple[str, ...]:
    """The concept of each picture: pictures that share a thing have one concept.

    It is named by the first of its captions in the alphabet.

    Args:
        captions: of each picture; captions of the same words in any order are one thing.
        others: further things of each picture, such as its emoji or all its pixels.
    """
    leader: dict[Hashable, Hashable] = {}

    def find(thing: Hashable) -> Hashable:
        while leader.setdefault(thing, thing) != thing:
            thing = leader[thing]
        return thing

    words = [tuple(sorted(caption.split())) for caption in captions]
    for kind, things in enumerate(others):
        for own, thing in zip(words, things, strict=True):
            leader[find((kind, thing))] = find(own)
    names: dict[Hashable, str] = {}
    for caption, own in zip(captions, words, strict=True):
        names[find(own)] = min(names.get(find(own), caption), caption)
    return tuple(names[find(own)] for own in words)


def _split(concept: str, source: str) -> str:
    """The side of a concept, or "vendor" for the drawing that is held out of an emoji on the training side."""
    side = split_of(concept)
    number = hashlib.sha256(f"drawing of {concept}".encode()).digest()[0] % 10
    held_out = number < len(VENDORS) and VENDORS[number] == source
    return "vendor" if side == "train" and held_out else side


# Open Clip Art ----------------------------------------------------------------------------------------


def clip_art_titles(limit: int | None = None) -> dict[str, str]:
    """Title of each picture that has one fit to be a caption, by its path without ending.

    Args:
        limit: keep only the first `limit` pictures of each top folder.
    """
    pictures = asset_path("clip_art") / CLIP_ART / "png"
    drawings = asset_path("clip_art_titles") / CLIP_ART / "svg"
    paths = (path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))
    names = sorted(path.removesuffix(".png") for path in paths)
    found = {name: _title(drawings / f"{name}.svg") for name in names}
    often = Counter(plain_words(title) for title, _ in found.values())
    kept: dict[str, dict[str, str]] = {}
    for name, (title, keywords) in found.items():
        folder, filed_under = name.split("/")[0], [*keywords, *name.split("/")[:-1]]
        if (
            not name.startswith(SERIES)
            and often[plain_words(title)] <= MOST_OF_A_TITLE
            and says_what_it_shows(title, filed_under)
            and _pixels(pictures / f"{name}.png") <= MOST_PIXELS
            and len(kept.setdefault(folder, {})) != limit
        ):
            kept[folder][name] = title
    return {name: title for titles in kept.values() for name, title in titles.items()}


def _title(path: Path) -> tuple[str, list[str]]:
    """Title and keywords of a drawing, both empty where it has none."""
    if not path.exists():
        return "", []
    # Not all of these files are XML that a parser takes; the facts stand in their heads.
    text = path.read_text(encoding="utf8", errors="replace")
    title = re.search(r"<dc:title[^>]*>([^<]*)<", text)
    keywords = re.findall(r"<rdf:li[^>]*>([^<]*)<", text)
    return (html.unescape(title.group(1)) if title else ""), [html.unescape(k) for k in keywords]


def says_what_it_shows(title: str, filed_under: Iterable[str]) -> bool:
    """Whether a title and what the picture is filed under share a word (in singular or plural)."""
    telling = set(plain_words(title).split()) - LITTLE
    known = {word for text in filed_under for word in plain_words(text).split()}
    return bool({word.rstrip("s") for word in telling} & {word.rstrip("s") for word in known})


def _pixels(path: Path) -> int:
    """Width times height of a PNG, from its head alone."""
    with path.open("rb") as stream:
        width, height = struct.unpack(">II", stream.read(24)[16:])
    return width * height


def read_picture(path: Path, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """A picture padded to a square: colours on white, and the opacity."""
    with Image.open(path) as opened:
        shown = ImageOps.pad(
            opened.convert("RGBA"),
            (size, size),
            Image.Resampling.BILINEAR,
            color=(255, 255, 255, 0),
        )
    white = Image.new("RGBA", shown.size, (255, 255, 255, 255))
    on_white = np.array(Image.alpha_composite(white, shown))
    on_white[..., 3] = np.asarray(shown)[..., 3]
    return on_white
