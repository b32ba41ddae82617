"""The study of OptiPrune: its own arithmetic, on an untrained model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reattend.backbones.scene_judge import SceneJudge
from reattend.backbones.trained.t2i import SETTINGS, untrained
from reattend.data.prompt_scenes import pair_prompts
from reattend.generation.optiprune import Descent, Scores, Shift, SimPrune, optimise
from reattend.studies import optiprune as study
from reattend.studies.optiprune import (
    Painter,
    PassCost,
    equal_candidates,
    fresh_scores,
    graph_select,
    ground_deviation,
    limits_at,
    other_things,
    pass_cost,
    pruning_errors,
    sampling_cost,
    selection_entropy,
    selections,
    unpruned_difference,
    within,
)
from reattend.studies.text_to_image import Bench


@pytest.fixture(scope="module")
def painter():
    model = untrained(SETTINGS["smoke"], 0).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.requires_grad_(False)
    bench = Bench.of(model, SceneJudge(), pair_prompts(3), 2, 0, steps=3, guidance=2.0)
    return Painter(bench)


@pytest.mark.parametrize(("seed", "ratio"), [(0, 0.3), (1, 0.5), (2, 0.75)])
def test_the_timed_graph_chooses_what_the_method_chooses(seed, ratio):
    x = torch.randn(2, 64, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, graph = SimPrune(ratio, noise=0.0).select(x), graph_select(x, ratio)
    for name in ("kept", "pruned", "source"):
        assert torch.equal(getattr(ours, name), getattr(graph, name))


def test_a_shift_is_scaled_back_to_the_bound_or_left():
    shift = Shift(torch.tensor([[0.2, -0.1], [0.01, 0.0]]), torch.tensor([[0.1, 0.3], [0.0, 0.0]]))
    back = within(shift, 1e-3)
    assert back.divergence().tolist() == pytest.approx(
        [1e-3, shift.divergence()[1].item()], rel=1e-3
    )
    assert torch.equal(back.mean[1], shift.mean[1])
    ratio = back.mean[0] / shift.mean[0]
    assert torch.allclose(ratio, (back.log_variance[0] / shift.log_variance[0]))


def test_other_things_have_the_same_colours_and_nouns_that_were_not_named():
    prompts = pair_prompts(56, 3)
    others = other_things(prompts, 0)
    assert torch.equal(others.colours, prompts.colours)
    for named, other in zip(prompts.nouns.tolist(), others.nouns.tolist(), strict=True):
        assert len({*named, *other}) == 4
    assert set(others.nouns.flatten().tolist()) == set(range(8))


def test_the_same_noises_can_be_scored_under_other_captions(painter):
    others = other_things(pair_prompts(3), 0)[painter.bench.item]
    asked = painter.asking(others)
    assert torch.equal(asked.noise, painter.noise)
    by_hand = replace(painter.bench, prompts=others)
    own, strange = (fresh_scores(some.scorer(), some.noise) for some in (painter, asked))
    assert torch.equal(
        strange.neglect, fresh_scores(Painter(by_hand).scorer(), by_hand.noise).neglect
    )
    assert (own.neglect != strange.neglect).all()


def test_limits_are_percentiles_of_each_score():
    scores = Scores(torch.arange(11.0), torch.arange(11.0) * 2, torch.zeros(11))
    assert limits_at(scores, 30.0) == pytest.approx((3, 6))


def test_costs_of_a_search_count_both_kinds_of_passes():
    noise = torch.zeros(2, 3)

    def score(z, rows):
        nothing = 0 * z.sum(-1)
        return Scores(rows / 2 + nothing, rows / 2 + nothing, nothing)

    found = optimise(noise, score, Descent(), 1)
    assert (found.passes.tolist(), found.steps.tolist()) == ([1, 1], [0, 1])
    assert PassCost(10, 30).of_search(found) == 20
    assert [equal_candidates(c, 10) for c in (5.0, 20.0, 21.0)] == [1, 2, 3]


def test_pruning_saves_multiply_adds_and_a_gradient_costs_some(painter):
    plain, pruned = (pass_cost(painter, p) for p in (None, SimPrune(0.5, noise=0.0)))
    assert pruned.forward < plain.forward < plain.gradient
    assert pruned.gradient < plain.gradient
    assert sampling_cost(painter, SimPrune(0.5, noise=0.0)) < sampling_cost(painter, None)
    # Three steps of two guidance halves are six passes, and the captions are read twice more.
    assert sampling_cost(painter, None) == pytest.approx(6 * plain.forward, rel=0.02)


def test_scores_of_a_part_are_those_of_the_whole(painter):
    whole = fresh_scores(painter.scorer(), painter.noise)
    rows = torch.tensor([4, 1])
    with torch.no_grad():
        part = painter.scorer()(painter.noise[rows], rows)
    assert torch.allclose(part.neglect, whole.neglect[rows], atol=1e-6)
    assert torch.allclose(part.conflict, whole.conflict[rows], atol=1e-6)


def test_maps_are_shares_of_the_words_at_every_place(painter):
    with torch.no_grad():
        words, own = painter.maps(painter.noise, torch.arange(6))
    assert words.shape == (6, 7, 6, 6)
    assert torch.allclose(words.sum(1), torch.ones(6, 6, 6))
    assert torch.allclose(own.sum(-1), torch.ones(6, 36), atol=1e-5)


def test_nothing_pruned_changes_no_picture_and_errors_grow_with_the_ratio(painter):
    assert unpruned_difference(painter) == 0
    arms = {ratio: SimPrune(ratio, noise=0.0) for ratio in (0.1, 0.7)}
    errors = pruning_errors(painter, arms, [0, 2])
    assert len(errors[0.1]) == 6
    assert (errors[0.1] < errors[0.7]).all()


def test_selections_are_of_the_finest_grid_at_the_asked_steps(painter):
    found = selections(painter, SimPrune(0.5, noise=0.0), [0, 2])
    assert list(found) == ["step 1", "step 3"]
    assert found["step 1"].kept.shape == (6, 72)


def test_entropy_is_nothing_without_noise_and_one_with_much():
    x = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    assert selection_entropy(SimPrune(0.5, noise=0.0), x, 5) == 0
    wild = SimPrune(0.5, noise=100.0, generator=torch.Generator().manual_seed(0))
    assert selection_entropy(wild, x, 500) == pytest.approx(1, abs=0.01)


def test_times_are_relative_to_full_attention_in_the_same_round(monkeypatch):
    def turns(baseline, candidate, *, rounds):
        return np.arange(1.0, rounds + 1), 0.8 * np.arange(1.0, rounds + 1)

    monkeypatch.setattr(study, "paired_times", turns)
    found = study.time_ratios(16, 8, 0.5, 5, 1)
    assert set(found) == {"pruned", "selection alone", "pruned, by the graph"}
    for ratios in found.values():
        assert ratios == pytest.approx(np.full(5, 0.8))


def test_the_ground_is_what_lies_at_the_border():
    picture = torch.zeros(1, 3, 6, 6)
    picture[..., 2, 2] = 1
    assert ground_deviation(picture).item() == 0
    picture[..., 0, 0] = 1
    assert ground_deviation(picture).item() == pytest.approx(1 / 20)
