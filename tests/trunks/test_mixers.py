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
