"""Figures of the study of selective attention: what is drawn where."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from reattend.plots import BASELINE, COLOURS
from reattend.studies.selective_figures import (
    colour,
    draw_by_degree,
    draw_gains,
    draw_learning,
    draw_norms,
    draw_points,
    draw_spikiness,
    draw_temperatures,
    draw_transitions,
)
from reattend.studies.selective_tasks import draw_graphs, learn_graphs


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_method_baseline_and_placebo_have_their_colours():
    assert colour("SSA") == colour("value") == COLOURS[0]
    assert colour("vanilla") == colour("Softmax") == BASELINE
    assert len({colour("SSA"), colour("vanilla"), colour("permuted"), colour("Constant")}) == 4


def test_transitions_are_ordered_by_degree():
    degrees = torch.tensor([2, 1, 2, 1])
    target = torch.eye(4)
    figure = draw_transitions(target, {"SSA": torch.full((4, 4), 0.25)}, degrees)
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(shown, 0.5)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["P*", "SSA"]
    rows = torch.arange(16.0).view(4, 4) / 16
    first = draw_transitions(rows, {"SSA": rows}, degrees)
    np.testing.assert_allclose(first.axes[0].images[0].get_array()[0, 0], rows[1, 1] ** 0.5)


def test_graph_figures():
    graphs = draw_graphs((0, 1, 2), 8, 4, (1, 2))
    runs = {arm: learn_graphs(arm, graphs, 5, 0.01) for arm in ("vanilla", "SSA")}
    figure = draw_norms(runs, runs["vanilla"].final)
    assert len(figure.axes[0].lines) == 2 * (3 + 1)
    tau = {"SSA": torch.rand(3, 8, 1) + 0.5}
    figure = draw_by_degree(tau, tau, graphs.degrees)
    curve = figure.axes[0].lines[0].get_ydata()
    expected = [tau["SSA"][:, graphs.degrees == kind].mean().item() for kind in (1, 2)]
    np.testing.assert_allclose(curve, expected, rtol=1e-5)


def test_points_and_bounds():
    figure = draw_points(
        {"value": [1.0, 2.0, 3.0], "vanilla": [4.0, 5.0, 6.0]}, "x", {"Bayes": 0.5}
    )
    texts = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert texts == ["value", "vanilla"]
    assert figure.axes[0].get_legend().texts[0].get_text() == "Bayes: 0.50"


def test_gains_name_arm_and_corpus():
    figure = draw_gains({"SSA, text": [0.1, 0.2, 0.3], "q, k and v, text": [0.1]})
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "SSA, text",
        "q, k and v, text",
    ]
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert [line.get_color() for line in diamonds] == [colour("SSA"), colour("q, k and v")]
    np.testing.assert_allclose([line.get_xdata()[0] for line in diamonds], [0.2, 0.1])


def test_learning_shows_how_many_times_fewer_steps():
    slow = np.linspace(3, 1, 20) * np.ones((3, 1))
    losses = {"Softmax": slow, "SSA": slow - 0.25}
    figure = draw_learning(losses, {"SSA": np.log([0.5, 0.5, 0.5])}, 4, 1.45)
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), -0.25)
    speeds = figure.axes[1].lines[0].get_xdata()
    np.testing.assert_allclose(speeds, 2.0)


def test_spikiness_and_temperatures_draw_every_layer_and_part():
    figure = draw_spikiness({"SSA": np.random.default_rng(0).random((3, 2, 30)) + 0.1})
    assert len(figure.axes) == 2
    tau = {part: torch.rand(2, 6) + 0.5 for part in ("query", "value")}
    figure = draw_temperatures(tau, torch.eye(6), torch.eye(6))
    assert [axis.get_title() for axis in figure.axes[:2]] == [
        "tau of each query",
        "tau of each value",
    ]
