"""What the pipeline costs: with nothing to do, for one notebook, and for all of them side by side.

    python benchmarks/repro.py [--papers 65]          # the quick part: minutes
    python benchmarks/repro.py --runs [paper ...]     # and forced runs at smoke: hours for all papers

Everything happens in copies of the checkout, so results and dvc.lock stay as they are. The quick part prints,
for the real papers and for a suite made of copies of them, wall and CPU seconds of `reattend repro` with
nothing to do and the lines it prints, of `reattend sync`, `fingerprint`, `report` and `judge`, and of
`dvc status`. `--runs` adds, at smoke: the named papers by plain `dvc repro`, `reattend repro -j 1` and `-j 2`, in
turns so that a busy machine hits all; a run from an empty cache of backbones with -j 2 (builds beside papers)
with its idle share; what a notebook costs beyond a bare kernel; and the time from editing one method to its
new verdict.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import yaml
from nbclient import NotebookClient

from reattend.assets.store import cache_directory
from reattend.pipeline.run import kernel_config, threads
from reattend.pipeline.warm_kernels import kernel_server
from reattend.project import find_root, load_yaml
from reattend.records import record_paths

REATTEND = "reattend.pipeline.cli"


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds on the clock, CPU seconds of all its processes, lines printed."""

    wall: float
    cpu: float
    lines: int

    def __str__(self) -> str:
        return f"{self.wall:7.1f} s   {self.cpu:7.1f} CPU-s   {self.lines:4d} lines"


def timed(root: Path, *arguments: str, **extra: str) -> Cost:
    """A Python module run as a command in `root`; a failure ends the benchmark."""
    # The copy's own library, and the commands of this environment for the stages that DVC starts.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(root / "lib")} | extra
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, len(done.stdout.splitlines()))


def copy_of(root: Path, target: Path) -> None:
    """The checkout's files, with DVC's and Git's own, without environments and build products."""
    ignored = shutil.ignore_patterns(".venv", "build", "__pycache__", "*.egg-info", "tmp")
    shutil.copytree(root, target, ignore=ignored)
    link = target / ".git"
    if (
        link.is_file()
    ):  # a linked work tree: a repository of its own, so that nothing reaches the other
        link.unlink()
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
            who = ["-c", "user.name=b", "-c", "user.email=b@b.invalid"]
            subprocess.run(["git", *who, *command], cwd=target, check=True)


def multiply(root: Path, count: int) -> None:
    """Copy papers under other names until the checkout has `count`."""
    papers = list(record_paths(root).items())
    params = load_yaml((root / "params.yaml").read_text())
    for number in range(count - len(papers)):
        slug, record = papers[number % len(papers)]
        twin = f"{slug}_copy{number}"
        for path, old in (
            (record, f"slug: {slug}"),
            (record.with_suffix(".ipynb"), f'\\"{slug}\\"'),
        ):
            text = path.read_text().replace(old, old.replace(slug, twin))
            path.with_stem(twin).write_text(text)
        params["papers"][twin] = params["papers"][slug]
        family = root / "figures" / record.parent.name
        shutil.copytree(family / slug, family / twin)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def up_to_date(root: Path) -> None:
    """Have DVC take everything as it is."""
    for command in (["sync"], ["fingerprint"], ["report"]):
        timed(root, REATTEND, *command)
    timed(root, "dvc", "commit", "--force")


def quick(root: Path) -> None:
    """Commands that run no notebook, in a checkout whose results stand."""
    up_to_date(root)
    timed(root, "dvc", "status")  # DVC's own notes on files
    print(f"{len(record_paths(root))} papers")
    judge = [["judge"]] if " judge" in _help(root) else []
    for command in (["repro"], ["repro", "--dry"], ["sync"], ["fingerprint"], ["report"], *judge):
        print(f"  reattend {' '.join(command):14} {timed(root, REATTEND, *command)}", flush=True)
    print(f"  {'dvc status':23} {timed(root, 'dvc', 'status')}", flush=True)


def _help(root: Path) -> str:
    command = [sys.executable, "-m", REATTEND, "--help"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout


def forced(root: Path, papers: list[str], rounds: int) -> None:
    """Each way to run the papers at smoke, by turns; ratios to plain `dvc repro` of the same round."""
    stages = [f"replicate-{slug}" for slug in papers]
    reattend = [REATTEND, "repro", "--force", "--profile", "smoke"]
    ways = {
        "dvc repro": ["dvc", "repro", "--force", *stages],
        "reattend repro -j 1": [*reattend, "--jobs", "1", *papers],
        "reattend repro -j 2": [*reattend, "--jobs", "2", *papers],
    }
    timed(root, *ways["reattend repro -j 2"])  # fetches, builds, sets the profile
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            costs[name].append(timed(root, *ways[name], **threads()))
    plain = np.array([cost.wall for cost in costs["dvc repro"]])
    for name, found in costs.items():
        wall = np.array([cost.wall for cost in found])
        ratio = np.median(wall / plain)
        print(f"{name:22} median {np.median(wall):7.1f} s   {ratio:.2f} of dvc repro", flush=True)


def from_nothing(root: Path, papers: list[str], scratch: Path) -> None:
    """A run at smoke that has to build all backbones, on two workers and on one; assets are at hand."""
    for jobs in (1, 2):
        cache = scratch / f"cache{jobs}"
        (cache / "reattend").mkdir(parents=True)
        (cache / "reattend" / "assets").symlink_to(cache_directory() / "assets")
        shutil.rmtree(root / "build")
        options = ["--profile", "smoke", "--force", "--jobs", str(jobs)]
        cost = timed(root, REATTEND, "repro", *options, *papers, XDG_CACHE_HOME=str(cache))
        idle = 1 - cost.cpu / (jobs * cost.wall)
        print(f"with all builds, -j {jobs}    {cost}   idle {idle:.0%}", flush=True)


def bare_kernel(root: Path, slug: str) -> float:
    """Seconds of a fresh kernel from its start to its end, running the notebook's cells at smoke."""
    own = {"PYTHONPATH": str(root / "lib"), "REATTEND_OUT": str(root / "build" / "bare")}
    path = record_paths(root)[slug].with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    place = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, resources=place, config=kernel_config())
    client.execute(env=os.environ | own | {"OMP_NUM_THREADS": "1"})
    return time.perf_counter() - started


def overheads(root: Path, slug: str, rounds: int) -> None:
    """Seconds that a notebook takes at smoke beyond a bare kernel, in each of the rounds.

    The last way is that of `reattend repro`, which keeps a process to fork kernels from.
    """
    run = [REATTEND, "run", "--profile", "smoke", slug]
    stage = ["dvc", "repro", "--force", "--single-item", f"replicate-{slug}"]
    ways = ("reattend run", "a stage of dvc repro", "a stage of reattend repro")
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        bare = bare_kernel(root, slug)
        seconds = [timed(root, *run).wall, timed(root, *stage).wall]
        with kernel_server(os.environ | threads()):
            timed(root, *run)  # by its end the server has imported all
            seconds.append(timed(root, *stage).wall)
        for values, value in zip(found.values(), seconds, strict=True):
            values.append(value - bare)
    for name, values in found.items():
        print(
            f"{name} beyond a bare kernel, {slug} at smoke   {np.median(values):+.1f} s "
            f"[{min(values):+.1f}, {max(values):+.1f}]",
            flush=True,
        )


def edit_to_verdict(root: Path, slug: str) -> None:
    """From an edit of a paper's method to its new results at smoke."""
    method = next((root / "lib" / "reattend").glob(f"*/{slug}.py"))
    method.write_text(method.read_text() + "\n_EDITED = True\n")
    print(f"edit of {slug} to its result   {timed(root, REATTEND, 'repro', slug)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="paper", help="for --runs; default: all")
    parser.add_argument("--papers", type=int, default=65, help="size of the suite of copies")
    parser.add_argument("--runs", action="store_true", help="run notebooks too")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    root = find_root()
    with tempfile.TemporaryDirectory() as scratch:
        real, copies = Path(scratch) / "real", Path(scratch) / "copies"
        copy_of(root, real)
        shutil.copytree(real, copies)
        multiply(copies, options.papers)
        for checkout in (real, copies):
            quick(checkout)
        if options.runs:
            names = options.names or list(record_paths(root))
            forced(real, names, options.rounds)
            overheads(real, names[0], options.rounds)
            edit_to_verdict(real, names[0])
            from_nothing(real, names, Path(scratch))


if __name__ == "__main__":
    main()
