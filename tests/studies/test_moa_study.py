"""MoA's study: texts of exact length, plans within their bounds, answers read under the plan."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.host import attach
from reattend.data.needles import Haystack
from reattend.long_context.moa import Item, MoA, Plan, Rule, profile_influence
from reattend.studies.long_context import answer
from reattend.studies.moa import (
    Planner,
    above_dense,
    answered_prompts,
    arms_table,
    best_plan,
    by_arm,
    calibrate,
    compared_rows,
    early_needles,
    largest_gap,
    part_of,
    prose,
    random_plans,
    read,
    true_loss,
)

SIZE = 8
TEXTS = ["The river ran on. It was late? Yes! " * 60, "A second text begins here. It ends. " * 60]


class Characters:
    """A tokenizer with one token for each character."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def convert_ids_to_tokens(self, ids):
        return [chr(token) for token in ids]


@pytest.fixture(scope="module")
def haystack():
    return Haystack(Characters(), TEXTS)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 16}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
    made = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3)).eval()
    return made.requires_grad_(False)


def planner(**other):
    settings = {"block_size": SIZE, "alphas": 4, "least": 0.9, "intervals": 2}
    return Planner([256, 320], 640, **(settings | other))


DRAW = {
    "texts": 2,
    "validation": 400,
    "held_out": 2,
    "seed": 1,
    "distractors": 1,
    "latest": 0.45,
}


@pytest.fixture(scope="module")
def calibration(model, haystack):
    return calibrate(model, haystack, planner(), kinds=("answers", "prose"), **DRAW)


def text_of(tokens):
    return "".join(map(chr, tokens))


# Texts


def test_answered_prompts_end_with_what_is_asked(haystack):
    for item in answered_prompts(haystack, 256, 3, seed=0, distractors=1, latest=0.45):
        text, response = text_of(item.tokens), text_of(item.tokens[item.scored])
        assert len(text) == 256
        assert text.endswith(f"is{response}")
        question = text[: -len(response)].rsplit("\n\n", 1)[1]
        assert f"{question}{response}." in text
        assert len(response) == 6


def test_prose_scores_every_fourth_token(haystack):
    for item in prose(haystack, 64, 2, seed=0):
        assert item.scored.nonzero()[:, 0].tolist() == list(range(3, 64, 4))


def test_asked_needles_come_early(haystack):
    found = early_needles(haystack, 600, 5, seed=0, distractors=1, latest=0.4)
    depths = [sample.depth for sample in found]
    assert len(found) == 5
    assert max(depths) < 0.45
    assert depths == sorted(depths)
    assert max(depths) - min(depths) > 0.2


# Plans


def test_densities_are_those_of_plans():
    made = planner()
    lengths = [256, 320, 640]
    densities = made.densities(made.elastic, lengths)
    for number, rule in enumerate(made.elastic):
        plan = Plan.uniform(rule, 1, 1, block_size=SIZE)
        for row, length in zip(densities, lengths, strict=True):
            assert row[number] == pytest.approx(plan.density(length), abs=1e-6)


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_the_uniform_plan_has_its_density(model, density):
    plan = planner().uniform(model, density)
    assert {plan.density(n) for n in (256, 320, 640)} == {density}
    assert len(plan.rules) == 3


@pytest.mark.parametrize("space", ["layers", "heads", "elastic"])
def test_plans_keep_to_their_space(calibration, space):
    made = planner()
    plans = made.search(calibration.profiles["answers"], 0.5, space)
    assert plans
    for plan in plans:
        for length in (256, 320, 640) if space == "elastic" else (320,):
            assert 0.45 - 1e-6 <= plan.density(length) <= 0.5 + 1e-6
        kinds = [len(set(layer)) for layer in plan.rules]
        assert max(kinds) <= (1 if space == "layers" else 2)
        alphas = {rule.alpha for layer in plan.rules for rule in layer}
        assert space == "elastic" or alphas == {0}


def test_more_freedom_costs_less(calibration):
    made, profiles = planner(), calibration.profiles["answers"]
    layers, heads = (made.search(profiles, 0.5, space)[0] for space in ("layers", "heads"))
    at = profiles[320]
    assert at.cost(heads) < at.cost(layers)
    assert at.cost(heads) < min(at.cost(p) for p in (heads.permuted(n) for n in range(5)))


def test_random_plans_have_one_density(model):
    plans = random_plans(planner(), model, 0.5, 4, seed=0)
    assert all(0.45 - 1e-6 <= plan.density(320) <= 0.5 + 1e-6 for plan in plans)
    assert len({plan.rules for plan in plans}) == 4
    assert plans == random_plans(planner(), model, 0.5, 4, seed=0)


# Calibration


def test_profiles_are_those_of_their_texts(model, haystack, calibration):
    for kind, texts in (
        ("answers", answered_prompts(haystack, 256, 2, 1, 1, 0.45)),
        ("prose", prose(haystack, 256, 2, 1)),
    ):
        (expected,) = profile_influence(model, texts, block_size=SIZE)
        found = calibration.profiles[kind][256].influence
        torch.testing.assert_close(found, expected.influence)
    both = [calibration.profiles[kind][320].influence for kind in ("answers", "prose", "both")]
    torch.testing.assert_close(both[2], (both[0] + both[1]) / 2)
    assert {kind: len(items) for kind, items in calibration.held_out.items()} == {
        "answers": 2,
        "prose": 2,
        "both": 2,
    }
    assert {len(item.tokens) for items in calibration.held_out.values() for item in items} == {400}


def test_a_draw_of_one_kind_has_that_kind_alone(model, haystack, calibration):
    found = calibrate(model, haystack, planner(), kinds=("answers",), **DRAW)
    assert set(found.profiles) == set(found.held_out) == {"answers"}
    for length, profile in found.profiles["answers"].items():
        assert torch.equal(profile.influence, calibration.profiles["answers"][length].influence)


def test_the_plan_of_least_true_loss_is_taken(model, calibration):
    plan, losses = best_plan(model, planner(), calibration, "answers", 0.5)
    plans = planner().search(calibration.profiles["answers"], 0.5)
    assert len(plans) == max(len(losses), 1)
    if losses:
        items = calibration.held_out["answers"]
        mine = sum(true_loss(model, item, plan) for item in items) / len(items)
        assert mine == pytest.approx(min(losses))


# True losses


def full(model):
    return Plan.uniform(Rule(0, 1.0), 3, 3, block_size=SIZE)


def test_true_loss_is_the_cross_entropy_of_the_scored_tokens(model, haystack):
    (item,) = answered_prompts(haystack, 256, 1, seed=0, distractors=1, latest=0.45)
    with torch.no_grad():
        logits = model(item.tokens[None]).logits[0, :-1]
    expected = F.cross_entropy(logits[item.scored[1:]], item.tokens[1:][item.scored[1:]]).item()
    for plan in (None, full(model)):
        assert true_loss(model, item, plan) == pytest.approx(expected, abs=1e-4)
    narrow = planner().uniform(model, 0.25)
    assert abs(true_loss(model, item, narrow) - expected) > 1e-3


def test_prompt_and_answer_are_read_under_the_plan(model, haystack):
    """As the prompt in one pass and the answer behind its cache; not as the prompt alone under it."""
    sample = early_needles(haystack, 300, 1, 0, 1, 0.45)[0]
    plan = planner().uniform(model, 0.25)
    found, method = read(model, sample, plan), MoA(plan=plan, length=300)
    with attach(model, method):
        expected = answer(model, sample, nullcontext())
    for ours, theirs in (
        (found, expected),
        (read(model, sample, None), answer(model, sample, nullcontext())),
    ):
        torch.testing.assert_close(
            ours.log_probabilities, theirs.log_probabilities, atol=1e-4, rtol=1e-4
        )
        assert ours.tokens.tolist() == theirs.tokens.tolist() == list(sample.answer)
        assert ours.prose_nll == pytest.approx(theirs.prose_nll, abs=1e-4)
    dense_behind = answer(model, sample, attach(model, method)).log_probabilities
    assert (dense_behind - found.log_probabilities).abs().max() > 1e-3
    whole = read(model, sample, full(model)).log_probabilities
    torch.testing.assert_close(
        whole, read(model, sample, None).log_probabilities, atol=1e-4, rtol=1e-4
    )


def test_items_are_one_length(model):
    with pytest.raises(ValueError, match="texts of one length"):
        profile_influence(
            model, [Item(torch.arange(n), torch.arange(n) > 2) for n in (16, 24)], block_size=8
        )


# Results


def test_every_plan_of_a_prompt_has_a_row_against_its_dense_reading(model, haystack):
    sample = early_needles(haystack, 300, 1, 0, 1, 0.45)[0]
    narrow = planner().uniform(model, 0.25)
    plans = {("uniform", 0.25): {"all": narrow}, ("MoA", 1.0): {0: full(model), 1: full(model)}}
    rows = pd.DataFrame(compared_rows(model, 7, sample, plans))
    assert rows["arm"].tolist() == ["dense", "uniform", "MoA", "MoA"]
    assert rows["draw"].tolist() == ["all", "all", 0, 1]
    assert set(rows["item"]) == {7}
    assert set(rows["length"]) == {len(sample.prompt)}
    assert rows["distance"][0] == round(300 * (1 - sample.depth))
    assert rows["answer KL"][[0, 2, 3]].abs().max() < 1e-5
    expected = read(model, sample, narrow).compared(read(model, sample, None))
    assert rows["answer KL"][1] == pytest.approx(expected["answer KL"])
    assert rows["answer KL"][1] > 1e-3


def toy_results():
    rows = []
    for item, (dense, even) in enumerate([(1.0, 2.0), (2.0, 2.5), (1.5, 4.5)]):
        where = {"item": item, "length": 64, "prose NLL": 3.0 + item, "score": 100.0 * (item > 0)}
        rows.append(where | {"arm": "dense", "density": 1.0, "answer NLL": dense})
        for draw in (-0.1, 0.1):
            rows.append(where | {"arm": "MoA", "density": 0.5, "answer NLL": even + draw})
        rows.append(where | {"arm": "MoA", "density": 0.25, "answer NLL": 9.0})
        rows.append(where | {"arm": "MoA", "density": 0.5, "answer NLL": 8.0, "length": 128})
    return pd.DataFrame(rows)


def test_arms_are_means_over_draws_and_then_over_prompts():
    results = toy_results()
    assert len(part_of(results, "MoA", 0.5, 64)) == 6
    arms = [("dense", 1.0), ("MoA", 0.5)]
    table = arms_table(results, arms, 64, {"retrieval": {"MoA": 0.97}})
    assert table["answer NLL"].tolist() == pytest.approx([1.5, 3.0])
    assert table["prose NLL"].tolist() == pytest.approx([4, 4])
    assert table["exact match"].tolist() == pytest.approx([200 / 3] * 2)
    assert table["retrieval, reported"][1] == 0.97
    assert np.isnan(table["retrieval, reported"][0])
    half = 4.302653 * np.std([2.0, 2.5, 4.5], ddof=1) / 3**0.5
    assert table["high"][1] - 3 == pytest.approx(half, rel=1e-5)
    assert 3 - table["low"][1] == pytest.approx(half, rel=1e-5)


def test_rises_above_dense_are_paired_by_prompt():
    rows = above_dense(toy_results(), ["MoA"], 64)
    means = rows[rows.density == 0.5].groupby("item")[["answer NLL", "prose NLL"]].mean()
    assert means["answer NLL"].tolist() == pytest.approx([1.0, 0.5, 3.0])
    assert means["prose NLL"].tolist() == [0, 0, 0]


def test_reported_values_go_by_our_names():
    frame = pd.DataFrame({"method": ["StreamingLLM", "MoA"], "8k": ["0.4", "0.9"]})
    assert by_arm(frame, "method", "8k", {"ours": "MoA"}) == {"ours": 0.9}


def test_the_largest_gap_looks_at_longer_prompts_where_asked():
    even, fixed = (Plan.uniform(rule, 2, 2, block_size=8) for rule in (Rule(0, 0.5), Rule(24, 0.0)))
    gap = abs(even.density(64) - 0.5)
    assert largest_gap({("even", 0.5): {"all": even}}, 64, {}) == pytest.approx(gap)
    plans = {("even", 0.5): {"all": even}, ("fixed", 0.5): {0: fixed}}
    assert fixed.density(64) == 0.5
    assert largest_gap(plans, 64, {}) == pytest.approx(gap)
    longer = largest_gap(plans, 64, {("fixed", 0.5): 256})
    assert longer == pytest.approx(0.5 - fixed.density(256))
    assert longer > 0.3
