"""Oracles of ProxyAttn."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.blocks import causal_block_mask, density, expand_to_tokens
from reattend.attention.dense import dense_attention, repeat_key_heads
from reattend.attention.host import attach
from reattend.long_context.proxyattn import (
    ProxyAttn,
    block_max,
    blocks_to_cover,
    last_block_mass,
    proxy_heads,
    proxy_scores,
)

SHAPES = [  # batch, query heads, key heads, queries, keys, block size, stride, groups
    pytest.param(1, 2, 2, 128, 128, 16, 1, 1, id="H2-T128-b16-s1-g1"),
    pytest.param(2, 6, 2, 111, 111, 16, 4, 1, id="H6kv2-T111-b16-s4-g1"),
    pytest.param(1, 6, 2, 101, 101, 12, 3, 2, id="H6kv2-T101-b12-s3-g2"),
    pytest.param(1, 4, 4, 45, 103, 16, 4, 2, id="H4-Q45-T103-b16-s4-g2"),
    pytest.param(2, 3, 1, 29, 90, 8, 8, 1, id="H3kv1-Q29-T90-b8-s8-g1"),
]
EACH = pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "queries", "keys", "size", "stride", "groups"), SHAPES
)
SCALE = 0.3


def tensors(batch, heads, key_heads, queries, keys, *, seed=0, dtype=torch.float32):
    """Queries, keys and values with a sink; the heads run from nearly even to peaked attention."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, 16, generator=generator, dtype=dtype)

    query, key, value = (
        normal(batch, heads, queries),
        *(normal(batch, key_heads, keys) for _ in "kv"),
    )
    query *= torch.linspace(0.3, 4.0, heads, dtype=dtype)[:, None, None]
    key[:, :, 0] += query.mean(dim=(1, 2))[:, None]
    return query, key, value


def method(gamma=0.7, *, groups=1, stride=1, min_budget=0, block_size=16):
    settings = {"groups": groups, "stride": stride, "block_size": block_size}
    return ProxyAttn(gamma=gamma, min_budget=min_budget, **settings)


# Scores -------------------------------------------------------------------------------------------


def loop_scores(query, key, *, size, stride):
    """One proxy in plain loops: windows of `stride` tokens stand for their first one that is there."""
    queries, keys = len(query), len(key)
    shift = keys - queries
    rows = range(shift // size, math.ceil(keys / size))
    scores = torch.zeros(len(rows), math.ceil(keys / size), dtype=query.dtype)
    for window in range(shift // stride, math.ceil(keys / stride)):
        position = max(window * stride, shift)
        seen = range(0, position + 1, stride)
        weights = torch.stack([SCALE * query[position - shift].dot(key[j]) for j in seen]).softmax(
            0
        )
        row = position // size - rows[0]
        for j, weight in zip(seen, weights, strict=True):
            scores[row, j // size] = torch.maximum(scores[row, j // size], weight)
    return scores


@EACH
def test_scores_equal_plain_loops(batch, heads, key_heads, queries, keys, size, stride, groups):
    query, key, _ = tensors(batch, heads, key_heads, queries, keys, dtype=torch.float64)
    ours = proxy_scores(query, key, groups=groups, block_size=size, stride=stride, scale=SCALE)
    for b in range(batch):
        for g in range(groups):
            mean_query = query[b].chunk(groups)[g].mean(0)
            mean_key = key[b].chunk(groups)[g].mean(0)
            expected = loop_scores(mean_query, mean_key, size=size, stride=stride)
            torch.testing.assert_close(ours[b, g], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_equal_heads_give_their_own_maps(seed):
    """Then nothing is lost by the mean: one proxy is any of its heads."""
    one, key, _ = tensors(2, 1, 1, 111, 111, seed=seed, dtype=torch.float64)
    query, keys = one.expand(-1, 6, -1, -1), key.expand(-1, 2, -1, -1)
    _, weights = dense_attention(one, key, key, scale=SCALE, causal=True, return_weights=True)
    ours = proxy_scores(query, keys, groups=1, block_size=16, scale=SCALE)
    torch.testing.assert_close(ours, block_max(weights, 16), atol=1e-12, rtol=0)


def test_a_proxy_of_one_head_is_that_head():
    query, key, _ = tensors(1, 4, 4, 97, 97, dtype=torch.float64)
    _, weights = dense_attention(query, key, key, causal=True, return_weights=True)
    ours = proxy_scores(query, key, groups=4, block_size=16)
    torch.testing.assert_close(ours, block_max(weights, 16), atol=1e-12, rtol=0)


def test_one_proxy_for_several_key_heads_holds_their_cross_terms():
    """q1 meets k2: the mean of products is not the product of means."""
    query, key, _ = tensors(1, 4, 2, 32, 32, dtype=torch.float64)
    proxy = proxy_heads(query, 1) @ proxy_heads(key, 1).transpose(-2, -1)
    products = (
        sum(query[:, i] @ key[:, j].transpose(-2, -1) for i in range(4) for j in range(2)) / 8
    )
    torch.testing.assert_close(proxy[:, 0], products, atol=1e-12, rtol=0)
    own = (query @ repeat_key_heads(key, 4).transpose(-2, -1)).mean(1)
    assert (own - products).abs().max() > 0.1


def test_repeated_key_heads_change_nothing():
    query, key, _ = tensors(1, 6, 2, 64, 64, dtype=torch.float64)
    one, other = (
        proxy_scores(query, k, groups=2, block_size=16) for k in (key, repeat_key_heads(key, 6))
    )
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_mean_commutes_with_the_rotary_embedding():
    query, _, _ = tensors(2, 6, 2, 50, 50, dtype=torch.float64)
    angle = torch.arange(50.0, dtype=torch.float64)[:, None] / 10 ** (torch.arange(8) / 4)

    def rotated(x):
        left, right = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    before, after = proxy_heads(rotated(query), 2), rotated(proxy_heads(query, 2))
    torch.testing.assert_close(before, after, atol=1e-12, rtol=0)


def test_the_peak_of_a_block_counts_and_not_its_mass():
    weights = torch.zeros(1, 1, 8, 8)
    weights[..., 6, 1] = 0.4  # one peak in block (1, 0)
    weights[..., 4:, 4] = 0.3  # more mass in block (1, 1)
    assert block_max(weights, 4)[0, 0].tolist() == [
        [0.0, 0.0],
        [pytest.approx(0.4), pytest.approx(0.3)],
    ]


# Budgets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("blocks", [1, 7, 10, 20])
def test_even_mass_needs_gamma_of_the_blocks(blocks, gamma):
    for dtype in (torch.float32, torch.float64):
        mass = torch.full((2, 3, blocks), 1 / blocks, dtype=dtype)
        expected = max(1, math.ceil(round(gamma * blocks, 9)))
        assert blocks_to_cover(mass, gamma).tolist() == [[expected] * 3] * 2


def test_one_block_with_everything_is_enough():
    mass = torch.eye(9)
    assert blocks_to_cover(mass, 0.99).tolist() == [1] * 9
    assert blocks_to_cover(mass, 1.0).tolist() == [9] * 9


def test_the_largest_blocks_are_counted_until_gamma_is_reached():
    mass = torch.tensor([0.1, 0.5, 0.05, 0.35])
    for gamma, count in ((0.4, 1), (0.5, 1), (0.51, 2), (0.85, 2), (0.9, 3), (0.96, 4)):
        assert blocks_to_cover(mass, gamma).item() == count
        assert blocks_to_cover(10 * mass, gamma).item() == count  # a share of the total


def test_budgets_do_not_fall_with_gamma():
    query, key, _ = tensors(1, 6, 2, 250, 250)
    mass = last_block_mass(4 * query, key, 16)
    counts = torch.stack([blocks_to_cover(mass, g) for g in (0.2, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0)])
    assert (counts.diff(dim=0) >= 0).all()
    assert (counts[-2] > counts[0]).all()
    assert len(set(counts[3].flatten().tolist())) > 2  # and heads differ


@EACH
def test_the_mass_of_the_last_block(batch, heads, key_heads, queries, keys, size, stride, groups):
    query, key, _ = tensors(batch, heads, key_heads, queries, keys, dtype=torch.float64)
    ours = last_block_mass(query, key, size, scale=SCALE)
    assert ours.shape == (batch, heads, math.ceil(keys / size))
    for head in range(heads):
        expected = torch.zeros(math.ceil(keys / size), dtype=torch.float64)
        for i in range(keys - size, keys):
            own = key[-1, head // (heads // key_heads), : i + 1]
            weights = (SCALE * own @ query[-1, head, i - keys]).softmax(0) / size
            expected.index_add_(0, torch.arange(i + 1) // size, weights)
        torch.testing.assert_close(ours[-1, head], expected, atol=1e-12, rtol=0)


def test_a_least_budget_in_tokens():
    query, key, _ = tensors(1, 6, 2, 160, 160)
    for tokens, least in ((0, 1), (1, 1), (40, 3), (48, 3), (49, 4), (900, 10)):
        budget = method(0.05, min_budget=tokens).budget(query, key, scale=SCALE, layer=0)
        assert budget.min() == least


# Selection ----------------------------------------------------------------------------------------


@EACH
def test_masks_are_causal_and_nested_within_a_group(
    batch, heads, key_heads, queries, keys, size, stride, groups
):
    query, key, _ = tensors(batch, heads, key_heads, queries, keys)
    made = method(0.6, groups=groups, stride=stride, block_size=size)
    mask = made.block_mask(query, key, scale=SCALE)
    rows, columns = mask.shape[-2:]
    assert not (mask & ~causal_block_mask(rows, columns)).any()
    assert mask[..., 0].all()
    assert mask.diagonal(columns - rows, dim1=-2, dim2=-1).all()
    budget = made.budget(query, key, scale=SCALE, layer=0)
    seen = torch.arange(columns - rows, columns) + 1
    # Sink and diagonal are computed whatever the budget.
    expected = torch.minimum(budget[..., None].clamp_min(2), seen)
    assert torch.equal(mask.sum(-1), expected)
    for group in mask.chunk(groups, dim=1):
        nested = group.gather(
            1, group.sum((-2, -1)).argsort(1)[..., None, None].expand(group.shape)
        )
        assert (nested[:, :-1] <= nested[:, 1:]).all()


@pytest.mark.parametrize("stride", [1, 8])
def test_each_row_takes_its_groups_best_blocks(stride):
    query, key, _ = tensors(1, 6, 2, 160, 160)
    mask = method(0.6, groups=2, stride=stride).block_mask(query, key, scale=SCALE)
    scores = proxy_scores(query, key, groups=2, block_size=16, stride=stride, scale=SCALE)
    for head in range(6):
        for row in range(2, 10):
            own, between = scores[0, head // 3, row], range(1, row)
            taken = [own[c].item() for c in between if mask[0, head, row, c]]
            left = [own[c].item() for c in between if not mask[0, head, row, c]]
            assert not taken or not left or min(taken) >= max(left)


@EACH
def test_gamma_of_one_is_dense(batch, heads, key_heads, queries, keys, size, stride, groups):
    query, key, value = tensors(batch, heads, key_heads, queries, keys)
    everything = method(1.0, groups=groups, stride=stride, block_size=size)
    ours = everything.prefill(query, key, value, scale=SCALE, layer=0)
    expected = dense_attention(query, key, value, scale=SCALE, causal=True)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert everything.density() == 1.0


@EACH
def test_output_equals_dense_attention_under_the_same_mask(
    batch, heads, key_heads, queries, keys, size, stride, groups
):
    query, key, value = tensors(batch, heads, key_heads, queries, keys)
    made = method(0.5, groups=groups, stride=stride, block_size=size)
    selected = made.block_mask(query, key, scale=SCALE)
    assert density(selected).mean() < 0.95
    mask = expand_to_tokens(selected, size, queries, keys)
    expected = dense_attention(query, key, value, mask=mask, scale=SCALE)
    ours = made.prefill(query, key, value, scale=SCALE, layer=0)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_short_prompts_are_dense():
    made = method(0.05, min_budget=40)
    assert made.is_short(48)  # the least budget, rounded up to blocks
    assert not made.is_short(49)
    assert made.saves_from("prefill") == 49
    assert method(0.05).saves_from("prefill") == 33  # sink and diagonal are computed anyway
    assert method(1.0).saves_from("prefill") is None
    assert ProxyAttn().saves_from("prefill") == 2049
    assert made.saves_from("decode") is None


def test_decoding_is_dense_behind_a_sparse_prompt():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 16}
    config = LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 50, (1, 90))
    with (
        torch.no_grad(),
        attach(model, "proxyattn", gamma=0.4, min_budget=0, stride=2, block_size=8) as made,
    ):
        read = model(prompt, use_cache=True)
        model(prompt[:, :1], past_key_values=read.past_key_values, use_cache=True)
    assert made.density() < 0.9
    assert made.density("decode") == 1.0


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.0}, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"gamma": 1.5}, r"gamma must lie in \(0, 1\], got 1.5"),
        ({"groups": 0}, "groups must be an integer of at least 1, got 0"),
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"stride": 3}, "stride must divide the block size, 128, got 3"),
        ({"min_budget": -1}, "min_budget must be an integer of at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ProxyAttn(**settings)


def test_groups_that_would_cut_a_key_head_are_refused():
    query, key, _ = tensors(1, 6, 3, 64, 64)
    with pytest.raises(ValueError, match="3 heads do not fall into 2 equal groups"):
        method(groups=2).block_mask(query, key)
