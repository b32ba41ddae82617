"""Crops of real photographs, several of each: what a frozen tower is asked about where photographs are the units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Generator, Tensor

from reattend.assets.store import asset_path
from reattend.data.photographs import TEST
from reattend.data.scenes import PHOTOS


def _paths() -> list[Path]:
    """Twelve photographs of nature, then five of other things."""
    nature = sorted((asset_path("nature_photos") / PHOTOS).glob("*.jpg"))
    return [*nature, *(asset_path("sample_photos") / "skimage" / "data" / name for name in TEST)]


def _opened(path: Path, shorter: int) -> UInt8[Tensor, "3 height width"]:
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    factor = shorter / min(photo.size)
    size = tuple(max(shorter, round(side * factor)) for side in photo.size)
    pixels = np.array(photo.resize(size, Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).movedim(-1, 0)


def photo_crops(
    photos: int, crops: int, size: int, seed: int
) -> UInt8[Tensor, "photos crops 3 size size"]:
    """Random crops of the first `photos` of seventeen photographs, each of half the photograph's shorter side.

    Crops of one photograph are no independent pictures: average over them.

    Raises:
        ValueError: for more photographs than there are.
        AssetError: when the photographs have not been fetched.
    """
    paths = _paths()
    if photos > len(paths):
        raise ValueError(f"{photos} photographs were asked for, there are {len(paths)}")
    generator = Generator().manual_seed(seed)

    def crop(photo: Tensor) -> Tensor:
        top, left = (
            int(torch.randint(side - size + 1, (), generator=generator)) for side in photo.shape[1:]
        )
        return photo[:, top : top + size, left : left + size]

    opened = [_opened(path, 2 * size) for path in paths[:photos]]
    return torch.stack([torch.stack([crop(photo) for _ in range(crops)]) for photo in opened])
