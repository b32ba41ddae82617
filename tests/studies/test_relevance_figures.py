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
