"""Bi-encoders and cross-encoders on pretrained text encoders, and the loop that fine-tunes them.

A bi-encoder embeds each text alone, a cross-encoder reads both at once. On two cores a training step
of MiniLM costs half a second, so two savings are built in: the word embeddings and the lowest layers
can be frozen, and what frozen layers say of a text is computed once (`TextEncoder.cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, MPNetModel, PreTrainedTokenizerBase

from reattend.training.loop import BestCheckpoint, TrainingLog, TrainingPlan, train


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts, padded on the right; `mask` is True for real tokens."""

    ids: Int[Tensor, "texts length"]
    mask: Bool[Tensor, "texts length"]
    segments: Int[Tensor, "texts length"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor | slice) -> Tokens:
        """Some of the texts, without padding that all of them have."""
        longest = int(self.mask[index].sum(1).max())
        return Tokens(*(part[index][:, :longest] for part in (self.ids, self.mask, self.segments)))


@dataclass(frozen=True)
class CachedStates:
    """States of texts after the frozen layers, in half precision; indexed like `Tokens`."""

    states: Float[Tensor, "texts length width"]
    mask: Bool[Tensor, "texts length"]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Tensor | slice) -> CachedStates:
        longest = int(self.mask[index].sum(1).max())
        return CachedStates(self.states[index][:, :longest], self.mask[index][:, :longest])


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    first: Sequence[str],
    second: Sequence[str] | None = None,
    *,
    length: int,
) -> Tokens:
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP], cut to `length` tokens (longest first)."""
    texts = [list(first)] if second is None else [list(first), list(second)]
    made = tokenizer(
        *texts,
        truncation=True,
        max_length=length,
        padding=True,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    return Tokens(made["input_ids"], made["attention_mask"].bool(), made["token_type_ids"])


class TextEncoder(nn.Module):
    """A pretrained encoder of which the embeddings and the lowest layers may be frozen.

    Args:
        model: a BertModel or MPNetModel of transformers.
        frozen: number of layers that keep their weights; the word embeddings always keep theirs
            (a dense update of half of all parameters would cost more than the layers do).

    Raises:
        ValueError: when `frozen` is not a number of the model's layers.
    """

    def __init__(self, model: BertModel | MPNetModel, frozen: int = 0) -> None:
        super().__init__()
        layers = len(model.encoder.layer)
        if not 0 <= frozen <= layers:
            raise ValueError(f"frozen must lie in 0..{layers}, got {frozen}")
        self.model, self.frozen = model, frozen
        self.width: int = model.config.hidden_size
        self.layers = layers
        for part in (model.embeddings, *model.encoder.layer[:frozen]):
            part.requires_grad_(False)

    def forward(self, texts: Tokens | CachedStates) -> list[Float[Tensor, "texts length width"]]:
        """States after the frozen layers and after each layer above; the last one is the output."""
        if isinstance(texts, CachedStates):
            states, mask = texts.states.float(), texts.mask
        else:
            states, mask = self._bottom(texts), texts.mask
        return [states, *self._layers(states, mask, self.frozen, self.layers)]

    @torch.no_grad()
    def cache(self, tokens: Tokens, batch: int = 64) -> CachedStates:
        """What the frozen layers say of each text, without dropout."""
        mode = self.training
        self.eval()
        count, length = tokens.ids.shape
        states = torch.zeros(count, length, self.width, dtype=torch.float16)
        for start in range(0, count, batch):
            part = tokens[start : start + batch]
            states[start : start + batch, : part.ids.shape[1]] = self._bottom(part).half()
        self.train(mode)
        return CachedStates(states, tokens.mask)

    def train(self, mode: bool = True) -> TextEncoder:
        """As of any module, but the frozen part stays without dropout."""
        super().train(mode)
        for part in (self.model.embeddings, *self.model.encoder.layer[: self.frozen]):
            part.eval()
        return self

    @torch.no_grad()
    def _bottom(self, tokens: Tokens) -> Float[Tensor, "texts length width"]:
        segments = {"token_type_ids": tokens.segments} if isinstance(self.model, BertModel) else {}
        states = self.model.embeddings(input_ids=tokens.ids, **segments)
        return [states, *self._layers(states, tokens.mask, 0, self.frozen)][-1]

    def _layers(self, states: Tensor, mask: Tensor, first: int, last: int) -> list[Tensor]:
        scores = torch.zeros(mask.shape, dtype=states.dtype, device=states.device)
        scores = scores.masked_fill(~mask, torch.finfo(states.dtype).min)[:, None, None, :]
        extra = {}
        if isinstance(self.model, MPNetModel):
            extra["position_bias"] = self.model.encoder.compute_position_bias(states)
        out = []
        for layer in self.model.encoder.layer[first:last]:
            states = layer(states, scores, **extra)
            states = states if isinstance(states, Tensor) else states[0]
            out.append(states)
        return out


def masked_mean(
    states: Float[Tensor, "texts length width"], mask: Bool[Tensor, "texts length"]
) -> Float[Tensor, "texts width"]:
    """Mean of the states of real tokens."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


class BiEncoder(nn.Module):
    """Embeds each text alone: the mean of its last states, or that of [CLS]."""

    def __init__(self, encoder: TextEncoder, pooling: Literal["mean", "cls"] = "mean") -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, texts: Tokens | CachedStates) -> Float[Tensor, "texts width"]:
        states = self.encoder(texts)[-1]
        return states[:, 0] if self.pooling == "cls" else masked_mean(states, texts.mask)

    def similarity(
        self, first: Tokens | CachedStates, second: Tokens | CachedStates
    ) -> Float[Tensor, " pairs"]:
        """Cosine of each pair."""
        return F.cosine_similarity(self(first), self(second))


class CrossEncoder(nn.Module):
    """Reads a pair at once; a linear head on the pooled [CLS] gives `outputs` logits.

    As `BertForSequenceClassification`: the pretrained pooler (dense, tanh), dropout, linear.
    """

    def __init__(self, encoder: TextEncoder, outputs: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.width, outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, pairs: Tokens | CachedStates) -> Float[Tensor, "pairs outputs"]:
        pooled = self.encoder.model.pooler(self.encoder(pairs)[-1])
        return self.head(self.dropout(pooled))


def index_batches(items: int, batch: int, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    """Endless batches of positions; every item once before any comes again.

    Raises:
        ValueError: when there are fewer items than a batch holds.
    """
    if items < batch:
        raise ValueError(f"{items} items do not fill a batch of {batch}")
    generator = Generator().manual_seed(seed)
    while True:
        order = torch.randperm(items, generator=generator)
        yield from order[: items // batch * batch].split(batch)


def length_batches(
    lengths: Int[Tensor, " items"], batch: int, seed: int, pool: int = 8
) -> Iterator[Int[Tensor, " batch"]]:
    """As `index_batches`, but items of similar length share a batch, which saves padding.

    Args:
        lengths: tokens of each item.
        pool: batches whose items are drawn together and then sorted by length.

    Raises:
        ValueError: when there are fewer items than a batch holds.
    """
    if len(lengths) < batch:
        raise ValueError(f"{len(lengths)} items do not fill a batch of {batch}")
    lengths, generator = lengths.cpu(), Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator)
        drawn = []
        for part in order[: len(lengths) // batch * batch].split(pool * batch):
            drawn += part[lengths[part].argsort(stable=True)].split(batch)
        for k in torch.randperm(len(drawn), generator=generator):
            yield drawn[k]


def fine_tune(
    model: nn.Module,
    items: int,
    loss: Callable[[nn.Module, Int[Tensor, " batch"]], Tensor],
    *,
    epochs: int | float,
    batch: int = 32,
    learning_rate: float = 5e-5,
    weight_decay: float = 0.01,
    seed: int = 0,
    lengths: Int[Tensor, " items"] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    checks: int = 4,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TrainingLog:
    """Train an encoder in place on `epochs` passes over items 0 .. items - 1.

    `loss(model, index)` looks up the items of a batch itself. A tenth of the steps warms up, then the
    rate falls along a cosine. Dropout and order depend on `seed` alone. With `lengths` items of similar
    length share a batch. With `score` the weights are kept that had the best of `checks` scores, asked
    at even distances.
    """
    torch.manual_seed(seed)
    steps = max(1, round(epochs * (items // batch)))
    plan = TrainingPlan(steps, learning_rate, weight_decay, warmup=max(1, steps // 10))
    drawn = index_batches(items, batch, seed)
    if lengths is not None:
        drawn = length_batches(lengths, batch, seed)
    if score is None:
        return train(model, drawn, loss, plan, progress=progress)
    best = BestCheckpoint(score)
    every = max(1, steps // checks)
    log = train(model, drawn, loss, plan, stop=best, check_every=every, progress=progress)
    best.restore(model)
    return log


@torch.no_grad()
def outputs(
    model: Callable[..., Tensor],
    *texts: Tokens | CachedStates | Bool[Tensor, "items longest"],
    batch: int = 128,
) -> Float[Tensor, "items ..."]:
    """What a model, or a method of one, says of all items, in batches of items of similar length.

    The first of `texts` has the lengths; all are indexed alike.
    """
    order = texts[0].mask.sum(1).argsort(stable=True)
    parts = [model(*(part[rows] for part in texts)) for rows in order.split(batch)]
    return torch.cat(parts)[order.argsort()]
