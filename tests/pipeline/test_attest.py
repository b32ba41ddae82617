"""Results that stand although code has changed, and the chain that says so."""

import json

import pytest
import yaml

from reattend.pipeline.provenance import (
    BEFORE,
    OTHER_CODE,
    OTHER_PARAMETERS,
    TODAY,
    attested_equal,
    attested_path,
    fingerprint,
    standing,
)
from reattend.project import read_json
from reattend.records import record_paths
from tests.pipeline.toy import EXPERIMENT, ROOT, Checkout

RUNS = [
    (slug, profile)
    for slug, path in record_paths(ROOT).items()
    for profile in ("cpu", "gpu")
    if (ROOT / "figures" / path.parent.name / slug / profile / "run.json").exists()
]


@pytest.mark.parametrize(("slug", "profile"), RUNS)
def test_a_chain_leads_from_a_committed_run_to_today(slug, profile):
    """Any machine can make cpu results again; older gpu results stay, and the report says what they are."""
    found = standing(ROOT, record_paths(ROOT)[slug].with_suffix(".ipynb"), profile)
    allowed = {TODAY, BEFORE} if profile == "gpu" else {TODAY}
    assert found in allowed, "run `reattend repro`, or `reattend attest` where results must stand"


def test_a_link_joins_what_it_names(tmp_path):
    notebook = tmp_path / "notebooks" / "theory" / "toy.ipynb"
    path = attested_path(tmp_path, notebook)
    path.parent.mkdir(parents=True)
    links = [("a", "b"), ("c", "d"), ("b", "c"), ("x", "y"), ("c", "a")]
    named = [{"old": old, "new": new, "smoke": "0"} for old, new in links]
    path.write_text(json.dumps({"links": named}))
    assert attested_equal(tmp_path, notebook, "a") == {"a", "b", "c", "d"}
    assert attested_equal(tmp_path, notebook, "d") == {"d"}
    assert attested_equal(tmp_path, notebook, "y") == {"y"}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Checkout:
    """One paper that ran at cpu through DVC, committed."""
    made = Checkout(tmp_path_factory.mktemp("attest") / "checkout", ["toy"])
    made.reattend("repro", "--profile", "cpu", check=True)
    made.commit()
    return made


@pytest.fixture
def own(finished):
    yield finished
    finished.run("git", "checkout", "-q", ".", check=True)
    finished.run("git", "clean", "-qfd", "figures", check=True)


def state(checkout: Checkout) -> str:
    """`standing`, asked of the checkout's own library."""
    code = (
        "from pathlib import Path; from reattend.pipeline.provenance import standing; "
        "print(standing(Path.cwd(), Path('notebooks/theory/toy.ipynb').absolute(), 'cpu'))"
    )
    return checkout.run("python", "-c", code, check=True).stdout.strip()


SAMPLES = "lib/reattend/evidence/samples.py"


def test_a_run_says_what_it_was_made_under(own):
    run = read_json(own.results("toy") / "run.json")
    assert set(run["fingerprint"]) == {"code", "parameters"}
    assert state(own) == TODAY
    edit(own.root / "params.yaml", "n: 20", "n: 21")
    assert state(own) == OTHER_PARAMETERS
    (own.results("toy") / "run.json").write_text('{"seconds": 1}')
    assert state(own) == BEFORE


def test_code_that_gives_the_same_is_attested(own):
    edit(
        own.root / SAMPLES,
        'return float(f"{value:.6g}")',
        'text = f"{value:.6g}"\n    return float(text)',
    )
    assert state(own) == OTHER_CODE
    own.reattend("fingerprint", check=True)
    assert "replicate-toy" in own.dvc("status", check=True).stdout
    before = own.results("toy").joinpath("run.json").read_bytes()
    done = own.reattend("attest", check=True)
    assert "toy: attested; smoke results are the same as at HEAD" in done.stdout
    assert "1 papers attested, 0 refused" in done.stdout
    [link] = read_json(own.results("toy").parent / "attested.json")["links"]
    assert link["old"] == json.loads(before)["fingerprint"]["code"]
    assert link["old"] != link["new"]
    assert state(own) == TODAY
    assert "up to date" in own.dvc("status", check=True).stdout
    assert own.results("toy").joinpath("run.json").read_bytes() == before
    changed = own.run("git", "status", "--porcelain", check=True).stdout.split()[1::2]
    assert set(changed) == {"dvc.lock", "figures/theory/toy/attested.json", SAMPLES}
    assert len(own.run("git", "worktree", "list", check=True).stdout.splitlines()) == 1
    again = own.reattend("attest", "toy", check=True)
    assert "nothing to attest" in again.stdout


def test_code_that_gives_something_else_is_refused(own):
    edit(own.root / SAMPLES, 'return float(f"{value:.6g}")', 'return float(f"{value:.4g}")')
    done = own.reattend("attest", "toy")
    assert done.returncode == 1
    assert "toy: refused: its smoke results.json and evidence.csv differ" in done.stderr
    assert not (own.results("toy").parent / "attested.json").exists()
    assert state(own) == OTHER_CODE


def test_bad_input_is_refused(own):
    done = own.reattend("attest", "toi")
    assert done.returncode == 2
    assert "unknown paper 'toi'" in done.stderr
    edit(own.root / SAMPLES, 'return float(f"{value:.6g}")', 'return float(f"{value:.5g}")')
    done = own.reattend("attest", "--ref", "nowhere")
    assert done.returncode == 2
    assert "--ref nowhere" in done.stderr
    own.run("git", "commit", "-qam", "edited", check=True)
    done = own.reattend("attest", "toy")
    assert done.returncode == 1
    assert "HEAD holds today's code, not that of the results; name their commit" in done.stderr
    own.run("git", "reset", "-q", "--hard", "HEAD~", check=True)


def test_the_library_of_another_clone_is_refused(own):
    done = own.reattend("fingerprint", PYTHONPATH=str(ROOT / "lib"))
    assert done.returncode == 2
    assert "holds the library of another clone" in done.stderr
    assert f"PYTHONPATH={own.root / 'lib'}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_profiles_differ_in_parameters_alone(own):
    notebook = own.notebook("toy")
    prints = [fingerprint(own.root, notebook, profile) for profile in ("smoke", "cpu", "gpu")]
    assert len({each["code"] for each in prints}) == 1
    assert prints[0]["parameters"] != prints[1]["parameters"] == prints[2]["parameters"]


WEIGHTS = """\
import os


def weight():
    return 0.0


def build(target, profile):
    with open(os.environ["TOY_BUILDS"], "a") as log:
        log.write(f"{profile}\\n")
    (target / "weights.txt").write_text(f"{weight()} {profile}")
"""
READ = """\
from reattend.backbones.store import backbone_path

assert (backbone_path("toy_weights", profile) / "weights.txt").read_text() == f"0.0 {profile}"
"""


def test_a_build_is_carried_over(tmp_path):
    own, log = Checkout(tmp_path / "own", ["toy"]), tmp_path / "builds"
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TOY_BUILDS": str(log)}
    module = own.root / "lib/reattend/backbones/trained/toy_weights.py"
    module.write_text(WEIGHTS)
    catalogue = own.root / "lib/reattend/backbones/catalogue.yaml"
    entries = yaml.safe_load(catalogue.read_text())
    entries["trained"]["toy_weights"] = {
        "about": "numbers", "assets": [], "seconds": 1, "profiles": True
    }  # fmt: skip
    catalogue.write_text(yaml.safe_dump(entries))
    own.write_paper("toy", READ + EXPERIMENT, needs={"backbones": ["toy_weights"]})
    own.reattend("sync", check=True)
    own.reattend("repro", "--profile", "cpu", check=True, **cache)
    own.commit()
    edit(module, "return 0.0", "return float(0)")
    done = own.reattend("attest", check=True, **cache)
    assert "backbone 'toy_weights': carried over" in done.stdout
    assert log.read_text().split() == ["cpu", "smoke", "smoke"]
    own.reattend("run", "toy", "--profile", "cpu", check=True, **cache)
    assert log.read_text().split() == ["cpu", "smoke", "smoke"]
