"""Figures of DHSA's study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point

POOLING_COLOURS = {"sqrt": COLOURS[0], "mean": COLOURS[1], "max": COLOURS[2]}


def draw_example(
    weights: Float[Tensor, "tokens tokens"],
    edges: Sequence[int],
    scores: Float[Tensor, "blocks tokens"],
    mask: Float[Tensor, "blocks tokens"],
) -> Figure:
    """The mean attention of a layer with its chunks, the scores of the chunks, and what is read."""
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    axes[0].imshow(np.log10(np.maximum(weights, 1e-4)), cmap="viridis", interpolation="nearest")
    for edge in edges[1:-1]:
        axes[0].plot([edge - 0.5] * 2, [edge - 0.5, len(weights) - 0.5], color="white", lw=0.4)
    axes[0].set(title="attention, mean of the heads", xlabel="key", ylabel="query")
    unseen = np.where(scores == 0, np.nan, scores)
    axes[1].imshow(unseen, cmap="coolwarm", aspect="auto", interpolation="nearest")
    axes[1].set(title="scores of the chunks", xlabel="key", ylabel="block of queries")
    axes[2].imshow(mask, cmap="Greys", aspect="auto", vmax=1.3, interpolation="nearest")
    axes[2].set(title="what each block reads", xlabel="key", ylabel="block of queries")
    for axis in axes:
        axis.grid(False)
    return fig


def draw_losses(excess: pd.DataFrame, metrics: Mapping[str, str], colours: Sequence[str]) -> Figure:
    """NLL above dense, one row a method: every document a point, their mean and its 95 % interval.

    Args:
        excess: columns method and the metrics; rows are documents.
        metrics: column -> what it is called.
        colours: of the methods, in their order.
    """
    names = list(dict.fromkeys(excess.method))
    fig, axes = plt.subplots(1, len(metrics), figsize=(11, 0.45 * len(names) + 1.2), sharey=True)
    for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
        for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
            mean_point(axis, excess[excess.method == name][metric], place, colour)
        axis.axvline(0, color=BASELINE, lw=1)
        axis.set(xlabel=title)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return fig


def draw_boundaries(masses: pd.DataFrame, bounds: Mapping[str, pd.Series], count: str) -> Figure:
    """Mass kept by boundaries and pooling: beyond fixed chunks with plain means, and by other selections.

    Args:
        masses: columns rule, pooling, document, kept (%).
        bounds: other selections, kept by document.
        count: of the documents, for the axis.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.5, 1])
    table = masses.set_index(["rule", "pooling", "document"])["kept"].unstack("document")
    base, names = table.loc["fixed", "mean"], list(dict.fromkeys(masses.rule))
    for place, name in enumerate(names):
        for shift, (pooling, colour) in enumerate(POOLING_COLOURS.items()):
            label = f"pooling: {pooling}" if not place else None
            found = table.loc[name, pooling] - base
            mean_point(axes[0], found, place + 0.24 * (shift - 1), colour, label)
    axes[0].axvline(0, color=BASELINE, lw=1)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set(xlabel=f"mass kept, points above fixed chunks with plain means; {count}")
    axes[0].legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    whole = {
        f"{name}, {p}": table.loc[name, p] for name, p in (("fixed", "mean"), (names[0], "sqrt"))
    }
    rows = sorted((whole | dict(bounds)).items(), key=lambda item: item[1].mean())
    for place, (name, kept) in enumerate(rows):
        mean_point(axes[1], kept, place, COLOURS[0] if name in whole else BASELINE)
    axes[1].set_yticks(range(len(rows)), [name for name, _ in rows])
    axes[1].set(xlabel="mass kept beyond the forced tokens, %")
    return fig


def draw_predictor(
    scores: pd.DataFrame, losses: Sequence[float], words: Sequence[str], logits: Sequence[float]
) -> Figure:
    """The predictor against its labels, its training, and what it says of a text.

    Args:
        scores: columns guess, document, precision, recall, F1.
        losses: of every step.
        words: tokens of an example.
        logits: of a boundary after each of them.
    """
    fig = plt.figure(figsize=(11, 5.4))
    grid = fig.add_gridspec(2, 2, height_ratios=[1.3, 1], width_ratios=[1.5, 1])
    axes = [fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, :])]
    for shift, (name, colour) in enumerate(zip(dict.fromkeys(scores.guess), COLOURS, strict=False)):
        for place, metric in enumerate(("precision", "recall", "F1")):
            found = scores[scores.guess == name][metric]
            label = None if place else name
            mean_point(axes[0], found, place + 0.24 * (shift - 1), colour, label)
    axes[0].set_yticks(range(3), ["precision", "recall", "F1"])
    axes[0].invert_yaxis()
    axes[0].set(xlabel="against the labels, ratio at least 2; held-out documents", xlim=(0, 1.02))
    axes[0].legend(fontsize=8)
    tenth = max(len(losses) // 10, 1)
    axes[1].plot(losses, color=REPORTED, lw=0.6)
    smooth = np.convolve(losses, np.ones(tenth) / tenth, mode="valid")
    axes[1].plot(np.arange(len(smooth)) + tenth / 2, smooth, color=COLOURS[0])
    axes[1].set(xlabel="step", ylabel="focal loss", title="training; line: mean of a tenth")
    colours = [COLOURS[0] if x > 0 else REPORTED for x in logits]
    axes[2].bar(range(len(words)), 1 / (1 + np.exp(-np.asarray(logits))), color=colours)
    axes[2].axhline(0.5, color=BASELINE, lw=0.8)
    axes[2].set_xticks(range(len(words)), words, rotation=90, fontsize=6)
    axes[2].set(ylabel="boundary after", ylim=(0, 1))
    axes[2].grid(False, axis="x")
    return fig


def draw_budgets(
    curves: Mapping[str, Float[np.ndarray, "documents budgets"]], budgets: list
) -> Figure:
    """Mass kept by budget."""
    fig, axis = plt.subplots(figsize=(8.5, 4))
    colours = [COLOURS[0], *COLOURS[1:]]
    for (name, values), colour in zip(curves.items(), colours, strict=False):
        mean_curve(axis, budgets, values, colour, name)
    axis.set(xlabel="budget, tokens", ylabel="mass kept beyond the forced tokens, %")
    axis.set_xticks(budgets)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def draw_needles(found: pd.DataFrame, styles: Mapping[str, tuple[str, str]]) -> Figure:
    """NLL of the answers by depth of the needle.

    Args:
        found: columns method, depth, answer NLL; one row a document.
        styles: method -> colour and marker.
    """
    fig, axis = plt.subplots(figsize=(8.5, 4))
    for name, (colour, marker) in styles.items():
        part = found[found.method == name].sort_values("depth")
        axis.plot(100 * part.depth, part["answer NLL"], marker, color=colour, label=name, ms=5)
    axis.set(xlabel="depth of the needle, % of the prompt", ylabel="answer NLL, nats a token")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return fig
