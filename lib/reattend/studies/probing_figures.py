"""Figures that studies of probing share: accuracy against parameters, and along an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from reattend.plots import BASELINE, COLOURS, REPORTED
from reattend.studies.probing import pareto_front

MARKS = {"SimPool": "s", "AIM": "D", "MHCA": "^", "V-JEPA": "v", "AbMILP": "P"}
LINES = {"EP_8": ("o-", COLOURS[0]), "LP-GAP": ("s:", BASELINE), "LP-cls": ("X--", BASELINE)}


def draw_pareto(ax: Axes, table: pd.DataFrame, ours: Sequence[str]) -> None:
    """Accuracy against parameters with the Pareto front of all probes.

    Args:
        table: one row per probe: columns "probe", "parameters", "test" (accuracy in %).
        ours: probes drawn in colour, with labels pushed apart to their left.
    """
    table = table.set_index("probe").sort_values("test")
    front = pareto_front(list(zip(table.parameters, table.test, strict=True)))
    ax.step(*zip(*front, strict=True), where="post", color=REPORTED, zorder=1, label="Pareto front")
    gap, height = 0.045 * (table.test.max() - table.test.min()), -1.0
    for probe, row in table.iterrows():
        place, colour = (row.parameters, row.test), COLOURS[0] if probe in ours else BASELINE
        mark = "o" if probe in ours else MARKS.get(probe, "X")
        ax.scatter(*place, marker=mark, s=52, zorder=3, color=colour)
        if probe not in ours:
            offset = (6, 5) if probe == "LP-cls" else (6, -11)  # the two LP often lie together
            ax.annotate(probe, place, offset, textcoords="offset points", fontsize=8)
            continue
        height = max(row.test, height + gap)
        label = (table.loc[list(ours), "parameters"].min() / 2.2, height)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6}
        ax.annotate(probe, place, label, fontsize=8, ha="right", va="center", arrowprops=line)
    ax.set(xscale="log", xlabel="trainable parameters", ylabel="top-1 accuracy (%)")
    ax.margins(x=0.14, y=0.12)


def draw_curves(ax: Axes, curves: Mapping[str, Mapping[int | float, np.ndarray]]) -> None:
    """Accuracy along an axis: one line per probe, with the range over seeds as a band.

    Args:
        curves: probe -> place on the axis -> accuracies of the seeds in %.
    """
    for probe, points in curves.items():
        style, colour = LINES[probe]
        places = sorted(points)
        runs = np.stack([points[place] for place in places])
        ax.plot(places, runs.mean(1), style, color=colour, label=probe)
        ax.fill_between(places, runs.min(1), runs.max(1), color=colour, alpha=0.15)
    ax.set_xticks(places)
    ax.set(ylabel="top-1 accuracy (%)")
