"""H2O: the cache keeps the entries that have received most attention so far, and recent ones.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", NeurIPS 2023, arXiv 2306.14048. What is evicted never comes back.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.kv_selection import (
    KVSelection,
    best_entries,
    group_heads,
    received_attention,
)
from reattend.attention.method import (
    Budget,
    Phase,
    budget_of,
    check_budget,
    check_count,
    first_above,
)


@dataclass
class HeavyHitters:
    """State of one layer.

    Attributes:
        received: attention that each entry has received so far, from the query heads of its group.
        budget: entries that are read for each token.
    """

    received: Float[Tensor, "batch key_heads keys"]
    budget: int


class H2O(KVSelection):
    """A fixed number of entries per key head, half of them heavy hitters, half the most recent."""

    looks_back = None

    def __init__(self, *, budget: Budget = 1024, recent: int | None = None) -> None:
        """
        Args:
            budget: entries that a key head reads for each token, the token's own among them; a
                float is a share of the prompt.
            recent: how many of them are the most recent ones; half of them when None.

        Raises:
            ValueError: a setting out of range.
        """
        super().__init__()
        self.budget = check_budget("budget", budget, at_least=1)
        self.recent = None if recent is None else check_count("recent", recent, at_least=1)
        if recent is not None and isinstance(budget, int) and recent > budget:
            raise ValueError(f"recent ({recent}) must not exceed budget ({budget})")

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts that leave no room in the budget for a token of their own."""
        if phase == "prefill":
            return None
        above = first_above(self.budget, at_least=self.recent or 1)
        return above if above is None else max(above - 1, 1)

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> HeavyHitters:
        received = group_heads(received_attention(query, key, scale=scale), key.shape[1])
        budget = budget_of(self.budget, key.shape[2], at_least=self.recent or 1)
        return HeavyHitters(received.sum(dim=2), budget)

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: HeavyHitters,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        """The most recent entries and those that have received most.

        An entry that fell out never comes back: it receives nothing any more, and every heavy
        hitter was above it already.
        """
        keys = key.shape[2]
        state.received = F.pad(state.received, (0, keys - state.received.shape[-1]))
        count = self.recent or max(state.budget // 2, 1)
        recent = torch.arange(keys, device=key.device) >= keys - count
        return best_entries(state.received.masked_fill(recent, float("inf")), state.budget)

    def observe(
        self, weights: Float[Tensor, "batch key_heads group keys"], state: HeavyHitters
    ) -> None:
        state.received = state.received + weights.sum(dim=2)
