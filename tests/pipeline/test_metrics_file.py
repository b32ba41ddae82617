"""metrics.json: few numbers under the same names for every paper."""

from reattend.pipeline.metrics_file import metrics


def claim(verdict, **tests):
    return {"verdict": verdict, "reason": "", "tests": tests}


def test_counts_and_the_headline_effect():
    claims = {
        "far": claim("out of reach"),
        "main": claim(
            "not reproduced",
            gate={"role": "gate", "effect": 1.0},
            control={"role": "control", "effect": 2.0},
            gain={"role": "test", "effect": -0.123456789},
        ),
        "other": claim("reproduced", gain={"role": "test", "effect": 5.0}),
    }
    assert metrics({"cpu": claims}) == {
        "cpu": {
            "reproduced": 1,
            "partially": 0,
            "not_reproduced": 1,
            "inconclusive": 0,
            "headline": -0.123457,
        }
    }


def test_no_verdicts_no_metrics():
    assert metrics({}) == metrics({"cpu": {}}) == {}
    assert "headline" not in metrics({"cpu": {"main": claim("inconclusive")}})["cpu"]
