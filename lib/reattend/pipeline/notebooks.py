"""Notebooks as files: their parameter model, the cells that are checked, and tidying up."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from reattend.parameters import Parameters
from reattend.pipeline.errors import CommandError
from reattend.project import read_json

CHECKED = "# NBVAL_CHECK_OUTPUT"
KEPT = ("tags", "jupyter")  # of a cell's metadata


@dataclass(frozen=True)
class Notebook:
    """A notebook file and its content."""

    path: Path
    content: dict

    @classmethod
    def read(cls, path: Path) -> Notebook:
        """Read a notebook.

        Raises:
            CommandError: when it is missing, or its cells are not plain Python.
            FileError: when it is not JSON.
        """
        try:
            notebook = cls(path, read_json(path))
        except FileNotFoundError:
            raise CommandError(f"no notebook {path.name} beside its record", 2) from None
        if problem := _format_problem(notebook.content):
            raise CommandError(f"{notebook.name} is not a notebook: {problem}", 2)
        for number, cell in enumerate(notebook.cells, start=1):
            if cell["cell_type"] == "code":
                notebook._check_python(number, source(cell))
        return notebook

    def _check_python(self, number: int, text: str) -> None:
        # Fingerprints follow imports through the syntax tree, which magics are not part of.
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            line = (text.splitlines() or [""])[
                max(0, (getattr(error, "lineno", 0) or 1) - 1)
            ].strip()
            magic = line.startswith(("%", "!", "?")) or line.endswith("?")
            what = "an IPython magic; write it in Python" if magic else error
            raise CommandError(f"{self.name}, cell {number} ({line[:60]}): {what}", 2) from None

    @property
    def name(self) -> str:
        """Path relative to the root, for messages."""
        return self.path.relative_to(self.root).as_posix()

    @property
    def root(self) -> Path:
        """The checkout."""
        return self.path.parents[2]

    @property
    def cells(self) -> list[dict]:
        """All cells in order."""
        return self.content["cells"]

    def tagged(self, tag: str) -> str:
        """Source of the code cell with a tag.

        Raises:
            CommandError: when no or several cells have it.
        """
        found = [c for c in self.cells if tag in _tags(c)]
        if len(found) != 1:
            raise CommandError(f"{self.name}: needs one cell tagged '{tag}', has {len(found)}", 2)
        if found[0]["cell_type"] != "code":
            raise CommandError(f"{self.name}: the cell tagged '{tag}' must be a code cell", 2)
        return source(found[0])

    def check_injection(self) -> None:
        """Refuse a notebook that would not take its profile from the pipeline.

        Papermill puts the profile behind the cell tagged `parameters`; without that cell, before all
        cells, where the notebook's own `profile = "smoke"` then undoes it.

        Raises:
            CommandError: names what is wrong.
        """
        names = _assigned(ast.parse(self.tagged("parameters")))
        if names != {"profile", "overrides"}:
            raise CommandError(
                f"{self.name}: its cell tagged 'parameters' must set profile and overrides, and "
                f"nothing else",
                2,
            )
        if any("injected-parameters" in _tags(cell) for cell in self.cells):
            raise CommandError(
                f"{self.name} is an executed copy: it has a cell tagged 'injected-parameters'; "
                f"restore it from git, or delete that cell",
                2,
            )
        place = next(i for i, cell in enumerate(self.cells) if "parameters" in _tags(cell))
        for number, cell in enumerate(self.cells[place + 1 :], start=place + 2):
            names = _assigned(ast.parse(source(cell))) if cell["cell_type"] == "code" else set()
            if again := names & {"profile", "overrides"}:
                raise CommandError(
                    f"{self.name}, cell {number}: sets {again.pop()} again, which would undo what the "
                    f"command line asks for",
                    2,
                )

    def parameter_model(self) -> type[Parameters]:
        """The parameter model that the cell tagged `schema` declares; runs that cell alone."""
        namespace: dict = {"__name__": "schema"}
        where = f"{self.name}, the cell tagged 'schema'"
        try:
            exec(compile(self.tagged("schema"), where, "exec"), namespace)
        except (Exception, SystemExit) as error:
            if isinstance(error, CommandError):
                raise
            said = str(error).strip().partition("\n")[0]
            raise CommandError(f"{where}: {type(error).__name__}: {said}", 2) from None
        models = [
            value
            for value in namespace.values()
            if isinstance(value, type) and issubclass(value, Parameters) and value is not Parameters
        ]
        if len(models) != 1:
            raise CommandError(f"{where} must declare one Parameters class, has {len(models)}", 2)
        return models[0]

    def describe_cell(self, cell_source: str | None) -> str:
        """'cell 12 (its first statement)' for the cell with this source."""
        for number, cell in enumerate(self.cells, start=1):
            if cell_source is not None and source(cell) == cell_source:
                lines = [line.strip() for line in cell_source.splitlines()]
                code = [line for line in lines if line and not line.startswith("#")]
                return f"cell {number} ({code[0][:60] if code else ''})"
        return "before its first cell"


def source(cell: dict) -> str:
    """A cell's source as one string."""
    return "".join(cell["source"])


def _format_problem(content: dict) -> str | None:
    """What is missing of nbformat 4, as far as anything here reads it."""
    if content.get("nbformat") != 4:
        return f"its nbformat is {content.get('nbformat')!r}, not 4"
    if not isinstance(content.get("metadata"), dict):
        return "it has no metadata"
    cells = content.get("cells")
    if not isinstance(cells, list):
        return "it has no list of cells"
    wrong = [number for number, cell in enumerate(cells, start=1) if not _is_cell(cell)]
    return f"cell {wrong[0]} is not a cell" if wrong else None


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict) or cell.get("cell_type") not in ("code", "markdown", "raw"):
        return False
    metadata, text = cell.get("metadata", {}), cell.get("source")
    lines = text if isinstance(text, list) else [text]
    return (
        all(isinstance(line, str) for line in lines)
        and isinstance(metadata, dict)
        and isinstance(metadata.get("tags", []), list)
    )


def _tags(cell: dict) -> list:
    return cell.get("metadata", {}).get("tags", [])


def _assigned(tree: ast.Module) -> set[str]:
    """Names that the statements of a cell set, imports and what is inside definitions apart."""
    statements = [s for s in tree.body if not isinstance(s, _DEFINITIONS)]
    nodes = [node for statement in statements for node in ast.walk(statement)]
    inner = {
        id(name)
        for node in nodes
        if isinstance(node, ast.comprehension)
        for name in ast.walk(node.target)
    }
    return {
        node.id
        for node in nodes
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inner
    }


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def note_cell(executed: Path, number: int, count: int) -> None:
    """Say beside an executed copy, which is written now and then, which cell has begun."""
    executed.with_suffix(".cell").write_text(f"{number} {count}", encoding="utf8")


def noted_cell(executed: Path, since: float) -> tuple[int, int] | None:
    """Number of the cell that began last and count of cells; None if none began after `since`."""
    path = executed.with_suffix(".cell")
    try:
        if path.stat().st_mtime < since:
            return None
        number, count = path.read_text(encoding="utf8").split()
    except (OSError, ValueError):
        return None  # not begun, or just being written
    return int(number), int(count)


def running_cell(executed: Path) -> str | None:
    """Source of the cell that an unfinished executed copy was in; None if it had begun none."""
    try:
        cells = json.loads(executed.read_text(encoding="utf8"))["cells"]
    except (OSError, json.JSONDecodeError):
        return None
    begun = [c for c in cells if c.get("metadata", {}).get("papermill", {}).get("start_time")]
    return source(begun[-1]) if begun else None


def tidy(notebook: Notebook, executed: Path) -> None:
    """Give a notebook the outputs of its checked cells from an executed copy, and no others.

    nbval compares only those; without the rest, notebooks stay small and diffs readable.
    """
    fresh = [
        cell
        for cell in json.loads(executed.read_text(encoding="utf8"))["cells"]
        if "injected-parameters" not in _tags(cell)
    ]
    if len(fresh) != len(notebook.cells):
        raise CommandError(f"{notebook.name}: the executed copy has other cells", 1)
    count = 0
    for cell, ran in zip(notebook.cells, fresh, strict=True):
        # "jupyter" folds a cell's source; what else editors write there is of no use to a reader.
        metadata = cell.get("metadata", {})
        cell["metadata"] = {name: metadata[name] for name in KEPT if metadata.get(name)}
        if cell["cell_type"] != "code":
            continue
        count += 1
        checked = source(cell).startswith(CHECKED)
        cell["outputs"] = ran["outputs"] if checked else []
        cell["execution_count"] = count if checked else None
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = count
    notebook.content["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    text = json.dumps(notebook.content, indent=1, ensure_ascii=False) + "\n"
    notebook.path.write_text(text, encoding="utf8")
