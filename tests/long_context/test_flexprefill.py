"""Oracles of FlexPrefill."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.assets.store import AssetError, asset_path
from reattend.attention.baselines.vertical_slash import vertical_slash_blocks
from reattend.attention.blocks import causal_block_mask, density, expand_to_tokens
from reattend.attention.dense import dense_attention
from reattend.attention.host import attach
from reattend.attention.statistics import js_divergence
from reattend.long_context.flexprefill import (
    FlexPrefill,
    best_blocks,
    blocks_of_tokens,
    estimated_block_mass,
    query_aware_blocks,
    representative_attention,
    slash_mass,
    sum_blocks,
    tokens_to_cover,
    vertical_mass,
)

SHAPES = [  # batch, query heads, key heads, tokens, block size
    pytest.param(1, 2, 2, 128, 16, id="B1-H2-T128-b16"),
    pytest.param(2, 6, 2, 128, 16, id="B2-H6kv2-T128-b16"),
    pytest.param(1, 4, 1, 111, 16, id="B1-H4kv1-T111-b16"),
    pytest.param(2, 3, 3, 63, 8, id="B2-H3-T63-b8"),
]
ROOT_LN2 = math.sqrt(math.log(2))
SCALE = 16**-0.5


def real_looking(batch, heads, key_heads, tokens, *, sharpness=2.0, seed=0):
    """Queries, keys and values with a sink; the heads run from nearly even to peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    query = sharpness * torch.randn(batch, heads, tokens, 16, generator=generator)
    query *= torch.linspace(0.2, 3.0, heads)[:, None, None]
    key = torch.randn(batch, key_heads, tokens, 16, generator=generator)
    value = torch.randn(batch, key_heads, tokens, 16, generator=generator)
    key[:, :, 0] += query.mean(dim=(1, 2))[:, None]
    return query, key, value


def prefill(method, query, key, value):
    return method.prefill(query, key, value, scale=SCALE, layer=0)


# The output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens", "size"), SHAPES)
def test_full_gamma_equals_dense_attention(batch, heads, key_heads, tokens, size):
    query, key, value = real_looking(batch, heads, key_heads, tokens)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for tau in (0.0, 1.0):
        method = FlexPrefill(gamma=1.0, tau=tau, min_budget=0, block_size=size)
        torch.testing.assert_close(
            prefill(method, query, key, value), expected, atol=1e-5, rtol=1e-5
        )


def test_full_min_budget_selects_everything():
    query, key, _ = real_looking(1, 4, 2, 128)
    # is_short would take the dense path; the selection itself has to be complete as well.
    method = FlexPrefill(gamma=0.1, min_budget=128, block_size=16)
    assert method.is_short(128)
    blocks = method.explain(query, key, scale=SCALE).blocks
    assert torch.equal(blocks, causal_block_mask(8, 8).expand(1, 4, 8, 8))


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens", "size"), SHAPES)
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_output_equals_dense_attention_under_the_same_mask(
    batch, heads, key_heads, tokens, size, tau
):
    query, key, value = real_looking(batch, heads, key_heads, tokens)
    method = FlexPrefill(gamma=0.7, tau=tau, min_budget=size, block_size=size)
    selected = method.block_mask(query, key, scale=SCALE)
    assert density(selected).mean() < 0.95
    mask = expand_to_tokens(selected, size, tokens, tokens)
    expected = dense_attention(query, key, value, mask=mask, scale=SCALE)
    torch.testing.assert_close(prefill(method, query, key, value), expected, atol=1e-5, rtol=1e-5)


def test_no_value_reaches_an_earlier_output():
    query, key, value = real_looking(1, 4, 2, 128)
    method = FlexPrefill(gamma=0.8, min_budget=16, block_size=16)
    before = prefill(method, query, key, value)
    later = value.clone()
    later[:, :, 70:] += 5.0
    after = prefill(method, query, key, later)
    assert torch.equal(after[:, :, :70], before[:, :, :70])
    assert not torch.allclose(after[:, :, 70:], before[:, :, 70:])


def test_short_input_is_dense():
    method = FlexPrefill(gamma=0.1, min_budget=40, block_size=16)
    assert method.is_short(48)  # min_budget rounded up to blocks
    assert not method.is_short(49)
    assert FlexPrefill(gamma=0.1, min_budget=0, block_size=16).is_short(32)
    query, key, value = real_looking(1, 2, 2, 48)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(prefill(method, query, key, value), expected, atol=1e-5, rtol=1e-5)
    assert method.density() == 1


# The selection ------------------------------------------------------------------------------------


def loop_selection(query, key, *, size, gamma, tau, least):
    """One head in plain loops, from the description in the paper: a set of (row, column)."""
    tokens = len(query)
    count = math.ceil(tokens / size)
    weights = []
    for i in range(tokens - size, tokens):
        scores = torch.stack([SCALE * query[i].dot(key[j]) for j in range(i + 1)])
        weights.append(scores.softmax(0).tolist() + [0.0] * (tokens - i - 1))

    vertical = [sum(row[j] for row in weights) / size for j in range(tokens)]
    slash = [0.0] * tokens
    for r, row in enumerate(weights):
        for j in range(tokens - size + r + 1):
            slash[tokens - size + r - j] += row[j] / size

    def pooled(mass):
        return [sum(mass[c * size : (c + 1) * size]) for c in range(count)]

    def budget(mass):
        running, needed = 0.0, 1
        for entry in sorted(mass, reverse=True):
            running += entry
            needed += running <= gamma
        return min(max(needed // size + 1, least), count)

    def best(blocks, number):
        order = sorted(range(1, count), key=lambda c: -blocks[c])
        return [0, *order[: number - 1]]

    mean_query = query[-size:].mean(0)
    mean_keys = [key[c * size : (c + 1) * size].mean(0) for c in range(count)]
    estimate = torch.stack([SCALE * mean_query.dot(k) for k in mean_keys]).softmax(0).tolist()
    truth = pooled(vertical)
    divergence = 0.0
    for p, q in zip(truth, estimate, strict=True):
        middle = (p + q) / 2
        divergence += 0.5 * (p * math.log(p / middle) if p > 0 else 0)
        divergence += 0.5 * (q * math.log(q / middle) if q > 0 else 0)
    aware = math.sqrt(max(divergence, 0)) < tau

    columns = best(truth, least if aware else budget(vertical))
    diagonals = best(pooled(slash), least if aware else budget(slash))
    chosen = {(i, j) for i in range(count) for j in columns if j <= i}
    chosen |= {(i, i - o) for i in range(count) for o in diagonals if o <= i}
    if aware:
        mass = {}
        for i in range(count):
            mean = query[i * size : (i + 1) * size].mean(0)
            row = torch.stack([SCALE * mean.dot(mean_keys[j]) for j in range(i + 1)]).softmax(0)
            mass |= {(i, j): entry for j, entry in enumerate(row.tolist())}
        running = 0.0
        for block in sorted(mass, key=mass.get, reverse=True):
            running += mass[block]
            if running <= gamma * count:
                chosen.add(block)
    return chosen, aware


@pytest.mark.parametrize("tokens", [96, 93])
@pytest.mark.parametrize("tau", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_selection_equals_plain_loops(tokens, tau, gamma):
    query, key, _ = real_looking(2, 4, 2, tokens, sharpness=1.0)
    method = FlexPrefill(gamma=gamma, tau=tau, min_budget=16, block_size=8)
    selection = method.explain(query, key, scale=SCALE)
    for sequence in range(2):
        for head in range(4):
            expected, aware = loop_selection(
                query[sequence, head],
                key[sequence, head // 2],
                size=8,
                gamma=gamma,
                tau=tau,
                least=2,
            )
            got = set(map(tuple, selection.blocks[sequence, head].nonzero().tolist()))
            assert bool(selection.query_aware[sequence, head]) == aware
            assert got == expected


def test_both_patterns_occur_in_the_loop_test():
    query, key, _ = real_looking(2, 4, 2, 96, sharpness=1.0)
    method = FlexPrefill(tau=0.15, min_budget=16, block_size=8)
    aware = method.explain(query, key, scale=SCALE).query_aware
    assert aware.any()
    assert not aware.all()


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_selection_grows_with_gamma(tau):
    query, key, _ = real_looking(2, 4, 2, 160)
    selections = []
    for gamma in (0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0):
        method = FlexPrefill(gamma=gamma, tau=tau, min_budget=16, block_size=16)
        blocks = method.explain(query, key, scale=SCALE).blocks
        selections.append(blocks)
    assert not any((small & ~large).any() for small, large in itertools.pairwise(selections))
    assert (selections[0].sum() < selections[-1].sum()).all()


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_selection_grows_with_min_budget_and_max_budget(tau):
    query, key, _ = real_looking(2, 4, 2, 160)
    sizes = []
    for budget in (0, 16, 32, 64, 128, 160):
        method = FlexPrefill(gamma=0.3, tau=tau, min_budget=budget, block_size=16)
        sizes.append(method.explain(query, key, scale=SCALE).blocks.sum(dim=(-2, -1)))
    assert all((a <= b).all() for a, b in itertools.pairwise(sizes))
    assert (sizes[0] < sizes[-1]).all()
    sizes = []
    for budget in (16, 48, 96, 160):
        method = FlexPrefill(gamma=0.99, tau=0.0, min_budget=0, max_budget=budget, block_size=16)
        sizes.append(method.explain(query, key, scale=SCALE).blocks.sum(dim=(-2, -1)))
    assert all((a <= b).all() for a, b in itertools.pairwise(sizes))
    assert (sizes[0] < sizes[-1]).all()


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens", "size"), SHAPES)
@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
def test_sink_and_diagonal_are_always_in_and_the_future_never(
    batch, heads, key_heads, tokens, size, tau
):
    query, key, _ = real_looking(batch, heads, key_heads, tokens)
    key[:, :, 0] = -3 * query.mean(dim=(1, 2))[:, None]  # a first key that nobody attends to
    method = FlexPrefill(gamma=0.05, tau=tau, min_budget=0, block_size=size)
    blocks = method.explain(query, key, scale=SCALE).blocks
    assert blocks[..., 0].all()
    assert blocks.diagonal(dim1=-2, dim2=-1).all()
    assert not blocks.triu(1).any()


def test_tau_decides_the_pattern():
    query, key, _ = real_looking(2, 4, 2, 128)
    never = FlexPrefill(tau=0.0, min_budget=16, block_size=16).explain(query, key, scale=SCALE)
    always = FlexPrefill(tau=1.0, min_budget=16, block_size=16).explain(query, key, scale=SCALE)
    assert not never.query_aware.any()
    assert always.query_aware.all()
    assert (always.vertical_budget == 1).all()  # columns fall back to their lowest budget
    assert (always.slash_budget == 1).all()


def test_grouped_heads_choose_as_if_keys_were_repeated():
    query, key, _ = real_looking(2, 6, 2, 128)
    method = FlexPrefill(gamma=0.8, min_budget=16, block_size=16)
    grouped = method.explain(query, key, scale=SCALE).blocks
    repeated = method.explain(query, key.repeat_interleave(3, dim=1), scale=SCALE).blocks
    assert torch.equal(grouped, repeated)
    assert not torch.equal(grouped[:, 0], grouped[:, 1])  # each query head chooses for itself


def test_sequences_of_a_batch_are_independent():
    query, key, _ = real_looking(3, 4, 2, 96)
    method = FlexPrefill(gamma=0.8, min_budget=16, block_size=16)
    together = method.explain(query, key, scale=SCALE).blocks
    for one in range(3):
        alone = method.explain(query[one : one + 1], key[one : one + 1], scale=SCALE).blocks
        assert torch.equal(together[one], alone[0])


def test_chunk_behind_a_cache_selects_the_last_rows():
    query, key, _ = real_looking(1, 4, 2, 128)
    method = FlexPrefill(gamma=0.8, tau=0.0, min_budget=16, block_size=16)
    whole = method.explain(query, key, scale=SCALE).blocks
    chunk = method.explain(query[:, :, -40:], key, scale=SCALE).blocks
    assert torch.equal(chunk, whole[:, :, -3:])


# The steps ----------------------------------------------------------------------------------------


def test_representatives_are_rows_of_dense_attention():
    query, key, value = real_looking(2, 6, 2, 63)
    _, weights = dense_attention(query, key, value, causal=True, scale=SCALE, return_weights=True)
    got = representative_attention(query, key, 8, SCALE)
    torch.testing.assert_close(got, weights[:, :, -8:], atol=1e-6, rtol=1e-5)


def test_masses_equal_double_loops_and_sum_to_one():
    query, key, _ = real_looking(1, 2, 2, 40)
    weights = representative_attention(query, key, 8, SCALE)
    slash = torch.zeros(1, 2, 40)
    for i in range(8):
        for j in range(40 - 8 + i + 1):
            slash[:, :, 40 - 8 + i - j] += weights[:, :, i, j] / 8
    torch.testing.assert_close(slash_mass(weights), slash)
    ones = torch.ones(1, 2)
    torch.testing.assert_close(slash_mass(weights).sum(-1), ones)
    torch.testing.assert_close(vertical_mass(weights).sum(-1), ones)
    torch.testing.assert_close(sum_blocks(vertical_mass(weights), 16).sum(-1), ones)
    assert sum_blocks(vertical_mass(weights), 16).shape == (1, 2, 3)


@pytest.mark.parametrize(
    ("gamma", "expected"), [(0.4, 1), (0.5, 2), (0.6, 2), (0.75, 3), (0.9, 4), (1.0, 5)]
)
def test_tokens_to_cover_at_its_edges(gamma, expected):
    mass = torch.tensor([[[0.125, 0.5, 0.125, 0.25]]])
    assert tokens_to_cover(mass, gamma).tolist() == [[expected]]


def test_token_budget_becomes_a_block_budget():
    tokens = torch.tensor([[1, 31, 32, 33, 64, 200]])
    assert blocks_of_tokens(tokens, 32).tolist() == [[1, 1, 2, 2, 3, 7]]
    assert blocks_of_tokens(tokens, 128).tolist() == [[1, 1, 1, 1, 1, 2]]


def test_official_conversion_is_an_option():
    query, key, _ = real_looking(1, 4, 2, 160, sharpness=0.1)
    settings = {"gamma": 0.9, "tau": 0.0, "min_budget": 0, "block_size": 16}
    ours = FlexPrefill(**settings).explain(query, key, scale=SCALE)
    official = FlexPrefill(**settings, tokens_per_block=128).explain(query, key, scale=SCALE)
    assert (official.vertical_budget == 2).all()
    assert (ours.vertical_budget >= 8).all()


def test_best_blocks_ranks_and_forces_the_first():
    mass = torch.tensor([[[0.0, 0.1, 0.5, 0.4]]]).expand(1, 3, 4)
    chosen = best_blocks(mass, torch.tensor([[1, 2, 3]]))[0]
    assert chosen.int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


def test_columns_and_diagonals_by_hand():
    columns = torch.tensor([[[True, False, False, False]]])
    diagonals = torch.tensor([[[True, False, True, False]]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert vertical_slash_blocks(columns, diagonals, 4)[0, 0].int().tolist() == expected
    assert vertical_slash_blocks(columns, diagonals, 2)[0, 0].int().tolist() == expected[2:]


def test_query_aware_budget_is_shared_by_the_rows():
    # Rows 0 to 2 attend evenly, row 3 to one block only: its one block ranks with the first row's.
    size, dim = 4, 16
    query, key = torch.zeros(1, 1, 16, dim), torch.zeros(1, 1, 16, dim)
    key[0, 0, 4:8, 0] = 10.0
    query[0, 0, 12:, 0] = 10.0
    blocks = query_aware_blocks(query, key, size, 1.0, 0.5)[0, 0].int().tolist()
    assert blocks == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_query_aware_chunk_is_pooled_on_the_grid_of_absolute_positions():
    # 40 queries behind 88 keys: rows of 8, 16 and 16 queries, each looking at a block of its own.
    query, key = torch.zeros(1, 1, 40, 3), torch.zeros(1, 1, 128, 3)
    for row, queries in enumerate((slice(0, 8), slice(8, 24), slice(24, 40))):
        query[:, :, queries, row] = 10.0
        key[:, :, 16 * row : 16 * row + 16, row] = 10.0
    blocks = query_aware_blocks(query, key, 16, 1.0, 0.9)[0, 0]
    assert blocks.sum() == 2  # 0.9 of the mass of three rows leaves no room for a third
    assert set(map(tuple, blocks.nonzero().tolist())) <= {(0, 0), (1, 1), (2, 2)}


def test_one_attended_column_costs_one_block():
    query, key = torch.zeros(1, 1, 128, 16), torch.zeros(1, 1, 128, 16)
    query[..., 0], key[0, 0, 37, 0] = 1.0, 200.0
    method = FlexPrefill(gamma=0.95, tau=0.0, min_budget=0, block_size=16)
    selection = method.explain(query, key, scale=1.0)
    assert selection.vertical_budget.item() == 1
    assert selection.true_blocks[0, 0].argmax() == 2
    # With a budget of two the column is found next to the forced sink.
    wider = FlexPrefill(gamma=0.95, tau=0.0, min_budget=32, block_size=16)
    assert wider.explain(query, key, scale=1.0).blocks[0, 0, 2:, 2].all()


def test_a_planted_slash_is_recovered():
    # Position p is a rotation by 2 pi p / 128, so that query p matches key p - 48 best.
    angle = torch.arange(128) * 2 * math.pi / 128
    key = torch.stack([angle.cos(), angle.sin()], dim=-1)[None, None]
    back = angle - 48 * 2 * math.pi / 128
    query = 3000 * torch.stack([back.cos(), back.sin()], dim=-1)[None, None]
    method = FlexPrefill(gamma=0.9, tau=0.0, min_budget=32, block_size=16)
    selection = method.explain(query, key, scale=1.0)
    assert selection.slash[0, 0].argmax() == 48
    assert selection.slash_budget.item() == 2
    assert selection.blocks[0, 0].diagonal(-3).all()  # 48 tokens are 3 blocks
    kept = best_blocks(sum_blocks(selection.slash, 16), selection.slash_budget)
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 3]


def test_divergence_vanishes_when_pooling_loses_nothing():
    # Keys constant inside a block, one query direction, nothing attended in the masked last block.
    generator = torch.Generator().manual_seed(0)
    levels = torch.randn(1, 3, 8, 1, 16, generator=generator)
    key = levels.expand(1, 3, 8, 16, 16).reshape(1, 3, 128, 16).clone()
    query = torch.randn(1, 3, 1, 16, generator=generator).expand(1, 3, 128, 16).clone()
    key[:, :, -16:] = -20 * query[:, :, -16:]
    method = FlexPrefill(tau=0.1, min_budget=16, block_size=16)
    selection = method.explain(query, key, scale=SCALE)
    assert selection.divergence.max() < 1e-3
    assert selection.query_aware.all()
    torch.testing.assert_close(selection.estimated_blocks, selection.true_blocks)


def test_divergence_is_symmetric_and_bounded():
    query, key, _ = real_looking(2, 4, 2, 128, sharpness=10.0)
    found = FlexPrefill(min_budget=16, block_size=16).explain(query, key, scale=SCALE)
    assert (found.divergence >= 0).all()
    assert (found.divergence <= ROOT_LN2 + 1e-6).all()
    p, q = found.true_blocks, found.estimated_blocks
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p))
    torch.testing.assert_close(found.divergence, js_divergence(p, q).sqrt())
    apart = js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).sqrt()
    torch.testing.assert_close(apart, torch.tensor(ROOT_LN2))
    assert js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0


def test_zero_probabilities_give_no_nan():
    query, key, value = real_looking(1, 2, 2, 128, sharpness=400.0)
    method = FlexPrefill(gamma=0.9, min_budget=16, block_size=16)
    selection = method.explain(query, key, scale=1.0)
    assert (selection.true_blocks == 0).any()
    assert selection.divergence.isfinite().all()
    assert prefill(method, query, key, value).isfinite().all()


def test_estimate_uses_the_mean_of_real_tokens_only():
    query, key, _ = real_looking(1, 2, 2, 19)
    got = estimated_block_mass(query, key, 8, SCALE)
    pooled = torch.stack([part.mean(2) for part in key.split(8, dim=2)], dim=2)
    expected = (SCALE * query[:, :, -8:].mean(2, keepdim=True) @ pooled.mT).softmax(-1)[:, :, 0]
    torch.testing.assert_close(got, expected)


# Settings and records -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": 0.0},
        {"gamma": 1.1},
        {"tau": -0.1},
        {"min_budget": -1},
        {"max_budget": 0},
        {"block_size": 0},
        {"tokens_per_block": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FlexPrefill(**wrong)


def test_density_and_patterns_are_recorded_and_forgotten():
    query, key, value = real_looking(2, 4, 2, 128)
    method = FlexPrefill(gamma=0.8, min_budget=16, block_size=16)
    for layer in (1, 0):
        method.prefill(query, key, value, scale=SCALE, layer=layer)
    selection = method.explain(query, key, scale=SCALE)
    expected = density(selection.blocks).mean(dim=0)
    torch.testing.assert_close(method.densities(), expected.expand(2, 4))
    aware = selection.query_aware.float().mean(dim=0)
    torch.testing.assert_close(method.query_aware_share(), aware.expand(2, 4))
    method.clear()
    with pytest.raises(ValueError, match="recorded"):
        method.density()
    with pytest.raises(ValueError, match="long input"):
        method.query_aware_share()


# Inside a language model --------------------------------------------------------------------------


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def greedy(model, prompt, count):
    # The mask is given because generate() takes prompt tokens equal to the padding for padding.
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )


@torch.no_grad()
def check_full_budget(model, prompt):
    expected, expected_tokens = model(prompt).logits, greedy(model, prompt, 32)
    # min_budget 0: the sparse path runs, and gamma alone makes it complete.
    with attach(model, FlexPrefill(gamma=1.0, min_budget=0, block_size=32)) as method:
        logits, tokens = model(prompt).logits, greedy(model, prompt, 32)
        assert method.density() == 1
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(tokens, expected_tokens)


def test_full_budget_in_a_model_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    check_full_budget(tiny_llama(), torch.randint(97, (2, 160), generator=generator))


@torch.no_grad()
def test_small_budget_in_a_model_is_sparse_and_leaves_no_trace():
    model = tiny_llama()
    prompt = torch.randint(97, (1, 256), generator=torch.Generator().manual_seed(0))
    before = model(prompt).logits
    with attach(model, FlexPrefill(gamma=0.5, min_budget=32, block_size=16)) as method:
        inside = model(prompt).logits
    assert method.density() < 0.8
    assert not torch.allclose(inside, before, atol=1e-3)
    assert torch.equal(model(prompt).logits, before)


def test_full_budget_in_smollm2_changes_nothing():
    try:
        asset_path("smollm2")
    except AssetError as error:
        pytest.skip(str(error))
    from reattend.backbones.pretrained.smollm2 import load
    from reattend.data.prose import documents

    model, tokenizer = load()
    prompt = tokenizer(documents("needles")[0][:2000], return_tensors="pt").input_ids[:, :320]
    check_full_budget(model, prompt)


def test_a_model_that_is_not_there_is_not_looked_up(tmp_path):
    from reattend.backbones.pretrained.smollm2 import load

    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        load(path=tmp_path / "missing")


def test_any_local_model_can_be_loaded(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    from reattend.backbones.pretrained.smollm2 import load

    model = tiny_llama()
    model.save_pretrained(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    loaded, tokenizer = load(path=tmp_path)
    assert tokenizer.encode("b") == [1]
    prompt = torch.arange(20)[None]
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flex_kernel_gives_the_same_output():
    query, key, value = (x.cuda() for x in real_looking(1, 4, 2, 1024))
    settings = {"gamma": 0.8, "min_budget": 128, "block_size": 128}
    fused = FlexPrefill(**settings, backend="flex")
    reference = FlexPrefill(**settings, backend="dense")
    torch.testing.assert_close(
        prefill(fused, query, key, value),
        prefill(reference, query, key, value),
        atol=1e-4,
        rtol=1e-4,
    )
