"""Matchings on frozen towers, and what reduced towers cost: the experiments of CrossGET beside its trainings.

Names of shapes: `pictures`, `layers`, `length` (tokens), `r` (tokens merged away in a block).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from reattend.backbones.pretrained.vit import prepare
from reattend.backbones.trained.crossget import random_matching
from reattend.trunks.image_text import BlockHooks, Heads
from reattend.vision_language.crossget import (
    Matcher,
    Merging,
    TokenEnsemble,
    bipartite_matching,
    complete_graph_matching,
    greedy_matching,
    similarities,
)

# --- placebos --------------------------------------------------------------------------------------------


def random_order_matching(generator: torch.Generator) -> Matcher:
    """The complete graph with its ranking replaced by a random one."""

    def match(similarity: Tensor, r: int, importance: Tensor | None) -> Merging:
        order = torch.rand(similarity.shape[:2], generator=generator).argsort(1)
        return complete_graph_matching(similarity, r, importance, order.to(similarity.device))

    return match


MATCHERS: Mapping[str, Callable[[torch.Generator], Matcher]] = {
    "CGSM": lambda generator: complete_graph_matching,
    "BSM": lambda generator: bipartite_matching,
    "random order": random_order_matching,
    "random pairs": random_matching,
    "greedy": lambda generator: greedy_matching,
}
"""Unguided matchings by name, each made with the random numbers it may use."""


# --- the frozen vision transformer -------------------------------------------------------------------------


def vit_cls(
    model: Dinov2Model,
    pixels: UInt8[Tensor, "pictures 3 height width"],
    hooks: BlockHooks,
    size: int,
) -> Float[Tensor, "pictures width"]:
    """[CLS] of the ViT with hooks in its blocks, after the last normalisation."""
    x = model.embeddings(prepare(pixels, size))
    for layer, block in enumerate(model.encoder.layer):
        x = hooks.before(layer, x)
        attention, normed = block.attention, block.norm1(x)
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (
            m(normed).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for m in maps
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=hooks.bias(layer, x))
        x = x + block.layer_scale1(attention.o_proj(mixed.transpose(1, 2).flatten(2)))
        x = hooks.between(layer, x, Heads(q, k, v))
        x = x + block.layer_scale2(block.mlp(block.norm2(x)))
    return model.layernorm(x)[:, 0]


def pair_similarity(similarity: Tensor, merging: Merging) -> Float[Tensor, " pictures"]:
    """Mean cosine of the keys of what is merged with what takes it in."""
    rows = torch.arange(len(similarity), device=similarity.device)[:, None]
    return similarity[rows, merging.sources, merging.destinations].mean(1)


class MatchingProbe(BlockHooks):
    """Asks matchings in every block and merges nothing, so that all are asked about the same tokens.

    Attributes:
        found: by matching, the mean similarity of its pairs in every block in turn.
    """

    def __init__(self, matchers: Mapping[str, Matcher], r: int) -> None:
        self.matchers, self.r = matchers, r
        self.found: dict[str, list[Tensor]] = {name: [] for name in matchers}

    def between(self, layer: int, x: Tensor, heads: Heads) -> Tensor:
        """Match by the keys of this block; [CLS] is protected."""
        protected = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        protected[:, 0] = True
        similarity = similarities(heads.keys.transpose(1, 2).flatten(2), protected)
        for name, match in self.matchers.items():
            merging = match(similarity, self.r, None)
            self.found[name].append(pair_similarity(similarity, merging))
        return x


@torch.no_grad()
def matching_quality(
    encode: Callable[[Tensor, BlockHooks], Tensor],
    pixels: UInt8[Tensor, "pictures 3 height width"],
    layers: int,
    rs: tuple[int, ...],
    seed: int = 0,
    batch: int = 25,
) -> dict[str, dict[int, dict[str, Float[Tensor, " pictures"]]]]:
    """By matching and r: "similarity" of merged pairs, mean over the layers, and relative "error" of [CLS].

    Similarities are those of the tokens of the unreduced tower, the same for all matchings; errors are those
    of a tower that merges r tokens in every block, ||y - y'|| / ||y||.

    Args:
        encode: the tower, from pictures and hooks to [CLS].
    """
    found: dict = {name: {r: {"similarity": [], "error": []} for r in rs} for name in MATCHERS}
    generator = torch.Generator().manual_seed(seed)
    matchers = {name: make(generator) for name, make in MATCHERS.items()}
    for part in pixels.split(batch):
        for r in rs:
            probe = MatchingProbe(matchers, r)
            plain = encode(part, probe)
            for name, match in matchers.items():
                cell = found[name][r]
                cell["similarity"].append(torch.stack(probe.found[name]).mean(0))
                reduced = encode(part, TokenEnsemble((r,) * layers, match=match, importance=None))
                cell["error"].append((reduced - plain).norm(dim=-1) / plain.norm(dim=-1))
    return {
        name: {r: {kind: torch.cat(v) for kind, v in cell.items()} for r, cell in cells.items()}
        for name, cells in found.items()
    }
