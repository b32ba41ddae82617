"""Pictures of modality interference: what is attacked, what each perturbation costs, items with answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_point

MOST_LETTERS = 150  # of a text above a picture; the rest of a paragraph is left out
MODEL_COLOURS = {
    "base": COLOURS[3],
    "control": COLOURS[4],
    "D_VQA": "#949494",
    "clean": BASELINE,
    "D_AUG": COLOURS[2],
    "JS": COLOURS[1],
    "JS released": COLOURS[5],
    "JS swapped": COLOURS[6],
    "ADV": COLOURS[9],
    "noise": COLOURS[8],
    "full": COLOURS[0],
}


def draw_attack(
    changes: Mapping[str, Float[Tensor, "length width"]], words: Mapping[str, Sequence[str]]
) -> Figure:
    """The change of one sequence of each kind: places across, coordinates down; white is untouched.

    Args:
        words: what stands at each place.
    """
    figure, axes = plt.subplots(len(changes), 1, figsize=(11, 2.3 * len(changes)))
    for axis, (kind, change) in zip(axes, changes.items(), strict=True):
        bound = max(float(change.abs().max()), 1e-9)
        axis.imshow(change.T.numpy(), cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
        axis.set_xticks(range(len(words[kind])), words[kind], rotation=90, fontsize=6)
        axis.set(ylabel="coordinate", title=kind.replace("_", "-"))
        axis.grid(False)
    return figure


def _grouped(
    axis: Axes,
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    conditions: Sequence[str],
) -> None:
    """Seeds, mean and interval of every model in every condition, a row a condition."""
    height = 0.8 / len(scores)
    for number, (model, found) in enumerate(scores.items()):
        for row, condition in enumerate(conditions):
            place = row + (number - (len(scores) - 1) / 2) * height
            label = model if row == 0 else None
            mean_point(axis, found[condition], place, MODEL_COLOURS[model], label)
    axis.set_yticks(range(len(conditions)), conditions)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy, per cent")


def draw_conditions(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    reported: Mapping[str, Mapping[str, Sequence[float]]],
    chance: float,
) -> Figure:
    """A panel for each kind of item: accuracy by condition and model; grey crosses: what the paper reports.

    Args:
        panels: kind -> model -> condition -> seeds.
        reported: kind -> condition -> the paper's models without fine-tuning.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.6), width_ratios=[3, 4, 1.6])
    for axis, (kind, scores) in zip(axes, panels.items(), strict=True):
        conditions = list(next(iter(scores.values())))
        _grouped(axis, scores, conditions)
        for row, condition in enumerate(conditions):
            there = reported.get(kind, {}).get(condition, ())
            axis.plot(there, [row + 0.45] * len(there), "x", color=REPORTED, ms=6, mew=2)
        axis.axvline(chance, color="black", lw=0.8, ls=":")
        axis.set(title=kind, xlim=(0, 104))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_ablation(
    scores: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
    reported: Mapping[tuple[str, str], Mapping[str, float]],
) -> Figure:
    """A panel for each measure, a row for each arm: seeds, mean, interval; grey crosses: the paper.

    Args:
        scores: (title, measure with its unit) -> arm -> seeds.
        reported: the same -> arm -> the paper's value.
    """
    figure, axes = plt.subplots(1, len(scores), figsize=(4 * len(scores), 4.4), sharey=True)
    for axis, (measure, found) in zip(axes, scores.items(), strict=True):
        for row, (arm, points) in enumerate(found.items()):
            mean_point(axis, points, row, MODEL_COLOURS[arm])
            if arm in reported.get(measure, {}):
                axis.plot(reported[measure][arm], row + 0.3, "x", color=REPORTED, ms=6, mew=2)
        axis.set_yticks(range(len(found)), list(found))
        axis.set(title=measure[0], xlabel=measure[1])
    axes[0].invert_yaxis()
    return figure


def draw_losses(losses: Mapping[str, Float[Tensor, "seeds steps"]], window: int) -> Figure:
    """Loss of the bases by step, every seed, smoothed over a window."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for name, found in losses.items():
        kernel = np.ones(window) / window
        for seed, row in enumerate(found.numpy()):
            smooth = np.convolve(row, kernel, mode="valid")
            label = name if seed == 0 else None
            axis.plot(smooth, color=MODEL_COLOURS[name], lw=1, alpha=0.8, label=label)
    axis.set(xlabel="step", ylabel="answers' loss, nats")
    axis.legend()
    return figure


def draw_items(
    rows: Sequence[Sequence[tuple[Tensor, str, Mapping[str, tuple[str, bool]]]]],
    titles: Sequence[str],
) -> Figure:
    """Items as rows, conditions as columns: the picture, the text (shortened), and what models answered.

    Args:
        rows: for each item its conditions as (pixels, text, model -> (answer, whether right)).
        titles: of the rows.
    """
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, figsize=(2.3 * columns, 3.9 * len(rows)))
    for row, title, line in zip(rows, titles, axes, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (pixels, text, answered) in zip(line, row, strict=False):
            axis.imshow(pixels.movedim(0, -1).numpy(), interpolation="nearest")
            sides = (0, 0), 1, 1
            axis.add_patch(Rectangle(*sides, transform=axis.transAxes, fill=False, ec=REPORTED))
            whole = textwrap.shorten(text, MOST_LETTERS, placeholder=" ...")
            wrapped = "\n".join(textwrap.wrap(whole, 36))
            axis.set_title(wrapped, fontsize=7, fontweight="normal", loc="left")
            for number, (model, (answer, right)) in enumerate(answered.items()):
                axis.text(
                    0,
                    -0.03 - 0.1 * number,
                    f"{model}: {answer}",
                    transform=axis.transAxes,
                    va="top",
                    fontsize=8,
                    color=COLOURS[2] if right else COLOURS[3],
                    fontweight="bold",
                )
        line[0].text(
            -0.08, 0.5, title, rotation=90, transform=line[0].transAxes, va="center", ha="right"
        )
    return figure
