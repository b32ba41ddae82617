"""Differences between two stored results."""

import copy

from reattend.pipeline.compare import differences

STORED = {
    "claims": {
        "gain": {
            "verdict": "reproduced",
            "tests": {
                "sampled": {"effect": 3.0, "low": 1.0, "high": 4.0, "n": 5},
                "exact": {"effect": 7.0, "n": 1},
                "seconds": {"verdict": "reproduced"},
            },
        }
    },
    "measurements": [
        {"metric": "score", "method": "a", "setting": "512", "seed": 0, "value": 80.0},
        {"metric": "score", "method": "b", "setting": "512", "seed": 0, "value": 0.0},
    ],
}


def changed(edit, **tolerances):
    fresh = copy.deepcopy(STORED)
    edit(fresh)
    return differences(fresh, STORED, tolerances)


def test_same_results_have_no_differences():
    assert changed(lambda fresh: None) == []


def test_tolerance_is_relative():
    assert changed(lambda f: f["measurements"][0].update(value=81.0)) == []
    assert changed(lambda f: f["measurements"][0].update(value=82.0)) == ["score a 512 0: 80 -> 82"]
    assert changed(lambda f: f["measurements"][1].update(value=1e-3)) == [
        "score b 512 0: 0 -> 0.001"
    ]


def test_verdicts_and_missing_measurements_count():
    assert changed(lambda f: f["claims"]["gain"].update(verdict="partially")) == [
        "claim gain: reproduced -> partially"
    ]
    assert changed(lambda f: f["measurements"].pop(0)) == ["score a 512 0: gone"]
    assert changed(lambda f: f["claims"].clear()) == ["claim gain: reproduced -> absent"]


def test_a_metric_may_have_a_tolerance_of_its_own():
    def edit(fresh):
        fresh["measurements"][0].update(value=84.0)

    assert changed(edit, score=0.1) == []
    assert changed(edit, other=0.1) == ["score a 512 0: 80 -> 84"]
    assert changed(lambda f: f["measurements"][0].update(value=80.5), score=0.001) == [
        "score a 512 0: 80 -> 80.5"
    ]


def test_effects_may_move_within_the_reference_interval():
    def effect(test, value):
        return changed(lambda f: f["claims"]["gain"]["tests"][test].update(effect=value))

    assert effect("sampled", 1.5) == []
    assert effect("sampled", 0.9) == ["claim gain, sampled: 3 -> 0.9"]
    assert effect("sampled", 4.2) == ["claim gain, sampled: 3 -> 4.2"]
    assert effect("exact", 7.1) == []
    assert effect("exact", 7.2) == ["claim gain, exact: 7 -> 7.2"]
