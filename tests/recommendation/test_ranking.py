"""Recall and NDCG of recommendation lists, against a loop over users."""

import math

import pytest
import torch

from reattend.recommendation.ranking import list_scores


def by_hand(scores, trained, wanted, k):
    """Recall and NDCG of one world, user by user."""
    recalls, gains = [], []
    for s, seen, want in zip(scores.tolist(), trained.tolist(), wanted.tolist(), strict=True):
        if not any(want):
            continue
        allowed = [i for i in range(len(s)) if not seen[i]]
        best = sorted(allowed, key=lambda i: -s[i])[:k]
        hits = [r for r, i in enumerate(best, 1) if want[i]]
        recalls.append(len(hits) / sum(want))
        ideal = sum(1 / math.log2(1 + r) for r in range(1, min(k, sum(want)) + 1))
        gains.append(sum(1 / math.log2(1 + r) for r in hits) / ideal)
    return sum(recalls) / len(recalls), sum(gains) / len(gains)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 4, 11])
def test_equals_a_loop_over_users(seed, k):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 7, 23, generator=generator, dtype=torch.float64)
    kind = torch.randint(4, scores.shape, generator=generator)
    trained, wanted = kind == 0, kind == 1
    wanted[:, 2] = False  # a user without an item to find counts for nothing
    recall, ndcg = list_scores(scores, trained, wanted, k)
    for world in range(3):
        expected = by_hand(scores[world], trained[world], wanted[world], k)
        assert (recall[world].item(), ndcg[world].item()) == pytest.approx(expected, abs=1e-12)


def test_a_training_item_takes_no_place_in_the_list():
    scores = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    trained = torch.tensor([[[True, False, False, False]]])
    wanted = torch.tensor([[[False, True, False, False]]])
    assert [x.item() for x in list_scores(scores, trained, wanted, 1)] == [1.0, 1.0]


def test_recall_divides_by_all_wanted_items_and_ndcg_by_the_best_list():
    scores = torch.arange(6.0).flip(0)[None, None]
    wanted = torch.tensor([[[True] * 5 + [False]]])
    recall, ndcg = list_scores(scores, torch.zeros_like(wanted), wanted, 2)
    assert recall.item() == pytest.approx(2 / 5)
    assert ndcg.item() == pytest.approx(1.0)


def test_bad_input_is_refused():
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    scores = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="split the interactions"):
        list_scores(scores, mask, mask, 1)
    with pytest.raises(ValueError, match=r"1\.\.3"):
        list_scores(scores, ~mask, mask, 4)
    with pytest.raises(ValueError, match="no user"):
        list_scores(scores, mask, ~mask, 1)
