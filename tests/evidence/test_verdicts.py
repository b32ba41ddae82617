"""Every outcome on stored numbers."""

import math

import numpy as np
import pytest

from reattend.evidence.intervals import Estimate
from reattend.evidence.samples import Exact, Sample, points
from reattend.evidence.verdicts import (
    EvidenceError,
    conclude,
    decide,
    endings_of,
    judge,
    verdict_of,
)
from reattend.records import Claim, Record, Test

# Eight stored differences with mean 0 and standard deviation 1, to be shifted.
SHAPE = np.array([-1.4, -1.1, -0.6, -0.1, 0.2, 0.5, 1.0, 1.5])


def declared(name="t", better="higher", unit="seed", **margins) -> Test:
    return Test(id=name, measures="m", better=better, unit=unit, **margins)


HIGHER = declared(reproduced=0.0, negligible=1.0)
TWO_BOUNDS = declared(reproduced=2.0, not_reproduced=0.0)
NON_INFERIOR = declared(reproduced=-0.5)
EQUAL = declared(better="equal", margin=1.0)


def mirrored(test: Test) -> Test:
    names = ("reproduced", "negligible", "not_reproduced")
    flipped = {n: -v for n in names if (v := getattr(test, n)) is not None}
    return test.model_copy(update=flipped | {"better": "lower"})


def outcome(test, values, level=0.05):
    return decide(test, points(Sample(values, seed=range(len(values))), "seed"), level)


@pytest.mark.parametrize(
    ("test", "low", "high", "expected"),
    [
        (HIGHER, 0.1, 3.0, "reproduced"),
        (HIGHER, 1.2, 3.0, "reproduced"),
        (HIGHER, 0.1, 0.9, "partially"),  # there, but negligible
        (HIGHER, -0.2, 0.9, "not reproduced"),
        (HIGHER, -3.0, -1.0, "not reproduced"),
        (HIGHER, -0.2, 1.5, "inconclusive"),
        (TWO_BOUNDS, 2.1, 3.0, "reproduced"),
        (TWO_BOUNDS, 0.5, 1.5, "partially"),
        (TWO_BOUNDS, -1.0, -0.1, "not reproduced"),
        (TWO_BOUNDS, 1.0, 3.0, "inconclusive"),
        (TWO_BOUNDS, -1.0, 1.0, "inconclusive"),
        (NON_INFERIOR, -0.4, 3.0, "reproduced"),
        (NON_INFERIOR, -2.0, -0.6, "not reproduced"),
        (NON_INFERIOR, -2.0, 0.6, "inconclusive"),
        (EQUAL, -0.9, 1.0, "reproduced"),
        (EQUAL, 1.1, 2.0, "not reproduced"),
        (EQUAL, -2.0, -1.1, "not reproduced"),
        (EQUAL, 0.5, 1.5, "inconclusive"),
        (HIGHER, math.nan, math.nan, "inconclusive"),
    ],
)
def test_interval_against_margins(test, low, high, expected):
    assert verdict_of(test, low, high) == expected
    if test.better == "higher":
        assert verdict_of(mirrored(test), -high, -low) == expected


@pytest.mark.parametrize(
    ("test", "low", "high", "expected"),
    [
        (HIGHER, -0.2, 1.5, {"reproduced", "partially", "not reproduced"}),
        (HIGHER, -0.2, 0.9, {"partially", "not reproduced"}),
        (TWO_BOUNDS, 1.0, 3.0, {"reproduced", "partially"}),
        (TWO_BOUNDS, -1.0, 1.0, {"partially", "not reproduced"}),
        (NON_INFERIOR, -2.0, 0.6, {"reproduced", "not reproduced"}),
        (EQUAL, 0.5, 1.5, {"reproduced", "not reproduced"}),
        (HIGHER, math.nan, math.nan, {"reproduced", "partially", "not reproduced"}),
    ],
)
def test_an_open_test_can_end_in_what_its_interval_holds(test, low, high, expected):
    assert set(endings_of(test, Estimate(0.0, low, high, 8))) == expected
    if test.better == "higher":
        assert set(endings_of(mirrored(test), Estimate(0.0, -high, -low, 8))) == expected


def test_margins_are_compared_with_a_tolerance():
    """.1 + .2 is not .3 in floating point, and .8999999999 is .9."""
    assert (
        verdict_of(declared(reproduced=0.3, not_reproduced=0.0), 0.3 - 1e-16, 1.0) == "reproduced"
    )
    assert verdict_of(declared(better="equal", margin=0.3), -0.1, 0.1 + 0.2) == "reproduced"
    exact = declared(unit="exact", reproduced=0.9)
    assert decide(exact, points(Exact(0.9 - 1e-10), "exact")).verdict == "reproduced"
    assert verdict_of(exact, 0.9 - 1e-7, 0.9 - 1e-7) == "not reproduced"


def test_the_interval_decides_and_not_the_mean():
    found = outcome(HIGHER, 1.2 + 3 * SHAPE)
    assert found.estimate.effect > 1.0
    assert found.verdict == "inconclusive"


def test_few_points_say_how_many_would_do():
    found = outcome(HIGHER, 1.2 + 3 * SHAPE)
    assert 20 < found.needed < 60  # t * 3 / sqrt(n) = 1.2 near n = 27
    assert found.why_open == f"few points: 't' has 8 seeds, about {found.needed} would do"
    again = outcome(HIGHER, 1.2 + 3 * np.tile(SHAPE, math.ceil(found.needed / 8) + 1))
    assert again.verdict == "reproduced"


def test_two_points_lack_a_third():
    found = outcome(HIGHER, np.array([5.0, 6.0]))
    assert (found.verdict, found.needed) == ("inconclusive", 3)
    assert math.isnan(found.beyond)


def test_on_the_margin_no_number_would_do():
    found = outcome(NON_INFERIOR, -0.5 + SHAPE)
    assert found.needed is None
    assert found.why_open == "'t' is on its margin (8 seeds)"


def test_probability_beyond_the_margin():
    assert outcome(HIGHER, SHAPE).beyond == pytest.approx(0.5)
    assert outcome(mirrored(HIGHER), SHAPE).beyond == pytest.approx(0.5)
    assert outcome(HIGHER, 3 + SHAPE).beyond > 0.999
    assert outcome(EQUAL, 0.1 * SHAPE).beyond > 0.999


def test_looks_widen_the_interval():
    plain, looked = outcome(HIGHER, SHAPE), outcome(HIGHER, SHAPE, level=0.0221)
    assert looked.estimate.high > plain.estimate.high


def test_a_unit_that_was_not_declared_is_refused():
    with pytest.raises(ValueError, match="evidence has unit 'item', the record says 'seed'"):
        decide(HIGHER, points(Sample(SHAPE, item=range(8)), "item"))


# Claims -----------------------------------------------------------------------------------------------

MAIN = declared("main", reproduced=0.0, negligible=1.0)
OTHER = declared("other", reproduced=0.0, negligible=1.0)
THIRD = declared("third", reproduced=0.0, negligible=1.0)
GATE = declared("gate", role="gate", unit="exact", reproduced=1.0)
SEED_GATE = declared("gate", role="gate", reproduced=1.0)
CONTROL = declared("control", role="control", reproduced=0.0, negligible=1.0)
YES, NO, OPEN, SMALL = 3 + 0.1 * SHAPE, -3 + 0.1 * SHAPE, 0.6 + 3 * SHAPE, 0.5 + 0.1 * SHAPE


def concluded(measured, placebo="none: nothing to remove"):
    claim = Claim(
        id="c",
        says="s",
        where="w",
        reported="r",
        about="training",
        placebo=placebo,
        tests=[test for test, _ in measured],
    )
    outcomes = [
        decide(test, points(value, "exact")) if isinstance(value, Exact) else outcome(test, value)
        for test, value in measured
    ]
    found = conclude(claim, outcomes)
    return found.verdict, found.reason


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([(MAIN, YES)], ("reproduced", "")),
        ([(MAIN, NO)], ("not reproduced", "")),
        ([(MAIN, SMALL)], ("partially", "")),
        ([(MAIN, YES), (OTHER, NO)], ("partially", "")),
        ([(MAIN, YES), (OTHER, YES)], ("reproduced", "")),
        # closure: a mixture stays a mixture
        (
            [(MAIN, YES), (OTHER, NO), (THIRD, OPEN)],
            ("partially", "whatever the open tests would say"),
        ),
        ([(MAIN, YES), (GATE, Exact(2.0))], ("reproduced", "")),
        ([(MAIN, YES), (GATE, Exact(0.5))], ("inconclusive", "cannot be asked here: gate")),
        ([(MAIN, NO), (GATE, Exact(0.5))], ("inconclusive", "cannot be asked here: gate")),
        ([(MAIN, YES), (CONTROL, NO)], ("reproduced", "")),
        ([(MAIN, YES), (CONTROL, YES)], ("inconclusive", "control 'control' did not fail")),
        ([(MAIN, YES), (CONTROL, SMALL)], ("inconclusive", "control 'control' did not fail")),
    ],
)
def test_claims(measured, expected):
    assert concluded(measured) == expected


def test_open_tests_leave_a_claim_open_and_say_why():
    verdict, reason = concluded([(MAIN, YES), (OTHER, OPEN)])
    assert verdict == "inconclusive"
    assert reason.startswith("few points: 'other' has 8 seeds, about ")
    assert concluded([(MAIN, YES), (SEED_GATE, 1 + SHAPE)]) == (
        "inconclusive",
        "cannot be asked here: gate ('gate' is on its margin (8 seeds))",
    )
    assert concluded([(MAIN, YES), (CONTROL, OPEN)])[1].startswith(
        "control 'control' did not fail (few"
    )


def test_endings_outside_the_interval_leave_nothing_open():
    between = TWO_BOUNDS.model_copy(update={"id": "between"})
    high, low = 2 + SHAPE, SHAPE  # around either bound, clear of the other
    assert outcome(between, high).verdict == outcome(between, low).verdict == "inconclusive"
    closed = ("partially", "whatever the open tests would say")
    assert concluded([(MAIN, NO), (between, high)]) == closed
    assert concluded([(MAIN, YES), (between, low)]) == closed
    assert concluded([(MAIN, YES), (between, high)])[0] == "inconclusive"


def test_a_decisive_test_settles_what_others_leave_open():
    decisive = MAIN.model_copy(update={"decisive": True})
    assert concluded([(decisive, NO), (OTHER, YES)]) == ("not reproduced", "'main' decides")
    assert concluded([(decisive, NO), (OTHER, OPEN)]) == ("not reproduced", "'main' decides")


def test_what_the_placebo_does_as_well_is_not_reproduced():
    assert concluded([(MAIN, YES), (OTHER, NO)], placebo="other") == (
        "not reproduced",
        "its placebo does as well ('other')",
    )
    assert concluded([(MAIN, YES), (CONTROL, YES)], placebo="control") == (
        "not reproduced",
        "its placebo 'control' passes too",
    )
    assert concluded([(MAIN, YES), (CONTROL, NO)], placebo="control") == ("reproduced", "")
    assert concluded([(MAIN, YES), (CONTROL, OPEN)], placebo="control")[0] == "inconclusive"


def test_out_of_reach_keeps_its_reason():
    claim = Claim(id="c", says="s", where="w", reported="r", out_of_reach="too large")
    found = conclude(claim, [])
    assert (found.verdict, found.reason) == ("out of reach", "too large")


def test_outcomes_must_be_those_of_the_claim():
    claim = Claim(
        id="c", says="s", where="w", reported="r", about="training", placebo="none: x", tests=[MAIN]
    )
    with pytest.raises(ValueError, match="declares the tests"):
        conclude(claim, [])


# Records ----------------------------------------------------------------------------------------------


def record(**more) -> Record:
    claim = {"id": "c", "says": "s", "where": "w", "reported": "r", "about": "training"}
    claim |= {"placebo": "none: nothing to remove", "tests": [MAIN.model_dump(exclude_none=True)]}
    facts = {"slug": "toy", "family": "theory", "title": "t", "authors": "a", "year": 2020}
    facts |= {"venue": "v", "question": "q", "stands_on": "s", "claims": [claim]}
    return Record(**facts, **more)


def test_a_record_is_judged_claim_by_claim():
    evidence = {("c", "main"): points(Sample(YES, seed=range(8)), "seed")}
    assert judge(record(), evidence)["c"].verdict == "reproduced"
    with pytest.raises(EvidenceError, match="no evidence for test 'main' of claim 'c'"):
        judge(record(), {})
    wrong = {("c", "main"): points(Sample(YES, item=range(8)), "item")}
    with pytest.raises(EvidenceError, match="claim 'c', test 'main': evidence has unit 'item'"):
        judge(record(), wrong)
    two = {("c", "main"): points(Sample({"a": YES, "b": YES}, seed=range(8)), "seed")}
    with pytest.raises(EvidenceError, match="'mean' takes one list of values"):
        judge(record(), two)


def test_growth_reaches_the_interval_of_its_unit_alone():
    evidence = {("c", "main"): points(Sample(YES, seed=range(8)), "seed")}

    def width(grow):
        found = judge(record(grow=grow), evidence)["c"].tests[0].estimate
        return found.high - found.low

    looks = {"parameter": "n", "looks": [4, 8, 16]}
    assert width(looks | {"unit": "seed"}) > width(None)
    assert width(looks | {"unit": "item"}) == width(None)


def test_a_question_asked_again_is_held_to_the_level_of_as_many_looks():
    evidence = {("c", "main"): points(Sample(YES, seed=range(8)), "seed")}

    def width(runs, grow=None):
        claim = record(grow=grow).model_dump()
        claim["claims"][0]["tests"][0]["runs"] = runs
        found = judge(Record.model_validate(claim), evidence)["c"].tests[0].estimate
        return found.high - found.low

    looks = {"parameter": "n", "looks": [4, 8], "unit": "seed"}
    widths = [width(1), width(2), width(3), width(2, looks), width(3, looks)]
    assert widths[0] < widths[1] < widths[2] == widths[3] < widths[4]
    assert width(2) == width(1, looks)
