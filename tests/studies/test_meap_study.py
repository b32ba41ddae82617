"""Needles, distances, attention by segment, and what [MASK] does to attention."""

import math

import pytest
import torch
from torch.nn import functional as F

from reattend.language_modeling.meap import random_masks
from reattend.studies.meap import (
    answers,
    attention_maps,
    by_distance,
    copy_accuracy,
    masking_effects,
    needles,
    segment_shares,
)
from reattend.trunks.language import FeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention, TokenShift


def model(seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = Trunk(
        9,
        8,
        [lambda w: TokenShift(SoftmaxAttention(w, 2), w), lambda w: SoftmaxAttention(w, 2)],
        feed_forward=FeedForward,
        embedding_std=scale,
        tied=False,
    )
    return net.double().eval()


def rows(count=4, length=14, seed=0):
    return torch.randint(8, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_needle_is_a_token_that_stood_exactly_once_before(seed):
    tokens = rows(seed=seed)
    found, sources = needles(tokens)
    assert found.shape == (4, 13)
    for row, is_needle, source in zip(
        tokens.tolist(), found.tolist(), sources.tolist(), strict=True
    ):
        for t in range(13):
            assert is_needle[t] == (row[:t].count(row[t]) == 1)
            if is_needle[t]:
                assert source[t] == row.index(row[t]) < t


@pytest.mark.parametrize("batch", [3, 128])
def test_answers_are_nats_and_hits_of_the_next_token(batch):
    net, tokens = model(), rows(7)
    nats, right = answers(net, tokens, batch)
    for r in range(7):
        logits = net(tokens[r : r + 1, :-1])[0]
        expected = torch.stack(
            [-F.log_softmax(x, -1)[i] for x, i in zip(logits, tokens[r, 1:], strict=True)]
        )
        torch.testing.assert_close(nats[r], expected.detach(), rtol=0, atol=1e-12)
        assert right[r].tolist() == (logits.argmax(-1) == tokens[r, 1:]).tolist()


def test_needles_are_averaged_by_their_distance():
    found = torch.tensor([[False, True, True, False, True]])
    sources = torch.tensor([[0, 0, 0, 2, 0]])
    values = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0]])
    means = by_distance(values, found, sources, [1, 3, 4, 8])
    assert means[0] == 1.5
    assert means[2] == 4.0
    assert math.isnan(means[1])


def test_copying_answers_what_stood_behind_the_source():
    # Needles: the second 1 (answer 4, as before), the second 4 (answer 0, before it was 1).
    tokens = torch.tensor([[3, 1, 4, 1, 4, 0]])
    found, sources = needles(tokens)
    assert found[0].tolist() == [False, False, False, True, True]
    assert copy_accuracy(tokens, found, sources) == 0.5


def test_attention_maps_are_those_that_the_model_uses():
    net, tokens = model(), rows(3, 11)
    maps = attention_maps(net, tokens)
    assert maps.shape == (3, 4, 11, 11)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 11).double(), rtol=0, atol=1e-12)
    assert not maps.triu(1).any()
    first = net.blocks[0]
    x = first.mixer_norm(net.embed(tokens))
    before = F.pad(x, (0, 0, 1, -1))
    shifted = x.lerp(before, first.mixer.share)
    torch.testing.assert_close(maps[:, :2], first.mixer.mixer.weights(shifted), rtol=0, atol=1e-12)
    second = net.blocks[1]
    x = second.mixer_norm(first(net.embed(tokens), tokens))
    torch.testing.assert_close(maps[:, 2:], second.mixer.weights(x), rtol=0, atol=1e-12)


def test_segments_share_all_attention_and_count_the_right_places():
    # Tokens 3 1 4 1 5: the second 1, at place 3, is a needle; its answer, 4, stands at place 2.
    tokens = torch.tensor([[3, 1, 4, 1, 5, 0]])
    found, sources = needles(tokens)
    weights = torch.arange(25.0).view(1, 1, 5, 5).expand(1, 2, 5, 5)
    shares = segment_shares(weights, found, sources)
    assert shares.tolist() == [[15, 16, 17, 0, 18]] * 2
    far = torch.tensor([[1, 4, 0, 2, 1, 5]])
    shares = segment_shares(weights, *needles(far))
    assert shares.tolist() == [[0, 20, 21, 22 + 23, 24]] * 2


def test_a_token_that_follows_itself_is_no_question_for_attention():
    both = torch.tensor([[1, 1, 3, 4, 3, 0]])
    found, sources = needles(both)
    assert found[0].tolist() == [False, True, False, False, True]
    weights = torch.arange(25.0).view(1, 1, 5, 5)
    assert segment_shares(weights, found, sources)[0].tolist() == [20 + 21, 22, 23, 0, 24]


def test_a_model_that_does_not_tell_the_mask_from_tokens_shows_no_effect():
    masked = random_masks(4, 14, 0.3, torch.Generator().manual_seed(0))
    net = model()
    effects = masking_effects(net, rows(), masked, 8)
    assert set(effects) == {"decay", "variance"}
    assert abs(effects["decay"]) > 1e-4
    assert abs(effects["variance"]) > 1e-4
    with torch.no_grad():
        net.tokens.weight[:] = net.tokens.weight[0]
    effects = masking_effects(net, rows(), masked, 8)
    assert effects == pytest.approx({"decay": 0, "variance": 0}, abs=1e-12)
