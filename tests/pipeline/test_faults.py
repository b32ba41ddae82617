"""Full disks, directories that cannot be written, floods of output: `make test-faults`."""

import json
import os
import subprocess

import pytest

from tests.pipeline.toy import EXPERIMENT, Checkout

pytestmark = pytest.mark.faults


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 40 MB; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_keeps_earlier_results(small_disk):
    checkout = Checkout(small_disk / "bare", ["toy"], dvc=False)
    checkout.reattend("run", "toy", "--profile", "smoke", check=True)
    before = contents(checkout.results("toy", "smoke"))
    free = os.statvfs(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 20_000))
    failed = checkout.reattend("run", "toy", "--profile", "smoke")
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert contents(checkout.results("toy", "smoke")) == before
    filler.unlink()
    checkout.reattend("run", "toy", "--profile", "smoke", check=True)
    after = contents(checkout.results("toy", "smoke"))
    assert after["results.json"] == before["results.json"]


def test_results_that_cannot_be_replaced_are_kept(tmp_path):
    checkout = Checkout(tmp_path / "bare", ["toy"], dvc=False)
    checkout.reattend("run", "toy", "--profile", "smoke", check=True)
    results = checkout.results("toy", "smoke")
    before = contents(results)
    # Of root, who may write anywhere, only this attribute keeps a directory.
    if subprocess.run(["chattr", "+i", str(results.parent)], capture_output=True).returncode:
        pytest.skip("making a directory immutable needs root and a file system that can")
    try:
        failed = checkout.reattend("run", "toy", "--profile", "smoke")
    finally:
        subprocess.run(["chattr", "-i", str(results.parent)], check=True)
    assert failed.returncode == 1
    assert "cannot write figures/theory/toy/smoke" in failed.stderr
    assert "earlier results kept" in failed.stderr
    assert contents(results) == before


def test_a_notebook_that_prints_100_megabytes(tmp_path):
    checkout = Checkout(tmp_path / "bare", ["toy"], dvc=False)
    flood = "for _ in range(100):\n    print('x' * 1_000_000)\n"
    checkout.write_paper("toy", flood + EXPERIMENT)
    done = checkout.reattend("run", "toy", "--profile", "smoke", check=True)
    assert len(done.stdout) + len(done.stderr) < 10_000
    results = json.loads((checkout.results("toy", "smoke") / "results.json").read_text())
    assert results["slug"] == "toy"
