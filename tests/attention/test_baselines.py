"""Baselines: planted patterns, budgets, and their place in the common interface."""

import pytest
import torch

from reattend.attention.baselines.antidiagonal import Antidiagonal, antidiagonal_scores
from reattend.attention.baselines.block_topk import (
    BlockTopK,
    OracleTopK,
    exact_block_mass,
    pooled_scores,
)
from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.baselines.vertical_slash import (
    VerticalSlash,
    last_weights,
    vertical_slash_blocks,
    vertical_slash_mass,
)
from reattend.attention.blocks import causal_block_mask, pool_blocks
from reattend.attention.dense import dense_attention
from reattend.attention.statistics import block_mass

SIZE = 16
METHODS = [
    StreamingLLM(sink=16, window=32, block_size=SIZE),
    VerticalSlash(verticals=2, slashes=2, block_size=SIZE),
    BlockTopK(k=3, block_size=SIZE),
    BlockTopK(k=4, local=1, block_size=SIZE),
    OracleTopK(k=3, block_size=SIZE),
    OracleTopK(mass=0.8, block_size=SIZE),
    Antidiagonal(k=3, stride=4, block_size=SIZE),
    Antidiagonal(mass=0.6, stride=8, block_size=SIZE),
]


def tensors(queries=111, keys=111, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 6, queries, 8, generator=generator),
        torch.randn(2, 3, keys, 8, generator=generator),
    )


@pytest.mark.parametrize("queries", [111, 40])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_masks_are_causal_and_hold_sink_and_diagonal(method, queries):
    query, key = tensors(queries)
    blocks = method.block_mask(query, key)
    rows, columns = blocks.shape[-2:]
    assert not (blocks & ~causal_block_mask(rows, columns)).any()
    assert blocks[..., 0].all()
    assert blocks.diagonal(columns - rows, -2, -1).all()


def test_block_top_k_forces_the_blocks_before_the_diagonal():
    method = BlockTopK(k=3, local=1, block_size=SIZE)
    blocks = method.block_mask(*tensors(96, 96))
    assert blocks.diagonal(-1, -2, -1).all()
    assert (blocks.sum(-1)[..., 3:] == 3).all()


def test_streaming_window_in_blocks():
    blocks = StreamingLLM(sink=1, window=20, block_size=SIZE).block_mask(*tensors(80, 80))
    assert blocks[1, 5].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_vertical_slash_finds_a_planted_column():
    query, key = torch.zeros(1, 1, 128, 8), torch.zeros(1, 1, 128, 8)
    query[..., 0] = 1
    key[0, 0, 50, 0] = 100  # block 3
    blocks = VerticalSlash(verticals=2, slashes=1, block_size=SIZE).block_mask(query, key)[0, 0]
    expected = torch.eye(8, dtype=torch.bool)
    expected[:, 0] = True
    expected[3:, 3] = True
    assert torch.equal(blocks, expected)


def test_vertical_slash_finds_a_planted_diagonal():
    query, key = 20 * torch.eye(128)[None, None], 20 * torch.eye(128)[None, None]
    key = key.roll(
        -40, dims=2
    )  # key j answers to query j + 40: two block diagonals below the main one
    blocks = VerticalSlash(verticals=1, slashes=2, block_size=SIZE).block_mask(query, key)[0, 0]
    expected = torch.eye(8, dtype=torch.bool) | torch.diag(torch.ones(6), -2).bool()
    expected[:, 0] = True
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("scale", [0.05, 0.35, 2.0])
def test_vertical_slash_weights_are_softmax_at_the_given_scale(scale):
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(2))
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    scores = (scale * query @ key.transpose(-2, -1)).masked_fill(future, -torch.inf)
    expected = scores.softmax(dim=-1)[:, :, -10:]
    weights = last_weights(query, key, 10, scale)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    vertical, slash = vertical_slash_mass(weights, SIZE)
    # Each of the ten queries spreads a mass of one.
    torch.testing.assert_close(vertical.sum(-1), torch.full((1, 2), 10.0))
    torch.testing.assert_close(slash.sum(-1), torch.full((1, 2), 10.0))


@pytest.mark.parametrize("scale", [0.3, 0.6])
def test_vertical_slash_selects_at_the_scale_it_is_given(scale):
    """At a small scale many weak keys outweigh one strong key; at a large one it wins."""
    query, key = torch.zeros(1, 1, 128, 8), torch.zeros(1, 1, 128, 8)
    query[..., 0] = 1
    key[0, 0, 50, 0] = 5  # one strong key in block 3
    key[0, 0, 80:96, 0] = 1  # sixteen weak ones in block 5
    made = VerticalSlash(verticals=2, slashes=1, last_queries=16, block_size=SIZE)
    columns = made.block_mask(query, key, scale=scale)[0, 0, -1].nonzero().flatten().tolist()
    assert columns == [0, 3 if scale == 0.6 else 5, 7]


def test_vertical_slash_union_behind_a_cache():
    verticals = torch.tensor([[[True, False, True, False]]])
    slashes = torch.tensor([[[True, False, False, True]]])
    assert vertical_slash_blocks(verticals, slashes, 2)[0, 0].int().tolist() == [
        [1, 0, 1, 0],
        [1, 0, 1, 1],
    ]


def test_pooled_scores_are_products_of_means():
    query, key = tensors()
    scores = pooled_scores(query, key, SIZE, 0.3)
    first = 0.3 * query[1, 4, 16:32].mean(0) @ key[1, 2, 96:111].mean(0)
    torch.testing.assert_close(scores[1, 4, 1, 6], first)
    behind_cache = pooled_scores(query[:, :, 71:], key, SIZE, 0.3)
    whole = pool_blocks(query, SIZE)[:, :, 5:]
    keys = pool_blocks(key, SIZE).repeat_interleave(2, dim=1)
    expected = 0.3 * whole @ keys.transpose(-2, -1)
    torch.testing.assert_close(behind_cache[:, :, 1:], expected, atol=1e-6, rtol=1e-5)


def test_budgets_are_kept():
    query, key = tensors()
    counts = BlockTopK(k=3, block_size=SIZE).block_mask(query, key).sum(-1)
    assert counts[0, 0].tolist() == [1, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("queries", [111, 40])
@pytest.mark.parametrize("rows_at_once", [16, 512])
def test_exact_mass_equals_pooled_dense_weights(queries, rows_at_once, monkeypatch):
    monkeypatch.setattr("reattend.attention.baselines.block_topk.ORACLE_ROWS", rows_at_once)
    query, key = tensors(queries)
    _, weights = dense_attention(query, key, key, scale=0.3, causal=True, return_weights=True)
    torch.testing.assert_close(
        exact_block_mass(query, key, SIZE, 0.3), block_mass(weights, SIZE), atol=1e-5, rtol=0
    )


def test_oracle_covers_more_than_any_other_choice_of_equal_size():
    query, key = tensors()
    mass = exact_block_mass(query, key, SIZE, 0.3)
    oracle, pooled = (
        (mass * method.block_mask(query, key, scale=0.3)).sum((-2, -1))
        for method in (OracleTopK(k=3, block_size=SIZE), BlockTopK(k=3, block_size=SIZE))
    )
    assert (oracle >= pooled).all()
    assert (oracle > pooled).any()


def test_oracle_reaches_its_mass_in_every_row():
    query, key = tensors()
    mass = exact_block_mass(query, key, SIZE, 0.3)
    blocks = OracleTopK(mass=0.8, block_size=SIZE).block_mask(query, key, scale=0.3)
    assert ((mass * blocks).sum(-1) >= 0.8 * mass.sum(-1) - 1e-6).all()
    assert blocks.float().mean() < causal_block_mask(7, 7).float().mean()


def test_oracle_takes_one_budget():
    with pytest.raises(ValueError, match="either k or mass"):
        OracleTopK(k=3, mass=0.5)
    assert OracleTopK().k == 16


# Of the official estimate on the tensors of `waves`: weights by block, and the blocks at threshold 0.8.
OFFICIAL = [
    [2.0, 0.0, 0.0, 0.0, 0.0],
    [1.203203, 0.796797, 0.0, 0.0, 0.0],
    [0.612800, 0.706097, 0.681103, 0.0, 0.0],
    [0.620682, 0.527005, 0.476836, 0.375477, 0.0],
    [0.431072, 0.430811, 0.401880, 0.387519, 0.348718],
]
OFFICIAL_BLOCKS = ["#....", "##...", "###..", "####.", "###.#"]


def waves():
    position = torch.arange(160, dtype=torch.float64).view(1, 1, 40, 4)
    return 3 * torch.sin(1.7 * position), torch.cos(2.3 * position + 1)


def test_antidiagonal_scores_are_the_official_ones():
    ours = antidiagonal_scores(*waves(), block_size=8, stride=4, scale=0.5)[0, 0]
    torch.testing.assert_close(ours, torch.tensor(OFFICIAL).double(), atol=2e-6, rtol=0)
    blocks = Antidiagonal(mass=0.8, stride=4, block_size=8).block_mask(*waves(), scale=0.5)
    assert ["".join(".#"[b] for b in row) for row in blocks[0, 0].int().tolist()] == OFFICIAL_BLOCKS


@pytest.mark.parametrize("queries", [111, 101, 40])
def test_antidiagonal_scores_equal_plain_loops(queries):
    """Windows at absolute positions; what is missing of one counts as zeros."""
    query, key = (x[:1].double() for x in tensors(queries))
    stride, shift = 4, 111 - queries
    ours = antidiagonal_scores(query, key, SIZE, stride, 0.3)
    for head in range(6):
        expected = torch.zeros(7 - shift // SIZE, 7, dtype=torch.float64)
        for i in range(shift // stride, 28):
            scores = []
            for j in range(i + 1):
                pairs = [(i * stride + stride - 1 - r, j * stride + r) for r in range(stride)]
                real = [(p - shift, t) for p, t in pairs if shift <= p < 111 and t < 111]
                dots = [query[0, head, p].dot(key[0, head // 2, t]) for p, t in real]
                scores.append(0.3 / stride * sum(dots, torch.zeros(()).double()))
            for j, weight in enumerate(torch.stack(scores).softmax(0)):
                expected[i // 4 - shift // SIZE, j // 4] += weight
        torch.testing.assert_close(ours[0, head], expected, atol=1e-12, rtol=0)


def test_antidiagonals_see_columns_and_slashes():
    """A sharp column and a sharp diagonal both cross every antidiagonal of their tiles."""
    query, key = torch.zeros(1, 1, 96, 8), torch.zeros(1, 1, 96, 8)
    query[..., 0], key[:, :, 37, 0] = 1, 60  # column 37, in block 2
    blocks = Antidiagonal(k=3, stride=4, block_size=SIZE).block_mask(query, key)
    assert blocks[0, 0, 3:, 2].all()
    angle = torch.arange(96.0) * 2.4
    turning = torch.stack([angle.cos(), angle.sin()], dim=-1)
    query[..., :2], key[..., :2] = 9 * turning.roll(32, 0), 9 * turning  # query i meets key i - 32
    blocks = Antidiagonal(k=3, stride=4, block_size=SIZE).block_mask(query, key)
    assert blocks[0, 0].diagonal(-2).all()


def test_antidiagonal_settings():
    assert Antidiagonal().mass == 0.9
    assert Antidiagonal(k=4).saves_from("prefill") == 513
    assert Antidiagonal(k=1).saves_from("prefill") == 257  # first and diagonal block in any case
    assert Antidiagonal(mass=1.0).saves_from("prefill") is None
    with pytest.raises(ValueError, match="either k or mass"):
        Antidiagonal(k=3, mass=0.5)
    with pytest.raises(ValueError, match="stride must divide the block size, 128, got 3"):
        Antidiagonal(stride=3)


def two_tokens():
    """Two keys whose scores for the last query are 0 and 2 before the scale."""
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    query[..., -1, 0], key[..., 1, 0] = 2, 1
    return query, key


def test_last_weights_are_those_of_the_scale():
    weights = last_weights(*two_tokens(), 1, 0.5)
    odds = torch.tensor([1.0, torch.e])  # exp(0.5 * 0), exp(0.5 * 2)
    torch.testing.assert_close(weights[0, 0, 0], odds / odds.sum())


def test_the_scale_decides_what_vertical_slash_selects():
    """One column against two: sharp weights favour the single strong key, flat ones the two weak."""
    query, key = torch.zeros(1, 1, 12, 4), torch.zeros(1, 1, 12, 4)
    query[:, :, -1, 0] = 1
    key[:, :, 2, 0] = 2.0  # block 1: one strong key
    key[:, :, 4:6, 0] = 1.5  # block 2: two weaker ones
    method = VerticalSlash(verticals=2, slashes=1, last_queries=1, block_size=2)
    columns = {
        scale: method.select(query, key, scale=scale, layer=0)[0, 0, -1, 1:3].tolist()
        for scale in (1.0, 3.0)
    }
    # exp(2 s) + 1 against 2 exp(1.5 s): the two swap at s = 1.76.
    assert columns == {1.0: [False, True], 3.0: [True, False]}
