"""Figures of in-context regression: circuits, risks, paths of two heads, and where they lead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from reattend.plots import BASELINE, COLOURS, REPORTED
from reattend.studies.in_context import FlowFit
from reattend.theory.icl_regression import last_entries, mean_diagonal


def heat(axis: Axes, image: Float[Tensor, "rows columns"], limit: float, hidden: int = 0) -> None:
    """One circuit, red positive and blue negative; the last `hidden` columns never act and are grey."""
    image = image.clone()
    if hidden:
        image[:, -hidden:] = math.nan
    axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_facecolor("0.8")
    axis.set(xticks=[], yticks=[])
    axis.grid(False)


def draw_circuits(
    models: Sequence[
        tuple[Float[Tensor, "_heads width width"], Float[Tensor, "_heads tasks width"]]
    ],
    titles: Sequence[Sequence[str]],
    tasks: int = 1,
    most: int = 8,
) -> Figure:
    """KQ above OV of every head of some models, as many models in a row as `most` heads allow.

    Args:
        models: KQ and OV of each; one scale for each model.
        titles: of every head of every model.
    """
    rows: list[list[int]] = [[]]
    for number, (kq, _) in enumerate(models):
        if sum(len(models[n][0]) for n in rows[-1]) + len(kq) > most:
            rows.append([])
        rows[-1].append(number)
    width = models[0][0].shape[-1]
    fig, axes = plt.subplots(
        2 * len(rows),
        most,
        figsize=(10, 2.1 * len(rows)),
        height_ratios=[width, tasks] * len(rows),
        squeeze=False,
    )
    for row, members in enumerate(rows):
        place = 0
        for number in members:
            kq, ov = models[number]
            for head in range(len(kq)):
                above, below = axes[2 * row : 2 * row + 2, place]
                heat(above, kq[head], float(kq[..., :-tasks].abs().max()), hidden=tasks)
                heat(below, ov[head], float(ov.abs().max()))
                above.set_title(titles[number][head], fontsize=8)
                place += 1
        for axis in axes[2 * row : 2 * row + 2, place:].flat:
            axis.axis("off")
        axes[2 * row, 0].set_ylabel("KQ")
        axes[2 * row + 1, 0].set_ylabel("OV")
    return fig


def draw_risk(
    risks: Mapping[str, Float[np.ndarray, " seeds"]],
    trained: Sequence[str],
    references: Mapping[str, Mapping[str, float]],
) -> Figure:
    """One row a predictor: its risk for every seed, the mean, and what was expected of it.

    Args:
        trained: predictors that were trained, in the first colour.
        references: label -> predictor -> risk, drawn as grey marks.
    """
    fig, axis = plt.subplots(figsize=(9, 0.42 * len(risks) + 1.2))
    marks = dict(zip(references, ("D", "|"), strict=False))
    for place, (name, values) in enumerate(risks.items()):
        colour = COLOURS[0] if name in trained else COLOURS[1]
        heights = place + np.linspace(-0.25, 0.25, len(values))
        axis.plot(values, heights, "o", color=colour, ms=3.5, alpha=0.55)
        axis.plot([values.mean()] * 2, [place - 0.36, place + 0.36], color="black", lw=1.6)
        for label, expected in references.items():
            if name in expected:
                style = {"mfc": "none", "mew": 1.6} if marks[label] == "D" else {"mew": 2.2}
                axis.plot(expected[name], place, marks[label], color="0.45", ms=10, **style)
    for label, mark in marks.items():
        axis.plot([], [], mark, color="0.45", ms=8, mfc="none", mew=1.6, ls="", label=label)
    axis.plot([], [], color="black", lw=1.6, label="mean over seeds")
    axis.set_yticks(range(len(risks)), list(risks))
    axis.invert_yaxis()
    axis.set(xlabel="risk, mean squared error", xlim=(0, None))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def draw_paths(
    steps: np.ndarray,
    paths: Mapping[str, Float[np.ndarray, "snapshots seeds 2"]],
    split: Bool[np.ndarray, " seeds"],
    reported: Sequence[tuple[float, float]],
) -> Figure:
    """omega and mu of two heads over the training, and against each other.

    Starts that split: median and middle four fifths of each head, the one that ends positive in blue.
    The others are dashed lines.

    Args:
        reported: (omega, mu) of the heads in the paper's plots.
    """
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.9))
    first = paths["mu"][-1].argmax(-1)[None, :, None]  # the head that ends highest
    ordered = {
        name: np.concatenate([np.take_along_axis(x, h, 2) for h in (first, 1 - first)], 2)
        for name, x in paths.items()
    }
    for axis, (name, symbol) in zip(axes, (("omega", "ω"), ("mu", "μ")), strict=False):
        for head, colour in ((0, COLOURS[0]), (1, COLOURS[3])):
            values = ordered[name][:, :, head]
            axis.plot(steps, values[:, ~split], "--", color=colour, lw=0.8, alpha=0.5)
            if split.any():
                low, middle, high = np.percentile(values[:, split], (10, 50, 90), axis=1)
                axis.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)
                axis.plot(steps, middle, color=colour, lw=2)
        if split.any():
            total = np.median(paths[name][:, split].sum(-1), axis=1)
            axis.plot(steps, total, color="0.3", lw=1.2, label=f"sum of both {symbol}, median")
        axis.set_xscale("symlog", linthresh=10 * (steps[1] - steps[0]))
        axis.set(xlabel="training step (linear, then logarithmic)", ylabel=symbol)
        axis.legend(loc="upper left")
    for seed in np.flatnonzero(split):
        for head, colour in ((0, COLOURS[0]), (1, COLOURS[3])):
            omega, mu = (ordered[name][:, seed, head] for name in ("omega", "mu"))
            axes[2].plot(omega, mu, color=colour, lw=0.8, alpha=0.45)
            axes[2].plot(omega[-1], mu[-1], ".", color="black", ms=4)
    for number, (omega, mu) in enumerate(reported):
        label = None if number else "the paper's plots, 500,000 steps"
        axes[2].plot(omega, mu, "*", color="0.4", ms=12, label=label)
    axes[2].plot([], [], ".", color="black", label="end of our training")
    axes[2].set(xlabel="ω", ylabel="μ", title="starts that split", ylim=(-5.5, 5.5))
    axes[2].legend(loc="upper left")
    return fig


def draw_flows(
    time: np.ndarray,
    omega: Float[np.ndarray, "snapshots seeds 2"],
    flows: Sequence[FlowFit],
    split: Bool[np.ndarray, " seeds"],
    bounds: tuple[float, float],
) -> Figure:
    """Three starts beside their fitted gradient flow (best, median, worst), and the fit of all.

    Args:
        time: sum of the learning rates at every snapshot.
        split: starts whose heads end with opposite signs; only these are drawn where there are any.
        bounds: R^2 from which on the claim holds, and below which it fails.
    """
    shown = np.flatnonzero(split) if split.any() else np.arange(len(flows))
    ranked = shown[np.argsort([-flows[seed].quality for seed in shown])]
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    fig, axes = plt.subplots(1, 4, figsize=(11.5, 3.4), width_ratios=[1, 1, 1, 0.7])
    for axis, (title, seed) in zip(axes, chosen.items(), strict=False):
        fit = flows[seed]
        axis.plot(time, omega[:, seed], color=COLOURS[0], lw=1.6)
        axis.plot(time[fit.start :], fit.omega, color=COLOURS[1], lw=1.6, ls="--")
        axis.set_title(f"{title}: start {seed}, R² {fit.quality:.2f}")
        axis.set_xscale("symlog", linthresh=1)
        axis.set(xlabel="sum of learning rates", ylim=(-0.75, 0.75))
    axes[0].set_ylabel("ω")
    axes[0].plot([], [], color=COLOURS[0], label="trained")
    axes[0].plot([], [], color=COLOURS[1], ls="--", label="gradient flow")
    axes[0].legend(loc="lower right")
    qualities = [flows[seed].quality for seed in shown]
    axes[3].plot(np.linspace(-0.3, 0.3, len(shown)), qualities, "o", color=COLOURS[0], alpha=0.6)
    axes[3].plot(0, np.mean(qualities), "_", color="black", ms=40, mew=2)
    for bound, label in zip(bounds, ("reproduced from", "not below"), strict=True):
        axes[3].axhline(bound, color=BASELINE, ls=":")
        axes[3].text(0.5, bound, label, fontsize=8, ha="right", va="bottom")
    axes[3].set(ylabel="R² of every start", xticks=[], xlim=(-0.5, 0.5))
    axes[3].set_ylim(min(0, *qualities) - 0.05, 1)
    return fig


def draw_lengths(
    lengths: Sequence[int],
    risks: Mapping[str, Float[np.ndarray, "lengths seeds"]],
    trained: int,
) -> Figure:
    """Risk against the length of the context: mean and every seed; `trained` is the length of training."""
    fig, axis = plt.subplots(figsize=(8, 4.2))
    for number, (name, curve) in enumerate(risks.items()):
        width = 5 if number == 0 else 1.6
        axis.plot(lengths, curve.mean(1), "-", color=COLOURS[number], lw=width, label=name)
        axis.plot(lengths, curve, "o", color=COLOURS[number], ms=3, alpha=0.5)
    axis.axvline(trained, color=BASELINE, lw=1, ls=":")
    axis.set(xlabel="context length in the test (dotted: in training)", ylabel="risk")
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def draw_preconditioners(
    circuits: Mapping[str, Float[Tensor, "width width"]],
    inverse: Mapping[str, Tensor],
    steps: Mapping[str, Float[Tensor, "seeds width width"]],
    best: Mapping[str, Tensor],
    split: Bool[np.ndarray, " seeds"],
) -> Figure:
    """One head's KQ for each covariance, and the step that two heads add up to in its eigenbasis.

    Args:
        circuits: covariance -> KQ of one head.
        inverse, best: 1 / eigenvalues, and the best preconditioner's eigenvalues.
        steps: sum of mu_h KQ_h in the eigenbasis.
        split: starts whose heads take opposite signs; the others are drawn as crosses.
    """
    fig, axes = plt.subplots(1, 4, figsize=(11, 3.3), width_ratios=[1, 1, 1.3, 1.3])
    for column, (name, kq) in enumerate(circuits.items()):
        heat(axes[column], kq, float(kq[:, :-1].abs().max()), hidden=1)
        axes[column].set_title(f"KQ, {name}", fontsize=9)
        axis, dim = axes[2 + column], len(inverse[name])
        for good, gamma in zip(split, steps[name], strict=True):
            mark = "o" if good else "x"
            axis.plot(inverse[name], gamma.diagonal()[:dim], mark, color=COLOURS[0], alpha=0.5)
        axis.plot(inverse[name], best[name], "--", color=COLOURS[1], label="best preconditioner")
        axis.set(xlabel="1 / eigenvalue of the covariance", title=name, ylim=(0, None))
    axes[2].plot([], [], "x", color=COLOURS[0], label="heads of one sign")
    axes[2].set_ylabel("diagonal of the step in the eigenbasis")
    axes[2].legend(fontsize=8)
    return fig


def draw_kernels(products: Tensor, omegas: Sequence[float], pair: tuple[float, float]) -> Figure:
    """Weights that a reduced head gives to the examples of one context, and what two heads leave.

    Args:
        products: x_l . x_q of every example.
        omegas: of single heads.
        pair: omega and mu of a pair with opposite signs.
    """
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
    order = products.argsort()
    for number, omega in enumerate(omegas):
        weights = (omega * products).softmax(-1)[order]
        axes[0].plot(
            products[order], weights, "o-", ms=3, color=COLOURS[number], label=f"ω = {omega:g}"
        )
    axes[0].axhline(1 / len(products), color=BASELINE, ls=":", label="1 / L")
    axes[0].set(
        xlabel="product of example and query", ylabel="weight of the example", title="one head"
    )
    axes[0].legend()
    omega, mu = pair
    both = mu * ((omega * products).softmax(-1) - (-omega * products).softmax(-1))[order]
    step = 2 * mu * omega / len(products) * (products - products.mean())[order]
    axes[1].plot(products[order], both, "o", ms=4, color=COLOURS[0], label=f"heads of ±{omega:g}")
    axes[1].plot(
        products[order], step, color=REPORTED, lw=2, label="debiased gradient step", zorder=0
    )
    axes[1].set(xlabel="product of example and query", title="two heads: factor of each label")
    axes[1].legend()
    return fig


def head_titles(heads: int, **numbers: Tensor) -> list[str]:
    """Two lines for each head: how many there are, and its numbers (one a head) by symbol."""
    columns = [[f"{symbol} {value:+.2f}" for value in values] for symbol, values in numbers.items()]
    return [f"H = {heads}\n" + ", ".join(parts) for parts in zip(*columns, strict=True)]


def draw_by_size(
    kq: Float[Tensor, "heads width width"],
    ov: Float[Tensor, "heads 1 width"],
    models: Mapping[int, slice],
    dim: int,
) -> Figure:
    """The circuits of models with different numbers of heads, sorted by omega, with omega and mu as titles.

    Args:
        models: number of heads -> where they lie.
        dim: covariates of the task.
    """
    shown, titles = [], []
    for heads, own in models.items():
        omega = mean_diagonal(kq[own], dim)
        order = omega.argsort()
        shown.append((kq[own][order], ov[own][order]))
        mu = last_entries(ov[own])[..., 0]
        titles.append(head_titles(heads, ω=omega[order], μ=mu[order]))
    return draw_circuits(shown, titles)
