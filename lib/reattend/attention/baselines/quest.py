"""Quest: for every token the pages of the cache that could hold the largest scores.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML 2024,
arXiv 2406.10774. A page keeps the smallest and the largest value of each key channel, which bounds
the score of every key in it from above. Pages are chosen per key head, by the sum of the bounds
over the query heads that share it, as in sparse-frontier (arXiv 2504.17768).
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.dense import widened
from reattend.attention.kv_selection import KVSelection, best_entries, group_heads
from reattend.attention.method import Budget, Phase, budget_of, check_budget, check_count


@dataclass
class Pages:
    """Channel-wise bounds of the keys in each full page."""

    smallest: Float[Tensor, "batch key_heads pages dim"]
    largest: Float[Tensor, "batch key_heads pages dim"]

    @classmethod
    def of(cls, key: Float[Tensor, "batch key_heads keys dim"], page: int) -> "Pages":
        """Bounds of the full pages of `key`."""
        full = key[:, :, : key.shape[2] // page * page].unflatten(2, (-1, page))
        return cls(full.amin(dim=3), full.amax(dim=3))

    def first(self, count: int) -> "Pages":
        """The first `count` pages."""
        return Pages(self.smallest[:, :, :count], self.largest[:, :, :count])

    def append(self, later: "Pages") -> None:
        """Adds pages behind the last one."""
        self.smallest = torch.cat([self.smallest, later.smallest], dim=2)
        self.largest = torch.cat([self.largest, later.largest], dim=2)


class Quest(KVSelection):
    """The best pages of the whole cache for each token, and the page it is written to."""

    def __init__(self, *, budget: Budget = 1024, page: int = 16) -> None:
        """
        Args:
            budget: entries in chosen pages, rounded down to whole pages; the current page comes on
                top. A float is a share of the cache as it stands.
            page: entries of a page.

        Raises:
            ValueError: a setting out of range, or a budget of less than one page.
        """
        super().__init__()
        self.page = check_count("page", page, at_least=1)
        self.budget = check_budget("budget", budget, at_least=page)

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts with one full page more than are chosen, before the current one."""
        if phase == "prefill" or self.budget == 1.0:
            return None
        prompts = itertools.count(self.page)
        return next(n for n in prompts if n // self.page > self._pages(n + 1))

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> Pages:
        return Pages.of(key, self.page)

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: Pages,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        keys = key.shape[2]
        # The page of the newest entry is read in any case, so only the pages before it compete.
        before = (keys - 1) // self.page
        known = state.smallest.shape[2]
        if known < before:
            written = key[:, :, known * self.page : before * self.page]
            state.append(Pages.of(written, self.page))
        bounds = score_bounds(query, state.smallest[:, :, :before], state.largest[:, :, :before])
        chosen = best_entries(bounds, self._pages(keys))
        entries = chosen.repeat_interleave(self.page, dim=-1)
        return F.pad(entries, (0, keys - entries.shape[-1]), value=True)

    def rewound(self, state: Pages, keys: int) -> Pages:
        return state.first(keys // self.page)

    def _pages(self, keys: int) -> int:
        """Pages that are chosen of a cache of `keys` entries."""
        return budget_of(self.budget, keys, at_least=self.page) // self.page

    def reads_to_choose(self, keys: int) -> float:
        """A smallest and a largest key for each page before the current one."""
        return float((keys - 1) // self.page)


def score_bounds(
    query: Float[Tensor, "batch query_heads 1 dim"],
    smallest: Float[Tensor, "batch key_heads pages dim"],
    largest: Float[Tensor, "batch key_heads pages dim"],
) -> Float[Tensor, "batch key_heads pages"]:
    """Upper bounds of the unscaled scores in each page, summed over the query heads of a group.

    In float32 at least.

    sum_c max(q_c min_c, q_c max_c), written as two products: positive channels of the query meet
    the largest keys, negative ones the smallest.
    """
    query, smallest, largest = widened(query.squeeze(2)), widened(smallest), widened(largest)
    positive = group_heads(query.clamp_min(0), smallest.shape[1]).sum(dim=2)
    negative = group_heads(query.clamp_max(0), smallest.shape[1]).sum(dim=2)
    return (largest @ positive[..., None] + smallest @ negative[..., None]).squeeze(-1)
