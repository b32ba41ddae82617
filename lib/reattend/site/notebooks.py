"""A paper's notebook as a page: the executed copy where there is one, else the committed one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from reattend.findings import PROFILES
from reattend.records import Record

TEMPLATES = Path(__file__).with_name("templates")

# Sources shown as output bring a style sheet of their own each time; the page has one.
_STYLES = re.compile(r"<style[^>]*>.*?</style>", re.DOTALL)
_PICTURES = re.compile(r"<img(?![^>]*\balt=)", re.IGNORECASE)
_TABLES = re.compile(r"(<table.*?</table>)", re.DOTALL)
_COMMITTED = re.compile(r'src="(?:\.\./)+figures/')


@dataclass(frozen=True)
class Article:
    """A notebook's body as HTML, and whether it was executed as a whole."""

    html: str
    executed: bool
    title: str


def notebook_of(root: Path, record: Record) -> tuple[Path, bool]:
    """The copy that the last run of the largest profile executed, and True; else the committed one."""
    executed = root / "build" / "executed" / record.family
    for profile in PROFILES:
        path = executed / f"{record.slug}.{profile}.ipynb"
        if path.exists():
            return path, True
    return root / "notebooks" / record.family / f"{record.slug}.ipynb", False


class Converter:
    """Turns notebooks into articles; making one once is cheaper than once a notebook."""

    def __init__(self) -> None:
        self._exporter = HTMLExporter(
            template_name="notebook", extra_template_basedirs=[str(TEMPLATES)]
        )
        self._exporter.exclude_input_prompt = True
        self._exporter.exclude_output_prompt = True
        self._exporter.exclude_anchor_links = True

    def convert(self, path: Path, executed: bool, figures: str) -> Article:
        """One notebook.

        Args:
            executed: whether it is a copy that a run executed.
            figures: where the page finds the repository's folder `figures`, as a relative link.
        """
        notebook = nbformat.read(path, as_version=4)
        title = next(
            (c.source.splitlines()[0].lstrip("# ") for c in notebook.cells if c.source.strip()),
            path.stem,
        )
        html, _ = self._exporter.from_notebook_node(notebook)
        html = _STYLES.sub("", html)
        html = _COMMITTED.sub(f'src="{figures}/', html)
        html = _PICTURES.sub(f'<img alt="figure of {escape(title, quote=True)}"', html)
        html = _TABLES.sub(r'<div class="scroll" tabindex="0">\1</div>', html)
        return Article(html, executed, title)
