"""Several papers at a time, and what is left after violence: always whole results, never a lock."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline.toy import EXPERIMENT, PATIENCE, Checkout, heed_interrupts, wait_until

PAPERS = ["toy_a", "toy_b", "toy_c"]


@pytest.fixture
def three(tmp_path) -> Checkout:
    """Three papers of which nothing has run."""
    checkout = Checkout(tmp_path / "three", PAPERS)
    checkout.commit()
    return checkout


def start(checkout: Checkout, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "reattend.pipeline.cli", "repro", *arguments],
        cwd=checkout.root,
        env=checkout.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


def processes(checkout: Checkout) -> list[int]:
    """Processes whose working directory is in the checkout."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            where = os.readlink(f"/proc/{entry}/cwd")
            dead = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if where.startswith(str(checkout.root)) and not dead:
            found.append(int(entry))
    return found


def results(checkout: Checkout) -> dict[str, bytes]:
    return {
        slug: (checkout.results(slug, "smoke") / "results.json").read_bytes() for slug in PAPERS
    }


def all_is_well(checkout: Checkout) -> None:
    assert "up to date" in checkout.dvc("status", check=True).stdout
    assert not list((checkout.root / "build" / "running").glob("*"))
    assert processes(checkout) == []


def test_two_at_a_time_leave_dvc_with_nothing_to_do(three, ordinary_kernels):
    done = three.reattend("repro", "--profile", "smoke", "--jobs", "2", check=True)
    for slug in PAPERS:
        assert f"{slug}: done" in done.stdout
    all_is_well(three)
    assert "Running stage" not in three.dvc("repro", check=True).stdout
    again = three.reattend("repro", "--profile", "smoke", "--jobs", "2", check=True)
    assert "nothing to run" in again.stdout


def test_ctrl_c_ends_everything_and_a_second_run_continues(three, ordinary_kernels):
    slow = "import pathlib, time\nwhile not pathlib.Path('../../build/go').exists():\n"
    three.write_paper("toy_a", slow + "    time.sleep(0.05)\n" + EXPERIMENT)
    process = start(three, "--profile", "smoke", "--jobs", "2")
    wait_until(lambda: (three.root / "build/executed/theory/toy_a.smoke.cell").exists())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    wait_until(lambda: processes(three) == [])
    (three.root / "build" / "go").touch()
    three.reattend("repro", "--profile", "smoke", "--jobs", "2", check=True)
    all_is_well(three)


def test_a_killed_stage_is_tried_once_more(three):
    suicide = (
        "import pathlib, psutil\n"
        "if not pathlib.Path('../../build/tried').exists():\n"
        "    pathlib.Path('../../build/tried').touch()\n"
        "    for process in psutil.process_iter(['cmdline', 'cwd']):\n"
        "        here = process.info['cwd'] == str(pathlib.Path('../..').resolve())\n"
        "        if here and {'run', 'toy_b'} <= set(process.info['cmdline'] or []):\n"
        "            process.kill()\n"
    )
    three.write_paper("toy_b", suicide + EXPERIMENT)
    done = three.reattend("repro", "--profile", "smoke", "--jobs", "2", check=True)
    assert "toy_b: done" in done.stdout
    all_is_well(three)


def test_a_second_repro_says_so(three):
    three.write_paper("toy_a", "import time\ntime.sleep(3600)")
    process = start(three, "--profile", "smoke", "--jobs", "1", "toy_a")
    try:
        wait_until(lambda: (three.root / "build/executed/theory/toy_a.smoke.cell").exists())
        second = three.reattend("repro", "--profile", "smoke", "toy_b")
        assert second.returncode == 1
        assert "another `reattend repro` is at work" in second.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)


def test_a_paper_whose_model_cannot_be_had_stops_no_other(three):
    three.write_paper("toy_a", needs={"assets": ["needles"]})
    done = three.reattend("repro", "--profile", "smoke", REATTEND_ASSETS=str(three.root / "none"))
    assert done.returncode == 1
    assert "needs asset 'needles'" in done.stdout
    assert "toy_b: done" in done.stdout
    assert not three.results("toy_a", "smoke").exists()


@pytest.mark.faults
def test_kill_9_at_random_moments_then_a_second_run(tmp_path):
    undisturbed = Checkout(tmp_path / "calm", PAPERS)
    began = time.monotonic()
    undisturbed.reattend("repro", "--profile", "smoke", "--jobs", "2", check=True)
    length = time.monotonic() - began
    expected = results(undisturbed)
    disturbed = Checkout(tmp_path / "disturbed", PAPERS)
    chance = random.Random(0)
    for attempt in range(20):
        process = start(disturbed, "--profile", "smoke", "--jobs", "2", "--force")
        time.sleep(chance.uniform(0.1, 1.2) * length)
        victims = processes(disturbed)
        if attempt % 3:  # now one process, now all of them
            victims = chance.sample(victims, min(1, len(victims)))
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not attempt % 3:
            process.kill()
        process.communicate(timeout=PATIENCE)
        wait_until(lambda: processes(disturbed) == [])
        for slug in PAPERS:
            path = disturbed.results(slug, "smoke") / "results.json"
            assert not path.exists() or json.loads(path.read_text())
        disturbed.reattend("repro", "--profile", "smoke", "--jobs", "2", check=True)
        assert results(disturbed) == expected
        all_is_well(disturbed)
