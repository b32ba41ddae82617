"""FasterVLM: visual tokens kept by the vision tower's [CLS] attention (arXiv 2412.01818), and FastV beside it.

FasterVLM asks the vision tower which patches matter: those that its [CLS] token attends to in the layer
whose features are used. The rest never enters the language model, and positions are counted anew. FastV
(arXiv 2403.06764) asks the language model: the first K layers read all visual tokens, then those stay to
which the last prompt token attends in layer K - 1; positions are left as they were. Both only rank tokens;
`reattend.trunks.visual_tokens` keeps them.

Also the statistics with which the paper explains the difference: attention by index (shift) and the share of the
attention that the best tokens hold (dispersion).

Names of shapes: `batch`, `heads`, `tokens` (patches), `keys` = 1 + tokens ([CLS] first), `length` (of a prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reattend.trunks.visual_tokens import Reduction, top_tokens

# --- FasterVLM: the vision tower's [CLS] token -----------------------------------------------------------------


def cls_attention(
    query: Float[Tensor, "batch heads dim"], keys: Float[Tensor, "batch heads keys dim"]
) -> Float[Tensor, "batch heads tokens"]:
    """What [CLS] pays to every patch: softmax(q k / sqrt(dim)) over all keys, then without [CLS]'s own column.

    One row a head, in single precision at least; the full map is never made.

    Args:
        query: of [CLS].
        keys: of [CLS], which is first, and of the patches.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    query, keys = query.to(precision), keys.to(precision)
    logits = (keys @ query[..., None]).squeeze(-1) / query.shape[-1] ** 0.5
    return logits.softmax(-1)[..., 1:]


def cls_scores(
    attention: Float[Tensor, "batch heads tokens"],
) -> Float[Tensor, "batch tokens"]:
    """FasterVLM's score of each patch: the mean over heads; the question plays no part (section 3.3)."""
    return attention.mean(1)


def faster_vlm(attention: Float[Tensor, "batch heads tokens"], kept: int) -> Reduction:
    """The `kept` patches with the highest score, in raster order."""
    return top_tokens(cls_scores(attention), kept)


@dataclass(frozen=True)
class SeenPatches:
    """What a vision tower gives to a language model: features, and what [CLS] paid to each patch."""

    features: Float[Tensor, "batch tokens width"]
    attention: Float[Tensor, "batch heads tokens"]


def read_picture(
    tower: nn.Module, pixels: Float[Tensor, "batch 3 height width"], layer: int = -2
) -> SeenPatches:
    """Features after a layer of a Hugging Face vision transformer, and [CLS]'s attention inside that layer.

    Works with any attention kernel: queries and keys are read where they leave their projections.

    Args:
        tower: CLIPVisionModel, Dinov2Model, ViTModel or another whose only token before the patches is [CLS] and
            whose layers have `q_proj` and `k_proj` without rotary positions.
        pixels: as the tower wants them.
        layer: place in `hidden_states`, whose first entry is the embedding; -2 is the paper's.

    Raises:
        ValueError: for a layer that does not exist, or a tower without such projections.
    """
    return read_layers(tower, pixels, (layer,))[0]


@torch.no_grad()
def read_layers(
    tower: nn.Module, pixels: Float[Tensor, "batch 3 height width"], layers: Sequence[int]
) -> list[SeenPatches]:
    """`read_picture` at several layers in one pass."""
    count = tower.config.num_hidden_layers
    if not all(1 <= abs(layer) <= count for layer in layers):
        raise ValueError(f"layers must lie in 1..{count} or -{count}..-1, not {list(layers)}")
    blocks = [layer - 1 if layer > 0 else count + layer for layer in layers]
    query, key = (_projections(tower, name) for name in ("q_proj", "k_proj"))
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, out: seen.__setitem__(module, out))
        for block in set(blocks)
        for module in (query[block], key[block])
    ]
    try:
        states = tower(pixels, output_hidden_states=True).hidden_states
    finally:
        for hook in hooks:
            hook.remove()

    def of_heads(module: nn.Module) -> Float[Tensor, "batch heads keys dim"]:
        split = seen[module].unflatten(-1, (tower.config.num_attention_heads, -1))
        return split.transpose(1, 2)

    return [
        SeenPatches(
            states[block + 1][:, 1:],
            cls_attention(of_heads(query[block])[:, :, 0], of_heads(key[block])),
        )
        for block in blocks
    ]


def _projections(tower: nn.Module, name: str) -> list[nn.Module]:
    """The projections of this name, one a block."""
    found = [m for path, m in tower.named_modules() if path.rpartition(".")[2] == name]
    if len(found) != tower.config.num_hidden_layers:
        raise ValueError(
            f"{type(tower).__name__} does not have one {name} a layer: "
            "give queries and keys to cls_attention instead"
        )
    return found


# --- FastV: the language model's last prompt token ---------------------------------------------------------------


def fastv_scores(
    last_rows: Float[Tensor, "prompts heads length"], visual: slice
) -> Float[Tensor, "prompts tokens"]:
    """FastV's score: what the last prompt token pays to each visual token, mean over heads.

    Args:
        last_rows: the last prompt token's row of layer K - 1, after the softmax.
        visual: where the visual tokens stand in the prompt.
    """
    return last_rows.mean(1)[:, visual]


# --- attention shift and dispersion ------------------------------------------------------------------


def attention_curves(
    weights: Float[Tensor, "batch length length"], visual: slice
) -> dict[str, Float[Tensor, "batch tokens"]]:
    """Attention that each visual token receives, by who pays it (the paper's analysis of attention shift).

    Args:
        weights: causal attention of one layer, mean over heads; rows are queries.
        visual: where the visual tokens stand; text follows them.

    Returns:
        last: the row of the last prompt token. text: the mean of the rows after the picture, without the last
        token's, but with it in the count, as in the official code. image, full: the sum over the picture's
        rows, and over all rows from the picture on, divided by how many of them can see the token at all (a
        token of index j is hidden from the j before it).

    Raises:
        ValueError: when no text follows the picture.
    """
    if weights.shape[1] <= visual.stop:
        raise ValueError("the prompt ends with the picture: no text token is left to ask")
    columns = weights[:, visual.start :, visual]
    tokens = columns.shape[2]
    text = columns.shape[1] - tokens
    seers = torch.arange(tokens, 0, -1, device=weights.device)
    return {
        "last": columns[:, -1],
        "text": columns[:, tokens:-1].sum(1) / text,
        "image": columns[:, :tokens].sum(1) / seers,
        "full": columns.sum(1) / (seers + text),
    }


def index_correlation(curve: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch"]:
    """Spearman's rank correlation of attention with the token's index; 1: every later token gets more.

    Equal values share the mean of their ranks; 0 for a constant curve.
    """
    below = (curve[..., None, :] < curve[..., None]).sum(-1)
    upto = (curve[..., None, :] <= curve[..., None]).sum(-1)
    ranks = (below + upto).double()
    ranks = ranks - ranks.mean(-1, keepdim=True)
    index = torch.arange(curve.shape[-1], device=curve.device).double()
    index = index - index.mean()
    scale = (ranks.square().sum(-1) * index.square().sum()).sqrt()
    return torch.where(scale > 0, (ranks * index).sum(-1) / scale.clamp_min(1e-300), 0)


def cumulated_mass(scores: Float[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Share of a picture's attention that its best 1, 2, ... tokens hold (the paper's dispersion figure)."""
    ordered = scores.sort(1, descending=True).values
    return ordered.cumsum(1) / scores.sum(1, keepdim=True)


def top_mass(scores: Float[Tensor, "batch tokens"], share: float = 0.2) -> Float[Tensor, " batch"]:
    """Share of the attention held by the best `share` of the tokens, at least one."""
    best = max(1, round(share * scores.shape[1]))
    return cumulated_mass(scores)[:, best - 1]


def mass_inside(
    scores: Float[Tensor, "batch tokens"], inside: Float[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Share of the attention that falls on a region.

    Args:
        inside: how much of each patch belongs to the region, 0 to 1.
    """
    return (scores * inside).sum(1) / scores.sum(1)
