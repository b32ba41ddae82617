"""Training on a task whose batches are drawn anew: one stream a seed, the same for every arm."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.training.loop import TrainingLog, TrainingPlan, train

Draw = Callable[[Generator], tuple[Tensor, Tensor]]
"""Draws one batch: inputs and labels."""


def fit_on_drawn(model: nn.Module, draw: Draw, plan: TrainingPlan, seed: int) -> TrainingLog:
    """Train a classifier in place with cross-entropy on batches that depend on `seed` alone."""
    device = next(model.parameters()).device

    def batches():
        generator = Generator().manual_seed(1_000 + seed)
        while True:
            inputs, labels = draw(generator)
            yield inputs.to(device), labels.to(device)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return train(model, batches(), loss, plan)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of right answers in per cent."""
    device = next(model.parameters()).device
    answers = [model(part.to(device)).argmax(1).cpu() for part in inputs.split(batch)]
    return 100 * (torch.cat(answers) == labels).double().mean().item()
