"""metrics.json of a paper: the few numbers that `dvc metrics show` and `diff` print in columns.

The same names for every paper, so that a table of 65 papers has a dozen columns.
"""

from __future__ import annotations

import json
from pathlib import Path

from reattend.parameters import PROFILES
from reattend.pipeline.graph import METRICS, read_records
from reattend.pipeline.manifests import write_json
from reattend.project import results_directory
from reattend.records import Record

COUNTED = ("reproduced", "partially", "not reproduced", "inconclusive")


def metrics(verdicts: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    """How many claims have which verdict, and the headline effect, by profile.

    Args:
        verdicts: {profile: {claim: {"verdict": …, "tests": {test: {"role": …, "effect": …}}}}}.

    Returns:
        {profile: counts by verdict and `headline`: the effect of the first test (no gate, no control)
        of the first claim that has one, to six digits}; only profiles with a verdict.
    """
    return {profile: _of(claims) for profile, claims in verdicts.items() if _counts(claims)}


def _of(claims: dict[str, dict]) -> dict[str, float]:
    counts = _counts(claims)
    found = {verdict.replace(" ", "_"): counts.get(verdict, 0) for verdict in COUNTED}
    effects = [
        test["effect"]
        for claim in claims.values()
        for test in claim.get("tests", {}).values()
        if test.get("role", "test") == "test" and "effect" in test
    ]
    return found | ({"headline": float(f"{effects[0]:.6g}")} if effects else {})


def _counts(claims: dict[str, dict]) -> dict[str, int]:
    given = [claim.get("verdict") for claim in claims.values()]
    return {verdict: given.count(verdict) for verdict in COUNTED if verdict in given}


def write_metrics(root: Path) -> None:
    """Write metrics.json of every paper beside its results."""
    for slug, record in read_records(root)[0].items():
        path = root / "figures" / record.family / slug / METRICS
        write_json(path, metrics(_verdicts(root, record)))


def _verdicts(root: Path, record: Record) -> dict[str, dict[str, dict]]:
    """A paper's claims as its results of each profile have them; those that cannot be read have none."""
    found = {}
    for profile in PROFILES:
        directory = results_directory(root, record.family, record.slug, profile)
        try:
            text = (directory / "results.json").read_text(encoding="utf8")
            found[profile] = json.loads(text)["claims"]
        except (OSError, ValueError, KeyError):
            continue
    return found
