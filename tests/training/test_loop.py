"""The training loop, against optimisers stepped by hand."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.training.loop import (
    BestCheckpoint,
    TrainingDiverged,
    TrainingPlan,
    decay_matrices,
    train,
)


def linear(seed=0, outputs=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        yield x, x[:, :2] ** 2


def square_error(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def test_the_rate_rises_and_falls_along_a_cosine():
    plan = TrainingPlan(steps=12, learning_rate=0.5, warmup=2)
    rates = [plan.rate(step) for step in range(12)]
    assert rates[:3] == [0.25, 0.5, 0.5]
    assert rates[7] == pytest.approx(0.25)
    assert rates[11] == pytest.approx(0.25 * (1 + math.cos(0.9 * math.pi)))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.25, 0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.25, 0.5, 0.1 + 0.4 * 0.9, 0.1 + 0.4 * 0.5, 0.1 + 0.4 * 0.1]),
        ("cosine", [0.25, 0.5, *(0.1 + 0.2 * (1 + math.cos(math.pi * k / 10)) for k in (1, 5, 9))]),
    ],
)
def test_a_schedule_ends_at_its_floor(schedule, rates):
    plan = TrainingPlan(12, 0.5, warmup=2, schedule=schedule, floor=0.2)
    assert [plan.rate(step) for step in (0, 2, 3, 7, 11)] == pytest.approx(rates)


def test_groups_have_their_own_decay_and_rate():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tokens = nn.Embedding(3, 4)
            self.norm = nn.LayerNorm(4)
            self.map = nn.Linear(4, 2)
            self.tied = nn.Linear(4, 3, bias=False)
            self.tied.weight = self.tokens.weight

    model = Model()
    decayed, rest = decay_matrices(model)
    assert [id(p) for p in decayed["params"]] == [id(model.map.weight)]
    assert len(rest["params"]) == 4
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def groups(model):
        first, second = decay_matrices(model)
        return [first | {"rate": 0.5}, second]

    plan = TrainingPlan(1, 0.1, weight_decay=0.3, schedule="constant")
    still = lambda model, batch: 0 * sum(p.sum() for p in model.parameters())  # noqa: E731
    train(model, [None], still, plan, groups=groups)
    for name, p in model.named_parameters():
        share = 1 - 0.5 * 0.1 * 0.3 if name == "map.weight" else 1.0
        torch.testing.assert_close(p.detach(), share * before[name])


def test_the_fused_kernel_is_the_same_optimiser():
    plan = TrainingPlan(steps=9, learning_rate=0.03, weight_decay=0.2)
    models = [linear(1), linear(1)]
    for model, fused in zip(models, (None, True), strict=True):
        train(model, batches(1), square_error, dataclasses.replace(plan, fused=fused))
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_equals_adamw_by_hand(seed):
    plan = TrainingPlan(steps=9, learning_rate=0.03, weight_decay=0.2, warmup=3, clip=0.1)
    model, other = linear(seed), linear(seed)
    log = train(model, batches(seed), square_error, plan)

    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in other.parameters()]
    losses = []
    for step, batch in enumerate(itertools.islice(batches(seed), 9)):
        loss = square_error(other, batch)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        norm = sum((g**2).sum() for g in gradients).sqrt()
        scale = min(1.0, 0.1 / norm.item())
        with torch.no_grad():
            for parameter, gradient, (m, v) in zip(
                other.parameters(), gradients, moments, strict=True
            ):
                gradient = gradient * scale
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                parameter.mul_(1 - plan.rate(step) * 0.2)
                parameter.sub_(plan.rate(step) * m_hat / (v_hat.sqrt() + 1e-8))
    assert log.losses == pytest.approx(losses)
    for trained, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, atol=1e-5, rtol=1e-5)


def test_two_runs_are_identical():
    plan = TrainingPlan(steps=20, learning_rate=0.03)
    first, second = linear(), linear()
    assert train(first, batches(), square_error, plan).losses == (
        train(second, batches(), square_error, plan).losses
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_stopping_test_sees_an_evaluated_model_at_the_right_steps():
    asked = []

    def stop(model):
        asked.append(model.training)
        return len(asked) == 3

    model = linear()
    log = train(
        model,
        batches(),
        square_error,
        TrainingPlan(steps=100, learning_rate=0.01),
        stop=stop,
        check_every=4,
    )
    assert asked == [False] * 3
    assert log.steps == 12
    assert log.stopped_early
    assert not model.training


def test_progress_wraps_the_steps():
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    plan = TrainingPlan(steps=5, learning_rate=0.01)
    log = train(linear(), batches(), square_error, plan, progress=progress)
    assert seen == [0, 1, 2, 3, 4]
    assert not log.stopped_early


def test_a_broken_parameter_is_named():
    def poisoned():
        for step, batch in enumerate(batches()):
            if step == 3:
                with torch.no_grad():
                    model[2].weight[0, 0] = math.nan
            yield batch

    model = linear()
    with pytest.raises(TrainingDiverged, match=r"nan at step 3: parameter 2\.weight"):
        train(model, poisoned(), square_error, TrainingPlan(steps=9, learning_rate=0.01))


def test_the_first_broken_layer_is_named():
    class Square(nn.Module):
        def forward(self, x):
            return x * 1e200 * 1e200

    model = nn.Sequential(nn.Linear(3, 2), Square(), nn.Linear(2, 2)).double()
    with pytest.raises(TrainingDiverged, match="at step 0: output of 1 is not finite"):
        train(model, batches(), square_error, TrainingPlan(steps=9, learning_rate=0.01))


def test_a_broken_gradient_is_named():
    def root(model, batch):
        return (model(batch[0]) * 0).abs().sum().sqrt()  # 0, with an infinite slope

    with pytest.raises(TrainingDiverged, match=r"gradient is nan at step 0: .*2\.weight"):
        train(linear(), batches(), root, TrainingPlan(steps=9, learning_rate=0.01))


def test_too_few_batches_are_an_error():
    few = itertools.islice(batches(), 4)
    with pytest.raises(ValueError, match="ran out at step 4 of 9"):
        train(linear(), few, square_error, TrainingPlan(steps=9, learning_rate=0.01))


def test_the_best_checkpoint_is_kept_and_frozen_weights_are_left_alone():
    model = torch.nn.Linear(1, 1, bias=False)
    frozen = torch.nn.Linear(1, 1).requires_grad_(False)
    both = torch.nn.Sequential(model, frozen)
    scores = iter([0.2, 0.7, 0.7, 0.1])
    best = BestCheckpoint(lambda _: next(scores))
    with pytest.raises(ValueError, match="check at least once"):
        best.restore(both)
    for value in (1.0, 2.0, 3.0, 4.0):
        model.weight.data.fill_(value)
        frozen.weight.data.fill_(10 * value)
        assert best(both) is False
    best.restore(both)
    assert (best.best, model.weight.item(), frozen.weight.item()) == (0.7, 2.0, 40.0)
