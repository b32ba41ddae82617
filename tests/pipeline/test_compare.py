"""Differences between two stored results."""

import copy

from reattend.pipeline.compare import differences

STORED = {
    "claims": {"gain": {"verdict": "reproduced"}},
    "measurements": [
        {"metric": "score", "method": "a", "setting": "512", "seed": 0, "value": 80.0},
        {"metric": "score", "method": "b", "setting": "512", "seed": 0, "value": 0.0},
    ],
}


def changed(edit):
    fresh = copy.deepcopy(STORED)
    edit(fresh)
    return differences(fresh, STORED, tolerance=0.02)


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
