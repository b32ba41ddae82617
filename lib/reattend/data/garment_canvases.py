"""Fashion-MNIST garments at random scale and place on a larger black canvas.

On the plain pictures every small network does well, and so does a linear classifier; here a linear classifier
on pixels is far behind, since what a pixel says depends on where the garment lies and how large it is.
"""

import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor
from torch.nn import functional as F

from reattend.data.images import fashion_mnist

SIDE = 32
SCALES = (10, 28)
"""Side of the canvas, and smallest and largest side of a garment, in pixels."""


def garment_canvases(
    split: str, count: int, seed: int
) -> tuple[UInt8[Tensor, "count 1 side side"], Int[Tensor, " count"]]:
    """The first `count` garments of a split of Fashion-MNIST, each on a canvas of its own, and their classes.

    Scale and place are drawn uniformly; garments are shrunk with antialiasing.

    Raises:
        ValueError: when the split has fewer garments, or is unknown.
    """
    garments = fashion_mnist(limit=count)
    chosen = garments.indices(split)
    if len(chosen) < count:
        raise ValueError(f"'{split}' has {len(chosen)} garments, {count} were asked for")
    generator = Generator().manual_seed(seed)
    scales = torch.randint(SCALES[0], SCALES[1] + 1, (count,), generator=generator)
    places = torch.rand(2, count, generator=generator)
    canvases = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.uint8)
    grey = garments.pixels[chosen, :1].float()
    for scale in scales.unique().tolist():
        items = (scales == scale).nonzero()[:, 0]
        small = F.interpolate(grey[items], size=(scale, scale), mode="bilinear", antialias=True)
        top, left = (places[:, items] * (SIDE - scale + 1)).long()
        rows, columns = (start[:, None] + torch.arange(scale) for start in (top, left))
        canvases[items[:, None, None], 0, rows[:, :, None], columns[:, None]] = (
            small[:, 0].round().to(torch.uint8)
        )
    return canvases, garments.labels[chosen]
