"""Peak memory is the largest sum of what is alive, in bytes, and nothing else."""

import pytest
import torch
from torch import nn

from reattend.studies.costs import PeakMemory, backward_pass, peak_megabytes


def test_what_is_alive_at_one_time_is_summed():
    with PeakMemory() as memory:
        first = torch.ones(1_000)  # 4 kB
        second = first.double()  # 8 kB
        del first
        third = torch.ones(500)  # 2 kB
        del second, third
    assert memory.peak == 12_000
    assert memory.now == 0


def test_views_and_given_tensors_take_nothing():
    given = torch.ones(1_000)
    assert peak_megabytes(lambda: given.view(10, 100).mT.add_(1)) == 0
    assert peak_megabytes(lambda: given + 1) == pytest.approx(0.004)


def test_a_backward_pass_leaves_the_gradients_of_one_run():
    layer = nn.Linear(3, 2, bias=False)
    x = torch.ones(5, 3)
    run = backward_pass(layer, x)
    run()
    run()
    assert torch.equal(layer.weight.grad, torch.full((2, 3), 5.0))
