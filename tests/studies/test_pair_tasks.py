"""Arms of one seed see the same batches; accuracy is a percentage of right answers."""

import pytest
import torch
from torch import nn

from reattend.studies.pairs import accuracy, fit_on_drawn
from reattend.training.loop import TrainingPlan

PLAN = TrainingPlan(3, 0.01)


def seen(model, seed):
    """The batches that a model is trained on."""
    drawn = []

    def draw(generator):
        inputs = torch.randn(4, 2, generator=generator)
        drawn.append(inputs)
        return inputs, (inputs[:, 0] > 0).long()

    fit_on_drawn(model, draw, PLAN, seed)
    return torch.stack(drawn)


def test_batches_depend_on_the_seed_alone():
    one, other = seen(nn.Linear(2, 2), 0), seen(nn.Linear(2, 2, bias=False), 0)
    assert torch.equal(one, other)
    assert not torch.equal(one, seen(nn.Linear(2, 2), 1))


def test_a_line_is_learnt_and_scored_in_per_cent():
    model = nn.Linear(2, 2)

    def draw(generator):
        inputs = torch.randn(32, 2, generator=generator)
        return inputs, (inputs[:, 0] > 0).long()

    log = fit_on_drawn(model, draw, TrainingPlan(60, 0.1), 0)
    assert log.losses[-1] < log.losses[0] / 2
    assert accuracy(model, torch.tensor([[3.0, 0], [-3.0, 0]]), torch.tensor([1, 0])) == 100
    assert accuracy(
        model, torch.tensor([[3.0, 0], [-3.0, 0]]), torch.tensor([1, 1])
    ) == pytest.approx(50)
