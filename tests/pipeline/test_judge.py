"""`reattend judge`: verdicts follow from what is stored; nothing runs, nothing is lost."""

import json

import pytest
import yaml

from tests.pipeline.toy import Checkout


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    checkout = Checkout(tmp_path_factory.mktemp("judge"), ["toy"], dvc=False)
    checkout.reattend("run", "toy", check=True)
    return checkout


def verdict(checkout):
    path = checkout.root / "figures" / "theory" / "toy" / "verdicts.json"
    return json.loads(path.read_text())["cpu"]["gain"]["verdict"]


def test_an_edited_margin_is_judged_again_without_a_run(ran):
    assert verdict(ran) == "reproduced"  # `run` judges what it has stored
    record = ran.notebook("toy").with_suffix(".yaml")
    text = record.read_text()
    changed = yaml.safe_load(text)
    changed["claims"][0]["tests"][0]["reproduced"] = 5.0
    record.write_text(yaml.safe_dump(changed))
    before = (ran.results("toy") / "evidence.csv").stat().st_mtime_ns
    done = ran.reattend("judge", check=True)
    assert "toy: gain (cpu): reproduced -> partially" in done.stdout
    assert verdict(ran) == "partially"
    assert (ran.results("toy") / "evidence.csv").stat().st_mtime_ns == before
    record.write_text(text)
    assert "1 verdicts judged, 1 changed" in ran.reattend("judge", check=True).stdout
    assert "1 verdicts judged, 0 changed" in ran.reattend("judge", check=True).stdout


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("evidence.csv", ",value,3,,", ",value,3,,nan#", "line 5: needs a claim"),
        ("evidence.csv", ",value,3,,", ",value,,3,", "do not share the labels of one unit"),
        ("evidence.csv", "gain,mean", "gain,other", "no evidence for test 'mean' of claim 'gain'"),
        ("evidence.csv", "seed,item", "item,seed", "line 1: the columns must be"),
        ("run.json", "{", "", "run.json, line 2: not valid JSON"),
    ],
)
def test_damaged_results_end_in_one_line_and_lose_nothing(ran, name, old, new, message):
    path = ran.results("toy") / name
    text = path.read_text()
    path.write_text(text.replace(old, new))
    done = ran.reattend("judge")
    path.write_text(text)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert verdict(ran) == "reproduced"


def test_unknown_paper(ran):
    done = ran.reattend("judge", "poy")
    assert (done.returncode, done.stderr) == (2, "reattend: unknown paper 'poy'; there are: toy\n")
