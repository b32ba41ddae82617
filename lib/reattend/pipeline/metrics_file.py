"""metrics.json of a paper: the few numbers that `dvc metrics show` and `diff` print in columns.

The same names for every paper, so that a table of 65 papers has a dozen columns.
"""

from __future__ import annotations

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
