"""evidence.csv: what is written is read again, what is damaged is refused."""

import numpy as np
import pytest

from reattend.evidence.files import evidence_csv, evidence_rows, read_evidence
from reattend.evidence.samples import Exact, Sample, points
from reattend.evidence.verdicts import EvidenceError

EVIDENCE = {
    ("a", "mean"): points(Sample([1 / 3, 2.0], seed=[0, 1]), "seed"),
    ("a", "count"): points(Exact(7.0), "exact"),
    ("b", "both"): points(Sample([[1.0, 2.0], [3.0, 4.0]], seed=[0, 1], item="xy"), "seed x item"),
    ("b", "ratio"): points(Sample({"a": [1.0, 2.0], "b": [3.0, 4.0]}, item=["p", "q"]), "item"),
    ("b", "time"): points(Sample([0.5, 0.25, 0.75], round=range(3)), "round"),
}


def test_what_is_written_is_read_again():
    text = evidence_csv(EVIDENCE)
    assert "time" not in text  # times differ from run to run
    found = read_evidence(text, evidence_rows(EVIDENCE, timing=True))
    assert found.keys() == EVIDENCE.keys()
    for key, kept in EVIDENCE.items():
        assert found[key].labels == kept.labels
        assert found[key].unit == kept.unit
        for name, values in kept.quantities.items():
            np.testing.assert_array_equal(found[key].quantities[name], values)


HEAD = "claim,test,quantity,seed,item,value\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the columns must be"),
        ("claim,test\n", "line 1: the columns must be"),
        (HEAD + "a,mean,value,0,,nan\n", "line 2: the value of 'a.mean' is nan"),
        (HEAD + "a,mean,value,0,,1\na,mean,value,1,,x\n", "line 3: needs a claim, a test"),
        (HEAD + "a,mean,value,0,1\n", "line 2: needs 6 cells"),
        (HEAD + "a,mean,value,0,,1,2\n", "line 2: needs 6 cells"),
        (HEAD + ",mean,value,0,,1\n", "line 2: needs a claim"),
        (HEAD + "a,mean,value,0,,1\na,mean,value,,1,1\n", "'a.mean' do not share the labels"),
        (HEAD + "a,mean,value,0,,1\na,mean,value,0,,1\n", "'a.mean' do not share the labels"),
        (HEAD + "a,mean,a,0,,1\na,mean,b,1,,1\n", "'a.mean' do not share the labels"),
        (HEAD + "a,mean,value,0,,1\n<<<<<<< HEAD\n", "line 3: needs 6 cells"),
    ],
)
def test_damaged_evidence_is_refused(text, message):
    with pytest.raises(EvidenceError, match=message):
        read_evidence(text)


def test_damaged_times_are_refused():
    with pytest.raises(EvidenceError, match="timing_evidence"):
        read_evidence(HEAD, [{"claim": "a", "test": "t"}])
