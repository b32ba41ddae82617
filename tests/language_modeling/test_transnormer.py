"""Oracles of TransNormerLLM: three forms of one operator, its decays and positions, its mixers."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.language_modeling.transnormer import (
    GatedLinearAttention,
    NormalisedLinearAttention,
    decay_mask,
    decay_slopes,
    left_product,
    lightning,
    lrpe,
    lrpe_rates,
    printed_decay_slopes,
    recurrent,
    split_recurrent,
)
from reattend.trunks.language import GatedFeedForward, Trunk

EXACT = {"rtol": 0, "atol": 1e-10}


def tensors(length, heads=3, dim=5, value_dim=4, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = (dim, dim, value_dim)
    q, k, v = (torch.randn(batch, heads, length, w, generator=generator) for w in widths)
    slopes = torch.tensor([0.7, 0.05, 1e-6])[:heads]
    return [x.double() for x in (q, k, v, slopes)]


def chunks(q, k, v, slopes, block):
    return lightning(q, k, v, slopes, block=block)[0]


def with_gradients(form, inputs, seed=1):
    q, k, v, slopes = inputs
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = form(*inputs, slopes)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


# --- the operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_left_product_is_the_sum_that_the_paper_writes(seed):
    q, k, v, slopes = tensors(7, seed=seed)
    out = torch.zeros_like(v)
    for t in range(7):
        for s in range(t + 1):
            weight = (q[:, :, t] * k[:, :, s]).sum(-1) * torch.exp(-slopes * (t - s))
            out[:, :, t] += weight[..., None] * v[:, :, s]
    torch.testing.assert_close(left_product(q, k, v, slopes), out, **EXACT)


@pytest.mark.parametrize("length", [1, 31, 64, 77])
@pytest.mark.parametrize("block", [1, 7, 16, 64, 100])
def test_chunks_are_the_left_product_forward_and_backward(length, block):
    inputs = tensors(length, seed=length)
    expected = with_gradients(left_product, inputs)
    found = with_gradients(partial(chunks, block=block), inputs)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, **EXACT)


@pytest.mark.parametrize("length", [1, 13, 64])
def test_the_recurrence_is_the_left_product_forward_and_backward(length):
    inputs = tensors(length, seed=length)
    expected = with_gradients(left_product, inputs)
    for form in (recurrent, split_recurrent):  # slopes and length are small: nothing overflows
        for mine, reference in zip(with_gradients(form, inputs), expected, strict=True):
            torch.testing.assert_close(mine, reference, **EXACT)


@pytest.mark.parametrize("cuts", [(1, 20, 37), (16, 37), (5, 6, 7, 37)])
def test_a_text_may_be_read_in_parts(cuts):
    q, k, v, slopes = tensors(37)
    whole, last = lightning(q, k, v, slopes, block=8)
    parts, state, start = [], None, 0
    for end in cuts:
        part = (x[:, :, start:end] for x in (q, k, v))
        out, state = lightning(*part, slopes, block=8, state=state)
        parts.append(out)
        start = end
    torch.testing.assert_close(torch.cat(parts, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)
    decay = torch.exp(-slopes[:, None] * torch.arange(36, -1, -1))[None, :, :, None]
    torch.testing.assert_close(last, (k * decay).mT @ v, **EXACT)


def test_without_decay_it_is_a_cumulative_sum():
    q, k, v, slopes = tensors(21)
    state = (k[..., :, None] * v[..., None, :]).cumsum(2)
    expected = (q[..., None, :] @ state)[..., 0, :]
    torch.testing.assert_close(chunks(q, k, v, 0 * slopes, block=6), expected, **EXACT)


def test_with_the_fastest_decay_a_token_reads_itself_alone():
    q, k, v, slopes = tensors(21)
    expected = (q * k).sum(-1, keepdim=True) * v
    found = chunks(q, k, v, torch.full_like(slopes, 50.0), block=6)
    torch.testing.assert_close(found, expected, **EXACT)


def test_split_decays_overflow_where_the_robust_form_does_not():
    q, k, v, slopes = (x.float() for x in tensors(400))
    split = split_recurrent(q, k, v, slopes)
    assert split[:, 0].isfinite().logical_not().any()  # e^(.7 t) passes 3e38 at t = 127
    exact = left_product(*(x.double() for x in (q, k, v, slopes))).float()
    for form in (recurrent, partial(chunks, block=32), left_product):
        torch.testing.assert_close(form(q, k, v, slopes), exact, rtol=1e-4, atol=1e-4)


def test_it_is_the_operator_of_minimax():
    """transformers' own lightning attention: same slopes, same factor by layer, same pairing of decays."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=32,
        num_attention_heads=8,
        head_dim=4,
        num_hidden_layers=4,
        block_size=8,
        layer_types=["linear_attention"] * 4,
    )
    for layer in range(3):
        theirs = MiniMaxLightningAttention(config, layer)
        slopes = decay_slopes(8, 4)[layer]
        found = theirs.slope_rate.flatten()
        torch.testing.assert_close(found, slopes, rtol=2e-5, atol=0)
        fall = torch.exp(-slopes[:, None] * torch.arange(1, 9))
        torch.testing.assert_close(theirs.query_decay[..., 0], fall, rtol=2e-5, atol=0)


# --- decays and positions ------------------------------------------------------------------------


def test_slopes_are_alibis_falling_over_the_layers():
    slopes = decay_slopes(8, 5)
    torch.testing.assert_close(slopes[0], 2.0 ** -torch.arange(1.0, 9) * (1 + 1e-5))
    torch.testing.assert_close(slopes[2], 2.0 ** -torch.arange(1.0, 9) * (0.5 + 1e-5))
    torch.testing.assert_close(slopes[4], 2.0 ** -torch.arange(1.0, 9) * 1e-5, rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="got 1 layers"):
        decay_slopes(8, 1)


def test_the_printed_slopes_are_much_steeper():
    slopes = printed_decay_slopes(4, 2)
    torch.testing.assert_close(slopes, torch.tensor([[2.0, 4, 6, 8], [1, 2, 3, 4]]))


def test_the_mask_is_a_power_of_the_distance():
    mask = decay_mask(torch.tensor([0.5, 0.0]).double(), 4)
    assert mask[0, 3].tolist() == pytest.approx(
        [2.718281828459045 ** (-0.5 * d) for d in (3, 2, 1, 0)]
    )
    assert torch.equal(mask[1], torch.ones(4, 4).double().tril())


@pytest.mark.parametrize("shift", [0, 11])
def test_relative_positions_weight_channels_by_the_cosine_of_the_distance(shift):
    q, k, _, _ = tensors(9)
    rates = torch.rand(3, 1, 5, generator=torch.Generator().manual_seed(3)).double()
    found = lrpe(q, rates, shift) @ lrpe(k, rates, shift).mT
    distance = torch.arange(9)[:, None] - torch.arange(9)
    cosines = torch.cos(rates[:, :, None] * distance[..., None])  # [heads, t, s, channel]
    expected = torch.einsum("bhtd,bhsd,htsd->bhts", q, k, cosines)
    torch.testing.assert_close(found, expected, **EXACT)


def test_rates_fall_over_heads_and_channels():
    rates = lrpe_rates(2, 3)
    assert rates.shape == (2, 1, 3)
    expected = [10_000 ** (-2 * j / 6) for j in range(6)]
    assert rates.flatten().tolist() == pytest.approx(expected, rel=1e-5)


# --- mixers --------------------------------------------------------------------------------------

WIDTH, HEADS = 12, 3
MIXERS = {
    "mix": lambda w: GatedLinearAttention(w, HEADS, decay_slopes(HEADS, 2)[0], relative=True, block=5),
    "decay": lambda w: GatedLinearAttention(w, HEADS, decay_slopes(HEADS, 2)[0], block=5),
    "no gate": lambda w: GatedLinearAttention(w, HEADS, torch.zeros(HEADS), gate=False, block=5),
    "placebo": lambda w: GatedLinearAttention(
        w, HEADS, decay_slopes(HEADS, 2)[0], content=False, block=5
    ),
    "1 + elu": lambda w: NormalisedLinearAttention(w, HEADS, block=5),
}  # fmt: skip


def mixer(name, seed=0):
    torch.manual_seed(seed)
    return MIXERS[name](WIDTH).double()


def states(length=17, seed=5):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def test_gated_linear_attention_is_the_papers_formula():
    layer, x = mixer("mix"), states()
    wq, wk = layer.compare.weight.chunk(2)
    wv, wu = layer.read.weight.chunk(2)
    heads = lambda y: y.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
    q, k = (lrpe(heads(F.silu(x @ w.T)), layer.rates) for w in (wq, wk))
    mixed = left_product(q, k, heads(x @ wv.T), layer.slopes.double())
    mixed = mixed.transpose(1, 2).flatten(2)
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (mixed * (x @ wu.T)) @ layer.out.weight.T
    torch.testing.assert_close(layer(x), expected, **EXACT)
    weights = layer.weights(x)
    torch.testing.assert_close(
        weights @ heads(x @ wv.T), left_product(q, k, heads(x @ wv.T), layer.slopes.double())
    )


def test_the_norm_replaces_the_denominator():
    """Ten times the keys change nothing after the norm, and its output has mean square one."""
    layer, x = mixer("no gate"), states()
    layer.out = nn.Identity()
    plain = layer(x)
    torch.testing.assert_close(
        plain.square().mean(-1), torch.ones(2, 17).double(), rtol=0, atol=1e-3
    )
    with torch.no_grad():
        layer.read.weight *= 10
    torch.testing.assert_close(layer(x), plain, rtol=1e-3, atol=1e-3)


def test_the_placebo_does_not_compare_tokens():
    layer, x = mixer("placebo"), states()
    wv, wu = layer.read.weight.chunk(2)
    v = (x @ wv.T).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    mixed = (decay_mask(layer.slopes.double(), 17) @ v).transpose(1, 2).flatten(2)
    mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layer(x), (mixed * (x @ wu.T)) @ layer.out.weight.T, **EXACT)


def test_the_baseline_is_a_weighted_mean():
    layer, x = mixer("1 + elu"), states()
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in layer.project(x).chunk(3, -1))
    weights = ((1 + F.elu(q)) @ (1 + F.elu(k)).mT).tril()
    mixed = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).flatten(2)), **EXACT)


@pytest.mark.parametrize("name", MIXERS)
def test_the_future_does_not_matter(name):
    layer, x = mixer(name), states()
    changed = x.clone()
    changed[:, 9:] += 1
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=0, rtol=0)
    assert (before[:, 9] - after[:, 9]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("cuts", [(1,) * 17, (6, 1, 10)])
def test_decoding_through_the_trunk_gives_the_parallel_form(name, cuts):
    torch.manual_seed(1)
    model = Trunk(
        13,
        WIDTH,
        [MIXERS[name], MIXERS[name]],
        norm="simple_rms",
        feed_forward=lambda w: GatedFeedForward(w, 7, nn.Identity()),
        embedding_std=0.5,
    )
    tokens = torch.randint(13, (2, 17), generator=torch.Generator().manual_seed(2))
    cache = model.start_cache()
    parts = torch.cat([model(part, cache) for part in tokens.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(parts, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_the_state_is_what_the_cache_holds(name):
    cache = {}
    layer = mixer(name)
    layer(states(), cache)
    assert layer.state_size(17) == layer.state_size(10**6) == cache["state"][0].numel()


@pytest.mark.parametrize(
    "make", [NormalisedLinearAttention, partial(GatedLinearAttention, slopes=torch.ones(5))]
)
def test_heads_must_divide_the_width(make):
    with pytest.raises(ValueError, match="12 is not a multiple of 5 heads"):
        make(12, 5)


def test_each_head_has_its_slope():
    with pytest.raises(ValueError, match="2 slopes for 3 heads"):
        GatedLinearAttention(12, 3, torch.ones(2))
