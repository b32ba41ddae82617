"""One training loop: AdamW, warm-up and a schedule, clipping, early stop, no silent NaN."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
"""Scalar loss of a model on one batch."""


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite; the message names the step and the place."""


@dataclass(frozen=True)
class TrainingPlan:
    """What the optimiser does.

    After `warmup` steps the learning rate falls along a cosine or a line to the share `floor` of its peak,
    or stays constant. `clip` bounds the gradient norm; `warmup` and `steps` count optimiser steps.
    `fused`: one kernel for all of AdamW; None: on CUDA alone (on a CPU it is faster and rounds otherwise).
    """

    steps: int
    learning_rate: float
    weight_decay: float = 0.1
    warmup: int = 0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.0
    fused: bool | None = None

    def rate(self, step: int) -> float:
        """Learning rate of step 0 .. steps - 1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "cosine":
            height = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            height = 1 - progress if self.schedule == "linear" else 1.0
        return self.learning_rate * (self.floor + (1 - self.floor) * height)


@dataclass
class TrainingLog:
    """Loss of every step taken and norm of its gradient before clipping."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        return len(self.losses)


def decay_matrices(model: nn.Module) -> list[dict]:
    """Parameter groups for `train`: weight decay for the weights of linear layers and convolutions alone.

    None for gains, biases, embeddings and whatever else is no map from channels to channels.
    """
    maps = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    decayed = {id(m.weight) for m in maps} - {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    rest = [p for p in trained if id(p) not in decayed]
    return [
        {"params": [p for p in trained if id(p) in decayed]},
        {"params": rest, "weight_decay": 0.0},
    ]


def origin_of_divergence(model: nn.Module, loss: Loss, batch: Any) -> str:
    """Name of the first parameter, else of the first module output, that is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    broken: list[str] = []

    def watch(name: str):
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                broken.append(name or "the whole model")

        return note

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return f"output of {broken[0]}" if broken else "the loss itself"


def train(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    plan: TrainingPlan,
    *,
    stop: Callable[[nn.Module], bool] | None = None,
    check_every: int = 50,
    after_step: Callable[[int], None] = lambda step: None,
    groups: Callable[[nn.Module], list[dict]] = lambda model: [{"params": model.parameters()}],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> TrainingLog:
    """Train `model` in place on the first `plan.steps` of `batches`; leave it in evaluation mode.

    `stop(model)` is asked every `check_every` steps, in evaluation mode; True ends the training.
    `after_step(step)` is called after each update, for instance to average weights or to measure.
    `groups(model)` are AdamW's parameter groups (for instance `decay_matrices`); the entry `rate` of one
    multiplies its learning rate.
    `progress` wraps the loop over steps (for instance `rep.progress`).
    Raises TrainingDiverged, and ValueError when the batches run out.
    """
    optimiser = torch.optim.AdamW(
        groups(model),
        lr=plan.rate(0),
        betas=plan.betas,
        weight_decay=plan.weight_decay,
        # On CUDA small models wait for launches.
        fused=True if plan.fused is None and next(model.parameters()).is_cuda else plan.fused,
    )
    log, source = TrainingLog(), iter(batches)
    model.train()
    for step in progress(range(plan.steps)):
        try:
            batch = next(source)
        except StopIteration:
            raise ValueError(f"batches ran out at step {step} of {plan.steps}") from None
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step) * group.get("rate", 1.0)
        optimiser.zero_grad()
        value = loss(model, batch)
        number = value.item()
        if not math.isfinite(number):
            where = origin_of_divergence(model, loss, batch)
            raise TrainingDiverged(f"loss is {number} at step {step}: {where} is not finite")
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), plan.clip).item()
        if not math.isfinite(norm):
            names = [n for n, p in model.named_parameters() if p.grad is not None]
            bad = [n for n in names if not model.get_parameter(n).grad.isfinite().all()]
            raise TrainingDiverged(
                f"gradient is {norm} at step {step}: {', '.join(bad) or 'its norm overflows'}"
            )
        optimiser.step()
        log.losses.append(number)
        log.gradient_norms.append(norm)
        after_step(step)
        if stop is not None and (step + 1) % check_every == 0:
            model.eval()
            log.stopped_early = stop(model)
            if log.stopped_early:
                break
            model.train()
    model.eval()
    return log


class BestCheckpoint:
    """Keeps the trained weights of the best score seen, the first of equals; a `stop` of `train`.

    Args:
        score: of a model in evaluation mode, higher is better.
    """

    def __init__(self, score: Callable[[nn.Module], float]) -> None:
        self.score, self.best = score, -math.inf
        self._weights: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module) -> bool:
        """Score the model and never stop the training."""
        found = self.score(model)
        if found > self.best:
            self.best = found
            trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
            self._weights = {name: p.detach().clone() for name, p in trained}
        return False

    def restore(self, model: nn.Module) -> None:
        """Give the model its best weights.

        Raises:
            ValueError: when no score was asked for.
        """
        if not self._weights:
            raise ValueError("no checkpoint was scored: check at least once in the training")
        model.load_state_dict(self._weights, strict=False)
