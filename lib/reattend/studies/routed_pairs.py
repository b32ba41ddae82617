"""Bi-level routing on displaced pairs: which regions a trained model reads, and its scores by pattern and region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from reattend.vision.biformer import bra_cost, routed_regions


@torch.no_grad()
def routes(
    model: nn.Module, canvases: UInt8[Tensor, "items channels height width"], side: int, topk: int
) -> list[Int[Tensor, "items regions topk"]]:
    """Regions that each block of a routed model reads, of side x side; on the CPU."""
    inputs: list[Tensor] = []
    mixers = [block.mixer for block in model.blocks]
    hooks = [m.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for m in mixers]
    model(canvases)
    for hook in hooks:
        hook.remove()
    pairs = zip(mixers, inputs, strict=True)
    return [routed_regions(mixer, x, side, topk).cpu() for mixer, x in pairs]


def _points(scores: Sequence[float]) -> dict[str, float]:
    """Scores over seeds, %."""
    ends = {"lowest": min(scores), "highest": max(scores), "seeds": len(scores)}
    return {"accuracy (%)": np.mean(scores)} | ends


def patterns_table(
    scores: Mapping[str, Sequence[float]],
    multiply_adds: Mapping[str, float],
    reported: Mapping[str, float],
) -> pd.DataFrame:
    """Accuracy over seeds and cost of every attention pattern, beside the paper's ImageNet accuracy.

    Args:
        scores: accuracy of each seed, %; "full" reads 64 keys a query, all others 16.
        multiply_adds: of one attention.
        reported: %, of the patterns that the paper has.
    """
    rows = []
    for kind, found in scores.items():
        row = {"attention": kind, "keys per query": 64 if kind == "full" else 16}
        row |= {"multiply-adds of an attention": multiply_adds[kind]} | _points(found)
        row |= {"seeds above 95 %": sum(score > 95 for score in found)}
        rows.append(row | {"ImageNet, reported (%)": reported.get(kind)})
    return pd.DataFrame(rows)


def regions_table(
    scores: Mapping[tuple[int, int], Sequence[float]], width: int, tokens_a_side: int = 8
) -> pd.DataFrame:
    """Accuracy over seeds and cost by size and number of the routed regions.

    Args:
        scores: (regions a side S, regions read k) -> accuracy of each seed, %.
        width: channels of the attention.
    """
    rows = []
    for (side, topk), found in sorted(scores.items()):
        cost = bra_cost(tokens_a_side**2, side, topk, width).attention
        row = {"S": side, "k": topk, "keys per query": topk * (tokens_a_side // side) ** 2}
        rows.append(row | {"multiply-adds": cost} | _points(found))
    return pd.DataFrame(rows)
