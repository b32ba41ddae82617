"""Pictures of picture-text models: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from reattend.studies.image_text_figures import draw_gains, draw_training


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_training_shows_mean_losses_and_every_seed_at_each_mark():
    # Losses come in another order than recalls.
    losses = {"late": torch.ones(3, 4), "global": torch.tensor([[4.0, 2, 2, 2], [2.0, 2, 4, 4]])}
    recalls = {
        "global": np.array([[10.0, 20], [30, 60]]),
        "late": np.array([[1.0, 2], [2, 4], [6, 9]]),
    }
    left, right = draw_training(losses, recalls, (2, 4), every=2).axes
    first = left.lines[0]
    assert (first.get_label(), first.get_ydata().tolist()) == ("global", [2.5, 3.0])
    assert [bar.lines[0].get_ydata().tolist() for bar in right.containers] == [[20, 40], [3, 5]]
    dots = [line.get_ydata().tolist() for line in right.lines if line.get_marker() == "o"]
    assert dots == [[10, 20], [30, 60], [1, 2], [2, 4], [6, 9]]
    # Three seeds have an interval: t at two degrees of freedom, 4.303 standard errors.
    low, high = right.containers[1][2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(
        (low, high), 3 + np.array([-1, 1]) * 4.303 * 7**0.5 / 3**0.5, rtol=1e-3
    )
    # Arms stand apart at a mark.
    places = [bar.lines[0].get_xdata()[0] for bar in right.containers]
    assert places[0] < places[1]


def test_gains_lie_beside_the_reported_ones():
    gains = {
        "R@1": {"late": [1.0, 2.0, 6.0], "quarter": [-3.0, -1.0]},
        "NLL": {"late": [0.1, 0.2, 0.3], "quarter": [0.4, 0.5]},
    }
    first, second = draw_gains(gains, {"R@1": {"late": 5.5}}).axes
    crosses = [line for line in first.lines if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[5.5]]
    assert not [line for line in second.lines if line.get_marker() == "x"]
    shown = [line.get_xdata().tolist() for line in first.lines if line.get_marker() == "o"]
    assert [1.0, 2, 6] in shown
    assert [-3.0, -1] in shown
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["late", "quarter"]
