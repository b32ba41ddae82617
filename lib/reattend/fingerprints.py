"""Fingerprints: what a result depends on, hashed so that only changes of meaning count.

A Python source is reduced to its syntax tree without docstrings, so comments, docstrings and layout
do not count. A fingerprint covers the modules that are imported, transitively, within `reattend`;
imports are followed statically, therefore notebooks and methods import by name and never by string.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from reattend.project import load_yaml

LIBRARY = Path(__file__).parent


def source_hash(source: str) -> str:
    """Hash of a Python source's syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, _WITH_DOCSTRING) and body and _is_docstring(body[0]):
            node.body = body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def imported_modules(sources: Iterable[str], library: Path = LIBRARY) -> dict[str, Path]:
    """Every module of the library that `sources` import, directly or not: name -> file.

    Imports inside functions count; the packages on the way count as well, because importing a
    module runs them.
    """
    found: dict[str, Path] = {}
    waiting = [name for source in sources for name in _imports(source)]
    while waiting:
        name = waiting.pop()
        path = _module_file(name, library)
        if path is None or name in found:
            continue
        found[name] = path
        waiting += _imports(path.read_text(encoding="utf8"))
        if "." in name:
            waiting.append(name.rpartition(".")[0])
    return dict(sorted(found.items()))


@lru_cache(maxsize=1024)
def _imports(source: str) -> tuple[str, ...]:
    """Names that `source` may import from the library; a name may be a module or a thing in one."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(name for name in names if name.split(".")[0] == "reattend")


def _module_file(name: str, library: Path) -> Path | None:
    base = library.joinpath(*name.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def notebook_sources(notebook: Path) -> list[str]:
    """Sources of a notebook's code cells, in order."""
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def module_fingerprint(module: str, library: Path = LIBRARY) -> dict[str, str]:
    """Hash of one library module and of everything it imports from the library."""
    path = _module_file(module, library)
    modules = imported_modules([path.read_text(encoding="utf8")], library) | {module: path}
    return {name: _file_hash(file) for name, file in sorted(modules.items())}


def paper_fingerprint(notebook: Path, library: Path = LIBRARY) -> dict:
    """What a paper's results depend on: its code cells, its record, the modules it imports.

    Outputs and metadata of the notebook, Markdown cells, comments and docstrings do not count.
    """
    sources = notebook_sources(notebook)
    record = load_yaml(notebook.with_suffix(".yaml").read_text(encoding="utf8"))
    modules = imported_modules(sources, library)
    return {
        "cells": digest([source_hash(source) for source in sources]),
        "record": digest(record),
        "modules": {name: _file_hash(path) for name, path in modules.items()},
    }


def digest(value: object) -> str:
    """Hash of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_hash(path: Path) -> str:
    return _cached_hash(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _cached_hash(path: Path, mtime: int) -> str:
    return source_hash(path.read_text(encoding="utf8"))
