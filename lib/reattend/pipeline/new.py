"""`reattend new`: the five places of a paper, from templates that run as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

from reattend.pipeline.errors import CommandError
from reattend.records import FAMILIES, record_paths

TEMPLATES = Path(__file__).with_name("templates")
LEFT = "FILL IN"  # what templates say where an author has to write


def write_paper(root: Path, family: str, slug: str) -> list[Path]:
    """Write record, notebook, method, tests and parameters of a new paper; the files written.

    Raises:
        CommandError: a wrong name, or something of the paper is there already; nothing is written.
    """
    if family not in FAMILIES:
        raise CommandError(f"unknown family '{family}'; there are: {', '.join(FAMILIES)}", 2)
    if not re.fullmatch("[a-z][a-z0-9_]*", slug):
        raise CommandError(f"'{slug}': a paper's name is made of a-z, 0-9 and _, a letter first", 2)
    if slug in record_paths(root):
        raise CommandError(f"there is already a paper '{slug}'", 2)
    texts = {
        root / "notebooks" / family / f"{slug}.yaml": _template("record.yaml", family, slug),
        root / "notebooks" / family / f"{slug}.ipynb": _notebook(family, slug),
        root / "lib/reattend" / family / f"{slug}.py": _template("method.py.txt", family, slug),
        root / "tests" / family / f"test_{slug}.py": _template("test_method.py.txt", family, slug),
    }
    there = [path for path in texts if path.exists()]
    if there:
        raise CommandError(f"{there[0].relative_to(root)} is there already", 2)
    room = root / "lib/reattend" / family / "__init__.py"
    if not room.exists():
        texts[room] = f'"""{family.replace("_", " ").capitalize()}: one module a paper."""\n'
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
    params = root / "params.yaml"
    known = params.read_text(encoding="utf8").rstrip("\n") + "\n"
    params.write_text(known + _template("params.yaml", family, slug), encoding="utf8")
    return [*texts, params]


def _template(name: str, family: str, slug: str) -> str:
    text = (TEMPLATES / name).read_text(encoding="utf8")
    return text.replace("FAMILY", family).replace("SLUG", slug)


def _notebook(family: str, slug: str) -> str:
    """The notebook's JSON. In the template a line `%%% kind [tag] [folded]` begins each cell."""
    parts = re.split(r"^%%% (.*)\n", _template("notebook.txt", family, slug), flags=re.M)[1:]
    cells = []
    for number, (head, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        kind, *words = head.split()
        folded = {"jupyter": {"source_hidden": True}} if "folded" in words else {}
        tags = [word for word in words if word != "folded"]
        cell = {"cell_type": kind, "id": f"{slug}-{number}"[-64:]}
        cell["metadata"] = folded | ({"tags": tags} if tags else {})
        cell["source"] = text.rstrip("\n").splitlines(keepends=True)
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
