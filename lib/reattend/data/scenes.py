"""Scenes: cut-outs on real photographs, with everything about them known.

Tux Paint stamps of twelve kinds are pasted on crops of nature photographs. About two thirds of the stamps
are cut out of photographs, the rest is drawn (clip-art). Each scene comes with exact boxes, masks,
classes, colours and depths; `reattend.data.scene_language` turns those into captions, questions and
referring phrases. Cut-outs and photographs of the training, validation and test sides are different ones;
pairs of classes can be held out besides ("held_out" compositions). There is not much of it: three
photographs on the test side, and three test cut-outs of fish, tools and instruments.

What can be varied (`SceneSettings`): number and size of objects, resolution, overlap, a bias of which
classes occur together, twins of the first object, a rendered word on a sign, and motion over several
frames. `MODES` names the usual ones.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reattend.assets.store import asset_path
from reattend.data.images import SPLITS, STAMPS

# Class and the folders of stamps that belong to it.
KINDS = {
    "bird": ("animals/birds",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "insect": ("animals/insects",),
    "fish": ("animals/fish",),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "house": ("town/houses",),
    "vehicle": ("vehicles",),
    "sign": ("town/roadsigns",),
    "tool": ("household/tools",),
    "instrument": ("hobbies/music",),
}
CLASSES = tuple(KINDS)
# Stamps that lie in a folder of `KINDS` without being of that kind.
MISFITS = {
    "Brown_slug", "Woodlouse", "snail", "snail2",  # no insects
    "lobster", "shrimp",  # no fish
    "trainSign",  # no vehicle
}  # fmt: skip
PHOTOS = "usr/share/backgrounds/mate/nature"
# Which photographs lie on which side: two for validation, three for testing, seven for training.
_PHOTO_SPLITS = {"Dune": "validation", "LadyBird": "validation"}
_PHOTO_SPLITS |= dict.fromkeys(("Garden", "RainDrops", "Wood"), "test")
COLOURS = (
    "black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown",
)  # fmt: skip
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WORDS = (
    "STOP",
    "OPEN",
    "SALE",
    "HOTEL",
    "CAFE",
    "EXIT",
    "TAXI",
    "BANK",
    "PARK",
    "ZOO",
    "FIRE",
    "SHOP",
)

Composition = Literal["any", "seen", "held_out"]


@dataclass(frozen=True)
class SceneSettings:
    """What scenes look like.

    Attributes:
        size: side of the pictures in pixels.
        objects: fewest and most objects in a scene.
        scale: smallest and largest side of an object, as a share of `size`.
        bias: probability that the second object is of the first one's partner class (the next one in
            `CLASSES`) instead of any class; 0: classes are independent.
        compositions: "seen" leaves out the held-out pairs of classes, "held_out" draws nothing else (of
            scenes with two objects or more), "any" ignores the distinction.
        overlap: largest share of an object's box that later objects may cover together; 0: none.
        twins: probability that each further object is the first one's cut-out again, so that neither
            class nor colour tells the two apart.
        word: whether a sign with a rendered word is added.
        frames: number of frames in which the objects move; 1: a still picture.
    """

    size: int = 96
    objects: tuple[int, int] = (1, 1)
    scale: tuple[float, float] = (0.35, 0.6)
    bias: float = 0.0
    compositions: Composition = "any"
    overlap: float = 0.0
    twins: float = 0.0
    word: bool = False
    frames: int = 1


MODES = {
    "single": SceneSettings(),
    "several": SceneSettings(objects=(2, 4), scale=(0.25, 0.4)),
    "biased": SceneSettings(objects=(2, 2), scale=(0.3, 0.45), bias=0.9),
    "overlapping": SceneSettings(objects=(2, 4), scale=(0.35, 0.55), overlap=0.5),
    "twins": SceneSettings(objects=(2, 4), scale=(0.2, 0.35), twins=0.6),
    "high_resolution": SceneSettings(size=384, objects=(4, 6), scale=(0.12, 0.25)),
    "text": SceneSettings(size=128, objects=(1, 2), scale=(0.25, 0.4), word=True),
    "video": SceneSettings(objects=(1, 2), scale=(0.25, 0.4), frames=8),
}


@dataclass(frozen=True)
class Scenes:
    """Scenes with their annotations; a video has a dimension of frames, a still picture has none.

    Objects are listed in the order of pasting. Where a scene has fewer than the most, the rest have
    class -1, empty masks and boxes of zeros.

    Attributes:
        pixels: colours, 0..255.
        masks: where each object can be seen; what a later one covers is not part of an earlier one's mask.
        boxes: x0, y0, x1, y1 in pixels around each mask, x1 and y1 exclusive.
        depths: how many objects were pasted later than each: 0 is nearest, and covers the others; or -1.
        labels: class of each object, a position in `CLASSES`, or -1.
        colours: dominant colour of each object, a position in `COLOURS`, or -1.
        motions: direction in which each object moves, a position in `MOTIONS`, or -1.
        identities: name of each object's cut-out.
        words: the word on the sign, or "".
        word_masks, word_boxes: of the sign with the word, like those of objects; empty where there is none.
    """

    pixels: UInt8[Tensor, "scenes *frames 3 height width"]
    masks: Bool[Tensor, "scenes *frames objects height width"]
    boxes: Float[Tensor, "scenes *frames objects 4"]
    labels: Int[Tensor, "scenes objects"]
    colours: Int[Tensor, "scenes objects"]
    depths: Int[Tensor, "scenes objects"]
    motions: Int[Tensor, "scenes objects"]
    identities: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    word_masks: Bool[Tensor, "scenes *frames height width"]
    word_boxes: Float[Tensor, "scenes *frames 4"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _CutOut:
    """A stamp cropped to its opaque part, RGBA."""

    identity: str
    label: int
    colour: int
    picture: Image.Image


def make_scenes(
    count: int,
    settings: SceneSettings | str = "single",
    *,
    split: str = "train",
    seed: int = 0,
    **changes,
) -> Scenes:
    """Compose scenes; the same arguments give the same bytes.

    Args:
        count: number of scenes.
        settings: a name of `MODES` or settings of your own.
        split: whose cut-outs and photographs to use.
        seed: of everything random.
        changes: settings to replace, as in `make_scenes(9, "several", size=64)`.

    Raises:
        ValueError: for an unknown mode or split, or settings that cannot be met.
        AssetError: when stamps or photographs have not been fetched.
    """
    if isinstance(settings, str):
        if settings not in MODES:
            raise ValueError(f"unknown mode '{settings}'; there are: {', '.join(MODES)}")
        settings = MODES[settings]
    settings = replace(settings, **changes)
    _check(settings, split)
    random = np.random.default_rng([seed, SPLITS.index(split)])
    members = _by_class(split)
    scenes = [_compose(settings, split, members, random) for _ in range(count)]
    pixels, masks, boxes, labels, colours, motions, identities, words = zip(*scenes, strict=True)
    frames = slice(None) if settings.frames > 1 else 0
    masks, boxes = (torch.from_numpy(np.stack(part)[:, frames]) for part in (masks, boxes))
    labels, colours, motions = (
        torch.from_numpy(np.stack(values)) for values in (labels, colours, motions)
    )
    there = labels >= 0
    later = there.sum(1, keepdim=True) - there.cumsum(1)
    return Scenes(
        torch.from_numpy(np.stack(pixels)[:, frames]).movedim(-1, -3).contiguous(),
        masks[..., :-1, :, :],
        boxes[..., :-1, :],
        labels,
        colours,
        torch.where(there, later, -1),
        motions,
        tuple(identities),
        tuple(words),
        masks[..., -1, :, :],
        boxes[..., -1, :],
    )


def held_out_pair(first: int, second: int) -> bool:
    """Whether two different classes are a held-out composition; about a fifth of the pairs are."""
    low, high = sorted((CLASSES[first], CLASSES[second]))
    if low == high:
        return False
    return hashlib.sha256(f"{low}+{high}".encode()).digest()[0] < 0.2 * 256


def _check(settings: SceneSettings, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; there are: {', '.join(SPLITS)}")
    fewest, most = settings.objects
    if not 1 <= fewest <= most:
        raise ValueError(
            f"objects must be (fewest, most) with 1 <= fewest <= most, got {fewest, most}"
        )
    small, large = settings.scale
    if not 0 < small <= large <= 1:
        raise ValueError(f"scale must be (smallest, largest) within (0, 1], got {small, large}")
    for name in ("overlap", "twins"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(settings, name)}")
    if settings.compositions == "held_out" and (most < 2 or settings.twins):
        raise ValueError("held-out compositions need scenes with two objects or more, and no twins")


# Material -----------------------------------------------------------------------------------------


@cache
def _by_class(split: str) -> tuple[tuple[_CutOut, ...], ...]:
    """Cut-outs of one side of the split, class by class."""
    root = asset_path("stamps") / STAMPS
    members = []
    for label, folders in enumerate(KINDS.values()):
        paths = sorted(path for folder in folders for path in (root / folder).rglob("*.png"))
        side = split_names(path.stem for path in paths)
        kept = [p for p in paths if side[p.stem] == split and p.stem not in MISFITS]
        members.append(tuple(_cut_out(path, label) for path in kept))
    return tuple(members)


def split_names(stems: Iterable[str]) -> dict[str, str]:
    """Side of the split of each cut-out of one class: 60 % training, 15 % validation, 25 % test.

    In the order of a hash, so that small classes have cut-outs on every side. Mirrored copies of a
    picture lie where the original does.
    """
    names = {stem: stem.removesuffix("_mirror") for stem in stems}
    ordered = sorted(set(names.values()), key=lambda n: hashlib.sha256(n.encode()).digest())
    ends = [round(share * len(ordered)) for share in (0.60, 0.75)]
    rank = {name: position for position, name in enumerate(ordered)}
    return {stem: SPLITS[sum(rank[name] >= end for end in ends)] for stem, name in names.items()}


def _cut_out(path, label: int) -> _CutOut:
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 64)).getbbox()
    picture = picture.crop(box)
    return _CutOut(path.stem, label, dominant_colour(np.asarray(picture)), picture)


# A hue is said of an object from this share of its opaque pixels on: a red fire engine is red although
# more of it is chrome and tyres. The bounds below were set by eye on half of the stamps of the test.
_TELLING = 0.2


def dominant_colour(rgba: UInt8[np.ndarray, "height width 4"]) -> int:
    """The colour by which one would call the opaque pixels, a position in `COLOURS`.

    The commonest vivid colour if it covers a fifth of them, else the commonest colour of all.
    """
    with Image.fromarray(rgba[..., :3]) as picture:
        hsv = np.asarray(picture.convert("HSV"))[rgba[..., 3] > 128].astype(float) / 255
    hue, saturation, value = hsv.T
    # Upper end of each hue's range on the circle; what is above the last is red again.
    ends = np.array([0.03, 0.11, 0.19, 0.46, 0.7, 0.83, 0.93])
    names = np.array(("red", "orange", "yellow", "green", "blue", "purple", "pink", "red"))
    named = names[np.searchsorted(ends, hue)]
    named[(named == "orange") & ((value < 0.7) | (saturation < 0.5))] = "brown"
    named[(hue < 0.03) & ((value < 0.35) | (saturation < 0.45))] = "brown"
    named[(named == "pink") & (value < 0.65)] = "purple"
    named[saturation < 0.2] = "grey"
    named[(saturation < 0.2) & (value > 0.8)] = "white"
    named[value < 0.25] = "black"
    vivid = named[(saturation >= 0.3) & (value >= 0.3)]
    shares = [
        np.array([np.sum(part == c) for c in COLOURS]) / len(named) for part in (vivid, named)
    ]
    return int(shares[0 if shares[0].max() > _TELLING else 1].argmax())


@cache
def _photos(split: str, size: int) -> tuple[Image.Image, ...]:
    """Photographs of one side, shrunk so that a crop of `size` pixels shows half of the height."""
    folder = asset_path("nature_photos") / PHOTOS
    paths = [p for p in sorted(folder.glob("*.jpg")) if _PHOTO_SPLITS.get(p.stem, "train") == split]
    photos = []
    for path in paths:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        factor = 2 * size / min(photo.size)
        shape = tuple(max(size, round(side * factor)) for side in photo.size)
        photos.append(photo.resize(shape, Image.Resampling.LANCZOS))
    return tuple(photos)


def object_name(identity: str) -> str:
    """A readable name of a cut-out: "heron_greatblue" -> "heron greatblue"."""
    return " ".join(re.sub(r"[\d_-]+", " ", identity).split()).lower()


# Composition --------------------------------------------------------------------------------------


def _compose(settings: SceneSettings, split: str, members: tuple, random: np.random.Generator):
    """One scene: frames of pixels, masks and boxes, and what does not change over time."""
    size, most = settings.size, settings.objects[1]
    chosen = _choose(settings, members, random)
    motions = random.integers(len(MOTIONS), size=len(chosen))
    if settings.frames == 1:
        motions[:] = list(MOTIONS).index("still")
    word = str(random.choice(WORDS)) if settings.word else ""
    sign = [_sign(word, size)] if word else []
    pictures, places = _place(settings, [c.picture for c in chosen], sign, motions, random)
    background = _crop(random, _photos(split, size), size)
    pixels = np.empty((settings.frames, size, size, 3), np.uint8)
    masks = np.zeros((settings.frames, most + 1, size, size), bool)  # the last is the sign's
    boxes = np.zeros((settings.frames, most + 1, 4), np.float32)
    speed = size * 0.3 / max(1, settings.frames - 1)
    for frame in range(settings.frames):
        canvas = background.copy()
        owner = np.full((size, size), -1)
        for index, (picture, (x, y)) in enumerate(zip(pictures, places, strict=True)):
            if index < len(chosen):
                dx, dy = list(MOTIONS.values())[motions[index]]
                x, y = round(x + dx * speed * frame), round(y + dy * speed * frame)
            canvas.paste(picture, (x, y), picture)
            opaque = np.asarray(picture.getchannel("A")) > 128
            owner[y : y + opaque.shape[0], x : x + opaque.shape[1]][opaque] = index
        pixels[frame] = np.asarray(canvas)
        for index in range(len(pictures)):
            slot = index if index < len(chosen) else most
            masks[frame, slot] = owner == index
            boxes[frame, slot] = _box(masks[frame, slot])
    rest = [-1] * (most - len(chosen))
    return (
        pixels,
        masks,
        boxes,
        np.array([c.label for c in chosen] + rest),
        np.array([c.colour for c in chosen] + rest),
        np.array([*motions, *rest]),
        tuple(c.identity for c in chosen),
        word,
    )


def _choose(settings: SceneSettings, members: tuple, random: np.random.Generator) -> list[_CutOut]:
    """Cut-outs of one scene, by class first, so that classes are equally frequent."""
    count = int(random.integers(settings.objects[0], settings.objects[1] + 1))
    while True:
        labels = random.integers(len(CLASSES), size=count).tolist()
        if count > 1 and random.random() < settings.bias:
            labels[1] = (labels[0] + 1) % len(CLASSES)
        pairs = [(a, b) for i, a in enumerate(labels) for b in labels[:i]]
        unseen = any(held_out_pair(a, b) for a, b in pairs)
        if settings.compositions == "any" or unseen == (settings.compositions == "held_out"):
            break
        if settings.compositions == "held_out":
            count = max(2, count)
    chosen = [members[label][random.integers(len(members[label]))] for label in labels]
    if settings.twins:
        chosen[1:] = [chosen[0] if random.random() < settings.twins else c for c in chosen[1:]]
    return chosen


def _place(
    settings: SceneSettings,
    cut_outs: list[Image.Image],
    signs: list[Image.Image],
    motions: np.ndarray,
    random: np.random.Generator,
) -> tuple[list[Image.Image], list[tuple[int, int]]]:
    """Resized objects and their upper left corners, apart over the whole motion but for `overlap`.

    When no free place is found, all objects are drawn smaller and placed anew.
    """
    size, shrink = settings.size, 1.0
    travel = size * 0.3
    while True:
        sides = shrink * size * random.uniform(*settings.scale, size=len(cut_outs))
        pictures = [_resized(p, side) for p, side in zip(cut_outs, sides, strict=True)] + signs
        taken, places = [], []
        for index, picture in enumerate(pictures):
            moves = index < len(cut_outs) and settings.frames > 1
            dx, dy = list(MOTIONS.values())[motions[index]] if moves else (0, 0)
            path = (dx * travel, dy * travel)
            shared = settings.overlap if index < len(cut_outs) else 0.0
            place = _free_place(picture.size, size, taken, path, shared, random)
            if place is None:
                break
            places.append(place)
        else:
            return pictures, places
        shrink *= 0.9


def _free_place(
    shape: tuple[int, int],
    size: int,
    taken: list[tuple],
    travel: tuple[float, float],
    overlap: float,
    random: np.random.Generator,
) -> tuple[int, int] | None:
    """A place whose swept box is inside the picture and leaves each box in `taken` covered to `overlap`.

    Extends `taken`.
    """
    width, height = (side + math.ceil(abs(way)) for side, way in zip(shape, travel, strict=True))
    if width > size or height > size:
        return None
    corner = (size - width, size - height)
    drawn = random.integers(0, corner, size=(40, 2), endpoint=True)
    for x, y in drawn.tolist():
        box = (x, y, x + width, y + height)
        later = [*taken, box]
        if all(_covered(b, later[i + 1 :]) <= overlap for i, b in enumerate(taken)):
            taken.append(box)
            # A move to the left or up starts at the far side of the swept box.
            start_x, start_y = (math.ceil(max(-way, 0)) for way in travel)
            return x + start_x, y + start_y
    return None


def _covered(box: tuple, others: list[tuple]) -> float:
    """Share of a box that others cover, what several cover counted for each."""
    shared = 0
    for other in others:
        width, height = (min(box[2 + k], other[2 + k]) - max(box[k], other[k]) for k in (0, 1))
        shared += max(0, width) * max(0, height)
    return shared / ((box[2] - box[0]) * (box[3] - box[1]))


def _resized(picture: Image.Image, side: float) -> Image.Image:
    """A picture whose longer side is `side` pixels."""
    factor = side / max(picture.size)
    shape = tuple(max(2, round(length * factor)) for length in picture.size)
    return picture.resize(shape, Image.Resampling.BILINEAR, reducing_gap=2.0)


@cache
def _sign(word: str, size: int) -> Image.Image:
    """A white panel with a black frame and a word on it."""
    font = ImageFont.load_default(size=max(9, size // 9))
    left, top, right, bottom = font.getbbox(word)
    edge = max(2, size // 40)
    panel = Image.new("RGBA", (right - left + 4 * edge, bottom - top + 4 * edge), "white")
    draw = ImageDraw.Draw(panel)
    draw.rectangle(
        (0, 0, panel.width - 1, panel.height - 1), outline="black", width=max(1, edge // 2)
    )
    draw.text((2 * edge - left, 2 * edge - top), word, fill="black", font=font)
    return panel


def _crop(random: np.random.Generator, photos: tuple[Image.Image, ...], size: int) -> Image.Image:
    photo = photos[random.integers(len(photos))]
    x, y = (int(random.integers(0, side - size, endpoint=True)) for side in photo.size)
    crop = photo.crop((x, y, x + size, y + size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
