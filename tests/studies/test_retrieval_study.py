"""Judging retrieval: cosines, the fitted temperature, and likelihood by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from reattend.studies.retrieval import cosines, fitted_temperature, judge, log_likelihood


def noisy(n=200, seed=0):
    """Scores of which the right ones are larger on average, but not the largest of every row."""
    return 2 * torch.eye(n) + torch.randn(n, n, generator=torch.Generator().manual_seed(seed))


def test_likelihood_by_hand():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert log_likelihood(scores, 0.5) == pytest.approx(2 - math.log(math.exp(2) + 1))


def test_the_fitted_temperature_is_the_best_and_follows_the_scale():
    scores = noisy()
    best = fitted_temperature(scores)
    for factor in (0.9, 1.1):
        assert log_likelihood(scores, best) > log_likelihood(scores, factor * best)
    assert fitted_temperature(3 * scores) == pytest.approx(3 * best, rel=0.01)


def test_a_common_scale_changes_no_judgement_and_validation_gives_the_temperature_alone():
    validation, test = noisy(seed=1), noisy(seed=2)
    found, scaled = judge(validation, test), judge(0.3 * validation, 0.3 * test)
    assert scaled.log_likelihood == pytest.approx(found.log_likelihood, abs=1e-4)
    assert scaled.ndcg == found.ndcg
    assert found.log_likelihood == log_likelihood(test, fitted_temperature(validation))


def test_cosines_are_those_of_torch():
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(cosines(x, x), F.cosine_similarity(x[:, None], x[None], dim=-1))
