"""Pictures of mask tuning: domains, masks and what gates their gradients, arms, shots, paths, densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.data.attribute_scenes import COLOURS as PAINTS
from reattend.data.attribute_scenes import NOUNS
from reattend.data.shifted_objects import Objects
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point

ARM_COLOURS = {
    "R-AMT": COLOURS[0],
    "AMT": COLOURS[1],
    "CoOp": COLOURS[2],
    "TIP-Adapter": COLOURS[4],
    "linear probe": COLOURS[5],
    "zero-shot": BASELINE,
    "permuted": COLOURS[3],
    "shuffled": COLOURS[6],
    "thinned": COLOURS[8],
}


def colour_of(arm: str) -> str:
    """The colour of an arm; variants of R-AMT share the last one."""
    return ARM_COLOURS.get(arm, COLOURS[9])


def draw_domains(objects: Objects, domains: Sequence[str], shown: int = 8) -> Figure:
    """The same pictures in several domains, a row each, their words on top."""
    figure, axes = plt.subplots(
        len(domains), shown, figsize=(1.15 * shown, 1.25 * len(domains)), squeeze=False
    )
    for row, domain in zip(axes, domains, strict=True):
        pixels = objects[:shown].shifted(domain).pixels
        for picture, axis in enumerate(row):
            axis.imshow(pixels[picture].movedim(0, -1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(domain, fontsize=8)
    for picture, axis in enumerate(axes[0]):
        words = PAINTS[int(objects.colours[picture])], NOUNS[int(objects.nouns[picture])]
        axis.set_title("\n".join(words), fontsize=7)
    return figure


def draw_step(
    values: Float[Tensor, "rows columns"],
    bits: Float[Tensor, "rows columns"],
    task: Float[Tensor, "rows columns"],
    old: Float[Tensor, "rows columns"],
    kept: Float[Tensor, "rows columns"],
) -> Figure:
    """One matrix in one step: M, its bits, both gradients (by sign and rank of size), and P."""
    figure, axes = plt.subplots(1, 5, figsize=(12, 3.6))

    def ranked(gradient: Tensor) -> np.ndarray:
        sizes = gradient.abs().flatten().argsort().argsort().view_as(gradient)
        return (gradient.sign() * (1 + sizes) / gradient.numel()).numpy()

    panels = [
        ("M", values.numpy(), "viridis", None),
        ("1[M > .005]", bits.numpy(), "gray", (0, 1)),
        ("g of the task", ranked(task), "RdBu_r", (-1, 1)),
        ("g of imitation", ranked(old), "RdBu_r", (-1, 1)),
        ("P to keep", kept.numpy(), "magma", (0, 1)),
    ]
    for axis, (title, picture, colours, limits) in zip(axes, panels, strict=True):
        low, high = limits or (None, None)
        shown = axis.imshow(
            picture, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
        )
        axis.set_title(title, fontsize=9)
        axis.grid(False)
        figure.colorbar(shown, ax=axis, shrink=0.7, location="bottom")
    axes[0].set(ylabel="output channel")
    return figure


def draw_arms(
    scores: Mapping[str, Mapping[str, Sequence[float]]], reported: Mapping[str, float]
) -> Figure:
    """A panel a measure: every arm's seeds with mean and interval; the paper's averages as grey crosses.

    Args:
        scores: measure -> arm -> seeds.
        reported: arm -> the paper's average over 11 sets, drawn in the first panel.
    """
    figure, axes = plt.subplots(
        1, len(scores), figsize=(3.6 * len(scores), 4.2), sharey=True, squeeze=False
    )
    for column, (axis, (measure, arms)) in enumerate(zip(axes[0], scores.items(), strict=True)):
        for place, (arm, values) in enumerate(arms.items()):
            mean_point(axis, values, place, colour_of(arm))
            if column == 0 and arm in reported:
                axis.plot(reported[arm], place, "x", color=REPORTED, ms=8, mew=2)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.set(xlabel=measure)
    axes[0, 0].invert_yaxis()
    return figure


def draw_shots(
    curves: Mapping[str, Float[np.ndarray, "seeds shots"]],
    shots: Sequence[int],
    zero_shot: Sequence[float],
    reported: Mapping[str, Mapping[int, float]],
) -> Figure:
    """Accuracy against shots, ours with intervals on the left, the paper's averages on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharex=True)
    for arm, values in curves.items():
        mean_curve(axes[0], shots, values, colour_of(arm), arm)
    axes[0].axhline(np.mean(zero_shot), color=BASELINE, ls="--", lw=1.2, label="zero-shot")
    for arm, line in reported.items():
        if arm == "zero-shot":
            axes[1].axhline(next(iter(line.values())), color=BASELINE, ls="--", lw=1.2)
        else:
            places = sorted(line)
            axes[1].plot(places, [line[k] for k in places], "x-", color=colour_of(arm), label=arm)
    for axis, title in zip(axes, ("here", "the paper, 11 sets"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, [str(k) for k in shots])
        axis.set(xlabel="shots a class", ylabel="accuracy, per cent", title=title)
        axis.legend(fontsize=7)
    return figure


def draw_paths(
    paths: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], check_every: int
) -> Figure:
    """Share of zeros, and accuracy against it, over a training; a line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for arm, lines in paths.items():
        for seed, (zeros, scores) in enumerate(lines):
            style = {"color": colour_of(arm), "lw": 1, "alpha": 0.8, "ms": 3}
            label = arm if seed == 0 else None
            axes[0].plot(check_every * np.arange(len(zeros)), zeros, **style, label=label)
            axes[1].plot(zeros, scores, ".-", **style, label=label)
    axes[0].axhline(2.56, color=REPORTED, ls=":", label="the paper's mean, 2.56")
    axes[0].set(xlabel="step", ylabel="weights switched off, per cent")
    axes[1].set(xlabel="weights switched off, per cent", ylabel="accuracy on the target, per cent")
    for axis in axes:
        axis.legend(fontsize=7)
    return figure


def draw_statistics(
    values: Mapping[str, Float[np.ndarray, " entries"]],
    threshold: float,
    densities: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
    """Histogram of M with the threshold, and the share of zeros of every matrix.

    Args:
        values: arm -> M at the end, all matrices and seeds.
        densities: arm -> matrix -> per cent of zeros, a value a seed.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.0), width_ratios=(1, 1.2))
    low = min(v.min() for v in values.values())
    high = max(v.max() for v in values.values())
    for arm, entries in values.items():
        axes[0].hist(
            entries, np.linspace(low, high, 80), histtype="step", color=colour_of(arm), label=arm
        )
    axes[0].axvline(threshold, color="black", lw=1, ls="--", label="threshold")
    axes[0].set(xlabel="M", ylabel="weights, all seeds", yscale="log")
    for shift, (arm, matrices) in zip(
        np.linspace(-0.2, 0.2, len(densities)), densities.items(), strict=True
    ):
        for place, shares in enumerate(matrices.values()):
            mean_point(axes[1], shares, place + shift, colour_of(arm), arm if not place else None)
    axes[1].set_yticks(range(len(matrices)), list(matrices), fontsize=7)
    axes[1].invert_yaxis()
    axes[1].set(xlabel="weights switched off, per cent")
    for axis in axes:
        axis.legend(fontsize=7)
    return figure
