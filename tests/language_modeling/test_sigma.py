"""Oracles of Sigma: shared heads, the lift, augmented queries, the cache, selective V."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from reattend.attention.dense import dense_attention
from reattend.attention.host import attach
from reattend.attention.positions import rotary
from reattend.attention.registry import build_method
from reattend.language_modeling.sigma import (
    DiffQKVAttention,
    SelectiveV,
    cache_bytes,
    largest,
    replicated,
    shared_sum,
    shared_weights,
)
from reattend.trunks.language import GatedFeedForward, Trunk, parameter_count
from reattend.trunks.mixers import SoftmaxAttention

EXACT = {"rtol": 0, "atol": 1e-10}
WIDTH, HEADS = 48, 6  # heads of 8


def tensors(heads=6, key_heads=2, value_heads=3, queries=7, keys=11, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, queries), (key_heads, keys), (value_heads, keys)
    return [torch.randn(2, n, t, dim, generator=generator).double() for n, t in shapes]


def mixer(seed=0, **sizes):
    torch.manual_seed(seed)
    return DiffQKVAttention(WIDTH, HEADS, **sizes).double().eval()


def text(length=13, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator).double()


def by_hand(layer, x):
    """The whole layer, head by head, as the paper writes it (equations 1 to 4, appendix E)."""
    d = layer.head_width
    q = layer.query(x)
    if layer.augment is not None:
        unit = layer.augment
        q = unit.down(F.silu(unit.gate(q)) * unit.up(q))
    k, v = layer.key(x), layer.value(x)
    heads = []
    for i in range(layer.heads):
        of_key = i * layer.key_heads // layer.heads
        of_value = i * layer.value_heads // layer.heads
        k_i = k[..., of_key * layer.key_width :][..., : layer.key_width]
        if layer.lift is not None:
            k_i = k_i @ layer.lift.weight.T
        q_i = rotary(q[..., i * d : (i + 1) * d], 0, layer.rotary_base)
        k_i = rotary(k_i, 0, layer.rotary_base)
        scores = q_i @ k_i.mT / d**0.5
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        heads.append(weights @ v[..., of_value * d : (of_value + 1) * d])
    return layer.out(torch.cat(heads, -1))


# --- shared heads --------------------------------------------------------------------------------


@pytest.mark.parametrize(("key_heads", "value_heads"), [(6, 6), (2, 3), (3, 2), (1, 6), (6, 1)])
@pytest.mark.parametrize("queries", [1, 7, 11])
def test_sharing_is_attention_with_every_head_copied(key_heads, value_heads, queries):
    q, k, v = tensors(key_heads=key_heads, value_heads=value_heads, queries=queries)
    found = shared_sum(shared_weights(q, k), v)
    copies = (x.repeat_interleave(6 // x.shape[1], 1) for x in (k, v))
    expected = dense_attention(q, *copies, causal=True)
    torch.testing.assert_close(found, expected, **EXACT)


def test_equal_numbers_of_heads_are_grouped_query_attention():
    q, k, v = tensors(key_heads=3, value_heads=3, queries=11)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(shared_sum(shared_weights(q, k), v), expected, **EXACT)


def test_neighbouring_query_heads_share_a_head():
    q, k, v = tensors()
    other = k.clone()
    other[:, 1] += 1 + torch.arange(4)  # query heads 3, 4 and 5
    changed = (shared_weights(q, other) != shared_weights(q, k)).any(-1).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 3
    weights, other = shared_weights(q, k), v.clone()
    other[:, 1] += 1  # query heads 2 and 3
    changed = (shared_sum(weights, other) != shared_sum(weights, v)).any(-1).any(-1)[0]
    assert changed.tolist() == [False, False, True, True, False, False]
    assert torch.equal(replicated(v, 6)[0, :, 0], v[0, [0, 0, 1, 1, 2, 2], 0])


def test_weights_take_the_scale_that_is_given():
    q, k, _ = tensors(queries=1)
    expected = (0.3 * q @ replicated(k, 6).mT).softmax(-1)
    torch.testing.assert_close(shared_weights(q, k, 0.3), expected, **EXACT)


# --- the mixer -----------------------------------------------------------------------------------

SIZES = [
    {},
    {"key_heads": 2, "value_heads": 3},
    {"key_heads": 1, "augmented": 20, "rotary_base": 500.0},
    {"value_heads": 1, "key_width": 4},
    {"key_heads": 3, "value_heads": 2, "key_width": 3, "augmented": 7, "rotary_base": 500.0},
    {"key_heads": 2, "head_width": 10, "key_width": 5, "augmented": 9},
]
EVERY = pytest.mark.parametrize("sizes", SIZES)


@EVERY
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_what_the_paper_writes(sizes, seed):
    layer, x = mixer(seed, **sizes), text(seed=seed)
    torch.testing.assert_close(layer(x), by_hand(layer, x), **EXACT)


@EVERY
@pytest.mark.parametrize("cuts", [(1,) * 13, (6, 1, 6), (12, 1)])
def test_decoding_is_the_parallel_form(sizes, cuts):
    layer, x, cache = mixer(**sizes), text(), {}
    parts = [layer(part, cache=cache) for part in x.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), **EXACT)
    held = sum(cache[name].numel() for name in ("key", "value"))
    assert held == 2 * layer.state_size(13)  # a batch of two


@EVERY
def test_weights_are_those_of_the_forward_pass(sizes):
    layer, x = mixer(**sizes), text()
    weights = layer.weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)
    v = layer.value(x).unflatten(-1, (layer.value_heads, -1)).transpose(1, 2)
    mixed = (weights @ replicated(v, HEADS)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.out(mixed), layer(x), **EXACT)


def test_full_heads_are_the_trunks_softmax_attention():
    layer, x = mixer(key_heads=2, value_heads=3), text()
    trunks = SoftmaxAttention(WIDTH, HEADS, key_heads=2, value_heads=3).double()
    parts = (layer.query.weight, layer.key.weight, layer.value.weight)
    trunks.project.weight.data = torch.cat(parts).data
    trunks.out = layer.out
    torch.testing.assert_close(layer(x), trunks(x), **EXACT)


def test_augmented_queries_add_three_matrices_and_no_cache():
    plain, augmented = mixer(key_heads=2), mixer(key_heads=2, augmented=72)
    added = parameter_count(augmented) - parameter_count(plain)
    assert added == 3 * WIDTH * 72
    assert augmented.state_size(100) == plain.state_size(100)
    unit = GatedFeedForward(WIDTH, 72)
    assert added == parameter_count(unit)  # a feed-forward part wider by as much
    x = text()
    q = augmented.query(x)
    unit = augmented.augment
    expected = unit.down(F.silu(unit.gate(q)) * unit.up(q))
    torch.testing.assert_close(augmented.queries(x), expected, **EXACT)
    torch.testing.assert_close(plain.queries(x), plain.query(x), **EXACT)


def test_a_lift_into_the_first_half_compares_half_of_the_query():
    """Without a turn (all at place 0) a lift [I; 0] leaves the product over the first half of q."""
    layer = mixer(key_width=4)
    layer.lift.weight.data = torch.eye(8, 4).double()
    layer.rotary_base = 1e300  # the first pair turns still, so it is left out
    x = text(length=5)
    q = layer.query(x).unflatten(-1, (HEADS, 8)).transpose(1, 2)
    k = layer.key(x).unflatten(-1, (HEADS, 4)).transpose(1, 2)
    k[..., 0] = 0
    layer.key.weight.data.unflatten(0, (HEADS, 4))[:, 0] = 0
    scores = (q[..., :4] @ k.mT) / 8**0.5
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(future, float("-inf")).softmax(-1)
    torch.testing.assert_close(layer.weights(x), expected, rtol=0, atol=1e-8)


def test_it_is_causal_and_gradients_reach_every_matrix():
    layer, x = mixer(**SIZES[4]), text()
    other = x.clone()
    other[:, 7:] = other[:, 7:].flip(1)
    torch.testing.assert_close(layer(other)[:, :7], layer(x)[:, :7], **EXACT)
    layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_a_trunk_of_it_decodes_as_it_reads():
    torch.manual_seed(0)
    layers = [lambda width: DiffQKVAttention(width, 3, key_heads=1, key_width=4, augmented=10)] * 2
    model = Trunk(11, 24, layers, feed_forward=lambda width: GatedFeedForward(width, 20)).eval()
    tokens, cache = torch.randint(11, (2, 9)), model.start_cache()
    parts = [model(token, cache) for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-5)
    assert model.state_size(9) == 2 * 9 * (4 + 24)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 50}, "width 50 is not a multiple of 6 heads"),
        ({"key_heads": 4}, "4 key or value heads do not divide 6 heads"),
        ({"value_heads": 5}, "5 key or value heads do not divide 6 heads"),
        ({"key_width": 9}, "keys of 9 are wider than queries of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        DiffQKVAttention(**({"width": WIDTH, "heads": HEADS} | sizes))


def test_the_cache_of_sigma_is_three_eighths_smaller():
    widths = {"key_width": 64, "value_width": 64}
    sigma, grouped = cache_bytes(1000, 4, 16, **widths), cache_bytes(1000, 16, 16, **widths)
    assert grouped == 2 * 1000 * 32 * 64
    assert 1 - sigma / grouped == 0.375  # the abstract: 37.5 %
    half = cache_bytes(1000, 16, 16, key_width=32, value_width=64, number_bytes=4)
    assert half == 4 * 1000 * 16 * 96
    layer = mixer(key_heads=2, value_heads=3, key_width=4)
    held = cache_bytes(77, 2, 3, key_width=4, value_width=8, number_bytes=1)
    assert layer.state_size(77) == held


# --- selective V ---------------------------------------------------------------------------------


def test_the_largest_are_chosen_for_every_head_and_query():
    scores = torch.tensor([[[[0.1, 0.5, 0.2, 0.4], [0.3, 0.0, 0.6, 0.1]]]])
    chosen = largest(scores, torch.tensor([1, 3]))
    assert chosen.tolist() == [[[[False, True, False, False], [True, False, True, True]]]]


def decoded(method, q, k, v, scale=0.4):
    return method.decode(q, k, v, scale=scale, layer=0)


@pytest.mark.parametrize("keep", [11, 50, 1.0])
def test_all_values_are_dense_attention(keep):
    q, k, v = tensors(value_heads=2, queries=1)
    for renormalise in (False, True):
        found = decoded(SelectiveV(keep=keep, renormalise=renormalise), q, k, v)
        torch.testing.assert_close(found, dense_attention(q, k, v, scale=0.4), **EXACT)


@pytest.mark.parametrize("keep", [1, 4, 0.5])
def test_values_left_out_count_as_zero_and_bound_the_error(keep):
    q, k, v = tensors(value_heads=2, queries=1, seed=3)
    full, weights = dense_attention(q, k, v, scale=0.4, return_weights=True)
    number = keep if isinstance(keep, int) else 6  # half of 11, rounded to even
    kept, places = weights.topk(number)
    values = replicated(v, 6).take_along_dim(places[..., 0, :, None], dim=2)
    expected = kept @ values
    found = decoded(SelectiveV(keep=keep, renormalise=False), q, k, v)
    torch.testing.assert_close(found, expected, **EXACT)
    left = 1 - kept.sum(-1, keepdim=True)
    longest = replicated(v, 6).norm(dim=-1).amax(-1)[..., None, None]
    assert ((found - full).norm(dim=-1, keepdim=True) <= left * longest + 1e-12).all()
    again = decoded(SelectiveV(keep=keep), q, k, v)
    torch.testing.assert_close(again, expected / (1 - left), **EXACT)


def test_reads_are_keys_of_all_and_values_of_a_group_once():
    q, k, v = tensors(value_heads=2, queries=1)
    method = SelectiveV(keep=4)
    decoded(method, q, k, v)
    chosen = largest(shared_weights(q, k, 0.4), torch.tensor([4]))
    together = int(chosen.unflatten(1, (2, 3)).any(2).sum())
    assert method.kv_reads == together < 2 * 2 * 11
    assert method.kv_reads + method.selection_reads == (2 * 2 * 11 + together) / 2
    assert method.density("decode") == pytest.approx(4 / 11)


def test_a_padded_sequence_is_decoded_as_it_is_alone():
    q, k, v = tensors(value_heads=2, queries=1)
    padding = torch.ones(2, 11, dtype=torch.bool)
    padding[0, :5] = False
    method = SelectiveV(keep=0.5)
    found = method.decode(q, k, v, scale=0.4, layer=0, padding=padding)
    alone = decoded(SelectiveV(keep=3), q[:1], k[:1, :, 5:], v[:1, :, 5:])
    torch.testing.assert_close(found[:1], alone, **EXACT)
    torch.testing.assert_close(found[1:], decoded(SelectiveV(keep=6), q[1:], k[1:], v[1:]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_chosen_and_summed_in_float32(dtype):
    """Raw scores of 75,000, scaled ones of 9,400: beyond float16, and a sharp softmax."""
    shape = {"generator": torch.Generator().manual_seed(0)}
    key, value = (torch.randn(1, 1, 48, 64, **shape).to(dtype) for _ in range(2))
    query = torch.zeros(1, 2, 1, 64, dtype=dtype)
    query[..., 0] = 300
    key[..., 0] = 250 + torch.arange(48).to(dtype) / 8
    ours = decoded(SelectiveV(keep=4), query, key, value, scale=1 / 8)
    wide = decoded(SelectiveV(keep=4), query.float(), key.float(), value.float(), scale=1 / 8)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, wide.to(dtype), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*left nothing out")
def test_it_attaches_to_a_model_and_reads_the_prompt_densely():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(31, (1, 20))

    def last(method):
        cache = DynamicCache(config=config)
        with attach(model, method), torch.no_grad():
            model(tokens[:, :19], past_key_values=cache, use_cache=True)
            return model(tokens[:, 19:], past_key_values=cache, use_cache=True).logits

    with torch.no_grad():
        whole = model(tokens).logits[:, -1:]
    everything = last(build_method("selective_v", keep=20))
    torch.testing.assert_close(everything, whole, rtol=0, atol=1e-5)
    few = build_method("selective_v", keep=3)
    assert (last(few) - whole).abs().max() > 1e-2
    assert few.density("decode") == pytest.approx(3 / 20)
    assert few.density("prefill") == 1.0


@pytest.mark.parametrize(("keep", "tokens"), [(100, 100), (0.25, 1), (1.0, None)])
def test_where_it_begins_to_save(keep, tokens):
    method = SelectiveV(keep=keep)
    assert method.saves_from("prefill") is None
    assert method.saves_from("decode") == tokens


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got 0"):
        SelectiveV(keep=0)
    with pytest.raises(ValueError, match="keep must lie in"):
        SelectiveV(keep=1.5)
