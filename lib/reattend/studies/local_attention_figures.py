"""Figures of attention in blocks and regions (HaloNet, BiFormer): what is seen, what it costs, how well it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, arm_points, number_grid, show_regions

Numbers = Sequence[float] | Sequence[int] | np.ndarray


def _bare(axes: Iterable[Axes]) -> None:
    """Pictures have no ticks and no grid."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)


def _edges(axis: Axes, side: int, block: int, colour: str, width: float) -> None:
    """Borders of the blocks of a square picture."""
    for edge in range(block, side, block):
        axis.axhline(edge - 0.5, color=colour, lw=width)
        axis.axvline(edge - 0.5, color=colour, lw=width)


def draw_windows(
    picture: Float[Tensor, "side side"],
    block: Float[Tensor, "block block"],
    window: Float[Tensor, "window window"],
    corner: tuple[int, int],
    mask: Tensor,
) -> Figure:
    """A picture in blocks, one block of queries, its window of keys, and who sees whom in a small map.

    Args:
        corner: row and column of the block's first pixel.
        mask: queries x keys of the small map.
    """
    side, size = len(picture), len(block)
    halo = (len(window) - size) // 2
    fig, axes = plt.subplots(1, 4, figsize=(10.5, 3))
    axes[0].imshow(picture, cmap="gray")
    _edges(axes[0], side, size, COLOURS[9], 0.8)
    row, column = corner[0] - 0.5, corner[1] - 0.5
    own = {"fill": False, "ec": COLOURS[0], "lw": 2.5}
    axes[0].add_patch(Rectangle((column, row), size, size, **own))
    around = (column - halo, row - halo)
    style = {"fill": False, "ec": COLOURS[1], "lw": 2, "ls": "--"}
    axes[0].add_patch(Rectangle(around, len(window), len(window), **style))
    axes[1].imshow(block, cmap="gray", vmin=0, vmax=1)
    axes[2].imshow(window, cmap="gray", vmin=0, vmax=1)
    axes[2].add_patch(Rectangle((halo - 0.5, halo - 0.5), size, size, **own))
    axes[3].imshow(mask, cmap="Blues")
    titles = (
        f"{side} x {side}, blocks of {size}",
        "queries: one block",
        "keys and values: its window",
        "8 x 8, b = 4, h = 1",
    )
    _bare(axes)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
    axes[3].set(xlabel=f"{mask.shape[1]} keys", ylabel=f"{mask.shape[0]} queries")
    return fig


def draw_layer_costs(
    speed: Mapping[tuple[str, int], Numbers],
    sides: Sequence[int],
    memory: Float[np.ndarray, "blocks halos"],
    blocks: Sequence[int],
    halos: Sequence[int],
) -> Figure:
    """Speed over per-pixel windows by size of the map, every round and the median; memory by block and halo.

    Args:
        speed: (attention, side of the map) -> times as fast, by round.
        memory: megabytes an image.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), width_ratios=[1.3, 1])
    for number, name in enumerate(dict.fromkeys(name for name, _ in speed)):
        colour = BASELINE if "convolution" in name else COLOURS[number]
        axes[0].plot(
            sides, [np.median(speed[name, side]) for side in sides], color=colour, label=name
        )
        for side in sides:
            rounds = speed[name, side]
            axes[0].plot([side] * len(rounds), rounds, "o", color=colour, ms=3, alpha=0.4)
    axes[0].axhline(1, color="0.3", lw=1, ls=":")
    axes[0].set(xscale="log", yscale="log", xlabel="side of the map, pixels")
    axes[0].set_ylabel("times as fast as per-pixel, k = 7")
    axes[0].set_xticks(sides, [str(side) for side in sides])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    number_grid(axes[1], memory, blocks, halos)
    axes[1].set(xlabel="halo h", ylabel="block b", title="peak memory, MB an image")
    return fig


def draw_halos(
    by_halo: Sequence[np.ndarray],
    placebo: tuple[int, np.ndarray],
    ceiling: float,
    others: Mapping[str, np.ndarray],
    placebos: Sequence[str],
) -> Figure:
    """Test accuracy, %, by the size of the halo, and of the other ways to place blocks; seeds are points.

    Args:
        by_halo: accuracies of the seeds for a halo of 0, 1, 2 ... pixels.
        placebo: the halo that repeats a block's own pixels: its size, and accuracies.
        ceiling: what no network without a halo can pass.
        placebos: names among `others` that are drawn as such.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    sizes = range(len(by_halo))
    means = [scores.mean() for scores in by_halo]
    axes[0].plot(sizes, means, color=COLOURS[0], label="blocks of 4, mean")
    for size, scores in enumerate(by_halo):
        axes[0].plot([size] * len(scores), scores, "o", color=COLOURS[0], ms=4, alpha=0.6)
    size, scores = placebo
    label = "halo of own pixels"
    axes[0].plot([size] * len(scores), scores, "x", color=COLOURS[3], ms=5, label=label)
    axes[0].axhline(ceiling, color=BASELINE, ls="--", label="most that h = 0 allows")
    axes[0].set(xlabel="halo h, pixels", ylabel="test accuracy, %", title="halo", xticks=sizes)
    axes[0].legend(loc="center right")
    arm_points(axes[1], others, dict.fromkeys(placebos, COLOURS[3]))
    axes[1].set(xlabel="test accuracy, %", title="block at window 8, per pixel; downsampling")
    return fig


def draw_looks(
    picture: Float[Tensor, "side side"],
    weights: Mapping[str, Float[Tensor, "side side"]],
    mark: Sequence[int],
    partner: Sequence[int],
    block: int,
) -> Figure:
    """A map with a pair of marks, and where the query on the first one (red) looks; its partner is green."""
    fig, axes = plt.subplots(1, 1 + len(weights), figsize=(10, 2.9))
    axes[0].imshow(picture, cmap="PuOr", vmin=-1.3, vmax=1.3)
    axes[0].set_title("a map")
    for axis, (name, seen) in zip(axes[1:], weights.items(), strict=True):
        axis.imshow(seen, cmap="Blues", vmin=0)
        axis.set_title(name)
    _bare(axes)
    for axis in axes:
        _edges(axis, len(picture), block, "0.7", 0.5)
        axis.plot(mark[1], mark[0], "s", color="red", mfc="none", ms=7)
        axis.plot(partner[1], partner[0], "s", color=COLOURS[2], mfc="none", ms=7)
    return fig


def draw_routing(
    picture: Float[Tensor, "3 height width"],
    affinity: Float[Tensor, "regions regions"],
    routed: Mapping[str, tuple[int, Sequence[int]]],
    side: int,
) -> Figure:
    """A scene, the affinity of its regions, and which regions some queries attend to.

    Args:
        routed: what a query region is -> its number, and those that it attends to.
        side: regions on a side of the picture.
    """
    fig, axes = plt.subplots(1, 2 + len(routed), figsize=(10, 2.9))
    axes[0].imshow(picture.movedim(0, -1))
    axes[0].axis("off")
    axes[0].set_title("scene", fontsize=9)
    bound = affinity.abs().max()
    drawn = axes[1].imshow(affinity, cmap="PuOr", vmin=-bound, vmax=bound)
    axes[1].set(xlabel="key region", ylabel="query region")
    axes[1].grid(False)
    axes[1].set_title("affinity of regions", fontsize=9)
    fig.colorbar(drawn, ax=axes[1], shrink=0.7)
    for axis, (name, (query, seen)) in zip(axes[2:], routed.items(), strict=True):
        show_regions(axis, picture, seen, query, side, f"query {name}")
    return fig


def draw_complexity(
    tokens: np.ndarray,
    counted: Mapping[str, Numbers],
    slopes: Mapping[str, float],
    bound: Numbers,
    by_side: Mapping[int, Mapping[int, float | int]],
    closed_form: Callable[[float, int], float | int],
    best: Mapping[int, float | int],
    full: float | int,
) -> Figure:
    """Multiply-adds of the attention, against the number of tokens and against the number of regions.

    Args:
        counted: name -> multiply-adds at each number of tokens; the last one is drawn as a baseline.
        bound: what the paper says of the least cost, at the same numbers.
        by_side: regions that a query reads -> regions on a side -> multiply-adds.
        closed_form: multiply-adds by regions on a side and regions read.
        best: regions read -> the predicted best number on a side.
        full: multiply-adds of full attention.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 4))
    colours = [COLOURS[0], COLOURS[1], BASELINE]
    for (name, values), colour in zip(counted.items(), colours, strict=True):
        axes[0].loglog(
            tokens, values, "o-", color=colour, label=f"{name}: slope {slopes[name]:.2f}"
        )
    axes[0].loglog(tokens, bound, ":", color="black", label="the paper: 3 k^(2/3) (HW)^(4/3) C")
    axes[0].set(xlabel="tokens HW", ylabel="multiply-adds of the attention, C = 32")
    for (topk, row), colour in zip(by_side.items(), COLOURS, strict=False):
        smooth = np.geomspace(max(1, topk**0.5), 64, 100)
        line = [closed_form(side, topk) for side in smooth]
        axes[1].loglog(smooth, line, "-", color=colour, alpha=0.6)
        label = f"k = {topk}, counted"
        axes[1].loglog(list(row), list(row.values()), "o", color=colour, label=label)
        axes[1].axvline(best[topk], color=colour, linestyle=":", linewidth=1)
    axes[1].axhline(full, color=BASELINE, linestyle="--", label="full attention")
    axes[1].set(xlabel="regions a side S", ylabel="multiply-adds, 64 x 64 tokens")
    axes[1].set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axes[1].minorticks_off()
    for axis in axes:
        axis.legend()
    return fig


def draw_routed_pairs(
    canvases: Float[Tensor, "items 3 height width"],
    routed: Sequence[Sequence[tuple[int, Sequence[int]]]],
    labels: Sequence[str],
    side: int,
) -> Figure:
    """Which regions a query region attends to in every block of a model, one row a block.

    Args:
        routed: by block and item: the query region, and those it attends to.
        labels: what each item is.
        side: regions on a side of a canvas.
    """
    size = (10, 1.9 * len(routed))
    fig, axes = plt.subplots(len(routed), len(labels), figsize=size, squeeze=False)
    for block, items in enumerate(routed):
        for axis, canvas, (query, seen), label in zip(
            axes[block], canvases, items, labels, strict=True
        ):
            show_regions(axis, canvas, seen, query, side, f"block {block + 1}, {label}")
    return fig


def draw_region_sizes(scores: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> Figure:
    """Accuracy, %, by size and number of the routed regions, every seed and the mean; `colours` of some."""
    fig, axis = plt.subplots(figsize=(8, 3.2))
    arm_points(axis, scores, colours)
    axis.set(xlabel="accuracy on displaced pairs (%)")
    return fig


def draw_patterns(scores: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracy, %, of every attention pattern, every seed and the mean; chance (50 %) is dotted."""
    fig, axis = plt.subplots(figsize=(8, 3.8))
    colours = dict.fromkeys(scores, COLOURS[1]) | {"routed": COLOURS[0], "full": BASELINE}
    arm_points(axis, scores, colours)
    axis.axvline(50, color="0.5", linestyle=":")
    axis.set(xlabel="accuracy on displaced pairs (%); dotted: chance")
    return fig
