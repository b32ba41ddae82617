"""The scoreboard: every claim of every paper, what was reported, what was found, the verdict.

It shows the results of one profile and, where there are any, the verdicts of the other beside them.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from reattend.evidence.verdicts import VERDICTS
from reattend.pipeline.graph import read_records
from reattend.pipeline.judge import committed_verdicts, judge_papers, verdicts_path
from reattend.pipeline.manifests import write_text
from reattend.presentation import interval_text
from reattend.project import read_json, results_directory
from reattend.records import Claim, Record

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
    elsewhere: str  # verdict and n at the other profile


def other(profile: str) -> str:
    """The profile whose verdicts stand beside those of `profile`; smoke has none."""
    return "cpu" if profile == "gpu" else "gpu"


def scoreboard(root: Path, profile: str) -> list[Row]:
    """All claims of all papers with their results at `profile`."""
    return [
        row for record in read_records(root)[0].values() for row in _rows(root, record, profile)
    ]


def write_report(root: Path, profile: str) -> list[Row]:
    """Judge, then write figures/README.md, figures/scoreboard.csv and the table in README.md."""
    judge_papers(root, [])
    rows = scoreboard(root, profile)
    write_text(root / "figures" / "scoreboard.csv", _csv(rows))
    write_text(root / "figures" / "README.md", _figures_page(root, rows, profile))
    readme = root / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf8")
        renewed = readme_with_scoreboard(text, rows, profile)
        if renewed != text:
            write_text(readme, renewed)
    return rows


def readme_with_scoreboard(text: str, rows: list[Row], profile: str) -> str:
    """README's text with the scoreboard between its two markers renewed."""
    head, begin, rest = text.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        return text
    return (
        f"{head}{_BEGIN}\n\n{_summaries(rows, profile)}\n\n{_table(rows, profile)}\n\n{_END}{tail}"
    )


def summary(rows: list[Row]) -> str:
    """How many claims have which verdict, in one line."""
    return _count({(row.paper, row.claim): row.verdict for row in rows})


def _summaries(rows: list[Row], profile: str) -> str:
    """The same, and for what has also run at the other profile."""
    elsewhere = {(r.paper, r.claim): r.elsewhere.partition(" (n")[0] for r in rows if r.elsewhere}
    line = f"\n\nAt profile `{other(profile)}`, {_count(elsewhere)}" if elsewhere else ""
    return summary(rows) + line


def _count(verdicts: dict[tuple[str, str], str]) -> str:
    counts = Counter(verdicts.values())
    papers = len({paper for paper, _ in verdicts})
    parts = [f"{counts[v]} {v}" for v in (*VERDICTS, SMOKE, NOT_RUN) if counts[v]]
    return f"{len(verdicts)} claims of {papers} papers: {', '.join(parts)}."


def _rows(root: Path, record: Record, profile: str) -> list[Row]:
    here, there = (Found.read(root, record, name) for name in (profile, other(profile)))
    return [_row(record, claim, here, there) for claim in record.claims]


@dataclass(frozen=True)
class Found:
    """What a paper's run at one profile left; empty where it has not run."""

    results: dict
    facts: dict
    claims: dict  # verdicts by claim

    @classmethod
    def read(cls, root: Path, record: Record, profile: str) -> Found:
        directory = results_directory(root, record.family, record.slug, profile)
        verdicts = committed_verdicts(verdicts_path(root, record)).get(profile, {})
        return cls(_read(directory / "results.json"), _read(directory / "run.json"), verdicts)

    def tests(self, claim: Claim) -> dict[str, dict]:
        """Numbers of a claim's tests."""
        return self._stored(claim).get("tests", {})

    def n(self, claim: Claim) -> str:
        """The distinct numbers of items behind a claim."""
        return ", ".join(dict.fromkeys(str(t["n"]) for t in self.tests(claim).values()))

    def verdict(self, claim: Claim) -> str:
        """A claim's verdict, or why there is none."""
        if not self.results:
            return NOT_RUN
        return self._stored(claim).get("verdict", SMOKE)

    @property
    def seconds(self) -> str:
        """How long the run took."""
        return f"{self.facts['seconds']:.0f}" if "seconds" in self.facts else ""

    def _stored(self, claim: Claim) -> dict:
        return self.claims.get(claim.id, {})


def _row(record: Record, claim: Claim, here: Found, there: Found) -> Row:
    elsewhere = there.verdict(claim) if there.results and not claim.out_of_reach else ""
    return Row(
        family=record.family,
        paper=record.slug,
        claim=claim.id,
        says=claim.says,
        reported=claim.reported,
        ours=_ours(here, claim),
        n=here.n(claim),
        verdict=here.verdict(claim),
        seconds=here.seconds,
        elsewhere=f"{elsewhere} (n {there.n(claim)})" if elsewhere else "",
    )


def _ours(found: Found, claim: Claim) -> str:
    return "; ".join(_numbers(name, test) for name, test in found.tests(claim).items())


def _numbers(name: str, test: dict) -> str:
    numbers = interval_text(test["effect"], test.get("low"), test.get("high"))
    return f"{name.replace('_', ' ')} {numbers}"


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _csv(rows: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row.__dataclass_fields__)
    writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)
    return out.getvalue()


def _table(rows: list[Row], profile: str) -> str:
    head = [
        f"| paper | claim | reported | ours (95 % interval) | n | verdict | s | at {other(profile)} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines = []
    for row in rows:
        says, reported, ours = (_cell(text) for text in (row.says, row.reported, row.ours))
        paper = f"[{row.paper}](notebooks/{row.family}/{row.paper}.ipynb)"
        cells = [paper, says, reported, ours, row.n, _signed(row.verdict), row.seconds]
        cells.append(_signed(row.elsewhere))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*head, *lines])


def _signed(verdict: str) -> str:
    """A verdict, with or without its n, behind its sign."""
    return f"{_SIGNS.get(verdict.partition(' (n')[0], '')} {verdict}".strip()


def _cell(text: str) -> str:
    """Text that may stand in a Markdown table: a norm's bars are no column borders."""
    return text.replace("|", r"\|")


def _figures_page(root: Path, rows: list[Row], profile: str) -> str:
    """figures/README.md: the scoreboard, then every paper's figures with their captions."""
    table = _table(rows, profile).replace("](notebooks/", "](../notebooks/")
    parts = [
        "# Results",
        f"Generated by `reattend report` from the results at profile `{profile}`.",
        _summaries(rows, profile),
        table,
    ]
    for record in read_records(root)[0].values():
        shown, folded = _exhibits(root, record, profile), _exhibits(root, record, other(profile))
        if shown or folded:
            parts += [f"## {record.title}", record.citation, *shown]
        if folded:
            found = Found.read(root, record, other(profile))
            where = f"at profile {other(profile)} ({found.facts['device']}, {found.seconds} s)"
            parts += [f"<details><summary>The same {where}</summary>", _claims(record, found)]
            parts += [*folded, "</details>"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _exhibits(root: Path, record: Record, profile: str) -> list[str]:
    """Links to a paper's tables, then its figures with their captions; empty if it has not run."""
    directory = results_directory(root, record.family, record.slug, profile)
    place = f"{record.family}/{record.slug}/{profile}"
    captions = _read(directory / "results.json").get("captions", [])
    tables = [
        f"- [{caption}]({place}/{name}.csv)"
        for name, caption in captions
        if (directory / f"{name}.csv").exists()
    ]
    pictures = [
        f"![{caption}]({place}/{name}.png)\n\n*{caption}*"
        for name, caption in captions
        if (directory / f"{name}.png").exists()
    ]
    return ["\n".join(tables), *pictures] if captions else []


def _claims(record: Record, found: Found) -> str:
    """A paper's claims with the numbers of one run."""
    lines = ["| claim | ours (95 % interval) | n | verdict |", "| --- | --- | --- | --- |"]
    for claim in record.claims:
        if not claim.out_of_reach:
            cells = [_cell(claim.says), _cell(_ours(found, claim)), found.n(claim)]
            lines.append(f"| {' | '.join([*cells, _signed(found.verdict(claim))])} |")
    return "\n".join(lines)
