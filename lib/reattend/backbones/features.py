"""Cached features of frozen encoders: half-precision tokens of a set of pictures at named layers.

Extracting features costs far more than training a probe on them (about 25 pictures a second and core
for a ViT-S at 112 pixels), so it is done once. `cached_tokens` keeps them in the user's cache under a
key made of everything they depend on: the encoder's weights, the pictures, the layers and the size.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float16, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from reattend.assets.store import cache_directory

Encode = Callable[[Tensor], Tensor]
"""uint8 pictures [items, 3, height, width] -> states [layers, items, tokens, dim]."""


def extract(
    encode: Encode, pixels: UInt8[Tensor, "items 3 height width"], label: str, batch: int = 32
) -> Float16[Tensor, "layers items tokens dim"]:
    """Run a frozen encoder over all pictures; half precision halves the memory and changes no probe.

    Args:
        encode: maps a batch of pictures to the states of the wanted layers.
        label: of the progress bar.
        batch: pictures encoded together.

    Raises:
        ValueError: when a feature is not finite in half precision.
    """
    parts = [
        encode(pixels[start : start + batch]).to("cpu", torch.float16)
        for start in tqdm(range(0, len(pixels), batch), desc=label, mininterval=2.0)
    ]
    tokens = torch.cat(parts, 1)
    if not tokens.isfinite().all():
        raise ValueError(f"{label}: a feature is too large for half precision, or not a number")
    return tokens


def content_key(model: nn.Module, pixels: Tensor, layers: Sequence[int], size: int) -> str:
    """Hash of what features depend on: weights, pictures, layers, picture size in pixels."""
    digest = hashlib.sha256(repr((type(model).__name__, list(layers), size)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + _bytes(tensor))
    digest.update(repr(tuple(pixels.shape)).encode() + _bytes(pixels))
    return digest.hexdigest()[:24]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def cached_tokens(
    model: nn.Module,
    encode: Encode,
    pixels: UInt8[Tensor, "items 3 height width"],
    layers: Sequence[int],
    size: int,
    label: str,
    folder: Path | None = None,
) -> Float16[Tensor, "layers items tokens dim"]:
    """Features of the pictures, from the cache or extracted now.

    Args:
        model: the encoder; its weights enter the key.
        encode: maps a batch of pictures to the states of `layers` at `size` pixels.
        folder: where features are kept; by default the user's cache.
    """
    folder = folder or cache_directory() / "features"
    path = folder / f"{content_key(model, pixels, layers, size)}.safetensors"
    if not path.is_file():
        write_tokens(path, extract(encode, pixels, label))
    return read_tokens(path)


def write_tokens(path: Path, tokens: Float16[Tensor, "*lead tokens dim"]) -> None:
    """Write features so that the file appears whole or not at all, also when runs race."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".features-") as scratch:
        written = Path(scratch) / path.name
        save_file({"tokens": tokens.contiguous()}, written)
        os.replace(written, path)


def read_tokens(path: Path) -> Float16[Tensor, "*lead tokens dim"]:
    """Features written by `write_tokens`."""
    return load_file(path)["tokens"]
