"""Figures of SeerAttention: recall and perplexity by density, maps, lengths, training."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.attention.blocks import causal_block_mask
from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED

STYLE = {
    "gates": (COLOURS[0], "o"),
    "best possible": (BASELINE, "*"),
    "block top-k": (COLOURS[1], "s"),
    "StreamingLLM": (COLOURS[2], "^"),
    "vertical-slash": (COLOURS[3], "D"),
    "random": (COLOURS[4], "v"),
}


def draw_maps(axes: Sequence[Axes], maps: dict[str, Float[Tensor, "rows columns"]]):
    """Shares of rows over blocks on a logarithmic scale; returns the last picture."""
    for axis, (title, shown) in zip(axes, maps.items(), strict=True):
        above = ~causal_block_mask(*shown.shape)
        shares = shown.detach().clamp_min(1e-4).log10().masked_fill(above, torch.nan)
        image = axis.imshow(shares, vmin=-4, vmax=0, cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.grid(False)
    return image


def draw_heads(
    true: Float[Tensor, "layers heads blocks blocks"],
    predicted: Float[Tensor, "layers heads blocks blocks"],
) -> Figure:
    """Truth above prediction for four heads, from evenly spread to concentrated truth."""
    spread = torch.special.entr(true).sum(-1).mean(-1).flatten()
    ranked = spread.argsort(descending=True)
    places = [int(ranked[int(q * (len(ranked) - 1))]) for q in (0.1, 0.4, 0.7, 0.95)]
    heads = [divmod(place, true.shape[1]) for place in places]
    fig, axes = plt.subplots(2, 4, figsize=(10, 4.9), sharex=True, sharey=True)
    for row, (maps, label) in enumerate(((true, "truth"), (predicted, "gate"))):
        image = draw_maps(axes[row], {f"layer {n}, head {h}": maps[n, h] for n, h in heads})
        axes[row, 0].set_ylabel(f"{label}\nquery block")
    for axis in axes[1]:
        axis.set_xlabel("key block")
    fig.colorbar(image, ax=axes, label="share of the row, log10", shrink=0.8)
    return fig


def interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean, and how far its 95 % interval reaches below and above it."""
    e = mean(values.to_numpy())
    return e.effect, *np.nan_to_num([e.effect - e.low, e.high - e.effect])


def draw_density(
    recall: pd.DataFrame, rises: Sequence[tuple[str, pd.DataFrame]], reported: pd.Series
) -> Figure:
    """Recall, and rise of the perplexity on each kind of text, against measured density.

    Args:
        recall: rows with "method", "density", "measured", "recall", one a prompt.
        rises: (title, rows with "method", "density", "measured", "rise", one a text).
        reported: rise of the paper's gates by density, %.
    """
    fig, axes = plt.subplots(1, 1 + len(rises), figsize=(11.5, 4.2))
    panels = [("recall", recall), *(("rise", frame) for _, frame in rises)]
    for axis, (column, frame) in zip(axes, panels, strict=True):
        for name, (colour, marker) in STYLE.items():
            cells = frame[frame.method == name].groupby("density")
            if not len(cells):
                continue
            x = cells["measured"].mean()
            y = np.array([interval(cell[column]) for _, cell in cells])
            style = {"color": colour, "marker": marker, "ms": 8 if marker == "*" else 5}
            axis.errorbar(x, y[:, 0], y[:, 1:].T, lw=1, capsize=2, label=name, **style)
        axis.set_xlabel("measured density")
    axes[0].set(ylabel="recall of attention mass, %")
    for axis, (title, _) in zip(axes[1:], rises, strict=True):
        axis.set(title=title, ylabel="perplexity above dense, %", yscale="symlog", ylim=(0, None))
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter("{x:g}")
    last = axes[-1]
    last.plot(reported.index, reported, "x--", color=REPORTED, label="the paper, 8k tokens")
    for margin in (3, 10):
        last.axhline(margin, color=BASELINE, ls=":", lw=1)
    handles, labels = axes[0].get_legend_handles_labels()
    more = last.get_legend_handles_labels()
    entries = handles + more[0][:1], labels + more[1][:1]
    fig.legend(*entries, loc="outside lower center", ncols=7)
    return fig


def draw_lengths(way: pd.DataFrame, shares: Sequence[float], trained_at: int) -> Figure:
    """How far gates go from random blocks to the best possible, by length; thin lines are texts.

    Args:
        way: shares, columns are methods; index (text, density, length).
    """
    fig, axes = plt.subplots(1, len(shares), figsize=(11, 3.7), sharey=True)
    for axis, share in zip(axes, shares, strict=True):
        for number, name in enumerate(way.columns):
            cell = way.xs(share, level="density")[name].unstack("length")
            axis.plot(cell.columns, cell.T, color=COLOURS[number], lw=0.7, alpha=0.4)
            y = np.array([interval(cell[length]) for length in cell.columns])
            style = {"color": COLOURS[number], "fmt": "o-", "capsize": 3, "label": name}
            axis.errorbar(cell.columns, y[:, 0], y[:, 1:].T, **style)
        axis.axvline(trained_at, color=BASELINE, ls=":", lw=1)
        axis.axhline(0, color=BASELINE, lw=0.8)
        axis.set(title=f"density {share}", xlabel="tokens", xscale="log")
        axis.set_xticks(cell.columns, [str(length) for length in cell.columns])
        axis.minorticks_off()
    axes[0].set_ylabel("share of the way from random to best")
    axes[0].legend()
    return fig


def draw_training(
    losses: Sequence[float], watched: pd.DataFrame, shares: Sequence[float]
) -> Figure:
    """Loss, and share of the true best blocks that are found, by step.

    Args:
        losses: of every step.
        watched: rows with "step", "loss" and one column a density, on a document kept out.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.7))
    style = {"color": COLOURS[0], "lw": 0.8, "alpha": 0.6, "label": "trained on"}
    axes[0].plot(range(1, len(losses) + 1), losses, **style)
    axes[0].plot(watched["step"], watched["loss"], "o-", color=COLOURS[1], ms=3, label="kept out")
    for number, share in enumerate(shares):
        style = {"color": COLOURS[2 + number], "ms": 3, "label": f"density {share}"}
        axes[1].plot(watched["step"], 100 * watched[f"{share:g}"], "o-", **style)
    axes[0].set(xlabel="step", ylabel="distillation loss", yscale="log")
    for formatted in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        formatted("{x:g}")
    axes[1].set(xlabel="step", ylabel="true best blocks found, %")
    for axis in axes:
        axis.legend()
    return fig
