"""The study of HiP attention: placebos, prompts, and trees on dense maps."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from reattend.attention.dense import dense_attention
from reattend.data.needles import Haystack
from reattend.long_context.hip_attention import HiPAttention, Tree, query_blocks, tree_search
from reattend.studies.hip import (
    BlindTree,
    OtherHead,
    best_mass,
    branch_hits,
    compare_rules,
    count_candidates,
    far_needles,
    methods_table,
    noise,
    pooled_of_density,
    table_score,
    unit_map,
)
from reattend.studies.hip_figures import draw_searches

SETTINGS = {"k": 16, "block_q": 16, "window": 12, "sink": 3, "dense_layers": 0}
TREE = Tree(16, 16, 2, 2, 12, 3, "centre")


class Characters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text, *, add_special_tokens):
        return [ord(c) for c in text]

    def convert_ids_to_tokens(self, ids):
        return [chr(i) for i in ids]


def tensors(tokens=150, heads=4, key_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, tokens, 8) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def seen_map(tokens=151):
    query, key, _ = tensors(tokens)
    return unit_map(query, key, 0.3, TREE), query, key


def test_placebos_read_as_much_and_something_else():
    query, key, value = tensors()
    outputs, densities, counts = [], [], []
    for made in (HiPAttention(**SETTINGS), BlindTree(0, **SETTINGS), OtherHead(**SETTINGS)):
        outputs.append(made.prefill(query, key, value, scale=0.3, layer=0))
        densities.append(made.density())
        counts.append(made.evaluations)
    assert max(densities) - min(densities) < 0.02
    assert max(counts) < 1.1 * min(counts)
    assert (outputs[0] - outputs[1]).abs().max() > 0.1
    assert (outputs[0] - outputs[2]).abs().max() > 0.1


def test_another_head_is_the_neighbour():
    query, key, _ = tensors()
    own, other = HiPAttention(**SETTINGS), OtherHead(**SETTINGS)
    (blocks,) = own.blocks(query, key)
    units = own.select(query, key, blocks).units
    assert torch.equal(other.select(query, key, blocks).units, units[:, [3, 0, 1, 2]])


def test_a_blind_tree_is_random_and_repeatable():
    query, key, _ = tensors()
    (blocks,) = HiPAttention(**SETTINGS).blocks(query, key)
    picks = [BlindTree(seed, **SETTINGS).select(query, key, blocks).units for seed in (0, 0, 1)]
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])


@pytest.mark.parametrize("seed", [0, 3])
def test_needles_stand_before_the_gap_and_more_prompts_begin_with_the_same(seed):
    prose = Haystack(
        Characters(), ["One more sentence of prose. And yet another one, why not? " * 99]
    )
    few, many = (
        list(far_needles(prose, "word_pairs", 900, count, 400, seed, 3)) for count in (3, 9)
    )
    assert many[:3] == few
    places = [sample.depth * 900 for sample in many]
    assert max(places) <= 500
    assert min(places) < 150
    assert max(places) > 350
    assert len(set(places)) >= 8  # sentences are where they are
    for sample in many:
        text = "".join(map(chr, sample.prompt))
        key = text.rsplit("The partner of ", 1)[1].split(" is")[0]
        fact = f"The partner of {key} is{''.join(map(chr, sample.answer))}."
        assert round(sample.depth * 900) == text.index(fact) - 1
        assert len(sample.prompt) == 900
    with pytest.raises(ValueError, match="gap"):
        next(far_needles(prose, "word_pairs", 300, 1, 300))


def test_masses_of_units_equal_loops():
    seen, query, key = seen_map()
    _, weights = dense_attention(query, key, key, scale=0.3, causal=True, return_weights=True)
    expected = torch.zeros_like(seen.mass)
    for p in range(151):
        for j in range(3, p - 12 + 1):
            expected[:, :, p // 16, (j - 3) // 2] += weights[:, :, p, j]
    torch.testing.assert_close(seen.mass, expected)
    # With sinks and windows it is all there is.
    near = sum(weights[0, :, p, max(p - 11, 3) : p + 1].sum(-1) for p in range(151))
    sinks = weights[0, :, :, :3].sum((-2, -1))
    torch.testing.assert_close(
        seen.mass.sum((-2, -1))[0] + near + sinks, torch.full((4,), 151.0).double()
    )


@pytest.mark.parametrize("k", [8, 16])
def test_recall_and_mass_of_each_rule(k):
    seen, _, _ = seen_map()
    found = compare_rules(seen, k, seed=0).set_index(["keys", "rule"])
    assert (
        found.loc[("real", "oracle"), "recall"],
        found.loc[("permuted", "oracle"), "recall"],
    ) == (1, 1)
    assert found["recall"].between(0, 1).all()
    share = found["kept"] / found["searched"]
    # The same units whatever their order; no choice holds more than the heaviest units.
    assert share["real", "oracle"] == pytest.approx(share["permuted", "oracle"])
    assert (share <= best_mass(seen, k) + 1e-9).all()
    units = seen.tree.units(seen.blocks.last)
    deep = units > k // 2
    for keys in ("real", "permuted"):
        chance = (k // 2 / units[deep]).mean().item()
        assert found.loc[(keys, "blind"), "recall"] == pytest.approx(chance, abs=0.12)
        assert found.loc[(keys, "centre"), "recall"] > found.loc[(keys, "blind"), "recall"]


def test_recall_of_the_centre_equals_a_count_by_hand():
    seen, _, _ = seen_map()
    found = compare_rules(seen, 16, seed=0).set_index(["keys", "rule"])
    units, rates, kept = seen.tree.units(seen.blocks.last), [], 0.0
    score = table_score(seen.scores, "centre", torch.Generator())
    tree = tree_search(units, 8, (1, 4), score)
    for h in range(4):
        for m, count in enumerate(units.tolist()):
            if count <= 8:
                continue
            best = seen.scores[0, h, m, :count].topk(8).indices.tolist()
            mine = tree.units[0, h, m].tolist()
            rates.append(len(set(best) & set(mine)) / 8)
            kept += seen.mass[0, h, m, mine].sum().item()
    assert found.loc[("real", "centre"), "recall"] == pytest.approx(sum(rates) / len(rates))
    assert found.loc[("real", "centre"), "kept"] == pytest.approx(kept)


def test_random_order_takes_locality_away_and_nothing_else():
    """Scores that fall with the distance from one unit: a tree finds them, unless neighbours are strangers."""
    seen, _, _ = seen_map(601)
    distance = (torch.arange(seen.scores.shape[-1]) - 40.0).abs()
    smooth = type(seen)(
        -distance.expand_as(seen.scores).contiguous(), seen.mass, seen.blocks, seen.tree
    )
    found = compare_rules(smooth, 16, seed=0).set_index(["keys", "rule"])["recall"]
    assert found["real", "centre"] > 0.9
    assert found["permuted", "centre"] < 0.6


def test_branches_are_right_with_the_best_unit_and_at_the_last_split():
    seen, _, _ = seen_map(601)
    best = branch_hits(seen, 16, "oracle", permuted=False, seed=0)
    assert (best["right"] == 1).all()
    assert best["size"].tolist() == [1, 2, 4, 8, 16]
    for permuted in (False, True):
        centre = branch_hits(seen, 16, "centre", permuted, seed=0).set_index("size")["right"]
        assert centre[1] > 0.95  # halves of one unit, or of one and two
        assert (centre[[8, 16]] < 0.8).all()
        assert (centre > 0.4).all()
    with pytest.raises(ValueError, match="nothing to search"):
        branch_hits(seen_map(40)[0], 32, "centre", False, 0)


def test_random_representatives_lie_inside():
    table = torch.arange(40.0).expand(1, 1, 1, -1)
    score = table_score(table, "random", torch.Generator().manual_seed(0))
    start, size = torch.full((1, 1, 1, 500), 10), torch.full((1, 1, 1, 500), 6)
    assert score(start, size, 0).unique().tolist() == [10, 11, 12, 13, 14, 15]


def test_counts_are_those_of_a_prefill():
    query, key, value = tensors(500, 1, 1)
    method = HiPAttention(k=16, block_q=16, window=12, sink=3, dense_layers=0)
    method.prefill(query, key, value, scale=0.3, layer=0)
    searched, everything = count_candidates(500, 16, 16, 12, 3)
    assert searched == pytest.approx(method.evaluations, rel=0.02)
    units = [max(0, math.ceil((min(16 * m + 16, 500) - 15) / 2)) for m in range(32)]
    assert everything == sum(units)


def test_noise_differs_from_call_to_call():
    score = noise(torch.Generator().manual_seed(0))
    start = torch.zeros(1, 1, 1, 8, dtype=torch.long)
    assert not torch.equal(score(start, start, 0), score(start, start, 0))


def test_pooled_blocks_of_the_nearest_density():
    for density in (0.2, 0.3, 0.8):
        made = pooled_of_density(density, 320, 16)
        query, key, value = (x.float() for x in tensors(320))
        made.prefill(query, key, value, scale=0.3, layer=0)
        assert made.density() == pytest.approx(density, abs=0.05)


def test_blocks_of_the_map_are_those_of_the_method():
    seen, query, key = seen_map(150)
    (blocks,) = HiPAttention(**SETTINGS).blocks(query, key)
    for ours, own in zip(seen.blocks, blocks, strict=True):
        assert torch.equal(ours, own)
    assert torch.equal(query_blocks(150, 150, 16, 2).last, seen.blocks.last)


def test_the_methods_table_is_paired_by_prompt():
    rows = [("dense", 1.0, 100.0, 2.0, 1.0), ("HiP", 0.2, 100.0, 2.5, 1.0)]
    rows += [("dense", 1.0, 0.0, 3.0, 1.0), ("HiP", 0.4, 100.0, 4.5, 3.0)]
    rows += [("other", 0.1, 0.0, 5.0, 2.0)]
    columns = ["method", "density", "right", "prose NLL", "answer NLL"]
    main = pd.DataFrame(rows, columns=columns, index=[0, 0, 1, 1, 1]).rename_axis("item")
    table = methods_table(main).set_index("method")
    assert table.loc["HiP", "prompts"] == 2
    assert table.loc["HiP", "density"] == pytest.approx(0.3)
    assert table.loc["HiP", "prose NLL above dense"] == pytest.approx(1.0)
    assert table.loc["HiP", "prose NLL, s.e."] == pytest.approx(0.5)
    assert table.loc["dense", "answer NLL above dense"] == 0
    assert table.loc["other", "prose NLL above dense"] == 2  # against its own prompt
    assert table.loc["dense", "probability, % of dense"] == pytest.approx(100)
    whole = math.exp(-1) + math.exp(-1)
    assert table.loc["HiP", "probability, % of dense"] == pytest.approx(
        100 * (math.exp(-1) + math.exp(-3)) / whole
    )
    assert table.loc["other", "probability, % of dense"] == pytest.approx(100 * math.exp(-1))
    assert math.isnan(table.loc["other", "prose NLL, s.e."])


def test_searches_of_heads_are_drawn_under_their_recall():
    start, size = torch.tensor([0, 3]), torch.tensor([3, 2])
    whole = [x.expand(1, 3, 2, -1) for x in (start, size)]
    trace = [(*whole, torch.arange(12.0).view(1, 3, 2, 2))]
    table = torch.arange(30.0).view(1, 3, 2, 5)
    found = torch.tensor([[1]]).expand(1, 3, 2, 1)
    fig = draw_searches(trace, found, table, {2: 1.0, 0: 0.5})
    titles = [axis.get_title() for axis in fig.axes]
    assert titles == [f"head {h}: {p} % of the best units found" for h, p in ((2, 100), (0, 50))]
    drawn = fig.axes[0].images[0].get_array()
    assert drawn[0].tolist() == [8, 8, 8, 9, 9]
    assert drawn[1].tolist() == [20, 21, 22, 23, 24]
    assert fig.axes[0].get_xlabel() == ""
    assert fig.axes[1].get_xlabel() == "unit of keys"
    plt.close("all")
