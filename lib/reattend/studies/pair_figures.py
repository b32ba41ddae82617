"""Figures of experiments on texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point

Numbers = Sequence[float] | Sequence[int] | np.ndarray


def draw_features(features: np.ndarray, blocks: Sequence[str], pairs: Sequence[str]) -> Figure:
    """Blocks of the features of some pairs as maps, one below the other, on one scale.

    Args:
        features: [pairs, blocks, width].
        blocks: names of the blocks.
        pairs: names of the pairs.
    """
    fig, axes = plt.subplots(len(blocks), 1, figsize=(9, 3.4), sharex=True)
    style = {"cmap": "RdBu_r", "aspect": "auto", "interpolation": "nearest"}
    for axis, block, name in zip(axes, features.transpose(1, 0, 2), blocks, strict=True):
        shown = axis.imshow(block, vmin=-0.5, vmax=0.5, **style)
        axis.set_yticks(range(len(pairs)), pairs)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=30)
        axis.grid(False)
    axes[-1].set_xlabel("feature of the top layer")
    fig.colorbar(shown, ax=axes, pad=0.01)
    return fig


def draw_scores(
    scores: Mapping[str, Mapping[str, Numbers]],
    teachers: Mapping[str, float],
    trivial: Mapping[str, float],
    reported: float,
) -> Figure:
    """Every seed of every method on every task, means with intervals, between trivial and teacher.

    Args:
        scores: task -> method -> score of each seed.
        teachers: score of the teacher by task.
        trivial: score of a constant answer by task.
        reported: the paper's mean score relative to the teacher's.
    """
    fig, axes = plt.subplots(1, len(scores), figsize=(2.9 * len(scores) + 1.8, 3.6), sharey=True)
    for axis, (name, methods) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        for place, points in enumerate(methods.values()):
            mean_point(axis, points, place, COLOURS[0] if place == 0 else BASELINE)
        axis.axvline(teachers[name], color="black", lw=1.6, label="teacher")
        label = f"{reported:.3f} of the teacher's score (reported mean)"
        axis.axvline(reported * teachers[name], color=REPORTED, lw=1.6, ls="--", label=label)
        axis.axvline(trivial[name], color=COLOURS[3], lw=1.2, ls=":", label="constant answer")
        axis.set_yticks(range(len(methods)), list(methods))
        axis.set(title=name, xlabel="accuracy, %")
        if trivial[name] == 0:
            axis.set(xlabel="100 x Pearson r", xlim=(min(map(min, methods.values())) - 3, None))
    np.atleast_1d(axes)[0].invert_yaxis()
    handles = np.atleast_1d(axes)[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside upper center", ncols=3)
    return fig


def draw_sweep(
    scores: Mapping[str, Mapping[float, Numbers]], teachers: Mapping[str, float]
) -> Figure:
    """Score against alpha: every seed as a point, means with their intervals; dotted the teacher.

    Args:
        scores: task -> alpha -> score of each seed, as many for every alpha.
        teachers: score of the teacher by task.
    """
    fig, ax = plt.subplots(figsize=(7.5, 4))
    for number, (name, by_alpha) in enumerate(scores.items()):
        colour = COLOURS[number]
        mean_curve(ax, list(by_alpha), np.stack(list(by_alpha.values()), 1), colour, name)
        ax.axhline(teachers[name], color=colour, lw=1, ls=":")
    ax.plot([], [], color=BASELINE, lw=1, ls=":", label="teacher of the task")
    ax.set(xlabel="alpha (0: labels alone, 1: teacher alone)", ylabel="test score")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def draw_gains(
    panels: Mapping[str, Mapping[str, Numbers]],
    reported: Mapping[str, Numbers],
    quantity: str,
) -> Figure:
    """Gains of every row and seed, one panel an encoder, and last the reported gains of the same rows.

    Args:
        panels: encoder -> row -> gain of each seed.
        reported: row -> gains of the models that were reported.
        quantity: what the horizontal axis shows.
    """
    rows = list(next(iter(panels.values())))
    fig, axes = plt.subplots(1, len(panels) + 1, figsize=(11, 3.2), sharey=True)
    for axis, (name, gains) in zip(axes, panels.items(), strict=False):
        for place, (row, points) in enumerate(gains.items()):
            mean_point(axis, points, place, BASELINE if row.startswith("contrast") else COLOURS[0])
        axis.set(title=name, xlabel=quantity)
    for row, points in reported.items():
        axes[-1].plot(points, [rows.index(row)] * len(points), "s", color=REPORTED, mec="black")
    axes[-1].set(title="reported (STS)", xlabel=quantity)
    for axis in axes:
        axis.axvline(0, color=BASELINE, lw=1, ls="--")
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    return fig


def draw_differences(
    panels: Mapping[str, Mapping[str, np.ndarray]], tasks: Sequence[str]
) -> Figure:
    """Differences of techniques to a baseline: means over seeds by task, and black over all tasks.

    Args:
        panels: what is shown -> technique -> [seeds, tasks].
        tasks: names of the last axis.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(10, 4.4), sharey=True)
    step = 0.8 / (len(tasks) + 1)
    for axis, (quantity, gains) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for place, values in enumerate(gains.values()):
            arms = [
                *zip(tasks, values.T, COLOURS, strict=False),
                ("all tasks", values.mean(1), "k"),
            ]
            for number, (name, points, colour) in enumerate(arms):
                height = place + step * (number - len(tasks) / 2)
                mean_point(axis, points, height, colour, name if place == 0 else None)
        axis.axvline(0, color=BASELINE, lw=1)
        axis.set_yticks(range(len(gains)), list(gains))
        axis.set_xlabel(quantity)
    np.atleast_1d(axes)[0].invert_yaxis()
    fig.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside right center")
    return fig


def draw_sizes(
    sweep: Mapping[str, np.ndarray],
    plain: np.ndarray,
    sizes: Numbers,
    constant: float,
) -> Figure:
    """Accuracy against the size of the perturbation in training.

    Args:
        sweep: technique -> [seeds, sizes].
        plain: accuracy of each seed without perturbation.
        sizes: epsilon.
        constant: accuracy of an answer that is always the same.
    """
    fig, ax = plt.subplots(figsize=(7.5, 4.2))
    every = np.repeat(np.asarray(plain)[:, None], len(sizes), 1)
    mean_curve(ax, sizes, every, BASELINE, "Vanilla", "--")
    for (kind, values), colour in zip(sweep.items(), COLOURS, strict=False):
        mean_curve(ax, sizes, values, colour, kind)
    ax.axhline(constant, color="black", lw=1, ls=":", label="constant answer")
    ax.set(xlabel="epsilon in training", ylabel="test accuracy, %", xscale="log")
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def draw_strips(strips: Mapping[tuple[str, str], Mapping[str, Numbers]]) -> Figure:
    """One row of shades for each label over the words of each text, every row divided by its largest.

    Args:
        strips: (words, title) -> label -> number of each word.
    """
    fig, axes = plt.subplots(len(strips), 1, figsize=(9, 2.6 * len(strips)), squeeze=False)
    for axis, ((spelt, title), rows) in zip(axes[:, 0], strips.items(), strict=True):
        shades = np.stack([np.asarray(row) / np.max(np.asarray(row)) for row in rows.values()])
        axis.imshow(shades, cmap="Blues", aspect="auto", vmin=0, vmax=1)
        axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axis.set_xticks(range(shades.shape[1]), spelt.split(" "), rotation=25, ha="right")
        axis.set_title(title, fontsize=9)
        between = np.arange(2, len(rows), 2) - 0.5
        axis.hlines(between, -0.5, shades.shape[1] - 0.5, color="black", lw=0.8)
        axis.grid(False)
    return fig


def draw_shifts(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    sizes: Numbers,
    labels: Mapping[str, str],
) -> Figure:
    """Change of predictions against the size of a perturbation at test time.

    Args:
        panels: kind of perturbation -> technique -> [seeds, sizes]; "Vanilla" is drawn dashed.
        sizes: epsilon.
        labels: technique -> what the legend says.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(9.5, 3.8), sharey=True)
    for axis, (how, curves) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for (kind, values), colour in zip(curves.items(), COLOURS, strict=False):
            plain = kind == "Vanilla"
            style = (BASELINE, labels[kind], "--") if plain else (colour, labels[kind], "-")
            mean_curve(axis, sizes, values, *style)
        axis.set(xscale="log", xlabel="epsilon at test time", title=how, ylim=(0, None))
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.minorticks_off()
    np.atleast_1d(axes)[0].set_ylabel("total variation of predictions")
    fig.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside right center")
    return fig


def draw_imitation(
    logits: Mapping[str, tuple[Numbers, Numbers]], fits: Mapping[str, tuple[float, float]]
) -> Figure:
    """The student's logit against its teacher's on every test pair, one panel a task; grey: equality.

    Args:
        logits: task -> the teacher's and the student's logit of each pair.
        fits: task -> R² of the student's logits, and of a student that learned from labels alone.
    """
    size = (2.4 * len(logits) + 1, 3.2)
    fig, axes = plt.subplots(1, len(logits), figsize=size, squeeze=False)
    for axis, (name, (teacher, student)) in zip(axes[0], logits.items(), strict=True):
        axis.plot(teacher, student, ".", ms=3, alpha=0.4, color=COLOURS[0])
        ends = min(teacher), max(teacher)
        axis.plot(ends, ends, color=BASELINE, lw=1)
        own, labels = fits[name]
        axis.set(title=f"{name}\nR² {own:.2f} (labels {labels:.2f})", xlabel="teacher's logit")
    axes[0, 0].set_ylabel("DSE's logit")
    return fig
