"""`reattend compare`: fresh results against the committed ones, on one screen.

Training on another processor is another draw. So an effect agrees when it lies in the prediction interval
of the stored one (units resampled on both sides), and a deterministic number when it lies within its
tolerance. Both sides are judged by the present record; times are not compared, only their verdicts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from scipy.special import stdtrit

from reattend.evidence.files import read_evidence
from reattend.evidence.intervals import Estimate
from reattend.evidence.verdicts import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    ClaimOutcome,
    EvidenceError,
    judge,
)
from reattend.pipeline.errors import CommandError
from reattend.pipeline.judge import judge_profile
from reattend.pipeline.manifests import write_text
from reattend.pipeline.power import chosen_records
from reattend.presentation import interval_text
from reattend.project import git, read_json, results_directory, study_directory
from reattend.records import Record

DEFAULT_TOLERANCE = 0.02  # relative, for metrics of which the record says nothing
LEVEL = 0.05  # of all prediction intervals of one comparison together
LINES = 12  # of each list that the screen shows
_FLOOR = 1e-9  # differences below this are rounding, whatever the size of the numbers


@dataclass
class Comparison:
    """What came of holding two sets of results against each other; lines of text by kind."""

    claims: int = 0
    agreeing: int = 0
    contradicting: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    measurements: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """No verdict contradicts, no effect falls outside what the stored evidence predicts."""
        return not (self.contradicting or self.outside)


def compare(root: Path, papers: list[str], profile: str, ref: str, study: bool = False) -> int:
    """Print how the working tree's results stand to those committed at `ref`.

    Args:
        study: take the results of runs with other parameters, in build/study: with another seed the
            verdicts should be the same. Single measurements, each of a seed, are then not compared.

    Returns:
        0 unless a verdict contradicts (reproduced against not reproduced) or an effect falls outside its
        prediction interval or tolerance.

    Raises:
        CommandError: unknown paper or revision, or evidence that cannot be used.
    """
    records = chosen_records(root, papers)
    if not has_revision(root, ref):
        raise CommandError(f"no Git revision '{ref}'", exit_code=2)
    sides = {}
    found = Comparison()
    place = study_directory if study else results_directory
    for record in records:
        fresh = judge_profile(root, record, profile, place)
        if fresh is None and study and not papers:
            continue  # few papers are studied
        stored = stored_outcomes(root, record, profile, ref)
        if fresh is None or isinstance(stored, str):
            here = "no results here" if fresh is None else stored
            found.missing.append(f"{record.slug}: {here}")
            continue
        sides[record.slug] = fresh, stored
        if not study:
            found.measurements += changed_measurements(root, record, profile, ref)
    tests = sum(len(outcome.tests) for fresh, _ in sides.values() for outcome in fresh.values())
    for slug, (fresh, stored) in sides.items():
        add_claims(found, slug, fresh, stored, LEVEL / max(tests, 1))
    _show(root, found, profile, ref)
    return int(not found.agrees)


def has_revision(root: Path, ref: str) -> bool:
    """Whether Git knows `ref` as a commit."""
    return git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}") is not None


def stored_outcomes(
    root: Path, record: Record, profile: str, ref: str
) -> dict[str, ClaimOutcome] | str:
    """Outcomes of the evidence committed at `ref` under the present record, or why there are none."""
    place = results_directory(root, record.family, record.slug, profile).relative_to(root)
    text = git(root, "show", f"{ref}:{place.as_posix()}/evidence.csv")
    if text is None:
        return f"{ref} has no evidence at profile {profile}"
    facts = json.loads(git(root, "show", f"{ref}:{place.as_posix()}/run.json") or "{}")
    try:
        return judge(record, read_evidence(text, facts.get("timing_evidence", [])))
    except EvidenceError as error:
        return f"the evidence at {ref} is of another record ({error})"


def add_claims(
    found: Comparison,
    slug: str,
    fresh: dict[str, ClaimOutcome],
    stored: dict[str, ClaimOutcome],
    level: float,
) -> None:
    """Hold every testable claim of one paper against its stored self.

    Args:
        level: of each prediction interval.
    """
    for name, now in fresh.items():
        before = stored[name]
        if not now.tests:
            continue
        found.claims += 1
        if now.verdict == before.verdict:
            found.agreeing += 1
        else:
            contradict = {now.verdict, before.verdict} == {REPRODUCED, NOT_REPRODUCED}
            why = next((o.reason for o in (now, before) if o.verdict == INCONCLUSIVE), now.reason)
            line = f"{slug} {name}: {before.verdict} -> {now.verdict}" + (
                f" ({why})" if why else ""
            )
            (found.contradicting if contradict else found.changed).append(line)
        for new, old in zip(now.tests, before.tests, strict=True):
            if new.test.unit != "round" and not predicted(new.estimate, old.estimate, level):
                texts = (
                    interval_text(e.effect, e.low, e.high) for e in (old.estimate, new.estimate)
                )
                found.outside.append(f"{slug} {name}.{new.id}: {' -> '.join(texts)}")


def predicted(new: Estimate, old: Estimate, level: float) -> bool:
    """Whether the stored evidence predicts the new effect.

    The difference of two effects of the same experiment has the variance of both; the fewer degrees of
    freedom count. A deterministic number is held to a tolerance.
    """
    if _alike(new.effect, old.effect, DEFAULT_TOLERANCE):
        return True
    if not (new.has_interval and old.has_interval):
        return True  # too few points to predict from
    error, freedom = math.hypot(new.error, old.error), min(new.freedom, old.freedom)
    if error == 0:
        return False
    return abs(new.effect - old.effect) <= float(stdtrit(freedom, 1 - level / 2)) * error


def changed_measurements(root: Path, record: Record, profile: str, ref: str) -> list[str]:
    """Logged measurements that are gone, new, or beyond the tolerance of their metric, a line each."""
    path = results_directory(root, record.family, record.slug, profile) / "results.json"
    text = git(root, "show", f"{ref}:{path.relative_to(root).as_posix()}")
    fresh = read_json(path)
    try:
        old_values, new_values = _by_key(json.loads(text)), _by_key(fresh)
    except (ValueError, KeyError, TypeError):
        return [f"{record.slug}: results.json cannot be read on one side"]
    lines = []
    for key in {**old_values, **new_values}:
        name = f"{record.slug} " + " ".join(str(part) for part in key if part not in ("", None))
        if key not in new_values or key not in old_values:
            lines.append(f"{name}: {'gone' if key in old_values else 'new'}")
            continue
        old, new = old_values[key], new_values[key]
        if not _alike(new, old, record.tolerances.get(key[0], DEFAULT_TOLERANCE)):
            lines.append(f"{name}: {old:g} -> {new:g}")
    return lines


def _show(root: Path, found: Comparison, profile: str, ref: str) -> None:
    """One screen; the whole lists in build/compare.txt."""
    print(
        f"{found.agreeing} of {found.claims} testable claims have the verdict of {ref} (profile {profile})"
    )
    lists = {
        "verdicts that contradict": found.contradicting,
        "verdicts that changed": found.changed,
        "effects outside what the stored evidence predicts": found.outside,
        "not compared": found.missing,
    }
    for title, lines in lists.items():
        if lines:
            more = [f"… and {len(lines) - LINES} more"] if len(lines) > LINES else []
            print("\n".join([f"{title}:", *(f"  {line}" for line in lines[:LINES] + more)]))
    lists["measurements beyond their tolerance"] = found.measurements
    text = "\n".join(line for title, lines in lists.items() for line in [f"# {title}", *lines])
    write_text(root / "build" / "compare.txt", text + "\n")
    print(
        f"{len(found.measurements)} measurements differ by more than their tolerance; "
        "every line: build/compare.txt"
    )


def _alike(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b)) + _FLOOR


def _by_key(results: dict) -> dict[tuple, float]:
    return {
        (row["metric"], row["method"], row["setting"], row["seed"]): row["value"]
        for row in results["measurements"]
    }
