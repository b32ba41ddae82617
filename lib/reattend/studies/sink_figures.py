"""Figures of attention sinks: where they are, and what calibrating a head does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS


def draw_example(maps: Mapping[str, np.ndarray]) -> Figure:
    """Attention maps of one head side by side, as weights; keys to the right, queries down."""
    fig, axes = plt.subplots(1, len(maps), figsize=(7, 3.2), sharey=True)
    for axis, (name, drawn) in zip(axes, maps.items(), strict=True):
        axis.imshow(drawn, cmap="Blues", vmin=0, vmax=1)
        axis.set(title=name, xlabel="key")
        axis.grid(False)
    axes[0].set_ylabel("query")
    return fig


def draw_maps(
    maps: Mapping[int, np.ndarray], positions: np.ndarray, shown: Sequence[int]
) -> Figure:
    """Mean attention maps of some layers, and below how often each token is a sink.

    Args:
        maps: mean weights by layer, [queries, keys].
        positions: share of heads and prompts in which a token is a sink, [layers, keys].
        shown: layers to draw.
    """
    fig, axes = plt.subplots(
        2, len(shown), figsize=(10, 5), sharex=True, sharey="row", height_ratios=[2.2, 1]
    )
    for column, layer in enumerate(shown):
        logs = np.log10(np.maximum(maps[layer], 1e-3))
        image = axes[0, column].imshow(
            logs, cmap="viridis", vmin=-3, vmax=0, aspect="auto", interpolation="nearest"
        )
        axes[0, column].set_title(f"layer {layer}")
        axes[0, column].grid(False)
        axes[1, column].bar(range(len(logs)), 100 * positions[layer], color=COLOURS[0], width=1)
        axes[1, column].set_xlabel("key")
    axes[0, 0].set_ylabel("query")
    axes[1, 0].set_ylabel("heads and prompts\nwhere it is a sink, %")
    fig.colorbar(image, ax=axes[0], label="log10 of mean attention", pad=0.01)
    return fig


def draw_rates(
    by_layer: Mapping[str, np.ndarray],
    classes: Mapping[str, tuple[float, float]],
    by_length: Mapping[str, Sequence[float]],
    lengths: Sequence[int],
) -> Figure:
    """How many heads have a later sink, by layer and by length, and which tokens sinks are; all in %.

    Args:
        by_layer: rates of each definition of a sink; the last one is drawn as a baseline.
        classes: share of the sinks and share of the tokens by class of token.
        by_length: rates of some of these definitions at `lengths`.
    """
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.9), width_ratios=[1.3, 1, 1])
    colours = dict(zip(by_layer, [*COLOURS[: len(by_layer) - 1], BASELINE], strict=True))
    for name, rates in by_layer.items():
        line = "--" if colours[name] == BASELINE else "-"
        axes[0].plot(rates, color=colours[name], ls=line, label=name)
    axes[0].set(
        xlabel="layer",
        ylabel="heads and prompts with a later sink, %",
        ylim=(0, 100),
        title="by layer",
    )
    place, shares = np.arange(len(classes)), np.array(list(classes.values()))
    axes[1].bar(place - 0.2, shares[:, 0], 0.4, color=COLOURS[0], label="of the sinks")
    axes[1].bar(place + 0.2, shares[:, 1], 0.4, color=BASELINE, label="of the tokens")
    axes[1].set_xticks(place, [name.replace(" ", "\n") for name in classes])
    axes[1].set(ylabel="share, %", title="which tokens")
    axes[1].legend()
    for name, rates in by_length.items():
        axes[2].plot(lengths, rates, "o-", color=colours[name])
    axes[2].set(xlabel="prompt of news, tokens", ylabel="heads and prompts, %", title="by length")
    axes[2].set(ylim=(0, 100), xscale="log")
    axes[2].set_xticks(lengths, [str(length) for length in lengths])
    axes[2].minorticks_off()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_heads(
    rates: np.ndarray, change: np.ndarray, chosen: Sequence[tuple[int, int]], label: str
) -> Figure:
    """Two maps of layers by heads: how often a head has a sink, and what calibrating it alone does.

    Args:
        rates: share of the prompts, [layers, heads].
        change: by how much the measure that `label` names changes; NaN where not searched.
        chosen: heads that are kept, marked by dots.
    """
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 5.4), sharey=True)
    bound = max(np.nanmax(np.abs(change)), 1e-6)
    style = {"aspect": "auto", "interpolation": "nearest"}
    pictures = [
        axes[0].imshow(100 * rates, cmap="viridis", vmin=0, vmax=100, **style),
        axes[1].imshow(change, cmap="RdBu_r", vmin=-bound, vmax=bound, **style),
    ]
    axes[1].set_facecolor("#d9d9d9")
    axes[1].plot(*np.array(chosen)[:, ::-1].T, "k.", ms=6)
    axes[0].set(title="sinks", ylabel="layer", xlabel="head")
    axes[1].set(title="calibrating this head alone", xlabel="head")
    labels = ("prompts with a later sink, %", label)
    for axis, picture, text in zip(axes, pictures, labels, strict=True):
        axis.grid(False)
        axis.set_xticks(range(rates.shape[1]))
        fig.colorbar(picture, ax=axis, label=text)
    return fig


def draw_gains(correct: Mapping[tuple[str, int], Mapping[str, np.ndarray]]) -> Figure:
    """Accuracy with chosen and with random heads minus dense attention's, with 95 % intervals, paired by item.

    Args:
        correct: task and number of examples -> method -> 100 for each right answer; "dense" is among the methods.
    """
    fig, axis = plt.subplots(figsize=(9, 4.2))
    marks = {
        "ACT": (COLOURS[0], "o"),
        "random heads": (BASELINE, "^"),
    }
    groups = list(correct.values())
    for n, (name, (colour, marker)) in enumerate(marks.items()):
        found = [mean(group[name] - group["dense"]) for group in groups]
        y = np.array([e.effect for e in found])
        error = np.array([(e.effect - e.low, e.high - e.effect) for e in found]).T
        style = {"fmt": marker, "color": colour, "label": name, "ms": 5, "capsize": 2}
        axis.errorbar(np.arange(len(groups)) + 0.2 * (n - 0.5), y, error, **style)
    axis.axhline(0, color=BASELINE, lw=1)
    labels = [f"{task}\n{shots}".replace(" ", "\n") for task, shots in correct]
    axis.set_xticks(range(len(correct)), labels, fontsize=8)
    axis.set(xlabel="task, and examples in the prompt", ylabel="accuracy minus dense, points")
    axis.legend()
    return fig
