"""The order in which stages are run, with made-up stages that take no time."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest

from reattend.pipeline import workers
from reattend.pipeline.plan import Stage, Task
from reattend.pipeline.workers import Outcome, run_tasks

CHAIN = {
    "fetch-text": ((), 1, "text"),
    "build-model": (("fetch-text",), 100, "model"),
    "replicate-a": (("build-model",), 10, None),
    "replicate-b": ((), 20, None),
}


class Silent:
    """A display that shows nothing."""

    def started(self, name): ...
    def ended(self, name, outcome): ...
    def dropped(self, name): ...


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run made-up tasks; what came of them, and when each began and ended."""
    log, done = [], []

    def run(act=lambda name: None, jobs=2, deadline=float("inf"), **settings):
        def stage(root, name, force):
            log.append(f"+{name}")
            code = act(name) or 0
            log.append(f"-{name}")
            return Outcome(code, 0.0, "broken" if code else "")

        monkeypatch.setattr(workers, "run_stage", stage)
        monkeypatch.setattr(workers, "_kernels", lambda scheduler: contextlib.nullcontext())
        todo = {
            name: Task(Stage(name, needs, seconds, manifest), "x", **settings.get(name, {}))
            for name, (needs, seconds, manifest) in CHAIN.items()
        }
        ended = run_tasks(tmp_path, todo, jobs, None, deadline, Silent(), done.append)
        assert done == [name for name, outcome in ended.outcomes.items() if not outcome.code]
        return ended, log

    return run


def test_papers_run_beside_builds(run):
    beside = threading.Barrier(2, timeout=20)

    def act(name):
        if name in ("build-model", "replicate-b"):
            beside.wait()  # breaks unless both run at once

    ended, log = run(act)
    assert all(outcome.code == 0 for outcome in ended.outcomes.values())
    assert log.index("-fetch-text") < log.index("+build-model")
    assert log.index("-build-model") < log.index("+replicate-a")


def test_the_longest_chain_begins(run):
    _, log = run(jobs=1)
    order = [entry[1:] for entry in log if entry[0] == "+"]
    assert order == ["fetch-text", "build-model", "replicate-b", "replicate-a"]


def test_a_failure_stops_what_needs_it_alone(run):
    ended, log = run(lambda name: name == "fetch-text")
    assert "+build-model" not in log
    assert ended.outcomes["replicate-a"].message == "needs asset 'text'"
    assert ended.outcomes["build-model"].code == 1
    assert ended.outcomes["replicate-b"].code == 0


@pytest.mark.parametrize(("text", "runs"), [("new", True), ("old", False)])
def test_what_reads_a_manifest_runs_only_if_it_is_another(run, tmp_path, text, runs):
    (tmp_path / "text").write_text("old")

    def act(name):
        if name == "fetch-text":  # alone: a file that others truncate meanwhile reads as another
            (tmp_path / "text").write_text(text)
        return 0

    only = {"only_if_new": True}
    ended, log = run(act, **{"build-model": only, "replicate-a": only})
    assert ("+build-model" in log) == runs
    assert "+replicate-a" not in log  # the model's manifest is the same
    assert all(outcome.code == 0 for outcome in ended.outcomes.values())


def test_what_will_not_end_in_time_is_not_begun(run):
    ended, _ = run(deadline=time.monotonic() + 50)
    assert ended.left_out == ["fetch-text", "build-model", "replicate-a"]
    assert list(ended.outcomes) == ["replicate-b"]


def test_no_dask_and_no_port_without_a_scheduler():
    code = (
        "import sys, pathlib, psutil\n"
        "from reattend.pipeline import repro, workers\n"
        "with workers._workers(pathlib.Path('.'), 2, None) as (submit, slots):\n"
        "    assert slots() == 2\n"
        "    found = psutil.Process().net_connections()\n"
        "    assert not found, found\n"
        "assert not {'dask', 'distributed', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
