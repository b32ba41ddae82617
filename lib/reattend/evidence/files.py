"""evidence.csv: the points of a run, and verdicts as plain values.

One row a quantity and point: claim, test, quantity, seed, item, value. Tests of unit `round` are times,
which differ from run to run; their rows are in run.json instead.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping

import numpy as np

from reattend.evidence.samples import LABELS, Points, six_digits
from reattend.evidence.verdicts import ClaimOutcome, EvidenceError, TestOutcome

COLUMNS = ("claim", "test", "quantity", "seed", "item", "value")
Evidence = dict[tuple[str, str], Points]


def evidence_csv(evidence: Mapping[tuple[str, str], Points]) -> str:
    """The text of evidence.csv: everything but times."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for row in evidence_rows(evidence, timing=False):
        writer.writerow(row | {"value": f"{row['value']:.6g}"})
    return out.getvalue()


def evidence_rows(evidence: Mapping[tuple[str, str], Points], timing: bool) -> list[dict]:
    """One row a quantity and point, of the times or of everything else."""
    return [
        {"claim": claim, "test": test, "quantity": quantity}
        | {name: labels[number] for name, labels in points.labels.items()}
        | {"value": float(value)}
        for (claim, test), points in evidence.items()
        if (points.unit == "round") == timing
        for quantity, values in points.quantities.items()
        for number, value in enumerate(values)
    ]


def read_evidence(text: str, timing: Iterable[Mapping] = ()) -> Evidence:
    """The points in the text of an evidence.csv, with the rows of times that run.json keeps.

    Raises:
        EvidenceError: names the first row that cannot be used.
    """
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise EvidenceError(f"line 1: the columns must be {','.join(COLUMNS)}")
    groups: dict[tuple[str, str], list[dict]] = {}
    for number, row in enumerate(reader, start=2):
        where = f"line {number}"
        if None in row or None in row.values():
            raise EvidenceError(f"{where}: needs {len(COLUMNS)} cells")
        _add(groups, {name: cell for name, cell in row.items() if cell != ""}, where)
    for row in timing:
        _add(groups, dict(row), "timing_evidence")
    return {key: _points(rows, *key) for key, rows in groups.items()}


def stored(outcome: ClaimOutcome) -> dict:
    """A claim's outcome as JSON values for verdicts.json."""
    claim = {"verdict": outcome.verdict}
    claim |= {"reason": outcome.reason} if outcome.reason else {}
    return claim | {"tests": {test.id: _stored_test(test) for test in outcome.tests}}


def _stored_test(outcome: TestOutcome) -> dict:
    measured = outcome.estimate
    kept = {"role": outcome.test.role, "effect": six_digits(measured.effect)}
    if measured.has_interval and outcome.test.unit != "exact":
        kept |= {"low": six_digits(measured.low), "high": six_digits(measured.high)}
    kept |= {"n": measured.n, "unit": outcome.test.unit, "verdict": outcome.verdict}
    if math.isfinite(outcome.beyond):
        kept["beyond"] = round(outcome.beyond, 3)
    return kept | ({"needed": outcome.needed} if outcome.needed else {})


def _add(groups: dict, row: dict, where: str) -> None:
    """Put a row with its value as a number to those of its test."""
    try:
        value = float(row["value"])
        key = row["claim"], row["test"]
        row["quantity"]
    except (KeyError, TypeError, ValueError):
        raise EvidenceError(f"{where}: needs a claim, a test, a quantity and a number") from None
    if not math.isfinite(value):
        raise EvidenceError(f"{where}: the value of '{key[0]}.{key[1]}' is {value}")
    groups.setdefault(key, []).append(row | {"value": value})


def _points(rows: list[dict], claim: str, test: str) -> Points:
    names = {name for name in ("seed", "item", "round") if name in rows[0]}
    order = next((labels for labels in LABELS.values() if set(labels) == names), None)
    by_quantity: dict[str, list[dict]] = {}
    for row in rows:
        by_quantity.setdefault(row["quantity"], []).append(row)
    keys = [[tuple(r.get(n) for n in order or ()) for r in some] for some in by_quantity.values()]
    broken = order is None or any(some != keys[0] for some in keys)
    broken = broken or any(None in key for key in keys[0]) or len(set(keys[0])) < len(keys[0])
    if broken:
        raise EvidenceError(f"the rows of '{claim}.{test}' do not share the labels of one unit")
    labels = {name: tuple(str(key[i]) for key in keys[0]) for i, name in enumerate(order)}
    arrays = {name: np.array([row["value"] for row in some]) for name, some in by_quantity.items()}
    return Points(arrays, labels)
