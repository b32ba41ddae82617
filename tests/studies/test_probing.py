"""The protocol by which probes are trained and compared."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from reattend.studies.probing import (
    ProbePlan,
    batches,
    few_labels,
    hits,
    nearest_neighbours,
    pareto_front,
    study,
    train_probes,
)
from reattend.vision.efficient_probing import EfficientProbing, MeanPooling, Probe

PLAN = ProbePlan(classes=3, steps=40, batch=16, rates=[0.0001, 0.01], seeds=2)


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in which one token, marked by channel 0, carries the class in channels 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 9, 8, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    place = torch.randint(9, (count,), generator=generator)
    tokens[torch.arange(count), place, 0] = 6.0
    tokens[torch.arange(count), place, 1 + labels] += 3.0
    return tokens, labels


def sides() -> tuple[dict, dict]:
    made = {name: data(n, n) for name, n in (("train", 150), ("validation", 60), ("test", 90))}
    return {n: d[0] for n, d in made.items()}, {n: d[1] for n, d in made.items()}


def test_a_stack_of_rates_is_the_same_as_each_rate_alone():
    tokens, labels = data(50, 0)
    make = partial(EfficientProbing, 8, 2)
    together = train_probes(make, [0.001, 0.02], tokens, labels, PLAN, seed=3)
    for rate, probe in zip([0.001, 0.02], together, strict=True):
        (alone,) = train_probes(make, [rate], tokens, labels, PLAN, seed=3)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(probe.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_training_equals_a_plain_loop():
    tokens, labels = data(50, 0)
    (probe,) = train_probes(partial(MeanPooling, 8), [0.02], tokens, labels, PLAN, seed=1)
    torch.manual_seed(1)
    plain = Probe(MeanPooling(8), 3).train()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.0)
    order = batches(50, PLAN.batch, 1)
    for step in range(PLAN.steps):
        ramp = PLAN.steps // 10
        fall = 0.5 + 0.5 * np.cos(np.pi * max(0, step - ramp) / (PLAN.steps - ramp))
        optimiser.param_groups[0]["lr"] = 0.02 * min((step + 1) / ramp, fall)
        part = next(order)
        loss = functional.cross_entropy(plain(tokens[part]), labels[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(probe.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_study_chooses_the_rate_on_validation_and_attention_finds_the_token():
    tokens, labels = sides()
    plan = ProbePlan(classes=3, steps=150, batch=32, rates=[0.0001, 0.05], seeds=2)
    attentive = study(partial(EfficientProbing, 8, 2), tokens, labels, plan)
    linear = study(partial(MeanPooling, 8), tokens, labels, plan)
    assert attentive.rate == 0.05
    assert attentive.hits.shape == (2, 90)
    assert attentive.parameters == 2 * 8 + 64 + 27
    assert attentive.accuracy > linear.accuracy + 5
    assert attentive.accuracy == pytest.approx(
        100 * np.mean([hits(p, tokens["test"], labels["test"]).mean() for p in attentive.probes])
    )


def test_test_labels_do_not_influence_training():
    tokens, labels = sides()
    first = study(partial(MeanPooling, 8), tokens, labels, PLAN)
    changed = labels | {"test": (labels["test"] + 1) % 3}
    second = study(partial(MeanPooling, 8), tokens, changed, PLAN)
    assert first.rate == second.rate
    for a, b in zip(first.probes, second.probes, strict=True):
        assert torch.equal(a.classifier.weight, b.classifier.weight)


def test_chosen_items_alone_are_used():
    tokens, labels = sides()
    chosen = [torch.arange(0, 150, 5), torch.arange(0, 150, 3)]
    first = study(partial(MeanPooling, 8), tokens, labels, PLAN, chosen)
    spoiled = tokens["train"].clone()
    spoiled[1] = 100.0  # in neither selection
    second = study(partial(MeanPooling, 8), tokens | {"train": spoiled}, labels, PLAN, chosen)
    assert np.array_equal(first.hits, second.hits)


def test_batches_cover_an_epoch_without_repetition():
    order = batches(10, 3, seed=0)
    epoch = torch.cat([next(order) for _ in range(3)])
    assert len(epoch.unique()) == 9
    assert sorted(next(batches(5, 8, seed=0)).tolist()) == [0, 1, 2, 3, 4]


def test_few_labels_keep_every_class():
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 40)
    chosen = few_labels(labels, 0.1, seed=0)
    assert labels[chosen].bincount().tolist() == [10, 2, 4]
    assert len(chosen.unique()) == len(chosen)
    assert not torch.equal(chosen, few_labels(labels, 0.1, seed=1))


def test_nearest_neighbours_choose_on_validation():
    tokens, labels = sides()
    features = {n: functional.one_hot(y, 3).float() + 0.01 for n, y in labels.items()}
    assert nearest_neighbours(features, labels).mean() == 1.0
    assert nearest_neighbours({n: t.mean(1) for n, t in tokens.items()}, labels).shape == (90,)


def test_front_keeps_what_nothing_cheaper_reaches():
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (2.0, 4.0), (9.0, 5.0)]
    assert pareto_front(points) == [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]


def test_hits_counts_in_order():
    class Fixed(nn.Module):
        def forward(self, tokens):
            return tokens[:, 0]

    tokens = torch.eye(3)[:, None].repeat(200, 1, 1)
    labels = torch.tensor([0, 1, 0]).repeat(200)
    assert hits(Fixed(), tokens, labels).tolist() == [1.0, 1.0, 0.0] * 200
