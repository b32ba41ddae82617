"""Two tasks on maps of signs that tell apart what windows can pass on: one across borders, one about the whole map.

*Displaced signs*: every pixel must name the sign that stands some pixels above and to the left of it.
*Faint gain*: every pixel must multiply its sign by a gain that is the same all over the map, and of which
each pixel shows a very noisy reading. Nothing is repeated, so nothing can be learnt by heart.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor


class Maps(NamedTuple):
    """What is read, and what must be said, at every pixel."""

    inputs: Float[Tensor, "items side side channels"]
    targets: Float[Tensor, "items side side"]


def _signs(items: int, side: int, generator: Generator) -> Float[Tensor, "items side side"]:
    return 2.0 * torch.randint(2, (items, side, side), generator=generator) - 1


def displaced_signs(items: int, side: int, distance: int, generator: Generator) -> Maps:
    """Random signs; the target is the sign `distance` pixels above and as many to the left.

    Where there is no such pixel the target is zero; see `has_source`.
    """
    signs = _signs(items, side, generator)
    targets = torch.zeros_like(signs)
    targets[:, distance:, distance:] = signs[:, :-distance, :-distance]
    return Maps(signs[..., None], targets)


def has_source(side: int, distance: int) -> Bool[Tensor, "side side"]:
    """Pixels whose displaced sign lies on the map."""
    inner = torch.arange(side) >= distance
    return inner[:, None] & inner


def source_in_window(
    side: int, distance: int, window: int, shift: int = 0
) -> Bool[Tensor, "side side"]:
    """Pixels whose displaced sign lies in their own window, of windows that start at `shift`."""
    joined = (torch.arange(side) - shift) % window >= distance
    return has_source(side, distance) & joined[:, None] & joined


def faint_gain(items: int, side: int, noise: float, generator: Generator) -> Maps:
    """Random signs beside noisy readings of a gain; the target is sign times gain.

    The gain of a map is standard normal; every reading adds normal noise of deviation `noise`, so the
    best answer from n readings leaves noise² / (noise² + n) of the target's variance.
    """
    signs = _signs(items, side, generator)
    gain = torch.randn(items, 1, 1, generator=generator)
    readings = gain + noise * torch.randn(items, side, side, generator=generator)
    return Maps(torch.stack([signs, readings], -1), signs * gain)
