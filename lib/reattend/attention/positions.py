"""Positions inside attention: rotary embedding and linear biases."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary(
    x: Float[Tensor, "*lead length dim"], offset: int = 0, base: float = 10_000.0
) -> Float[Tensor, "*lead length dim"]:
    """Rotates queries or keys by their position, so that scores depend on distances only.

    Su et al. 2021 (arXiv 2104.09864), equation 15, in the half-split layout of Llama: dimension i is
    paired with i + dim / 2 and turned by position * base ** (-2 i / dim) radians.

    Args:
        offset: position of the first row.

    Raises:
        ValueError: for an odd `dim`.
    """
    length, dim = x.shape[-2:]
    if dim % 2:
        raise ValueError(f"rotary embedding needs an even width, got {dim}")
    rates = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
    places = torch.arange(offset, offset + length, device=x.device, dtype=torch.float64)
    angles = places[:, None] * rates
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1)


def alibi_slopes(heads: int, device: torch.device | None = None) -> Float[Tensor, " heads"]:
    """Slopes of the linear biases: a geometric series from 2 ** (-8 / heads) to 2 ** -8.

    Press et al. 2022 (arXiv 2108.12409), section 3, for any number of heads. Their code gives the same for a
    power of two; for other numbers it fills the series of the next lower power with slopes of the next higher.
    """
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)


def alibi_bias(
    heads: int, queries: int, keys: int, device: torch.device | None = None
) -> Float[Tensor, "heads queries keys"]:
    """-slope * distance for keys at or before the query; the last query stands at the last key.

    Keys after the query get a positive value: mask them.
    """
    rows = torch.arange(keys - queries, keys, device=device)
    distance = rows[:, None] - torch.arange(keys, device=device)
    return -alibi_slopes(heads, device)[:, None, None] * distance
