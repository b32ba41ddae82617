"""Pictures of the study of A-STAR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point

COLOUR_OF = {
    "base": BASELINE,
    "Attend-and-Excite": COLOURS[1],
    "+ L_ret": COLOURS[2],
    "+ L_seg": COLOURS[4],
    "A-STAR": COLOURS[0],
    "random direction": COLOURS[3],
    "borrowed masks": COLOURS[5],
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
    figure, axes = plt.subplots(1, 1 + 2 * count, figsize=(2.1 * (1 + 2 * count), 2.3))
    show_picture(axes[0], picture)
    axes[0].set_title(title, fontsize=9)
    for place, (word, heat, region) in enumerate(zip(words, maps, regions, strict=True)):
        for axis, grid, what in zip(
            axes[1 + 2 * place :], (heat, region), ("map", "region B"), strict=False
        ):
            axis.imshow(grid.numpy(), cmap="magma", vmin=0, vmax=1)
            axis.set_title(f"{word}: {what}", fontsize=9)
            _bare(axis)
    return figure


def draw_grid(rows: Mapping[str, Tensor], captions: Sequence[str]) -> Figure:
    """Pictures by method (rows) and prompt (columns), every column from one noise."""
    columns = len(captions)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.15 * columns, 1.15 * len(rows) + 0.5), squeeze=False
    )
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            show_picture(axis, picture)
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(caption.replace(" and ", "\nand "), fontsize=6.5, fontweight="normal")
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
        figsize=(1.15 * (len(shown) + 1), 1.2 * count * len(maps)),
    )
    for block, (name, of_method) in enumerate(maps.items()):
        for place, word in enumerate(words):
            line = axes[count * block + place]
            for axis, step in zip(line, shown, strict=False):
                axis.imshow(of_method[step, place].numpy(), cmap="magma", vmin=0, vmax=1)
                _bare(axis)
                if count * block + place == 0:
                    axis.set_title(f"step {step + 1}", fontsize=8)
            line[0].set_ylabel(f"{name}\n{word}", fontsize=7, rotation=0, ha="right", va="center")
            line[-1].axis("off")
            if place == 0:
                line[-1].axis("on")
                show_picture(line[-1], pictures[name])
    return figure


def draw_over_steps(
    panels: Mapping[str, Mapping[str, np.ndarray]],
    colours: Mapping[str, str],
    ylabels: Sequence[str],
) -> Figure:
    """A panel for each quantity: mean over prompts by step, with intervals.

    Args:
        panels: title -> curve -> [prompts, steps].
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.4))
    for axis, (title, curves), label in zip(
        np.atleast_1d(axes), panels.items(), ylabels, strict=True
    ):
        for name, values in curves.items():
            steps = np.arange(1, values.shape[1] + 1)
            mean_curve(axis, steps, values, colours[name], name)
        for line in axis.lines:
            if line.get_marker() == "o":
                line.set_visible(False)  # points of every prompt would hide the curves
        axis.set_title(title)
        axis.set_xlabel("step, from noise to picture")
        axis.set_ylabel(label)
        axis.legend()
    return figure


def draw_scores(by_prompt: Mapping[str, pd.DataFrame], measures: Mapping[str, str]) -> Figure:
    """By method, prompts as points with the mean and its interval, a panel for each measure.

    Args:
        by_prompt: method -> means of every prompt.
        measures: column -> title of its panel.
    """
    figure, axes = plt.subplots(1, len(measures), figsize=(4.4 * len(measures), 3.4), sharey=True)
    for axis, (column, title) in zip(np.atleast_1d(axes), measures.items(), strict=True):
        for place, (name, frame) in enumerate(by_prompt.items()):
            mean_point(axis, frame[column].to_numpy(), place, COLOUR_OF[name])
        axis.set_title(title)
        axis.axvline(by_prompt["base"][column].mean(), color=BASELINE, lw=1, ls=":")
        axis.set_yticks(range(len(by_prompt)), list(by_prompt))
    np.atleast_1d(axes)[0].invert_yaxis()
    return figure


def draw_against_reported(ours: Mapping[str, float], reported: pd.DataFrame) -> Figure:
    """Reported text-text similarity over Stable Diffusion's, and our presence over the base's, by method."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.0))
    names = [name for name in reported["method"] if name in ours]
    columns = [name for name in reported.columns if name != "method"]
    table = reported.set_index("method")[columns]
    for place, name in enumerate(names):
        gains = table.loc[name] - table.loc["base"]
        axes[0].plot(gains, [place] * len(columns), "o", color=REPORTED)
        axes[0].plot(gains.mean(), place, "D", color=COLOUR_OF[name])
        axes[1].plot(ours[name] - ours["base"], place, "D", color=COLOUR_OF[name])
    titles = (
        "paper: text-text similarity, over base",
        "here: pictures with both things, over base",
    )
    units = ("cosine of caption and prompt (CLIP)", "percentage points")
    for axis, title, unit in zip(axes, titles, units, strict=True):
        axis.set_xlabel(unit)
        axis.axvline(0, color=BASELINE, lw=1)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(title)
    return figure
