"""Build the site: an index, a page a paper, its notebook, the methods that attach to a model, shared models.

Everything a page needs lies inside the site; no page asks another host for anything.
"""

from __future__ import annotations

import inspect
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from reattend.assets.store import fetch
from reattend.attention.registry import methods
from reattend.backbones.reports.page import read_reports
from reattend.evidence.verdicts import plural
from reattend.findings import (
    NOT_RUN,
    PROFILES,
    STATES,
    Paper,
    Run,
    count_line,
    read_papers,
)
from reattend.pipeline.provenance import BEFORE
from reattend.presentation import margins_text
from reattend.records import Claim, Record, Test
from reattend.site.history import State, histories
from reattend.site.intervals import Measured, effects_of, found_text, interval_svg
from reattend.site.marks import MEANINGS, SIZE, class_of, shape
from reattend.site.tables import reported_tables, tables

TEMPLATES = Path(__file__).with_name("templates")
KATEX = ("katex.min.css", "katex.min.js", "contrib/auto-render.min.js", "fonts")


def build_site(
    root: Path, records: Mapping[str, Record], target: Path, notebooks: bool = True
) -> None:
    """Write the site of a checkout into `target`, which is replaced as a whole.

    Raises:
        AssetError: KaTeX is neither in the cache nor to be had.
    """
    fresh = target.with_name(f".{target.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    papers, models = read_papers(root, records), read_reports(root)
    _assets(fresh / "assets")
    runs = [run for shown in (*papers, *models) for run in shown.runs.values()]
    _results(root, runs, fresh / "figures")
    pages = _Pages(fresh, papers)
    pages.write("index.html", "index.html", count=count_line(papers))
    pages.write("methods.html", "methods.html", methods=methods())
    pages.write("models.html", "models.html", models=models)
    changes = histories(root)
    for paper in papers:
        slug = paper.record.slug
        view = {"paper": paper, "r": paper.record, "tests": _pictures(paper)}
        pages.write(
            f"papers/{slug}.html",
            "paper.html",
            **view,
            changes=_changes(paper, changes.get(slug, [])),
            has_notebook=notebooks,
        )
    if notebooks:
        _notebooks(root, papers, pages)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


class _Pages:
    """Renders templates into files, each with the way back to the site's root."""

    def __init__(self, target: Path, papers: list[Paper]) -> None:
        self._target = target
        self._jinja = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._jinja.filters |= {"prose": _prose, "found": found_text, "size": _png_size}
        self._jinja.filters |= {"rounded": _rounded, "default_text": _default_text}
        self._jinja.tests["number_like"] = _is_number
        self._jinja.globals |= {
            "papers": papers,
            "STATES": STATES,
            "PROFILES": PROFILES,
            "NOT_RUN": NOT_RUN,
            "MEANINGS": MEANINGS,
            "mark": _mark,
            "class_of": class_of,
            "margins": margins_text,
            "size_of": lambda n, unit: f"{n} {plural(unit)}",
            "ran": _ran,
            "tables_of": tables,
            "reported_tables": reported_tables,
        }

    def write(self, path: str, template: str, **context: object) -> None:
        """One page."""
        file = self._target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * path.count("/")
        text = self._jinja.get_template(template).render(up=up, here=path, **context)
        file.write_text(text, encoding="utf8")


def _assets(target: Path) -> None:
    """Style sheet, script, and KaTeX with its fonts."""
    target.mkdir(parents=True)
    for name in ("style.css", "site.js"):
        shutil.copy(TEMPLATES / name, target / name)
    katex = fetch("katex") / "package" / "dist"
    for name in KATEX:
        source, copy = katex / name, target / "katex" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)


def _results(root: Path, runs: Iterable[Run], target: Path) -> None:
    """The pictures and tables of all runs, under the paths that they have in the repository."""
    for run in runs:
        copy = target / run.directory.relative_to(root / "figures")
        shutil.copytree(run.directory, copy, ignore=shutil.ignore_patterns("*.json"))


def _notebooks(root: Path, papers: list[Paper], pages: _Pages) -> None:
    # nbconvert takes a second to import, which a site without notebooks need not wait for.
    from reattend.site.notebooks import Converter, notebook_of

    converter = Converter()
    for paper in papers:
        r = paper.record
        article = converter.convert(*notebook_of(root, r), "../figures")
        pages.write(f"notebooks/{r.slug}.html", "notebook.html", r=r, article=article)


def _pictures(paper: Paper) -> dict[tuple[str, str], Markup]:
    """(claim, test) -> the picture of its intervals at all profiles."""
    return {
        (claim.id, test.id): Markup(interval_svg(test, _measured(paper, claim, test)))
        for claim in paper.record.claims
        for test in claim.tests
    }


def _measured(paper: Paper, claim: Claim, test: Test) -> list[Measured]:
    found = []
    for profile, run in paper.runs.items():
        tests = run.claims.get(claim.id, {}).get("tests", {})
        if test.id in tests:
            points = run.evidence.get((claim.id, test.id))
            found.append(Measured(profile, tests[test.id], effects_of(points, test.statistic)))
    return found


def _changes(paper: Paper, states: list[State]) -> list[dict]:
    """A claim's verdict after each commit that changed one; claims that are gone are left out."""
    return [
        {"state": state, "verdicts": [state.verdicts.get(c.id, "") for c in paper.record.claims]}
        for state in states
    ]


def _mark(verdict: str, label: bool = False) -> Markup:
    """A verdict's mark as inline SVG; hidden from screen readers where a word stands beside it."""
    said = f'role="img" aria-label="{verdict}"' if label else 'aria-hidden="true"'
    return Markup(
        f'<svg class="mark {class_of(verdict)}" viewBox="0 0 {SIZE} {SIZE}" {said}>'
        f"{shape(verdict)}</svg>"
    )


def _prose(text: str) -> Markup:
    """A record's text as HTML: what stands in backticks is code."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part)
        for number, part in enumerate(parts)
    )


def _ran(run: Run) -> str:
    """Where and how long a run ran, and whether it can be told by which code."""
    facts = run.facts
    older = "" if "fingerprint" in facts else f"; {BEFORE}"
    return f"Profile {run.profile}: {facts['seconds']:.0f} s on {facts['device']}{older}."


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _rounded(cell: str) -> str:
    """A table's cell; numbers with four significant digits."""
    return f"{float(cell):.4g}" if _is_number(cell) and "." in cell else cell


def _default_text(default: object) -> str:
    """A setting's default as a call would write it; what has none must be given."""
    return " (required)" if default is inspect.Parameter.empty else f"={default!r}"


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, so that the page does not jump when it loads."""
    with path.open("rb") as stream:
        return struct.unpack(">II", stream.read(24)[16:])
