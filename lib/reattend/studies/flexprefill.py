"""Figures of FlexPrefill: patterns, score against density, heads, ablation, coverage; fixed budgets beside it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from reattend.attention.baselines.block_topk import exact_block_mass
from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.baselines.vertical_slash import VerticalSlash
from reattend.attention.blocks import density
from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED
from reattend.studies.long_context import PromptMaps
from reattend.studies.prefill import DenseMaps

STYLE = {
    "FlexPrefill": (COLOURS[0], "o"),
    "vertical-slash": (COLOURS[1], "s"),
    "StreamingLLM": (COLOURS[2], "^"),
    "random": (COLOURS[3], "D"),
}
METRICS = {
    "probability": "probability of the right answer\nminus dense, points",
    "answer NLL": "answer NLL above dense, nats",
    "prose NLL": "prose NLL above dense, nats",
}


def streaming(size: int, block_size: int) -> StreamingLLM:
    """The first block and a window of `size` blocks."""
    return StreamingLLM(sink=block_size, window=size * block_size, block_size=block_size)


def fixed(split: float, size: int, block_size: int) -> VerticalSlash:
    """`size` columns and diagonals of blocks, the share `split` of them columns."""
    columns = round(split * size)
    budget = {"verticals": max(1, columns), "slashes": max(1, size - columns)}
    return VerticalSlash(**budget, last_queries=64, block_size=block_size)


def best_fixed(
    maps: PromptMaps | DenseMaps, target: float, block_size: int, most: int
) -> VerticalSlash:
    """Fixed budgets of density `target`, with the split that covers most attention mass."""
    splits = (0.25, 0.5, 0.75)
    makes = [functools.partial(fixed, split, block_size=block_size) for split in splits]
    return max((maps.match(make, target, most) for make in makes), key=maps.covered)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, and how far its 95 % interval reaches below and above it."""
    e = mean(np.asarray(values, dtype=float))
    return e.effect, *np.nan_to_num([e.effect - e.low, e.high - e.effect])


def draw_patterns(layers: Mapping[int, tuple], chosen: Mapping, block_size: int) -> Figure:
    """Block masses of two heads of each pattern, a third and two thirds up in density, above their blocks.

    Args:
        layers: queries, keys and scale by layer.
        chosen: the selection (`FlexPrefill.explain`) by layer.
    """
    gallery = []
    for aware in (False, True):
        found = sorted(
            (density(c.blocks)[0, h].item(), number, h)
            for number, c in chosen.items()
            for h in range(c.query_aware.shape[1])
            if bool(c.query_aware[0, h]) == aware
        )
        gallery += [found[len(found) * third // 3] for third in (1, 2)]
    size = (2.4 * len(gallery), 4.9)
    fig, axes = plt.subplots(2, len(gallery), figsize=size, sharex=True, sharey=True)
    for column, (share, number, h) in enumerate(gallery):
        q, k, s = layers[number]
        mass = exact_block_mass(q, k, block_size, s)[0, h]
        shown = mass.clamp_min(1e-3).log10().masked_fill(mass == 0, torch.nan)
        axes[0, column].imshow(shown, cmap="viridis", vmin=-3, vmax=1.5)
        axes[1, column].imshow(chosen[number].blocks[0, h], cmap="Greys", vmin=0, vmax=1.4)
        aware = bool(chosen[number].query_aware[0, h])
        pattern = "query-aware" if aware else "vertical-slash"
        axes[0, column].set_title(f"layer {number}, head {h}\n{pattern}", fontsize=10)
        axes[1, column].set_title(f"density {share:.2f}", fontsize=10)
        axes[1, column].set_xlabel("key block")
        axes[1, column].set_xticks(range(0, len(mass), 2))
    labels = "dense mass\nquery block", "selected\nquery block"
    for axis, label in zip(axes[:, 0], labels, strict=True):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.grid(False)
    return fig


def draw_curves(above: pd.DataFrame, gammas: Mapping[str, float]) -> Figure:
    """Answers and losses against density: FlexPrefill's gammas, fixed budgets, placebos; 95 % intervals.

    Args:
        above: rows with "method", "setting", "density" and the metrics, above dense, one a prompt.
        gammas: setting -> gamma, of the curves; other settings are drawn hollow with their names.
    """
    fig, axes = plt.subplots(1, len(METRICS), figsize=(10.5, 4.1))
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for name, (colour, marker) in STYLE.items():
            cells = above[(above.method == name) & above.setting.isin(list(gammas))]
            points = cells.groupby("setting").agg(density=("density", "mean"))
            points = points.sort_values("density")
            y = np.array([interval(cells[cells.setting == s][metric]) for s in points.index])
            style = {"color": colour, "fmt": marker + "-", "ms": 5, "capsize": 2, "label": name}
            axis.errorbar(points.density, y[:, 0], y[:, 1:].T, **style)
        rest = above[(above.method == "FlexPrefill") & above.setting.str.startswith("min_budget")]
        for setting, cell in rest.groupby("setting"):
            y = interval(cell[metric])
            style = {"color": COLOURS[0], "fmt": "o", "mfc": "white", "ms": 7, "capsize": 2}
            x = cell.density.mean()
            axis.errorbar(x, y[0], [[y[1]], [y[2]]], **style)
            axis.annotate(f" {setting.split('=')[1]}", (x, y[0]), fontsize=8, color=COLOURS[0])
        axis.axhline(0, color=BASELINE, ls="--", lw=1, label="dense")
        axis.set(xlabel="density, share of causal blocks", ylabel=label)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=6)
    return fig


def draw_heads(stacks: Mapping[str, Sequence[torch.Tensor]]) -> Figure:
    """Density and share of prompts read query-aware of every head, mean over prompts."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 5.6), sharey=True)
    labels = "density", "share of prompts query-aware"
    for axis, (name, stack), label in zip(axes, stacks.items(), labels, strict=True):
        shown = torch.stack(list(stack)).mean(0)
        image = axis.imshow(shown, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(xlabel="head", title=name)
        axis.grid(False)
        axis.set_xticks(range(stack[0].shape[1]))
        fig.colorbar(image, ax=axis, label=label)
    axes[0].set_ylabel("layer")
    return fig


def draw_ablation(above: pd.DataFrame, arms: Mapping[str, str], main: str) -> Figure:
    """Differences of each arm from the main setting, prompt by prompt, with 95 % intervals.

    Args:
        above: rows of FlexPrefill with "setting", "item", the metrics and "density".
        arms: label -> setting.
    """
    panels = {
        "probability": "probability, points",
        "prose NLL": "prose NLL, nats",
        "density": "density",
    }
    fig, axes = plt.subplots(1, len(panels), figsize=(10, 2.6), sharey=True)
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        table = above.pivot(index="item", columns="setting", values=metric)
        for place, setting in enumerate(arms.values()):
            difference = (table[setting] - table[main]).dropna().to_numpy()
            y = interval(difference)
            axis.plot(difference, [place] * len(difference), ".", color=REPORTED, ms=4)
            style = {"color": COLOURS[0], "fmt": "o", "ms": 5, "capsize": 3}
            axis.errorbar(y[0], place, xerr=[[y[1]], [y[2]]], **style)
        axis.axvline(0, color=BASELINE, ls="--", lw=1)
        axis.set_xlabel(f"{label}, arm minus main")
    axes[0].set_yticks(range(len(arms)), list(arms))
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return fig


def draw_coverage(
    mass: pd.DataFrame, by_length: pd.DataFrame, curve: pd.DataFrame, gamma: float
) -> Figure:
    """Covered mass by gamma; density by length; density by gamma (grey: prompts).

    Args:
        mass: rows "method", "gamma", "prompt", "covered" (%).
        by_length: rows "method", "length", "density".
        curve: density of FlexPrefill, prompts x gammas.
    """
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.7))
    for name in mass.method.unique():
        colour, marker = STYLE[name]
        found = mass[mass.method == name].pivot(index="prompt", columns="gamma", values="covered")
        axes[0].plot(found.columns, found.T, color=colour, lw=0.5, alpha=0.3)
        y = np.array([interval(found[g]) for g in found.columns])
        style = {"color": colour, "fmt": marker + "-", "ms": 5, "capsize": 2, "label": name}
        axes[0].errorbar(found.columns, y[:, 0], y[:, 1:].T, **style)
    targets = sorted(mass.gamma.unique())
    axes[0].plot(targets, [100 * g for g in targets], "--", color=BASELINE, label="target")
    axes[0].set(xlabel="target share gamma", ylabel="attention mass covered, %", title="Figure 4")
    axes[0].legend()
    for name in ("FlexPrefill", "vertical-slash", "StreamingLLM"):
        cells = by_length[by_length.method == name].groupby("length")["density"]
        y = 100 * np.array([interval(cell) for _, cell in cells])
        style = {"color": STYLE[name][0], "fmt": "o-", "capsize": 2, "label": name}
        axes[1].errorbar(list(cells.groups), y[:, 0], y[:, 1:].T, **style)
    axes[1].set(xlabel="prompt, tokens", ylabel="density, %", title=f"Figure 5, gamma {gamma}")
    lengths = sorted(by_length.length.unique())
    axes[1].set(xscale="log", ylim=(0, 105))
    axes[1].set_xticks(lengths, [str(length) for length in lengths])
    axes[1].minorticks_off()
    axes[1].legend()
    axes[2].plot(curve.columns, 100 * curve.T, color=REPORTED, lw=0.8)
    axes[2].plot(curve.columns, 100 * curve.mean(), "o-", color=COLOURS[0])
    axes[2].set(xlabel="gamma", ylabel="density, %", title="Figure 5", ylim=(0, 105))
    return fig
