"""Budgets of blocks per row: by pooled queries and keys, and by exact mass (an upper bound).

The pooled scores are the common core of block selection in, for example, MInference's block-sparse
pattern (Jiang et al., NeurIPS 2024, arXiv 2407.02490) and MoBA (Lu et al., 2025, arXiv 2502.13189).
"""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import (
    block_count,
    cumulative_mass_blocks,
    pool_blocks,
    top_k_blocks,
)
from reattend.attention.dense import dense_attention, repeat_key_heads
from reattend.attention.method import (
    BlockSparseMethod,
    Budget,
    budget_of,
    check_budget,
    check_count,
    check_share,
    first_above,
)
from reattend.attention.statistics import block_mass

# Rows of attention weights that the oracle holds at once, in tokens.
ORACLE_ROWS = 512


class BlockTopK(BlockSparseMethod):
    """The k key blocks of each query block whose mean key agrees best with its mean query."""

    def __init__(
        self,
        *,
        k: Budget = 16,
        sink: int = 1,
        local: int = 0,
        block_size: int = 64,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            k: blocks of each row, the forced ones among them; a float is a share of the key blocks.
            sink: blocks at the start of the sequence that are forced, like the diagonal block.
            local: blocks before the diagonal one that are forced.
        """
        super().__init__(block_size=block_size, backend=backend)
        self.k = check_budget("k", k, at_least=1)
        self.sink = check_count("sink", sink)
        self.local = check_count("local", local)

    def fewest_blocks(self) -> int | None:
        above = first_above(self.k)
        # Sinks, the diagonal block and those before it are read in any case.
        return above and max(2, above, self.sink + self.local + 2)

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        scores = pooled_scores(query, key, self.block_size, scale)
        k = budget_of(self.k, scores.shape[-1])
        return top_k_blocks(scores, k, sink=self.sink, local=self.local)


class OracleTopK(BlockSparseMethod):
    """Blocks chosen by the mass they really hold: the best any choice of equal size can cover.

    Computes the dense weights, so it saves nothing; it is an upper bound, not a method. A fixed
    budget `k` per row, or the share `mass` of each row's attention to cover; 16 blocks where
    neither is given.
    """

    def __init__(
        self,
        *,
        k: Budget | None = None,
        mass: float | None = None,
        sink: int = 1,
        block_size: int = 64,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            k: blocks of each row, the forced ones among them; a float is a share of the key blocks.
            mass: share of the attention mass of each row of blocks to cover, in (0, 1].
            sink: blocks at the start of the sequence that are forced, like the diagonal block.

        Raises:
            ValueError: both `k` and `mass` are given, or one has a wrong value.
        """
        super().__init__(block_size=block_size, backend=backend)
        if k is not None and mass is not None:
            raise ValueError("OracleTopK takes either k or mass")
        k = 16 if k is None and mass is None else k
        self.k = None if k is None else check_budget("k", k, at_least=1)
        self.mass = None if mass is None else check_share("mass", mass)
        self.sink = check_count("sink", sink)

    def fewest_blocks(self) -> int | None:
        above = 2 if self.k is None else first_above(self.k)
        return None if self.mass == 1.0 else above and max(2, above, self.sink + 2)

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        mass = exact_block_mass(query, key, self.block_size, scale)
        if self.k is not None:
            return top_k_blocks(mass, budget_of(self.k, mass.shape[-1]), sink=self.sink)
        # The softmax of the logarithm gives the shares of each row back.
        return cumulative_mass_blocks(mass.log(), self.mass, sink=self.sink, diagonal=True)


def pooled_scores(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch query_heads query_blocks key_blocks"]:
    """Scaled products of the mean query and the mean key of each pair of blocks."""
    queries = pool_blocks(query, block_size, offset=key.shape[2] - query.shape[2])
    keys = repeat_key_heads(pool_blocks(key, block_size), query.shape[1])
    return scale * (queries @ keys.transpose(-2, -1))


def exact_block_mass(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch query_heads query_blocks key_blocks"]:
    """Dense causal attention mass inside each block, from a limited number of rows at a time."""
    queries, keys = query.shape[2], key.shape[2]
    step = max(ORACLE_ROWS // block_size, 1) * block_size
    # Cut where blocks of queries begin, which is at absolute positions.
    first = keys - queries
    cuts = [first, *range(first - first % step + step, keys, step), keys]
    columns = block_count(keys, block_size)
    masses = []
    for start, stop in itertools.pairwise(cuts):
        _, weights = dense_attention(
            query[:, :, start - first : stop - first],
            key[:, :, :stop],
            key[:, :, :stop],
            scale=scale,
            causal=True,
            return_weights=True,
        )
        mass = block_mass(weights, block_size)
        masses.append(F.pad(mass, (0, columns - mass.shape[-1])))
    return torch.cat(masses, dim=-2)
