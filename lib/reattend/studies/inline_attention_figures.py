"""Pictures of the study of InLine attention: colliding queries, arms, confusions, neighbours, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point

FAMILY_COLOURS = {"InLine": COLOURS[0], "linear": COLOURS[1], "softmax": BASELINE}
"""Of arms, by the first word of their names; placebos and the rest are drawn in `OTHER`."""
OTHER = COLOURS[4]


def colour_of(arm: str) -> str:
    """The colour of an arm's operator."""
    return FAMILY_COLOURS.get(arm.replace(",", " ").split()[0], OTHER)


def draw_collisions(
    q: Float[Tensor, "queries 2"],
    k: Float[Tensor, "keys 2"],
    scores: Mapping[str, Float[Tensor, "queries keys"]],
) -> Figure:
    """Queries and keys as arrows, and the scores of every query by every operator, as numbers on shades."""
    figure, axes = plt.subplots(1, 1 + len(scores), figsize=(3.2 * (1 + len(scores)), 3.1))
    for name, vectors, map_ in (("q", q, plt.cm.Blues), ("k", k, plt.cm.Oranges)):
        for number, (x, y) in enumerate(vectors.tolist(), 1):
            colour = map_(0.35 + 0.6 * number / len(vectors))
            style = {"arrowstyle": "->", "color": colour, "lw": 1.8}
            axes[0].annotate("", (x, y), (0, 0), arrowprops=style)
            axes[0].annotate(f"${name}_{number}$", (x, y), color=colour, fontsize=9)
    largest = 1.15 * max(q.max().item(), k.max().item())
    axes[0].set(xlim=(0, largest), ylim=(0, largest), title="queries and keys")
    axes[0].set_aspect("equal")
    for axis, (name, shown) in zip(axes[1:], scores.items(), strict=True):
        axis.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=0.6)
        for (i, j), value in np.ndenumerate(shown.numpy()):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9)
        axis.set_xticks(range(len(k)), [f"$k_{j + 1}$" for j in range(len(k))])
        axis.set_yticks(range(len(q)), [f"$q_{i + 1}$" for i in range(len(q))])
        axis.set_title(name)
        axis.grid(False)
    return figure


def draw_maps(
    picture: np.ndarray, rows: Mapping[str, Float[Tensor, "side side"]], query: tuple[int, int]
) -> Figure:
    """A picture, and the weights of one of its tokens over the map in several networks; the query is framed.

    Args:
        picture: [height, width], bytes.
        rows: network -> weights, on one scale of colours each, white at 0.
        query: row and column of the token that reads.
    """
    figure, axes = plt.subplots(1, 1 + len(rows), figsize=(2.4 * (1 + len(rows)), 2.6))
    axes[0].imshow(picture, cmap="gray", vmin=0, vmax=255)
    axes[0].set_title("canvas", fontsize=9)
    for axis, (name, shown) in zip(axes[1:], rows.items(), strict=True):
        most = shown.abs().max().item()
        axis.imshow(shown.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        axis.set_title(f"{name}\nto ±{most:.3f}", fontsize=9)
    for axis, cell in [(axes[0], picture.shape[0] // shown.shape[0])] + [(a, 1) for a in axes[1:]]:
        corner = (query[1] * cell - 0.5, query[0] * cell - 0.5)
        axis.add_patch(plt.Rectangle(corner, cell, cell, fill=False, edgecolor="red", lw=2))
        axis.axis("off")
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
    for axis, values, trivial in zip(axes, (nats, accuracy), linear, strict=False):
        for place, (arm, seeds) in enumerate(values.items()):
            mean_point(axis, seeds, place, colour_of(arm))
        axis.axvline(trivial, color="black", ls=":", lw=1, label="linear classifier")
        axis.legend()
    known = reported.set_index("arm").top1
    for place, arm in enumerate(nats):
        if arm in known.index:
            axes[2].plot(known[arm], place, "s", color=REPORTED, mec="black", mew=0.5, ms=7)
    axes[0].set_yticks(range(len(nats)), list(nats))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="nats (less is better)", title="here: loss on new canvases")
    axes[1].set(xlabel="per cent", title="here: accuracy")
    axes[2].set(xlabel="per cent", title="paper: Swin-T, ImageNet top-1")
    return figure


def draw_learning(losses: Mapping[str, Float[Tensor, "seeds steps"]], pieces: int = 25) -> Figure:
    """Training loss of every arm on pictures that it has not seen before, mean over seeds and pieces of steps."""
    figure, axis = plt.subplots(figsize=(7.5, 4))
    for number, (arm, found) in enumerate(losses.items()):
        size = max(1, found.shape[1] // pieces)
        shown = found[:, : found.shape[1] // size * size].unflatten(1, (-1, size)).mean((0, 2))
        style = ("-", "--", ":", "-.")[number // 4 % 4]
        places = (np.arange(len(shown)) + 0.5) * size
        axis.plot(places, shown, style, color=COLOURS[number % 4], lw=1.5, label=arm)
    axis.set(xlabel="training step", ylabel="training loss (nats)")
    axis.legend(ncol=2)
    return figure


def draw_confusions(
    shares: Mapping[str, Float[np.ndarray, "seeds layers"]],
    equal: Mapping[str, Float[np.ndarray, "seeds layers"]],
) -> Figure:
    """Percentage of confused pairs by layer and arm, of queries as they are and of queries of one length."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    titles = ("queries as they are", "queries of one length (placebo)")
    for axis, found, title in zip(axes, (shares, equal), titles, strict=True):
        for number, (arm, values) in enumerate(found.items()):
            colour = colour_of(arm)
            style = "--" if "residual" in arm or "identity" in arm else "-"
            places = np.arange(1, values.shape[1] + 1) + 0.03 * (number - len(found) / 2)
            mean_curve(axis, places, values, colour, arm, style)
        axis.set_xticks(range(1, values.shape[1] + 1))
        axis.set(xlabel="layer", title=title)
    axes[0].set(ylabel="confused pairs of queries (%)")
    axes[0].legend()
    return figure


def draw_neighbours(
    mass: Mapping[str, Float[np.ndarray, "seeds layers"]],
    even: float,
    rises: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> Figure:
    """Left: weight on the 3 x 3 neighbourhood by layer. Right: what masking keys at test time costs.

    Args:
        mass: arm -> share of the absolute weight.
        even: the share when all keys weigh the same.
        rises: arm -> rise of the loss by seed when the neighbours, or as many others, are hidden.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    for number, (arm, values) in enumerate(mass.items()):
        places = np.arange(1, values.shape[1] + 1) + 0.04 * (number - len(mass) / 2)
        style = ":" if "residual" in arm else "--" if "identity" in arm else "-"
        left.plot(places, values.mean(0), style, color=colour_of(arm), lw=1.8, label=arm)
        left.plot(places, values.T, "o", color=colour_of(arm), ms=3.5, alpha=0.5)
    left.axhline(even, color="black", ls=":", lw=1, label="all keys alike")
    left.set_xticks(range(1, values.shape[1] + 1))
    left.set(xlabel="layer", ylabel="share of |weight| on the 3 x 3 neighbourhood")
    left.legend()
    for place, (arm, (near, others)) in enumerate(rises.items()):
        mean_point(right, near, place - 0.14, colour_of(arm), "neighbours" if place == 0 else None)
        mean_point(right, others, place + 0.14, REPORTED, "as many others" if place == 0 else None)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(rises)), list(rises))
    right.invert_yaxis()
    right.set(xlabel="rise of the loss when they are hidden (nats)")
    right.legend()
    return figure


def draw_time(
    seconds: Mapping[str, tuple[Sequence[int], Float[np.ndarray, "lengths rounds"]]],
    reported: pd.DataFrame,
) -> Figure:
    """Left: time against tokens, every round. Right: how much faster InLine is than softmax, beside the paper.

    Args:
        seconds: operator -> lengths, and its times.
        reported: columns `tokens` and `speed_up`, of whole networks on a GPU.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    colours = {"InLine": COLOURS[0], "softmax": BASELINE, "InLine, N x N": COLOURS[3]}
    for name, (lengths, found) in seconds.items():
        left.plot(lengths, 1000 * np.median(found, 1), "-", color=colours[name], label=name)
        left.plot(lengths, 1000 * found, ".", color=colours[name], alpha=0.4, ms=4)
    lengths, inline = seconds["InLine"]
    ratio = seconds["softmax"][1] / inline
    right.plot(lengths, np.median(ratio, 1), "-", color=BASELINE, label="one head, one CPU thread")
    right.plot(lengths, ratio, ".", color=BASELINE, alpha=0.4, ms=4)
    style = {"color": "black", "mfc": REPORTED, "ms": 7, "lw": 1}
    right.plot(reported.tokens, reported.speed_up, "s--", label="paper: whole DeiT-T, GPU", **style)
    right.axhline(1, color="black", lw=0.8)
    for axis, what in ((left, "CPU milliseconds, forward"), (right, "softmax over InLine")):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=what)
        axis.set_xticks(lengths, lengths)
        axis.minorticks_off()
        axis.legend()
    return figure


def draw_kernels(pictures: np.ndarray, kernels: Float[Tensor, "pictures channels 3 3"]) -> Figure:
    """A row a picture: the picture, and the 3 x 3 kernel of every channel; one scale of colours a channel.

    Args:
        pictures: [pictures, height, width], bytes.
    """
    rows, columns = kernels.shape[:2]
    size = (1.1 * (columns + 1), 1.15 * rows)
    figure, axes = plt.subplots(rows, columns + 1, figsize=size, squeeze=False)
    for row, (picture, own) in enumerate(zip(pictures, kernels.numpy(), strict=True)):
        axes[row, 0].imshow(picture, cmap="gray", vmin=0, vmax=255)
        for channel, kernel in enumerate(own):
            most = kernels[:, channel].abs().max().item()
            axes[row, channel + 1].imshow(kernel, cmap="RdBu_r", vmin=-most, vmax=most)
    for channel in range(columns):
        axes[0, channel + 1].set_title(f"channel {channel + 1}", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    return figure
