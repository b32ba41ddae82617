"""The notebook's object, run by hand: it writes to build/study and never over committed results."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from reattend.parameters import ParameterError, Parameters, parameter
from reattend.replication import Replication
from reattend.verdicts import Sample
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
    rep.claim("gain", mean=Sample([1.0, 1.1, 0.9]))
    rep.finish()
    results = json.loads((study(tmp_path) / "results.json").read_text())
    assert results["measurements"] == [
        {"metric": "gain", "method": "toy", "setting": "512", "seed": 1, "value": 0.333333}
    ]
    assert results["claims"]["gain"]["tests"]["mean"]["points"] == [1.0, 1.1, 0.9]
    assert "speed" not in (study(tmp_path) / "results.json").read_text()
    assert json.loads((study(tmp_path) / "run.json").read_text())["measurements"][0]["value"] == 2.0
    assert not (tmp_path / "figures").exists()


def test_a_new_run_by_hand_starts_clean(begin, tmp_path):
    begin().table("old", pd.DataFrame({"a": [1]}), "old")
    begin()
    assert list(study(tmp_path).iterdir()) == []


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
    with pytest.raises(ValueError, match="claims without a measurement: gain"):
        rep.finish()
    rep.table("t", pd.DataFrame({"a": [1]}), "A table")
    with pytest.raises(ValueError, match="already a table or figure 't'"):
        rep.table("t", pd.DataFrame({"a": [1]}), "Again")
    with pytest.raises(ParameterError, match="unknown parameter 'm'"):
        begin(overrides={"m": 1})
    with pytest.raises(ParameterError, match="unknown profile"):
        begin(profile="fast")
