"""Training and comparing probes on cached tokens: the protocol that studies of probing share.

All probes of one encoder see the same tokens, steps, batches and learning rates to choose from. Pictures are
tested by cross-fitting: identities are divided into folds, each is tested by a probe that was trained on the
others, with a seed of its own. The rate is chosen on the validation side with the first fold. The
probes of a grid of rates differ in nothing else, so they are trained as one stack that reads each batch once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from reattend.vision.efficient_probing import (
    Probe,
    foreground_mass,
    knn_predict,
    mean_correlation_across,
    mean_pairwise_correlation,
    mean_pairwise_cosine,
    project,
)


@dataclass(frozen=True)
class Folds:
    """Positions of the pictures that choose learning rates, and of those that take turns in being tested."""

    validation: Int[Tensor, " chosen"]
    parts: tuple[Int[Tensor, " part"], ...]

    @property
    def tested(self) -> Int[Tensor, " pictures"]:
        """Positions of all tested pictures, fold by fold: the order of `ProbeRun.hits`."""
        return torch.cat(self.parts)

    def training(self, fold: int) -> Int[Tensor, " pictures"]:
        """Positions of the pictures that train the probe of a fold: those of the other folds."""
        return torch.cat([part for other, part in enumerate(self.parts) if other != fold])


def fold_by_identity(
    identities: Sequence[str], validation: Int[Tensor, " chosen"], count: int, seed: int = 0
) -> Folds:
    """Folds of about equally many identities; all pictures of an identity lie in one.

    Raises:
        ValueError: for fewer than two folds.
    """
    if count < 2:
        raise ValueError(f"cross-fitting needs at least two folds, got {count}")
    aside = set(validation.tolist())
    names = sorted({name for place, name in enumerate(identities) if place not in aside})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    fold = {names[place]: rank % count for rank, place in enumerate(order)}
    parts: list[list[int]] = [[] for _ in range(count)]
    for place, name in enumerate(identities):
        if place not in aside:
            parts[fold[name]].append(place)
    return Folds(validation, tuple(torch.tensor(part) for part in parts))


@dataclass(frozen=True)
class ProbePlan:
    """How every probe of an encoder is trained.

    Attributes:
        batch: pictures of a step.
        seed: of the first fold's training; the next fold's is one larger, and so on.
    """

    classes: int
    steps: int
    batch: int
    rates: Sequence[float]
    seed: int = 0


class ProjectedMean(nn.Module):
    """EP with its attention taken away: the mean of the tokens' values, whatever the number of queries.

    What EP is when all its queries are zero, with as many parameters but for the queries.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.v = nn.Linear(dim, dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch dim"]:
        return project(tokens.mean(1), self.v.weight)


@dataclass(frozen=True)
class ProbeRun:
    """One kind of probe after training.

    Attributes:
        probes: one trained probe for each fold.
        rate: the learning rate that was chosen.
        parameters: trainable parameters of one probe with its classifier.
        validation: accuracy on the validation side in %, mean over folds.
        hits: 1 where a tested picture got its right class, in the order of `Folds.tested`.
        folds: accuracy on each fold in %.
    """

    probes: list[Probe]
    rate: float
    parameters: int
    validation: float
    hits: Float[np.ndarray, " pictures"]
    folds: list[float]

    @property
    def accuracy(self) -> float:
        """Accuracy on all tested pictures in %."""
        return 100 * float(self.hits.mean())


def study(
    pooling: Callable[[], nn.Module],
    tokens: Float[Tensor, "items tokens dim"],
    labels: Int[Tensor, " items"],
    folds: Folds,
    plan: ProbePlan,
    share: float = 1.0,
) -> ProbeRun:
    """Choose the learning rate of a probe, then train and test it fold by fold.

    Args:
        pooling: makes the untrained pooling.
        tokens, labels: of all pictures.
        folds: which of them train, choose and test.
        plan: how to train.
        share: of each class's training labels that a probe may see; every fold draws its own.
    """
    probes, found, rates = [], [], list(plan.rates)
    for fold, part in enumerate(folds.parts):
        items, seed = folds.training(fold), plan.seed + fold
        if share < 1:
            items = items[few_labels(labels[items], share, seed)]
        trained = train_probes(pooling, rates, tokens, labels, plan, seed, items)
        if fold == 0:
            marks = [_mark(probe, tokens, labels, folds) for probe in trained]
            best = int(np.argmax(marks))
            rates, trained = [rates[best]], [trained[best]]
        probes += trained
        found.append(hits(trained[0], tokens, labels, part))
    return ProbeRun(
        probes,
        rates[0],
        sum(parameter.numel() for parameter in probes[0].parameters()),
        100 * float(np.mean([_mark(probe, tokens, labels, folds) for probe in probes])),
        np.concatenate(found),
        [100 * float(part.mean()) for part in found],
    )


def repeated_study(
    pooling: Callable[[], nn.Module],
    tokens: Float[Tensor, "items tokens dim"],
    labels: Int[Tensor, " items"],
    divisions: Sequence[Folds],
    plan: ProbePlan,
    share: float,
) -> list[ProbeRun]:
    """`study` once for each division into folds, always with other labelled pictures and first weights.

    The learning rate is chosen in the first. Arguments as those of `study`.
    """
    runs: list[ProbeRun] = []
    seed = plan.seed
    for folds in divisions:
        rates = [runs[0].rate] if runs else plan.rates
        anew = replace(plan, rates=rates, seed=seed)
        runs.append(study(pooling, tokens, labels, folds, anew, share))
        seed += len(folds.parts)
    return runs


def _mark(probe: Probe, tokens: Tensor, labels: Tensor, folds: Folds) -> float:
    return float(hits(probe, tokens, labels, folds.validation).mean())


def train_probes(
    pooling: Callable[[], nn.Module],
    rates: Sequence[float],
    tokens: Float[Tensor, "items tokens dim"],
    labels: Int[Tensor, " items"],
    plan: ProbePlan,
    seed: int,
    items: Int[Tensor, " chosen"],
) -> list[Probe]:
    """Train one probe per learning rate from the same start on the same batches of the pictures `items`.

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
    order = batches(len(items), plan.batch, seed)
    for _ in range(plan.steps):
        part = items[next(order)]
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
    probe: nn.Module,
    tokens: Float[Tensor, "items tokens dim"],
    labels: Int[Tensor, " items"],
    chosen: Int[Tensor, " part"],
) -> Float[np.ndarray, " part"]:
    """1 where the probe names the right class of a chosen picture, else 0."""
    predicted = torch.cat([probe(tokens[part]).argmax(-1) for part in chosen.split(256)])
    return (predicted == labels[chosen]).float().cpu().numpy()


def nearest_neighbours(
    features: Float[Tensor, "items dim"], labels: Int[Tensor, " items"], folds: Folds
) -> Float[np.ndarray, " pictures"]:
    """Hits of k-NN in the order of `Folds.tested`; k and temperature are chosen on the validation side."""

    def right(chosen: Tensor, fold: int, setting: tuple[int, float]) -> Tensor:
        bank = folds.training(fold)
        found = knn_predict(features[bank], labels[bank], features[chosen], *setting)
        return (found == labels[chosen]).float()

    smallest = min(len(folds.training(fold)) for fold in range(len(folds.parts)))
    neighbours = [k for k in (5, 10, 20, 50, 100, 200) if k <= smallest]
    settings = [(k, temperature) for k in neighbours for temperature in (0.07, 0.1, 0.2)]
    best = max(settings, key=lambda setting: right(folds.validation, 0, setting).mean().item())
    tested = [right(part, fold, best) for fold, part in enumerate(folds.parts)]
    return torch.cat(tested).cpu().numpy()


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


@torch.no_grad()
def map_statistics(
    pools: Sequence[nn.Module],
    tokens: Float[Tensor, "items tokens dim"],
    coverage: Float[Tensor, "items tokens"],
    folds: Folds,
) -> tuple[Float[np.ndarray, " pictures"], ...]:
    """Likeness of the maps of every tested picture, under the pooling of its fold, and what they look at.

    Args:
        pools: one pooling with a method `maps` for each fold.
        coverage: share of each token's patch that the object covers.

    Returns:
        in the order of `Folds.tested`: mean pairwise correlation, mean pairwise cosine, and attention on
        the object in %.
    """
    found = []
    for pool, chosen in zip(pools, folds.parts, strict=True):
        maps = torch.cat([pool.maps(tokens[part]).cpu() for part in chosen.split(256)])
        likeness = (mean_pairwise_correlation(maps), mean_pairwise_cosine(maps))
        found.append(torch.stack([*likeness, foreground_mass(maps, coverage[chosen])]))
    correlation, cosine, mass = torch.cat(found, 1).numpy()
    return correlation, cosine, 100 * mass


@torch.no_grad()
def likeness_across(
    pools: Sequence[nn.Module],
    others: Sequence[nn.Module],
    tokens: Float[Tensor, "items tokens dim"],
    folds: Folds,
) -> Float[np.ndarray, " pictures"]:
    """Mean correlation of a map of one probe with a map of another, for every tested picture.

    Args:
        pools, others: one pooling with a method `maps` for each fold, trained apart.

    Returns:
        in the order of `Folds.tested`.
    """
    found = []
    for pool, other, chosen in zip(pools, others, folds.parts, strict=True):
        for part in chosen.split(256):
            found.append(mean_correlation_across(pool.maps(tokens[part]), other.maps(tokens[part])))
    return torch.cat(found).cpu().numpy()


def accuracies_by_place(
    found: Mapping[tuple[str, int | float, str], Any],
    encoders: Mapping[str, str],
    probes: Sequence[str],
    accuracies: Callable[[Any], Sequence[float]],
) -> dict[str, dict[str, dict[int | float, np.ndarray]]]:
    """Repeated accuracies along an axis: encoder's title -> probe -> place -> accuracies in %.

    Args:
        found: (encoder, place on the axis, probe) -> what was measured there.
        encoders: encoder -> title.
        probes: that are wanted.
        accuracies: in % of what was measured.
    """
    return {
        title: {
            wanted: {
                place: np.array(accuracies(measured))
                for (encoder, place, probe), measured in found.items()
                if (encoder, probe) == (name, wanted)
            }
            for wanted in probes
        }
        for name, title in encoders.items()
    }


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
