"""The figures of the study of HiP attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, number_grid

RULE_STYLES = {
    "centre": (COLOURS[0], "o-"),
    "first": (COLOURS[1], "s-"),
    "last": (COLOURS[2], "^-"),
    "random": (COLOURS[4], "v-"),
    "oracle": ("black", ":"),
    "blind": (COLOURS[7], "--"),
}


def draw_search(
    axis: Axes,
    rounds: list[tuple[Tensor, Tensor, Tensor]],
    found: Tensor,
    table: Float[Tensor, " units"],
) -> None:
    """The candidates of one search round by round, coloured by score, with what it found of all scores.

    Args:
        rounds: start, size and score of the candidates, each a row of numbers.
        found: the units found.
        table: score of every unit.
    """
    spread = {"vmin": table.min(), "vmax": table.max(), "cmap": "viridis"}
    lines = torch.full((len(rounds) + 1, len(table)), torch.nan)
    for line, (start, size, score) in zip(lines, rounds, strict=False):
        for begin, width, value in zip(start.tolist(), size.tolist(), score.tolist(), strict=True):
            line[begin : begin + width] = value
    lines[-1] = table
    axis.imshow(lines, aspect="auto", interpolation="nearest", **spread)
    best = table.topk(len(found)).indices
    below = len(rounds)
    axis.plot(best, torch.full_like(best, below) + 0.28, "^", color="white", ms=4, mec="black")
    axis.plot(found, torch.full_like(found, below) - 0.28, "v", color=COLOURS[3], ms=4)
    axis.set_yticks(range(below + 1), [f"round {n + 1}" for n in range(below)] + ["all units"])
    axis.set_xlabel("unit of keys")
    axis.grid(False)


def draw_searches(
    trace: Sequence[tuple[Tensor, Tensor, Tensor]],
    found: Tensor,
    table: Float[Tensor, "batch heads blocks units"],
    recall: Mapping[int, float],
) -> Figure:
    """`draw_search` of the first block of some heads, one below the other.

    Args:
        trace: start, size and score of the candidates by round, each [batch, heads, blocks, candidates].
        found: units found, [batch, heads, blocks, nodes].
        table: score of every unit.
        recall: share of the best units found, by head, from the top.
    """
    fig, axes = plt.subplots(len(recall), 1, figsize=(9, 2.2 * len(recall)), sharex=True)
    for axis, (h, share) in zip(axes, recall.items(), strict=True):
        rounds = [tuple(x[0, h, 0] for x in step) for step in trace]
        draw_search(axis, rounds, found[0, h, 0], table[0, h, 0])
        axis.set_title(f"head {h}: {100 * share:.0f} % of the best units found", fontsize=9)
    for axis in axes[:-1]:
        axis.set_xlabel("")
    return fig


def draw_weights(
    pairs: Mapping[str, tuple[Float[Tensor, "queries keys"], Float[Tensor, "queries keys"]]],
) -> Figure:
    """Weights of some heads on a log scale, dense and with what the tree finds; white: not read."""
    size = (5 * len(pairs), 2.9)
    fig, axes = plt.subplots(1, 2 * len(pairs), figsize=size, sharex=True, sharey=True)
    for n, (head, both) in enumerate(pairs.items()):
        for axis, shown, name in zip(axes[2 * n :], both, ("dense", "HiP"), strict=False):
            logs = shown.clamp_min(1e-5).log10().masked_fill(shown == 0, torch.nan)
            axis.imshow(logs, vmin=-4, vmax=0)
            axis.set(title=f"{head}, {name}", xlabel="key")
            axis.grid(False)
    axes[0].set_ylabel("query")
    return fig


def draw_methods(main: pd.DataFrame) -> Figure:
    """NLL above dense, one row a method: every prompt a point, their mean a bar.

    Args:
        main: one row for each method and prompt, indexed by prompt.
    """
    dense = main[main["method"] == "dense"]
    names = [name for name in main["method"].unique() if name != "dense"]
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    for axis, metric in zip(axes, ("prose NLL", "answer NLL"), strict=True):
        for place, name in enumerate(names):
            found = main[main["method"] == name]
            excess = found[metric] - dense.loc[found.index, metric]
            baseline = name.startswith(("Stream", "block"))
            colour = COLOURS[0] if name.startswith("HiP") else COLOURS[1 if baseline else 7]
            axis.plot(excess, [place] * len(excess), "o", color=colour, ms=4, alpha=0.5)
            axis.plot(excess.mean(), place, "|", color="black", ms=14)
        axis.axvline(0, color=BASELINE, ls="--", lw=1)
        axis.set(xlabel=f"{metric} above dense, nats")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return fig


def draw_needles(results: pd.DataFrame, names: Sequence[str], bins: int = 4) -> Figure:
    """Mean NLL of the answer by method and by how far before the end it stands; one panel a length."""
    lengths = results["length"].unique()
    fig, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 2.8), squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        part = results[(results["length"] == length) & results["method"].isin(names)]
        count = min(bins, part["item"].nunique())
        edges = np.unique(np.quantile(part["back"], np.linspace(0, 1, count + 1)).round())
        if len(edges) == 1:
            edges = np.array([edges[0] - 1, edges[0]])
        place = pd.cut(part["back"], edges, include_lowest=True)
        grid = part.assign(place=place).pivot_table(
            index="method", columns="place", values="answer NLL", observed=True
        )
        columns = [f"{place.left:.0f}-{place.right:.0f}" for place in grid.columns]
        number_grid(axis, grid.loc[list(names)].to_numpy(), list(names), columns)
        axis.set(title=f"{length} tokens", xlabel="tokens from the answer to the end")
    return fig


def draw_trees(trees: pd.DataFrame, branches: pd.DataFrame, length: int) -> Figure:
    """Recall and mass against k by representative, and how often a split keeps the right half.

    Args:
        trees: `recall`, `mass` and `most`, indexed by k (a share), keys, rule, window.
        branches: columns `keys`, `size`, `window`, `right`, `pairs`.
    """
    fig, axes = plt.subplots(1, 3, figsize=(11, 4))
    curves = [("real", rule) for rule in RULE_STYLES] + [("permuted", "centre")]
    for keys, rule in curves:
        found = trees.xs((keys, rule), level=("keys", "rule")).reset_index()
        colour, mark = RULE_STYLES[rule]
        label = "best unit" if rule == "oracle" else rule
        style = {"color": colour, "ms": 5, "capsize": 2, "fmt": mark, "label": label}
        if keys == "permuted":
            style |= {"fillstyle": "none", "color": COLOURS[3], "label": "centre, keys permuted"}
        for axis, metric in zip(axes, ("recall", "mass"), strict=False):
            line = found.groupby("k")[metric].agg(["mean", "sem"])
            axis.errorbar(length * line.index, line["mean"], line["sem"], **style)
    most = trees.groupby("k")["most"].mean()
    axes[1].plot(length * most.index, most, color=REPORTED, lw=4, label="largest masses", zorder=0)
    names = ("share of the best units found", "share of the searched mass found")
    for axis, name in zip(axes, names, strict=False):
        axis.set(xlabel="k, keys", ylabel=name, xscale="log", ylim=(0, 1.05))
        _plain_ticks(axis, [round(length * k) for k in most.index])
    for keys, colour in (("real", COLOURS[0]), ("permuted", COLOURS[3])):
        found = branches[branches["keys"] == keys]
        found = found.assign(hits=found["right"] * found["pairs"]).groupby(["size", "window"])
        sums = found[["hits", "pairs"]].sum()
        rate = (sums["hits"] / sums["pairs"]).groupby("size").agg(["mean", "sem"])
        style = {"color": colour, "fillstyle": "full" if keys == "real" else "none", "capsize": 2}
        axes[2].errorbar(
            rate.index, rate["mean"], rate["sem"], fmt="o-", label=f"{keys} keys", **style
        )
        axes[2].set(
            xlabel="units in a half", ylabel="better half has the better unit", xscale="log"
        )
        _plain_ticks(axes[2], rate.index)
    axes[2].axhline(0.5, color=BASELINE, ls=":", lw=1)
    axes[2].legend()
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def draw_counts(
    lengths: Sequence[int],
    counts: Mapping[str, Sequence[tuple[int, int]]],
    slopes: Mapping[tuple[str, str], float],
) -> Figure:
    """Units scored against the length: by the search, and all of them.

    Args:
        counts: setting -> (by the search, all) for each length.
        slopes: of ("HiP" or "all units", setting).
    """
    fig, axis = plt.subplots(figsize=(7.5, 4.2))
    for (name, pairs), colour in zip(counts.items(), COLOURS, strict=False):
        for place, (which, line) in enumerate((("HiP", "o-"), ("all units", "--"))):
            label = f"{which}, {name}: slope {slopes[which, name]:.2f}"
            axis.loglog(lengths, [pair[place] for pair in pairs], line, color=colour, label=label)
    axis.set(xlabel="prompt, tokens", ylabel="units scored in one head")
    _plain_ticks(axis, lengths)
    axis.legend()
    return fig


def draw_refresh(lasting: pd.DataFrame, refreshes: Sequence[int]) -> Figure:
    """NLL of a copied list against the tokens that share a search.

    Args:
        lasting: columns `method` ("HiP, refresh 1", ..., "dense", "StreamingLLM"), `prompt`, `NLL`.
    """
    fig, axis = plt.subplots(figsize=(6.5, 3.6))
    lines = lasting.pivot(index="method", columns="prompt", values="NLL")
    ours = lines.loc[[f"HiP, refresh {r}" for r in refreshes]]
    axis.plot(refreshes, ours, "o-", color=COLOURS[0], lw=0.7, ms=3, alpha=0.5)
    axis.plot(refreshes, ours.mean(axis=1), "o-", color=COLOURS[0], lw=2, label="HiP, mean")
    for name, colour, line in (("dense", BASELINE, "--"), ("StreamingLLM", COLOURS[1], ":")):
        axis.axhline(lines.loc[name].mean(), color=colour, ls=line, label=f"{name}, mean")
    axis.set(
        xlabel="tokens that share a search, $r_m$", ylabel="NLL of the words, nats", xscale="log"
    )
    _plain_ticks(axis, refreshes)
    axis.legend()
    return fig


def _plain_ticks(axis: Axes, places: Sequence[int]) -> None:
    """Ticks of a logarithmic axis at these numbers, written out."""
    axis.set_xticks(list(places), [f"{place:,}" for place in places])
    axis.minorticks_off()
