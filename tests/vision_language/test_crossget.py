"""CrossGET's matching, importance, ensemble and loss: by brute force, by hand, by invariance and against its code."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from reattend.trunks.image_text import Heads, ImageTextModel, ImageTower, TextTower, TowerAttention
from reattend.vision_language.crossget import (
    CrossTokens,
    Merging,
    Reduction,
    TokenEnsemble,
    bipartite_matching,
    complete_graph_matching,
    cross_divergence,
    cross_features,
    crossget_loss,
    ensemble_weights,
    greedy_matching,
    guided_importance,
    merged_sum,
    reduced_vectors,
    similarities,
)

MATCHERS = [complete_graph_matching, bipartite_matching, greedy_matching]
WIDTH, LAYERS = 8, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ends_protected(batch, length):
    protected = torch.zeros(batch, length, dtype=torch.bool)
    protected[:, 0] = protected[:, -1] = True
    return protected


def heads_of(queries, keys, heads=2):
    """A block's heads from all of them side by side."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys)]
    return Heads(*split, split[1])


def model(seed=0, text_layers=LAYERS):
    torch.manual_seed(seed)
    image = ImageTower(12, 4, WIDTH, LAYERS, 2)
    found = ImageTextModel(image, TextTower(11, 9, WIDTH, text_layers, 2), 6).double()
    for parameter in found.parameters():  # no zero biases, no tiny embeddings
        parameter.data += 0.3 * torch.randn_like(parameter)
    return found


def pairs(batch=4, words=9):
    random = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (batch, 3, 12, 12), generator=random, dtype=torch.uint8)
    ids = torch.randint(1, 11, (batch, words), generator=random)
    return pixels, ids, torch.ones(batch, words, dtype=torch.bool)


# --- matching --------------------------------------------------------------------------------------


def test_similarities_are_cosines_without_self_and_protected():
    keys = normal(2, 6, 3)
    found = similarities(keys, ends_protected(2, 6))
    for b, i, j in itertools.product(range(2), range(6), range(6)):
        if i == j or {i, j} & {0, 5}:
            assert found[b, i, j] == -math.inf
        else:
            expected = keys[b, i] @ keys[b, j] / keys[b, i].norm() / keys[b, j].norm()
            assert found[b, i, j].item() == pytest.approx(expected.item(), abs=1e-12)


def complete_graph_by_hand(similarity, r, importance):
    """The section's words, token by token: (sources, destinations)."""
    length = len(similarity)
    best = [max(row.tolist()) for row in similarity]
    order = sorted(range(length), key=lambda i: -best[i])
    scores = {}
    for rank, i in enumerate(order):
        seen = [float(similarity[i, j]) for j in order[rank + 1 :]]
        scores[i] = max(seen, default=-math.inf) - float(importance[i])
    sources = sorted(scores, key=lambda i: -scores[i])[:r]
    stay = [j for j in range(length) if j not in sources]
    return sources, [max(stay, key=lambda j: float(similarity[i, j])) for i in sources]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("length", "r"), [(9, 3), (14, 6), (23, 4)])
@pytest.mark.parametrize("guided", [False, True])
def test_complete_graph_matching_by_hand(seed, length, r, guided):
    keys = normal(3, length, 4, seed=seed)
    similarity = similarities(keys, ends_protected(3, length))
    importance = guided_importance(normal(3, 4, seed=seed + 50), keys)
    found = complete_graph_matching(similarity, r, importance if guided else None)
    for b in range(3):
        by = importance[b] if guided else torch.zeros(length)
        sources, destinations = complete_graph_by_hand(similarity[b], r, by)
        assert found.sources[b].tolist() == sources
        assert found.destinations[b].tolist() == destinations


def test_ranks_replace_the_order_of_best_similarities():
    """A token whose rank is last sees nobody and stays, however similar it is."""
    similarity = similarities(normal(1, 8, 3), ends_protected(1, 8))
    free = complete_graph_matching(similarity, 1).sources.item()
    ranks = torch.arange(8)[None].clone()
    ranks[0, free], ranks[0, 7] = 7, free
    found = complete_graph_matching(similarity, 3, None, ranks)
    assert free not in found.sources
    plain = similarity.amax(-1).argsort(descending=True).argsort()
    again = complete_graph_matching(similarity, 3, None, plain)
    assert torch.equal(again.sources, complete_graph_matching(similarity, 3).sources)


@pytest.mark.parametrize("length", [9, 14])
def test_bipartite_matching_is_tome(length):
    """Even places, which [CLS] leads, each to the best odd place; the r best pairs are merged."""
    similarity = similarities(normal(3, length, 4), ends_protected(3, length))
    found = bipartite_matching(similarity, 3)
    for b in range(3):
        odd = range(1, length, 2)
        best = {i: max(odd, key=lambda j: float(similarity[b, i, j])) for i in range(0, length, 2)}
        order = sorted(best, key=lambda i: -float(similarity[b, i, best[i]]))[:3]
        assert found.sources[b].tolist() == order
        assert found.destinations[b].tolist() == [best[i] for i in order]


@pytest.mark.parametrize("match", MATCHERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_merging_is_consistent(match, seed):
    """No token is source and destination, protected ones are neither, the order is kept; also at the cap."""
    for length in (9, 20):
        similarity = similarities(normal(4, length, 5, seed=seed), ends_protected(4, length))
        for r in (1, (length - 2) // 2):
            found = match(similarity, r)
            assert found.survivors.shape == (4, length - r)
            assert (found.survivors.diff(dim=1) > 0).all()
            for b in range(4):
                sources, taking = (
                    set(found.sources[b].tolist()),
                    set(found.destinations[b].tolist()),
                )
                assert len(sources) == r
                assert not sources & taking
                assert not (sources | taking) & {0, length - 1}
                assert sources | set(found.survivors[b].tolist()) == set(range(length))


def total(similarity, merging):
    rows = torch.arange(len(similarity))[:, None]
    return similarity[rows, merging.sources, merging.destinations].sum(1)


@pytest.mark.parametrize("seed", range(5))
def test_no_matching_beats_the_optimum_and_greedy_is_near(seed):
    similarity = similarities(normal(4, 8, 3, seed=seed), ends_protected(4, 8))
    optimum = torch.full((4,), -math.inf, dtype=torch.float64)
    for sources in itertools.combinations(range(1, 7), 3):
        stay = [j for j in range(8) if j not in sources]
        value = similarity[:, list(sources)][:, :, stay].amax(-1).sum(1)
        optimum = torch.maximum(optimum, value)
    for match in MATCHERS:
        assert (total(similarity, match(similarity, 3)) <= optimum + 1e-12).all()
    greedy = total(similarity, greedy_matching(similarity, 3))
    assert (greedy - optimum).mean() > -0.15
    first = total(similarity, greedy_matching(similarity, 1))
    torch.testing.assert_close(first, similarity.flatten(1).amax(1), atol=0, rtol=0)


# --- importance and ensemble -----------------------------------------------------------------------


def test_importance_is_a_cosine():
    guide, keys = normal(3, 5), 7 * normal(3, 6, 5, seed=1)
    found = guided_importance(guide, keys)
    assert found.shape == (3, 6)
    expected = guide[1] @ keys[1, 4] / guide[1].norm() / keys[1, 4].norm()
    assert found[1, 4].item() == pytest.approx(expected.item(), abs=1e-12)


def test_weights_are_twice_a_softmax_and_sum_to_two():
    merging = Merging(torch.tensor([[2, 4]]), torch.tensor([[0, 1, 3]]), torch.tensor([[1, 2]]))
    importance = torch.tensor([[0.0, 0.3, -0.5, 0.9, 0.9]], dtype=torch.float64)
    found = ensemble_weights(importance, merging)
    first = 2 * math.exp(-0.5) / (math.exp(-0.5) + math.exp(0.3))
    expected = torch.tensor([[[first, 2 - first], [1.0, 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_sums_of_several_sources_at_one_destination():
    merging = Merging(torch.tensor([[3, 1]]), torch.tensor([[0, 2, 4]]), torch.tensor([[1, 1]]))
    x = normal(1, 5, 4)
    plain = torch.stack([x[0, 0], x[0, 1] + x[0, 2] + x[0, 3], x[0, 4]])
    torch.testing.assert_close(merged_sum(x, merging)[0], plain, atol=1e-12, rtol=0)
    weights = torch.tensor([[[0.4, 1.6], [1.5, 0.5]]], dtype=torch.float64)
    middle = x[0, 2] + 0.4 * x[0, 3] + 0.6 * x[0, 2] + 1.5 * x[0, 1] - 0.5 * x[0, 2]
    found = merged_sum(x, merging, weights)[0]
    torch.testing.assert_close(found[1], middle, atol=1e-12, rtol=0)
    assert torch.equal(found[[0, 2]], x[0, [0, 4]])


def test_official_numbers():
    """What the official reducer makes of nine tokens, r = 3, where one destination takes in two sources."""
    keys = [
        [1, 0, 0],
        [2, 1, 0],
        [0, 3, 1],
        [1, 0, 4],
        [2, 1, 1],
        [0, 1, -1],
        [1, 1, 0],
        [-1, 2, 0],
    ]
    keys = torch.tensor([[*keys, [3, 0, 1]]], dtype=torch.float64)
    queries = torch.zeros(1, 9, 3, dtype=torch.float64)
    queries[0, -1] = torch.tensor([1.0, 2.0, -1.0])
    ensemble = TokenEnsemble((3,), cross=torch.zeros(1, 3).double())
    ensemble.sizes = torch.ones(1, 9, 1, dtype=torch.float64)
    x = torch.arange(27, dtype=torch.float64).view(1, 9, 3)
    found = ensemble.between(0, x, heads_of(queries, keys, heads=1))
    assert ensemble.mergings[0].sources.tolist() == [[1, 2, 4]]
    assert ensemble.mergings[0].destinations.tolist() == [[6, 7, 6]]
    first = torch.tensor([[0.0, 9, 15, 11.7008, 13.1336, 24]], dtype=torch.float64)
    torch.testing.assert_close(found[..., 0], first, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[..., 2], first + 2, atol=1e-4, rtol=0)
    assert ensemble.sizes[0, :, 0].tolist() == [1, 1, 1, 3, 2, 1]


def test_equal_importance_and_sizes_give_means():
    ensemble = TokenEnsemble((2,), importance=None)
    ensemble.sizes = torch.ones(2, 7, 1, dtype=torch.float64)
    x, keys = normal(2, 7, 4), normal(2, 7, 4, seed=3)
    found = ensemble.between(0, x, heads_of(keys, keys))
    merging = ensemble.mergings[0]
    for b, target in itertools.product(range(2), range(5)):
        members = [int(merging.survivors[b, target])]
        members += [
            int(s)
            for s, t in zip(*[m[b] for m in (merging.sources, merging.targets)], strict=True)
            if t == target
        ]
        torch.testing.assert_close(found[b, target], x[b, members].mean(0), atol=1e-12, rtol=0)


def test_proportional_attention_equals_attention_over_copies():
    torch.manual_seed(0)
    attention = TowerAttention(8, 2, causal=False).double()
    x, copies = normal(2, 4, 8), torch.tensor([1, 3, 2, 1])
    plain, _ = attention(x.repeat_interleave(copies, dim=1), None)
    ensemble = TokenEnsemble((0,), importance=None)
    ensemble.sizes = copies.double()[None, :, None].expand(2, 4, 1)
    assert ensemble.bias(0, x) is None
    ensemble.mergings.append(Merging(*(torch.zeros(2, 1, dtype=torch.long),) * 3))
    sized, _ = attention(x, ensemble.bias(0, x))
    first = copies.cumsum(0) - copies
    torch.testing.assert_close(sized, plain[:, first], atol=1e-12, rtol=0)


# --- towers ----------------------------------------------------------------------------------------


def test_without_merging_and_with_the_cross_token_hidden_nothing_changes():
    class Hidden(TokenEnsemble):
        def bias(self, layer, x):
            hide = torch.zeros(1, x.shape[1], dtype=x.dtype)
            hide[0, -1] = -math.inf
            return hide

    towers, (pixels, _, _) = model(), pairs()
    cross = 0.5 * normal(LAYERS, WIDTH)
    plain = towers.image_tokens(pixels)
    hidden = towers.image_tokens(pixels, Hidden((0,) * LAYERS, cross=cross))
    torch.testing.assert_close(hidden[:, :-1], plain, atol=1e-10, rtol=0)
    seen = towers.image_tokens(pixels, TokenEnsemble((0,) * LAYERS, cross=cross))
    assert (seen[:, 0] - plain[:, 0]).abs().max() > 1e-3


def test_with_offsets_at_zero_the_cross_token_is_cls_in_every_layer():
    class Watching(TokenEnsemble):
        def before(self, layer, x):
            x = super().before(layer, x)
            assert torch.equal(x[:, 0], x[:, -1])
            return x

    towers, (pixels, _, _) = model(), pairs()
    hooks = Watching((2,) * LAYERS, cross=torch.zeros(LAYERS, WIDTH).double())
    towers.image_tokens(pixels, hooks)
    assert len(hooks.cross_tokens) == LAYERS


def test_sizes_are_conserved_and_tokens_counted():
    towers, (pixels, ids, mask) = model(), pairs()
    hooks = TokenEnsemble((2, 1, 9), cross=normal(LAYERS, WIDTH))
    found = towers.image_tokens(pixels, hooks)
    # 9 patches, [CLS], cross token: 11 - 2 - 1 = 8, of which at most (8 - 2) // 2 go
    assert found.shape[1] == 5
    assert torch.equal(hooks.sizes.sum(1), torch.full((4, 1), 11.0, dtype=torch.float64))
    plain = TokenEnsemble((2, 0, 1), importance=None)
    assert towers.image_tokens(pixels, plain).shape[1] == 7
    assert len(plain.mergings) == 2
    read = TokenEnsemble((9, 0, 0), cross=normal(LAYERS, WIDTH), ends=mask.sum(1) - 1)
    # 9 words and the cross token, three of them protected: (10 - 3) // 2 go
    assert towers.text(ids, read).shape[1] == 7


def test_where_all_patches_are_equal_every_merging_gives_the_dense_output():
    """With proportional attention; without the logarithm of sizes it does not."""
    towers = model()
    towers.image.positions.data[1:] = towers.image.positions.data[1]
    pixels = torch.full((2, 3, 12, 12), 90, dtype=torch.uint8)
    dense = towers.image_tokens(pixels)[:, 0]
    for match in MATCHERS:
        hooks = TokenEnsemble((3, 2, 1), match=match, importance=None)
        torch.testing.assert_close(
            towers.image_tokens(pixels, hooks)[:, 0], dense, atol=1e-10, rtol=0
        )
    with_cross = TokenEnsemble((0,) * LAYERS, cross=normal(LAYERS, WIDTH))
    merged = TokenEnsemble((3, 2, 1), cross=normal(LAYERS, WIDTH))
    vectors = [towers.image_tokens(pixels, hooks)[:, 0] for hooks in (with_cross, merged)]
    torch.testing.assert_close(*vectors, atol=1e-10, rtol=0)


def test_eos_is_followed_through_mergings():
    """Captions of different lengths: the token at `ends` stays the one that began there."""
    x = normal(3, 12, WIDTH)
    ends = torch.tensor([10, 4, 7])
    marks = x[torch.arange(3), ends]
    hooks = TokenEnsemble((2, 3, 1), cross=torch.zeros(3, WIDTH).double(), ends=ends)
    for layer in range(3):
        x = hooks.before(layer, x)
        queries, keys = normal(2, *x.shape, seed=layer)
        x = hooks.between(layer, x, heads_of(queries, keys))
        assert torch.equal(x[torch.arange(3), hooks.ends], marks)
    assert (hooks.ends < ends).any()


def test_captions_are_guided_by_eos_and_pictures_by_the_cross_token():
    x = normal(2, 9, WIDTH)
    queries, keys = normal(2, 2, 9, WIDTH, seed=4)
    ends = torch.tensor([5, 7])
    cross = torch.zeros(1, WIDTH).double()
    for hooks, guide in (
        (TokenEnsemble((2,), cross=cross), queries[:, -1]),
        (TokenEnsemble((2,), cross=cross, ends=ends), queries[torch.arange(2), ends]),
    ):
        seen = {}
        hooks.importance = lambda q, k, seen=seen: seen.update(q=q, k=k) or guided_importance(q, k)
        hooks.sizes = torch.ones(2, 9, 1, dtype=torch.float64)
        hooks.between(0, x, heads_of(queries, keys))
        assert torch.equal(seen["q"], guide)
        assert torch.equal(seen["k"], keys)


def test_a_causal_text_tower_does_not_see_its_cross_token():
    towers, (_, ids, mask) = model(), pairs()
    plain = towers.text(ids)[:, -1]
    hooks = TokenEnsemble((0,) * LAYERS, cross=normal(LAYERS, WIDTH), ends=mask.sum(1) - 1)
    torch.testing.assert_close(towers.text(ids, hooks)[:, -2], plain, atol=1e-10, rtol=0)


def test_pictures_without_cross_token_cannot_be_guided():
    with pytest.raises(ValueError, match="guided by the cross token"):
        TokenEnsemble((2,))


# --- the loss --------------------------------------------------------------------------------------


def test_divergence_is_the_official_one():
    image, text = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    middle = ((image.softmax(-1) + text.softmax(-1)) / 2).flatten(0, 1)
    parts = [
        F.kl_div(x.flatten(0, 1).log_softmax(-1), middle, reduction="batchmean")
        for x in (image, text)
    ]
    found = cross_divergence(image, text)
    assert found.item() == pytest.approx(sum(parts).item() / 2, abs=1e-12)
    assert cross_divergence(text, image).item() == pytest.approx(found.item(), abs=1e-12)
    assert cross_divergence(image, image + 3).item() == pytest.approx(0, abs=1e-12)
    one, two = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[math.log(3.0), 0.0]]])
    # P = (1/2, 1/2) and (3/4, 1/4), M = (5/8, 3/8)
    expected = [
        m * math.log(m / p)
        for m, p in ((5 / 8, 1 / 2), (3 / 8, 1 / 2), (5 / 8, 3 / 4), (3 / 8, 1 / 4))
    ]
    assert cross_divergence(one, two).item() == pytest.approx(sum(expected) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="3 and 2 layers"):
        cross_divergence(image, text[:2])


def test_cross_features_are_normalised_and_mapped():
    towers, tokens = model(), [normal(4, WIDTH, seed=i) for i in range(LAYERS)]
    found = cross_features(tokens, towers.text, towers.text_map)
    expected = towers.text_map(towers.text.norm(tokens[2]))
    torch.testing.assert_close(found[2], expected, atol=1e-12, rtol=0)


def reduced(towers, cross, reduction):
    return reduced_vectors(towers, cross, reduction, *pairs())


def test_only_the_offsets_learn_from_the_divergence():
    towers, reduction = model(), Reduction((2,) * LAYERS, (1,) * LAYERS)
    cross = CrossTokens(towers).double()
    vectors = reduced(towers, cross, reduction)
    both, contrastive = crossget_loss(towers, vectors, 0.25)
    divergence = (both - 0.75 * contrastive) / 0.25
    divergence.backward(retain_graph=True)
    for name, parameter in cross.named_parameters():
        assert (parameter.grad.abs().amax(1) > 1e-9).all(), name
    for name, parameter in towers.named_parameters():
        grad = parameter.grad
        assert grad is None or grad.abs().max() < 1e-12, name
    cross.zero_grad()
    contrastive.backward()
    assert (cross.image.grad.abs().amax(1) > 1e-9).all()
    assert cross.text.grad.abs().max() < 1e-12  # nobody sees it
    assert towers.image.patches.weight.grad.abs().max() > 1e-9


def test_the_loss_by_its_definition():
    towers, reduction = model(), Reduction((2,) * LAYERS, (0,) * LAYERS)
    cross = CrossTokens(towers).double()
    cross.image.data += normal(LAYERS, WIDTH)
    vectors = reduced(towers, cross, reduction)
    logits, own = towers.scale * vectors.image @ vectors.text.T, torch.arange(4)
    clip = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    image = cross_features(vectors.image_cross, towers.image, towers.image_map)
    text = cross_features(vectors.text_cross, towers.text, towers.text_map)
    found, contrastive = crossget_loss(towers, vectors, 0.3)
    expected = 0.7 * clip + 0.3 * cross_divergence(image, text)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    assert contrastive.item() == pytest.approx(clip.item(), abs=1e-12)
    assert crossget_loss(towers, vectors, 0.0)[0].item() == pytest.approx(clip.item(), abs=1e-12)


def test_vectors_are_those_of_cls_and_eos():
    towers, nothing = model(), Reduction((0,) * LAYERS, (0,) * LAYERS, importance=None)
    pixels, ids, mask = pairs()
    mask[1, 6:] = False
    found = reduced_vectors(towers, None, nothing, pixels, ids, mask)
    torch.testing.assert_close(found.image, towers.image_tokens(pixels)[:, 0])
    words = towers.text_tokens(ids)
    torch.testing.assert_close(found.text[1], words[1, 5])
    torch.testing.assert_close(found.text[0], words[0, 8])


def test_cross_tokens_start_at_zero_and_are_detached():
    towers, (pixels, _, _) = model(), pairs()
    cross = CrossTokens(towers).double()
    assert cross.image.abs().max() == cross.text.abs().max() == 0
    cross.image.data += normal(LAYERS, WIDTH)
    hooks = TokenEnsemble((0,) * LAYERS, cross=cross.image)
    towers.image_tokens(pixels, hooks)
    hooks.cross_tokens[1].sum().backward()
    assert torch.equal(cross.image.grad[1], torch.full((WIDTH,), 4.0, dtype=torch.float64))
    assert cross.image.grad[[0, 2]].abs().max() == 0
    assert towers.image.cls.grad is None
