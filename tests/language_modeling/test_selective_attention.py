"""Oracles of selective attention: what its temperatures are, what they scale, and what they leave alone."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.attention.dense import dense_attention
from reattend.attention.positions import rotary
from reattend.language_modeling.selective_attention import (
    OfficialTemperature,
    SelectiveAttention,
    Temperature,
    official_position_temperature,
    position_temperature,
    spikiness,
    token_temperature,
)
from reattend.trunks.language import Trunk
from reattend.trunks.mixers import SoftmaxAttention

EXACT = {"rtol": 0, "atol": 1e-10}
ALL = ("query", "key", "value")


def text(length=13, width=12, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator).double()


def mixer(seed=0, width=12, heads=3, stirred=True, **options):
    """A mixer in float64 with random weights; `stirred` moves its temperatures from where they start."""
    torch.manual_seed(seed)
    made = SelectiveAttention(width, heads, **options).double()
    for name, parameter in made.named_parameters():
        if stirred and "temperatures" in name:
            nn.init.normal_(parameter, std=1.5)
    return made


def vanilla(model):
    """Softmax attention with the weights of a selective mixer."""
    plain = SoftmaxAttention(
        model.out.out_features,
        model.heads,
        model.position_kind,
        key_heads=model.key_heads,
        value_heads=model.value_heads,
    ).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


def by_hand(model, x, tau_q=1.0, tau_k=1.0, tau_v=1.0):
    """The paper's formula with dense attention, given the temperatures; no shared key heads."""
    q, k, v = (
        p.unflatten(-1, (model.heads, -1)).transpose(1, 2) for p in model.project(x).chunk(3, -1)
    )
    if model.position_kind == "rotary":
        q, k = rotary(q), rotary(k)
    mixed = dense_attention(tau_q * q, tau_k * k, tau_v * v, causal=True)
    return model.out(mixed.transpose(1, 2).flatten(2))


# --- temperatures --------------------------------------------------------------------------------


def test_a_temperature_is_what_the_paper_writes():
    torch.manual_seed(0)
    tau = Temperature(2, 5).double()
    nn.init.normal_(tau.direction)
    with torch.no_grad():
        tau.strength.fill_(0.7)
    features = torch.randn(3, 2, 4, 5).double()
    found = tau(features, torch.arange(1, 5))
    share = 1 / (1 + math.exp(-0.7))
    for head in range(2):
        for place in range(4):
            hidden = F.gelu(features[1, head, place])
            token = math.tanh((hidden * tau.direction[head, :, 0]).sum().item())
            expected = token + 1 + share * math.log(place + 1)
            assert found[1, head, place, 0].item() == pytest.approx(expected, abs=1e-6)


def test_temperatures_start_near_one_and_at_one_for_the_first_token():
    tau = Temperature(3, 4)(torch.randn(2, 3, 100, 4), torch.arange(1, 101))
    assert torch.equal(tau[:, :, 0], torch.ones(2, 3, 1))
    assert tau[0, 0, -1].item() == pytest.approx(1 + 0.0066929 * math.log(100), abs=1e-5)


@pytest.mark.parametrize("beta", [-1.0, 0.0, 1.5, 2.0])
def test_the_official_factor(beta):
    places = torch.tensor([1, 2, 50, 1000])
    found = official_position_temperature(places, torch.tensor(beta).double())[:, 0]
    expected = [1 + math.exp(-math.exp(beta)) * math.log(i) for i in (1, 2, 50, 1000)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_official_starts_at_the_published_factors():
    two, at = torch.tensor([3]), partial(torch.tensor, dtype=torch.float64)
    pythia = (official_position_temperature(two, at(2.0)) - 1) / math.log(3)
    gpt2 = (official_position_temperature(two, at(1.5)) - 1) / math.log(3)
    assert pythia.item() == pytest.approx(6.2e-4, rel=0.01)
    assert gpt2.item() == pytest.approx(0.0113, rel=0.01)


def test_token_parts_stay_below_one_in_size():
    torch.manual_seed(0)
    found = token_temperature(100 * torch.randn(50, 20), torch.randn(20, 1))
    assert found.abs().max() <= 1
    assert found.min() < -0.9 < 0.9 < found.max()


def test_position_parts_grow_with_the_natural_logarithm():
    found = position_temperature(torch.tensor([1, 3, 9, 27]), torch.tensor(0.0))[:, 0]
    torch.testing.assert_close(found, 1 + 0.5 * math.log(3) * torch.arange(4.0))


# --- the mixer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_temperatures_it_is_softmax_attention_forward_and_backward(positions, seed):
    model = mixer(seed, positions=positions, on=ALL, stirred=False)
    for tau in model.temperatures.values():
        nn.init.constant_(tau.strength, -100.0)
    x = text(seed=seed).requires_grad_()
    plain = vanilla(model)
    weight = text(seed=seed + 1)
    mine = torch.autograd.grad((model(x) * weight).sum(), [x, model.project.weight])
    theirs = torch.autograd.grad((plain(x) * weight).sum(), [x, plain.project.weight])
    torch.testing.assert_close(model(x), plain(x), **EXACT)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("on", [("query",), ("key",), ("value",), ("query", "value"), ALL])
@pytest.mark.parametrize("options", [{}, {"hidden": 7}, {"position": False}, {"token": False}])
def test_it_is_the_formula_of_the_paper(on, options):
    model, x = mixer(3, on=on, **options), text(seed=4)
    tau = model.scales(x)
    assert set(tau) == set(on)
    given = {f"tau_{part[0]}": scale for part, scale in tau.items()}
    torch.testing.assert_close(model(x), by_hand(model, x, **given), **EXACT)
    assert (model(x) - by_hand(model, x)).abs().max() > 1e-3


def test_the_shared_form_reads_its_own_projection_before_the_rotary_turn():
    model, x = mixer(5, on=ALL), text(seed=6)
    parts = model.project(x).chunk(3, -1)
    for name, projected in zip(ALL, parts, strict=True):
        tau = model.temperatures[name]
        features = projected.unflatten(-1, (3, -1)).transpose(1, 2)
        token = torch.tanh((F.gelu(features) * tau.direction[:, None, :, 0]).sum(-1))
        position = tau.strength.sigmoid() * torch.arange(1, 14).log()
        torch.testing.assert_close(
            model.scales(x)[name][..., 0], token + 1 + position, rtol=0, atol=1e-6
        )


def test_a_constant_query_temperature_is_a_scale():
    model, x = mixer(7, on=("query",), position=False), text()
    model.temperatures["query"].forward = lambda features, places: torch.tensor(
        1.7, dtype=torch.float64
    )
    q, k, v = SoftmaxAttention._heads(model, x)
    scaled = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.7 / 2)
    torch.testing.assert_close(model(x), model.out(scaled.transpose(1, 2).flatten(2)), **EXACT)


def test_a_value_temperature_scales_rows_that_are_read_not_rows_that_read():
    model, x = mixer(8, on=("value",), position=False), text()
    kept = (torch.arange(13) % 3 > 0).double()[:, None]
    model.temperatures["value"].forward = lambda features, places: kept
    q, k, v = SoftmaxAttention._heads(model, x)
    _, weights = dense_attention(q, k, v, causal=True, return_weights=True)
    expected = model.out((weights @ (v * kept)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(model(x), expected, **EXACT)
    # Not renormalised, and a token of temperature zero still reads.
    assert model(x)[:, 3].abs().max() > 1e-3


@pytest.mark.parametrize("place", [0, 5, 12])
def test_a_query_temperature_changes_its_own_row_alone(place):
    model, x = mixer(9, on=("query",), position=False), text()
    before = model(x)
    tau = torch.ones(13, 1).double()
    tau[place] = 3.0
    model.temperatures["query"].forward = lambda features, places: tau
    plain, changed = vanilla(model)(x), model(x)
    moved = (changed - plain).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [
        i == place and place > 0 for i in range(13)
    ]  # the first reads itself alone
    assert not torch.equal(before, changed)


def test_the_shared_form_adds_its_width_and_one_for_each_use():
    plain = sum(p.numel() for p in SoftmaxAttention(64, 4).parameters())
    count = sum(p.numel() for p in SelectiveAttention(64, 4).parameters())
    assert count - plain == 2 * (64 + 1)
    assert (count - plain) / (12 * 64**2) < 0.005
    own = sum(p.numel() for p in SelectiveAttention(64, 4, hidden=64).parameters())
    assert (own - plain) / (12 * 64**2) > 0.1
    official = sum(
        p.numel() for p in SelectiveAttention(64, 4, pos_only_official=True).parameters()
    )
    assert official - plain == 1


@pytest.mark.parametrize("beta", [-0.5, 2.0])
def test_the_official_option_scales_queries_by_position_and_trains_beta(beta):
    model, x = mixer(10, pos_only_official=True), text()
    assert isinstance(model.temperatures["query"], OfficialTemperature)
    nn.init.constant_(model.temperatures["query"].beta, beta)
    factor = 1 + math.exp(-math.exp(beta)) * torch.arange(1, 14).double().log()[:, None]
    torch.testing.assert_close(model(x), by_hand(model, x, tau_q=factor), **EXACT)
    model(x).square().sum().backward()
    assert model.temperatures["query"].beta.grad.abs() > 0


def test_every_part_of_every_temperature_gets_a_gradient():
    model = mixer(11, on=ALL, stirred=False)
    model(text()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", [{}, {"hidden": 6}, {"pos_only_official": True}, {"on": ALL}])
@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_decoding_continues_the_text(options, positions):
    model = Trunk(
        20, 12, [lambda width: mixer(12, width, positions=positions, **options)] * 2
    ).double()
    tokens = torch.randint(20, (2, 17), generator=torch.Generator().manual_seed(0))
    whole, cache = model(tokens), model.start_cache()
    parts = torch.cat([model(part, cache) for part in tokens.split([5, 1, 1, 7, 3], dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, **EXACT)


def test_fewer_key_and_value_heads_have_temperatures_of_their_own():
    options = {"key_heads": 2, "value_heads": 1}
    model, x = mixer(13, width=16, heads=4, on=ALL, **options), text(width=16)
    tau = model.scales(x)
    assert [tau[part].shape[1] for part in ALL] == [4, 2, 1]
    q, k, v = SoftmaxAttention._heads(vanilla(model), x)
    k_tau, v_tau = tau["key"].repeat_interleave(2, 1), tau["value"].expand(-1, 4, -1, -1)
    mixed = dense_attention(tau["query"] * q, k_tau * k, v_tau * v, causal=True)
    torch.testing.assert_close(model(x), model.out(mixed.transpose(1, 2).flatten(2)), **EXACT)


def test_later_tokens_change_nothing_before_them():
    model, x = mixer(14, on=ALL), text()
    other = torch.cat([x[:, :6], x[:, 6:].flip(1)], dim=1)
    torch.testing.assert_close(model(other)[:, :6], model(x)[:, :6], **EXACT)


def test_maps_show_the_sharpened_rows():
    model, x = mixer(15), text()
    maps, plain = model.weights(x), vanilla(model).weights(x)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]), **EXACT)
    assert (maps - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": ("output",)}, "on must name some of query, key, value; got .'output',."),
        ({"on": ()}, "on must name some of"),
        ({"causal": False}, "must be causal"),
        ({"token": False, "position": False}, "needs a token part or a position part"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelectiveAttention(12, 3, **options)


# --- spikiness -----------------------------------------------------------------------------------


def test_spikiness_is_the_share_of_tokens_that_a_row_reads():
    even, one = torch.full((4, 8), 1 / 8), torch.eye(8)[:4]
    torch.testing.assert_close(spikiness(even), torch.ones(4))
    torch.testing.assert_close(spikiness(one), torch.full((4,), 1 / 8))
    half = torch.tensor([[0.5, 0.5, 0, 0, 0, 0, 0, 0]])
    assert spikiness(half).item() == pytest.approx(0.25)


def test_spikiness_counts_visible_tokens_alone():
    causal = torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(spikiness(causal, torch.arange(1, 6)), torch.ones(5))
