"""InfoNCE with hard negatives and masks, and SDM: against torch's own and by hand."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from reattend.training.contrastive import (
    answer_log_probability,
    cosine_logits,
    counted_candidates,
    shared_targets,
    similarity_distribution_matching,
    symmetric_info_nce,
)

SHAPES = [(1, 1, 3), (5, 2, 7), (9, 7, 13)]  # batch, mined, width


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("batch", "mined", "width"), SHAPES)
def test_without_masks_it_is_the_cross_entropy_of_interleaved_candidates(batch, mined, width, seed):
    """Official layout: each answer before its own negatives, so the target of query i is i (1 + mined)."""
    queries = normal(batch, width, seed=seed)
    answers, negatives = (
        normal(batch, width, seed=seed + 10),
        normal(batch, mined, width, seed=seed + 20),
    )
    interleaved = torch.cat([answers[:, None], negatives], 1).flatten(0, 1)
    scores = F.normalize(queries, dim=-1) @ F.normalize(interleaved, dim=-1).T / 0.02
    wanted = F.cross_entropy(scores, torch.arange(batch) * (1 + mined))
    candidates = torch.cat([answers, negatives.flatten(0, 1)])
    found = -answer_log_probability(cosine_logits(queries, candidates, 0.02)).mean()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_by_hand():
    """Cosines 1 and 0 at temperature .5: p = e^2 / (e^2 + 1) of two candidates."""
    unit = torch.eye(2, dtype=torch.float64)
    log_p = answer_log_probability(cosine_logits(3 * unit, 7 * unit, 0.5))
    assert log_p.tolist() == pytest.approx([2 - math.log(math.exp(2) + 1)] * 2, abs=1e-12)


def test_a_copy_of_the_own_answer_is_not_counted_and_nothing_else_is_left_out():
    answers = torch.tensor([4, 7, 4])
    negatives = torch.tensor([[7, 1], [2, 3], [9, 9]])
    counted = counted_candidates(answers, negatives)
    wanted = torch.ones(3, 9, dtype=torch.bool)
    wanted[0, 2] = wanted[2, 0] = False  # queries 0 and 2 share their answer
    wanted[1, 3] = False  # the answer of query 1 was mined for query 0
    assert torch.equal(counted, wanted)


def test_masked_candidates_change_neither_value_nor_gradient():
    queries = normal(3, 5).requires_grad_()
    candidates = normal(9, 5, seed=1)
    counted = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.6
    counted.diagonal().fill_(True)
    log_p = answer_log_probability(cosine_logits(queries, candidates, 0.1, counted))
    for i in range(3):
        kept = counted[i].nonzero()[:, 0]
        scores = F.normalize(queries[i : i + 1], dim=-1) @ F.normalize(candidates[kept], dim=-1).T
        own = (kept == i).nonzero()[0]
        torch.testing.assert_close(
            log_p[i], -F.cross_entropy(scores / 0.1, own), atol=1e-10, rtol=0
        )
    (gradient,) = torch.autograd.grad(log_p.sum(), queries)
    assert gradient.isfinite().all()


def test_more_negatives_never_lower_the_loss():
    queries, candidates = normal(4, 6), normal(12, 6, seed=1)
    values = [
        -answer_log_probability(cosine_logits(queries, candidates[:n], 0.05)) for n in (4, 5, 8, 12)
    ]
    for fewer, more in itertools.pairwise(values):
        assert (more >= fewer).all()


@pytest.mark.parametrize("n", [1, 4, 7])
def test_symmetric_info_nce_of_one_matrix_is_clips(n):
    logits, own = normal(n, n), torch.arange(n)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    for targets in (None, torch.eye(n), shared_targets(own)):
        loss = symmetric_info_nce(logits, logits, targets)
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


def test_symmetric_info_nce_reads_rows_of_one_and_columns_of_the_other():
    rows, columns = normal(5, 5), normal(5, 5, seed=1)
    expected = (
        F.cross_entropy(rows, torch.arange(5)) + F.cross_entropy(columns.T, torch.arange(5))
    ) / 2
    for targets in (None, torch.eye(5)):
        loss = symmetric_info_nce(rows, columns, targets)
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)


def test_shared_targets_by_hand():
    targets = shared_targets(torch.tensor([7, 3, 7, 7]))
    third = [1 / 3, 0, 1 / 3, 1 / 3]
    expected = torch.tensor([third, [0, 1, 0, 0], third, third]).double()
    torch.testing.assert_close(targets, expected, atol=1e-7, rtol=0)
    # Equal rows and columns for equal items: the loss is at best the entropy of the targets.
    logits = 50 * (targets > 0).double()
    best = symmetric_info_nce(logits, logits, targets)
    torch.testing.assert_close(best, 0.75 * torch.tensor(3.0).double().log(), atol=1e-12, rtol=0)


def test_refusals():
    with pytest.raises(ValueError, match="leave it out when mining"):
        counted_candidates(torch.tensor([1, 2]), torch.tensor([[5], [2]]))
    with pytest.raises(ValueError, match="temperature must be positive"):
        cosine_logits(normal(2, 3), normal(2, 3), 0.0)


def test_sdm_of_two_pairs():
    """p = 3/4 for the right one: KL = .75 log(.75 / 1) + .25 log(.25 / 1e-8), in both directions."""
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]], dtype=torch.float64)
    expected = 0.75 * math.log(0.75) + 0.25 * math.log(0.25e8)
    found = similarity_distribution_matching(logits, torch.eye(2, dtype=torch.float64))
    assert found.item() == pytest.approx(2 * expected, abs=1e-7)


def test_sdm_is_nothing_where_probabilities_are_the_targets():
    targets = shared_targets(torch.tensor([4, 7, 4, 9, 4]))
    found = similarity_distribution_matching(targets.clamp_min(1e-30).log(), targets)
    assert abs(found.item()) < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sdm_is_the_divergence_of_both_directions(seed):
    logits = 3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)).double()
    targets = shared_targets(torch.tensor([0, 1, 2, 1, 3]))
    both = [
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=table),
            torch.distributions.Categorical(probs=targets + 0.01, validate_args=False),
        )
        for table in (logits, logits.T)
    ]
    # Categorical divides q + floor by its sum, which is the same in every row.
    shift = math.log(1 + 5 * 0.01)
    expected = sum(kl.mean().item() - shift for kl in both)
    found = similarity_distribution_matching(logits, targets, floor=0.01)
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_sdm_pulls_matches_together_and_pushes_others_apart():
    logits = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    targets = shared_targets(torch.tensor([0, 1, 0, 2]))
    similarity_distribution_matching(logits, targets).backward()
    assert (logits.grad[targets > 0] < 0).all()
    assert (logits.grad[targets == 0] > 0).all()
    assert torch.autograd.gradcheck(lambda x: similarity_distribution_matching(x, targets), logits)
