"""Prompts read with methods: the same scores as the needle suite, distances from dense, equal densities."""

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.host import attach
from reattend.data.needles import NeedleSample, score_sample
from reattend.studies.flexprefill import best_fixed, fixed
from reattend.studies.long_context import (
    BFloat16Linear,
    PromptMaps,
    PromptReader,
    bfloat16_layers,
    with_intervals,
)

SIZE = 8


def llama():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16, "initializer_range": 0.3}
    config = LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return llama()


def sample(seed, length=61):
    tokens = torch.randint(0, 50, (length + 3,), generator=torch.Generator().manual_seed(seed))
    prompt, answer = tokens[:length].tolist(), tokens[length:].tolist()
    prose = (True,) * (length - 5) + (False,) * 5
    return NeedleSample("toy", tuple(prompt), tuple(answer), (True, False, True), prose, 0.5)


def sparse():
    return StreamingLLM(sink=SIZE, window=2 * SIZE, block_size=SIZE)


def test_scores_are_those_of_the_needle_suite(model):
    reader = PromptReader(model)
    samples = [({"item": seed}, sample(seed)) for seed in range(3)]
    density = reader.read(sparse(), samples, method="sparse")
    rows = reader.frame()
    assert rows.density.mean() == pytest.approx(density)
    for seed, row in zip(range(3), rows.itertuples(), strict=True):
        want = score_sample(model, sample(seed), attach(model, sparse()))
        assert row.score == 100 * want.exact_match
        assert rows["answer NLL"][seed] == pytest.approx(want.answer_nll, abs=1e-5)
        assert rows["prose NLL"][seed] == pytest.approx(want.prose_nll, abs=1e-5)
        assert rows["answer KL"][seed] > 1e-3


def test_dense_reading_is_at_distance_zero_and_density_one(model):
    reader = PromptReader(model)
    assert reader.read(None, [({"item": 0}, sample(0))], method="dense") == 1.0
    row = reader.frame().iloc[0]
    assert row["answer KL"] == pytest.approx(0, abs=1e-7)
    assert row["method"] == "dense"


def test_divergence_is_that_of_the_definition(model):
    reader = PromptReader(model)
    reader.read(sparse(), [({"item": 0}, sample(0))], method="sparse")
    toy, seen = sample(0), []
    tokens, given = torch.tensor([toy.prompt]), torch.tensor([toy.answer])
    for method in (StreamingLLM(sink=0, window=64, block_size=SIZE), sparse()):
        with torch.no_grad(), attach(model, method):
            read = model(tokens, use_cache=True)
        with torch.no_grad():
            rest = model(given[:, :-1], past_key_values=read.past_key_values).logits
        logits = torch.cat([read.logits[:, -1:], rest], dim=1)[0]
        seen.append(logits.double().log_softmax(-1)[[0, 2]])  # the answer's tokens that count
    want = (seen[0].exp() * (seen[0] - seen[1])).sum(-1).mean().item()
    assert reader.frame()["answer KL"][0] == pytest.approx(want, rel=1e-4)


def test_bfloat16_layers_multiply_in_bfloat16_and_hand_on_float32():
    plain, halved = llama(), bfloat16_layers(llama())
    layers = [m for m in halved.modules() if isinstance(m, BFloat16Linear)]
    assert len(layers) == 2 * 7
    assert all(layer.weight.dtype == torch.bfloat16 for layer in layers)
    tokens = torch.tensor([sample(0).prompt])
    with torch.no_grad():
        ours, want = halved(tokens).logits, plain(tokens).logits
    assert ours.dtype == torch.float32
    assert 0 < (ours - want).std() < 0.02 * want.std()


def test_density_of_several_prompts_is_matched(model):
    maps = PromptMaps(model, [sample(seed, 64).prompt for seed in range(2)], SIZE)
    make = lambda size: StreamingLLM(sink=0, window=size * SIZE, block_size=SIZE)  # noqa: E731
    assert maps.density(make(1)) == pytest.approx(8 / 36)
    assert maps.match(make, 0.41, 20).window == 2 * SIZE
    assert maps.covered(make(8)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("target", [0.4, 0.6])
def test_fixed_budgets_have_the_density_and_the_split_that_covers_most(model, target):
    maps = PromptMaps(model, [sample(3, 64).prompt], SIZE)
    made = best_fixed(maps, target, SIZE, 32)
    assert maps.density(made) == pytest.approx(target, abs=0.1)
    for split in (0.25, 0.5, 0.75):
        other = maps.match(lambda size, split=split: fixed(split, size, SIZE), target, 32)
        assert maps.covered(made) >= maps.covered(other)
    half = fixed(0.25, 8, SIZE)
    assert (half.verticals, half.slashes) == (2, 6)


def test_intervals_stand_behind_their_means():
    row = with_intervals(pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [0.0, 0.0, 0.0]}))
    assert list(row) == ["a", "a, low", "a, high", "b", "b, low", "b, high"]
    half = 4.302653 / 3**0.5  # Student's t with two degrees of freedom
    assert list(row.values()) == pytest.approx([2, 2 - half, 2 + half, 0, 0, 0], rel=1e-5)
