"""Oracles of ACT."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.assets.store import AssetError, asset_path
from reattend.attention.dense import causal_sdpa, dense_attention
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod
from reattend.long_context.act import (
    ACT,
    SinkSurvey,
    attention_map,
    calibrate,
    column_score,
    improving_heads,
    sinks,
)

SEEDS = [0, 1, 2]
SCALE = 16**-0.5
TOKENS = 37


def causal_map(seed=0, tokens=TOKENS, planted=(5, 11), dtype=torch.float64):
    """Two batches of three causal maps; the planted keys draw attention in the last two heads."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, tokens, tokens, generator=generator, dtype=dtype)
    scores[..., 0] += 2.0
    for key in planted:
        scores[:, 1:, :, key] += 5.0
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)


def planted_tensors(seed=0, batch=2, heads=6, key_heads=2, tokens=TOKENS, sink=5):
    """Queries, keys, values in float32; every query head finds a sink at key `sink`."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, tokens, 16, generator=generator)
    key = torch.randn(batch, key_heads, tokens, 16, generator=generator)
    value = torch.randn(batch, key_heads, tokens, 16, generator=generator)
    query[..., 0] = 4.0
    key[..., 0] = 0.0
    key[:, :, sink, 0] = 5.0
    return query, key, value


def prefill(method, tensors, layer=0, padding=None):
    return method.prefill(*tensors, scale=SCALE, layer=layer, padding=padding)


# Column score and sinks ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tokens", [1, 2, 9, 37])
def test_column_score_equals_a_loop(seed, tokens):
    weights = causal_map(seed, tokens, planted=())
    got = column_score(weights)
    for k in range(tokens):
        expected = sum(weights[..., i, k] for i in range(k, tokens)) / (tokens - k)
        torch.testing.assert_close(got[..., k], expected, atol=1e-14, rtol=0)


def test_column_score_of_even_causal_attention():
    tokens = 23
    even = torch.ones(tokens, tokens, dtype=torch.float64).tril()
    even = even / even.sum(dim=-1, keepdim=True)
    expected = [sum(1 / (i + 1) for i in range(k, tokens)) / (tokens - k) for k in range(tokens)]
    got = column_score(even)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0)
    assert not sinks(got).any()


def test_column_score_of_a_chunk_averages_its_own_rows():
    weights = causal_map(tokens=12, planted=())
    chunk = weights[..., -5:, :]
    expected = torch.stack([chunk[..., max(k - 7, 0) :, k].mean(dim=-1) for k in range(12)], dim=-1)
    torch.testing.assert_close(column_score(chunk), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("position", [1, 7, 20])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_planted_sink_is_found(position, threshold):
    found = sinks(column_score(causal_map(planted=(position,))), threshold=threshold, min_rows=4)
    assert found[:, 1:].nonzero()[:, -1].unique().tolist() == [position]
    assert not found[:, 0].any()


def test_first_token_is_never_a_sink_and_a_later_one_is_not_lost():
    everything_on_first = torch.zeros(9, 9, dtype=torch.float64)
    everything_on_first[:, 0] = 1.0
    assert not sinks(column_score(everything_on_first)).any()
    # The first token below the threshold, key 3 far above it: dropping the first detected sink, as
    # the official code does, would lose the only one.
    score = torch.tensor([0.01, 0.05, 0.05, 0.9, 0.05])
    assert sinks(score, threshold=0.1).tolist() == [False, False, False, True, False]


def test_threshold_is_strict_and_relative_to_the_length():
    score = torch.tensor([0.0, 0.25, 0.2500001, 0.2] + [0.0] * 16, dtype=torch.float64)
    assert sinks(score, alpha=5.0).nonzero().flatten().tolist() == [2]
    assert sinks(score, alpha=4.0).nonzero().flatten().tolist() == [1, 2]  # 4 / 20 is not exceeded
    longer = torch.cat([score, torch.zeros(20, dtype=torch.float64)])
    assert sinks(longer, alpha=5.0).nonzero().flatten().tolist() == [1, 2, 3]
    assert sinks(longer, threshold=0.25).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(("min_rows", "expected"), [(1, [6, 7, 8, 9]), (2, [6, 7, 8]), (4, [6])])
def test_min_rows_excludes_the_end_of_the_prompt(min_rows, expected):
    score = torch.zeros(10)
    score[6:] = 0.9
    assert sinks(score, min_rows=min_rows).nonzero().flatten().tolist() == expected


# Calibration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0, 1.5])
def test_calibrated_map_equals_a_loop_over_its_definition(seed, beta):
    weights = causal_map(seed, tokens=13, planted=(3, 6))
    found = sinks(column_score(weights), alpha=2.0)
    expected = weights.clone()
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(13)).tolist():
        row, chosen = weights[*index], found[*index[:2]]
        mass, others = row[chosen].sum(), row[~chosen].sum()
        remaining = min(beta, 1 / mass.item()) if mass > 0 else beta
        freed = (1 - remaining) * mass
        expected[*index] = torch.where(chosen, remaining * row, row + freed * row / others)
    torch.testing.assert_close(calibrate(weights, found, beta), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_closed_form_ratios_and_rows(seed):
    weights, beta = causal_map(seed), 0.4
    found = sinks(column_score(weights))
    assert found.any()
    got = calibrate(weights, found, beta)
    columns = found[..., None, :].expand_as(weights)
    mass = (weights * columns).sum(dim=-1, keepdim=True)
    factor = torch.where(columns, beta, 1 + (1 - beta) * mass / (1 - mass))
    torch.testing.assert_close(got, weights * factor, atol=1e-13, rtol=0)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]), atol=1e-12, rtol=0)
    # Among the others of a row all ratios to the first token are kept; sinks scale by exactly beta.
    before, after = weights / weights[..., :1], got / got[..., :1]
    torch.testing.assert_close(after[~columns], before[~columns], atol=1e-10, rtol=1e-10)
    assert torch.equal(got[columns], (weights * beta)[columns])


@pytest.mark.parametrize("beta", [0.0, 0.4, 2.0, 50.0])
def test_causal_and_not_negative(beta):
    weights = causal_map()
    got = calibrate(weights, sinks(column_score(weights)), beta)
    assert (got >= 0).all()
    assert not got.triu(1).any()
    torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]), atol=1e-12, rtol=0)


def test_identity_for_beta_one_and_without_sinks():
    weights = causal_map()
    found = sinks(column_score(weights))
    assert torch.equal(calibrate(weights, found, 1.0), weights)
    assert torch.equal(calibrate(weights, torch.zeros_like(found), 0.4), weights)


def test_rows_before_a_sink_are_untouched():
    weights = causal_map(planted=(9,))
    found = torch.zeros(2, 3, TOKENS, dtype=torch.bool)
    found[..., 9] = True
    got = calibrate(weights, found, 0.4)
    assert torch.equal(got[..., :9, :], weights[..., :9, :])
    assert (got[..., 9:, :] != weights[..., 9:, :]).any(dim=-1).all()


def test_sink_mass_falls_with_beta_and_the_first_token_gains():
    weights = causal_map()
    found = sinks(column_score(weights))
    masses, firsts = [], []
    for beta in (1.5, 1.0, 0.8, 0.4, 0.0):
        got = calibrate(weights, found, beta)
        masses.append((got * found[..., None, :]).sum())
        firsts.append(got[..., 0].sum())
    assert masses == sorted(masses, reverse=True)
    assert firsts == sorted(firsts)
    assert masses[-1] == 0
    twice = calibrate(calibrate(weights, found), found)
    assert (twice * found[..., None, :]).sum() < masses[3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_without_other_attention_stay_finite(dtype):
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.75, 0.25]], dtype=dtype)
    got = calibrate(weights, torch.tensor([False, True, False]), 0.4)
    assert got.isfinite().all()
    torch.testing.assert_close(got.sum(-1), torch.ones(3, dtype=dtype))
    assert torch.equal(got[1], weights[1])
    everything = calibrate(weights, torch.tensor([False, True, True]), 0.0)
    assert torch.equal(everything, weights)


def test_gradient_passes_through_the_calibration():
    weights = causal_map(tokens=5, planted=()).requires_grad_()
    found = torch.zeros(2, 3, 5, dtype=torch.bool)
    found[:, 1:, 2] = True
    assert torch.autograd.gradcheck(lambda w: calibrate(w, found, 0.4), (weights + 0.05,))


# Choosing heads -----------------------------------------------------------------------------------


def test_only_heads_that_raise_the_score_are_kept():
    baseline = torch.tensor([1.0, 0.0, 1.0, 0.0])
    calibrated = torch.tensor(
        [[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    )
    candidates = [(2, 0), (2, 1), (3, 0), (5, 4)]
    assert improving_heads(calibrated, baseline, candidates) == [(2, 0), (5, 4)]
    assert improving_heads(calibrated, baseline, candidates, margin=0.25) == [(5, 4)]
    with pytest.raises(ValueError, match="4 candidates, but scores of 3"):
        improving_heads(calibrated[:3], baseline, candidates)


# The method in a layer ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("heads", "key_heads", "tokens"), [(6, 2, 37), (4, 4, 21), (9, 3, 50)])
def test_chosen_heads_are_calibrated_and_the_others_bitwise_dense(seed, heads, key_heads, tokens):
    tensors = planted_tensors(seed, heads=heads, key_heads=key_heads, tokens=tokens)
    dense = causal_sdpa(*tensors, scale=SCALE)
    got = prefill(ACT(heads=[(3, 1), (3, 2), (4, 0)]), tensors, layer=3)
    others = [h for h in range(heads) if h not in (1, 2)]
    assert torch.equal(got[:, others], dense[:, others])
    query, key, value = (x.double() for x in tensors)
    _, weights = dense_attention(query, key, value, scale=SCALE, causal=True, return_weights=True)
    expected = calibrate(weights, sinks(column_score(weights)))
    values = value.repeat_interleave(heads // key_heads, dim=1)
    expected = (expected @ values)[:, [1, 2]].float()
    torch.testing.assert_close(got[:, [1, 2]], expected, atol=1e-5, rtol=1e-5)
    assert (got[:, [1, 2]] - dense[:, [1, 2]]).abs().max() > 0.1


def test_a_layer_without_chosen_heads_is_bitwise_dense():
    tensors = planted_tensors()
    dense = causal_sdpa(*tensors, scale=SCALE)
    assert torch.equal(prefill(ACT(heads=[(3, 1)]), tensors, layer=2), dense)
    assert torch.equal(prefill(ACT(heads=[]), tensors, layer=2), dense)
    assert not torch.equal(prefill(ACT(), tensors, layer=2), dense)  # None is every head


def test_heads_without_a_sink_are_bitwise_dense():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (0.1 * torch.randn(2, 4, 30, 16, generator=generator) for _ in range(3))
    dense = causal_sdpa(query, key, value, scale=SCALE)
    assert torch.equal(prefill(ACT(min_rows=8), (query, key, value)), dense)


def test_beta_one_changes_nothing_but_rounding():
    tensors = planted_tensors()
    got = prefill(ACT(beta=1.0), tensors)
    torch.testing.assert_close(got, causal_sdpa(*tensors, scale=SCALE), atol=1e-5, rtol=1e-5)


def test_beta_zero_ignores_the_sink():
    query, key, value = planted_tensors()
    other = value.clone()
    other[:, :, 5] = 1e3
    method = ACT(beta=0.0, min_rows=8)
    # Row 5 sees the sink as its own key; every row has other keys, so none of them keeps it.
    torch.testing.assert_close(
        prefill(method, (query, key, value)), prefill(method, (query, key, other))
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sequence_is_computed_as_alone(side):
    query, key, value = planted_tensors(batch=3)
    padding = torch.ones(3, TOKENS, dtype=torch.bool)
    cuts = [0, 4, 19]
    for sequence, cut in enumerate(cuts):
        padding[sequence, slice(0, cut) if side == "left" else slice(TOKENS - cut, None)] = False
    method = ACT(heads=[(0, 0), (0, 3)], alpha=3.0)
    got = prefill(method, (query, key, value), padding=padding)
    for sequence in range(3):
        real = padding[sequence]
        alone = [x[sequence : sequence + 1, :, real] for x in (query, key, value)]
        assert torch.equal(got[sequence : sequence + 1, :, real], prefill(method, alone))
        assert not got[sequence, :, ~real].any()


def test_sequences_of_a_batch_are_independent():
    tensors = planted_tensors(batch=3)
    together = prefill(ACT(), tensors)
    for one in range(3):
        alone = prefill(ACT(), [x[one : one + 1] for x in tensors])
        torch.testing.assert_close(together[one : one + 1], alone, atol=1e-6, rtol=1e-6)


def test_a_chunk_behind_a_cache_is_calibrated_on_its_own_rows():
    query, key, value = planted_tensors()
    got = prefill(ACT(heads=[(0, 2)]), (query[:, :, -9:], key, value))
    weights = attention_map(query[:, :, -9:], key, SCALE, heads=[2])
    assert weights.shape == (2, 1, 9, TOKENS)
    expected = calibrate(weights, sinks(column_score(weights))) @ value[:, :1]
    torch.testing.assert_close(got[:, 2:3], expected, atol=1e-6, rtol=1e-6)


def test_decoding_is_dense():
    query, key, value = planted_tensors()
    one = query[:, :, -1:]
    got = ACT().decode(one, key, value, scale=SCALE, layer=0)
    assert torch.equal(got, causal_sdpa(one, key, value, scale=SCALE))


def test_settings_reach_the_sinks():
    tensors = planted_tensors(sink=TOKENS - 3)
    dense = causal_sdpa(*tensors, scale=SCALE)
    assert not torch.equal(prefill(ACT(threshold=0.5), tensors), dense)
    for spared in (ACT(threshold=0.9999), ACT(alpha=36.9), ACT(threshold=0.5, min_rows=4)):
        assert torch.equal(prefill(spared, tensors), dense)


def test_gradients_reach_queries_keys_and_values():
    tensors = [x.requires_grad_() for x in planted_tensors()]
    prefill(ACT(heads=[(0, 1)]), tensors).square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in tensors)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"beta": float("nan")}, "beta must be at least 0"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"min_rows": 0}, "min_rows must be an integer of at least 1"),
        ({"heads": [(-1, 0)]}, "the layer of a head must be"),
        ({"heads": [(0, -1)]}, "a head must be"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ACT(**wrong)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="layer 0 has 6 heads, so there is no head 6"):
        prefill(ACT(heads=[(0, 6)]), planted_tensors())
    with pytest.raises(ValueError, match="beta must be at least 0"):
        calibrate(causal_map(), torch.zeros(2, 3, TOKENS, dtype=torch.bool), -1.0)
    with pytest.raises(ValueError, match="no prompt was surveyed"):
        SinkSurvey().stacked()
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="padded batch"):
        prefill(SinkSurvey(), planted_tensors(), padding=padding)


# In a model ---------------------------------------------------------------------------------------


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def prompt_of(tokens, batch=2):
    return torch.randint(97, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_only_layers_behind_the_calibrated_head_change():
    model, prompt = tiny_llama(), prompt_of(29)
    before = model(prompt, output_hidden_states=True).hidden_states
    with attach(model, ACT(heads=[(1, 2)], alpha=1.5)) as method:
        inside = model(prompt, output_hidden_states=True).hidden_states
    assert torch.equal(inside[1], before[1])
    assert not torch.equal(inside[2], before[2])
    assert method.density() == 1
    assert torch.equal(model(prompt, output_hidden_states=True).hidden_states[3], before[3])


def test_generation_calibrates_the_prompt_and_decodes_densely():
    model, prompt = tiny_llama(), prompt_of(29)
    method = ACT(alpha=1.5)
    with attach(model, method):
        prefilled = model(prompt).logits[:, -1].argmax(-1)
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
    assert tokens.shape == (2, 33)
    assert torch.equal(tokens[:, 29], prefilled)
    assert method.density("decode") == 1


def test_left_padding_in_a_model_changes_nothing():
    model, prompt = tiny_llama(), prompt_of(21, batch=1)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), prompt], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with attach(model, ACT(alpha=1.5)):
        alone = model(prompt).logits
        beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, 6:]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=1e-5)


def test_survey_keeps_scores_of_all_layers_and_changes_nothing():
    model, prompt = tiny_llama(), prompt_of(17)
    with attach(model, AttentionMethod()):
        expected = model(prompt).logits
    with attach(model, SinkSurvey()) as survey:
        assert torch.equal(model(prompt).logits, expected)
    scores = survey.stacked()
    assert scores.shape == (2, 3, 4, 17)
    model.set_attn_implementation("eager")
    maps = model(prompt, output_attentions=True).attentions
    torch.testing.assert_close(scores, column_score(torch.stack(maps, dim=1)), atol=1e-5, rtol=0)


def test_random_heads_do_nothing_on_labels_that_mean_nothing():
    # Calibration cannot raise the accuracy on shuffled labels, whichever heads are taken.
    model, prompts = tiny_llama(), prompt_of(19, batch=256)
    labels = torch.randint(4, (256,), generator=torch.Generator().manual_seed(1))
    with attach(model, AttentionMethod()):
        before = model(prompts).logits[:, -1, :4].argmax(-1) == labels
    changes = []
    for draw in range(6):
        generator = torch.Generator().manual_seed(draw)
        heads = [divmod(i, 4) for i in torch.randperm(12, generator=generator)[:4].tolist()]
        with attach(model, ACT(heads=heads, alpha=1.5)):
            after = model(prompts).logits[:, -1, :4].argmax(-1) == labels
        changes.append(after.double() - before.double())
    changes = torch.stack(changes).mean(dim=0)
    error = changes.std() / 256**0.5
    assert error > 0
    assert changes.mean().abs() < 3 * error


def test_smollm2_keeps_its_logits_with_beta_one():
    try:
        asset_path("smollm2")
    except AssetError as error:
        pytest.skip(str(error))
    from reattend.backbones.pretrained.smollm2 import load

    model, tokenizer = load()
    text = "Review: The plot, such as it is, makes no sense at all.\nSentiment:"
    prompt = tokenizer(text, return_tensors="pt").input_ids
    expected = model(prompt, logits_to_keep=1).logits
    with attach(model, ACT(beta=1.0, alpha=2.0)):
        got = model(prompt, logits_to_keep=1).logits
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-4)
    with attach(model, ACT(alpha=2.0)):
        assert not torch.allclose(model(prompt, logits_to_keep=1).logits, expected, atol=1e-2)
