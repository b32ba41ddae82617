"""What is asked of language models with temperatures: how soon they learn, and how widely they read."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reattend.language_modeling.selective_attention import spikiness
from reattend.studies.selective_tasks import at_first
from reattend.trunks.language import Trunk, innermost


def smoothed(
    losses: Float[np.ndarray, "seeds steps"], window: int
) -> Float[np.ndarray, "seeds fewer"]:
    """Means over the last `window` steps, from the first step that has so many."""
    sums = np.cumsum(np.pad(losses.astype(float), ((0, 0), (1, 0))), axis=1)
    return (sums[:, window:] - sums[:, :-window]) / window


def log_step_ratio(
    losses: Float[np.ndarray, "seeds steps"],
    baseline: Float[np.ndarray, "seeds steps"],
    window: int,
) -> Float[np.ndarray, " seeds"]:
    """log of steps that an arm needs over steps that the baseline needs to one loss, seed by seed.

    The loss is what the worse of the two ends with, so that both get there; below zero the arm is faster.
    """
    curves = [smoothed(x, window).T for x in (losses, baseline)]
    level = np.maximum(curves[0][-1], curves[1][-1])
    steps = np.arange(window, losses.shape[1] + 1)[:, None] * np.ones(len(losses))
    mine, theirs = (at_first(curve, level, steps) for curve in curves)
    return np.log(mine / theirs)


@torch.no_grad()
def spikiness_by_place(
    model: Trunk, rows: Int[Tensor, "rows length"]
) -> Float[np.ndarray, "layers length"]:
    """`spikiness` of every place's attention over the tokens that it sees, mean over rows and heads."""
    read: list[Tensor] = []

    def note(_mixer: nn.Module, given: tuple[Tensor, ...]) -> None:
        read.append(given[0])

    mixers = [innermost(block.mixer) for block in model.blocks]
    handles = [mixer.register_forward_pre_hook(note) for mixer in mixers]
    try:
        model(rows)
    finally:
        for handle in handles:
            handle.remove()
    visible = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    found = [
        spikiness(mixer.weights(x), visible).mean((0, 1)).cpu().numpy()
        for mixer, x in zip(mixers, read, strict=True)
    ]
    return np.stack(found)


def dilution(spiky: Float[np.ndarray, "layers length"], first: int = 2) -> float:
    """Least-squares slope of log spikiness on log place, mean over layers, from place `first` on.

    0: rows read the same share of what they see, so attention thins out with the length; -1: as many tokens
    at every length.
    """
    x = np.log(np.arange(first, spiky.shape[1] + 1))
    x = x - x.mean()
    return float((np.log(spiky[:, first - 1 :]) @ x / (x @ x)).mean())
