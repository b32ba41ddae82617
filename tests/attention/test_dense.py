"""The dense reference against torch's kernel and against explicit loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from reattend.attention.dense import causal_sdpa, dense_attention


def tensors(heads=6, key_heads=3, queries=11, keys=17, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, queries, dim), (2, key_heads, keys, dim), (2, key_heads, keys, dim)]
    return [torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes]


def by_loops(query, key, value, allowed, scale):
    """Softmax attention written out pair by pair."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(batch, heads, queries, value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = [j for j in range(key.shape[2]) if allowed[i, j]]
                terms = [
                    math.exp(scale * float(query[b, h, i] @ key[b, h // group, j])) for j in seen
                ]
                for j, term in zip(seen, terms, strict=True):
                    output[b, h, i] += term / sum(terms) * value[b, h // group, j]
    return output


@pytest.mark.parametrize("queries", [1, 5, 17])
def test_equals_explicit_loops(queries):
    query, key, value = tensors(queries=queries)
    allowed = torch.tensor([[j <= i + 17 - queries for j in range(17)] for i in range(queries)])
    expected = by_loops(query, key, value, allowed, scale=8**-0.5)
    torch.testing.assert_close(
        dense_attention(query, key, value, causal=True), expected, atol=1e-12, rtol=0
    )


def test_loops_would_notice_a_wrong_scale():
    query, key, value = tensors(queries=5)
    allowed = torch.ones(5, 17, dtype=torch.bool)
    expected = by_loops(query, key, value, allowed, scale=8**-0.5)
    assert (dense_attention(query, key, value, scale=1.01 * 8**-0.5) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [1, 3, 6])
def test_equals_torch_forward_and_backward(causal, key_heads):
    query, key, value = tensors(key_heads=key_heads, queries=17)
    gradient = torch.randn_like(query)
    results = []
    for attend in (
        lambda: dense_attention(query, key, value, causal=causal),
        lambda: F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=True
        ),
    ):
        for x in (query, key, value):
            x.grad = None
            x.requires_grad_()
        output = attend()
        output.backward(gradient)
        results.append([output.detach(), *(x.grad for x in (query, key, value))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_mask_and_bias_match_torch():
    query, key, value = tensors(key_heads=6)
    mask = torch.rand(2, 1, 11, 17) < 0.6
    mask[..., 0] = True
    bias = torch.randn(1, 6, 11, 17, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(~mask, float("-inf")), scale=0.3
    )
    ours = dense_attention(query, key, value, mask=mask, bias=bias, scale=0.3)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_weights_reproduce_the_output_and_sum_to_one():
    query, key, value = tensors(key_heads=6)
    output, weights = dense_attention(query, key, value, causal=True, return_weights=True)
    torch.testing.assert_close(weights @ value, output)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 11, dtype=torch.float64))


def test_mask_and_causality_both_hold():
    query, key, value = tensors()
    mask = torch.rand(2, 6, 11, 17) < 0.6
    _, weights = dense_attention(query, key, value, mask=mask, causal=True, return_weights=True)
    assert torch.equal(weights > 0, mask & torch.ones(11, 17).tril(6).bool())


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    query, key, value = tensors()
    mask = torch.ones(2, 1, 11, 17, dtype=torch.bool)
    mask[0, :, 4] = False
    for x in (query, key, value):
        x.requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):  # no NaN inside the backward pass either
        output, weights = dense_attention(query, key, value, mask=mask, return_weights=True)
        output.sum().backward()
    assert (output[0, :, 4] == 0).all()
    assert (weights[0, :, 4] == 0).all()
    assert (query.grad[0, :, 4] == 0).all()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


def test_uneven_head_groups_are_refused():
    query, key, value = tensors(heads=5)
    with pytest.raises(ValueError, match="5 query heads cannot share 3 key heads"):
        dense_attention(query, key, value)


@pytest.mark.parametrize("queries", [1, 7, 17])
def test_fused_kernel_equals_the_reference(queries):
    query, key, value = tensors(queries=queries, dtype=torch.float32)
    torch.testing.assert_close(
        causal_sdpa(query, key, value, scale=0.3),
        dense_attention(query, key, value, scale=0.3, causal=True),
        atol=1e-6,
        rtol=0,
    )
