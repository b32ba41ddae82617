"""Oracles of HiP attention."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from reattend.attention.dense import dense_attention, repeat_key_heads
from reattend.attention.host import attach
from reattend.attention.kv_selection import Combined
from reattend.long_context import hip_attention
from reattend.long_context.hip_attention import (
    Found,
    HiPAttention,
    HiPDecoding,
    Tree,
    first_intervals,
    halves,
    oracle_score,
    query_blocks,
    representative_unit,
    rounds_needed,
    sampled_score,
    score_of,
    tree_search,
    unit_scores,
)

SCALE = 0.25
SMALL = {"block_q": 16, "query_stride": 2, "block_k": 2, "window": 20, "sink": 3, "dense_layers": 0}
# batch, query heads, key heads, queries, keys, changes of the settings
SHAPES = [
    pytest.param(1, 2, 2, 160, 160, {}, id="whole"),
    pytest.param(2, 6, 2, 211, 211, {}, id="grouped, odd length"),
    pytest.param(2, 4, 1, 77, 190, {}, id="chunk that starts inside a block"),
    pytest.param(
        1, 3, 3, 201, 201, {"block_q": 32, "window": 7}, id="window narrower than a block"
    ),
    pytest.param(1, 2, 1, 149, 149, {"block_k": 3, "sink": 0, "query_stride": 5}, id="units of 3"),
]
RULES = ("centre", "first", "last", "oracle")


def tensors(batch, heads, key_heads, queries, keys, seed=0, dtype=torch.float64, dim=16):
    """Keys that resemble their neighbours, queries that look for some of them."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(batch, key_heads, keys, dim, generator=generator, dtype=dtype).cumsum(2)
    key = walk / walk.std()
    query = 2 * torch.randn(batch, heads, queries, dim, generator=generator, dtype=dtype)
    value = torch.randn(batch, key_heads, keys, dim, generator=generator, dtype=dtype)
    return query, key, value


def method_of(k=24, **changes):
    return HiPAttention(k=k, **(SMALL | changes))


def prefill(method, query, key, value):
    return method.prefill(query, key, value, scale=SCALE, layer=0)


def selected(method, query, key):
    """(sequence, head, block) -> the units found, as a list."""
    found, first = {}, 0
    for blocks in method.blocks(query, key):
        part = method.select(query, key, blocks)
        for b, h, m in torch.cartesian_prod(
            *(torch.arange(n) for n in part.units.shape[:3])
        ).tolist():
            found[b, h, first + m] = part.units[b, h, m][part.real[b, h, m]].tolist()
        first += len(blocks.positions)
    return found


def pair_mask(method, query, key):
    """Pairs that are attended, from the units found: in plain loops."""
    tree, keys = method.tree, key.shape[2]
    offset = keys - query.shape[2]
    mask = torch.zeros(*query.shape[:3], keys, dtype=torch.bool)
    for (b, h, m), units in selected(method, query, key).items():
        block = offset // tree.block_q + m
        for p in range(max(offset, block * tree.block_q), min(keys, (block + 1) * tree.block_q)):
            row = mask[b, h, p - offset]
            row[max(p - tree.window + 1, 0) : p + 1] = True
            row[: min(tree.sink, p + 1)] = True
            for unit in units:
                for j in range(
                    tree.sink + unit * tree.block_k, tree.sink + (unit + 1) * tree.block_k
                ):
                    if j <= p - tree.window:
                        row[j] = True
    return mask


# The output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "heads", "key_heads", "queries", "keys", "changes"), SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_output_is_dense_attention_over_what_was_found(
    batch, heads, key_heads, queries, keys, changes, rule
):
    query, key, value = tensors(batch, heads, key_heads, queries, keys)
    method = method_of(**changes, representative=rule)
    mask = pair_mask(method, query, key)
    expected = dense_attention(query, key, value, mask=mask, scale=SCALE)
    torch.testing.assert_close(prefill(method, query, key, value), expected, atol=1e-10, rtol=1e-10)
    pairs = queries * keys - queries * (queries - 1) // 2
    share = mask.sum((-2, -1)).double() / pairs
    torch.testing.assert_close(method.densities()[0].double(), share.mean(0), atol=1e-6, rtol=1e-6)
    assert share.max() < 0.9


@pytest.mark.parametrize(("batch", "heads", "key_heads", "queries", "keys", "changes"), SHAPES)
def test_with_room_for_all_it_is_dense(batch, heads, key_heads, queries, keys, changes):
    query, key, value = tensors(batch, heads, key_heads, queries, keys)
    expected = dense_attention(query, key, value, causal=True, scale=SCALE)
    tree = method_of(**changes).tree
    room = keys - tree.window - tree.sink + tree.block_k
    for k in (1.0, 10_000, room):
        method = method_of(k, **changes)
        torch.testing.assert_close(prefill(method, query, key, value), expected)
        assert method.density() == 1
    less = method_of(room - 2 * tree.block_k, **changes)
    prefill(less, query, key, value)
    assert less.density() < 1


def test_room_for_all_holds_in_the_sparse_path_too(monkeypatch):
    query, key, value = tensors(2, 4, 2, 90, 90)
    monkeypatch.setattr(Tree, "saves_from", lambda self: 1)
    expected = dense_attention(query, key, value, causal=True, scale=SCALE)
    torch.testing.assert_close(prefill(method_of(200), query, key, value), expected)


def test_without_a_budget_it_is_streaming_token_by_token():
    query, key, value = tensors(1, 2, 1, 120, 120)
    position = torch.arange(120)
    distance = position[:, None] - position
    mask = (distance >= 0) & ((distance < 20) | (position < 3))
    expected = dense_attention(query, key, value, mask=mask[None, None], scale=SCALE)
    torch.testing.assert_close(prefill(method_of(0), query, key, value), expected)


def test_parts_of_the_blocks_change_nothing(monkeypatch):
    query, key, value = tensors(2, 4, 2, 200, 200)
    whole, parts = method_of(), method_of()
    monkeypatch.setattr(hip_attention, "GATHERED_NUMBERS", 1 << 40)
    assert len(whole.blocks(query, key)) == 1
    expected = prefill(whole, query, key, value)
    monkeypatch.setattr(hip_attention, "GATHERED_NUMBERS", 1)
    assert len(parts.blocks(query, key)) == 13
    torch.testing.assert_close(prefill(parts, query, key, value), expected)
    assert parts.evaluations == whole.evaluations > 0
    assert parts.density() == pytest.approx(whole.density())


def test_gradients_are_those_of_masked_dense_attention():
    plain = [x.requires_grad_() for x in tensors(1, 4, 2, 90, 90)]
    mask = pair_mask(method_of(), *plain[:2])
    for attend in (
        lambda: prefill(method_of(), *plain),
        lambda: dense_attention(*plain, mask=mask, scale=SCALE),
    ):
        attend().square().sum().backward()
    # Both passes add to the same gradients: half of the sum is what each gave, if they agree.
    total = [x.grad.clone() for x in plain]
    for x in plain:
        x.grad = None
    dense_attention(*plain, mask=mask, scale=SCALE).square().sum().backward()
    for both, x in zip(total, plain, strict=True):
        torch.testing.assert_close(both, 2 * x.grad)


@pytest.mark.parametrize("rule", RULES)
def test_the_future_of_a_block_does_not_reach_it(rule):
    query, key, value = tensors(1, 4, 2, 160, 160)
    method = method_of(representative=rule)
    before = prefill(method, query, key, value)
    later = [x.clone() for x in (query, key, value)]
    for x in later:
        x[:, :, 96:] = 9 * torch.randn(x[:, :, 96:].shape, dtype=x.dtype)
    after = prefill(method, *later)
    torch.testing.assert_close(after[:, :, :96], before[:, :, :96])
    # Of its own block a query sees no later value either.
    values = value.clone()
    values[:, :, 101:] += 5
    after = prefill(method, query, key, values)
    torch.testing.assert_close(after[:, :, :101], before[:, :, :101])


# The search ---------------------------------------------------------------------------------------


def loop_search(table, units, nodes, rule):
    """One head and block in plain Python, from the description."""
    intervals = [(i * units // nodes, (i + 1) * units // nodes) for i in range(nodes)]
    intervals = [pair for pair in intervals if pair[0] < pair[1]]
    scored, rounds = 0, max(0, math.ceil(math.log2(units / nodes))) if units else 0
    for _ in range(rounds):
        children = []
        for begin, end in intervals:
            middle = begin + (end - begin) // 2
            children += [pair for pair in ((begin, middle), (middle, end)) if pair[0] < pair[1]]

        def value(pair):
            begin, end = pair
            return {
                "first": table[begin],
                "last": table[end - 1],
                "centre": table[begin + (end - begin) // 2],
                "oracle": max(table[begin:end]),
            }[rule]

        scored += len(children)
        intervals = sorted(children, key=value, reverse=True)[:nodes]
    return sorted(begin for begin, _ in intervals), scored


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("units", "nodes"), [(64, 8), (61, 8), (100, 7), (9, 8), (8, 8), (5, 8), (0, 8)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_equals_plain_loops(units, nodes, rule, seed):
    table = torch.randn(2, 3, 1, max(units, 1), generator=torch.Generator().manual_seed(seed))

    def score(start, size, first):
        unit = representative_unit(start, size, rule)
        return table.gather(-1, unit)

    found = tree_search(
        torch.tensor([units]), nodes, (2, 3), oracle_score(table) if rule == "oracle" else score
    )
    total = 0
    for b in range(2):
        for h in range(3):
            expected, scored = loop_search(table[b, h, 0].tolist(), units, nodes, rule)
            assert found.units[b, h, 0][found.real[b, h, 0]].tolist() == expected
            assert len(expected) == min(units, nodes)
            total += scored
    assert found.evaluations == total


def test_blocks_of_different_depth_are_searched_as_alone():
    table = torch.randn(1, 2, 4, 90, generator=torch.Generator().manual_seed(0))
    units = torch.tensor([3, 16, 33, 90])

    def score(start, size, first):
        return table[:, :, first:].gather(-1, representative_unit(start, size, "centre"))

    found = tree_search(units, 8, (1, 2), score)
    for h in range(2):
        for m, count in enumerate(units.tolist()):
            expected, _ = loop_search(table[0, h, m].tolist(), count, 8, "centre")
            assert found.units[0, h, m][found.real[0, h, m]].tolist() == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("block_q", "block_k", "stride"), [(16, 1, 1), (16, 2, 2), (7, 3, 3), (32, 4, 32)]
)
def test_with_the_best_of_each_interval_the_search_is_exact(seed, block_q, block_k, stride):
    """So whatever a tree misses, its representatives have missed."""
    query, key, _ = tensors(2, 4, 2, 173, 173, seed=seed)
    changes = {"block_q": block_q, "block_k": block_k, "query_stride": stride}
    method = method_of(8 * block_k, **changes, representative="oracle")
    tree, deep = method.tree, 0
    for (b, h, m), units in selected(method, query, key).items():
        last = min((m + 1) * block_q, 173) - 1
        queries = range(last, m * block_q - 1, -stride)
        count = max(0, math.ceil((last + 1 - tree.window - tree.sink) / block_k))
        best = []
        for unit in range(count):
            keys = range(tree.sink + unit * block_k, tree.sink + (unit + 1) * block_k)
            pairs = [(p, j) for p in queries for j in keys if j <= p - tree.window]
            products = [query[b, h, p].dot(key[b, h // 2, j]).item() for p, j in pairs]
            best.append(max(products, default=-math.inf))
        order = sorted(range(count), key=lambda unit: -best[unit])[:8]
        assert units == sorted(order)
        deep += count > 32
    assert deep > 0


def test_a_tree_of_representatives_is_not_exact():
    query, key, _ = tensors(1, 4, 2, 300, 300)
    exact = selected(method_of(8, representative="oracle"), query, key)
    found = {rule: selected(method_of(8, representative=rule), query, key) for rule in RULES[:3]}
    assert all(units != exact for units in found.values())
    assert found["centre"] != found["first"] != found["last"]


@pytest.mark.parametrize("nodes", [1, 3, 8])
def test_intervals_cover_the_units_and_halves_their_parents(nodes):
    start, size = first_intervals(torch.tensor([5, 8, 29]), nodes)
    assert size.sum(-1).tolist() == [5, 8, 29]
    assert torch.equal(start[:, 1:], (start + size)[:, :-1])
    assert (size.amax(-1) - size.amin(-1)).max() <= 1
    starts, sizes = halves(start, size)
    assert torch.equal(sizes.unflatten(-1, (-1, 2)).sum(-1), size)
    assert torch.equal(starts[:, ::2], start)
    assert torch.equal(starts[:, 1::2], start + sizes[:, ::2])
    assert ((sizes[:, 1::2] - sizes[:, ::2]) <= 1).all()


@pytest.mark.parametrize(
    ("units", "nodes"), [(478, 64), (478, 16), (512, 16), (513, 16), (16, 16), (1, 7)]
)
def test_rounds_and_evaluations(units, nodes):
    rounds = max(0, math.ceil(math.log2(units / nodes)))
    assert rounds_needed(units, nodes) == rounds
    asked = []

    def score(start, size, first):
        asked.append(size)
        return torch.rand(start.shape)

    found = tree_search(torch.tensor([units]), nodes, (1, 1), score)
    assert len(asked) == rounds
    assert found.evaluations <= 2 * nodes * rounds
    if units % nodes == 0 and math.log2(units / nodes).is_integer():
        assert found.evaluations == 2 * nodes * rounds
    if rounds:
        assert asked[-1].max() == 1  # resolved
        assert asked[-1].numel() == 2 * nodes


@pytest.mark.parametrize("place", [40, 99, 101, 170])
@pytest.mark.parametrize("rule", RULES)
def test_scores_that_fall_with_distance_are_found_as_one_neighbourhood(place, rule):
    distance = (torch.arange(200) - place).abs()
    table = -distance.double().expand(1, 1, 1, -1)

    def score(start, size, first):
        return table.gather(-1, representative_unit(start, size, rule))

    how = oracle_score(table) if rule == "oracle" else score
    units = tree_search(torch.tensor([200]), 12, (1, 1), how).units[0, 0, 0]
    assert torch.equal(units, torch.arange(12) + units[0])
    assert units[0] <= place <= units[-1]


def test_the_centre_by_hand():
    start, size = torch.tensor([10, 10, 10, 10]), torch.tensor([1, 2, 3, 4])
    assert representative_unit(start, size, "centre").tolist() == [10, 11, 11, 12]
    assert representative_unit(start, size, "first").tolist() == [10] * 4
    assert representative_unit(start, size, "last").tolist() == [10, 11, 12, 13]


def test_range_maxima():
    table = torch.randn(1, 1, 2, 37, generator=torch.Generator().manual_seed(0))
    score = oracle_score(table)
    for size in range(1, 38):
        start = torch.arange(38 - size)
        got = score(start.expand(1, 1, 2, -1), torch.full((1, 1, 2, len(start)), size), 0)
        expected = torch.stack([table[..., s : s + size].amax(-1) for s in start], dim=-1)
        torch.testing.assert_close(got, expected)
    one = score(torch.tensor([[[[3]]]]), torch.tensor([[[[5]]]]), 1)  # the second block alone
    assert one == table[0, 0, 1, 3:8].max()


# What is scored ------------------------------------------------------------------------------------


def test_gathered_scores_are_those_of_the_table():
    query, key, _ = tensors(2, 4, 2, 130, 171)
    blocks, tree = query_blocks(130, 171, 16, 2), method_of().tree
    table = unit_scores(query, key, blocks, tree)
    units = torch.arange(table.shape[-1]).expand(2, 4, len(blocks.positions), -1)
    score = sampled_score(query, key, blocks, tree)
    torch.testing.assert_close(score(units, torch.ones_like(units), 0), table)
    torch.testing.assert_close(
        score(units[:, :, 3:], torch.ones_like(units)[:, :, 3:], 3), table[:, :, 3:]
    )


def test_every_second_query_is_scored_from_the_last_one_back():
    blocks = query_blocks(40, 71, 16, 2)  # positions 31 to 70
    scored = [row[real].tolist() for row, real in zip(blocks.scored, blocks.is_scored, strict=True)]
    assert scored == [[31], [*range(47, 31, -2)], [*range(63, 47, -2)], [70, 68, 66, 64]]
    real = [row[real].tolist() for row, real in zip(blocks.positions, blocks.real, strict=True)]
    assert real == [[31], [*range(32, 48)], [*range(48, 64)], [*range(64, 71)]]
    assert query_blocks(16, 16, 16, 16).scored.tolist() == [[15]]


def test_queries_that_are_not_scored_do_not_choose():
    query, key, _ = tensors(1, 2, 1, 128, 128)
    method = method_of()
    before, other = selected(method, query, key), query.clone()
    other[:, :, ::2] = 100 * torch.randn(query[:, :, ::2].shape, dtype=query.dtype)
    assert selected(method, other, key) == before
    other[:, :, 1::2] *= -1
    assert selected(method, other, key) != before


def test_pairs_inside_the_window_do_not_score():
    """The first scored query of a block still reads the end of the region in its own window."""
    query, key, _ = torch.zeros(1, 1, 160, 4), torch.zeros(1, 1, 160, 4), None
    query[..., 0] = 1.0
    method = method_of(8)
    # Block 9 is positions 144 to 159: its region ends at 139, the window of 145 begins at 126.
    key[0, 0, 30, 0], key[0, 0, 139, 0] = 3.0, 5.0
    query[0, 0, 159] = 0.0  # the only scored query whose window has left 139 behind
    units = selected(method, query, key)[0, 0, 9]
    table = unit_scores(query, key, query_blocks(160, 160, 16, 2), method.tree)[0, 0, 9]
    assert table[(139 - 3) // 2] == 0
    assert table[(30 - 3) // 2] == 3
    assert len(units) == 4


def test_scores_are_the_largest_unscaled_product():
    query, key, _ = tensors(1, 2, 1, 64, 64, seed=3)
    tree = Tree(8, 16, 2, 2, 20, 3, "centre")
    table = unit_scores(query, key, query_blocks(64, 64, 16, 2), tree)
    expected = max(
        query[0, 1, p].dot(key[0, 0, j]).item()
        for p in range(49, 64, 2)
        for j in (3 + 2 * 5, 4 + 2 * 5)
        if j <= p - 20
    )
    assert table[0, 1, 3, 5].item() == pytest.approx(expected)


def test_heads_and_sequences_search_alone():
    query, key, value = tensors(3, 6, 2, 150, 150)
    together = prefill(method_of(), query, key, value)
    for b in range(3):
        alone = prefill(method_of(), query[b : b + 1], key[b : b + 1], value[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone)
    repeated = prefill(method_of(), query, *(repeat_key_heads(x, 6) for x in (key, value)))
    torch.testing.assert_close(together, repeated)
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    moved = prefill(
        method_of(), query[:, order], *(repeat_key_heads(x, 6)[:, order] for x in (key, value))
    )
    torch.testing.assert_close(moved, together[:, order])


def test_the_authors_draft_finds_the_same_units():
    """Their CPU draft (v1.1, first unit, b_q = 2, b_k = 2, no sinks) on these numbers, last blocks."""
    step = torch.arange(96, dtype=torch.float64)[:, None]
    rate = torch.arange(1, 9, dtype=torch.float64)
    query, key = torch.sin(0.7 * step * rate + rate), torch.cos(0.11 * step * rate**1.5)
    tree, blocks = Tree(16, 2, 2, 2, 8, 0, "first"), query_blocks(96, 96, 2, 2)
    query, key = query[None, None], key[None, None]
    found = tree_search(tree.units(blocks.last), 8, (1, 1), score_of(query, key, blocks, tree))
    assert found.units[0, 0, -6:].tolist() == OFFICIAL


OFFICIAL = [
    [3, 9, 10, 11, 12, 13, 20, 35],
    [8, 13, 14, 15, 17, 18, 25, 36],
    [0, 10, 11, 21, 28, 32, 33, 38],
    [2, 3, 5, 6, 7, 26, 28, 36],
    [3, 4, 10, 11, 14, 21, 29, 40],
    [11, 12, 15, 16, 17, 22, 38, 40],
]


# Cost ----------------------------------------------------------------------------------------------


def test_evaluations_are_counted_and_grow_like_t_log_t():
    counts = {}
    for length in (2048, 8192):
        blocks = query_blocks(length, length, 32, 2)
        tree = Tree(64, 32, 2, 2, 64, 4, "centre")
        found = tree_search(
            tree.units(blocks.last), 32, (1, 1), lambda start, size, first: torch.rand(start.shape)
        )
        # 2 c candidates in each of ceil(log2(B / c)) rounds, less the empty halves of the last one.
        units = [math.ceil(max(0, 32 * (m + 1) - 68) / 2) for m in range(length // 32)]
        most = sum(64 * math.ceil(math.log2(n / 32)) for n in units if n > 32)
        assert 0.85 * most < found.evaluations <= most
        counts[length] = found.evaluations
    assert 1.0 < math.log(counts[8192] / counts[2048], 4) < 1.35


# Decoding ------------------------------------------------------------------------------------------


def decode_once(method, query, key, value):
    method.begin_decoding(query[:, :, :-1], key[:, :, :-1], scale=SCALE, layer=0)
    return method.decode(query[:, :, -1:], key, value, scale=SCALE, layer=0)


DECODING = {"k": 24, "window": 20, "sink": 3, "dense_layers": 0}


@pytest.mark.parametrize("rule", RULES)
def test_a_token_reads_what_a_block_of_one_query_reads(rule):
    query, key, value = tensors(2, 6, 2, 150, 150)
    method = HiPDecoding(**DECODING, representative=rule)
    output = decode_once(method, query, key, value)
    alone = method_of(block_q=1, query_stride=1, representative=rule)
    expected = prefill(alone, query, key, value)[:, :, -1:]
    torch.testing.assert_close(output, expected)
    mask = pair_mask(alone, query, key)[:, :, -1]
    assert method.kv_reads == mask.unflatten(1, (2, 3)).any(2).sum()
    share = mask.double().mean(-1).mean(0)
    torch.testing.assert_close(method.densities("decode")[0].double(), share, atol=1e-6, rtol=1e-6)
    # ceil(log2(64 / 12)) = 3 rounds of at most 24 units of 2 keys, each half an entry.
    assert 0.8 * 12 * 3 * 24 < method.selection_reads <= 12 * 3 * 24


def test_a_search_is_reused_while_window_and_sinks_follow():
    query, key, _ = tensors(1, 2, 1, 160, 160)
    method = HiPDecoding(**DECODING, refresh=3)
    method.begin_decoding(query[:, :, :150], key[:, :, :150], scale=SCALE, layer=0)
    state, reads = method.states(0)[0], []
    found = []
    for t in range(150, 160):
        keys = key[:, :, : t + 1]
        chosen = method.choose(query[:, :, t : t + 1], keys, state, scale=SCALE)
        assert chosen.shape == (1, 2, t + 1)
        assert chosen[..., -20:].all()
        assert chosen[..., :3].all()
        found.append(state.found[..., :130])
        reads.append(method.selection_reads)
    searched = [bool(after > before) for before, after in zip([0, *reads], reads, strict=False)]
    assert searched == [True, False, False] * 3 + [True]
    assert all(torch.equal(found[n], found[n - n % 3]) for n in range(10))
    assert not torch.equal(found[0], found[3])


def test_what_leaves_the_window_waits_for_the_next_search():
    query, key, _ = tensors(1, 2, 1, 160, 160)
    key[:, :, 131] = 50 * query[:, :1, 150:160].mean(2)  # leaves the window at token 151
    query[:, :, 150:] = query[:, :1, 150:160].mean(2, keepdim=True)
    method = HiPDecoding(**DECODING, refresh=4)
    method.begin_decoding(query[:, :, :150], key[:, :, :150], scale=SCALE, layer=0)
    state, seen = method.states(0)[0], []
    for t in range(150, 156):
        chosen = method.choose(query[:, :, t : t + 1], key[:, :, : t + 1], state, scale=SCALE)
        seen.append(bool(chosen[0, 0, 131]))
    assert seen == [True, False, False, False, True, True]


# Settings and models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": -1},
        {"k": 1.5},
        {"block_q": 0},
        {"query_stride": 0},
        {"block_k": 0},
        {"window": 0},
        {"sink": -1},
        {"representative": "center"},
        {"dense_layers": -1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HiPAttention(**wrong)


def test_refresh_must_be_a_count():
    with pytest.raises(ValueError, match="refresh"):
        HiPDecoding(refresh=0)


@pytest.mark.parametrize("budget", [24, 25, 0, 0.25])
def test_saves_from_is_where_something_is_left_out(budget):
    method = method_of(budget)
    enough = method.saves_from("prefill")
    assert method.saves_from("decode") is None
    for keys, sparse in ((enough - 1, False), (enough, True)):
        method.clear()
        prefill(method, *tensors(1, 1, 1, keys, keys))
        assert (method.density() < 1) == sparse
    assert method_of(1.0).saves_from("prefill") is None


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_the_first_layers_stay_dense_in_both_phases():
    model, prompt = (
        tiny_llama(),
        torch.randint(97, (1, 120), generator=torch.Generator().manual_seed(0)),
    )
    settings = {"window": 20, "sink": 3, "k": 16, "dense_layers": 2}
    method = Combined(HiPAttention(**settings, block_q=16), HiPDecoding(**settings, refresh=2))
    with attach(model, method):
        cache = DynamicCache(config=model.config)
        model(prompt, past_key_values=cache)
        for token in (5, 6, 7):
            model(torch.tensor([[token]]), past_key_values=cache)
    for phase in ("prefill", "decode"):
        densities = method.densities(phase)
        assert (densities[:2] == 1).all()
        assert (densities[2] < 0.7).all()


def test_an_empty_find_is_nothing():
    found = tree_search(torch.tensor([0, 4]), 0, (1, 2), lambda *_: pytest.fail("nothing to score"))
    assert isinstance(found, Found)
    assert found.units.shape == (1, 2, 2, 0)
    assert found.evaluations == 0
