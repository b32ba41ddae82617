"""The protocol by which probes are trained and compared."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from reattend.studies.probing import (
    Folds,
    ProbePlan,
    ProjectedMean,
    accuracies_by_place,
    batches,
    few_labels,
    fold_by_identity,
    hits,
    likeness_across,
    map_statistics,
    nearest_neighbours,
    pareto_front,
    repeated_study,
    study,
    train_probes,
)
from reattend.vision.efficient_probing import (
    EfficientProbing,
    MeanPooling,
    Probe,
    foreground_mass,
    mean_pairwise_cosine,
)

PLAN = ProbePlan(classes=3, steps=40, batch=16, rates=[0.0001, 0.01])
ALL = torch.arange(50)


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in which one token, marked by channel 0, carries the class in channels 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 9, 8, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    place = torch.randint(9, (count,), generator=generator)
    tokens[torch.arange(count), place, 0] = 6.0
    tokens[torch.arange(count), place, 1 + labels] += 3.0
    return tokens, labels


def divided(count: int = 300) -> tuple[torch.Tensor, torch.Tensor, Folds]:
    tokens, labels = data(count, 1)
    identities = [str(place // 2) for place in range(count)]
    return tokens, labels, fold_by_identity(identities, torch.arange(60), 3, seed=2)


def test_folds_keep_identities_together_and_test_each_picture_once():
    identities = [f"i{place % 25}" for place in range(100)]
    aside = torch.tensor([place for place in range(100) if place % 25 < 5])
    folds = fold_by_identity(identities, aside, 4)
    assert sorted([*folds.tested.tolist(), *aside.tolist()]) == list(range(100))
    names = [{identities[place] for place in part.tolist()} for part in folds.parts]
    assert [len(part) for part in names] == [5] * 4
    assert len(set.union(*names)) == 20
    for fold, part in enumerate(folds.parts):
        assert not set(part.tolist()) & set(folds.training(fold).tolist())
    with pytest.raises(ValueError, match="at least two folds"):
        fold_by_identity(identities, aside, 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_projected_mean_is_ep_with_queries_of_zero(seed):
    torch.manual_seed(seed)
    tokens, ep, plain = torch.randn(5, 9, 8), EfficientProbing(8, 4), ProjectedMean(8)
    with torch.no_grad():
        ep.queries.zero_()
        plain.v.weight.copy_(ep.v.weight)
    torch.testing.assert_close(plain(tokens), ep(tokens))


def test_a_stack_of_rates_is_the_same_as_each_rate_alone():
    tokens, labels = data(50, 0)
    for make in (partial(EfficientProbing, 8, 2), partial(ProjectedMean, 8)):
        together = train_probes(make, [0.001, 0.02], tokens, labels, PLAN, 3, ALL)
        for rate, probe in zip([0.001, 0.02], together, strict=True):
            (alone,) = train_probes(make, [rate], tokens, labels, PLAN, 3, ALL)
            for name, tensor in alone.state_dict().items():
                torch.testing.assert_close(probe.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_training_equals_a_plain_loop():
    tokens, labels = data(50, 0)
    (probe,) = train_probes(partial(MeanPooling, 8), [0.02], tokens, labels, PLAN, 1, ALL)
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
    tokens, labels, folds = divided()
    plan = ProbePlan(classes=3, steps=150, batch=32, rates=[0.0001, 0.05])
    attentive = study(partial(EfficientProbing, 8, 2), tokens, labels, folds, plan)
    linear = study(partial(MeanPooling, 8), tokens, labels, folds, plan)
    assert attentive.rate == 0.05
    assert attentive.hits.shape == (240,)
    assert attentive.parameters == 2 * 8 + 64 + 27
    assert attentive.accuracy > linear.accuracy + 5
    tested = zip(attentive.probes, folds.parts, strict=True)
    each = [100 * hits(probe, tokens, labels, part).mean() for probe, part in tested]
    assert attentive.folds == pytest.approx(each)
    assert attentive.accuracy == pytest.approx(np.mean(each))  # folds of equal size


def test_a_picture_does_not_influence_the_probe_that_tests_it():
    tokens, labels, folds = divided()
    first = study(partial(MeanPooling, 8), tokens, labels, folds, PLAN)
    for fold, part in enumerate(folds.parts):
        changed = labels.clone()
        changed[part] = (changed[part] + 1) % 3
        second = study(partial(MeanPooling, 8), tokens, changed, folds, PLAN)
        same = [
            torch.equal(a.classifier.weight, b.classifier.weight)
            for a, b in zip(first.probes, second.probes, strict=True)
        ]
        assert same == [other == fold for other in range(3)]


def test_a_share_of_the_labels_trains_on_that_share():
    tokens, labels, folds = divided()
    first = study(partial(MeanPooling, 8), tokens, labels, folds, PLAN, share=0.1)
    used = set()
    for fold in range(3):
        items = folds.training(fold)
        used |= set(items[few_labels(labels[items], 0.1, fold)].tolist())
    unused = [p for p in folds.tested.tolist() if p not in used]
    spoiled = tokens.clone()
    spoiled[unused] = 100.0
    second = study(partial(MeanPooling, 8), spoiled, labels, folds, PLAN, share=0.1)
    for a, b in zip(first.probes, second.probes, strict=True):
        assert torch.equal(a.classifier.weight, b.classifier.weight)


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
    tokens, labels, folds = divided()
    perfect = functional.one_hot(labels, 3).float() + 0.01
    assert nearest_neighbours(perfect, labels, folds).mean() == 1.0
    assert nearest_neighbours(tokens.mean(1), labels, folds).shape == (240,)


def test_front_keeps_what_nothing_cheaper_reaches():
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (2.0, 4.0), (9.0, 5.0)]
    assert pareto_front(points) == [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]


def test_hits_counts_in_order():
    class Fixed(nn.Module):
        def forward(self, tokens):
            return tokens[:, 0]

    tokens = torch.eye(3)[:, None].repeat(200, 1, 1)
    labels = torch.tensor([0, 1, 0]).repeat(200)
    chosen = torch.arange(599, -1, -1)
    assert hits(Fixed(), tokens, labels, chosen).tolist() == [0.0, 1.0, 1.0] * 200


def test_map_statistics_use_the_pooling_of_each_fold():
    tokens, _, folds = divided()
    coverage = torch.rand(300, 9, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    pools = [EfficientProbing(8, 4) for _ in folds.parts]
    for number, pool in enumerate(pools):
        pool.queries.data.mul_(30.0 * (number + 1))
    correlation, cosine, mass = map_statistics(pools, tokens, coverage, folds)
    assert correlation.shape == cosine.shape == mass.shape == (240,)
    assert (correlation < cosine).all()  # flatness does not count
    part = folds.parts[1]
    start = len(folds.parts[0])
    maps = pools[1].maps(tokens[part]).detach()
    inside = slice(start, start + len(part))
    np.testing.assert_allclose(cosine[inside], mean_pairwise_cosine(maps), rtol=1e-5)
    np.testing.assert_allclose(mass[inside], 100 * foreground_mass(maps, coverage[part]), rtol=1e-5)


@pytest.mark.parametrize("seed", [0, 3])
def test_likeness_across_is_that_of_both_probes_of_a_fold(seed):
    tokens, _, folds = divided()
    torch.manual_seed(seed)
    pools, others = ([EfficientProbing(8, 4) for _ in folds.parts] for _ in range(2))
    found = likeness_across(pools, others, tokens, folds)
    assert found.shape == (240,)
    part, start = folds.parts[1], len(folds.parts[0])
    first, second = (each[1].maps(tokens[part[:5]]).detach().numpy() for each in (pools, others))
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        pairs = [np.corrcoef(x, y)[0, 1] for x in a for y in b]
        np.testing.assert_allclose(found[start + number], np.mean(pairs), atol=1e-5)


def test_repeated_studies_draw_anew_and_choose_the_rate_once():
    tokens, labels, folds = divided()
    identities = [str(place // 2) for place in range(300)]
    divisions = [folds, fold_by_identity(identities, torch.arange(60), 3, seed=3)]
    make, plan = partial(EfficientProbing, 8, 2), replace(PLAN, seed=5)
    runs = repeated_study(make, tokens, labels, divisions, plan, 0.3)
    first = study(make, tokens, labels, folds, plan, 0.3)
    np.testing.assert_array_equal(runs[0].hits, first.hits)
    anew = replace(plan, rates=[first.rate], seed=plan.seed + 3)
    second = study(make, tokens, labels, divisions[1], anew, 0.3)
    assert runs[1].rate == first.rate
    for ours, theirs in zip(runs[1].probes, second.probes, strict=True):
        assert torch.equal(ours.pooling.queries, theirs.pooling.queries)


def test_a_plan_s_seed_is_that_of_its_first_fold():
    tokens, labels, folds = divided()
    make, plan = partial(EfficientProbing, 8, 2), replace(PLAN, rates=[0.01], seed=7)
    found = study(make, tokens, labels, folds, plan)
    for fold, probe in enumerate(found.probes):
        seen = folds.training(fold)
        (alone,) = train_probes(make, [0.01], tokens, labels, plan, 7 + fold, seen)
        assert torch.equal(probe.pooling.queries, alone.pooling.queries)


def test_accuracies_by_place_are_those_of_an_encoder_and_its_probes():
    found = {
        ("mae", 0.1, "EP_8"): [1.0, 2.0],
        ("mae", 0.5, "EP_8"): [3.0, 4.0],
        ("vit", 0.1, "EP_8"): [5.0, 6.0],
        ("mae", 0.1, "other"): [7.0, 8.0],
    }
    encoders = {"mae": "autoencoder", "vit": "ViT"}
    drawn = accuracies_by_place(found, encoders, ["EP_8"], lambda values: [x + 1 for x in values])
    assert list(drawn) == ["autoencoder", "ViT"]
    assert list(drawn["autoencoder"]) == ["EP_8"]
    assert {place: x.tolist() for place, x in drawn["autoencoder"]["EP_8"].items()} == {
        0.1: [2, 3],
        0.5: [4, 5],
    }
    assert drawn["ViT"]["EP_8"][0.1].tolist() == [6, 7]
