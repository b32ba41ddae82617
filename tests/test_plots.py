"""Figures are written small, the same bytes for the same picture."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from reattend.plots import (
    MAX_BYTES,
    arm_points,
    mean_curve,
    mean_point,
    number_grid,
    save_png,
    show_regions,
)


def drawn(scale=1.0):
    figure, axes = plt.subplots()
    axes.plot([0, scale], label="line")
    axes.legend()
    return figure


def test_same_picture_same_bytes(tmp_path):
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_png(drawn(scale), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def photograph(size):
    noise = np.random.default_rng(0).random((size, size, 3))
    figure, axes = plt.subplots()
    axes.imshow(noise)
    return figure


def test_large_pictures_are_reduced_or_refused(tmp_path):
    save_png(photograph(60), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size <= MAX_BYTES
    with pytest.raises(ValueError, match=r"b\.png takes \d+ kB, more than 150 kB"):
        save_png(photograph(400), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_arm_points_draw_every_seed_and_the_mean_from_the_top():
    _, axis = plt.subplots()
    arm_points(axis, {"one": [1.0, 3.0], "two": [5.0]}, {"two": "red"})
    drawn = [line.get_xydata().tolist() for line in axis.lines]
    assert drawn == [[[1, 0], [3, 0]], [[2, 0]], [[5, 1]], [[5, 1]]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["one", "two"]
    assert axis.yaxis_inverted()
    plt.close("all")


def test_number_grid_writes_rows_down_and_columns_across():
    _, axis = plt.subplots()
    number_grid(axis, np.array([[1.0, 2.0], [3.0, 40.0]]), ["a", "b"], [5, 6])
    written = {text.get_position(): text.get_text() for text in axis.texts}
    assert written == {(0, 0): "1", (1, 0): "2", (0, 1): "3", (1, 1): "40"}
    assert axis.texts[-1].get_color() == "white"
    plt.close("all")


def test_regions_that_are_seen_stay_bright_and_are_framed_in_their_places():
    _, axis = plt.subplots()
    show_regions(axis, np.full((1, 8, 8), 255, np.uint8), [1, 6], 6, 4)
    shown = axis.images[0].get_array()
    assert shown.shape == (8, 8, 3)
    assert [shown[0, 2, 0], shown[2, 4, 2], shown[0, 0, 0]] == [1, 1, pytest.approx(0.4)]
    corners = [patch.get_xy() for patch in axis.patches]
    assert corners == [(1.5, -0.5), (3.5, 1.5), (3.5, 1.5)]
    plt.close("all")


def test_a_mean_point_lies_in_its_interval_and_two_points_have_none():
    values = [1.0, 2.0, 6.0]
    _, axis = plt.subplots()
    mean_point(axis, values, 3, "black", "arm")
    points, interval, centre = axis.lines
    assert points.get_xdata().tolist() == values
    half = (
        4.302652729911275 * np.std(values, ddof=1) / np.sqrt(3)
    )  # Student t, 2 degrees of freedom
    np.testing.assert_allclose(interval.get_xdata(), [3 - half, 3 + half])
    assert (centre.get_xdata()[0], centre.get_ydata()[0], centre.get_label()) == (3.0, 3, "arm")
    _, axis = plt.subplots()
    mean_point(axis, values[:2], 0, "black")
    assert len(axis.lines) == 2


def test_a_mean_curve_joins_the_means_of_its_columns():
    values = np.random.default_rng(0).normal(size=(4, 3))
    _, axis = plt.subplots()
    mean_curve(axis, [1, 2, 4], values, "black")
    np.testing.assert_allclose(axis.lines[0].get_ydata(), values.mean(0))
    assert len(axis.collections) == 1
