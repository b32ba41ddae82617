"""`reattend study`: JupyterLab on copies of the notebooks, so that saving changes nothing committed.

The server's root is the checkout, because the notebooks show pictures of figures/. A copy that its
reader has saved is never written over.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from reattend.pipeline.errors import CommandError
from reattend.pipeline.manifests import write_json, write_text
from reattend.project import FileError, read_json
from reattend.records import record_paths

STUDY = "build/study"
_WRITTEN = ".copies.json"  # paper -> hashes of the committed notebook and of the copy made of it


def study(root: Path, slug: str | None, options: list[str]) -> None:
    """Renew the copies and become JupyterLab, opened at one paper or at the list of them.

    Args:
        options: passed on to JupyterLab.

    Raises:
        CommandError: there is no such paper.
    """
    for line in copy_notebooks(root):
        print(line)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *jupyter(root, slug, os.geteuid() == 0), *options])


def jupyter(root: Path, slug: str | None, as_root: bool) -> list[str]:
    """Python's arguments that start JupyterLab."""
    paths = record_paths(root)
    if slug is not None and slug not in paths:
        raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(paths)}", exit_code=2)
    place = f"/{paths[slug].parent.name}/{slug}.ipynb" if slug else ""
    arguments = ["-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    arguments.append(f"--LabApp.default_url=/lab/tree/{STUDY}{place}")
    # In a container everybody is root, and Jupyter refuses that unless told.
    return [*arguments, "--allow-root"] if as_root else arguments


def _copied(root: Path) -> dict:
    """What has been copied; nothing where that is not known, so that no copy is taken for ours."""
    try:
        return read_json(root / STUDY / _WRITTEN)
    except (FileNotFoundError, FileError):
        return {}


def copy_notebooks(root: Path) -> list[str]:
    """Copy every committed notebook into build/study; what to tell the reader, a line each."""
    written, lines = _copied(root), []
    for slug, record in record_paths(root).items():
        source = record.with_suffix(".ipynb").read_text(encoding="utf8")
        copy = root / STUDY / record.parent.name / f"{slug}.ipynb"
        before = written.get(slug, ["", ""])
        if copy.exists() and _digest(copy.read_text(encoding="utf8")) != before[1]:
            if before[0] != _digest(source):
                where = copy.relative_to(root)
                lines.append(
                    f"{where}: kept as you saved it; the paper's notebook is newer. Delete it "
                    "to begin anew."
                )
            continue
        text = _moved(source)
        write_text(copy, text)
        written[slug] = [_digest(source), _digest(text)]
    write_json(root / STUDY / _WRITTEN, written)
    return lines


def _moved(text: str) -> str:
    """A notebook whose relative links hold one folder deeper than notebooks/<family>."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            for opening in ("](", 'src="', 'href="'):
                source = source.replace(f"{opening}../../", f"{opening}../../../")
            cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
