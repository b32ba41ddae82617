"""Figures of simplified attention: arms against standard attention, maps, indicators, scores, skipped layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point

ARM_COLOURS = {
    "Standard": BASELINE,
    "Half": "black",
    "MLP": COLOURS[7],
    "Approximate": COLOURS[2],
    "Non-approximate": COLOURS[3],
    "RndEmbQK": COLOURS[0],
    "FixedSeqQK": COLOURS[9],
    "StaticEmbQK": COLOURS[1],
}


def colour(arm: str) -> str:
    """Of an arm's variant, whatever its placement."""
    return ARM_COLOURS[arm.partition(" ")[0]]


def arms_figure(nats: Mapping[str, np.ndarray], reported: pd.DataFrame) -> Figure:
    """Loss above standard attention of every arm: seeds, means and 95 % intervals; beside it the paper's.

    Args:
        nats: arm -> loss by seed.
        reported: perplexities by variant in "uniform" and "hybrid", with the row "Standard".
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, width_ratios=[3, 2])
    arms = [arm for arm in nats if arm != "Standard"]
    base = np.log(reported.uniform["Standard"])
    for place, arm in enumerate(arms):
        mean_point(left, nats[arm] - nats["Standard"], place, colour(arm))
        variant, _, where = arm.partition(" ")
        if variant in reported.index:
            above = np.log(reported[where or "uniform"][variant]) - base
            right.plot(above, place, "s", color=REPORTED, mec="black", mew=0.5, ms=7)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    left.set(xlabel="nats a byte above standard attention: seeds, mean, 95 %", title="here")
    right.set(
        xlabel="nats a token above standard attention", title="the paper, WikiText", xscale="symlog"
    )
    right.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    right.set_xscale("symlog", linthresh=0.1)
    right.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    return figure


def learning_figure(
    losses: Mapping[str, np.ndarray],
    gains: Mapping[str, np.ndarray],
    reported: pd.DataFrame,
    bigram: float,
) -> Figure:
    """Training loss by step, what context gives by tokens before, and the paper's perplexity by context.

    Args:
        losses: arm -> [seeds, steps].
        gains: arm -> nats below the MLP's at each place of held-out rows, [seeds, predictions].
        reported: "context", and perplexities in columns with arms' names.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9), width_ratios=[3, 3, 2])
    for arm, values in losses.items():
        every = max(1, values.shape[1] // 24)
        steps = values.shape[1] // every * every
        shown = values[:, :steps].reshape(len(values), -1, every).mean(2).mean(0)
        style = "--" if "hybrid" in arm else "-"
        left.plot((np.arange(len(shown)) + 0.5) * every, shown, style, color=colour(arm), label=arm)
    for arm, curves in gains.items():
        bins = np.array_split(np.arange(1, curves.shape[1] + 1), 8)
        far = np.array([[curve[part - 1].mean() for part in bins] for curve in curves])
        style = "--" if "hybrid" in arm else "-"
        mean_curve(middle, [part.mean() for part in bins], far, colour(arm), arm, style)
    for arm in reported.columns.drop("context"):
        shown = reported.dropna(subset=[arm])
        style = "s--" if "hybrid" in arm else "s-"
        kept = {"color": colour(arm), "mec": "black", "mew": 0.5, "ms": 5}
        right.plot(shown.context, np.log(shown[arm]), style, **kept, label=arm)
    left.set(xlabel="training step", ylabel="training loss (nats a byte)", title="learning curves")
    middle.set(
        xlabel="tokens before", ylabel="nats a byte below the MLP", title="held out, by context"
    )
    right.set(xlabel="context", ylabel="nats a token", xscale="log", title="the paper's table 4")
    right.set_xticks(reported.context[::2], reported.context[::2])
    right.minorticks_off()
    left.axhline(bigram, color="black", linestyle=":", linewidth=1, label="bigrams, held out")
    left.legend(fontsize=7, ncols=2)
    right.legend(fontsize=7)
    return figure


def maps_figure(maps: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str]) -> Figure:
    """One map of each variant in a row for every column (texts, layers), square root of the weights."""
    figure, axes = plt.subplots(
        len(columns), len(maps), figsize=(10, 1.9 * len(columns)), squeeze=False
    )
    for column, (name, drawn) in zip(axes.T, maps.items(), strict=True):
        for axis, weights in zip(column, drawn, strict=True):
            drawn = np.sqrt(np.clip(weights, 0, 1))
            axis.imshow(drawn, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
        column[0].set_title(name, fontsize=9)
    for axis, name in zip(axes[:, 0], columns, strict=True):
        axis.set_ylabel(name, fontsize=9)
    return figure


def indicators_figure(found: pd.DataFrame) -> Figure:
    """Each indicator by layer, a line an arm, means over seeds with each seed as a point.

    Args:
        found: columns arm, seed, layer and one for each indicator.
    """
    names = [c for c in found.columns if c not in ("arm", "seed", "layer")]
    figure, axes = plt.subplots(2, len(names) // 2, figsize=(11, 5), sharex=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        for arm, of_arm in found.groupby("arm", sort=False):
            style = "--" if "hybrid" in arm else "-"
            mean = of_arm.groupby("layer")[name].mean()
            axis.plot(mean.index, mean, style, color=colour(arm), label=arm)
            axis.plot(of_arm.layer, of_arm[name], "o", color=colour(arm), ms=2.5, alpha=0.4)
        axis.set_title(name, fontsize=9)
        axis.set_xticks(sorted(found.layer.unique()))
    for axis in axes[-1]:
        axis.set_xlabel("layer", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def skips_figure(lost: Mapping[str, Mapping[str, np.ndarray]], reported: pd.Series) -> Figure:
    """What trained models lose without some layers: seeds, means and 95 % intervals, and the paper's numbers.

    Args:
        lost: what is skipped -> arm -> nats a byte by seed.
        reported: nats a token that the paper's hybrids lose, by variant.
    """
    figure, axes = plt.subplots(1, len(lost) + 1, figsize=(10.5, 2.9), sharey=True)
    arms = list(next(iter(lost.values())))
    for axis, (what, by_arm) in zip(axes, lost.items(), strict=False):
        for place, arm in enumerate(arms):
            mean_point(axis, by_arm[arm], place, colour(arm))
        axis.set(xlabel="nats a byte lost", title=what, xlim=(0, None))
    for place, arm in enumerate(arms):
        variant = arm.partition(" ")[0]
        if variant in reported.index:
            axes[-1].plot(reported[variant], place, "s", color=REPORTED, mec="black", mew=0.5, ms=7)
    axes[-1].set(xlabel="nats a token lost", title="the paper: layers skipped", xlim=(0, None))
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    return figure


def logits_figure(
    histograms: Mapping[str, Sequence[np.ndarray]], largest: Mapping[str, np.ndarray]
) -> Figure:
    """Densities of the logits' magnitudes by layer, and the largest of every layer and seed.

    Args:
        histograms: arm -> magnitudes by layer, all seeds together.
        largest: arm -> [seeds, layers].
    """
    figure, axes = plt.subplots(1, len(histograms) + 1, figsize=(11.5, 3.4))
    edges = np.logspace(-3, 3, 61)
    for axis, (arm, by_layer) in zip(axes, histograms.items(), strict=False):
        for layer, magnitudes in enumerate(by_layer):
            counts, _ = np.histogram(np.clip(magnitudes, edges[0], edges[-1]), edges)
            shade = plt.get_cmap("viridis")(layer / max(1, len(by_layer) - 1) * 0.85)
            axis.step(edges[:-1], counts / counts.sum(), color=shade, label=f"layer {layer + 1}")
        axis.set(xscale="log", xlabel="magnitude of a logit", title=arm)
    for arm, values in largest.items():
        style = "--" if "hybrid" in arm else "-"
        layers = np.arange(1, values.shape[1] + 1)
        axes[-1].plot(layers, values.mean(0), style, color=colour(arm), label=arm)
        axes[-1].plot(layers, values.T, "o", color=colour(arm), ms=3, alpha=0.4)
    axes[-1].axhline(1000, color=REPORTED, linestyle=":")
    axes[-1].annotate(
        "the paper: uniform, above",
        (1, 1000),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=7,
    )
    axes[-1].axhline(10, color=REPORTED, linestyle=":")
    axes[-1].annotate(
        "the paper: hybrid, below", (1, 10), xytext=(0, -9), textcoords="offset points", fontsize=7
    )
    axes[-1].set(yscale="log", xlabel="layer", title="largest magnitude", xticks=layers)
    axes[0].set_ylabel("share")
    axes[0].legend(fontsize=7)
    axes[-1].legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.75))
    return figure


def recall_figure(
    once: Mapping[str, np.ndarray],
    curves: Mapping[str, np.ndarray],
    reported: pd.Series,
    bounds: Mapping[str, float],
) -> Figure:
    """Row language: loss on look-ups, loss by place in the row, and the paper's accuracy on LAMBADA.

    Args:
        once: arm -> nats by seed at tokens seen once before.
        curves: arm -> nats, [seeds, predictions].
        reported: accuracy in per cent by variant.
        bounds: name -> nats, drawn as lines over the curves.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.4), width_ratios=[3, 3, 2])
    for place, (arm, points) in enumerate(once.items()):
        mean_point(left, points, place, ARM_COLOURS.get(arm, COLOURS[4]))
    left.set_yticks(range(len(once)), list(once))
    left.invert_yaxis()
    left.set(xlabel="nats of a token whose like was seen once", title="look-ups")
    for arm, values in curves.items():
        middle.plot(
            np.arange(1, values.shape[1] + 1), values.T, color=colour(arm), lw=0.8, alpha=0.6
        )
        middle.plot([], [], color=colour(arm), label=arm)
    for style, (name, value) in zip((":", "--"), bounds.items(), strict=True):
        middle.axhline(value, color="black", linestyle=style, linewidth=1, label=name)
    middle.set(xlabel="tokens before", ylabel="nats a token", title="by place, a line a seed")
    middle.legend(fontsize=7)
    shown = [arm for arm in once if arm in reported.index]
    bars = [ARM_COLOURS[arm] for arm in shown]
    right.barh(range(len(shown)), reported[shown], color=bars, alpha=0.5)
    right.set_yticks(range(len(shown)), shown)
    right.invert_yaxis()
    right.set(xlabel="accuracy, %", title="the paper: LAMBADA")
    return figure
