"""The figures of Sigma: who shares which head, what sizes cost in loss, in bytes and in time, what values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.plots import COLOURS, REPORTED, mean_curve, mean_point
from reattend.studies.sigma import Way

Seeds = Mapping[str, np.ndarray]


def draw_sharing(
    keys: Float[Tensor, "heads key_heads"], values: Float[Tensor, "heads value_heads"]
) -> Figure:
    """Which key head and which value head every query head reads."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), width_ratios=[1, 2.2])
    for axis, shared, name in zip(axes, (keys, values), ("key", "value"), strict=True):
        axis.imshow(shared, cmap="Blues", aspect="auto", interpolation="nearest")
        axis.set(xlabel=f"{name} head", ylabel="query head", xticks=range(shared.shape[1]))
        axis.set_title(f"{shared.shape[1]} {name} heads")
        axis.grid(False)
    return figure


def beside_the_paper(
    reported: Mapping[str, float], ours: Seeds, paper: str, here: str, colours: Mapping[str, str]
) -> Figure:
    """Left, differences that the paper reports; right, ours by seed with means and 95 % intervals.

    Args:
        reported, ours: label -> difference(s), from the top.
        paper, here: what is measured.
        colours: of labels that are not drawn in the first colour.
    """
    rows = max(len(reported), len(ours))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.2 + 0.42 * rows))
    left.barh(
        range(len(reported)), list(reported.values()), color=REPORTED, edgecolor="black", lw=0.6
    )
    left.set_yticks(range(len(reported)), list(reported))
    for place, (name, values) in enumerate(ours.items()):
        mean_point(right, values, place, colours.get(name, COLOURS[0]))
    right.set_yticks(range(len(ours)), list(ours))
    for axis, label, title in (
        (left, paper, "the paper, one run each"),
        (right, here, "here, seeds"),
    ):
        axis.axvline(0, color="black", lw=0.8)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.set_title(title)
    return figure


def draw_losses(
    curves: Mapping[str, Float[np.ndarray, "seeds places"]],
    numbers: Mapping[str, int],
    nats: Seeds,
    reference: str,
) -> Figure:
    """Left, loss against what a layer's cache holds of a token; right, distance to `reference` by place.

    Args:
        curves: arm -> loss of every place in the row.
        numbers: arm -> numbers that its cache holds of a token.
        nats: arm -> loss by seed.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4))
    cells = np.array_split(np.arange(curves[reference].shape[1]), 10)
    taken: dict[int, int] = {}
    for (name, values), colour in zip(nats.items(), COLOURS, strict=False):
        beside = taken[numbers[name]] = taken.get(numbers[name], 0) + 1
        x, found = numbers[name] * 1.06 ** (beside - 1), mean(values)
        left.plot(np.full(len(values), x), values, "o", color=colour, ms=3, alpha=0.5)
        left.plot([x, x], [found.low, found.high], color=colour, lw=2)
        left.plot(x, found.effect, "D", color=colour, mec="black", mew=0.6, ms=6, label=name)
        if name != reference:
            above = curves[name] - curves[reference]
            by_cell = np.stack([above[:, cell].mean(1) for cell in cells], 1)
            right.plot(
                [c.mean() + 1 for c in cells], by_cell.mean(0), "o-", color=colour, ms=3, label=name
            )
    places = sorted(taken)
    left.set_xscale("log", base=2)
    left.set_xticks(places, places)
    left.minorticks_off()
    left.set(xlabel="numbers a layer's cache holds of a token", ylabel="loss (nats a token)")
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel="tokens before", ylabel=f"loss above {reference}'s, mean of seeds")
    left.legend(ncols=2)
    return figure


def draw_maps(
    maps: Mapping[str, Float[Tensor, "heads length length"]], shared: Mapping[str, str]
) -> Figure:
    """Attention maps of all heads, a row an arm; `shared` says beside each row what its heads share."""
    heads = len(next(iter(maps.values())))
    figure, axes = plt.subplots(len(maps), heads, figsize=(1.3 * heads, 1.45 * len(maps) + 0.3))
    for row, (name, found) in zip(axes, maps.items(), strict=True):
        for head, (axis, one) in enumerate(zip(row, found, strict=True)):
            axis.imshow(one.sqrt(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if name == next(iter(maps)):
                axis.set_title(f"head {head + 1}", fontsize=9)
        row[0].set_ylabel(f"{name}\n{shared[name]}", fontsize=9)
    return figure


def draw_times(
    contexts: Sequence[int],
    seconds: Mapping[str, Float[np.ndarray, "contexts rounds"]],
    bytes_held: Mapping[str, Sequence[int]],
    reported: pd.DataFrame,
    styles: Mapping[str, str],
) -> Figure:
    """Time of one layer's attention for one token, what it saves against "grouped", and bytes of the cache."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.8))
    for name, found in seconds.items():
        mean_curve(left, contexts, 1000 * found.T, styles[name], name)
        if name not in ("grouped", "K replicated"):
            saved = 100 * (1 - found / seconds["grouped"])
            mean_curve(middle, contexts, saved.T, styles[name], name)
    style = {"color": "black", "mfc": REPORTED, "ms": 6, "lw": 1}
    middle.plot(reported.tokens, reported.kernel, "s--", label="the paper: kernel", **style)
    middle.plot(reported.tokens, reported.total, "^--", label="the paper: total", **style)
    for name, found in bytes_held.items():
        right.plot(contexts, np.array(found) / 1e6, "o-", color=styles[name], label=name)
    left.set(ylabel="CPU milliseconds a token", yscale="log", title="time")
    middle.axhline(0, color="black", lw=0.8)
    middle.set(ylabel="time saved against grouped (%)", title="what is saved", ylim=(-60, 50))
    right.set(ylabel="megabytes", yscale="log", title="cache of a layer, float32")
    for axis in (left, middle, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{n // 1024}k" for n in contexts])
        axis.minorticks_off()
        axis.set_xlabel("tokens in the cache")
        axis.legend()
    return figure


def draw_selective(
    losses: Mapping[Way, np.ndarray], masses: Mapping[Way, np.ndarray], share: float
) -> Figure:
    """Nats lost, and mass of the kept weights, against the share of values that is read.

    Args:
        losses, masses: by way, a number a text; ways that read a number of values are left out.
        share: at which other ways than that of the largest weights were read.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[1.3, 1])
    shares = {way for way in losses if isinstance(way.keep, float)}
    curve = sorted((w for w in shares if w == Way(w.keep)), key=lambda w: w.keep)
    places = [100 * way.keep for way in curve]
    for axis, measured in ((left, losses), (right, masses)):
        mean_curve(axis, places, np.stack([measured[w] for w in curve], 1), COLOURS[0], "largest")
    others = [Way(share, renormalise=False), Way(share, "latest"), Way(share, "random")]
    names = ("largest, not renormalised", "latest", "random")
    for way, name, colour in zip(others, names, COLOURS[1:4], strict=True):
        x = np.full(len(losses[way]), 100 * share)
        left.plot(x, losses[way], "^", color=colour, label=name, ms=5, alpha=0.7)
        if way.renormalise:
            right.plot(x, masses[way], "^", color=colour, label=name, ms=5, alpha=0.7)
    left.set(ylabel="nats a token above all values", yscale="log", title="loss")
    right.set(ylabel="share of attention", ylim=(0, 1), title="mass of the weights kept")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="values read (% of the cache)")
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
        axis.legend()
    return figure
