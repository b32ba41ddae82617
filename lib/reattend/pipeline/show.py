"""`reattend show`: a paper's claims, verdicts and evidence in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from reattend.evidence.verdicts import plural
from reattend.findings import Conclusion, Paper
from reattend.pipeline.errors import CommandError
from reattend.presentation import interval_text, margins_text
from reattend.records import Claim, Test, load_record, record_paths
from reattend.site.marks import CHARACTERS

_STYLES = {"reproduced": "green", "partially": "yellow", "not reproduced": "red"}


def show(root: Path, slug: str, console: Console | None = None) -> None:
    """Print one paper: its question and answer, then each claim with its tests.

    Raises:
        CommandError: there is no such paper.
    """
    paths = record_paths(root)
    if slug not in paths:
        raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(paths)}", exit_code=2)
    paper = Paper.read(root, load_record(paths[slug]))
    record = paper.record
    out = console or Console(highlight=False)
    out.print(Text(record.title, style="bold"))
    out.print(Text(f"{record.authors} ({record.year}), {record.venue}"), style="dim")
    out.print(Text(record.question))
    out.print(Text(paper.answer(), style="bold"))
    for claim in record.claims:
        out.print()
        _show_claim(out, paper, claim)
    times = ", ".join(f"{profile} {s:.0f} s" for profile, s in paper.seconds.items())
    out.print(f"\n{times or 'not run yet: reattend run ' + slug}", style="dim")


def _show_claim(out: Console, paper: Paper, claim: Claim) -> None:
    profiles = [profile for profile in paper.runs if paper.at(claim, profile).profile]
    found = [paper.at(claim, profile) for profile in profiles] or [paper.best(claim)]
    out.print(Text.assemble(*(part for one in found for part in _verdict(one)), claim.says))
    _indented(out, 2, Text(f"reported: {claim.reported} ({claim.where})", style="dim"))
    for one in found:
        if one.reason:
            _indented(out, 2, Text(f"{one.profile} {one.reason}".strip()))
    for test in claim.tests:
        _indented(out, 2, Text(f"- {test.measures}: {margins_text(test)}"))
        for one in found:
            if test.id in (one.tests or {}):
                _indented(out, 6, _measured(one, test))


def _verdict(found: Conclusion) -> list[tuple[str, str]]:
    where = f" ({found.profile})" if found.profile else ""
    style = f"bold {_STYLES.get(found.verdict, '')}"
    return [(f"{CHARACTERS[found.verdict]} {found.verdict}", style), (f"{where}  ", "dim")]


def _measured(found: Conclusion, test: Test) -> Text:
    one = found.tests[test.id]
    numbers = interval_text(one["effect"], one.get("low"), one.get("high"))
    size = "" if test.unit == "exact" else f" ({one['n']} {plural(test.unit)})"
    said = f"{CHARACTERS[one['verdict']]} {numbers}"
    return Text.assemble(
        f"{found.profile} ", (said, _STYLES.get(one["verdict"], "")), (size, "dim")
    )


def _indented(out: Console, by: int, text: Text) -> None:
    out.print(Padding(text, (0, 0, 0, by), expand=False))
