"""Scores of recommendation lists: full ranking over the items that a user has not trained on.

A leading axis `worlds` runs over independent data sets of one size.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def list_scores(
    scores: Float[Tensor, "worlds users items"],
    trained: Bool[Tensor, "worlds users items"],
    wanted: Bool[Tensor, "worlds users items"],
    k: int,
) -> tuple[Float[Tensor, " worlds"], Float[Tensor, " worlds"]]:
    """Recall@k and NDCG@k, each a mean over the users who have an item to find.

    Recall divides by all items that a user should find, also where they are more than k. NDCG gives the item at
    rank r a gain of 1 / log2(1 + r) and divides by the gains of the best list of length k.

    Args:
        scores: of every item for every user.
        trained: items of a user's training part; they cannot be recommended.
        wanted: items that should be found.
        k: length of the list.

    Raises:
        ValueError: when a wanted item is a training item, the list is longer than the catalogue, or a world
            has no user with an item to find.
    """
    if (trained & wanted).any():
        raise ValueError("a wanted item is a training item: split the interactions apart")
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must lie in 1..{scores.shape[-1]}, the number of items, got {k}")
    asked = wanted.any(-1)
    if not asked.any(-1).all():
        raise ValueError("a world has no user with an item to find")
    best = scores.masked_fill(trained, -math.inf).topk(k, dim=-1).indices
    hits = wanted.gather(-1, best).double()
    counts = wanted.sum(-1)
    gains = 1 / torch.log2(2 + torch.arange(k, dtype=torch.double, device=scores.device))
    ideal = gains.cumsum(0)[counts.clamp(1, k) - 1]
    found = hits.sum(-1) / counts.clamp_min(1), hits @ gains / ideal
    return tuple((f * asked).sum(-1) / asked.sum(-1) for f in found)
