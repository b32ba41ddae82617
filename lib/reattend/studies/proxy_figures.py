"""Figures of ProxyAttn's study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS


def draw_example(
    maps: Mapping[str, Float[Tensor, "rows columns"]],
    masks: Mapping[str, Float[Tensor, "rows columns"]],
) -> Figure:
    """Attention maps as logarithms, and the masks that come of them."""
    fig, axes = plt.subplots(1, len(maps) + len(masks), figsize=(10.5, 3))
    for axis, (title, drawn) in zip(axes, maps.items(), strict=False):
        axis.imshow(np.log10(np.maximum(drawn, 1e-4)), cmap="viridis", interpolation="nearest")
        axis.set_title(title, fontsize=9)
    for axis, (title, drawn) in zip(axes[len(maps) :], masks.items(), strict=True):
        axis.imshow(drawn, cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set(xlabel="key", ylabel="query")
        axis.grid(False)
    return fig


def draw_masses(
    masses: pd.DataFrame, costs: Mapping[str, float], lines: Sequence[str], at: Sequence[float]
) -> Figure:
    """Mass found by density, and of every ranking, the cheapest first.

    Args:
        masses: columns ranking, window, density, found.
        costs: multiply-adds of each estimate over those of full attention's scores.
        lines: rankings of the left panel, the method first.
        at: densities over which the right panel averages.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for number, name in enumerate(lines):
        found = masses[masses.ranking == name].groupby("density")["found"]
        shown = [mean(values.to_numpy()) for _, values in found]
        y = np.array([each.effect for each in shown])
        error = [y - [each.low for each in shown], [each.high for each in shown] - y]
        axes[0].errorbar(
            list(found.groups),
            y,
            error,
            color=COLOURS[number],
            marker="o",
            ms=4,
            capsize=2,
            label=name,
        )
    axes[0].set(
        xlabel="density, share of the blocks that a row sees", ylabel="mass found / best possible"
    )
    axes[0].legend(fontsize=8)
    chosen = masses[masses.density.isin(at)].groupby(["ranking", "window"])["found"].mean()
    ranked = sorted(costs, key=lambda name: (costs[name], -chosen[name].mean()))
    for place, name in enumerate(ranked):
        found, colour = mean(chosen[name].to_numpy()), COLOURS[0] if name == lines[0] else BASELINE
        axes[1].plot(chosen[name], [place] * len(chosen[name]), "o", color=colour, ms=3, alpha=0.3)
        axes[1].plot([found.low, found.high], [place] * 2, color=colour, lw=2)
        axes[1].plot(found.effect, place, "|", color="black", ms=12)
    axes[1].set_yticks(range(len(ranked)), [f"{name}: {costs[name]:.2g}" for name in ranked])
    axes[1].invert_yaxis()
    axes[1].set(
        xlabel="mass found / best possible", title="cost of the estimate / full attention's"
    )
    return fig


def draw_heads(
    maps: Mapping[int, Float[Tensor, "heads heads"]],
    by_layer: Mapping[str, Sequence[Sequence[float]]],
    budgets: Float[Tensor, "windows layers heads"],
) -> Figure:
    """Likeness of heads in some layers, its mean by layer, and the budgets of all heads.

    Args:
        maps: by layer, mass of the column's head on the row's top tokens.
        by_layer: name -> windows x layers.
        budgets: shares of the blocks.
    """
    fig, axes = plt.subplots(
        1, len(maps) + 2, figsize=(11.5, 3.6), width_ratios=[1] * len(maps) + [1.6, 1.1]
    )
    for axis, (layer, drawn) in zip(axes, maps.items(), strict=False):
        image = axis.imshow(drawn, cmap="viridis", vmin=0, vmax=1)
        axis.set(title=f"layer {layer}", xlabel="mass of head", ylabel="on the top of head")
        axis.set_xticks(range(0, len(drawn), 2))
        axis.set_yticks(range(0, len(drawn), 2))
        axis.grid(False)
    fig.colorbar(image, ax=list(axes[: len(maps)]), location="bottom", shrink=0.6, label="mass")
    for number, (name, values) in enumerate(by_layer.items()):
        values = np.asarray(values)
        spread = values.std(axis=0, ddof=1)
        layers = np.arange(values.shape[1])
        axes[-2].plot(layers, values.mean(axis=0), color=COLOURS[number], label=name)
        band = values.mean(axis=0) - spread, values.mean(axis=0) + spread
        axes[-2].fill_between(layers, *band, color=COLOURS[number], alpha=0.15)
    axes[-2].set(xlabel="layer", ylabel="mass", title="likeness by layer", ylim=(0, 1.25))
    axes[-2].legend(fontsize=7, loc="upper center", ncols=2)
    image = axes[-1].imshow(budgets.mean(dim=0), cmap="magma", vmin=0, vmax=1, aspect="auto")
    axes[-1].set(xlabel="head", ylabel="layer", title="budget")
    axes[-1].set_xticks(range(0, budgets.shape[-1], 2))
    axes[-1].grid(False)
    fig.colorbar(image, ax=axes[-1], label="share of the blocks")
    return fig


def draw_losses(excess: pd.DataFrame, curves: Sequence[str]) -> Figure:
    """NLL above dense by density: curves over gamma, single points for the other rankings.

    Args:
        excess: columns method, gamma, prompt, density, "answer NLL", "prose NLL", the latter above dense.
        curves: methods with several gammas.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.4))
    names = [*curves, *(name for name in excess.method.unique() if name not in curves)]
    markers = "os^DvPX*<>"
    for axis, metric in zip(axes, ("prose NLL", "answer NLL"), strict=True):
        for number, name in enumerate(names):
            found = excess[excess.method == name].groupby("gamma")
            x = [100 * part["density"].mean() for _, part in found]
            shown = [mean(part[metric].to_numpy()) for _, part in found]
            y = np.array([each.effect for each in shown])
            error = [y - [each.low for each in shown], [each.high for each in shown] - y]
            line = "-" if name in curves else "none"
            axis.errorbar(
                np.array(x) + 0.35 * (number - len(names) / 2),
                y,
                error if len(excess.prompt.unique()) > 2 else None,
                ls=line,
                marker=markers[number],
                color=COLOURS[number],
                ms=5,
                lw=1,
                elinewidth=0.8,
                label=name,
            )
        axis.axhline(0, color=BASELINE, lw=1, ls="--")
        axis.set(xlabel="density, % of the causal blocks", ylabel=f"{metric} above dense, nats")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5)
    return fig


def draw_costs(
    shares: Mapping[str, Sequence[float]],
    lengths: Sequence[int],
    reported: float,
    speeds: Mapping[str, Sequence[float]],
) -> Figure:
    """Cost of the estimate by length, counted; times of one layer, by round.

    Args:
        shares: name -> multiply-adds of the estimate over full attention's, one for each length.
        reported: the paper's estimate over its full attention, in time.
        speeds: name -> seconds of dense attention over seconds of this, round by round.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for number, (name, values) in enumerate(shares.items()):
        axes[0].plot(lengths, values, "o-", ms=3, color=COLOURS[number], label=name)
    axes[0].axhline(reported, color=BASELINE, ls=":", label="reported: time on a GPU, one proxy")
    axes[0].set(xscale="log", yscale="log", xlabel="tokens", ylabel="estimate / full attention")
    axes[0].legend(fontsize=8)
    for place, values in enumerate(speeds.values()):
        axes[1].plot(values, [place] * len(values), "o", color=COLOURS[place], alpha=0.6, ms=4)
        axes[1].plot(np.median(values), place, "|", color="black", ms=14)
    axes[1].set_yticks(range(len(speeds)), list(speeds))
    axes[1].invert_yaxis()
    axes[1].axvline(1, color=BASELINE, ls="--", lw=1)
    axes[1].set(xscale="log", xlabel="times as fast as fused dense attention")
    return fig
