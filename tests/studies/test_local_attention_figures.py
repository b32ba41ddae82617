"""Figures of attention in blocks and regions: what stands where."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from reattend.plots import BASELINE, COLOURS
from reattend.studies import local_attention_figures as figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_window_lies_around_its_block():
    fig = figures.draw_windows(
        torch.rand(32, 32), torch.rand(8, 8), torch.rand(14, 14), (16, 8), torch.eye(64)
    )
    own, around = fig.axes[0].patches
    assert (own.get_xy(), own.get_width()) == ((7.5, 15.5), 8)
    assert (around.get_xy(), around.get_width()) == ((4.5, 12.5), 14)
    assert fig.axes[2].patches[0].get_xy() == (2.5, 2.5)
    assert fig.axes[3].get_xlabel() == "64 keys"


def test_layer_costs_draw_every_round_and_the_median():
    speed = {
        (name, side): [1.0, 2.0, 6.0] for name in ("blocks", "convolution") for side in (8, 16)
    }
    fig = figures.draw_layer_costs(speed, [8, 16], np.arange(1.0, 5).reshape(2, 2), [1, 2], [0, 1])
    median, rounds = fig.axes[0].lines[:2]
    assert median.get_ydata().tolist() == [2, 2]
    assert rounds.get_xdata().tolist() == [8, 8, 8]
    assert fig.axes[0].lines[3].get_color() == BASELINE


def test_halos_stand_at_their_size():
    scores = [np.array([70.0, 74.0]) + 5 * halo for halo in range(3)]
    others = {"per pixel": scores[2], "own pixels": scores[0]}
    fig = figures.draw_halos(scores, (2, scores[0]), 72.5, others, ["own pixels"])
    mean, *points, placebo, ceiling = fig.axes[0].lines
    assert mean.get_ydata() == pytest.approx([72, 77, 82])
    assert points[1].get_xdata().tolist() == [1, 1]
    assert placebo.get_xdata().tolist() == [2, 2]
    assert placebo.get_ydata().tolist() == [70, 74]
    assert ceiling.get_ydata()[0] == 72.5


def test_looks_mark_the_pair_by_row_and_column():
    fig = figures.draw_looks(torch.zeros(8, 8), {"b = 4": torch.rand(8, 8)}, [1, 6], [5, 2], 4)
    for axis in fig.axes:
        mark, partner = axis.lines[-2:]
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (6, 1)
        assert (partner.get_xdata()[0], partner.get_ydata()[0]) == (2, 5)


def test_routing_names_its_queries():
    routed = {"on the object": (5, [1, 2]), "off the object": (0, [3, 4])}
    fig = figures.draw_routing(torch.rand(3, 32, 32), torch.randn(16, 16), routed, 4)
    titles = [axis.get_title() for axis in fig.axes[:4]]
    assert titles == ["scene", "affinity of regions", "query on the object", "query off the object"]


def test_complexity_draws_counts_on_their_closed_form():
    tokens = np.array([64, 256])
    counted = {"routed": [10, 40], "S = 4": [12, 60], "full attention": [100, 1600]}
    by_side = {1: {1: 300, 2: 200}, 4: {2: 500, 4: 400}}
    fig = figures.draw_complexity(
        tokens,
        counted,
        dict.fromkeys(counted, 1.5),
        [9, 38],
        by_side,
        lambda side, topk: 100 * side * topk,
        {1: 2.0, 4: 3.0},
        1600,
    )
    bound = fig.axes[0].lines[3]
    assert bound.get_ydata().tolist() == [9, 38]
    closed_form, counts, best = fig.axes[1].lines[:3]
    assert closed_form.get_ydata()[-1] == pytest.approx(100 * 64)
    assert (counts.get_xdata().tolist(), counts.get_ydata().tolist()) == ([1, 2], [300, 200])
    assert best.get_xdata()[0] == 2


def test_routed_pairs_have_a_row_a_block():
    routed = [[(0, [1]), (2, [3])], [(1, [0]), (3, [2])], [(1, [2]), (3, [0])]]
    fig = figures.draw_routed_pairs(torch.rand(2, 3, 16, 16), routed, ["same", "different"], 4)
    assert len(fig.axes) == 6
    assert fig.axes[5].get_title() == "block 3, different"


def test_region_sizes_colour_what_they_are_told_to():
    scores = {"S = 4, k = 1": [70.0, 72.0], "S = 4, k = 16": [90.0, 91.0]}
    fig = figures.draw_region_sizes(scores, {"S = 4, k = 16": BASELINE})
    labels = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert labels == list(scores)
    first, _, second, _ = fig.axes[0].lines  # points and mean, arm by arm
    assert (first.get_color(), second.get_color()) == (COLOURS[0], BASELINE)
    assert second.get_xdata().tolist() == [90, 91]


def test_patterns_stand_against_chance():
    scores = {"routed": [90.0, 92.0], "windows": [55.0, 57.0], "full": [99.0, 98.0]}
    axis = figures.draw_patterns(scores).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == list(scores)
    points = axis.lines[:6:2]
    assert [line.get_color() for line in points] == [COLOURS[0], COLOURS[1], BASELINE]
    assert list(axis.lines[-1].get_xdata()) == [50, 50]
