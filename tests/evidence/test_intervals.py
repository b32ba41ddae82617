"""Intervals against closed forms and against scipy."""

import math
from typing import get_args

import numpy as np
import pytest
from scipy import stats

from reattend.evidence import intervals
from reattend.evidence.intervals import POCOCK, STATISTICS, estimate
from reattend.evidence.samples import Exact, Sample, points
from reattend.evidence.statistics import RESAMPLED, least_of_means, pearson, spearman
from reattend.records import Statistic

SHAPE = np.array([-1.4, -1.1, -0.6, -0.1, 0.2, 0.5, 1.0, 1.5])


def test_records_know_the_statistics_that_there_are():
    assert set(get_args(Statistic)) == set(STATISTICS)


def test_the_mean_is_student():
    values = 0.3 + SHAPE
    found = intervals.mean(values)
    low, high = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.beyond(0.0) == pytest.approx(
        stats.ttest_1samp(values, 0, alternative="greater").pvalue * -1 + 1
    )


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_points_have_no_interval(n):
    assert not intervals.mean(SHAPE[:n]).has_interval


@pytest.mark.parametrize("n", [3, 7])
def test_what_is_resampled_needs_eight(n):
    q = {"value": SHAPE[:n]}
    assert not intervals.resampled(q, RESAMPLED["median"]).has_interval
    assert intervals.resampled({"value": SHAPE}, RESAMPLED["median"]).has_interval


def test_the_resampled_mean_is_near_student():
    found = intervals.resampled({"value": SHAPE}, lambda q: q["value"].mean(-1))
    exact = intervals.mean(SHAPE)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.12)


def test_crossed_means_add_the_variance_of_seeds_and_items():
    """Additive layout: the variance of the mean is the sum of both variances over their numbers."""
    seeds, items = np.array([-1.0, 0.0, 1.0, 2.0]), np.array([-2.0, 0.0, 1.0, 1.0, 3.0])
    found = intervals.crossed_mean(seeds[:, None] + items)
    error = math.sqrt(seeds.var(ddof=1) / 4 + items.var(ddof=1) / 5)
    assert found.error == pytest.approx(error, rel=1e-12)
    assert found.effect == pytest.approx(seeds.mean() + items.mean())
    weights = np.array([seeds.var(ddof=1) / 4, items.var(ddof=1) / 5])
    freedom = weights.sum() ** 2 / (weights**2 / [3, 4]).sum()
    assert found.freedom == max(3, math.floor(freedom))


def test_one_seed_does_not_become_many_by_its_items():
    grid = np.array([[0.0] * 100, [1.0] * 100, [2.0] * 100])
    found = intervals.crossed_mean(grid)
    exact = intervals.mean(np.array([0.0, 1.0, 2.0]))
    assert found.high - found.low == pytest.approx(exact.high - exact.low)


def test_all_of_few_is_no_certainty():
    found = intervals.share(np.ones(6))
    assert (found.effect, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 6))  # Clopper-Pearson's closed form
    assert 0.5 < found.beyond(0.5) < 1
    with pytest.raises(ValueError, match="0 and 1"):
        intervals.share(np.array([0.5, 1.0, 1.0]))


def test_shares_differ_when_their_intervals_do():
    found = intervals.share_difference(np.ones(6), np.zeros(6))
    assert found.effect == 1.0
    assert 0.2 < found.low < 0.6
    same = intervals.share_difference(np.ones(6), np.ones(6))
    assert same.low < 0 < same.high


def test_welch():
    a, b = 1 + SHAPE, 3 * SHAPE[:5]
    found = intervals.unpaired_difference(a, b)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))


def test_correlations_are_averaged_as_z():
    found = intervals.mean_correlation(np.tanh(SHAPE))
    assert found.effect == pytest.approx(math.tanh(SHAPE.mean()))
    assert found.high == pytest.approx(math.tanh(intervals.mean(SHAPE).high))


def test_rank_and_linear_correlation_against_scipy():
    random = np.random.default_rng(0)
    q = {"a": random.standard_normal(20), "b": random.standard_normal(20)}
    assert pearson(q) == pytest.approx(stats.pearsonr(q["a"], q["b"]).statistic)
    assert spearman(q) == pytest.approx(stats.spearmanr(q["a"], q["b"]).statistic)
    assert pearson({"a": np.ones(4), "b": np.arange(4.0)}) == 0


def test_least_of_means_is_the_worst_setting():
    assert least_of_means({"a": np.array([1.0, 3.0]), "b": np.array([0.0, 1.0])}) == 0.5


def test_each_statistic_gives_an_interval_that_holds_its_effect():
    random = np.random.default_rng(1)
    named = {name: 2 + random.random(12) for name in ("a", "a_n", "b", "b_n")}
    for statistic in STATISTICS:
        takes = intervals_quantities(statistic)
        values = {n: named[n] for n in takes} if takes else np.tanh(named["a"] - 2.5)
        if statistic.startswith("share"):
            values = {n: v > 2.5 for n, v in values.items()} if takes else values > 0
        found = estimate(points(Sample(values, item=range(12)), "item"), "item", statistic)
        assert found.low <= found.effect <= found.high, statistic
        assert found.low < found.high, statistic


def intervals_quantities(statistic):
    from reattend.evidence.statistics import QUANTITIES

    return QUANTITIES.get(statistic)


def test_exact_numbers_are_their_own_interval():
    found = estimate(points(Exact(4.0), "exact"), "exact", "mean")
    assert (found.low, found.effect, found.high, found.n) == (4.0, 4.0, 4.0, 1)


def test_seeds_and_items_must_cross():
    sample = Sample([1.0, 2.0, 3.0], seed=[0, 0, 1], item=["x", "y", "x"])
    with pytest.raises(ValueError, match="every seed needs every item"):
        estimate(points(sample, "seed x item"), "seed x item", "mean")


@pytest.mark.parametrize("looks", [(3, 6), (3, 6, 12), (4, 8, 16), (3, 6, 12, 24)])
def test_looks_keep_five_per_cent_together(looks):
    """Simulated: the effect lies on the margin, points double from look to look."""
    values = np.random.default_rng(0).standard_normal((20_000, looks[-1]))
    wrong = np.zeros(len(values), dtype=bool)
    for n in looks:
        t = values[:, :n].mean(1) / (values[:, :n].std(1, ddof=1) / math.sqrt(n))
        wrong |= np.abs(t) > stats.t.isf(POCOCK[len(looks)] / 2, n - 1)
    assert 0.04 < wrong.mean() < 0.055
