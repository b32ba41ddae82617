"""Oracles of Deconstructing Attention: each variant's map, its recurrence, its stream, the placements."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from reattend.attention.positions import rotary
from reattend.language_modeling.deconstructing_attention import (
    Approximate,
    NonApproximate,
    StaticEmbQK,
    StreamQK,
    StreamTrunk,
    TokenMLP,
    own_scores,
    placement,
    score_maps,
    score_recurrent,
    softmax_maps,
    taylor_features,
    taylor_maps,
    taylor_recurrent,
)
from reattend.trunks.language import GatedFeedForward, Trunk, parameter_count
from reattend.trunks.mixers import SoftmaxAttention

EXACT = {"rtol": 0, "atol": 1e-10}
WIDTH, HEADS = 12, 3


def tensors(length=7, dim=4, batch=2, heads=HEADS, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, dim, generator=generator).double()
    return scale * q, scale * k, v


def states(rows=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, WIDTH, generator=generator).double()


def made(kind, *options, seed=0, **more):
    torch.manual_seed(seed)
    return kind(WIDTH, *options, **more).double()


def trunk(mixers, seed=0, kind=Trunk, **more):
    torch.manual_seed(seed)
    feed_forward = partial(GatedFeedForward, hidden=20)
    model = kind(
        11, WIDTH, mixers, feed_forward=feed_forward, norm="rms", embedding_std=0.4, **more
    )
    return model.double().eval()


def simple(kind, heads=HEADS, **more):
    return lambda width: kind(width, heads, **more)


STREAM = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(5)).double()
TEXT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
TRUNKS = {
    "MLP": lambda: trunk([TokenMLP] * 3),
    "Approximate": lambda: trunk([simple(Approximate)] * 3),
    "Non-approximate": lambda: trunk([simple(NonApproximate)] * 3),
    "StaticEmbQK": lambda: trunk([simple(StaticEmbQK)] * 3),
    "RndEmbQK": lambda: trunk([simple(StreamQK)] * 3, kind=StreamTrunk, stream=STREAM),
    "FixedSeqQK": lambda: trunk([simple(StreamQK)] * 3, kind=StreamTrunk, stream=TEXT),
    "hybrid": lambda: trunk(
        [simple(StreamQK), simple(SoftmaxAttention), simple(StreamQK)],
        kind=StreamTrunk,
        stream=STREAM,
    ),
}


# --- sizes, causality and caches of all variants -------------------------------------------------


@pytest.mark.parametrize(
    "mixer",
    [
        partial(SoftmaxAttention, heads=HEADS),
        partial(Approximate, heads=HEADS),
        partial(NonApproximate, heads=HEADS),
        partial(StaticEmbQK, heads=HEADS),
        partial(StreamQK, heads=HEADS),
        TokenMLP,
    ],
)
def test_every_mixer_has_four_matrices_of_width_times_width(mixer):
    assert parameter_count(made(mixer)) == 4 * WIDTH**2


def test_a_width_that_has_no_equal_mlp_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        TokenMLP(64)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple of 5 heads"):
        NonApproximate(12, 5)


@pytest.mark.parametrize("name", TRUNKS)
def test_later_tokens_change_nothing_before_them(name):
    model, tokens = TRUNKS[name](), torch.randint(11, (2, 9), generator=torch.manual_seed(1))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 3) % 11
    here, there = model(tokens), model(changed)
    torch.testing.assert_close(here[:, :5], there[:, :5], **EXACT)
    assert (here[:, 5] - there[:, 5]).abs().max() > 0.01
    assert name == "MLP" or (here[:, 6:] - there[:, 6:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("name", TRUNKS)
def test_a_cache_continues_a_text(name):
    model, tokens = TRUNKS[name](), torch.randint(11, (2, 9), generator=torch.manual_seed(2))
    cache = model.start_cache()
    parts = [model(tokens[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), **EXACT)


@pytest.mark.parametrize("name", ["Approximate", "Non-approximate", "StaticEmbQK"])
def test_the_state_size_is_what_the_cache_holds(name):
    model = TRUNKS[name]()
    cache = model.start_cache()
    model(TEXT[None, :7], cache)
    held = sum(t.numel() for layer in cache.layers for t in layer.values() if torch.is_tensor(t))
    assert held == model.state_size(7)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_stream_is_cached_once_a_batch(batch):
    model = TRUNKS["RndEmbQK"]()
    cache = model.start_cache()
    model(TEXT[:7].expand(batch, -1), cache)
    held = sum(t.numel() for layer in cache.layers for t in layer.values())
    of_a_text = 3 * 7 * WIDTH  # layers, tokens, channels: values
    assert held == (batch + 2) * of_a_text
    assert model.state_size(7) == 3 * of_a_text


# --- MLP -----------------------------------------------------------------------------------------


def test_an_mlp_does_not_see_other_tokens():
    model = TRUNKS["MLP"]()
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randint(11, (2, 1, 9), generator=generator)
    second[:, 4] = first[:, 4]
    torch.testing.assert_close(model(first)[:, 4], model(second)[:, 4], **EXACT)


# --- Approximate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_taylor_weights_are_those_of_the_equation(seed):
    q, k, _ = tensors(seed=seed)
    maps = taylor_maps(q, k)
    for i in range(7):
        u = (q[:, :, i, None] * k[:, :, : i + 1]).sum(-1) / 2  # the root of 4
        weight = 1 + u + u**2 / 2
        torch.testing.assert_close(
            maps[:, :, i, : i + 1], weight / weight.sum(-1, keepdim=True), **EXACT
        )
        assert not maps[:, :, i, i + 1 :].any()


def test_features_give_the_polynomial():
    q, k, _ = tensors(dim=5)
    u = (q * k).sum(-1) / 5**0.5
    found = (taylor_features(q) * taylor_features(k)).sum(-1)
    torch.testing.assert_close(found, 1 + u + u**2 / 2, **EXACT)
    assert taylor_features(q).shape[-1] == 1 + 5 + 25


def test_the_taylor_recurrence_is_the_map():
    q, k, v = tensors(length=13)
    torch.testing.assert_close(taylor_recurrent(q, k, v)[0], taylor_maps(q, k) @ v, **EXACT)


def test_small_scores_make_it_standard_attention():
    q, k, _ = tensors(scale=0.03)
    difference = (taylor_maps(q, k) - softmax_maps(q, k)).abs().max()
    u = (q @ k.mT / 2).abs().max()
    assert 0 < difference < u**3  # the first order left out is the third, over 6 and twice
    assert (softmax_maps(q, k) - softmax_maps(0 * q, k)).abs().max() > 100 * difference


def test_split_orders_are_three_maps():
    q, k, _ = tensors()
    split, u = taylor_maps(q, k, split=True), (q @ k.mT / 2).tril()
    square = u.square()
    first = torch.ones(7, 7).double().tril() / torch.arange(1, 8)[:, None]
    expected = first + u / u.sum(-1, keepdim=True) + square / square.sum(-1, keepdim=True)
    torch.testing.assert_close(split, expected, **EXACT)
    torch.testing.assert_close(
        split.sum(-1), torch.full_like(split[..., 0], 3.0), rtol=0, atol=1e-8
    )


def test_the_split_form_refuses_a_cache():
    with pytest.raises(ValueError, match="no cache"):
        made(Approximate, HEADS, split=True)(states(), cache={})


# --- Non-approximate -----------------------------------------------------------------------------


def test_scores_are_those_of_one_token():
    q, k, _ = tensors(dim=5)
    expected = torch.einsum("bhld,bhld->bhl", q * torch.sigmoid(q), k) / 5**0.5
    torch.testing.assert_close(own_scores(q, k), expected, **EXACT)


def test_a_rotation_changes_no_plain_product_of_one_token():
    q, k, _ = tensors()
    torch.testing.assert_close((rotary(q) * rotary(k)).sum(-1), (q * k).sum(-1), **EXACT)


@pytest.mark.parametrize("seed", [0, 1])
def test_score_maps_are_softmaxes_of_the_scores_so_far(seed):
    scores = own_scores(*tensors(seed=seed)[:2])
    maps = score_maps(scores)
    for i in range(7):
        torch.testing.assert_close(
            maps[:, :, i, : i + 1], scores[..., : i + 1].softmax(-1), **EXACT
        )
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(scores), **EXACT)
    ratio = maps[:, :, 4:, 1] / maps[:, :, 4:, 3]  # of two tokens: the same for all that read them
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), **EXACT)


@pytest.mark.parametrize("largest", [1, 1000])
def test_the_score_recurrence_is_the_map_and_does_not_overflow(largest):
    q, k, v = tensors(length=13, scale=largest**0.5)
    scores = own_scores(q, k)
    assert scores.abs().max() > largest
    torch.testing.assert_close(score_recurrent(scores, v)[0], score_maps(scores) @ v, **EXACT)


# --- StaticEmbQK ---------------------------------------------------------------------------------


def test_static_maps_read_the_embeddings_alone():
    mixer, e = made(StaticEmbQK, HEADS), states(seed=1)
    here, there = (mixer.weights(states(seed=s), embeddings=e) for s in (2, 3))
    torch.testing.assert_close(here, there, **EXACT)
    assert (here - mixer.weights(states(seed=2), embeddings=states(seed=4))).abs().max() > 0.01


def test_static_with_its_own_states_is_standard_attention():
    standard, static = made(SoftmaxAttention, HEADS), made(StaticEmbQK, HEADS, normalise=False)
    static.load_state_dict(standard.state_dict())
    x = states()
    torch.testing.assert_close(static(x, embeddings=x), standard(x), **EXACT)
    torch.testing.assert_close(static.weights(x, embeddings=x), standard.weights(x), **EXACT)


def test_normalised_embeddings_have_one_size():
    mixer, e = made(StaticEmbQK, HEADS), states(seed=1)
    here, there = (mixer.weights(e, embeddings=s * e) for s in (1.0, 50.0))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    raw = made(StaticEmbQK, HEADS, normalise=False)
    e = F.normalize(e, dim=-1) * WIDTH**0.5
    torch.testing.assert_close(
        mixer.weights(e, embeddings=e), raw.weights(e, embeddings=e), rtol=0, atol=1e-5
    )


def test_static_maps_of_later_layers_do_not_see_earlier_values():
    model, seen = TRUNKS["StaticEmbQK"](), []
    last = model.blocks[2].mixer
    last.register_forward_pre_hook(
        lambda m, args, more: seen.append(m.weights(*args, **more)), with_kwargs=True
    )
    model(TEXT[None])
    with torch.no_grad():
        model.blocks[0].mixer.project.weight[2 * WIDTH :] *= -3
    model(TEXT[None])
    torch.testing.assert_close(*seen, **EXACT)


# --- RndEmbQK and FixedSeqQK ---------------------------------------------------------------------


def maps_of(model, tokens):
    """The maps by which each StreamQK layer mixes."""
    found, hooks = [], []
    for block in model.blocks:
        if isinstance(block.mixer, StreamQK):
            hooks.append(
                block.mixer.register_forward_pre_hook(
                    lambda m, args: found.append(m.weights(*args))
                )
            )
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["RndEmbQK", "FixedSeqQK", "hybrid"])
def test_maps_of_a_stream_are_the_same_for_every_text(name):
    model, generator = TRUNKS[name](), torch.Generator().manual_seed(4)
    first, second = torch.randint(11, (2, 3, 9), generator=generator)
    here, there = maps_of(model, first), maps_of(model, second)
    assert len(here) == (2 if name == "hybrid" else 3)
    for mine, other in zip(here, there, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    # A shorter text uses the first rows of the maps.
    for mine, other in zip(maps_of(model, first[:, :5]), here, strict=True):
        torch.testing.assert_close(mine, other[..., :5, :5], **EXACT)


def test_a_fixed_text_read_as_a_text_is_read_by_standard_attention():
    standard, fixed = trunk([simple(SoftmaxAttention)] * 3), TRUNKS["FixedSeqQK"]()
    fixed.load_state_dict(standard.state_dict() | {"stream": TEXT})
    torch.testing.assert_close(fixed(TEXT[None]), standard(TEXT[None]), **EXACT)
    other = TEXT.flip(0)[None]
    assert (fixed(other) - standard(other)).abs().max() > 0.01


def test_the_stream_runs_through_the_layers_by_hand():
    """Layer by layer, the stream beside one text: its own values, its own feed-forward parts."""
    model = TRUNKS["RndEmbQK"]()
    stream, x = STREAM[None], model.tokens(TEXT[None])
    for block in model.blocks:
        mixer = block.mixer
        norm = block.mixer_norm
        q, k, own = mixer.project(norm(stream)).chunk(3, -1)
        value = mixer.project(norm(x)).chunk(3, -1)[2]
        q, k, own, value = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, own, value)
        )
        maps = F.scaled_dot_product_attention(
            rotary(q), rotary(k), torch.eye(9).double().expand(1, HEADS, 9, 9), is_causal=True
        )
        stream = stream + mixer.out((maps @ own).transpose(1, 2).flatten(2))
        x = x + mixer.out((maps @ value).transpose(1, 2).flatten(2))
        stream = stream + block.feed_forward(block.feed_forward_norm(stream))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    expected = model.logits(model.norm(x))
    torch.testing.assert_close(model(TEXT[None]), expected, **EXACT)


@pytest.mark.parametrize("name", ["RndEmbQK", "hybrid"])
def test_gradients_flow_through_the_stream(name):
    """The last map reads the stream alone: what earlier layers make of the stream is trained by it."""
    model = TRUNKS[name]()
    maps_of(model, TEXT[None])[-1].square().sum().backward()
    for block in model.blocks[:2]:
        values = block.mixer.project.weight.grad[2 * WIDTH :]
        assert values.abs().sum() > 0
        assert block.feed_forward.down.weight.grad.abs().sum() > 0
    assert "stream" not in dict(model.named_parameters())


def test_a_text_longer_than_the_stream_is_refused():
    with pytest.raises(ValueError, match="longer one"):
        TRUNKS["RndEmbQK"]()(torch.zeros(1, 10, dtype=torch.long))


# --- placements ----------------------------------------------------------------------------------


def numbered(name, layers=24):
    return [layer for layer, simplified in enumerate(placement(name, layers), 1) if simplified]


def test_placements_of_24_layers_are_the_papers():
    assert numbered("uniform") == list(range(1, 25))
    assert numbered("hybrid") == list(range(1, 25, 2))
    assert numbered("shifted") == list(range(2, 25, 2))
    assert numbered("bottom") == list(range(1, 13))
    assert numbered("middle") == list(range(7, 19))
    assert numbered("top") == list(range(13, 25))
    assert [n for n in range(1, 25) if n not in numbered("quarter")] == [4, 8, 12, 16, 20, 24]
    assert numbered("all but first") == list(range(2, 25))
    assert numbered("all but last") == list(range(1, 24))
    assert numbered("all but both ends") == list(range(2, 24))


def test_an_unknown_placement_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown placement 'even'; there are: uniform"):
        placement("even", 4)
