"""MambaRec: DREAM as released and as it is, MMD, InfoNCE, BPR, the graphs, fusion and the baselines."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.recommendation.baselines import (
    FREEDOM,
    VBPR,
    LightGCN,
    MatrixFactorisation,
    even_neighbour_graph,
    feature_loss,
    popularity,
    thinned,
)
from reattend.recommendation.mambarec import (
    BRANCHES,
    Batch,
    BatchNorm,
    Design,
    Dream,
    Graphs,
    Linear,
    MambaRec,
    ReleasedDream,
    Views,
    Weights,
    alignment_loss,
    bipartite,
    bpr,
    contrastive_loss,
    fuse,
    info_nce,
    layer_mean,
    mmd,
    neighbour_graph,
    objective,
    occurrences,
    recommendation_loss,
)

SEEDS = (0, 1, 2)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generators(seed)[0], dtype=torch.float64)


def interactions(copies, users, items, seed=0):
    return torch.rand(copies, users, items, generator=generators(seed)[0]) < 0.3


def rows_of(copies, batch, count, seed=0):
    return torch.randint(count, (copies, batch), generator=generators(seed)[0])


# Layers with several copies -----------------------------------------------------------------------


def test_copies_are_independent_and_drawn_like_torch_linear():
    layer = Linear(generators(3, 4), 7, 5)
    alone = Linear(generators(4), 7, 5)
    assert torch.equal(layer.weight[1], alone.weight[0])
    x = torch.randn(2, 6, 7)
    torch.testing.assert_close(layer(x)[1:], alone(x[1:]))
    wide = Linear(generators(0), 400, 300)
    plain = nn.Linear(400, 300)
    for ours, theirs in ((wide.weight, plain.weight), (wide.bias, plain.bias)):
        assert ours.abs().max().item() == pytest.approx(1 / 20, rel=0.02)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    assert wide.weight.mean().abs() < 1e-3


def test_batch_norm_of_a_copy_is_torchs_and_two_uses_move_its_statistics_twice():
    ours, theirs = BatchNorm(2, 5, uses=2).double(), nn.BatchNorm1d(5).double()
    x = normal(2, 9, 5) * 3 + 1
    found = ours(x)
    for _ in range(2):
        expected = theirs(x[1])
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(ours.running_mean.view(2, 5)[1], theirs.running_mean)
    torch.testing.assert_close(ours.running_var.view(2, 5)[1], theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x)[1], theirs(x[1]))


# DREAM --------------------------------------------------------------------------------------------


def shaken(module, seed):
    """The module with random gains, offsets and statistics, so that none of them is idle."""
    torch.manual_seed(seed)
    for norm in [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return module.double()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("width", [5, 8])
@pytest.mark.parametrize("training", [True, False])
def test_dream_is_the_released_module(seed, width, training):
    """Dilated convolutions on single pixels are linear layers: outputs and gradients agree."""
    released = shaken(ReleasedDream(width), seed).train(training)
    ours = Dream(generators(0), width, uses=1).double().load_released(released).train(training)
    x = normal(11, width, seed=seed).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, found = released(x), ours(y[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    direction = normal(11, width, seed=seed + 9)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-8, atol=1e-9)
    for branch, conv in enumerate(released.branches[1:4], 1):
        outer = conv.weight.grad.clone()
        outer[:, :, 1, 1] = 0
        assert not outer.any()
        own = ours.branches.weight.grad[0, :, branch * width : (branch + 1) * width].T
        torch.testing.assert_close(own, conv.weight.grad[:, :, 1, 1], rtol=1e-8, atol=1e-9)


def test_the_dilation_makes_no_difference_on_a_single_pixel_and_one_on_a_map():
    conv = nn.Conv2d(3, 4, 3, padding=6, dilation=6, bias=False).double()
    other = nn.Conv2d(3, 4, 3, padding=1, dilation=1, bias=False).double()
    other.load_state_dict(conv.state_dict())
    pixel, whole = normal(2, 3, 1, 1), normal(2, 3, 9, 9)
    torch.testing.assert_close(conv(pixel), other(pixel), rtol=1e-12, atol=1e-12)
    assert (conv(whole) - other(whole)).abs().max() > 0.1


def test_initial_weights_of_branches_are_those_of_the_convolutions():
    torch.manual_seed(0)
    width = 64
    ours, released = Dream(generators(0), width), ReleasedDream(width)
    for branch in range(BRANCHES):
        conv = released.branches[branch]
        conv = conv if isinstance(conv, nn.Conv2d) else conv[1]
        own = ours.branches.weight[0, :, branch * width : (branch + 1) * width]
        assert own.abs().max().item() == pytest.approx(conv.weight.abs().max().item(), rel=0.02)


@pytest.mark.parametrize("gate", ["released", "figure", "square", "none"])
def test_attention_is_a_number_per_item_times_c(gate):
    dream = Dream(generators(1, 2), 6, gate).double()
    c = dream.hidden(normal(2, 7, 6))
    assert c.shape == (2, 7, 30)
    assert (c >= 0).all()
    found = dream.attention(c)
    if gate in ("released", "figure"):
        spatial = torch.sigmoid((c * dream.spatial.weight[:, None, :, 0]).sum(-1, keepdim=True))
    if gate == "released":
        channel = F.relu((c * dream.channel.weight[:, None, :, 0]).sum(-1, keepdim=True))
        expected = torch.maximum(c * channel, c * spatial)
    elif gate == "figure":
        inner = F.relu(c @ dream.squeeze.weight) @ dream.excite.weight
        expected = torch.maximum(c * torch.sigmoid(inner), c * spatial)
    else:
        expected = c if gate == "square" else torch.ones_like(c)
    torch.testing.assert_close(found.expand_as(c), expected)


def test_without_gates_dream_is_a_plain_hidden_layer():
    dream = Dream(generators(1), 6, "none").double()
    x = normal(1, 9, 6)
    hidden = F.relu(F.batch_norm(x[0] @ dream.branches.weight[0], None, None, training=True))
    expected = F.relu(F.batch_norm(hidden @ dream.out.weight[0], None, None, training=True))
    torch.testing.assert_close(dream(x)[0], expected)
    gates = sum(p.numel() for p in Dream(generators(1), 6).parameters())
    assert gates - sum(p.numel() for p in dream.parameters()) == 2 * 6 * BRANCHES


# Losses -------------------------------------------------------------------------------------------


def even(copies, items):
    return torch.full((copies, items), 1 / items, dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 2.0])
def test_mmd_is_the_sum_over_pairs_of_a_batch_with_repeated_items(seed, bandwidth):
    x, y = normal(2, 6, 4, seed=seed), normal(2, 6, 4, seed=seed + 9)
    rows = rows_of(2, 11, 6, seed)
    found = mmd(x, y, occurrences(rows, 6).double() / 11, bandwidth)

    def kernel(a, b):
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        total = 0.0
        for p in a:
            for q in b:
                total += math.exp(-((p - q) ** 2).sum().item() / (2 * bandwidth**2))
        return total / len(a) / len(b)

    for copy in range(2):
        a, b = x[copy, rows[copy]], y[copy, rows[copy]]
        expected = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
        assert found[copy].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_mmd_is_a_distance_of_directions(seed):
    x, y, w = normal(1, 7, 5, seed=seed), normal(1, 7, 5, seed=seed + 9), even(1, 7)
    assert mmd(x, x, w, 1.0).abs() < 1e-12
    order = torch.randperm(7, generator=generators(seed)[0])
    found = mmd(x, y, w, 1.0)
    assert found > 1e-3
    torch.testing.assert_close(mmd(y, x, w, 1.0), found)
    torch.testing.assert_close(mmd(x[:, order], y, w, 1.0), found)
    torch.testing.assert_close(mmd(3 * x, y, w, 1.0), found)


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_info_nce_of_orthonormal_views(n, temperature):
    view, rows = torch.eye(n, dtype=torch.float64)[None], torch.arange(n)[None]
    expected = math.log(1 + (n - 1) * math.exp(-1 / temperature))
    assert info_nce(2 * view, view, rows, rows, temperature).item() == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_info_nce_is_the_loss_over_the_gathered_batch(seed):
    """Repeated members, members that are missing, and permuted partners."""
    views, others = normal(2, 6, 4, seed=seed), normal(2, 6, 4, seed=seed + 9)
    rows = rows_of(2, 9, 6, seed)
    order = torch.randperm(9, generator=generators(seed)[0])
    for partners, target in ((rows, torch.arange(9)), (rows[:, order], order)):
        found = info_nce(views, others, rows, partners, 0.3)
        for copy in range(2):
            a, b = (F.normalize(t[copy, rows[copy]], dim=-1) for t in (views, others))
            expected = F.cross_entropy(a @ b.T / 0.3, target)
            torch.testing.assert_close(found[copy], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_bpr_and_regulariser_member_by_member(seed):
    views = Views(normal(2, 9, 3, seed=seed), normal(2, 9, 3, seed=seed + 9), {}, users=4)
    batch = Batch(*(rows_of(2, 7, n, 3 * seed + place) for place, n in enumerate((4, 5, 5))))
    assert not torch.equal(batch.positives, batch.negatives)
    found = recommendation_loss(views, batch, decay=0.3)
    final = views.content + views.side
    for copy in range(2):
        losses, lengths = [], []
        members = [rows[copy] for rows in (batch.users, batch.positives, batch.negatives)]
        for u, i, j in zip(*members, strict=True):
            user, liked, other = final[copy, u], final[copy, 4 + i], final[copy, 4 + j]
            losses.append(-torch.log(torch.sigmoid(user @ liked - user @ other)))
            lengths.append(sum(v.square().sum() for v in (user, liked, other)))
        expected = torch.stack(losses).mean() + 0.3 * 0.5 * torch.stack(lengths).sum() / 7
        torch.testing.assert_close(found[copy], expected)
    with_zero = bpr(torch.zeros(1, 2, 3), *(torch.zeros(1, 4, dtype=torch.long),) * 3)
    assert with_zero.item() == pytest.approx(math.log(2))


# Graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_bipartite_graph_is_symmetric_normalised(seed):
    liked = interactions(2, 5, 7, seed)
    liked[:, 0] = False
    found = bipartite(liked)
    adjacency = torch.zeros(2, 12, 12)
    adjacency[:, :5, 5:], adjacency[:, 5:, :5] = liked.float(), liked.mT.float()
    degree = adjacency.sum(2)
    for a in range(12):
        for b in range(12):
            expected = adjacency[0, a, b] / (degree[0, a] * degree[0, b]).clamp_min(1).sqrt()
            torch.testing.assert_close(found[0, a, b], expected)
    assert torch.linalg.matrix_norm(found, 2).max() <= 1 + 1e-6
    assert not found[:, 0].any()


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_one_matrix_equals_propagation_layer_by_layer(layers):
    adjacency, x = bipartite(interactions(2, 5, 7)), torch.randn(2, 12, 3)
    states = [x]
    for _ in range(layers):
        states.append(adjacency @ states[-1])
    expected = torch.stack(states).mean(0)
    torch.testing.assert_close(layer_mean(adjacency, layers) @ x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbour_graph(seed):
    features = normal(2, 9, 4, seed=seed).abs().float()
    found = neighbour_graph(features, 3)
    assert (found.ne(0).sum(2) == 3).all()
    assert found.diagonal(dim1=1, dim2=2).ne(0).all()
    unit = F.normalize(features[1], dim=-1)
    cosine = unit @ unit.T
    kept = torch.zeros(9, 9)
    for i in range(9):
        for j in cosine[i].topk(3).indices:
            kept[i, j] = cosine[i, j]
    out = kept.sum(1)
    torch.testing.assert_close(found[1], kept / (out[:, None] * out[None]).sqrt())
    assert neighbour_graph(torch.ones(1, 4, 2), 2).isfinite().all()
    with pytest.raises(ValueError, match=r"1\.\.9"):
        neighbour_graph(features, 10)


def test_likeness_reaches_users_by_what_they_liked():
    liked, features = interactions(1, 4, 6), {"words": normal(1, 6, 5).float()}
    graphs = Graphs.of(liked, features, layers=2, k=2)
    among = neighbour_graph(features["words"], 2)
    torch.testing.assert_close(graphs.similar["words"][:, 4:], among)
    users = bipartite(liked)[:, :4, 4:] @ among
    torch.testing.assert_close(graphs.similar["words"][:, :4], users)


# Fusion and model ---------------------------------------------------------------------------------


def test_fusion_of_identical_modalities():
    z = normal(1, 5, 4)
    query = nn.Linear(4, 1).double()
    torch.testing.assert_close(fuse([z, z], query, [torch.ones_like(z)] * 2), z / 3)


def test_fusion_by_hand():
    z, p = [normal(1, 5, 4, seed=s) for s in (0, 1)], [normal(1, 5, 4, seed=s) for s in (2, 3)]
    query = nn.Linear(4, 1).double()
    scores = [query(v).exp() for v in z]
    common = sum(s * v for s, v in zip(scores, z, strict=True)) / sum(scores)
    expected = (p[0] * (z[0] - common) + p[1] * (z[1] - common) + common) / 3
    torch.testing.assert_close(fuse(z, query, p), expected)


USERS, ITEMS, DIMS = 5, 8, {"picture": 16, "words": 6}


SMALL = Design(width=4)


def small_model(seeds=(0,), design=SMALL):
    liked = torch.cat([interactions(1, USERS, ITEMS, s) for s in seeds])
    features = {
        m: torch.cat([normal(1, ITEMS, d, seed=s).float() for s in seeds]) for m, d in DIMS.items()
    }
    return MambaRec(generators(*seeds), features, Graphs.of(liked, features, 2, 3), design)


def small_batch(copies):
    counts = (USERS, ITEMS, ITEMS)
    return Batch(*(rows_of(copies, 6, n, seed) for seed, n in enumerate(counts)))


@pytest.mark.parametrize("refine", ["dream", "figure", "square", "plain", "off"])
def test_a_copy_trains_as_it_would_alone(refine):
    design = Design(refine=refine, width=4)
    together, alone = small_model((3, 8), design), small_model((8,), design)
    weights = Weights(contrast=0.5)
    rows = [rows_of(1, 6, 5, seed) for seed in SEEDS]
    for model, copies in ((together, 2), (alone, 1)):
        batch = Batch(*(r.expand(copies, -1) for r in rows))
        objective(model(), batch, weights).sum().backward()
    for name, parameter in together.named_parameters():
        other = alone.get_parameter(name).grad.flatten()
        # Batch norms hold the copies one behind the other, all else along a leading axis: flat, both halve.
        own = parameter.grad.flatten()[-len(other) :]
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6, msg=name)


def test_forward_step_by_step():
    """Sections 3.1 to 3.5, written out for one copy in evaluation mode."""
    model = small_model().double().eval()
    graphs = Graphs(
        model.graphs.behaviour.double(), {m: g.double() for m, g in model.graphs.similar.items()}
    )
    model.graphs = graphs
    content = graphs.behaviour[0] @ torch.cat([model.user_table[0], model.item_table[0]])
    side, special = [], []
    for name, table in model.features.items():
        part = model.projections[name]
        x = table
        if name == "picture":
            assert part.reduce.weight.shape == (1, 16, 2)
            x = x @ part.reduce.weight + part.reduce.bias
        else:
            assert isinstance(part.reduce, nn.Identity)
        x = part.refine(x @ part.project.weight + part.project.bias)
        torch.testing.assert_close(model().refined[name], x)
        x = F.layer_norm(x[0], (4,))
        gate = torch.sigmoid(x @ model.gates[name].weight[0] + model.gates[name].bias[0])
        side.append(graphs.similar[name][0] @ (model.item_table[0] * gate))
        preference = model.preferences[name]
        special.append(torch.sigmoid(content @ preference.weight[0] + preference.bias[0]))
    expected = fuse([z[None] for z in side], model.query, [p[None] for p in special])
    views = model()
    torch.testing.assert_close(views.content[0], content)
    torch.testing.assert_close(views.side, expected)
    final = content + expected[0]
    torch.testing.assert_close(views.scores()[0], final[:USERS] @ final[USERS:].T)


def test_dropout_scales_the_normalised_features_of_each_modality():
    model = small_model().eval()
    keep = torch.ones(1, 2, ITEMS, 4)
    torch.testing.assert_close(model(keep).side, model().side)
    keep[:, 1] = 0  # of the words nothing is left but the gate's offset
    before = model(keep).side
    model.gates["words"].weight.data.mul_(2)
    torch.testing.assert_close(model(keep).side, before)
    assert not torch.allclose(model().side, before)
    model.gates["picture"].weight.data.mul_(2)
    assert not torch.allclose(model(keep).side, before)


def test_objective_is_the_weighted_sum_and_mmd_compares_what_dream_gives():
    model, batch = small_model((0, 1)), small_batch(2)
    views, weights = model(), Weights(contrast=0.7, align=0.3, bandwidth=1.5, decay=0.1)
    users, items = (batch.users,) * 2, (batch.positives,) * 2
    split = views.users
    contrast = contrastive_loss(views, users, items, 0.2)
    by_hand = info_nce(views.side[:, :split], views.content[:, :split], *users, 0.2) + info_nce(
        views.side[:, split:], views.content[:, split:], *items, 0.2
    )
    torch.testing.assert_close(contrast, by_hand)
    share = occurrences(batch.positives, ITEMS) / 6
    apart = mmd(views.refined["picture"], views.refined["words"], share, 1.5)
    torch.testing.assert_close(alignment_loss(views, batch.positives, 1.5), apart)
    expected = recommendation_loss(views, batch, 0.1) + 0.7 * contrast + 0.3 * apart
    torch.testing.assert_close(objective(views, batch, weights), expected)


def test_features_are_trained_and_what_was_given_is_not_changed():
    features = {m: normal(1, ITEMS, d).float() for m, d in DIMS.items()}
    before = {m: f.clone() for m, f in features.items()}
    graphs = Graphs.of(interactions(1, USERS, ITEMS), features, 2, 3)
    model = MambaRec(generators(0), features, graphs, Design(width=4))
    recommendation_loss(model(), small_batch(1), 0.0).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.features.parameters())
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert all(torch.equal(before[m], features[m]) for m in DIMS)


def test_the_reduction_saves_parameters():
    def count(factor):
        return sum(
            p.numel() for p in small_model(design=Design(width=4, factor=factor)).parameters()
        )

    inner = {1: 16, 8: 2}
    sizes = {f: 16 * n + n + n * 4 for f, n in inner.items()}
    assert count(1) - count(8) == sizes[1] - sizes[8]


# Baselines ----------------------------------------------------------------------------------------


def test_light_gcn_without_layers_is_matrix_factorisation():
    liked = interactions(2, USERS, ITEMS)
    model = LightGCN(generators(0, 1), liked, 0, 4)
    torch.testing.assert_close(model().scores(), model.user_table @ model.item_table.mT)
    deep = LightGCN(generators(0, 1), liked, 2, 4)
    tables = torch.cat([deep.user_table, deep.item_table], 1)
    a = bipartite(liked)
    torch.testing.assert_close(deep().final, (tables + a @ tables + a @ a @ tables) / 3)


def test_light_gcn_penalises_its_tables_and_not_what_the_graph_makes_of_them():
    model = LightGCN(generators(0, 1), interactions(2, USERS, ITEMS), 2, 4)
    batch, views = small_batch(2), model()
    penalty = recommendation_loss(views, batch, 0.3) - recommendation_loss(views, batch, 0.0)
    for copy in range(2):
        rows = [r[copy] for r in (batch.users, batch.positives, batch.negatives)]
        tables = (model.user_table[copy], model.item_table[copy], model.item_table[copy])
        squares = sum(t[r].square().sum() for t, r in zip(tables, rows, strict=True))
        torch.testing.assert_close(penalty[copy], 0.3 * 0.5 * squares / 6)


def test_matrix_factorisation_adds_the_bias_of_an_item():
    model = MatrixFactorisation(generators(0, 1), USERS, ITEMS, 4)
    assert not model.bias.any()
    with torch.no_grad():
        model.bias.copy_(normal(2, ITEMS, 1))
    expected = model.user_table @ model.item_table.mT + model.bias.mT
    torch.testing.assert_close(model().scores(), expected)


def test_vbpr_scores():
    """Equation 4 of He and McAuley without what is the same for all items of a user."""
    features = {m: normal(1, ITEMS, d).float() for m, d in DIMS.items()}
    model = VBPR(generators(0), features, USERS, 4)
    with torch.no_grad():
        model.bias.copy_(normal(1, ITEMS, 1))
        model.seen_bias.copy_(normal(1, sum(DIMS.values()), 1, seed=1))
    joined = torch.cat([features["picture"], features["words"]], 2)
    seen = joined @ model.project.weight + model.project.bias
    first, second = model.user_table.split(4, dim=2)
    bias = model.bias + joined @ model.seen_bias
    expected = first @ model.item_table.mT + second @ seen.mT + bias.mT
    torch.testing.assert_close(model().scores(), expected)
    assert "features" not in dict(model.named_parameters())


def test_popularity_counts():
    liked = interactions(2, USERS, ITEMS)
    found = popularity(liked)
    assert found.shape == liked.shape
    torch.testing.assert_close(found[1, 3], liked[1].sum(0).float())


def waves(*shape, step):
    return torch.sin(step * torch.arange(float(math.prod(shape)))).view(shape)


def small_freedom():
    """Four users, six items, with values that the released code was given as well."""
    liked = ((torch.arange(4)[:, None] * 3 + torch.arange(6) * 5) % 7 < 3)[None]
    features = {"picture": waves(1, 6, 5, step=0.7), "words": waves(1, 6, 2, step=1.3)}
    model = FREEDOM(generators(0), liked, features, k=3, width=3)
    with torch.no_grad():
        model.user_table.copy_(waves(1, 4, 3, step=0.31))
        model.item_table.copy_(waves(1, 6, 3, step=0.53))
        for name, step in (("picture", 0.23), ("words", 0.41)):
            layer = model.projections[name]
            layer.weight.copy_(waves(*layer.weight.shape, step=step))
            layer.bias.zero_()
    return model


RELEASED_FREEDOM = [
    [-0.063085, 0.169718, 0.396092],
    [0.821674, 0.879683, 0.791227],
    [0.383668, 0.241542, 0.123944],
    [0.407766, 0.409101, 0.324439],
    [0.054495, 0.475946, 0.776922],
    [0.743740, 0.873542, 0.787715],
    [0.101840, 0.006576, -0.055641],
    [-0.011661, 0.028043, 0.093800],
    [0.692080, 0.857722, 0.812075],
    [0.680269, 0.815207, 0.759055],
]
RELEASED_USER_GRADIENTS = [
    [0.030404, 0.009424, -0.013723],
    [0.034687, 0.037816, 0.042720],
    [0.016008, 0.050668, 0.069564],
    [0.003826, -0.037103, -0.063798],
]
RELEASED_WORD_GRADIENTS = [[-0.007340, -0.008744, -0.007697], [0.027943, 0.025604, 0.019517]]


def test_freedom_is_the_released_one():
    model = small_freedom()
    views = model()
    torch.testing.assert_close(views.final[0], torch.tensor(RELEASED_FREEDOM), atol=2e-6, rtol=0)
    batch = Batch(
        torch.tensor([[0, 1, 2, 3, 3]]),
        torch.tensor([[0, 1, 2, 0, 0]]),
        torch.tensor([[1, 0, 0, 2, 2]]),
    )
    scored = bpr(views.scores(), batch.users, batch.positives, batch.negatives)
    loss = scored + 0.1 * feature_loss(views, batch)
    assert loss.item() == pytest.approx(0.9346201, abs=1e-6)
    loss.sum().backward()
    for ours, released in (
        (model.user_table, RELEASED_USER_GRADIENTS),
        (model.projections["words"].weight, RELEASED_WORD_GRADIENTS),
    ):
        torch.testing.assert_close(ours.grad[0], torch.tensor(released), atol=2e-6, rtol=0)


def test_the_even_graph_holds_the_nearest_items():
    features = normal(2, ITEMS, 5).float()
    graph = even_neighbour_graph(features, 3)
    unit = F.normalize(features, dim=-1)
    for copy in range(2):
        for item in range(ITEMS):
            nearest = (unit[copy] @ unit[copy, item]).argsort(descending=True)[:3]
            assert set(graph[copy, item].nonzero()[:, 0].tolist()) == set(nearest.tolist())
    assert graph[graph > 0].unique().tolist() == pytest.approx([1 / 3])
    with pytest.raises(ValueError, match="k must lie in 1"):
        even_neighbour_graph(features, ITEMS + 1)


def test_thinning_keeps_its_share_and_spares_the_rare():
    # One item that all 40 users like, and one more for each user that nobody else does.
    liked = torch.zeros(1, 40, 41, dtype=torch.bool)
    liked[0, :, 0] = True
    liked[0, torch.arange(40), 1 + torch.arange(40)] = True
    popular = rare = 0
    for seed in range(30):
        kept = thinned(liked, 0.75, generators(seed))
        assert kept.sum() == 20
        assert not (kept & ~liked).any()
        popular, rare = popular + int(kept[..., 0].sum()), rare + int(kept[..., 1:].sum())
    # Chances are as 1 to sqrt(40); without replacement a little more of the popular one is kept.
    assert 4.5 < rare / popular < 7.5
    both = thinned(liked.expand(2, -1, -1), 0.75, generators(5, 6))
    assert torch.equal(both[1:], thinned(liked, 0.75, generators(6)))


def test_freedom_mixes_layer_by_layer_what_light_gcn_mixes_by_one_matrix():
    model = small_freedom()
    tables = torch.cat([model.user_table, model.item_table], 1)
    paths = layer_mean(bipartite(model.interactions), model.layers)
    torch.testing.assert_close(model.mixed(model.whole), paths @ tables)


def test_freedom_trains_on_the_thinned_graph_and_is_read_on_the_whole():
    model = small_freedom()
    whole = model().final
    torch.testing.assert_close(whole, model.eval()().final)
    model.thin(0.5, generators(0))
    torch.testing.assert_close(model().final, whole)
    model.train()
    assert (model().final - whole).abs().max() > 0.05
    first = model().final
    model.thin(0.5, generators(1))
    assert (model().final - first).abs().max() > 0.05
