"""Pictures of few-shot studies: score against shots, what further data are worth, heads by label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval, over draws."""
    estimate = mean(np.array(list(values), float))
    return estimate.effect, (estimate.high - estimate.low) / 2


def draw_against_shots(scores: pd.DataFrame, colours: Mapping[str, str]) -> Figure:
    """Accuracy of each method against k: one panel for the mean over the sets, one for each set.

    Args:
        scores: columns set, k, draw, method, accuracy.
        colours: of the methods to be drawn.
    """
    sets, shots = list(dict.fromkeys(scores.set)), sorted(scores.k.unique())
    fig, axes = plt.subplots(1, len(sets) + 1, figsize=(2.2 * (len(sets) + 1), 3.6), sharey=True)
    places = np.arange(len(shots))
    for axis, name in zip(axes, ["mean", *sets], strict=True):
        part = scores if name == "mean" else scores[scores.set == name]
        for number, (method, colour) in enumerate(colours.items()):
            of_method = part[part.method == method].groupby(["k", "draw"]).accuracy.mean()
            centres, halves = zip(*(spread(of_method[k]) for k in shots), strict=True)
            shift = places + 0.05 * (number - len(colours) / 2)
            style = {"color": colour, "marker": "o", "ms": 3, "lw": 1.2, "label": method}
            axis.errorbar(shift, centres, halves, **style)
        title = f"mean of {len(sets)} sets" if name == "mean" else name
        axis.set(title=title, xlabel="shots a class")
        axis.set_xticks(places, shots)
    axes[0].set_ylabel("accuracy, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_gains(gains: Mapping[tuple[str, str], Sequence[float]]) -> Figure:
    """What each kind of further data, used in each way, adds to using none: draws, means, intervals.

    Args:
        gains: (kind of data, use) -> one difference a draw, in points.
    """
    kinds, uses = (list(dict.fromkeys(key[part] for key in gains)) for part in (0, 1))
    fig, axis = plt.subplots(figsize=(8, 3.4))
    colours = dict(zip(uses, [BASELINE, *COLOURS], strict=False))
    for (kind, use), values in gains.items():
        place = kinds.index(kind) + 0.25 * (uses.index(use) - (len(uses) - 1) / 2)
        axis.plot(np.full(len(values), place), values, ".", color=colours[use], alpha=0.4)
        centre, half = spread(values)
        label = use if kind == kinds[0] else None
        axis.errorbar(place + 0.07, centre, half, color=colours[use], marker="o", label=label)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set(ylabel="accuracy minus never, points")
    axis.legend(title="further data used", loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def draw_heads(
    axis: Axes, weights: Float[Tensor, "heads classes"], classes: Sequence[str], title: str
) -> None:
    """Attention of every head to every label."""
    axis.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set(title=title)
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(weights)))
    axis.grid(False)


def draw_class_heads(
    weights: Float[Tensor, "texts heads classes"],
    classes: Int[Tensor, " texts"],
    labels: Sequence[str],
    titles: Sequence[str],
) -> Figure:
    """Mean attention of every head to every label over the texts of each class, a panel a class.

    Args:
        labels: ticks of the labels.
        titles: of the panels, class by class.
    """
    fig, axes = plt.subplots(1, len(titles), figsize=(10, 2.6), sharey=True)
    for number, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        draw_heads(axis, weights[classes == number].mean(0), labels, title)
    axes[0].set_ylabel("head")
    return fig
