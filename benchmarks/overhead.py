"""What the pipeline adds: `reattend run` against executing the same cells in a bare kernel.

    python benchmarks/overhead.py zoology --rounds 5

Interleaved rounds at smoke, whose results Git ignores. Prints seconds of both, their paired
difference, and the time that `reattend --help` and a `dvc repro` with nothing to do take.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient

from reattend.project import find_root
from reattend.records import record_paths
from reattend.timing import paired_times


def bare(notebook: Path) -> None:
    """Execute the cells with nbclient, in a fresh kernel, writing results to build/study."""
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(content, kernel_name="python3", timeout=600)
    client.execute(cwd=str(notebook.parent))


def command(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", *arguments], cwd=root, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    root = find_root()
    for slug in options.papers:
        notebook = record_paths(root)[slug].with_suffix(".ipynb")
        run = ("reattend.pipeline.cli", "run", slug, "--profile", "smoke")
        ours, plain = paired_times(
            lambda run=run: command(root, *run),
            lambda notebook=notebook: bare(notebook),
            rounds=options.rounds,
        )
        print(
            f"{slug}: reattend run {np.median(ours):.2f} s, bare kernel {np.median(plain):.2f} s, "
            f"difference {np.median(ours - plain):+.2f} s "
            f"[{(ours - plain).min():+.2f}, {(ours - plain).max():+.2f}]"
        )
    nothing = ("dvc", "repro", "--allow-missing", "--dry")
    help_seconds, idle = paired_times(
        lambda: command(root, "reattend.pipeline.cli", "--help"),
        lambda: command(root, *nothing),
        rounds=options.rounds,
    )
    print(f"reattend --help {np.median(help_seconds):.2f} s; nothing to do {np.median(idle):.2f} s")


if __name__ == "__main__":
    main()
