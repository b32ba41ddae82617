"""`reattend run`: results only from whole runs, one clear line otherwise."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.pipeline.toy import EXPERIMENT, PATIENCE, Checkout, heed_interrupts, wait_until

KEEP = "what an earlier run left"


def with_earlier_results(checkout: Checkout, slug: str = "toy", profile: str = "smoke"):
    """Plant results, and a function that checks that exactly these are still there."""
    directory = checkout.results(slug, profile)
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(KEEP)

    def untouched() -> None:
        assert [p.name for p in directory.iterdir()] == ["results.json"]
        assert (directory / "results.json").read_text() == KEEP
        assert not list((checkout.root / "build" / "running").glob("*"))
        assert not [p for p in directory.parent.iterdir() if p.name.startswith(".")]

    return untouched


def fails(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """Exit code, one line on stderr, and what it says."""
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    # Now and then a kernel reports that its end interrupted it.
    lines = [line for line in lines if not line.startswith("[IPKernelApp]")]
    if "did not end" not in words:  # a kernel killed in mid-cell may have last words of its own
        assert len(lines) == 1, done.stderr
    assert lines[-1].startswith("reattend: ")
    for word in words:
        assert word in lines[-1], lines[-1]


def test_a_run_writes_everything_and_again_the_same_bytes(bare):
    bare.reattend("run", "toy", "--profile", "cpu", check=True)
    directory = bare.results("toy")
    names = {p.name for p in directory.iterdir()}
    kept = {"results.json", "evidence.csv", "run.json"}
    assert names == kept | {"figure1_values.png", "table1_values.csv"}
    first = (directory / "results.json").read_bytes()
    results = json.loads(first)
    assert results["claims"]["gain"]["tests"]["mean"]["n"] == 20
    assert len(results["measurements"]) == 20
    facts = json.loads((directory / "run.json").read_text())
    assert {"seconds", "device", "threads", "versions", "commit", "peak_memory_mb"} <= facts.keys()
    assert facts["threads"] == 1
    picture = (directory / "figure1_values.png").read_bytes()
    bare.reattend("run", "toy", "--profile", "cpu", check=True)
    assert (directory / "results.json").read_bytes() == first
    assert (directory / "figure1_values.png").read_bytes() == picture
    assert (bare.root / "build/executed/theory/toy.cpu.ipynb").exists()


def test_smoke_yields_no_verdict(bare):
    bare.reattend("run", "toy", "--profile", "smoke", check=True)
    results = json.loads((bare.results("toy", "smoke") / "results.json").read_text())
    assert "verdict" not in results["claims"]["gain"]
    verdicts = bare.root / "figures" / "theory" / "toy" / "verdicts.json"
    assert json.loads(verdicts.read_text()) == {}


def test_overrides_do_not_touch_the_committed_results(bare):
    untouched = with_earlier_results(bare)
    done = bare.reattend("run", "toy", "--profile", "smoke", "--set", "n=5", check=True)
    assert "build/study/theory/toy/smoke" in done.stdout
    results = json.loads((bare.root / "build/study/theory/toy/smoke/results.json").read_text())
    assert results["parameters"]["n"] == 5
    untouched()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toi"], ["unknown paper 'toi'", "toy"]),
        (["toy", "--profile", "fast"], ["unknown profile 'fast'", "smoke, cpu, gpu"]),
        (["toy", "--set", "m=3"], ["unknown parameter 'm'", "n, scales"]),
        (["toy", "--set", "n=0"], ["'n' = 0", ">= 1", "number of points"]),
        (["toy", "--set", "n=[1, 2]"], ["'n' = [1, 2]", "a whole number"]),
        (["toy", "--set", "scales=1"], ["'scales' = 1", "a list of numbers"]),
        (["toy", "--set", "scales=[0]"], ["'scales'", "> 0"]),
        (["toy", "--set", "n"], ["--set takes NAME=VALUE"]),
        (["toy", "--set", "n=["], ["not a YAML value"]),
        (["toy", "--profile", "gpu"], ["needs a CUDA GPU"]),
    ],
)
def test_bad_input_is_refused_before_a_kernel_starts(bare, arguments, words):
    import torch

    if "gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    untouched = with_earlier_results(bare)
    if "--profile" not in arguments:
        arguments = [*arguments, "--profile", "smoke"]
    fails(bare.reattend("run", *arguments), 2, *words)
    assert not (bare.root / "build" / "executed").exists()
    untouched()


def test_bad_records_and_places_are_named(bare, tmp_path):
    bare.write_paper("toy", claims=[])
    fails(bare.reattend("run", "toy"), 2, "toy.yaml: claims")
    elsewhere = subprocess.run(
        [sys.executable, "-m", "reattend.pipeline.cli", "run", "toy"],
        cwd=tmp_path,
        env=bare.environment(),
        capture_output=True,
        text=True,
    )
    fails(elsewhere, 2, "not inside a Reattend checkout")


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ("x = 1\nx / 0", ["theory/toy.ipynb", "cell 6 (x = 1)", "ZeroDivisionError"]),
        ("import os\nos._exit(9)", ["theory/toy.ipynb", "cell 6", "kernel died"]),
        ("rep.log('gain', float('nan'))", ["cell 6", "measurement gain", "nan"]),
        ("pass", ["cell 7 (rep.finish())", "claims without a measurement: gain"]),
        ("rep.claim('loss')", ["cell 6", "no claim 'loss'"]),
    ],
)
def test_a_notebook_that_fails_leaves_earlier_results(bare, experiment, words):
    untouched = with_earlier_results(bare)
    bare.write_paper("toy", experiment)
    fails(bare.reattend("run", "toy", "--profile", "smoke"), 1, *words)
    untouched()


def test_a_cell_that_does_not_end_is_stopped(bare):
    """The first cell, so that the time allowed need not be enough for anything else."""
    untouched = with_earlier_results(bare)
    bare.write_paper("toy", budget_seconds={"smoke": 0.1})
    content = json.loads(bare.notebook("toy").read_text())
    content["cells"][1]["source"] = (
        "import time\ntime.sleep(3600)\n" + content["cells"][1]["source"]
    )
    bare.notebook("toy").write_text(json.dumps(content))
    words = ["theory/toy.ipynb", "cell 2 (import time)", "did not end"]
    fails(bare.reattend("run", "toy", "--profile", "smoke"), 1, *words)
    untouched()


def test_a_notebook_without_results_is_no_success(bare):
    untouched = with_earlier_results(bare)
    bare.write_paper("toy", EXPERIMENT + "\nimport os\nrep.finish = lambda: None")
    fails(bare.reattend("run", "toy", "--profile", "smoke"), 1, "ended without results")
    untouched()


def start(checkout: Checkout, experiment: str) -> subprocess.Popen:
    """A run that has reached its sixth cell, which says so in a file."""
    checkout.write_paper("toy", f"open('begun', 'w').close()\n{experiment}")
    process = subprocess.Popen(
        [sys.executable, "-m", "reattend.pipeline.cli", "run", "toy", "--profile", "smoke"],
        cwd=checkout.root,
        env=checkout.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    begun = checkout.root / "notebooks" / "theory" / "begun"
    wait_until(lambda: begun.exists() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


SLEEP = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(3600)"


def kernel_ends(checkout: Checkout) -> None:
    pid = int((checkout.root / "notebooks" / "theory" / "pid").read_text())

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(gone)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_its_kernel_and_changes_nothing(bare, ordinary_kernels, number):
    untouched = with_earlier_results(bare)
    process = start(bare, SLEEP)
    pid = bare.root / "notebooks" / "theory" / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors == "\nreattend: stopped; earlier results are untouched\n"
    untouched()
    kernel_ends(bare)


def test_the_second_of_two_runs_says_so(bare):
    process = start(bare, SLEEP)
    try:
        fails(bare.reattend("run", "toy", "--profile", "smoke"), 1, "'toy' is being run by another")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)


def test_a_full_disk_keeps_earlier_results(bare):
    untouched = with_earlier_results(bare)
    full = "import errno, pathlib\n"
    full += "def fail(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device', 'figure')\n"
    full += "pathlib.Path.write_bytes = fail\n"
    bare.write_paper("toy", full + EXPERIMENT)
    fails(bare.reattend("run", "toy", "--profile", "smoke"), 1, "cell 6", "No space left on device")
    untouched()


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("params.yaml", "n: 3", "n: 4"),
        ("lib/reattend/evidence/samples.py", "6g", "7g"),
        ("notebooks/theory/toy.yaml", "id: mean", "id: means"),
    ],
)
def test_edits_during_a_run_are_not_taken_for_what_ran(bare, path, old, new):
    untouched = with_earlier_results(bare)
    edit = f"p = __import__('pathlib').Path('../..') / {path!r}\n"
    edit += f"assert {old!r} in p.read_text()\n"
    edit += f"p.write_text(p.read_text().replace({old!r}, {new!r}))\n"
    bare.write_paper("toy", EXPERIMENT + edit)
    fails(bare.reattend("run", "toy", "--profile", "smoke"), 1, "edited while it ran")
    untouched()
