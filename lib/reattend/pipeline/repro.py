"""`reattend repro`: bring results up to date through DVC's graph."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from reattend.assets.store import AssetError, asset_path
from reattend.pipeline.compare import compare, has_revision
from reattend.pipeline.errors import CommandError
from reattend.pipeline.graph import asset_manifest, load_records, needed_assets, sync
from reattend.pipeline.manifests import write_text
from reattend.pipeline.notebooks import Notebook
from reattend.pipeline.report import Row, summary, write_report
from reattend.pipeline.run import check_parameters, recover
from reattend.records import Record, record_paths


def repro(root: Path, papers: list[str], profile: str, *, force: bool) -> int:
    """Run the stages of `papers` (default: all) that are not up to date, or all with `force`.

    A failing paper stops only what depends on it. Ends with the scoreboard and with what differs
    from the committed results.

    Returns:
        0 when every stage succeeded, else 1.

    Raises:
        CommandError: unknown paper, or parameters that a notebook does not take; nothing has run.
    """
    records = load_records(root)
    chosen = papers or list(records)
    _check(root, chosen, records, profile)
    recover(root)
    sync(root)
    set_profile(root, profile)
    forget_damaged_assets(root, [records[slug] for slug in chosen])
    targets = [f"replicate-{slug}" for slug in chosen] + ([] if papers else ["report"])
    options = ["--keep-going", *(["--force"] if force else [])]
    failed = dvc(root, "repro", *options, *targets)
    rows = write_report(root, profile)
    print_scoreboard([row for row in rows if row.paper in chosen])
    if has_revision(root, "HEAD"):
        compare(root, chosen, profile, "HEAD")
    if failed:
        print("some stages failed; their messages are above", file=sys.stderr)
    return int(bool(failed))


def dvc(root: Path, *arguments: str) -> int:
    """Run DVC with this Python's programs first on the path; its exit code."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
    }
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=environment).returncode


def set_profile(root: Path, profile: str) -> None:
    """Write the chosen profile into params.yaml, where DVC's graph reads it."""
    path = root / "params.yaml"
    text = path.read_text(encoding="utf8")
    renewed = re.sub(r"(?m)^profile: *\w+", f"profile: {profile}", text, count=1)
    if renewed != text:
        write_text(path, renewed)
        print(f"params.yaml: profile is now '{profile}'")


def forget_damaged_assets(root: Path, records: list[Record]) -> None:
    """Remove the manifests of assets that are no longer whole in the cache: DVC fetches them anew."""
    for name in {name for record in records for name in needed_assets(record)}:
        try:
            asset_path(name)
        except AssetError:
            (root / asset_manifest(name)).unlink(missing_ok=True)


def print_scoreboard(rows: list[Row]) -> None:
    """The verdicts as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("paper", "claim", "ours", "verdict", "s", title=summary(rows), title_style="")
    last = None
    for row in rows:
        first = row.paper != last
        table.add_row(
            row.paper if first else "",
            row.claim,
            row.ours,
            row.verdict,
            row.seconds if first else "",
        )
        last = row.paper
    Console().print(table)


def _check(root: Path, chosen: list[str], records: dict[str, Record], profile: str) -> None:
    for slug in chosen:
        if slug not in records:
            raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(records)}", 2)
        notebook = Notebook.read(record_paths(root)[slug].with_suffix(".ipynb"))
        check_parameters(root, notebook, slug, profile, {})
