"""What is asked of DiffQKV attention: what decoding costs over its cache, and what values that are left out cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reattend.attention.decoding import read_prompt
from reattend.attention.method import AttentionMethod, Budget
from reattend.language_modeling.sigma import (
    SelectiveV,
    largest,
    replicated,
    shared_sum,
    shared_weights,
)
from reattend.studies.recycled import follow
from reattend.trunks.language import GatedFeedForward, Trunk, innermost

Run = Callable[[], object]


# --- decoding ------------------------------------------------------------------------------------


@torch.no_grad()
def decoding_runs(
    context: int,
    heads: tuple[int, int, int],
    dim: int,
    augmented: int,
    device: torch.device | str = "cpu",
) -> dict[str, Run]:
    """One layer's attention of one new token over a cache of `context` random entries, in four forms.

    "grouped": as many key heads as value heads; "DiffQKV": fewer; "DiffQKV + AugQ": its queries go
    through a gated unit of width `augmented` first; "K replicated": its keys are copied to as many heads
    as there are values in every step, as frameworks do whose kernels want equal numbers.

    Args:
        heads: of queries, keys and values.
        dim: width of a head.
    """
    generator = torch.Generator().manual_seed(0)
    of_queries, _, of_values = heads
    q, k, v, full = (
        torch.randn(1, n, t, dim, generator=generator).to(device)
        for n, t in zip((*heads, of_values), (1, context, context, context), strict=True)
    )
    unit = GatedFeedForward(of_queries * dim, augmented).to(device)

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return shared_sum(shared_weights(q, k), v)

    def augment() -> Tensor:
        return unit(q.transpose(1, 2).flatten(2)).unflatten(-1, (of_queries, dim)).transpose(1, 2)

    runs: dict[str, Run] = {
        "grouped": lambda: attend(q, full),
        "DiffQKV": lambda: attend(q, k),
        "DiffQKV + AugQ": lambda: attend(augment(), k),
        "K replicated": lambda: attend(q, replicated(k, of_values)),
    }
    return {name: torch.no_grad()(run) for name, run in runs.items()}


# --- selective V ---------------------------------------------------------------------------------


def random_scores(weights: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead keys"]:
    """A random order of the entries that a token sees."""
    return torch.rand_like(weights)


def places(weights: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead keys"]:
    """The order in which the entries came."""
    return torch.arange(weights.shape[-1], device=weights.device).to(weights).expand_as(weights)


ORDERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda weights: weights,
    "random": random_scores,
    "latest": places,
}
"""What says which values are read: the method's, and two that do not look at the weights."""


class SelectiveChunk(AttentionMethod):
    """Reads a chunk behind a prompt as if its tokens were decoded one by one with `SelectiveV`.

    What a layer computes for a token depends on those before it only, so that all tokens of a text can
    be scored in one pass.

    Args:
        method: says how many values are read, and what becomes of their weights.
        order: a name in `ORDERS`.

    Attributes:
        mass: sum of the weights whose values were read, the mean over queries, heads and batch of each
            layer so far.
    """

    def __init__(self, method: SelectiveV, order: str = "largest"):
        super().__init__()
        self.method, self.order = method, ORDERS[order]
        self.mass: list[float] = []

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        """The chunk's attention."""
        weights = shared_weights(query, key, scale)
        queries, keys = weights.shape[-2:]
        seen = torch.arange(keys - queries + 1, keys + 1).tolist()
        reads = torch.tensor([self.method.values_read(n) for n in seen], device=key.device)
        future = torch.ones_like(weights[0, 0], dtype=torch.bool).triu(keys - queries + 1)
        chosen = largest(self.order(weights).masked_fill(future, -1), reads)
        self.mass.append((weights * chosen).sum(-1).mean().item())
        return shared_sum(self.method.kept(weights, chosen), value)


@dataclass(frozen=True)
class Way:
    """How many values are read of a cache, which, and what becomes of their weights."""

    keep: Budget
    order: str = "largest"
    renormalise: bool = True

    def chunk(self) -> SelectiveChunk:
        """A reader of its own for one text."""
        return SelectiveChunk(SelectiveV(keep=self.keep, renormalise=self.renormalise), self.order)


def decoded_nats(
    model: nn.Module, text: Int[Tensor, " length"], prompt: int, ways: Sequence[Way]
) -> dict[Way | None, tuple[float, float]]:
    """Mean nats of the tokens behind a prompt that was read densely, and the mass of the weights that were kept.

    Under None: all values, mass 1. The first token behind the prompt is left out: no way has a say in it.
    """
    start = read_prompt(model, text[None, :prompt])
    given = text[None, prompt:]
    found = {None: (follow(model, AttentionMethod(), start, given).nll[0, 1:].mean().item(), 1.0)}
    for way in ways:
        chunk = way.chunk()
        nll = follow(model, chunk, start, given).nll[0, 1:].mean().item()
        found[way] = nll, float(np.mean(chunk.mass))
    return found


# --- maps ----------------------------------------------------------------------------------------


@torch.no_grad()
def layer_maps(
    model: Trunk, tokens: Int[Tensor, "batch length"], layer: int
) -> Float[Tensor, "batch heads length length"]:
    """The attention maps of one layer, on what its mixer reads there."""
    mixer, maps = innermost(model.blocks[layer].mixer), []
    hook = mixer.register_forward_pre_hook(lambda m, read: maps.append(m.weights(read[0])))
    try:
        model(tokens)
    finally:
        hook.remove()
    return maps[0].cpu()
