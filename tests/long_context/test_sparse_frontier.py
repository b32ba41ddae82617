"""Oracles of The Sparse Frontier: masks, budgets, costs and statistics."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.baselines.quest import Pages, Quest, score_bounds
from reattend.attention.baselines.snapkv import AdaSnapKV, SnapKV
from reattend.attention.blocks import causal_block_mask, density, expand_to_tokens, pool_blocks
from reattend.attention.decoding import decode, read_prompt
from reattend.attention.dense import dense_attention, repeat_key_heads
from reattend.attention.host import attach
from reattend.long_context.sparse_frontier import (
    FlexVerticalSlash,
    ModelShape,
    VerticalSlashTokens,
    attention_flops,
    best_lines,
    chunks_density,
    decode_transfers,
    fit_scaling_law,
    line_density,
    line_mask,
    line_mass,
    lines_to_cover,
    logit,
    max_compression,
    pair_density,
    pareto_front,
    prefill_flops,
    quest_overhead,
    r_squared,
    retained,
    vertical_slash_overhead,
)

SHAPES = [  # batch, query heads, key heads, queries, keys
    pytest.param(1, 2, 2, 64, 64, id="square"),
    pytest.param(2, 6, 2, 61, 61, id="odd-gqa"),
    pytest.param(1, 4, 1, 23, 75, id="chunk-behind-cache"),
    pytest.param(1, 2, 1, 150, 190, id="rows-in-parts"),
]
SCALE = 0.25
SMALL = {"last_queries": 16, "sink": 2, "local": 4}


def qkv(batch, heads, key_heads, queries, keys, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(h, n):
        return torch.randn(batch, h, n, 16, generator=generator, dtype=torch.float64)

    return sharpness * draw(heads, queries), draw(key_heads, keys), draw(key_heads, keys)


def prefill(method, query, key, value, **call):
    return method.prefill(query, key, value, scale=SCALE, layer=0, **call)


def methods():
    return [
        VerticalSlashTokens(lines=9, **SMALL),
        FlexVerticalSlash(coverage=0.5, least=6, **SMALL),
        BlockTopK(k=4, local=1, block_size=8),
    ]


def mask_of(method, query, key):
    if isinstance(method, BlockTopK):
        blocks = method.block_mask(query, key, scale=SCALE)
        return expand_to_tokens(blocks, method.block_size, query.shape[2], key.shape[2])
    return line_mask(*method.lines(query, key, scale=SCALE), query.shape[2])


# Prefill: output --------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads", "key_heads", "queries", "keys"), SHAPES)
@pytest.mark.parametrize("full", ["lines", "coverage", "chunks"])
def test_full_budget_equals_dense_attention(batch, heads, key_heads, queries, keys, full):
    query, key, value = qkv(batch, heads, key_heads, queries, keys)
    method = {
        "lines": VerticalSlashTokens(lines=keys, **SMALL),
        "coverage": FlexVerticalSlash(coverage=1.0, least=4, **SMALL),
        "chunks": BlockTopK(k=100, local=1, block_size=8),
    }[full]
    dense = dense_attention(query, key, value, scale=SCALE, causal=True)
    torch.testing.assert_close(prefill(method, query, key, value), dense, atol=1e-10, rtol=1e-10)
    assert method.density() == pytest.approx(1.0)


@pytest.mark.parametrize(("batch", "heads", "key_heads", "queries", "keys"), SHAPES)
@pytest.mark.parametrize("number", range(3))
def test_output_is_masked_dense_attention(batch, heads, key_heads, queries, keys, number):
    query, key, value = qkv(batch, heads, key_heads, queries, keys, seed=number)
    method = methods()[number]
    mask = mask_of(method, query, key)
    assert not bool(mask.all(dim=-1)[..., -1].all())  # it leaves something out
    want = dense_attention(query, key, value, mask=mask, scale=SCALE)
    torch.testing.assert_close(prefill(method, query, key, value), want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("number", range(3))
def test_gradients_are_those_of_masked_dense_attention(number):
    inputs = [x.requires_grad_() for x in qkv(1, 4, 2, 45, 45, seed=3)]
    method = methods()[number]
    mask = mask_of(method, *inputs[:2])
    up = torch.randn(1, 4, 45, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((prefill(method, *inputs) * up).sum(), inputs)
    dense = dense_attention(*inputs, mask=mask, scale=SCALE)
    want = torch.autograd.grad((dense * up).sum(), inputs)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("number", range(3))
def test_a_padded_sequence_is_computed_as_alone(number):
    query, key, value = qkv(2, 4, 2, 50, 50)
    padding = torch.ones(2, 50, dtype=torch.bool)
    padding[1, :13] = False
    both = prefill(methods()[number], query, key, value, padding=padding)
    alone = prefill(methods()[number], query[1:, :, 13:], key[1:, :, 13:], value[1:, :, 13:])
    torch.testing.assert_close(both[1:, :, 13:], alone, atol=1e-10, rtol=1e-10)


# Prefill: what is kept --------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 8, 20])
def test_line_mass_is_the_sum_of_columns_and_diagonals(queries):
    weights = torch.rand(1, 2, queries, 20, dtype=torch.float64).tril(20 - queries)
    vertical, slash = line_mass(weights)
    torch.testing.assert_close(vertical, weights.sum(2))
    for head in range(2):
        for offset in range(20):
            # The pair of the last query and the key `offset` before it lies on this diagonal.
            line = torch.diagonal(weights[0, head], offset=20 - queries - offset)
            assert slash[0, head, offset] == pytest.approx(line.sum().item(), abs=1e-12)


def test_mask_against_a_double_loop():
    generator = torch.Generator().manual_seed(1)
    columns, diagonals = (torch.rand(1, 2, 17, generator=generator) < 0.3 for _ in range(2))
    for queries in (17, 6):
        mask = line_mask(columns, diagonals, queries)
        for head in range(2):
            for row in range(queries):
                p = row + 17 - queries
                want = [
                    j <= p and bool(columns[0, head, j] or diagonals[0, head, p - j])
                    for j in range(17)
                ]
                assert mask[0, head, row].tolist() == want


def test_planted_lines_are_found_with_the_forced_ones():
    weights = torch.full((1, 1, 16, 64), 1e-3)
    weights[..., 30] = 0.4  # a column
    rows = torch.arange(16)
    weights[..., rows, rows + 48 - 21] = 0.3  # the diagonal at distance 21
    vertical, slash = line_mass(weights)
    count = torch.full((1, 1), 5)
    assert best_lines(vertical, count, 4)[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 30]
    assert best_lines(slash, count, 4)[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 21]


def test_every_head_keeps_the_same_number_of_columns_and_diagonals():
    query, key, _ = qkv(2, 6, 3, 70, 70)
    columns, diagonals = VerticalSlashTokens(lines=11, **SMALL).lines(query, key, scale=SCALE)
    for lines, forced in ((columns, 2), (diagonals, 4)):
        assert (lines.sum(-1) == 11).all()
        assert lines[..., :forced].all()


def test_only_the_last_queries_rank_the_lines():
    query, key, _ = qkv(1, 2, 2, 70, 70)
    method = VerticalSlashTokens(lines=11, **SMALL)
    before = method.lines(query, key, scale=SCALE)
    query[:, :, : 70 - 16] = 5.0
    for a, b in zip(before, method.lines(query, key, scale=SCALE), strict=True):
        assert torch.equal(a, b)


def test_lines_to_cover_is_the_smallest_number():
    mass = torch.tensor([[[0.5, 0.1, 0.3, 0.1]]], dtype=torch.float64)
    for coverage, want in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.85, 3), (1.0, 4)):
        assert lines_to_cover(mass, coverage).item() == want


def test_flex_is_called_head_by_head():
    query, key, _ = qkv(2, 6, 3, 80, 80, sharpness=1.0)
    query[:, 0] *= 20  # a head that needs few lines
    method = FlexVerticalSlash(coverage=0.6, least=4, last_queries=70, sink=1, local=2)
    together = method.lines(query, key, scale=SCALE)
    repeated = repeat_key_heads(key, 6)
    for head in range(6):
        one = slice(head, head + 1)
        alone = method.lines(query[:, one], repeated[:, one], scale=SCALE)
        for ours, want in zip(together, alone, strict=True):
            assert torch.equal(ours[:, one], want)


def test_flex_keeps_what_each_head_needs():
    query, key, _ = qkv(2, 4, 2, 80, 80, sharpness=1.0)
    query[:, 0] *= 20
    method = FlexVerticalSlash(coverage=0.6, least=4, last_queries=80, sink=0, local=1)
    columns, _ = method.lines(query, key, scale=SCALE)
    _, weights = dense_attention(query, key, key, scale=SCALE, causal=True, return_weights=True)
    need = lines_to_cover(line_mass(weights)[0], 0.6)
    assert (need[:, 0] < need[:, 1:].amin(1)).all()
    assert torch.equal(columns.sum(-1), need.clamp_min(4))


def test_flex_keeps_at_least_its_minimum():
    query, key, _ = qkv(1, 2, 2, 80, 80, sharpness=20.0)
    method = FlexVerticalSlash(coverage=0.01, least=33, last_queries=16, sink=2, local=4)
    columns, diagonals = method.lines(query, key, scale=SCALE)
    assert (columns.sum(-1) == 33).all()
    assert (diagonals.sum(-1) == 33).all()


def test_block_sparse_forces_three_chunks_and_ranks_by_plain_products():
    query, key, _ = qkv(1, 4, 2, 96, 96, seed=5)
    method = BlockTopK(k=5, local=1, block_size=8)
    blocks = method.block_mask(query, key, scale=SCALE)
    scores = pool_blocks(query, 8) @ repeat_key_heads(pool_blocks(key, 8), 4).transpose(-2, -1)
    for row in range(12):
        forced = {0, row, max(row - 1, 0)}
        for head in range(4):
            rest = sorted(set(range(row + 1)) - forced, key=lambda j: -scores[0, head, row, j])
            want = forced | set(rest[: 5 - len(forced)])
            assert set(blocks[0, head, row].nonzero().flatten().tolist()) == want
    # Without scale and softmax the scale must not matter.
    assert torch.equal(blocks, method.block_mask(query, key, scale=100.0))


def test_densities_in_closed_form():
    generator = torch.Generator().manual_seed(2)
    for keys, queries in ((1, 1), (9, 9), (40, 40), (40, 1), (41, 13)):
        columns, diagonals = (torch.rand(2, 3, keys, generator=generator) < 0.3 for _ in range(2))
        torch.testing.assert_close(
            line_density(columns, diagonals, queries),
            pair_density(line_mask(columns, diagonals, queries)),
        )
    assert pair_density(torch.ones(1, 1, 3, 7, dtype=torch.bool).tril(4)).item() == 1
    method = BlockTopK(k=5, local=1, block_size=8)
    query, key, _ = qkv(1, 1, 1, 96, 96)
    assert density(method.block_mask(query, key)).item() == pytest.approx(chunks_density(5, 12))
    assert chunks_density(99, 12) == 1


def test_density_is_recorded_in_pairs_of_tokens():
    query, key, value = qkv(1, 2, 2, 64, 64)
    method = VerticalSlashTokens(lines=8, **SMALL)
    prefill(method, query, key, value)
    assert method.density() == pytest.approx(pair_density(mask_of(method, query, key)).mean())
    assert 0 < method.density() < 0.5


# Decoding: the shared methods in the paper's form -------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_quest_scores_bound_the_products_in_their_page(seed):
    query, key, _ = qkv(1, 6, 3, 1, 64, seed=seed)
    pages = Pages.of(key, 8)
    bounds = score_bounds(query, pages.smallest, pages.largest)
    products = (query.unflatten(1, (3, 2)).squeeze(3) @ key.transpose(-2, -1)).unflatten(
        -1, (-1, 8)
    )
    assert (bounds >= products.amax(-1).sum(2) - 1e-12).all()


def test_quest_with_pages_of_one_key_is_exact_top_k():
    query, key, _ = qkv(1, 3, 3, 1, 64)
    method = Quest(budget=10, page=1)
    chosen = method.choose(query, key, method.begin(query, key, scale=SCALE), scale=SCALE)
    products = (query @ key.transpose(-2, -1)).squeeze(2)
    want = products[..., :-1].topk(10).indices
    assert chosen[..., :-1].gather(-1, want).all()
    assert (chosen.sum(-1) == 11).all()  # the token's own entry on top


def test_ada_snapkv_shares_the_capacity_among_heads():
    query, key, _ = qkv(1, 6, 3, 100, 100, sharpness=4.0)
    settings = {"capacity": 30, "window": 20, "kernel": 5, "recent": 4, "sink": 2}
    kept = AdaSnapKV(least_share=0.2, **settings).begin(query, key, scale=SCALE)
    assert kept.sum() == 90
    assert (kept.sum(-1) >= 6).all()
    uniform = AdaSnapKV(least_share=1.0, **settings).begin(query, key, scale=SCALE)
    assert (uniform.sum(-1) == 30).all()
    assert (SnapKV(**settings).begin(query, key, scale=SCALE).sum(-1) == 30).all()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def test_inside_a_model_full_budgets_change_nothing(model):
    tokens = torch.randint(64, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(tokens).logits
        for method in (
            VerticalSlashTokens(lines=60, **SMALL),
            FlexVerticalSlash(coverage=1.0, least=4, **SMALL),
            BlockTopK(k=8, local=1, block_size=8),
        ):
            with attach(model, method):
                torch.testing.assert_close(model(tokens).logits, dense, atol=1e-5, rtol=1e-5)


def test_inside_a_model_sparse_prefill_is_followed_by_dense_decoding(model):
    tokens = torch.randint(64, (1, 60), generator=torch.Generator().manual_seed(1))
    answer = torch.randint(64, (1, 4), generator=torch.Generator().manual_seed(2))
    method = VerticalSlashTokens(lines=6, **SMALL)
    prompt = read_prompt(model, tokens, prefill=method)
    assert method.density() < 0.5
    done = decode(model, prompt, "dense", given=answer)
    assert done.kv_reads == (61 * 4, 62 * 4, 63 * 4)  # two layers of two key heads


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VerticalSlashTokens(lines=63), "lines must be an integer of at least 64"),
        (lambda: VerticalSlashTokens(local=0), "local must be an integer of at least 1"),
        (lambda: FlexVerticalSlash(coverage=0.0), "coverage must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Costs ------------------------------------------------------------------------------------------

SHAPE = ModelShape(
    width=8, layers=2, heads=4, key_heads=2, head_dim=2, feed_forward=16, vocabulary=10
)


def test_costs_by_hand():
    per_layer = 2 * 5 * 8 * (16 + 8) + 4 * 25 * (8 + 3) + 2 * 5 * 16 * 25
    assert prefill_flops(SHAPE, 5) == 2 * 5 * 8 + 2 * per_layer + 2 * 5 * 8 * 10
    assert vertical_slash_overhead(SHAPE, 8, 3, 4.0, 5.0) == 2 * 4 * (9 * 24 + 48 + 64 * 8 * 9)
    weights = 2 * (4 * 64 + 3 * 8 * 16) + 8 * 11
    assert decode_transfers(SHAPE, 5) == weights + 2 * 2 * 5 * 2 * 2
    assert quest_overhead(SHAPE, 32, 16) == 2 * 2 * 2 * 2 * 2


def test_costs_grow_as_they_should():
    assert prefill_flops(SHAPE, 64, batch=3) == 3 * prefill_flops(SHAPE, 64)
    costs = [prefill_flops(SHAPE, 64, rho) for rho in (0.05, 0.1, 0.5, 1.0)]
    assert costs == sorted(costs)
    # Attention is the only part that is quadratic in the length.
    linear = prefill_flops(SHAPE, 64, 0.0)
    assert prefill_flops(SHAPE, 128, 0.0) == 2 * linear
    assert attention_flops(SHAPE, 128) == 4 * attention_flops(SHAPE, 64)
    assert prefill_flops(SHAPE, 64) == linear + attention_flops(SHAPE, 64)
    # Weights are moved once for the batch, the cache once for each sequence.
    fixed = decode_transfers(SHAPE, 64, 0.0)
    assert decode_transfers(SHAPE, 64, batch=3) - fixed == 3 * (decode_transfers(SHAPE, 64) - fixed)


def test_the_shape_of_a_model(model):
    shape = ModelShape.of(model.config)
    assert shape == ModelShape(32, 2, 4, 2, 8, 64, 64)
    norms = 5 * 32
    # The memory formula counts multi-head key and value projections: 4 d^2 for our 3 d^2.
    weights = sum(p.numel() for p in model.parameters()) - norms - 64 * 32
    assert decode_transfers(shape, 0) == weights + 2 * 32**2 + 32


def test_pareto_front():
    cost, score = np.array([1.0, 2.0, 2.0, 3.0, 4.0]), np.array([0.5, 0.6, 0.7, 0.7, 0.9])
    assert pareto_front(cost, score).tolist() == [True, False, True, False, True]


# Statistics -------------------------------------------------------------------------------------


def test_identical_scores_are_never_a_loss():
    for scores in (np.random.default_rng(0).random(12), np.zeros(5), np.ones(3)):
        assert retained(scores, np.stack([scores, scores]), margin=0.0).all()


def test_a_clear_loss_is_found_and_a_loss_within_the_margin_is_not():
    dense = np.linspace(0.6, 1.0, 40)
    sparse = np.stack([0.97 * dense, 0.9 * dense, 0.5 * dense])
    assert retained(dense, sparse).tolist() == [True, False, False]
    both = retained(np.stack([dense, dense]), np.stack([sparse, sparse], axis=1))  # two tasks
    assert both.tolist() == [[True, True], [False, False], [False, False]]


def test_pairing_makes_the_difference():
    random = np.random.default_rng(1)
    dense = random.random(30)
    paired = 0.98 * dense
    assert retained(dense, paired[None]).all()
    assert not retained(dense, random.permutation(paired)[None]).any()


def test_max_compression_stops_at_the_first_loss():
    levels = np.array([2.0, 5.0, 10.0])
    kept = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], dtype=bool)
    assert max_compression(levels, kept.T).tolist() == [10, 2, 1, 5]


def test_the_scaling_law_is_recovered():
    sizes, lengths, compressions = (
        x.ravel() for x in np.meshgrid([1e4, 3e4, 9e4], [128.0, 512.0], [1.0, 2.0, 10.0])
    )
    logits = -9 + 1.2 * np.log(sizes) - 0.4 * np.log(lengths) - 0.8 * np.log(compressions)
    scores = 1 / (1 + np.exp(-logits))
    law = fit_scaling_law(sizes, lengths, compressions, scores, clip=1e-9)
    found = [law.constant, law.size, law.length, law.compression]
    np.testing.assert_allclose(found, [-9, 1.2, -0.4, -0.8], atol=1e-8)
    np.testing.assert_allclose(law.predict(sizes, lengths, compressions), scores, atol=1e-10)
    assert r_squared(scores, scores) == 1
    assert r_squared(np.full(18, scores.mean()), scores) == pytest.approx(0)


def test_a_scaling_law_needs_variation():
    with pytest.raises(ValueError, match="at least two sizes"):
        fit_scaling_law(np.ones(5), np.arange(1.0, 6), np.arange(1.0, 6) ** 2, np.full(5, 0.5))


def test_logits_are_clipped():
    np.testing.assert_allclose(logit(np.array([0.0, 0.5, 1.0])), [-4.59512, 0, 4.59512], atol=1e-5)


def test_causal_chunks_only():
    query, key, _ = qkv(1, 2, 2, 33, 33)
    blocks = BlockTopK(k=3, local=1, block_size=8).block_mask(query, key)
    assert not (blocks & ~causal_block_mask(5, 5)).any()
