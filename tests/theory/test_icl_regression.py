"""Oracles of in-context linear regression: attention, circuits, reduced model, predictors."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.linear_model import Ridge
from torch import nn

from reattend.theory.icl_regression import (
    MultiHeadAttention,
    Regressions,
    approximate_risk,
    attend,
    best_combination,
    best_preconditioner,
    diagonal_spread,
    gradient_flow,
    gradient_step,
    imbalance,
    in_eigenbasis,
    interaction,
    kac_murdock,
    last_entries,
    mean_diagonal,
    monte_carlo_risk,
    off_diagonal,
    other_entries,
    reduced_features,
    ridge,
    ridge_limit,
    risk_gradients,
    sample_multitask,
    sample_regressions,
    shared_heads,
    single_head_limit,
    two_head_limit,
)

SETTING = {"dim": 5, "length": 40, "noise": 0.1}  # the paper's
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 4), (1, 5, 17, 3), (3, 2, 40, 5)]  # seeds, batch, length, dim
IDS = [f"S{s}-B{b}-L{n}-d{d}" for s, b, n, d in SHAPES]
SEEDS = [0, 1, 2]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def regressions(shape, length, dim, seed=0, **options):
    return sample_regressions(shape, length, dim, 0.1, rng(seed), dtype=torch.float64, **options)


def attention(heads, dim, tasks=1, seeds=1, seed=0, linear_length=None):
    return MultiHeadAttention(heads, dim, tasks, seeds, rng(seed), linear_length).double()


def by_hand(model, data):
    """The paper's equation, seed by seed, query by query, head by head."""
    width = model.q.shape[-1]
    out = torch.zeros(*data.query.shape[:2], len(model.heads), data.target.shape[-1]).double()
    for seed, batch in np.ndindex(*data.query.shape[:2]):
        z = torch.cat([data.inputs[seed, batch].T, data.labels[seed, batch].T])
        zq = torch.cat([data.query[seed, batch], torch.zeros_like(data.target[seed, batch])])
        head = 0
        for number, heads in enumerate(model.heads):
            for _ in range(heads):
                q, k, v, o = (getattr(model, name)[seed, head] for name in "qkvo")
                scores = (k @ z).T @ (q @ zq) / math.sqrt(width)
                linear = model.linear_length
                weights = torch.softmax(scores, 0) if linear is None else scores / linear
                out[seed, batch, number] = out[seed, batch, number] + o @ v @ z @ weights
                head += 1
    return out


@pytest.mark.parametrize("linear_length", [None, 7], ids=["softmax", "linear"])
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize(("seeds", "batch", "length", "dim"), SHAPES, ids=IDS)
def test_stacked_models_equal_the_papers_equation_forward_and_backward(
    seeds, batch, length, dim, tasks, linear_length
):
    supports = torch.ones(tasks, dim, dtype=torch.bool)
    data = sample_multitask((seeds, batch), length, supports, 0.1, rng(dim), dtype=torch.float64)
    model = attention((1, 3, 2), dim, tasks, seeds, length, linear_length)
    fast, slow = model(data), by_hand(model, data)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-12)
    losses = (fast - data.target.unsqueeze(-2)).square().sum(-1).mean(-2)
    torch.testing.assert_close(model.losses(data), losses)
    direction = torch.randn(fast.shape, generator=rng(), dtype=torch.float64)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad((out * direction).sum(), parameters) for out in (fast, slow)]
    for name, ours, theirs in zip("qkvo", *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10, msg=f"gradient of {name}")


@pytest.mark.parametrize("seed", SEEDS)
def test_models_trained_side_by_side_equal_models_trained_alone(seed):
    together = attention((1, 3), 4, seeds=2, seed=seed)
    alone = attention((3,), 4, seeds=2, seed=seed)
    own = together.of_model(1)
    assert own == slice(1, 4)
    with torch.no_grad():
        for name in "qkvo":
            getattr(alone, name).copy_(getattr(together, name)[:, own])
    for model in (together, alone):
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(5):
            optimiser.zero_grad()
            model.losses(regressions((2, 16), 9, 4, step)).sum().backward()
            optimiser.step()
    torch.testing.assert_close(together.kq()[:, own], alone.kq())
    torch.testing.assert_close(together.ov()[:, own], alone.ov())


def test_weights_start_like_linear_layers():
    model = MultiHeadAttention((1, 8), 5, 1, 200, rng())
    torch.manual_seed(0)
    for name in "qkv":
        weight = getattr(model, name)
        layer = nn.Linear(6, 60_000, bias=False).weight
        assert weight.abs().max() <= 6**-0.5
        assert weight.std().item() == pytest.approx(layer.std().item(), rel=0.01)
    joint = nn.Linear(48, 10_000, bias=False).weight  # one projection from eight heads
    assert model.o[:, 0].std().item() == pytest.approx(1 / math.sqrt(3 * 6), rel=0.05)
    assert model.o[:, 1:].std().item() == pytest.approx(joint.std().item(), rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
def test_order_of_the_context_does_not_matter(seed):
    data, model = regressions((2, 5), 11, 4, seed), attention((1, 2), 4, seeds=2, seed=seed)
    order = torch.randperm(11, generator=rng(seed))
    shuffled = Regressions(
        data.inputs[..., order, :], data.labels[..., order, :], data.query, data.target
    )
    torch.testing.assert_close(model(shuffled), model(data))


@pytest.mark.parametrize("linear_length", [None, 9], ids=["softmax", "linear"])
def test_a_context_repeated_four_times(linear_length):
    """Softmax attention averages, so nothing changes; linear attention adds, so it is four times as much."""
    data = regressions((2, 5), 9, 4)
    repeated = Regressions(
        data.inputs.repeat(1, 1, 4, 1), data.labels.repeat(1, 1, 4, 1), data.query, data.target
    )
    model = attention((1, 2), 4, seeds=2, linear_length=linear_length)
    factor = 1 if linear_length is None else 4
    torch.testing.assert_close(model(repeated), factor * model(data))


def test_last_column_of_kq_is_never_trained():
    data, model = regressions((1, 8), 9, 4), attention((2,), 4)
    kq = model.kq().detach().requires_grad_()
    read = attend(data.tokens, data.query_token, kq)
    read.square().sum().backward()
    assert (kq.grad[..., -1] == 0).all()
    assert (kq.grad[..., :-1] != 0).all()


# The reduced model --------------------------------------------------------------------------------


def hand_set(omega, mu, dim, linear_length=None):
    """Q = omega sqrt(width) I_x, K = I_x, V = e_y e_y^T, O = mu e_y^T, differentiable."""
    heads, width = len(omega), dim + 1
    model = attention((heads,), dim, linear_length=linear_length)
    covariates = torch.diag(torch.tensor([1.0] * dim + [0.0])).double()
    label = torch.eye(width, dtype=torch.float64)[-1]
    weights = {
        "q": omega[None, :, None, None] * math.sqrt(width) * covariates,
        "k": covariates.expand(1, heads, width, width),
        "v": torch.outer(label, label).expand(1, heads, width, width),
        "o": mu[None, :, None, None] * label,
    }
    for name, weight in weights.items():
        delattr(model, name)
        setattr(model, name, weight)
    return model


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("batch", "length", "dim"), [s[1:] for s in SHAPES], ids=IDS)
def test_reduced_model_equals_attention_with_hand_set_weights(batch, length, dim, seed):
    data = regressions((1, batch), length, dim, seed)
    omega, mu = (
        torch.randn(3, generator=rng(seed + k), dtype=torch.float64).requires_grad_()
        for k in (10, 20)
    )
    full = hand_set(omega, mu, dim)(data)[..., 0, 0]
    reduced = reduced_features(data, omega) @ mu
    torch.testing.assert_close(full, reduced, atol=1e-12, rtol=1e-12)
    theirs = torch.autograd.grad(full.square().sum(), (omega, mu))
    ours = torch.autograd.grad(reduced.square().sum(), (omega, mu))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


def test_circuits_of_hand_set_weights_are_omega_and_mu():
    omega, mu = torch.tensor([0.3, -0.2]).double(), torch.tensor([3.0, -2.0]).double()
    model = hand_set(omega, mu, 5)
    kq, ov = model.kq(), model.ov()
    torch.testing.assert_close(mean_diagonal(kq, 5)[0], omega)
    torch.testing.assert_close(last_entries(ov)[0, :, 0], mu)
    for pattern in (off_diagonal(kq, 5), diagonal_spread(kq, 5), other_entries(ov)):
        torch.testing.assert_close(pattern, torch.zeros(1, 2).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_gradients_of_the_approximate_risk_equal_autograd(heads, seed):
    mu, omega = (
        torch.randn(3, heads, generator=rng(seed + k), dtype=torch.float64).requires_grad_()
        for k in (1, 2)
    )
    expected = torch.autograd.grad(approximate_risk(mu, omega, **SETTING).sum(), (mu, omega))
    for ours, theirs in zip(risk_gradients(mu, omega, **SETTING), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-10)


@pytest.mark.parametrize("scale", [0.05, 0.1])
def test_approximate_risk_against_monte_carlo_where_it_should_hold(scale):
    omega = torch.tensor([scale, -scale]).double()
    mu = torch.linalg.solve(interaction(omega, 5, 400, 0.1), omega)  # mu*(omega) = M^-1 omega
    data = regressions((20_000,), 400, 5)
    error = reduced_features(data, omega) @ mu - data.target[:, 0]
    assert approximate_risk(mu, omega, 5, 400, 0.1).item() == pytest.approx(
        error.square().mean().item(), rel=0.03
    )


def test_approximate_risk_is_too_low_for_large_omega_and_short_contexts():
    omega = torch.tensor([0.45]).double()
    mu = torch.linalg.solve(interaction(omega, **SETTING), omega)
    data = regressions((100_000,), 40, 5)
    error = reduced_features(data, omega) @ mu - data.target[:, 0]
    ratio = approximate_risk(mu, omega, **SETTING).item() / error.square().mean().item()
    assert 0.87 < ratio < 0.93


def test_limits_of_the_approximate_risk():
    def best(omega):
        omega = torch.tensor(omega).double()
        mu = torch.linalg.solve(interaction(omega, **SETTING), omega)
        return approximate_risk(mu, omega, **SETTING).item()

    single = minimize_scalar(lambda w: best([w]), bounds=(0.01, 2), method="bounded")
    assert single.x == pytest.approx(5**-0.5, abs=1e-4)
    assert single.fun == pytest.approx(single_head_limit(**SETTING), abs=1e-8)
    assert single_head_limit(**SETTING) == pytest.approx(0.3721, abs=1e-4)
    assert two_head_limit(**SETTING) == pytest.approx(0.2209, abs=1e-4)
    risks = [best([w, -w]) for w in (0.4, 0.2, 0.1, 0.01)]
    assert risks == sorted(risks, reverse=True)  # the infimum is approached, not attained
    assert risks[-1] == pytest.approx(two_head_limit(**SETTING), abs=1e-4)
    assert risks[-1] > two_head_limit(**SETTING)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_heads_become_the_debiased_step_as_omega_vanishes(seed):
    data, step = regressions((50,), 40, 5, seed), 0.9
    target = step * gradient_step(data, debiased=True)[:, 0]

    def difference(w):
        omega = torch.tensor([w, -w]).double()
        heads = reduced_features(data, omega) @ torch.tensor([1.0, -1.0]).double()
        return (step / (2 * w) * heads - target).abs().max().item()

    for w in (0.04, 0.02):
        assert difference(w) / difference(w / 2) == pytest.approx(4, rel=0.1)  # O(w^2)


def test_monte_carlo_constants_of_the_reduced_model():
    train, test = regressions((40_000,), 40, 5, 1), regressions((40_000,), 40, 5, 2)

    def risk(features):
        mu = best_combination(features(train), train.target[:, 0])
        return (features(test) @ mu - test.target[:, 0]).square().mean().item(), mu

    single, _ = risk(lambda data: reduced_features(data, torch.tensor([0.5]).double()))
    pair = torch.tensor([0.13, -0.13]).double()
    double, mu = risk(lambda data: reduced_features(data, pair))
    debiased, _ = risk(lambda data: gradient_step(data, debiased=True))
    plain, step = risk(lambda data: gradient_step(data, debiased=False))
    bayes = (ridge(test, 0.5) - test.target).square().mean().item()
    assert single == pytest.approx(0.41, rel=0.03)
    assert double == pytest.approx(0.246, rel=0.03)
    assert mu.tolist() == pytest.approx([3.4, -3.4], rel=0.05)
    assert debiased == pytest.approx(0.246, rel=0.03)
    assert plain == pytest.approx(0.243, rel=0.03)
    assert bayes == pytest.approx(0.1144, rel=0.03)
    assert plain < debiased  # E x = 0: nothing to debias
    preconditioner = best_preconditioner(torch.ones(5).double(), 40, 0.1)
    assert step.item() == pytest.approx(preconditioner[0].item(), rel=0.02)


def test_debiasing_wins_when_covariates_have_a_mean():
    errors = {}
    for debiased in (True, False):
        train, test = (regressions((20_000,), 40, 5, seed, mean=1.0) for seed in (1, 2))
        step = best_combination(gradient_step(train, debiased=debiased), train.target[:, 0])
        error = gradient_step(test, debiased=debiased) @ step - test.target[:, 0]
        errors[debiased] = error.square().mean().item()
    assert errors[True] < 0.9 * errors[False]


# Gradient flow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_flow_follows_small_explicit_steps_and_never_climbs(seed):
    mu, omega = 0.3 * torch.randn(2, 2, generator=rng(seed), dtype=torch.float64)
    states = gradient_flow(mu, omega, 4.0, **SETTING)(np.linspace(0, 4, 41))
    path = torch.from_numpy(states)
    risks = approximate_risk(path[:2].T, path[2:].T, **SETTING)
    assert (risks.diff() < 1e-9).all()
    size = 1e-3
    for _ in range(round(4 / size)):
        toward_mu, toward_omega = risk_gradients(mu, omega, **SETTING)
        mu, omega = mu - size * toward_mu, omega - size * toward_omega
    torch.testing.assert_close(path[:, -1], torch.cat([mu, omega]), atol=1e-2, rtol=1e-2)


def test_gradient_flow_keeps_mirrored_heads_mirrored_and_lowers_omega():
    flow = gradient_flow(
        torch.tensor([0.1, -0.1]).double(), torch.tensor([0.1, -0.1]).double(), 2000.0, **SETTING
    )
    early, late = flow(np.array([5.0, 2000.0])).T
    for state in (early, late):
        assert state[[0, 2]] == pytest.approx(-state[[1, 3]], rel=1e-4)
    assert late[2] < 0.6 * early[2]
    assert late[0] > early[0]
    eta = late[:2] @ late[2:]
    assert eta == pytest.approx(1 / (1 + 5 * 1.1 / 40), abs=0.01)


def test_gradient_flow_of_heads_with_one_sign_stays_at_the_risk_of_one_head():
    start = torch.tensor([0.1, 0.2]).double()
    end = torch.from_numpy(gradient_flow(start, start, 2000.0, **SETTING)(np.array([2000.0])))[:, 0]
    risk = approximate_risk(end[:2], end[2:], **SETTING).item()
    assert risk == pytest.approx(single_head_limit(**SETTING), abs=1e-4)


# Predictors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("seeds", "batch", "length", "dim"), SHAPES, ids=IDS)
def test_gradient_step_is_minus_the_gradient_of_the_context_loss(seeds, batch, length, dim, seed):
    data = regressions((seeds, batch), length, dim, seed)
    for debiased in (False, True):
        beta = torch.zeros(seeds, batch, dim, 1, dtype=torch.float64, requires_grad=True)
        inputs = data.inputs - data.inputs.mean(-2, keepdim=True) if debiased else data.inputs
        loss = (data.labels - inputs @ beta).square().mean(-2).sum() / 2
        (gradient,) = torch.autograd.grad(loss, beta)
        expected = -torch.einsum("...d,...dt->...t", data.query, gradient)
        torch.testing.assert_close(gradient_step(data, debiased=debiased), expected)


def test_linear_attention_with_hand_set_weights_is_a_gradient_step():
    data = regressions((1, 6), 13, 4)
    omega, mu = torch.tensor([0.5]).double(), torch.tensor([1.6]).double()
    step = hand_set(omega, mu, 4, linear_length=13)(data)[..., 0, :]
    torch.testing.assert_close(step, 0.8 * gradient_step(data, debiased=False))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("length", "dim"), [(1, 1), (3, 5), (17, 4), (40, 5)])
def test_ridge_equals_scikit_learn(length, dim, seed):
    data = regressions((1, 1), length, dim, seed)
    theirs = Ridge(alpha=0.1 * dim, fit_intercept=False)
    theirs.fit(data.inputs[0, 0].numpy(), data.labels[0, 0, :, 0].numpy())
    expected = theirs.predict(data.query[0].numpy())[0]
    assert ridge(data, 0.1 * dim).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("penalty", [0.25, 1.0])
def test_bayes_penalty_is_best(penalty):
    data = regressions((40_000,), 20, 5)
    loss = {p: (ridge(data, p) - data.target).square().mean() for p in (0.5, penalty)}
    assert loss[0.5] < loss[penalty]


def test_asymptotic_ridge_risk():
    assert ridge_limit(**SETTING) == pytest.approx(0.1141, abs=1e-4)
    data = regressions((4_000,), 240, 30)
    risk = (ridge(data, 3.0) - data.target).square().mean().item()
    assert risk == pytest.approx(ridge_limit(30, 240, 0.1), rel=0.05)


def test_best_preconditioner_against_least_squares():
    variances = torch.tensor([0.4, 1.0, 2.5]).double()
    data = regressions((200_000,), 20, 3, root=variances.sqrt().diag())
    correlation = (data.inputs * data.labels).mean(-2)  # 1/L sum_l y_l x_l
    fitted = best_combination(correlation * data.query, data.target[:, 0])
    torch.testing.assert_close(fitted, best_preconditioner(variances, 20, 0.1), rtol=0.05, atol=0)


# Data and patterns --------------------------------------------------------------------------------


def test_moments_of_the_tasks():
    covariance = kac_murdock(4, 0.6)
    root = torch.linalg.cholesky(covariance)
    data = regressions((2, 20_000), 3, 4, root=root.expand(2, 4, 4))
    flat = data.inputs.flatten(0, 2)
    torch.testing.assert_close(flat.T @ flat / len(flat), covariance, atol=0.03, rtol=0)
    signal = covariance.trace().item() / 4  # E (beta^T x)^2 for beta ~ N(0, I/d)
    for labels in (data.labels, data.target):
        assert labels.square().mean().item() == pytest.approx(signal + 0.1, rel=0.03)
    assert data.tokens.shape == (2, 20_000, 3, 5)
    assert (data.query_token[..., -1] == 0).all()
    shifted = regressions((20_000,), 3, 4, mean=2.0)
    assert shifted.inputs.mean().item() == pytest.approx(2, abs=0.02)
    assert shifted.query.mean().item() == pytest.approx(2, abs=0.02)


def test_seeds_of_a_stack_draw_different_tasks():
    data = regressions((2, 3), 4, 2)
    assert not torch.isclose(data.inputs[0], data.inputs[1]).any()


def test_tasks_on_supports():
    supports = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    data = sample_multitask((4_000,), 48, supports, 0.1, rng(), dtype=torch.float64)
    assert data.tokens.shape == (4_000, 48, 8)
    for task, inside in enumerate(supports):
        inputs, labels = data.inputs, data.labels[..., task : task + 1]
        alone = Regressions(
            inputs[..., inside], labels, data.query[..., inside], data.target[..., task : task + 1]
        )
        assert labels.square().mean().item() == pytest.approx(4.4, rel=0.03)
        # Least squares on the support sees noise of 0.4 and predicts a noiseless query.
        error = (ridge(alone, 0.4) - alone.target).square().mean().item()
        assert error == pytest.approx(0.4 * 4 / (48 - 4 - 1), rel=0.1)
        beyond = data.target[:, task] @ data.query[:, ~inside] / len(data.query)
        assert beyond.abs().max() < 0.15


def test_patterns_of_made_up_circuits():
    kq = torch.diag(torch.tensor([0.9, 1.0, 1.1, 7.0])).double()
    kq[3, 0], kq[0, 3] = -0.2, 50.0  # the last column does not count
    assert mean_diagonal(kq, 3).item() == pytest.approx(1.0)
    assert off_diagonal(kq, 3).item() == pytest.approx(0.2)
    assert diagonal_spread(-kq, 3).item() == pytest.approx(0.1)
    assert other_entries(torch.tensor([[0.1, -0.3, 0.0, -3.0]])).item() == pytest.approx(0.1)
    assert imbalance(torch.tensor([3.0, -1.0])).item() == pytest.approx(0.5)
    two = torch.tensor([[9.0, 9.0, 5.0, 6.0], [9.0, 9.0, 7.0, 8.0]])
    assert last_entries(two).tolist() == [5.0, 8.0]


def test_eigenbasis_makes_functions_of_the_covariance_diagonal():
    covariance = kac_murdock(5, 0.5)
    kq = torch.zeros(2, 6, 6).double()
    kq[:, :5, :5] = torch.linalg.inv(covariance)
    rotated = in_eigenbasis(kq, covariance)
    assert off_diagonal(rotated, 5).max() < 1e-12
    expected = 1 / torch.linalg.eigvalsh(covariance)
    torch.testing.assert_close(rotated[0].diagonal()[:5], expected)
    assert off_diagonal(kq, 5).min() > 0.3


def test_shared_heads_are_counted_by_the_largest_output():
    mu = torch.tensor([[[5.0, 1.1], [0.0, -4.0], [-4.0, 0.9], [-1.1, 1.1]]])
    assert shared_heads(mu).tolist() == [2.0]
    assert shared_heads(mu, threshold=0.25).tolist() == [0.0]


@pytest.mark.parametrize("chunk", [1, 4, 10, 50])
def test_risk_is_a_mean_over_tasks_whatever_the_chunks(chunk):
    sizes = []

    def draw(count):
        start = sum(sizes)
        sizes.append(count)
        target = torch.arange(start, start + count, dtype=torch.float64)[:, None]
        return Regressions(torch.zeros(count, 2, 1), torch.zeros(count, 2, 1), target, target)

    risk = monte_carlo_risk(lambda data: data.target.mean(0), draw, 10, chunk)
    assert risk.item() == pytest.approx(4.5)
    assert sum(sizes) == 10
