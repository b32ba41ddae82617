"""StreamingLLM: attention sinks and a sliding window.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv
2309.17453. As a prefill baseline: every query block sees the first tokens and its most recent ones,
in whole blocks.
"""

import itertools

from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import block_count, forced_blocks, query_block_count
from reattend.attention.method import (
    BlockSparseMethod,
    Budget,
    budget_of,
    check_budget,
    check_count,
)


class StreamingLLM(BlockSparseMethod):
    """The same sinks and window for every head, whatever the content."""

    def __init__(
        self,
        *,
        sink: int = 64,
        window: Budget = 1024,
        block_size: int = 64,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            sink: tokens at the start of the sequence that every query sees, rounded up to whole
                blocks.
            window: recent tokens that every query sees, rounded up to whole blocks; the diagonal
                block is the first. A float is a share of the keys.
        """
        super().__init__(block_size=block_size, backend=backend)
        self.sink = check_count("sink", sink)
        self.window = check_budget("window", window, at_least=1)

    def fewest_blocks(self) -> int | None:
        if self.window == 1.0 and isinstance(self.window, float):
            return None
        sinks = block_count(self.sink, self.block_size)
        return next(n for n in itertools.count(2) if n > sinks + self._window_blocks(n))

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        blocks = forced_blocks(
            query_block_count(query.shape[2], key.shape[2], self.block_size),
            block_count(key.shape[2], self.block_size),
            sink=block_count(self.sink, self.block_size),
            local=self._window_blocks(block_count(key.shape[2], self.block_size)) - 1,
            device=query.device,
        )
        return blocks.expand(*query.shape[:2], -1, -1)

    def _window_blocks(self, blocks: int) -> int:
        return block_count(budget_of(self.window, blocks * self.block_size), self.block_size)
