"""House style of the figures: importing this module sets it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.rcsetup import cycler
from PIL import Image

from reattend.evidence.intervals import mean

DPI = 110
MAX_BYTES = 150_000

# Seaborn's colour-blind safe palette. The first colour is the paper's method.
COLOURS = [
    "#0173b2",
    "#de8f05",
    "#029e73",
    "#d55e00",
    "#cc78bc",
    "#ca9161",
    "#fbafe4",
    "#949494",
    "#ece133",
    "#56b4e9",
]
BASELINE = "#6b6b6b"  # the dense or plain baseline
REPORTED = "#b0b0b0"  # the paper's own numbers

# Matplotlib's own copy of seaborn's style: importing seaborn would cost every notebook a second.
plt.style.use("seaborn-v0_8-whitegrid")
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=COLOURS),
        "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own, not the first that a system has
        "figure.figsize": (8, 4.5),
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "axes.labelsize": "small",
        "xtick.labelsize": "small",
        "ytick.labelsize": "small",
        "legend.fontsize": "small",
        "legend.frameon": False,
        "grid.linewidth": 0.6,
        "figure.constrained_layout.use": True,
    }
)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the same bytes for the same picture, and close it.

    A picture over 150 kB (photographs) is reduced to 256 colours.

    Raises:
        ValueError: when it is too large even then; draw less or smaller.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    data = buffer.getvalue()
    if len(data) > MAX_BYTES:
        reduced = io.BytesIO()
        with Image.open(buffer) as picture:
            picture.convert("RGB").quantize(256).save(reduced, format="png", optimize=True)
        data = reduced.getvalue()
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"figure {path.name} takes {len(data) // 1000} kB, more than {MAX_BYTES // 1000} kB"
        )
    path.write_bytes(data)


def arm_points(
    axis: Axes, scores: Mapping[str, Sequence[float]], colours: Mapping[str, str] | None = None
) -> None:
    """One row an arm, from the top: every seed as a point, their mean as a bar.

    Args:
        scores: arm -> its points.
        colours: of arms that are not drawn in the first colour.
    """
    for place, (name, points) in enumerate(scores.items()):
        colour = (colours or {}).get(name, COLOURS[0])
        axis.plot(points, [place] * len(points), "o", color=colour, ms=4, alpha=0.6)
        axis.plot(sum(points) / len(points), place, "|", color="black", ms=14)
    axis.set_yticks(range(len(scores)), list(scores))
    axis.invert_yaxis()


def mean_point(
    axis: Axes,
    points: Sequence[float] | np.ndarray,
    place: float,
    colour: str,
    label: str | None = None,
) -> None:
    """Points in a row at height `place`, their mean as a diamond, from three points on its 95 % interval."""
    values = np.asarray(points, dtype=float)
    axis.plot(values, np.full(len(values), place), "o", color=colour, ms=3, alpha=0.4)
    found = mean(values)
    if np.isfinite(found.low):
        axis.plot([found.low, found.high], [place, place], color=colour, lw=2)
    axis.plot(found.effect, place, "D", color=colour, mec="black", mew=0.6, ms=5, label=label)


def mean_curve(
    axis: Axes,
    places: Sequence[float],
    values: np.ndarray,
    colour: str,
    label: str | None = None,
    style: str = "-",
) -> None:
    """Mean over seeds against `places`, with the 95 % interval of each mean as a band and seeds as points.

    Args:
        values: [seeds, places].
        style: of the line.
    """
    found = [mean(column) for column in np.asarray(values, dtype=float).T]
    axis.plot(places, [f.effect for f in found], style, color=colour, lw=1.8, label=label)
    low, high = [f.low for f in found], [f.high for f in found]
    axis.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)
    axis.plot(places, np.asarray(values).T, "o", color=colour, ms=2.5, alpha=0.4)


def number_grid(axis: Axes, values: np.ndarray, rows: Sequence, columns: Sequence) -> None:
    """A matrix of positive numbers as shades of their logarithms, with the numbers in it."""
    logs = np.log(values)
    axis.imshow(logs, cmap="Blues", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        dark = logs[i, j] - logs.min() > 0.6 * np.ptp(logs)
        colour = "white" if dark else "black"
        axis.text(j, i, f"{value:.2g}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(len(columns)), [str(column) for column in columns])
    axis.set_yticks(range(len(rows)), [str(row) for row in rows])
    axis.grid(False)


def show_regions(
    axis: Axes, picture: np.ndarray, seen: Iterable[int], query: int, side: int, title: str = ""
) -> None:
    """A picture in side x side regions: the query's framed red, those it sees bright with orange frames.

    Args:
        picture: bytes, [channels, size, size], of 1 or 3 channels.
        seen: numbers of regions, row by row.
    """
    channels, size = np.shape(picture)[:2]
    cell = size // side
    bright = np.full(side**2, 0.4)
    bright[list(seen)] = 1.0
    bright = bright.reshape(side, side).repeat(cell, 0).repeat(cell, 1)
    shown = np.moveaxis(np.asarray(picture) / 255 * bright, 0, -1)
    axis.imshow(shown.repeat(3 // channels, -1))
    frames = [(region, COLOURS[1], 1) for region in seen] + [(query, "red", 2)]
    for region, colour, line in frames:
        row, column = divmod(int(region), side)
        corner = (column * cell - 0.5, row * cell - 0.5)
        axis.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=colour, linewidth=line))
    axis.set_title(title, fontsize=9)
    axis.axis("off")
