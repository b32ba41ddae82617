"""Vertical-slash attention with fixed budgets, after MInference.

Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse
Attention", NeurIPS 2024, arXiv 2407.02490. The last queries estimate which key columns ("vertical")
and which diagonals ("slash") hold the attention mass; the same number of each is kept for every
head. Here both are chosen among whole blocks, so that every method of the suite runs through the
same kernel.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import diagonal_sums, query_block_count
from reattend.attention.dense import dense_attention
from reattend.attention.method import (
    BlockSparseMethod,
    Budget,
    budget_of,
    check_budget,
    check_count,
    first_above,
)


class VerticalSlash(BlockSparseMethod):
    """Fixed numbers of block columns and block diagonals per head; sink and main one forced."""

    def __init__(
        self,
        *,
        verticals: Budget = 8,
        slashes: Budget = 8,
        last_queries: int = 64,
        block_size: int = 64,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            verticals: block columns of each head, the sink column among them; a float is a share of
                all columns.
            slashes: block diagonals of each head, the main diagonal among them; or a share.
            last_queries: queries at the end of the prompt that estimate the pattern.
        """
        super().__init__(block_size=block_size, backend=backend)
        self.verticals = check_budget("verticals", verticals, at_least=1)
        self.slashes = check_budget("slashes", slashes, at_least=1)
        self.last_queries = check_count("last_queries", last_queries, at_least=1)

    def fewest_blocks(self) -> int | None:
        """One column and one diagonal must be left, which cross inside the triangle."""
        above = [first_above(budget) for budget in (self.verticals, self.slashes)]
        return None if None in above else max(3, *above)

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        weights = last_weights(query, key, self.last_queries, scale)
        vertical, slash = vertical_slash_mass(weights, self.block_size)
        return vertical_slash_blocks(
            _best(vertical, budget_of(self.verticals, vertical.shape[-1])),
            _best(slash, budget_of(self.slashes, slash.shape[-1])),
            query_block_count(query.shape[2], key.shape[2], self.block_size),
        )


def last_weights(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    last_queries: int,
    scale: float,
) -> Float[Tensor, "batch query_heads last_queries keys"]:
    """Exact causal attention weights of the last queries (fewer for a shorter prompt)."""
    _, weights = dense_attention(
        query[:, :, -last_queries:], key, key, scale=scale, causal=True, return_weights=True
    )
    return weights


def vertical_slash_mass(
    weights: Float[Tensor, "batch heads last_queries keys"], block_size: int
) -> tuple[Float[Tensor, "batch heads key_blocks"], Float[Tensor, "batch heads key_blocks"]]:
    """Mass of each block column, and of each block diagonal (token offsets o b ... o b + b - 1)."""
    return (
        _sum_blocks(weights.sum(dim=-2), block_size),
        _sum_blocks(diagonal_sums(weights), block_size),
    )


def vertical_slash_blocks(
    verticals: Bool[Tensor, "batch heads key_blocks"],
    slashes: Bool[Tensor, "batch heads key_blocks"],
    query_blocks: int,
) -> Bool[Tensor, "batch heads query_blocks key_blocks"]:
    """Union of block columns and block diagonals; slash o lies o blocks below the main one."""
    key_blocks = verticals.shape[-1]
    column = torch.arange(key_blocks, device=verticals.device)
    row = torch.arange(query_blocks, device=verticals.device) + key_blocks - query_blocks
    distance = row[:, None] - column
    on_slash = slashes[..., distance.clamp_min(0)]
    return (verticals[..., None, :] | on_slash) & (distance >= 0)


def _sum_blocks(
    mass: Float[Tensor, "batch heads keys"], block_size: int
) -> Float[Tensor, "batch heads key_blocks"]:
    padded = F.pad(mass, (0, -mass.shape[-1] % block_size))
    return padded.unflatten(-1, (-1, block_size)).sum(dim=-1)


def _best(
    mass: Float[Tensor, "batch heads key_blocks"], count: int
) -> Bool[Tensor, "batch heads key_blocks"]:
    """The `count` entries of largest mass; entry 0 (sink, main diagonal) is always among them."""
    ranked = mass.index_fill(-1, torch.zeros(1, dtype=torch.long, device=mass.device), float("inf"))
    best = ranked.topk(min(count, mass.shape[-1]), dim=-1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, best, True)
