"""What the parallel `reattend repro` gains over DVC's own `dvc repro`, which runs one stage at a time.

    python benchmarks/repro.py --profile smoke --rounds 3 [paper ...]

Runs in a copy of the checkout, so results and dvc.lock stay as they are. Each round forces the named
papers through plain `dvc repro`, `reattend repro -j 1` and `-j 2`, in turns so that a busy machine hits
all; all three begin with the fetches and builds. Then: what running a notebook costs beyond a bare kernel
that executes it, the time with nothing to do, also for 65 stages (made of copies), and the time from editing one
method to its new verdict. Prints medians and the ratio to plain `dvc repro` of the same round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import yaml
from nbclient import NotebookClient

from reattend.pipeline.run import kernel_config, threads
from reattend.pipeline.warm_kernels import kernel_server
from reattend.project import find_root
from reattend.records import record_paths

STAGES = 65


def timed(root: Path, *arguments: str) -> float:
    """Seconds of a Python module run as a command in `root`; a failure ends the benchmark."""
    # The copy's own library, and the commands of this environment for the stages that DVC starts.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(root / "lib")}
    command = [sys.executable, "-m", *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def copy_of(root: Path, target: Path) -> None:
    """The checkout's files, with DVC's and Git's own, without environments and build products."""
    ignored = shutil.ignore_patterns(".venv", "build", "__pycache__", "*.egg-info", "tmp")
    shutil.copytree(root, target, ignore=ignored)


def forced(root: Path, papers: list[str], profile: str, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each way to run the papers, one column per round."""
    stages = [f"replicate-{slug}" for slug in papers]
    reattend = ["reattend.pipeline.cli", "repro", "--force", "--profile", profile]
    ways = {
        "dvc repro": ["dvc", "repro", "--force", *stages],
        "reattend repro -j 1": [*reattend, "--jobs", "1", *papers],
        "reattend repro -j 2": [*reattend, "--jobs", "2", *papers],
    }
    timed(root, *ways["reattend repro -j 2"])  # fetches, builds, sets the profile
    seconds = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(timed(root, *ways[name]))
    return {name: np.array(values) for name, values in seconds.items()}


def bare_kernel(root: Path, slug: str) -> float:
    """Seconds of a fresh kernel from its start to its end, running the notebook's cells at smoke."""
    own = {"PYTHONPATH": str(root / "lib"), "REATTEND_OUT": str(root / "build" / "bare")}
    environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
    path = record_paths(root)[slug].with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, resources=place, config=kernel_config()).execute(env=environment)
    return time.perf_counter() - started


def overheads(root: Path, slug: str, rounds: int) -> dict[str, np.ndarray]:
    """Seconds that a notebook takes at smoke beyond a bare kernel, in each of the rounds.

    The last way is that of `reattend repro`, which keeps a process to fork kernels from.
    """
    run = ["reattend.pipeline.cli", "run", "--profile", "smoke", slug]
    stage = ["dvc", "repro", "--force", "--single-item", f"replicate-{slug}"]
    found = {
        name: [] for name in ("reattend run", "a stage of dvc repro", "a stage of reattend repro")
    }
    for _ in range(rounds):
        bare = bare_kernel(root, slug)
        seconds = [timed(root, *run), timed(root, *stage)]
        with kernel_server(os.environ | threads()):
            timed(root, *run)  # by its end the server has imported all
            seconds.append(timed(root, *stage))
        for values, value in zip(found.values(), seconds, strict=True):
            values.append(value - bare)
    return {name: np.array(values) for name, values in found.items()}


def nothing_to_do(root: Path) -> dict[str, float]:
    """Seconds of a no-op, as it is and with copies of papers up to 65 stages."""
    found = {"no-op, as it is": timed(root, "dvc", "repro", "--allow-missing")}
    graph = yaml.safe_load((root / "dvc.yaml").read_text())
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    papers = [name for name in graph["stages"] if name.startswith("replicate-")]
    for number in range(STAGES - len(graph["stages"])):
        name, target = papers[number % len(papers)], f"copy{number}"
        for content in (graph, lock):
            content["stages"][target] = yaml.safe_load(yaml.safe_dump(content["stages"][name]))
        # A stage may not share its output with another: the copy gets a directory of its own.
        directory = lock["stages"][name]["outs"][0]["path"]
        twin = f"{directory}-{target}"
        shutil.copytree(root / directory, root / twin)
        outs = graph["stages"][target]["outs"][0]
        graph["stages"][target]["outs"] = [{twin: next(iter(outs.values()))}]
        lock["stages"][target]["outs"][0]["path"] = twin
    (root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    (root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    found[f"no-op, {len(graph['stages'])} stages"] = timed(root, "dvc", "repro", "--allow-missing")
    return found


def edit_to_verdict(root: Path, slug: str, profile: str) -> float:
    """Seconds from an edit of a paper's method to its new results."""
    method = next((root / "lib" / "reattend").glob(f"*/{slug}.py"))
    method.write_text(method.read_text() + "\n_EDITED = True\n")
    return timed(root, "reattend.pipeline.cli", "repro", "--profile", profile, slug)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", help="default: all")
    parser.add_argument("--profile", default="smoke", choices=("smoke", "cpu"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    root = find_root()
    papers = options.papers or list(record_paths(root))
    with tempfile.TemporaryDirectory() as scratch:
        copy, still = Path(scratch) / "checkout", Path(scratch) / "still"
        copy_of(root, copy)
        copy_of(root, still)
        for name, value in nothing_to_do(still).items():
            print(f"{name:22} {value:7.1f} s", flush=True)
        seconds = forced(copy, papers, options.profile, options.rounds)
        plain = seconds["dvc repro"]
        for name, values in seconds.items():
            ratio = np.median(values / plain)
            print(
                f"{name:22} median {np.median(values):7.1f} s   {ratio:.2f} of dvc repro",
                flush=True,
            )
        first = papers[0]
        for name, values in overheads(copy, first, options.rounds).items():
            print(
                f"{name} beyond a bare kernel, {first} at smoke   {np.median(values):+.1f} s "
                f"[{values.min():+.1f}, {values.max():+.1f}]",
                flush=True,
            )
        edited = edit_to_verdict(copy, first, options.profile)
        print(f"edit of {first} to its verdict   {edited:.1f} s")


if __name__ == "__main__":
    main()
