"""Figures of simplified attention: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from reattend.studies import deconstructing_figures as figures

REPORTED = pd.DataFrame(
    {"uniform": [38.1, 84.8], "hybrid": [np.nan, 39.3]}, index=["Standard", "RndEmbQK"]
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_arms_stand_where_they_lie_above_standard_and_beside_the_paper():
    nats = {
        "Standard": np.array([2.0, 2.1, 2.2]),
        "Half": np.array([2.1, 2.2, 2.3]),
        "RndEmbQK": np.array([2.5, 2.6, 2.7]),
        "RndEmbQK hybrid": np.array([2.3, 2.4, 2.5]),
    }
    left, right = figures.arms_figure(nats, REPORTED).axes
    means = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "D"]
    assert means == pytest.approx([0.1, 0.5, 0.3])
    assert [label.get_text() for label in left.get_yticklabels()] == list(nats)[1:]
    reported = {line.get_ydata()[0]: line.get_xdata()[0] for line in right.lines}
    assert reported == pytest.approx({1: np.log(84.8 / 38.1), 2: np.log(39.3 / 38.1)})


def test_learning_curves_are_means_over_seeds_and_steps():
    losses = {"MLP": np.stack([np.arange(48.0), np.arange(48.0) + 2])}
    gains = {"MLP": np.full((3, 16), 0.5)}
    contexts = pd.DataFrame({"context": [128, 256], "Standard": [69.9, 56.2]})
    figure = figures.learning_figure(losses, gains, contexts, bigram=2.4)
    left, middle, right = figure.axes
    assert left.lines[0].get_ydata()[:2] == pytest.approx([1.5, 3.5])
    assert left.lines[0].get_xdata()[:2] == pytest.approx([1, 3])
    assert middle.lines[0].get_ydata() == pytest.approx(np.full(8, 0.5))
    assert right.lines[0].get_ydata() == pytest.approx(np.log([69.9, 56.2]))


def test_maps_show_square_roots_in_a_column_each():
    maps = {"one": [np.full((3, 3), 0.25), np.eye(3)], "two": [np.eye(3), np.full((3, 3), -1.0)]}
    axes = np.array(figures.maps_figure(maps, ["first", "second"]).axes).reshape(2, 2)
    assert (axes[0, 0].images[0].get_array() == 0.5).all()
    assert (axes[1, 1].images[0].get_array() == 0).all()
    assert [axis.get_title() for axis in axes[0]] == ["one", "two"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["first", "second"]


def test_indicators_are_means_over_seeds_by_layer():
    rows = [
        {"arm": arm, "seed": seed, "layer": layer, "entropy": layer + seed, "sink": 0.1}
        for arm in ("Standard", "RndEmbQK hybrid")
        for seed in (0, 2)
        for layer in (1, 2)
    ]
    first, second = figures.indicators_figure(pd.DataFrame(rows)).axes
    assert first.get_title() == "entropy"
    assert first.lines[0].get_ydata() == pytest.approx([2, 3])
    assert second.lines[0].get_ydata() == pytest.approx([0.1, 0.1])


def test_skips_stand_beside_the_papers():
    lost = {
        "layers skipped": {"Standard": np.array([1.0, 2, 3]), "RndEmbQK hybrid": np.ones(3)},
        "mixers skipped": {"Standard": np.array([0.5, 0.5, 0.5]), "RndEmbQK hybrid": np.ones(3)},
    }
    figure = figures.skips_figure(lost, pd.Series({"RndEmbQK": 6.2}))
    first, second, paper = figure.axes
    means = [line.get_xdata()[0] for line in first.lines if line.get_marker() == "D"]
    assert means == pytest.approx([2, 1])
    assert second.get_title() == "mixers skipped"
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in paper.lines] == [(6.2, 1)]


def test_histograms_of_logits_are_shares_and_the_largest_are_drawn():
    histograms = {"Non-approximate": [np.array([0.5, 0.5, 2000.0]), np.array([1.0])]}
    largest = {"Non-approximate": np.array([[2000.0, 1.0], [1000.0, 3.0]])}
    shares, peaks = figures.logits_figure(histograms, largest).axes
    assert max(shares.lines[0].get_ydata()) == pytest.approx(2 / 3)
    assert sum(shares.lines[0].get_ydata()) == pytest.approx(1)
    assert peaks.lines[0].get_ydata() == pytest.approx([1500, 2])


def test_recall_draws_seeds_curves_and_the_papers_accuracy():
    once = {"Standard": np.array([0.5, 0.7, 0.9]), "another": np.array([2.0, 2.0, 2.0])}
    curves = {"Standard": np.array([[3.0, 2.0, 1.0]])}
    accuracy = pd.Series({"Standard": 22.9, "RndEmbQK": 1.3})
    figure = figures.recall_figure(once, curves, accuracy, {"counts": 1.0, "chance": 2.7})
    left, middle, right = figure.axes
    means = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "D"]
    assert means == pytest.approx([0.7, 2.0])
    assert middle.lines[0].get_ydata() == pytest.approx([3, 2, 1])
    assert [bar.get_width() for bar in right.patches] == [22.9]
