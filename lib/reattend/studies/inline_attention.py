"""What is asked of InLine, linear and softmax attention: confused queries, local weight, masks, time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from reattend.backbones.trained.inline_attention import centred
from reattend.vision.inline_attention import (
    SCORES,
    InlineDeiT,
    inline_attention,
    inline_scores,
)

Run = Callable[[], object]

# Networks on test canvases --------------------------------------------------------------------------


@torch.no_grad()
def class_logits(
    model: InlineDeiT,
    pixels: UInt8[Tensor, "items 1 height width"],
    visible: Bool[Tensor, "tokens tokens"] | None = None,
    batch: int = 250,
) -> Float[Tensor, "items classes"]:
    """Logits of every canvas; `visible` masks the attention of all blocks."""
    device = model.pos_embed.device
    seen = None if visible is None else visible.to(device)
    return torch.cat([model(centred(part).to(device), seen).cpu() for part in pixels.split(batch)])


def nats_and_accuracy(
    logits: Float[Tensor, "items classes"], labels: Int[Tensor, " items"]
) -> tuple[float, float]:
    """Mean nats of the right class, and the share of canvases that are classified rightly in per cent."""
    right = logits.argmax(1) == labels
    return F.cross_entropy(logits, labels).item(), 100 * right.double().mean().item()


# Neighbours on the map ------------------------------------------------------------------------------


def neighbours(side: int) -> Bool[Tensor, "tokens tokens"]:
    """Whether token j lies in the 3 x 3 neighbourhood of token i, itself included, on a side x side map."""
    rows, columns = torch.arange(side**2) // side, torch.arange(side**2) % side
    near_rows = (rows[:, None] - rows).abs() <= 1
    return near_rows & ((columns[:, None] - columns).abs() <= 1)


def without_neighbours(side: int) -> Bool[Tensor, "tokens tokens"]:
    """The mask that hides the up to eight neighbours of every token, but not itself."""
    return ~neighbours(side) | torch.eye(side**2, dtype=torch.bool)


def without_others(side: int, seed: int) -> Bool[Tensor, "tokens tokens"]:
    """The mask that hides as many keys from every token, drawn from those beyond its neighbourhood.

    Of those that are left, none is hidden where a map is too small to have as many.
    """
    near = neighbours(side)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(near.shape, generator=generator).masked_fill(near, 2.0).argsort(1).argsort(1)
    hidden = order < near.sum(1, keepdim=True) - 1
    return ~(hidden & ~near)


def local_mass(scores: Float[Tensor, "batch heads tokens tokens"], absolute: bool = True) -> float:
    """Share of the weight that lies in the 3 x 3 neighbourhood, mean over queries, heads and pictures.

    Args:
        absolute: take |weight| over the sum of |weights|, since InLine's weights may be negative; else the sum
            of the weights as they are.
    """
    near = neighbours(round(scores.shape[-1] ** 0.5)).to(scores.device)
    if absolute:
        scores = scores.abs() / scores.abs().sum(-1, keepdim=True).clamp(min=1e-12)
    return (scores * near).sum(-1).mean().item()


@torch.no_grad()
def local_mass_by_layer(
    model: InlineDeiT, pixels: UInt8[Tensor, "items 1 height width"], absolute: bool = True
) -> list[float]:
    """`local_mass` of every block of a network on these canvases."""
    inputs = model.attention_inputs(centred(pixels).to(model.pos_embed.device))
    found = zip(model.blocks, inputs, strict=True)
    return [local_mass(block.attn.scores(x), absolute) for block, x in found]


# Confused queries -----------------------------------------------------------------------------------


def confused_share(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads keys dim"],
    operator: str,
    *,
    apart: float = 0.5,
    alike: float = 0.05,
) -> float:
    """Of the pairs of queries of one picture that lie apart, the share whose scores are nearly the same.

    A pair lies apart when |q_i - q_j| exceeds `apart` times the median distance of the head's queries in the
    picture; scores are nearly the same when their distance is below `alike` times the median distance of the
    scores there. Medians, because a few peaked rows would make all others look alike.

    Args:
        q, k: queries and keys, phi applied.
    """
    far = _relative_distances(q) > apart
    close = _relative_distances(SCORES[operator](q, k)) < alike
    return ((far & close).sum() / far.sum().clamp(min=1)).item()


def _relative_distances(
    x: Float[Tensor, "batch heads tokens dim"],
) -> Float[Tensor, "batch heads tokens tokens"]:
    """Distances of all pairs over their median, by picture and head."""
    distances = torch.cdist(x, x)
    middle = distances.flatten(-2).median(-1).values[..., None, None]
    return distances / middle.clamp(min=1e-12)


def one_length(
    q: Float[Tensor, "batch heads tokens dim"],
) -> Float[Tensor, "batch heads tokens dim"]:
    """Queries scaled to the mean length of their head in the picture: the placebo of `confused_share`."""
    length = q.norm(dim=-1, keepdim=True)
    return q * (length.mean(-2, keepdim=True) / length.clamp(min=1e-12))


@torch.no_grad()
def confusion_by_layer(
    model: InlineDeiT, pixels: UInt8[Tensor, "items 1 height width"], equal_lengths: bool = False
) -> list[float]:
    """`confused_share` of every block in percent; of queries of one length where asked."""
    found = []
    inputs = model.attention_inputs(centred(pixels).to(model.pos_embed.device))
    for block, x in zip(model.blocks, inputs, strict=True):
        q, k, _ = block.attn.queries_keys_values(x)
        q = one_length(q) if equal_lengths else q
        found.append(100 * confused_share(q, k, block.attn.operator))
    return found


# Time -----------------------------------------------------------------------------------------------


def attention_runs(
    tokens: int, dim: int, explicit: bool, device: torch.device | str = "cpu"
) -> dict[str, Run]:
    """Forward passes of one head on random inputs: "InLine", "softmax" (PyTorch's fused kernel), and where
    `explicit` the same InLine weights as an N x N matrix ("InLine, N x N").
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, dim, generator=generator).to(device) for _ in range(3))
    runs: dict[str, Run] = {
        "InLine": partial(inline_attention, q, k, v),
        "softmax": partial(F.scaled_dot_product_attention, q, k, v),
    }
    if explicit:
        runs["InLine, N x N"] = lambda: inline_scores(q, k) @ v
    return runs
