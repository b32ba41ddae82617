"""Trained in-context regressors measured: patterns of two heads, their paths, and what several tasks make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from reattend.theory.icl_regression import (
    MultiHeadAttention,
    Regressions,
    best_combination,
    diagonal_spread,
    gradient_flow,
    gradient_step,
    imbalance,
    last_entries,
    mean_diagonal,
    off_diagonal,
    other_entries,
    ridge,
    sample_multitask,
)
from reattend.training.loop import TrainingPlan, train

BOUNDS = {
    "off diagonal": 0.15,
    "spread of diagonal": 0.15,
    "other OV entries": 0.1,
    "|sum mu| / sum |mu|": 0.1,
}
"""How large each pattern of two heads may be for the paper's description to hold."""

BASELINES = ("linear attention", "gradient step", "debiased step", "ridge", "zero")
"""Predictors beside the trained heads."""

PER_SEED = Float[np.ndarray, " seeds"]


def train_stack(
    model: MultiHeadAttention,
    draw: Callable[[int], Regressions],
    rate: float,
    steps: int,
    label: str,
    watch: Callable[[MultiHeadAttention], bool] | None = None,
    *,
    batch: int,
    every: int,
    device: torch.device,
    progress: Callable[[Iterable[int], str], Iterable[int]],
) -> MultiHeadAttention:
    """Train all models and all seeds of a stack at once; every weight has its own Adam state.

    Args:
        draw: gives so many fresh contexts for each seed.
        rate: learning rate, decayed along a cosine to zero.
        label: of the progress bar.
        watch: is called every `every` steps; the training stops where it returns True.
        batch: contexts of one step.
        progress: makes the progress bar.
    """
    plan = TrainingPlan(steps=steps, learning_rate=rate, weight_decay=0.0, clip=math.inf)
    train(
        model.to(device),
        iter(lambda: draw(batch), None),
        lambda stack, data: stack.losses(data).sum(),
        plan,
        stop=watch,
        check_every=every,
        progress=lambda numbers: progress(numbers, label),
    )
    return model


class Predictors:
    """Trained heads beside what they are compared with, on the same contexts.

    The sizes of the gradient steps, and nothing else, are fitted.

    Args:
        softmax: the trained models.
        linear: linear attention with two heads.
        heads: names of the models in `softmax`.
        fitting: contexts of one seed for the sizes of the gradient steps.
        length: of the contexts that `linear` was trained on.
        noise: variance of the label noise.

    Attributes:
        names: of the predictions, in order.
    """

    def __init__(
        self,
        softmax: MultiHeadAttention,
        linear: MultiHeadAttention,
        heads: Sequence[str],
        fitting: Regressions,
        length: int,
        noise: float,
    ) -> None:
        self.softmax, self.linear, self.length, self.noise = softmax, linear, length, noise
        self.names = [*heads, *BASELINES, "linear attention, rescaled"]
        self.sizes = {
            debiased: best_combination(
                gradient_step(fitting, debiased=debiased)[0], fitting.target[0, :, 0]
            )
            for debiased in (False, True)
        }

    @torch.no_grad()
    def __call__(self, data: Regressions) -> Float[Tensor, "seeds batch names"]:
        """Predictions of everything in `names`."""
        by_linear = self.linear(data)[..., 0]
        columns = [
            self.softmax(data)[..., 0],
            by_linear,
            self.sizes[False] * gradient_step(data, debiased=False),
            self.sizes[True] * gradient_step(data, debiased=True),
            ridge(data, data.inputs.shape[-1] * self.noise),
            torch.zeros_like(data.target),
            by_linear * self.length / data.inputs.shape[-2],  # as if it knew the context's length
        ]
        return torch.cat(columns, -1)

    def losses(self, data: Regressions) -> Float[Tensor, "seeds names"]:
        """Mean squared errors over the batch."""
        return (self(data) - data.target).square().mean(-2)


class Watch:
    """Records omega and mu of every head; as a stopping test of a training it never stops."""

    def __init__(self, model: MultiHeadAttention) -> None:
        self._omega: list[Tensor] = []
        self._mu: list[Tensor] = []
        self(model)

    @torch.no_grad()
    def __call__(self, model: MultiHeadAttention) -> bool:
        self._omega.append(mean_diagonal(model.kq(), model.dim).double().cpu())
        self._mu.append(last_entries(model.ov())[..., 0].double().cpu())
        return False

    def paths(self, heads: slice) -> dict[str, Float[np.ndarray, "snapshots seeds heads"]]:
        """omega and mu of these heads at every record."""
        kept = {"omega": self._omega, "mu": self._mu}
        return {name: torch.stack(records)[:, :, heads].numpy() for name, records in kept.items()}


def patterns_of(
    kq: Float[Tensor, "seeds 2 width width"], ov: Float[Tensor, "seeds 2 1 width"], dim: int
) -> dict[str, PER_SEED]:
    """The patterns of two heads, each of the worse head."""
    omega, mu = mean_diagonal(kq, dim), last_entries(ov)[..., 0]
    return {
        "off diagonal": off_diagonal(kq, dim).amax(-1).numpy(),
        "spread of diagonal": diagonal_spread(kq, dim).amax(-1).numpy(),
        "other OV entries": other_entries(ov).amax(-1).numpy(),
        "|sum mu| / sum |mu|": imbalance(mu).numpy(),
        "signs agree": (omega * mu > 0).double().mean(-1).numpy(),
        "sum mu omega": (omega * mu).sum(-1).numpy(),
    }


def worst_pattern(found: Mapping[str, PER_SEED]) -> PER_SEED:
    """The worst pattern over its bound; at least 10 where a head's omega and mu differ in sign."""
    over = np.max([found[name] / bound for name, bound in BOUNDS.items()], axis=0)
    return np.where(found["signs agree"] < 1, np.maximum(over, 10), over)


def patterns_table(
    found: Mapping[str, PER_SEED],
    omega: Float[Tensor, "seeds 2"],
    mu: Float[Tensor, "seeds 2"],
    risk: PER_SEED,
    published: Mapping[str, Sequence[float]],
) -> pd.DataFrame:
    """Patterns of two heads and their risk, one row a seed; the last row is the paper's omega and mu.

    Args:
        found: the patterns, as `patterns_of` gives them.
        published: "omega" and "mu" of the paper's two heads.
    """

    def signed(pair: Iterable[float]) -> str:
        return ", ".join(f"{value:+.2f}" for value in pair)

    table = pd.DataFrame(found)
    table.insert(0, "seed", np.arange(len(table)))
    table.insert(1, "omega", [signed(pair) for pair in omega.tolist()])
    table.insert(2, "mu", [signed(pair) for pair in mu.tolist()])
    table["worst over its bound"] = worst_pattern(found)
    table["risk"] = risk
    reported = {name: signed(published[name]) for name in ("omega", "mu")}
    table.loc[len(table)] = pd.Series({"seed": "the paper's plots"} | reported)
    return table


def risk_table(
    risks: Mapping[str, PER_SEED], monte_carlo: Mapping[str, float], formulas: Mapping[str, float]
) -> pd.DataFrame:
    """Risk of each predictor over the seeds, beside the reduced model's and the large-L formula's."""
    return pd.DataFrame(
        {
            "predictor": list(risks),
            "risk, mean over seeds": [risk.mean() for risk in risks.values()],
            "least": [risk.min() for risk in risks.values()],
            "largest": [risk.max() for risk in risks.values()],
            "Monte Carlo of the reduced model": [monte_carlo.get(name, np.nan) for name in risks],
            "large-L formula": [formulas.get(name, np.nan) for name in risks],
        }
    )


def orders(
    kq: Float[Tensor, "seeds heads width width"], eigenvalues: Float[Tensor, " dim"]
) -> PER_SEED:
    """Worse head: Spearman correlation of the size of KQ's diagonal with 1 / eigenvalue."""
    inverse, dim = 1 / eigenvalues.numpy(), len(eigenvalues)
    sizes = kq.diagonal(dim1=-2, dim2=-1)[..., :dim].abs().numpy()
    return np.array([min(spearmanr(size, inverse).statistic for size in seed) for seed in sizes])


@dataclass(frozen=True)
class FlowFit:
    """The gradient flow of the approximate risk fitted to two trained heads.

    Attributes:
        start: first record that is compared: from here on both heads keep their signs.
        factor: of time, the only thing that is fitted.
        quality: R^2 of omega, each head about its own mean.
        omega: of the flow, from `start` on.
    """

    start: int
    factor: float
    quality: float
    omega: Float[np.ndarray, "records 2"]


def fit_flow(
    omega: Float[np.ndarray, "snapshots 2"],
    mu: Float[np.ndarray, "snapshots 2"],
    time: Float[np.ndarray, " snapshots"],
    setting: dict[str, int | float],
) -> FlowFit:
    """The flow that starts where the trained heads first have the signs that they keep.

    Args:
        time: of the training at every record, the sum of its learning rates.
        setting: dim, length and noise of the approximate risk.
    """
    kept = ((np.sign(omega) == np.sign(omega[-1])) & (np.sign(mu) == np.sign(mu[-1]))).all(1)
    start = int(np.flatnonzero(~kept)[-1]) + 1 if not kept.all() else 0
    start = min(start, len(omega) - 3)
    passed, truth = time[start:] - time[start], omega[start:]
    factors = np.geomspace(0.1, 1e4, 251)
    begin = torch.from_numpy(mu[start]), torch.from_numpy(omega[start])
    flow = gradient_flow(*begin, factors[-1] * passed[-1], **setting)
    total = np.square(truth - truth.mean(0)).sum()
    fits = [1 - np.square(flow(f * passed)[2:].T - truth).sum() / total for f in factors]
    best = int(np.argmax(fits))
    return FlowFit(start, factors[best], fits[best], flow(factors[best] * passed)[2:].T)


def growth(paths: dict[str, Float[np.ndarray, "snapshots seeds 2"]], shift: int = 0) -> PER_SEED:
    """Worse head: correlation of omega and mu from the first record until |omega| is largest.

    Args:
        shift: takes mu from the start so many places further on, the head that ends higher with the head
            that ends higher; so what every growing head has in common can be told from its own path.
    """
    higher = paths["mu"][-1].argmax(-1)[None, :, None]
    omega, mu = (
        np.concatenate([np.take_along_axis(paths[n], h, 2) for h in (higher, 1 - higher)], 2)
        for n in ("omega", "mu")
    )
    mu = np.roll(mu, -shift, axis=1)

    def one(omega: np.ndarray, mu: np.ndarray) -> float:
        stop = max(int(np.abs(omega).argmax()) + 1, 3)
        return float(np.corrcoef(omega[:stop], mu[:stop])[0, 1])

    seeds = range(omega.shape[1])
    return np.array([min(one(omega[:, s, h], mu[:, s, h]) for h in (0, 1)) for s in seeds])


class TwoTasks:
    """Two regressions on the same six covariates: the first uses coordinates 1 to 4, the second 3 to 6.

    Args:
        noise: variance of the label noise as a share of the signal's.
        device: of the contexts.
    """

    LENGTH = 48

    def __init__(self, noise: float, device: torch.device) -> None:
        chosen = [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
        self._supports = torch.tensor(chosen, dtype=torch.bool, device=device)
        self._noise = noise

    def stream(self, seeds: int, source: torch.Generator) -> Callable[[int], Regressions]:
        """A function that draws so many fresh contexts for each of `seeds` seeds."""

        def draw(count: int) -> Regressions:
            return sample_multitask(
                (seeds, count), self.LENGTH, self._supports, self._noise, source
            )

        return draw

    def separate_steps(
        self, fitting: Regressions
    ) -> Callable[[Regressions], Float[Tensor, "*stack batch 2"]]:
        """Predictions of one debiased gradient step for each task on its own coordinates.

        Args:
            fitting: contexts of one seed on which the sizes of the steps, and nothing else, are fitted.
        """
        sizes = []
        for task in range(2):
            alone = self._alone(fitting, task)
            step = gradient_step(alone, debiased=True)[0]
            sizes.append(best_combination(step, alone.target[0, :, 0]))

        def predict(data: Regressions) -> Tensor:
            parts = [self._alone(data, task) for task in range(2)]
            pairs = zip(sizes, parts, strict=True)
            return torch.cat([n * gradient_step(part, debiased=True) for n, part in pairs], -1)

        return predict

    def losses(
        self, model: MultiHeadAttention, separate: Callable[[Regressions], Tensor]
    ) -> Callable[[Regressions], Float[Tensor, "seeds models"]]:
        """Losses of all models of a stack, and last of the separate steps, summed over both tasks."""

        @torch.no_grad()
        def measure(data: Regressions) -> Tensor:
            alone = (separate(data) - data.target).square().sum(-1).mean(-1, keepdim=True)
            return torch.cat([model.losses(data), alone], -1)

        return measure

    def _alone(self, data: Regressions, task: int) -> Regressions:
        inside, label = self._supports[task], slice(task, task + 1)
        return Regressions(
            data.inputs[..., inside],
            data.labels[..., label],
            data.query[..., inside],
            data.target[..., label],
        )


def tasks_table(
    mu: Float[Tensor, "seeds heads 2"],
    models: Mapping[int, slice],
    shared: Mapping[int, PER_SEED],
    risk: Float[np.ndarray, "seeds models"],
) -> pd.DataFrame:
    """One row a model and seed: what every head gives to either task, and the risk.

    Args:
        models: number of heads -> where they lie.
        shared: number of heads -> how many serve both tasks.
        risk: of every model, and last of separate debiased steps.
    """
    return pd.DataFrame(
        [
            {
                "heads": heads,
                "seed": seed,
                "mu of task 1": ", ".join(f"{m:+.2f}" for m in mu[seed, own, 0]),
                "mu of task 2": ", ".join(f"{m:+.2f}" for m in mu[seed, own, 1]),
                "heads that serve both": shared[heads][seed],
                "risk": risk[seed, number],
                "risk of separate debiased steps": risk[seed, -1],
            }
            for number, (heads, own) in enumerate(models.items())
            for seed in range(len(mu))
        ]
    )
