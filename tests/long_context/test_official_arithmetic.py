"""What the official code of three papers computes on small tensors, as numbers, beside what ours does.

The tensors are given by a formula, so that only results are stored. ProxyAttn's code could not be had.
"""

import math

import pytest
import torch

from reattend.attention.blocks import causal_block_mask
from reattend.attention.statistics import block_mass
from reattend.long_context.dhsa import (
    BoundaryPredictor,
    block_bounds,
    choose_tokens,
    chunk_edges,
    chunk_of_tokens,
    focal_loss,
    token_scores,
)
from reattend.long_context.hip_attention import Tree, query_blocks, score_of, tree_search
from reattend.long_context.moa import MoA, Plan, Rule, influence


def wave(*shape, step):
    """Numbers in [-1, 1] without a pattern: sin(step n^1.5), n = 1, 2, ..."""
    numbers = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(step * numbers**1.5).reshape(shape)


# HiP: the first version 1.1 (one scored query in a block of two, the first unit stands for an interval)


def test_hip_finds_the_same_keys():
    """T = 90, k = 8, units of 2, window 8: keys by block of queries."""
    official = {
        20: [4, 6, 12, 14],
        27: [24, 28, 30, 42],
        33: [14, 18, 22, 52],
        40: [0, 10, 12, 20],
        44: [10, 30, 32, 40],
    }
    query, key = wave(1, 1, 90, 4, step=0.9), wave(1, 1, 90, 4, step=0.7)
    tree = Tree(k=8, block_q=2, query_stride=2, block_k=2, window=8, sink=0, representative="first")
    blocks = query_blocks(90, 90, tree.block_q, tree.query_stride)
    score = score_of(query, key, blocks, tree)
    found = tree_search(tree.units(blocks.last), tree.nodes(90), (1, 1), score)
    for block, keys in official.items():
        assert (2 * found.units[0, 0, block]).tolist() == keys


# MoA: the influence of a mask, summed in blocks, and the blocks that a rule keeps


def test_moa_has_the_same_influence():
    query, key, value, gradient = (wave(1, 2, 6, 4, step=s) for s in (0.7, 1.1, 0.3, 0.9))
    future = torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
    weights = (query @ key.transpose(-1, -2) + future).softmax(-1)  # 2 q k / sqrt 4
    epsilon = torch.finfo(torch.float64).eps
    change = influence(weights, gradient @ value.transpose(-1, -2), epsilon)
    official = [
        [[0.617171, 0.0, 0.0], [1.376067, 1.178854, 0.0], [0.501768, 0.618398, 0.130042]],
        [[0.697869, 0.0, 0.0], [1.152592, 0.996449, 0.0], [1.082089, 1.227722, 1.278250]],
    ]
    expected = torch.tensor(official, dtype=torch.float64)
    torch.testing.assert_close(block_mass(change.abs(), 2)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "blocks", "kept"),
    [
        (Rule(-40, 0.5), 16, 81),
        (Rule(-24, 0.875), 16, 130),
        (Rule(48, 0.0), 16, 58),
        (Rule(320, 0.0), 32, 462),
        (Rule(-64, 1.0), 9, 39),
        (Rule(17, 0.25), 13, 55),
    ],
)
def test_moa_keeps_as_many_blocks(rule, blocks, kept):
    method = MoA(plan=Plan.uniform(rule, 1, 1, block_size=16, sink=1))
    tokens = torch.zeros(1, 1, 16 * blocks, 2)
    mask = method.block_mask(tokens, tokens, layer=0) & causal_block_mask(blocks, blocks)
    assert int(mask.sum()) == kept


# DHSA: its first version


def test_dhsa_predicts_the_same_boundaries():
    predictor = BoundaryPredictor(8, heads=2, window=2, hidden=6).double()
    with torch.no_grad():
        for number, weights in enumerate(predictor.parameters()):
            weights.copy_(wave(*weights.shape, step=0.3 + 0.1 * number))
    key = wave(1, 2, 9, 4, step=0.7).transpose(1, 2).flatten(2)
    official = [-1.196668, -1.009854, -1.112740, 0.074826, 0.437641]
    official += [0.459005, 0.376454, 0.024904, -1.130125]
    expected = torch.tensor([official], dtype=torch.float64)
    torch.testing.assert_close(predictor(key), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "ends"),
    [  # the official lists hold the last position of each chunk
        ({"limit": 5, "window": 2}, [2, 7, 10, 16, 19]),
        ({"limit": 5, "window": 0, "threshold": 0.3}, [1, 2, 7, 10, 19]),
        ({"limit": 6, "window": 3, "threshold": -0.5}, [2, 7, 13, 19, 23]),
    ],
)
def test_dhsa_keeps_the_same_boundaries(settings, ends):
    edges = chunk_edges(wave(1, 24, step=0.37), **settings)
    assert set(edges[0].tolist()) == {0, 24, *(end + 1 for end in ends)}


@pytest.mark.parametrize(
    ("pooling", "official"),
    [
        ("sqrt", ([1, 4, 5, 6, 7, 8, 12, 13, 14, 15], [3, 6, 16, 17, 18, 19, 20, 21, 22, 23])),
        ("mean", ([3, 4, 5, 6, 7, 8, 12, 13, 14, 15], [3, 4, 5, 6, 7, 8, 20, 21, 22, 23])),
    ],
)
def test_dhsa_reads_as_many_tokens_of_the_same_chunks(pooling, official):
    """Tokens of a chunk have equal scores: which of them fill up a budget is not defined."""
    edges = torch.tensor([[0, 3, 4, 9, 15, 16, 24]])
    query, key = (wave(1, 4, 24, 4, step=s).float() for s in (0.9, 0.3))
    scores = token_scores(query, key, edges, block_size=8, pooling=pooling)
    chosen = choose_tokens(scores, block_bounds(24, 24, 8)[1], budget=10, local=4, sink=0)
    chunk = chunk_of_tokens(edges)[0]
    for tokens, expected in zip(chosen[0, 1:], official, strict=True):  # the first block reads all
        assert torch.equal(chunk[tokens].sort().values, chunk[torch.tensor(expected)].sort().values)


def test_dhsa_has_the_same_loss():
    logits, target = 2 * wave(1, 12, step=0.5), (wave(1, 12, step=0.8) > 0).double()
    assert focal_loss(logits, target).item() == pytest.approx(0.443810, abs=1e-6)
