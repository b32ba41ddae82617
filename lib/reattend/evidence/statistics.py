"""The named statistics that a record may ask for.

A statistic maps quantities, arrays whose last axis runs over units, to an effect; leading axes are
resamples. `mean` and those with an interval of their own are in `intervals.py`; the others here are
resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from reattend.evidence.samples import VALUE

Quantities = Mapping[str, np.ndarray]


def median(q: Quantities) -> np.ndarray:
    """The median over units."""
    return np.median(q[VALUE], axis=-1)


def ratio_of_sums(q: Quantities) -> np.ndarray:
    """Sum of `a` over sum of `b`."""
    return q["a"].sum(-1) / q["b"].sum(-1)


def difference_of_ratios(q: Quantities) -> np.ndarray:
    """Sum of `a` over sum of `a_n`, minus the same of `b`."""
    return q["a"].sum(-1) / q["a_n"].sum(-1) - q["b"].sum(-1) / q["b_n"].sum(-1)


def pearson(q: Quantities) -> np.ndarray:
    """Linear correlation of `a` and `b` over units; 0 where one of them is constant."""
    a, b = (q[name] - q[name].mean(-1, keepdims=True) for name in "ab")
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def spearman(q: Quantities) -> np.ndarray:
    """Rank correlation of `a` and `b` over units."""
    # Here: scipy.stats takes most of a second, which commands that only look would pay.
    from scipy.stats import rankdata

    return pearson({name: rankdata(q[name], axis=-1) for name in "ab"})


def least_of_means(q: Quantities) -> np.ndarray:
    """The smallest of the quantities' means: at least so much in every one of several settings."""
    return np.min([array.mean(-1) for array in q.values()], axis=0)


RESAMPLED: dict[str, Callable[[Quantities], np.ndarray]] = {
    f.__name__: f
    for f in (median, ratio_of_sums, difference_of_ratios, pearson, spearman, least_of_means)
}
QUANTITIES = {
    "ratio_of_sums": {"a", "b"},
    "difference_of_ratios": {"a", "a_n", "b", "b_n"},
    "pearson": {"a", "b"},
    "spearman": {"a", "b"},
    "share_difference": {"a", "b"},
    "unpaired_difference": {"a", "b"},
}
"""The quantities that a statistic takes where it is not the single unnamed one."""
