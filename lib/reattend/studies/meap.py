"""What is asked of models trained with and without masked inputs: needles, a learned table, attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reattend.language_modeling.meap import mask_inputs, score_decay, variance_gain
from reattend.trunks.language import Trunk, innermost

SEGMENTS = ("before", "key", "answer", "after", "question")
"""Where a needle's question looks: before the token's first occurrence, at it, at its successor, behind, at itself."""


# --- needles --------------------------------------------------------------------------------------


def needles(
    tokens: Int[Tensor, "rows length"],
) -> tuple[Bool[Tensor, "rows predictions"], Int[Tensor, "rows predictions"]]:
    """Look-ups with one single source: whether a token stood exactly once before in its row, and where.

    Column t is the prediction of token t + 1 from token t. Places of tokens that are no needle say nothing.
    """
    here = tokens[:, :-1]
    earlier = torch.ones(here.shape[1], here.shape[1], dtype=torch.bool).tril(-1)
    same = (here[:, :, None] == here[:, None]) & earlier
    return same.sum(-1) == 1, same.byte().argmax(-1)


def copy_accuracy(
    tokens: Int[Tensor, "rows length"],
    found: Bool[Tensor, "rows predictions"],
    sources: Int[Tensor, "rows predictions"],
) -> float:
    """Share of needles whose next token is the one that stood behind the source: what copying achieves."""
    row, asks = found.nonzero(as_tuple=True)
    return (tokens[row, sources[row, asks] + 1] == tokens[row, asks + 1]).double().mean().item()


@torch.no_grad()
def answers(
    model: Trunk, tokens: Int[Tensor, "rows length"], batch: int = 128
) -> tuple[Float[Tensor, "rows predictions"], Bool[Tensor, "rows predictions"]]:
    """-log p of every next token, and whether it is the likeliest, for a model in evaluation mode."""
    nats, right = [], []
    for part in tokens.to(model.tokens.weight.device).split(batch):
        logits, following = model(part[:, :-1]), part[:, 1:]
        nats.append(F.cross_entropy(logits.mT, following, reduction="none"))
        right.append(logits.argmax(-1) == following)
    return torch.cat(nats).cpu(), torch.cat(right).cpu()


def by_distance(
    values: Float[Tensor, "rows predictions"],
    found: Bool[Tensor, "rows predictions"],
    sources: Int[Tensor, "rows predictions"],
    edges: Sequence[int],
) -> list[float]:
    """Mean over needles whose distance to their source is in edges[i] .. edges[i + 1] - 1."""
    distance = torch.arange(found.shape[1]) - sources
    return [
        values[found & (distance >= low) & (distance < high)].mean().item()
        for low, high in pairwise(edges)
    ]


# --- attention ------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(
    model: Trunk, tokens: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows maps length length"]:
    """Attention of every head of every layer, layer by layer."""
    seen: list[Tensor] = []
    hooks = [
        innermost(block.mixer).register_forward_hook(
            lambda mixer, inputs, _: seen.append(mixer.weights(inputs[0]))
        )
        for block in model.blocks
    ]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(seen, dim=1)


def masking_effects(
    model: Trunk,
    tokens: Int[Tensor, "rows length"],
    masked: Bool[Tensor, "rows length"],
    mask_id: int,
) -> dict[str, float]:
    """ "decay" and "variance": `score_decay` and `variance_gain` of one model, fed the rows without and with [MASK]."""
    plain = attention_maps(model, tokens)
    with_masks = attention_maps(model, mask_inputs(tokens, masked, mask_id))
    return {
        "decay": score_decay(plain, with_masks, masked).item(),
        "variance": variance_gain(plain, with_masks, masked).item(),
    }


def segment_shares(
    maps: Float[Tensor, "rows maps length length"],
    found: Bool[Tensor, "rows length"],
    sources: Int[Tensor, "rows length"],
) -> Float[Tensor, "maps segments"]:
    """Attention of needles' questions on each of `SEGMENTS`, mean over questions, for every head.

    A needle whose answer is the question itself (a token that follows itself) does not count.
    """
    places = torch.arange(found.shape[1], device=maps.device)
    row, asks = (found & (sources < places - 1)).nonzero(as_tuple=True)
    source = sources[row, asks, None]
    parts = (
        places < source,
        places == source,
        places == source + 1,
        (places > source + 1) & (places < asks[:, None]),
        places == asks[:, None],
    )
    weights = maps[row, :, asks]  # [needles, maps, keys]
    return torch.stack([(weights * part[:, None]).sum(-1).mean(0) for part in parts], dim=1)
