"""Figures of maps: galleries of pictures, and deletion curves beside paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS
from reattend.studies.relevance import OUTCOMES
from reattend.vision.salient_relevance import top_area

# Colour and dashes of each map.
LINES = {
    "SR": (COLOURS[0], "-"), "LRP": (COLOURS[1], "-"), "blur": (COLOURS[1], "--"),
    "SR, z+": (COLOURS[9], "-"), "LRP, z+": (COLOURS[2], "-"), "blur, z+": (COLOURS[2], "--"),
    "image saliency": (COLOURS[3], "-"), "Grad-CAM": (COLOURS[4], "-"), "gradient x input": (COLOURS[5], "-"),
    "random": (BASELINE, ":"), "object in use": ("black", ":"),
}  # fmt: skip


Panel = tuple[str, Tensor, Tensor | None]
"""Title, picture (colours [3, h, w] or a map [h, w]), and the map whose level 0.5 is outlined, if any."""


def map_rows(
    leading: Sequence[Sequence[Panel]],
    maps: Mapping[str, Tensor],
    columns: Sequence[str],
    outlined: float = 0.0,
) -> list[list[Panel]]:
    """Rows of a `gallery`: the leading panels of each picture, then its maps.

    Args:
        maps: by name, [pictures, h, w].
        columns: names of the maps that are drawn.
        outlined: brightest share of a map that is outlined; 0: none.
    """

    def outline(drawn: Tensor) -> Tensor | None:
        return top_area(drawn[None], outlined)[0] if outlined else None

    return [
        [*first, *((name, maps[name][number], outline(maps[name][number])) for name in columns)]
        for number, first in enumerate(leading)
    ]


def outcome_row(
    title: str,
    picture: Tensor,
    guesses: Mapping[str, str],
    maps: Mapping[str, Mapping[str, Tensor]],
    outline: Tensor,
) -> list[Panel]:
    """A row of a `gallery`: a scene, and LRP and SR of each network for the class that it guesses.

    Args:
        guesses: network -> name of the class.
        maps: network -> map -> [scenes, h, w]; the first scene is drawn.
        outline: drawn on every map, [h, w].
    """
    row: list[Panel] = [(title, picture, None)]
    for name, guess in guesses.items():
        row += [(f"{m} of {name}:\n{guess}", maps[name][m][0], outline) for m in ("LRP", "SR")]
    return row


def gallery(rows: Sequence[Sequence[Panel]], panel: float = 0.88) -> Figure:
    """Rows of pictures; `panel` is the side of one in inches."""
    title_lines = 1 + max(title.count("\n") for title, *_ in chain(*rows))
    size = (panel * len(rows[0]), (panel + 0.12 * title_lines) * len(rows))
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size)
    for axis, (title, picture, outline) in zip(axes.flat, chain(*rows), strict=True):
        axis.imshow(picture.movedim(0, -1) if picture.ndim == 3 else picture, cmap="inferno")
        if outline is not None:
            axis.contour(outline.float(), [0.5], colors="white", linewidths=0.5)
        axis.set_title(title, fontsize=7)
        axis.axis("off")
    return figure


def draw_curves(axis: Axes, curves: Mapping[str, np.ndarray], shares: Sequence[float]) -> None:
    """Deletion curves of maps, [shares, pictures] each, as means with 95 % intervals over pictures."""
    for name, curve in curves.items():
        colour, dashes = LINES[name]
        ends = [mean(row) for row in curve]
        centre, low, high = ([getattr(e, part) for e in ends] for part in ("effect", "low", "high"))
        face = "white" if dashes == "--" else colour  # a blur has the colour of its LRP
        axis.plot(shares, centre, dashes, color=colour, marker="o", mfc=face, ms=4, label=name)
        axis.fill_between(shares, low, high, color=colour, alpha=0.08)
    axis.set(xlabel="share of the regions blanked", ylabel="probability of the predicted class")
    axis.set_ylim(0, None)
    axis.legend(fontsize=7, ncols=2, handlelength=4)


def draw_differences(
    axis: Axes, areas: Mapping[str, np.ndarray], ours: Sequence[str], others: Sequence[str]
) -> None:
    """Area under the deletion curve of each of our maps minus that of other maps, paired by picture."""
    for number, name in enumerate(ours):
        gaps = [mean(areas[name] - areas[other]) for other in others]
        centre = np.array([gap.effect for gap in gaps])
        ends = np.abs(np.array([[gap.low, gap.high] for gap in gaps]).T - centre)
        places = np.arange(len(others)) + 0.24 * number - 0.12
        axis.errorbar(centre, places, xerr=ends, fmt="o", ms=4, color=LINES[name][0], label=name)
    axis.axvline(0, color=BASELINE, lw=0.8)
    axis.set_yticks(np.arange(len(others)), others)
    axis.invert_yaxis()
    axis.set_xlabel("deletion AUC of SR minus that of the map (95 %)")
    axis.legend(fontsize=7)


def draw_deletion(
    curves: Mapping[str, np.ndarray],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    shares: Sequence[float],
) -> Figure:
    """Deletion curves, and areas under those of SR minus those of every other map.

    Args:
        curves: by map, [shares, pictures]; those of `LINES` are drawn.
        scores: map -> measure -> pictures; maps without "deletion" are left out.
    """
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[1.2, 1])
    draw_curves(axes[0], {name: curves[name] for name in LINES}, shares)
    areas = {name: found["deletion"] for name, found in scores.items() if "deletion" in found}
    others = [name for name in areas if not name.startswith("SR")]
    draw_differences(axes[1], areas, ["SR", "SR, z+"], others)
    return fig


def draw_outcomes(gaps: Mapping[tuple[str, str], np.ndarray]) -> Figure:
    """Share of SR and of LRP inside the object, network B minus network A, by which network is right.

    Args:
        gaps: (map, outcome) -> [trainings, 4], the difference last.
    """
    fig, axis = plt.subplots(figsize=(7, 2.8))
    for place, name in enumerate(("SR", "LRP")):
        points = {f"right: {kind}": gaps[name, kind][:, 3] for kind in OUTCOMES}
        draw_groups(axis, points, LINES[name][0], 0.3 * place - 0.25, name)
    axis.set_xlabel(
        "share of the map inside the object, B minus A (points; dots: trainings, 95 % interval)"
    )
    axis.legend()
    return fig


def draw_groups(
    axis: Axes,
    points: Mapping[str, np.ndarray],
    colour: str = COLOURS[0],
    shift: float = 0.0,
    label: str = "",
) -> None:
    """One row a group, from the top: every training as a dot, their mean and 95 % interval beside it."""
    for place, values in enumerate(points.values()):
        found = mean(values)
        axis.plot(values, np.full(len(values), place + shift), ".", color=colour, alpha=0.5)
        ends = [[found.effect - found.low], [found.high - found.effect]]
        told = label if place == 0 else None
        axis.errorbar(
            found.effect, place + shift + 0.12, xerr=ends, fmt="D", ms=4, color=colour, label=told
        )
    axis.axvline(0, color=BASELINE, lw=0.8)
    axis.set_yticks(range(len(points)), list(points))
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
