"""Pictures of one recoloured cut-out each, and what shifts them away from those that a model was trained on.

The pictures are scenes of `reattend.data.attribute_scenes` with a single, large object. A shift is a fixed
change of the pixels, the object's included, in the way of the corruptions of ImageNet-C (1903.12261).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor

from reattend.data.attribute_scenes import make_attribute_scenes

_GREY = 127.5
_PART = 64  # scenes of one call: one call never shows a (colour, noun) pair twice, and there are 76


@dataclass(frozen=True)
class Objects:
    """Pictures as bytes 0..255 with positions in `COLOURS` and `NOUNS` of what they show."""

    pixels: UInt8[Tensor, "pictures 3 size size"]
    colours: Int[Tensor, " pictures"]
    nouns: Int[Tensor, " pictures"]

    def __len__(self) -> int:
        return len(self.nouns)

    def __getitem__(self, index: Tensor | slice) -> Objects:
        return Objects(self.pixels[index], self.colours[index], self.nouns[index])

    def to(self, device: torch.device | str) -> Objects:
        """The same on a device."""
        return Objects(self.pixels.to(device), self.colours.to(device), self.nouns.to(device))

    def shifted(self, domain: str) -> Objects:
        """The same pictures in another domain.

        Raises:
            ValueError: for an unknown domain; lists the known ones.
        """
        if domain not in DOMAINS:
            raise ValueError(f"unknown domain '{domain}'; there are: {', '.join(DOMAINS)}")
        return Objects(DOMAINS[domain](self.pixels), self.colours, self.nouns)


def make_objects(
    count: int, *, size: int, side: tuple[int, int], split: str = "train", seed: int = 0
) -> Objects:
    """Pictures of one object each; the same arguments give the same bytes.

    Args:
        size: side of the pictures in pixels.
        side: shortest and longest longer side of an object in pixels.
        split: whose photographs to use as grounds.

    Raises:
        ValueError, AssetError: as `make_attribute_scenes`.
    """
    parts = [
        make_attribute_scenes(
            _PART, objects=(1, 1), size=size, side=side, split=split, seed=1000 * seed + part
        )
        for part in range(-(-count // _PART))
    ]
    pixels = torch.cat([part.pixels for part in parts])[:count]
    colours = torch.cat([part.colours[:, 0] for part in parts])[:count]
    return Objects(pixels, colours, torch.cat([part.nouns[:, 0] for part in parts])[:count])


def jittered(
    pixels: UInt8[Tensor, "pictures 3 size size"], generator: Generator, most: int = 2
) -> UInt8[Tensor, "pictures 3 size size"]:
    """Each picture moved by up to `most` pixels both ways, edges repeated, and mirrored or not."""
    count, _, size, _ = pixels.shape
    device = pixels.device
    drawn = torch.randint(-most, most + 1, (2, count, 1), generator=generator, device=device)
    mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
    places = torch.arange(size, device=device)
    rows, columns = (places + drawn).clamp(0, size - 1)
    columns = torch.where(mirrored, columns.flip(1), columns)
    pictures = torch.arange(count, device=device)[:, None, None]
    return pixels[pictures, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


Shift = Callable[[UInt8[Tensor, "pictures 3 size size"]], UInt8[Tensor, "pictures 3 size size"]]


def _striped(period: int, amplitude: float, contrast: float, slanted: bool) -> Shift:
    """Stripes of `amplitude` x 127.5 over a picture of less contrast; upright, or along a diagonal."""

    def shift(pixels: UInt8[Tensor, "pictures 3 size size"]) -> Tensor:
        columns = torch.arange(pixels.shape[-1], device=pixels.device)
        places = columns[:, None] + columns if slanted else columns
        signs = 1 - 2 * (places // (period // 2) % 2)
        changed = _GREY + contrast * (pixels - _GREY) + amplitude * _GREY * signs
        return changed.round().clamp(0, 255).to(torch.uint8)

    return shift


DOMAINS: dict[str, Shift] = {
    "source": lambda pixels: pixels,
    "striped": _striped(period=4, amplitude=0.3, contrast=0.7, slanted=False),
    "slanted": _striped(period=4, amplitude=0.3, contrast=0.7, slanted=True),
    "turned": lambda pixels: pixels.rot90(1, (2, 3)),
    "negative": lambda pixels: 255 - pixels,
}
