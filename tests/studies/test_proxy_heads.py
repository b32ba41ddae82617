"""Rankings under given budgets: equal counts, placebos that keep what they should, exact masses."""

import pandas as pd
import pytest
import torch

from reattend.attention.baselines.block_topk import exact_block_mass
from reattend.attention.blocks import causal_block_mask, density
from reattend.long_context.proxyattn import ProxyAttn, block_max, proxy_heads, proxy_scores
from reattend.studies.proxy_heads import (
    Planned,
    Planner,
    by_average_pooling,
    by_chance,
    by_own_maps,
    by_proxy,
    by_recency,
    by_true_mass,
    estimate_shares,
    layer_speeds,
    level,
    likeness,
    mass_found,
    masses_table,
    shuffled,
    speeds,
)

SIZE, ROWS = 8, 14
SCALE = 0.4


def tensors(seed=0, tokens=ROWS * SIZE):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 6, tokens, 16, generator=generator)
    query *= torch.linspace(0.3, 6.0, 6)[:, None, None]
    return query, torch.randn(1, 2, tokens, 16, generator=generator)


def planner(gamma=0.7):
    return Planner(gamma=gamma, groups=1, stride=1, min_budget=2 * SIZE, block_size=SIZE)


def planned(rank, plan):
    return Planned(rank, plan, SIZE).block_mask(*tensors(), scale=SCALE)


@pytest.fixture(name="plan")
def _plan():
    made = planner()
    made.block_mask(*tensors(), scale=SCALE)
    return made.plan


def test_a_planner_is_proxyattn_and_keeps_its_budgets(plan):
    made = ProxyAttn(gamma=0.7, stride=1, min_budget=2 * SIZE, block_size=SIZE)
    query, key = tensors()
    assert torch.equal(plan[0][..., 0], made.budget(query, key, scale=SCALE, layer=0))
    ours = planned(by_proxy(SIZE, 1), plan)
    assert torch.equal(ours, made.block_mask(query, key, scale=SCALE))
    assert plan[0].unique().numel() > 2


@pytest.mark.parametrize(
    "rank",
    [by_own_maps(SIZE, 2), by_true_mass(SIZE), by_chance(ROWS, 0), by_recency(ROWS)],
    ids=["own maps", "oracle", "chance", "recency"],
)
def test_every_ranking_computes_as_many_blocks_in_every_row(rank, plan):
    ours, other = planned(by_proxy(SIZE, 1), plan), planned(rank, plan)
    assert torch.equal(ours.sum(-1), other.sum(-1))
    assert not torch.equal(ours, other)
    assert other[..., 0].all()
    assert other.diagonal(dim1=-2, dim2=-1).all()


def test_recency_is_a_window_and_chance_is_none(plan):
    mask = planned(by_recency(ROWS), plan)
    column, row = torch.arange(ROWS), torch.arange(ROWS)[:, None]
    latest = row - column < plan[0][..., None] - 1  # the first block is one of the budget
    assert torch.equal(mask, (latest | (column == 0)) & (column <= row))
    first, second = (planned(by_chance(ROWS, seed), plan) for seed in (0, 1))
    assert not torch.equal(first, second)
    wide = plan[0].flatten().argmax()
    assert not torch.equal(first[0, wide], first[0, wide - 1])


def test_shuffled_budgets_are_the_same_numbers(plan):
    mixed = shuffled(dict.fromkeys(range(8), plan[0]), seed=0)
    assert all(torch.equal(x.sort(1).values, plan[0].sort(1).values) for x in mixed.values())
    assert not all(torch.equal(x, plan[0]) for x in mixed.values())
    assert not torch.equal(mixed[0], mixed[1])  # layers in orders of their own


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_one_budget_for_all_heads_computes_as_many_blocks(gamma):
    made = planner(gamma)
    dynamic = made.block_mask(*tensors(), scale=SCALE)
    even = planned(by_proxy(SIZE, 1), level(made.plan, ROWS))
    assert (even.sum((-2, -1)) == even[0, 0].sum()).all()
    # To half a block of the mean, out of 105.
    assert abs(density(even).mean() - density(dynamic).mean()) <= 0.5 / 105 + 1e-6
    counts = level(made.plan, ROWS)[0].flatten()
    assert counts.max() - counts.min() <= 1


def test_average_pooling_is_the_mass_of_the_proxys_map():
    query, key = tensors()
    rank = by_average_pooling(SIZE)(query, key, SCALE)
    mean = exact_block_mass(proxy_heads(query, 1), proxy_heads(key, 1), SIZE, SCALE)
    torch.testing.assert_close(rank, mean)
    coarse = by_average_pooling(SIZE, 4)(query, key, SCALE)
    assert coarse.shape == rank.shape
    torch.testing.assert_close(coarse.sum(-1), torch.full((1, 1, ROWS), SIZE / 4))


def test_own_maps_are_those_of_each_head():
    query, key = tensors()
    own = by_own_maps(SIZE)(query, key, SCALE)
    for head in range(6):
        alone = proxy_scores(
            query[:, [head]], key[:, [head // 3]], groups=1, block_size=SIZE, scale=SCALE
        )
        torch.testing.assert_close(own[:, [head]], alone)


def test_mass_found_is_that_of_free_late_blocks():
    mass = torch.rand(1, 3, ROWS, ROWS) * causal_block_mask(ROWS, ROWS)
    for d in (0.2, 0.3, 0.5):
        assert mass_found(mass, mass, d) == pytest.approx(1.0)
        worst = mass_found(-mass, mass, d)
        chance = mass_found(torch.rand(1, 3, ROWS, ROWS), mass, d)
        assert worst < chance < 1
    by_hand = best = 0.0
    scores = torch.rand(1, 1, ROWS, ROWS)
    for row in range(ROWS // 2, ROWS):
        budget = max(2, round(0.5 * (row + 1))) - 2
        between = scores[0, 0, row, 1:row].argsort(descending=True)[:budget] + 1
        by_hand += mass[0, :, row, between].sum().item()
        best += mass[0, :, row, 1:row].topk(budget).values.sum().item()
    assert mass_found(scores, mass, 0.5) == pytest.approx(by_hand / best, rel=1e-5)


def test_mass_found_ignores_what_everybody_computes():
    mass = torch.rand(1, 2, ROWS, ROWS) * causal_block_mask(ROWS, ROWS)
    heavy = mass.clone()
    heavy[..., 0] += 50
    heavy.diagonal(dim1=-2, dim2=-1).add_(50)
    scores = torch.rand(1, 2, ROWS, ROWS)
    assert mass_found(scores, heavy, 0.3) == pytest.approx(mass_found(scores, mass, 0.3))


def test_likeness_of_equal_and_of_unlike_heads():
    query, key = tensors(seed=3)
    equal = likeness(
        query[:, :1].expand(-1, 6, -1, -1), key[:, :1].expand(-1, 2, -1, -1), SCALE, SIZE
    )
    assert equal["heads"].std() < 1e-6
    ours = likeness(query, key, SCALE, SIZE)
    own, other = ours["heads"].diag(), ours["heads"]
    assert (own >= other.amax(dim=0) - 1e-6).all()  # no other set of that size holds more of a head
    assert (own - other.mean(dim=0))[-1] > 0.1
    even = likeness(0 * query, key, SCALE, SIZE)
    count = round((ROWS * SIZE - 4 - SIZE) / 8) / (ROWS * SIZE - 4 - SIZE)
    torch.testing.assert_close(even["heads"], torch.full((6, 6), count))
    torch.testing.assert_close(even["recency"], torch.full((6,), count))


def test_likeness_by_hand():
    """Shares of the mean attention of the last block, without four sinks and that block's own keys."""
    query, key = (x.double() for x in tensors(seed=3, tokens=60))
    shares = []
    for head in range(6):
        total = torch.zeros(60, dtype=torch.float64)
        for i in range(52, 60):
            weights = (SCALE * key[0, head // 3, : i + 1] @ query[0, head, i]).softmax(0)
            total[: i + 1] += weights
        middle = total[4:52]
        shares.append(middle / middle.sum())
    ours = likeness(query, key, SCALE, SIZE)
    for one in range(6):
        assert ours["recency"][one].item() == pytest.approx(shares[one][-6:].sum().item())
        top = shares[one].topk(6).indices
        for other in range(6):
            expected = shares[other][top].sum().item()
            assert ours["heads"][one, other].item() == pytest.approx(expected)


def test_maximum_and_average_differ():
    query, key = tensors()
    assert not torch.allclose(
        by_proxy(SIZE, 1)(query, key, SCALE)[:, :1], by_average_pooling(SIZE)(query, key, SCALE)
    )
    assert block_max(torch.eye(16), SIZE).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_speeds_are_positive_and_one_a_round(plan):
    made = Planned(by_proxy(SIZE, 1), plan, SIZE)
    whole, selection = speeds(made, *tensors(), SCALE, 3)
    assert len(whole) == len(selection) == 3
    assert (whole > 0).all()


def test_speeds_of_layers_are_every_round_at_one_number_of_blocks():
    layers = [(*tensors(seed), SCALE) for seed in (0, 1)]
    found, read = layer_speeds(layers, 0.7, SIZE, 3)
    assert list(found) == [
        "ProxyAttn",
        "mean-pooled blocks",
        "ProxyAttn, selection alone",
        "mean-pooled blocks, selection alone",
    ]
    assert all(len(values) == 2 * 3 and min(values) > 0 for values in found.values())
    settings = {"gamma": 0.7, "stride": 2, "min_budget": 3 * SIZE, "block_size": SIZE}
    masks = [ProxyAttn(**settings).block_mask(q, k, scale=s) for q, k, s in layers]
    expected = sum(density(mask).mean().item() for mask in masks) / 2
    assert read["ProxyAttn"] == pytest.approx(expected, abs=1e-6)
    assert read["mean-pooled blocks"] == pytest.approx(expected, abs=0.5 / 105)


def test_a_proxys_cost_is_that_of_its_map_and_of_the_last_block():
    shares = estimate_shares([1024, 131072])
    assert shares["mean-pooled blocks"] == [1 / 128**2] * 2
    # One of 32 heads at every 4th query and key; 128 queries of half as many causal pairs.
    own, last = 1 / (32 * 16), 128 / (1024 / 2)
    assert shares["one proxy of 32 heads, s = 4"][0] == pytest.approx(own + last)
    assert shares["8 proxies, s = 4"][1] == pytest.approx(8 * own + last / 128)


def test_masses_table_keeps_the_order_of_the_rankings():
    rows = [("proxy", 0, 0.2, 0.8), ("proxy", 1, 0.2, 0.6), ("chance", 0, 0.2, 0.1)]
    rows += [("proxy", 0, 0.3, 0.9)]
    masses = pd.DataFrame(rows, columns=["ranking", "window", "density", "found"])
    table = masses_table(masses, {"proxy": 0.01})
    assert table["ranking"].tolist() == ["proxy", "chance"]
    assert table[0.2].tolist() == pytest.approx([0.7, 0.1])
    assert table["cost of the estimate"].isna().tolist() == [False, True]
