"""Scores of rankings and similarities; those of classification are scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor


def spearman(predicted: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]) -> float:
    """Rank correlation; 0 when one side is constant, as it then orders nothing."""
    if np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return 0.0
    return float(spearmanr(predicted, gold).statistic)


def pseudo_values(
    arrays: Mapping[str, np.ndarray], statistic: Callable[[Mapping[str, np.ndarray]], float]
) -> Float[np.ndarray, " items"]:
    """One value an item whose mean is the statistic, up to its bias: n times it less n - 1 times it without the item.

    The jackknife's linear form of a smooth statistic (Tukey 1958), so that it has an interval of means. A
    maximum of near ties or a count of wins is not smooth: choose its argument once, then hold it fixed.

    Args:
        arrays: equally long along their first axis, which runs over items.

    Raises:
        ValueError: from eight items on, when the values have no spread although the arrays have, or their
            mean lies more than a standard error from the statistic, as happens where it is not smooth.
    """
    n = len(next(iter(arrays.values())))
    whole = statistic(arrays)
    if n == 1:
        return np.array([whole])
    without = [statistic({k: np.delete(a, i, axis=0) for k, a in arrays.items()}) for i in range(n)]
    values = n * whole - (n - 1) * np.array(without)
    error = values.std(ddof=1) / np.sqrt(n)
    stuck = error == 0 and any(np.ptp(a, axis=0).any() for a in arrays.values())
    if n >= 8 and (stuck or abs(values.mean() - whole) > error + 1e-12 * abs(whole)):
        raise ValueError("the statistic is not smooth: hold fixed what it chooses or counts")
    return values


def ranks_of_answers(scores: Float[Tensor, "queries candidates"]) -> Int[Tensor, " queries"]:
    """Rank from 1 of candidate i for query i; ties count against the answer.

    Recall at k is the mean of `ranks <= k`, the mean reciprocal rank that of `1 / ranks`.
    """
    right = scores.diagonal()[:, None]
    return (scores >= right).sum(1)


def ranks_of_first_right(
    scores: Float[Tensor, "queries candidates"], right: Bool[Tensor, "queries candidates"]
) -> Int[Tensor, " queries"]:
    """Rank from 1 of the best-placed right candidate of each query; ties with wrong ones count against it.

    `ranks_of_answers` for queries that may have several right candidates.

    Raises:
        ValueError: for a query without a right candidate.
    """
    if not right.any(1).all():
        raise ValueError("a query has no right candidate, so that none has a rank")
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~right).sum(1)


def ndcg(ranks: Int[Tensor, " queries"], k: int = 10) -> Float[Tensor, " queries"]:
    """nDCG@k of queries with one right answer, by its rank from 1: 1 / log2(1 + rank), 0 beyond k."""
    gains = 1 / torch.log2(1 + ranks.double())
    return gains.masked_fill(ranks > k, 0)
