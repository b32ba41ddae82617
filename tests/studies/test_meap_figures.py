"""Figures of the study of masked inputs: what is drawn where."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from reattend.studies.meap import SEGMENTS
from reattend.studies.meap_figures import (
    colour,
    draw_attention,
    draw_distance,
    draw_heads,
    draw_inputs,
    draw_steps,
)

ARMS = ("NTP", "MEAP", "Random tokens")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def scores(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return {arm: generator.uniform(0.1, 1.0, shape) for arm in ARMS}


def line(axis, label):
    (found,) = [drawn for drawn in axis.lines if drawn.get_label() == label]
    return found


def test_inputs_are_black_where_masked_and_numbered_by_their_targets():
    tokens = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
    masked = np.array([[False, True, False, False], [False, False, True, False]])
    figure = draw_inputs(tokens, {"one": masked, "none": np.zeros_like(masked)})
    first, second = figure.axes
    assert np.array_equal(np.ma.getmaskarray(first.images[0].get_array()), masked)
    assert not np.ma.getmaskarray(second.images[0].get_array()).any()
    assert [text.get_text() for text in first.texts] == ["2", "3", "4", "5", "7", "8", "9", "0"]


def test_steps_show_means_bounds_and_the_papers_accuracies():
    nats, accuracy = scores(3, 4), scores(3, 4, seed=1)
    reported = pd.DataFrame(
        {"tokens_billions": [40, 60], "ntp": [65.9, 52.8], "meap": [80.2, 85.8]}
    )
    figure = draw_steps([1, 2, 3, 4], nats, accuracy, (0.5, 0.25), reported)
    left, middle, right = figure.axes
    for arm in ARMS:
        assert line(left, arm).get_ydata() == pytest.approx(nats[arm].mean(0))
        assert line(middle, arm).get_ydata() == pytest.approx(100 * accuracy[arm].mean(0))
    assert line(left, "counts in the row").get_ydata()[0] == 0.5
    assert line(middle, "copying").get_ydata()[0] == 25
    assert line(right, "MEAP").get_ydata().tolist() == [80.2, 85.8]


def test_distances_are_named_by_their_bins():
    figure = draw_distance([1, 5, 9], {"early": scores(3, 2), "late": scores(3, 2)}, [0.2, 0.3])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1-4", "5-8"]
    assert [axis.get_title() for axis in figure.axes] == ["early", "late"]
    assert line(figure.axes[0], "counts in the row").get_ydata() == pytest.approx([0.2, 0.3])


def test_attention_bars_are_means_and_squares_are_the_papers():
    shares = scores(4, len(SEGMENTS))
    effects = {"decay": scores(4), "variance": scores(4, seed=1)}
    reported = {"NTP": {"answer": 0.094}, "MEAP": {"answer": 0.345}}
    reported["effects"] = {"decay": 0.5334, "variance": 0.078}
    left, right = draw_attention(shares, effects, reported).axes
    heights = [bar.get_height() for bar in left.patches]
    assert heights == pytest.approx(np.concatenate([shares[arm].mean(0) for arm in ARMS]))
    squares = [drawn.get_ydata()[0] for drawn in left.lines if drawn.get_marker() == "s"]
    assert squares == [0.094, 0.345]
    heights = [bar.get_height() for bar in right.patches]
    assert heights == pytest.approx([v.mean() for arms in effects.values() for v in arms.values()])
    assert [d.get_ydata()[0] for d in right.lines if d.get_marker() == "s"] == [0.5334, 0.078]


def test_heads_are_drawn_on_one_scale_with_the_answer_marked():
    maps = {arm: np.full((4, 4), 0.25) for arm in ARMS}
    figure = draw_heads(maps, (3, 1))
    for arm, axis in zip(ARMS, figure.axes, strict=False):
        assert axis.get_title() == arm
        assert axis.images[0].get_clim() == (0, 1)
        assert axis.images[0].get_array().max() == 0.5
        assert (axis.lines[0].get_xdata()[0], axis.lines[0].get_ydata()[0]) == (1, 3)


def test_arms_have_their_colours_and_others_share_one():
    assert len({colour(arm) for arm in ARMS}) == 3
    assert colour("MEAP .05") == colour("MEAP .30")
