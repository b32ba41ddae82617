"""The two synthetic tasks of selective attention: next tokens on a graph, and denoising.

Many seeds are trained at once, as slices of one tensor: nothing is shared between them, and Adam works
number by number, so each is what it would be alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from reattend.language_modeling.selective_attention import token_temperature

Weights = dict[str, Tensor]
"""Trained tensors by name, each with the seeds in its first axis."""


def _by_seed(seeds: Iterable[int], draw: Callable[[Generator], Tensor]) -> Tensor:
    """One draw a seed, stacked: what a seed gets does not depend on the others."""
    return torch.stack([draw(Generator().manual_seed(seed)) for seed in seeds])


def _normal(seeds: Iterable[int], *shape: int, std: float) -> Float[Tensor, "seeds ..."]:
    return std * _by_seed(seeds, lambda generator: torch.randn(*shape, generator=generator))


def _network(seeds: Sequence[int], width: int, hidden: int) -> Weights:
    """First layer, bias and direction of f(x) = u . GELU(W x + b); u starts at zero."""
    return {
        "widen": _normal([10_000 + seed for seed in seeds], width, hidden, std=width**-0.5),
        "bias": torch.zeros(len(seeds), 1, hidden),
        "direction": torch.zeros(len(seeds), hidden, 1),
    }


def _tau(
    weights: Weights, x: Float[Tensor, "seeds tokens width"]
) -> Float[Tensor, "seeds tokens 1"]:
    """1 + tanh(u . GELU(W x + b)) with an own first layer, in (0, 2)."""
    features = x @ weights["widen"] + weights["bias"]
    return 1 + token_temperature(features, weights["direction"])


def _minimise(
    weights: Weights,
    loss: Callable[[int], Float[Tensor, " seeds"]],
    steps: int,
    rate: float,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
    after_step: Callable[[int, Float[Tensor, " seeds"]], None] = lambda step, value: None,
) -> None:
    """Adam on each seed's loss, in place; the rate falls along a cosine to zero."""
    for tensor in weights.values():
        tensor.requires_grad_()
    optimiser = torch.optim.Adam(weights.values(), lr=rate)
    for step in progress(range(steps)):
        optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        value = loss(step)
        value.sum().backward()
        after_step(step, value.detach())
        optimiser.step()
    for tensor in weights.values():
        tensor.requires_grad_(False)


# --- next tokens on a graph ----------------------------------------------------------------------


@dataclass(frozen=True)
class Graphs:
    """Random directed graphs, one a seed, and frozen embeddings of their nodes.

    Attributes:
        degrees: successors of each node; the same in all seeds.
        target: P*, uniform over a node's successors.
        embeddings: random unit vectors.
    """

    seeds: tuple[int, ...]
    degrees: Int[Tensor, " nodes"]
    target: Float[Tensor, "seeds nodes nodes"]
    embeddings: Float[Tensor, "seeds nodes width"]

    @property
    def entropy(self) -> float:
        """Nats of P*, mean over nodes: the least cross-entropy."""
        return self.degrees.float().log().mean().item()


def draw_graphs(seeds: Iterable[int], nodes: int, width: int, degrees: Sequence[int]) -> Graphs:
    """Graphs whose node i has `degrees[i % len(degrees)]` successors, none of them itself.

    Raises:
        ValueError: when a node would need more successors than there are other nodes.
    """
    if max(degrees) >= nodes:
        raise ValueError(f"{max(degrees)} successors of one node among {nodes}")
    seeds = tuple(seeds)
    counts = torch.tensor(degrees)[torch.arange(nodes) % len(degrees)]

    def successors(generator: Generator) -> Tensor:
        order = torch.rand(nodes, nodes, generator=generator).fill_diagonal_(2.0)
        ranks = order.argsort(-1).argsort(-1)
        return (ranks < counts[:, None]) / counts[:, None]

    embeddings = _normal([20_000 + seed for seed in seeds], nodes, width, std=1.0)
    return Graphs(seeds, counts, _by_seed(seeds, successors), F.normalize(embeddings, dim=-1))


def graph_weights(arm: str, graphs: Graphs, hidden: int) -> Weights:
    """Untrained weights of an arm: W alone, and what the arm has beside it."""
    width, seeds = graphs.embeddings.shape[-1], graphs.seeds
    weights = {"W": _normal(seeds, width, width, std=width**-0.5)}
    if arm == "second W":
        weights["second"] = _normal([30_000 + s for s in seeds], width, width, std=width**-0.5)
    elif arm == "constant":
        weights["level"] = torch.zeros(len(seeds), 1, 1)
    elif arm == "shared":
        weights["direction"] = torch.zeros(len(seeds), width, 1)
    elif arm == "network query":  # as many numbers as the network of a temperature has
        narrower = round(hidden * (width + 2) / (2 * width + 1))
        weights |= _network(seeds, width, narrower)
        weights["direction"] = torch.zeros(len(seeds), narrower, width)
    elif arm in ("SSA", "permuted"):
        weights |= _network(seeds, width, hidden)
    elif arm != "vanilla":
        raise ValueError(f"unknown arm '{arm}' of the graph task")
    return weights


def graph_tau(
    arm: str, weights: Weights, graphs: Graphs, generator: Generator | None = None
) -> Float[Tensor, "seeds nodes 1"]:
    """The inverse temperature of every node's row; "permuted" gives each node that of a random other one.

    Without a generator the permuted arm's are those of the nodes themselves.
    """
    e = graphs.embeddings
    if arm == "constant":
        return (1 + weights["level"].tanh()).expand(*e.shape[:2], 1)
    if arm == "shared":
        return 1 + token_temperature(e @ weights["W"], weights["direction"])
    if arm not in ("SSA", "permuted"):
        return torch.ones_like(e[..., :1])
    tau = _tau(weights, e)
    if arm == "permuted" and generator is not None:
        order = torch.rand(tau.shape, generator=generator).argsort(1)
        tau = tau.gather(1, order)
    return tau


def graph_queries(arm: str, weights: Weights, graphs: Graphs) -> Float[Tensor, "seeds nodes width"]:
    """W^T e of every node, before its temperature."""
    e = graphs.embeddings
    if arm == "second W":
        return e @ (weights["W"] + weights["second"])
    if arm == "network query":
        features = F.gelu(e @ weights["widen"] + weights["bias"])
        return e @ weights["W"] + features @ weights["direction"]
    return e @ weights["W"]


def graph_rows(
    arm: str, weights: Weights, graphs: Graphs, generator: Generator | None = None
) -> Float[Tensor, "seeds nodes nodes"]:
    """log of the attention of every node, as the last token, over a sequence that holds each node once."""
    scores = graph_queries(arm, weights, graphs) @ graphs.embeddings.mT
    return (graph_tau(arm, weights, graphs, generator) * scores).log_softmax(-1)


def divergence(
    rows: Float[Tensor, "seeds nodes nodes"], target: Float[Tensor, "seeds nodes nodes"]
) -> Float[Tensor, " seeds"]:
    """KL(P* || attention) in nats, mean over nodes; `rows` are logarithms."""
    return (torch.special.xlogy(target, target) - target * rows).sum(-1).mean(-1)


def distance(
    rows: Float[Tensor, "seeds nodes nodes"], target: Float[Tensor, "seeds nodes nodes"]
) -> Float[Tensor, " seeds"]:
    """L1 distance of attention and P*, mean over nodes; between 0 and 2."""
    return (rows.exp() - target).abs().sum(-1).mean(-1)


@dataclass
class GraphRun:
    """One trained arm, all seeds.

    Attributes:
        divergence: KL to P* along training, [steps, seeds], and the Frobenius norm of W beside it.
        final: KL after training; of the permuted arm the mean over fresh permutations.
        final_distance: L1, likewise.
    """

    weights: Weights
    divergence: Float[np.ndarray, "steps seeds"]
    norm: Float[np.ndarray, "steps seeds"]
    final: Float[np.ndarray, " seeds"]
    final_distance: Float[np.ndarray, " seeds"]


def learn_graphs(
    arm: str,
    graphs: Graphs,
    steps: int,
    rate: float,
    hidden: int = 32,
    permutations: int = 32,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> GraphRun:
    """Train an arm on the whole of P*: no sampling, so the loss is the population's.

    Raises:
        ValueError: for an unknown arm.
    """
    weights = graph_weights(arm, graphs, hidden)
    generator = Generator().manual_seed(0)
    found, norms = [], []

    def loss(step: int) -> Tensor:
        return divergence(graph_rows(arm, weights, graphs, generator), graphs.target)

    def note(step: int, value: Tensor) -> None:
        matrix = weights["W"] + weights["second"] if arm == "second W" else weights["W"]
        found.append(value.numpy())
        norms.append(matrix.detach().flatten(1).norm(dim=1).numpy())

    _minimise(weights, loss, steps, rate, progress, note)
    passes = permutations if arm == "permuted" else 1
    ends = [graph_rows(arm, weights, graphs, generator) for _ in range(passes)]
    final, final_distance = (
        torch.stack([score(rows, graphs.target) for rows in ends]).mean(0).numpy()
        for score in (divergence, distance)
    )
    return GraphRun(weights, np.stack(found), np.stack(norms), final, final_distance)


def at_first(
    curve: Float[np.ndarray, "steps seeds"],
    level: Float[np.ndarray, " seeds"],
    values: Float[np.ndarray, "steps seeds"],
) -> Float[np.ndarray, " seeds"]:
    """`values` at the first step where `curve` is at or below `level`, seed by seed.

    Raises:
        ValueError: when a curve never gets there.
    """
    reached = curve <= level
    if not reached.any(0).all():
        raise ValueError(f"{(~reached.any(0)).sum()} of the curves never reach the level")
    return np.take_along_axis(values, reached.argmax(0)[None], axis=0)[0]


def degree_slope(
    tau: Float[Tensor, "seeds nodes 1"], degrees: Int[Tensor, " nodes"], least: float = 1e-3
) -> Float[np.ndarray, " seeds"]:
    """Least-squares slope of log tau on log degree, per seed.

    Temperatures below `least` count as that: the rows are even, and how even does not matter.
    """
    x = degrees.double().log()
    x = x - x.mean()
    return (tau[..., 0].double().clamp_min(least).log() @ x / (x @ x)).numpy()


# --- denoising -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoising:
    """Sequences in which few tokens carry the vector that is asked for.

    A signal token is mu + e, another one `loud` e, e standard normal; the last channel says which it is, +1
    or -1, with normal noise of sd `marker_noise`. mu is standard normal and new in each sequence. The first
    token asks.
    """

    tokens: int = 64
    width: int = 16
    share: float = 0.3
    loud: float = 2.0
    marker_noise: float = 0.3

    def draw(
        self, seeds: Sequence[int], batch: int, step: int
    ) -> tuple[
        Float[Tensor, "seeds batch tokens channels"],
        Float[Tensor, "seeds batch width"],
        Bool[Tensor, "seeds batch tokens"],
    ]:
        """Tokens, mu, and which tokens are signal; other numbers at each `step`."""
        n, d = self.tokens, self.width
        total = batch * (n * (d + 2) + d)
        numbers = _by_seed(
            [10**6 * (seed + 1) + step for seed in seeds],
            lambda generator: torch.randn(total, generator=generator),
        )
        noise, kind, marks, mean = numbers.split(
            [batch * n * d, batch * n, batch * n, batch * d], 1
        )
        mean = mean.unflatten(1, (batch, d))
        signal = (torch.special.ndtr(kind) < self.share).unflatten(1, (batch, n))
        chosen, noise = signal[..., None], noise.unflatten(1, (batch, n, d))
        content = torch.where(chosen, mean[:, :, None] + noise, self.loud * noise)
        marker = 2 * signal - 1 + self.marker_noise * marks.unflatten(1, (batch, n))
        return torch.cat([content, marker[..., None]], dim=-1), mean, signal


def posterior_mean(
    x: Float[Tensor, "seeds batch tokens channels"], signal: Bool[Tensor, "seeds batch tokens"]
) -> Float[Tensor, "seeds batch width"]:
    """E[mu | tokens, which are signal]: their sum over their number and one. No method can do better."""
    chosen = signal.to(x)[..., None]
    return (x[..., :-1] * chosen).sum(-2) / (chosen.sum(-2) + 1)


def denoise_weights(arm: str, task: Denoising, seeds: Sequence[int], hidden: int) -> Weights:
    """Untrained weights of an arm. The value map starts as the identity: a layer near the mean of all."""
    width, channels = task.width, task.width + 1
    weights = {
        "W": _normal(seeds, channels, channels, std=0.1 / channels),
        "V": torch.eye(channels, width).repeat(len(seeds), 1, 1),
    }
    if arm == "query bias":
        weights["query"] = torch.zeros(len(seeds), 1, channels)
    elif arm != "vanilla":
        weights |= _network(seeds, channels, hidden)
    return weights


DENOISE_ARMS = ("vanilla", "query bias", "query", "value", "output", "noise")


def denoise(
    arm: str,
    weights: Weights,
    x: Float[Tensor, "seeds batch tokens channels"],
    generator: Generator | None = None,
) -> tuple[Float[Tensor, "seeds batch width"], Float[Tensor, "seeds batch tokens"]]:
    """What one attention layer answers to the first token, and how much it weighs each token.

    softmax(x_0^T W X^T / sqrt(channels)) X V, and by arm: "query bias" adds a vector to the query; "query"
    scales it by tau(x_0); "value" scales row j of the values by tau(x_j); "output" scales the answer by
    tau(x_0), as third-party code has it; "noise" scales row j by the tau of another token of the sequence,
    permuted afresh each time.
    """
    seeds, batch, tokens, channels = x.shape
    tau = x.new_ones(seeds, batch, tokens)
    if "direction" in weights:
        tau = _tau(weights, x.flatten(1, 2)).view(seeds, batch, tokens)
    query = x[:, :, 0] @ weights["W"] + weights.get("query", 0.0)
    if arm == "query":
        query = query * tau[:, :, :1]
    scores = (x @ query[..., None])[..., 0] / channels**0.5
    weight = scores.softmax(-1)
    if arm == "noise":
        tau = tau.gather(-1, torch.rand(tau.shape, generator=generator).argsort(-1))
    if arm in ("value", "noise"):
        weight = weight * tau
    if arm == "output":
        weight = weight * tau[:, :, :1]
    return (weight[:, :, None] @ x)[:, :, 0] @ weights["V"], weight


def squared_error(
    answer: Float[Tensor, "seeds batch width"], mean: Float[Tensor, "seeds batch width"]
) -> Float[Tensor, " seeds"]:
    """|answer - mu|^2, mean over sequences."""
    return (answer - mean).square().sum(-1).mean(-1)


@dataclass
class DenoiseRun:
    """One trained arm, all seeds: its weights, its loss along training and its error on new sequences."""

    weights: Weights
    error: Float[np.ndarray, " seeds"]
    losses: list[np.ndarray] = field(default_factory=list)


def learn_denoising(
    arm: str,
    task: Denoising,
    seeds: Sequence[int],
    steps: int,
    rate: float,
    batch: int,
    tests: int,
    hidden: int = 32,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> DenoiseRun:
    """Train an arm on fresh sequences; all arms of a seed see the same ones.

    Raises:
        ValueError: for an unknown arm.
    """
    if arm not in DENOISE_ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(DENOISE_ARMS)}")
    weights = denoise_weights(arm, task, seeds, hidden)
    generator, losses = Generator().manual_seed(0), []

    def loss(step: int) -> Tensor:
        x, mean, _ = task.draw(seeds, batch, step)
        return squared_error(denoise(arm, weights, x, generator)[0], mean)

    _minimise(
        weights, loss, steps, rate, progress, lambda step, value: losses.append(value.numpy())
    )
    x, mean, _ = task.draw(seeds, tests, step=steps)
    error = squared_error(denoise(arm, weights, x, generator)[0], mean).numpy()
    return DenoiseRun(weights, error, losses)


def bounds_of_denoising(
    task: Denoising, seeds: Sequence[int], tests: int, step: int
) -> dict[str, Float[np.ndarray, " seeds"]]:
    """Errors without a layer: the plain mean of all tokens, it times the best factor, and Bayes."""
    x, mean, signal = task.draw(seeds, tests, step)
    plain = x[..., :-1].mean(-2)
    factor = (plain * mean).sum((1, 2), True) / plain.square().sum((1, 2), True)
    answers = {
        "mean of all": plain,
        "scaled mean": factor * plain,
        "Bayes": posterior_mean(x, signal),
    }
    return {name: squared_error(answer, mean).numpy() for name, answer in answers.items()}
