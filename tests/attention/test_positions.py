"""Rotary embedding against complex numbers and transformers; linear biases against their definition."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reattend.attention.positions import alibi_bias, alibi_slopes, rotary


@pytest.mark.parametrize("dim", [2, 8, 34])
def test_rotary_is_a_rotation_of_complex_pairs(dim):
    x = torch.randn(3, 5, dim, dtype=torch.float64)
    pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :])
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    turned = pairs * torch.exp(1j * torch.arange(7, 12)[:, None] * rates)
    torch.testing.assert_close(rotary(x, offset=7), torch.cat([turned.real, turned.imag], -1))


def test_rotary_is_that_of_llama():
    q, k = torch.randn(2, 3, 6, 16), torch.randn(2, 3, 6, 16)
    angles = torch.arange(6)[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    angles = torch.cat([angles, angles], -1)[None]
    expected = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    torch.testing.assert_close((rotary(q), rotary(k)), expected)


def test_rotated_scores_depend_on_distance_only():
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
    scores = [rotary(q, 3 + shift) @ rotary(k, shift).T for shift in (0, 1, 50)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_rotary_refuses_an_odd_width():
    with pytest.raises(ValueError, match="even width"):
        rotary(torch.randn(2, 3))


def test_alibi_slopes_of_eight_heads_are_the_published_ones():
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))


@pytest.mark.parametrize(
    ("heads", "more"),
    [(3, [2.0**-2]), (5, [2.0**-1]), (12, [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5])],
)
def test_alibi_slopes_of_other_numbers_are_those_of_the_official_code(heads, more):
    """get_slopes of Press et al.: the lower power of two, then every other slope of twice as many heads."""
    whole = heads - len(more)
    torch.testing.assert_close(
        alibi_slopes(heads), torch.cat([alibi_slopes(whole), torch.tensor(more)])
    )


def test_alibi_bias_falls_with_distance():
    bias = alibi_bias(2, 2, 4)
    torch.testing.assert_close(bias[0, :, :3], -torch.tensor([[2.0, 1, 0], [3, 2, 1]]) / 16)
    torch.testing.assert_close(bias[1] * 16, bias[0])
