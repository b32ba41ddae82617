"""`reattend compare`: fresh results against the committed ones."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from reattend.pipeline.errors import CommandError
from reattend.pipeline.graph import load_records
from reattend.project import results_directory
from reattend.records import Record

DEFAULT_TOLERANCE = 0.02  # relative, for metrics of which the record says nothing
_FLOOR = 1e-9  # differences below this are rounding, whatever the size of the numbers


def compare(root: Path, papers: list[str], profile: str, ref: str) -> int:
    """Print what differs between the working tree's results and those committed at `ref`.

    Returns:
        0 when every verdict is the same, every measurement within its metric's tolerance and every
        effect within that or the committed interval, else 1.

    Raises:
        CommandError: unknown paper or revision.
    """
    records = load_records(root)
    unknown = [slug for slug in papers if slug not in records]
    if unknown:
        raise CommandError(f"unknown paper '{unknown[0]}'; there are: {', '.join(records)}", 2)
    if not has_revision(root, ref):
        raise CommandError(f"no Git revision '{ref}'", exit_code=2)
    different = 0
    for slug in papers or records:
        lines = compare_paper(root, records[slug], profile, ref)
        different += bool(lines)
        for line in lines[:20]:
            print(f"{slug}: {line}")
        if len(lines) > 20:
            print(f"{slug}: … and {len(lines) - 20} more")
    count = len(papers or records)
    print(f"{count - different} of {count} papers agree with {ref} (profile {profile})")
    return int(bool(different))


def has_revision(root: Path, ref: str) -> bool:
    """Whether Git knows `ref` as a commit."""
    return _git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}") is not None


def compare_paper(root: Path, record: Record, profile: str, ref: str) -> list[str]:
    """What differs for one paper, a line each; empty when it agrees."""
    path = results_directory(root, record.family, record.slug, profile) / "results.json"
    text = _git(root, "show", f"{ref}:{path.relative_to(root).as_posix()}")
    if not path.exists():
        return [] if text is None else [f"no results at profile {profile}, {ref} has some"]
    if text is None:
        return [f"{ref} has no results at profile {profile} to compare with"]
    return differences(json.loads(path.read_text()), json.loads(text), record.tolerances)


def differences(fresh: dict, reference: dict, tolerances: dict[str, float]) -> list[str]:
    """Verdicts and effects that changed, then measurements missing, new or beyond the tolerance.

    Args:
        fresh, reference: contents of two results.json.
        tolerances: relative difference allowed by metric; `DEFAULT_TOLERANCE` for the others.
    """
    lines = []
    old_claims, new_claims = reference["claims"], fresh["claims"]
    for name in {**old_claims, **new_claims}:
        old = old_claims.get(name, {}).get("verdict", "absent")
        new = new_claims.get(name, {}).get("verdict", "absent")
        if old != new:
            lines.append(f"claim {name}: {old} -> {new}")
        lines += _changed_effects(name, new_claims.get(name, {}), old_claims.get(name, {}))
    old_values, new_values = _by_key(reference), _by_key(fresh)
    for key in {**old_values, **new_values}:
        name = " ".join(str(part) for part in key if part not in ("", None))
        if key not in new_values or key not in old_values:
            lines.append(f"{name}: {'gone' if key in old_values else 'new'}")
            continue
        old, new = old_values[key], new_values[key]
        if not _alike(new, old, tolerances.get(key[0], DEFAULT_TOLERANCE)):
            lines.append(f"{name}: {old:g} -> {new:g}")
    return lines


def _changed_effects(claim: str, fresh: dict, reference: dict) -> list[str]:
    """Effects of a claim's tests outside both the tolerance and the reference's interval."""
    lines = []
    old_tests, new_tests = reference.get("tests", {}), fresh.get("tests", {})
    for name in old_tests.keys() & new_tests.keys():
        old, new = old_tests[name], new_tests[name]
        if "effect" not in old or "effect" not in new:
            continue  # a timing, which may differ
        before, now = old["effect"], new["effect"]
        inside = old.get("low", before) <= now <= old.get("high", before)
        if not inside and not _alike(now, before, DEFAULT_TOLERANCE):
            lines.append(f"claim {claim}, {name}: {before:g} -> {now:g}")
    return sorted(lines)


def _alike(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b)) + _FLOOR


def _by_key(results: dict) -> dict[tuple, float]:
    return {
        (row["metric"], row["method"], row["setting"], row["seed"]): row["value"]
        for row in results["measurements"]
    }


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None
