"""Blocks chosen by sums along antidiagonals, after XAttention.

Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", ICML 2025, arXiv
2503.16428. Windows of `stride` queries and `stride` keys are scored by the sum of the products
along the antidiagonal of their tile, which meets every key once and crosses every column and
diagonal of the map.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import cumulative_mass_blocks, top_k_blocks
from reattend.attention.dense import causal_token_mask, masked_softmax, repeat_key_heads, widened
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


class Antidiagonal(BlockSparseMethod):
    """The blocks that hold a share of each row's antidiagonal scores, or a fixed number of them.

    The first block and the diagonal one are always among them.
    """

    def __init__(
        self,
        *,
        k: Budget | None = None,
        mass: float | None = None,
        stride: int = 8,
        block_size: int = 128,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            k: blocks of each row, the forced ones among them; a float is a share of the key blocks.
            mass: share of each row's scores to cover, in (0, 1]; the paper's threshold. 0.9 where
                neither is given.
            stride: tokens of a window; a divisor of `block_size`.
            block_size: tokens of a block.

        Raises:
            ValueError: both `k` and `mass` are given, or one has a wrong value.
        """
        super().__init__(block_size=block_size, backend=backend)
        if k is not None and mass is not None:
            raise ValueError("Antidiagonal takes either k or mass")
        mass = 0.9 if k is None and mass is None else mass
        self.k = None if k is None else check_budget("k", k, at_least=1)
        self.mass = None if mass is None else check_share("mass", mass)
        self.stride = check_count("stride", stride, at_least=1)
        if block_size % stride:
            raise ValueError(f"stride must divide the block size, {block_size}, got {stride}")

    def fewest_blocks(self) -> int | None:
        above = 3 if self.k is None else first_above(self.k)
        return None if self.mass == 1.0 else above and max(3, above)

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        scores = antidiagonal_scores(query, key, self.block_size, self.stride, scale)
        if self.k is not None:
            return top_k_blocks(scores, budget_of(self.k, scores.shape[-1]), sink=1)
        # The softmax of the logarithm gives the shares of each row back.
        return cumulative_mass_blocks(scores.log(), self.mass, sink=1, diagonal=True)


def antidiagonal_scores(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    stride: int,
    scale: float,
) -> Float[Tensor, "batch query_heads query_blocks key_blocks"]:
    """Weights of windows, softmax over causal windows of the mean antidiagonal score, by block.

    Window (i, j) scores scale * sum_r q[i s + s - 1 - r] . k[j s + r] / s, r = 0 ... s - 1; windows
    are cut at absolute positions, and what is missing of one counts as zeros.
    """
    front = (key.shape[2] - query.shape[2]) % stride
    queries = _windows(widened(query), stride, front).flip(-2).flatten(-2)
    keys = _windows(widened(repeat_key_heads(key, query.shape[1])), stride).flatten(-2)
    scores = scale / stride * queries @ keys.transpose(-2, -1)
    causal = causal_token_mask(*scores.shape[-2:], device=scores.device)
    return block_mass(masked_softmax(scores, causal), block_size // stride)


def _windows(
    x: Float[Tensor, "batch heads tokens dim"], stride: int, front: int = 0
) -> Float[Tensor, "batch heads windows stride dim"]:
    """The tokens in windows, filled with zeros before the first and behind the last."""
    padded = F.pad(x, (0, 0, front, -(front + x.shape[2]) % stride))
    return padded.unflatten(2, (-1, stride))
