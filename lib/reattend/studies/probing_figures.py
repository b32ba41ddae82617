"""Figures that studies of probing share: accuracy against parameters, and along an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation
from torch import Tensor

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
    higher_linear = [probe for probe in table.index if probe.startswith("LP")][-1]  # sorted
    gap, height = 0.045 * (table.test.max() - table.test.min()), -1.0
    for probe, row in table.iterrows():
        place, colour = (row.parameters, row.test), COLOURS[0] if probe in ours else BASELINE
        mark = "o" if probe in ours else MARKS.get(probe, "X")
        ax.scatter(*place, marker=mark, s=52, zorder=3, color=colour)
        if probe not in ours:
            offset = (6, 5) if probe == higher_linear else (6, -11)  # the two LP often lie together
            ax.annotate(probe, place, offset, textcoords="offset points", fontsize=8)
            continue
        height = max(row.test, height + gap)
        label = (table.loc[list(ours), "parameters"].min() / 2.2, height)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6}
        ax.annotate(probe, place, label, fontsize=8, ha="right", va="center", arrowprops=line)
    ax.set(xscale="log", xlabel="trainable parameters", ylabel="top-1 accuracy (%)")
    ax.margins(x=0.14, y=0.12)


def draw_curves(ax: Axes, curves: Mapping[str, Mapping[int | float, np.ndarray]]) -> None:
    """Accuracy along an axis: one line per probe, side by side, with the range over seeds as bars.

    Args:
        curves: probe -> place on the axis -> accuracies of the seeds in %.
    """
    for row, (probe, points) in enumerate(curves.items()):
        style, colour = LINES[probe]
        places = sorted(points)
        runs = [points[place] for place in places]  # not everywhere equally many
        means = np.array([run.mean() for run in runs])
        ends = np.array([means - [run.min() for run in runs], [run.max() for run in runs] - means])
        aside = (row - (len(curves) - 1) / 2) * 5 / 72  # inches, on an axis of either scale
        shift = ScaledTranslation(aside, 0, ax.figure.dpi_scale_trans)
        look = {"color": colour, "elinewidth": 1.2, "ms": 5, "transform": ax.transData + shift}
        ax.errorbar(places, means, ends, fmt=style, label=probe, **look)
        for reached in (means - ends[0], means + ends[1]):  # what is moved aside sets no limits
            ax.update_datalim(np.column_stack([places, reached]))
    ax.autoscale_view()
    ax.set_xticks(places)
    ax.set(ylabel="top-1 accuracy (%)")


def draw_queries(
    queries: Sequence[int],
    panels: Mapping[str, tuple[np.ndarray, Mapping[str, float]]],
) -> Figure:
    """Accuracy (%) of EP by its number of queries, one panel an encoder; dots are single folds.

    Args:
        panels: encoder -> accuracies [queries, folds], and the accuracy of each probe drawn as a line.
    """
    styles = {"LP-GAP": (":", BASELINE), "LP-cls": ("--", BASELINE), "MHCA": ("-.", COLOURS[1])}
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.9))
    for ax, (title, (points, levels)) in zip(axes, panels.items(), strict=True):
        ax.plot(queries, points.mean(1), "o-", color=COLOURS[0], label="EP$_Q$, mean")
        ax.plot(queries, points, ".", color=COLOURS[0], alpha=0.5)
        for probe, level in levels.items():
            line, colour = styles[probe]
            ax.axhline(level, linestyle=line, color=colour, label=probe)
        ax.set_xscale("log", base=2)
        ax.set_xticks(queries, queries)
        ax.set(xlabel="queries Q", ylabel="top-1 accuracy (%)", title=title)
    axes[-1].legend(loc="best", frameon=True)
    return fig


def draw_probe_costs(
    queries: Sequence[int],
    macs: Mapping[str, Sequence[float]],
    milliseconds: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Million multiply-adds and milliseconds a picture by number of queries; the first is the method.

    Args:
        title: of the left panel: what one picture is.
    """
    styles = [("o-", COLOURS[0]), ("o--", COLOURS[2]), ("^-", BASELINE)]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    for ax, lines in zip(axes, (macs, milliseconds), strict=True):
        for (name, values), (style, colour) in zip(lines.items(), styles, strict=True):
            ax.plot(queries, values, style, color=colour, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(queries, queries)
        ax.set(yscale="log", xlabel="queries Q")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set(title=title, ylabel="million multiply-adds, forward")
    axes[1].set(title="median of paired rounds", ylabel="milliseconds, forward + backward")
    axes[0].legend(loc="best")
    return fig


def draw_maps(
    pictures: UInt8[Tensor, "pictures 3 height width"],
    maps: Float[Tensor, "pictures queries tokens"],
) -> Figure:
    """Pictures, and beside each the map of every query on its own scale; tokens are a square grid."""
    grid = round(maps.shape[-1] ** 0.5)
    fig, axes = plt.subplots(len(pictures), 1 + maps.shape[1], figsize=(9.5, 6.2))
    for row, picture, of_picture in zip(axes, pictures, maps, strict=True):
        row[0].imshow(picture.permute(1, 2, 0))
        for ax, one in zip(row[1:], of_picture, strict=True):
            ax.imshow(one.view(grid, grid), cmap="magma")
    titles = ["picture", *(f"query {number + 1}" for number in range(maps.shape[1]))]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.set_axis_off()
    return fig


def draw_panels(
    panels: Mapping[str, Mapping[str, Mapping[int | float, np.ndarray]]],
    axis: str,
    shares: bool = False,
) -> Figure:
    """Accuracy along one axis, one panel an encoder; as `draw_curves`.

    Args:
        panels: encoder -> probe -> place on the axis -> accuracies of the folds.
        axis: what the axis is.
        shares: whether places are shares, on a log scale and named in per cent.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.9))
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        if shares:
            ax.set_xscale("log")
        draw_curves(ax, curves)
        if shares:
            ax.set_xticks(ax.get_xticks(), [f"{100 * x:g} %" for x in ax.get_xticks()])
            ax.minorticks_off()
        ax.set(xlabel=axis, title=title)
    axes[0].legend(loc="best")
    return fig
