"""Scores of rankings and similarities; those of classification are scikit-learn's."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor


def spearman(predicted: Float[np.ndarray, " items"], gold: Float[np.ndarray, " items"]) -> float:
    """Rank correlation; 0 when one side is constant, as it then orders nothing."""
    if np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return 0.0
    return float(spearmanr(predicted, gold).statistic)


def ranks_of_answers(scores: Float[Tensor, "queries candidates"]) -> Int[Tensor, " queries"]:
    """Rank from 1 of candidate i for query i; ties count against the answer.

    Recall at k is the mean of `ranks <= k`, the mean reciprocal rank that of `1 / ranks`.
    """
    right = scores.diagonal()[:, None]
    return (scores >= right).sum(1)
