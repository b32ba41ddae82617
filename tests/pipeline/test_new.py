"""`reattend new` writes a paper that runs, `reattend check` says what it lacks."""

import json
import sys

import pytest

from reattend.pipeline.check import Lack, lacks
from reattend.pipeline.errors import CommandError
from reattend.pipeline.new import write_paper
from tests.pipeline.toy import ROOT


def words(found: list[Lack]) -> str:
    return "; ".join(lack.what for lack in found)


def test_a_new_paper_runs_and_lacks_what_only_its_author_can_write(bare):
    done = bare.reattend("new", "theory", "fresh", check=True)
    assert done.stdout.count("written: ") == 5
    bare.reattend("run", "fresh", "--profile", "smoke", check=True)
    results = json.loads((bare.results("fresh", "smoke") / "results.json").read_text())
    assert list(results["claims"]) == ["improves", "identity"]
    tests = bare.root / "tests" / "theory" / "test_fresh.py"
    oracles = bare.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert oracles.returncode == 0, oracles.stdout
    checked = bare.reattend("check", "fresh")
    assert checked.returncode == 1
    for lacking in ("fresh.yaml still says", "fresh.ipynb still says", "2 oracles", "no evidence"):
        assert lacking in checked.stdout
    for given in ("tagged", "NBVAL", "equation", "drawn", "gate", "lines", "params.yaml", "table"):
        assert given not in checked.stdout
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml"]
        done = bare.run(*ruff, *bare.root.rglob("*fresh.py"), bare.notebook("fresh"))
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("family", "slug", "said"),
    [
        ("poetry", "fresh", "unknown family"),
        ("theory", "Fresh!", "made of a-z"),
        ("theory", "toy", "there is already a paper 'toy'"),
    ],
)
def test_wrong_names_write_nothing(bare, family, slug, said):
    before = sorted(bare.root.rglob("*"))
    with pytest.raises(CommandError, match=said):
        write_paper(bare.root, family, slug)
    assert sorted(bare.root.rglob("*")) == before


def test_what_is_too_long_or_missing_is_said(bare):
    write_paper(bare.root, "theory", "fresh")
    path = bare.notebook("fresh")
    content = json.loads(path.read_text())
    [experiment] = [c for c in content["cells"] if "def score" in "".join(c["source"])]
    experiment["source"] = ["x = 1\n"] * 43
    path.write_text(json.dumps(content))
    [long] = [lack for lack in lacks(bare.root, "fresh") if "a cell of 43" in lack.what]
    assert not long.hard
    experiment["source"] = ["x = 1\n"] * 400
    content["cells"] = [c for c in content["cells"] if "softmax" not in "".join(c["source"])]
    content["cells"] = [c for c in content["cells"] if "imshow" not in "".join(c["source"])]
    path.write_text(json.dumps(content))
    found = lacks(bare.root, "fresh")
    hard = words([lack for lack in found if lack.hard])
    for what in ("lines of code", "a cell of 400", "no display equation", "no tensor drawn"):
        assert what in hard
    record = path.with_suffix(".yaml")
    text = record.read_text().replace("over_placebo  # or", '"none: interim"  # or')
    record.write_text(text.replace("role: gate", "role: test\n        negligible: 1.0"))
    found = words(lacks(bare.root, "fresh"))
    assert "interim margins" in found
    assert "without a gate, control or placebo: improves" in found


def test_results_are_held_to_budget_and_provenance(bare):
    write_paper(bare.root, "theory", "fresh")
    results = bare.results("fresh")
    results.mkdir(parents=True)
    for name in ("results.json", "evidence.csv", "a.png"):
        (results / name).touch()
    (results / "run.json").write_text(json.dumps({"cpu_seconds": 601.0}))
    found = words(lacks(bare.root, "fresh"))
    for what in ("601 CPU seconds", "no fingerprint", "fewer than 2 figures", "no table"):
        assert what in found
    (results / "run.json").write_text(json.dumps({"cpu_seconds": 599.0, "fingerprint": "f"}))
    found = words(lacks(bare.root, "fresh"))
    assert "seconds" not in found
    assert "fingerprint" not in found
