"""SnapKV and Ada-SnapKV: the cache is compressed once, by the attention of the last queries.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024, arXiv
2404.14469; Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", 2024,
arXiv 2407.11550. In the form that sparse-frontier (arXiv 2504.17768) compares: scores smoothed by
an average over neighbours, then the first and the most recent entries forced.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.baselines.vertical_slash import last_weights
from reattend.attention.kv_selection import KVSelection, best_entries, group_heads
from reattend.attention.method import (
    Budget,
    Phase,
    budget_of,
    check_budget,
    check_count,
    check_share,
    first_above,
)


class SnapKV(KVSelection):
    """Each key head keeps the same number of entries of the prompt, and every new one."""

    def __init__(
        self,
        *,
        capacity: Budget = 1024,
        window: int = 256,
        kernel: int = 21,
        recent: int = 128,
        sink: int = 4,
    ) -> None:
        """
        Args:
            capacity: entries of the prompt that each key head keeps; a float is a share of it.
            window: queries at the end of the prompt whose attention scores the entries.
            kernel: entries that the smoothing averages over; odd.
            recent: entries at the end of the prompt that are always kept.
            sink: entries at its start that are always kept.

        Raises:
            ValueError: a setting out of range, or `capacity` smaller than the forced entries.
        """
        super().__init__()
        self.window = check_count("window", window, at_least=1)
        self.kernel = check_count("kernel", kernel, at_least=1)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.recent = check_count("recent", recent)
        self.sink = check_count("sink", sink)
        self.capacity = check_budget("capacity", capacity, at_least=max(recent + sink, 1))
        self.looks_back = window

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts longer than the capacity."""
        if phase == "prefill":
            return None
        return first_above(self.capacity, at_least=max(self.recent + self.sink, 1))

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        """The entries kept for ever."""
        weights = last_weights(query, key, self.window, scale)
        scores = self._smoothed(self.importance(group_heads(weights, key.shape[1])))
        return self.keep(self._forced(scores))

    def importance(
        self, weights: Float[Tensor, "batch key_heads group window keys"]
    ) -> Float[Tensor, "batch key_heads keys"]:
        """Attention summed over the window's queries, the mean over the group."""
        return weights.sum(dim=3).mean(dim=2)

    def keep(
        self, scores: Float[Tensor, "batch key_heads keys"]
    ) -> Bool[Tensor, "batch key_heads keys"]:
        """The best `capacity` entries of each head."""
        return best_entries(scores, self._capacity(scores.shape[-1]))

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: Bool[Tensor, "batch key_heads prompt"],
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        return F.pad(state, (0, key.shape[2] - state.shape[-1]), value=True)

    def rewound(
        self, state: Bool[Tensor, "batch key_heads prompt"], keys: int
    ) -> Bool[Tensor, "batch key_heads prompt"]:
        """As it is: every entry behind the prompt is kept."""
        return state if keys >= state.shape[-1] else super().rewound(state, keys)

    def _capacity(self, prompt: int) -> int:
        """Entries kept of a prompt."""
        return budget_of(self.capacity, prompt, at_least=max(self.recent + self.sink, 1))

    def _smoothed(self, scores: Tensor) -> Tensor:
        return F.avg_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)

    def _forced(self, scores: Tensor) -> Tensor:
        """Scores with the first and the last entries above all others."""
        position = torch.arange(scores.shape[-1], device=scores.device)
        forced = (position < self.sink) | (position >= scores.shape[-1] - self.recent)
        return scores.masked_fill(forced, float("inf"))


class AdaSnapKV(SnapKV):
    """The heads of a layer share their total capacity: who holds more important entries gets more.

    Scores are compared between heads as they are, without normalising each head's.
    """

    def __init__(
        self,
        *,
        capacity: Budget = 1024,
        least_share: float = 0.2,
        window: int = 256,
        kernel: int = 21,
        recent: int = 128,
        sink: int = 4,
    ) -> None:
        """
        Args:
            capacity: entries of the prompt that a key head keeps on average; a float is a share of
                it.
            least_share: share of `capacity` that every head keeps in any case, in (0, 1]; never
                less than the forced entries.
        """
        super().__init__(capacity=capacity, window=window, kernel=kernel, recent=recent, sink=sink)
        self.least_share = check_share("least_share", least_share)

    def importance(
        self, weights: Float[Tensor, "batch key_heads group window keys"]
    ) -> Float[Tensor, "batch key_heads keys"]:
        """The largest attention over the window's queries and the group."""
        return weights.amax(dim=(2, 3))

    def keep(
        self, scores: Float[Tensor, "batch key_heads keys"]
    ) -> Bool[Tensor, "batch key_heads keys"]:
        """Each head's own minimum, then the best entries of all heads, `capacity` a head in all."""
        capacity = self._capacity(scores.shape[-1])
        least = max(round(self.least_share * capacity), self.recent + self.sink)
        own = best_entries(scores, least)
        ranked = scores.masked_fill(own, float("inf")).flatten(1)
        return best_entries(ranked, capacity * scores.shape[1]).view_as(scores)
