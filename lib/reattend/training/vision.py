"""Trains and tests the small vision classifiers: one recipe for every attention that is compared."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reattend.training.loop import TrainingLog, TrainingPlan, train


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    `flip`: mirror half of the pictures, which changes what a sign says and what lies left of what;
    `shift`: move each by up to so many pixels, borders repeated;
    `average`: decay of the moving average of the weights that is kept in the end, 0 for none.
    """

    steps: int
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 20
    label_smoothing: float = 0.1
    flip: bool = False
    shift: int = 2
    average: float = 0.0


def augment(
    pixels: UInt8[Tensor, "batch channels height width"],
    flip: bool,
    shift: int,
    generator: Generator,
) -> UInt8[Tensor, "batch channels height width"]:
    """Mirror and move each picture at random."""
    count, _, height, width = pixels.shape
    columns = torch.arange(width).expand(count, width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = torch.arange(height).expand(count, height)
    if shift:
        moves = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator)
        rows = (rows + moves[0]).clamp(0, height - 1)
        columns = (columns + moves[1]).clamp(0, width - 1)
    items = torch.arange(count)[:, None, None]
    moved = pixels.movedim(1, -1)[items, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)


def batches(
    pixels: UInt8[Tensor, "items channels height width"],
    labels: Int[Tensor, " items"],
    recipe: Recipe,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches; every picture once before any comes again.

    Raises:
        ValueError: when there are fewer pictures than a batch holds.
    """
    if len(pixels) < recipe.batch:
        raise ValueError(f"{len(pixels)} pictures do not fill a batch of {recipe.batch}")
    generator = Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(pixels), generator=generator)
        for chosen in order[: len(order) // recipe.batch * recipe.batch].split(recipe.batch):
            moved = augment(pixels[chosen], recipe.flip, recipe.shift, generator)
            yield moved.to(device), labels[chosen].to(device)


def fit(
    model: nn.Module,
    pixels: UInt8[Tensor, "items channels height width"],
    labels: Int[Tensor, " items"],
    recipe: Recipe,
    *,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TrainingLog:
    """Train a classifier in place with cross-entropy; leave it in evaluation mode.

    Batches and augmentation depend on `seed` alone, so models trained with one seed see the same
    pictures in the same order.
    """
    device = next(model.parameters()).device
    plan = TrainingPlan(
        recipe.steps, recipe.learning_rate, recipe.weight_decay, warmup=recipe.warmup
    )
    averaged = None
    if recipe.average:
        average = get_ema_multi_avg_fn(recipe.average)
        averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=recipe.label_smoothing)

    log = train(
        model,
        batches(pixels, labels, recipe, seed, device),
        loss,
        plan,
        after_step=lambda step: averaged and averaged.update_parameters(model),
        progress=progress,
    )
    if averaged is not None:
        model.load_state_dict(averaged.module.state_dict())
    return log


@torch.no_grad()
def predictions(
    model: nn.Module, pixels: UInt8[Tensor, "items channels height width"], batch: int = 256
) -> Int[Tensor, " items"]:
    """The most probable class of each picture."""
    device = next(model.parameters()).device
    parts = [model(part.to(device)).argmax(1).cpu() for part in pixels.split(batch)]
    return torch.cat(parts)


def correct(
    model: nn.Module,
    pixels: UInt8[Tensor, "items channels height width"],
    labels: Int[Tensor, " items"],
    batch: int = 256,
) -> Bool[Tensor, " items"]:
    """Which test pictures a model classifies correctly; pair models by picture for an interval."""
    return predictions(model, pixels, batch) == labels
