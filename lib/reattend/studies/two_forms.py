"""One encoder in both forms, on one set of pairs: stored states, labels, training (see `alternate`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from reattend.backbones.pretrained import minilm
from reattend.metrics import spearman
from reattend.text_matching.trans_encoder import (
    SegmentCrossEncoder,
    bi_labels,
    bi_loss,
    both_orders,
    cross_labels,
    cross_loss,
    mask_spans,
    nt_xent,
    segment_masks,
)
from reattend.trunks.encoders import (
    BiEncoder,
    CachedStates,
    TextEncoder,
    Tokens,
    fine_tune,
    outputs,
    tokenise,
)

Pairs = tuple[Sequence[str], Sequence[str], Tensor]
"""First texts, second texts, gold similarity."""

TEMPERATURE = 0.04  # of the contrast, as in Mirror-BERT
TRAIN, DEVELOPMENT = "train", "validation"


@dataclass(frozen=True)
class Recipe:
    """How models are trained: learning rate, passes over the data and items of a batch of each kind.

    Every training keeps the checkpoint, of `checks` at even distances, with the best Spearman
    correlation on the development pairs, as in the paper; the contrastive start keeps its last one.
    """

    contrast: tuple[float, float, int]
    cross: tuple[float, float, int]
    bi: tuple[float, float, int]
    checks: int = 4


class PairEncoder:
    """One cut of MiniLM with the states of all texts and pairs after its frozen layers.

    Args:
        layers: first layers of MiniLM that are kept.
        trained: top layers that are trained.
        pairs: by name; "train" and "validation" are stored in both orders.
        length: most tokens of a text.
        device: where everything lives.
    """

    def __init__(
        self,
        layers: int,
        trained: int,
        pairs: Mapping[str, Pairs],
        length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tokenizer, bert = minilm.load(layers)
        self.raw, self.device = TextEncoder(bert.to(device), layers - trained), device
        self.gold = {name: gold.numpy() for name, (_, _, gold) in pairs.items()}
        self.texts: dict[str, CachedStates] = {}
        self.pairs: dict[str, CachedStates] = {}
        self.masks: dict[str, list[Tensor]] = {}
        for name, (first, second, _) in pairs.items():
            a, b = list(first), list(second)
            self.texts[name] = self._states(tokenise(self.tokenizer, a + b, length=length))
            sides = (a + b, b + a) if name in (TRAIN, DEVELOPMENT) else (a, b)
            joint = tokenise(self.tokenizer, *sides, length=2 * length)
            self.pairs[name] = self._states(joint)
            self.masks[name] = [mask.to(device) for mask in segment_masks(joint)]
        self.single = list(dict.fromkeys([*pairs[TRAIN][0], *pairs[TRAIN][1]]))
        generator = torch.Generator().manual_seed(layers)
        hidden = [mask_spans(self.single, generator) for _ in range(2)]
        self.plain, *self.views = [
            self._states(tokenise(self.tokenizer, texts, length=64))
            for texts in (self.single, *hidden)
        ]

    def _states(self, tokens: Tokens) -> CachedStates:
        parts = (tokens.ids, tokens.mask, tokens.segments)
        cached = self.raw.cache(Tokens(*(part.to(self.device) for part in parts)))
        return CachedStates(cached.states.to(self.device), cached.mask)

    def cosines(self, bi: BiEncoder, name: str) -> Float[Tensor, " pairs"]:
        """Of every pair of a set."""
        return functional.cosine_similarity(*outputs(bi.eval(), self.texts[name]).cpu().chunk(2))

    def logits(
        self, cross: SegmentCrossEncoder, name: str, order: Literal["given", "swapped"] = "given"
    ) -> Float[Tensor, " pairs"]:
        """Of (a, b), or of (b, a) where both orders are stored, for every pair of a set."""
        count = len(self.gold[name])
        rows = slice(count) if order == "given" else slice(count, None)
        states, masks = self.pairs[name], self.masks[name]
        part = CachedStates(states.states[rows], states.mask[rows])
        return outputs(cross.eval(), part, *(mask[rows] for mask in masks)).cpu()

    def development(self, model: nn.Module) -> float:
        """Spearman correlation of either form with the gold of the development pairs."""
        say = self.logits if isinstance(model, SegmentCrossEncoder) else self.cosines
        return spearman(say(model, DEVELOPMENT).numpy(), self.gold[DEVELOPMENT])

    def contrast(
        self,
        bi: BiEncoder,
        recipe: Recipe,
        seed: int,
        *,
        view: int = 0,
        passes: float | None = None,
    ) -> BiEncoder:
        """A copy of a bi-encoder trained by contrast of the texts with one view of them.

        Args:
            view: which of the two masked copies of the texts.
            passes: over the texts; then the best checkpoint is kept. None: those of the recipe, to the
                end (the start).
        """

        def loss(model: nn.Module, index: Tensor) -> Tensor:
            views = (said(model, states[index]) for states in (self.plain, self.views[view]))
            return nt_xent(*views, TEMPERATURE)

        made, (rate, epochs, batch) = shared_copy(bi), recipe.contrast
        fine_tune(
            made,
            len(self.single),
            loss,
            epochs=epochs if passes is None else passes,
            batch=batch,
            learning_rate=rate,
            seed=seed,
            score=None if passes is None else self.development,
            checks=recipe.checks,
        )
        return made


@dataclass(frozen=True)
class TwoForms:
    """How one encoder labels the training pairs and learns from labels; a `Student` of `alternate`.

    Attributes:
        start: its contrastive bi-encoder.
        loss: of the cross-encoder, "bce" or "mse".
    """

    encoder: PairEncoder
    start: BiEncoder
    recipe: Recipe
    seed: int
    loss: str = "bce"

    def label_with_bi(self, bi: BiEncoder) -> Float[Tensor, " pairs"]:
        """Cosines of the training pairs in [0, 1]."""
        return bi_labels(self.encoder.cosines(bi, TRAIN))

    def label_with_cross(self, cross: SegmentCrossEncoder) -> Float[Tensor, " pairs"]:
        """Scores of the training pairs in (0, 1), of one order."""
        return cross_labels(self.encoder.logits(cross, TRAIN))

    def train_cross(self, labels: Float[Tensor, " pairs"], cycle: int) -> SegmentCrossEncoder:
        """A cross-encoder from the raw encoder, on both orders."""
        seed, encoder = 10 * self.seed + cycle, self.encoder
        states, masks = encoder.pairs[TRAIN], encoder.masks[TRAIN]
        torch.manual_seed(seed)
        cross = SegmentCrossEncoder(shared_copy(encoder.raw), labels.mean().item())
        cross.to(encoder.device)
        doubled = both_orders(labels.to(encoder.device))[2]

        def loss(model: nn.Module, index: Tensor) -> Tensor:
            logits = said(model, states[index], *(mask[index] for mask in masks))
            return cross_loss(logits, doubled[index], self.loss)

        self._fit(cross, len(doubled), loss, self.recipe.cross, seed, states.mask.sum(1))
        return cross

    def train_bi(self, labels: Float[Tensor, " pairs"], cycle: int) -> BiEncoder:
        """A bi-encoder from the contrastive start."""
        states, count = self.encoder.texts[TRAIN], len(labels)
        labels = labels.to(self.encoder.device)

        def loss(model: nn.Module, index: Tensor) -> Tensor:
            sides = (said(model, states[rows]) for rows in (index, index + count))
            return bi_loss(*sides, labels[index])

        bi, lengths = shared_copy(self.start), states.mask.sum(1)
        longer = torch.maximum(lengths[:count], lengths[count:])
        self._fit(bi, count, loss, self.recipe.bi, 10 * self.seed + cycle, longer)
        return bi

    def _fit(self, model, items, loss, how, seed, lengths) -> None:
        rate, epochs, batch = how
        fine_tune(
            model,
            items,
            loss,
            epochs=epochs,
            batch=batch,
            learning_rate=rate,
            seed=seed,
            lengths=lengths,
            score=self.encoder.development,
            checks=self.recipe.checks,
        )


def said(model: nn.Module, states: CachedStates, *masks: Tensor) -> Tensor:
    """What a model in training says of a batch: a third faster in bfloat16, where there are units for it.

    Matrix products alone are rounded so; a processor without such units would be slower for it.
    """
    device = states.mask.device.type
    units = device != "cpu" or torch.cpu._is_amx_tile_supported()
    with torch.autocast(device, torch.bfloat16, enabled=units):
        return model(states, *masks).float()


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with its own trained weights; frozen ones are shared."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
