"""Matchings on frozen towers, and what reduced towers cost: the experiments of CrossGET beside its trainings.

Names of shapes: `pictures`, `layers`, `length` (tokens), `r` (tokens merged away in a block).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from reattend.backbones.pretrained.vit import prepare
from reattend.backbones.trained.crossget import Reduced, Setting, arm_of, random_matching
from reattend.backbones.trained.filip import Pairs, global_similarity
from reattend.studies.image_text import PairTokens, retrieval
from reattend.trunks.image_text import BlockHooks, Heads
from reattend.vision_language.crossget import (
    Matcher,
    Merging,
    TokenEnsemble,
    bipartite_matching,
    complete_graph_matching,
    cross_divergence,
    cross_features,
    greedy_matching,
    guided_importance,
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
) -> Float[Tensor, "pictures channels"]:
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


class BlockTokens(BlockHooks):
    """Keeps the keys of one block, all heads together: [pictures, length, width]."""

    def __init__(self, layer: int) -> None:
        self.layer, self.keys = layer, torch.empty(0)

    def between(self, layer: int, x: Tensor, heads: Heads) -> Tensor:
        """Keep them; merge nothing."""
        if layer == self.layer:
            self.keys = heads.keys.transpose(1, 2).flatten(2)
        return x


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


Qualities = dict[str, dict[int, dict[str, Float[Tensor, " _"]]]]
"""By matching and r: "similarity" and "error" of each picture, or of each photograph."""


@torch.no_grad()
def matching_quality(
    encode: Callable[[Tensor, BlockHooks], Tensor],
    pixels: UInt8[Tensor, "pictures 3 height width"],
    layers: int,
    rs: tuple[int, ...],
    seed: int = 0,
    batch: int = 25,
) -> Qualities:
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


def by_photograph(quality: Qualities, photos: int) -> Qualities:
    """Means over the crops of each photograph; crops are listed photograph by photograph."""
    return {
        name: {
            r: {kind: values.unflatten(0, (photos, -1)).mean(1) for kind, values in cell.items()}
            for r, cell in cells.items()
        }
        for name, cells in quality.items()
    }


# --- trained towers ------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieved(reduced: Reduced, pairs: Pairs, gallery: int) -> dict[str, float]:
    """Recalls in per cent and "NLL" in nats of a reduced model, mean over galleries of `gallery` pairs."""
    parts = [
        reduced(pairs[slice(start, start + gallery)])
        for start in range(0, len(pairs) - gallery + 1, gallery)
    ]
    image, text = (
        torch.cat([getattr(part, side) for part in parts])[:, None].cpu()
        for side in ("image", "text")
    )
    tokens = PairTokens(image, text, torch.ones(len(image), 1, dtype=torch.bool))
    return retrieval(global_similarity, tokens, reduced.model.scale.detach().cpu(), gallery)


@torch.no_grad()
def told_apart(reduced: Reduced, pairs: Pairs) -> float:
    """Per cent of pictures closer to their own caption than to their twin's; pairs 2 i and 2 i + 1 are twins."""
    vectors = reduced(pairs)
    own = (vectors.image * vectors.text).sum(1)
    twin = (vectors.image * vectors.text.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)).sum(1)
    return 100 * (own > twin).double().mean().item()


@torch.no_grad()
def divergence(reduced: Reduced, pairs: Pairs) -> float:
    """L_JS of the cross tokens of these pairs, in nats."""
    vectors, model = reduced(pairs), reduced.model
    image = cross_features(vectors.image_cross, model.image, model.image_map)
    text = cross_features(vectors.text_cross, model.text, model.text_map)
    return cross_divergence(image, text).item()


def multiply_adds(
    width: int, lengths: Sequence[int], *, ratio: int = 4, matching: bool = False
) -> int:
    """Multiply-adds of a tower's blocks for one sample, without embedding, norms and softmax.

    Args:
        lengths: tokens that enter each block, and those that leave the last one.
        ratio: hidden width of the MLP / width.
        matching: whether the cosines of keys, length x length x width, are counted too.
    """
    total = 0
    for before, after in pairwise(lengths):
        total += 4 * before * width**2 + 2 * before**2 * width
        total += 2 * ratio * after * width**2
        if matching and after < before:
            total += before**2 * width
    return total


def token_groups(
    mergings: Sequence[Merging], length: int, appended: int = 0
) -> Int[Tensor, "pictures length"]:
    """Which final token each of the first tokens has become part of, after all mergings in turn.

    Args:
        length: tokens at the start, with the cross token.
        appended: tokens at the end to leave out of the answer, 1 for the cross token.
    """
    batch = len(mergings[0].sources)
    place = torch.arange(length).expand(batch, length)
    for merging in mergings:
        now = torch.empty(batch, merging.sources.shape[1] + merging.survivors.shape[1]).long()
        kept = torch.arange(merging.survivors.shape[1]).expand(batch, -1)
        now.scatter_(1, merging.survivors.cpu(), kept)
        now.scatter_(1, merging.sources.cpu(), merging.targets.cpu())
        place = now.gather(1, place)
    return place[:, : length - appended]


@torch.no_grad()
def merging_of(
    reduced: Reduced, pixels: UInt8[Tensor, "pictures 3 height width"]
) -> tuple[list[Float[Tensor, "pictures patches"]], Int[Tensor, "pictures tokens"]]:
    """What a guided image tower does: importance of the patches in every block, and the final groups.

    Importance is NaN for patches that an earlier block merged away; a token's value stands at the patch that
    took the others in. Groups are of [CLS] and patches, as `token_groups` numbers them.
    """
    seen: list[Tensor] = []

    def importance(guide: Tensor, keys: Tensor) -> Tensor:
        seen.append(guided_importance(guide, keys))
        return seen[-1]

    hooks = TokenEnsemble(
        reduced.arm.reduction.image, cross=reduced.cross.image, importance=importance
    )
    reduced.model.image(pixels, hooks)
    length = seen[0].shape[1]
    shown, alive = [], torch.arange(length, device=pixels.device).expand(len(pixels), -1)
    for values, merging in zip(seen, hooks.mergings, strict=True):
        everywhere = torch.full((len(pixels), length), torch.nan, device=pixels.device)
        shown.append(everywhere.scatter(1, alive, values)[:, 1:-1].cpu())
        alive = alive.gather(1, merging.survivors)
    return shown, token_groups(hooks.mergings, length, appended=1)


def token_counts(start: int, rs: Sequence[int], protected: int) -> list[int]:
    """Tokens that enter each block, and those that leave the last one; merging takes half of the free ones at most."""
    counts = [start]
    for r in rs:
        counts.append(counts[-1] - min(r, (counts[-1] - protected) // 2))
    return counts


def arm_multiply_adds(name: str, setting: Setting) -> dict[str, int]:
    """Multiply-adds of one picture and of one caption of an arm at test, by tower.

    A tower that merges nothing needs no cross token at test where nobody sees it (captions).
    """
    shape, arm = setting.shape, arm_of(name, setting, 0)
    cross, reduction = int(arm.cross), arm.reduction
    patches, words = (shape.size // shape.patch) ** 2, 3 * shape.objects[1] + 1
    image = token_counts(1 + patches + cross, reduction.image, 1 + cross)
    read = cross if any(reduction.text) else 0
    text = token_counts(words + read, reduction.text, 2 + read)
    return {
        "image": multiply_adds(shape.width, image, matching=True),
        "text": multiply_adds(shape.width, text, matching=True),
    }
