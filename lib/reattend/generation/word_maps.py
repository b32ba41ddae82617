"""Attention maps as methods for text-to-image models read them: smoothed, compared, parted into active and rest."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def smooth(maps: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows columns"]:
    """3 x 3 weights exp(-distance^2), brought to sum one, with reflected borders.

    The released code of Attend-and-Excite, which InitNO took over, calls this a Gaussian of s.d. .5; but its
    exponent is (distance / 2 s)^2, so the s.d. is .71.
    """
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=maps.dtype, device=maps.device))
    kernel = torch.outer(line, line) / line.sum() ** 2
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.conv2d(F.pad(flat, (1, 1, 1, 1), "reflect"), kernel[None, None]).reshape(maps.shape)


def overlap(
    first: Float[Tensor, "*batch rows columns"],
    second: Float[Tensor, "*batch rows columns"],
    offset: float = 0.0,
) -> Float[Tensor, "*batch"]:
    """sum min(A, B) / (sum (A + B) + offset): one half for equal maps, 0 for disjoint or empty ones."""
    shared = torch.minimum(first, second).sum((-2, -1))
    return shared / ((first + second).sum((-2, -1)) + offset).clamp(min=1e-9)


def otsu_threshold(values: Float[Tensor, "*batch items"]) -> Float[Tensor, "*batch"]:
    """The value that splits a set into "at most" and "above" with the largest variance between the two.

    The lowest of equally good ones; the value itself where all are equal.
    """
    ordered = values.sort(-1).values
    count = values.shape[-1]
    below = torch.arange(1, count).to(values)
    running = ordered.cumsum(-1)
    low = running[..., :-1] / below
    high = (running[..., -1:] - running[..., :-1]) / (count - below)
    between = below * (count - below) * (high - low).square()
    return ordered.gather(-1, between.argmax(-1, keepdim=True))[..., 0]


def joined_to_peak(
    maps: Float[Tensor, "batch concepts rows columns"],
    above: Bool[Tensor, "batch concepts rows columns"],
) -> Bool[Tensor, "batch concepts rows columns"]:
    """The component of `above`, through sides and not corners, that holds each map's highest place."""
    reached = F.one_hot(maps.flatten(-2).argmax(-1), maps[0, 0].numel()).bool().view_as(maps)
    while True:
        padded = F.pad(reached, (1, 1, 1, 1))
        beside = padded[..., :-2, 1:-1] | padded[..., 2:, 1:-1]
        beside |= padded[..., 1:-1, :-2] | padded[..., 1:-1, 2:]
        grown = reached | (beside & above)
        if torch.equal(grown, reached):
            return reached
        reached = grown
