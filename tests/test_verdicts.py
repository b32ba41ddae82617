"""The verdict engine on stored numbers."""

import numpy as np
import pytest

from reattend.records import Claim, Test
from reattend.verdicts import Exact, Sample, conclude, decide, interval_text

HIGHER = Test(id="t", measures="gain", better="higher", reproduced=2.0, not_reproduced=0.0)
LOWER = Test(id="t", measures="loss", better="lower", reproduced=-2.0, not_reproduced=0.0)
EQUAL = Test(id="t", measures="difference", better="equal", margin=1.0)
EXACT = Test(id="t", measures="count", better="equal", margin=0.0, exact=True)

# Eight stored differences with mean 0 and standard deviation 1, to be shifted.
SHAPE = np.array([-1.4, -1.1, -0.6, -0.1, 0.2, 0.5, 1.0, 1.5])


def claim(*tests: Test) -> Claim:
    return Claim(id="c", says="s", where="w", reported="r", tests=list(tests))


def verdict(test: Test, values) -> str:
    return decide(test, Sample(values)).verdict


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (4.0, "reproduced"),
        (1.0, "partially"),
        (-2.0, "not reproduced"),
        (2.0, "inconclusive"),  # straddles the upper margin
        (0.0, "inconclusive"),  # straddles the lower one
    ],
)
def test_interval_against_margins(shift, expected):
    values = shift + 0.5 * SHAPE
    assert verdict(HIGHER, values) == expected
    assert verdict(LOWER, -values) == expected  # the mirror image


def test_the_interval_decides_and_not_the_mean():
    values = 2.2 + 3 * SHAPE
    assert values.mean() > HIGHER.reproduced
    assert verdict(HIGHER, values) == "inconclusive"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (0.2 * SHAPE, "reproduced"),
        (3 + 0.2 * SHAPE, "not reproduced"),
        (-3 + 0.2 * SHAPE, "not reproduced"),
        (1 + 0.5 * SHAPE, "inconclusive"),
        (10 * SHAPE, "inconclusive"),  # no significant difference is no equivalence
    ],
)
def test_equivalence_needs_the_interval_within_the_margin(values, expected):
    assert verdict(EQUAL, values) == expected


def test_few_points_must_all_be_on_one_side():
    assert verdict(HIGHER, [2.1, 2.5, 9.0]) == "reproduced"
    assert verdict(HIGHER, [1.9, 2.5, 9.0]) == "inconclusive"
    outcome = decide(HIGHER, Sample([2.1, 2.5, 9.0]))
    assert (outcome.low, outcome.high) == (2.1, 9.0)
    assert outcome.points == (2.1, 2.5, 9.0)


@pytest.mark.parametrize("values", [[100.0], [100.0, 100.0]])
def test_one_or_two_points_decide_nothing(values):
    assert verdict(HIGHER, values) == "inconclusive"


def test_exact_numbers_decide_alone():
    assert decide(EXACT, Exact(0)).verdict == "reproduced"
    assert decide(EXACT, Exact(1)).verdict == "not reproduced"
    with pytest.raises(TypeError, match="takes Exact"):
        decide(EXACT, Sample([0.0, 0.0, 0.0]))
    with pytest.raises(TypeError, match="takes Sample"):
        decide(HIGHER, Exact(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_refused(bad):
    with pytest.raises(ValueError, match="NaN"):
        Sample([1.0, bad, 2.0])
    with pytest.raises(ValueError, match="finite"):
        Exact(bad)
    with pytest.raises(ValueError, match="NaN"):
        decide(HIGHER, Sample({"a": [1.0, 2.0, 3.0]}, statistic=lambda d: bad))


def test_coverage_of_the_interval():
    random = np.random.default_rng(1)
    draws = random.normal(1.0, 2.0, size=(300, 12))
    intervals = [Sample(values).interval() for values in draws]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.91 <= covered <= 0.985  # plain percentiles cover about 90 % at n = 12


def test_interval_is_deterministic_and_paired():
    x = np.random.default_rng(0).normal(size=40)
    pairs = Sample({"a": x + 5, "b": x}, statistic=lambda d: d["a"].mean() - d["b"].mean())
    assert pairs.interval() == pytest.approx((5, 5))  # unpaired resampling would spread it
    assert Sample(x).interval() == Sample(x).interval()


def test_statistic_of_arrays():
    sample = Sample(
        {"hit": [1, 0, 1, 1], "total": [2, 1, 1, 4]}, lambda d: d["hit"].sum() / d["total"].sum()
    )
    assert sample.effect() == pytest.approx(3 / 8)


@pytest.mark.parametrize(
    ("values", "statistic"),
    [([], None), ([[1.0, 2.0]], None), ({"a": [1.0]}, None), ([1.0], np.mean)],
)
def test_malformed_samples_are_refused(values, statistic):
    with pytest.raises(ValueError, match=r"array|measurements|dimensional|statistic"):
        Sample(values, statistic)


def test_unequal_pairs_are_refused():
    with pytest.raises(ValueError, match="same length"):
        Sample({"a": [1.0, 2.0], "b": [1.0]}, statistic=lambda d: 0.0)


GOOD, MIDDLE, BAD, OPEN = 4 + SHAPE / 5, 1 + SHAPE / 5, -4 + SHAPE / 5, 2 + SHAPE


def outcome(*pairs):
    tests = [
        Test(**(HIGHER.model_dump() | {"id": f"t{i}"} | extra))
        for i, (_, extra) in enumerate(pairs)
    ]
    measured = [decide(t, Sample(values)) for t, (values, _) in zip(tests, pairs, strict=True)]
    return conclude(claim(*tests), measured).verdict


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(GOOD, {}), (GOOD, {})], "reproduced"),
        ([(GOOD, {}), (BAD, {})], "partially"),
        ([(GOOD, {}), (MIDDLE, {})], "partially"),
        ([(MIDDLE, {}), (MIDDLE, {})], "partially"),
        ([(BAD, {}), (BAD, {})], "not reproduced"),
        ([(GOOD, {}), (OPEN, {})], "inconclusive"),
        ([(BAD, {}), (OPEN, {})], "inconclusive"),
        ([(BAD, {"decisive": True}), (GOOD, {})], "not reproduced"),
        ([(BAD, {"decisive": True}), (OPEN, {})], "not reproduced"),
        ([(GOOD, {"decisive": True}), (BAD, {})], "partially"),
        ([(GOOD, {}), (BAD, {"control": True})], "reproduced"),
        ([(GOOD, {}), (GOOD, {"control": True})], "inconclusive"),
        ([(GOOD, {}), (OPEN, {"control": True})], "inconclusive"),
        ([(BAD, {"decisive": True}), (GOOD, {"control": True})], "inconclusive"),
    ],
)
def test_claims_from_tests(pairs, expected):
    assert outcome(*pairs) == expected


def test_out_of_reach_keeps_its_reason():
    untestable = Claim(id="c", says="s", where="w", reported="r", out_of_reach="needs 8 GPUs")
    assert conclude(untestable, []).verdict == "out of reach"
    assert conclude(untestable, []).reason == "needs 8 GPUs"


def test_outcomes_must_be_those_of_the_claim():
    with pytest.raises(ValueError, match="declares the tests"):
        conclude(claim(HIGHER), [])


def test_interval_text():
    assert interval_text(1.23456, 1.0, 2.0) == "1.23 [1, 2]"
    assert interval_text(3.0, float("nan"), float("nan")) == "3"
