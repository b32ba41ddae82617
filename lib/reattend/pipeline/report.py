"""The scoreboard: every claim of every paper, what was reported, what was found, the verdict."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from reattend.pipeline.graph import load_records
from reattend.pipeline.manifests import write_text
from reattend.project import results_directory
from reattend.records import Claim, Record
from reattend.verdicts import VERDICTS, interval_text

NOT_RUN = "not run"
SMOKE = "no verdict (smoke)"
_BEGIN, _END = "<!-- scoreboard -->", "<!-- /scoreboard -->"
_SIGNS = {
    "reproduced": "✅",
    "partially": "🟡",
    "not reproduced": "❌",
    "inconclusive": "❔",
    "out of reach": "➖",
}


@dataclass(frozen=True)
class Row:
    """One line of the scoreboard: a claim and what came of it."""

    family: str
    paper: str
    claim: str
    says: str
    reported: str
    ours: str
    n: str
    verdict: str
    seconds: str


def scoreboard(root: Path, profile: str) -> list[Row]:
    """All claims of all papers with their results at `profile`."""
    return [row for record in load_records(root).values() for row in _rows(root, record, profile)]


def write_report(root: Path, profile: str) -> list[Row]:
    """Write figures/README.md, figures/scoreboard.csv and the table in README.md."""
    rows = scoreboard(root, profile)
    write_text(root / "figures" / "scoreboard.csv", _csv(rows))
    write_text(root / "figures" / "README.md", _figures_page(root, rows, profile))
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf8")
        renewed = readme_with_scoreboard(text, rows)
        if renewed != text:
            write_text(readme, renewed)
    return rows


def readme_with_scoreboard(text: str, rows: list[Row]) -> str:
    """README's text with the scoreboard between its two markers renewed."""
    head, begin, rest = text.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        return text
    return f"{head}{_BEGIN}\n\n{summary(rows)}\n\n{_table(rows)}\n\n{_END}{tail}"


def summary(rows: list[Row]) -> str:
    """How many claims have which verdict, in one line."""
    counts = Counter(row.verdict for row in rows)
    papers = len({row.paper for row in rows})
    parts = [f"{counts[v]} {v}" for v in (*VERDICTS, SMOKE, NOT_RUN) if counts[v]]
    return f"{len(rows)} claims of {papers} papers: {', '.join(parts)}."


def _rows(root: Path, record: Record, profile: str) -> list[Row]:
    directory = results_directory(root, record.family, record.slug, profile)
    results, facts = _read(directory / "results.json"), _read(directory / "run.json")
    stored = results.get("claims", {})
    seconds = f"{facts['seconds']:.0f}" if "seconds" in facts else ""
    timing = facts.get("timing_tests", {})
    return [
        _row(record, claim, stored.get(claim.id, {}), timing, seconds) for claim in record.claims
    ]


def _row(record: Record, claim: Claim, stored: dict, timing: dict, seconds: str) -> Row:
    tests = {
        name: numbers | timing.get(f"{claim.id}.{name}", {})
        for name, numbers in stored.get("tests", {}).items()
    }
    measured = [t for t in tests.values() if "effect" in t]
    return Row(
        family=record.family,
        paper=record.slug,
        claim=claim.id,
        says=claim.says,
        reported=claim.reported,
        ours="; ".join(_numbers(name, numbers) for name, numbers in tests.items()),
        n=", ".join(dict.fromkeys(str(t["n"]) for t in measured)),
        verdict=stored.get("verdict", NOT_RUN) or SMOKE,
        seconds=seconds,
    )


def _numbers(name: str, test: dict) -> str:
    if "effect" not in test:
        return name
    low, high = test.get("low", float("nan")), test.get("high", float("nan"))
    return f"{name.replace('_', ' ')} {interval_text(test['effect'], low, high)}"


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _csv(rows: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)
    return out.getvalue()


def _table(rows: list[Row]) -> str:
    head = [
        "| paper | claim | reported | ours (95 % interval) | n | verdict | s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines = []
    for row in rows:
        says, reported, ours = (_cell(text) for text in (row.says, row.reported, row.ours))
        paper = f"[{row.paper}](notebooks/{row.family}/{row.paper}.ipynb)"
        verdict = f"{_SIGNS.get(row.verdict, '')} {row.verdict}".strip()
        cells = [paper, says, reported, ours, row.n, verdict, row.seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*head, *lines])


def _cell(text: str) -> str:
    """Text that may stand in a Markdown table: a norm's bars are no column borders."""
    return text.replace("|", r"\|")


def _figures_page(root: Path, rows: list[Row], profile: str) -> str:
    """figures/README.md: the scoreboard, then every paper's figures with their captions."""
    table = _table(rows).replace("](notebooks/", "](../notebooks/")
    parts = [
        "# Results",
        f"Generated by `reattend report` from the results at profile `{profile}`.",
        summary(rows),
        table,
    ]
    for slug, record in load_records(root).items():
        directory = results_directory(root, record.family, slug, profile)
        captions = _read(directory / "results.json").get("captions", [])
        pictures = [
            f"![{caption}]({record.family}/{slug}/{profile}/{name}.png)\n\n*{caption}*"
            for name, caption in captions
            if (directory / f"{name}.png").exists()
        ]
        tables = [
            f"- [{caption}]({record.family}/{slug}/{profile}/{name}.csv)"
            for name, caption in captions
            if (directory / f"{name}.csv").exists()
        ]
        if captions:
            parts += [f"## {record.title}", record.citation, "\n".join(tables), *pictures]
    return "\n\n".join(part for part in parts if part) + "\n"
