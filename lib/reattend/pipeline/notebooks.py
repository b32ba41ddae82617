"""Notebooks as files: their parameter model, the cells that are checked, and tidying up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from reattend.parameters import Parameters
from reattend.pipeline.errors import CommandError

CHECKED = "# NBVAL_CHECK_OUTPUT"


@dataclass(frozen=True)
class Notebook:
    """A notebook file and its content."""

    path: Path
    content: dict

    @classmethod
    def read(cls, path: Path) -> Notebook:
        """Read a notebook.

        Raises:
            CommandError: when it is missing or not JSON.
        """
        try:
            return cls(path, json.loads(path.read_text(encoding="utf8")))
        except FileNotFoundError:
            raise CommandError(f"no notebook {path.name} beside its record", 2) from None
        except json.JSONDecodeError as error:
            raise CommandError(f"{path.name} is not a notebook: {error}", 2) from None

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
        found = [c for c in self.cells if tag in c.get("metadata", {}).get("tags", [])]
        if len(found) != 1:
            raise CommandError(f"{self.name}: needs one cell tagged '{tag}', has {len(found)}", 2)
        return source(found[0])

    def parameter_model(self) -> type[Parameters]:
        """The parameter model that the cell tagged `schema` declares; runs that cell alone."""
        namespace: dict = {"__name__": "schema"}
        exec(compile(self.tagged("schema"), f"{self.name} (schema)", "exec"), namespace)
        models = [
            value
            for value in namespace.values()
            if isinstance(value, type) and issubclass(value, Parameters) and value is not Parameters
        ]
        if len(models) != 1:
            raise CommandError(f"{self.name}: the schema cell must declare one Parameters class", 2)
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
        if "injected-parameters" not in cell.get("metadata", {}).get("tags", [])
    ]
    if len(fresh) != len(notebook.cells):
        raise CommandError(f"{notebook.name}: the executed copy has other cells", 1)
    count = 0
    for cell, ran in zip(notebook.cells, fresh, strict=True):
        tags = cell.get("metadata", {}).get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
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
