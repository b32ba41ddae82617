"""The notebook's object, run by hand: it writes to build/study and never over committed results."""

import json
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from reattend.evidence import Exact, Sample
from reattend.parameters import ParameterError, Parameters, parameter
from reattend.replication import Replication, _commit
from tests.pipeline.toy import Checkout


class ToyParameters(Parameters):
    n: int = parameter("number of points", ge=1, le=100)
    scales: list[float] = parameter("spread of the points", gt_each=0, min_length=1)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    checkout = Checkout(tmp_path, ["toy"], dvc=False)
    monkeypatch.chdir(checkout.notebook("toy").parent)
    monkeypatch.delenv("REATTEND_OUT", raising=False)
    yield lambda **kw: Replication("toy", Parameters=ToyParameters, **({"profile": "cpu"} | kw))
    torch.use_deterministic_algorithms(False)


def study(tmp_path):
    return tmp_path / "build/study/theory/toy/cpu"


def test_by_hand_it_writes_to_study(begin, tmp_path, capsys):
    rep = begin(overrides={"n": 4})
    assert rep.parameters.n == 4
    rep.log("gain", 1 / 3, method="toy", setting=512, seed=1)
    rep.log_time("speed", 2.0)
    rep.table("t", pd.DataFrame({"a": [1 / 3]}), "A table")
    rep.claim("gain", mean=Sample([1.0, 1.1, 0.9], seed=range(3)))
    rep.finish()
    results = json.loads((study(tmp_path) / "results.json").read_text())
    assert results["measurements"] == [
        {"metric": "gain", "method": "toy", "setting": "512", "seed": 1, "value": 0.333333}
    ]
    assert results["claims"]["gain"]["tests"]["mean"] == {"effect": 1.0, "n": 3}
    assert (study(tmp_path) / "evidence.csv").read_text() == (
        "claim,test,quantity,seed,item,value\n"
        "gain,mean,value,0,,1\ngain,mean,value,1,,1.1\ngain,mean,value,2,,0.9\n"
    )
    assert "speed" not in (study(tmp_path) / "results.json").read_text()
    assert json.loads((study(tmp_path) / "run.json").read_text())["measurements"][0]["value"] == 2.0
    assert not (tmp_path / "figures").exists()


def test_a_new_run_by_hand_starts_clean(begin, tmp_path):
    begin().table("old", pd.DataFrame({"a": [1]}), "old")
    begin()
    assert list(study(tmp_path).iterdir()) == []


def test_a_smoke_run_ends_with_the_committed_verdicts(begin, tmp_path, capsys):
    committed = {"cpu": {"gain": {"verdict": "partially", "tests": {"mean": {"effect": 0.25}}}}}
    place = tmp_path / "figures" / "theory" / "toy" / "verdicts.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(committed))
    rep = begin(profile="smoke")
    assert rep.claim("gain", mean=Sample([1.0, 2.0], seed=[0, 1])) is None
    shown = rep._smoke_summary()
    assert "**partially**" in shown
    assert "mean 0.25" in shown
    assert "| 1.5 |" in shown


def test_the_commit_of_a_run(begin, tmp_path):
    assert _commit(tmp_path) is None  # nothing committed
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t.invalid"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    commit = _commit(tmp_path)
    assert not commit.endswith("+")
    (tmp_path / "lib" / "new.py").write_text("")  # untracked, and yet code
    assert _commit(tmp_path) == commit + "+"
    inner = tmp_path / "build" / "inner"
    inner.mkdir(parents=True)
    assert _commit(inner) is None  # lies in a repository that is not its own


def test_everything_is_seeded(begin):
    begin(seed=3)
    first = (torch.rand(2).tolist(), np.random.rand(2).tolist())
    begin(seed=3)
    assert first == (torch.rand(2).tolist(), np.random.rand(2).tolist())


def test_refusals(begin):
    rep = begin()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="measurement loss"):
            rep.log("loss", value)
    with pytest.raises(KeyError, match="no claim 'other'; it has: gain"):
        rep.claim("other")
    with pytest.raises(ValueError, match=r"declares the tests \['mean'\], got \[\]"):
        rep.claim("gain")
    with pytest.raises(ValueError, match="claim 'gain', test 'mean': unit 'seed' needs the label"):
        rep.claim("gain", mean=Sample([1.0], item=[0]))
    with pytest.raises(TypeError, match=r"claim 'gain', test 'mean': takes Sample"):
        rep.claim("gain", mean=Exact(1.0))
    with pytest.raises(ValueError, match="claims without a measurement: gain"):
        rep.finish()
    rep.table("t", pd.DataFrame({"a": [1]}), "A table")
    with pytest.raises(ValueError, match="already a table or figure 't'"):
        rep.table("t", pd.DataFrame({"a": [1]}), "Again")
    with pytest.raises(ParameterError, match="unknown parameter 'm'"):
        begin(overrides={"m": 1})
    with pytest.raises(ParameterError, match="unknown profile"):
        begin(profile="fast")
