"""Mosaics of Fashion-MNIST garments: several real pictures in one, with a class for every patch.

Endless in number, and dense: what stands in a patch is known, and differs within a picture.
"""

import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor
from torch.nn import functional as F

PATCH = 8
TILE = 32
"""Sides of a patch and of a garment with its margin, in pixels."""
LIT = 20  # grey value from which a pixel belongs to a garment


def garment_mosaics(
    garments: UInt8[Tensor, "items 28 28"],
    labels: Int[Tensor, " items"],
    count: int,
    tiles: int,
    generator: Generator,
) -> tuple[UInt8[Tensor, "count 1 side side"], Int[Tensor, "count patches"]]:
    """Squares of tiles x tiles random garments, and the class that each patch shows.

    A patch has its garment's class when more than half of its pixels belong to it, else -1.
    """
    chosen = torch.randint(len(labels), (count, tiles, tiles), generator=generator)
    margin = (TILE - garments.shape[-1]) // 2
    framed = F.pad(garments[chosen], (margin,) * 4)
    side = tiles * TILE
    pixels = framed.transpose(2, 3).reshape(count, 1, side, side)
    inside = F.avg_pool2d((pixels > LIT).float(), PATCH).flatten(1) > 0.5
    across = TILE // PATCH
    classes = labels[chosen].repeat_interleave(across, 1).repeat_interleave(across, 2)
    return pixels, torch.where(inside, classes.flatten(1), -1)
