"""Pictures of the study of a speech recogniser's maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point
from reattend.studies.speech_maps import POSITION, Explained, Heard

FRAME = 10  # milliseconds of a frame of the spectrogram
COLOUR_OF = {
    "CA": COLOURS[0],
    "SM^X": COLOURS[3],
    "SM^X, cells": COLOURS[1],
    "SM^X, mean": COLOURS[5],
    "SM^H": COLOURS[2],
    "random frames": BASELINE,
    "random cells": COLOURS[7],
}
"""One colour a map, in every figure."""


def draw_masks(spectrogram: np.ndarray, masks: Sequence[np.ndarray], fill: float) -> Figure:
    """A spectrogram [bins, frames] and what is left of it under masks [frames, bins]."""
    panels = [("speech", spectrogram)] + [
        (f"mask {number}", np.where(mask.T, spectrogram, fill))
        for number, mask in enumerate(masks, 1)
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.2), sharey=True)
    for axis, (title, picture) in zip(axes, panels, strict=True):
        _image(axis, picture, picture.shape[1] * FRAME, "magma", vmin=spectrogram.min())
        axis.set_title(title)
        axis.set_xlabel("time (ms)")
    axes[0].set_ylabel("mel bin")
    return figure


def draw_maps(explained: Explained, names: Sequence[str], titles: Sequence[str]) -> Figure:
    """The spectrogram, then maps of its tokens by time, each row from its least to its most."""
    count = len(names) + 1
    figure, axes = plt.subplots(1, count, figsize=(2.35 * count, 2.3), constrained_layout=True)
    frames = explained.speech.frames
    picture = explained.speech.features[:, :frames].numpy()
    _image(axes[0], picture, frames * FRAME, "magma")
    axes[0].set_title("speech (log-mel)")
    axes[0].set_ylabel("mel bin")
    for axis, name, title in zip(axes[1:], names, titles, strict=True):
        rows = explained.maps[name]
        rows = rows - rows.amin(1, keepdim=True)
        rows = (rows / rows.amax(1, keepdim=True)).numpy()
        length = rows.shape[1] * POSITION
        axis.imshow(rows, aspect="auto", cmap="magma", extent=(0, length, len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), explained.pieces)
        axis.set_title(title)
    for axis in axes:
        axis.grid(visible=False)
        axis.set_xlabel("time (ms)")
    return figure


def _image(axis: Axes, picture: np.ndarray, length: int, cmap: str, **settings) -> None:
    """[bins, frames], low bins below, over `length` milliseconds."""
    extent = (0, length, 0, len(picture))
    axis.imshow(picture, aspect="auto", origin="lower", cmap=cmap, extent=extent, **settings)
    axis.grid(visible=False)


def draw_heads(rho: Mapping[str, np.ndarray], layers: Mapping[str, np.ndarray], overall) -> Figure:
    """For each target: mean correlation of every head, of a layer's mean map, and of the mean of all.

    Args:
        rho: target -> [layers, heads]; layers: target -> [layers]; overall: target -> number.
    """
    figure, axes = plt.subplots(1, len(rho), figsize=(5.2 * len(rho), 2.9))
    for axis, (target, values) in zip(np.atleast_1d(axes), rho.items(), strict=True):
        shown = np.concatenate([values, layers[target][:, None]], 1)
        picture = axis.imshow(shown, cmap="viridis", vmin=min(0.0, shown.min()), aspect="auto")
        middle = (picture.norm.vmin + picture.norm.vmax) / 2
        for (row, column), value in np.ndenumerate(shown):
            colour = "black" if value > middle else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, size=9)
        heads = values.shape[1]
        axis.axvline(heads - 0.5, color="white", lw=3)
        axis.set_xticks(range(heads + 1), [*map(str, range(1, heads + 1)), "mean map"])
        axis.set_yticks(range(len(values)), [f"layer {n + 1}" for n in range(len(values))])
        axis.set_xlabel("head")
        axis.set_title(f"correlation with {target} (mean map of all: {overall[target]:.2f})")
        axis.grid(visible=False)
    return figure


def draw_correlations(
    points: Mapping[str, Mapping[str, np.ndarray]], reported: Mapping[str, tuple[float, float]]
) -> Figure:
    """Corrected correlation of maps with each target: prompts as points, mean with its 95 % interval.

    Args:
        points: target -> name of a map -> one value a prompt.
        reported: target -> ends of the paper's range.
    """
    figure, axes = plt.subplots(1, len(points), figsize=(5.4 * len(points), 3.2), sharex=True)
    for axis, (target, scores) in zip(np.atleast_1d(axes), points.items(), strict=True):
        low, high = reported[target]
        label = f"paper, CA: {low:g}" if low == high else f"paper, CA: {low:g} to {high:g}"
        axis.axvspan(low - 0.005, high + 0.005, color=REPORTED, alpha=0.5, lw=0)
        for place, (name, values) in enumerate(scores.items()):
            mean_point(axis, values, place, COLOURS[0] if name.startswith("CA") else BASELINE)
        axis.set_yticks(range(len(scores)), list(scores))
        axis.invert_yaxis()
        axis.set_title(f"with {target} (grey: {label})")
        axis.set_xlabel("correlation, corrected for noise")
    return figure


def draw_deletion(
    curves: Mapping[str, np.ndarray], shares: Sequence[float], reported: Mapping[str, float]
) -> Figure:
    """Word error rate by the share deleted, and areas under the curves with the paper's beside them.

    Args:
        curves: name -> [prompts, shares], per cent.
        reported: name -> the paper's area, of those it gives.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    percent = 100 * np.asarray(shares)
    for name, values in curves.items():
        mean_line(left, percent, values, COLOUR_OF[name], name)
    left.set_xlabel("share of the spectrogram deleted, most important first (%)")
    left.set_ylabel("word error rate (%)")
    left.set_ylim(0, 105)
    left.legend()
    for place, (name, values) in enumerate(curves.items()):
        areas = np.trapezoid(values, np.asarray(shares), axis=1)
        mean_point(right, areas, place, COLOUR_OF[name])
        if name in reported:
            right.plot(reported[name], place, "s", color=REPORTED, mec="black", ms=7)
    right.plot([], [], "s", color=REPORTED, mec="black", label="paper")
    right.set_yticks(range(len(curves)), list(curves))
    right.invert_yaxis()
    right.set_xlabel("area under the curve (higher: better explanation)")
    # Above the axes: inside, its square would look like one more area.
    right.legend(loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def draw_boundaries(
    heard: Heard, starts: Sequence[int], errors: Mapping[str, Mapping[str, np.ndarray]]
) -> Figure:
    """Attention over joined words with silences and starts, and the error of starts of each map and size.

    Args:
        starts: first position of each token of `heard`.
        errors: size -> name of a map -> milliseconds, one value a sequence.
    """
    figure, axes = plt.subplots(1, 1 + len(errors), figsize=(4 * (1 + len(errors)), 3))
    rows = heard.heads.mean((0, 1))
    rows = (rows / rows.amax(1, keepdim=True)).numpy()
    extent = (0, rows.shape[1] * POSITION, len(rows) - 0.5, -0.5)
    axes[0].imshow(rows, aspect="auto", cmap="magma", extent=extent)
    for edge in chain.from_iterable(heard.joined.gaps):
        axes[0].axvline(1000 * edge, color=COLOURS[9], ls="--", lw=1.2)
    for token, start in enumerate(starts):
        axes[0].plot([start * POSITION] * 2, [token - 0.5, token + 0.5], color="white", lw=2)
    axes[0].set_yticks(range(len(rows)), heard.pieces)
    axes[0].set_xlabel("time (ms)")
    axes[0].set_title("attention over joined words")
    axes[0].grid(visible=False)
    for axis, (size, maps) in zip(axes[1:], errors.items(), strict=True):
        for place, (name, values) in enumerate(maps.items()):
            mean_point(axis, values, place, COLOURS[0] if name.startswith("CA") else BASELINE)
        axis.set_yticks(range(len(maps)), list(maps))
        axis.invert_yaxis()
        axis.set_title(f"Whisper {size}")
        axis.set_xlabel("distance of starts from silences (ms)")
    return figure


def mean_line(axis: Axes, places, values: np.ndarray, colour: str, label: str) -> None:
    """Mean over prompts with the 95 % interval of each mean as a band."""
    found = [mean(column) for column in values.T]
    axis.plot(places, [f.effect for f in found], color=colour, lw=1.8, label=label)
    axis.fill_between(
        places, [f.low for f in found], [f.high for f in found], color=colour, alpha=0.12, lw=0
    )


def draw_growth(
    growth: Mapping[str, tuple[Sequence[int], np.ndarray, np.ndarray, np.ndarray]],
) -> Figure:
    """Reliability and correlation with cross-attention, raw and corrected, by the number of masks.

    Args:
        growth: saliency -> (masks, reliability, raw correlation, corrected), each [prompts, counts].
    """
    figure, axes = plt.subplots(1, len(growth), figsize=(5 * len(growth), 3.2), sharey=True)
    for axis, (name, (counts, *lines)) in zip(np.atleast_1d(axes), growth.items(), strict=True):
        labels = ("reliability", "correlation with CA, raw", "correlation with CA, corrected")
        colours = (BASELINE, COLOURS[1], COLOURS[0])
        for values, label, colour in zip(lines, labels, colours, strict=True):
            mean_curve(axis, counts, values, colour, label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_title(name)
        axis.set_xlabel("masks")
        axis.set_ylim(-0.1, 1.2)
    np.atleast_1d(axes)[0].legend(loc="lower right")
    return figure
