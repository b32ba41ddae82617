"""ProxyAttn: block-sparse prefill in which a few proxy heads rank the blocks for all heads.

"ProxyAttn: Guided Sparse Attention via Representative Heads", ICLR 2026, arXiv 2509.24745.

Heads look at the same tokens, but not at equally many of them. So

1. *which* blocks matter is asked once for a group of heads, of a proxy whose queries and keys are
   the means of theirs: finely, pair of tokens by pair of tokens, and pooled by the maximum;
2. *how many* of them a head computes, it says itself: as many as hold a share gamma of the
   attention of its last block of queries.

    scores = proxy_scores(query, key, groups=1, block_size=128, stride=4)   [batch, groups, rows, columns]
    count = blocks_to_cover(last_block_mass(query, key, 128), gamma=0.95)   [batch, heads]

The official code and the full text were not to be had: this is built from two secondary accounts of
formulas and Algorithm 1, which agree; what they leave open is said where it is decided.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.baselines.vertical_slash import last_weights
from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import block_count, top_k_blocks
from reattend.attention.dense import masked_softmax, widened
from reattend.attention.method import BlockSparseMethod, check_count, check_share
from reattend.attention.statistics import block_mass

# Shares of float32 weights are summed in float64; what falls short of gamma by less has reached it.
ROUNDING = 1e-6


class ProxyAttn(BlockSparseMethod):
    """The method, for any model that `reattend.attention.host.attach` accepts. Decoding is dense.

    Each query block computes, of the blocks that it can see, as many as its head's budget says, in
    the order of its group's scores; early query blocks see no more than that and are dense. The
    first block and the diagonal one are always among them (our choice: the accounts do not say).
    """

    def __init__(
        self,
        *,
        gamma: float = 0.95,
        groups: int = 1,
        stride: int = 4,
        min_budget: int = 2048,
        block_size: int = 128,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            gamma: share of the attention of the last block of queries to cover, in (0, 1].
            groups: proxy heads; a divisor of the number of key heads. The paper uses 1 for
                Llama-3.1-8B and 4, one for each key head, for Qwen2.5-7B-1M.
            stride: one token in so many is scored; a divisor of `block_size`. Scores grow coarse
                where a block holds few of them: the paper's 4 leaves 32 in a block of 128.
            min_budget: least tokens that a head attends to, rounded up to blocks.
            block_size: tokens of a block.
            backend: see `reattend.attention.block_sparse.block_sparse_attention`.

        Raises:
            ValueError: a value is out of its range.
        """
        super().__init__(block_size=block_size, backend=backend)
        self.gamma = check_share("gamma", gamma)
        self.groups = check_count("groups", groups, at_least=1)
        self.stride = _check_stride(stride, block_size)
        self.min_budget = check_count("min_budget", min_budget)

    def is_short(self, keys: int) -> bool:
        """Whether an input of `keys` tokens is attended densely: the least budget covers it."""
        return block_count(keys, self.block_size) <= self._least

    def fewest_blocks(self) -> int | None:
        """The first block and the diagonal one are computed in any case."""
        return None if self.gamma == 1 else 3

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        """The blocks that each head computes: its budget of its group's best.

        Raises:
            ValueError: the key heads do not fall into `groups` equal groups.
        """
        scores = proxy_scores(
            query,
            key,
            groups=self.groups,
            block_size=self.block_size,
            stride=self.stride,
            scale=scale,
        )
        shared = scores.repeat_interleave(query.shape[1] // self.groups, dim=1)
        budget = self.budget(query, key, scale=scale, layer=layer)
        return top_k_blocks(shared, budget[..., None], sink=1)

    def budget(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Int[Tensor, "batch query_heads"]:
        """Blocks that every query block of a head computes, as far as it sees so many."""
        mass = last_block_mass(query, key, self.block_size, scale=scale)
        return blocks_to_cover(mass, self.gamma).clamp_min(min(self._least, mass.shape[-1]))

    @property
    def _least(self) -> int:
        return max(1, block_count(self.min_budget, self.block_size))


def proxy_heads(
    x: Float[Tensor, "batch heads tokens dim"], groups: int
) -> Float[Tensor, "batch groups tokens dim"]:
    """The mean over the heads of each of `groups` groups of neighbours, in float32 at least.

    Of queries it is the mean over the query heads, of keys the mean over the key heads; repeating
    a key head for its query heads would not change the mean. A rotary embedding is the same
    linear map for all heads, so it may come before the mean or after.

    Raises:
        ValueError: the heads do not fall into `groups` equal groups.
    """
    if x.shape[1] % groups:
        raise ValueError(f"{x.shape[1]} heads do not fall into {groups} equal groups")
    return widened(x).unflatten(1, (groups, -1)).mean(dim=2)


def proxy_scores(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    *,
    groups: int,
    block_size: int,
    stride: int = 1,
    scale: float | None = None,
) -> Float[Tensor, "batch groups query_blocks key_blocks"]:
    """A_g = maxpool(softmax(scale Q_g K_g^T)): the largest weight in each block of the proxy's map.

    Q_g and K_g are the means over a group's heads, so a group holds whole groups of query heads
    that share a key head. Means of many heads have small logits: the map is flatter than that of
    any of its heads, and good for ranking blocks, not for counting mass.

    Args:
        groups: proxy heads; divides the number of key heads.
        stride: one query and one key of every window of so many tokens is scored, the first that
            is there; windows are cut at absolute positions, like blocks. A query sees the keys up
            to its own position.
        scale: factor on the scores; 1 / sqrt(dim) when None.

    Raises:
        ValueError: the key heads do not fall into `groups` equal groups, or the stride does not
            divide the block.
    """
    _check_stride(stride, block_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys = torch.arange(0, key.shape[2], stride, device=key.device)
    queries = _first_of_windows(query.shape[2], key.shape[2], stride, query.device)
    weights = masked_softmax(
        scale
        * proxy_heads(query[:, :, queries], groups)
        @ proxy_heads(key[:, :, keys], groups).transpose(-2, -1),
        keys <= queries[:, None] + key.shape[2] - query.shape[2],
    )
    return block_max(weights, block_size // stride)


def block_max(
    weights: Float[Tensor, "*batch queries keys"], block_size: int
) -> Float[Tensor, "*batch query_blocks key_blocks"]:
    """The largest weight inside each block; weights are not negative.

    On the grid of `reattend.attention.blocks`: the last query stands at the last key.
    """
    queries, keys = weights.shape[-2:]
    padded = F.pad(
        weights, (0, -keys % block_size, (keys - queries) % block_size, -keys % block_size)
    )
    return padded.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size)).amax(dim=(-3, -1))


def last_block_mass(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch query_heads key_blocks"]:
    """Share of the attention of the last `block_size` queries that lies in each block of keys.

    The exact, causal attention of every head. The paper pools it by the average over queries and
    keys and divides by the sum: that is the mass, as here, where all blocks are whole.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = last_weights(query, key, block_size, scale)
    # The last queries may lie in two blocks of the grid.
    return block_mass(weights, block_size).sum(dim=-2) / weights.shape[-2]


def blocks_to_cover(mass: Float[Tensor, "*batch blocks"], gamma: float) -> Int[Tensor, "*batch"]:
    """Fewest blocks whose mass reaches a share gamma of the total, the largest first (Algorithm 1).

    All of them for gamma = 1. Algorithm 1 counts from 0 and so writes one less; the number is
    counted here, 1 where one block holds everything.
    """
    if gamma == 1:
        return torch.full_like(mass[..., 0], mass.shape[-1], dtype=torch.long)
    ranked = mass.double().sort(dim=-1, descending=True).values
    total = ranked.sum(dim=-1, keepdim=True)
    short = ranked.cumsum(dim=-1) < (gamma - ROUNDING) * total
    return short.sum(dim=-1) + 1


def _first_of_windows(
    queries: int, keys: int, stride: int, device: torch.device
) -> Int[Tensor, " windows"]:
    """Of each window of `stride` positions, the first query that is there, counted from the first."""
    position = torch.arange(queries, device=device) + keys - queries
    first = position % stride == 0
    first[:1] = True
    return first.nonzero()[:, 0]


def _check_stride(stride: int, block_size: int) -> int:
    check_count("stride", stride, at_least=1)
    if block_size % stride:
        raise ValueError(f"stride must divide the block size, {block_size}, got {stride}")
    return stride
