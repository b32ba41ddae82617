"""The interface of methods: padding, chunks, decoding, densities, settings, registry."""

import pytest
import torch

from reattend.attention.blocks import causal_block_mask, density, expand_to_tokens
from reattend.attention.dense import dense_attention
from reattend.attention.method import (
    AttentionMethod,
    BlockSparseMethod,
    check_count,
    check_share,
    per_sequence,
)
from reattend.attention.registry import METHODS, build_method
from reattend.long_context.moa import Plan, Rule
from reattend.long_context.seer_attention import AttentionGates

SIZE = 16
GATES = AttentionGates(layers=1, query_heads=2, key_heads=1, dim=8, block_size=SIZE)


class EverySecond(BlockSparseMethod):
    """Diagonal and every second block, also blocks of the future, which must be dropped."""

    def select(self, query, key, *, scale, layer):
        rows = -(-key.shape[2] // SIZE) - (key.shape[2] - query.shape[2]) // SIZE
        columns = -(-key.shape[2] // SIZE)
        distance = torch.arange(rows)[:, None] + columns - rows - torch.arange(columns)
        return (distance % 2 == 0).expand(*query.shape[:2], -1, -1)


class Nothing(BlockSparseMethod):
    """Selects no block at all."""

    def select(self, query, key, *, scale, layer):
        blocks = -(-key.shape[2] // SIZE)
        return torch.zeros(*query.shape[:2], blocks, blocks, dtype=torch.bool)


def tensors(queries=63, keys=63, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 6, queries, 8, generator=generator),
        torch.randn(batch, 3, keys, 8, generator=generator),
        torch.randn(batch, 3, keys, 8, generator=generator),
    )


@pytest.mark.parametrize("queries", [63, 40])
@pytest.mark.parametrize(
    "method", [AttentionMethod(), EverySecond(block_size=SIZE)], ids=["dense", "block"]
)
def test_prefill_equals_masked_dense_attention(method, queries):
    query, key, value = tensors(queries)
    output = method.prefill(query, key, value, scale=0.3, layer=0)
    tokens = None
    if isinstance(method, BlockSparseMethod):
        tokens = expand_to_tokens(method.block_mask(query, key), SIZE, queries, 63)
    expected = dense_attention(query, key, value, mask=tokens, scale=0.3, causal=True)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_decode_is_dense_and_recorded_apart():
    method = EverySecond(block_size=SIZE)
    query, key, value = tensors(queries=1)
    output = method.decode(query, key, value, scale=0.3, layer=0)
    expected = dense_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert method.density("decode") == 1.0
    with pytest.raises(ValueError, match="no prefill was recorded"):
        method.density()


@pytest.mark.parametrize("queries", [63, 40, 5])
def test_a_padded_sequence_is_computed_as_it_is_alone(queries):
    query, key, value = tensors(queries, batch=3)
    padding = torch.ones(3, 63, dtype=torch.bool)
    padding[0, :29] = False  # left
    padding[1, 60:] = False  # right
    method = EverySecond(block_size=SIZE)
    output = method.prefill(query, key, value, scale=0.3, layer=0, padding=padding)
    for sequence, (start, stop) in enumerate([(29, 63), (0, 60), (0, 63)]):
        first, last = max(start - 63 + queries, 0), stop - 63 + queries
        one = slice(sequence, sequence + 1)
        alone = EverySecond(block_size=SIZE)
        expected = alone.prefill(
            query[one, :, first:last],
            key[one, :, start:stop],
            value[one, :, start:stop],
            scale=0.3,
            layer=0,
        )
        torch.testing.assert_close(output[one, :, first:last], expected, atol=1e-6, rtol=0)
        assert (output[one, :, :first] == 0).all()
        assert (output[one, :, last:] == 0).all()


def test_padded_keys_are_never_attended():
    query, key, value = tensors()
    padding = torch.ones(2, 63, dtype=torch.bool)
    padding[0, :29] = False
    key[0, :, :29], value[0, :, :29] = float("nan"), float("nan")
    for method in (AttentionMethod(), EverySecond(block_size=SIZE)):
        assert (
            method.prefill(query, key, value, scale=0.3, layer=0, padding=padding).isfinite().all()
        )


def test_scattered_padding_is_refused():
    query, key, value = tensors()
    padding = torch.ones(2, 63, dtype=torch.bool)
    padding[0, 30] = False
    with pytest.raises(ValueError, match="contiguous"):
        per_sequence(lambda *_: query, query, key, value, padding)


def test_density_is_the_mean_over_calls_layers_and_heads():
    method = EverySecond(block_size=SIZE)
    for layer, length in [(1, 63), (0, 63), (1, 100)]:
        method.prefill(*tensors(length, length), scale=0.3, layer=layer)
    by_hand = {
        length: density(method.block_mask(*tensors(length, length)[:2]))[0] for length in (63, 100)
    }
    expected = torch.stack([by_hand[63], (by_hand[63] + by_hand[100]) / 2])
    torch.testing.assert_close(method.densities(), expected)
    assert method.density() == pytest.approx(expected.mean().item())
    assert 0.5 < method.density() < 0.7
    method.clear()
    with pytest.raises(ValueError, match="no prefill"):
        method.densities()


def test_short_sequences_are_dense():
    method = Nothing(block_size=SIZE)
    query, key, value = tensors(SIZE, SIZE)
    output = method.prefill(query, key, value, scale=0.3, layer=0)
    expected = dense_attention(query, key, value, scale=0.3, causal=True)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    assert method.density() == 1.0
    method.clear()
    method.prefill(*tensors(SIZE + 1, SIZE + 1), scale=0.3, layer=0)
    assert method.density() == 0.0


def test_block_mask_drops_the_future():
    blocks = EverySecond(block_size=SIZE).block_mask(*tensors(40, 63)[:2])
    assert not (blocks & ~causal_block_mask(*blocks.shape[-2:])).any()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "8"])
def test_counts_are_checked(wrong):
    with pytest.raises(ValueError, match="block_size must be an integer of at least 1, got"):
        check_count("block_size", wrong, at_least=1)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.2, float("nan")])
def test_shares_are_checked(wrong):
    with pytest.raises(ValueError, match=r"gamma must lie in \(0, 1\], got"):
        check_share("gamma", wrong)


def test_registry_refuses_unknown_names_and_settings():
    with pytest.raises(
        ValueError, match=r"unknown attention method 'flexprefil'; known: .*flexprefill"
    ):
        build_method("flexprefil")
    with pytest.raises(TypeError, match="streaming_llm has no setting windw; it has: sink, window"):
        build_method("streaming_llm", windw=3)
    with pytest.raises(ValueError, match="window must be an integer of at least 1, got 0"):
        build_method("streaming_llm", window=0)


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_can_be_built(name):
    needed = {
        "oracle_topk": {"k": 4},
        "moa": {"plan": Plan.uniform(Rule(0, 0.5), 2, 3)},
        "seer_attention": {"gates": GATES, "inv_freq": torch.ones(4), "density": 0.2},
    }
    settings = needed.get(name, {})
    assert isinstance(build_method(name, **settings), AttentionMethod)
