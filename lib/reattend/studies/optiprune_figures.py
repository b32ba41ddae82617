"""Pictures of the study of noise optimisation and token pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.generation.optiprune import Selection, Shift
from reattend.plots import BASELINE, COLOURS, REPORTED
from reattend.studies.a_star_figures import prompt_row

COLOUR_OF = {
    "base": BASELINE,
    "noise only": COLOURS[4],
    "OptiPrune": COLOURS[0],
    "best of k": COLOURS[1],
    "random phases": COLOURS[5],
    "OptiPrune's search": COLOURS[0],
    "bounded": COLOURS[2],
    "unbounded": COLOURS[3],
    "scaled back": COLOURS[4],
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
        ruler = np.arange(-1, len(mask) + 1)  # a border of zeros closes outlines at the edge
        outline = np.pad(mask.numpy().astype(float), 1)
        axis.contour(ruler, ruler, outline, [0.5], colors="white", linewidths=1.2)
        axis.set(xlim=(-0.5, len(mask) - 0.5), ylim=(len(mask) - 0.5, -0.5))
        row, column = np.unravel_index(int(one.argmax()), one.shape)
        axis.plot(column, row, "x", color="cyan")
        axis.set_title(f"cross-attention of {name}")
    for axis, one, name in zip(axes[2:], seen, "AB", strict=True):
        axis.imshow(one.numpy(), cmap="viridis")
        axis.set_title(f"self-attention at the peak of {name}")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
        axis.title.set_fontsize(8)
    figure.supxlabel("white line: foreground; cyan cross: peak", fontsize=8)
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
        row[0].set_ylabel(name, fontsize=8)
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(caption.replace(" and ", "\nand "), fontsize=7.5, fontweight="normal")
    return figure


def draw_arms(points: Mapping[str, Mapping[str, np.ndarray]], labels: Mapping[str, str]) -> Figure:
    """One panel a measure: prompts of every arm as circles, and below them the mean with its 95 % interval."""
    figure, axes = plt.subplots(1, len(points), figsize=(4.4 * len(points), 4.2), sharey=True)
    for axis, (measure, arms) in zip(axes, points.items(), strict=True):
        _arm_rows(axis, arms)
        axis.axvline(np.mean(arms["base"]), color=BASELINE, lw=0.8, ls=":")
        axis.set_xlabel(labels[measure])
    axes[0].invert_yaxis()
    figure.supxlabel(
        "circles: prompts, area by how many; diamonds: means with 95 % intervals", fontsize=8
    )
    return figure


def _arm_rows(axis: Axes, arms: Mapping[str, np.ndarray]) -> None:
    width = (np.ptp(np.concatenate(list(arms.values()))) or 1.0) / 40
    for place, (name, values) in enumerate(arms.items()):
        prompt_row(axis, values, place, _colour(name), width)
    axis.set_yticks(range(len(arms)), list(arms))


def draw_noise(
    start: Tensor, shifts: Mapping[str, Shift], divergences: Mapping[str, np.ndarray]
) -> Figure:
    """What optimisation does to noises: the mean it adds to one, power by frequency of all, divergence by arm.

    Args:
        start: noises as they were drawn, [rows, channels, side, side].
        shifts: of these noises by arm, on one scale of colours.
        divergences: of every noise by arm.
    """
    figure = plt.figure(figsize=(12.5, 6.2))
    above, below = figure.subfigures(2, 1)
    axes = above.subplots(1, len(shifts))
    added = {name: shift.mean[0].mean(0).numpy() for name, shift in shifts.items()}
    limit = max(float(np.abs(grid).max()) for grid in added.values()) or 1.0
    for axis, (name, grid) in zip(axes, added.items(), strict=True):
        image = axis.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit)
        axis.set_title(f"mean added to one noise: {name}")
        axis.set(xlabel="column, pixels", ylabel="row, pixels")
        axis.grid(False)
    above.colorbar(image, ax=axes, shrink=0.8, label="s.d. of the noise")
    spectrum, spread = below.subplots(1, 2)
    arms = {"as drawn": start} | {n: shift.applied(start) for n, shift in shifts.items()}
    for (name, noise), style in zip(arms.items(), ("-", "-", "-", "--"), strict=True):
        frequency, power = _power(noise)
        label = f"{name}: mean {noise.mean():+.3f}, s.d. {noise.std():.3f}"
        colour = BASELINE if name == "as drawn" else _colour(name)
        spectrum.plot(frequency, power, style, color=colour, label=label, marker=".")
    spectrum.set(
        xlabel="spatial frequency, periods a picture", ylabel="power / that of white noise"
    )
    spectrum.set_yscale("log")
    spectrum.set_title("all noises, moved: white noise has power 1")
    spectrum.legend()
    for place, (name, values) in enumerate(divergences.items()):
        heights = place + np.linspace(-0.3, 0.3, len(values))  # side by side, not on each other
        spread.plot(np.maximum(values, 1e-6), heights, ".", color=_colour(name), alpha=0.4, ms=4)
    spread.axvline(1e-3, color="red", lw=0.8, label="bound")
    spread.set_xscale("log")
    spread.set_yticks(range(len(divergences)), list(divergences))
    spread.invert_yaxis()
    spread.set_xlabel("KL divergence, nats an element (at $10^{-6}$: not moved)")
    spread.set_title("every noise")
    spread.legend(loc="upper right")
    return figure


def _power(noise: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of noises [rows, channels, side, side] by whole spatial frequency; 1 for white noise."""
    side = noise.shape[-1]
    power = np.abs(np.fft.fft2(noise.double().numpy(), norm="ortho")) ** 2
    ruler = np.fft.fftfreq(side, 1 / side)
    ring = np.hypot(*np.meshgrid(ruler, ruler)).round().astype(int)
    rings = np.arange(side // 2 + 1)
    mean_power = power.mean((0, 1))
    return rings, np.array([mean_power[ring == r].mean() for r in rings])


def draw_prediction(
    scores: Mapping[str, np.ndarray],
    failed: np.ndarray,
    areas: Mapping[str, np.ndarray],
    more: np.ndarray,
) -> Figure:
    """Scores of fresh noises by what became of the picture, ROC curves, areas, and what the asked things add.

    Args:
        scores: less the mean of their prompt.
        areas: within prompts, pseudo-values of the prompts.
        more: area of the asked things less that of other things, pseudo-values.
    """
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.9), width_ratios=(1, 1, 1, 0.8))
    first = next(iter(scores))
    bins = np.linspace(scores[first].min(), scores[first].max(), 25)
    for which, name, colour in [
        (~failed, "both objects", COLOURS[2]),
        (failed, "one missing", COLOURS[3]),
    ]:
        label = f"{name} ({which.sum():,} pictures)"
        values = scores[first][which]
        axes[0].hist(values, bins, density=True, histtype="step", lw=1.6, color=colour, label=label)
        axes[0].axvline(values.mean(), color=colour, lw=1, ls="--")
    axes[0].set_xlabel(f"{first}, less the prompt's mean; dashed: means")
    axes[0].set_ylabel("density")
    axes[0].set_ylim(top=1.25 * axes[0].get_ylim()[1])  # room for the legend
    axes[0].legend(loc="upper center")
    for place, (name, values) in enumerate(scores.items()):
        miss, hit, _ = roc_curve(failed, values)
        axes[1].plot(miss, hit, color=COLOURS[place])
        _interval(axes[2], areas[name], place, COLOURS[place])
    axes[1].plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
    axes[1].set_xlabel("share of good pictures above the threshold")
    axes[1].set_ylabel("share of failed ones above it")
    axes[1].set_title("colours as on the right")
    axes[2].axvline(0.5, color="grey", lw=0.8, ls=":")
    axes[2].set_yticks(range(len(areas)), [name.replace(" of ", "\nof ") for name in areas])
    axes[2].set_ylim(len(areas) - 0.5, -0.5)
    axes[2].set_xlabel("area within prompts; .5: chance")
    axes[2].set_title("means, 95 % intervals")
    _interval(axes[3], more, 0, COLOURS[0])
    axes[3].axvline(0, color="grey", lw=0.8, ls=":")
    axes[3].axvline(0.056, color="red", lw=0.8)
    axes[3].set_yticks([])
    axes[3].set_ylim(0.5, -0.5)
    axes[3].set_xlabel("area; red: what would count")
    axes[3].set_title("asked less other things")
    return figure


def _interval(axis: Axes, values: np.ndarray, place: float, colour: str) -> None:
    """Mean of the values with its 95 % interval."""
    found = mean(values)
    if np.isfinite(found.low):
        axis.plot([found.low, found.high], [place, place], color=colour, lw=2)
    axis.plot(found.effect, place, "D", color=colour, mec="black", mew=0.6, ms=6)


def draw_pruning(
    errors: Mapping[str, Mapping[float, np.ndarray]],
    presence: Mapping[str, np.ndarray],
    times: Mapping[int, Mapping[str, np.ndarray]],
    reported: float,
) -> Figure:
    """Error by ratio, judged presence, and time of a block by number of tokens, each with 95 % intervals."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9))
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
    _arm_rows(axes[1], presence)
    axes[1].set_yticks(
        range(len(presence)), [name.replace(" alone", "\nalone") for name in presence]
    )
    axes[1].invert_yaxis()
    axes[1].set_xlabel("less certain object, log-odds within ±6 (judge)")
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
    axes[2].set_ylabel("time of a block / that of full attention")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.45, -0.17), ncols=2)
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
    figure.supxlabel("bright: base tokens; grey: other kept ones; dark: pruned", fontsize=8)
    return figure
