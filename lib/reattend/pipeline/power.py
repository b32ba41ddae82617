"""`reattend power`: what would decide each open test, and what that costs.

Read after a run from its evidence, or before one from the spread that a pilot showed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from reattend.evidence.intervals import Estimate
from reattend.evidence.verdicts import (
    INCONCLUSIVE,
    ClaimOutcome,
    TestOutcome,
    level_of,
    needed_points,
    plural,
)
from reattend.parameters import profile_values
from reattend.pipeline.errors import CommandError
from reattend.pipeline.judge import judge_profile
from reattend.project import results_directory
from reattend.records import Record, Test, load_record, record_paths

PILOT_POINTS = 1_000  # from which a pilot's spread is taken as known


@dataclass(frozen=True)
class OpenTest:
    """A test that leaves its claim open.

    `seconds` are CPU seconds of the run that would decide, None where they cannot be told: nothing
    grows, or no number of points would do.
    """

    paper: str
    claim: str
    outcome: TestOutcome
    seconds: float | None

    @property
    def advice(self) -> str:
        """What would decide it, or why more points do not."""
        test, measured = self.outcome.test, self.outcome.estimate
        if self.outcome.needed is None:
            return (
                "the margin is finer than the noise, or the effect lies on it: change the setting"
            )
        cost = "" if self.seconds is None else f", about {self.seconds:.0f} CPU s"
        return f"{measured.n} {plural(test.unit)} of {self.outcome.needed}{cost}"


def power(root: Path, papers: list[str], profile: str) -> int:
    """Print, for every open test of `papers` (default: all), what would decide it; returns 0.

    Raises:
        CommandError: unknown paper, or evidence that cannot be used.
    """
    count = 0
    for record in chosen_records(root, papers):
        for test in open_tests(root, record, profile):
            count += 1
            print(f"{test.paper}: {test.claim}.{test.outcome.id}: {test.advice}")
    print(f"{count} open tests at profile {profile}")
    return 0


def pilot_power(root: Path, paper: str, pilots: list[str]) -> int:
    """Print how many points would decide tests of one paper, given effects and spreads of a pilot.

    Args:
        pilots: "claim.test=effect:spread" each, the spread being a standard deviation over units.

    Raises:
        CommandError: unknown paper, claim or test, or a pilot that is no effect and spread.
    """
    (record,) = chosen_records(root, [paper])
    for pilot in pilots:
        test, effect, spread = _parsed(record, pilot)
        level = level_of(test, record.grow)
        n = points_for(test, effect, spread, level)
        where = pilot.partition("=")[0]
        if n is None:
            print(f"{where}: no number of points would do; the margin is finer than the noise")
        else:
            print(f"{where}: about {n} {plural(test.unit)} would decide")
    return 0


def points_for(test: Test, effect: float, spread: float, level: float = 0.05) -> int | None:
    """Points that would decide a test at this effect and spread over units; None above 1,000."""
    for n in range(3, PILOT_POINTS + 1):
        known = Estimate(effect, effect, effect, n, spread / math.sqrt(n), n - 1)
        found = needed_points(test, known, level)
        if found == n:
            return n
    return None


def open_tests(root: Path, record: Record, profile: str) -> list[OpenTest]:
    """The undecided tests behind a paper's inconclusive claims."""
    outcomes = judge_profile(root, record, profile) or {}
    factor = cost_of_a_point(root, record, profile)
    return [
        OpenTest(record.slug, outcome.id, test, factor(test) if factor else None)
        for outcome in outcomes.values()
        for test in undecided(outcome)
    ]


def undecided(outcome: ClaimOutcome) -> list[TestOutcome]:
    """The tests that an inconclusive claim waits for."""
    if outcome.verdict != INCONCLUSIVE:
        return []
    return [test for test in outcome.tests if test.verdict == INCONCLUSIVE]


def cost_of_a_point(root: Path, record: Record, profile: str):
    """From a test to the CPU seconds of a run that decides it; None where nothing grows.

    The run's cost is taken to grow with its points, which is at most what it does.
    """
    if record.grow is None:
        return None
    seconds = run_seconds(root, record, profile)

    def cost(test: TestOutcome) -> float | None:
        grows = record.grow.unit in test.test.unit.split(" x ")
        if seconds is None or test.needed is None or not grows:
            return None
        return seconds * test.needed / test.estimate.n

    return cost


def run_seconds(root: Path, record: Record, profile: str) -> float | None:
    """CPU seconds of a paper's last run."""
    path = results_directory(root, record.family, record.slug, profile) / "run.json"
    try:
        return float(json.loads(path.read_text(encoding="utf8"))["cpu_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def present_look(root: Path, record: Record, profile: str) -> int:
    """The value that params.yaml gives what grows.

    Raises:
        CommandError: when it is none of the record's looks.
    """
    grow = record.grow
    value = profile_values(root, record.slug, profile).get(grow.parameter)
    if value not in grow.looks:
        raise CommandError(
            f"{record.slug}: params.yaml has {grow.parameter}: {value} at {profile}, "
            f"which is none of the record's looks {grow.looks}",
            2,
        )
    return value


def chosen_records(root: Path, papers: list[str]) -> list[Record]:
    """The records of `papers`, or of all.

    Raises:
        CommandError: for an unknown paper.
    """
    paths = record_paths(root)
    for slug in papers:
        if slug not in paths:
            raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(paths)}", 2)
    return [load_record(paths[slug]) for slug in papers or paths]


def _parsed(record: Record, pilot: str) -> tuple[Test, float, float]:
    where, _, numbers = pilot.partition("=")
    claim, _, name = where.partition(".")
    try:
        effect, spread = map(float, numbers.split(":"))
    except ValueError:
        raise CommandError(f"a pilot is claim.test=effect:spread, not '{pilot}'", 2) from None
    if not spread > 0 or not math.isfinite(effect + spread):
        raise CommandError(f"a pilot's spread is a number above 0, not '{numbers}'", 2)
    tests = {(c.id, t.id): t for c in record.claims for t in c.tests}
    if (claim, name) not in tests:
        known = ", ".join(f"{c}.{t}" for c, t in tests)
        raise CommandError(f"'{record.slug}' has no test '{where}'; it has: {known}", 2)
    return tests[claim, name], effect, spread
