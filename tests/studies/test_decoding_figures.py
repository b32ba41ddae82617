"""Figures of decoding with a part of the cache, and of calibrated heads: what stands where."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from reattend.studies.recycled_figures import MARKS, draw_coverage, draw_tradeoff
from reattend.studies.sink_figures import draw_gains


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_coverage_is_the_mean_over_windows_by_distance():
    draw = np.random.default_rng(0)
    covered = {name: draw.uniform(40, 90, (5, 7)) for name in ("method", "fresh", "chance")}
    fig = draw_coverage(covered, {"paper, method": 90.0, "paper, other": 65.0}, ["fresh", "chance"])
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    assert list(lines) == ["fresh", "method", "chance", "paper, method", "paper, other"]
    assert list(lines["method"].get_xdata()) == list(range(1, 8))
    assert lines["method"].get_ydata() == pytest.approx(covered["method"].mean(axis=0))
    assert set(lines["paper, other"].get_ydata()) == {65}


def test_a_tradeoff_orders_settings_by_what_they_read():
    rows = [
        {
            "method": name,
            "setting": setting,
            "reads": 100 / setting,
            "nll": 0.1 * setting + 0.01 * n,
        }
        for name in MARKS
        for setting in (2, 5)
        for n in range(3)
    ]
    fig = draw_tradeoff(pd.DataFrame(rows), check_every=4)
    curve = fig.axes[0].lines[0]
    assert curve.get_xdata() == pytest.approx([20, 50])
    assert curve.get_ydata() == pytest.approx([0.51, 0.21])
    legend = [text.get_text() for text in fig.axes[0].get_legend().get_texts()]
    assert "dynamic schedule, checked every 4, s" in legend


def test_gains_are_paired_with_dense_attention():
    dense = np.array([0.0, 100.0, 100.0, 0.0])
    both = {"dense": dense, "ACT": dense[::-1] * 0.5, "random heads": dense}
    few = {"dense": dense, "ACT": dense + 1, "random heads": dense - 1}
    fig = draw_gains({("next word", 0): both, ("news", 2): few})
    points = {c.get_label(): c.lines[0] for c in fig.axes[0].containers}
    assert points["ACT"].get_ydata() == pytest.approx([-25, 1])
    assert points["random heads"].get_ydata() == pytest.approx([0, -1])
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["next\nword\n0", "news\n2"]
