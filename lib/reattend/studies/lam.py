"""Local attribution maps (LAM, arXiv 2011.11156) and the diffusion index: which pixels a patch of the output uses.

Integrated gradients of how much structure the patch shows, along a path from a blurred input to the input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def structure(outputs: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, " batch"]:
    """Sum of the lengths of all pixels' gradients (forward differences), over pixels and channels."""
    down = outputs[..., 1:, :-1] - outputs[..., :-1, :-1]
    across = outputs[..., :-1, 1:] - outputs[..., :-1, :-1]
    return (down.square() + across.square()).sqrt().sum((1, 2, 3))


def blurred(
    picture: Float[Tensor, "channels height width"], sigma: float, size: int = 9
) -> Float[Tensor, "channels height width"]:
    """A picture under a Gaussian of size x size pixels, mirrored at its ends."""
    half = size // 2
    line = torch.arange(-half, half + 1, dtype=picture.dtype, device=picture.device)
    line = torch.exp(-line.square() / (2 * (sigma + 1e-5) ** 2))
    line = line / line.sum()
    padded = F.pad(picture[None], (half, half, half, half), mode="reflect")
    kernel = (line[:, None] * line).expand(len(picture), 1, -1, -1)
    return F.conv2d(padded, kernel, groups=len(picture))[0]


def path_contributions(
    measure: Callable[[Tensor], Float[Tensor, " steps"]], path: Float[Tensor, "steps ..."]
) -> tuple[Float[Tensor, ...], float]:
    """Integrated gradients: what every input adds to a measure along a path; and what they add in all.

    Each step's move times the gradient at its end. Contributions sum to the measure's rise from the
    path's start to its end, up to the error of finite steps.

    Args:
        measure: a number for each input of a batch.
    """
    inputs = path.detach().requires_grad_()
    found = measure(inputs)
    (gradients,) = torch.autograd.grad(found.sum(), inputs)
    contributions = (gradients[1:].nan_to_num() * path.diff(dim=0)).sum(0)
    return contributions, (found[-1] - found[0]).item()


def local_attribution(
    restorer: Callable[[Tensor], Tensor],
    picture: Float[Tensor, "channels height width"],
    corner: tuple[int, int],
    side: int,
    steps: int = 50,
    sigma: float = 1.2,
) -> tuple[Float[Tensor, "channels height width"], float]:
    """LAM: what every input pixel adds to the structure of a patch of the output; and what they add in all.

    The path blurs the input by `sigma` at first and not at all in the end. Where the structure has no
    gradient (an edge of length 0) nothing is added.

    Args:
        restorer: of a batch of pictures.
        corner: upper left pixel of the patch in the output.
        side: of the patch, in pixels of the output.
    """
    sigmas = torch.linspace(sigma, 0, steps + 1)[:-1].tolist()
    path = torch.stack([blurred(picture, one) for one in sigmas] + [picture])
    top, left = corner
    return path_contributions(
        lambda inputs: structure(restorer(inputs)[..., top : top + side, left : left + side]), path
    )


def gini(values: Float[Tensor, ...]) -> float:
    """Gini coefficient of non-negative numbers: 0 when all are equal, 1 - 1/n when one holds all."""
    ordered = values.flatten().double().sort().values
    n = len(ordered)
    ranks = torch.arange(1, n + 1, dtype=torch.double, device=ordered.device)
    return (((2 * ranks - n - 1) * ordered).sum() / (n * ordered.sum())).item()


def diffusion_index(contributions: Float[Tensor, "channels height width"]) -> float:
    """100 (1 - Gini) of the pixels' absolute contributions: 100 when all are used alike."""
    pixels = contributions.sum(0).abs()
    return 100 * (1 - gini(pixels / pixels.max() + 1e-7))
