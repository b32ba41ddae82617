"""Oracles of routing attention: clusters, attention inside them, online k-means, causality."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reattend.attention.dense import dense_attention
from reattend.attention.positions import rotary
from reattend.attention.statistics import js_divergence
from reattend.language_modeling.routing_transformer import (
    RoutingAttention,
    balanced_members,
    centroid_scores,
    cluster_sums,
    commitment_loss,
    ema_step,
    gather_members,
    local_attention,
    local_mask,
    membership,
    pair_divergences,
    past_weights,
    query_key_products,
    random_members,
    repeated_pairs,
    routed_attention,
    routed_weights,
    same_centroid_mask,
    scatter_mean,
    spherical,
    spherical_kmeans,
    strided_members,
    unit_variance,
    without_self,
)
from reattend.trunks.language import Trunk, labelled_loss

KINDS = ["routing", "same_centroid", "random", "strided"]
LN2 = math.log(2)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixer(kind="routing", far_heads=2, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"block": 3, "clusters": 3, "window": 4} | options
    return RoutingAttention(8, 4, far_heads, kind, **settings).double()


def started(kind="routing", seed=0, length=12, **options):
    """A mixer in evaluation whose centroids were set by a training pass."""
    module = mixer(kind, seed=seed, **options)
    module(normal(2, length, 8, seed=seed + 50))
    module.move_centroids()
    return module.eval()


def assert_same_with_gradients(first, second, *inputs, **tolerances):
    torch.testing.assert_close(first, second, **tolerances)
    weights = normal(*first.shape, seed=99)
    for a, b in zip(
        torch.autograd.grad((first * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((second * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerances)


# --- clusters


@pytest.mark.parametrize("dim", [2, 5, 16])
def test_normalised_vectors_have_mean_zero_and_norm_sqrt_dim(dim):
    r = unit_variance(100 * normal(2, 3, 7, dim))
    torch.testing.assert_close(r.sum(-1), torch.zeros(2, 3, 7, dtype=torch.float64))
    torch.testing.assert_close(
        r.norm(dim=-1), torch.full((2, 3, 7), dim**0.5, dtype=r.dtype), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("clusters", [1, 2, 7])
def test_largest_product_is_nearest_centroid_when_norms_are_equal(seed, clusters):
    r = unit_variance(normal(2, 3, 11, 6, seed=seed))
    centroids = spherical(normal(3, clusters, 6, seed=seed + 1))
    distances = (r[..., :, None, :] - centroids[:, None]).norm(dim=-1)
    assert torch.equal(centroid_scores(r, centroids).argmax(-1), distances.argmin(-1))


def naive_members(scores, window):
    """Sort by (-score, position), keep the first ones, sort by position."""

    def best(column):
        order = sorted(range(len(column)), key=lambda i: (-column[i], i))
        return sorted(order[:window])

    return torch.tensor([[[best(c) for c in head] for head in row] for row in scores.mT.tolist()])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (9, 4), (13, 13), (8, 1)])
@pytest.mark.parametrize("levels", [0, 3])
def test_members_are_the_best_tokens_of_every_centroid(seed, length, window, levels):
    scores = normal(2, 3, length, 4, seed=seed)
    if levels:  # few distinct values, so that ties have to be broken
        scores = (scores * levels / 3).round()
    members = balanced_members(scores, window)
    assert torch.equal(members, naive_members(scores, window))


def test_a_window_longer_than_the_sequence_takes_every_token():
    members = balanced_members(normal(1, 1, 5, 2), 9)
    assert members.tolist() == [[[list(range(5))] * 2]]


def test_token_may_be_in_several_clusters_or_in_none():
    scores = torch.tensor([[[[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]]])
    members = balanced_members(scores, 2)
    assert membership(members, 3).tolist() == [[[2, 2, 0]]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_sets_are_disjoint_sorted_and_fresh(seed):
    torch.manual_seed(seed)
    members = random_members(2, 3, 13, 3, 4, None)
    counts = membership(members, 13)
    assert counts.max() == 1
    assert (counts.sum(-1) == 12).all()
    assert (members.diff(dim=-1) > 0).all()
    assert not torch.equal(members, random_members(2, 3, 13, 3, 4, None))


def test_strided_sets_have_one_remainder():
    members = strided_members(1, 1, 12, 3, None)
    assert members[0, 0].tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_sets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 disjoint sets of 5 positions > 14 tokens"):
        random_members(1, 1, 14, 3, 5, None)
    with pytest.raises(ValueError, match="13 tokens are no multiple of the stride 3"):
        strided_members(1, 1, 13, 3, None)
    with pytest.raises(ValueError, match="8 is not a multiple of 3 heads"):
        RoutingAttention(8, 3, 1, block=2, clusters=2, window=2)
    with pytest.raises(ValueError, match="3 tokens for 5 clusters"):
        spherical_kmeans(normal(1, 2, 3, 4), 5)


# --- attention inside clusters


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_one_cluster_of_everything_is_full_causal_attention(seed, length):
    raw = [normal(2, 3, length, 4, seed=seed + i).requires_grad_() for i in range(3)]
    q, k, v = unit_variance(raw[0]), unit_variance(raw[1]), raw[2]
    members = balanced_members(centroid_scores(q, normal(3, 1, 4)), length)
    routed = routed_attention(q, k, v, members, scale=0.5)
    dense = dense_attention(q, k, v, causal=True)  # dim 4: its scale is 0.5
    assert_same_with_gradients(routed, dense / (1 + 1e-5), *raw, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_disjoint_clusters_are_attention_under_a_block_mask(seed):
    q, k, v = (normal(2, 3, 12, 4, seed=seed + i).requires_grad_() for i in range(3))
    torch.manual_seed(seed)
    members = random_members(2, 3, 12, 3, 4, None)
    cluster = torch.empty(2, 3, 12, dtype=torch.long)
    cluster.scatter_(2, members.flatten(2), torch.arange(3).repeat_interleave(4).expand(2, 3, -1))
    mask = (cluster[..., :, None] == cluster[..., None, :]) & torch.ones(12, 12).tril().bool()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3) / (1 + 1e-5)
    routed = routed_attention(q, k, v, members, scale=0.3)
    assert_same_with_gradients(routed, expected, q, k, v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_overlapping_clusters_are_averaged_and_leftovers_are_zero(seed):
    q, k, v = (normal(2, 2, 11, 4, seed=seed + i).requires_grad_() for i in range(3))
    members = balanced_members(normal(2, 2, 11, 3, seed=seed + 3), 4)
    expected = torch.zeros_like(v)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 2, 11))).tolist():
        found = []
        for cluster in members[b, h].tolist():
            if i in cluster:
                keys = [j for j in cluster if j <= i]
                weights = (0.7 * k[b, h, keys] @ q[b, h, i]).softmax(0)
                found.append(weights @ v[b, h, keys])
        if found:
            expected[b, h, i] = torch.stack(found).sum(0) / (len(found) + 1e-5)
    routed = routed_attention(q, k, v, members, scale=0.7)
    assert_same_with_gradients(routed, expected, q, k, v)
    counts = membership(members, 11)
    assert (counts == 0).any()
    assert (counts > 1).any()
    assert (routed[counts == 0] == 0).all()


@pytest.mark.parametrize("attend_self", [True, False])
def test_dense_weights_reproduce_the_output(attend_self):
    q, k, v = (normal(2, 2, 11, 4, seed=i) for i in range(3))
    members = balanced_members(normal(2, 2, 11, 3, seed=3), 4)
    options = {"scale": 0.7, "attend_self": attend_self}
    weights = routed_weights(q, k, members, **options)
    torch.testing.assert_close(weights @ v, routed_attention(q, k, v, members, **options))


def test_inside_a_cluster_a_token_can_be_kept_from_itself():
    q, k = normal(1, 1, 6, 4), normal(1, 1, 6, 4, seed=1)
    members = torch.tensor([[[[1, 3, 4]]]])
    weights = routed_weights(q, k, members, scale=1.0, attend_self=False)[0, 0]
    assert (weights.diagonal() > 0.5).tolist() == [False, True, False, False, False, False]
    assert (weights > 0).int().sum(1).tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("eps", [1e-2, 1e-5])
def test_scatter_undoes_gather(eps):
    x = normal(2, 3, 10, 4)
    members = balanced_members(normal(2, 3, 10, 4, seed=1), 5)
    counts = membership(members, 10)[..., None]
    back = scatter_mean(gather_members(x, members), members, 10, eps)
    torch.testing.assert_close(back, x * counts / (counts + eps))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sorted_positions_make_the_triangle_the_position_mask(seed):
    members = balanced_members(normal(2, 2, 17, 4, seed=seed), 6)
    by_position = members[..., :, None] >= members[..., None, :]
    assert torch.equal(by_position, torch.ones(6, 6).tril().bool().expand_as(by_position))


@pytest.mark.parametrize(("length", "block"), [(1, 4), (7, 3), (12, 4), (5, 8)])
def test_local_attention_is_attention_under_its_mask(length, block):
    q, k, v = (normal(2, 3, length, 4, seed=i).requires_grad_() for i in range(3))
    mask = local_mask(length, block)[None, None]
    expected = dense_attention(q, k, v, mask=mask)
    assert_same_with_gradients(local_attention(q, k, v, block), expected, q, k, v)


def test_local_mask_reaches_one_block_back():
    assert local_mask(6, 2).sum(1).tolist() == [1, 2, 3, 4, 3, 4]


# --- causality


def change_the_future(module, length, at, seed=0):
    """Outputs before `at`, for two inputs that differ from `at` on."""
    x = normal(2, length, 8, seed=seed)
    other = x.clone()
    other[:, at:] = normal(2, length - at, 8, seed=seed + 1)
    with torch.no_grad():
        return module(x)[:, :at], module(other)[:, :at]


@pytest.mark.parametrize("kind", ["same_centroid", "strided"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_strictly_causal_kinds(kind, seed):
    torch.testing.assert_close(
        *change_the_future(started(kind, seed), 12, 7, seed), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusters_of_the_whole_row_leak_and_those_of_the_past_do_not(seed):
    module = started("routing", seed)
    first, second = change_the_future(module, 12, 7, seed)
    assert (first - second).abs().max() > 1e-3
    module.rule = "past"
    torch.testing.assert_close(*change_the_future(module, 12, 7, seed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_inside_given_clusters_nothing_flows_backwards(kind):
    module = started(kind)
    x = normal(2, 12, 8).requires_grad_()
    for at in (0, 5, 11):
        torch.manual_seed(0)
        (gradient,) = torch.autograd.grad(module(x)[:, at].sum(), x)
        assert (gradient[:, at + 1 :] == 0).all()


def test_without_self_leaves_only_those_who_meet_nobody():
    seen = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])
    expected = [[True, False, False], [True, False, False], [False, False, False]]
    assert without_self(seen).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("attend_self", [True, False])
def test_past_routing_is_routing_of_every_prefix(seed, levels, attend_self):
    q, k, v = (normal(2, 2, 11, 4, seed=seed + i).requires_grad_() for i in range(3))
    scores = normal(2, 2, 11, 3, seed=seed + 3)
    if levels:
        scores = (scores * levels / 2).round()
    options = {"scale": 0.7, "attend_self": attend_self}
    prefixes = []
    for end in range(1, 12):
        row = [x[:, :, :end] for x in (q, k, v)]
        members = balanced_members(scores[:, :, :end], 4)
        prefixes.append(routed_attention(*row, members, **options)[:, :, -1])
    past = past_weights(q, k, scores, 4, **options) @ v
    assert_same_with_gradients(past, torch.stack(prefixes, 2), q, k, v)


def test_same_centroid_mask_by_hand():
    scores = F.one_hot(torch.tensor([0, 1, 0, 1]), 2).double()[None, None]
    assert same_centroid_mask(scores)[0, 0].int().tolist() == [
        [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1],
    ]  # fmt: skip


# --- online k-means


def test_cluster_sums_are_sums_over_the_members():
    r, nearest = normal(2, 3, 9, 4), torch.randint(5, (2, 3, 9))
    sums, counts = cluster_sums(r, nearest, 6)
    for head in range(3):
        for cluster in range(6):
            inside = r[:, head][nearest[:, head] == cluster]
            torch.testing.assert_close(sums[head, cluster], inside.sum(0))
            assert counts[head, cluster] == len(inside)


@pytest.mark.parametrize("decay", [0.9, 0.999])
@pytest.mark.parametrize("count", [1, 5])
def test_moving_average_in_closed_form(decay, count):
    start, x = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    counts = torch.full((2, 3), float(count), dtype=torch.float64)
    moved = start
    for _ in range(20):
        moved = ema_step(moved, count * x, counts, decay)
    torch.testing.assert_close(moved, decay**20 * start + (1 - decay**20) * x)


def test_moving_average_as_printed_adds_half_the_sums():
    start, queries, keys = (normal(1, 2, 3, seed=i) for i in range(3))
    counts = torch.ones(1, 2, dtype=torch.float64)
    moved = ema_step(start, queries + keys, counts, 0.9, rule="sum")
    torch.testing.assert_close(moved, 0.9 * start + 0.05 * queries + 0.05 * keys)


def test_empty_clusters_stay():
    start = normal(1, 2, 3)
    counts = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    moved = ema_step(start, 2 * torch.ones_like(start), counts, 0.5)
    assert torch.equal(moved[0, 0], start[0, 0])
    torch.testing.assert_close(moved[0, 1], 0.5 * start[0, 1] + 0.5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kmeans_finds_well_separated_clusters(seed):
    directions = spherical(torch.eye(8, dtype=torch.float64)[:3])
    which = torch.randint(3, (4, 2, 50), generator=torch.Generator().manual_seed(seed))
    r = spherical(directions[which] + 0.05 * normal(4, 2, 50, 8, seed=seed))
    for attempt in range(20):  # a start with two centroids in one cluster may get stuck there
        torch.manual_seed(100 * seed + attempt)
        centroids = spherical_kmeans(r, 3)
        nearest = (centroids @ directions.T / 8).amax(-1)
        if (nearest > 0.99).all() and (centroids @ directions.T).argmax(-1).sort(
            -1
        ).values.tolist() == [[0, 1, 2]] * 2:
            return
    raise AssertionError("k-means never found the three directions")


def test_commitment_loss_and_its_gradient():
    r, centroids = normal(2, 3, 9, 4).requires_grad_(), normal(3, 5, 4, seed=1).requires_grad_()
    nearest = torch.randint(5, (2, 3, 9))
    loss = commitment_loss(r, nearest, centroids, 0.25)
    own = torch.stack([centroids[h][nearest[:, h]] for h in range(3)], 1).detach()
    gradient, stopped = torch.autograd.grad(loss, (r, centroids), allow_unused=True)
    torch.testing.assert_close(gradient, 2 * 0.25 * (r - own).detach() / r.numel())
    assert stopped is None
    assert commitment_loss(own, nearest, centroids, 0.25) == 0


def test_centroids_move_once_a_step_and_never_in_evaluation():
    module = mixer(decay=0.5)
    x = normal(2, 12, 8)
    module(x)
    before = module.centroids.clone()
    module(x)  # as with gradient checkpointing: the same batch again
    assert torch.equal(module.centroids, before)
    sums, counts = module.noted
    module.move_centroids()
    expected = spherical(ema_step(before, sums, counts, 0.5))
    torch.testing.assert_close(module.centroids, expected)
    module.move_centroids()
    torch.testing.assert_close(module.centroids, expected)
    module.eval()
    module(x)
    module.move_centroids()
    torch.testing.assert_close(module.centroids, expected)


def test_clustering_sends_no_gradient_but_the_commitment():
    module = mixer(commitment=0.0)
    module(normal(2, 12, 8))
    module.eval()
    x = normal(2, 12, 8, seed=1)
    weight = module.far.weight
    output = module(x).square().sum()
    (with_routing,) = torch.autograd.grad(output, weight)
    fixed = module.members(module.scores(unit_variance(module.heads_of(x, module.far, 2, 2)[0])))
    module.members = lambda scores: fixed
    (with_fixed,) = torch.autograd.grad(module(x).square().sum(), weight)
    torch.testing.assert_close(with_routing, with_fixed)
    assert not module.centroids.requires_grad


# --- the mixer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("far_heads", "attend_self"), [(0, True), (2, True), (4, False)])
def test_weights_belong_to_the_output(kind, far_heads, attend_self):
    module = started(kind, far_heads=far_heads, attend_self=attend_self)
    x = normal(2, 12, 8)
    near = module.heads_of(x, module.near, 3, 4 - far_heads)[2] if far_heads < 4 else None
    far = module.heads_of(x, module.far, 2, far_heads)[1] if far_heads else None
    values = torch.cat([part for part in (near, far) if part is not None], 1)
    torch.manual_seed(0)
    mixed = module.weights(x) @ values
    torch.manual_seed(0)
    torch.testing.assert_close(module(x), module.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("scaled", [True, False])
def test_logits_are_scaled_by_the_head_width_or_not_at_all(scaled):
    module = started(scaled=scaled, clusters=1, window=12)
    x = normal(1, 12, 8)
    r = unit_variance(module.heads_of(x, module.far, 2, 2)[0])
    expected = dense_attention(
        rotary(r), rotary(r), r, scale=0.5**0.5 if scaled else 1.0, causal=True, return_weights=True
    )[1]
    torch.testing.assert_close(module.weights(x)[:, 2:], expected / (1 + 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trunk_trains_with_it(kind):
    torch.manual_seed(0)
    model = Trunk(
        20,
        8,
        [lambda width: RoutingAttention(width, 4, 2, kind, block=3, clusters=3, window=4)] * 2,
    )
    tokens = torch.randint(20, (3, 12))
    loss = labelled_loss(model, tokens, tokens)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    routes = kind in ("routing", "same_centroid")
    assert (model.auxiliary_loss().item() > 0) == routes


def test_state_size_counts_keys_and_values():
    assert mixer().state_size(100) == 2 * (2 * 2 * 6 + 2 * 2 * 100)


# --- cost and divergence


@pytest.mark.parametrize(("length", "clusters"), [(64, 8), (256, 16), (144, 12), (256, 4)])
def test_counted_products(length, clusters):
    window, dim = length // clusters, 5
    q = normal(1, 1, length, dim)
    with FlopCounterMode(display=False) as counter:
        members = balanced_members(centroid_scores(q, normal(1, clusters, dim)), window)
        routed_weights(q, q, members, scale=1.0)
    products = query_key_products(length, clusters=clusters, window=window)
    assert counter.get_total_flops() == 2 * dim * (length * clusters + products)
    if clusters**2 == length:
        assert products == length**1.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergence_is_symmetric_and_bounded(seed):
    p, q = normal(20, 9, seed=seed).softmax(-1), normal(20, 9, seed=seed + 1).softmax(-1)
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p))
    assert ((js_divergence(p, q) > 0) & (js_divergence(p, q) < LN2)).all()
    assert (js_divergence(p, p) < 1e-12).all()
    ends = torch.eye(2, dtype=torch.float64)
    assert js_divergence(ends[0], ends[1]).item() == pytest.approx(LN2)


def test_divergences_of_pairs_by_hand():
    ends = torch.eye(2, dtype=torch.float64)
    local, other = ends[[0, 0, 0]], ends[[0, 1, 1]]
    nothing = torch.zeros(3, 2, dtype=torch.float64)
    nothing[2] = ends[1]
    found = pair_divergences(torch.stack([local, other, nothing])[None], near_heads=2)
    torch.testing.assert_close(found["local, local"], torch.tensor([0, LN2, LN2]).double())
    torch.testing.assert_close(found["local, far"], torch.tensor([LN2, 0]).double())
    assert "far, far" not in found
    later = pair_divergences(torch.stack([local, other])[None], near_heads=1, first_query=2)
    assert later["local, far"].tolist() == [pytest.approx(LN2)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_repeated_pairs_against_a_dictionary(seed):
    tokens, labels, distance = repeated_pairs(5, 40, 8, [3, 6], torch.Generator().manual_seed(seed))
    for row, label, gap in zip(tokens.tolist(), labels.tolist(), distance.tolist(), strict=True):
        memory, seen = {}, {}
        for place in range(0, 40, 2):
            key, value = row[place : place + 2]
            assert 0 <= key < 8 <= value < 16
            assert label[place] == memory.get(key, -100)
            assert memory.setdefault(key, value) == value
            assert gap[place] == (place - seen[key] if key in seen else 0)
            assert (label[place + 1], gap[place + 1]) == (-100, 0)
            seen[key] = place
        assert len(memory) in (2, 3, 4, 5, 6)


def test_repeated_pairs_that_do_not_fit_are_refused():
    for length, pool in ((7, 3), (8, 9)):
        with pytest.raises(ValueError, match=f"pairs of {pool} out of 8 keys in {length} tokens"):
            repeated_pairs(2, length, 8, [pool], torch.Generator())
