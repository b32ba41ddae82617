"""The shared figures draw every probe, and the front."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from reattend.studies.probing_figures import (
    draw_curves,
    draw_maps,
    draw_panels,
    draw_pareto,
    draw_probe_costs,
    draw_queries,
)


def test_pareto_figure_names_every_probe():
    rows = [("LP-GAP", 1e3, 60.0), ("EP_8", 2e4, 66.0), ("EP_8/2", 1e4, 66.1), ("MHCA", 6e4, 65.0)]
    fig, ax = plt.subplots()
    draw_pareto(ax, pd.DataFrame(rows, columns=["probe", "parameters", "test"]), ["EP_8", "EP_8/2"])
    labels = {text.get_text(): text.xyann for text in ax.texts}
    assert set(labels) == {row[0] for row in rows}
    assert abs(labels["EP_8"][1] - labels["EP_8/2"][1]) > 0.2  # pushed apart
    front = ax.lines[0].get_xydata()
    assert front[-1].tolist() == [1e4, 66.1]
    plt.close(fig)


@pytest.mark.parametrize("heights", [(58.5, 59.4), (59.4, 58.5)])
def test_labels_of_both_linear_probes_lie_on_their_own_sides(heights):
    rows = [("LP-cls", 1e3, heights[0]), ("LP-GAP", 1e3, heights[1]), ("EP_8", 2e4, 66.0)]
    fig, ax = plt.subplots()
    draw_pareto(ax, pd.DataFrame(rows, columns=["probe", "parameters", "test"]), ["EP_8"])
    offset = {text.get_text(): text.xyann[1] for text in ax.texts}
    higher, lower = ("LP-cls", "LP-GAP") if heights[0] > heights[1] else ("LP-GAP", "LP-cls")
    assert offset[higher] > 0 > offset[lower]
    plt.close(fig)


def test_curves_show_mean_and_range_over_seeds():
    fig, ax = plt.subplots()
    draw_curves(ax, {"EP_8": {2: np.array([1.0, 3.0]), 1: np.array([0.0, 2.0, 4.0])}})
    assert ax.lines[0].get_xydata().tolist() == [[1.0, 2.0], [2.0, 2.0]]
    assert [bar[:, 1].tolist() for bar in ax.collections[0].get_segments()] == [[0, 4], [1, 3]]
    plt.close(fig)


def test_queries_show_folds_their_mean_and_other_probes():
    points = np.array([[60.0, 62.0], [66.0, 70.0]])
    fig = draw_queries([1, 8], {"ViT": (points, {"MHCA": 71.0}), "MAE": (points, {"MHCA": 50.0})})
    mean, *folds, level = fig.axes[0].lines
    assert mean.get_ydata().tolist() == [61, 68]
    assert [line.get_ydata().tolist() for line in folds] == [[60, 66], [62, 70]]
    assert level.get_ydata()[0] == 71
    assert [axis.get_title() for axis in fig.axes] == ["ViT", "MAE"]
    plt.close(fig)


def test_costs_are_counted_left_and_timed_right():
    names = ("EP", "EP, pooling first", "MHCA")
    macs = {name: [1.0 + n, 2.0] for n, name in enumerate(names)}
    times = {name: [5.0 + n, 9.0] for n, name in enumerate(names)}
    fig = draw_probe_costs([1, 4], macs, times, "one picture")
    assert [line.get_ydata()[0] for line in fig.axes[0].lines] == [1, 2, 3]
    assert [line.get_ydata()[0] for line in fig.axes[1].lines] == [5, 6, 7]
    assert "million" in fig.axes[0].get_ylabel()
    plt.close(fig)


def test_maps_stand_beside_their_picture():
    maps = torch.arange(2 * 3 * 16.0).view(2, 3, 16)
    fig = draw_maps(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), maps)
    images = [axis.images[0].get_array() for axis in fig.axes]
    assert len(images) == 8
    assert images[5].tolist() == maps[1, 0].view(4, 4).tolist()
    assert [axis.get_title() for axis in fig.axes[:4]] == [
        "picture",
        "query 1",
        "query 2",
        "query 3",
    ]
    plt.close(fig)


def test_panels_name_shares_in_per_cent():
    curves = {"EP_8": {0.1: np.array([40.0, 44.0]), 1.0: np.array([60.0, 60.0])}}
    fig = draw_panels({"ViT": curves, "MAE": curves}, "share of labels", shares=True)
    labels = [text.get_text() for text in fig.axes[0].get_xticklabels()]
    assert labels == ["10 %", "100 %"]
    assert fig.axes[1].lines[0].get_ydata() == pytest.approx([42, 60])
    plt.close(fig)
