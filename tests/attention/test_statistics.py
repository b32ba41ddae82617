"""Attention statistics against hand-computed values."""

import math

import pytest
import torch

from reattend.attention.blocks import block_count, query_block_count
from reattend.attention.dense import dense_attention
from reattend.attention.statistics import (
    block_mass,
    covered_mass,
    entropy,
    js_divergence,
    sink_mass,
)


def weights_of(queries=11, keys=17):
    query, key = torch.randn(2, 3, queries, 4), torch.randn(2, 3, keys, 4)
    return dense_attention(query, key, key, causal=True, return_weights=True)[1]


def test_covered_mass_of_everything_nothing_and_one_column():
    weights = weights_of()
    everything = torch.ones(11, 17, dtype=torch.bool)
    torch.testing.assert_close(covered_mass(weights, everything), torch.ones(2, 3))
    assert (covered_mass(weights, ~everything) == 0).all()
    column = torch.zeros(11, 17, dtype=torch.bool)
    column[:, 2] = True
    torch.testing.assert_close(covered_mass(weights, column), weights[..., 2].mean(-1))


@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (11, 17), (5, 16)])
def test_block_mass_by_brute_force(queries, keys):
    weights = weights_of(queries, keys)
    rows, columns = query_block_count(queries, keys, 4), block_count(keys, 4)
    expected = torch.zeros(2, 3, rows, columns)
    offset = keys - queries
    for i in range(queries):
        for j in range(keys):
            expected[..., (i + offset) // 4 - offset // 4, j // 4] += weights[..., i, j]
    torch.testing.assert_close(block_mass(weights, 4), expected)


def test_js_divergence_limits_symmetry_and_a_known_value():
    p, q = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.5, 0.5])
    assert js_divergence(p, q).item() == pytest.approx(math.log(2), abs=1e-6)
    assert js_divergence(p, p).item() == 0
    r = torch.tensor([0.5, 0.5, 0])
    # m = (3/4, 1/4, 0): 0.5 ln(4/3) + 0.5 (0.5 ln(2/3) + 0.5 ln 2)
    known = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert js_divergence(p, r).item() == pytest.approx(known, abs=1e-6)
    assert js_divergence(r, p).item() == pytest.approx(known, abs=1e-6)


def test_entropy_of_uniform_and_certain_rows():
    rows = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0, 1.0, 0, 0]])
    torch.testing.assert_close(entropy(rows), torch.tensor([math.log(4), 0.0]))


def test_sink_mass_is_the_first_columns():
    weights = weights_of()
    torch.testing.assert_close(sink_mass(weights, 2), weights[..., :2].sum(-1).mean(-1))
    torch.testing.assert_close(sink_mass(weights, 17), torch.ones(2, 3))
