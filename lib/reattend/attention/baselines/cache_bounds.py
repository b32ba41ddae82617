"""The two ends of cache selection: content ignored (sinks and a window), content known (oracle)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.dense import dense_attention
from reattend.attention.kv_selection import KVSelection, best_entries, group_heads
from reattend.attention.method import (
    Budget,
    Phase,
    budget_of,
    check_budget,
    check_count,
    first_above,
)


class StreamingCache(KVSelection):
    """StreamingLLM in decoding: the first entries and the most recent ones, whatever the content.

    Xiao et al., ICLR 2024, arXiv 2309.17453. Keys keep their original positions, where the paper
    counts positions inside the cache: a model that reads no further than it was trained needs no
    compacted ones.
    """

    def __init__(self, *, budget: Budget = 1024, sink: int = 4) -> None:
        """
        Args:
            budget: entries read for each token, sinks and the token's own among them; a float is a
                share of the prompt.
            sink: entries at the start of the sequence.

        Raises:
            ValueError: a setting out of range, or no room for a recent entry.
        """
        super().__init__()
        self.sink = check_count("sink", sink)
        self.budget = check_budget("budget", budget, at_least=sink + 1)

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts that leave no room in the budget for a token of their own."""
        above = first_above(self.budget, at_least=self.sink + 1)
        return None if phase == "prefill" or above is None else max(above - 1, 1)

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> int:
        """Entries read for each token."""
        return budget_of(self.budget, key.shape[2], at_least=self.sink + 1)

    def rewound(self, state: int, keys: int) -> int:
        return state

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: int,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        keys = key.shape[2]
        position = torch.arange(keys, device=key.device)
        chosen = (position < self.sink) | (position >= keys - state + self.sink)
        return chosen.expand(key.shape[0], key.shape[1], -1)


class OracleCache(KVSelection):
    """The entries of largest exact weight for each token: the best that any choice can cover.

    Scores every key to choose, so it is an upper bound, not a method.
    """

    def __init__(self, *, budget: Budget = 1024) -> None:
        """
        Args:
            budget: entries read for each token; per key head, by the mean weight over its group. A
                float is a share of the cache as it stands.
        """
        super().__init__()
        self.budget = check_budget("budget", budget, at_least=1)

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts that leave no room in the budget for a token of their own."""
        above = first_above(self.budget)
        return None if phase == "prefill" or above is None else max(above - 1, 1)

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: None,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        _, weights = dense_attention(query, key, key, scale=scale, return_weights=True)
        mean = group_heads(weights, key.shape[1]).mean(dim=2).squeeze(2)
        return best_entries(mean, budget_of(self.budget, key.shape[2]))

    def reads_to_choose(self, keys: int) -> float:
        """Every key, without its value."""
        return keys / 2
