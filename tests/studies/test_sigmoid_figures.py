"""Figures of the study of sigmoid attention: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from reattend.studies import sigmoid_figures as figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_smoothing_is_a_moving_mean():
    curve = np.arange(10.0) ** 2
    found = figures.smooth(curve, 4)
    assert found.tolist() == [curve[i : i + 4].mean() for i in range(7)]
    assert figures.smooth(curve, 99).tolist() == [curve.mean()]


def test_weights_are_cropped_but_their_sums_are_whole():
    weights = np.full((6, 6), 0.5)
    figure = figures.draw_weights({"half": weights, "other": weights}, shown=2)
    axis = figure.axes[0]
    assert axis.images[0].get_array().shape == (2, 2)
    assert axis.get_title() == "half: row sums 3"


def test_curves_lie_in_the_panel_of_their_positions():
    runs = {
        "softmax, RoPE": [[1.0] * 30, [3.0] * 30],
        "sigmoid, ALiBi": [[2.0] * 30],
        "mean": [[4.0] * 30],
    }
    rope, alibi = figures.draw_training(runs, "loss", "linear").axes
    drawn = [
        {line.get_label(): line.get_ydata()[0] for line in axis.lines} for axis in (rope, alibi)
    ]
    assert drawn == [
        {"softmax": 2.0, "mean of the values": 4.0},
        {"sigmoid, b = -log n": 2.0, "mean of the values": 4.0},
    ]


def test_parity_shows_every_seed_and_its_interval():
    _, axis = plt.subplots()
    figures.draw_parity(axis, {"news": np.array([0.0, 1.0, 2.0])}, 1.5)
    dots, bars = axis.lines[0], axis.containers[0]
    assert dots.get_xdata().tolist() == [0.0, 1.0, 2.0]
    (segment,) = bars[2][0].get_segments()
    # t at two degrees of freedom: 4.303 standard errors, here 1 / sqrt(3).
    np.testing.assert_allclose(segment[:, 0], [1 - 4.303 / 3**0.5, 1 + 4.303 / 3**0.5], rtol=1e-3)


def test_times_are_ratios_beside_the_reported_ones():
    seconds = {128: np.array([[2.0, 4.0, 3.0], [1.0, 1.0, 1.0]]), 256: np.ones((2, 3))}
    axis = figures.draw_times(seconds, {"full": 17.4, "causal": 18.8}).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert list(lines["here, unfused, median"]) == [3.0, 1.0]
    assert lines["paper, fused on an H100, full"][0] == pytest.approx(1.174)
