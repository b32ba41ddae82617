"""Figures of the study of sigmoid attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED

STYLES = {
    "softmax": {"color": BASELINE, "lw": 2.4},
    "sigmoid": {"color": COLOURS[0]},
    "sigmoid b = 0": {"color": COLOURS[1]},
    "mean": {"color": COLOURS[4], "ls": ":"},
}
LABELS = {"sigmoid": "sigmoid, b = -log n", "mean": "mean of the values"}


def draw_weights(weights: Mapping[str, np.ndarray], shown: int = 48) -> Figure:
    """Attention weights [queries, keys] of several activations: the first `shown` of both, each on its own scale."""
    figure, axes = plt.subplots(1, len(weights), figsize=(3.1 * len(weights), 2.9))
    for axis, (name, values) in zip(axes, weights.items(), strict=True):
        image = axis.imshow(values[:shown, :shown], cmap="viridis", vmin=0)
        axis.set(
            title=f"{name}: row sums {values.sum(-1).mean():.3g}", xlabel="key", ylabel="query"
        )
        axis.grid(False)
        figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def smooth(curve: np.ndarray, span: int = 20) -> np.ndarray:
    """Moving mean over the last axis, without its ends; `span` is at most the curve's length."""
    span = min(span, curve.shape[-1])
    windows = np.lib.stride_tricks.sliding_window_view(curve, span, axis=-1)
    return windows.mean(-1)


def draw_training(
    curves: Mapping[str, Sequence[Sequence[float]]], label: str, yscale: str
) -> Figure:
    """Series over the training steps, RoPE on the left, ALiBi on the right: mean and range of the seeds.

    Args:
        curves: "activation, positions", or an activation that both panels show -> a series for every seed.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, positions in zip(axes, ("RoPE", "ALiBi"), strict=True):
        for name, runs in curves.items():
            kind, _, where = name.partition(", ")
            if where in ("", positions):
                lines = smooth(np.array(runs))
                steps = np.arange(lines.shape[-1]) + 1
                axis.plot(steps, lines.mean(0), label=LABELS.get(kind, kind), **STYLES[kind])
                axis.fill_between(
                    steps, lines.min(0), lines.max(0), color=STYLES[kind]["color"], alpha=0.15
                )
        axis.set(title=positions, xlabel="training step", xscale="log", yscale=yscale)
    axes[0].set_ylabel(label)
    axes[0].legend()
    return figure


def draw_points(
    axis: Axes, places: Sequence[float], points: Sequence[Sequence[float]], colour: str
) -> None:
    """Means along an axis with every seed as a dot."""
    axis.plot(places, [np.mean(values) for values in points], "-", color=colour)
    for place, values in zip(places, points, strict=True):
        axis.plot([place] * len(values), values, "o", color=colour, ms=4, alpha=0.7)


def draw_parity(axis: Axes, differences: Mapping[str, np.ndarray], margin: float) -> None:
    """Sigmoid against softmax by domain: every seed, mean and 95 % interval, and the paper's "parity"."""
    axis.axvspan(
        -margin,
        margin,
        color=REPORTED,
        alpha=0.35,
        label="parity, as the paper reports it (our margin)",
    )
    for place, values in enumerate(differences.values()):
        found = mean(values)
        axis.plot(values, [place] * len(values), ".", color=COLOURS[0], alpha=0.6)
        ends = [[found.effect - found.low], [found.high - found.effect]]
        axis.errorbar(found.effect, place + 0.2, xerr=ends, fmt="D", ms=4, color=COLOURS[0])
    axis.set_yticks(range(len(differences)), list(differences))
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_jacobian(
    outliers: Sequence[float], norms: Mapping[str, np.ndarray], smaller: np.ndarray, margin: float
) -> Figure:
    """Jacobian norms by the outlier's norm (median, quartiles), and the share of draws in which sigmoid's is smaller.

    Args:
        norms: "softmax", "sigmoid", "sigmoid b = 0", "bound" -> [outliers, draws].
        smaller: whether sigmoid is below softmax, [outliers, draws].
        margin: of the claim, a share.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for name in ("softmax", "sigmoid", "sigmoid b = 0"):
        low, middle, high = np.quantile(norms[name], [0.25, 0.5, 0.75], axis=1)
        axes[0].plot(outliers, middle, "o-", label=LABELS.get(name, name), **STYLES[name])
        axes[0].fill_between(outliers, low, high, color=STYLES[name]["color"], alpha=0.15)
    axes[0].plot(
        outliers,
        np.median(norms["bound"], axis=1),
        "--",
        color=COLOURS[0],
        label="the theorem's bound",
    )
    axes[0].set(xscale="log", yscale="log", ylabel="Jacobian norm (median, quartiles)")
    share = smaller.mean(1)
    error = 1.96 * np.sqrt(share * (1 - share) / smaller.shape[1])
    axes[1].errorbar(outliers, 100 * share, yerr=100 * error, fmt="o-", color=COLOURS[0])
    axes[1].axhline(100 * margin, color=BASELINE, ls=":", label="margin of the claim")
    axes[1].set(xscale="log", ylim=(-3, 103), ylabel="draws with sigmoid below softmax (%)")
    for axis in axes:
        axis.set_xticks(outliers, [f"{ratio:g}" for ratio in outliers])
        axis.minorticks_off()
        axis.set_xlabel("norm of one token over the typical norm")
        axis.legend()
    return figure


def draw_times(seconds: Mapping[int, np.ndarray], reported: Mapping[str, float]) -> Figure:
    """Time of softmax over that of sigmoid in every paired round, and the paper's fused kernels.

    Args:
        seconds: length -> [softmax, sigmoid] x rounds.
        reported: kernel -> per cent by which sigmoid is faster.
    """
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    lengths = list(seconds)
    ratios = [seconds[length][0] / seconds[length][1] for length in lengths]
    for length, ratio in zip(lengths, ratios, strict=True):
        axis.plot([length] * len(ratio), ratio, ".", color=COLOURS[0], alpha=0.4)
    axis.plot(
        lengths,
        [np.median(r) for r in ratios],
        "o-",
        color=COLOURS[0],
        label="here, unfused, median",
    )
    axis.axhline(1, color=BASELINE, lw=0.8)
    for (kernel, percent), dashes in zip(reported.items(), (":", "--"), strict=True):
        label = f"paper, fused on an H100, {kernel}"
        axis.axhline(1 + percent / 100, color=REPORTED, ls=dashes, label=label)
    axis.set(
        xscale="log", yscale="log", xlabel="n (tokens)", ylabel="time of softmax / time of sigmoid"
    )
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axis.minorticks_off()
    axis.legend()
    return figure
