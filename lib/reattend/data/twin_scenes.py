"""Scenes of recoloured cut-outs in twos: the same nouns and the same colours, paired otherwise.

"Red apple and blue key and green mug" has the twin "blue apple and red key and green mug". Who sees a scene as
a bag of words, or mixes the patches of two objects, cannot tell twins apart. Beneath the objects that a caption
names lie grey cut-outs that it does not name, so that there are patches of things that do not matter.

Cut-outs, colours, photographs and their sides of the split are those of `reattend.data.attribute_scenes`.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Num

from reattend.data.attribute_scenes import (
    _CONTRAST,
    _DARKEST,
    COLOURS,
    NOUNS,
    PAINTS,
    AttributeScenes,
    _photos,
    _piece,
    _placed,
)
from reattend.data.images import SPLITS

GREYS = (40, 240)  # darkest and lightest paint of what no caption names
Drawn = list[tuple[int, int]]
"""(colour, noun) of each object of a scene."""


def make_twin_scenes(
    twos: int,
    *,
    objects: int = 3,
    unnamed: int = 4,
    size: int = 24,
    side: tuple[int, int] = (8, 9),
    split: str = "train",
    seed: int = 0,
) -> AttributeScenes:
    """Scenes 2 i and 2 i + 1 are twins; the same arguments give the same bytes. No two show the same set of objects.

    Args:
        twos: how many twins to draw: half as many as there are scenes.
        objects: named ones in each scene.
        unnamed: grey ones beneath them.
        size: side of the pictures in pixels.
        side: shortest and longest longer side of an object in pixels.
        split: whose photographs to use.

    Raises:
        ValueError: for an unknown split, fewer than two objects or more than colours, objects that find no
            place, or more twins than there are sets of objects.
        AssetError: when stamps or photographs have not been fetched.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; there are: {', '.join(SPLITS)}")
    if not 2 <= objects <= len(COLOURS):
        raise ValueError(f"twins have 2 to {len(COLOURS)} objects, got {objects}")
    random = np.random.default_rng([seed, SPLITS.index(split), objects, unnamed])
    scenes = AttributeScenes(
        torch.empty(2 * twos, 3, size, size, dtype=torch.uint8),
        torch.empty(2 * twos, objects, 4, dtype=torch.long),
        torch.empty(2 * twos, objects, dtype=torch.long),
        torch.empty(2 * twos, objects, dtype=torch.long),
    )
    shown: set[frozenset] = set()
    for index in range(twos):
        for place, drawn in enumerate(_new_twins(objects, shown, random), 2 * index):
            canvas = _cluttered_ground(
                [noun for _, noun in drawn], unnamed, size, side, split, random
            )
            boxes = _paint_apart(canvas, drawn, side, random)
            scenes.pixels[place] = torch.from_numpy(canvas.round().astype(np.uint8)).movedim(-1, 0)
            scenes.boxes[place] = torch.tensor(boxes)
            scenes.colours[place], scenes.nouns[place] = torch.tensor(drawn).T
    return scenes


def _new_twins(
    objects: int, shown: set[frozenset], random: np.random.Generator
) -> tuple[Drawn, Drawn]:
    """Twins that `shown` does not hold yet, each in an order of its own; adds them."""
    for _ in range(1000):
        colours = random.permutation(len(COLOURS))[:objects].tolist()
        nouns = random.permutation(len(NOUNS))[:objects].tolist()
        swapped = [colours[1], colours[0], *colours[2:]]
        twins = tuple(
            [list(zip(each, nouns, strict=True))[i] for i in random.permutation(objects)]
            for each in (colours, swapped)
        )
        sets = {frozenset(twin) for twin in twins}
        if not sets & shown:
            shown |= sets
            return twins
    raise ValueError(f"no new twins of {objects} objects after {len(shown)} scenes: ask for fewer")


def _cluttered_ground(
    named: list[int],
    unnamed: int,
    size: int,
    side: tuple[int, int],
    split: str,
    random: np.random.Generator,
) -> Float[np.ndarray, "size size 3"]:
    """A crop of a photograph, grey and of half the contrast, with grey cut-outs of other nouns anywhere on it."""
    photos = _photos(split, size)
    photo = photos[random.integers(len(photos))]
    top, left = (random.integers(0, length - size + 1) for length in photo.shape[:2])
    canvas = _DARKEST + _CONTRAST * photo[top : top + size, left : left + size].astype(float)
    others = random.permutation([noun for noun in range(len(NOUNS)) if noun not in named])
    for noun in others[:unnamed].tolist():
        piece = _piece(noun, int(random.integers(side[0], side[1] + 1)))
        corner = [int(random.integers(0, size - length + 1)) for length in piece[0].shape]
        _paint(canvas, piece, (corner[1], corner[0]), np.full(3, random.uniform(*GREYS)))
    return canvas


def _paint_apart(
    canvas: Float[np.ndarray, "size size 3"],
    drawn: Drawn,
    side: tuple[int, int],
    random: np.random.Generator,
) -> list[tuple[int, int, int, int]]:
    """Paint objects that do not overlap; their boxes."""
    pieces = [_piece(noun, int(random.integers(side[0], side[1] + 1))) for _, noun in drawn]
    boxes = _placed([shade.shape for shade, _ in pieces], len(canvas), random)
    for (colour, _), piece, box in zip(drawn, pieces, boxes, strict=True):
        _paint(canvas, piece, box[:2], np.array(PAINTS[COLOURS[colour]]))
    return boxes


def _paint(
    canvas: Float[np.ndarray, "size size 3"],
    piece: tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]],
    corner: tuple[int, int],
    paint: Num[np.ndarray, " channels"],
) -> None:
    """Lay a cut-out, given by shading and opacity, over the canvas with its upper left corner at (x, y)."""
    shade, alpha = piece
    (height, width), (x, y) = shade.shape, corner
    under = canvas[y : y + height, x : x + width]
    under[:] = alpha[..., None] * shade[..., None] * paint + (1 - alpha[..., None]) * under
