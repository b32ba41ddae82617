"""Recall and NDCG of recommendation lists, against the numbers of another library."""

import pytest
import torch

from reattend.recommendation.ranking import list_scores

# What Recall(k) and NDCG(k) of cornac 3.0.1 give on `case`, averaged by its ranking_eval over the users of the test
# set, training items left out of the ranking and items without a training interaction kept in it
# (exclude_unknowns=False).
CORNAC = {
    5: (0.08933333333333333, 0.2893707059983713),
    20: (0.584, 0.43639287738117816),
}


def case():
    """Scores, training and wanted items of six users and sixty items; no two items of a user tie.

    One user wants a single item, one more than fit a list, one all that is left, one has nothing to train
    on and one nothing to find.
    """
    items = torch.arange(1, 61)
    scores = torch.tensor([2, 7, 11, 17, 29, 5])[:, None] * items % 61
    place = torch.tensor([3, 10, 19, 23, 37, 44])[:, None] * items % 61
    seen = torch.tensor([8, 8, 0, 15, 30, 8])[:, None]
    found = seen + torch.tensor([12, 1, 25, 5, 30, 0])[:, None]
    return scores.double()[None], (place <= seen)[None], ((place > seen) & (place <= found))[None]


@pytest.mark.parametrize("k", CORNAC)
def test_equals_another_library(k):
    got = [x.item() for x in list_scores(*case(), k)]
    assert got == pytest.approx(CORNAC[k], rel=0, abs=1e-6)
