"""Prompts of one or two coloured things, and pictures of them: "a red car and a blue duck".

Eight Tux Paint stamps, each painted in four colours, lie apart on a near-white ground, corners on every
second pixel. Things of one
picture differ in noun and in colour. All captions are padded to the length of those with two things.

Besides what was painted, `matched` says by rule what a picture shows: it lays every painted stamp on every
place and counts where one fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from reattend.assets.store import asset_path
from reattend.data.images import STAMPS

CUT_OUTS = {
    "apple": "food/fruit/apple_red",
    "car": "vehicles/auto/beetle",
    "cat": "seasonal/halloween/blackcat",
    "duck": "household/rubberduck",
    "fish": "animals/fish/clownfish",
    "house": "town/houses/cartoon/wooden_cottage",
    "mug": "household/dishes/mug",
    "star": "symbols/shapes/star",
}
NOUNS = tuple(CUT_OUTS)
ANIMALS = ("cat", "duck", "fish")
PAINTS = {
    "red": (225, 35, 35),
    "green": (40, 170, 60),
    "blue": (45, 75, 235),
    "yellow": (240, 205, 40),
}
COLOURS = tuple(PAINTS)
VOCABULARY = ("<pad>", "<bos>", "<eos>", "a", "and", *COLOURS, *NOUNS)
PADDING, START, END, A, AND = range(5)
FIRST_COLOUR, FIRST_NOUN = 5, 5 + len(COLOURS)
LENGTH = 9
"""Tokens of a caption: <bos> a colour noun and a colour noun <eos>."""
COLOUR_AT, NOUN_AT = (2, 6), (3, 7)
"""Positions in a caption of the colours and the nouns of its first and second thing."""
SIDES = (0.42,)
"""Longer sides of things as shares of the picture's: 10 of 24 pixels."""
_GROUND, _DARKEST = 0.95, 0.7
_FITS = 0.6
_GRID = 2  # pixels


@dataclass(frozen=True)
class PromptScenes:
    """Pictures with all that is known of them.

    Where a picture has one thing, the second has colour and noun -1 and a box of zeros.

    Attributes:
        pixels: colours in [-1, 1].
        boxes: x0, y0, x1, y1 in pixels around each thing, x1 and y1 exclusive.
        colours, nouns: positions in `COLOURS` and `NOUNS`, or -1.
    """

    pixels: Float[Tensor, "scenes 3 size size"]
    boxes: Int[Tensor, "scenes things 4"]
    colours: Int[Tensor, "scenes things"]
    nouns: Int[Tensor, "scenes things"]

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class Prompts:
    """What to draw: colours and nouns of two things each; -1 for a second thing that is not asked for."""

    colours: Int[Tensor, "prompts 2"]
    nouns: Int[Tensor, "prompts 2"]

    def __len__(self) -> int:
        return len(self.nouns)

    def __getitem__(self, index: Tensor | slice) -> Prompts:
        return Prompts(self.colours[index], self.nouns[index])

    def ids(self) -> Int[Tensor, "prompts 9"]:
        """The captions as positions in `VOCABULARY`."""
        return caption_ids(self.colours, self.nouns)

    def texts(self) -> list[str]:
        """The captions as text."""
        return [spelled(row) for row in self.ids()]


def caption_ids(
    colours: Int[Tensor, "scenes 2"], nouns: Int[Tensor, "scenes 2"]
) -> Int[Tensor, "scenes 9"]:
    """Captions as positions in `VOCABULARY`, padded on the right."""
    ids = torch.full((len(nouns), LENGTH), PADDING)
    ids[:, 0], ids[:, 1], ids[:, 4], ids[:, 5], ids[:, 8] = START, A, AND, A, END
    ids[:, COLOUR_AT], ids[:, NOUN_AT] = FIRST_COLOUR + colours, FIRST_NOUN + nouns
    alone = nouns[:, 1] < 0
    ids[alone, 4] = END
    ids[alone, 5:] = PADDING
    return ids


def empty_captions(count: int) -> Int[Tensor, "count 9"]:
    """Captions without words: <bos> <eos>."""
    ids = torch.full((count, LENGTH), PADDING)
    ids[:, 0], ids[:, 1] = START, END
    return ids


def spelled(ids: Int[Tensor, " length"]) -> str:
    """The words of one caption."""
    return " ".join(VOCABULARY[i] for i in ids.tolist() if i > END)


def pair_prompts(count: int, seed: int = 0) -> Prompts:
    """`count` prompts with two things: every pair of nouns equally often (within one), in random order.

    Colours are drawn at random and differ within a prompt.
    """
    random = np.random.default_rng([seed, 2])
    pairs = np.array(list(combinations(range(len(NOUNS)), 2)))
    rounds = -(-count // len(pairs))
    nouns = np.concatenate([random.permutation(pairs) for _ in range(rounds)])[:count]
    colours = np.stack([random.permutation(len(COLOURS))[:2] for _ in range(count)])
    return Prompts(torch.from_numpy(colours), torch.from_numpy(random.permuted(nouns, axis=1)))


def single_prompts() -> Prompts:
    """Every noun in every colour, one thing a prompt."""
    nouns = torch.arange(len(NOUNS)).repeat_interleave(len(COLOURS))
    colours = torch.arange(len(COLOURS)).repeat(len(NOUNS))
    missing = torch.full_like(nouns, -1)
    return Prompts(torch.stack([colours, missing], 1), torch.stack([nouns, missing], 1))


def category(nouns: Sequence[int]) -> str:
    """Of a pair of nouns, as Attend-and-Excite sorts prompts: "animal-animal", "animal-object", "object-object"."""
    animals = sum(NOUNS[noun] in ANIMALS for noun in nouns)
    return ("object-object", "animal-object", "animal-animal")[animals]


# --- pictures --------------------------------------------------------------------------------------


def draw_prompts(count: int, generator: Generator, two: float = 0.6) -> Prompts:
    """Random prompts, a share `two` of them with two things."""
    nouns = torch.rand(count, len(NOUNS), generator=generator).argsort(1)[:, :2]
    colours = torch.rand(count, len(COLOURS), generator=generator).argsort(1)[:, :2]
    alone = torch.rand(count, generator=generator) >= two
    nouns[alone, 1] = colours[alone, 1] = -1
    return Prompts(colours, nouns)


def paint(prompts: Prompts, size: int, generator: Generator) -> PromptScenes:
    """Pictures of these prompts, things at random places that do not overlap."""
    return paint_things(prompts.colours, prompts.nouns, size, generator)


def paint_things(
    colours: Int[Tensor, "scenes things"],
    nouns: Int[Tensor, "scenes things"],
    size: int,
    generator: Generator,
) -> PromptScenes:
    """Pictures of any number of things, nouns and colours free; -1 stands for nothing.

    Of 40 random ways to place them the one in which boxes overlap least is taken; later things cover
    earlier ones. `size`: side of the pictures in pixels.
    """
    count, things = nouns.shape
    opacity, shade, extents = _stamps(size)
    kinds = torch.randint(len(SIDES), (count, things), generator=generator)
    extent = extents[nouns.clamp(min=0), kinds]
    corners = _corners(extent, size, generator)
    pixels = torch.empty(count, 1, 1, 1).uniform_(_GROUND, 1.0, generator=generator)
    pixels = pixels.expand(-1, 3, size, size)
    for place in range(things):
        there = nouns[:, place] >= 0
        noun, kind = nouns[:, place].clamp(min=0), kinds[:, place]
        alpha = _pasted(opacity[noun, kind], corners[:, place], size) * there[:, None, None]
        light = _pasted(shade[noun, kind], corners[:, place], size)
        painted = light[:, None] * _paints()[colours[:, place].clamp(min=0)][:, :, None, None]
        pixels = pixels + alpha[:, None] * (2 * painted - 1 - pixels)
    boxes = torch.cat([corners, corners + extent], -1) * (nouns >= 0)[..., None]
    return PromptScenes(pixels.clamp(-1, 1), boxes, colours, nouns)


def _corners(
    extent: Int[Tensor, "scenes things 2"], size: int, generator: Generator
) -> Int[Tensor, "scenes things 2"]:
    """Upper left corners (x, y): of 40 random draws the first with the least overlap of boxes."""
    draws = torch.rand(40, *extent.shape, generator=generator)
    corners = (draws * ((size - extent) // _GRID + 1)).long() * _GRID
    ends = corners + extent
    shared = torch.zeros(corners.shape[:2], dtype=torch.long)
    for one, other in combinations(range(extent.shape[1]), 2):
        last = torch.minimum(ends[:, :, one], ends[:, :, other])
        first = torch.maximum(corners[:, :, one], corners[:, :, other])
        shared += (last - first).clamp(min=0).prod(-1)
    return corners[shared.argmin(0), torch.arange(len(extent))]


def _pasted(
    piece: Float[Tensor, "scenes side side"], corner: Int[Tensor, "scenes 2"], size: int
) -> Float[Tensor, "scenes size size"]:
    """Each piece on an empty canvas, its upper left corner (x, y) at `corner`."""
    side, ruler = piece.shape[-1], torch.arange(size)
    x, y = (ruler - corner[:, axis, None] for axis in (0, 1))
    inside = ((x >= 0) & (x < side))[:, None, :] & ((y >= 0) & (y < side))[:, :, None]
    rows = torch.arange(len(piece))[:, None, None]
    taken = piece[rows, y.clamp(0, side - 1)[:, :, None], x.clamp(0, side - 1)[:, None, :]]
    return taken * inside


@cache
def _paints() -> Float[Tensor, "colours 3"]:
    return torch.tensor(list(PAINTS.values())) / 255


@cache
def _stamps(
    size: int,
) -> tuple[
    Float[Tensor, "nouns sides side side"],
    Float[Tensor, "nouns sides side side"],
    Int[Tensor, "nouns sides 2"],
]:
    """Opacity and light of every stamp at every size, from the upper left corner, and width and height."""
    lengths = [round(share * size) for share in SIDES]
    shape = (len(NOUNS), len(SIDES), max(lengths), max(lengths))
    opacity, light = torch.zeros(shape), torch.ones(shape)
    extents = torch.zeros(len(NOUNS), len(SIDES), 2, dtype=torch.long)
    for noun, name in enumerate(NOUNS):
        for kind, length in enumerate(lengths):
            shade, alpha = _piece(name, length)
            height, width = alpha.shape
            opacity[noun, kind, :height, :width] = torch.from_numpy(alpha)
            light[noun, kind, :height, :width] = torch.from_numpy(shade)
            extents[noun, kind] = torch.tensor([width, height])
    return opacity, light, extents


def _piece(noun: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Light and opacity of a stamp whose longer side is `side` pixels: [height, width]."""
    with Image.open(asset_path("stamps") / STAMPS / f"{CUT_OUTS[noun]}.png") as opened:
        picture = opened.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 64)).getbbox())
    factor = side / max(picture.size)
    shape = tuple(max(3, round(length * factor)) for length in picture.size)
    pixels = np.asarray(picture.resize(shape, Image.Resampling.BOX)).astype(np.float32)
    grey, alpha = pixels[..., :3].mean(-1), pixels[..., 3] / 255
    low, high = np.percentile(grey[alpha > 0.5], (5, 95))
    shade = (1 + (grey - high) / max(high - low, 40.0)).clip(0, 1)
    return _DARKEST + (1 - _DARKEST) * shade, alpha


# --- what a picture shows, by rule -----------------------------------------------------------------


def matched(
    pixels: Float[Tensor, "pictures 3 size size"],
) -> tuple[Bool[Tensor, "pictures nouns colours rows columns"], Float[Tensor, "pictures nouns"]]:
    """Where painted stamps fit, by rule, and how well each noun's best one does.

    A stamp's fit at a place is 1 - (squared error of the stamp) / (squared error of white), over its box:
    1 for the same pixels, 0 for an empty place. It counts where it is at least .6 and the best fit of all
    stamps within a third of the picture's side.
    """
    fits = _fits(pixels)
    best = fits.amax((1, 2))[:, None]
    peaks = (fits >= _FITS) & (fits == _around(best)[:, :, None])
    return peaks, fits.amax((2, 3, 4))


def match_margins(
    pixels: Float[Tensor, "pictures 3 size size"],
) -> Float[Tensor, "pictures nouns"]:
    """By how much `matched` finds each noun, or falls short of it; it finds those of zero or more.

    The best over the noun's peaks p of min(fit(p) - .6, fit(p) - best fit of another noun within a third of the
    side).
    """
    fits = _fits(pixels).amax(2)
    around = _around(fits)
    top = around.topk(2, 1)
    first = top.indices[:, :1] == torch.arange(len(NOUNS))[:, None, None]
    rival = torch.where(first, top.values[:, 1:], top.values[:, :1])
    margins = torch.minimum(fits - _FITS, fits - rival)
    return margins.where(fits == around, -torch.inf).amax((-2, -1))


def _fits(
    pixels: Float[Tensor, "pictures 3 size size"],
) -> Float[Tensor, "pictures nouns colours rows columns"]:
    """How well each noun's stamp fits around each place, at the better of its sizes."""
    templates, boxes = _templates(pixels.shape[-1])
    margin = templates.shape[-1] // 2
    deviations = F.pad(pixels - 1, (margin,) * 4)
    energy = F.conv2d(deviations.square().sum(1, keepdim=True), boxes[:, None])
    product = F.conv2d(deviations, templates)
    own = templates.square().sum((1, 2, 3))[:, None, None]
    fits = 1 - (energy.repeat_interleave(len(COLOURS), 1) - 2 * product + own) / own
    return fits.unflatten(1, (len(NOUNS), len(SIDES), len(COLOURS))).amax(2)


def _around(
    values: Float[Tensor, "pictures some rows columns"],
) -> Float[Tensor, "pictures some rows columns"]:
    """The highest value within a third of the side."""
    reach = values.shape[-1] // 6
    return F.max_pool2d(values, 2 * reach + 1, 1, reach)


@cache
def _templates(
    size: int,
) -> tuple[Float[Tensor, "templates 3 odd odd"], Float[Tensor, "shapes odd odd"]]:
    """Deviations from white of every painted stamp on a square around its centre, and its box.

    Templates run over nouns, sizes, colours; shapes over nouns and sizes.
    """
    opacity, light, extents = _stamps(size)
    odd = opacity.shape[-1] + 1 | 1
    corners = (odd - extents.flatten(0, 1)) // 2
    alpha = _pasted(opacity.flatten(0, 1), corners, odd)
    shade = _pasted(light.flatten(0, 1), corners, odd)
    painted = 2 * shade[:, None, None] * _paints()[None, :, :, None, None] - 2
    templates = (alpha[:, None, None] * painted).flatten(0, 1)
    boxes = torch.zeros_like(alpha)
    for box, (x, y), (width, height) in zip(boxes, corners, extents.flatten(0, 1), strict=True):
        box[y : y + height, x : x + width] = 1
    return templates, boxes
