"""Pictures of the study of CrossFormer: patches, groups, reach, arms, biases, other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point

OWN = {"CEL", "LSDA", "SDA, LDA"}
PLACEBOS = {"one wide kernel", "random groups", "SDA, random groups"}


def colour_of(arm: str) -> str:
    """Blue for the paper's method, pink for placebos, orange for all it is compared with."""
    return COLOURS[0] if arm in OWN else COLOURS[4] if arm in PLACEBOS else COLOURS[1]


def draw_patches(
    picture: np.ndarray, kernels: Sequence[int], stride: int, token: tuple[int, int]
) -> Figure:
    """The patches of one token of the embedding on a picture, and each patch by itself.

    Args:
        picture: [height, width], bytes.
        token: row and column.
    """
    figure, axes = plt.subplots(1, 1 + len(kernels), figsize=(2 * (1 + len(kernels)), 2.3))
    axes[0].imshow(picture, cmap="gray", vmin=0, vmax=255)
    margin = max(kernels)
    padded = np.pad(picture, margin)
    for axis, kernel, colour in zip(axes[1:], kernels, COLOURS, strict=False):
        row, column = (place * stride - (kernel - stride) // 2 for place in token)
        frame = {"fill": False, "edgecolor": colour, "lw": 2}
        axes[0].add_patch(Rectangle((column - 0.5, row - 0.5), kernel, kernel, **frame))
        rows, columns = (slice(margin + n, margin + n + kernel) for n in (row, column))
        axis.imshow(padded[rows, columns], cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{kernel} x {kernel}", fontsize=9, color=colour)
    axes[0].set_title("one token's patches", fontsize=9)
    for axis in axes:
        axis.axis("off")
    return figure


def draw_groups(maps: Mapping[str, Int[np.ndarray, "rows columns"]]) -> Figure:
    """Which group every token of a map belongs to, by colour; the group of the first token is numbered.

    Args:
        maps: title -> number of the group of each token.
    """
    figure, axes = plt.subplots(1, len(maps), figsize=(2.7 * len(maps), 2.9), squeeze=False)
    for axis, (title, numbers) in zip(axes[0], maps.items(), strict=True):
        axis.imshow(numbers, cmap="tab20", vmin=0, vmax=19)
        first = np.argwhere(numbers == numbers[0, 0])
        for order, (row, column) in enumerate(first, 1):
            axis.text(column, row, str(order), ha="center", va="center", fontsize=7)
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=1.2))
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    return figure


def draw_reach(
    maps: Mapping[str, tuple[Bool[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]], token: int
) -> Figure:
    """Of which tokens one token hears in one block (dark) and only through two (light), by arm.

    Args:
        maps: arm -> after one block, after two.
    """
    columns = (len(maps) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(2.2 * columns, 4.9), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (arm, (one, two)) in zip(axes.flat, maps.items(), strict=False):
        side = round(len(one) ** 0.5)
        level = two.astype(int) + one.astype(int)
        axis.imshow(level.reshape(side, side), cmap="Blues", vmin=0, vmax=2.6)
        corner = (token % side - 0.5, token // side - 0.5)
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", lw=2))
        for edge in range(side + 1):
            axis.axhline(edge - 0.5, color="white", lw=0.6)
            axis.axvline(edge - 0.5, color="white", lw=0.6)
        axis.set_title(f"{arm}\n{100 * two.mean():.0f} % of the map", fontsize=9)
    return figure


def draw_tokens(
    accuracy: Mapping[str, Sequence[float]],
    bound: Mapping[str, float],
    steps: Mapping[str, Sequence[int]],
    most: int,
) -> Figure:
    """Share of tokens that name the lone garment, what those that cannot hear of it allow, and the steps it took.

    Args:
        accuracy: arm -> seeds; none where the arm was not trained.
        bound: arm -> accuracy when all that hear of the garment are right and the others guess.
        steps: arm -> seeds; steps until the task was solved, `most` where it was not.
    """
    size = (10, 0.36 * len(accuracy) + 1.1)
    figure, (axis, taken) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=(3, 2))
    for place, (arm, values) in enumerate(accuracy.items()):
        colour = BASELINE if arm == "full attention" else colour_of(arm)
        if len(values):
            mean_point(axis, values, place, colour)
            taken.plot(steps[arm], [place] * len(values), "o", color=colour, ms=5, alpha=0.6)
        label = "all that hear of it right, the others guess" if place == 0 else None
        axis.plot(bound[arm], place, "|", color="black", ms=16, mew=1.5, label=label)
    axis.set_yticks(range(len(accuracy)), list(accuracy))
    axis.invert_yaxis()
    axis.set(xlabel="tokens that name the garment (%)", xlim=(0, 102))
    taken.axvline(most, color="black", ls=":", lw=1, label="not solved")
    taken.set(xlabel="training steps until it is solved", xscale="log")
    taken.set_xlim(most / 100, 1.3 * most)
    for panel in (axis, taken):
        panel.legend(loc="upper left", bbox_to_anchor=(0, -0.18))
    return figure


def draw_arms(
    nats: Mapping[str, Sequence[float]],
    accuracy: Mapping[str, Sequence[float]],
    linear: tuple[float, float],
    reported: pd.DataFrame,
) -> Figure:
    """A row an arm: nats and accuracy of every seed with mean and 95 % interval, and the paper's top-1.

    Args:
        linear: nats and accuracy of the linear classifier on pixels.
        reported: columns `arm` and `top1`.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.36 * len(nats) + 1.2), sharey=True)
    for axis, values in zip(axes, (nats, accuracy), strict=False):
        for place, (arm, seeds) in enumerate(values.items()):
            mean_point(axis, seeds, place, colour_of(arm))
    known = reported.set_index("arm").top1
    for place, arm in enumerate(nats):
        if arm in known.index:
            axes[2].plot(known[arm], place, "s", color=REPORTED, mec="black", mew=0.5, ms=7)
    axes[0].set_yticks(range(len(nats)), list(nats))
    axes[0].invert_yaxis()
    axes[0].set(
        xlabel=f"nats (linear classifier: {linear[0]:.2f})", title="here: loss on new canvases"
    )
    axes[1].set(xlabel=f"per cent (linear classifier: {linear[1]:.0f})", title="here: accuracy")
    axes[2].set(xlabel="per cent", title="paper: CrossFormer-S, ImageNet")
    return figure


def draw_biases(surfaces: Mapping[str, Float[np.ndarray, "rows columns"]], trained: int) -> Figure:
    """Biases of one head over offsets, on one scale of colours each; the trained offsets are framed.

    Args:
        surfaces: title -> bias by offset (rows down, columns right), (2 G - 1) on a side.
        trained: G of the training.
    """
    figure, axes = plt.subplots(1, len(surfaces), figsize=(2.9 * len(surfaces), 3), squeeze=False)
    for axis, (title, values) in zip(axes[0], surfaces.items(), strict=True):
        reach = len(values) // 2 + 0.5
        centred = values - values.mean()
        most = np.abs(centred).max()
        axis.imshow(
            centred, cmap="RdBu_r", vmin=-most, vmax=most, extent=(-reach, reach, reach, -reach)
        )
        inner = trained - 0.5
        frame = {"fill": False, "edgecolor": "black", "lw": 1.5}
        axis.add_patch(Rectangle((-inner, -inner), 2 * inner, 2 * inner, **frame))
        axis.set_title(f"{title}\nto ±{most:.2f}", fontsize=9)
        axis.set(xlabel="columns from key to query")
        axis.grid(False)
    axes[0, 0].set(ylabel="rows from key to query")
    return figure


def draw_sizes(rises: Mapping[str, Mapping[str, Sequence[float]]], trained: str) -> Figure:
    """A panel a kind of larger canvas: rise of the loss over that on canvases of the trained size, by bias."""
    figure, axes = plt.subplots(
        1, len(rises), figsize=(5 * len(rises), 2.6), sharey=True, squeeze=False
    )
    for axis, (kind, arms) in zip(axes[0], rises.items(), strict=True):
        for place, values in enumerate(arms.values()):
            mean_point(axis, values, place, COLOURS[place % len(COLOURS)])
        axis.axvline(0, color="black", lw=0.8)
        axis.set(xlabel=f"rise of the loss over {trained} (nats)", title=kind)
        axis.set_yticks(range(len(arms)), list(arms))
    axes[0, 0].invert_yaxis()
    return figure
