"""Figures of the Sparse Frontier: scores by budget, losses by task, error by length, fronts at equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reattend.evidence.intervals import mean
from reattend.long_context.sparse_frontier import pareto_front
from reattend.metrics import pseudo_values
from reattend.plots import BASELINE, COLOURS, REPORTED
from reattend.studies.sparse_frontier import DECODE, PREFILL, relative_loss

STYLE = dict(zip(PREFILL + DECODE, zip(COLOURS, "osD^vP", strict=False), strict=True))
RANDOM = {"random lines": "x", "random chunks": "+", "random entries": "x", "random pages": "+"}


def draw_masks(axes: Sequence[Axes], weights: np.ndarray, masks: Mapping[str, np.ndarray]) -> None:
    """A dense attention map (log scale) and the pairs that each mask keeps of it."""
    axes[0].imshow(np.log10(np.maximum(weights, 1e-4)), cmap="viridis", vmin=-4, vmax=0)
    axes[0].set_title("dense weights, log10", fontsize=9)
    axes[0].set_ylabel("query")
    for axis, (name, mask) in zip(axes[1:], masks.items(), strict=True):
        axis.imshow(mask, cmap="Greys", vmin=0, vmax=1.3, interpolation="nearest")
        pairs = len(mask) * (len(mask) + 1) / 2
        axis.set_title(f"{name}, {mask.sum() / pairs:.0%} of the pairs", fontsize=9)
    for axis in axes:
        axis.set_xlabel("key")
        axis.grid(False)


def draw_tasks(results: pd.DataFrame, tasks: Sequence[str], ticks: Sequence[float]) -> Figure:
    """Answer probability of each task by compression, mean and standard error; placebos as crosses.

    Args:
        results: one row a prompt and method at one length, with "task", "method", "compression", "probability".
    """
    size = (2.7 * len(tasks), 5.4)
    fig, axes = plt.subplots(2, len(tasks), figsize=size, sharex=True, sharey="col", squeeze=False)
    for column, task in enumerate(tasks):
        found = results[results.task == task].groupby(["method", "compression"]).probability
        found = found.agg(["mean", "sem"])
        for row, (phase, names) in enumerate((("prefill", PREFILL), ("decoding", DECODE))):
            axis = axes[row, column]
            whole = found.loc["dense", "mean"].mean()
            axis.axhline(whole, color=BASELINE, ls="--", lw=1, label="dense")
            for name in names:
                colour, mark = STYLE[name]
                cell = found.loc[name]
                style = {"color": colour, "fmt": mark + "-", "ms": 4, "lw": 1, "capsize": 2}
                axis.errorbar(cell.index, cell["mean"], cell["sem"].fillna(0), label=name, **style)
            for name, mark in list(RANDOM.items())[2 * row : 2 * row + 2]:
                cell = found.loc[name]
                axis.plot(cell.index, cell["mean"], mark, color=BASELINE, ms=5, label=name)
            axis.set(xscale="log", title=task if row == 0 else "")
            axis.set_xticks(ticks, [f"{c:g}" for c in ticks])
            axis.minorticks_off()
            if column == 0:
                axis.set_ylabel(f"{phase}\nanswer probability")
        axes[1, column].set_xlabel("compression, 1 / budget")
    for row in axes:
        row[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


def task_losses(
    arrays: Mapping[str, np.ndarray],
    methods: Sequence[str],
    compressions: Sequence[float],
    tasks: Sequence[str],
) -> pd.DataFrame:
    """Relative loss with its 95 % interval of each method, compression and task, and of the tasks' mean.

    Args:
        arrays: "dense" and "<method> <compression>" -> draws x tasks.
    """
    rows = []
    for method in methods:
        for c in compressions:
            pair = {"dense": arrays["dense"], "sparse": arrays[f"{method} {c:g}"]}
            for number, task in enumerate([*tasks, "mean"]):
                pick = slice(None) if task == "mean" else number

                def loss(a, pick=pick):
                    return float(relative_loss(a["dense"], a["sparse"])[pick].mean())

                e = mean(pseudo_values(pair, loss))
                row = {"method": method, "compression": c, "task": task, "loss": loss(pair)}
                rows.append(row | {"low": e.low, "high": e.high})
    return pd.DataFrame(rows)


def draw_losses(losses: pd.DataFrame, margin: float) -> Figure:
    """Losses by task, one panel a compression; the band is what counts as no loss."""
    levels, tasks = losses.compression.unique(), losses.task.unique()
    methods = losses.method.unique()
    fig, axes = plt.subplots(1, len(levels), figsize=(10, 4.2), sharex=True, sharey=True)
    for axis, level in zip(axes, levels, strict=True):
        axis.axvspan(-0.3, margin, color=REPORTED, alpha=0.25, lw=0)
        for number, name in enumerate(methods):
            cell = losses[(losses.method == name) & (losses.compression == level)]
            places = np.arange(len(tasks)) + 0.15 * (number - (len(methods) - 1) / 2)
            colour, mark = STYLE[name]
            away = np.nan_to_num([cell.loss - cell.low, cell.high - cell.loss]).clip(0)
            style = {"color": colour, "fmt": mark, "ms": 4, "lw": 1, "label": name}
            axis.errorbar(cell.loss, places, xerr=away, **style)
        axis.set(title=f"budget 1/{level:g}", xlabel="relative loss", xlim=(-0.3, 1))
        axis.set_yticks(range(len(tasks)), tasks)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(methods))
    return fig


def draw_lengths(
    losses: Mapping[str, Mapping[int, np.ndarray]], reported: pd.DataFrame, budget: float
) -> Figure:
    """Relative error by length beside the reported one.

    Args:
        losses: method -> length -> pseudo-values of the loss, by prompt.
        reported: columns "tokens" and "relative error".
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), sharey=True)
    for number, (name, by_length) in enumerate(losses.items()):
        colour, mark = STYLE.get(name, (BASELINE, RANDOM.get(name, "o")))
        places = np.array(list(by_length)) * (1 + 0.015 * (number - 1.5))
        found = [mean(values) for values in by_length.values()]
        away = np.nan_to_num([[e.effect - e.low, e.high - e.effect] for e in found]).T
        style = {"color": colour, "fmt": mark + "-", "ms": 5, "capsize": 2, "label": name}
        axes[0].errorbar(places, [e.effect for e in found], away, **style)
    axes[0].set(title=f"ours, budget 1/{budget:g}", ylabel="relative error")
    axes[0].legend()
    axes[1].plot(reported["tokens"], reported["relative error"], "o-", color=REPORTED)
    axes[1].set(title="reported, budget 1/20 (version 3)", ylim=(0, 1))
    for axis, ticks in zip(axes, (by_length, reported["tokens"]), strict=True):
        axis.set(xlabel="prompt, tokens", xscale="log")
        axis.set_xticks(list(ticks), [str(t) for t in ticks])
        axis.minorticks_off()
    return fig


def draw_fronts(
    small: pd.DataFrame, scores: Mapping[tuple, np.ndarray]
) -> tuple[Figure, pd.DataFrame]:
    """Answer probability (mean, standard error) against cost, with the Pareto fronts; also their points."""
    lengths = small.length.unique()
    fig, axes = plt.subplots(2, len(lengths), figsize=(3.2 * len(lengths), 6), sharey=True)
    fronts = []
    units = {"Vertical-Slash": "operations per prompt", "Quest": "numbers moved per token"}
    for row, (method, unit) in enumerate(units.items()):
        for column, length in enumerate(lengths):
            axis = axes[row, column]
            here = small[(small.method == method) & (small.length == length)]
            front = here[pareto_front(here.cost.to_numpy(), here.score.to_numpy())]
            front = front.sort_values("cost")
            fronts.append(front)
            axis.plot(front.cost, front.score, "o-", color=REPORTED, ms=11, mfc="none", lw=1)
            for number, (width, found) in enumerate(here.groupby("width")):
                for dense, part in found.groupby(found.compression == 1):
                    points = [scores[method, width, length, c] for c in part.compression]
                    error = [x.std() / np.sqrt(len(x)) for x in points]
                    mark, kind = ("s", "dense") if dense else ("o", "sparse")
                    style = {"color": COLOURS[number], "fmt": mark, "ms": 5, "lw": 0.8}
                    label = f"width {width}, {kind}"
                    axis.errorbar(part.cost, part.score, error, label=label, **style)
            axis.set(xlabel=unit, title=f"{method}, {length} tokens")
            axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axes[row, 0].set_ylabel("answer probability")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=small.width.nunique())
    columns = ["method", "length", "width", "compression", "cost", "score"]
    return fig, pd.concat(fronts)[columns]
