"""Pictures of studies of embedding models: who reads whom, arms against a reference, slices, hardness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from reattend.plots import BASELINE, COLOURS, REPORTED, mean_curve, mean_point
from reattend.trunks.decoders import decoder_states


def reach(
    model: PreTrainedModel, ids: Int[Tensor, "1 length"], *, causal: bool
) -> Float[Tensor, "length length"]:
    """How strongly each state (row) depends on each input (column): norms of gradients."""
    inputs: list[Tensor] = []

    def note(_module, _arguments, out: Tensor) -> Tensor:
        inputs.append(out.detach().requires_grad_())
        return inputs[-1]

    handle = model.get_input_embeddings().register_forward_hook(note)
    try:
        states = decoder_states(model, ids, torch.ones_like(ids, dtype=torch.bool), causal=causal)[
            0
        ]
    finally:
        handle.remove()
    rows = [torch.autograd.grad(s.norm(), inputs[0], retain_graph=True)[0] for s in states]
    return torch.stack([row[0].norm(dim=-1) for row in rows])


def draw_reach(maps: Mapping[str, Float[Tensor, "length length"]], words: Sequence[str]) -> Figure:
    """One panel a mask: rows are states, columns the inputs that they depend on."""
    fig, axes = plt.subplots(1, len(maps), figsize=(4.2 * len(maps), 3.4))
    for axis, (name, shown) in zip(axes, maps.items(), strict=True):
        axis.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=float(shown.max()))
        axis.set(title=name, xlabel="input", ylabel="state")
        axis.set_xticks(range(len(words)), words, rotation=90)
        axis.set_yticks(range(len(words)), words)
        axis.grid(False)
    return fig


def draw_differences(
    differences: Mapping[str, Sequence[float]],
    negligible: float,
    reported: Mapping[str, float] | None = None,
    unit: str = "nats",
) -> Figure:
    """One row a comparison: every seed, mean and 95 % interval; the band is what would not matter.

    Args:
        reported: the paper's differences in its own unit, on an axis of their own.
    """
    panels = 2 if reported else 1
    size = (5 * panels + 2.5, 0.42 * len(differences) + 1.2)
    fig, axes = plt.subplots(1, panels, figsize=size, sharey=True, squeeze=False)
    axis = axes[0, 0]
    axis.axvspan(-negligible, negligible, color=REPORTED, alpha=0.3, lw=0)
    for place, values in enumerate(differences.values()):
        mean_point(axis, values, place, COLOURS[0])
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(differences)), list(differences))
    axis.invert_yaxis()
    axis.set(xlabel=f"difference in log-likelihood, {unit}", title="ours")
    if reported:
        for place, name in enumerate(differences):
            if name in reported:
                axes[0, 1].plot(reported[name], place, "D", color=REPORTED, mec="black")
        axes[0, 1].axvline(0, color="black", lw=0.8)
        axes[0, 1].set(xlabel="difference in MTEB cmn, points", title="paper")
    return fig


def draw_slices(
    curves: Mapping[str, np.ndarray], dims: Sequence[int], teacher: float, untrained: float
) -> Figure:
    """nDCG of vectors cut to `dims` numbers, by how they were made to bear it.

    Args:
        curves: by way, [seeds, dims].
    """
    fig, axis = plt.subplots(figsize=(7.5, 3.8))
    for (name, values), colour in zip(curves.items(), [*COLOURS[:2], BASELINE], strict=False):
        mean_curve(axis, dims, values, colour, name)
    axis.axhline(untrained, color="black", lw=0.8, ls=":", label="untrained, all numbers")
    axis.set_xscale("log", base=2)
    axis.set_xticks(dims, [str(dim) for dim in dims])
    axis.set(xlabel="numbers kept", ylabel="nDCG@10", title=f"teacher: {teacher:.2f}")
    axis.legend()
    return fig


def draw_hardness(
    probabilities: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray], ranks: np.ndarray
) -> Figure:
    """Histograms of p_i and w_i at start and end, and where mixtures rank among the mined negatives.

    Args:
        probabilities, weights: by moment.
        ranks: [kinds, queries], 0 for a mixture that is closer to the query than all mined negatives.
    """
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for axis, shown, label in zip(axes, (probabilities, weights), ("p", "w"), strict=False):
        for (moment, values), colour in zip(shown.items(), (BASELINE, COLOURS[0]), strict=True):
            axis.hist(values, np.linspace(0, 1, 26), color=colour, alpha=0.5, label=moment)
        axis.set(xlabel=f"${label}_i$", ylabel="queries")
        axis.legend()
    _draw_ranks(axes[2], ranks)
    return fig


def _draw_ranks(axis: Axes, ranks: np.ndarray) -> None:
    bins = np.arange(ranks.max() + 2) - 0.5
    for values, colour, name in zip(ranks, COLOURS, ("pair-wise", "list-wise"), strict=False):
        axis.hist(values, bins, color=colour, alpha=0.5, label=name)
    axis.set(xlabel="mined negatives that are closer", ylabel="mixtures")
    axis.legend()


def draw_readings(scores: Mapping[str, np.ndarray], levels: Mapping[str, float]) -> Figure:
    """nDCG of a decoder by mask and pooling, seed by seed, beside levels without it."""
    fig, axis = plt.subplots(figsize=(7.5, 0.5 * len(scores) + 1.4))
    for place, values in enumerate(scores.values()):
        mean_point(axis, values, place, COLOURS[0] if place == 0 else BASELINE)
    for (name, level), style in zip(levels.items(), (":", "--", "-."), strict=False):
        axis.axvline(level, color="black", lw=0.9, ls=style, label=name)
    axis.set_yticks(range(len(scores)), list(scores))
    axis.invert_yaxis()
    axis.set(xlabel="nDCG@10")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig
