"""What a notebook shows of its record and its verdicts, in Markdown. Nothing here changes a result."""

from __future__ import annotations

import math
from collections.abc import Mapping

from reattend.evidence.verdicts import ClaimOutcome, TestOutcome, plural
from reattend.records import Claim, Record, Test


def record_markdown(record: Record) -> str:
    """Citation, question, what stands in for what, and the claims with how they are tested."""
    code = f" Code: [{record.code}](https://github.com/{record.code})." if record.code else ""
    rows = [
        [f"`{c.id}`", f"{c.says} ({c.where})", c.reported, _how_tested(c)] for c in record.claims
    ]
    head = ["claim", "what the paper says", "reported", "how it is tested here"]
    return (
        f"{record.citation}{code}\n\n{record.question}\n\n**Here:** {record.stands_on}\n\n"
        f"{markdown_table(head, rows)}"
    )


def outcome_markdown(claim: Claim, outcome: ClaimOutcome, reading: str | None) -> str:
    """One claim's verdict with the tests it follows from."""
    ours = " on our reading" if reading else ""
    reason = f" ({outcome.reason})" if outcome.reason else ""
    lines = [f"- {_test_line(o)}" for o in outcome.tests]
    return f"`{claim.id}`: **{outcome.verdict}**{ours}{reason}\n\n" + "\n".join(lines)


def summary_markdown(record: Record, outcomes: Mapping[str, ClaimOutcome]) -> str:
    """All claims with their verdicts, and what differs from the paper."""
    rows = [
        [c.says, c.reported, _ours(outcomes[c.id]), _verdict(outcomes[c.id])] for c in record.claims
    ]
    return markdown_table(["claim", "reported", "ours", "verdict"], rows) + _deviations(record)


def smoke_markdown(
    record: Record, outcomes: Mapping[str, ClaimOutcome], committed: Mapping[str, dict]
) -> str:
    """The committed verdicts beside the numbers of a smoke run, which yields none.

    Args:
        committed: claims of the committed verdicts.json at cpu; empty where there are none.
    """
    rows = [
        [
            c.says,
            _stored_numbers(committed.get(c.id, {})),
            f"**{committed[c.id]['verdict']}**" if c.id in committed else "not run yet",
            "; ".join(f"{o.estimate.effect:.3g}" for o in outcomes[c.id].tests),
        ]
        for c in record.claims
    ]
    head = ["claim", "committed run (cpu)", "its verdict", "your smoke run, no verdict"]
    return markdown_table(head, rows) + _deviations(record)


def margins_text(test: Test) -> str:
    """A test's margins in words."""
    roles = {"control": "; a control, which must fail", "gate": "; a gate, which must hold"}
    role = roles.get(test.role, "")
    if test.better == "equal":
        return f"reproduced within ±{test.margin:g}{role}"
    sign, other = ("≥", "<") if test.better == "higher" else ("≤", ">")
    parts = [f"reproduced {sign} {test.reproduced:g}"]
    if test.negligible is not None:
        parts.append(f"negligible {other} {test.negligible:g}")
    if test.not_reproduced is not None:
        parts.append(f"not reproduced {other} {test.not_reproduced:g}")
    return ", ".join(parts) + role


def interval_text(effect: float, low: float | None = None, high: float | None = None) -> str:
    """An effect with its interval in few digits; without one where there is none."""
    if low is None or high is None or not math.isfinite(low) or low == high:
        return f"{effect:.3g}"
    return f"{effect:.3g} [{low:.3g}, {high:.3g}]"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; bars in cells, such as those of a norm, are no column borders."""
    lines = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *lines])


def _how_tested(claim: Claim) -> str:
    if claim.out_of_reach:
        return f"out of reach: {claim.out_of_reach}"
    return "<br>".join(f"{t.measures}: {margins_text(t)}" for t in claim.tests)


def _test_line(outcome: TestOutcome) -> str:
    test, measured = outcome.test, outcome.estimate
    numbers = interval_text(measured.effect, measured.low, measured.high)
    size = "" if test.unit == "exact" else f" ({measured.n} {plural(test.unit)})"
    odds = "" if math.isnan(outcome.beyond) or test.unit == "exact" else _odds(outcome)
    return f"{test.measures}: **{numbers}**{size}; {margins_text(test)} → {outcome.verdict}{odds}"


def _odds(outcome: TestOutcome) -> str:
    where = "within its margin" if outcome.test.better == "equal" else "beyond its margin"
    return f"; {where} with probability {outcome.beyond:.2g}"


def _ours(outcome: ClaimOutcome) -> str:
    return "; ".join(
        f"{o.id.replace('_', ' ')} "
        f"{interval_text(o.estimate.effect, o.estimate.low, o.estimate.high)}"
        for o in outcome.tests
    )


def _verdict(outcome: ClaimOutcome) -> str:
    return f"**{outcome.verdict}**" + (f" ({outcome.reason})" if outcome.reason else "")


def _stored_numbers(claim: Mapping) -> str:
    return "; ".join(
        f"{name.replace('_', ' ')} {interval_text(t['effect'], t.get('low'), t.get('high'))}"
        for name, t in claim.get("tests", {}).items()
    )


def _deviations(record: Record) -> str:
    lines = "\n".join(f"- {line}" for line in record.deviations)
    return f"\n\nWhat differs from the paper:\n\n{lines}" if lines else ""
