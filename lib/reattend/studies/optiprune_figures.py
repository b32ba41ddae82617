"""Pictures of the study of noise optimisation and token pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import norm
from sklearn.metrics import roc_curve
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.generation.optiprune import Selection, Shift
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point

COLOUR_OF = {
    "base": BASELINE,
    "noise only": COLOURS[4],
    "OptiPrune": COLOURS[0],
    "best of k": COLOURS[1],
    "random direction": COLOURS[5],
    "SimPrune": COLOURS[2],
    "SimPrune alone": COLOURS[2],
    "random": COLOURS[7],
    "random pruning alone": COLOURS[7],
    "dissimilar": COLOURS[3],
    "ToMe": COLOURS[9],
}
"""One colour an arm, in every figure."""


def _colour(name: str) -> str:
    return COLOUR_OF.get(name, COLOURS[6])


def _picture(axis: Axes, picture: Tensor) -> None:
    axis.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)


def draw_scores(maps: Tensor, inside: Tensor, seen: Tensor) -> Figure:
    """Cross-attention of two concepts with the outline of their foreground, and the self-attention of their peaks."""
    figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.6))
    for axis, one, mask, name in zip(axes, maps, inside, "AB", strict=False):
        axis.imshow(one.numpy(), cmap="magma", vmin=0, vmax=1)
        axis.contour(mask.numpy().astype(float), [0.5], colors="white", linewidths=1.2)
        row, column = np.unravel_index(int(one.argmax()), one.shape)
        axis.plot(column, row, "x", color="cyan")
        axis.set_title(f"cross-attention of {name}, foreground, peak")
    for axis, one, name in zip(axes[2:], seen, "AB", strict=True):
        axis.imshow(one.numpy(), cmap="viridis")
        axis.set_title(f"self-attention at the peak of {name}")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
        axis.title.set_fontsize(8)
    return figure


def draw_selection(picture: np.ndarray, selection: Selection) -> Figure:
    """Tokens of one picture [side, side]: base tokens, others that are kept, and what the pruned ones copy."""
    side = len(picture)
    figure, axis = plt.subplots(figsize=(4.6, 4.4))
    axis.imshow(picture, cmap="Greys", alpha=0.5)
    kept, pruned = selection.kept[0].numpy(), selection.pruned[0].numpy()
    base = kept[-(side**2 // 4) :]
    for token, source in zip(pruned, kept[selection.source[0].numpy()], strict=True):
        (y, x), (to_y, to_x) = divmod(int(token), side), divmod(int(source), side)
        arrow = {"arrowstyle": "->", "color": COLOURS[3], "lw": 0.7}
        axis.annotate("", (to_x, to_y), (x, y), arrowprops=arrow)
    for tokens, style, name in [
        (base, "s", "base (always kept)"),
        (kept[: -len(base)], "o", "kept"),
        (pruned, "x", "pruned, with its source"),
    ]:
        colour = {"s": COLOURS[0], "o": COLOURS[2], "x": COLOURS[3]}[style]
        axis.plot(tokens % side, tokens // side, style, color=colour, ms=6, label=name)
    for edge in range(0, side + 1, 2):
        axis.axhline(edge - 0.5, color="black", lw=0.4)
        axis.axvline(edge - 0.5, color="black", lw=0.4)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def draw_samples(
    pictures: Mapping[str, Tensor], captions: Sequence[str], good: Mapping[str, np.ndarray]
) -> Figure:
    """One row an arm, one column a prompt, the same first noise; a red frame where an object is missing."""
    figure, axes = plt.subplots(
        len(pictures),
        len(captions),
        figsize=(1.25 * len(captions), 1.25 * len(pictures) + 0.5),
        squeeze=False,
    )
    for row, (name, drawn) in zip(axes, pictures.items(), strict=True):
        for axis, picture, there in zip(row, drawn, good[name], strict=True):
            _picture(axis, picture)
            for spine in axis.spines.values():
                spine.set_visible(True)
                spine.set_color("grey" if there else "red")
                spine.set_linewidth(0.5 if there else 2)
        row[0].set_ylabel(name, fontsize=7)
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(caption.replace(" and ", "\nand "), fontsize=6.5, fontweight="normal")
    return figure


def draw_arms(points: Mapping[str, Mapping[str, np.ndarray]], labels: Mapping[str, str]) -> Figure:
    """One panel a measure: every prompt of every arm, and the mean with its 95 % interval."""
    figure, axes = plt.subplots(1, len(points), figsize=(4.2 * len(points), 3.4), sharey=True)
    for axis, (measure, arms) in zip(axes, points.items(), strict=True):
        for place, (name, values) in enumerate(arms.items()):
            mean_point(axis, values, place, _colour(name))
        axis.axvline(np.mean(arms["base"]), color=BASELINE, lw=0.8, ls=":")
        axis.set_xlabel(labels[measure])
        axis.set_yticks(range(len(arms)), list(arms))
    axes[0].invert_yaxis()
    return figure


def draw_noise(start: Tensor, shift: Shift, free: Shift, steps: Mapping[str, np.ndarray]) -> Figure:
    """What optimisation does to a noise: the mean it adds, all values against the normal, divergence by arm."""
    figure, axes = plt.subplots(1, 4, figsize=(12.5, 2.9))
    for axis, moved, name in [(axes[0], shift, "bounded"), (axes[1], free, "unbounded")]:
        added = moved.mean[0].mean(0)
        limit = float(free.mean[0].mean(0).abs().max()) or 1.0
        image = axis.imshow(added.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        axis.set_title(f"mean added to one noise, {name}")
        axis.grid(False)
        figure.colorbar(image, ax=axis, shrink=0.8)
    ruler = np.linspace(-4, 4, 200)
    for moved, name, colour in [(shift, "bounded", COLOURS[0]), (free, "unbounded", COLOURS[3])]:
        values = moved.applied(start).flatten().numpy()
        label = f"{name}: mean {values.mean():+.3f}, s.d. {values.std():.3f}"
        axes[2].hist(values, 80, (-4, 4), density=True, histtype="step", color=colour, label=label)
    axes[2].plot(ruler, norm.pdf(ruler), color="black", lw=0.8, label="standard normal")
    axes[2].set_ylim(top=0.58)  # room for the legend above the curves
    axes[2].legend(fontsize=6.5, loc="upper center")
    axes[2].set_title("values of all noises")
    for place, values in enumerate(steps.values()):
        axes[3].plot(
            np.maximum(values, 1e-7),
            np.full(len(values), place),
            ".",
            color=COLOURS[place],
            alpha=0.3,
        )
    axes[3].axvline(1e-3, color="red", lw=0.8)
    axes[3].set_xscale("log")
    axes[3].set_yticks(range(len(steps)), list(steps))
    axes[3].set_xlabel("KL divergence (nats an element); red: bound")
    return figure


def draw_prediction(
    scores: Mapping[str, np.ndarray], failed: np.ndarray, areas: Mapping[str, np.ndarray]
) -> Figure:
    """Scores of fresh noises by what became of the picture, ROC curves, and areas with their intervals.

    Args:
        scores: less the mean of their prompt.
        areas: within prompts, pseudo-values of the prompts; all of them are shown.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), width_ratios=(1, 1, 1.3))
    first = next(iter(scores))
    bins = np.linspace(scores[first].min(), scores[first].max(), 25)
    for which, name, colour in [
        (~failed, "both objects", COLOURS[2]),
        (failed, "one missing", COLOURS[3]),
    ]:
        axes[0].hist(scores[first][which], bins, density=True, alpha=0.6, color=colour, label=name)
    axes[0].set_xlabel(f"{first}, less the prompt's mean")
    axes[0].set_ylabel("density")
    axes[0].legend()
    for place, (name, values) in enumerate(scores.items()):
        miss, hit, _ = roc_curve(failed, values)
        axes[1].plot(miss, hit, color=COLOURS[place], label=name)
        mean_point(axes[2], areas[name], place, COLOURS[place])
    axes[1].plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
    axes[1].set_xlabel("share of good pictures above the threshold")
    axes[1].set_ylabel("share of failed ones above it")
    axes[1].legend(fontsize=7, loc="lower right")
    axes[2].axvline(0.5, color="grey", lw=0.8, ls=":")
    axes[2].set_yticks(range(len(areas)), list(areas))
    axes[2].invert_yaxis()
    axes[2].set_xlabel("area within prompts, 95 % interval")
    return figure


def draw_pruning(
    errors: Mapping[str, Mapping[float, np.ndarray]],
    presence: Mapping[str, np.ndarray],
    times: Mapping[int, Mapping[str, np.ndarray]],
    reported: float,
) -> Figure:
    """Error by ratio, judged presence, and time of a block by number of tokens, each with 95 % intervals."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.4))
    for name, by_ratio in errors.items():
        found = [mean(np.exp(values)) for values in by_ratio.values()]
        bars = np.array([[f.effect - f.low, f.high - f.effect] for f in found]).T
        heights = [f.effect for f in found]
        axes[0].errorbar(
            list(by_ratio),
            heights,
            bars,
            marker="o",
            ms=4,
            capsize=2,
            color=_colour(name),
            label=name,
        )
    axes[0].set_xlabel("share of tokens that is pruned")
    axes[0].set_ylabel("relative error of the velocity")
    axes[0].set_yscale("log")
    axes[0].legend()
    for place, (name, values) in enumerate(presence.items()):
        mean_point(axes[1], values, place, _colour(name))
    axes[1].set_yticks(range(len(presence)), list(presence))
    axes[1].invert_yaxis()
    axes[1].set_xlabel("log-odds of the less certain object")
    styles = {
        "pruned": COLOURS[0],
        "selection alone": COLOURS[1],
        "pruned, by the graph": COLOURS[3],
    }
    for name, colour in styles.items():
        middle = [np.median(times[tokens][name]) for tokens in times]
        axes[2].plot(list(times), middle, "-", color=colour, label=name)
        for tokens in times:
            axes[2].plot(
                [tokens] * len(times[tokens][name]),
                times[tokens][name],
                ".",
                color=colour,
                alpha=0.3,
            )
    axes[2].axhline(1, color="black", lw=0.8)
    axes[2].axhline(reported, color=REPORTED, lw=1.5, label="reported, whole model (GPU)")
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(list(times), [f"{tokens:,}" for tokens in times])
    axes[2].set_xlabel("tokens")
    axes[2].set_ylabel("time / full attention")
    axes[2].legend(fontsize=7)
    return figure


def draw_kept(pictures: Tensor, selections: Mapping[str, Selection], shuffle: int) -> Figure:
    """Pictures, and the same with the pruned tokens dark, at several moments of sampling."""
    rows = len(pictures)
    figure, axes = plt.subplots(
        rows,
        len(selections) + 1,
        figsize=(1.5 * (len(selections) + 1), 1.5 * rows + 0.3),
        squeeze=False,
    )
    for number in range(rows):
        _picture(axes[number, 0], pictures[number])
        for axis, (name, selection) in zip(axes[number, 1:], selections.items(), strict=True):
            tokens = selection.kept.shape[1] + selection.pruned.shape[1]
            side = math.isqrt(tokens)
            bright = np.full(tokens, 0.15)
            bright[selection.kept[number].numpy()] = 0.8
            bright[selection.kept[number, -(tokens // 4) :].numpy()] = 1.0
            mask = bright.reshape(side, side).repeat(shuffle, 0).repeat(shuffle, 1)
            shown = ((pictures[number] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
            axis.imshow(shown * mask[..., None])
            axis.axis("off")
            if number == 0:
                axis.set_title(name, fontsize=8)
    axes[0, 0].set_title("picture", fontsize=8)
    return figure
