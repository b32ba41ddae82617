"""A checkout with small made-up papers, to try the pipeline on without running real ones."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def heed_interrupts() -> None:
    """Before a command starts: what a shell runs in the background ignores Ctrl-C, and passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# Seconds after which a test takes a wait for a hang. No test may be sooner: machines are loaded.
PATIENCE = 600


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something to become true, not for ever."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


SCHEMA = """\
from reattend.parameters import Parameters, parameter


class ToyParameters(Parameters):
    n: int = parameter("number of points", ge=1, le=100)
    scales: list[float] = parameter("spread of the points", gt_each=0, min_length=1)
"""
BEGIN = """\
from reattend.replication import Replication

rep = Replication("{slug}", Parameters=ToyParameters, profile=profile, overrides=overrides)
P = rep.parameters
"""
EXPERIMENT = """\
import numpy as np
import matplotlib.pyplot as plt
import pandas as pd
from reattend.evidence import Sample

random = np.random.default_rng(rep.seed)
values = 1 + P.scales[0] * random.standard_normal(P.n)
for seed, value in enumerate(values):
    rep.log("gain", value, method="toy", seed=seed)
fig, ax = plt.subplots()
ax.plot(values)
rep.figure("figure1_values", fig, "The values.")
rep.table("table1_values", pd.DataFrame({"value": values}), "The values again.")
rep.claim("gain", mean=Sample(values, seed=range(P.n)))
"""
RECORD = {
    "family": "theory",
    "title": "A toy",
    "authors": "Nobody",
    "year": 2020,
    "venue": "nowhere",
    "question": "Does it work? It should.",
    "stands_on": "nothing",
    "claims": [
        {
            "id": "gain",
            "says": "the gain is positive",
            "where": "Table 1",
            "reported": "1",
            "about": "training",
            "placebo": "none: a toy has no idea to remove",
            "tests": [
                {
                    "id": "mean",
                    "measures": "mean gain",
                    "better": "higher",
                    "unit": "seed",
                    "reproduced": 0.5,
                    "not_reproduced": 0.0,
                }
            ],
        }
    ],
}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
VALUES = {
    "smoke": {"n": 3, "scales": [0.1]},
    "cpu": {"n": 20, "scales": [0.1]},
    "gpu": {"n": 20, "scales": [0.1]},
}


class Checkout:
    """A throw-away checkout under `root`, with its own DVC and Git repositories."""

    def __init__(self, root: Path, papers: list[str], dvc: bool = True) -> None:
        self.root = root
        (root / "notebooks" / "theory").mkdir(parents=True)
        (root / "lib").mkdir()
        # The real library under a path of its own, so that tests may edit it.
        subprocess.run(["cp", "-r", ROOT / "lib" / "reattend", root / "lib"], check=True)
        for name in ("constraints.txt", ".dvcignore"):
            (root / name).write_text((ROOT / name).read_text())
        # Smoke is quick, so these tests commit its results, which the suite ignores.
        ignored = (ROOT / ".gitignore").read_text().replace("/figures/*/*/smoke/\n", "")
        (root / ".gitignore").write_text(ignored)
        params = {"profile": "cpu", "papers": {slug: copy.deepcopy(VALUES) for slug in papers}}
        (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        for slug in papers:
            self.write_paper(slug)
        self.run("git", "init", "-q", check=True)
        if dvc:
            self.run(sys.executable, "-m", "dvc", "init", "-q", check=True)
            config = (ROOT / ".dvc" / "config").read_text()
            (root / ".dvc" / "config").write_text(config)
            self.reattend("sync", check=True)

    def notebook(self, slug: str) -> Path:
        return self.root / "notebooks" / "theory" / f"{slug}.ipynb"

    def results(self, slug: str, profile: str = "cpu") -> Path:
        return self.root / "figures" / "theory" / slug / profile

    def write_paper(self, slug: str, experiment: str = EXPERIMENT, **record) -> None:
        """Write a paper's notebook and record."""
        cells = [
            ("markdown", f"# {slug}", []),
            ("code", 'profile = "smoke"\noverrides = {}', ["parameters"]),
            ("code", SCHEMA, ["schema"]),
            ("code", BEGIN.format(slug=slug), []),
            ("code", "# NBVAL_CHECK_OUTPUT\nprint(6 * 7)", []),
            ("code", experiment, []),
            ("code", "rep.finish()", []),
        ]
        content = {
            "cells": [_cell(i, *cell) for i, cell in enumerate(cells)],
            "metadata": {"kernelspec": KERNEL, "language_info": {"name": "python"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        self.notebook(slug).write_text(json.dumps(content))
        text = yaml.safe_dump(RECORD | {"slug": slug} | record, sort_keys=False)
        self.notebook(slug).with_suffix(".yaml").write_text(text)

    def environment(self, **extra: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PYTHONPATH": str(self.root / "lib"), "PATH": path, "OMP_NUM_THREADS": "1"}
        names = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t.invalid"}
        names |= {k.replace("AUTHOR", "COMMITTER"): v for k, v in names.items()}
        return os.environ | own | names | extra

    def run(self, *command: str, check: bool = False, **extra: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.root,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert not (check and done.returncode), done.stdout + done.stderr
        return done

    def reattend(self, *arguments: str, check: bool = False, **extra: str):
        command = [sys.executable, "-m", "reattend.pipeline.cli", *arguments]
        return self.run(*command, check=check, **extra)

    def dvc(self, *arguments: str, check: bool = False):
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check)

    def commit(self) -> None:
        self.run("git", "add", "-A", check=True)
        self.run("git", "commit", "-q", "-m", "state", check=True)


def _cell(index: int, kind: str, source: str, tags: list[str]) -> dict:
    cell = {"cell_type": kind, "id": f"cell{index}", "source": source, "metadata": {}}
    if tags:
        cell["metadata"]["tags"] = tags
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell
