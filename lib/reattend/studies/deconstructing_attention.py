"""What is asked of simplified attention: its maps and scores by layer, what skipped layers cost, look-ups, costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reattend.attention.positions import rotary
from reattend.language_modeling.deconstructing_attention import NonApproximate
from reattend.trunks.language import Trunk, innermost
from reattend.trunks.mixers import SoftmaxAttention

# --- taking parts out of trained models ---------------------------------------------------------------------


@contextmanager
def skipping(
    model: Trunk, layers: Sequence[int], part: Literal["layer", "mixer"] = "layer"
) -> Iterator[Trunk]:
    """The model without some of its trained layers, or without their mixers alone (section 4.2).

    Layers count from 0. Nothing is trained again, and the model is whole again afterwards.
    """

    def silent(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    def unchanged(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return arguments[0]

    with ExitStack() as hooks:
        for layer in layers:
            block = model.blocks[layer]
            skipped, hook = (block, unchanged) if part == "layer" else (block.mixer, silent)
            hooks.callback(skipped.register_forward_hook(hook).remove)
        yield model


@contextmanager
def common_embeddings(model: Trunk) -> Iterator[Trunk]:
    """The model with one embedding, the mean of all in the batch, in the place of each that its mixers read.

    Maps that are made of embeddings then know positions alone: the placebo of `StaticEmbQK`.
    """

    def common(module: nn.Module, arguments: tuple, more: dict) -> tuple[tuple, dict]:
        read = more["embeddings"]
        return arguments, more | {"embeddings": read.mean((0, 1)).expand_as(read)}

    with ExitStack() as hooks:
        for block in model.blocks:
            if getattr(block.mixer, "reads_embeddings", False):
                hook = block.mixer.register_forward_pre_hook(common, with_kwargs=True)
                hooks.callback(hook.remove)
        yield model


# --- maps and scores -----------------------------------------------------------------------------


@torch.no_grad()
def mixer_calls(
    model: Trunk, tokens: Int[Tensor, "rows length"]
) -> list[tuple[nn.Module, Tensor, dict]]:
    """(mixer, what it reads, its keywords) of every layer, inside all wrappers."""
    found = []

    def note(module: nn.Module, arguments: tuple, more: dict) -> None:
        found.append((module, arguments[0], more))

    with ExitStack() as hooks:
        for block in model.blocks:
            hook = innermost(block.mixer).register_forward_pre_hook(note, with_kwargs=True)
            hooks.callback(hook.remove)
        model(tokens)
    return found


@torch.no_grad()
def maps_by_layer(
    model: Trunk, tokens: Int[Tensor, "rows length"]
) -> list[Float[Tensor, "maps heads length length"] | None]:
    """Attention maps of every layer, one map for all texts where they share it; None where nothing is mixed."""
    return [
        mixer.weights(x, **more) if hasattr(mixer, "weights") else None
        for mixer, x, more in mixer_calls(model, tokens)
    ]


def pair_logits(
    mixer: SoftmaxAttention, x: Float[Tensor, "rows length width"]
) -> Float[Tensor, "rows heads length length"]:
    """q . k / sqrt(dim) of standard attention with rotary positions, zero for later tokens."""
    q, k = mixer.project(x).split(x.shape[-1], dim=-1)[:2]
    q, k = (rotary(t.unflatten(-1, (mixer.heads, -1)).transpose(1, 2)) for t in (q, k))
    return (q @ k.mT / math.sqrt(q.shape[-1])).tril()


@torch.no_grad()
def logits_by_layer(
    model: Trunk, tokens: Int[Tensor, "rows length"]
) -> list[Float[Tensor, " logits"] | None]:
    """All numbers that the softmax of a layer is taken of, where it is standard or Non-approximate; else None."""
    found = []
    for mixer, x, _ in mixer_calls(model, tokens):
        if isinstance(mixer, NonApproximate):
            found.append(mixer.scores(x).flatten())
        elif isinstance(mixer, SoftmaxAttention):
            logits = pair_logits(mixer, x)
            seen = torch.ones_like(logits, dtype=torch.bool).tril()
            found.append(logits[seen])
        else:
            found.append(None)
    return found


# --- indicators of a map (the paper's figure 1) --------------------------------------------------


def indicators(maps: Float[Tensor, "maps heads length length"]) -> dict[str, float]:
    """Entropy, concentration, diversity of heads, sink and local focus, averaged over maps and heads.

    With rows i that sum to one over j <= i: "entropy", the mean over rows of -sum a log a; "concentration", the
    Frobenius norm of a map; "diversity", the mean over j <= i of the standard deviation over heads (divided by the
    number of heads); "sink", the mean of the first column; "local 0" .. "local 3", the mean of the diagonal and of
    the three below it.
    """
    length = maps.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool, device=maps.device).tril()
    found = {
        "entropy": torch.special.entr(maps.clamp(min=0)).sum(-1).mean(),
        "concentration": torch.linalg.matrix_norm(maps).mean(),
        "diversity": maps.std(dim=1, correction=0)[:, seen].mean(),
        "sink": maps[..., 0].mean(),
    }
    for back in range(4):
        found[f"local {back}"] = maps.diagonal(-back, -2, -1).mean()
    return {name: value.item() for name, value in found.items()}


# --- look-ups in the row language ----------------------------------------------------------------


def seen_once(tokens: Int[Tensor, "rows length"]) -> Bool[Tensor, "rows predictions"]:
    """Where the token to be continued stood exactly once before in its row, so that its follower was seen once."""
    here = tokens[:, :-1]
    same = here[:, :, None] == here[:, None]
    return same.tril(-1).sum(-1) == 1


# --- costs of decoding (the paper's tables 5 to 8) -----------------------------------------------


def paper_cost(
    variant: str, batch: int, length: int, width: int, heads: int
) -> tuple[int | None, int | None]:
    """(operations, bytes of cache in half precision) of one layer that decodes a token, as the paper prints them.

    None where we have no formula of the paper.
    """
    projections, pairs = 6 * batch * width**2, 2 * batch * length * width
    stream = 2 * length * width
    operations = {
        "Standard": projections + 2 * pairs,
        "Non-approximate": projections,
        "RndEmbQK": stream + pairs + projections,
    }
    cache = {
        "Standard": 2 * pairs,
        "MLP": 0,
        "Approximate": 6 * batch * width + 4 * batch * width**2 // heads,
        "Non-approximate": 2 * batch * width + 4 * batch * heads,
        "RndEmbQK": stream + pairs,
        "FixedSeqQK": stream + pairs,
    }
    return operations.get(variant), cache.get(variant)


@torch.no_grad()
def counted_cost(
    mixer: nn.Module, x: Float[Tensor, "rows length width"], **more: Tensor
) -> tuple[int, int]:
    """(operations, bytes of cache in half precision) of the last token of `x`, behind the others in a cache.

    Counted from the matrix products that run, the output projection among them, and from the tensors that the
    cache holds afterwards. The fused kernel of `SoftmaxAttention` is not counted: `StaticEmbQK` does the same work.
    """
    cache: dict = {}
    mixer(x[:, :-1], cache=cache, **{name: value[:, :-1] for name, value in more.items()})
    with FlopCounterMode(display=False) as counter:
        mixer(x[:, -1:], cache=cache, **{name: value[:, -1:] for name, value in more.items()})
    numbers = sum(value.numel() for value in cache.values() if isinstance(value, Tensor))
    return counter.get_total_flops(), 2 * numbers
