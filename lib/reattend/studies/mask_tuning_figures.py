"""Pictures of mask tuning: domains, masks and what gates their gradients, arms, shots, paths, densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from reattend.data.attribute_scenes import COLOURS as PAINTS
from reattend.data.attribute_scenes import NOUNS
from reattend.data.shifted_objects import Objects
from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point
from reattend.studies.mask_tuning import zeros_at

ARM_COLOURS = {
    "R-AMT": COLOURS[0],
    "AMT": COLOURS[1],
    "CoOp": COLOURS[2],
    "TIP-Adapter": COLOURS[4],
    "linear probe": COLOURS[5],
    "zero-shot": BASELINE,
    "permuted": COLOURS[3],
    "shuffled": COLOURS[3],
    "thinned": COLOURS[3],
    "CoOp + permuted": COLOURS[3],
}


def colour_of(arm: str) -> str:
    """The colour of an arm; placebos share one, and variants of R-AMT the last one."""
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
    threshold: float,
    task: Float[Tensor, "rows columns"],
    old: Float[Tensor, "rows columns"],
    kept: Float[Tensor, "rows columns"],
) -> Figure:
    """One matrix in one step: M, its bits, both gradients (by sign and rank of size), and P."""
    figure, axes = plt.subplots(1, 5, figsize=(12.5, 4.4), sharex=True, sharey=True)

    def ranked(gradient: Tensor) -> np.ndarray:
        sizes = gradient.abs().flatten().argsort().argsort().view_as(gradient)
        return (gradient.sign() * (1 + sizes) / gradient.numel()).numpy()

    bits = (values > threshold).double().numpy()
    rank = "sign × rank of size"
    panels = [
        ("$M$", values.numpy(), "viridis", None, "$M$ (red: threshold)"),
        ("$1[M > \\alpha]$", bits, ListedColormap(["black", "#e8e8e8"]), (0, 1), "weight"),
        ("$g_a$, of the task", ranked(task), "RdBu_r", (-1, 1), rank),
        ("$g_b$, of imitation", ranked(old), "RdBu_r", (-1, 1), rank),
        ("$P$", kept.numpy(), "magma", (0, 1), "probability to keep $g_a$"),
    ]
    for axis, (title, picture, colours, limits, unit) in zip(axes, panels, strict=True):
        low, high = limits or (None, None)
        shown = axis.imshow(
            picture, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
        )
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="input entry")
        axis.grid(False)
        bar = figure.colorbar(shown, ax=axis, shrink=0.85, location="bottom")
        bar.set_label(unit, fontsize=8)
        if unit == "weight":
            bar.set_ticks([0.25, 0.75], labels=["off", "takes part"])
        elif axis is axes[0]:
            bar.ax.axvline(threshold, color="red", lw=2)
    axes[0].set(ylabel="output channel")
    return figure


def draw_arms(
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    reported: Mapping[str, float],
    logarithmic: Sequence[str] = (),
) -> Figure:
    """A panel a measure: every arm's seeds with mean and interval; the paper's averages as grey crosses.

    Args:
        scores: measure -> arm -> seeds; NaN where an arm has no such measure.
        reported: arm -> the paper's average over 11 sets, drawn in the first panel below its arm.
        logarithmic: measures whose axis is.
    """
    first = next(iter(scores.values()))
    height = 1.2 + 0.34 * len(first)
    figure, axes = plt.subplots(
        1, len(scores), figsize=(3.6 * len(scores), height), sharey=True, squeeze=False
    )
    for column, (axis, (measure, arms)) in enumerate(zip(axes[0], scores.items(), strict=True)):
        if measure in logarithmic:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
        for place, (arm, values) in enumerate(arms.items()):
            if np.isnan(values).all():
                words = {"fontsize": 7, "color": BASELINE, "ha": "center", "va": "center"}
                axis.text(0.5, place, "not measured", transform=axis.get_yaxis_transform(), **words)
                continue
            mean_point(axis, values, place, colour_of(arm))
            if column == 0 and arm in reported:
                axis.plot(reported[arm], place + 0.33, "x", color=REPORTED, ms=6, mew=1.8)
        axis.set(xlabel=measure)
    axes[0, 0].set_yticks(range(len(first)), [f"{arm} ({len(v)})" for arm, v in first.items()])
    axes[0, 0].set_ylim(len(first) - 0.4, -0.6)
    return figure


def draw_gaps(
    gaps: Mapping[str, Mapping[str, Sequence[float]]],
    margins: Mapping[str, float],
    reported: Mapping[str, float],
    lower_is_better: Sequence[str],
) -> Figure:
    """A panel a measure, a row a comparison: differences of two arms, seeds with mean and 95 % interval.

    Args:
        gaps: measure -> comparison -> a difference a seed.
        margins: measure -> the difference short of which it would not matter, a dotted line.
        reported: comparison -> the paper's difference, a grey cross in the first panel.
        lower_is_better: measures of which the shaded side, the better one, is the left.
    """
    rows = list(next(iter(gaps.values())))
    figure, axes = plt.subplots(
        1, len(gaps), figsize=(3.8 * len(gaps), 1.3 + 0.42 * len(rows)), sharey=True
    )
    for column, (axis, (measure, found)) in enumerate(zip(axes, gaps.items(), strict=True)):
        for place, (row, values) in enumerate(found.items()):
            mean_point(axis, values, place, colour_of("thinned" if "thinned" in row else "AMT"))
            if column == 0 and row in reported:
                axis.plot(reported[row], place + 0.3, "x", color=REPORTED, ms=7, mew=2)
        axis.axvline(0, color="black", lw=1)
        if measure in margins:
            axis.axvline(margins[measure], color="black", lw=1, ls=":")
        left, right = axis.get_xlim()
        better = (left, 0) if measure in lower_is_better else (0, right)
        axis.axvspan(*better, color=COLOURS[0], alpha=0.07, lw=0)
        axis.set(xlim=(left, right), xlabel=measure)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def draw_shots(
    curves: Mapping[str, Float[np.ndarray, "seeds shots"]],
    shots: Sequence[int],
    zero_shot: Sequence[float],
    reported: Mapping[str, Mapping[int, float]],
) -> Figure:
    """Accuracy against shots, ours with intervals on the left, the paper's averages on the right.

    Args:
        zero_shot: of the seeds of the curves.
        reported: arm -> shots -> average; a single one where the arm takes no shots.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharex=True, sharey=True)
    aside = np.linspace(
        -0.16, 0.16, len(curves)
    )  # in octaves, so that intervals do not hide each other
    for shift, (arm, values) in zip(aside, curves.items(), strict=True):
        places, colour = np.array(shots) * 2**shift, colour_of(arm)
        found = [mean(column) for column in values.T]
        axes[0].plot(places, [f.effect for f in found], "D-", color=colour, lw=1.5, ms=4.5)
        axes[0].vlines(places, [f.low for f in found], [f.high for f in found], colour, lw=2)
        axes[0].plot(places, values.T, "o", color=colour, ms=2.5, alpha=0.45)
    level = {"color": BASELINE, "ls": "--", "lw": 1.2}
    axes[0].axhline(np.mean(zero_shot), **level)
    for arm, line in reported.items():
        places = sorted(line)
        if len(places) == 1:
            axes[1].axhline(line[places[0]], **level, label=arm)
        else:
            axes[1].plot(places, [line[k] for k in places], "x-", color=colour_of(arm), label=arm)
    ticks = sorted({*shots, *(k for line in reported.values() for k in line)})
    for axis, title in zip(axes, ("here", "the paper, average of 11 sets"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(k) for k in ticks])
        axis.set(xlabel="shots a class", title=title)
    axes[0].set(ylabel="accuracy, per cent")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def draw_paths(
    paths: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], check_every: int
) -> Figure:
    """Share of zeros, and accuracy against it, over a training; a line a seed, 90 % of its gain a diamond."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for arm, lines in paths.items():
        for seed, (zeros, scores) in enumerate(lines):
            style = {"color": colour_of(arm), "lw": 1, "alpha": 0.8, "ms": 3}
            label = arm if seed == 0 else None
            axes[0].plot(check_every * np.arange(len(zeros)), zeros, **style, label=label)
            axes[1].plot(zeros, scores, ".-", **style, label=label)
            reached = zeros_at(zeros, scores)
            height = scores[zeros == reached].max()
            axes[1].plot(reached, height, "D", color=colour_of(arm), mec="black", mew=0.6, ms=6)
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
