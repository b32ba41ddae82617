"""Figures of MoA's study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.long_context.moa import Plan
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point


def _colour(arm: str) -> str:
    """The method in the first colour, what it is compared with in grey, its variants in the second."""
    return {"MoA": COLOURS[0], "dense": BASELINE, "uniform": BASELINE}.get(arm, COLOURS[1])


def draw_example(
    influence: Float[Tensor, "heads blocks blocks"],
    masks: Bool[Tensor, "heads blocks blocks"],
    titles: Sequence[str],
) -> Figure:
    """Influence of some heads, as logarithms, each with the blocks that its rule leaves out faded."""
    fig, axes = plt.subplots(1, len(titles), figsize=(3.4 * len(titles), 3.3))
    logs = np.log10(np.maximum(influence.numpy(), 1e-6))
    for axis, drawn, mask, title in zip(axes, logs, masks.numpy(), titles, strict=True):
        seen = np.tril(np.ones_like(drawn)) > 0
        axis.imshow(np.where(seen, drawn, np.nan), cmap="viridis", vmin=-6, vmax=logs.max())
        axis.imshow(np.where(seen & ~mask, 1.0, np.nan), cmap="Greys", vmin=0, vmax=1, alpha=0.6)
        axis.set(title=title, xlabel="block of keys", ylabel="block of queries")
        axis.grid(False)
    return fig


def draw_plan(plan: Plan, lengths: Sequence[int], shown: Sequence[tuple[int, int]]) -> Figure:
    """Alpha and beta of every unit, and the spans of some units by length.

    Args:
        shown: (layer, key head) of the units whose spans are drawn.
    """
    rules = np.array(plan.rules)  # [layers, heads, 2]
    fig, axes = plt.subplots(3, 1, figsize=(9, 6.2), height_ratios=[1, 1, 2.2])
    for number, name in enumerate(("alpha, tokens", "beta, share of the prompt")):
        drawn = axes[number].imshow(rules[..., number].T, aspect="auto", cmap="viridis")
        fig.colorbar(drawn, ax=axes[number], pad=0.01)
        axes[number].set(title=name, ylabel="key head", yticks=range(rules.shape[1]))
        axes[number].grid(False)
    axes[1].set_xlabel("layer")
    for place, (layer, head) in enumerate(shown):
        rule = plan.rules[layer][head]
        spans = [rule.window(-(-n // plan.block_size), plan.block_size) for n in lengths]
        label = f"layer {layer}, head {head}: {rule.alpha} + {rule.beta:g} N"
        tokens = plan.block_size * np.array(spans)
        axes[2].plot(lengths, tokens, "o-", ms=3, color=COLOURS[place], label=label)
    axes[2].plot(lengths, lengths, ":", color=BASELINE, label="the whole prompt")
    axes[2].set(xlabel="prompt N, tokens", ylabel="window, tokens", title="spans by length")
    axes[2].legend(fontsize=8)
    return fig


def draw_densities(results: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Losses above dense by density, MoA, uniform and shuffled: every draw and prompt, means and intervals.

    Args:
        results: columns arm, density, item, draw and the metrics, above dense.
    """
    fig, axes = plt.subplots(1, len(metrics), figsize=(10.5, 3.8))
    for axis, metric in zip(axes, metrics, strict=True):
        for arm, part in results.groupby("arm", sort=False):
            colour, aside = _colour(arm), 0.005 * (arm != "MoA")
            by_item = part.groupby(["density", "item"])[metric].mean()
            densities = sorted(part.density.unique())
            found = [mean(by_item[d].to_numpy()) for d in densities]
            y = np.array([f.effect for f in found])
            error = [y - [f.low for f in found], [f.high for f in found] - y]
            axis.errorbar(
                np.array(densities) + aside,
                y,
                np.nan_to_num(error),
                color=colour,
                marker="o",
                ms=4,
                capsize=2,
                label=arm,
            )
            axis.plot(part.density + aside, part[metric], ".", color=colour, ms=3, alpha=0.35)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(
            xlabel="density of the cache, sinks included", ylabel=f"{metric} above dense, nats"
        )
    axes[0].legend()
    return fig


def draw_arms(
    panels: Mapping[str, Mapping[str, Sequence[float]]], reported: Mapping[str, Mapping[str, float]]
) -> Figure:
    """NLL of the answers by arm, one panel an experiment, the paper's scores written beside.

    Args:
        panels: title -> arm -> one value for each prompt and draw.
        reported: title -> arm -> what the paper reports, retrieval.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(12, 3.6))
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        for place, (arm, values) in enumerate(arms.items()):
            mean_point(axis, values, place, _colour(arm))
            known = reported[title].get(arm)
            if known is not None:
                axis.text(1.0, place - 0.28, f"paper: {known:g}", transform=axis.get_yaxis_transform(),
                          ha="right", fontsize=8, color="#555555")  # fmt: skip
        axis.set_yticks(range(len(arms)), list(arms))
        axis.set_ylim(len(arms) - 0.5, -0.7)
        axis.set(title=title, xlabel="NLL of the answers, nats")
    return fig


def draw_context(rows: pd.DataFrame, windows: Mapping[int, float]) -> Figure:
    """NLL of the answers by the distance of the needle, one panel a length.

    Args:
        rows: columns arm, length, item, distance, loss; draws averaged.
        windows: length -> mean span in tokens of every arm but dense.
    """
    lengths = sorted(rows.length.unique())
    fig, axes = plt.subplots(1, len(lengths), figsize=(10, 3.6), sharey=True)
    for axis, length in zip(np.atleast_1d(axes), lengths, strict=True):
        here = rows[rows.length == length]
        for arm, part in here.groupby("arm", sort=False):
            ordered, style = part.sort_values("distance"), "o:" if arm == "dense" else "o-"
            axis.plot(
                ordered.distance, ordered.loss, style, ms=4, lw=1, color=_colour(arm), label=arm
            )
        axis.axvline(windows[length], color=REPORTED, ls="--", lw=1)
        axis.set(title=f"{length} tokens", xlabel="tokens from the asked needle to the question")
    np.atleast_1d(axes)[0].set_ylabel("NLL of the answer, nats")
    np.atleast_1d(axes)[0].legend()
    return fig


def draw_proxy(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float], float]]],
) -> Figure:
    """Predicted against true rise of the loss: title -> variant -> (predicted, true, rank correlation)."""
    fig, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6))
    for axis, (title, variants) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for number, (name, (predicted, true, rank)) in enumerate(variants.items()):
            label = f"{name}: Spearman {rank:.2f}"
            face = "none" if number else COLOURS[0]
            axis.plot(predicted, true, "o", color=COLOURS[number], mfc=face, ms=6, label=label)
        axis.set(title=title, xlabel="predicted rise, sum of |E|", ylabel="true rise, nats")
        axis.legend(fontsize=8)
    return fig
