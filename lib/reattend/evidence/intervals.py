"""Intervals that keep their word, and how surely an effect lies beyond a margin.

`benchmarks/coverage.py` simulates how often each rule covers the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri, stdtr, stdtrit

from reattend.evidence.samples import VALUE, Points
from reattend.evidence.statistics import RESAMPLED, Quantities

FEWEST = 3  # points of a mean
FEWEST_RESAMPLED = 8  # points of a statistic that is resampled
RESAMPLES = 4_000
POCOCK = {1: 0.05, 2: 0.027, 3: 0.0187, 4: 0.0145, 5: 0.012}
"""Level of each look's interval, by number of looks, that keeps 5 % over all of them (Pocock 1977).

Pocock's own constants (.0294, .0221, .0182, .0158) are for equal steps and a known variance. Here the
points double from look to look and their spread is estimated from as few as three, which costs more;
these were simulated (3, 6, 12, … points; `benchmarks/coverage.py` shows what they keep).
"""


@dataclass(frozen=True)
class Estimate:
    """An effect, its interval, and the spread behind it.

    `low` and `high` are NaN where there are too few points for an interval; `error` is the standard
    error, `freedom` its degrees of freedom.
    """

    effect: float
    low: float
    high: float
    n: int
    error: float = 0.0
    freedom: float = math.inf

    @property
    def has_interval(self) -> bool:
        """Whether there were points enough."""
        return math.isfinite(self.low)

    def beyond(self, margin: float) -> float:
        """Probability under the t posterior that the effect lies above `margin`."""
        if self.error == 0:
            return float(self.effect >= margin)
        return float(stdtr(self.freedom, (self.effect - margin) / self.error))


def estimate(points: Points, unit: str, statistic: str, level: float = 0.05) -> Estimate:
    """The effect of a test's points with its interval at 1 - `level`.

    Raises:
        ValueError: when seeds and items do not cross, or a statistic is not finite.
    """
    q = points.quantities
    if unit == "exact":
        effect = float(q[VALUE][0])
        return Estimate(effect, effect, effect, 1)
    if unit == "seed x item":
        return crossed_mean(_grid(points), level)
    if statistic in RESAMPLED:
        return resampled(q, RESAMPLED[statistic], level)
    return _RULES[statistic](q, level)


def mean(values: np.ndarray, level: float = 0.05) -> Estimate:
    """Mean over units, Student t."""
    n, effect = len(values), float(values.mean())
    if n < FEWEST:
        return Estimate(effect, math.nan, math.nan, n, math.nan, max(n - 1, 1))
    return _t_interval(effect, float(values.std(ddof=1)) / math.sqrt(n), n - 1, n, level)


def crossed_mean(grid: np.ndarray, level: float = 0.05) -> Estimate:
    """Mean of a grid [seeds, items], both drawn at random.

    Variance components of the two-way layout without replicates; degrees of freedom by Satterthwaite,
    rounded down, which is what keeps the interval's word at three seeds. A component cannot be
    negative, so the variance is at least that of either mean alone.
    """
    seeds, items = grid.shape
    effect = float(grid.mean())
    if min(seeds, items) < FEWEST:
        return Estimate(effect, math.nan, math.nan, seeds, math.nan, max(seeds - 1, 1))
    rows, columns = grid.mean(1), grid.mean(0)
    rest = grid - rows[:, None] - columns + effect
    by_seed = items * rows.var(ddof=1)
    by_item = seeds * columns.var(ddof=1)
    residual = (rest**2).sum() / ((seeds - 1) * (items - 1))
    total = max(by_seed + by_item - residual, by_seed, by_item)
    parts = by_seed**2 / (seeds - 1) + by_item**2 / (items - 1)
    least = min(seeds, items) - 1
    freedom = max(least, math.floor(total**2 / parts)) if parts else math.inf
    return _t_interval(effect, math.sqrt(total / grid.size), freedom, seeds, level)


def resampled(
    quantities: Quantities, statistic: Callable[[Quantities], np.ndarray], level: float = 0.05
) -> Estimate:
    """A statistic of units, by the expanded percentile bootstrap.

    Percentiles are widened from normal to Student t quantiles and by sqrt(n / (n - 1)), because plain
    ones are too narrow for small n (Hesterberg 2015, "What teachers should know about the bootstrap",
    section 5.3).
    """
    n = len(next(iter(quantities.values())))
    effect = float(statistic(quantities))
    if not math.isfinite(effect):
        raise ValueError("the statistic is NaN or infinite")
    if n < FEWEST_RESAMPLED:
        return Estimate(effect, math.nan, math.nan, n, math.nan, max(n - 1, 1))
    random, draws = np.random.default_rng(0), []
    rows = max(1, 2_000_000 // n)  # bounds the memory of one slab
    for start in range(0, RESAMPLES, rows):
        index = random.integers(n, size=(min(rows, RESAMPLES - start), n))
        draws.append(statistic({name: array[index] for name, array in quantities.items()}))
    effects = np.concatenate(draws)
    if not np.isfinite(effects).all():
        raise ValueError("the statistic is NaN or infinite on a resample")
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, level / 2))
    low, high = np.quantile(effects, [tail, 1 - tail])
    return Estimate(effect, float(low), float(high), n, float(effects.std(ddof=1)), n - 1)


def share(values: np.ndarray, level: float = 0.05) -> Estimate:
    """Share of units that are 1 (the others are 0), Clopper-Pearson: exact for any n.

    Raises:
        ValueError: when a value is neither 0 nor 1.
    """
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("a share takes values 0 and 1")
    n, hits = len(values), int(values.sum())
    if n < FEWEST:
        return Estimate(hits / n, math.nan, math.nan, n, math.nan, max(n - 1, 1))
    low = betaincinv(hits, n - hits + 1, level / 2) if hits else 0.0
    high = betaincinv(hits + 1, n - hits, 1 - level / 2) if hits < n else 1.0
    middle = (hits + 2) / (n + 4)  # Agresti and Coull: all or none is not certainty
    error = math.sqrt(middle * (1 - middle) / (n + 4))
    return Estimate(hits / n, float(low), float(high), n, error, n - 1)


def share_difference(a: np.ndarray, b: np.ndarray, level: float = 0.05) -> Estimate:
    """Share of `a` minus share of `b`, unpaired; from the two Clopper-Pearson intervals (Newcombe 1998)."""
    first, second = share(a, level), share(b, level)
    n, effect = min(len(a), len(b)), first.effect - second.effect
    error = math.hypot(first.error, second.error)
    if not (first.has_interval and second.has_interval):
        return Estimate(effect, math.nan, math.nan, n, error, max(n - 1, 1))
    low = effect - math.hypot(first.effect - first.low, second.high - second.effect)
    high = effect + math.hypot(first.high - first.effect, second.effect - second.low)
    return Estimate(effect, low, high, n, error, n - 1)


def unpaired_difference(a: np.ndarray, b: np.ndarray, level: float = 0.05) -> Estimate:
    """Mean of `a` minus mean of `b` where nothing pairs them (Welch)."""
    n, effect = len(a), float(a.mean() - b.mean())
    if n < FEWEST:
        return Estimate(effect, math.nan, math.nan, n, math.nan, max(n - 1, 1))
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    spread = (parts**2 / [len(a) - 1, len(b) - 1]).sum()
    freedom = parts.sum() ** 2 / spread if spread else math.inf
    return _t_interval(effect, math.sqrt(parts.sum()), freedom, n, level)


def mean_correlation(values: np.ndarray, level: float = 0.05) -> Estimate:
    """Mean of one correlation a unit (an independent pool), on Fisher's z scale.

    Raises:
        ValueError: for a value outside [-1, 1].
    """
    if np.abs(values).max() > 1:
        raise ValueError("a correlation lies between -1 and 1")
    inner = mean(np.arctanh(np.clip(values, -0.999999, 0.999999)), level)
    effect = math.tanh(inner.effect)
    return Estimate(
        effect,
        math.tanh(inner.low),
        math.tanh(inner.high),
        inner.n,
        inner.error * (1 - effect**2),
        inner.freedom,
    )


def _t_interval(effect: float, error: float, freedom: float, n: int, level: float) -> Estimate:
    quantile = stdtrit(freedom, 1 - level / 2) if math.isfinite(freedom) else ndtri(1 - level / 2)
    half = float(quantile) * error
    return Estimate(effect, effect - half, effect + half, n, error, freedom)


def _grid(points: Points) -> np.ndarray:
    """Points of unit `seed x item` as a matrix [seeds, items]."""
    seeds, items = (list(dict.fromkeys(points.labels[name])) for name in ("seed", "item"))
    values = points.quantities[VALUE]
    if len(values) != len(seeds) * len(items):
        raise ValueError("seeds x items: every seed needs every item once")
    grid = np.empty((len(seeds), len(items)))
    row = {label: number for number, label in enumerate(seeds)}
    column = {label: number for number, label in enumerate(items)}
    for seed, item, value in zip(points.labels["seed"], points.labels["item"], values, strict=True):
        grid[row[seed], column[item]] = value
    return grid


_RULES: dict[str, Callable[[Quantities, float], Estimate]] = {
    "mean": lambda q, level: mean(q[VALUE], level),
    "share": lambda q, level: share(q[VALUE], level),
    "mean_correlation": lambda q, level: mean_correlation(q[VALUE], level),
    "share_difference": lambda q, level: share_difference(q["a"], q["b"], level),
    "unpaired_difference": lambda q, level: unpaired_difference(q["a"], q["b"], level),
}
STATISTICS = (*_RULES, *RESAMPLED)
