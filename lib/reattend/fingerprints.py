"""Fingerprints: what a result depends on, hashed so that only changes of meaning count.

A paper depends on its notebook's code cells and, from the names they use, on definitions of the
library, followed from name to name through imports, not on whole modules. What is done when a module
is imported counts too. Where a module is handed on as a value, all of it counts. Names are followed
statically, so notebooks and methods import by name and never by string (tests/test_fingerprints.py).
A definition that uses `__file__` depends on every file beside it that its texts name.

The normal form in which code is hashed is `syntax.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from reattend.syntax import Analyses, Import, Module, Unit

LIBRARY = Path(__file__).parent
ANALYSES = Analyses()  # of this process

NO_RESULT = {
    "reattend.plots": "drawing: a figure shows numbers that are kept elsewhere",
    "reattend.presentation": "what a notebook shows while it runs",
    "reattend.studies.probing_figures": "drawing",
    "reattend.studies.pair_figures": "drawing",
    "reattend.records": "reads the record; its fields that bear on results are in the fingerprint",
    "reattend.evidence.intervals": "judging, which is done anew from what a run keeps",
    "reattend.evidence.statistics": "judging",
    "reattend.evidence.verdicts": "judging",
    "reattend.assets.store": "files are pinned by sha256, which is in the fingerprint",
    "reattend.backbones.store": "what a backbone is made from is in the fingerprint",
    "reattend.attention.registry": "finds methods by name, which no notebook may do",
    "reattend.project": "where files lie",
    "reattend.locks": "who may write",
    "reattend.replication:_commit": "a fact about a run",
    "reattend.replication:_cpu_seconds": "a fact about a run",
    "reattend.replication:_device_name": "a fact about a run",
}
"""Modules, and definitions of others, that do not count, each with the reason."""

VERSIONS = ("torch", "numpy", "transformers")


def definitions(sources: Iterable[str], library: Path = LIBRARY) -> dict:
    """What `sources` (notebook cells) use of the library.

    Returns:
        {"definitions": {module: {name: hash}}, "files": {path: hash}}; an import that was followed
        stands there as the name it binds and what it binds it to.
    """
    found = _Followed(library)
    cells = [_cell(source) for source in sources]
    imports = [each for unit in cells for each in unit.imports]
    for unit in cells:
        found.follow(unit, Module(imports=imports), "")
    return found.result()


def module_fingerprint(name: str, library: Path = LIBRARY) -> dict:
    """What a backbone's module `name` uses of the library when it builds, as `definitions`."""
    found = _Followed(library)
    found.member(name, ["build"])
    return found.result()


def code_fingerprint(notebook: Path, record: dict, library: Path = LIBRARY) -> dict:
    """What a paper's results depend on, but for its assets, backbones and parameters.

    These are its code cells, the definitions they use, and what the record says that a run reads.
    Outputs and metadata of the notebook, Markdown cells and the record's prose and margins do not count.
    """
    sources = notebook_sources(notebook)
    return {
        "cells": digest([_cell(source).hash for source in sources]),
        "record": digest(result_bearing(record)),
        **definitions(sources, library),
    }


def result_bearing(record: dict) -> dict:
    """The part of a record (as loaded from its file) that a run's numbers depend on."""
    claims = {
        claim["id"]: {
            test["id"]: [test.get("unit"), test.get("statistic", "mean")]
            for test in claim.get("tests", [])
        }
        for claim in record["claims"]
    }
    needs = {kind: sorted(names or []) for kind, names in record.get("needs", {}).items()}
    return {"needs": needs, "reported": record.get("reported", {}), "claims": claims}


def pinned_versions(root: Path) -> dict[str, str]:
    """Major and minor version of the packages that do the arithmetic, on the reference platform.

    Those of constraints.txt, not those installed: a reader with another version has the same code, and
    run.json says what a run really used.
    """
    text = (root / "constraints.txt").read_text(encoding="utf8")
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\d+\.\d+)", text))
    return {name: pins[name] for name in VERSIONS}


def notebook_sources(notebook: Path) -> list[str]:
    """Sources of a notebook's code cells, in order."""
    cells = json.loads(notebook.read_text(encoding="utf8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def digest(value: object) -> str:
    """Hash of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Followed:
    """Definitions reached by following names from one to the next."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.found: dict[str, dict[str, str]] = {}
        self.files: dict[str, str] = {}
        self._files: dict[str, Path | None] = {}
        self._modules: dict[str, Module] = {}
        self._imported: set[str] = set()
        self._wholes: set[str] = set()
        self._seen: set[tuple[str, int]] = set()

    def result(self) -> dict:
        """In an order that depends on nothing but content."""
        found = {name: dict(sorted(self.found[name].items())) for name in sorted(self.found)}
        return {"definitions": found, "files": dict(sorted(self.files.items()))}

    def follow(self, unit: Unit, inside: Module, name: str) -> None:
        """Everything that one unit of module `name` uses."""
        for each in unit.imports:
            self.imported(each)
        for reference in unit.references:
            chain = reference.split(".")
            own = [each for each in unit.imports if each[0] == chain[0]]
            if own:
                self._through(own, chain[1:])
            else:
                self.resolve(inside, name, chain)
        if not unit.strings:
            return
        directory = self.library.joinpath(*name.split(".")[1:]).parent
        for text in unit.strings:
            path = directory / text
            if text and path.suffix != ".py" and path.is_file():
                where = path.relative_to(self.library).as_posix()
                self.files[where] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def resolve(self, inside: Module, name: str, chain: list[str]) -> None:
        """A name used in module `name`: a definition there, or something imported."""
        for unit in inside.definitions + inside.statements:
            if chain[0] in unit.names:
                self._visit(unit, inside, name)
        bound = [each for each in inside.imports if each[0] == chain[0]]
        for _, target, attribute in bound:
            if name and not self._ignored(target, attribute):
                where = f"{target}:{attribute}".rstrip(":")
                self.found.setdefault(name, {})[f"import {chain[0]}"] = where
        self._through(bound, chain[1:])

    def member(self, name: str, chain: list[str]) -> None:
        """`chain` looked up in module `name`; all of the module where that is not clear."""
        path = self._file(name)
        if path is None or name in NO_RESULT:
            return
        self._run(name)
        inside = self._module(name, path)
        known = {each for unit in inside.definitions + inside.statements for each in unit.names}
        known |= {bound for bound, _, _ in inside.imports}
        if chain and chain[0] in known:
            self.resolve(inside, name, chain)
        elif chain and self._file(f"{name}.{chain[0]}"):
            self.member(f"{name}.{chain[0]}", chain[1:])
        elif name not in self._wholes:
            self._wholes.add(name)
            for unit in inside.definitions:
                self._visit(unit, inside, name)
            for bound in {bound for bound, _, _ in inside.imports}:
                self.resolve(inside, name, [bound])

    def imported(self, each: Import) -> None:
        """What an import does: it runs the module, and the packages on the way."""
        bound, name, attribute = each
        self._run(name)
        if bound == "*":
            self.member(name, [])
        elif attribute:
            self._run(f"{name}.{attribute}")

    def _through(self, imports: list[Import], chain: list[str]) -> None:
        for _, target, attribute in imports:
            self.member(target, [attribute, *chain] if attribute else chain)

    def _run(self, name: str) -> None:
        path = self._file(name)
        if path is None or name in NO_RESULT or name in self._imported:
            return
        self._imported.add(name)
        if "." in name:
            self._run(name.rpartition(".")[0])
        inside = self._module(name, path)
        for unit in inside.statements:
            self._visit(unit, inside, name)
        for each in inside.imports:
            self.imported(each)

    def _visit(self, unit: Unit, inside: Module, name: str) -> None:
        if (name, id(unit)) in self._seen or any(
            f"{name}:{each}" in NO_RESULT for each in unit.names
        ):
            return
        self._seen.add((name, id(unit)))
        key = ", ".join(unit.names) or "statement"
        hashes = self.found.setdefault(name, {})
        # Several of one name: all count, in the order of their hashes.
        hashes[key] = "+".join(sorted([*hashes.get(key, "").split("+"), unit.hash])).strip("+")
        self.follow(unit, inside, name)

    def _ignored(self, target: str, attribute: str) -> bool:
        return target in NO_RESULT or f"{target}.{attribute}" in NO_RESULT

    def _file(self, name: str) -> Path | None:
        """The file of a library's module; None for anything else."""
        if name not in self._files:
            self._files[name] = _module_file(name, self.library)
        return self._files[name]

    def _module(self, name: str, path: Path) -> Module:
        if name not in self._modules:
            self._modules[name] = ANALYSES.of("module", path.read_text(encoding="utf8"))
        return self._modules[name]


def _module_file(name: str, library: Path) -> Path | None:
    package, *rest = name.split(".")
    if package != "reattend":
        return None
    base = library.joinpath(*rest)
    for path in (base.with_suffix(".py") if rest else base, base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _cell(source: str) -> Unit:
    return ANALYSES.of("cell", source).statements[0]
