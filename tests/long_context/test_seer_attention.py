"""Oracles of SeerAttention."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from reattend.attention.baselines.block_topk import pooled_scores
from reattend.attention.blocks import causal_block_mask, density, top_k_blocks
from reattend.attention.dense import dense_attention
from reattend.attention.host import attach
from reattend.attention.positions import rotary
from reattend.long_context.seer_attention import (
    AttentionGates,
    Distillation,
    SeerAttention,
    block_maximum_map,
    blocks_per_row,
    distillation_loss,
    frequencies,
    pool,
    rotate,
    streaming_block_maximum_map,
    threshold_blocks,
    truth_map,
    unrotate,
)

DIM, SCALE = 8, 8**-0.5
SHAPES = [  # batch, query heads, key heads, tokens, block size
    pytest.param(1, 2, 2, 64, 8, id="B1-H2-T64-b8"),
    pytest.param(2, 6, 2, 63, 8, id="B2-H6kv2-T63-b8"),
    pytest.param(2, 4, 1, 50, 16, id="B2-H4kv1-T50-b16"),
    pytest.param(1, 3, 3, 33, 16, id="B1-H3-T33-b16"),
]


def random_heads(batch, heads, key_heads, tokens, *, seed=0, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, tokens, DIM, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, key_heads, tokens, DIM, generator=generator, dtype=torch.float64)
    return sharpness * query, key


def random_gates(
    layers=1, heads=4, key_heads=2, *, seed=0, std=0.5, dtype=torch.float64, **changes
):
    torch.manual_seed(seed)
    settings = {"dim": DIM, "block_size": 8, "std": std} | changes
    gates = AttentionGates(layers=layers, query_heads=heads, key_heads=key_heads, **settings)
    return gates.to(dtype)


def pooled(gates, query, key):
    """One layer's pooled vectors, with the axis of layers."""
    return gates.pool_queries(query)[:, None], gates.pool_keys(key)[:, None]


# Pooling and positions ----------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "offset"), [(24, 0), (29, 0), (21, 5), (8, 11), (3, 6)])
def test_pooling_equals_plain_loops(tokens, offset):
    x = torch.randn(2, 3, tokens, DIM, generator=torch.Generator().manual_seed(0))
    got = pool(x, 8, ("max", "min", "avg"), offset=offset)
    members = {}
    for t in range(tokens):
        members.setdefault((t + offset) // 8, []).append(x[:, :, t])
    blocks = [torch.stack(members[number]) for number in sorted(members)]
    expected = torch.stack(
        [torch.cat([b.amax(0), b.amin(0), b.mean(0)], dim=-1) for b in blocks], dim=2
    )
    torch.testing.assert_close(got, expected)


def test_pooling_in_ceil_mode_equals_torch():
    x = torch.randn(3, 29, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = x.transpose(1, 2)
    largest = F.max_pool1d(moved, 8, ceil_mode=True).transpose(1, 2)
    mean = F.avg_pool1d(moved, 8, ceil_mode=True).transpose(1, 2)
    torch.testing.assert_close(pool(x, 8, ("max",)), largest)
    torch.testing.assert_close(pool(x, 8, ("avg",)), mean)


@pytest.mark.parametrize("kinds", [("median",), ()])
def test_unknown_poolings_are_refused(kinds):
    with pytest.raises(ValueError, match="poolings are avg, max, min"):
        pool(torch.zeros(1, 8, DIM), 8, kinds)


def test_rotation_agrees_with_the_shared_one_and_is_undone():
    x = torch.randn(2, 21, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inv_freq = frequencies(DIM, 100.0).double()
    turned = rotate(x, torch.arange(5, 26), inv_freq)
    torch.testing.assert_close(turned, rotary(x, offset=5, base=100.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unrotate(turned, 5, inv_freq), x, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(unrotate(1.3 * turned, 5, inv_freq, 1.3), x, atol=1e-12, rtol=1e-12)


def test_frequencies_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 frequencies do not fit a width of 8"):
        rotate(torch.zeros(4, 8), torch.arange(4), torch.ones(3))
    with pytest.raises(ValueError, match="even width, got 7"):
        frequencies(7, 10_000.0)


# The gate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens", "size"), SHAPES)
@pytest.mark.parametrize("width", [8, 6])
def test_gate_equals_plain_loops(batch, heads, key_heads, tokens, size, width):
    query, key = random_heads(batch, heads, key_heads, tokens)
    gates = random_gates(2, heads, key_heads, block_size=size, width=width, rotary_base=50.0)
    pooled_query, pooled_key = gates.pool_queries(query), gates.pool_keys(key)
    got = gates(
        torch.stack([pooled_query] * 2, dim=1).detach(), torch.stack([pooled_key] * 2, dim=1)
    )
    count = math.ceil(tokens / size)
    assert got.shape == (batch, 2, heads, count, count)
    for layer in range(2):
        for head in range(heads):
            shared = head // (heads // key_heads)
            q = pooled_query[:, head] @ gates.query_map[layer, head]
            k = pooled_key[:, shared] @ gates.key_map[layer, shared]
            for i in range(count):
                for j in range(count):
                    qi = rotary(q[:, i : i + 1], offset=i * size, base=50.0)[:, 0]
                    kj = rotary(k[:, j : j + 1], offset=j * size, base=50.0)[:, 0]
                    expected = (qi * kj).sum(-1) / math.sqrt(width)
                    if j > i:
                        expected = torch.full_like(expected, torch.finfo(got.dtype).min)
                    # The gates keep their frequencies in float32.
                    torch.testing.assert_close(
                        got[:, layer, head, i, j], expected, atol=1e-4, rtol=1e-4
                    )


def test_identity_on_average_pooling_is_the_pooled_heuristic():
    query, key = random_heads(2, 4, 2, 61)
    gates = random_gates(key_pooling=("avg",), rotary_base=None)
    with torch.no_grad():
        gates.query_map.copy_(torch.eye(DIM).expand_as(gates.query_map))
        gates.key_map.copy_(torch.eye(DIM).expand_as(gates.key_map))
    scores = gates(*pooled(gates, query, key))[:, 0]
    expected = pooled_scores(query, key, 8, SCALE)
    causal = causal_block_mask(8, 8)
    torch.testing.assert_close(scores[..., causal], expected[..., causal], atol=1e-12, rtol=1e-12)
    assert (scores[..., ~causal] == torch.finfo(torch.float64).min).all()


def test_grouped_heads_equal_repeated_keys():
    query, key = random_heads(2, 4, 2, 64)
    grouped = random_gates(single_linear=False)
    repeated = random_gates(key_heads=4)
    with torch.no_grad():
        repeated.query_map.copy_(grouped.query_map)
        repeated.key_map.copy_(grouped.key_map.repeat_interleave(2, dim=1))
    expected = repeated(*pooled(repeated, query, key.repeat_interleave(2, dim=1)))
    torch.testing.assert_close(grouped(*pooled(grouped, query, key)), expected)


def test_single_linear_form_has_one_matrix_for_each_query_head():
    query, key = random_heads(1, 4, 2, 64)
    gates = random_gates(single_linear=True)
    assert gates.query_map is None
    assert gates.key_map.shape == (1, 4, 3 * DIM, DIM)
    double = random_gates(key_heads=4)
    with torch.no_grad():
        double.query_map.copy_(torch.eye(DIM).expand_as(double.query_map))
        double.key_map.copy_(gates.key_map)
    expected = double(*pooled(double, query, key.repeat_interleave(2, dim=1)))
    torch.testing.assert_close(gates(*pooled(gates, query, key)), expected)


@pytest.mark.parametrize("base", [None, 100.0])
def test_swapping_two_key_blocks_with_their_positions_swaps_columns(base):
    query, key = random_heads(2, 4, 2, 64)
    gates = random_gates(rotary_base=base)
    pooled_query, pooled_key = pooled(gates, query, key)
    order = torch.tensor([0, 1, 6, 3, 4, 5, 2, 7])
    scores = gates(pooled_query, pooled_key)
    swapped = gates(pooled_query, pooled_key[..., order, :], blocks=order)
    torch.testing.assert_close(swapped, scores[..., order])
    # Without the positions it is not the same, if there are positions at all.
    last = gates(pooled_query, pooled_key[..., order, :])[..., -1, :]
    assert torch.allclose(last, scores[..., -1, :][..., order]) == (base is None)


def test_scores_depend_on_distances_of_blocks_only():
    gates = random_gates(rotary_base=100.0)
    query, key = random_heads(1, 4, 2, 64)
    pooled_query, pooled_key = pooled(gates, query, key)
    same_query = pooled_query[..., :1, :].expand(*pooled_query.shape[:-2], 8, -1)
    same_key = pooled_key[..., :1, :].expand(*pooled_key.shape[:-2], 8, -1)
    scores = gates(same_query, same_key)[0, 0]
    for distance in range(8):
        on_diagonal = scores.diagonal(-distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(
            on_diagonal, on_diagonal[..., :1].expand_as(on_diagonal), atol=1e-4, rtol=1e-4
        )
    assert scores[:, -1].std(dim=-1).min() > 1e-3


def test_layers_have_gates_of_their_own():
    gates = random_gates(layers=3)
    query, key = random_heads(1, 4, 2, 64)
    pooled_query, pooled_key = pooled(gates, query, key)
    together = gates(pooled_query.expand(-1, 3, -1, -1, -1), pooled_key.expand(-1, 3, -1, -1, -1))
    for layer in range(3):
        alone = gates(pooled_query, pooled_key, layers=slice(layer, layer + 1))
        torch.testing.assert_close(alone[:, 0], together[:, layer])
    assert not torch.allclose(together[:, 0], together[:, 1])


def test_wrong_gates_are_refused():
    with pytest.raises(ValueError, match="9 query heads cannot share 2 key heads"):
        AttentionGates(layers=1, query_heads=9, key_heads=2, dim=8)
    with pytest.raises(ValueError, match="one query pooling and width = dim"):
        AttentionGates(layers=1, query_heads=2, key_heads=2, dim=8, width=4, single_linear=True)
    with pytest.raises(ValueError, match="block_size must be an integer of at least 1"):
        AttentionGates(layers=1, query_heads=2, key_heads=2, dim=8, block_size=0)


# The truth and the loss ---------------------------------------------------------------------------


def probabilities(query, key):
    _, weights = dense_attention(query, key, key, causal=True, scale=SCALE, return_weights=True)
    return weights


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens", "size"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_map_equals_max_pooled_probabilities_and_the_streaming_kernel(
    batch, heads, key_heads, tokens, size, seed, monkeypatch
):
    # Two rows of blocks at a time, so that several pieces are put together.
    monkeypatch.setattr("reattend.long_context.seer_attention.TRUTH_ROWS", 2 * size)
    query, key = random_heads(batch, heads, key_heads, tokens, seed=seed, sharpness=6.0)
    expected = F.max_pool2d(probabilities(query, key), size, ceil_mode=True)
    got = block_maximum_map(query, key, size, SCALE)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    streamed = streaming_block_maximum_map(query, key, size, SCALE)
    torch.testing.assert_close(streamed, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens", "size"), SHAPES)
def test_truth_is_a_distribution_over_the_past(batch, heads, key_heads, tokens, size):
    truth = truth_map(*random_heads(batch, heads, key_heads, tokens), size, SCALE)
    torch.testing.assert_close(truth.sum(-1), torch.ones_like(truth[..., 0]))
    assert (truth >= 0).all()
    assert (truth.triu(1) == 0).all()
    assert (truth.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_truth_is_the_maximum_and_not_the_mass():
    # The last query: eight keys of weight 1/16 in one block, one key of 1/2 in the other. The
    # queries before it attend evenly, the first of the block to nine keys.
    query, key = torch.zeros(1, 1, 16, DIM), torch.zeros(1, 1, 16, DIM)
    query[0, 0, 15, 0] = 1.0
    key[0, 0, 12, 0], key[0, 0, 8:, 1] = math.log(8), 0.0
    query[0, 0, 15, 1], key[0, 0, 8:12, 1], key[0, 0, 13:, 1] = 1.0, -100.0, -100.0
    largest = block_maximum_map(query, key, 8, 1.0)[0, 0, 1]
    torch.testing.assert_close(largest, torch.tensor([1 / 9, 1 / 2]), atol=1e-6, rtol=0)
    weights = dense_attention(query, key, key, causal=True, scale=1.0, return_weights=True)[1]
    torch.testing.assert_close(weights[0, 0, 15, :8].sum(), torch.tensor(0.5))


def test_enlarging_an_entry_never_lowers_its_tile():
    weights = probabilities(*random_heads(1, 2, 2, 32))
    pooled_map = F.max_pool2d(weights, 8, ceil_mode=True)
    for row, column in ((3, 1), (20, 9), (31, 31)):
        larger = weights.clone()
        larger[..., row, column] += 0.3
        change = F.max_pool2d(larger, 8, ceil_mode=True) - pooled_map
        assert (change >= 0).all()


def test_a_part_of_a_sequence_has_no_truth():
    query, key = random_heads(1, 2, 2, 32)
    for function in (truth_map, streaming_block_maximum_map):
        with pytest.raises(ValueError, match="16 queries and 32 keys"):
            function(query[:, :, 16:], key, 8, SCALE)


def test_loss_is_zero_at_the_log_of_the_truth_plus_a_constant():
    truth = truth_map(*random_heads(2, 4, 2, 64), 8, SCALE)[:, None]
    lowest = torch.finfo(truth.dtype).min
    scores = truth.log().masked_fill(truth == 0, lowest) + 3.0
    assert abs(distillation_loss(scores, truth).item()) < 1e-12
    assert distillation_loss(0.5 * scores, truth).item() > 1e-3


@pytest.mark.parametrize("layers", [1, 3])
def test_loss_equals_torch_over_the_kept_rows(layers):
    truth = torch.stack(
        [truth_map(*random_heads(2, 4, 2, 64, seed=s), 8, SCALE) for s in range(layers)], dim=1
    )
    scores = torch.randn(truth.shape, dtype=torch.float64).masked_fill(
        ~causal_block_mask(8, 8), torch.finfo(torch.float64).min
    )
    scores.requires_grad_()
    expected = sum(
        F.kl_div(
            scores[:, layer, :, 2:].log_softmax(-1), truth[:, layer, :, 2:], reduction="none"
        ).sum()
        / (2 * 4 * 6 * 8)
        for layer in range(layers)
    )
    loss = distillation_loss(scores, truth)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient[..., :2, :] == 0).all()  # the first quarter of the rows
    torch.testing.assert_close(
        gradient[..., 2:, :], (scores.softmax(-1) - truth)[..., 2:, :].detach() / (2 * 4 * 6 * 8)
    )


def test_no_gradient_reaches_the_truth():
    query, key = (x.requires_grad_() for x in random_heads(1, 4, 2, 64))
    gates = random_gates()
    truth = truth_map(query, key, 8, SCALE)[:, None]
    loss = distillation_loss(gates(*(x.detach() for x in pooled(gates, query, key))), truth)
    loss.backward()
    assert query.grad is None
    assert key.grad is None
    assert all(p.grad.abs().sum() > 0 for p in gates.parameters())


def test_gradient_of_the_gate_agrees_with_finite_differences():
    query, key = random_heads(1, 2, 1, 24)
    gates = random_gates(heads=2, key_heads=1, rotary_base=None)
    truth = truth_map(query, key, 8, SCALE)[:, None]
    vectors = pooled(gates, query, key)

    def loss(query_map, key_map):
        maps = {"query_map": query_map, "key_map": key_map}
        return distillation_loss(torch.func.functional_call(gates, maps, vectors), truth)

    assert torch.autograd.gradcheck(loss, (gates.query_map, gates.key_map))


# Selection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "blocks", "expected"),
    [(0.1, 64, 3), (0.2, 64, 6), (0.3, 64, 10), (0.5, 64, 18), (1.0, 64, 64), (0.1, 8, 1)],
)
def test_blocks_per_row_of_the_official_formula(share, blocks, expected):
    assert blocks_per_row(share, blocks) == expected


def test_long_rows_reach_the_density_asked_for():
    for share in (0.1, 0.2, 0.3, 0.5, 0.9):
        k, n = blocks_per_row(share, 100_000), 100_000
        assert (k * (k + 1) / 2 + (n - k) * k) / (n * (n + 1) / 2) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_density_of_k_blocks_in_each_row(k):
    query, key = random_heads(2, 4, 2, 64)
    method = SeerAttention(gates=random_gates(), inv_freq=frequencies(DIM, 1e4), k=k)
    blocks = method.select(query, key, scale=SCALE, layer=0)
    kept = k * (k + 1) // 2 + (8 - k) * k
    assert (blocks.sum((-2, -1)) == kept).all()
    torch.testing.assert_close(density(blocks), torch.full((2, 4), kept / 36))


def test_threshold_keeps_shares_above_it_and_the_diagonal():
    scores = torch.log(torch.tensor([[[[1.0, 0, 0], [0.95, 0.05, 0], [0.5, 0.3, 0.2]]]]))
    scores = scores.masked_fill(~causal_block_mask(3, 3), torch.finfo(torch.float32).min)
    kept = threshold_blocks(scores, 0.25)[0, 0].int().tolist()
    assert kept == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    nothing = threshold_blocks(scores, 0.99)[0, 0].int().tolist()
    assert nothing == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert threshold_blocks(scores, 0.0).equal(causal_block_mask(3, 3)[None, None])


def test_last_rows_can_be_dense():
    query, key = random_heads(1, 4, 2, 64)
    method = SeerAttention(gates=random_gates(), inv_freq=frequencies(DIM, 1e4), k=1, dense_last=2)
    blocks = method.block_mask(query, key, scale=SCALE)
    assert blocks[..., -2:, :].sum() == 4 * (7 + 8)
    assert blocks[..., :-2, :].sum() == 4 * 6


@pytest.mark.parametrize(("batch", "heads", "key_heads", "tokens", "size"), SHAPES)
@pytest.mark.parametrize("setting", [{"density": 1.0}, {"threshold": 0.0}])
def test_full_density_equals_dense_attention(batch, heads, key_heads, tokens, size, setting):
    query, key = (x.float() for x in random_heads(batch, heads, key_heads, tokens))
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(1))
    gates = random_gates(1, heads, key_heads, block_size=size, dtype=torch.float32)
    method = SeerAttention(gates=gates, inv_freq=frequencies(DIM, 1e4), **setting)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    got = method.prefill(query, key, value, scale=SCALE, layer=0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert method.density() == 1.0


def test_selection_is_that_of_the_unrotated_vectors():
    query, key = random_heads(2, 4, 2, 61)
    gates = random_gates()
    inv_freq = frequencies(DIM, 1e4)
    positions = torch.arange(61)
    method = SeerAttention(gates=gates, inv_freq=inv_freq, k=2)
    got = method.select(
        rotate(query, positions, inv_freq), rotate(key, positions, inv_freq), scale=SCALE, layer=0
    )
    expected = top_k_blocks(gates(*pooled(gates, query, key))[:, 0], 2, diagonal=False)
    assert torch.equal(got, expected)


def test_chunk_behind_a_cache_selects_the_last_rows():
    query, key = random_heads(1, 4, 2, 64)
    method = SeerAttention(gates=random_gates(), inv_freq=frequencies(DIM, 1e4), k=2)
    whole = method.select(query, key, scale=SCALE, layer=0)
    chunk = method.select(query[:, :, -24:], key, scale=SCALE, layer=0)
    assert torch.equal(chunk, whole[:, :, -3:])


def test_wrong_settings_are_refused():
    gates, inv_freq = random_gates(), frequencies(DIM, 1e4)
    for settings in ({}, {"k": 1, "density": 0.5}, {"k": 1, "threshold": 0.1}):
        with pytest.raises(ValueError, match="exactly one of density, k and threshold"):
            SeerAttention(gates=gates, inv_freq=inv_freq, **settings)
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\)"):
        SeerAttention(gates=gates, inv_freq=inv_freq, threshold=1.0)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        SeerAttention(gates=gates, inv_freq=inv_freq, density=0.0)
    with pytest.raises(ValueError, match="no sequence was read"):
        Distillation(gates, inv_freq).example()


# Inside a model -----------------------------------------------------------------------------------


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
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, 111), generator=torch.Generator().manual_seed(1))


def gates_of(model, **changes):
    settings = {"layers": 2, "heads": 9, "key_heads": 3, "block_size": 16, "std": 0.3}
    return random_gates(dtype=torch.float32, **(settings | changes))


def settings_of(model, gates, **choice):
    rotary_emb = model.model.rotary_emb
    scaling = rotary_emb.attention_scaling
    return {"gates": gates, "inv_freq": rotary_emb.inv_freq, "rotary_scaling": scaling} | choice


def projections(model, call):
    """Outputs of q_proj and k_proj of every layer, as heads: the vectors before the rotary."""
    seen = []

    def keep(_module, _inputs, output):
        seen.append(output.unflatten(-1, (-1, DIM)).transpose(1, 2))

    handles = [
        projection.register_forward_hook(keep)
        for layer in model.model.layers
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(seen[::2], seen[1::2], strict=True))


class Spy(SeerAttention):
    """Keeps the vectors that the gates see."""

    def select(self, query, key, *, scale, layer):
        offset = key.shape[2] - query.shape[2]
        before = (
            unrotate(query, offset, self.inv_freq, self.rotary_scaling),
            unrotate(key, 0, self.inv_freq, self.rotary_scaling),
        )
        self.seen.append((layer, *before))
        return super().select(query, key, scale=scale, layer=layer)


def spy(model, **choice):
    method = Spy(**settings_of(model, gates_of(model), **choice))
    method.seen = []
    return method


@torch.no_grad()
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_gates_see_what_the_projections_give(model, tokens, rope):
    if rope == "yarn":
        config = LlamaConfig(**model.config.to_dict())
        config.rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        assert model.model.rotary_emb.attention_scaling != 1
    method = spy(model, k=3)
    with attach(model, method):
        before = projections(model, lambda: model(tokens))
    assert [layer for layer, _, _ in method.seen] == [0, 1]
    for (query, key), (_, seen_query, seen_key) in zip(before, method.seen, strict=True):
        torch.testing.assert_close(seen_query, query, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen_key, key, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_gates_see_the_projections_of_a_batch_padded_on_the_left(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    # What generate and the project's own decoding pass: numbers start at the first real token.
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    method = spy(model, k=3)
    with attach(model, method):
        before = projections(
            model, lambda: model(tokens, attention_mask=mask, position_ids=positions)
        )
    sequences = [method.seen[0:2], method.seen[2:4]]
    for (query, key), seen in zip(before, sequences, strict=True):
        (_, first_query, first_key), (_, second_query, second_key) = seen
        torch.testing.assert_close(first_query, query[:1, :, 30:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first_key, key[:1, :, 30:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second_query, query[1:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second_key, key[1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_numbers_the_positions_of_a_padded_batch_from_the_first_real_token(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    method = spy(model, k=3)
    settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with attach(model, method):
        before = projections(model, lambda: model.generate(tokens, attention_mask=mask, **settings))
    torch.testing.assert_close(method.seen[0][1], before[0][0][:1, :, 30:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_padded_sequence_is_read_as_it_is_alone(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    settings = settings_of(model, gates_of(model), k=2)
    with attach(model, SeerAttention(**settings)) as padded:
        ours = model(tokens, attention_mask=mask, position_ids=positions).logits
    with attach(model, SeerAttention(**settings)) as alone:
        expected = [model(tokens[:1, 30:]).logits[0], model(tokens[1:]).logits[0]]
    torch.testing.assert_close(ours[0, 30:], expected[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(padded.densities(), alone.densities())


@torch.no_grad()
def test_model_in_chunks_and_at_full_density_is_unchanged(model, tokens):
    expected = model(tokens).logits
    settings = settings_of(model, gates_of(model), density=1.0)
    with attach(model, SeerAttention(**settings)) as method:
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(50, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert method.density() == 1.0


def test_distillation_trains_gates_and_leaves_the_model_alone(model, tokens):
    model.requires_grad_(True)
    gates = gates_of(model, std=0.02, width=8)
    inv_freq = model.model.rotary_emb.inv_freq
    with attach(model, Distillation(gates, inv_freq)) as collector:
        logits = model(tokens).logits
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
    example = collector.example()
    assert example.pooled_query.shape == (2, 2, 9, 7, DIM)
    assert example.pooled_key.shape == (2, 2, 3, 7, 3 * DIM)
    assert example.truth.shape == (2, 2, 9, 7, 7)
    assert not any(x.requires_grad for x in example)
    optimiser = torch.optim.AdamW(gates.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = 10 * distillation_loss(gates(*example[:2]), example.truth)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_collected_features_are_what_the_method_selects_from(model, tokens):
    gates = gates_of(model)
    inv_freq = model.model.rotary_emb.inv_freq
    with attach(model, Distillation(gates, inv_freq)) as collector:
        model(tokens)
    scores = gates(*collector.example()[:2])
    method = spy(model, k=2)
    with attach(model, method):
        model(tokens)
    _, query, key = method.seen[0]
    torch.testing.assert_close(
        gates(*pooled(gates, query, key), layers=slice(0, 1))[:, 0], scores[:, 0]
    )


@torch.no_grad()
def test_distillation_refuses_padding(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    collector = Distillation(gates_of(model), model.model.rotary_emb.inv_freq)
    with (
        pytest.raises(ValueError, match="without padding"),
        attach(model, collector),
    ):
        model(tokens, attention_mask=mask)
