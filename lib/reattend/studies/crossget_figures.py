"""Pictures of merged tokens: which pairs a matching chooses, what is left, what it costs in recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point
from reattend.vision_language.crossget import Merging

ARM_COLOURS = {
    "dense": BASELINE,
    "random pairs": "#949494",
    "ToMe": COLOURS[1],
    "CGSM": COLOURS[2],
    "CrossGET": COLOURS[0],
    "own guide": COLOURS[4],
    "shuffled": COLOURS[3],
    "half as many": COLOURS[0],
    "text": COLOURS[0],
    "both": COLOURS[0],
}
MATCHER_COLOURS = {
    "CGSM": COLOURS[0],
    "BSM": COLOURS[1],
    "random order": COLOURS[3],
    "random pairs": "#949494",
    "greedy": COLOURS[2],
}


def _picture(axis: Axes, pixels: Tensor, title: str = "") -> None:
    axis.imshow(pixels.movedim(0, -1).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.axis("off")


def _centres(places: Int[Tensor, " r"], grid: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (x, y) of the middles of patches; the token before the first patch is [CLS]."""
    patch = size / grid
    rows, columns = np.divmod(places.numpy() - 1, grid)
    return (columns + 0.5) * patch - 0.5, (rows + 0.5) * patch - 0.5


def draw_matching(
    pixels: Tensor,
    similarity: Float[Tensor, "length length"],
    ranks: Int[Tensor, " length"],
    mergings: Mapping[str, Merging],
) -> Figure:
    """What a token may see on the complete graph, and on the picture the pairs that matchings merge.

    Left: cosines with tokens in the order of their ranks; what a token does not see is white. Then a picture
    for each matching, with a line from each source to its destination (a point).
    """
    figure, axes = plt.subplots(1, 1 + len(mergings), figsize=(3.6 * (1 + len(mergings)), 4.2))
    order = ranks.argsort()
    ranked = similarity[order][:, order].clone()
    hidden = np.tril(np.ones(ranked.shape, dtype=bool)) | ~np.isfinite(ranked.numpy())
    shown = axes[0].imshow(np.ma.masked_array(ranked.numpy(), hidden), cmap="viridis")
    axes[0].set(xlabel="token, by rank", ylabel="token, by rank", title="what each token sees")
    axes[0].grid(False)
    figure.colorbar(shown, ax=axes[0], shrink=0.8, label="cosine of keys")
    size, grid = pixels.shape[-1], round((len(similarity) - 1) ** 0.5)
    for axis, (name, merging) in zip(axes[1:], mergings.items(), strict=True):
        _picture(axis, pixels, name)
        starts = _centres(merging.sources[0], grid, size)
        ends = _centres(merging.destinations[0], grid, size)
        for x0, y0, x1, y1 in zip(*starts, *ends, strict=True):
            axis.plot([x0, x1], [y0, y1], color="#ff2d2d", lw=1.6)
        axis.plot(*ends, "o", color="white", mec="#ff2d2d", ms=5)
    return figure


def draw_merged(
    pixels: Tensor,
    importances: Sequence[Float[Tensor, "pictures patches"]],
    groups: Int[Tensor, "pictures length"],
    captions: Sequence[str],
) -> Figure:
    """A column a picture: the picture, importance in the first and last block, the tokens that are left.

    Patches that have become one token share a colour; white marks say how many colours there are.

    Args:
        importances: of the patches in blocks to show; NaN where a patch has been merged away.
        groups: final token of [CLS] and every patch.
    """
    rows, columns = 2 + len(importances), len(pixels)
    figure, axes = plt.subplots(rows, columns, figsize=(1.55 * columns, 1.6 * rows))
    palette = plt.get_cmap("tab10")
    grid = round(importances[0].shape[1] ** 0.5)
    for column in range(columns):
        _picture(axes[0, column], pixels[column], captions[column])
        for row, importance in enumerate(importances, start=1):
            values = importance[column].view(grid, grid)
            axes[row, column].imshow(values, cmap="magma")
        own = groups[column]
        names = {token: number for number, token in enumerate(sorted(set(own[1:].tolist())))}
        numbers = np.array([names[token] for token in own[1:].tolist()]).reshape(grid, grid)
        axes[-1, column].imshow(palette(numbers % 10))
        for axis in axes[1:, column]:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
    return figure


def draw_qualities(
    found: Mapping[str, Mapping[int, Mapping[str, Float[Tensor, " pictures"]]]],
) -> Figure:
    """Similarity of merged pairs and error of [CLS] by matching, a panel for each r of the second.

    Similarities are shown as one minus the cosine, on a logarithmic axis; points are pictures.
    """
    rs = list(next(iter(found.values())))
    figure, axes = plt.subplots(2, len(rs), figsize=(5.2 * len(rs), 5.0), sharey=True)
    for column, r in enumerate(rs):
        for place, (name, cells) in enumerate(found.items()):
            away = 1 - cells[r]["similarity"].numpy()
            mean_point(axes[0, column], away, place, MATCHER_COLOURS[name])
            mean_point(axes[1, column], cells[r]["error"].numpy(), place, MATCHER_COLOURS[name])
        for axis in axes[:, column]:
            axis.set_yticks(range(len(found)), list(found))
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axes[0, column].set(title=f"r = {r} in every block", xlabel="1 - cosine of merged keys")
        axes[1, column].set(xlabel="relative error of [CLS]")
    axes[0, 0].invert_yaxis()
    return figure


def draw_arms(scores: Mapping[str, Mapping[str, Sequence[float]]], zero: str) -> Figure:
    """A panel a measure: what every arm has more than `zero`, seeds with mean and interval."""
    figure, axes = plt.subplots(1, len(scores), figsize=(5.2 * len(scores), 3.4), sharey=True)
    for axis, (measure, arms) in zip(np.atleast_1d(axes), scores.items(), strict=True):
        shown = {arm: values for arm, values in arms.items() if arm != zero}
        for place, (arm, values) in enumerate(shown.items()):
            base = np.asarray(arms[zero])[: len(values)]
            mean_point(axis, np.asarray(values) - base, place, ARM_COLOURS[arm])
        axis.axvline(0, color=BASELINE, lw=1)
        axis.set_yticks(range(len(shown)), list(shown))
        axis.set(xlabel=f"{measure} minus that of {zero}")
    np.atleast_1d(axes)[0].invert_yaxis()
    return figure


def draw_costs(
    tuned: Mapping[str, tuple[float, Sequence[float]]],
    plain: Mapping[str, tuple[Sequence[float], Float[np.ndarray, "seeds places"]]],
    reported: Mapping[str, tuple[float, float]],
) -> Figure:
    """Change of mean R@1 against the share of the dense multiply-adds, with and without fine-tuning.

    Fine-tuned arms of equal cost stand a little apart, in the legend's order; variants of CrossGET at other
    costs, and the paper's rows, are named beside their marks. Each panel has its own scale.

    Args:
        tuned: arm -> share of the cost and a change a seed, against the dense model fine-tuned alike.
        plain: matching -> shares of the cost and changes without fine-tuning, against the dense model before it.
        reported: the paper's rows: share of its cost, change against its dense model.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2))
    for name, (shares, values) in plain.items():
        means = values.mean(0)
        axes[0].plot(shares, means, "o-", color=ARM_COLOURS[name], label=name, ms=3)
        for row in values:
            axes[0].plot(shares, row, ".", color=ARM_COLOURS[name], alpha=0.35, ms=4)
    for number, (name, (share, values)) in enumerate(tuned.items()):
        variant = name != "CrossGET" and ARM_COLOURS[name] == ARM_COLOURS["CrossGET"]
        colour, place = ARM_COLOURS[name], share if variant else share + 0.012 * number
        label = None if variant else name
        axes[1].plot([place] * len(values), values, ".", color=colour, alpha=0.4)
        axes[1].plot(place, np.mean(values), "D", color=colour, ms=6, label=label)
        if variant:
            _name(axes[1], name, place, float(np.mean(values)), colour, -6.0)
    for name, (share, change) in reported.items():
        axes[1].plot(share, change, "x", color=REPORTED, ms=8, mew=2)
        _name(axes[1], f"paper: {name}", share, change, "0.4", 6.0)
    for axis, title in zip(axes, ("without fine-tuning", "fine-tuned"), strict=True):
        axis.axhline(0, color=BASELINE, lw=1)
        axis.set(xlabel="multiply-adds, share of the dense model", title=title)
    axes[0].legend(loc="lower right")
    axes[1].legend(loc="lower center")
    axes[0].set(ylabel="mean R@1 minus dense, points")
    axes[1].margins(x=0.2)
    return figure


def _name(axis: Axes, text: str, x: float, y: float, colour: str, up: float) -> None:
    """A name beside a mark: right of it between the crowd at half of the cost and the right edge, else left."""
    right = 0.55 < x < 0.9
    axis.annotate(text, (x, y), xytext=(8 if right else -8, up), textcoords="offset points",
                  ha="left" if right else "right", va="center", fontsize=8, color=colour)  # fmt: skip
