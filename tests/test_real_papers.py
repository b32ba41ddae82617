"""The real papers at smoke: the same bytes twice, and once through the real graph."""

import shutil
import subprocess
import sys

import pytest

from reattend.records import record_paths
from tests.pipeline.toy import ROOT, Checkout

PAPERS = {slug: path.parent.name for slug, path in record_paths(ROOT).items()}
THROUGH_DVC = "zoology"  # quick, and needs a real asset


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout of the suite as it is in the working tree, without its results."""
    checkout = Checkout.__new__(Checkout)
    checkout.root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.egg-info")
    for name in ("lib", "notebooks"):
        shutil.copytree(ROOT / name, checkout.root / name, ignore=ignore)
    for name in ("params.yaml", "dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, checkout.root)
    checkout.run("git", "init", "-q", check=True)
    checkout.run(sys.executable, "-m", "dvc", "init", "-q", check=True)
    return checkout


@pytest.mark.parametrize("slug", PAPERS)
def test_two_runs_give_the_same_bytes(copy, slug):
    directory = copy.root / "figures" / PAPERS[slug] / slug / "smoke"
    outputs = []
    for _ in range(2):
        copy.reattend("run", slug, "--profile", "smoke", check=True)
        outputs.append((directory / "results.json").read_bytes())
    assert outputs[0] == outputs[1]


def test_a_paper_through_the_real_graph(copy):
    done = copy.reattend("repro", THROUGH_DVC, "--profile", "smoke", check=True)
    assert f"{THROUGH_DVC}: done" in done.stdout
    status = copy.dvc("status", f"replicate-{THROUGH_DVC}", check=True)
    assert "up to date" in status.stdout
    again = copy.reattend("repro", THROUGH_DVC, "--profile", "smoke", check=True)
    assert "nothing to run" in again.stdout


def test_a_fresh_clone_finds_committed_results_up_to_date(tmp_path):
    """Without fetching, building or running anything."""
    clone = tmp_path / "clone"
    made = subprocess.run(["git", "clone", "-q", ROOT, clone], capture_output=True, text=True)
    if made.returncode:
        pytest.skip("not a Git checkout")
    checkout = Checkout.__new__(Checkout)
    checkout.root = clone
    done = checkout.dvc("repro", "--allow-missing", "--dry", check=True)
    assert "Running stage" not in done.stdout, done.stdout
