"""Pictures of the study of DMT-JEPA: masks, chosen neighbours, similarity maps, targets by kind, trained arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, mean_curve, mean_point, show_regions
from reattend.studies.dmt_jepa import TargetScores

METHOD = COLOURS[0]
KIND_COLOURS = {
    "own": BASELINE,
    "top-4": METHOD,
    "top-4 + own": METHOD,
    "four by feature": METHOD,
}
"""Of kinds of targets; those that choose neighbours by something else than features are drawn in `PLACEBO`."""
PLACEBO = COLOURS[1]


def draw_masks(
    picture: np.ndarray,
    context: Int[Tensor, " context"],
    targets: Int[Tensor, "blocks target"],
    side: int,
) -> Figure:
    """One picture's masks: what the context encoder sees, and each target block, on a side x side grid.

    Args:
        picture: bytes, [3, size, size].
    """
    figure, axes = plt.subplots(1, 1 + len(targets), figsize=(2.1 * (1 + len(targets)), 2.3))
    names = ["context"] + [f"target block {number + 1}" for number in range(len(targets))]
    for axis, seen, name in zip(axes, [context, *targets], names, strict=True):
        show_grid(axis, picture, seen.tolist(), side)
        axis.set_title(f"{name}: {len(seen)} patches", fontsize=9)
    return figure


def show_grid(axis: Axes, picture: np.ndarray, seen: Sequence[int], side: int) -> None:
    """A picture with all patches but the seen ones darkened."""
    cell = picture.shape[-1] // side
    bright = np.full(side**2, 0.2)
    bright[list(seen)] = 1.0
    bright = bright.reshape(side, side).repeat(cell, 0).repeat(cell, 1)
    axis.imshow(np.moveaxis(picture / 255 * bright, 0, -1))
    axis.axis("off")


def draw_neighbours(
    pictures: Sequence[np.ndarray],
    chosen: Mapping[str, Sequence[Sequence[int]]],
    patches: Sequence[int],
    side: int,
) -> Figure:
    """A row a picture: the neighbours of one patch (red) that each rule chooses (orange)."""
    rows, columns = len(pictures), len(chosen)
    figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.25 * rows), squeeze=False)
    for row, (picture, patch) in enumerate(zip(pictures, patches, strict=True)):
        for axis, (name, found) in zip(axes[row], chosen.items(), strict=True):
            show_regions(axis, picture, found[row], patch, side, name if row == 0 else "")
    return figure


def draw_similarity(
    pictures: Sequence[np.ndarray],
    maps: Mapping[str, Sequence[np.ndarray]],
    patches: Sequence[int],
) -> Figure:
    """A row a picture: cosine of one patch's target (framed) with every other target of its picture, by kind.

    All maps share one scale, 0 to 1.
    """
    rows, columns = len(pictures), 1 + len(maps)
    figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.2 * rows), squeeze=False)
    for row, (picture, patch) in enumerate(zip(pictures, patches, strict=True)):
        axes[row, 0].imshow(np.moveaxis(picture, 0, -1))
        for axis, (name, found) in zip(axes[row, 1:], maps.items(), strict=True):
            shown = axis.imshow(found[row], cmap="viridis", vmin=0, vmax=1)
            axis.set_title(name if row == 0 else "", fontsize=9)
        side = found[row].shape[0]
        for axis in axes[row]:
            cell = picture.shape[-1] // side if axis is axes[row, 0] else 1
            down, right = divmod(patch, side)
            corner = (right * cell - 0.5, down * cell - 0.5)
            axis.add_patch(plt.Rectangle(corner, cell, cell, fill=False, edgecolor="red", lw=1.5))
            axis.axis("off")
    figure.colorbar(shown, ax=axes[:, -1], fraction=0.05, label="cosine")
    return figure


def draw_pairing(change: Float[np.ndarray, "pictures patches"]) -> Figure:
    """How far each target lies from the one whose query is its own picture's mean, over the length of that."""
    figure, axis = plt.subplots(figsize=(8, 2.2))
    shown = axis.imshow(change, cmap="magma", aspect="auto", interpolation="nearest")
    axis.set(xlabel="patch of the picture, row by row", ylabel="picture of the batch")
    axis.grid(False)
    figure.colorbar(shown, ax=axis, label="relative change")
    return figure


def draw_kinds(
    measures: Mapping[str, Mapping[str, Float[np.ndarray, " scenes"]]], better: Sequence[str]
) -> Figure:
    """A row a kind of target: mean over scenes and its 95 % interval, one axis a measure.

    Args:
        measures: axis label -> kind -> values of the scenes; nan where a scene has none.
        better: for each measure "more" or "less".
    """
    kinds = list(next(iter(measures.values())))
    figure, axes = plt.subplots(
        1, len(measures), figsize=(3.5 * len(measures), 0.34 * len(kinds) + 1.1), sharey=True
    )
    for axis, (label, values), way in zip(
        np.atleast_1d(axes), measures.items(), better, strict=True
    ):
        for place, kind in enumerate(kinds):
            found = mean(values[kind][np.isfinite(values[kind])])
            colour = KIND_COLOURS.get(kind, PLACEBO)
            axis.plot([found.low, found.high], [place, place], color=colour, lw=2.5)
            axis.plot(found.effect, place, "D", color=colour, mec="black", mew=0.6, ms=5)
        axis.set_xlabel(f"{label}\n({way} is better)")
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(kinds)), kinds)
    first.invert_yaxis()
    return figure


def draw_scores(scores: Mapping[str, TargetScores]) -> Figure:
    """How well kinds of targets tell what a patch shows: nats of the probe, and variance between labels."""
    measures = {
        "nats of the patch's class": {kind: found.nats for kind, found in scores.items()},
        "the same, boundary patches": {kind: found.boundary for kind, found in scores.items()},
        "share of variance between labels": {kind: s.between for kind, s in scores.items()},
    }
    return draw_kinds(measures, ["less", "less", "more"])


def draw_cosines(scores: Mapping[str, TargetScores]) -> Figure:
    """Mean cosines of kinds of targets: of the same and of different labels, near and far."""
    pairs = next(iter(scores.values())).cosine
    measures = {
        f"cosine, {same} labels, {near}": {kind: s.cosine[same, near] for kind, s in scores.items()}
        for same, near in pairs
    }
    return draw_kinds(measures, ["more" if same == "same" else "less" for same, _ in pairs])


def draw_grid(
    nats: Mapping[int, Mapping[str, Float[np.ndarray, " scenes"]]], kinds: Sequence[str]
) -> Figure:
    """Nats of the probe against the layer of the encoder, a line a kind of target, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    layers = list(nats)
    for number, kind in enumerate(kinds):
        found = [mean(nats[layer][kind]) for layer in layers]
        means = np.array([f.effect for f in found])
        errors = np.array([[f.effect - f.low, f.high - f.effect] for f in found]).T
        colour = BASELINE if kind == "own" else COLOURS[number % len(COLOURS)]
        shift = 0.08 * (number - len(kinds) / 2)
        axis.errorbar(
            np.array(layers) + shift,
            means,
            errors,
            fmt="o-",
            ms=4,
            lw=1.4,
            color=colour,
            label=kind,
        )
    axis.set_xticks(layers)
    axis.set(xlabel="layer of the encoder", ylabel="nats of the patch's class")
    axis.legend(ncol=2, title="target")
    return figure


def draw_arms(
    losses: Mapping[str, Float[Tensor, "seeds steps"]],
    spreads: Mapping[str, Float[np.ndarray, "seeds looks"]],
    accuracy: Mapping[str, Sequence[float]],
    trivial: Mapping[str, float],
) -> Figure:
    """Trained arms: loss, spread of the targets over pictures, and accuracy of the patch probe.

    Args:
        trivial: accuracy of what needs no pretraining, drawn as lines.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5))
    for number, (arm, found) in enumerate(losses.items()):
        colour, steps = COLOURS[number], found.shape[1]
        # Two of the arms lie on each other.
        style = ("-", "-", ":", "-")[number % 4]
        size = max(1, steps // 25)
        pieces = found[:, : steps // size * size].unflatten(1, (-1, size)).mean(2)
        places = (np.arange(pieces.shape[1]) + 0.5) * size
        mean_curve(axes[0], places, pieces.numpy(), colour, arm, style)
        looks = np.linspace(0, steps, spreads[arm].shape[1])
        mean_curve(axes[1], looks, spreads[arm], colour, arm, style)
        mean_point(axes[2], accuracy[arm], number, colour)
    for name, style in zip(trivial, ("-", "--"), strict=False):
        axes[2].axvline(trivial[name], color="black", ls=style, lw=1, label=name)
    axes[0].set(xlabel="training step", ylabel="smooth-L1 loss")
    axes[1].set(
        xlabel="training step", ylabel="spread of the targets over pictures", ylim=(0, None)
    )
    axes[2].set(xlabel="accuracy of the patch probe, %")
    axes[2].set_yticks(range(len(losses)), list(losses))
    axes[2].invert_yaxis()
    axes[0].legend()
    axes[2].legend()
    return figure
