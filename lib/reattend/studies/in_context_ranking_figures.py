"""Pictures of in-context ranking: masks, rankers, where the dense model looks, latency, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve


def draw_masks(
    masks: Mapping[str, Bool[Tensor, "tokens tokens"]],
    block: Int[Tensor, " tokens"],
    positions: Int[Tensor, " tokens"],
) -> Figure:
    """Which tokens see which under each mask, and the positions of the tokens under the last."""
    fig, axes = plt.subplots(1, len(masks) + 1, figsize=(3 * (len(masks) + 1), 3.1))
    borders = np.flatnonzero(np.diff(block.numpy())) + 0.5
    for axis, (name, mask) in zip(axes, masks.items(), strict=False):
        axis.imshow(mask.numpy(), cmap="Blues", vmax=1.4, interpolation="nearest")
        axis.hlines(borders, -0.5, len(block) - 0.5, color="white", lw=0.5)
        axis.vlines(borders, -0.5, len(block) - 0.5, color="white", lw=0.5)
        axis.set(title=name, xlabel="key", ylabel="query")
        axis.grid(visible=False)
    axes[-1].plot(positions, ".", ms=2)
    for border in borders:
        axes[-1].axvline(border, color=REPORTED, lw=0.5)
    axes[-1].set(yscale="symlog", title="positions", xlabel="token", ylabel="position")
    axes[-1].set_ylim(0, None)
    return fig


def draw_scores(axis: Axes, scores: Float[Tensor, "heads documents"], right: int) -> None:
    """S of every head and document as shades, with the right document marked."""
    axis.imshow(scores.numpy(), cmap="Blues", vmin=0, aspect="auto")
    axis.set(xlabel="document", ylabel="head", title="S by head")
    axis.set_xticks(range(scores.shape[1]))
    axis.get_xticklabels()[right].set(fontweight="bold", color=COLOURS[0])
    axis.grid(visible=False)


def draw_rankers(
    points: Mapping[str, Float[np.ndarray, "seeds items"]],
    chance: float,
    reported: Mapping[str, float],
) -> Figure:
    """P@1 of each ranker with its 95 % interval over items: readers in blue; the paper's numbers beside.

    Args:
        points: P@1 by item; several seeds are averaged, and drawn one by one.
        reported: the paper's numbers, %, on its own data and model.
    """
    fig, (axis, paper) = plt.subplots(
        1, 2, figsize=(9.5, 0.32 * len(points) + 1), width_ratios=[3, 1.3]
    )
    for place, values in enumerate(points.values()):
        trained = len(values) > 1
        colour = COLOURS[0] if trained else BASELINE
        found = mean(100 * values.mean(0))
        axis.plot([found.low, found.high], [place, place], color=colour, lw=2)
        axis.plot(found.effect, place, "D", color=colour, mec="black", mew=0.6, ms=5)
        if trained:
            axis.plot(
                100 * values.mean(1), [place] * len(values), "o", color=colour, ms=3, alpha=0.4
            )
    axis.axvline(100 * chance, color=REPORTED, ls="--", lw=1)
    axis.annotate("chance", (100 * chance, len(points) - 0.6), fontsize=7, ha="left")
    axis.set_yticks(range(len(points)), list(points))
    axis.set(xlabel="right document first, %", title="here: verses, SmolLM2", xlim=(0, 102))
    axis.invert_yaxis()
    paper.barh(range(len(reported)), list(reported.values()), color=REPORTED, height=0.6)
    paper.set_yticks(range(len(reported)), list(reported))
    paper.set(xlabel="P@1, %", title="paper: MS MARCO")
    paper.invert_yaxis()
    return fig


def draw_by_number(
    likelihoods: Mapping[str, Mapping[int, Float[np.ndarray, "_ items"]]],
    hits: Mapping[str, Mapping[int, Float[np.ndarray, "_ items"]]],
    trained: int,
    reported: Mapping[int, float],
) -> Figure:
    """What rankers find in growing lists, with 95 % intervals over queries: nats above chance, P@1, the paper's P@1.

    Args:
        likelihoods, hits: by ranker and number of documents.
        trained: the number of documents in training.
        reported: the paper's P@1 by number of documents, %, on its own data and model.
    """
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.4), width_ratios=[3, 3, 1.6])
    for axis, values, scale in ((axes[0], likelihoods, 1), (axes[1], hits, 100)):
        for place, (name, of) in enumerate(values.items()):
            numbers, colour = sorted(of), COLOURS[place % len(COLOURS)]
            above = [np.log(n) if scale == 1 else 0 for n in numbers]
            means = [
                mean(scale * of[n].mean(0) + more) for n, more in zip(numbers, above, strict=True)
            ]
            effects = [m.effect for m in means]
            # Dashes let a curve be seen below another; intervals stand side by side.
            line, beside = "--" if place % 2 else "-", 0.94 + 0.12 * place / len(values)
            axis.plot(numbers, effects, line, color=colour, marker=".", label=name)
            ends = [(m.low, m.high if scale == 1 else min(m.high, scale)) for m in means]
            axis.vlines([beside * n for n in numbers], *zip(*ends, strict=True), colour, lw=0.8)
        label = "documents in training" if axis is axes[1] else None
        axis.axvline(trained, color=REPORTED, lw=1, ls=":", label=label)
        axis.set(xscale="log", xlabel="documents N")
        axis.set_xticks(numbers := sorted(next(iter(values.values()))), numbers)
        axis.minorticks_off()
    every = sorted(next(iter(hits.values())))
    certain = axes[0].plot(every, np.log(every), color=REPORTED, ls="--", lw=1, label="certain")
    axes[0].set(ylabel="log-likelihood above chance, nats", title="the right document")
    axes[1].plot(every, [100 / n for n in every], color=REPORTED, ls=":", lw=2, label="chance")
    axes[1].set(ylabel="P@1, %", ylim=(0, 102), title="the right document first")
    named = [*axes[1].get_legend_handles_labels()[0], *certain]
    fig.legend(handles=named, ncol=4, loc="outside lower center", fontsize=8)
    axes[2].plot(list(reported), list(reported.values()), "s-", color=REPORTED)
    axes[2].set(xscale="log", xlabel="documents N", ylabel="P@1, %", title="paper: MS MARCO")
    axes[2].set_xticks(list(reported), list(reported))
    axes[2].minorticks_off()
    axes[2].set_ylim(0, 1.1 * max(reported.values()))
    return fig


def draw_latency(
    numbers: Sequence[int],
    seconds: Mapping[str, Float[np.ndarray, "numbers rounds"]],
    reported: pd.DataFrame,
) -> Figure:
    """Seconds against the number of documents, rounds as points, the paper's whole model in grey."""
    fig, axis = plt.subplots(figsize=(6.5, 4))
    for colour, (name, rounds) in zip((BASELINE, COLOURS[0]), seconds.items(), strict=True):
        axis.plot(numbers, np.median(rounds, 1), "-", color=colour, label=f"{name}, one layer here")
        axis.plot(numbers, rounds, "o", color=colour, ms=3, alpha=0.3)
    styles = {"Full-FT": "--", "BlockRank": "-"}
    for method, style in styles.items():
        part = reported[reported.method == method]
        label = f"{method}, paper (Mistral-7B)"
        axis.plot(part.N, part.ms / 1000, style, marker="s", ms=3, color=REPORTED, label=label)
    axis.set(xscale="log", yscale="log", xlabel="documents N", ylabel="seconds; here of CPU")
    axis.set_xticks([10, 20, 50, 100, 200, 500], [10, 20, 50, 100, 200, 500])
    axis.minorticks_off()
    axis.legend()
    return fig


def draw_segments(
    segments: Float[np.ndarray, "prompts layers parts"],
    between: Float[np.ndarray, "prompts layers 2"],
    documents: int,
) -> Figure:
    """By layer of the dense model: where document tokens look, and what signal tokens give each document."""
    fig, (inside, left, right) = plt.subplots(1, 3, figsize=(11, 3.4))
    layers = range(between.shape[1])
    for column, (name, colour) in enumerate(
        {"documents": COLOURS[0], "shifted by half": BASELINE}.items()
    ):
        mean_curve(inside, layers, between[:, :, column], colour, name)
    inside.axhline(1, color=REPORTED, ls="--", lw=1)
    inside.set(title="other documents' share, over uniform", ylabel="ratio", ylim=(0, None))
    for column, name in enumerate(("first token", "instruction", "own document", "others")):
        left.plot(layers, segments[:, :, column].mean(0), color=COLOURS[column], label=name)
    left.set(title="from document tokens", ylabel="attention", ylim=(0, 1))
    for name, values in {
        "right document": segments[:, :, 6],
        "each other document": segments[:, :, 7] / (documents - 1),
    }.items():
        colour = COLOURS[0] if name.startswith("right") else BASELINE
        mean_curve(right, layers, values, colour, name)
    right.set(title="from the signal tokens", ylabel="attention to one document")
    for axis in (inside, left, right):
        axis.set(xlabel="layer")
        axis.legend(ncol=2 if axis is left else 1)
    return fig


def draw_layers(
    points: Mapping[int, Float[np.ndarray, "seeds items"]],
    untrained: Mapping[int, Float[np.ndarray, "1 items"]],
) -> Figure:
    """P@1 by layer under the full mask: readers, seed by seed, and the attention as it is."""
    fig, axis = plt.subplots(figsize=(5.5, 3.4))
    layers = sorted(points)
    for name, of, colour in (
        ("reader", points, COLOURS[0]),
        ("attention as it is, slots removed", untrained, BASELINE),
    ):
        axis.plot(layers, [100 * of[n].mean() for n in layers], "-", color=colour, label=name)
        for n in layers:
            axis.plot([n] * len(of[n]), 100 * of[n].mean(1), "o", color=colour, ms=3, alpha=0.5)
            found = mean(100 * of[n].mean(0))
            axis.plot([n, n], [found.low, found.high], color=colour, lw=1)
    axis.set(xlabel="layer", ylabel="right document first, %", ylim=(0, None))
    axis.set_xticks(layers)
    axis.legend()
    return fig


def draw_training(losses: Mapping[str, Float[np.ndarray, "seeds steps"]], chance: float) -> Figure:
    """Training loss of readers, smoothed over a tenth of the steps, mean over seeds."""
    fig, axis = plt.subplots(figsize=(5.5, 3))
    for (name, values), colour in zip(losses.items(), COLOURS, strict=False):
        width = max(1, values.shape[1] // 10)
        smooth = np.convolve(values.mean(0), np.ones(width) / width, mode="valid")
        axis.plot(np.linspace(0, 1, len(smooth)), smooth, color=colour, label=name)
    axis.axhline(chance, color=REPORTED, ls="--", lw=1)
    axis.set(xlabel="share of the steps", ylabel="L_aux, nats", ylim=(0, None))
    axis.legend()
    return fig
