"""What is asked of DiffQKV attention: what decoding costs over its cache, and what values that are left out cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from reattend.attention.method import AttentionMethod
from reattend.language_modeling.sigma import (
    SelectiveV,
    largest,
    replicated,
    shared_sum,
    shared_weights,
)
from reattend.trunks.language import GatedFeedForward

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
