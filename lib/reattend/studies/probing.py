"""Training and comparing probes on cached tokens: the protocol that studies of probing share.

All probes of one encoder see the same tokens, steps, batches and learning rates to choose from. The rate is
chosen on the validation side with the first seed; then every seed runs at that rate. The probes of a
grid of rates differ in nothing else, so they are trained as one stack that reads each batch once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from reattend.vision.efficient_probing import Probe, knn_predict

Sides = Mapping[str, Tensor]
"""What belongs to "train", "validation" and "test"."""


@dataclass(frozen=True)
class ProbePlan:
    """How every probe of an encoder is trained; `batch` counts pictures."""

    classes: int
    steps: int
    batch: int
    rates: Sequence[float]
    seeds: int


@dataclass(frozen=True)
class ProbeRun:
    """One kind of probe after training.

    Attributes:
        probes: one trained probe per seed.
        rate: the learning rate that was chosen.
        parameters: trainable parameters of one probe with its classifier.
        validation: accuracy on the validation side in %, mean over seeds.
        hits: 1 where a test picture got its right class, [seeds, pictures].
    """

    probes: list[Probe]
    rate: float
    parameters: int
    validation: float
    hits: np.ndarray

    @property
    def accuracy(self) -> float:
        """Accuracy on the test side in %, mean over seeds."""
        return 100 * float(self.hits.mean())


def study(
    pooling: Callable[[], nn.Module],
    tokens: Sides,
    labels: Sides,
    plan: ProbePlan,
    chosen: Sequence[Tensor] | None = None,
) -> ProbeRun:
    """Choose the learning rate of a probe, train it with every seed, and test it.

    Args:
        pooling: makes the untrained pooling.
        tokens, labels: of the three sides; tokens are [pictures, tokens, dim].
        plan: how to train.
        chosen: for each seed the positions of the training pictures it may use; all by default.
    """
    probes, rates = [], list(plan.rates)
    for seed in range(plan.seeds):
        items = slice(None) if chosen is None else chosen[seed]
        train, targets = tokens["train"][items], labels["train"][items]
        trained = train_probes(pooling, rates, train, targets, plan, seed)
        if seed == 0:
            marks = [_mark(probe, tokens, labels) for probe in trained]
            best = int(np.argmax(marks))
            rates, trained = [rates[best]], [trained[best]]
        probes += trained
    return ProbeRun(
        probes,
        rates[0],
        sum(parameter.numel() for parameter in probes[0].parameters()),
        100 * float(np.mean([_mark(probe, tokens, labels) for probe in probes])),
        np.stack([hits(probe, tokens["test"], labels["test"]) for probe in probes]),
    )


def _mark(probe: Probe, tokens: Sides, labels: Sides) -> float:
    return float(hits(probe, tokens["validation"], labels["validation"]).mean())


def train_probes(
    pooling: Callable[[], nn.Module],
    rates: Sequence[float],
    tokens: Float[Tensor, "items tokens dim"],
    labels: Int[Tensor, " items"],
    plan: ProbePlan,
    seed: int,
) -> list[Probe]:
    """Train one probe per learning rate from the same start on the same batches.

    AdamW without weight decay; warm-up over a tenth of the steps, then a cosine to zero.
    """
    probes = []
    for _ in rates:
        torch.manual_seed(seed)
        probes.append(Probe(pooling(), plan.classes).to(tokens.device).train())
    groups = [
        {"params": list(probe.parameters()), "lr": rate}
        for probe, rate in zip(probes, rates, strict=True)
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    ramp = max(1, plan.steps // 10)

    def schedule(step: int) -> float:
        fall = math.cos(math.pi * max(0, step - ramp) / max(1, plan.steps - ramp))
        return min((step + 1) / ramp, 0.5 + 0.5 * fall)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
    names = [name for name, _ in probes[0].named_parameters()]
    buffers = {
        name: torch.stack([probe.get_buffer(name) for probe in probes])
        for name, _ in probes[0].named_buffers()
    }
    order = batches(len(tokens), plan.batch, seed)
    for _ in range(plan.steps):
        part = next(order)
        stack = {name: torch.stack([p.get_parameter(name) for p in probes]) for name in names}
        scores = torch.func.functional_call(probes[0], (stack, buffers), tokens[part])
        targets = labels[part].repeat(len(probes))
        # The sum over the stack leaves every probe the gradient of its own mean loss.
        loss = functional.cross_entropy(scores.flatten(0, 1), targets, reduction="sum") / len(part)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        scheduler.step()
    for position, probe in enumerate(probes):
        for name, stacked in buffers.items():
            probe.get_buffer(name).copy_(stacked[position])
    return [probe.eval() for probe in probes]


def batches(count: int, size: int, seed: int) -> Iterator[Int[Tensor, " part"]]:
    """Endless batches of positions below `count`: shuffled epochs of full batches, or all at once."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


@torch.no_grad()
def hits(
    probe: nn.Module, tokens: Float[Tensor, "items tokens dim"], labels: Int[Tensor, " items"]
) -> np.ndarray:
    """1 where the probe names the right class, else 0."""
    predicted = torch.cat([probe(part).argmax(-1) for part in tokens.split(256)])
    return (predicted == labels).float().cpu().numpy()


def nearest_neighbours(features: Sides, labels: Sides) -> np.ndarray:
    """Hits of k-NN on the test side, with k and temperature chosen on the validation side."""
    bank, known = features["train"], labels["train"]

    def right(side: str, setting: tuple[int, float]) -> Tensor:
        return (knn_predict(bank, known, features[side], *setting) == labels[side]).float()

    neighbours = [k for k in (5, 10, 20, 50, 100, 200) if k <= len(bank)]
    settings = [(k, temperature) for k in neighbours for temperature in (0.07, 0.1, 0.2)]
    best = max(settings, key=lambda setting: right("validation", setting).mean().item())
    return right("test", best).cpu().numpy()


def few_labels(
    labels: Int[Tensor, " items"], share: float, seed: int, fewest: int = 2
) -> Int[Tensor, " chosen"]:
    """Positions of a random share of every class, at least `fewest` of each."""
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = []
    for number in labels.unique().tolist():
        members = (labels.cpu() == number).nonzero()[:, 0]
        count = max(fewest, round(share * len(members)))
        parts.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(parts)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, gain) that gain more than every point of no more cost, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


# Costs ------------------------------------------------------------------------------------------------


def training_pass(
    pool: Callable[[Tensor], Tensor], module: nn.Module, tokens: Float[Tensor, "items tokens dim"]
) -> Callable[[], None]:
    """A closure that runs `pool`, a method of `module`, forward and backward on frozen tokens."""

    def run() -> None:
        module.zero_grad()
        pool(tokens).square().mean().backward()

    return run


@torch.no_grad()
def counted_macs(
    pool: Callable[[Tensor], Tensor], tokens: Float[Tensor, "items tokens dim"]
) -> int:
    """Multiply-adds that really run in a forward pass of all items."""
    with FlopCounterMode(display=False) as counter:
        pool(tokens)
    return counter.get_total_flops() // 2
