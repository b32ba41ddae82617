"""Oracles of Recycled Attention: full budget, schedules, invariants of the cache, training masks."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.cache_bounds import StreamingCache
from reattend.attention.baselines.h2o import H2O
from reattend.attention.decoding import decode, read_prompt
from reattend.attention.dense import dense_attention
from reattend.attention.host import attach
from reattend.attention.kv_selection import best_entries, group_heads
from reattend.attention.method import AttentionMethod
from reattend.long_context.recycled_attention import (
    RecycledAttention,
    RefreshedStreaming,
    SegmentAttention,
    most_important,
    query_similarity,
    segment_mask,
)

LENGTH, STEPS, LAYERS, KEY_HEADS, BATCH = 45, 23, 2, 3, 2
HEADS = LAYERS * KEY_HEADS * BATCH


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=KEY_HEADS,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    shape = (BATCH, LENGTH + STEPS)
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompt(model, tokens):
    return read_prompt(model, tokens[:, :LENGTH])


@pytest.fixture(scope="module")
def given(tokens):
    return tokens[:, LENGTH:]


def tensors(tokens=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": torch.float64}
    query = 2 * torch.randn(BATCH, 6, tokens, 8, **shape)
    key, value = (torch.randn(BATCH, KEY_HEADS, tokens, 8, **shape) for _ in range(2))
    return query, key, value


def step_through(method, query, key, value, prompt, scale=0.3):
    """Outputs and states of decoding the tokens behind a prompt, one by one, on plain tensors."""
    method.clear()
    method.begin_decoding(query[:, :, :prompt], key[:, :, :prompt], scale=scale, layer=0)
    outputs, kept = [], []
    for t in range(prompt, query.shape[2]):
        call = query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1]
        outputs.append(method.decode(*call, scale=scale, layer=0))
        kept.append(method.states(0)[0].kept)
    return torch.cat(outputs, dim=2), kept


def mean_weights(query, key, t, scale=0.3):
    """Attention of token t on all tokens up to it, the mean over each group."""
    part = query[:, :, t : t + 1], key[:, :, : t + 1], key[:, :, : t + 1]
    _, weights = dense_attention(*part, scale=scale, return_weights=True)
    return group_heads(weights, KEY_HEADS).mean(dim=2).squeeze(2)


# Equal to dense decoding


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 5, "stride": 1},
        {"budget": LENGTH + STEPS, "stride": 7},
        {"budget": LENGTH + STEPS, "stride": None},
        {"budget": 5, "stride": 1, "threshold": 1.1},
    ],
)
@pytest.mark.parametrize("method", [RecycledAttention, RefreshedStreaming])
def test_full_steps_only_or_full_budget_is_dense(model, prompt, method, settings):
    dense = decode(model, prompt, "dense", steps=STEPS)
    ours = decode(model, prompt, method(**settings), steps=STEPS)
    assert torch.equal(ours.tokens, dense.tokens)
    torch.testing.assert_close(ours.log_likelihood, dense.log_likelihood, atol=1e-5, rtol=1e-5)
    assert ours.kv_reads == dense.kv_reads


def test_a_full_step_sees_tokens_of_recycle_steps_again(model, prompt, given):
    """In a model of one layer nothing is approximated but attention: full steps are dense there."""
    config = LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 1})
    torch.manual_seed(2)
    shallow = LlamaForCausalLM(config).eval()
    start = read_prompt(shallow, given[:, :20])
    dense = decode(shallow, start, "dense", given=given)
    ours = decode(shallow, start, RecycledAttention(budget=4, stride=5), given=given)
    # The likelihood at index t comes of step t, which the prompt is step 0 of.
    full = torch.arange(STEPS) % 5 == 0
    difference = (ours.log_likelihood - dense.log_likelihood).abs()
    assert difference[:, full].max() < 1e-5
    assert (difference[:, ~full] > 1e-4).any(dim=0).all()


# StreamingLLM is the same code with another selection


@pytest.mark.parametrize("sink", [0, 1, 4])
def test_streaming_llm_is_a_selection(model, prompt, given, sink):
    expected = decode(model, prompt, StreamingCache(budget=12, sink=sink), given=given)
    method = RefreshedStreaming(budget=12, stride=None, sink=sink)
    ours = decode(model, prompt, method, given=given)
    torch.testing.assert_close(ours.log_likelihood, expected.log_likelihood, atol=1e-6, rtol=1e-6)
    assert ours.kv_reads == expected.kv_reads


def test_refreshed_streaming_differs_only_by_its_full_steps(model, prompt, given):
    once = decode(model, prompt, RefreshedStreaming(budget=12, stride=None), given=given)
    often = decode(model, prompt, RefreshedStreaming(budget=12, stride=6), given=given)
    # Step 6 feeds the token of index 5 and is the first full one.
    assert torch.equal(once.log_likelihood[:, :6], often.log_likelihood[:, :6])
    assert not torch.allclose(once.log_likelihood[:, 6:], often.log_likelihood[:, 6:])


# Reads and the cache


@pytest.mark.parametrize(("budget", "stride"), [(8, 4), (20, 7), (1, 3), (2, 100)])
@pytest.mark.parametrize("method", [RecycledAttention, RefreshedStreaming])
def test_reads_are_all_at_full_steps_and_k_between(model, prompt, given, method, budget, stride):
    reader = method(budget=budget, stride=stride, sink=0)
    result = decode(model, prompt, reader, given=given)
    expected = [LENGTH + t if t % stride == 0 else budget for t in range(1, STEPS)]
    assert result.kv_reads == tuple(HEADS * count for count in expected)
    assert sum(result.selection_reads) == 0


def test_reads_without_eviction_grow_until_the_full_step(model, prompt, given):
    method = RecycledAttention(budget=8, stride=4, evict=False)
    result = decode(model, prompt, method, given=given[:, :12])
    expected = [LENGTH + t if t % 4 == 0 else 8 + t % 4 for t in range(1, 12)]
    assert result.kv_reads == tuple(HEADS * count for count in expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recycled_cache_against_a_loop(seed):
    query, key, value = tensors(seed=seed)
    method = RecycledAttention(budget=7, stride=5, sink=1)
    outputs, kept = step_through(method, query, key, value, prompt=24)
    for b in range(BATCH):
        for h in range(KEY_HEADS):
            weights = mean_weights(query, key, 23)[b, h]
            cache = [0, *[i for i in weights.argsort(descending=True).tolist() if i][:6]]
            score = dict(enumerate(weights.tolist()))
            newest = None
            for step, t in enumerate(range(24, 50), start=1):
                spare = [i for i in cache if i not in (0, newest)]
                cache.remove(min(spare, key=score.__getitem__))
                cache.append(t)
                newest = t
                full = step % 5 == 0
                seen = list(range(t + 1)) if full else sorted(cache)
                part = query[b, 2 * h : 2 * h + 2, t] @ key[b, h, seen].T * 0.3
                weights = part.softmax(dim=-1)
                torch.testing.assert_close(
                    outputs[b, 2 * h : 2 * h + 2, t - 24], weights @ value[b, h, seen]
                )
                score = dict(zip(seen, weights.mean(dim=0).tolist(), strict=True))
                if full:
                    order = sorted(range(1, t + 1), key=score.__getitem__, reverse=True)
                    cache = [0, *order[:6]]
                    newest = t if t in cache else None
                assert kept[t - 24][b, h].nonzero().flatten().tolist() == sorted(cache)


@pytest.mark.parametrize("seed", [0, 1])
def test_size_newest_and_sinks_of_the_cache(seed):
    query, key, value = tensors(tokens=80, seed=seed)
    # The third sink is repulsive to all: it has to be kept by force.
    key[:, :, 2] = -5 * query.mean(dim=(1, 2))[:, None]
    method = RecycledAttention(budget=9, stride=11, sink=3)
    _, kept = step_through(method, query, key, value, prompt=30)
    for step, mask in enumerate(kept, start=1):
        assert mask.shape[-1] == 30 + step
        assert (mask.sum(dim=-1) == 9).all()
        assert mask[..., :3].all()
        if step % 11 and step % 11 != 1:
            assert mask[..., -1].all()
            assert mask[..., -2].all()


def test_selection_differs_between_key_heads_and_layers(model, prompt, given):
    method = RecycledAttention(budget=8, stride=4)
    for layer, start in prompt.starts.items():
        method.begin_decoding(key=prompt.cache.layers[layer].keys, layer=layer, **start)
    first, second = (method.states(layer)[0].kept for layer in range(LAYERS))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 1])


def test_the_set_is_selected_by_the_mean_over_the_group():
    query, key, _ = tensors()
    state = RecycledAttention(budget=9, sink=0).begin(query, key, scale=0.3)
    assert torch.equal(state.kept, best_entries(mean_weights(query, key, 49), 9))


# Recovered attention


def recovered(query, key, anchor, t, selected):
    """Share of token t's attention to the tokens up to `anchor` that a selection holds."""
    weights = mean_weights(query, key, t)[..., : anchor + 1]
    return (weights * selected).sum(dim=-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fresh_selection_covers_most_and_recycled_equals_it_at_distance_zero(seed):
    query, key, _ = tensors(tokens=120, seed=seed)
    drift = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    query[:, :, 100:] = (1 - 0.5 * drift) * query[:, :, 100:101] + 0.5 * drift * query[:, :, 100:]
    random = best_entries(
        torch.rand(BATCH, KEY_HEADS, 101, generator=torch.Generator().manual_seed(seed)), 10
    )
    recycled = best_entries(mean_weights(query, key, 100), 10)
    means = []
    for t in (100, 105, 119):
        fresh = best_entries(mean_weights(query, key, t)[..., :101], 10)
        ours, best, chance = (recovered(query, key, 100, t, s) for s in (recycled, fresh, random))
        assert (best >= ours - 1e-12).all()
        if t == 100:
            torch.testing.assert_close(ours, best)
        means.append((best.mean(), ours.mean(), chance.mean()))
    assert all(best >= ours >= chance for best, ours, chance in means)


def test_with_constant_queries_the_recycled_set_stays_the_best():
    query, key, value = tensors(tokens=60)
    query = query[:, :KEY_HEADS, :1].repeat_interleave(2, dim=1).expand(-1, -1, 60, -1)
    # New tokens receive next to nothing, so the best entries are all in the prompt.
    key[:, :, 40:] = -4 * group_heads(query[:, :, 40:], KEY_HEADS).mean(dim=2)
    method = RecycledAttention(budget=22, stride=None, sink=0)
    _, kept = step_through(method, query, key, value, prompt=40)
    best = best_entries(mean_weights(query, key, 59), 20)
    assert (kept[-1] >= best).all()


# The schedule that follows the query


def test_thresholds_at_the_ends(model, prompt, given):
    def nll(**settings):
        return decode(model, prompt, RecycledAttention(budget=8, **settings), given=given)

    never, once = nll(stride=3, threshold=-1.1), nll(stride=None)
    assert torch.equal(never.log_likelihood, once.log_likelihood)
    always, fixed = nll(stride=3, threshold=1.1), nll(stride=3)
    assert torch.equal(always.log_likelihood, fixed.log_likelihood)
    assert always.kv_reads == fixed.kv_reads
    between = sum(nll(stride=3, threshold=0.2).kv_reads)
    assert sum(never.kv_reads) < between < sum(always.kv_reads)


def test_similarity_is_to_the_query_of_the_last_full_step():
    turn = [0.0, 0.3, 0.6, 0.9, 0.1, 0.3]
    directions = torch.tensor([[torch.tensor(x).cos(), torch.tensor(x).sin()] for x in turn])
    query = directions.double()[None, None].repeat(1, 2, 1, 1)
    query[:, 1] *= 7
    key = torch.ones(1, 1, 6, 2, dtype=torch.float64)
    method = RecycledAttention(budget=2, stride=1, threshold=0.8, sink=0)
    method.begin_decoding(query[:, :, :1], key[:, :, :1], scale=1.0, layer=0)
    full = []
    for t in range(1, 6):
        part = query[:, :, t : t + 1], key[:, :, : t + 1], key[:, :, : t + 1]
        method.decode(*part, scale=1.0, layer=0)
        full.append(bool(method.states(0)[0].full))
    # cos 0.3 and 0.6 are above 0.8, cos 0.9 below; from 0.9, 0.1 is too far; from 0.1, 0.3 is not.
    assert full == [False, False, True, True, False]
    same = query_similarity(query[:, :, 3:4], query[:, :, :1])
    torch.testing.assert_close(same, torch.tensor([0.9], dtype=torch.float64).cos())


def test_layers_and_sequences_decide_apart(model, prompt, given):
    method = RecycledAttention(budget=8, stride=1, threshold=0.2)
    seen = []
    original = method.choose

    def choose(query, key, state, *, scale):
        chosen = original(query, key, state, scale=scale)
        seen.append(state.full.tolist())
        return chosen

    method.choose = choose
    decode(model, prompt, method, given=given)
    layers = [seen[layer::LAYERS] for layer in range(LAYERS)]
    assert layers[0] != layers[1]
    assert any(first != second for first, second in seen)


# Inside the model


DYNAMIC = {"budget": 8, "stride": 3, "threshold": 0.3}
VARIANTS = [
    RecycledAttention(budget=8, stride=5),
    RecycledAttention(**DYNAMIC),
    RefreshedStreaming(budget=8, stride=5),
]


@pytest.mark.parametrize("method", VARIANTS)
def test_generate_equals_the_decode_loop(model, prompt, tokens, method):
    expected = decode(model, prompt, method, steps=STEPS)
    method.clear()
    with attach(model, method):
        generated = model.generate(
            tokens[:, :LENGTH],
            attention_mask=torch.ones(BATCH, LENGTH, dtype=torch.long),
            max_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
        )
    assert torch.equal(generated[:, LENGTH:], expected.tokens)
    assert method.kv_reads == sum(expected.kv_reads)


@pytest.mark.parametrize("method", VARIANTS)
def test_a_padded_sequence_is_decoded_as_it_is_alone(model, tokens, given, method):
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[0, :17] = False
    padded = read_prompt(model, tokens[:, :LENGTH], real=real)
    together = decode(model, padded, method, given=given)
    for row, start in enumerate((17, 0)):
        single = read_prompt(model, tokens[row : row + 1, start:LENGTH])
        alone = decode(model, single, method, given=given[row : row + 1])
        torch.testing.assert_close(
            together.log_likelihood[row], alone.log_likelihood[0], atol=1e-4, rtol=1e-4
        )


def test_h2o_loses_what_recycling_finds_again():
    """The token that matters late matters to nobody before: eviction has dropped it by then."""
    query, key, value = tensors(tokens=60)
    query[..., 0] = 0
    key[..., 0] = 0
    key[:, :, 10, 0] = 20
    query[:, :, 55:, 0] = 20
    recycled, _ = step_through(RecycledAttention(budget=8, stride=8), query, key, value, prompt=40)
    h2o, lost = H2O(budget=8), []
    h2o.begin_decoding(query[:, :, :40], key[:, :, :40], scale=0.3, layer=0)
    for t in range(40, 60):
        part = query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1]
        lost.append(h2o.decode(*part, scale=0.3, layer=0))
    target = value[:, :, 10].repeat_interleave(2, dim=1)
    # Token 55 is step 16, a full one; the steps after it recycle what it found.
    for t in (55, 56, 58):
        torch.testing.assert_close(recycled[:, :, t - 40], target)
        assert not torch.allclose(lost[t - 40].squeeze(2), target, atol=0.1)


# Masks for training


@pytest.mark.parametrize(("budget", "stride"), [(8, 5), (3, 4), (200, 5), (8, 1), (8, 100)])
def test_segment_attention_equals_step_by_step_decoding(model, tokens, given, budget, stride):
    prompt = read_prompt(model, tokens[:, :LENGTH])
    stepwise = RecycledAttention(budget=budget, stride=stride, evict=False)
    expected = decode(model, prompt, stepwise, given=given).log_likelihood
    with attach(model, SegmentAttention(budget=budget, stride=stride, prompt=LENGTH)) as masked:
        logits = model(tokens).logits[:, LENGTH - 1 : -1]
    ours = logits.log_softmax(dim=-1).gather(-1, given[..., None]).squeeze(-1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (masked.density() == 1) == (budget == 200 or stride == 1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("start", "stride", "sink"), [(0, 7, 0), (12, 5, 1), (30, 100, 2)])
def test_segment_mask_against_a_loop(seed, start, stride, sink):
    query, key, _ = tensors(tokens=47, seed=seed)
    settings = {"budget": 6, "stride": stride, "start": start, "sink": sink, "scale": 0.3}
    mask = segment_mask(query, key, **settings)
    for t in range(47):
        expected = torch.zeros(BATCH, KEY_HEADS, 47, dtype=torch.bool)
        expected[..., : t + 1] = True
        if t > start and (t - start) % stride:
            anchor = t - (t - start) % stride
            selected = most_important(mean_weights(query, key, anchor), 6, sink)
            expected[..., : anchor + 1] = selected
        assert torch.equal(mask[:, :, t], expected), t


def test_segment_attention_has_gradients_where_the_mask_is_open():
    query, key, value = (x.requires_grad_() for x in tensors(tokens=33))
    method = SegmentAttention(budget=4, stride=6, prompt=10)
    output = method.prefill(query, key, value, scale=0.3, layer=0)
    mask = segment_mask(query, key, budget=4, stride=6, start=9, scale=0.3)
    expected = dense_attention(query, key, value, mask=mask.repeat_interleave(2, dim=1), scale=0.3)
    torch.testing.assert_close(output, expected)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).double()
    ours = torch.autograd.grad((output * target).sum(), (query, key, value))
    reference = torch.autograd.grad((expected * target).sum(), (query, key, value))
    torch.testing.assert_close(ours, reference)
    last = method.prefill(query, key, value, scale=0.3, layer=0)[:, :, 32]
    (reach,) = torch.autograd.grad(last.square().sum(), value)
    assert torch.equal(reach.abs().sum(dim=-1) > 0, mask[:, :, 32])


def test_segment_attention_of_a_padded_sequence(model, tokens):
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[0, :13] = False
    positions = (real.long().cumsum(dim=-1) - 1).clamp_min(0)
    with attach(model, SegmentAttention(budget=5, stride=6, prompt=20)):
        call = {"attention_mask": real.long(), "position_ids": positions}
        together = model(tokens[:, :LENGTH], **call).logits[0, 13:]
        alone = model(tokens[:1, 13:LENGTH]).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1}, "budget must be an integer of at least 2"),
        ({"budget": 4, "sink": 4}, "budget must be an integer of at least 5"),
        ({"stride": 0}, "stride must be an integer of at least 1"),
        ({"stride": None, "threshold": 0.5}, "a threshold needs a stride"),
        ({"sink": -1}, "sink must be an integer of at least 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        RecycledAttention(**settings)


def test_wrong_settings_of_segments():
    with pytest.raises(ValueError, match="prompt must be an integer of at least 1"):
        SegmentAttention(budget=4, stride=2, prompt=0)
    query, key, value = tensors()
    method = SegmentAttention(budget=4, stride=2)
    with pytest.raises(ValueError, match="whole sequences"):
        method.prefill(query[:, :, 40:], key, value, scale=0.3, layer=0)


def test_the_class_is_a_method():
    assert isinstance(RecycledAttention(), AttentionMethod)
