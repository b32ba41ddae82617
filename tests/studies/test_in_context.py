"""Oracles of in-context experiments: patterns, growth, the fitted flow, and two tasks."""

import math

import numpy as np
import pytest
import torch

from reattend.studies.in_context import (
    BASELINES,
    Predictors,
    TwoTasks,
    Watch,
    fit_flow,
    growth,
    orders,
    patterns_of,
    patterns_table,
    risk_table,
    tasks_table,
    train_stack,
    worst_pattern,
)
from reattend.theory.icl_regression import (
    MultiHeadAttention,
    best_combination,
    gradient_flow,
    gradient_step,
    ridge,
    sample_regressions,
)

SETTING = {"dim": 5, "length": 40, "noise": 0.1}


def circuits(omega, mu, dim=5):
    """KQ and OV of two heads for each seed, as the paper describes them."""
    kq = torch.zeros(len(omega), 2, dim + 1, dim + 1, dtype=torch.float64)
    kq[..., range(dim), range(dim)] = torch.as_tensor(omega, dtype=torch.float64)[..., None]
    ov = torch.zeros(len(mu), 2, 1, dim + 1, dtype=torch.float64)
    ov[..., 0, -1] = torch.as_tensor(mu, dtype=torch.float64)
    return kq, ov


def test_the_papers_circuits_have_no_pattern_over_its_bound():
    found = patterns_of(*circuits([[0.1, -0.1], [-0.2, 0.2]], [[3, -3], [-2, 2]]), 5)
    assert worst_pattern(found).max() == 0
    np.testing.assert_allclose(found["sum mu omega"], [0.6, 0.8])


def test_each_fault_is_the_worst_pattern_by_its_own_bound():
    kq, ov = circuits([[0.1, -0.1]] * 5, [[3, -3]] * 5)
    kq[0, 1, 0, 1] = 0.03  # 0.3 of the diagonal, bound 0.15
    kq[1, 0, range(5), range(5)] += 0.02 * torch.tensor([1, -1, 1, -1, 0])
    ov[2, 0, 0, 2] = 0.9  # 0.3 of the last entry, bound 0.1
    ov[3, 0, 0, -1] = 4.0  # sums to 1 of 7, bound 0.1
    ov[4] *= -1  # omega and mu differ in sign
    expected = [2, 0.2 / 0.15, 3, 1 / 0.7, 10]
    np.testing.assert_allclose(worst_pattern(patterns_of(kq, ov, 5)), expected, rtol=1e-6)


def test_the_label_column_of_kq_does_not_count():
    kq, ov = circuits([[0.1, -0.1]], [[3, -3]])
    kq[..., -1] = 5.0
    assert worst_pattern(patterns_of(kq, ov, 5)).max() == 0


def test_order_is_that_of_the_worse_head():
    kq, _ = circuits([[1, 1]], [[1, 1]], dim=3)
    kq[0, 0, range(3), range(3)] = torch.tensor([3.0, 2, 1]).double()
    kq[0, 1, range(3), range(3)] = torch.tensor([-3.0, -1, -2]).double()
    assert orders(kq, torch.tensor([0.5, 1.0, 2.0]))[0] == pytest.approx(0.5)


@pytest.mark.parametrize("factor", [0.5, 3.0, 40.0])
def test_a_flow_is_fitted_to_itself_with_its_factor_of_time(factor):
    time = np.linspace(0, 2, 60)
    mu, omega = torch.tensor([0.2, -0.3]).double(), torch.tensor([0.1, -0.15]).double()
    flow = gradient_flow(mu, omega, factor * 2, **SETTING)(factor * time)
    found = fit_flow(flow[2:].T, flow[:2].T, time, SETTING)
    assert found.start == 0
    assert found.quality > 0.99
    assert found.factor == pytest.approx(factor, rel=0.05)


def test_the_flow_starts_where_both_heads_have_the_signs_they_keep():
    omega = np.array([[0.1, 0.1], [0.2, 0.1], [0.3, -0.1], [0.3, -0.2], [0.3, -0.3], [0.2, -0.2]])
    found = fit_flow(omega, omega * 3, np.arange(6.0), SETTING)
    assert found.start == 2
    assert found.omega.shape == (4, 2)


def test_growth_is_one_along_a_line_and_uses_the_mu_of_another_start_when_shifted():
    steps = np.linspace(0, 1, 20)
    omega = np.stack([steps, steps**2], 1)[..., None] * np.array([1, -1])
    paths = {"omega": omega, "mu": 4 * omega}
    np.testing.assert_allclose(growth(paths), 1)
    crossed = np.corrcoef(steps, steps**2)[0, 1]
    np.testing.assert_allclose(growth(paths, 1), crossed)


def test_growth_pairs_heads_by_where_they_end_not_by_their_place():
    steps = np.linspace(0, 1, 20)
    omega = np.stack([steps[:, None] * [1, -1], steps[:, None] * [-1, 1]], 1)
    np.testing.assert_allclose(growth({"omega": omega, "mu": 2 * omega}, 1), 1)


def test_growth_ends_where_omega_is_largest():
    omega = np.concatenate([np.linspace(0, 1, 10), np.linspace(0.9, 0.3, 10)])
    mu = np.linspace(0, 2, 20) * 10 / 9
    mu[:10] = 3 * omega[:10]
    paths = {
        name: x[:, None, None] * np.array([1, -1]) for name, x in (("omega", omega), ("mu", mu))
    }
    np.testing.assert_allclose(growth(paths), 1)


def test_watch_records_omega_and_mu_of_the_chosen_heads():
    model = MultiHeadAttention((1, 2), 5, 1, seeds=2, generator=torch.Generator().manual_seed(0))
    watch = Watch(model)
    assert watch(model) is False
    paths = watch.paths(model.of_model(1))
    assert paths["omega"].shape == paths["mu"].shape == (2, 2, 2)
    kq = model.kq().detach()[:, 1:]
    mean = kq.diagonal(dim1=-2, dim2=-1)[..., :5].mean(-1)
    np.testing.assert_allclose(paths["omega"][1], mean, rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_separate_steps_see_their_own_coordinates_and_labels_alone(seed):
    two = TwoTasks(0.1, torch.device("cpu"))
    source = torch.Generator().manual_seed(seed)
    predict = two.separate_steps(two.stream(1, source)(3_000))
    data = two.stream(2, source)(7)
    answers = predict(data)
    assert answers.shape == (2, 7, 2)
    data.inputs[..., 4:] *= 3.0
    data.labels[..., 1] *= 2.0
    changed = predict(data)
    torch.testing.assert_close(changed[..., 0], answers[..., 0])
    assert (changed[..., 1] - answers[..., 1]).abs().min() > 1e-4


def test_the_size_of_a_step_is_the_least_squares_one():
    two = TwoTasks(0.1, torch.device("cpu"))
    fitting = two.stream(1, torch.Generator().manual_seed(3))(5_000)
    alone = two._alone(fitting, 0)
    step = gradient_step(alone, debiased=True)[0]
    size = best_combination(step, alone.target[0, :, 0])
    torch.testing.assert_close(two.separate_steps(fitting)(fitting)[0, :, 0], (size * step)[:, 0])
    # clean labels of variance 4, 48 examples: the best step is near 1 / (1 + (4 + 0.4 + 1) / 48)
    assert float(size) == pytest.approx(0.9, abs=0.05)


def test_the_table_has_a_row_a_model_and_seed():
    mu = torch.arange(2 * 7 * 2.0).view(2, 7, 2)
    risk = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    shared = {3: np.array([1.0, 0.0]), 4: np.array([2.0, 4.0])}
    table = tasks_table(mu, {3: slice(0, 3), 4: slice(3, 7)}, shared, risk)
    assert table["risk"].tolist() == [1, 4, 2, 5]
    assert table["risk of separate debiased steps"].tolist() == [3, 6, 3, 6]
    assert table["heads that serve both"].tolist() == [1, 0, 2, 4]
    assert table["mu of task 2"][0] == "+1.00, +3.00, +5.00"
    assert not math.isnan(table["risk"].sum())


def stack(heads, seeds=2, **options):
    return MultiHeadAttention(heads, 5, 1, seeds, torch.Generator().manual_seed(4), **options)


def contexts(seed, seeds=2, count=7, length=11):
    source = torch.Generator().manual_seed(seed)
    return sample_regressions((seeds, count), length, 5, 0.1, source)


def test_the_first_step_moves_every_weight_by_the_learning_rate():
    model, asked = stack((1, 2)), []

    def draw(count):
        asked.append(count)
        return contexts(len(asked), count=count)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    watched = []
    trained = train_stack(
        model,
        draw,
        0.01,
        1,
        "training",
        lambda model: watched.append(model) or False,
        batch=9,
        every=1,
        device=torch.device("cpu"),
        progress=lambda steps, label: steps,
    )
    assert trained is model
    assert set(asked) == {9}
    assert watched == [model]
    moved = torch.cat([(p - before[n]).abs().flatten() for n, p in model.named_parameters()])
    moved = moved[moved > 0]  # what has no gradient stays
    assert len(moved) > 100
    # Adam's first step is the rate itself, whatever the size of a gradient.
    assert (moved - 0.01).abs().median() < 1e-5


def test_predictors_stand_under_their_names():
    softmax, linear = stack((1, 2)), stack((2,), linear_length=6)
    fitting, data = contexts(1, seeds=1, count=900), contexts(2)
    predict = Predictors(softmax, linear, ["1 head", "2 heads"], fitting, 6, 0.1)
    assert predict.names == ["1 head", "2 heads", *BASELINES, "linear attention, rescaled"]
    found = dict(zip(predict.names, predict(data).unbind(-1), strict=True))
    torch.testing.assert_close(found["2 heads"], softmax(data)[..., 1, 0])
    torch.testing.assert_close(found["linear attention"], linear(data)[..., 0, 0])
    torch.testing.assert_close(
        found["linear attention, rescaled"], linear(data)[..., 0, 0] * 6 / 11
    )
    torch.testing.assert_close(found["ridge"], ridge(data, 0.5)[..., 0])
    assert (found["zero"] == 0).all()
    step = gradient_step(data, debiased=True)[..., 0]
    torch.testing.assert_close(found["debiased step"], predict.sizes[True] * step)
    assert predict.sizes[True] != predict.sizes[False]
    risk = (found["ridge"] - data.target[..., 0]).square().mean(-1)
    torch.testing.assert_close(predict.losses(data)[:, predict.names.index("ridge")], risk)


def test_patterns_table_ends_with_the_papers_heads():
    omega, mu = torch.tensor([[0.1, -0.1], [0.2, 0.2]]), torch.tensor([[3.0, -3.0], [2.0, 2.0]])
    found = patterns_of(*circuits(omega, mu), 5)
    table = patterns_table(
        found, omega, mu, np.array([0.25, 0.41]), {"omega": [0.13, -0.13], "mu": [3.5, -3.5]}
    )
    assert table["seed"].tolist() == [0, 1, "the paper's plots"]
    assert table["omega"].tolist() == ["+0.10, -0.10", "+0.20, +0.20", "+0.13, -0.13"]
    assert table["mu"].iloc[2] == "+3.50, -3.50"
    assert table["risk"].tolist()[:2] == [0.25, 0.41]
    np.testing.assert_allclose(
        table["worst over its bound"][:2].astype(float), worst_pattern(found)
    )


def test_risk_table_leaves_empty_what_has_no_reference():
    risks = {"1 head": np.array([0.4, 0.5, 0.3]), "ridge": np.array([0.1, 0.1, 0.1])}
    table = risk_table(risks, {"1 head": 0.41}, {"ridge": 0.114}).set_index("predictor")
    assert table.loc["1 head"].tolist()[:4] == pytest.approx([0.4, 0.3, 0.5, 0.41])
    assert table["large-L formula"].isna().tolist() == [True, False]
    assert table["Monte Carlo of the reduced model"].isna().tolist() == [False, True]


def test_losses_of_two_tasks_are_sums_over_both():
    two = TwoTasks(0.1, torch.device("cpu"))
    model = MultiHeadAttention((3, 4), 6, 2, 2, torch.Generator().manual_seed(1))
    separate = two.separate_steps(two.stream(1, torch.Generator().manual_seed(2))(3_000))
    data = two.stream(2, torch.Generator().manual_seed(3))(9)
    found = two.losses(model, separate)(data)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[:, :2], model.losses(data))
    errors = (separate(data) - data.target).square()
    torch.testing.assert_close(found[:, 2], errors[..., 0].mean(-1) + errors[..., 1].mean(-1))
