"""The real papers at smoke, once through the real pipeline: forked kernels, DVC's graph, two at a time.

nbval has run the same notebooks in kernels of its own, by hand as it were, with results in build/study:
the bytes must agree. Therefore these tests come after nbval's, as in `make test`.
"""

import shutil
import subprocess
import sys

import pytest

from reattend.records import record_paths
from tests.ledger import papers_to_run
from tests.pipeline.toy import ROOT, Checkout

PAPERS = papers_to_run(ROOT)
pytestmark = pytest.mark.after_nbval


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout of the suite as it is in the working tree, without its results."""
    checkout = Checkout.__new__(Checkout)
    checkout.root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.egg-info")
    for name in ("lib", "notebooks"):
        shutil.copytree(ROOT / name, checkout.root / name, ignore=ignore)
    for name in ("params.yaml", "dvc.yaml", "constraints.txt", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, checkout.root)
    checkout.run("git", "init", "-q", check=True)
    checkout.run(sys.executable, "-m", "dvc", "init", "-q", check=True)
    return checkout


@pytest.fixture(scope="module")
def repro(copy):
    """What one pass of the pipeline over all papers said."""
    return copy.reattend("repro", *PAPERS, "--profile", "smoke") if PAPERS else None


@pytest.mark.parametrize("slug", PAPERS)
def test_the_pipeline_gives_the_bytes_of_nbval_s_run(copy, repro, slug):
    assert f"{slug}: done" in repro.stdout, repro.stdout + repro.stderr
    by_hand = ROOT / "build" / "study" / PAPERS[slug] / slug / "smoke"
    assert by_hand.exists(), f"run `pytest --nbval-lax` on {slug}'s notebook first, as `make test`"
    piped = copy.root / "figures" / PAPERS[slug] / slug / "smoke"
    for name in ("results.json", "evidence.csv"):
        assert (piped / name).read_bytes() == (by_hand / name).read_bytes(), name


@pytest.mark.skipif(not PAPERS, reason="CI's ledger holds all papers")
def test_dvc_has_nothing_left_to_do(copy, repro):
    stages = [f"replicate-{slug}" for slug in PAPERS]
    assert "up to date" in copy.dvc("status", *stages, check=True).stdout
    again = copy.reattend("repro", *PAPERS, "--profile", "smoke", check=True)
    assert "nothing to run" in again.stdout


def test_a_fresh_clone_finds_committed_results_up_to_date(tmp_path):
    """Without fetching, building or running anything."""
    clone = tmp_path / "clone"
    made = subprocess.run(["git", "clone", "-q", ROOT, clone], capture_output=True, text=True)
    if made.returncode:
        pytest.skip("not a Git checkout")
    checkout = Checkout.__new__(Checkout)
    checkout.root = clone
    kept = [f"replicate-{slug}" for slug in record_paths(ROOT)]
    done = checkout.dvc("repro", "--allow-missing", "--dry", *kept, check=True)
    assert "Running stage" not in done.stdout, done.stdout
