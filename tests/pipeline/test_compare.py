"""Fresh results against stored ones: what another draw may do, and what it may not."""

import numpy as np
import pytest

from reattend.evidence.samples import Exact, Sample, points
from reattend.evidence.verdicts import conclude, decide
from reattend.pipeline.compare import Comparison, add_claims, predicted
from reattend.records import Claim, Test
from tests.pipeline.toy import Checkout

SHAPE = np.array([-1.4, -1.1, -0.6, -0.1, 0.2, 0.5, 1.0, 1.5])
GAIN = Test(id="gain", measures="m", better="higher", unit="seed", reproduced=0.0, negligible=0.5)
COUNT = Test(id="count", measures="m", better="equal", unit="exact", margin=100.0)
CLAIM = Claim(
    id="c",
    says="s",
    where="w",
    reported="r",
    about="training",
    placebo="none: nothing to remove",
    tests=[GAIN, COUNT],
)


def outcomes(shift=3.0, count=50.0, spread=1.0, n=8):
    values = shift + spread * SHAPE[:n]
    gain = decide(GAIN, points(Sample(values, seed=range(n)), "seed"))
    return {"c": conclude(CLAIM, [gain, decide(COUNT, points(Exact(count), "exact"))])}


def compared(fresh, stored=None, level=0.05):
    found = Comparison()
    add_claims(found, "toy", fresh, stored or outcomes(), level)
    return found


def test_the_same_agrees():
    found = compared(outcomes())
    assert (found.claims, found.agreeing, found.agrees) == (1, 1, True)
    assert not found.outside


def test_another_draw_agrees_and_another_effect_does_not():
    """sd 1, n = 8: the difference of two means has error .5, so 1.07 away is too far at 5 %."""
    assert compared(outcomes(3.9)).agrees
    found = compared(outcomes(4.3))
    assert not found.agrees
    assert found.outside[0].startswith("toy c.gain: 3 [2.16, 3.84] -> 4.3")
    assert compared(outcomes(4.3), level=0.05 / 80).agrees  # one of eighty


def test_deterministic_numbers_have_a_tolerance():
    assert compared(outcomes(count=50.9)).agrees
    assert compared(outcomes(count=51.2)).outside == ["toy c.count: 50 -> 51.2"]


def test_a_changed_verdict_is_told_with_its_reason_and_a_contradiction_fails():
    found = compared(outcomes(0.7), outcomes(1.0))
    assert found.agrees
    assert found.changed[0].startswith(
        "toy c: reproduced -> inconclusive (few points: 'gain' has 8 seeds"
    )
    found = compared(outcomes(-3.0, count=200.0), outcomes(3.0))
    assert not found.agrees
    assert found.contradicting == ["toy c: reproduced -> not reproduced"]


def test_too_few_points_predict_nothing():
    assert predicted(
        outcomes(9.0, n=2)["c"].tests[0].estimate, outcomes()["c"].tests[0].estimate, 0.05
    )


@pytest.fixture
def checkout(tmp_path):
    made = Checkout(tmp_path, ["toy"], dvc=False)
    made.reattend("run", "toy", check=True)
    made.commit()
    return made


def test_one_screen(checkout):
    done = checkout.reattend("compare", check=True)
    assert done.stdout.splitlines() == [
        "1 of 1 testable claims have the verdict of HEAD (profile cpu)",
        "0 measurements differ by more than their tolerance; every line: build/compare.txt",
    ]
    params = checkout.root / "params.yaml"
    params.write_text(params.read_text().replace("- 0.1", "- 0.5"))
    checkout.reattend("run", "toy", check=True)
    done = checkout.reattend("compare", check=True)
    assert "19 measurements differ" in done.stdout
    assert len(done.stdout.splitlines()) == 2
    assert "toy gain toy 3: " in (checkout.root / "build" / "compare.txt").read_text()


def test_what_cannot_be_compared_is_said(checkout):
    checkout.run("git", "rm", "-rq", "--cached", "figures", check=True)
    checkout.run("git", "commit", "-qm", "no results", check=True)
    done = checkout.reattend("compare", check=True)
    assert "toy: HEAD has no evidence at profile cpu" in done.stdout
    done = checkout.reattend("compare", "--ref", "nowhere")
    assert (done.returncode, done.stderr) == (2, "reattend: no Git revision 'nowhere'\n")


def test_a_run_with_other_values_is_held_against_the_committed_one(checkout):
    done = checkout.reattend("compare", "--study", check=True)
    assert done.stdout.startswith("0 of 0 testable claims")
    done = checkout.reattend("compare", "--study", "toy", check=True)
    assert "toy: no results here" in done.stdout
    checkout.reattend("run", "toy", "--set", "scales=[40.0]", check=True)
    assert "1 of 1 testable" in checkout.reattend("compare", check=True).stdout
    done = checkout.reattend("compare", "--study", check=True)
    assert done.stdout.startswith("0 of 1 testable claims have the verdict of HEAD")
    assert "toy gain: reproduced -> inconclusive" in done.stdout
    assert "0 measurements differ" in done.stdout
