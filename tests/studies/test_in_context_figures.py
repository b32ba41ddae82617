"""The figures of in-context regression show what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from reattend.studies.in_context import FlowFit
from reattend.studies.in_context_figures import (
    draw_by_size,
    draw_circuits,
    draw_flows,
    draw_kernels,
    draw_lengths,
    draw_paths,
    draw_preconditioners,
    draw_risk,
    head_titles,
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_circuits_fill_a_row_before_the_next_begins():
    models = [(torch.ones(h, 6, 6), torch.ones(h, 1, 6)) for h in (1, 2, 4, 8)]
    titles = [head_titles(h, a=torch.arange(h)) for h in (1, 2, 4, 8)]
    figure = draw_circuits(models, titles)
    assert len(figure.axes) == 4 * 8
    shown = [axis for axis in figure.axes if axis.axison]
    assert len(shown) == 2 * 15
    assert figure.axes[0].get_title() == "H = 1\na +0.00"
    assert not figure.axes[7].axison  # 1 + 2 + 4 heads leave one place


def test_circuits_hide_the_columns_of_empty_labels_and_scale_by_the_rest():
    kq = torch.ones(2, 8, 8)
    kq[..., -2:] = 50.0
    figure = draw_circuits([(kq, torch.ones(2, 2, 8))], [["a", "b"]], tasks=2)
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-1.0, 1.0)
    assert np.isnan(np.asarray(image.get_array().filled(np.nan))[:, -2:]).all()


def test_risk_shows_every_seed_the_mean_and_what_was_expected():
    risks = {"1 head": np.array([0.4, 0.5]), "ridge": np.array([0.1, 0.2])}
    axis = draw_risk(risks, ["1 head"], {"expected": {"1 head": 0.41}}).axes[0]
    drawn = [line.get_xdata().tolist() for line in axis.lines if len(line.get_xdata())]
    assert [0.4, 0.5] in drawn
    assert [0.45, 0.45] in drawn
    assert [0.41] in drawn


@pytest.mark.parametrize("split", [[True, True, False], [False, False, False]])
def test_paths_follow_the_head_that_ends_higher(split):
    steps = np.arange(0, 50, 10)
    grown = steps[:, None, None] * np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, 2.0]])
    paths = {"omega": grown, "mu": 3 * grown}
    axis = draw_paths(steps, paths, np.array(split), [(0.1, 3.0)]).axes[0]
    solid = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "-"]
    if split[0]:
        np.testing.assert_allclose(solid[0], steps)
        np.testing.assert_allclose(solid[1], -steps)
    else:
        assert not solid


@pytest.mark.parametrize("split", [[True, True, False], [False, False, False]])
def test_flows_show_best_median_and_worst_of_the_starts_that_split(split):
    time, omega = np.linspace(0, 2, 5), np.zeros((5, 3, 2))
    flows = [FlowFit(1, 2.0, quality, np.zeros((4, 2))) for quality in (0.2, 0.9, -3.0)]
    figure = draw_flows(time, omega, flows, np.array(split), (0.8, 0.5))
    best, worst = figure.axes[0].get_title(), figure.axes[2].get_title()
    assert best == "best: start 1, R² 0.90"
    assert worst == f"worst: start {0 if split[0] else 2}, R² {'0.20' if split[0] else '-3.00'}"


def test_lengths_preconditioners_and_kernels_are_drawn():
    curves = {"2 heads": np.ones((3, 4)), "ridge": np.full((3, 4), 0.5)}
    axis = draw_lengths([10, 20, 40], curves, 40).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [1, 1, 1]
    names = ("diagonal", "Kac-Murdock")
    figure = draw_preconditioners(
        dict.fromkeys(names, torch.eye(6)),
        dict.fromkeys(names, torch.arange(1.0, 6)),
        dict.fromkeys(names, torch.stack([torch.eye(6), 2 * torch.eye(6)])),
        dict.fromkeys(names, torch.ones(5)),
        np.array([True, False]),
    )
    assert [line.get_marker() for line in figure.axes[2].lines[:2]] == ["o", "x"]
    weights = draw_kernels(torch.linspace(-3, 3, 11), (0.5, -0.1), (0.13, 3.4)).axes[0].lines
    assert weights[0].get_ydata().sum() == pytest.approx(1, abs=1e-5)
    assert (np.diff(weights[0].get_ydata()) > 0).all()
    assert (np.diff(weights[1].get_ydata()) < 0).all()


def test_models_are_drawn_by_size_with_their_heads_in_order_of_omega():
    omega, mu = torch.tensor([0.3, 0.2, -0.1]), torch.tensor([1.0, 2.0, -3.0])
    kq = torch.zeros(3, 6, 6)
    kq[:, range(5), range(5)] = omega[:, None]
    ov = torch.zeros(3, 1, 6)
    ov[:, 0, -1] = mu
    figure = draw_by_size(kq, ov, {1: slice(0, 1), 2: slice(1, 3)}, dim=5)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [
        "H = 1\nω +0.30, μ +1.00",
        "H = 2\nω -0.10, μ -3.00",
        "H = 2\nω +0.20, μ +2.00",
    ]
    assert figure.axes[1].images[0].get_array()[0, 0] == pytest.approx(-0.1)
