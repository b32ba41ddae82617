"""Pictures and token maps whose answer lies in how distant parts pair up: two tasks for local attention.

*Displaced pairs*: two pictures in random regions of a canvas, do their classes agree? *Neighbour
pairs*: two pairs of marks on a map of tokens, do the marks of a pair agree? In both, no part of the
input says anything about the answer by itself, and neither does any sum over single places.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

# Neighbour pairs ----------------------------------------------------------------------------------


class Marks(NamedTuple):
    """Maps with four marks; `places` are those of both pairs, `labels` 1 where both pairs agree."""

    maps: Float[Tensor, "items 1 side side"]
    labels: Int[Tensor, " items"]
    places: Int[Tensor, "items 2 2 2"]


def near_places(side: int, reach: int) -> Int[Tensor, "pairs 2 2"]:
    """All ordered pairs of different places of a map, at most `reach` apart in both directions."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    apart = (places[:, None] - places).abs().amax(-1)
    return places[((apart > 0) & (apart <= reach)).nonzero()]


def neighbour_pairs(
    items: int, side: int, reach: int, generator: torch.Generator, noise: float = 0.0
) -> Marks:
    """Two pairs of marks, +1 or -1, on empty maps: alike within both pairs, or within none.

    The marks of a pair lie at most `reach` places apart in both directions, anywhere on the map; the
    pairs keep more than 2 `reach` from each other. Two marks of every map are +1 and two -1, so only
    who stands beside whom tells the classes apart.

    Args:
        side: places a side.
        noise: standard deviation of normal noise on all places.

    Raises:
        ValueError: when the map is too small for two pairs.
    """
    if side < 4 * reach:
        raise ValueError(f"pairs of reach {reach} need a map of at least {4 * reach} places a side")
    options = near_places(side, reach)
    places = options[torch.randint(len(options), (items, 2), generator=generator)]
    while (close := _distance(places[:, 0], places[:, 1]) <= 2 * reach).any():
        again = (int(close.sum()), 2)
        places[close] = options[torch.randint(len(options), again, generator=generator)]
    labels = torch.randint(2, (items,), generator=generator)
    signs = 2 * torch.randint(2, (items, 2), generator=generator) - 1  # of the first marks
    signs[:, 1] = torch.where(labels == 1, -signs[:, 0], signs[:, 1])
    marks = torch.stack([signs, signs * (2 * labels[:, None] - 1)], -1)  # [item, pair, mark]
    maps = noise * torch.randn(items, 1, side, side, generator=generator)
    rows = torch.arange(items)[:, None, None]
    maps[rows, 0, places[..., 0], places[..., 1]] += marks
    return Marks(maps, labels, places)


def _distance(
    one: Int[Tensor, "items 2 2"], other: Int[Tensor, "items 2 2"]
) -> Int[Tensor, " items"]:
    """Least distance between the marks of two pairs, the larger of rows and columns."""
    return (one[:, :, None] - other[:, None]).abs().amax(-1).amin((1, 2))


# Displaced pairs ----------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Canvases with two pictures; `places` are their regions, `labels` 1 where the classes agree."""

    canvases: UInt8[Tensor, "items channels height width"]
    labels: Int[Tensor, " items"]
    places: Int[Tensor, "items 2"]


def distant_places(side: int) -> Int[Tensor, "pairs 2"]:
    """All ordered pairs of regions that do not touch, not even by a corner."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    apart = (places[:, None] - places).abs().amax(-1) > 1
    return apart.nonzero()


def displaced_pairs(
    pictures: UInt8[Tensor, "pictures channels size size"],
    classes: Int[Tensor, " pictures"],
    items: int,
    side: int,
    generator: torch.Generator,
) -> Pairs:
    """Put two pictures into random regions that do not touch; half of the pairs are of one class.

    A picture fills its region; the canvas is black elsewhere.

    Args:
        classes: numbers 0, 1, ..., each of at least one picture.
        items: number of pairs.
        side: regions a side.
    """
    first = torch.randint(len(pictures), (items,), generator=generator)
    labels = torch.randint(2, (items,), generator=generator)
    order = classes.argsort(stable=True)
    counts = classes.bincount()
    starts = counts.cumsum(0) - counts
    share = torch.rand(items, generator=generator)  # picks the mate, or the stranger's class
    own = classes[first]
    mate = order[starts[own] + (share * counts[own]).long()]
    other = (own + 1 + (share * (len(counts) - 1)).long()) % len(counts)
    within = torch.rand(items, generator=generator)
    stranger = order[starts[other] + (within * counts[other]).long()]
    second = torch.where(labels == 1, mate, stranger)
    options = distant_places(side)
    places = options[torch.randint(len(options), (items,), generator=generator)]
    channels, size = pictures.shape[1], pictures.shape[-1]
    cells = pictures.new_zeros(items, side**2, channels, size, size)
    rows = torch.arange(items)[:, None]
    cells[rows, places] = pictures[torch.stack([first, second], 1)]
    canvases = cells.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5)
    return Pairs(canvases.flatten(4).flatten(2, 3), labels, places)


def finds_partner(
    index: Int[Tensor, "items regions topk"], places: Int[Tensor, "items 2"]
) -> Bool[Tensor, "items 2"]:
    """Whether the region of each picture is routed to the region of the other."""
    seen = index[torch.arange(len(index))[:, None], places]
    return (seen == places.flip(1)[..., None]).any(-1)
