"""Oracles of active multi-task representation learning: relevance, allocation, data, learning."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from reattend.theory.a_mtrl import (
    CORRUPTIONS,
    active_sampling,
    allocate,
    balanced_error,
    balanced_order,
    basis_pursuit,
    block_heads,
    bound_constants,
    bound_value,
    concatenated,
    corrupt,
    draw,
    erm_constant,
    estimate_relevance,
    excess_risk,
    fit_basis,
    fit_heads,
    fit_representation,
    head_error,
    l1_relevance,
    l2_relevance,
    lasso,
    lasso_path,
    make_problem,
    predictor,
    representation_error,
    ridge_predictor,
    sampling_weights,
    separating_constants,
    separating_erm_constant,
    separating_heads,
    stacked,
    statistics_of,
    total_cost,
    whitening,
)

SEEDS = (0, 1, 2)
SIZES = ((1, 7), (3, 11), (4, 40))  # k, M


def problem(seed, k, sources):
    """Gaussian heads and target, float64."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(k, sources, generator=generator, dtype=torch.float64)
    return heads, torch.randn(k, generator=generator, dtype=torch.float64)


def orthonormal(seed, d, k):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]


def sampled(seed, basis, heads, counts, noise):
    """Samples task by task, and their statistics stacked over the tasks."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for m, n in enumerate(counts):
        x = torch.randn(n, len(basis), generator=generator, dtype=torch.float64)
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        tasks.append((x, x @ basis @ heads[:, m] + noise * z))
    return tasks, concatenated([statistics_of(x, y) for x, y in tasks])


# Relevance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("k", "sources"), SIZES)
def test_both_relevances_reproduce_the_target_with_least_norm(seed, k, sources):
    heads, target = problem(seed, k, sources)
    l1, l2 = basis_pursuit(heads, target), l2_relevance(heads, target)
    torch.testing.assert_close(heads @ l1, target)
    torch.testing.assert_close(heads @ l2, target)
    assert l1.abs().sum() <= l2.abs().sum() + 1e-12
    assert l2.norm() <= l1.norm() + 1e-12
    assert (l1 != 0).sum() <= k


def test_basis_pursuit_refuses_a_target_outside_the_span():
    heads = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="no relevance"):
        basis_pursuit(heads, torch.tensor([1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("k", "sources"), SIZES)
def test_lasso_tends_to_basis_pursuit(seed, k, sources):
    heads, target = problem(seed, k, sources)
    small = torch.tensor(3e-5, dtype=torch.float64)
    found = lasso(heads, target, small, iterations=200_000, tolerance=1e-10)
    torch.testing.assert_close(found, basis_pursuit(heads, target), atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("k", "sources"), SIZES)
def test_lasso_agrees_with_scikit_learn(seed, k, sources):
    heads, target = problem(seed, k, sources)
    largest = (heads.T @ target).abs().max()
    for share in (0.5, 0.1):
        penalty = share * largest
        reference = Lasso(alpha=float(penalty) / k, fit_intercept=False, tol=1e-12, max_iter=10**6)
        reference.fit(heads.numpy(), target.numpy())
        found = lasso(heads, target, penalty, iterations=100_000, tolerance=1e-13)
        torch.testing.assert_close(found, torch.tensor(reference.coef_), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_lasso_is_zero_exactly_from_the_largest_penalty_on(seed):
    heads, target = problem(seed, 3, 11)
    largest = (heads.T @ target).abs().max()
    assert (lasso(heads, target, largest * 1.0001) == 0).all()
    assert (lasso(heads, target, largest * 0.999) != 0).any()


def test_lasso_of_a_batch_is_that_of_its_members():
    pairs = [problem(seed, 3, 11) for seed in SEEDS]
    heads, target = (torch.stack(part) for part in zip(*pairs, strict=True))
    penalty = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    together = lasso(heads, target, penalty, iterations=50_000, tolerance=1e-13)
    for i in range(3):
        alone = lasso(heads[i], target[i], penalty[i], iterations=50_000, tolerance=1e-13)
        torch.testing.assert_close(together[i], alone, atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_lasso_estimate_is_the_sparsest_on_the_path_within_the_error(seed):
    heads, target = problem(seed, 4, 40)
    allowed = torch.tensor(0.3, dtype=torch.float64)
    penalties, solutions = lasso_path(heads, target)
    residuals = (solutions @ heads.T - target).norm(dim=-1)
    chosen = l1_relevance(heads, target, allowed)
    first = int((residuals <= allowed).nonzero()[0])
    torch.testing.assert_close(chosen, solutions[first])
    assert first > 0
    assert residuals[first - 1] > allowed
    assert (penalties[1:] < penalties[:-1]).all()
    nothing_suffices = l1_relevance(heads, target, torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(nothing_suffices, solutions[-1])


def test_lasso_estimates_of_a_batch_keep_their_own_penalties():
    """A run that has its penalty keeps it while the path goes on for the others."""
    heads, target = problem(0, 4, 40)
    allowed = torch.tensor([2.0, 0.3, 0.05], dtype=torch.float64) * target.norm() / 2.5
    together = l1_relevance(heads.expand(3, -1, -1), target.expand(3, -1), allowed)
    for found, size in zip(together, allowed, strict=True):
        torch.testing.assert_close(found, l1_relevance(heads, target, size), atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[2])


def test_relevance_is_free_of_the_choice_of_basis():
    """(B Q, Q^-1 W) gives the same relevance, predictions and risk."""
    heads, target = problem(0, 3, 11)
    basis = orthonormal(1, 8, 3)
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turned_heads, turned_target = torch.linalg.solve(mix, heads), torch.linalg.solve(mix, target)
    torch.testing.assert_close(
        l2_relevance(turned_heads, turned_target), l2_relevance(heads, target)
    )
    torch.testing.assert_close(
        basis_pursuit(turned_heads, turned_target), basis_pursuit(heads, target), atol=1e-9, rtol=0
    )
    _, data = sampled(3, basis, target[:, None], [50], 0.5)
    truth = basis @ target
    plain, turned = predictor(basis, data), predictor(basis @ mix, data)
    torch.testing.assert_close(plain, turned)
    torch.testing.assert_close(excess_risk(plain, truth), excess_risk(turned, truth))


# Allocation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("total", [1000, 1013, 77_777])
def test_allocation_is_exact_and_respects_the_floor(seed, total):
    random = np.random.default_rng(seed)
    weights = torch.tensor(random.exponential(size=(5, 13)) ** 3)
    weights[0, 3:] = 0.0
    floor = torch.tensor(random.integers(0, 60, size=(5, 13)))
    found = allocate(weights, total, floor)
    assert (found.sum(-1) == total).all()
    assert (found >= floor).all()
    for row, weight, free in zip(found, weights, found > floor + 1, strict=True):
        if free.any():  # where the floor does not bind: some c with |n_m - c weight_m| <= 1
            row, weight = row[free], weight[free]
            assert ((row - 1) / weight).max() <= ((row + 1) / weight).min()


def test_allocation_of_whole_shares_is_those_shares():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    found = allocate(weights, 100, torch.zeros(4, dtype=torch.long))
    assert found.tolist() == [10, 20, 30, 40]


def test_allocation_refuses_the_impossible():
    floor = torch.tensor([6, 6])
    with pytest.raises(ValueError, match="floors take 12"):
        allocate(torch.ones(2), 11, floor)
    with pytest.raises(ValueError, match="not all zero"):
        allocate(torch.zeros(2), 20, floor)


@pytest.mark.parametrize("seed", SEEDS)
def test_allocation_by_absolute_relevance_is_the_best(seed):
    """sum nu^2 / n is ||nu||_1^2 / N at n ~ |nu|, and no random allocation is below."""
    random = np.random.default_rng(seed)
    relevance = torch.tensor(random.standard_normal(13))
    best = 1000 * sampling_weights(relevance, "l1")
    least = relevance.abs().sum() ** 2 / 1000
    torch.testing.assert_close(bound_value(relevance, best), least)
    others = 1000 * torch.tensor(random.dirichlet(np.ones(13), size=200))
    assert (bound_value(relevance.expand(200, 13), others) >= least).all()
    squared = 1000 * sampling_weights(relevance, "l2")
    torch.testing.assert_close(
        bound_value(relevance, squared), 13 * relevance.square().sum() / 1000
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("k", "sources"), SIZES)
def test_constants_are_ordered(seed, k, sources):
    heads, target = problem(seed, k, sources)
    found = bound_constants(basis_pursuit(heads, target), l2_relevance(heads, target))
    assert found["l1"] <= found["l2"] * (1 + 1e-12)
    assert found["l2"] <= found["uniform"] * (1 + 1e-12)


@pytest.mark.parametrize("sources", [2, 5, 40, 101])
def test_separating_instance_has_its_closed_form(sources):
    heads = separating_heads(sources)
    target = torch.ones(1, dtype=torch.float64)
    l1, l2 = basis_pursuit(heads, target), l2_relevance(heads, target)
    assert l1[0] == pytest.approx(1.0)
    assert (l1[1:] == 0).all()
    found, closed = bound_constants(l1, l2), separating_constants(sources)
    assert closed["l2"] == pytest.approx(sources / (1 + (sources - 1) / sources))
    for name, value in closed.items():
        assert found[name] == pytest.approx(value), name


@pytest.mark.parametrize("sources", [2, 5, 40])
@pytest.mark.parametrize("exponent", [0.25, 0.5])
def test_what_least_squares_attains_on_the_separating_instance(sources, exponent):
    heads, target = separating_heads(sources, exponent), torch.ones(1, dtype=torch.float64)
    shares = sampling_weights(l2_relevance(heads, target), "l2")
    closed = separating_erm_constant(sources, exponent)
    assert erm_constant(heads, target, shares) == pytest.approx(closed)
    if exponent == 0.25:
        assert closed == pytest.approx((1 + (sources - 1) / sources**0.5) / (2 - 1 / sources))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("k", "sources"), SIZES)
def test_what_least_squares_attains_is_least_at_the_l1_allocation(seed, k, sources):
    heads, target = problem(seed, k, sources)
    l1, l2 = basis_pursuit(heads, target), l2_relevance(heads, target)
    bound = bound_constants(l1, l2)
    attained = erm_constant(heads, target, sampling_weights(l1, "l1"))
    assert attained == pytest.approx(bound["l1"])
    uniform = torch.full((sources,), 1 / sources, dtype=torch.float64)
    assert erm_constant(heads, target, uniform) == pytest.approx(bound["uniform"])
    by_l2 = erm_constant(heads, target, sampling_weights(l2, "l2"))
    assert attained <= by_l2 * (1 + 1e-9)
    assert by_l2 <= bound["l2"] * (1 + 1e-9)
    random = np.random.default_rng(seed)
    for shares in random.dirichlet(np.ones(sources), size=50):
        assert erm_constant(heads, target, torch.tensor(shares)) >= attained * (1 - 1e-9)


def test_block_instance_is_k_separating_ones():
    heads = block_heads(4, 40)
    target = torch.full((4,), 0.5, dtype=torch.float64)
    l1, l2 = basis_pursuit(heads, target), l2_relevance(heads, target)
    assert (l1 != 0).nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
    found = bound_constants(l1, l2)
    assert found["l1"] == pytest.approx(4.0)
    assert found["l2"] == pytest.approx(4 * separating_constants(10)["l2"])
    with pytest.raises(ValueError, match="divide"):
        block_heads(3, 10)


@pytest.mark.parametrize("name", ["separating", "blocks", "random", "identical"])
def test_problems_are_consistent(name):
    problem = make_problem(name, 3, 12, 7, 2, np.random.default_rng(0))
    identity = torch.eye(problem.rank, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(problem.basis.mT @ problem.basis, identity)
    assert problem.rank == (1 if name in ("separating", "identical") else 2)
    torch.testing.assert_close(problem.truth.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    for relevance in (problem.nu1, problem.nu2):
        mixed = (problem.predictors.mT @ relevance[..., None]).squeeze(-1)
        torch.testing.assert_close(mixed, problem.truth)
    for weights in problem.weights().values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert (problem.heads[0] == problem.heads[1]).all() == (name != "random")
    if name == "identical":
        weights = problem.weights()
        torch.testing.assert_close(weights["L2"], weights["uniform"])


def test_costs_by_hand():
    samples = torch.tensor([0.0, 4.0, 9.0], dtype=torch.float64)
    assert total_cost(samples, "linear", 16.0) == 13
    assert total_cost(samples, "fixed", 16.0) == 45
    assert total_cost(samples, "concave", 16.0) == pytest.approx(20)


# Data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 9])  # fewer than, as many as, and more than d = 5
def test_drawn_statistics_have_the_moments_of_samples(n):
    runs, d, noise = 20_000, 5, 0.5
    truth = torch.linspace(-1, 1, d, dtype=torch.float64)
    counts = torch.full((runs, 1), n)
    found = draw(np.random.default_rng(0), counts, truth.expand(runs, 1, d), noise)
    x = torch.randn(runs, n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = torch.randn(runs, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x @ truth + noise * z
    direct = (x.mT @ x, (x.mT @ y[..., None]).squeeze(-1), (y**2).sum(-1))
    drawn = (found.gram[:, 0], found.moment[:, 0], found.energy[:, 0])
    for ours, reference in zip(drawn, direct, strict=True):
        for power in (1, 2):
            first, second = (ours**power).mean(0), (reference**power).mean(0)
            spread = ((ours**power).var(0) + (reference**power).var(0)).div(runs).sqrt()
            assert ((first - second).abs() <= 5 * spread).all()
    residual = found.energy - (found.moment * truth).sum(-1) * 2
    residual += (truth @ found.gram @ truth[:, None]).squeeze(-1)
    assert residual.mean() == pytest.approx(n * noise**2, rel=0.03)  # sum of squared noise
    assert (torch.linalg.matrix_rank(found.gram[:50, 0]) == min(n, d)).all()


def test_statistics_add_up():
    x = torch.randn(9, 4, dtype=torch.float64)
    y = torch.randn(9, dtype=torch.float64)
    added, whole = statistics_of(x[:4], y[:4]) + statistics_of(x[4:], y[4:]), statistics_of(x, y)
    for name in ("gram", "moment", "energy", "samples"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))


# Learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_free_data_is_recovered_exactly(seed):
    heads, target = problem(seed, 3, 11)
    basis = orthonormal(seed, 9, 3)
    _, data = sampled(seed, basis, heads, [12 + m for m in range(11)], 0.0)
    _, own = sampled(seed + 10, basis, target[:, None], [7], 0.0)
    found, learned_heads = fit_representation(data, 3, iterations=200, tolerance=1e-12)
    assert excess_risk(predictor(found, own), basis @ target) < 1e-10
    assert representation_error(found, basis @ target) < 1e-10
    torch.testing.assert_close(found @ learned_heads, basis @ heads, atol=1e-6, rtol=0)


def summed_loss(basis, heads, tasks):
    return sum(((y - x @ basis @ heads[:, m]) ** 2).sum() for m, (x, y) in enumerate(tasks))


@pytest.mark.parametrize("seed", SEEDS)
def test_learned_representation_is_stationary_for_the_summed_loss(seed):
    """Gradients of sum_m ||y_m - X_m B w_m||^2, from the raw samples, vanish: no averaging by task."""
    heads, _ = problem(seed, 2, 5)
    tasks, data = sampled(seed, orthonormal(seed, 6, 2), heads, [9, 30, 77, 12, 200], 0.3)
    basis, found = fit_representation(data, 2, iterations=2000, tolerance=1e-13)
    basis, found = basis.requires_grad_(), found.requires_grad_()
    loss = summed_loss(basis, found, tasks)
    for gradient in torch.autograd.grad(loss, (basis, found)):
        assert gradient.abs().max() < 1e-6 * loss


@pytest.mark.parametrize("seed", SEEDS)
def test_basis_solves_the_normal_equations_written_out(seed):
    """span(B) is that of the minimiser of ||y - (w_m kron x)^T vec B||^2 over all rows of all tasks."""
    heads, _ = problem(seed, 3, 5)
    tasks, data = sampled(seed, orthonormal(seed, 6, 3), heads, [9, 30, 77, 12, 200], 0.3)
    rows = torch.cat([torch.kron(heads[:, m], x) for m, (x, _) in enumerate(tasks)])
    labels = torch.cat([y for _, y in tasks])
    direct = torch.linalg.lstsq(rows, labels[:, None]).solution.reshape(3, 6).T
    direct = torch.linalg.qr(direct)[0]
    found = fit_basis(heads, data)
    torch.testing.assert_close(found @ found.T, direct @ direct.T)


def test_steps_never_raise_the_loss():
    heads, _ = problem(0, 2, 5)
    tasks, data = sampled(0, orthonormal(0, 6, 2), heads, [9, 30, 77, 12, 200], 0.3)
    basis, losses = orthonormal(5, 6, 2), []
    for _ in range(6):
        losses.append(float(summed_loss(basis, fit_heads(basis, data), tasks)))
        basis = fit_basis(fit_heads(basis, data), data)
    assert all(new <= old * (1 + 1e-12) for old, new in pairwise(losses))
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64))


def test_batched_learning_is_that_of_its_members():
    heads, _ = problem(0, 2, 5)
    parts = [sampled(s, orthonormal(s, 6, 2), heads, [40] * 5, 0.3)[1] for s in SEEDS]
    data = stacked(parts)
    assert data.gram.shape == (3, 5, 6, 6)
    together, _ = fit_representation(data, 2, iterations=300, tolerance=1e-12)
    for i, part in enumerate(parts):
        alone, _ = fit_representation(part, 2, iterations=300, tolerance=1e-12)
        torch.testing.assert_close(together[i] @ together[i].T, alone @ alone.T, atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_full_rank_makes_the_representation_vacuous(seed):
    """k = d: the target's risk is that of its own least squares, whatever the sources."""
    heads, target = problem(seed, 5, 7)
    basis = orthonormal(seed, 5, 5)
    _, data = sampled(seed, basis, heads, [30] * 7, 0.5)
    tasks, own = sampled(seed + 10, basis, target[:, None], [25], 0.5)
    found, _ = fit_representation(data, 5)
    alone = torch.linalg.lstsq(*(part[:, None] if part.ndim == 1 else part for part in tasks[0]))
    torch.testing.assert_close(predictor(found, own), alone.solution.squeeze(1))


def test_unused_sources_have_no_say():
    heads, _ = problem(0, 2, 5)
    basis = orthonormal(0, 6, 2)
    _, data = sampled(0, basis, heads, [40, 40, 40, 0, 0], 0.3)
    _, used = sampled(0, basis, heads[:, :3], [40, 40, 40], 0.3)
    with_unused, learned = fit_representation(data, 2, iterations=300, tolerance=1e-12)
    without, _ = fit_representation(used, 2, iterations=300, tolerance=1e-12)
    torch.testing.assert_close(with_unused @ with_unused.T, without @ without.T, atol=1e-8, rtol=0)
    assert (learned[:, 3:] == 0).all()


@pytest.mark.parametrize("rule", ["l1", "l2"])
def test_representation_error_follows_the_first_order_law(rule):
    """sigma^2 (d - k) times `erm_constant` / N, for both allocations, within sampling error."""
    d, runs, total, noise = 12, 300, 40_000, 0.5
    heads = block_heads(2, 10)
    target = torch.full((2,), 0.5**0.5, dtype=torch.float64)
    relevance = basis_pursuit(heads, target) if rule == "l1" else l2_relevance(heads, target)
    counts = allocate(sampling_weights(relevance, rule), total, torch.full((10,), 30))
    basis = orthonormal(0, d, 2)
    predictors = (basis @ heads).T.expand(runs, 10, d)
    data = draw(np.random.default_rng(0), counts.expand(runs, 10), predictors, noise)
    found, _ = fit_representation(data, 2)
    errors = representation_error(found, (basis @ target).expand(runs, d))
    law = noise**2 * (d - 2) * erm_constant(heads, target, counts / total) / total
    spread = float(errors.std() / runs**0.5)
    assert float(errors.mean()) == pytest.approx(law, abs=4 * spread + 0.02 * law)


def test_identical_sources_make_all_allocations_equal():
    heads, target = torch.ones(1, 10, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    constants = bound_constants(basis_pursuit(heads, target), l2_relevance(heads, target))
    assert list(constants.values()) == pytest.approx([1.0, 1.0, 1.0])
    random = np.random.default_rng(0)
    d, runs = 8, 400
    truth = torch.nn.functional.one_hot(torch.tensor(0), d).double()
    means, spreads = [], []
    for weights in (torch.eye(10)[0].double(), torch.ones(10, dtype=torch.float64)):
        counts = allocate(weights, 2000, torch.full((10,), 20))
        data = draw(random, counts.expand(runs, 10), truth.expand(runs, 10, d), 0.5)
        errors = representation_error(fit_representation(data, 1)[0], truth.expand(runs, d))
        means.append(float(errors.mean()))
        spreads.append(float(errors.std()) / runs**0.5)
    assert abs(means[0] - means[1]) < 4 * np.hypot(*spreads)


def test_head_error_is_the_error_of_the_head():
    """Over many targets, the mean of head_error^2 is the mean squared error of the fitted heads."""
    runs, d, k, noise = 2000, 6, 3, 0.5
    basis, truth = orthonormal(0, d, k), torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    counts = torch.full((runs, 1), 30)
    data = draw(np.random.default_rng(0), counts, (basis @ truth).expand(runs, 1, d), noise)
    heads = fit_heads(basis.expand(runs, d, k), data)
    squared = ((heads.squeeze(-1) - truth) ** 2).sum(-1)
    predicted = head_error(basis.expand(runs, d, k), heads, data) ** 2
    assert float(predicted.mean()) == pytest.approx(float(squared.mean()), rel=0.08)
    few = draw(np.random.default_rng(0), torch.tensor([3]), (basis @ truth)[None], noise)
    with pytest.raises(ValueError, match="more than 3"):
        head_error(basis, fit_heads(basis, few), few)


def test_active_sampling_finds_the_strong_source_and_spends_the_budget():
    random = np.random.default_rng(0)
    runs, d = 5, 10
    heads = separating_heads(12)
    basis = orthonormal(0, d, 1)
    predictors = (basis @ heads).T.expand(runs, 12, d)
    own = draw(random, torch.full((runs, 1), 60), basis.T.expand(runs, 1, d), 0.3)

    def draw_more(counts):
        return draw(random, counts, predictors, 0.3)

    explored = draw_more(torch.full((runs, 12), 50))
    first = fit_representation(explored, 1)
    learned = active_sampling(explored, first, draw_more, own, [2400], "l1")
    assert (learned.samples.sum(-1) == 2400).all()
    assert (learned.samples >= 50).all()
    assert (learned.relevance.argmax(-1) == 0).all()
    assert (learned.samples[:, 0] > 1500).all()
    repeated = active_sampling(explored, first, draw_more, own, [1200, 2400], "l2")
    assert (repeated.samples.sum(-1) == 2400).all()
    basis_found, heads_found = first
    minimal = estimate_relevance(basis_found, heads_found, own, "l2")
    torch.testing.assert_close(
        (heads_found @ minimal[..., None]).squeeze(-1), fit_heads(basis_found, own).squeeze(-1)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_ridge_takes_the_strength_of_least_leave_one_out_error(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(15, 9, generator=generator, dtype=torch.float64)
    y = torch.randn(15, generator=generator, dtype=torch.float64)
    strengths = [0.1, 3.0, 50.0]

    def solve(keep, strength):
        a = x[keep].T @ x[keep] + strength * torch.eye(9, dtype=torch.float64)
        return torch.linalg.solve(a, x[keep].T @ y[keep])

    errors = []
    for strength in strengths:
        keeps = [torch.arange(15) != i for i in range(15)]
        errors.append(
            sum(float(y[i] - x[i] @ solve(keep, strength)) ** 2 for i, keep in enumerate(keeps))
        )
    best = strengths[int(np.argmin(errors))]
    everything = torch.ones(15, dtype=torch.bool)
    torch.testing.assert_close(ridge_predictor(x, y, strengths), solve(everything, best))


# Real tasks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_change_pictures_and_stay_pictures(kind):
    images = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.5
    before = images.clone()
    found = corrupt(images, kind, torch.Generator().manual_seed(1))
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found - images).abs() > 0.01).flatten(1).any(1).all()
    torch.testing.assert_close(images, before)
    again = corrupt(images, kind, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, again)


def test_corruption_must_be_known():
    with pytest.raises(ValueError, match="unknown corruption 'snow'"):
        corrupt(torch.zeros(1, 8, 8), "snow", torch.Generator())


@pytest.mark.parametrize("seed", SEEDS)
def test_every_even_prefix_of_a_task_is_balanced(seed):
    random = np.random.default_rng(seed)
    labels = torch.tensor(random.integers(0, 5, 101))
    order = balanced_order(labels, 2, random)
    inside = (labels[order] == 2).long()
    assert len(order.unique()) == len(order) == 2 * int((labels == 2).sum())
    assert (inside.reshape(-1, 2).sum(1) == 1).all()


def test_whitened_components_have_unit_variance():
    x = torch.randn(400, 9, generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] *= 3.0
    x += 2.0
    centre, matrix, kept = whitening(x, 4)
    scores = (x - centre) @ matrix
    torch.testing.assert_close(scores.T @ scores / 400, torch.eye(4, dtype=torch.float64))
    left = torch.linalg.svdvals(x - centre) ** 2
    assert kept == pytest.approx(float(left[:4].sum() / left.sum()))


def test_balanced_error_by_hand():
    scores = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0])
    member = torch.tensor([True, True, False, False, False, False])
    assert balanced_error(scores, member) == pytest.approx(100 * (0.5 + 0.75) / 2)
    assert balanced_error(torch.zeros(6), member) == pytest.approx(50)
