"""Figures of active multi-task learning: relevance, allocations, costs and the tasks on pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED
from reattend.theory.a_mtrl import separating_constants, separating_erm_constant

COLOUR = {"L1": COLOURS[0], "L2": COLOURS[1], "uniform": BASELINE}


def draw_example(rows: Mapping[str, np.ndarray]) -> Figure:
    """Quantities of a small example, one value a source, as shaded rows with their numbers.

    Args:
        rows: name -> [k, sources] or [sources]. Shades are relative to a row's largest size.
    """
    blocks = {name: np.atleast_2d(values) for name, values in rows.items()}
    heights = [len(block) for block in blocks.values()]
    fig, axes = plt.subplots(
        len(blocks), 1, figsize=(9, 0.55 * sum(heights) + 1), height_ratios=heights, sharex=True
    )
    for axis, (name, block) in zip(axes, blocks.items(), strict=True):
        bound = np.abs(block).max()
        axis.imshow(block, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto")
        for (i, j), value in np.ndenumerate(block):
            colour = "white" if abs(value) > 0.6 * bound else "black"
            text = f"{value:.0f}" if bound > 10 else f"{value:.2f}"
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(yticks=[], xticks=range(block.shape[1]))
        axis.grid(False)
    axes[-1].set_xlabel("source (0 and 1 are strong)")
    return fig


def draw_error(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    laws: Mapping[str, Mapping[str, np.ndarray]],
    totals: Sequence[int],
) -> Figure:
    """Representation error against source samples: repetitions, their mean and a law.

    Args:
        panels: title -> method -> errors [totals, runs].
        laws: title -> method -> the law's error at every total.
    """
    fig, (axes,) = plt.subplots(1, len(panels), figsize=(10, 4), squeeze=False)
    for axis, (title, methods) in zip(axes, panels.items(), strict=True):
        for method, runs in methods.items():
            spread = np.broadcast_to(np.array(totals)[:, None], runs.shape)
            axis.plot(spread, runs, ".", color=COLOUR[method], alpha=0.12, markersize=4)
            axis.plot(totals, runs.mean(1), "o-", color=COLOUR[method], label=f"{method}, mean")
            axis.plot(totals, laws[title][method], ":", color=COLOUR[method])
        axis.set(xscale="log", yscale="log", title=title, xlabel="source samples N (thousand)")
        axis.set_xticks(totals, [f"{total / 1000:g}" for total in totals])
        axis.minorticks_off()
    axes[0].plot([], [], ":", color=BASELINE, label="first-order law")
    axes[0].set_ylabel("representation error")
    axes[0].legend(loc="upper right")
    return fig


def draw_relevance(
    estimates: Mapping[str, Tensor],
    truths: Mapping[str, Tensor],
    penalties: Tensor,
    path: Tensor,
    chosen: float | None,
    strong: int,
) -> Figure:
    """Estimated relevance of every source beside the true one, and one Lasso path.

    Args:
        estimates: method -> [runs, sources].
        truths: method -> the relevance it estimates, [sources].
        penalties, path: of the Lasso, falling, and its solutions [penalties, sources].
        chosen: the penalty that the method takes; None where even the smallest leaves too much.
        strong: how many sources, from the first, are strong.
    """
    fig = plt.figure(figsize=(10, 4.6))
    grid = fig.add_gridspec(2, 2)
    colours = dict(zip(estimates, COLOURS[:2], strict=True))
    first = None
    for row, (name, values) in enumerate(estimates.items()):
        axis = first = fig.add_subplot(grid[row, 0], sharex=first, sharey=first)
        sources = np.arange(values.shape[1])
        for run in values:
            axis.plot(sources, run, ".", color=colours[name], alpha=0.15, ms=4)
        axis.plot(sources, values.mean(0), "o", color=colours[name], ms=4, label=f"{name}, mean")
        axis.plot(sources, truths[name], "_", color="black", ms=9, label="truth")
        axis.set_ylabel("relevance")
        axis.legend(ncols=2, loc="upper right")
    axis.set_xlabel(f"source (0 to {strong - 1} are strong)")
    right = fig.add_subplot(grid[:, 1])
    for source in reversed(range(path.shape[1])):
        colour = COLOURS[0] if source < strong else BASELINE
        right.plot(penalties, path[:, source], color=colour)
    if chosen is not None:
        right.axvline(chosen, color=COLOURS[3], linestyle="--", label="penalty taken")
    right.plot([], [], color=COLOURS[0], label="strong sources")
    right.plot([], [], color=BASELINE, label="weak sources")
    right.set(xscale="log", xlabel="penalty", title="one Lasso path")
    right.margins(x=0.02, y=0.08)
    right.invert_xaxis()
    right.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
    return fig


def draw_cost(
    bars: Mapping[str, Mapping[str, tuple[float, float]]],
    measured: Mapping[str, Mapping[str, np.ndarray]],
) -> Figure:
    """Cost to reach one error, in thousand samples: two predictions and every repetition.

    Args:
        bars: kind of cost -> method -> cost by the paper's constants, by the first-order law.
        measured: kind -> method -> one value a repetition.
    """
    fig, (axes,) = plt.subplots(1, len(bars), figsize=(10, 3.8), squeeze=False)
    for axis, (kind, methods) in zip(axes, bars.items(), strict=True):
        for place, (method, pair) in enumerate(methods.items()):
            for side, (height, colour) in enumerate(zip(pair, (REPORTED, COLOURS[9]), strict=True)):
                axis.bar(place + 0.27 * (side - 1), height / 1000, width=0.27, color=colour)
            runs = measured[kind][method] / 1000
            jitter = place + 0.27 + np.linspace(-0.09, 0.09, len(runs))
            axis.plot(jitter, runs, ".", color=COLOURS[0], alpha=0.4, ms=4)
            axis.plot(place + 0.27, np.exp(np.log(runs).mean()), "_", color="black", ms=16)
        axis.set(title=kind, xticks=range(len(methods)), xticklabels=list(methods))
        axis.set_ylabel("cost (thousand samples)")
    axes[0].bar(0, 0, color=REPORTED, label="paper's constants")
    axes[0].bar(0, 0, color=COLOURS[9], label="least-squares law")
    axes[0].plot([], [], ".", color=COLOURS[0], label="measured, repetitions")
    axes[0].plot([], [], "_", color="black", ms=12, label="geometric mean")
    axes[0].margins(y=0.35)
    axes[0].legend(loc="upper left")
    return fig


def draw_targets(
    errors: Mapping[str, np.ndarray], ours: str, others: Sequence[str], groups: Sequence[str]
) -> Figure:
    """Error of one method against those of others, target by target.

    Args:
        errors: method -> [draws, targets]; draws are drawn pale, their means dark. A method with fewer
            draws has the first ones, and is compared on them.
        groups: names of equally many neighbouring targets, drawn in one colour each.
    """
    fig, (axes,) = plt.subplots(1, len(others), figsize=(9.5, 4.6), squeeze=False)
    each = errors[ours].shape[1] // len(groups)
    end = 1.02 * max(errors[m].max() for m in (ours, *others))
    for axis, other in zip(axes, others, strict=True):
        same = errors[ours][: len(errors[other])]
        for place, group in enumerate(groups):
            part = slice(place * each, (place + 1) * each)
            x, y = errors[other][:, part], same[:, part]
            axis.plot(x.ravel(), y.ravel(), ".", color=COLOURS[place], alpha=0.2, ms=4)
            axis.plot(x.mean(0), y.mean(0), "o", color=COLOURS[place], ms=5, label=group)
        axis.plot([0, end], [0, end], color=BASELINE, linewidth=1)
        share = 50 * (1 + np.sign(errors[other] - same)).mean()
        axis.set(xlabel=f"error of {other} (%)", ylabel=f"error of {ours} (%)")
        axis.set(xlim=(0, end), ylim=(0, end), aspect="equal")
        axis.set_title(f"{ours} better in {share:.0f} %")
    axes[0].legend(loc="upper left", ncols=2)
    return fig


def draw_relatedness(
    shares: Mapping[str, tuple[np.ndarray, np.ndarray]],
    kinds: Sequence[str],
    aims: Sequence[str],
    classes: Sequence[str],
) -> Figure:
    """Where the relevance lies, in %: by corruption and by class of target and source.

    Args:
        shares: method -> ([kinds, kinds], [aims, classes]); each method has its own colours, from
            nothing to its largest share.
        kinds, aims, classes: names of the corruptions, the targets' classes and the sources' classes.
    """
    fig, axes = plt.subplots(len(shares), 2, figsize=(11, 7.6), width_ratios=[1, 1.15])
    for row, (method, (by_kind, by_class)) in zip(axes, shares.items(), strict=True):
        panels = ((by_kind, kinds, kinds, "corruption"), (by_class, classes, aims, "class"))
        for axis, (shown, columns, rows, what) in zip(row, panels, strict=True):
            top = np.nanmax(shown)
            axis.imshow(shown, cmap="Blues", vmin=0, vmax=top, aspect="auto")
            for (i, j), value in np.ndenumerate(shown):
                if np.isfinite(value):
                    colour = "white" if value > 0.6 * top else "black"
                    text = f"{value:.0f}"
                    axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
            axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
            axis.set_yticks(range(len(rows)), rows)
            axis.set(title=f"{method}: share by {what} (%)", ylabel=f"{what} of the target")
            axis.grid(False)
    for axis, what in zip(axes[-1], ("corruption", "class"), strict=True):
        axis.set_xlabel(f"{what} of the source")
    return fig


def draw_separation(largest: int = 10_000) -> Figure:
    """Samples needed by L2 over L1 sampling on the separating instance, in closed form."""
    counts = np.unique(np.logspace(0.31, np.log10(largest), 60).astype(int)).tolist()
    fig, axis = plt.subplots(figsize=(7.5, 4))

    def line(ratio: Callable[[int], float], **style) -> None:
        axis.plot(counts, [ratio(m) for m in counts], **style)

    label = "the paper's bound, weak = $M^{-1/2}$"
    line(lambda m: separating_constants(m)["l2"], color=REPORTED, linewidth=3, label=label)
    for exponent, colour, name in ((0.5, COLOURS[1], "1/2"), (0.25, COLOURS[3], "1/4")):
        label = f"least squares, weak = $M^{{-{name}}}$"
        line(lambda m, e=exponent: separating_erm_constant(m, e), color=colour, label=label)
    axis.set(xscale="log", yscale="log", xlabel="sources M", ylabel="L2 over L1, samples needed")
    axis.legend()
    return fig


def draw_corruptions(pictures: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Flat square pictures with values in [0, 1], side by side."""
    fig, axes = plt.subplots(1, len(titles), figsize=(10, 1.7))
    side = math.isqrt(pictures[0].numel())
    for axis, title, picture in zip(axes, titles, pictures, strict=True):
        axis.imshow(picture.view(side, side), cmap="gray_r", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    return fig
