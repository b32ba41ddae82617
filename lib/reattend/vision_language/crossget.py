"""CrossGET: cross-guided ensemble of tokens for accelerating vision-language transformers (arXiv 2305.17455).

Between attention and MLP every block of a tower merges r tokens into others. Which ones, says a matching on
the complete graph of tokens; a learnt *cross token*, which training pulls towards its partner in the other
modality, says how important each token is: for the choice and for the weights of the sum. Names and
arithmetic follow the official code (sdc17/CrossGET, CLIP).

Names of shapes: `batch`, `length` (tokens of a tower before a merging), `r` (tokens merged away), `kept` =
length - r, `width`, `layers`. [CLS] is the first token of a picture; the cross token is the last of either tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.training.contrastive import symmetric_info_nce
from reattend.trunks.image_text import BlockHooks, Heads, ImageTextModel, Tower

# --- matching --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merging:
    """Which tokens go where.

    Attributes:
        sources: places of the tokens that are merged away.
        survivors: places of all others, ascending, so that the order is kept.
        targets: for each source the place *among the survivors* of the token that takes it in.
    """

    sources: Int[Tensor, "batch r"]
    survivors: Int[Tensor, "batch kept"]
    targets: Int[Tensor, "batch r"]

    @property
    def destinations(self) -> Int[Tensor, "batch r"]:
        """Places, before the merging, of the tokens that take the sources in."""
        return self.survivors.gather(1, self.targets)


Similarity = Float[Tensor, "batch length length"]
"""Cosines of keys; minus infinity on the diagonal and in rows and columns of protected tokens."""
Matcher = Callable[[Similarity, int, Float[Tensor, "batch length"] | None], Merging]
"""From similarities, r and the tokens' importance (None: unguided) to a merging."""


def similarities(
    keys: Float[Tensor, "batch length width"], protected: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length length"]:
    """Cosines of keys (all heads together), as a `Matcher` wants them."""
    unit = F.normalize(keys, dim=-1)
    barred = protected[:, :, None] | protected[:, None, :]
    barred = barred | torch.eye(keys.shape[1], dtype=torch.bool, device=keys.device)
    return (unit @ unit.mT).masked_fill(barred, -torch.inf)


def merging_into_best(
    sources: Int[Tensor, "batch r"], wishes: Float[Tensor, "batch length length"]
) -> Merging:
    """Each source goes to the survivor that its row of `wishes` likes best."""
    batch, length, _ = wishes.shape
    stays = torch.ones(batch, length, dtype=torch.bool, device=wishes.device)
    stays.scatter_(1, sources, False)
    survivors = stays.nonzero()[:, 1].view(batch, -1)
    rows = wishes.take_along_dim(sources[..., None], 1)
    targets = rows.take_along_dim(survivors[:, None], 2).argmax(-1)
    return Merging(sources, survivors, targets)


@torch.no_grad()
def complete_graph_matching(
    similarity: Similarity,
    r: int,
    importance: Float[Tensor, "batch length"] | None = None,
    ranks: Int[Tensor, "batch length"] | None = None,
) -> Merging:
    """Complete-graph soft matching (section 3.2, algorithm 1), guided where an importance is given.

    Tokens are ranked by their best similarity, highest first, and see only tokens of later rank, so that
    no two of them want to be merged into each other. The r tokens with the highest best similarity to what they
    see, less their own importance, are merged away, each into the most similar survivor.

    Args:
        ranks: another order in place of that of the best similarities: 0 is first and sees all others.
    """
    if ranks is None:
        ranks = similarity.amax(-1).argsort(descending=True, stable=True).argsort()
    later = ranks[:, None, :] > ranks[:, :, None]
    scores = similarity.masked_fill(~later, -torch.inf).amax(-1)
    if importance is not None:
        scores = scores - importance
    return merging_into_best(scores.argsort(descending=True, stable=True)[:, :r], similarity)


@torch.no_grad()
def bipartite_matching(
    similarity: Similarity, r: int, importance: Float[Tensor, "batch length"] | None = None
) -> Merging:
    """ToMe's bipartite soft matching (arXiv 2210.09461): tokens at even places find the best at odd places.

    The r most similar pairs are merged. Guidance is no part of it: an importance is left aside.
    """
    between = similarity[:, ::2, 1::2]
    sources = 2 * between.amax(-1).argsort(descending=True, stable=True)[:, :r]
    odd = torch.arange(similarity.shape[1], device=similarity.device) % 2 == 1
    return merging_into_best(sources, similarity.masked_fill(~odd, -torch.inf))


@torch.no_grad()
def greedy_matching(
    similarity: Similarity, r: int, importance: Float[Tensor, "batch length"] | None = None
) -> Merging:
    """One pair after the other, always the most similar one that is left: near the highest sum of similarities.

    A token that was merged away takes nothing in, one that took something in is not merged away. As an
    upper end to compare with; r steps, each over the whole matrix.
    """
    batch, length, _ = similarity.shape
    left, rows = similarity.clone(), torch.arange(batch, device=similarity.device)
    sources, partners = [], []
    for _ in range(r):
        best = left.flatten(1).argmax(1)
        source, partner = best // length, best % length
        left[rows, source], left[rows, :, source], left[rows, partner] = (-torch.inf,) * 3
        sources.append(source)
        partners.append(partner)
    wishes = torch.zeros_like(similarity)
    chosen = torch.stack(sources, 1)
    wishes[rows[:, None], chosen, torch.stack(partners, 1)] = 1
    return merging_into_best(chosen, wishes)


# --- importance and ensemble -----------------------------------------------------------------------------


Importance = Callable[
    [Float[Tensor, "batch width"], Float[Tensor, "batch length width"]],
    Float[Tensor, "batch length"],
]
"""From the guide's query and all keys to the importance of each token."""


def guided_importance(
    guide: Float[Tensor, "batch width"], keys: Float[Tensor, "batch length width"]
) -> Float[Tensor, "batch length"]:
    """Cosine of every key with the guide's query (section 3.3): all heads together, no scale."""
    return F.cosine_similarity(guide[:, None], keys, dim=-1)


def ensemble_weights(
    importance: Float[Tensor, "batch length"], merging: Merging
) -> Float[Tensor, "batch r 2"]:
    """Weights of source and destination: twice a softmax of their importances, so that equal ones give (1, 1)."""
    pairs = torch.stack([merging.sources, merging.destinations], -1)
    return 2 * importance[:, :, None].take_along_dim(pairs, 1).softmax(-1)


def merged_sum(
    x: Float[Tensor, "batch length width"],
    merging: Merging,
    weights: Float[Tensor, "batch r 2"] | None = None,
) -> Float[Tensor, "batch kept width"]:
    """Survivors with what is merged into them: each source s adds w_s x_s + (w_d - 1) x_d to its destination d.

    Args:
        weights: w_s and w_d; all ones where not given, which gives plain sums.
    """
    sources = x.take_along_dim(merging.sources[..., None], 1)
    kept = x.take_along_dim(merging.survivors[..., None], 1)
    places = merging.targets[..., None].expand(sources.shape)
    if weights is not None:
        own = kept.take_along_dim(merging.targets[..., None], 1)
        sources = weights[..., :1] * sources + (weights[..., 1:] - 1) * own
    return kept.scatter_add(1, places, sources)


class TokenEnsemble(BlockHooks):
    """CrossGET inside one tower, for one forward pass.

    Args:
        r: tokens to merge in each block; at most half of those that are not protected.
        cross: learnt offsets of the cross token, one a layer; None: no cross token is appended.
        ends: where [EOS] stands in each caption; None for pictures, whose guide is the cross token.
        match: the matching.
        importance: of tokens, from the query of the guide; None: unguided, plain means.

    Attributes:
        sizes: how many tokens each present one stands for: [batch, length, 1].
        ends: where [EOS] stands now.
        cross_tokens: the cross token as it entered each block, in turn.
        mergings: what was merged in each block, in turn; blocks with r = 0 have none.

    Raises:
        ValueError: when pictures are to be guided without a cross token, on the first block.
    """

    def __init__(
        self,
        r: Sequence[int],
        *,
        cross: Float[Tensor, "layers width"] | None = None,
        ends: Int[Tensor, " batch"] | None = None,
        match: Matcher = complete_graph_matching,
        importance: Importance | None = guided_importance,
    ) -> None:
        self.r, self.cross, self.ends = tuple(r), cross, ends
        self.match, self.importance = match, importance
        self.sizes = torch.empty(0)
        self.cross_tokens: list[Float[Tensor, "batch width"]] = []
        self.mergings: list[Merging] = []
        if importance is not None and cross is None and ends is None:
            raise ValueError(
                "pictures are guided by the cross token: give `cross`, or importance=None"
            )

    def before(self, layer: int, x: Tensor) -> Tensor:
        """The last token becomes stopgrad(guide) + p: the last token itself in pictures, [EOS] in captions."""
        rows = torch.arange(len(x), device=x.device)
        if self.cross is not None:
            if layer == 0:
                first = x[:, 0] if self.ends is None else x[rows, self.ends]
                x = torch.cat([x, first[:, None]], 1)
            last = x[:, -1] if self.ends is None else x[rows, self.ends]
            token = last.detach() + self.cross[layer]
            self.cross_tokens.append(token)
            x = torch.cat([x[:, :-1], token[:, None]], 1)
        if layer == 0:
            self.sizes = torch.ones_like(x[..., :1])
        return x

    def bias(self, layer: int, x: Tensor) -> Tensor | None:
        """Proportional attention: the logarithm of sizes. None before anything has been merged."""
        return self.sizes.log()[:, None, None, :, 0] if self.mergings else None

    def between(self, layer: int, x: Tensor, heads: Heads) -> Tensor:
        """Match by keys, weigh by importance, merge."""
        protected = self._protected(x)
        r = min(self.r[layer], int(x.shape[1] - protected[0].sum()) // 2)
        if r <= 0:
            return x
        keys = heads.keys.transpose(1, 2).flatten(2)
        importance = self._importance(heads, keys)
        merging = self.match(similarities(keys.detach(), protected), r, importance)
        weights = None if importance is None else ensemble_weights(importance, merging)
        summed = merged_sum(x * self.sizes, merging, weights)
        self.sizes = merged_sum(self.sizes, merging)
        self.mergings.append(merging)
        if self.ends is not None:
            self.ends = self.ends - (merging.sources < self.ends[:, None]).sum(1)
        return summed / self.sizes

    def _protected(self, x: Tensor) -> Bool[Tensor, "batch length"]:
        """[CLS] or [BOS], the cross token, [EOS]. Padding is not, as in the official code."""
        protected = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        protected[:, 0] = True
        if self.cross is not None:
            protected[:, -1] = True
        if self.ends is not None:
            protected.scatter_(1, self.ends[:, None], True)
        return protected

    @torch.no_grad()
    def _importance(self, heads: Heads, keys: Tensor) -> Float[Tensor, "batch length"] | None:
        if self.importance is None:
            return None
        queries = heads.queries.transpose(1, 2).flatten(2)
        rows = torch.arange(len(keys), device=keys.device)
        guide = queries[:, -1] if self.ends is None else queries[rows, self.ends]
        return self.importance(guide, keys)


# --- the model and its loss ------------------------------------------------------------------------------


def cross_features(
    tokens: Sequence[Float[Tensor, "batch width"]], tower: Tower, to_joint: nn.Linear
) -> Float[Tensor, "layers batch joint"]:
    """Cross tokens of all layers, normalised and mapped to the joint space; only the tokens learn from it."""
    norm = tower.norm
    scaled = F.layer_norm(
        torch.stack(list(tokens)),
        norm.normalized_shape,
        norm.weight.detach(),
        norm.bias.detach(),
        norm.eps,
    )
    return scaled @ to_joint.weight.detach().T


def cross_divergence(
    image: Float[Tensor, "layers batch joint"], text: Float[Tensor, "partners batch joint"]
) -> Float[Tensor, ""]:
    """L_JS in nats: (KL(M || P_v) + KL(M || P_t)) / 2 with M their mean, over layers and samples.

    P are softmaxes over the features. The order inside KL is that of the official code, not the
    textbook's Jensen-Shannon divergence, KL(P || M). Both sides learn.

    Raises:
        ValueError: for towers of unequally many layers.
    """
    if len(image) != len(text):
        raise ValueError(
            f"cross tokens meet layer by layer, but the towers have {len(image)} and {len(text)} layers"
        )
    middle = (image.softmax(-1) + text.softmax(-1)) / 2
    parts = (middle * (middle.log() - side.log_softmax(-1)) for side in (image, text))
    return sum(part.sum(-1).mean() for part in parts) / 2


class CrossTokens(nn.Module):
    """The offsets p of the cross tokens of both towers, which start at 0; 2 x layers x width parameters."""

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        for name, tower in (("image", model.image), ("text", model.text)):
            width = tower.norm.normalized_shape[0]
            setattr(self, name, nn.Parameter(torch.zeros(len(tower.blocks), width)))


@dataclass(frozen=True)
class Reduction:
    """How both towers merge.

    Attributes:
        image, text: tokens to merge in each block of each tower.
        match, importance: as in `TokenEnsemble`; unguided reductions have no cross token.
    """

    image: tuple[int, ...]
    text: tuple[int, ...]
    match: Matcher = complete_graph_matching
    importance: Importance | None = guided_importance

    def picture_hooks(self, cross: CrossTokens | None) -> TokenEnsemble:
        """Hooks of one forward pass of the image tower."""
        offsets = None if cross is None else cross.image
        return TokenEnsemble(
            self.image, cross=offsets, match=self.match, importance=self.importance
        )

    def caption_hooks(
        self, cross: CrossTokens | None, ends: Int[Tensor, " batch"]
    ) -> TokenEnsemble:
        """Hooks of one forward pass of the text tower."""
        return TokenEnsemble(
            self.text,
            cross=None if cross is None else cross.text,
            ends=ends,
            match=self.match,
            importance=self.importance,
        )


@dataclass(frozen=True)
class Vectors:
    """What the towers say of pictures and captions: unit vectors, and the cross tokens of every layer."""

    image: Float[Tensor, "batch joint"]
    text: Float[Tensor, "batch joint"]
    image_cross: list[Float[Tensor, "batch width"]]
    text_cross: list[Float[Tensor, "batch width"]]


def reduced_vectors(
    model: ImageTextModel,
    cross: CrossTokens | None,
    reduction: Reduction,
    pixels: UInt8[Tensor, "batch 3 height width"],
    ids: Int[Tensor, "batch words"],
    mask: Bool[Tensor, "batch words"],
) -> Vectors:
    """[CLS] and [EOS] in the joint space after both towers have merged; each tower runs alone."""
    seen = reduction.picture_hooks(cross)
    read = reduction.caption_hooks(cross, mask.sum(1) - 1)
    image = model.image_map(model.image(pixels, seen)[:, 0])
    states = model.text(ids, read)
    text = model.text_map(states[torch.arange(len(states), device=states.device), read.ends])
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return Vectors(image, text, seen.cross_tokens, read.cross_tokens)


def crossget_loss(
    model: ImageTextModel, vectors: Vectors, weight: float = 0.5
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(1 - w) contrastive + w divergence (section 3.3), and the contrastive part alone, in nats.

    Args:
        weight: w; 0 for models without cross tokens.
    """
    logits = model.scale * vectors.image @ vectors.text.T
    contrastive = symmetric_info_nce(logits, logits)
    if weight == 0:
        return contrastive, contrastive
    image = cross_features(vectors.image_cross, model.image, model.image_map)
    text = cross_features(vectors.text_cross, model.text, model.text_map)
    return (1 - weight) * contrastive + weight * cross_divergence(image, text), contrastive
