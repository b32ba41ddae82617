"""Pictures of the study of A-STAR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED

COLOUR_OF = {
    "base": BASELINE,
    "Attend-and-Excite": COLOURS[1],
    "+ L_ret": COLOURS[2],
    "+ L_seg": COLOURS[4],
    "A-STAR": COLOURS[0],
    "random direction": COLOURS[3],
    "L_ret, random direction": COLOURS[5],
}
"""One colour a method, in every figure."""


def show_picture(axis: Axes, picture: Tensor) -> None:
    """A picture [3, side, side] in [-1, 1], without ticks."""
    axis.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    _bare(axis)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)


def draw_concepts(
    picture: Tensor, maps: Tensor, regions: Tensor, words: Sequence[str], title: str
) -> Figure:
    """A noisy latent's picture, then each concept's map and its active region.

    Args:
        maps, regions: [concepts, rows, columns].
    """
    count = len(words)
    figure, axes = plt.subplots(1, 1 + 2 * count, figsize=(2.1 * (1 + 2 * count) + 0.6, 2.4))
    show_picture(axes[0], picture)
    axes[0].set_title(title, fontsize=9)
    most = float(maps.max())
    for place, (word, heat, region) in enumerate(zip(words, maps, regions, strict=True)):
        for axis, grid, what, top in zip(
            axes[1 + 2 * place :], (heat, region), ("map", "region B"), (most, 1), strict=False
        ):
            axis.imshow(grid.numpy(), cmap="magma", vmin=0, vmax=top)
            axis.set_title(f"{word}: {what}", fontsize=9)
            _bare(axis)
    _map_bar(figure, axes, most)
    return figure


def _map_bar(figure: Figure, axes: np.ndarray, most: float) -> None:
    """The scale of maps that are drawn from 0 to `most`."""
    heat = ScalarMappable(plt.Normalize(0, most), "magma")
    bar = figure.colorbar(heat, ax=axes, shrink=0.8, pad=0.01)
    bar.set_label("maps: share of attention\namong the words", fontsize=8)


def draw_grid(
    rows: Mapping[str, Tensor],
    captions: Sequence[str],
    *,
    wide: int = 8,
    framed: Mapping[str, Sequence[bool]] | None = None,
    halved: bool = False,
    note: str = "",
) -> Figure:
    """Pictures by method (rows) and prompt (columns), every column from one noise.

    Args:
        wide: prompts side by side; further ones stand in bands below.
        framed: which pictures of each method get a green frame.
        halved: a dashed line parts the left from the right half.
        note: what frame and line mean, below the pictures.
    """
    bands = -(-len(captions) // wide)
    lines, columns = bands * len(rows), min(wide, len(captions))
    figure, axes = plt.subplots(
        lines, columns, figsize=(1.25 * columns + 1, 1.2 * lines + 0.45 * bands), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, (name, pictures) in enumerate(rows.items()):
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            band, column = divmod(number, wide)
            axis = axes[band * len(rows) + place, column]
            axis.axis("on")
            show_picture(axis, picture)
            if halved:
                axis.axvline(picture.shape[-1] / 2 - 0.5, color="black", lw=0.6, ls="--")
            if framed is not None and framed[name][number]:
                for spine in axis.spines.values():
                    spine.set(visible=True, color=COLOURS[2], linewidth=2.5)
            if column == 0:
                axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
            if place == 0:
                title = caption.replace(" and ", "\nand ")
                axis.set_title(title, fontsize=7.5, fontweight="normal")
    if note:
        figure.supxlabel(note, fontsize=8)
    return figure


def draw_maps_over_time(
    maps: Mapping[str, Tensor],
    pictures: Mapping[str, Tensor],
    words: Sequence[str],
    shown: Sequence[int],
) -> Figure:
    """Maps of two concepts at some steps, a block of rows for each method, and the picture it ends in.

    Args:
        maps: method -> [steps, concepts, rows, columns].
    """
    count = len(words)
    figure, axes = plt.subplots(
        count * len(maps),
        len(shown) + 1,
        figsize=(1.15 * (len(shown) + 1) + 0.8, 1.2 * count * len(maps)),
    )
    most = max(float(of_method[list(shown)].max()) for of_method in maps.values())
    for block, (name, of_method) in enumerate(maps.items()):
        for place, word in enumerate(words):
            line = axes[count * block + place]
            for axis, step in zip(line, shown, strict=False):
                axis.imshow(of_method[step, place].numpy(), cmap="magma", vmin=0, vmax=most)
                _bare(axis)
                if count * block + place == 0:
                    axis.set_title(f"step {step + 1}", fontsize=8)
            line[0].set_ylabel(f"{name}\n{word}", fontsize=8, rotation=0, ha="right", va="center")
            line[-1].axis("off")
            if place == 0:
                line[-1].axis("on")
                show_picture(line[-1], pictures[name])
                if block == 0:
                    line[-1].set_title("picture", fontsize=8)
    _map_bar(figure, axes, most)
    return figure


def draw_over_steps(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    colours: Mapping[str, str],
    ylabels: Sequence[str],
) -> Figure:
    """A panel for each quantity: mean over prompts by step, with 95 % intervals as bands.

    The first curve is dashed and lies above the others, so that one which covers it shows too.

    Args:
        panels: title -> curve -> [prompts, steps]; all end at the last step, those with fewer begin later.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4))
    last = max(values.shape[1] for curves in panels.values() for values in curves.values())
    for axis, (title, curves), label in zip(
        np.atleast_1d(axes), panels.items(), ylabels, strict=True
    ):
        for place, (name, values) in enumerate(curves.items()):
            steps = np.arange(last - values.shape[1] + 1, last + 1)
            found = [mean(column) for column in values.T]
            style = {"ls": "-", "zorder": 2} if place else {"ls": "--", "zorder": 3}
            heights = [f.effect for f in found]
            axis.plot(steps, heights, color=colours[name], lw=1.8, label=name, **style)
            low, high = [f.low for f in found], [f.high for f in found]
            axis.fill_between(steps, low, high, color=colours[name], alpha=0.15, lw=0)
        axis.set_title(title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step, from noise to picture")
        axis.set_ylabel(label)
        axis.legend()
    return figure


def draw_scores(
    by_prompt: Mapping[str, pd.DataFrame], measures: Mapping[str, tuple[str, str, float]]
) -> Figure:
    """By method, circles for prompts and below them the mean with its 95 % interval, a panel for each measure.

    A circle's area says how many prompts lie there, within a fortieth of the panel's width.

    Args:
        by_prompt: method -> means of every prompt.
        measures: column -> title of its panel, label of its axis, and what the column is multiplied with.
    """
    figure, axes = plt.subplots(1, len(measures), figsize=(4.4 * len(measures), 4.2), sharey=True)
    for axis, (column, (title, unit, factor)) in zip(
        np.atleast_1d(axes), measures.items(), strict=True
    ):
        points = {n: factor * frame[column].to_numpy(float) for n, frame in by_prompt.items()}
        together = np.concatenate(list(points.values()))
        bin_width = (np.ptp(together) or 1.0) / 40
        for place, (name, values) in enumerate(points.items()):
            prompt_row(axis, values, place, COLOUR_OF[name], bin_width)
        axis.axvline(points["base"].mean(), color=BASELINE, lw=1, ls=":")
        axis.set_title(title)
        axis.set_xlabel(unit)
        axis.set_yticks(range(len(by_prompt)), list(by_prompt))
    np.atleast_1d(axes)[0].invert_yaxis()
    note = "circles: prompts, area by how many; diamonds: means with 95 % intervals; dotted: base"
    figure.supxlabel(note, fontsize=8)
    return figure


def prompt_row(axis: Axes, values: np.ndarray, place: float, colour: str, bin_width: float) -> None:
    """Circles at height `place`, whose area says how many values lie within a bin, and their mean below."""
    at, count = np.unique(np.round(values / bin_width) * bin_width, return_counts=True)
    area = 220 * count / len(values)
    axis.scatter(at, np.full(len(at), place), area, color=colour, alpha=0.45, lw=0)
    _mean_at(axis, values, place + 0.33, colour, "D")


def _mean_at(
    axis: Axes, values: np.ndarray, place: float, colour: str, marker: str, label: str | None = None
) -> None:
    """Mean of the values with its 95 % interval, at height `place`."""
    found = mean(values)
    if np.isfinite(found.low):
        axis.plot([found.low, found.high], [place, place], color=colour, lw=2)
    axis.plot(found.effect, place, marker, color=colour, mec="black", mew=0.6, ms=6, label=label)


def draw_against_reported(
    ours: Mapping[str, Mapping[str, Float[np.ndarray, " prompts"]]], reported: pd.DataFrame
) -> Figure:
    """Gains over the unmodified model: reported text-text similarity, and here pictures with both things.

    Args:
        ours: reader (two of them) -> method -> gain of every prompt, in percentage points.
        reported: of each method (column "method", one of them "base") the similarity by category.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.0), sharey=True)
    names = list(next(iter(ours.values())))
    table = reported.set_index("method")
    gains = table - table.loc["base"]
    for number, (category, marker) in enumerate(zip(gains.columns, "o^s", strict=True)):
        places = [
            place + 0.16 * (number - 1) for place, name in enumerate(names) if name in gains.index
        ]
        of_category = [gains.loc[name, category] for name in names if name in gains.index]
        axes[0].plot(
            of_category, places, marker, color=REPORTED, mec="black", mew=0.4, label=category
        )
    for place, name in enumerate(names):
        if name in gains.index:
            axes[0].plot(
                gains.loc[name].mean(),
                place,
                "D",
                color=COLOUR_OF[name],
                ms=6,
                mec="black",
                mew=0.6,
            )
        for (reader, points), marker, shift in zip(ours.items(), "Ds", (-0.15, 0.15), strict=True):
            label = reader if place == 0 else None
            _mean_at(axes[1], points[name], place + shift, COLOUR_OF[name], marker, label)
    axes[0].set_title("paper: text-text similarity, over base")
    axes[1].set_title("here: pictures with both things, over base")
    axes[0].set_xlabel("cosine of caption and prompt (CLIP); diamonds: mean of the three")
    axes[1].set_xlabel("percentage points, means over prompts with 95 % intervals")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.axvline(0, color=BASELINE, lw=1)
    for axis, title in zip(axes, ("categories", "read by"), strict=True):
        axis.legend(title=title, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    return figure
