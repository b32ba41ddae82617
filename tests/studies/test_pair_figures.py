"""Figures of text experiments: what stands where."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from reattend.studies import pair_figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def seeds(count=3, columns=None, seed=0):
    shape = count if columns is None else (count, columns)
    return np.random.default_rng(seed).normal(70, 2, shape)


def test_scores_lie_between_a_constant_answer_and_the_teacher():
    scores = {
        "one": {"DSE": seeds(), "labels": seeds()},
        "two": {"DSE": seeds(1), "labels": seeds()},
    }
    fig = pair_figures.draw_scores(
        scores, {"one": 80.0, "two": 90.0}, {"one": 50.0, "two": 0.0}, 0.95
    )
    lines = [line.get_xdata()[0] for line in fig.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert {80, 76, 50} <= set(lines)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["DSE", "labels"]


def test_a_sweep_has_one_curve_a_task_and_its_teacher():
    curves = {"one": {0.0: seeds(), 0.5: seeds(), 1.0: seeds()}}
    fig = pair_figures.draw_sweep(curves, {"one": 81.0})
    curve = fig.axes[0].lines[0]
    assert curve.get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert curve.get_ydata()[0] == pytest.approx(seeds().mean())


def test_reported_gains_stand_on_the_rows_of_ours():
    panels = {"3 layers": {"contrast continued": seeds(), "self bi": seeds()}}
    fig = pair_figures.draw_gains(panels, {"self bi": [4.2, 4.4]}, "gain")
    assert fig.axes[-1].lines[0].get_ydata().tolist() == [1, 1]


def test_differences_sizes_strips_and_shifts_are_drawn():
    gains = {"score": {"AT": seeds(4, 2), "iAT": seeds(4, 2)}}
    fig = pair_figures.draw_differences(gains, ["a", "b"])
    places = [line.get_ydata()[0] for line in fig.axes[0].lines if len(line.get_ydata()) == 4]
    assert len(places) == 2 * 3
    assert len(set(places)) == 6
    fig = pair_figures.draw_sizes({"AT": seeds(3, 2)}, seeds(), [0.3, 3.0], 50.4)
    assert 50.4 in {line.get_ydata()[0] for line in fig.axes[0].lines}
    fig = pair_figures.draw_strips(
        {("a b c", "good"): {"x": np.array([1, 2, 4]), "y": np.array([3, 1, 0])}}
    )
    shown = fig.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, [[0.25, 0.5, 1], [1, 1 / 3, 0]])
    curves = {"AT": seeds(3, 2), "Vanilla": seeds(3, 2, seed=1)}
    fig = pair_figures.draw_shifts({"random": curves}, [0.3, 3.0], {"AT": "AT", "Vanilla": "plain"})
    assert [line.get_linestyle() for line in fig.axes[0].lines if line.get_label() == "plain"] == [
        "--"
    ]


def test_imitation_shows_every_pair_and_equality():
    logits = {"one": ([1.0, -2.0, 3.0], [0.9, -1.0, 2.0]), "two": ([0.0, 1.0], [0.0, 1.0])}
    fig = pair_figures.draw_imitation(logits, {"one": (0.9, 0.3), "two": (1.0, 0.5)})
    points, equality = fig.axes[0].lines
    assert points.get_ydata().tolist() == [0.9, -1.0, 2.0]
    assert list(equality.get_xdata()) == list(equality.get_ydata()) == [-2.0, 3.0]
    assert "R² 0.90 (labels 0.30)" in fig.axes[0].get_title()


def test_blocks_of_features_lie_below_each_other_on_one_scale():
    features = np.arange(2 * 3 * 4.0).reshape(2, 3, 4) / 100
    fig = pair_figures.draw_features(features, ("u", "v", "u * v"), ("same", "another"))
    shown = fig.axes[1].images[0]
    np.testing.assert_allclose(shown.get_array(), features[:, 1])
    assert [axis.get_ylabel() for axis in fig.axes[:3]] == ["u", "v", "u * v"]
    assert {axis.images[0].get_clim() for axis in fig.axes[:3]} == {(-0.5, 0.5)}
