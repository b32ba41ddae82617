"""`reattend check`: what a paper still lacks, in the form of its files and in its results."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reattend.parameters import PROFILES, load_params
from reattend.pipeline.errors import CommandError
from reattend.pipeline.new import LEFT
from reattend.pipeline.notebooks import CHECKED, Notebook, source
from reattend.records import Record, RecordError, load_record, record_paths

FEWEST_CHECKED = 3
FEWEST_CLAIMS = 3
FEWEST_ORACLES = 5
FEWEST_FIGURES = 2
LINES, MOST_LINES = 350, 400  # of code in a notebook: what to aim for, what is allowed
CELL, MOST_CELL = 40, 45  # lines of one cell
MOST_SECONDS = 600  # of processor time at cpu
DRAWS = re.compile(r"imshow|matshow|heatmap|pcolormesh|subplots|draw_|show_map")
RULE_SINCE = "2026-11-28"  # since then a record is committed before its results


@dataclass(frozen=True)
class Lack:
    """Something that a paper lacks.

    Attributes:
        hard: the suite's tests refuse it; otherwise it is only to be aimed for.
    """

    what: str
    hard: bool = True


def lacks(root: Path, slug: str) -> list[Lack]:
    """What the paper `slug` lacks; empty for a finished one.

    Raises:
        CommandError: for an unknown paper.
    """
    known = record_paths(root)
    if slug not in known:
        raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(known)}", 2)
    path = known[slug]
    try:
        record = load_record(path)
        notebook = Notebook.read(path.with_suffix(".ipynb"))
    except (RecordError, CommandError) as error:
        return [Lack(str(error))]
    results = root / "figures" / record.family / slug / "cpu"
    return [
        *_of_files(root, record, path),
        *_of_notebook(notebook),
        *_of_record(record, path, notebook),
        *_of_results(results),
        *_of_history(root, path, results),
    ]


def _of_files(root: Path, record: Record, path: Path) -> Iterator[Lack]:
    method = root / "lib" / "reattend" / record.family / f"{record.slug}.py"
    oracles = root / "tests" / record.family / f"test_{record.slug}.py"
    for place in (path, path.with_suffix(".ipynb"), method, oracles):
        name = place.relative_to(root)
        if not place.exists():
            yield Lack(f"no {name}")
        elif LEFT in place.read_text(encoding="utf8"):
            yield Lack(f"{name} still says '{LEFT}'")
    if oracles.exists():
        count = len(re.findall(r"^\s*def test_", oracles.read_text(encoding="utf8"), re.M))
        if count < FEWEST_ORACLES:
            yield Lack(f"{count} oracles (at least {FEWEST_ORACLES} tests)")
    values = load_params(root)["papers"].get(record.slug) or {}
    missing = [profile for profile in PROFILES if profile not in values]
    if missing:
        yield Lack(f"params.yaml has no values for {', '.join(missing)}")


def _of_notebook(notebook: Notebook) -> Iterator[Lack]:
    for tag in ("parameters", "schema"):
        try:
            notebook.tagged(tag)
        except CommandError:
            yield Lack(f"the notebook needs one cell tagged '{tag}'")
    code = [source(cell) for cell in notebook.cells if cell["cell_type"] == "code"]
    if sum(text.startswith(CHECKED) for text in code) < FEWEST_CHECKED:
        yield Lack(f"fewer than {FEWEST_CHECKED} cells with {CHECKED}")
    lengths = [sum(bool(line.strip()) for line in text.splitlines()) for text in code]
    if sum(lengths) > LINES:
        yield Lack(
            f"{sum(lengths)} lines of code (aim {LINES}, at most {MOST_LINES})",
            hard=sum(lengths) > MOST_LINES,
        )
    if max(lengths, default=0) > CELL:
        yield Lack(
            f"a cell of {max(lengths)} lines (aim {CELL}, at most {MOST_CELL})",
            hard=max(lengths) > MOST_CELL,
        )
    prose, drawn = _method_part(notebook)
    if prose.count("$$") < 2:
        yield Lack("no display equation in the method part")
    if not drawn:
        yield Lack("no tensor drawn in the method part")


def _method_part(notebook: Notebook) -> tuple[str, bool]:
    """Prose of the sections before the experiment, and whether a picture is drawn in them."""
    prose, drawn = [], False
    for cell in notebook.cells:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            if re.search(r"^##? .*experiment", text, re.M | re.I):
                break
            prose.append(text)
        elif DRAWS.search(text):
            drawn = True
    return "\n".join(prose), drawn


def _of_record(record: Record, path: Path, notebook: Notebook) -> Iterator[Lack]:
    if len(record.claims) < FEWEST_CLAIMS:
        yield Lack(f"{len(record.claims)} claims (at least {FEWEST_CLAIMS})")
    if "interim" in path.read_text(encoding="utf8"):
        yield Lack("interim margins or placebos in the record")
    bare = [
        claim.id
        for claim in record.claims
        if any(test.unit not in ("exact", "round") for test in claim.tests)
        and not any(test.role != "test" for test in claim.tests)
        and (claim.placebo or "none: ").startswith("none: ")
    ]
    if bare:
        yield Lack(f"claims without a gate, control or placebo: {', '.join(bare)}")
    text = "\n".join(source(cell) for cell in notebook.cells if cell["cell_type"] == "code")
    if record.reported and "rep.reported" not in text:
        yield Lack("reported numbers stand beside none of ours (rep.reported is not used)", False)


def _of_results(results: Path) -> Iterator[Lack]:
    for name in ("results.json", "evidence.csv", "run.json"):
        if not (results / name).exists():
            yield Lack(f"no {name} at cpu")
    try:
        run = json.loads((results / "run.json").read_text(encoding="utf8"))
    except (OSError, json.JSONDecodeError):
        return
    seconds = run.get("cpu_seconds")
    if seconds is None:
        yield Lack("run.json has no cpu_seconds")
    elif seconds > MOST_SECONDS:
        yield Lack(f"{seconds:.0f} CPU seconds (at most {MOST_SECONDS})")
    if not run.get("fingerprint"):
        yield Lack("run.json has no fingerprint: nobody can say which code made the results")
    if len(list(results.glob("*.png"))) < FEWEST_FIGURES:
        yield Lack(f"fewer than {FEWEST_FIGURES} figures")
    if not set(results.glob("*.csv")) - {results / "evidence.csv"}:
        yield Lack("no table")


def _of_history(root: Path, record: Path, results: Path) -> Iterator[Lack]:
    """Whether history can show that margins came before results; a shallow clone shows nothing."""
    first, then = (_added(root, path) for path in (record, results / "results.json"))
    if first and first == then:
        yield Lack(
            "record and results came in one commit: margins cannot be shown to be older", False
        )


def _added(root: Path, path: Path) -> str | None:
    """The commit that added a file since the rule exists."""
    if (root / ".git" / "shallow").exists():
        return None
    command = ["git", "-C", str(root), "log", f"--since={RULE_SINCE}", "--diff-filter=A"]
    command += ["--format=%H", "-1", "--", str(path)]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def check(root: Path, papers: list[str]) -> int:
    """Print what each paper lacks; 1 when something hard is among it."""
    chosen = papers or list(record_paths(root))
    finished = 0
    for slug in chosen:
        found = lacks(root, slug)
        finished += not any(lack.hard for lack in found)
        for lack in found:
            print(f"{slug}: {lack.what}{'' if lack.hard else ' (aim)'}")
    print(f"{finished} of {len(chosen)} papers are finished")
    return int(finished < len(chosen))
