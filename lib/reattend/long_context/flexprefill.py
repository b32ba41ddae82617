"""FlexPrefill: sparse prefill with a pattern and a budget chosen per head and per input.

Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
Inference", ICLR 2025, arXiv 2502.20766.

The last block of queries is attended exactly and stands for all queries. From it each head decides

1. which pattern it follows: *query-aware* (scores of pooled queries and keys can be trusted) or
   *vertical-slash* (columns and diagonals), by a Jensen-Shannon divergence;
2. how many blocks it computes: as few as cover a share gamma of its attention mass.

Everything is vectorised over sequences and heads: budgets differ from head to head, so selections
are boolean block masks (grid of `reattend.attention.blocks`) rather than lists of indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.baselines.vertical_slash import vertical_slash_blocks
from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import (
    block_count,
    causal_block_mask,
    diagonal_sums,
    pool_blocks,
    query_block_count,
)
from reattend.attention.dense import causal_token_mask, masked_softmax, repeat_key_heads
from reattend.attention.method import BlockSparseMethod, check_count, check_share
from reattend.attention.statistics import js_divergence


@dataclass(frozen=True)
class Selection:
    """What every head chose, and why."""

    vertical: Float[Tensor, "batch heads keys"]  # mass of each key, mean over representatives
    slash: Float[Tensor, "batch heads keys"]  # mass of each distance query - key
    true_blocks: Float[Tensor, "batch heads key_blocks"]  # mass of each key block
    estimated_blocks: Float[Tensor, "batch heads key_blocks"]  # the same from pooled vectors
    divergence: Float[Tensor, "batch heads"]  # root of the Jensen-Shannon divergence of the two
    query_aware: Bool[Tensor, "batch heads"]  # the pattern; False is vertical-slash
    vertical_budget: Int[Tensor, "batch heads"]  # columns of blocks
    slash_budget: Int[Tensor, "batch heads"]  # diagonals of blocks
    blocks: Bool[Tensor, "batch heads query_blocks key_blocks"]  # the selected blocks


class FlexPrefill(BlockSparseMethod):
    """The method, for any model that `reattend.attention.host.attach` accepts. Decoding is dense.

    Inputs of up to max(2 block_size, min_budget rounded up to blocks) tokens are attended densely.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.95,
        tau: float = 0.1,
        min_budget: int = 1024,
        max_budget: int | None = None,
        block_size: int = 128,
        tokens_per_block: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            gamma: share of the attention mass to cover, in (0, 1].
            tau: heads whose divergence is below it are query-aware; 0 switches that pattern off.
                The divergence is at most sqrt(ln 2) = 0.8326.
            min_budget: least tokens covered by columns, and by diagonals, of each head.
            max_budget: most tokens of the same; None is no limit.
            block_size: tokens of a block. The paper uses 128 at contexts of 4k to 128k tokens.
            tokens_per_block: what a budget in tokens is divided by to become one in blocks; None is
                `block_size`. The official code always divides by 128, whatever its block size.
            backend: see `reattend.attention.block_sparse.block_sparse_attention`.

        Raises:
            ValueError: a value is out of its range.
        """
        super().__init__(block_size=block_size, backend=backend)
        self.gamma = check_share("gamma", gamma)
        if tau < 0:
            raise ValueError(f"tau must be at least 0, got {tau!r}")
        self.tau = tau
        self.min_budget = check_count("min_budget", min_budget)
        if max_budget is not None:
            check_count("max_budget", max_budget, at_least=1)
        self.max_budget = max_budget
        if tokens_per_block is not None:
            check_count("tokens_per_block", tokens_per_block, at_least=1)
        self.tokens_per_block = block_size if tokens_per_block is None else tokens_per_block

    def is_short(self, keys: int) -> bool:
        """Whether an input of `keys` tokens is attended densely."""
        lowest = block_count(self.min_budget, self.block_size) * self.block_size
        return keys <= max(2 * self.block_size, lowest)

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        """The blocks that each head computes (Algorithm 1)."""
        selection = self.explain(query, key, scale=scale)
        shares = selection.query_aware.double()
        total, sequences = self._query_aware.get(layer, (0.0, 0))
        self._query_aware[layer] = (total + shares.sum(dim=0), sequences + len(shares))
        return selection.blocks

    def explain(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> Selection:
        """The selection together with everything it was derived from."""
        size = self.block_size
        weights = representative_attention(query, key, size, scale)
        vertical, slash = vertical_mass(weights), slash_mass(weights)

        true_blocks = sum_blocks(vertical, size)
        estimated_blocks = estimated_block_mass(query, key, size, scale)
        divergence = js_divergence(true_blocks, estimated_blocks).sqrt()
        query_aware = divergence < self.tau

        # A query-aware head keeps columns and diagonals at their lowest budget next to its blocks.
        vertical_budget = self._budget(vertical).where(~query_aware, self._limits(vertical)[0])
        slash_budget = self._budget(slash).where(~query_aware, self._limits(slash)[0])
        rows = query_block_count(query.shape[2], key.shape[2], size)
        blocks = vertical_slash_blocks(
            best_blocks(true_blocks, vertical_budget),
            best_blocks(sum_blocks(slash, size), slash_budget),
            rows,
        )
        pooled = query_aware_blocks(query, key, size, scale, self.gamma)
        blocks = blocks | (pooled & query_aware[..., None, None])
        return Selection(
            vertical=vertical,
            slash=slash,
            true_blocks=true_blocks,
            estimated_blocks=estimated_blocks,
            divergence=divergence,
            query_aware=query_aware,
            vertical_budget=vertical_budget,
            slash_budget=slash_budget,
            blocks=blocks,
        )

    def query_aware_share(self) -> Float[Tensor, "layers heads"]:
        """Share of the prefills in which each head was query-aware; rows are the layers in order.

        Raises:
            ValueError: no input long enough to be sparse has been seen.
        """
        if not self._query_aware:
            raise ValueError("no selection was made: run the model on a long input first")
        means = [total / count for _, (total, count) in sorted(self._query_aware.items())]
        return torch.stack(means).float().cpu()

    def clear(self) -> None:
        """Forgets the recorded densities and patterns."""
        super().clear()
        self._query_aware: dict[int, tuple[Tensor | float, int]] = {}

    def _budget(self, mass: Float[Tensor, "batch heads keys"]) -> Int[Tensor, "batch heads"]:
        """Blocks needed to cover gamma of a mass over tokens, within the limits."""
        needed = blocks_of_tokens(tokens_to_cover(mass, self.gamma), self.tokens_per_block)
        return needed.clamp(*self._limits(mass))

    def _limits(self, mass: Float[Tensor, "batch heads keys"]) -> tuple[int, int]:
        """Least and most blocks of a budget."""
        most = block_count(mass.shape[-1], self.block_size)
        if self.max_budget is not None:
            most = min(most, block_count(self.max_budget, self.block_size))
        return min(max(1, block_count(self.min_budget, self.block_size)), most), most


def representative_attention(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    count: int,
    scale: float,
) -> Float[Tensor, "batch query_heads representatives keys"]:
    """Exact attention of the last `count` queries, softmax(scale Q_hat K^T), in float32."""
    last = query[:, :, -count:].float()
    scores = scale * last @ repeat_key_heads(key, query.shape[1]).float().transpose(-2, -1)
    return masked_softmax(scores, causal_token_mask(*scores.shape[-2:], device=query.device))


def vertical_mass(
    weights: Float[Tensor, "batch heads representatives keys"],
) -> Float[Tensor, "batch heads keys"]:
    """Attention mass of each key (a vertical line of the map), mean over the queries; sums to 1."""
    return weights.mean(dim=-2)


def slash_mass(
    weights: Float[Tensor, "batch heads representatives keys"],
) -> Float[Tensor, "batch heads keys"]:
    """Attention mass at each distance query - key (a slash of the map), over the number of queries.

    Sums to 1. Far distances have fewer entries than there are queries; as in the official code they
    are divided by the same number all the same.
    """
    return diagonal_sums(weights) / weights.shape[-2]


def sum_blocks(
    mass: Float[Tensor, "batch heads keys"], block_size: int
) -> Float[Tensor, "batch heads key_blocks"]:
    """Mass of each block of tokens (or of each block of distances, counted from distance 0)."""
    padded = F.pad(mass, (0, -mass.shape[-1] % block_size))
    return padded.unflatten(-1, (-1, block_size)).sum(dim=-1)


def estimated_block_mass(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch query_heads key_blocks"]:
    """Mass of each key block as pooled vectors predict it: softmax(scale mean(Q_hat) mean(K_j))."""
    pooled_query = query[:, :, -block_size:].float().mean(dim=2, keepdim=True)
    pooled_key = repeat_key_heads(pool_blocks(key.float(), block_size), query.shape[1])
    return (scale * pooled_query @ pooled_key.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]


def tokens_to_cover(
    mass: Float[Tensor, "batch heads keys"], gamma: float
) -> Int[Tensor, "batch heads"]:
    """Smallest number of entries whose mass exceeds gamma, the largest first.

    Greedy by mass is optimal: fewest entries for the mass, and most mass for the entries. gamma = 1
    gives one more than there are entries, which the caller's limit cuts.
    """
    return _covered(mass, gamma)[0].sum(dim=-1) + 1


def blocks_of_tokens(
    tokens: Int[Tensor, "batch heads"], tokens_per_block: int
) -> Int[Tensor, "batch heads"]:
    """A budget of tokens as one of blocks, floor(tokens / tokens_per_block) + 1."""
    return tokens // tokens_per_block + 1


def best_blocks(
    mass: Float[Tensor, "batch heads key_blocks"], budget: Int[Tensor, "batch heads"]
) -> Bool[Tensor, "batch heads key_blocks"]:
    """The `budget` heaviest blocks of each head; block 0 (sink or main diagonal) always is one."""
    forced = mass.clone()
    forced[..., 0] = torch.inf
    order = forced.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(mass.shape[-1], device=mass.device) < budget[..., None]
    return torch.zeros_like(kept).scatter(-1, order, kept)


def query_aware_blocks(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    scale: float,
    gamma: float,
) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
    """Blocks whose pooled attention covers gamma of the whole map: one budget for a head's rows.

    Unlike `tokens_to_cover` this keeps only the prefix that does not exceed gamma, as the official
    code does; the block that would cross the threshold is left out.
    """
    offset = key.shape[2] - query.shape[2]
    pooled_query = pool_blocks(query.float(), block_size, offset=offset)
    pooled_key = repeat_key_heads(pool_blocks(key.float(), block_size), query.shape[1])
    scores = scale * pooled_query @ pooled_key.transpose(-2, -1)
    causal = causal_block_mask(*scores.shape[-2:], device=scores.device)
    covered, order = _covered(masked_softmax(scores, causal).flatten(-2), gamma)
    kept = torch.zeros_like(covered).scatter(-1, order, covered)
    return kept.unflatten(-1, scores.shape[-2:]) & causal


def _covered(
    mass: Float[Tensor, "*batch entries"], gamma: float
) -> tuple[Bool[Tensor, "*batch entries"], Int[Tensor, "*batch entries"]]:
    """In falling order of mass: whether the running sum stays within gamma of the total; the order.

    The sum runs in float64 and is compared with its own end, so that gamma = 1 takes every entry
    instead of losing the tail to rounding.
    """
    ranked, order = mass.double().sort(dim=-1, descending=True, stable=True)
    running = ranked.cumsum(dim=-1)
    return running <= gamma * running[..., -1:], order
