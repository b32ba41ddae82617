"""Figures of maps: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from reattend.studies import relevance_figures as figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_gallery_shows_pictures_and_outlines():
    picture, mask = torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 2:5] = True
    rows = [[("scene", picture, None), ("map", picture[0], mask)]] * 2
    figure = figures.gallery(rows)
    assert len(figure.axes) == 4
    assert [axis.get_title() for axis in figure.axes[:2]] == ["scene", "map"]
    assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)
    assert not figure.axes[0].collections
    assert figure.axes[1].collections


def test_curves_are_means_over_pictures():
    _, axis = plt.subplots()
    figures.draw_curves(axis, {"SR": np.array([[1.0, 0.8, 0.9], [0.2, 0.4, 0.3]])}, [0.0, 0.5])
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.9, 0.3])


def test_no_two_maps_look_alike_in_the_legend():
    _, axis = plt.subplots()
    curve = np.array([[1.0, 0.8, 0.9], [0.2, 0.4, 0.3]])
    figures.draw_curves(axis, dict.fromkeys(figures.LINES, curve), [0.0, 0.5])
    legend = axis.get_legend()
    looks = {
        (str(line.get_color()), str(line.get_markerfacecolor())) for line in legend.legend_handles
    }
    assert len(looks) == len(figures.LINES)
    assert legend.handlelength >= 4  # dashes can be told from a line


def test_differences_are_paired():
    _, axis = plt.subplots()
    areas = {"SR": np.array([1.0, 2.0, 3.0]), "blur": np.array([2.0, 3.0, 4.0])}
    figures.draw_differences(axis, areas, ["SR"], ["blur"])
    (segment,) = axis.containers[0][2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [-1.0, -1.0])  # every picture differs by the same


def test_groups_show_trainings_and_their_interval():
    _, axis = plt.subplots()
    figures.draw_groups(
        axis, {"both": np.array([0.0, 1.0, 2.0]), "only B": np.array([5.0, 5.0, 5.0])}
    )
    assert axis.lines[0].get_xdata().tolist() == [0.0, 1.0, 2.0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["both", "only B"]
    assert axis.yaxis_inverted()
    (segment,) = axis.containers[0][2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [1 - 4.303 / 3**0.5, 1 + 4.303 / 3**0.5], rtol=1e-3)


def test_rows_lead_with_their_panels_and_outline_the_brightest_share():
    maps = {"SR": torch.arange(50.0).view(2, 5, 5), "LRP": torch.zeros(2, 5, 5)}
    leading = [[("one", torch.zeros(3, 5, 5), None)], [("two", torch.ones(3, 5, 5), None)]]
    rows = figures.map_rows(leading, maps, ["SR"], outlined=0.2)
    assert [[panel[0] for panel in row] for row in rows] == [["one", "SR"], ["two", "SR"]]
    assert torch.equal(rows[1][1][1], maps["SR"][1])
    assert rows[1][1][2].sum() == 5
    assert rows[1][1][2][-1].all()
    assert figures.map_rows(leading, maps, ["LRP"])[0][1][2] is None


def test_an_outcome_row_draws_both_networks_first_scene():
    maps = {
        n: {m: torch.full((2, 3, 3), float(k)) for m in ("LRP", "SR")} for k, n in enumerate("AB")
    }
    guesses, outline = {"A": "fish", "B": "tool"}, torch.eye(3)
    row = figures.outcome_row("fish", torch.zeros(3, 3, 3), guesses, maps, outline)
    assert [panel[0] for panel in row] == [
        "fish",
        "LRP of A:\nfish",
        "SR of A:\nfish",
        "LRP of B:\ntool",
        "SR of B:\ntool",
    ]
    assert (row[3][1] == 1).all()
    assert row[0][2] is None
    assert row[4][2] is outline


def test_deletion_has_a_curve_a_map_and_a_gap_a_rival():
    curves = {name: np.array([[1.0, 0.9, 0.8], [0.5, 0.4, 0.3]]) for name in figures.LINES}
    areas = np.array([0.5, 0.6, 0.7])
    scores = {"SR": {"deletion": areas}, "SR, z+": {"deletion": areas}, "LRP": {"energy": areas}}
    scores |= {"random": {"deletion": areas + 0.2}}
    fig = figures.draw_deletion(curves, scores, [0.0, 0.5])
    assert len(fig.axes[0].lines) == len(figures.LINES)
    assert [label.get_text() for label in fig.axes[1].get_yticklabels()] == ["random"]
    (segment,) = fig.axes[1].containers[0][2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], -0.2)


def test_outcomes_draw_the_difference_of_both_maps():
    gaps = {
        (name, kind): np.array([[5.0, 1.0, 2.0, place], [5.0, 1.0, 2.0, place + 2]])
        for name in ("SR", "LRP")
        for place, kind in enumerate(figures.OUTCOMES)
    }
    axis = figures.draw_outcomes(gaps).axes[0]
    dots = [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "."]
    assert dots == 2 * [[place, place + 2] for place in range(4)]
