"""Pictures of visual tokens: what each method kept and answered, quality against cost, shift and dispersion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED

METHOD_COLOURS = {
    "FasterVLM": COLOURS[0],
    "FastV": COLOURS[1],
    "FastV, random ranking": COLOURS[3],
    "FastV's ranking": COLOURS[4],
    "FastV's ranking minus mean map": COLOURS[8],
    "random": "#949494",
    "mean [CLS] map": COLOURS[2],
    "uniform grid": COLOURS[5],
    "pooling": COLOURS[6],
    "merging": COLOURS[9],
    "objects": "black",
}
PAYERS = {
    "cls": "[CLS] in the tower",
    "image": "image",
    "text": "text",
    "last": "last prompt token",
}


def _patches_shown(
    axis: Axes, pixels: UInt8[np.ndarray, "3 size size"], kept: Sequence[int] | None, side: int
) -> None:
    """The picture; where some patches are kept, the mean brightness of the others, pale."""
    shown = pixels.transpose(1, 2, 0).astype(float)
    if kept is not None:
        mask = np.zeros(side * side)
        mask[list(kept)] = 1
        size = shown.shape[0]
        rows = np.arange(size) * side // size
        mask = mask.reshape(side, side)[rows][:, rows][..., None]
        patch = size // side
        grey = shown.mean(-1)[: patch * side, : patch * side]
        grey = grey.reshape(side, patch, side, patch).mean((1, 3))[rows][:, rows][..., None]
        pale = 0.75 * 255 + 0.25 * grey
        shown = mask * shown + (1 - mask) * pale
    axis.imshow(shown.round().astype(np.uint8), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)


def draw_scores(
    pixels: UInt8[np.ndarray, "3 size size"],
    scores: Mapping[str, Float[np.ndarray, " patches"]],
    kept: Sequence[int],
) -> Figure:
    """A picture, maps of scores over its patches, and what is kept of it by the last of them."""
    figure, axes = plt.subplots(1, 2 + len(scores), figsize=(2.5 * (2 + len(scores)), 2.8))
    side = round(len(next(iter(scores.values()))) ** 0.5)
    _patches_shown(axes[0], pixels, None, side)
    axes[0].set_title("picture", fontsize=9)
    for axis, (name, values) in zip(axes[1:], scores.items(), strict=False):
        shown = axis.imshow(values.reshape(side, side), cmap="magma", vmin=0)
        axis.set_title(name, fontsize=9)
        axis.axis("off")
        figure.colorbar(shown, ax=axis, shrink=0.75)
    _patches_shown(axes[-1], pixels, kept, side)
    axes[-1].set_title(f"the {len(kept)} kept", fontsize=9)
    return figure


def draw_kept(
    pictures: Sequence[UInt8[np.ndarray, "3 size size"]],
    titles: Sequence[str],
    kept: Mapping[str, Sequence[Sequence[int]]],
    answers: Mapping[str, Sequence[tuple[str, bool]]],
    side: int,
) -> Figure:
    """A column a picture with its question; a row a method: what it kept, and what was answered.

    Args:
        titles: question and right answer.
        kept: method -> places of the kept patches of each picture.
        answers: method -> answer of each picture, and whether it is right.
    """
    figure, axes = plt.subplots(
        1 + len(kept), len(pictures), figsize=(1.4 * len(pictures), 1.6 * (1 + len(kept)))
    )
    for column, pixels in enumerate(pictures):
        _patches_shown(axes[0, column], pixels, None, side)
        axes[0, column].set_title(titles[column], fontsize=6)
        for row, name in enumerate(kept, start=1):
            axis = axes[row, column]
            _patches_shown(axis, pixels, kept[name][column], side)
            said, right = answers[name][column]
            axis.set_title(said, fontsize=7, color="#1a7f37" if right else "#c0262d", pad=2)
            if column == 0:
                axis.set_ylabel(name, fontsize=7)
    return figure


def draw_tradeoff(
    values: Mapping[str, Mapping[float, Float[np.ndarray, " pictures"]]],
    blind: float,
    reported: Mapping[str, Mapping[float, float]],
    reported_blind: float,
) -> Figure:
    """Average % against the share of removed tokens: here with 95 % intervals over pictures, and the paper's.

    Args:
        values: method -> removed share -> one value a picture whose mean is the Average, in per cent of dense.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.3), sharey=True)
    for number, (name, by_share) in enumerate(values.items()):
        places = 100 * np.array(list(by_share)) + 0.35 * (number - len(values) / 2)
        found = [mean(v) for v in by_share.values()]
        error = [[f.effect - f.low for f in found], [f.high - f.effect for f in found]]
        axes[0].errorbar(places, [f.effect for f in found], error, label=name, lw=1.4, ms=3.5,
                         marker="o", color=METHOD_COLOURS[name], elinewidth=0.9)  # fmt: skip
    for name, by_share in reported.items():
        axes[1].plot([100 * s for s in by_share], list(by_share.values()), "x-", ms=7, mew=2,
                     color=METHOD_COLOURS[name], label=f"paper: {name}")  # fmt: skip
    for axis, floor, title in zip(
        axes, (blind, reported_blind), ("here", "the paper, LLaVA-1.5-7B"), strict=True
    ):
        axis.axhline(100, color=BASELINE, lw=1)
        axis.axhline(floor, color=BASELINE, lw=1, ls=":")
        axis.annotate("no picture", (0.02, floor), xycoords=("axes fraction", "data"),
                      xytext=(0, 3), textcoords="offset points", fontsize=8)  # fmt: skip
        axis.set(xlabel="visual tokens removed, %", title=title)
    axes[0].set_ylabel("Average, % of the unpruned model")
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def draw_shift(
    curves: Mapping[str, Float[np.ndarray, "pictures patches"]],
    rho: Mapping[str, Float[np.ndarray, "layers 1"]],
    permuted: Float[np.ndarray, "pictures patches"],
    layer: int,
) -> Figure:
    """Mean attention by index, from four payers, and rho of index and attention in every layer.

    Args:
        curves: payer -> curves of pictures and their upside-down twins, of the language model's layer `layer`.
        rho: payer -> rho of the mean curve in each layer; one value for the tower.
        permuted: the last token's curve once patches were put in random order before the model.
    """
    figure, grid = plt.subplots(2, 3, figsize=(10, 5.6))
    axes = grid.ravel()
    axes[5].axis("off")
    for axis, (name, values) in zip(axes, curves.items(), strict=False):
        means = values.mean(0)
        error = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
        index = np.arange(1, len(means) + 1)
        axis.bar(index, means, color=COLOURS[0], width=1.0)
        axis.fill_between(index, means - error, means + error, color="black", alpha=0.25, lw=0)
        axis.set(title=PAYERS[name], xlabel="token index")
    axes[0].set_ylabel("attention, mean")
    axes[3].set_ylabel("attention, mean")
    axes[3].plot(np.arange(1, permuted.shape[1] + 1), permuted.mean(0), color=COLOURS[3], lw=1.2,
                 label="patches in random order")  # fmt: skip
    axes[3].legend(fontsize=8)
    for name in ("image", "text", "last"):
        place = list(PAYERS).index(name)
        axes[4].plot(
            range(len(rho[name])), rho[name][:, 0], "o-", ms=4, color=COLOURS[place], label=name
        )
    axes[4].axhline(rho["cls"][0, 0], color=COLOURS[0], ls="--", lw=1.2, label="[CLS]")
    axes[4].axhline(0, color=BASELINE, lw=0.8)
    axes[4].axvline(layer, color=BASELINE, lw=0.8, ls=":")
    axes[4].set(title="rho of index and attention", xlabel="LM layer", ylim=(-1.05, 1.05))
    axes[4].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.05, 0.5))
    return figure


def draw_dispersion(
    cumulated: Mapping[str, Float[np.ndarray, "pictures patches"]],
    scores: Mapping[str, Float[np.ndarray, "pictures patches"]],
    reported: Mapping[str, float],
) -> Figure:
    """Share of the attention that the best tokens hold, and histograms of single scores.

    Args:
        cumulated: payer -> share held by the best 1, 2, ... tokens of each picture.
        scores: payer -> attention of each token, divided by the largest there is.
        reported: payer -> the paper's share at 20 % of the tokens.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for name, colour in zip(cumulated, (COLOURS[0], COLOURS[1]), strict=True):
        values = 100 * cumulated[name]
        places = 100 * np.arange(1, values.shape[1] + 1) / values.shape[1]
        low, high = np.quantile(values, (0.025, 0.975), axis=0)
        axes[0].plot(places, values.mean(0), color=colour, label=PAYERS[name])
        axes[0].fill_between(places, low, high, color=colour, alpha=0.15, lw=0)
        axes[0].plot(20, reported[name], "x", color=REPORTED, ms=9, mew=2.5)
        axes[0].annotate(f"paper: {name}", (20, reported[name]), xytext=(7, -10), fontsize=8,
                         textcoords="offset points", color="0.4")  # fmt: skip
    axes[0].set(xlabel="tokens, %", ylabel="attention held, %", title="cumulated")
    axes[0].legend(fontsize=8, loc="lower right")
    for axis, (name, values) in zip(axes[1:], scores.items(), strict=True):
        axis.hist(
            values.ravel(), bins=60, color=COLOURS[0], weights=np.full(values.size, 1 / values.size)
        )
        axis.set(
            yscale="log",
            title=PAYERS[name],
            xlabel="score / largest score",
            ylabel="share of tokens",
        )
    return figure


def draw_layers(
    average: Mapping[int, Float[np.ndarray, " pictures"]],
    mass: Mapping[int, Float[np.ndarray, " pictures"]],
    ranked: Mapping[int, Float[np.ndarray, " pictures"]],
    area: float,
    floor: float,
    chosen: int,
) -> Figure:
    """Average % by the layer that is asked: [CLS] of the tower, the last prompt token of the language model.

    Args:
        average: layer of the tower -> Average of each picture; `mass`: -> share of [CLS] attention on objects.
        ranked: layer of the language model -> Average with its ranking, pruned before the model.
        area: share of the pictures that objects cover; `floor`: Average of random tokens.
        chosen: layer of the tower that supplies the features.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    panels = (
        (average, floor, "Average, % of unpruned", "random tokens", "[CLS] of the tower"),
        (mass, area, "attention on objects", "their area", "[CLS] of the tower"),
        (ranked, floor, "Average, % of unpruned", "random tokens", "last token of the LM"),
    )
    for axis, (values, line, label, name, title) in zip(axes, panels, strict=True):
        for layer, points in values.items():
            found = mean(points)
            colour = COLOURS[0] if layer == chosen else "#6b6b6b"
            error = [[found.effect - found.low], [found.high - found.effect]]
            axis.errorbar(layer, found.effect, error, fmt="D", color=colour, ms=5)
        axis.axhline(line, color=COLOURS[3], lw=1, ls="--", label=name)
        axis.set(xlabel="layer", ylabel=label, title=title)
        axis.set_xticks(list(values))
        axis.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))
    ends = np.array([axes[0].get_ylim(), axes[2].get_ylim()])
    for axis in (axes[0], axes[2]):
        axis.set_ylim(ends[:, 0].min(), ends[:, 1].max())
    return figure
