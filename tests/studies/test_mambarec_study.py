"""What MambaRec's study reads off its arms, and its pictures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from reattend.backbones.trained.mambarec import FIRST_SEED, MEASURES
from reattend.studies.mambarec import (
    by_seed,
    chosen_scores,
    gains,
    later_gain,
    mean_and_spread,
    selection_effect,
    shared_plane,
)
from reattend.studies.mambarec_figures import (
    draw_attention,
    draw_clouds,
    draw_curves,
    draw_gains,
    draw_grid,
)


def curve(validation, test):
    """[checks, seeds, measures] with Recall@20 on validation and test as given, [checks, seeds]."""
    found = torch.zeros(*np.shape(validation), len(MEASURES), dtype=torch.float64)
    validation, test = (torch.tensor(v, dtype=torch.float64) for v in (validation, test))
    found[..., MEASURES.index("validation R@20")] = validation
    found[..., MEASURES.index("R@20")] = test
    found[..., MEASURES.index("N@20")] = test / 2
    return found


CURVES = {
    "MGCN": curve([[0.0, 0.0], [0.2, 0.3], [0.1, 0.3]], [[0.0, 0.0], [0.4, 0.6], [0.9, 0.1]]),
    "other": curve([[0.9, 0.9], [0.1, 0.2], [0.3, 0.1]], [[0.0, 0.0], [0.3, 0.9], [0.3, 0.7]]),
}


def test_scores_are_those_of_the_check_that_validation_chose_for_the_arm():
    scores = chosen_scores(CURVES)
    assert scores["check"].tolist() == [1, 1, 2, 2]
    assert scores["last"].tolist() == [False, False, True, True]
    assert scores["R@20"].tolist() == [0.4, 0.6, 0.3, 0.7]


def test_gains_are_paired_and_in_percent_of_the_reference():
    table = by_seed(chosen_scores(CURVES), "R@20")
    assert gains(table, "other", "MGCN").tolist() == pytest.approx([-20, 20])
    assert table.index.tolist() == [FIRST_SEED, FIRST_SEED + 1]
    table.loc[FIRST_SEED + 1, "other"] = np.nan
    assert gains(table, "other", "MGCN").tolist() == pytest.approx([-20])


def test_what_choosing_on_test_adds():
    found = selection_effect(CURVES)
    assert found["by validation"].tolist() == ["other", "MGCN"]
    assert found["by test"].tolist() == ["MGCN", "other"]
    assert found["gain, %"].tolist() == pytest.approx([100 / 3, 100 / 6])


def test_what_twice_the_steps_bring():
    recall = [[9.0, 9.0], [0.2, 0.4], [0.5, 0.3], [0.1, 0.1], [0.6, 0.4]]
    assert later_gain(curve(recall, np.zeros((5, 2)))) == pytest.approx(25)
    assert later_gain(curve(recall[:4], np.zeros((4, 2)))) == pytest.approx(100 / 3)


def test_means_and_spreads():
    found = mean_and_spread(chosen_scores(CURVES), {"other": "shown so"})
    assert found.model.tolist() == ["shown so"]
    assert found["R@20"][0] == "0.5000 ± 0.2828"


@pytest.mark.parametrize("seed", range(3))
def test_the_plane_holds_most_of_the_variance_and_keeps_length(seed):
    generator = torch.Generator().manual_seed(seed)
    parts = {n: torch.randn(9, 2, generator=generator).abs() for n in ("a", "b")}
    found = shared_plane({n: 3 * t for n, t in parts.items()})
    unit = {n: t / t.norm(dim=1, keepdim=True) for n, t in parts.items()}
    before = torch.cdist(unit["a"], unit["b"]).numpy()
    after = np.linalg.norm(found["a"][:, None] - found["b"][None], axis=2)
    np.testing.assert_allclose(after, before, atol=1e-6)
    spread = np.concatenate(list(found.values())).std(0)
    assert spread[0] >= spread[1]


def test_pictures():
    hidden = torch.rand(4, 6)
    gates = {n: torch.rand(4, 1) for n in ("channel", "spatial")}
    assert len(draw_attention(hidden, hidden * 2, gates).axes) == 7
    axis = draw_gains({"a": [1.0, 2.0, 4.0], "b": [0.0, 1.0, 3.0]}, 0.5, {"a": [5.0]}).axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["a", "b"]
    axis = draw_curves({"a": torch.rand(3, 4), "b": torch.rand(5, 3)}, 5, {"level": 0.1}).axes[0]
    assert axis.get_xlabel() == "epochs"
    frame = pd.DataFrame([[0.1, 0.2]], index=[0.1], columns=[1.0, 2.0])
    axes = draw_grid(frame, 2 * frame).axes
    assert [t.get_text() for t in axes[1].texts] == ["0.2000", "0.4000"]
    assert len(draw_clouds({"p": {n: torch.rand(5, 3) for n in ("x", "y")}}).axes) == 1
    plt.close("all")
