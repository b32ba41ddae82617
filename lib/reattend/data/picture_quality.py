"""PSNR and SSIM on the luma of pictures, as super-resolution reports them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def luma(pictures: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch height width"]:
    """Y of ITU-R BT.601 in 16 .. 235, of colours in [0, 1]."""
    weights = pictures.new_tensor([65.481, 128.553, 24.966])
    return 16 + (pictures * weights[:, None, None]).sum(-3)


def _cropped(x: Float[Tensor, "*batch height width"], border: int):
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]


def psnr(
    pictures: Float[Tensor, "*batch 3 height width"],
    originals: Float[Tensor, "*batch 3 height width"],
    border: int = 0,
) -> Float[Tensor, "*batch"]:
    """Peak signal-to-noise ratio of the luma in dB, peak 255; infinite for equal pictures.

    Args:
        border: pixels left out on all sides; usually the scale.
    """
    difference = _cropped(luma(pictures.clamp(0, 1)) - luma(originals), border)
    return 10 * torch.log10(255**2 / difference.double().square().mean((-2, -1)))


def ssim(
    pictures: Float[Tensor, "*batch 3 height width"],
    originals: Float[Tensor, "*batch 3 height width"],
    border: int = 0,
) -> Float[Tensor, "*batch"]:
    """Structural similarity of the luma: Gaussian windows of 11 x 11, sigma 1.5, where they fit."""
    x, y = (_cropped(luma(p), border).double() for p in (pictures.clamp(0, 1), originals))
    places = torch.arange(-5, 6, dtype=torch.double)
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = (window / window.sum())[None, None]

    def blurred(z: Tensor) -> Tensor:
        return F.conv2d(z.flatten(0, -3)[:, None] if z.dim() > 2 else z[None, None], window)

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    found = light * (2 * covariance + c2) / (var_x + var_y + c2)
    return found.mean((1, 2, 3)).view(x.shape[:-2])
