"""The pictures of HAT's study show the numbers they are given."""

import numpy as np
import pandas as pd
import torch
from matplotlib.patches import Rectangle

from reattend.plots import BASELINE, COLOURS
from reattend.studies.hat_figures import (
    colour_of,
    draw_diffusion,
    draw_error_maps,
    draw_errors,
    draw_gain_maps,
    draw_reach,
)


def test_colours_tell_method_placebo_and_rivals_apart():
    found = [colour_of(arm) for arm in ("HAT", "+ CAB, blind", "RCAN", "SwinIR")]
    assert found == [COLOURS[0], COLOURS[1], COLOURS[2], BASELINE]


def test_reach_frames_pixel_and_source():
    eye = torch.eye(8, dtype=torch.bool)
    seen = {"plain window": eye, "shifted window": eye}
    plain, axis = draw_reach(seen, (4, 6), (2, 5), window=4).axes
    corners = [p.get_xy() for p in axis.patches if isinstance(p, Rectangle)]
    assert corners == [(5.5, 3.5), (4.5, 1.5)]
    assert "8 pixels" in axis.get_title()
    assert [line.get_ydata()[0] for line in axis.lines[::2]] == [1.5, 5.5]
    assert [line.get_ydata()[0] for line in plain.lines[::2]] == [-0.5, 3.5, 7.5]


def test_errors_stand_at_their_means():
    arms = {"SwinIR": torch.tensor([90.0, 92, 94]), "HAT": torch.tensor([1.0, 2, 3])}
    axis = draw_errors({"signs": arms, "gain": arms}, {"gain": {"best": 4.0}}).axes[0]
    diamonds = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D"]
    assert diamonds == [92, 2]


def test_errors_lie_inside_every_panel_and_arms_are_named_once():
    arms = {"SwinIR": torch.tensor([105.0, 110, 115]), "HAT": torch.tensor([1.0, 2, 3])}
    other = {"HAT": torch.tensor([1.0, 2, 3])}
    axes = draw_errors({"plain": arms, "neither": arms, "gain": other}, {}).axes
    names = [[label.get_text() for label in axis.get_yticklabels()] for axis in axes]
    assert names == [["SwinIR", "HAT"], ["", ""], ["HAT"]]
    for axis in axes:
        assert axis.get_xlim() == axes[0].get_xlim()
        assert axis.get_xlim()[0] == -4
        assert axis.get_xlim()[1] > 117  # as far as the interval
        assert axis.get_ylim()[0] > axis.get_ylim()[1]


def test_error_maps_hide_pixels_without_a_source():
    figure = draw_error_maps(dict.fromkeys("ab", torch.full((6, 6), 0.5)), window=4, distance=2)
    shown = figure.axes[0].images[0].get_array().filled(np.nan)
    assert np.isnan(shown[:2]).all()
    assert np.isnan(shown[:, :2]).all()
    assert (shown[2:, 2:] == 50).all()


def test_gain_maps_are_signed_roots():
    figure = draw_gain_maps(dict.fromkeys("ab", torch.tensor([[4.0, -9], [0, 1]])), window=2)
    shown = figure.axes[0].images[0].get_array()
    assert shown.tolist() == [[2, -3], [0, 1]]


def test_reported_indices_stand_beside_ours():
    reported = pd.DataFrame({"network": ["SwinIR", "HAT"], "index": [17.3, 26.7]})
    indices = {"SwinIR": np.array([5.0, 6, 7]), "HAT, untrained": np.array([1.0, 1, 1])}
    figure = draw_diffusion(indices, {"SwinIR": torch.tensor([40.0, 41, 42])}, reported)
    squares = [line.get_xdata()[0] for line in figure.axes[1].lines if line.get_marker() == "s"]
    assert squares == [17.3]
    assert sum(line.get_marker() == "D" for line in figure.axes[2].lines) == 1
