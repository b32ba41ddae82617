"""Recoloured cut-outs on grey photographs, with captions that say which thing has which colour.

Sixteen Tux Paint stamps, each shown in six colours, lie apart on grey crops of nature photographs. A caption
names them in random order: "red apple and blue key". Things of one scene differ in noun and in colour, so
that every word names one of them; which colour belongs to which noun only the pairing says. A fifth of the
(colour, noun) pairs is held out. The photographs of the training, validation and test sides differ, the
sixteen cut-outs are the same.

Objects are listed in the order of the caption; where a scene has fewer than the most, the rest have colour
and noun -1 and boxes of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor

from reattend.assets.store import asset_path
from reattend.data.images import SPLITS, STAMPS
from reattend.data.scenes import PHOTOS

CUT_OUTS = {
    "apple": "food/fruit/apple_red",
    "banana": "food/fruit/banana",
    "pineapple": "food/fruit/pineapple",
    "carrot": "food/vegetables/carrot",
    "corn": "food/vegetables/corn",
    "mushroom": "food/vegetables/mushroom",
    "guitar": "hobbies/music/string/guitar_classical",
    "hammer": "household/tools/hammer",
    "key": "household/key",
    "mug": "household/dishes/mug",
    "scissors": "household/arttools/scissors_small_open",
    "giraffe": "animals/mammals/giraffe",
    "flamingo": "animals/birds/pink_flamingo",
    "butterfly": "animals/insects/cartoon/butterfly",
    "fish": "animals/fish/clownfish",
    "shirt": "clothes/t_tshirt",
}
NOUNS = tuple(CUT_OUTS)
PAINTS = {
    "red": (225, 35, 35),
    "green": (40, 190, 60),
    "blue": (45, 75, 235),
    "yellow": (245, 225, 40),
    "purple": (165, 55, 205),
    "white": (250, 250, 250),
}
COLOURS = tuple(PAINTS)
VOCABULARY = ("<pad>", "<bos>", "<eos>", "and", *COLOURS, *NOUNS)
PADDING, START, END, AND = range(4)
FIRST_COLOUR, FIRST_NOUN = 4, 4 + len(COLOURS)
# Grounds are grey and of half the contrast: on photographs in full colour, where red things lie on red
# petals, towers of this size learn next to nothing in 300 steps (recall at 1 of 5 % in place of 55 %).
_DARKEST, _CONTRAST = 30, 0.5
_PHOTO_SPLITS = {"Dune": "validation", "LadyBird": "validation"}
_PHOTO_SPLITS |= dict.fromkeys(("Garden", "RainDrops", "Wood"), "test")


@dataclass(frozen=True)
class AttributeScenes:
    """Scenes with all that is known of them; see the module's head.

    Attributes:
        pixels: colours, 0..255.
        boxes: x0, y0, x1, y1 in pixels around what can be seen of each object, x1 and y1 exclusive.
        colours, nouns: positions in `COLOURS` and `NOUNS`, or -1.
    """

    pixels: UInt8[Tensor, "scenes 3 size size"]
    boxes: Int[Tensor, "scenes objects 4"]
    colours: Int[Tensor, "scenes objects"]
    nouns: Int[Tensor, "scenes objects"]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> AttributeScenes:
        return AttributeScenes(
            self.pixels[index], self.boxes[index], self.colours[index], self.nouns[index]
        )


def held_out_pair(colour: int, noun: int) -> bool:
    """Whether no "seen" scene shows this noun in this colour; a fifth of the pairs are held out."""
    return (colour + noun) % 5 == 0


def colour_word(place: int) -> int:
    """Position in a caption of the colour of its object number `place`; its noun comes next."""
    return 1 + 3 * place


def caption_ids(
    colours: Int[Tensor, "scenes objects"], nouns: Int[Tensor, "scenes objects"]
) -> tuple[Int[Tensor, "scenes length"], Bool[Tensor, "scenes length"]]:
    """Captions as positions in `VOCABULARY`, padded on the right to the most objects; True for real words.

    <bos> colour noun and colour noun ... <eos>: 3 objects + 1 tokens.
    """
    scenes, objects = nouns.shape
    ids = torch.full((scenes, 3 * objects + 1), PADDING)
    ids[:, 0] = START
    for place in range(objects):
        there, at = nouns[:, place] >= 0, colour_word(place)
        ids[there, at - 1] = AND if place else START
        ids[there, at] = FIRST_COLOUR + colours[there, place]
        ids[there, at + 1] = FIRST_NOUN + nouns[there, place]
    ids.scatter_(1, 3 * (nouns >= 0).sum(1, keepdim=True), END)
    return ids, ids != PADDING


def spelled(ids: Int[Tensor, " length"]) -> list[str]:
    """The words of one caption, without padding."""
    return [VOCABULARY[i] for i in ids.tolist() if i != PADDING]


def make_attribute_scenes(
    count: int,
    *,
    objects: tuple[int, int] = (2, 4),
    size: int = 24,
    side: tuple[int, int] = (8, 9),
    split: str = "train",
    held_out: bool = False,
    seed: int = 0,
) -> AttributeScenes:
    """Compose scenes; the same arguments give the same bytes. No two show the same set of objects.

    Args:
        objects: fewest and most objects in a scene.
        size: side of the pictures in pixels.
        side: shortest and longest longer side of an object in pixels.
        split: whose photographs to use.
        held_out: whether every scene shows at least one held-out pair of colour and noun, instead of none.

    Raises:
        ValueError: for an unknown split, more objects than colours, objects that find no place, or more
            scenes than there are sets of objects.
        AssetError: when stamps or photographs have not been fetched.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; there are: {', '.join(SPLITS)}")
    if not 1 <= objects[0] <= objects[1] <= len(COLOURS):
        raise ValueError(f"objects must be (fewest, most) within 1..{len(COLOURS)}, got {objects}")
    random = np.random.default_rng([seed, SPLITS.index(split), held_out])
    scenes = AttributeScenes(
        torch.empty(count, 3, size, size, dtype=torch.uint8),
        torch.zeros(count, objects[1], 4, dtype=torch.long),
        torch.full((count, objects[1]), -1),
        torch.full((count, objects[1]), -1),
    )
    shown: set[frozenset] = set()
    for index in range(count):
        chosen = _new_objects(objects, held_out, shown, random)
        canvas, boxes = _composed(chosen, size, side, split, random)
        scenes.pixels[index] = torch.from_numpy(canvas).movedim(-1, 0)
        scenes.boxes[index, : len(chosen)] = torch.tensor(boxes)
        scenes.colours[index, : len(chosen)] = torch.tensor([colour for colour, _ in chosen])
        scenes.nouns[index, : len(chosen)] = torch.tensor([noun for _, noun in chosen])
    return scenes


def _new_objects(
    objects: tuple[int, int], held_out: bool, shown: set[frozenset], random: np.random.Generator
) -> list[tuple[int, int]]:
    """(colour, noun) of the objects of one scene, a set that `shown` does not hold yet; adds it."""
    count = int(random.integers(objects[0], objects[1] + 1))
    for _ in range(1000):
        colours = random.permutation(len(COLOURS))[:count].tolist()
        nouns = random.permutation(len(NOUNS))[:count].tolist()
        chosen = list(zip(colours, nouns, strict=True))
        unseen = any(held_out_pair(*pair) for pair in chosen)
        if unseen == held_out and frozenset(chosen) not in shown:
            shown.add(frozenset(chosen))
            return chosen
    raise ValueError(
        f"no new set of {count} objects after {len(shown)} scenes: ask for fewer, or for more objects"
    )


def _composed(
    chosen: list[tuple[int, int]],
    size: int,
    side: tuple[int, int],
    split: str,
    random: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "size size 3"], list[tuple[int, int, int, int]]]:
    """Pixels and boxes of one scene."""
    photos = _photos(split, size)
    photo = photos[random.integers(len(photos))]
    top, left = (random.integers(0, length - size + 1) for length in photo.shape[:2])
    canvas = _DARKEST + _CONTRAST * photo[top : top + size, left : left + size].astype(float)
    pieces = [_piece(noun, int(random.integers(side[0], side[1] + 1))) for _, noun in chosen]
    boxes = _placed([shade.shape for shade, _ in pieces], size, random)
    for (colour, _), (shade, alpha), (x0, y0, x1, y1) in zip(chosen, pieces, boxes, strict=True):
        painted = shade[..., None] * np.array(PAINTS[COLOURS[colour]])
        under = canvas[y0:y1, x0:x1]
        canvas[y0:y1, x0:x1] = alpha[..., None] * painted + (1 - alpha[..., None]) * under
    return canvas.round().astype(np.uint8), boxes


def _placed(
    shapes: list[tuple[int, int]], size: int, random: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """Boxes of these heights and widths that do not overlap; all are placed anew where one finds no place."""
    for _ in range(1000):
        boxes: list[tuple[int, int, int, int]] = []
        for height, width in shapes:
            box = _free_box(height, width, size, boxes, random)
            if box is None:
                break
            boxes.append(box)
        else:
            return boxes
    raise ValueError(
        f"{len(shapes)} objects find no place on {size} pixels: ask for fewer or smaller ones"
    )


def _free_box(
    height: int, width: int, size: int, taken: list[tuple], random: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """A box apart from those that are taken, or None after 40 tries."""
    for _ in range(40):
        x, y = (int(random.integers(0, size - length + 1)) for length in (width, height))
        x1, y1 = x + width, y + height
        if all(x >= b[2] or b[0] >= x1 or y >= b[3] or b[1] >= y1 for b in taken):
            return x, y, x1, y1
    return None


@cache
def _piece(noun: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Shading in [.35, 1] and opacity of a cut-out whose longer side is `side` pixels: [height, width]."""
    path = asset_path("stamps") / STAMPS / f"{CUT_OUTS[NOUNS[noun]]}.png"
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 64)).getbbox())
    factor = side / max(picture.size)
    shape = tuple(max(3, round(length * factor)) for length in picture.size)
    pixels = np.asarray(picture.resize(shape, Image.Resampling.BOX)).astype(float)
    grey, alpha = pixels[..., :3].mean(-1), pixels[..., 3] / 255
    low, high = np.percentile(grey[alpha > 0.5], (5, 95))
    shade = ((grey - low) / max(high - low, 1.0)).clip(0, 1)
    return 0.35 + 0.65 * shade, alpha


@cache
def _photos(split: str, size: int) -> tuple[UInt8[np.ndarray, "height width 3"], ...]:
    """Grey photographs of one side, shrunk so that a crop of `size` pixels shows half of the height."""
    folder = asset_path("nature_photos") / PHOTOS
    paths = [p for p in sorted(folder.glob("*.jpg")) if _PHOTO_SPLITS.get(p.stem, "train") == split]
    photos = []
    for path in paths:
        with Image.open(path) as opened:
            photo = opened.convert("L").convert("RGB")
        factor = 2 * size / min(photo.size)
        shape = tuple(max(size, round(length * factor)) for length in photo.size)
        photos.append(np.asarray(photo.resize(shape, Image.Resampling.LANCZOS)))
    return tuple(photos)
