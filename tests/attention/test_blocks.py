"""Block masks against brute force over tokens, rows and diagonals."""

import pytest
import torch

from reattend.attention.blocks import (
    block_count,
    causal_block_mask,
    causal_pairs,
    cumulative_mass_blocks,
    density,
    diagonal_sums,
    expand_to_tokens,
    forced_blocks,
    pool_blocks,
    query_block_count,
    top_k_blocks,
    union,
)

# (queries, keys, block size): prefill of odd lengths, chunks behind a cache at odd places, decoding
GRIDS = [
    (63, 63, 16),
    (64, 64, 16),
    (111, 111, 10),
    (40, 111, 16),
    (33, 64, 16),
    (3, 50, 16),
    (1, 50, 16),
    (5, 5, 16),
]


def scores_of(rows=7, columns=9, seed=0):
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("queries", "keys", "size"), GRIDS)
def test_grid_counts_the_blocks_that_hold_queries(queries, keys, size):
    blocks = {position // size for position in range(keys - queries, keys)}
    assert query_block_count(queries, keys, size) == len(blocks)
    assert block_count(keys, size) == len({position // size for position in range(keys)})


@pytest.mark.parametrize(("queries", "keys", "size"), GRIDS)
def test_causal_blocks_are_those_with_a_causal_pair(queries, keys, size):
    pairs = causal_pairs(queries, keys, size)
    expected = torch.zeros_like(pairs)
    for i in range(queries):
        position = i + keys - queries
        row = position // size - (keys - queries) // size
        for j in range(position + 1):
            expected[row, j // size] += 1
    assert torch.equal(pairs, expected)
    assert torch.equal(causal_block_mask(*pairs.shape), expected > 0)


@pytest.mark.parametrize("offset", [0, 5, 16, 21])
@pytest.mark.parametrize("tokens", [1, 16, 31, 63])
def test_pooling_averages_over_the_real_tokens(tokens, offset):
    x = torch.randn(2, 3, tokens, 4)
    pooled = pool_blocks(x, 16, offset=offset)
    blocks = {}
    for i in range(tokens):
        blocks.setdefault((i + offset) // 16, []).append(x[:, :, i])
    expected = torch.stack([torch.stack(block).mean(0) for block in blocks.values()], dim=-2)
    torch.testing.assert_close(pooled, expected, atol=1e-6, rtol=0)


def test_forced_blocks_by_hand():
    forced = forced_blocks(3, 5, sink=1, local=1)
    assert forced.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert forced_blocks(3, 3, sink=0, diagonal=False).sum() == 0
    assert forced_blocks(3, 3, diagonal=False, local=1).int().tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
    ]


@pytest.mark.parametrize("k", [1, 2, 4, 20])
@pytest.mark.parametrize("sink", [0, 2])
def test_top_k_by_brute_force(k, sink):
    scores = scores_of()
    chosen = top_k_blocks(scores, k, sink=sink, local=1)
    forced = forced_blocks(7, 9, sink=sink, local=1)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 7))).tolist():
        last = i + 2
        ranked = sorted(
            range(last + 1), key=lambda j: (-int(forced[i, j]), -scores[b, h, i, j].item())
        )
        budget = max(k, int(forced[i].sum()))
        assert set(chosen[b, h, i].nonzero()[:, 0].tolist()) == set(ranked[:budget])


def test_top_k_takes_a_budget_per_row():
    scores = scores_of(rows=9)
    budget = torch.arange(1, 10).expand(2, 3, 9)
    chosen = top_k_blocks(scores, budget, diagonal=False)
    assert torch.equal(chosen.sum(-1), budget)
    per_head = top_k_blocks(scores, torch.tensor([[[1], [2], [3]]]), diagonal=False)
    assert per_head[:, :, -1].sum(-1).tolist() == [[1, 2, 3]] * 2


def test_top_k_prefers_earlier_blocks_in_ties():
    chosen = top_k_blocks(torch.zeros(1, 1, 4, 4), 2, diagonal=False)
    assert chosen[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.5, 0.9, 0.999])
def test_cumulative_mass_is_the_smallest_set_that_reaches_it(mass):
    scores = 2 * scores_of()
    chosen = cumulative_mass_blocks(scores, mass)
    causal = causal_block_mask(7, 9)
    share = scores.double().masked_fill(~causal, float("-inf")).softmax(-1)
    covered = (share * chosen).sum(-1)
    assert (covered >= mass).all()
    # Without its smallest member the set would miss the mass, so no smaller set reaches it.
    smallest = share.masked_fill(~chosen, 2.0).amin(-1)
    assert (covered - smallest < mass).all()
    assert not (chosen & ~causal).any()


def test_cumulative_mass_keeps_forced_blocks_and_counts_them():
    scores = torch.log(
        torch.tensor([[[[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0.1, 0.4, 0.2, 0.3]]]]) + 1e-12
    )
    row = cumulative_mass_blocks(scores, 0.39, sink=1, diagonal=True)[0, 0, 3]
    assert row.tolist() == [True, False, False, True]
    assert cumulative_mass_blocks(scores, 0.41, sink=1, diagonal=True)[0, 0, 3].sum() == 3


def test_full_mass_keeps_every_causal_block():
    chosen = cumulative_mass_blocks(100 * scores_of(), 1.0)
    assert torch.equal(chosen[1, 2], causal_block_mask(7, 9))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 9), (9, 9)])
def test_diagonal_sums_equal_a_double_loop(queries, keys):
    weights = torch.rand(2, 3, queries, keys, dtype=torch.float64)
    expected = torch.zeros(2, 3, keys, dtype=torch.float64)
    for i in range(queries):
        for j in range(keys):
            offset = i + keys - queries - j
            if offset >= 0:
                expected[..., offset] += weights[..., i, j]
    torch.testing.assert_close(diagonal_sums(weights), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys", "size"), GRIDS)
def test_expansion_to_tokens_pair_by_pair(queries, keys, size, causal):
    rows = query_block_count(queries, keys, size) if causal else block_count(queries, size)
    blocks = torch.rand(2, rows, block_count(keys, size)) < 0.5
    tokens = expand_to_tokens(blocks, size, queries, keys, causal=causal)
    offset = keys - queries if causal else 0
    for i in range(queries):
        for j in range(keys):
            row = (i + offset) // size - offset // size
            expected = blocks[:, row, j // size] & (j <= i + offset or not causal)
            assert torch.equal(tokens[:, i, j], expected)


@pytest.mark.parametrize(("queries", "keys", "size"), GRIDS)
def test_density_by_brute_force(queries, keys, size):
    rows, columns = query_block_count(queries, keys, size), block_count(keys, size)
    blocks = torch.rand(2, 3, rows, columns) < 0.5
    tokens = expand_to_tokens(blocks, size, queries, keys)
    everything = expand_to_tokens(torch.ones_like(blocks), size, queries, keys)
    expected = tokens.float().mean((-2, -1)) / everything.float().mean((-2, -1))
    in_pairs = density(blocks, size, queries=queries, keys=keys)
    torch.testing.assert_close(in_pairs, expected, atol=1e-6, rtol=0)
    causal = [(i, j) for i in range(rows) for j in range(columns) if j <= i + columns - rows]
    counted = sum(blocks[..., i, j].float() for i, j in causal) / len(causal)
    torch.testing.assert_close(density(blocks), counted, atol=1e-6, rtol=0)


def test_density_needs_all_lengths_or_none():
    with pytest.raises(ValueError, match="together"):
        density(torch.ones(2, 2, dtype=torch.bool), 16)


def test_union_joins_and_broadcasts():
    first, second = torch.eye(3, dtype=torch.bool), torch.zeros(2, 3, 3, dtype=torch.bool)
    second[1, 0, 2] = True
    joined = union(first, second)
    assert torch.equal(joined[0], first)
    assert joined[1].sum() == 4
    with pytest.raises(ValueError, match="at least one"):
        union()
