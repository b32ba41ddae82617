"""Rank correlation against scipy's definition by hand, ranks of answers with ties."""

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from reattend.metrics import (
    ndcg,
    pseudo_values,
    ranks_of_answers,
    ranks_of_first_right,
    spearman,
)


def test_spearman_by_hand():
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert abs(spearman(np.array([1.0, 2, 3, 4]), np.array([0.2, 0.1, 0.9, 0.7])) - 0.6) < 1e-12
    assert spearman(np.ones(4), np.arange(4.0)) == 0


def test_ranks_count_ties_against_the_answer():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.4], [0.3, 0.2, 0.1]])
    assert ranks_of_answers(scores).tolist() == [1, 2, 3]


def test_the_best_placed_right_candidate_has_the_rank():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.4], [0.3, 0.2, 0.1]])
    right = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 1]]).bool()
    assert ranks_of_first_right(scores, right).tolist() == [2, 2, 1]
    own = torch.eye(3, dtype=torch.bool)
    assert torch.equal(ranks_of_first_right(scores, own), ranks_of_answers(scores))
    with pytest.raises(ValueError, match="no right candidate"):
        ranks_of_first_right(scores, own & right)


def test_pseudo_values_of_a_mean_are_the_values_and_of_a_ratio_have_its_spread():
    random = np.random.default_rng(0)
    a, b = 3 + random.standard_normal(400), 2 + 0.1 * random.standard_normal(400)
    assert pseudo_values({"a": a}, lambda d: d["a"].mean()) == pytest.approx(a)
    ratio = pseudo_values({"a": a, "b": b}, lambda d: d["a"].mean() / d["b"].mean())
    assert ratio.mean() == pytest.approx(a.mean() / b.mean(), rel=1e-4)
    linear = (a - a.mean() / b.mean() * b) / b.mean()  # the delta method's form
    assert ratio.std() == pytest.approx(linear.std(), rel=0.01)


def test_pseudo_values_refuse_what_is_not_smooth():
    random = np.random.default_rng(0)
    tied = {name: random.standard_normal(400) for name in "abcdef"}
    tied = {
        name: values - values.mean() for name, values in tied.items()
    }  # a maximum of exact ties
    with pytest.raises(ValueError, match="not smooth"):
        pseudo_values(tied, lambda d: max(values.mean() for values in d.values()))
    with pytest.raises(ValueError, match="not smooth"):
        pseudo_values(tied, lambda d: float(d["a"].mean() > -1))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_ndcg_is_that_of_scikit_learn(k):
    scores = torch.randn(40, 40, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    wanted = ndcg_score(np.eye(40), scores.numpy(), k=k)
    assert ndcg(ranks_of_answers(scores), k).mean().item() == pytest.approx(wanted, abs=1e-12)
    assert ndcg(torch.tensor([1, 3, k + 1]), k)[::2].tolist() == [1, 0]
