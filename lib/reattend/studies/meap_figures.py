"""Figures of the study of masked inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve
from reattend.studies.meap import SEGMENTS

ARM_COLOURS = {"NTP": BASELINE, "MEAP": COLOURS[0], "Random tokens": COLOURS[3]}


def colour(arm: str) -> str:
    """The colour of an arm; ratios and cycles share one."""
    return ARM_COLOURS.get(arm, COLOURS[9])


def draw_inputs(tokens: np.ndarray, masks: Mapping[str, np.ndarray]) -> Figure:
    """Inputs as the model reads them, a panel for every kind of masks: numbers of tokens, black where [MASK].

    Args:
        tokens: [rows, length + 1], the last one being a target only.
        masks: title -> [rows, length].
    """
    figure, axes = plt.subplots(len(masks), 1, figsize=(9, 1.5 * len(masks)), sharex=True)
    for axis, (title, masked) in zip(np.atleast_1d(axes), masks.items(), strict=True):
        inputs = np.ma.masked_where(masked, tokens[:, : masked.shape[1]])
        palette = plt.get_cmap("GnBu").with_extremes(bad="black")
        # Twice the largest token: colours stay light enough for numbers.
        axis.imshow(
            inputs, cmap=palette, vmax=2 * tokens.max(), aspect="auto", interpolation="nearest"
        )
        for (row, place), hidden in np.ndenumerate(masked):
            ink = "white" if hidden else "black"
            target = tokens[row, place + 1]
            axis.text(place, row, target, ha="center", va="center", fontsize=7, color=ink)
        axis.set_title(title, fontsize=9)
        axis.set_yticks([])
        axis.grid(False)
    np.atleast_1d(axes)[-1].set_xlabel("position (colour: input token, number: its target)")
    return figure


def draw_steps(
    steps: Sequence[int],
    nats: Mapping[str, np.ndarray],
    accuracy: Mapping[str, np.ndarray],
    bounds: tuple[float, float],
    reported: pd.DataFrame,
) -> Figure:
    """Needles against training steps: nats, accuracy, and the paper's accuracies against its tokens.

    Args:
        nats: arm -> [seeds, checkpoints]; `accuracy`, a share, likewise.
        bounds: nats of counting in the row, and the share that copying answers.
        reported: columns tokens_billions, ntp, meap (%).
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6))
    for arm, values in nats.items():
        mean_curve(left, steps, values, colour(arm), arm)
        mean_curve(middle, steps, 100 * accuracy[arm], colour(arm), arm)
    for axis, bound, label in (
        (left, bounds[0], "counts in the row"),
        (middle, 100 * bounds[1], "copying"),
    ):
        axis.axhline(bound, color="black", ls=":", lw=1, label=label)
        axis.set(xlabel="training steps", xticks=steps)
    left.set(ylabel="nats a needle", title="here: loss")
    middle.set(ylabel="needles answered (%)", title="here: accuracy")
    for arm, column in (("NTP", "ntp"), ("MEAP", "meap")):
        right.plot(
            reported.tokens_billions,
            reported[column],
            "s-",
            color=colour(arm),
            mec=REPORTED,
            label=arm,
        )
    right.set(
        xlabel="training tokens (billions)", ylabel="accuracy (%)", title="the paper: 32K contexts"
    )
    for axis in (left, middle, right):
        axis.legend()
    return figure


def draw_distance(
    edges: Sequence[int], panels: Mapping[str, Mapping[str, np.ndarray]], bound: Sequence[float]
) -> Figure:
    """Nats of needles by the distance to their source, a panel for every title: arm -> [seeds, bins]."""
    names = [f"{low}-{high - 1}" for low, high in pairwise(edges)]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.5), sharey=True)
    for axis, (title, arms) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for arm, values in arms.items():
            mean_curve(axis, range(len(names)), values, colour(arm), arm)
        axis.plot(range(len(names)), bound, ":", color="black", lw=1, label="counts in the row")
        axis.set_xticks(range(len(names)), names)
        axis.set(title=title, xlabel="tokens between question and source")
    np.atleast_1d(axes)[0].set_ylabel("nats a needle")
    np.atleast_1d(axes)[0].legend()
    return figure


def _interval(axis: Axes, place: float, values: np.ndarray, width: float, **style: object) -> None:
    """A bar at the mean over seeds with its 95 % interval, and the seeds as points."""
    found = mean(values)
    axis.bar(place, found.effect, width, **style)
    if np.isfinite(found.low):
        axis.plot([place, place], [found.low, found.high], color="black", lw=1)
    axis.plot(np.full(len(values), place), values, "o", color="black", ms=2, alpha=0.5)


def draw_attention(
    shares: Mapping[str, np.ndarray],
    effects: Mapping[str, Mapping[str, np.ndarray]],
    reported: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Where questions look, and what [MASK] does to attention, beside the paper's numbers.

    Args:
        shares: arm -> share of each of `SEGMENTS`, [seeds, segments].
        effects: "decay", "variance" -> arm -> seeds.
        reported: "NTP", "MEAP" -> share by segment, where given; "effects" -> "decay", "variance".
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=[1.6, 1])
    width = 0.8 / len(shares)
    for number, (arm, values) in enumerate(shares.items()):
        places = np.arange(len(SEGMENTS)) + (number - (len(shares) - 1) / 2) * width
        for place, segment, found in zip(places, SEGMENTS, values.T, strict=True):
            label = arm if segment == "before" else None
            _interval(left, place, found, width, color=colour(arm), label=label)
            if segment in reported.get(arm, {}):
                label = "the paper" if (arm, segment) == ("NTP", "before") else None
                style = {"color": REPORTED, "mec": "black", "ms": 6, "label": label}
                left.plot(place, reported[arm][segment], "s", **style)
    left.set_xticks(range(len(SEGMENTS)), SEGMENTS)
    left.set(ylabel="share of attention", title="where a needle's question looks")
    for number, (effect, arms) in enumerate(effects.items()):
        for rank, (arm, values) in enumerate(arms.items()):
            place = number + (rank - (len(arms) - 1) / 2) * width
            _interval(right, place, values, width, color=colour(arm))
        style = {"color": REPORTED, "mec": "black", "ms": 6}
        right.plot(number + 0.45, reported["effects"][effect], "s", **style)
    right.axhline(0, color="black", lw=0.8)
    right.set_xticks(
        range(len(effects)), ["fall at masked places", "rise of the variance elsewhere"]
    )
    right.set(ylabel="relative change", title="fed with [MASK] instead of tokens")
    left.legend()
    return figure


def draw_heads(maps: Mapping[str, np.ndarray], marked: tuple[int, int]) -> Figure:
    """One head's map of every arm on one row, [queries, keys], with a needle's question and answer marked."""
    figure, axes = plt.subplots(1, len(maps), figsize=(3.4 * len(maps), 3.7))
    asks, answer = marked
    for axis, (arm, weights) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(np.sqrt(weights), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.plot(answer, asks, "o", mfc="none", mec=COLOURS[3], ms=9)
        axis.set(title=arm, xlabel="token read")
        axis.grid(False)
    axes[0].set_ylabel("token that reads")
    figure.colorbar(image, ax=axes, shrink=0.8, label="square root of the weight")
    return figure
