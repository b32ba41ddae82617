"""The figures of active multi-task learning show what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from reattend.studies.active_tasks_figures import (
    draw_corruptions,
    draw_cost,
    draw_error,
    draw_example,
    draw_relatedness,
    draw_relevance,
    draw_separation,
    draw_targets,
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_example_writes_every_number_of_every_row():
    rows = {"heads": np.array([[0.5, -1.0], [0.25, 0.0]]), "samples": np.array([120, 30])}
    axes = draw_example(rows).axes
    assert [text.get_text() for text in axes[0].texts] == ["0.50", "-1.00", "0.25", "0.00"]
    assert [text.get_text() for text in axes[1].texts] == ["120", "30"]


def test_error_shows_repetitions_mean_and_law():
    runs = np.array([[1.0, 3.0], [0.5, 1.5]])
    figure = draw_error(
        {"blocks": {"L1": runs}}, {"blocks": {"L1": np.array([2.0, 1.0])}}, (10, 20)
    )
    lines = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert [2.0, 1.0] in lines
    assert lines[:2] == [[1.0, 0.5], [3.0, 1.5]]


@pytest.mark.parametrize("chosen", [0.1, None])
def test_relevance_shows_truth_mean_and_the_penalty_where_there_is_one(chosen):
    estimates = {"Lasso": torch.ones(4, 5), "L2": torch.full((4, 5), 0.5)}
    truths = {name: torch.arange(5.0) for name in estimates}
    figure = draw_relevance(
        estimates, truths, torch.tensor([1.0, 0.1]), torch.ones(2, 5), chosen, 2
    )
    left, right = figure.axes[0], figure.axes[2]
    assert left.lines[-1].get_ydata().tolist() == [0, 1, 2, 3, 4]
    assert left.lines[-2].get_ydata().tolist() == [1] * 5
    dashed = [line for line in right.lines if line.get_linestyle() == "--"]
    assert len(dashed) == (chosen is not None)


def test_cost_draws_both_predictions_and_the_geometric_mean():
    bars = {"linear": {"L1": (4000.0, 3000.0), "uniform": (8000.0, 8000.0)}}
    measured = {"linear": {"L1": np.array([1000.0, 4000.0]), "uniform": np.array([8000.0, 8000.0])}}
    axis = draw_cost(bars, measured).axes[0]
    assert [patch.get_height() for patch in axis.patches[:2]] == [4.0, 3.0]
    assert axis.lines[1].get_ydata()[0] == pytest.approx(2.0)


def test_targets_say_how_many_are_better():
    errors = {"ours": np.array([[1.0, 5.0]]), "other": np.array([[2.0, 4.0]])}
    axis = draw_targets(errors, "ours", ["other"], ["a", "b"]).axes[0]
    assert axis.get_title() == "ours better in 50 %"


def test_relatedness_scales_each_method_by_itself():
    by_kind = np.array([[np.nan, 60.0], [40.0, np.nan]])
    small = by_kind / 10
    shares = {"L1": (by_kind, np.array([[50.0, 50.0]])), "L2": (small, np.array([[5.0, 5.0]]))}
    axes = draw_relatedness(shares, ["x", "y"], ["p"], ["p", "q"]).axes
    assert axes[0].images[0].get_clim() == (0, 60)
    assert axes[2].images[0].get_clim() == (0, 6)
    assert [text.get_text() for text in axes[0].texts] == ["60", "40"]


def test_separation_is_that_of_the_closed_forms():
    line = draw_separation(100).axes[0].lines[0]
    assert line.get_ydata()[-1] == pytest.approx(100**2 / 199)


def test_corruptions_are_squares_under_their_names():
    pictures = [torch.arange(16.0) / 16, torch.zeros(16)]
    axes = draw_corruptions(pictures, ["none", "dark"]).axes
    assert [axis.get_title() for axis in axes] == ["none", "dark"]
    assert axes[0].images[0].get_array()[1].tolist() == [0.25, 0.3125, 0.375, 0.4375]
