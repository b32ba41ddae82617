"""The dense mixer: its formula, its cache, its causality."""

import pytest
import torch
from torch import nn

from reattend.attention.dense import dense_attention
from reattend.attention.positions import alibi_bias, rotary
from reattend.trunks.language import FeedForward, Trunk, same_size
from reattend.trunks.mixers import SoftmaxAttention, TokenShift


def mixer(positions="rotary", qk_norm=False, width=12, heads=3):
    torch.manual_seed(0)
    return SoftmaxAttention(width, heads, positions, qk_norm).double()


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_it_is_dense_attention_of_its_projections(positions):
    module = mixer(positions)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = (t.reshape(2, 7, 3, 4).transpose(1, 2) for t in module.project(x).chunk(3, -1))
    bias = None
    if positions == "rotary":
        q, k = rotary(q), rotary(k)
    if positions == "alibi":
        bias = alibi_bias(3, 7, 7)[None].double()
    expected = dense_attention(q, k, v, bias=bias, causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.out(expected))


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_cache_continues_a_text(positions, qk_norm):
    module = mixer(positions, qk_norm)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    cache = {}
    parts = [module(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), module(x))


def test_it_is_causal():
    module = mixer()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(module(x)[:, :4], module(changed)[:, :4])
    assert not torch.allclose(module(x)[:, 4:], module(changed)[:, 4:])


def test_query_and_key_norm_bounds_the_scores():
    """With unit-variance queries and keys, |q k| / sqrt(dim) <= sqrt(dim)."""
    module = mixer(qk_norm=True)
    q = module.query_norm(100 * torch.randn(5, 4, dtype=torch.float64))
    torch.testing.assert_close(
        q.norm(dim=-1), torch.full((5,), 2.0, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_a_trunk_decodes_token_by_token():
    torch.manual_seed(1)
    layers = [lambda width: SoftmaxAttention(width, 2)] * 2
    model = Trunk(11, 8, layers, positions=9, feed_forward=FeedForward, tied=False).double()
    tokens = torch.randint(11, (2, 9))
    cache = model.start_cache()
    steps = [model(tokens[:, t : t + 1], cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens))
    assert cache.length == 9
    with pytest.raises(ValueError, match="10 tokens"):
        model(tokens[:, :1], cache)


def test_a_trunk_says_which_mixer_has_no_cache():
    class Forgetful(torch.nn.Linear):
        def forward(self, x):
            return x

    model = Trunk(5, 4, [lambda width: Forgetful(width, width)])
    with pytest.raises(ValueError, match="Forgetful has no cached form"):
        model.start_cache()


def test_an_untied_head_is_another_matrix():
    tied, untied = (Trunk(5, 4, [], tied=tied) for tied in (True, False))
    assert tied.head.weight is tied.tokens.weight
    assert untied.head.weight is not untied.tokens.weight


def test_same_size_names_the_odd_one():
    models = {"narrow": torch.nn.Linear(10, 9), "wide": torch.nn.Linear(10, 10)}
    with pytest.raises(ValueError, match="narrow has 99 parameters, wide 110"):
        same_size(models)
    assert same_size(models, tolerance=0.11) == 110


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="not a multiple"):
        SoftmaxAttention(10, 3)


def shifted(width=6):
    inner = nn.Identity()
    inner.state_size = lambda length: 10 * length
    return TokenShift(inner, width).double(), inner


def test_token_shift_mixes_with_the_token_before():
    module, _ = shifted()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    share = torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1]).double()
    before = torch.cat([torch.zeros(2, 1, 6).double(), x[:, :-1]], 1)
    torch.testing.assert_close(module(x), (1 - share) * x + share * before)
    assert module.state_size(7) == 76


def test_token_shift_has_its_mixers_loss_or_none():
    module, inner = shifted()
    assert not hasattr(module, "auxiliary_loss")
    inner.auxiliary_loss = torch.tensor(3.0)
    model = Trunk(5, 6, [lambda width: module])
    assert model.auxiliary_loss() == 3


GROUPS = [(6, 2, 3), (4, 4, 1), (4, 1, 4)]


def grouped(heads, key_heads, value_heads, **settings):
    torch.manual_seed(0)
    counts = {"key_heads": key_heads, "value_heads": value_heads}
    return SoftmaxAttention(24, heads, head_width=4, **counts, **settings).double()


@pytest.mark.parametrize(("heads", "key_heads", "value_heads"), GROUPS)
def test_query_heads_share_key_and_value_heads_in_blocks(heads, key_heads, value_heads):
    """Query head i reads key head floor(i * key_heads / heads), and likewise for values."""
    module = grouped(heads, key_heads, value_heads, value_width=3)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = module.project(x).split([4 * heads, 4 * key_heads, 3 * value_heads], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, n)).transpose(1, 2) for t, n in ((q, 4), (k, 4), (v, 3)))
    mixed = [
        dense_attention(
            rotary(q[:, i : i + 1]),
            rotary(k[:, i * key_heads // heads, None]),
            v[:, i * value_heads // heads, None],
            causal=True,
        )
        for i in range(heads)
    ]
    expected = torch.cat(mixed, dim=1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.out(expected))


@pytest.mark.parametrize(("heads", "key_heads", "value_heads"), GROUPS)
def test_the_cache_holds_shared_heads_once(heads, key_heads, value_heads):
    module, cache = grouped(heads, key_heads, value_heads), {}
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    parts = [module(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), module(x))
    assert sum(t.numel() for t in cache.values()) == module.state_size(9)


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_maps_mix_the_values(positions, causal):
    torch.manual_seed(0)
    module = SoftmaxAttention(16, 4, positions, key_heads=2, causal=causal).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    maps = module.weights(x)
    assert maps.triu(1).any() != causal
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    v = module.project(x)[..., -16:].unflatten(-1, (4, 4)).transpose(1, 2)
    torch.testing.assert_close(module(x), module.out((maps @ v).transpose(1, 2).flatten(2)))


def test_without_causality_a_linear_bias_falls_to_both_sides():
    module = SoftmaxAttention(4, 1, "alibi", causal=False).double()
    nn.init.zeros_(module.project.weight)
    middle = module.weights(torch.randn(1, 5, 4, dtype=torch.float64))[0, 0, 2]
    torch.testing.assert_close(middle, middle.flip(0))
    torch.testing.assert_close(middle[3] / middle[2], torch.tensor(2.0**-8).exp().pow(-1).double())


def test_the_rotary_base_changes_the_rates():
    torch.manual_seed(0)
    slow, fast = (SoftmaxAttention(8, 2, rotary_base=base) for base in (1e6, 10.0))
    fast.load_state_dict(slow.state_dict())
    x = torch.randn(1, 5, 8)
    assert not torch.allclose(slow(x), fast(x), atol=1e-4)


@pytest.mark.parametrize("counts", [{"key_heads": 4}, {"value_heads": 5}])
def test_shared_heads_must_divide_the_heads(counts):
    with pytest.raises(ValueError, match="do not divide 6 heads"):
        SoftmaxAttention(12, 6, **counts)


def test_a_fixed_token_shift_takes_half_the_channels_from_the_token_before():
    module = TokenShift(nn.Identity(), 5, learned=False)
    x = torch.randn(2, 4, 5)
    shifted = torch.cat([torch.zeros(2, 1, 3), x[:, :-1, 2:]], 1)
    torch.testing.assert_close(module(x), torch.cat([x[..., :2], shifted], -1))
    assert not list(module.parameters())


@pytest.mark.parametrize("learned", [True, False])
def test_a_shifted_trunk_decodes_token_by_token(learned):
    torch.manual_seed(1)
    layers = [lambda width: TokenShift(SoftmaxAttention(width, 2), width, learned)] * 2
    model = Trunk(11, 8, layers, norm="rms").double()
    tokens = torch.randint(11, (2, 9))
    cache = model.start_cache()
    parts = [model(tokens[:, a:b], cache) for a, b in ((0, 1), (1, 2), (2, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))


def test_a_wrapper_hands_on_what_its_mixer_asks_for():
    class Reader(nn.Module):
        reads_tokens = reads_embeddings = True

        def forward(self, x, tokens, embeddings):
            return tokens[..., None] + 10 * embeddings

    torch.manual_seed(0)
    model = Trunk(11, 4, [lambda width: TokenShift(TokenShift(Reader(), width), width)])
    model.blocks[0].mixer_norm = model.norm = nn.Identity()
    tokens = torch.randint(11, (2, 5))
    embedded = model.tokens(tokens)
    torch.testing.assert_close(model.hidden(tokens), 11 * embedded + tokens[..., None])
    with pytest.raises(ValueError, match="Reader has no cached form"):
        model.start_cache()
