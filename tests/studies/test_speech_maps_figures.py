"""Pictures of the study of speech maps: what is drawn is what was measured."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from reattend.data.spoken_prompts import Prompt
from reattend.studies import speech_maps_figures as figures
from reattend.studies.speech_maps import Heard, Joined


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_masks_show_the_filling_where_cells_are_gone():
    picture, mask = np.random.default_rng(0).random((6, 9)), np.ones((9, 6), bool)
    mask[2:4, 1] = False
    drawn = figures.draw_masks(picture, [mask], 0.25).axes[1].images[0].get_array()
    assert drawn[1, 2] == drawn[1, 3] == 0.25
    assert np.array_equal(np.delete(drawn, 1, 0), np.delete(picture, 1, 0))


def test_heads_carry_their_numbers_and_the_layers_mean_map():
    rho = {"SM^X": np.arange(6.0).reshape(2, 3) / 10}
    drawn = figures.draw_heads(rho, {"SM^X": np.array([0.7, 0.8])}, {"SM^X": 0.9}).axes[0]
    texts = [text.get_text() for text in drawn.texts]
    assert texts == ["0.00", "0.10", "0.20", "0.70", "0.30", "0.40", "0.50", "0.80"]
    assert "0.90" in drawn.get_title()


def test_correlations_show_the_papers_range():
    points = {"SM^H": {"CA": np.array([0.2, 0.4, 0.6]), "diagonal": np.array([0.1, 0.1, 0.2])}}
    axis = figures.draw_correlations(points, {"SM^H": (0.52, 0.75)}).axes[0]
    assert "paper, CA: 0.52 to 0.75" in axis.get_title()
    means = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D"]
    assert means == pytest.approx([0.4, 0.4 / 3])


def test_deletion_shows_mean_curves_areas_and_the_papers_area():
    curves = {"CA": np.array([[0.0, 50, 100], [0, 100, 100], [0, 90, 100]])}
    left, right = figures.draw_deletion(curves, [0.0, 0.5, 1.0], {"CA": 41.2}).axes
    assert left.lines[0].get_ydata() == pytest.approx([0, 80, 100])
    means = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "D"]
    assert means == pytest.approx([65.0])
    squares = [line.get_xdata() for line in right.lines if line.get_marker() == "s"]
    assert [float(np.ravel(x)[0]) for x in squares if np.size(x)] == [41.2]


def test_the_legend_of_the_areas_lies_above_the_axes():
    """Inside, its square looked like an area of the paper's."""
    curves = {
        name: np.array([[0.0, 50, 100], [0, 90, 100], [0, 80, 100]]) for name in ("CA", "SM^X")
    }
    figure = figures.draw_deletion(curves, [0.0, 0.5, 1.0], {"CA": 41.2})
    figure.canvas.draw()
    right = figure.axes[1]
    assert right.get_legend().get_window_extent().y0 >= right.get_window_extent().y1 - 1


def test_boundaries_show_silences_starts_and_errors():
    prompt = Prompt("p", "a b", np.zeros(1, np.float32))
    one = Heard(Joined(prompt, [(0.2, 0.3)]), ["a", "b"], torch.rand(2, 3, 2, 30), [1])
    errors = {size: {"CA": np.array([10.0, 20, 60]), "borrowed": np.ones(3)} for size in ("s", "t")}
    shown, *points = figures.draw_boundaries(one, [0, 12], errors).axes
    edges = [line.get_xdata()[0] for line in shown.lines if line.get_linestyle() == "--"]
    assert edges == pytest.approx([200, 300])
    starts = [line.get_xdata()[0] for line in shown.lines if line.get_linestyle() == "-"]
    assert starts == [0, 240]
    assert [axis.get_title() for axis in points] == ["Whisper s", "Whisper t"]
    means = [line.get_xdata()[0] for line in points[0].lines if line.get_marker() == "D"]
    assert means == pytest.approx([30, 1])


def test_growth_draws_reliability_raw_and_corrected():
    values = np.array([[0.2, 0.5], [0.4, 0.7], [0.3, 0.9]])
    figure = figures.draw_growth({"SM^X": ([8, 16], values, values / 2, values / 3)})
    lines = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    assert lines[0] == pytest.approx(values.mean(0))
