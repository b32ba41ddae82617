"""Selections of the cache: exact at full budget, counted exactly, blind to padding and future."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.baselines.cache_bounds import OracleCache, StreamingCache
from reattend.attention.baselines.h2o import H2O
from reattend.attention.baselines.quest import Pages, Quest, score_bounds
from reattend.attention.baselines.snapkv import AdaSnapKV, SnapKV
from reattend.attention.decoding import decode, read_prompt
from reattend.attention.dense import dense_attention
from reattend.attention.host import attach
from reattend.attention.kv_selection import (
    Combined,
    attend_to_chosen,
    group_heads,
    received_attention,
)
from reattend.attention.method import AttentionMethod
from reattend.attention.registry import build_method

pytestmark = pytest.mark.filterwarnings("ignore:.*left nothing out")

STEPS, LENGTH = 32, 61
SNAP = {"window": 8, "kernel": 3, "recent": 4, "sink": 2}
# Each method with room for everything, and with little room.
METHODS = {
    "streaming_cache": ({"budget": 200}, {"budget": 12}),
    "snapkv": ({"capacity": 200, **SNAP}, {"capacity": 12, **SNAP}),
    "ada_snapkv": ({"capacity": 200, **SNAP}, {"capacity": 12, **SNAP}),
    "h2o": ({"budget": 200}, {"budget": 12}),
    "quest": ({"budget": 200, "page": 4}, {"budget": 12, "page": 4}),
    "oracle_cache": ({"budget": 200}, {"budget": 12}),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def left_padded(tokens, pad=17):
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, :pad] = False
    return real


def tensors(keys=50, seed=0, dtype=torch.float32, queries=1):
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": dtype}
    query = torch.randn(2, 6, queries, 8, **shape)
    return query, torch.randn(2, 3, keys, 8, **shape), torch.randn(2, 3, keys, 8, **shape)


# Inside the model


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("padded", [False, True])
def test_full_budget_equals_dense_decoding(model, tokens, name, padded):
    prompt = read_prompt(model, tokens, real=left_padded(tokens) if padded else None)
    dense = decode(model, prompt, "dense", steps=STEPS)
    ours = decode(model, prompt, name, given=dense.tokens, **METHODS[name][0])
    assert torch.equal(ours.tokens, dense.tokens)
    torch.testing.assert_close(ours.log_likelihood, dense.log_likelihood, atol=1e-5, rtol=1e-5)
    assert ours.kv_reads == dense.kv_reads


@pytest.mark.parametrize("name", METHODS)
def test_generate_inside_attach_equals_the_decode_loop(model, tokens, name):
    settings = METHODS[name][1]
    prompt = read_prompt(model, tokens)
    expected = decode(model, prompt, name, steps=STEPS, **settings)
    with attach(model, name, **settings) as method:
        generated = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
        )
    assert torch.equal(generated[:, LENGTH:], expected.tokens)
    assert method.kv_reads == sum(expected.kv_reads)
    assert method.selection_reads == sum(expected.selection_reads)
    assert method.density() == 1.0
    assert method.density("decode") < 0.5


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_sequence_is_decoded_as_it_is_alone(model, tokens, name):
    settings = METHODS[name][1]
    padded = read_prompt(model, tokens, real=left_padded(tokens))
    together = decode(model, padded, name, given=tokens[:, :STEPS], **settings)
    alone = [
        decode(model, read_prompt(model, row[None]), name, given=given[None], **settings)
        for row, given in zip([tokens[0, 17:], tokens[1]], tokens[:, :STEPS], strict=True)
    ]
    for row, single in enumerate(alone):
        torch.testing.assert_close(
            together.log_likelihood[row], single.log_likelihood[0], atol=1e-4, rtol=1e-4
        )
    assert sum(together.kv_reads) == sum(sum(single.kv_reads) for single in alone)


@pytest.mark.parametrize("name", METHODS)
def test_padding_tokens_change_nothing(model, tokens, name):
    real = left_padded(tokens)
    other = torch.where(real, tokens, (tokens + 31) % 97)
    results = [
        decode(
            model, read_prompt(model, t, real=real), name, given=tokens[:, :8], **METHODS[name][1]
        ).log_likelihood
        for t in (tokens, other)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", METHODS)
def test_later_tokens_do_not_reach_back(model, tokens, name):
    given = tokens[:, :12].clone()
    prompt = read_prompt(model, tokens)
    before = decode(model, prompt, name, given=given, **METHODS[name][1]).log_likelihood
    given[:, 8:] = (given[:, 8:] + 5) % 97
    after = decode(model, prompt, name, given=given, **METHODS[name][1]).log_likelihood
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


def test_reads_of_dense_decoding_and_bytes(model, tokens):
    result = decode(model, read_prompt(model, tokens), "dense", steps=4)
    heads = 2 * 3 * 2  # sequences, key heads, layers
    assert result.kv_reads == tuple(heads * (LENGTH + step) for step in (1, 2, 3))
    assert result.selection_reads == (0.0, 0.0, 0.0)
    assert result.entry_bytes == 2 * 8 * 4
    mean_length = LENGTH + 2
    assert result.bytes_per_token == mean_length * 3 * 2 * 64
    assert result.tokens_per_second > 0


@pytest.mark.parametrize(
    ("name", "per_head", "choosing"),
    [
        ("streaming_cache", [12, 12, 12], [0, 0, 0]),
        ("snapkv", [13, 14, 15], [0, 0, 0]),
        ("ada_snapkv", [13, 14, 15], [0, 0, 0]),
        ("h2o", [12, 12, 12], [0, 0, 0]),
        # 62, 63 and 64 entries: 15 full pages before the current one, which holds 2, 3, 4.
        ("quest", [14, 15, 16], [15, 15, 15]),
        ("oracle_cache", [12, 12, 12], [31, 31.5, 32]),
    ],
)
def test_reads_of_each_method(model, tokens, name, per_head, choosing):
    result = decode(model, read_prompt(model, tokens), name, steps=4, **METHODS[name][1])
    assert result.kv_reads == tuple(12 * count for count in per_head)
    assert result.selection_reads == tuple(12 * float(count) for count in choosing)


def test_given_tokens_that_are_greedy_change_nothing(model, tokens):
    prompt = read_prompt(model, tokens)
    free = decode(model, prompt, "h2o", steps=9, budget=10)
    given = decode(model, prompt, "h2o", given=free.tokens, budget=10)
    assert torch.equal(free.tokens, given.tokens)
    assert torch.equal(free.log_likelihood, given.log_likelihood)


def test_a_prompt_serves_many_decodings(model, tokens):
    prompt = read_prompt(model, tokens)
    first = decode(model, prompt, "dense", steps=5)
    decode(model, prompt, "streaming_cache", steps=5, budget=6)
    assert torch.equal(decode(model, prompt, "dense", steps=5).log_likelihood, first.log_likelihood)
    assert prompt.cache.get_seq_length() == LENGTH


def test_a_sparse_prompt_and_a_sparse_cache(model, tokens):
    prefill = BlockTopK(k=2, block_size=8)
    combined = Combined(prefill, H2O(budget=12))
    with attach(model, combined):
        generated = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    prompt = read_prompt(model, tokens, prefill=BlockTopK(k=2, block_size=8))
    expected = decode(model, prompt, "h2o", steps=6, budget=12)
    assert torch.equal(generated[:, LENGTH:], expected.tokens)
    assert combined.density() < 0.7
    assert combined.density("decode") < 0.25
    assert combined.kv_reads == sum(expected.kv_reads)
    combined.clear()
    assert combined.kv_reads == 0
    assert combined.selection_reads == 0


def test_a_cache_that_was_read_without_the_method_is_refused(model, tokens):
    cache = model(tokens, use_cache=True).past_key_values
    with attach(model, "h2o", budget=8), pytest.raises(ValueError, match="read the prompt"):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)


def test_decode_wants_steps_or_tokens(model, tokens):
    prompt = read_prompt(model, tokens)
    with pytest.raises(ValueError, match="either steps or given"):
        decode(model, prompt, "dense")
    with pytest.raises(ValueError, match="at least one step"):
        decode(model, prompt, "dense", steps=0)


# The pieces


@pytest.mark.parametrize("seed", [0, 1])
def test_chosen_entries_equal_masked_dense_attention(seed):
    query, key, value = tensors(seed=seed, dtype=torch.float64)
    chosen = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(seed)) < 0.3
    chosen[..., -1] = True
    output, weights = attend_to_chosen(query, key, value, chosen, scale=0.3)
    mask = chosen.repeat_interleave(2, dim=1)[:, :, None]
    expected = dense_attention(query, key, value, mask=mask, scale=0.3, return_weights=True)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(weights.flatten(1, 2), expected[1].squeeze(2))


@pytest.mark.parametrize("queries", [50, 13])
def test_received_attention_in_pieces(monkeypatch, queries):
    query, key, _ = tensors(queries=queries, dtype=torch.float64)
    monkeypatch.setattr("reattend.attention.kv_selection.ROWS", 7)
    _, weights = dense_attention(query, key, key, scale=0.3, causal=True, return_weights=True)
    torch.testing.assert_close(received_attention(query, key, scale=0.3), weights.sum(dim=2))


def test_quest_bounds_every_score_of_a_page():
    query, key, _ = tensors(keys=48)
    pages = Pages.of(key, 8)
    scores = group_heads((query @ key.repeat_interleave(2, 1).mT).squeeze(2), 3)
    bounds = torch.stack(
        [score_bounds(query[:, [g, g + 2, g + 4]], pages.smallest, pages.largest) for g in (0, 1)],
        dim=2,
    )
    best = scores.unflatten(-1, (6, 8)).amax(dim=-1)
    assert (bounds >= best - 1e-5).all()
    channels = torch.maximum(query[:, ::2] * pages.smallest, query[:, ::2] * pages.largest).sum(
        dim=-1
    )
    torch.testing.assert_close(bounds[:, :, 0], channels)
    both = score_bounds(query, pages.smallest, pages.largest)
    torch.testing.assert_close(both, bounds.sum(dim=2))


def test_quest_with_pages_of_one_is_exact_top_k():
    query, key, _ = tensors(keys=33)
    method = Quest(budget=5, page=1)
    state = method.begin(query, key[:, :, :32], scale=0.3)
    chosen = method.choose(query, key, state, scale=0.3)
    scores = group_heads((query @ key.repeat_interleave(2, 1).mT).squeeze(2), 3).sum(dim=2)
    best = scores[..., :32].topk(5, dim=-1).indices
    expected = torch.zeros_like(chosen).scatter(-1, best, True)
    expected[..., 32] = True
    assert torch.equal(chosen, expected)


def test_quest_learns_of_pages_as_they_fill():
    query, key, _ = tensors(keys=41)
    method = Quest(budget=8, page=4)
    grown = method.begin(query, key[:, :, :9], scale=0.3)
    for keys in range(10, 42):
        chosen = method.choose(query, key[:, :, :keys], grown, scale=0.3)
    fresh = method.choose(query, key, method.begin(query, key, scale=0.3), scale=0.3)
    assert torch.equal(chosen, fresh)
    assert torch.equal(grown.largest, Pages.of(key, 4).largest)


def snap_scores(query, key, importance):
    """SnapKV's smoothed scores by plain loops over the window and the neighbours."""
    weights = torch.zeros(2, 6, 8, key.shape[2], dtype=key.dtype)
    keys = key.repeat_interleave(2, 1)
    for row in range(8):
        stop = key.shape[2] - 7 + row
        scores = 0.3 * (query[:, :, [row - 8]] @ keys[:, :, :stop].mT)
        weights[:, :, row, :stop] = scores.softmax(-1).squeeze(2)
    raw = importance(weights.unflatten(1, (3, 2)))
    padded = F.pad(raw, (1, 1))
    return (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_snapkv_keeps_the_forced_and_the_best(seed):
    query, key, _ = tensors(keys=50, seed=seed, dtype=torch.float64, queries=50)
    kept = SnapKV(capacity=14, **SNAP).begin(query, key, scale=0.3)
    scores = snap_scores(query, key, lambda w: w.sum(3).mean(2))
    scores[..., :2] = scores[..., -4:] = float("inf")
    expected = torch.zeros_like(kept).scatter(-1, scores.topk(14).indices, True)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ada_snapkv_moves_capacity_between_heads(seed):
    query, key, _ = tensors(keys=50, seed=seed, dtype=torch.float64, queries=50)
    # One head looks at few keys, so its large weights win.
    query[:, :2] *= 6
    kept = AdaSnapKV(capacity=14, least_share=0.6, **SNAP).begin(query, key, scale=0.3)
    counts = kept.sum(-1)
    assert (counts.sum(-1) == 14 * 3).all()
    assert (counts >= 8).all()
    assert counts.unique().numel() > 1
    assert kept[..., :2].all()
    assert kept[..., -4:].all()
    scores = snap_scores(query, key, lambda w: w.amax((2, 3)))
    # Beyond the guaranteed ones, no entry left out beats an entry taken in.
    forced = scores.clone()
    forced[..., :2] = forced[..., -4:] = float("inf")
    own = torch.zeros_like(kept).scatter(-1, forced.topk(8).indices, True)
    for row in range(2):
        taken, left = kept[row] & ~own[row], ~kept[row]
        assert scores[row][taken].min() >= scores[row][left].max()


def test_ada_snapkv_with_full_minimum_is_uniform():
    query, key, _ = tensors(keys=50, queries=50)
    kept = AdaSnapKV(capacity=14, least_share=1.0, **SNAP).begin(query, key, scale=0.3)
    assert (kept.sum(-1) == 14).all()


def test_h2o_against_a_loop():
    query, key, _ = tensors(keys=30, queries=20)
    method = H2O(budget=7, recent=3)
    state = method.begin(query, key[:, :, :20], scale=0.3)
    received = state.received[0, 0].tolist()
    kept = list(range(20))
    for keys in range(21, 31):
        chosen = method.choose(query[:, :, -1:], key[:, :, :keys], state, scale=0.3)
        kept.append(keys - 1)
        received.append(0.0)
        while len(kept) > 7:
            kept.remove(min((i for i in kept if i < keys - 3), key=lambda i: received[i]))
        assert chosen[0, 0].nonzero().flatten().tolist() == kept
        weights = torch.rand(2, 3, 2, keys, generator=torch.Generator().manual_seed(keys))
        weights = weights * chosen[:, :, None]
        method.observe(weights, state)
        received = [r + w for r, w in zip(received, weights[0, 0].sum(0).tolist(), strict=True)]
        torch.testing.assert_close(state.received[0, 0], torch.tensor(received))


def test_h2o_starts_from_the_attention_of_the_whole_prompt():
    query, key, _ = tensors(keys=30, queries=30, dtype=torch.float64)
    state = H2O(budget=7).begin(query, key, scale=0.3)
    _, weights = dense_attention(query, key, key, scale=0.3, causal=True, return_weights=True)
    torch.testing.assert_close(state.received, group_heads(weights.sum(2), 3).sum(2))


def test_streaming_cache_keeps_sinks_and_window():
    query, key, _ = tensors(keys=10)
    method = StreamingCache(budget=5, sink=2)
    state = method.begin(query, key, scale=0.3)
    chosen = method.choose(query, key, state, scale=0.3)
    assert chosen[0, 0].int().tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1]


def test_oracle_cache_covers_most():
    query, key, _ = tensors(keys=40)
    chosen = OracleCache(budget=6).choose(query, key, None, scale=0.3)
    _, weights = dense_attention(query, key, key, scale=0.3, return_weights=True)
    mean = group_heads(weights.squeeze(2), 3).mean(2)
    torch.testing.assert_close((mean * chosen).sum(-1), mean.topk(6).values.sum(-1))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("snapkv", {"capacity": 131}, "capacity must be an integer of at least 132"),
        ("snapkv", {"capacity": 500, "kernel": 4}, "kernel must be odd"),
        ("ada_snapkv", {"capacity": 500, "least_share": 0.0}, "least_share must lie in"),
        ("quest", {"budget": 15}, "budget must be an integer of at least 16"),
        ("h2o", {"budget": 4, "recent": 5}, "recent .5. must not exceed"),
        ("streaming_cache", {"budget": 4}, "budget must be an integer of at least 5"),
        ("oracle_cache", {"budget": 0}, "budget must be an integer of at least 1"),
    ],
)
def test_wrong_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_method(name, **settings)


def test_dense_is_a_method_like_any_other():
    assert isinstance(build_method("dense"), AttentionMethod)
