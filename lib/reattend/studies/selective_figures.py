"""Figures of the study of selective attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point
from reattend.studies.selective_attention import smoothed
from reattend.studies.selective_tasks import GraphRun

_METHOD = ("SSA", "value")
_PLAIN = ("vanilla", "Softmax")
_PLACEBO = ("permuted", "Elsewhere", "noise")


def colour(arm: str) -> str:
    """The method in the first colour, attention without temperatures grey, placebos red, others orange."""
    for names, found in ((_METHOD, COLOURS[0]), (_PLAIN, BASELINE), (_PLACEBO, COLOURS[3])):
        if arm in names:
            return found
    return {"Constant": COLOURS[2], "constant": COLOURS[2]}.get(arm, COLOURS[1])


def draw_temperatures(
    tau: Mapping[str, Float[Tensor, "heads length"]],
    before: Float[Tensor, "length length"],
    after: Float[Tensor, "length length"],
) -> Figure:
    """tau of queries and values by head and token, and one head's map without and with them."""
    figure, axes = plt.subplots(2, 2, figsize=(8.6, 5.6), height_ratios=(1, 2.6))
    most = max(float(values.max()) for values in tau.values())
    for axis, (part, values) in zip(axes[0], tau.items(), strict=True):
        shown = axis.imshow(values, cmap="RdBu_r", vmin=2 - most, vmax=most, aspect="auto")
        axis.set(title=f"tau of each {part}", xlabel="token", ylabel="head")
        axis.set_yticks(range(len(values)), range(1, len(values) + 1))
        figure.colorbar(shown, ax=axis)
    titles = ("head 1 without temperatures", "head 1, queries and values scaled")
    for axis, drawn, title in zip(axes[1], (before, after), titles, strict=True):
        shown = axis.imshow(drawn, cmap="Blues", vmin=0, vmax=1)
        axis.set(title=title, xlabel="token read", ylabel="token that reads")
        figure.colorbar(shown, ax=axis)
    for axis in axes.flat:
        axis.grid(False)
    return figure


def draw_transitions(
    target: Float[Tensor, "nodes nodes"],
    learned: Mapping[str, Float[Tensor, "nodes nodes"]],
    degrees: Int[Tensor, " nodes"],
) -> Figure:
    """P* and what arms learn of it, nodes by number of successors; square roots, so that 1/8 is seen."""
    order = degrees.argsort(stable=True)
    maps = {"P*": target, **learned}
    figure, axes = plt.subplots(1, len(maps), figsize=(3.4 * len(maps), 3.5), sharey=True)
    for axis, (name, rows) in zip(axes, maps.items(), strict=True):
        shown = axis.imshow(rows[order][:, order].sqrt(), cmap="Blues", vmin=0, vmax=1)
        axis.set(title=name, xlabel="next node")
        axis.grid(False)
    axes[0].set_ylabel("node, by number of successors")
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, label="probability")
    bar.set_ticks([0, 0.125**0.5, 0.5**0.5, 1], labels=["0", "1/8", "1/2", "1"])
    return figure


def draw_norms(runs: Mapping[str, GraphRun], level: Float[np.ndarray, " seeds"]) -> Figure:
    """Norm of W against the divergence along training, a line a seed, and the level of comparison."""
    figure, axis = plt.subplots(figsize=(7.5, 4))
    for arm, run in runs.items():
        axis.plot(run.divergence, run.norm, color=colour(arm), lw=0.8, alpha=0.5)
        axis.plot([], [], color=colour(arm), label=arm)
    axis.axvspan(
        level.min(), level.max(), color=REPORTED, alpha=0.3, label="where norms are compared"
    )
    axis.set(xlabel="KL to P* (nats)", ylabel="norm of W")
    axis.invert_xaxis()
    axis.legend()
    return figure


def draw_points(
    values: Mapping[str, Sequence[float]], label: str, bounds: Mapping[str, float]
) -> Figure:
    """Every arm's seeds, mean and 95 % interval, and vertical lines at bounds."""
    figure, axis = plt.subplots(figsize=(7.5, 0.45 * len(values) + 1.4))
    for place, (arm, points) in enumerate(values.items()):
        mean_point(axis, points, place, colour(arm))
    for style, (name, value) in zip(("-", "--", ":", "-."), bounds.items(), strict=False):
        axis.axvline(value, color="black", lw=1, ls=style, label=f"{name}: {value:.2f}")
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_gains(values: Mapping[str, Sequence[float]]) -> Figure:
    """Nats below softmax attention of every "arm, corpus": seeds, mean and 95 % interval."""
    figure, axis = plt.subplots(figsize=(7.5, 0.36 * len(values) + 1.2))
    for place, (name, points) in enumerate(values.items()):
        mean_point(axis, points, place, colour(name.rsplit(", ", 1)[0]))
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set_xlabel("loss below softmax attention's (nats; right of 0 is better)")
    return figure


def draw_by_degree(
    tau: Mapping[str, Float[Tensor, "seeds nodes 1"]],
    effective: Mapping[str, Float[Tensor, "seeds nodes 1"]],
    degrees: Int[Tensor, " nodes"],
) -> Figure:
    """tau, and tau times the length of the query, by number of successors: means of a seed, then of seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    kinds = sorted(set(degrees.tolist()))
    names = ("inverse temperature tau", "tau |W$^T$e|, the row's whole scale")
    for axis, measured, name in zip(axes, (tau, effective), names, strict=True):
        for arm, values in measured.items():
            by_kind = [values[:, degrees == kind, 0].mean(1).numpy() for kind in kinds]
            mean_curve(axis, kinds, np.stack(by_kind, axis=1), colour(arm), arm)
        axis.set(xscale="log", xlabel="successors of the node", ylabel=name, ylim=(0, None))
        axis.set_xticks(kinds, kinds)
        axis.minorticks_off()
        axis.legend()
    return figure


def draw_learning(
    losses: Mapping[str, Float[np.ndarray, "seeds steps"]],
    ratios: Mapping[str, Float[np.ndarray, " seeds"]],
    window: int,
    reported: float,
) -> Figure:
    """Training loss above softmax attention's, means over seeds, and how many times fewer steps arms need.

    Args:
        losses: of "Softmax" and of arms to compare with it.
        ratios: log of an arm's steps over softmax attention's.
        window: steps over which a loss is averaged.
        reported: times fewer steps, in the paper.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.2, 1))
    for arm, values in losses.items():
        shown = smoothed(values - losses["Softmax"], window).mean(0)
        left.plot(np.arange(window, window + len(shown)), shown, color=colour(arm), label=arm)
    left.set(
        xlabel="training step", ylabel="training loss above softmax's (nats)", title="learning"
    )
    left.legend()
    for place, (arm, values) in enumerate(ratios.items()):
        mean_point(right, np.exp(-values), place, colour(arm), "here" if place == 0 else None)
    style = {"color": REPORTED, "mec": "black", "mew": 0.5, "ms": 7}
    right.plot(reported, 0, "s", label="the paper (Llama, WikiText)", **style)
    right.axvline(1, color="black", lw=0.8)
    right.set_yticks(range(len(ratios)), list(ratios))
    right.invert_yaxis()
    right.set(xlabel="softmax's steps over the arm's, at one loss", title="speed")
    right.legend()
    return figure


def draw_spikiness(curves: Mapping[str, Float[np.ndarray, "seeds layers length"]]) -> Figure:
    """Share of the visible tokens that rows read, by place and layer."""
    layers = next(iter(curves.values())).shape[1]
    figure, axes = plt.subplots(1, layers, figsize=(4.6 * layers, 3.6), sharey=True, squeeze=False)
    for layer, axis in enumerate(axes[0]):
        for arm, values in curves.items():
            length = values.shape[2]
            places = np.unique(np.geomspace(1, length, min(14, length)).astype(int))
            mean_curve(axis, places, values[:, layer, places - 1], colour(arm), arm)
        axis.set(xscale="log", xlabel="visible tokens", title=f"layer {layer + 1}", ylim=(0, 1.05))
    axes[0, 0].set_ylabel("share of them that is read (low: spiky)")
    axes[0, -1].legend()
    return figure
