"""From points to verdicts: pure functions of what a run stored and what its record declares.

The interval of an effect, not the effect, is held against margins that the record fixed beforehand:

    wholly beyond `reproduced`                        reproduced
    the same, but wholly short of `negligible`        partially: there, but too small to matter
    wholly short of `negligible` or `not_reproduced`  not reproduced
    wholly between `not_reproduced` and `reproduced`  partially
    else                                              inconclusive: few points, or on the margin

A claim with several tests is first asked whether it can be asked at all: its gates must hold, its
controls must fail, its placebo must not pass too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from reattend.evidence.intervals import (
    FEWEST,
    FEWEST_RESAMPLED,
    POCOCK,
    Estimate,
    estimate,
)
from reattend.evidence.samples import VALUE, Points
from reattend.evidence.statistics import QUANTITIES, RESAMPLED
from reattend.records import Claim, Growth, Record, Test

REPRODUCED = "reproduced"
PARTIALLY = "partially"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
OUT_OF_REACH = "out of reach"
VERDICTS = (REPRODUCED, PARTIALLY, NOT_REPRODUCED, INCONCLUSIVE, OUT_OF_REACH)

TOLERANCE = 1e-9  # relative, of margins: .9 is not short of .9
MOST = 100  # times the present points: what would take more lies on its margin


class EvidenceError(ValueError):
    """Evidence that cannot be used; the message names the test or the line."""


@dataclass(frozen=True)
class TestOutcome:
    """One test of a claim, decided.

    `beyond` is the probability that the effect clears `reproduced` (lies within the margin, for
    `equal`); `needed` the points that would decide at the present effect and spread, None where the
    effect lies on its margin or the test is decided.
    """

    __test__ = False  # pytest: not a test class
    test: Test
    estimate: Estimate
    verdict: str
    beyond: float
    needed: int | None = None

    @property
    def id(self) -> str:
        """The test's id in the record."""
        return self.test.id

    @property
    def why_open(self) -> str:
        """What an inconclusive test lacks."""
        n, unit = self.estimate.n, plural(self.test.unit)
        if self.needed is None:
            return f"'{self.id}' is on its margin ({n} {unit})"
        return f"few points: '{self.id}' has {n} {unit}, about {self.needed} would do"


@dataclass(frozen=True)
class ClaimOutcome:
    """A claim's verdict, the tests it follows from, and the reason where they do not speak for it."""

    id: str
    verdict: str
    tests: tuple[TestOutcome, ...] = ()
    reason: str = ""


def judge(record: Record, evidence: Mapping[tuple[str, str], Points]) -> dict[str, ClaimOutcome]:
    """The verdict of every claim of a record, by claim id.

    Args:
        evidence: the points of each test by (claim id, test id).

    Raises:
        EvidenceError: names a test without points, with points of another unit than declared, or with
            quantities that its statistic does not take.
    """
    outcomes = {}
    for claim in record.claims:
        tests = []
        for test in claim.tests:
            if (claim.id, test.id) not in evidence:
                raise EvidenceError(f"no evidence for test '{test.id}' of claim '{claim.id}'")
            level = level_of(test, record.grow)
            try:
                tests.append(decide(test, evidence[claim.id, test.id], level))
            except ValueError as error:
                raise EvidenceError(f"claim '{claim.id}', test '{test.id}': {error}") from None
        outcomes[claim.id] = conclude(claim, tests)
    return outcomes


def level_of(test: Test, grow: Growth | None) -> float:
    """1 - confidence of a test's interval: 5 % over all looks of what grows.

    A run that asks again what an earlier one left open is another look, although at other points.
    """
    grows = grow is not None and grow.unit in test.unit.split(" x ")
    looks = (len(grow.looks) if grows else 1) + test.runs - 1
    return POCOCK[min(looks, max(POCOCK))]


def decide(test: Test, points: Points, level: float = 0.05) -> TestOutcome:
    """Hold one measured effect against its test's margins.

    Raises:
        ValueError: points of another unit than the test declares, or other quantities than its
            statistic takes.
    """
    if points.unit != test.unit:
        raise ValueError(f"evidence has unit '{points.unit}', the record says '{test.unit}'")
    takes = QUANTITIES.get(test.statistic)
    if takes is not None and set(points.quantities) != takes:
        raise ValueError(f"'{test.statistic}' takes the quantities {', '.join(sorted(takes))}")
    if takes is None and test.statistic != "least_of_means" and set(points.quantities) != {VALUE}:
        raise ValueError(f"'{test.statistic}' takes one list of values")
    measured = estimate(points, test.unit, test.statistic, level)
    verdict = verdict_of(test, measured.low, measured.high)
    needed = needed_points(test, measured, level) if verdict == INCONCLUSIVE else None
    return TestOutcome(test, measured, verdict, _beyond(test, measured), needed)


def verdict_of(test: Test, low: float, high: float) -> str:
    """The verdict of an interval; inconclusive where there is none (NaN)."""
    if not math.isfinite(low):
        return INCONCLUSIVE
    if test.better == "equal":
        if _at_least(low, -test.margin) and _at_least(test.margin, high):
            return REPRODUCED
        outside = _beyond_bound(low, test.margin) or _beyond_bound(-test.margin, high)
        return NOT_REPRODUCED if outside else INCONCLUSIVE
    good, weak, lost = _bounds(test)
    if test.better == "lower":
        low, high = -high, -low
    if _at_least(low, good):
        return PARTIALLY if weak is not None and _beyond_bound(weak, high) else REPRODUCED
    if _beyond_bound(lost, high):
        return NOT_REPRODUCED
    return PARTIALLY if _at_least(low, lost) and _beyond_bound(good, high) else INCONCLUSIVE


def endings_of(test: Test, measured: Estimate) -> list[str]:
    """The verdicts that an open test could still be given: those of effects inside its interval.

    All three where there is no interval.
    """
    if not measured.has_interval:
        return [REPRODUCED, PARTIALLY, NOT_REPRODUCED]
    low, high = measured.low, measured.high
    margins = (test.reproduced, test.negligible, test.not_reproduced)
    if test.better == "equal":
        margins = (-test.margin, test.margin)
    inside = sorted({m for m in margins if m is not None and low < m < high})
    # A verdict holds between two margins, so one effect stands for all of them.
    between = [(a + b) / 2 for a, b in itertools.pairwise([low, *inside, high])]
    return list(dict.fromkeys(verdict_of(test, effect, effect) for effect in between))


def needed_points(test: Test, measured: Estimate, level: float) -> int | None:
    """How many points would decide at the present effect and spread; None beyond MOST times as many."""
    fewest = FEWEST_RESAMPLED if test.statistic in RESAMPLED else FEWEST
    if measured.n < fewest:
        return fewest
    for n in _grid(measured.n, MOST * measured.n):
        half = stdtrit(n - 1, 1 - level / 2) * measured.error * math.sqrt(measured.n / n)
        if verdict_of(test, measured.effect - half, measured.effect + half) != INCONCLUSIVE:
            return n
    return None


def conclude(claim: Claim, outcomes: list[TestOutcome]) -> ClaimOutcome:
    """The verdict of a claim from all of its tests.

    In this order: a gate that does not hold, a control that does not fail, and a placebo that passes
    settle it; then a decisive test that is not reproduced. Otherwise all reproduced is reproduced, all
    not reproduced is not, and a mixture is partial. Open tests leave it open unless every way in which
    they could still end (`endings_of`) gives the same verdict.

    Raises:
        ValueError: when the outcomes are not those of the claim's tests, one each.
    """
    if claim.out_of_reach:
        return ClaimOutcome(claim.id, OUT_OF_REACH, reason=claim.out_of_reach)
    declared, given = [t.id for t in claim.tests], [o.id for o in outcomes]
    if declared != given:
        raise ValueError(f"claim '{claim.id}' declares the tests {declared}, measured: {given}")
    verdict, reason = _asked(claim, outcomes) or _combined(claim, outcomes)
    return ClaimOutcome(claim.id, verdict, tuple(outcomes), reason)


def plural(unit: str) -> str:
    """A unit in the plural."""
    return {"exact": "numbers", "seed x item": "seeds (x items)"}.get(unit, f"{unit}s")


def _asked(claim: Claim, outcomes: list[TestOutcome]) -> tuple[str, str] | None:
    """Verdict and reason where the experiment cannot tell, or tells of its placebo."""
    for gate in (o for o in outcomes if o.test.role == "gate" and o.verdict != REPRODUCED):
        reason = f"cannot be asked here: {gate.id}"
        open_gate = gate.verdict == INCONCLUSIVE
        return INCONCLUSIVE, f"{reason} ({gate.why_open})" if open_gate else reason
    for control in (o for o in outcomes if o.test.role == "control"):
        if control.verdict == NOT_REPRODUCED:
            continue
        if control.id == claim.placebo and control.verdict != INCONCLUSIVE:
            return NOT_REPRODUCED, f"its placebo '{control.id}' passes too"
        is_open = control.verdict == INCONCLUSIVE
        more = f" ({control.why_open})" if is_open else ""
        return INCONCLUSIVE, f"control '{control.id}' did not fail{more}"
    return None


def _combined(claim: Claim, outcomes: list[TestOutcome]) -> tuple[str, str]:
    """Verdict and reason of the tests proper."""
    tests = [o for o in outcomes if o.test.role == "test"]
    settled = _settled(claim, tests)
    if settled:
        return settled
    still_open = [o for o in tests if o.verdict == INCONCLUSIVE]
    verdicts = set()
    for ending in itertools.product(*(endings_of(o.test, o.estimate) for o in still_open)):
        closed = dict(zip((o.id for o in still_open), ending, strict=True))
        ended = [replace(o, verdict=closed.get(o.id, o.verdict)) for o in tests]
        verdicts.add((_settled(claim, ended) or (_mixture(ended),))[0])
    if len(verdicts) == 1:
        return verdicts.pop(), "whatever the open tests would say" if still_open else ""
    return INCONCLUSIVE, "; ".join(o.why_open for o in still_open)


def _settled(claim: Claim, tests: list[TestOutcome]) -> tuple[str, str] | None:
    """A lost placebo test or decisive test, whatever the others say."""
    for o in tests:
        if o.verdict == NOT_REPRODUCED and o.id == claim.placebo:
            return NOT_REPRODUCED, f"its placebo does as well ('{o.id}')"
        if o.verdict == NOT_REPRODUCED and o.test.decisive:
            return NOT_REPRODUCED, f"'{o.id}' decides"
    return None


def _mixture(tests: list[TestOutcome]) -> str:
    verdicts = {o.verdict for o in tests}
    return verdicts.pop() if len(verdicts) == 1 else PARTIALLY


def _bounds(test: Test) -> tuple[float, float | None, float]:
    """`reproduced`, `negligible` and the bound short of which it is lost, as if higher were better."""
    sign = 1 if test.better == "higher" else -1
    good = sign * test.reproduced
    weak = None if test.negligible is None else sign * test.negligible
    lost = weak if weak is not None else good
    if test.not_reproduced is not None:
        lost = sign * test.not_reproduced
    return good, weak, lost


def _beyond(test: Test, measured: Estimate) -> float:
    """Probability that the effect clears `reproduced`, or lies within the margin."""
    if not measured.has_interval:
        return math.nan
    if test.better == "equal":
        return measured.beyond(-test.margin) - measured.beyond(test.margin)
    above = measured.beyond(test.reproduced)
    return above if test.better == "higher" else 1 - above


def _at_least(value: float, bound: float) -> bool:
    return value >= bound - TOLERANCE * max(abs(value), abs(bound))


def _beyond_bound(value: float, bound: float) -> bool:
    """Whether `value` lies above `bound` by more than rounding."""
    return value > bound and not _at_least(bound, value)


def _grid(first: int, last: int) -> list[int]:
    """Whole numbers from `first` to `last`, finer at the start."""
    steps = np.geomspace(first, last, 400)
    return sorted({*range(first, min(first + 50, last)), *(int(step) for step in np.ceil(steps))})
