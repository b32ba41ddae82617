"""Canvases with one picture somewhere, and the question that every place has to answer: which one is it?

Only places that hear of the picture can answer, so the share of right answers says how far a network's
tokens hear, and whether it has learned to use that.
"""

import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor


def lone_pictures(
    pictures: UInt8[Tensor, "pictures channels size size"],
    classes: Int[Tensor, " pictures"],
    items: int,
    side: int,
    generator: Generator,
) -> tuple[UInt8[Tensor, "items channels height width"], Int[Tensor, "items side side"]]:
    """Put a random picture into a random cell of black canvases; the same class is asked of every cell.

    Args:
        classes: numbers of the classes.
        side: cells a side; a picture fills its cell.
    """
    which = torch.randint(len(pictures), (items,), generator=generator)
    place = torch.randint(side**2, (items,), generator=generator)
    channels, size = pictures.shape[1], pictures.shape[-1]
    cells = pictures.new_zeros(items, side**2, channels, size, size)
    cells[torch.arange(items), place] = pictures[which]
    canvases = cells.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5)
    labels = classes[which][:, None, None].expand(-1, side, side)
    return canvases.flatten(4).flatten(2, 3), labels
