"""Photographs for restoration: twelve of nature to train on, five others to test on, and how they are spoilt.

The two sides come from different collections, so no photograph lies on both. Those of nature are
shrunk, which brings their detail closer together; the others are used as they are.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reattend.assets.store import asset_path
from reattend.data.scenes import PHOTOS

TEST = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
SHRUNK = 8  # photographs of nature, of up to 2,560 pixels, by each side


def _open(path: Path, shrunk: int) -> UInt8[Tensor, "3 height width"]:
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    if shrunk > 1:
        size = tuple(side // shrunk for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).contiguous()


@cache
def photographs(side: str) -> dict[str, UInt8[Tensor, "3 height width"]]:
    """Photographs by name: twelve on the side "train", five on the side "test".

    Raises:
        ValueError: for another side.
    """
    if side == "train":
        paths = sorted((asset_path("nature_photos") / PHOTOS).glob("*.jpg"))
        return {path.stem: _open(path, SHRUNK) for path in paths}
    if side == "test":
        folder = asset_path("sample_photos") / "skimage" / "data"
        return {Path(name).stem: _open(folder / name, 1) for name in TEST}
    raise ValueError(f"unknown side '{side}'; there are: train, test")


def random_crops(
    photos: list[UInt8[Tensor, "3 _ _"]], count: int, size: int, generator: torch.Generator
) -> Float[Tensor, "count 3 size size"]:
    """Random crops in [0, 1] of random photographs, mirrored and turned by right angles at random.

    Raises:
        ValueError: when a photograph is smaller than a crop.
    """
    if min(min(photo.shape[1:]) for photo in photos) < size:
        raise ValueError(f"a photograph is smaller than a crop of {size} pixels")
    crops = []
    for chosen in torch.randint(len(photos), (count,), generator=generator).tolist():
        photo = photos[chosen]
        top, left = (
            int(torch.randint(side - size + 1, (), generator=generator)) for side in photo.shape[1:]
        )
        crop = photo[:, top : top + size, left : left + size]
        mirror, turns = (
            torch.randint(2, (), generator=generator),
            torch.randint(4, (), generator=generator),
        )
        crop = crop.flip(2) if mirror else crop
        crops.append(crop.rot90(int(turns), (1, 2)))
    return torch.stack(crops).float() / 255


def spoil(
    clean: Float[Tensor, "batch 3 height width"],
    scale: int,
    noise: float,
    generator: torch.Generator,
) -> Float[Tensor, "batch 3 rows columns"]:
    """Shrink by bicubic interpolation with antialiasing, then add normal noise of deviation `noise`."""
    if scale > 1:
        clean = F.interpolate(
            clean, scale_factor=1 / scale, mode="bicubic", antialias=True, align_corners=False
        )
    if noise:
        clean = clean + noise * torch.randn(clean.shape, generator=generator)
    return clean
