"""DHSA's study: equal numbers of chunks, masses by hand, a placebo that shares what is forced."""

import types

import numpy as np
import pytest
import torch

from reattend.attention.dense import dense_attention
from reattend.long_context.dhsa import BoundaryPredictor, chunk_of_tokens
from reattend.studies.dhsa import (
    Sizes,
    all_edges,
    document_prompts,
    f1_scores,
    layer_map,
    layer_times,
    mass_kept,
    other_scores,
    pooled_scores,
    single_scores,
)

SIZES = Sizes(block_size=8, local=12, sink=3, chunk=6, window=2)
TOKENS, BUDGET = 72, 30


def seen(seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, n, TOKENS, 16, generator=generator) for n in (4, 2))
    return layer_map(query, key, 0.5, 8)


def predictor(seed=0):
    torch.manual_seed(seed)
    return BoundaryPredictor(32, window=2, hidden=8).requires_grad_(False)


def test_masses_are_those_of_the_mean_head():
    layer = seen()
    args = {"scale": 0.5, "causal": True, "return_weights": True}
    _, weights = dense_attention(layer.query, layer.key, layer.key, **args)
    for block in range(9):
        expected = weights[0, :, 8 * block : 8 * block + 8].mean((0, 1))
        torch.testing.assert_close(layer.mass[0, block], expected)
    with pytest.raises(ValueError, match="70 tokens are no whole blocks of 8"):
        layer_map(layer.query[:, :, :70], layer.key[:, :, :70], 0.5, 8)


@pytest.mark.parametrize("seed", range(3))
def test_mass_kept_by_hand(seed):
    layer = seen(seed)
    scores = torch.rand(1, 9, TOKENS, generator=torch.Generator().manual_seed(seed))
    kept = []
    for block in range(9):
        end = 8 * block + 8
        if end > BUDGET:
            free = torch.arange(3, end - 12)
            best = free[scores[0, block, free].topk(BUDGET - 15).indices]
            kept.append(layer.mass[0, block, best].sum().item())
    assert len(kept) == 6
    assert mass_kept(scores, layer, SIZES, BUDGET) == pytest.approx(np.mean(kept), rel=1e-5)
    best = mass_kept(layer.mass, layer, SIZES, BUDGET)
    others = other_scores(layer, SIZES, torch.Generator().manual_seed(0))
    assert next(iter(others)) == "best possible"
    assert all(mass_kept(x, layer, SIZES, BUDGET) <= best for x in others.values())


def test_every_rule_finds_as_many_chunks():
    layer, generator = seen(), torch.Generator().manual_seed(0)
    rules = all_edges(layer, {"predicted": predictor(), "other": predictor(1)}, SIZES, generator)
    assert list(rules) == ["predicted", "other", "labelled", "key jumps", "random", "fixed"]
    count = len(rules["predicted"].unique())
    assert count == 72 // 6 + 2
    for edges in rules.values():
        assert len(edges.unique()) == count
        assert edges[0, 0] == 0
        assert edges[0, -1] == TOKENS
    assert rules["fixed"].diff(dim=1).unique().tolist() == [5, 6]
    for name in ("predicted", "labelled", "random"):
        assert rules[name][0, 1:-1].diff().min() > SIZES.window
    assert not torch.equal(rules["predicted"], rules["random"])


def test_the_best_key_of_a_chunk():
    layer, edges = seen(), torch.tensor([[0, 5, 6, 30, TOKENS]])
    alone, ours = single_scores(layer, 8), pooled_scores(layer, edges, "max", 8)
    chunk = chunk_of_tokens(edges)[0]
    for number in range(4):
        inside = chunk == number
        expected = alone[0, :, inside].amax(-1, keepdim=True).expand(-1, int(inside.sum()))
        assert torch.equal(ours[0, :, inside], expected)


def test_f1_by_hand():
    layers, guess = [seen(0), seen(1)], predictor()
    found = f1_scores(guess, layers)
    said, truth = [], []
    for layer in layers:
        known = layer.ratios.isfinite()
        said.append(guess.scores(layer.key)[known] > 0)
        truth.append(layer.ratios[known] >= 2)
    said, truth = torch.cat(said), torch.cat(truth)
    right = (said & truth).sum() / said.sum(), (said & truth).sum() / truth.sum()
    assert 0 < said.float().mean() < 1
    assert found["predictor"]["precision"] == pytest.approx(right[0].item())
    assert found["predictor"]["recall"] == pytest.approx(right[1].item())
    share = truth.float().mean().item()
    assert found["all positive"]["F1"] == pytest.approx(2 * share / (1 + share))


def test_the_placebo_shares_the_forced_tokens_and_the_budget():
    layer = seen()
    call = {"scale": 0.5, "layer": 0}
    ours = SIZES.method(predictor(), BUDGET).tokens(layer.query, layer.key, **call)
    placebo = SIZES.random_tokens(BUDGET, 1).tokens(layer.query, layer.key, **call)
    assert torch.equal((ours < TOKENS).sum(-1), (placebo < TOKENS).sum(-1))
    assert not torch.equal(ours, placebo)
    for tokens in (ours, placebo):
        for block in range(3, 9):
            end, listed = 8 * block + 8, set(tokens[0, block].tolist())
            assert {0, 1, 2, *range(end - 12, end)} <= listed
    again = SIZES.random_tokens(BUDGET, 1).tokens(layer.query, layer.key, **call)
    assert torch.equal(placebo, again)


def test_the_published_baseline_forces_its_own_block_alone():
    layer = seen()
    made = SIZES.published_blocks(32)
    tokens = made.tokens(layer.query, layer.key, scale=0.5, layer=0)[0, -1]
    assert (tokens.unflatten(0, (4, 8)) // 8 == tokens[::8, None] // 8).all()  # whole blocks
    assert made.sink == 0
    assert made.local == 8
    assert SIZES.completed_blocks(32).local == 12


def test_shared_boundaries_are_those_of_the_first_layer():
    first, second = seen(0), seen(1)
    made = SIZES.shared_boundaries(predictor(), BUDGET)
    edges = [made.edges(x.query, x.key, scale=0.5, layer=n) for n, x in enumerate((first, second))]
    assert torch.equal(*edges)
    own = SIZES.method(predictor(), BUDGET).edges(second.query, second.key, scale=0.5, layer=1)
    assert not torch.equal(edges[1], own)


def test_one_prompt_of_each_document():
    def encode(text, add_special_tokens):
        return [ord(letter) % 90 for letter in text]

    def pieces(ids):
        return ["." if i % 9 == 0 else "x" for i in ids]

    tokenizer = types.SimpleNamespace(encode=encode, convert_ids_to_tokens=pieces)
    texts = ["Short.", *(f"The sentence number {n} ends here. " * 60 for n in range(5))]
    settings = (tokenizer, texts, "magic_numbers", 600)
    many = dict(document_prompts(*settings, 4, 1, 0))
    few = dict(document_prompts(*settings, 2, 1, 0))
    assert list(many) == [1, 2, 3, 4]
    assert all(len(sample.prompt) == 600 for sample in many.values())
    assert {n: many[n] for n in few} == few
    depths = sorted(sample.depth for sample in many.values())
    assert np.diff(depths).min() > 0.05
    with pytest.raises(ValueError, match="5 of 6 documents have 1200 tokens, 6 wanted"):
        list(document_prompts(*settings, 6, 1, 0))


def test_times_have_a_row_each():
    rows = layer_times(192, 160, BoundaryPredictor(192), 3, torch.device("cpu"))
    assert [row["method"] for row in rows] == ["DHSA", "completed blocks"]
    assert all(0 < row["pairs read"] < 1 for row in rows)
