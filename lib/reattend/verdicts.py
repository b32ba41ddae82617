"""From measurements to verdicts.

A claim is tested by effects: differences paired by seed or by test item, or a statistic of paired
arrays. Each effect gets a 95 % bootstrap interval, and the interval, not the mean, is held against
margins that the record fixed beforehand:

    wholly beyond `reproduced`            reproduced
    wholly short of `not_reproduced`      not reproduced
    wholly between the two                partially
    straddling a margin                   inconclusive

The interval is the expanded percentile bootstrap (Hesterberg 2015, "What teachers should know about
the bootstrap", section 5.3): percentiles are widened from normal to Student t quantiles and by
sqrt(n / (n - 1)), because plain percentiles are too narrow for small n. For n <= 4 it is the range of
the points: all of them must lie on one side of the margin. Fewer than three points decide nothing,
unless the quantity is deterministic (`exact: true`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtr, stdtrit

from reattend.records import Claim, Test

REPRODUCED = "reproduced"
PARTIALLY = "partially"
NOT_REPRODUCED = "not reproduced"
INCONCLUSIVE = "inconclusive"
OUT_OF_REACH = "out of reach"
VERDICTS = (REPRODUCED, PARTIALLY, NOT_REPRODUCED, INCONCLUSIVE, OUT_OF_REACH)

RESAMPLES = 10_000
STATISTIC_RESAMPLES = 2_000  # of an arbitrary statistic, evaluated one by one
FEWEST = 3  # points that can decide
LEVEL = 0.95


class Sample:
    """Paired measurements, one per seed or test item, and what is computed from them.

    Args:
        values: a 1-D array whose mean is the effect, or a mapping of equally long arrays that are
            resampled together.
        statistic: maps such a mapping (of resampled arrays) to the effect; needed with a mapping.
    """

    def __init__(
        self,
        values,
        statistic: Callable[[Mapping[str, np.ndarray]], float] | None = None,
    ) -> None:
        if isinstance(values, Mapping) != (statistic is not None):
            raise ValueError("a mapping of arrays needs a statistic, a plain array takes none")
        named = values if isinstance(values, Mapping) else {"value": values}
        self.arrays = {name: np.asarray(array, dtype=float) for name, array in named.items()}
        self.statistic = statistic
        lengths = {array.shape[:1] for array in self.arrays.values()}
        if len(lengths) != 1 or any(array.ndim < 1 for array in self.arrays.values()):
            raise ValueError("paired arrays must have the same length along their first axis")
        if statistic is None and self.arrays["value"].ndim != 1:
            raise ValueError("values must be one-dimensional")
        if not len(self):
            raise ValueError("no measurements")
        for name, array in self.arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"'{name}' holds NaN or infinite measurements")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def effect(self, index=slice(None)) -> float:
        """The effect of the measurements, or of those at `index`."""
        chosen = {name: array[index] for name, array in self.arrays.items()}
        return float(self.statistic(chosen) if self.statistic else chosen["value"].mean())

    def interval(self) -> tuple[float, float]:
        """Expanded-percentile bootstrap interval of the effect at 95 %; NaN bounds for n = 1."""
        n = len(self)
        if n == 1:
            return math.nan, math.nan
        random = np.random.default_rng(0)
        if self.statistic is None:
            effects = self._resampled_means(random)
        else:
            draws = random.integers(n, size=(STATISTIC_RESAMPLES, n))
            effects = np.array([self.effect(draw) for draw in draws])
            if not np.isfinite(effects).all():
                raise ValueError("the statistic is NaN or infinite on a resample")
        tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - LEVEL) / 2))
        low, high = np.quantile(effects, [tail, 1 - tail])
        return float(low), float(high)

    def _resampled_means(self, random: np.random.Generator) -> np.ndarray:
        values = self.arrays["value"]
        rows = max(1, 4_000_000 // len(values))  # bounds the memory of one slab of draws
        means = []
        for start in range(0, RESAMPLES, rows):
            count = min(rows, RESAMPLES - start)
            means.append(values[random.integers(len(values), size=(count, len(values)))].mean(1))
        return np.concatenate(means)


class Exact:
    """A deterministic number: a count, or an identity that holds or does not."""

    def __init__(self, value: float) -> None:
        self.value = float(value)
        if not math.isfinite(self.value):
            raise ValueError("an exact measurement must be finite")


@dataclass(frozen=True)
class TestOutcome:
    """One test of a claim, decided."""

    __test__ = False  # pytest: not a test class
    id: str
    effect: float
    low: float
    high: float
    n: int
    verdict: str
    control: bool = False
    timing: bool = False
    points: tuple[float, ...] = ()  # every measurement, when there are at most five


@dataclass(frozen=True)
class ClaimOutcome:
    """A claim's verdict with the tests it follows from."""

    id: str
    verdict: str
    tests: tuple[TestOutcome, ...] = field(default=())
    reason: str = ""


def decide(test: Test, measured: Sample | Exact) -> TestOutcome:
    """Hold one measured effect against its test's margins.

    Raises:
        TypeError: when an exact number is given for a test that is not declared `exact`, or the
            reverse.
    """
    if isinstance(measured, Exact) != test.exact:
        kind = "Exact(…)" if test.exact else "Sample(…)"
        raise TypeError(f"test '{test.id}' takes {kind}")
    if isinstance(measured, Exact):
        effect = low = high = measured.value
        n, points = 1, ()
    else:
        effect, (low, high), n = measured.effect(), measured.interval(), len(measured)
        plain = measured.statistic is None and n <= 5
        points = tuple(map(float, measured.arrays["value"])) if plain else ()
        if not math.isfinite(effect):
            raise ValueError(f"test '{test.id}': the effect is NaN or infinite")
    undecided = n < FEWEST and not test.exact
    verdict = INCONCLUSIVE if undecided else _against_margins(test, low, high)
    return TestOutcome(test.id, effect, low, high, n, verdict, test.control, test.timing, points)


def _against_margins(test: Test, low: float, high: float) -> str:
    if test.better == "equal":
        if -test.margin <= low and high <= test.margin:
            return REPRODUCED
        return NOT_REPRODUCED if low > test.margin or high < -test.margin else INCONCLUSIVE
    good = test.reproduced
    bad = good if test.not_reproduced is None else test.not_reproduced
    if test.better == "lower":
        low, high, good, bad = -high, -low, -good, -bad
    if low >= good:
        return REPRODUCED
    if high < bad:
        return NOT_REPRODUCED
    return PARTIALLY if bad <= low and high < good else INCONCLUSIVE


def conclude(claim: Claim, outcomes: list[TestOutcome]) -> ClaimOutcome:
    """The verdict of a claim from all of its tests.

    A control that did not fail leaves the claim inconclusive: the experiment cannot tell. A decisive
    test that is not reproduced settles it. Otherwise any inconclusive test leaves it inconclusive;
    all reproduced is reproduced, all not reproduced is not, and a mixture is partial.

    Raises:
        ValueError: when the outcomes are not those of the claim's tests, one each.
    """
    if claim.out_of_reach:
        return ClaimOutcome(claim.id, OUT_OF_REACH, reason=claim.out_of_reach)
    declared, given = [t.id for t in claim.tests], [o.id for o in outcomes]
    if declared != given:
        raise ValueError(f"claim '{claim.id}' declares the tests {declared}, measured: {given}")
    tests = tuple(outcomes)
    main = [o for o in tests if not o.control]
    decisive = {t.id for t in claim.tests if t.decisive}
    passed = [o.id for o in tests if o.control and o.verdict != NOT_REPRODUCED]
    if passed:
        return ClaimOutcome(claim.id, INCONCLUSIVE, tests, f"control '{passed[0]}' did not fail")
    settled = [o.id for o in main if o.id in decisive and o.verdict == NOT_REPRODUCED]
    if settled:
        return ClaimOutcome(claim.id, NOT_REPRODUCED, tests, f"'{settled[0]}' decides")
    verdicts = {o.verdict for o in main}
    if INCONCLUSIVE in verdicts:
        return ClaimOutcome(claim.id, INCONCLUSIVE, tests)
    if len(verdicts) == 1:
        return ClaimOutcome(claim.id, verdicts.pop(), tests)
    return ClaimOutcome(claim.id, PARTIALLY, tests)


def interval_text(effect: float, low: float, high: float) -> str:
    """An effect with its interval in few digits; without one where there is none."""
    if not math.isfinite(low) or low == high:
        return f"{effect:.3g}"
    return f"{effect:.3g} [{low:.3g}, {high:.3g}]"
