"""Pictures of picture-text models: scenes, similarities of patches and words, alignments, arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from reattend.data.attribute_scenes import AttributeScenes, caption_ids, colour_word, spelled
from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point

ARM_COLOURS = {
    "late": COLOURS[0],
    "global": BASELINE,
    "mean-mean": COLOURS[3],
    "unmasked": COLOURS[1],
    "quarter": COLOURS[2],
}


def _picture(axis: Axes, pixels: Tensor, title: str = "") -> None:
    axis.imshow(pixels.movedim(0, -1).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=7)
    axis.axis("off")


def _caption(scenes: AttributeScenes, scene: int) -> list[str]:
    ids, _ = caption_ids(scenes.colours[[scene]], scenes.nouns[[scene]])
    return spelled(ids[0])


def draw_scenes(scenes: AttributeScenes, columns: int = 6) -> Figure:
    """Pictures with their boxes, a caption above each, an object a line."""
    rows = -(-len(scenes) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.75 * columns, 2.3 * rows))
    for scene, axis in enumerate(axes.flat):
        lines = " ".join(_caption(scenes, scene)[1:-1]).replace(" and ", " and\n")
        _picture(axis, scenes.pixels[scene], lines)
        for x0, y0, x1, y1 in scenes.boxes[scene].tolist():
            if x1:
                corner = (x0 - 0.5, y0 - 0.5)
                axis.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, ec="white", lw=0.8))
    return figure


def draw_products(
    pixels: Tensor, products: Float[Tensor, "patches words"], words: Sequence[str]
) -> Figure:
    """A picture, its patches x words matrix of cosines with both maxima marked, and one map a word."""
    grid = round(len(products) ** 0.5)
    figure = plt.figure(figsize=(10, 3.8))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    axes = left.subplots(1, 2, width_ratios=(1, 1))
    _picture(axes[0], pixels, "picture")
    limit = products.abs().max().item()
    style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    axes[1].imshow(products, aspect="auto", **style)
    axes[1].plot(products.argmax(1), range(len(products)), "k.", ms=3)
    axes[1].plot(range(len(words)), products.argmax(0), "o", mfc="none", mec="black", ms=7)
    axes[1].set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    axes[1].set(ylabel="patch")
    axes[1].grid(False)
    maps = right.subplots(2, -(-len(words) // 2))
    for word, axis in enumerate(maps.flat):
        axis.axis("off")
        if word < len(words):
            shown = axis.imshow(products[:, word].view(grid, grid), **style)
            axis.set_title(words[word], fontsize=8)
    right.colorbar(shown, ax=maps, shrink=0.6, label="cosine")
    return figure


def draw_training(
    losses: Mapping[str, Float[Tensor, "_ steps"]],
    recalls: Mapping[str, Float[np.ndarray, "_ marks"]],
    marks: Sequence[int],
    every: int = 20,
) -> Figure:
    """Training loss of every arm, means of `every` steps over its seeds; and R@1 after `marks` steps.

    R@1: seeds as points, means joined by lines, intervals as bars; arms stand side by side at each
    mark, each with its own number of seeds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.5))
    for row, (arm, found) in enumerate(recalls.items()):
        values = losses[arm]
        every = min(every, values.shape[1])
        kept = values.shape[1] // every * every
        means = values[:, :kept].unflatten(1, (-1, every)).mean((0, 2))
        places = np.arange(len(means)) * every + every / 2
        axes[0].plot(places, means, color=ARM_COLOURS[arm], lw=1.5, label=arm)
        at = np.arange(len(marks)) + 0.13 * (row - (len(recalls) - 1) / 2)
        _mean_bars(axes[1], at, found, ARM_COLOURS[arm])
    axes[0].set(xlabel="step", ylabel="contrastive loss, nats", yscale="log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend()
    axes[1].set_xticks(range(len(marks)), [f"{mark:,}" for mark in marks])
    axes[1].set(xlabel="steps of training", ylabel="R@1, per cent")
    return figure


def _mean_bars(
    axis: Axes,
    places: Float[np.ndarray, " marks"],
    values: Float[np.ndarray, "seeds marks"],
    colour: str,
) -> None:
    """Seeds as points a little to the right of their mean and its 95 % interval; means are joined."""
    found = [mean(column) for column in values.T]
    half = [f.high - f.effect if np.isfinite(f.high) else 0 for f in found]
    effects = [f.effect for f in found]
    axis.errorbar(places, effects, half, fmt="D-", color=colour, ms=4, lw=0.8, elinewidth=2)
    axis.plot(places + 0.05, values.T, "o", color=colour, ms=2.5, alpha=0.6)


def draw_gains(
    gains: Mapping[str, Mapping[str, Sequence[float]]], reported: Mapping[str, Mapping[str, float]]
) -> Figure:
    """A panel a measure: what every arm has more than the one it is set against, on the same seed.

    Args:
        gains: measure -> arm -> seeds.
        reported: measure -> arm -> the paper's number (another task), where there is one: grey crosses.
    """
    figure, axes = plt.subplots(1, len(gains), figsize=(2.8 * len(gains), 3.4), sharey=True)
    for axis, (measure, arms) in zip(np.atleast_1d(axes), gains.items(), strict=True):
        axis.axvline(0, color=BASELINE, lw=1)
        for place, (arm, values) in enumerate(arms.items()):
            mean_point(axis, values, place, ARM_COLOURS[arm])
            known = reported.get(measure, {}).get(arm)
            if known is not None:
                axis.plot(known, place - 0.2, "x", color=REPORTED, ms=8, mew=2, label="paper")
                axis.legend(loc="lower right", fontsize=8)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.set(xlabel=measure)
    np.atleast_1d(axes)[0].invert_yaxis()
    return figure


def draw_pointing(
    pointed: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]], chance: float
) -> Figure:
    """By arm, over seeds: how often a noun's best patch lies in its box, in another's, for absent nouns.

    Args:
        pointed: arm -> own box, another object's box, and own minus other for absent objects, a value a seed.
        chance: share of the patches that a box holds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.0), sharey=True, width_ratios=(1.4, 1))
    for place, (arm, (own, others, absent)) in enumerate(pointed.items()):
        mean_point(
            axes[0], own, place - 0.15, ARM_COLOURS[arm], "its own box" if not place else None
        )
        mean_point(axes[0], others, place + 0.15, REPORTED, "another box" if not place else None)
        difference = np.subtract(own, others)
        mean_point(axes[1], difference, place - 0.15, ARM_COLOURS[arm])
        mean_point(axes[1], absent, place + 0.15, REPORTED, "absent objects" if not place else None)
    axes[0].axvline(chance, color="0.5", ls=":", lw=1)
    axes[0].set_yticks(range(len(pointed)), list(pointed))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="P(best patch of a noun lies in the box); dotted: any patch")
    axes[1].set(xlabel="own minus another")
    for axis in axes:
        axis.legend(fontsize=7)
    return figure


def draw_alignment(
    scenes: AttributeScenes, chosen: Mapping[str, Int[Tensor, "scenes patches"]]
) -> Figure:
    """Pictures, and below them what each patch prefers, a row an arm: an object's words have its frame's colour.

    Patches that prefer <bos>, "and", <eos> stay grey; colour words are drawn lighter than nouns.
    """
    figure, axes = plt.subplots(
        1 + len(chosen), len(scenes), figsize=(1.5 * len(scenes), 1.75 * (1 + len(chosen)))
    )
    for scene in range(len(scenes)):
        words = _caption(scenes, scene)
        _picture(axes[0, scene], scenes.pixels[scene])
        for place, box in enumerate(scenes.boxes[scene].tolist()):
            if box[2]:
                _frame(axes[0, scene], box, COLOURS[place], 1.0)
        named = [" ".join(words[i : i + 2]) for i in range(1, len(words) - 1, 3)]
        axes[0, scene].set_title("\n".join(named), fontsize=6.5)
        for row, (arm, found) in enumerate(chosen.items(), start=1):
            _preferences(axes[row, scene], found[scene], scenes, scene)
            if scene == 0:
                axes[row, 0].set_title(arm, fontsize=9, loc="left")
    return figure


def _frame(axis: Axes, box: Sequence[int], colour: str, scale: float) -> None:
    x0, y0, x1, y1 = (side / scale for side in box)
    corner = (x0 - 0.5, y0 - 0.5)
    axis.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, ec=colour, lw=1.6))


def _preferences(
    axis: Axes, chosen: Int[Tensor, " patches"], scenes: AttributeScenes, scene: int
) -> None:
    grid = round(len(chosen) ** 0.5)
    shown = np.full((grid * grid, 3), 0.85)
    for place in range(scenes.nouns.shape[1]):
        colour = np.array(to_rgb(COLOURS[place]))
        shown[(chosen == colour_word(place) + 1).numpy()] = colour
        shown[(chosen == colour_word(place)).numpy()] = 0.5 + 0.5 * colour
    axis.imshow(shown.reshape(grid, grid, 3), interpolation="nearest")
    scale = scenes.pixels.shape[-1] / grid
    for place, box in enumerate(scenes.boxes[scene].tolist()):
        if box[2]:
            _frame(axis, box, COLOURS[place], scale)
    axis.axis("off")
