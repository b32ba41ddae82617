"""Real labelled pictures: Tux Paint stamps, emoji of two vendors, Fashion-MNIST.

Every set comes with one stable split into training, validation and test items. The split is drawn
by the *identity* of a picture (its stamp, its emoji), so that two drawings of one thing never lie on
both sides of it: an item's side is a hash of its identity and changes with nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from reattend.assets.store import asset_path

SPLITS = ("train", "validation", "test")
_SHARES = (0.60, 0.75)  # up to 0.60 training, up to 0.75 validation, the rest test

STAMPS = "usr/share/tuxpaint/stamps"
FASHION = "usr/share/datasets/fashion-mnist"
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
VENDORS = ("google", "twitter")


@dataclass(frozen=True)
class ImageSet:
    """Square pictures on white with their object masks, labels and split.

    Attributes:
        pixels: colours, 0..255, composited on white.
        alpha: opacity of the object in each pixel, 0..255; all 255 where a set has no masks.
        labels: class number of each picture.
        classes: names of the classes.
        identities: what a picture shows; pictures of one identity are on one side of the split.
        splits: "train", "validation" or "test" for each picture.
        captions: an English phrase for each picture.
    """

    pixels: UInt8[Tensor, "items 3 size size"]
    alpha: UInt8[Tensor, "items size size"]
    labels: Int[Tensor, " items"]
    classes: tuple[str, ...]
    identities: tuple[str, ...]
    splits: tuple[str, ...]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def indices(self, split: str) -> Int[Tensor, " chosen"]:
        """Positions of the pictures of one split.

        Raises:
            ValueError: for an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split '{split}'; there are: {', '.join(SPLITS)}")
        return torch.tensor([i for i, s in enumerate(self.splits) if s == split], dtype=torch.long)

    def subset(self, chosen: Int[Tensor, " chosen"]) -> ImageSet:
        """The pictures at the given positions, in that order."""
        positions = chosen.tolist()
        return ImageSet(
            self.pixels[chosen],
            self.alpha[chosen],
            self.labels[chosen],
            self.classes,
            *(
                tuple(values[i] for i in positions)
                for values in (self.identities, self.splits, self.captions)
            ),
        )


def split_of(identity: str) -> str:
    """The side of the split an identity is on: 60 % training, 15 % validation, 25 % test."""
    share = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") / 2**32
    return SPLITS[sum(share >= bound for bound in _SHARES)]


def patch_coverage(
    alpha: UInt8[Tensor, "items size size"], grid: int
) -> Float[Tensor, "items patches"]:
    """Share of each of grid x grid patches that the object covers, in [0, 1], row by row."""
    covered = functional.adaptive_avg_pool2d(alpha[:, None].float() / 255, grid)
    return covered.flatten(1)


# Emoji ------------------------------------------------------------------------------------------------

# Code points that vary a picture rather than name it: joiner, variation selector, gender signs,
# person / man / woman, skin tones, facing direction.
_VARIANTS = re.compile(r"^(200d|fe0f|2640|2642|1f9d1|1f468|1f469|1f3f[b-f]|27a1)$")


def emoji_identity(unified: str) -> str:
    """What an emoji shows, whoever shows it: woman running and man running are one identity.

    Args:
        unified: code points joined by dashes, as in "1F3C3-200D-2640-FE0F".
    """
    points = unified.lower().split("-")
    return "-".join(p for p in points if not _VARIANTS.match(p)) or "-".join(points)


def emoji(size: int = 64, limit: int | None = None) -> ImageSet:
    """Emoji of two vendors with their nine groups as classes; about 3,800 pictures of 64 x 64.

    Skin-tone variants and the five "Component" swatches are left out.

    Args:
        size: side of the pictures in pixels (64 is native).
        limit: keep only the first `limit` emoji of each group, for small runs.
    """
    entries = _emoji_entries(limit)
    classes = tuple(sorted({entry["category"] for entry in entries}))
    rows = [
        (entry, vendor) for vendor in VENDORS for entry in entries if entry[f"has_img_{vendor}"]
    ]
    folders = {v: asset_path(f"emoji_{v}") / "package" / "img" / v / "64" for v in VENDORS}
    pictures = [_square(folders[vendor] / entry["image"], size) for entry, vendor in rows]
    identities = tuple(emoji_identity(entry["unified"]) for entry, _ in rows)
    return _assemble(
        pictures,
        [classes.index(entry["category"]) for entry, _ in rows],
        classes,
        identities,
        tuple(entry["name"].lower() for entry, _ in rows),
    )


def _emoji_entries(limit: int | None) -> list[dict]:
    path = asset_path("emoji_google") / "package" / "emoji.json"
    entries = json.loads(path.read_text(encoding="utf8"))
    entries = [entry for entry in entries if entry["category"] != "Component"]
    entries.sort(key=lambda entry: (entry["category"], entry["sort_order"]))
    if limit is None:
        return entries
    seen: dict[str, int] = {}
    kept = []
    for entry in entries:
        seen[entry["category"]] = seen.get(entry["category"], 0) + 1
        if seen[entry["category"]] <= limit:
            kept.append(entry)
    return kept


# Stamps -----------------------------------------------------------------------------------------------


def stamps(size: int = 64, smallest_class: int = 1, limit: int | None = None) -> ImageSet:
    """Captioned Tux Paint stamps: cut-outs, mostly photographs, with their folder as the class.

    The class is the first two folders of the path ("animals/birds"), or the only one.

    Args:
        size: side of the pictures in pixels; pictures are padded to a square, then resized.
        smallest_class: leave out classes with fewer pictures than this.
        limit: keep only the first `limit` pictures of each class, for small runs.
    """
    root = asset_path("stamps") / STAMPS
    members: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.png")):
        if path.with_suffix(".txt").exists():
            folder = "/".join(path.relative_to(root).parts[:-1][:2])
            members.setdefault(folder, []).append(path)
    members = {
        name: paths[:limit] for name, paths in members.items() if len(paths) >= smallest_class
    }
    classes = tuple(sorted(members))
    rows = [(path, name) for name in classes for path in members[name]]
    return _assemble(
        [_square(path, size) for path, _ in rows],
        [classes.index(name) for _, name in rows],
        classes,
        tuple(path.stem for path, _ in rows),
        tuple(_caption(path.with_suffix(".txt")) for path, _ in rows),
    )


def _caption(path: Path) -> str:
    """First line of a stamp's text: its English caption."""
    return path.read_text(encoding="utf8", errors="replace").partition("\n")[0].strip()


# Fashion-MNIST ----------------------------------------------------------------------------------------


def fashion_mnist(limit: int | None = None) -> ImageSet:
    """Fashion-MNIST, 28 x 28, in its own split; the last 10,000 training pictures are validation.

    Args:
        limit: keep only the first `limit` pictures of each split, for small runs.
    """
    images, labels = zip(*(_fashion_part(part) for part in ("train", "t10k")), strict=True)
    pixels, labels = np.concatenate(images), np.concatenate(labels)
    splits = np.repeat(SPLITS, (50_000, 10_000, 10_000))
    if limit is not None:
        kept = np.concatenate([np.flatnonzero(splits == name)[:limit] for name in SPLITS])
        pixels, labels, splits = pixels[kept], labels[kept], splits[kept]
    pixels = torch.from_numpy(pixels)
    return ImageSet(
        pixels[:, None].expand(-1, 3, -1, -1),
        torch.full_like(pixels, 255),
        torch.from_numpy(labels.astype(np.int64)),
        FASHION_CLASSES,
        tuple(str(i) for i in range(len(labels))),
        tuple(map(str, splits)),
        tuple(FASHION_CLASSES[i] for i in labels),
    )


def _fashion_part(part: str) -> tuple[np.ndarray, np.ndarray]:
    folder = asset_path("fashion_mnist") / FASHION
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(), np.uint8, offset=8)
    return pixels, labels


# Pictures ---------------------------------------------------------------------------------------------


def _square(path: Path, size: int) -> np.ndarray:
    """A picture as RGBA [size, size, 4], padded to a square with full transparency."""
    with Image.open(io.BytesIO(path.read_bytes())) as opened:
        picture = opened.convert("RGBA")
    if picture.width != picture.height:
        side = max(picture.size)
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = canvas
    if picture.width != size:
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _assemble(
    pictures: list[np.ndarray],
    labels: list[int],
    classes: tuple[str, ...],
    identities: tuple[str, ...],
    captions: tuple[str, ...],
) -> ImageSet:
    colours = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    rgb, alpha = colours[:, :3].float(), colours[:, 3:].float() / 255
    on_white = (rgb * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return ImageSet(
        on_white,
        colours[:, 3].contiguous(),
        torch.tensor(labels),
        classes,
        identities,
        tuple(split_of(identity) for identity in identities),
        captions,
    )
