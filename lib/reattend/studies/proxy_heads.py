"""ProxyAttn's experiment: any ranking of blocks under any budgets, mass that a ranking finds, likeness of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from reattend.attention.baselines.antidiagonal import antidiagonal_scores
from reattend.attention.baselines.block_topk import exact_block_mass, pooled_scores
from reattend.attention.baselines.vertical_slash import last_weights
from reattend.attention.blocks import forced_blocks, top_k_blocks
from reattend.attention.dense import causal_sdpa, dense_attention, repeat_key_heads
from reattend.attention.method import BlockSparseMethod
from reattend.attention.statistics import block_mass
from reattend.long_context.proxyattn import ProxyAttn, proxy_heads, proxy_scores
from reattend.timing import device_clock, paired_ratio

Ranking = Callable[[Tensor, Tensor, float], Tensor]
"""Query, key and scale of a layer -> scores, [batch, heads, rows, columns]; a single head stands for all."""

Plan = Mapping[int, Int[Tensor, "#batch #heads #rows"]]
"""Blocks to compute, by layer."""


class Planner(ProxyAttn):
    """ProxyAttn that keeps the budgets of the last prompt as `plan`."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.plan: dict[int, Int[Tensor, "batch heads 1"]] = {}

    def budget(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Int[Tensor, "batch query_heads"]:
        """As ProxyAttn's."""
        budget = super().budget(query, key, scale=scale, layer=layer)
        self.plan[layer] = budget[..., None]
        return budget


class Planned(BlockSparseMethod):
    """A ranking under given budgets; the first block and the diagonal one are always computed."""

    def __init__(self, rank: Ranking, plan: Plan, block_size: int) -> None:
        super().__init__(block_size=block_size)
        self.rank, self.plan = rank, plan

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        scores = self.rank(query, key, scale)
        scores = scores.expand(*query.shape[:2], *scores.shape[-2:])
        return top_k_blocks(scores, self.plan[layer], sink=1)


# Rankings


def by_proxy(block_size: int, groups: int, stride: int = 1) -> Ranking:
    """ProxyAttn's own: for every head the scores of its group."""

    def rank(query: Tensor, key: Tensor, scale: float) -> Tensor:
        scores = proxy_scores(
            query, key, groups=groups, block_size=block_size, stride=stride, scale=scale
        )
        return scores.repeat_interleave(query.shape[1] // groups, dim=1)

    return rank


def by_own_maps(block_size: int, stride: int = 1) -> Ranking:
    """Every head's own max-pooled map: as many proxies as heads."""

    def rank(query: Tensor, key: Tensor, scale: float) -> Tensor:
        own = repeat_key_heads(key, query.shape[1])
        return proxy_scores(
            query, own, groups=query.shape[1], block_size=block_size, stride=stride, scale=scale
        )

    return rank


def by_average_pooling(block_size: int, stride: int = 1) -> Ranking:
    """One proxy head whose map is pooled by the average instead of the maximum; whole prompts."""

    def rank(query: Tensor, key: Tensor, scale: float) -> Tensor:
        queries, keys = (proxy_heads(x[:, :, ::stride], 1) for x in (query, key))
        _, weights = dense_attention(
            queries, keys, keys, scale=scale, causal=True, return_weights=True
        )
        return block_mass(weights, block_size // stride)

    return rank


def by_pooled_blocks(block_size: int) -> Ranking:
    """Mean query times mean key of each pair of blocks, head by head."""
    return lambda query, key, scale: pooled_scores(query, key, block_size, scale)


def by_antidiagonals(block_size: int, stride: int) -> Ranking:
    """XAttention's sums along antidiagonals, head by head."""
    return lambda query, key, scale: antidiagonal_scores(query, key, block_size, stride, scale)


def by_true_mass(block_size: int) -> Ranking:
    """The oracle: the mass that every block of a head really holds."""
    return lambda query, key, scale: exact_block_mass(query, key, block_size, scale)


def by_recency(blocks: int) -> Ranking:
    """Placebo: the latest blocks first, whatever the content."""
    latest = torch.arange(float(blocks)).expand(1, 1, blocks, blocks)
    return lambda query, key, scale: latest.to(query.device)


def by_chance(blocks: int, seed: int) -> Ranking:
    """Placebo: every head and row in an order of its own, drawn anew at every call."""
    generator = Generator().manual_seed(seed)

    def rank(query: Tensor, key: Tensor, scale: float) -> Tensor:
        luck = torch.rand(*query.shape[:2], blocks, blocks, generator=generator)
        return luck.to(query.device)

    return rank


# Budgets


def shuffled(plan: Plan, seed: int) -> dict[int, Tensor]:
    """Placebo: the budgets of each layer in a random order of its heads."""
    generator = Generator().manual_seed(seed)
    return {
        layer: budget[:, torch.randperm(budget.shape[1], generator=generator)]
        for layer, budget in plan.items()
    }


def level(plan: Plan, rows: int) -> dict[int, Tensor]:
    """One budget for all heads of a layer that computes as many blocks, to the nearest block.

    A whole budget would be too coarse, so that some rows, evenly spread, compute one block more.

    Args:
        plan: budgets of one sequence, one for each head and of at least two blocks.
        rows: blocks of the prompt.
    """
    seen = torch.arange(1, rows + 1)  # blocks that each row sees
    computed = torch.minimum(torch.arange(1, rows + 1)[:, None], seen).sum(-1)  # by budget
    even = {}
    for layer, budget in plan.items():
        target = computed[budget.flatten().cpu() - 1].double().mean()
        base = int((computed <= target).sum())
        more = round((target - computed[base - 1]).item()) if base < rows else 0
        picked = torch.linspace(base, rows - 1, more).round().long()
        even[layer] = (base + torch.zeros_like(seen).index_fill(0, picked, 1)).view(1, 1, -1)
        even[layer] = even[layer].to(budget.device)
    return even


# Masses


def mass_found(
    scores: Float[Tensor, "#batch #heads rows columns"],
    mass: Float[Tensor, "batch heads rows columns"],
    density: float,
) -> float:
    """Attention mass beyond the forced blocks that a ranking finds, over what the best ranking finds.

    Each row of the second half computes a share `density` of the blocks that it sees. Summed over heads
    and rows; the first block and the diagonal one, which every method computes, do not count.
    """
    rows, columns = mass.shape[-2:]
    free = ~forced_blocks(rows, columns, sink=1, device=mass.device)
    seen = torch.arange(1, rows + 1, device=mass.device)
    budget = (density * seen).round().long().clamp_min(2).view(1, 1, -1)
    late = slice(rows // 2, None)

    def found(scores: Tensor) -> Tensor:
        chosen = top_k_blocks(scores.expand(mass.shape), budget, sink=1) & free
        return (mass * chosen)[:, :, late].sum()

    return (found(scores) / found(mass)).item()


def likeness(
    query: Float[Tensor, "1 query_heads queries dim"],
    key: Float[Tensor, "1 key_heads keys dim"],
    scale: float,
    block_size: int,
    sinks: int = 4,
) -> dict[str, Tensor]:
    """How much attention a head has on the tokens that another head looks at most.

    Heads are compared by the mean attention of the last block of queries on the tokens between the
    `sinks` first ones and that block, as shares of it; "most" are an eighth of these tokens.

    Returns:
        "heads": Float[Tensor, "heads heads"], mass of the column's head on the row's top tokens;
        "recency": Float[Tensor, " heads"], mass of each head on as many of the latest tokens.
    """
    weights = last_weights(query, key, block_size, scale)[0].mean(dim=1)[:, sinks:-block_size]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    count = round(weights.shape[-1] / 8)
    top = torch.zeros_like(weights).scatter(-1, weights.topk(count).indices, 1.0)
    return {"heads": top @ weights.T, "recency": weights[:, -count:].sum(dim=-1)}


# Times


def speeds(
    made: BlockSparseMethod,
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    scale: float,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """How many times as fast as fused dense attention a method is, and its selection alone, by round.

    Keys stand for values, which are of the same shape.
    """

    def dense() -> Tensor:
        return causal_sdpa(query, key, key, scale=scale)

    def whole() -> Tensor:
        return made.prefill(query, key, key, scale=scale, layer=0)

    def selection() -> Tensor:
        return made.block_mask(query, key, scale=scale)

    settings = {"rounds": rounds, "clock": device_clock(query.device)}
    return paired_ratio(dense, whole, **settings), paired_ratio(dense, selection, **settings)


@torch.inference_mode()
def layer_speeds(
    layers: Iterable[tuple[Tensor, Tensor, float]],
    gamma: float,
    block_size: int,
    rounds: int,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times as fast as dense attention of ProxyAttn and of mean-pooled blocks with its number of blocks.

    ProxyAttn as published: stride 2, at least three blocks.

    Args:
        layers: query, key and scale of each.

    Returns:
        every round of every layer by method, and by "<method>, selection alone"; mean density by method.
    """
    names = ("ProxyAttn", "mean-pooled blocks")
    whole: dict[str, list[float]] = {name: [] for name in names}
    alone: dict[str, list[float]] = {name: [] for name in names}
    densities: dict[str, list[float]] = {name: [] for name in names}
    for query, key, scale in layers:
        proxied = Planner(gamma=gamma, stride=2, min_budget=3 * block_size, block_size=block_size)
        proxied.block_mask(query, key, scale=scale)
        rows = key.shape[2] // block_size
        pooled = Planned(by_pooled_blocks(block_size), level(proxied.plan, rows), block_size)
        for name, made in zip(names, (proxied, pooled), strict=True):
            of_whole, of_selection = speeds(made, query, key, scale, rounds)
            whole[name] += list(of_whole)
            alone[name] += list(of_selection)
            densities[name].append(made.density())
    found = whole | {f"{name}, selection alone": values for name, values in alone.items()}
    return found, {name: float(np.mean(values)) for name, values in densities.items()}


# Costs and tables


def estimate_shares(lengths: Sequence[int]) -> dict[str, list[float]]:
    """Multiply-adds of estimating the blocks over full attention's scores, for 32 heads and blocks of 128.

    Proxies add the attention of the last block's queries, in all heads, which sets the budgets.
    """
    last = [2 * 128 / length for length in lengths]
    return {
        "one proxy of 32 heads, s = 4": [1 / 512 + x for x in last],
        "8 proxies, s = 4": [8 / 512 + x for x in last],
        "antidiagonals, S = 8": [1 / 8] * len(lengths),
        "mean-pooled blocks": [1 / 128**2] * len(lengths),
    }


def masses_table(masses: pd.DataFrame, costs: Mapping[str, float]) -> pd.DataFrame:
    """Mass found by ranking and density, mean over windows, and the cost of the estimate where there is one.

    Args:
        masses: columns ranking, density and found.
        costs: multiply-adds over full attention's scores, by ranking.
    """
    by_density = masses.pivot_table(index="ranking", columns="density", values="found", sort=False)
    return by_density.join(pd.Series(costs, name="cost of the estimate")).reset_index()
