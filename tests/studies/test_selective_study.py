"""What is asked of models with temperatures: speed at equal loss, and how widely rows read."""

import numpy as np
import pytest
import torch

from reattend.backbones.trained.selective_attention import Shape, untrained
from reattend.studies.selective_attention import (
    dilution,
    log_step_ratio,
    smoothed,
    spikiness_by_place,
)

SMALL = Shape(12, 24, 16, 2, 2, shift=True)


def test_smoothing_averages_the_last_steps():
    found = smoothed(np.array([[1.0, 2.0, 6.0, 0.0]]), 2)
    np.testing.assert_allclose(found, [[1.5, 4.0, 3.0]])


@pytest.mark.parametrize("window", [1, 5])
def test_an_arm_that_is_twice_as_fast_has_half_the_steps(window):
    steps = np.arange(1, 401.0)
    slow = np.stack([10 - 0.01 * steps, 5 - 0.01 * steps])
    fast = np.stack([10 - 0.02 * steps, 5 - 0.02 * steps])
    found = log_step_ratio(fast, slow, window)
    np.testing.assert_allclose(found, np.log(0.5), atol=0.02)
    np.testing.assert_allclose(log_step_ratio(slow, fast, window), -found)
    np.testing.assert_allclose(log_step_ratio(slow, slow, window), 0.0)


def test_dilution_is_zero_for_even_reading_and_minus_one_for_few_tokens():
    places = np.arange(1, 65)
    assert dilution(np.ones((2, 64))) == pytest.approx(0.0)
    assert dilution(np.stack([3 / places, 3 / places])) == pytest.approx(-1.0)
    assert dilution(np.stack([np.ones(64), 1 / places])) == pytest.approx(-0.5)
    outside = np.ones((1, 64))
    outside[0, 0] = 1e6
    assert dilution(outside) == pytest.approx(0.0)


def test_even_attention_reads_all_that_it_sees():
    model = untrained("Softmax", SMALL, 0)
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.mixer.project.weight)
    found = spikiness_by_place(model, torch.randint(12, (3, 24)))
    np.testing.assert_allclose(found, np.ones((2, 24)), rtol=1e-5)


def test_spikiness_is_that_of_the_maps_that_the_model_uses():
    model = untrained("SSA", SMALL, 1).eval()
    rows = torch.randint(12, (2, 24), generator=torch.Generator().manual_seed(0))
    plain = spikiness_by_place(model, rows)
    for block in model.blocks:
        torch.nn.init.constant_(block.mixer.mixer.temperatures["query"].strength, 50.0)
    sharper = spikiness_by_place(model, rows)
    assert plain.shape == (2, 24)
    assert (sharper[:, 1:] < plain[:, 1:]).all()
    assert not model.blocks[0].mixer.mixer._forward_pre_hooks
