"""Pictures of the study of TextMonkey: masks, pages with what was kept and read, losses, scores by arm, redundancy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from reattend.backbones.trained.textmonkey import CROPS
from reattend.data.word_pages import HEIGHT, PATCH, WIDTH, WordPages
from reattend.evidence.intervals import mean
from reattend.multimodal_llm.textmonkey import visible_along
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point

Points = Mapping[str, Float[np.ndarray, " seeds"]]


def draw_masks(size: int, window: int, shift: int) -> Figure:
    """Which places of an axis may see each other: by the official mask, by ours, and by the official one alone."""
    padded = -(-size // window) * window
    places = (np.arange(padded) + shift) % size
    real = np.arange(padded) < size
    found = []
    for official in (True, False):
        seen = np.zeros((size, size))
        for number, pairs in enumerate(visible_along(size, window, shift, official=official)):
            inside = slice(number * window, (number + 1) * window)
            kept, where = real[inside], places[inside][real[inside]]
            seen[np.ix_(where, where)] = pairs.numpy()[np.ix_(kept, kept)]
        found.append(seen)
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.5))
    titles = ("official mask", "by the roll's seam", "allowed by the official one alone")
    for axis, shown, title in zip(axes, (*found, found[0] - found[1]), titles, strict=True):
        colours = "Reds" if shown is not found[0] and shown is not found[1] else "Blues"
        axis.imshow(shown, cmap=colours, vmin=0, vmax=1.4, interpolation="nearest")
        axis.axhline(size / 2 - 0.5, color="black", lw=0.6, ls=":")
        axis.axvline(size / 2 - 0.5, color="black", lw=0.6, ls=":")
        axis.set_title(f"{title}\n{int(shown.sum())} pairs", fontsize=9)
        axis.set(xlabel="key: place along the page", ylabel="query")
        axis.grid(False)
    return figure


def draw_borders(axis: Axes) -> None:
    """The borders of the crops of a page of words."""
    axis.axvline(WIDTH / 2, color=COLOURS[1], lw=1.5)
    axis.axhline(HEIGHT / 2, color=COLOURS[1], lw=1.5)


def show_page(axis: Axes, pixels: Float[Tensor, "height width"], title: str = "") -> None:
    """A page of words, ink dark, with its tokens (thin) and the borders of its crops (orange)."""
    extent = (0, WIDTH, HEIGHT, 0)
    axis.imshow(1 - pixels.numpy(), "gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    for place in range(PATCH, WIDTH, PATCH):
        axis.axvline(place, color="black", lw=0.2, alpha=0.4)
    for place in range(PATCH, HEIGHT, PATCH):
        axis.axhline(place, color="black", lw=0.2, alpha=0.4)
    draw_borders(axis)
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def draw_attention(
    pixels: Float[Tensor, "height width"],
    weights: Mapping[str, Float[Tensor, "rows columns"]],
    token: tuple[int, int],
) -> Figure:
    """A page, and how much its framed token reads of every other, by module (means over heads)."""
    figure, axes = plt.subplots(1, 1 + len(weights), figsize=(3.2 * (1 + len(weights)), 2.2))
    show_page(axes[0], pixels, "page, tokens, borders of the crops")
    row, column = token
    crop = ((row, CROPS.height), (column, CROPS.width))
    for axis, (name, found) in zip(axes[1:], weights.items(), strict=True):
        axis.imshow(found.numpy(), cmap="Blues", vmin=0, extent=(0, WIDTH, HEIGHT, 0))
        draw_borders(axis)
        own = (slice(n // size * size, (n // size + 1) * size) for n, size in crop)
        beyond = 100 * (found.sum() - found[tuple(own)].sum()).item()
        axis.set_title(f"{name}: {beyond:.0f} % beyond the borders", fontsize=8)
        axis.axis("off")
    for axis in axes:
        corner = (PATCH * column, PATCH * row)
        axis.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="red", lw=1.8))
    return figure


def colour_of(arm: str) -> str:
    """The method blue, placebos orange, other starts green, what is without a module grey."""
    if arm in ("shift 0", "random", "stride", "kept alone"):
        return COLOURS[1]
    if arm in ("default init", "learned queries", "by slot", "unsorted"):
        return COLOURS[2]
    if arm in ("zero init", "similarity"):
        return COLOURS[0]
    return BASELINE


def draw_scores(panels: Mapping[str, Points], label: str = "NLL of a letter, nats") -> Figure:
    """A panel for each kind of reader and letter: every arm's seeds, their mean and its 95 % interval.

    Args:
        panels: title -> arm -> seeds.
    """
    most = max(len(arms) for arms in panels.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 0.32 * most + 1.3))
    for axis, (title, arms) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for place, (arm, values) in enumerate(arms.items()):
            mean_point(axis, values, place, colour_of(arm.split(" + ")[0]))
        axis.set_yticks(range(len(arms)), list(arms))
        axis.invert_yaxis()
        axis.set(
            xlabel=label, xlim=(0, 1.05 * max(axis.get_xlim()[1], *map(np.max, arms.values())))
        )
        axis.set_title(title, fontsize=9)
    return figure


def draw_early_losses(
    losses: Mapping[str, Float[Tensor, "seeds steps"]], start: str, bins: int = 20
) -> Figure:
    """Training loss of arms above that of `start` on the same pages: the first tenth of the steps, and all in bins."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for arm in (arm for arm in losses if arm != start):
        above = (losses[arm].double() - losses[start].double()).numpy()
        for axis, last in zip(axes, (max(2, above.shape[1] // 10), above.shape[1]), strict=True):
            size = max(1, last // bins)
            binned = above[:, : last // size * size].reshape(len(above), -1, size).mean(-1)
            places = size * np.arange(binned.shape[1]) + (size + 1) / 2
            mean_curve(axis, places, binned, colour_of(arm), arm)
    for axis, title in zip(axes, ("the first tenth", "all steps, means of bins"), strict=True):
        axis.axhline(0, color=BASELINE, lw=1)
        axis.set(xlabel="step", title=title)
    axes[0].set_ylabel(f"training loss above that of {start},\nnats a token")
    axes[1].legend()
    return figure


def draw_pages(
    pages: WordPages,
    kept: Mapping[str, Bool[Tensor, "pages crops tokens"]],
    answers: Mapping[str, Sequence[str]],
) -> Figure:
    """Pages by row, arms by column: what is dropped is faded, and over it what was read, wrong letters as capitals.

    Args:
        kept: arm -> tokens that it keeps.
        answers: arm -> a line for each page.
    """
    count = len(pages)
    figure, axes = plt.subplots(count, len(kept), figsize=(2.6 * len(kept), 1.65 * count))
    for row, line in enumerate(np.atleast_2d(axes)):
        for axis, (arm, places) in zip(line, kept.items(), strict=True):
            page = CROPS.stitch(places[row : row + 1, ..., None].float())[0, :, :, 0].numpy() > 0
            shown = page.repeat(PATCH, 0).repeat(PATCH, 1)
            title = (f"{arm}\n" if row == 0 else "") + answers[arm][row]
            show_page(axis, pages.pixels[row], title)
            veil = np.zeros((*shown.shape, 4))
            veil[..., :3] = (0.98, 0.87, 0.72)
            veil[..., 3] = np.where(shown, 0.0, 0.85)
            axis.imshow(veil, extent=(0, WIDTH, HEIGHT, 0), interpolation="nearest")
    return figure


def draw_resampler(
    arms: Points,
    everything: Float[np.ndarray, " seeds"],
    reported: Mapping[str, float],
    benchmark: str,
) -> Figure:
    """NLL of readers of fewer tokens; and the paper's scores, where it has the row.

    Args:
        arms: reader, its number of tokens first -> seeds.
        everything: the reader of all tokens.
        reported: row -> reported score of `benchmark`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 0.3 * len(arms) + 1.4), width_ratios=[3, 2])
    for place, (arm, values) in enumerate(arms.items()):
        name = arm.split(" ", 1)[1]
        mean_point(axes[0], values, place, colour_of(name.split(" + ")[0]))
    axes[0].axvline(mean(everything).effect, color="black", ls=":", lw=1)
    axes[0].set_yticks(range(len(arms)), list(arms))
    axes[0].set(xlabel="NLL of a letter, nats", xscale="log")
    low, high = axes[0].get_xlim()
    ticks = [tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if low <= tick <= high]
    axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_title("here, of 288 tokens (dotted: all)", fontsize=9)
    axes[1].barh(range(len(reported)), list(reported.values()), color=REPORTED)
    axes[1].set_yticks(range(len(reported)), list(reported))
    axes[1].set(xlabel=f"{benchmark}, %", xlim=(0.9 * min(reported.values()), None))
    axes[1].set_title("reported", fontsize=9)
    for axis in axes:
        axis.invert_yaxis()
    return figure


def draw_redundancy(
    sides: Sequence[int],
    shares: Mapping[str, Float[np.ndarray, "pages sides"]],
    reported: Sequence[float],
) -> Figure:
    """Share of redundant tokens against resolution, mean over pages with 95 % interval, and the paper's.

    Args:
        sides: resolutions in pixels.
        reported: shares at the paper's three resolutions, each as many times the first as here.
    """
    figure, axis = plt.subplots(figsize=(6.8, 3.8))
    colours = [*COLOURS[:3], COLOURS[4], BASELINE]
    for (name, values), colour in zip(shares.items(), colours, strict=False):
        found = [mean(column) for column in values.T]
        centres = [f.effect for f in found]
        errors = [[f.effect - f.low for f in found], [f.high - f.effect for f in found]]
        axis.errorbar(sides[: len(centres)], centres, errors, fmt="o-", color=colour, label=name)
    known = list(reported)[: len(sides)]
    axis.plot(sides[: len(known)], known, "s--", color=REPORTED, mec="black", label="reported")
    axis.set_xticks(list(sides))
    axis.set(xlabel="pixels of a page's side (crops of 168)", ylabel="redundant tokens, %")
    axis.set_ylim(0, 100)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_documents(
    pages: UInt8[Tensor, "pages 3 side side"],
    dropped: Sequence[Mapping[str, tuple[int, Bool[np.ndarray, " tokens"]]]],
) -> Figure:
    """Rendered pages; beside each, tokens that are redundant in orange, and the borders of the crops.

    Args:
        dropped: for every page, title -> crops a side and which tokens, crop after crop.
    """
    columns = 1 + len(dropped[0])
    figure, axes = plt.subplots(len(pages), columns, figsize=(2.6 * columns, 2.75 * len(pages)))
    for line, page, found in zip(np.atleast_2d(axes), pages, dropped, strict=True):
        grey = page[0].numpy()
        for axis in line:
            axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
            axis.axis("off")
        line[0].set_title("page", fontsize=8)
        for axis, (title, (crops, tokens)) in zip(line[1:], found.items(), strict=True):
            side = round((tokens.size / crops**2) ** 0.5)
            tiles = tokens.reshape(crops, crops, side, side).swapaxes(1, 2)
            veil = np.zeros((crops * side, crops * side, 4))
            veil[..., :3] = (0.87, 0.56, 0.02)
            veil[..., 3] = 0.55 * tiles.reshape(crops * side, crops * side)
            axis.imshow(veil, extent=(0, 1, 1, 0), interpolation="nearest")
            for border in np.arange(1, crops) / crops:
                axis.axhline(border, color=COLOURS[0], lw=1)
                axis.axvline(border, color=COLOURS[0], lw=1)
            axis.set_title(f"{title}: {100 * tokens.mean():.0f} %", fontsize=8)
    return figure
