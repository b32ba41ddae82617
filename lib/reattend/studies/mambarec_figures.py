"""Pictures of MambaRec's study: gates, neighbour graphs, gains, training curves, the grid of MMD, feature clouds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import COLOURS, REPORTED, mean_curve, mean_point
from reattend.studies.mambarec import shared_plane


def draw_attention(
    hidden: Float[Tensor, "items wide"],
    attention: Float[Tensor, "items wide"],
    gates: Mapping[str, Float[Tensor, "items 1"]],
) -> Figure:
    """DREAM's hidden layer, its attention, the quotient of the two, and the gates behind it."""
    quotient = np.where(hidden > 0, attention / hidden.clamp_min(1e-9), np.nan)
    fig, axes = plt.subplots(1, 4, figsize=(12, 3), width_ratios=[3, 3, 3, 1])
    shown = {"c": hidden, "A": attention, "A / c, where c > 0": quotient}
    for axis, (name, values) in zip(axes[:3], shown.items(), strict=True):
        picture = axis.imshow(np.asarray(values), aspect="auto", cmap="Blues")
        axis.set(title=name, xlabel="channel", ylabel="item")
        axis.grid(False)
        fig.colorbar(picture, ax=axis, shrink=0.8)
    for place, (name, values) in enumerate(gates.items()):
        axes[3].plot(values[:, 0], range(len(values)), "os"[place % 2], ms=5, label=name)
    axes[3].invert_yaxis()
    axes[3].set(title="gates", xlabel="value", ylabel="item")
    axes[3].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return fig


def draw_gains(
    differences: Mapping[str, Sequence[float]],
    negligible: float,
    reported: Mapping[str, Sequence[float]],
) -> Figure:
    """One row a comparison: every seed, mean and 95 % interval; the band is what would not matter.

    Args:
        differences: in % of MGCN's NDCG@20.
        reported: the paper's differences in the same unit, one for each data set.
    """
    fig, axis = plt.subplots(figsize=(9, 0.42 * len(differences) + 1.3))
    axis.axvspan(-negligible, negligible, color=REPORTED, alpha=0.3, lw=0)
    for place, (name, values) in enumerate(differences.items()):
        mean_point(axis, values, place, COLOURS[0])
        if name in reported:
            theirs = reported[name]
            axis.plot(theirs, [place - 0.25] * len(theirs), "v", color=REPORTED, mec="black", ms=5)
    axis.plot([], [], "D", color=COLOURS[0], mec="black", label="ours: mean, 95 % interval, seeds")
    axis.plot([], [], "v", color=REPORTED, mec="black", label="paper: Baby, Sports, Clothing")
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(differences)), list(differences))
    axis.invert_yaxis()
    axis.set(xlabel="difference in NDCG@20, % of MGCN's")
    axis.legend(loc="lower right")
    return fig


def draw_curves(
    curves: Mapping[str, Float[Tensor, "_checks _seeds"]], every: int, levels: Mapping[str, float]
) -> Figure:
    """NDCG@20 against epochs, arms as lines; what needs no training as dashed levels.

    Args:
        every: epochs between two checks.
    """
    fig, axis = plt.subplots(figsize=(8, 4))
    for colour, (name, values) in zip(COLOURS, curves.items(), strict=False):
        epochs = [every * check for check in range(len(values))]
        mean_curve(axis, epochs, values.T.numpy(), colour, name)
    for name, level in levels.items():
        axis.axhline(level, color="black", lw=0.8, ls="--")
        axis.text(axis.get_xlim()[1], level, f"{name} ", ha="right", va="bottom", fontsize=8)
    axis.set(xlabel="epochs", ylabel="NDCG@20 (test)")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def draw_grid(validation: pd.DataFrame, test: pd.DataFrame) -> Figure:
    """Mean Recall@20 over weight (rows) and bandwidth (columns) of MMD, on validation and on test."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3))
    for axis, (name, frame) in zip(axes, (("validation", validation), ("test", test)), strict=True):
        values = frame.to_numpy()
        axis.imshow(values, cmap="Blues", aspect="auto")
        middle = (values.min() + values.max()) / 2
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if value > middle else "black"
            axis.text(j, i, f"{value:.4f}", ha="center", va="center", color=colour, fontsize=9)
        axis.set_xticks(range(frame.shape[1]), list(frame.columns))
        axis.set_yticks(range(frame.shape[0]), list(frame.index))
        axis.set(title=f"Recall@20, {name}", xlabel="bandwidth s", ylabel="weight of MMD")
        axis.grid(False)
    return fig


def draw_clouds(panels: Mapping[str, Mapping[str, Float[Tensor, "items width"]]]) -> Figure:
    """Embeddings of both modalities on a plane they share, one panel an arm."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False)
    for axis, (title, parts) in zip(axes[0], panels.items(), strict=True):
        for colour, (name, points) in zip(COLOURS, shared_plane(parts).items(), strict=False):
            axis.plot(*points.T, "o", ms=2.5, alpha=0.5, color=colour, label=name)
        axis.set(title=title, xlabel="first axis", ylabel="second axis")
    axes[0, 0].legend()
    return fig
