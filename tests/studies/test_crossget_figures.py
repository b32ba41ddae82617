"""Figures of merged tokens: panels hold what they are given, in the order and at the place of each name."""

import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from reattend.studies.crossget_figures import (
    ARM_COLOURS,
    draw_arms,
    draw_costs,
    draw_matching,
    draw_merged,
    draw_qualities,
)
from reattend.vision_language.crossget import Merging


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def seeds(count=4, seed=0):
    return np.random.default_rng(seed).normal(70, 2, count)


def points(axis):
    """Every x drawn in a panel's lines and clouds of points."""
    lines = [np.ravel(line.get_xdata()) for line in axis.lines]
    clouds = [np.asarray(cloud.get_offsets())[:, 0] for cloud in axis.collections]
    return np.concatenate([np.asarray(x, dtype=float) for x in lines + clouds if len(x)])


def holds(axis, values):
    """Whether each of the values is an x of the panel."""
    near = np.isclose(points(axis)[:, None], np.asarray(values)[None], rtol=1e-6)
    return bool(near.any(0).all())


def test_pairs_stand_on_the_middles_of_their_patches():
    """[CLS] and 2 x 2 patches of 3 pixels: 1 (top left) goes into 4 (bottom right)."""
    similarity = torch.arange(25.0).view(5, 5)
    similarity[0], similarity[:, 0] = -math.inf, -math.inf
    similarity.fill_diagonal_(-math.inf)
    merging = Merging(torch.tensor([[1]]), torch.tensor([[0, 2, 3, 4]]), torch.tensor([[3]]))
    ranks = torch.tensor([4, 1, 0, 3, 2])
    figure = draw_matching(torch.rand(3, 6, 6), similarity, ranks, {"mine": merging})
    seen, picture = figure.axes[:2]
    shown = seen.images[0].get_array()
    # By rank: tokens 2, 1, 4, 3, 0; the first sees the second, nobody sees an earlier one or [CLS].
    assert shown[0, 1] == similarity[2, 1]
    assert shown[1, 2] == similarity[1, 4]
    assert shown.mask[1, 0]
    assert shown.mask[2, 2]
    assert shown.mask[:, 4].all()
    assert picture.get_title() == "mine"
    assert [list(x) for x in picture.lines[0].get_data()] == [[1, 4], [1, 4]]
    assert [list(x) for x in picture.lines[1].get_data()] == [[4], [4]]


def test_merged_patches_share_a_colour_and_importances_stand_in_their_rows():
    first, last = torch.rand(2, 4), torch.rand(2, 4)
    last[1, 2] = torch.nan
    groups = torch.tensor([[0, 1, 1, 2, 3], [0, 4, 2, 4, 2]])
    figure = draw_merged(torch.rand(2, 3, 4, 4), [first, last], groups, ["one", "two"])
    axes = np.array(figure.axes).reshape(4, 2)
    assert [axis.get_title() for axis in axes[0]] == ["one", "two"]
    for row, values in ((1, first), (2, last)):
        for column in range(2):
            shown = np.ma.filled(axes[row, column].images[0].get_array(), np.nan)
            np.testing.assert_allclose(shown, values[column].view(2, 2).numpy())
    one, two = (axis.images[0].get_array().reshape(4, -1) for axis in axes[3])
    assert (one[0] == one[1]).all()
    assert len(np.unique(one, axis=0)) == 3
    assert (two[0] == two[2]).all()
    assert (two[1] == two[3]).all()
    assert len(np.unique(two, axis=0)) == 2


def test_qualities_have_a_column_for_each_r():
    found = {
        name: {
            r: {
                "similarity": 1 - torch.rand(5).double() / (10 * r),
                "error": torch.rand(5).double() + r,
            }
            for r in (2, 3)
        }
        for name in ("CGSM", "greedy")
    }
    axes = np.array(draw_qualities(found).axes).reshape(2, 2)
    for column, r in enumerate((2, 3)):
        for name in found:
            away = 1 - found[name][r]["similarity"].numpy()
            assert holds(axes[0, column], [*away, away.mean()])
            assert holds(axes[1, column], found[name][r]["error"].numpy())
            assert not holds(axes[1, 1 - column], found[name][r]["error"].numpy())
    assert [t.get_text() for t in axes[0, 0].get_yticklabels()] == ["CGSM", "greedy"]
    assert [axis.get_title() for axis in axes[0]] == [
        "r = 2 in every block",
        "r = 3 in every block",
    ]


def test_arms_are_differences_from_zero_of_the_same_seeds():
    dense, text = seeds(), seeds(3, seed=1)
    arms = {"CGSM": seeds(seed=2), "dense": dense, "text": text}
    (axis,) = draw_arms({"R@1": {name: list(x) for name, x in arms.items()}}, "dense").axes
    for values in (arms["CGSM"] - dense, text - dense[:3]):
        assert holds(axis, [*values, values.mean()])
    assert [t.get_text() for t in axis.get_yticklabels()] == ["CGSM", "text"]
    assert axis.get_xlabel() == "R@1 minus that of dense"


def test_costs_stand_at_their_shares():
    plain = {"CGSM": ([1.0, 0.7], np.array([[0.0, -4.0], [0.0, -6.0]]))}
    tuned = {
        "CGSM": (0.69, [-1.0, -3.0]),
        "CrossGET": (0.7, [-2.0, -2.5]),
        "text": (1.01, [-7.0, -9.0]),
    }
    figure = draw_costs(tuned, plain, {"both": (0.52, -0.85)})
    before, after = figure.axes
    assert list(before.lines[0].get_xdata()) == [1.0, 0.7]
    assert before.lines[0].get_ydata().tolist() == [0, -5]
    found = {
        (line.get_marker(), round(float(y), 3)): float(x)
        for line in after.lines
        for x, y in zip(np.ravel(line.get_xdata()), np.ravel(line.get_ydata()), strict=True)
    }
    assert found["x", -0.85] == 0.52
    assert found["D", -2.0] == found[".", -3.0] == 0.69
    assert found["D", -2.25] == 0.7 + 0.012
    assert found["D", -8.0] == 1.01
    named = {text.get_text(): text.get_color() for text in after.texts}
    assert set(named) == {"text", "paper: both"}
    assert to_rgba(named["text"]) == to_rgba(ARM_COLOURS["CrossGET"])
    legend = [text.get_text() for text in after.get_legend().get_texts()]
    assert legend == ["CGSM", "CrossGET"]
    assert before.get_ylim() != after.get_ylim()
