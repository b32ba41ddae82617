"""Oracles of active multi-task experiments: what every allocation learns, costs, and shares of relevance."""

import math
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from reattend.studies.active_tasks import (
    INSTANCES,
    RELEVANCE,
    Costs,
    PictureSetting,
    PictureTasks,
    SyntheticSetting,
    SyntheticTasks,
    gains_table,
    wins,
)
from reattend.studies.active_tasks_figures import draw_targets
from reattend.theory.a_mtrl import CORRUPTIONS, block_heads, bound_constants

TOTALS = (1800, 3600)


@cache
def tasks(seed, noise=0.4):
    setting = SyntheticSetting(3, 12, 9, 3, noise, 45, 10, 0.2)
    made = SyntheticTasks(setting, seed)
    for place, total in enumerate(TOTALS):
        for name in INSTANCES:
            made.run(name, total, np.random.default_rng([seed, place]))
    return made


@pytest.mark.parametrize("seed", [0, 1])
def test_without_noise_every_method_with_sources_of_all_directions_is_exact(seed):
    made = tasks(seed, noise=1e-9)
    for (name, _, method), error in made.error.items():
        if method not in ("single source", "target only"):
            assert error.max() < 1e-10, (name, method)


def test_the_target_alone_has_no_representation_error():
    for seed in (0, 1):
        assert tasks(seed).error["blocks", TOTALS[0], "target only"].max() < 1e-20


def test_ratios_are_logarithms_averaged_over_cells():
    made = tasks(0)
    assert np.all(made.log_ratio(INSTANCES[:2], TOTALS, "L1", "L1") == 0)
    cells = [(n, t) for n in INSTANCES[:2] for t in TOTALS]
    by_hand = sum(np.log(made.risk[*c, "L2"]) - np.log(made.risk[*c, "L1"]) for c in cells) / 4
    np.testing.assert_allclose(made.log_ratio(INSTANCES[:2], TOTALS, "L2", "L1"), by_hand)


def test_the_support_is_found_where_noise_is_small():
    precision, recall, size = tasks(0, noise=0.02).support_shares("blocks", TOTALS)
    assert recall.min() == 1
    assert precision.min() > 0.9
    assert 3 <= size <= 3.4


def test_constants_are_relative_to_l1_and_laws_match_the_bound_for_uniform_samples():
    made = tasks(1)
    table = made.constants(TOTALS[-1], {"L1": "one"}).set_index(["instance", "allocation"])
    first = table.xs("L1", level="allocation")
    assert (first[["over L1: bound", "over L1: least squares", "over L1: measured"]] == 1).all(None)
    row = table.loc["blocks", "uniform"]
    assert row["over L1: least squares"] == pytest.approx(row["over L1: bound"], rel=1e-9)
    assert list(table["reported"].unique()) == ["one", "not stated"]


def costs(curves):
    """Costs of the block instance with errors put in by hand, 3 blocks and 12 sources."""
    heads = block_heads(3, 12)
    aim = torch.full((3,), 3**-0.5, dtype=torch.float64)
    nu1 = torch.zeros(12, dtype=torch.float64)
    nu1[:3] = aim
    constants = bound_constants(nu1, torch.linalg.pinv(heads) @ aim)
    made = Costs(tasks(0), TOTALS, constants, 100.0, np.random.default_rng(5))
    made._curves = {method: curve(constants) for method, curve in curves.items()}
    return made, constants


@pytest.mark.parametrize(("opened", "kind"), [(0, "linear"), (300, "fixed")])
def test_errors_by_the_constants_cost_what_is_predicted(opened, kind):
    scale = 0.4**2 * (9 - 3)

    def by_law(constants):
        return scale * constants["l1"] / np.array([TOTALS, TOTALS])

    made, constants = costs({"L1": by_law})
    samples = TOTALS[-1] * constants["l1"] / constants["uniform"]
    np.testing.assert_allclose(made.measured("L1", kind), samples + opened, rtol=1e-9)
    assert made.pooled("L1", kind) == pytest.approx(samples + opened, rel=1e-9)
    assert made.predicted("L1", kind) == pytest.approx(samples + opened, rel=1e-9)


def test_uniform_sampling_is_predicted_to_need_the_largest_budget():
    made, _ = costs({})
    assert made.predicted("uniform", "linear") == pytest.approx(TOTALS[-1], rel=1e-9)
    assert made.predicted("uniform", "fixed") == pytest.approx(TOTALS[-1] + 12 * 100, rel=1e-9)


def test_a_lasso_path_stops_where_the_residual_is_within_the_heads_error():
    penalties, path, chosen = tasks(0).example_path("blocks", TOTALS[0], np.random.default_rng(8))
    assert path.shape == (len(penalties), 12)
    assert chosen is None or chosen in penalties.tolist()
    assert bool((penalties.diff() < 0).all())


def test_shares_of_relevance_add_up_and_leave_out_the_targets_corruption():
    made = PictureTasks.__new__(PictureTasks)
    made.classes, made.chosen = ["a", "b", "c"], [0, 2]
    generator = torch.Generator().manual_seed(0)
    sources = 3 * (len(CORRUPTIONS) - 1)
    draws = [[torch.randn(2, sources, generator=generator) for _ in CORRUPTIONS] for _ in range(2)]
    by_kind, by_class = made.shares(draws)
    assert np.isnan(np.diag(by_kind)).all()
    np.testing.assert_allclose(np.nansum(by_kind, 1), 100, rtol=1e-5)
    np.testing.assert_allclose(by_class.sum(1), 100, rtol=1e-5)
    one = [[torch.zeros(2, sources) for _ in CORRUPTIONS]]
    for part in one[0]:
        part[:, 4] = -7.0  # second of the other corruptions, second class
    by_kind, by_class = made.shares(one)
    assert by_kind[0, 2] == 100
    assert by_kind[5, 1] == 100
    assert (by_class[:, 1] == 100).all()
    assert math.isclose(by_class.sum(), 200)


def test_tables_of_risk_and_support_are_means_over_repetitions():
    made = tasks(0)
    table = made.risks_table(INSTANCES[:2], TOTALS)
    assert len(table) == 2 * len(RELEVANCE)
    row = table.set_index(["instance", "method"]).loc["blocks", "L2-A-MTRL"]
    assert row["relevance"] == "estimated"
    assert row["N = 3600"] == pytest.approx(1000 * made.risk["blocks", 3600, "L2-A-MTRL"].mean())
    part = 1000 * made.error["blocks", 3600, "L2-A-MTRL"].mean()
    assert row["representation only"] == pytest.approx(part)
    precision, recall, size = made.support_shares("blocks", TOTALS)
    row = made.supports_table(["blocks"], TOTALS).iloc[0]
    assert row["k"] == 3
    assert row.tolist()[2:] == pytest.approx([size, precision.mean(), recall.mean()])


def test_gains_count_ties_as_half_and_stand_above_the_papers():
    ours, other = np.array([[10.0, 20.0], [10.0, 40.0]]), np.array([[20.0, 20.0], [5.0, 55.0]])
    assert wins(ours, other).tolist() == [[100, 50], [0, 100]]
    reported = pd.DataFrame(
        [("L1 over passive", 80.0, 7.5)], columns=["comparison", "targets_won", "error_saved"]
    )
    table = gains_table({"ours": ours, "other": other}, "ours", reported).set_index("method")
    assert table["error (%)"].tolist()[:2] == [20, 25]
    assert table.loc["other"].tolist() == pytest.approx([2, 25, 20, 30, 62.5, 20])
    assert table.loc["ours"].isna().tolist() == [False] * 4 + [True] * 2
    assert table.loc["reported: L1 over passive"].tolist()[4:] == [80, 7.5]


def test_a_method_of_fewer_draws_is_compared_on_those():
    ours, first = np.array([[10.0, 20.0], [90.0, 90.0]]), np.array([[20.0, 40.0]])
    reported = pd.DataFrame(columns=["comparison", "targets_won", "error_saved"])
    table = gains_table({"ours": ours, "other": first}, "ours", reported).set_index("method")
    assert table.loc["other"].tolist() == pytest.approx([1, 30, 30, 30, 100, 50])
    figure = draw_targets({"ours": ours, "other": first}, "ours", ("other",), ("a", "b"))
    assert figure.axes[0].get_title().endswith("better in 100 %")


def test_methods_left_out_change_nothing_for_the_others():
    """A draw without L2-A-MTRL and the informed diagnosis gives the same errors and relevance."""
    made = PictureTasks(PictureSetting(2000, 200, 6, 2, 6, 8, 10, 40, 1))
    made.draw_orders(np.random.default_rng(0))
    errors, relevance = made.run(1)
    fewer, found = made.run(1, compared=False)
    assert set(errors) - set(fewer) == {"L2-A-MTRL", "L1, informed"}
    assert {method: errors[method] for method in fewer} == fewer
    assert set(found) == {"L1-A-MTRL"}
    torch.testing.assert_close(found["L1-A-MTRL"], relevance["L1-A-MTRL"], rtol=0, atol=0)
