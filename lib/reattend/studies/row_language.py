"""Small language models on the row language: trained on fresh rows, scored in nats by position."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.data.row_language import RowLanguage, fresh_rows
from reattend.training.loop import TrainingLog, TrainingPlan, train
from reattend.trunks.language import Trunk


def next_token_loss(model: Trunk, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of every next token, and the mixers' own losses."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + model.auxiliary_loss()


def learn_rows(
    model: Trunk,
    language: RowLanguage,
    plan: TrainingPlan,
    batch: int,
    seed: int,
    *,
    groups: Callable[[nn.Module], list[dict]] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TrainingLog:
    """Train a model in place; models of one seed see the same rows in the same order."""
    device = next(model.parameters()).device
    rows = (part.to(device) for part in fresh_rows(language, batch, seed))
    own = {} if groups is None else {"groups": groups}
    return train(model, rows, next_token_loss, plan, progress=progress, **own)


@torch.no_grad()
def nats_by_position(
    model: nn.Module, tokens: Int[Tensor, "rows length"], batch: int = 64
) -> Float[Tensor, "rows predictions"]:
    """-log p of every next token, for a model in evaluation mode."""
    device = next(model.parameters()).device
    found = []
    for part in tokens.to(device).split(batch):
        logits = model(part[:, :-1]).transpose(1, 2)
        found.append(F.cross_entropy(logits, part[:, 1:], reduction="none"))
    return torch.cat(found).cpu()


def second_half(nats: Float[Tensor, "rows predictions"]) -> Float[Tensor, " rows"]:
    """Mean over the second half of each row, where most of what comes has been seen."""
    return nats[:, (nats.shape[1] + 1) // 2 :].mean(1)
