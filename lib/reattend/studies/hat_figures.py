"""Pictures of the study of HAT: reach of windows, errors by pixel, restored crops, attribution maps, diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point

Picture = Float[Tensor, "3 height width"]


def colour_of(arm: str) -> str:
    """HAT and its parts blue, placebos orange, convolutional rivals green, SwinIR grey."""
    if arm == "SwinIR":
        return BASELINE
    if arm in ("EDSR", "RCAN"):
        return COLOURS[2]
    return COLOURS[1] if "," in arm else COLOURS[0]


def grid_lines(axis: Axes, side: int, window: int, shift: int = 0, **style) -> None:
    """Borders of the windows that start at `shift`, on a map of pixels."""
    for place in np.arange(shift, side + 1, window) - 0.5:
        axis.axhline(place, **style)
        axis.axvline(place, **style)


def draw_reach(
    seen: Mapping[str, Bool[Tensor, "side side"]],
    pixel: tuple[int, int],
    source: tuple[int, int],
    window: int,
) -> Figure:
    """Which pixels one pixel (red) reads, by layer, and whether a source (orange) is among them; lines are borders."""
    figure, axes = plt.subplots(1, len(seen), figsize=(2.35 * len(seen), 3.0))
    for axis, (name, found) in zip(axes, seen.items(), strict=True):
        axis.imshow(found.numpy(), cmap="Blues", vmin=0, vmax=1.6)
        shift = window // 2 if "shifted" in name else 0
        grid_lines(axis, len(found), window, shift, color="black", lw=0.6)
        for (row, column), colour in ((pixel, "red"), (source, COLOURS[1])):
            corner = (column - 0.5, row - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=2))
        axis.set_title(f"{name}\n{int(found.sum())} pixels", fontsize=9)
        axis.axis("off")
    return figure


def draw_errors(
    panels: Mapping[str, Mapping[str, Float[Tensor, " seeds"]]],
    lines: Mapping[str, Mapping[str, float]],
) -> Figure:
    """A panel for each kind of pixel: error of every arm and seed, mean and 95 % interval.

    Arms are named where they differ from those of the panel before; all panels have one scale.

    Args:
        lines: panel -> what a dotted line says -> where it stands.
    """
    most, named = max(len(arms) for arms in panels.values()), []
    size = (2.9 * len(panels), 0.36 * most + 1.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharex=True)
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        for place, (arm, values) in enumerate(arms.items()):
            mean_point(axis, values.numpy(), place, colour_of(arm))
        for number, (name, value) in enumerate(lines.get(title, {}).items()):
            axis.axvline(value, color="black", ls=(":", "--")[number % 2], lw=1, label=name)
        axis.set(xlabel="error, % of variance")
        axis.set_title(title, fontsize=9)
        axis.set_yticks(range(len(arms)), [""] * len(arms) if list(arms) == named else list(arms))
        axis.set_ylim(len(arms) - 0.5, -0.5)
        named = list(arms)
    axes[0].set_xlim(left=-4)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def draw_error_maps(
    maps: Mapping[str, Float[Tensor, "side side"]], window: int, distance: int
) -> Figure:
    """Error of every pixel of the displaced signs by arm, mean over seeds; lines are window borders."""
    figure, axes = plt.subplots(1, len(maps), figsize=(2.1 * len(maps) + 0.8, 2.6))
    for axis, (arm, found) in zip(axes, maps.items(), strict=True):
        shown = 100 * found.numpy().copy()
        shown[:distance], shown[:, :distance] = np.nan, np.nan
        image = axis.imshow(np.maximum(shown, 0.1), cmap="magma_r", norm="log", vmin=0.1, vmax=100)
        grid_lines(axis, len(found), window, color="black", lw=0.8)
        grid_lines(axis, len(found), window, window // 2, color="black", lw=0.5, ls=":")
        axis.set_title(arm, fontsize=9)
        axis.axis("off")
    figure.colorbar(image, ax=axes, label="error, % of variance", shrink=0.8)
    return figure


def show_picture(axis: Axes, picture: Picture, title: str) -> None:
    """A picture in [0, 1] without axes."""
    axis.imshow(picture.clamp(0, 1).movedim(0, -1).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def draw_crops(rows: Sequence[Mapping[str, Picture]]) -> Figure:
    """Restored crops: a row a crop, a column a network, with titles that say how good they are."""
    columns = len(rows[0])
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.75 * columns, 2.0 * len(rows)))
    for line, row in zip(np.atleast_2d(axes), rows, strict=True):
        for axis, (title, picture) in zip(line, row.items(), strict=True):
            show_picture(axis, picture, title)
    return figure


def draw_attributions(
    clean: Picture,
    maps: Mapping[str, Float[Tensor, "3 height width"]],
    patch: int,
    scale: int,
) -> Figure:
    """A crop with its patch framed, and how much each input pixel adds to the patch's structure, by network.

    Absolute contributions, their square roots, each map from 0 to its largest.
    """
    figure, axes = plt.subplots(1, 1 + len(maps), figsize=(2.0 * (1 + len(maps)), 2.5))
    show_picture(axes[0], clean, "original")
    side = clean.shape[-1]
    for number, axis in enumerate(axes):
        unit = scale if number else 1
        start, length = (side - patch) / 2 / unit - 0.5, patch / unit
        axis.add_patch(Rectangle((start, start), length, length, fill=False, edgecolor="red"))
    for axis, (title, found) in zip(axes[1:], maps.items(), strict=True):
        pixels = found.sum(0).abs()
        axis.imshow((pixels / pixels.max()).sqrt().numpy(), cmap="Greys", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    return figure


def draw_gain_maps(maps: Mapping[str, Float[Tensor, "side side"]], window: int) -> Figure:
    """What every reading adds to the answer at the framed middle pixel: signed roots, each map on its own scale."""
    figure, axes = plt.subplots(1, len(maps), figsize=(1.9 * len(maps), 2.5))
    for axis, (title, found) in zip(axes, maps.items(), strict=True):
        roots, middle = found.sign() * found.abs().sqrt(), len(found) // 2
        most = roots.abs().max().item()
        axis.imshow(roots.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        grid_lines(axis, len(found), window, color="black", lw=0.3)
        axis.add_patch(Rectangle((middle - 0.5,) * 2, 1, 1, fill=False, edgecolor="lime", lw=1.5))
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    return figure


def draw_diffusion(
    indices: Mapping[str, Float[np.ndarray, " seeds"]],
    errors: Mapping[str, Float[Tensor, " seeds"]],
    reported: pd.DataFrame,
) -> Figure:
    """Diffusion index of every network and seed, the reported ones, and the errors, one row a network.

    Args:
        errors: % of variance; untrained networks have none.
        reported: columns `network` and `index`.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 0.34 * len(indices) + 1.3), sharey=True)
    known = reported.set_index("network")["index"]
    for place, (arm, values) in enumerate(indices.items()):
        mean_point(axes[0], values, place, colour_of(arm))
        if arm in known.index:
            axes[1].plot(known[arm], place, "s", color=REPORTED, mec="black", mew=0.5, ms=7)
        if arm in errors:
            mean_point(axes[2], errors[arm].numpy(), place, colour_of(arm))
    axes[0].set_yticks(range(len(indices)), list(indices))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="diffusion index", title="here: faint gain", xlim=(0, None))
    axes[1].set(xlabel="diffusion index", title="reported: photographs, x4")
    axes[1].set_xlim(axes[0].get_xlim())
    axes[2].set(xlabel="error, % of variance", title="here: faint gain", xlim=(0, None))
    return figure
