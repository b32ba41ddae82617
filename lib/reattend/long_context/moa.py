"""MoA: sinks and a sliding window for every head, each with a span of its own that grows with the prompt.

"MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", 2024, arXiv
2406.14909 (v3: "Mixture of Attention Spans", CoLM 2025).

Every head follows a rule S(N) = alpha + beta N. Which rule, is decided once for a model:

1. a profile says how much the loss of calibration texts rises where attention is masked;
2. a rule costs what it masks, and a mixed-integer program picks one for each head, at a mean density;
3. of its plans on the Pareto front over lengths the one of least true loss is taken.

    (profile,) = profile_influence(model, items, block_size=64)     # at one length
    costs = profile.costs(windows)                                  # [layers, heads, rules]
    plan = Plan.of(rules, pareto_choices(Problem(...))[0], block_size=64)
    with attach(model, "moa", plan=plan): ...

A *unit* is a key head: query heads that share one share its cache, so they share its rule.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import block_count, diagonal_sums, query_block_count
from reattend.attention.dense import (
    causal_sdpa,
    causal_token_mask,
    masked_softmax,
    repeat_key_heads,
    widened,
)
from reattend.attention.host import attach
from reattend.attention.kv_selection import KVSelection
from reattend.attention.method import (
    AttentionMethod,
    BlockSparseMethod,
    CacheView,
    Phase,
    check_count,
)
from reattend.attention.statistics import block_mass

# Added to 1 - A, as in the official code, which adds the machine epsilon of its type.
EPSILON = 1e-6


class Rule(NamedTuple):
    """A span as a function of the prompt, S(N) = alpha + beta N tokens (section 3.1).

    Attributes:
        alpha: tokens, may be negative.
        beta: share of the prompt.
    """

    alpha: int
    beta: float

    def window(self, blocks: int, block_size: int) -> int:
        """Blocks of the window of a prompt of `blocks` blocks, the diagonal one among them."""
        return min(max(1, int(self.alpha // block_size + self.beta * blocks)), max(blocks, 1))


@dataclass(frozen=True)
class Plan:
    """One rule for every key head of every layer.

    Attributes:
        rules: by layer and key head.
        block_size: tokens of a block.
        sink: blocks at the start of the sequence that every query sees, beside its window.
    """

    rules: tuple[tuple[Rule, ...], ...]
    block_size: int = 64
    sink: int = 1

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size, at_least=1)
        check_count("sink", self.sink)
        if not self.rules or len({len(layer) for layer in self.rules}) != 1 or not self.rules[0]:
            raise ValueError("a plan needs as many rules in every layer, one for each key head")

    @classmethod
    def of(
        cls,
        rules: Sequence[Rule],
        choice: Int[np.ndarray, "layers heads"],
        *,
        block_size: int = 64,
        sink: int = 1,
    ) -> Plan:
        """The plan that gives every unit the rule of that number."""
        chosen = tuple(tuple(rules[number] for number in layer) for layer in choice)
        return cls(chosen, block_size, sink)

    @classmethod
    def uniform(
        cls, rule: Rule, layers: int, heads: int, *, block_size: int = 64, sink: int = 1
    ) -> Plan:
        """StreamingLLM: one rule for all."""
        return cls(((rule,) * heads,) * layers, block_size, sink)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file holds no plan.
        """
        try:
            held = json.loads(Path(path).read_text())
            rules = tuple(
                tuple(Rule(int(alpha), float(beta)) for alpha, beta in layer)
                for layer in held["rules"]
            )
            return cls(rules, held["block_size"], held["sink"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds no plan: it needs rules [[[alpha, beta], ...], ...], block_size and "
                "sink, as Plan.save writes them"
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the plan as json: [alpha, beta] by layer and key head, block size and sinks."""
        rules = [[list(rule) for rule in layer] for layer in self.rules]
        held = {"block_size": self.block_size, "sink": self.sink, "rules": rules}
        Path(path).write_text(json.dumps(held) + "\n")

    def permuted(self, seed: int) -> Plan:
        """The same rules in a random order over all units: of equal density at every length."""
        units = list(itertools.chain(*self.rules))
        order = np.random.default_rng(seed).permutation(len(units))
        heads = len(self.rules[0])
        shuffled = [units[number] for number in order]
        rows = range(0, len(units), heads)
        return replace(self, rules=tuple(tuple(shuffled[row : row + heads]) for row in rows))

    def windows(self, tokens: int) -> Int[Tensor, "layers heads"]:
        """Blocks of every window for a prompt of so many tokens."""
        blocks = block_count(tokens, self.block_size)
        return torch.tensor(
            [[rule.window(blocks, self.block_size) for rule in layer] for layer in self.rules]
        )

    def density(self, tokens: int) -> float:
        """Share of a prompt's cache that the next token needs, sinks included, mean over the units."""
        blocks = block_count(tokens, self.block_size)
        return ((self.windows(tokens) + self.sink).clamp_max(blocks) / blocks).mean().item()


class MoA(BlockSparseMethod, KVSelection):
    """The method, for any model that `reattend.attention.host.attach` accepts.

    A token in block i sees the first `sink` blocks and the w blocks that end with block i, in the
    prompt and behind it: decoding reads what the mask shows, whole blocks of it, and what it does not
    read it never reads again, so a cache of sink + w blocks would do. Heads of different spans are
    read together, filled up to the widest and masked, not grouped by rule.
    """

    def __init__(
        self, *, plan: Plan | str | Path, length: int | None = None, backend: Backend = "auto"
    ) -> None:
        """
        Args:
            plan: the rules of this model, or the json file that holds them.
            length: tokens of the prompt, from which spans follow. None: as many as there are when it
                is read, which is wrong for a prompt in chunks.
            backend: see `reattend.attention.block_sparse.block_sparse_attention`.

        Raises:
            ValueError: the file holds no plan, or `length` is no count.
        """
        self.plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        self.length = None if length is None else check_count("length", length, at_least=1)
        super().__init__(block_size=self.plan.block_size, backend=backend)

    def saves_from(self, phase: Phase) -> int | None:
        """Least tokens of a prompt of which some head leaves a block out."""
        size, sink = self.block_size, self.plan.sink
        rules = {rule for layer in self.plan.rules for rule in layer}
        if all(rule.beta >= 1 and rule.alpha // size >= -sink for rule in rules):
            return None
        enough = next(
            n for n in itertools.count(1) if any(rule.window(n, size) + sink < n for rule in rules)
        )
        return (enough - 1) * size + 1

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        """Sinks and the window of each head.

        Raises:
            ValueError: the plan has no such layer, or another number of key heads.
        """
        keys = key.shape[2]
        columns = torch.arange(block_count(keys, self.block_size), device=key.device)
        rows = columns[-query_block_count(query.shape[2], keys, self.block_size) :]
        window = self._window(layer, key.shape[1], self.length or keys).to(key.device)
        seen = columns > rows[:, None] - window[:, None, None]
        seen = (seen | (columns < self.plan.sink)).repeat_interleave(
            query.shape[1] // key.shape[1], dim=0
        )
        return seen.expand(len(query), -1, -1, -1)

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> int:
        """Tokens of the prompt, from which the spans of what follows are."""
        return self.length or key.shape[2]

    def rewound(self, state: int, keys: int) -> int:
        return state

    def decode(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        value: Float[Tensor, "batch key_heads keys value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
        cache: CacheView | None = None,
    ) -> Float[Tensor, "batch query_heads 1 value_dim"]:
        """Attention of one new token over the sinks and the window of its head."""
        self._layer = layer  # for `choose`, which is not told
        return super().decode(
            query, key, value, scale=scale, layer=layer, padding=padding, cache=cache
        )

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: int,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        block = torch.arange(key.shape[2], device=key.device) // self.block_size
        window = self._window(self._layer, key.shape[1], state).to(key.device)
        seen = (block < self.plan.sink) | (block > block[-1] - window[:, None])
        return seen.expand(len(key), -1, -1)

    def _window(self, layer: int, heads: int, tokens: int) -> Int[Tensor, " heads"]:
        """Blocks of the windows of a layer.

        Raises:
            ValueError: the plan is of another model.
        """
        if layer >= len(self.plan.rules) or heads != len(self.plan.rules[layer]):
            raise ValueError(
                f"the plan is for {len(self.plan.rules)} layers of {len(self.plan.rules[0])} key heads, "
                f"but layer {layer} of this model has {heads}: make a plan for this model"
            )
        blocks = block_count(tokens, self.block_size)
        rules = self.plan.rules[layer]
        return torch.tensor([rule.window(blocks, self.block_size) for rule in rules])


# The profile


@dataclass(frozen=True)
class Item:
    """A calibration text.

    Attributes:
        tokens: of the text, prompt and response.
        scored: the tokens whose mean cross-entropy is the loss: the response.
    """

    tokens: Int[Tensor, " tokens"]
    scored: Bool[Tensor, " tokens"]


@dataclass(frozen=True)
class Profile:
    """Influence of attention on the loss, at one length.

    Attributes:
        influence: sum of |E| in every block of the attention maps, over the query heads of each key
            head; the mean over the items. 0 above the diagonal.
    """

    influence: Float[Tensor, "layers heads blocks blocks"]

    def costs(
        self, windows: Int[Tensor, " rules"], sink: int = 1
    ) -> Float[Tensor, "layers heads rules"]:
        """Predicted rise of the loss under windows of so many blocks: the influence that they mask."""
        blocks = self.influence.shape[-1]
        free = self.influence.double() * (torch.arange(blocks) >= sink)
        by_distance = F.pad(diagonal_sums(free), (0, 1))
        masked = by_distance.flip(-1).cumsum(-1).flip(-1)  # by what lies at a distance or beyond
        return masked[..., windows.clamp_max(blocks)]

    def cost(self, plan: Plan) -> float:
        """Predicted rise of the loss under a plan, at this length: the sum over the units."""
        blocks = self.influence.shape[-1]
        costs = self.costs(torch.arange(blocks + 1), plan.sink)
        windows = plan.windows(blocks * plan.block_size)
        return costs.gather(-1, windows[..., None]).sum().item()


def influence(
    weights: Float[Tensor, "*batch queries keys"],
    gradient: Float[Tensor, "*batch queries keys"],
    epsilon: float = EPSILON,
) -> Float[Tensor, "*batch queries keys"]:
    """E_ij = A_ij / (1 - A_ij) * (sum_n G_in A_in - G_ij): the loss when A_ij is set to zero (eq. 4).

    To first order, with the rest of the row made to sum to 1 again: exact where the loss is linear
    in A. The first row has no rest, there E = -G A.

    Args:
        weights: causal attention weights A, the first query sees the first key only.
        gradient: G, of the loss with respect to A (not through the softmax).
        epsilon: added to 1 - A.
    """
    mean = (gradient * weights).sum(dim=-1, keepdim=True)
    change = weights / (1 - weights + epsilon) * (mean - gradient)
    change[..., 0, :] = -(gradient * weights)[..., 0, :]
    return change


class _Recorder(AttentionMethod):
    """Dense attention that keeps what the influence is computed from, and its output's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple] = {}

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        output = causal_sdpa(query, key, value, scale=scale)
        output.retain_grad()
        self.kept[layer] = (query.detach(), key.detach(), value.detach(), output, scale)
        return output


def profile_influence(
    model: nn.Module,
    items: Iterable[Item],
    *,
    block_size: int,
    epsilons: Sequence[float] = (EPSILON,),
) -> list[Profile]:
    """Profiles of a model on calibration texts of one length, one for each epsilon (section 4.1).

    One text a backward pass, its gradients at the inputs only; the maps of one layer at a time.

    Raises:
        ValueError: no items, or items of several lengths.
    """
    items = list(items)
    lengths = {len(item.tokens) for item in items}
    if len(lengths) != 1:
        raise ValueError(f"a profile needs texts of one length, got lengths {sorted(lengths)}")
    totals = [0.0] * len(epsilons)
    for item in items:
        found = _influence_of(model, item, block_size, epsilons)
        totals = [total + one for total, one in zip(totals, found, strict=True)]
    return [Profile(total / len(items)) for total in totals]


def _influence_of(
    model: nn.Module, item: Item, block_size: int, epsilons: Sequence[float]
) -> list[Float[Tensor, "layers heads blocks blocks"]]:
    """Block sums of |E| of one text, by layer, one tensor for each epsilon."""
    tokens = item.tokens.to(model.device)
    asked = item.scored.to(model.device).nonzero()[:, 0]
    recorder = _Recorder()
    with torch.enable_grad(), attach(model, recorder):
        embedded = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()
        read = model(inputs_embeds=embedded, logits_to_keep=asked - 1, use_cache=False)
        F.cross_entropy(read.logits[0].float(), tokens[asked]).backward()
    causal = causal_token_mask(len(tokens), len(tokens), device=tokens.device)
    layers = [[] for _ in epsilons]
    for number in sorted(recorder.kept):
        query, key, value, output, scale = recorder.kept.pop(number)
        keys, values = (repeat_key_heads(x, query.shape[1]) for x in (key, value))
        weights = masked_softmax(scale * widened(query) @ widened(keys).transpose(-2, -1), causal)
        gradient = output.grad @ values.transpose(-2, -1)
        for kept, epsilon in zip(layers, epsilons, strict=True):
            mass = block_mass(influence(weights, gradient, epsilon).abs(), block_size)
            kept.append(mass[0].unflatten(0, (key.shape[1], -1)).sum(dim=1).cpu())
    return [torch.stack(kept) for kept in layers]


# The plan


def candidate_rules(
    profiled: Sequence[int], longest: int, *, alphas: int, betas: int = 9
) -> list[Rule]:
    """The grid of rules (section 3.1), as the official code lays it.

    Args:
        profiled: lengths of the profiles, in tokens.
        longest: the longest length at which the plan shall have its density.
        alphas: steps from minus the shortest to the longest profiled length; 1 for alpha = 0 alone,
            spans that are shares of the prompt.
        betas: steps from 0 to 1.

    Returns:
        Rules whose span is positive at the shortest length and no longer than the prompt at the
        longest profiled one and at `longest`.
    """
    low, high = min(profiled), max(profiled)
    grid = np.linspace(-low, high, alphas) if alphas > 1 else [0.0]
    rules = [Rule(round(alpha), float(beta)) for alpha in grid for beta in np.linspace(0, 1, betas)]
    return [
        rule
        for rule in rules
        if rule.alpha + rule.beta * low > 0
        and all(rule.alpha + rule.beta * n <= n for n in (high, longest))
    ]


class Infeasible(ValueError):
    """No plan keeps within the bounds."""


@dataclass(frozen=True)
class Problem:
    """Which rule for which unit (section 4.2).

    Attributes:
        costs: predicted rise of the loss, for each objective (a profiled length).
        densities: of each rule at each constrained length.
        density: greatest mean density over the units.
        least: smallest one, as a share of it.
        rules_per_layer: distinct rules that a layer may hold; 1 gives a layer one rule.
        gap: relative gap at which the solver stops.
    """

    costs: Float[np.ndarray, "objectives layers heads rules"]
    densities: Float[np.ndarray, "lengths rules"]
    density: float
    least: float = 0.9
    rules_per_layer: int = 2
    gap: float = 0.01

    def solve(
        self, objective: int, bounds: Sequence[float | None]
    ) -> Int[np.ndarray, "layers heads"]:
        """The choice of least cost for one objective, by a mixed-integer linear program.

        Args:
            objective: its number.
            bounds: upper bound of the cost for each objective; None for no bound.

        Raises:
            Infeasible: no choice keeps within the bounds.
        """
        if self.rules_per_layer == 1:
            return self._one_a_layer().solve(objective, bounds).repeat(self.costs.shape[2], axis=1)
        constraints, own = self._constraints(bounds), self.costs[objective].ravel()
        cost = np.zeros(constraints[0].A.shape[1])
        cost[: own.size] = own / own.max()  # the solver's tolerances are absolute
        found = milp(
            cost,
            constraints=constraints,
            integrality=np.ones_like(cost),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": self.gap},
        )
        if found.x is None:
            raise Infeasible(
                f"no plan has a density of {self.least * self.density:.3f} to {self.density:.3f} within "
                f"these bounds ({found.message}): allow more rules, or a lower least density"
            )
        return found.x[: own.size].reshape(self.costs.shape[1:]).argmax(axis=-1)

    def cost(self, choice: Int[np.ndarray, "layers heads"]) -> Float[np.ndarray, " objectives"]:
        """The cost of a choice, for each objective."""
        return np.take_along_axis(self.costs, choice[None, ..., None], axis=-1).sum(axis=(1, 2, 3))

    def _constraints(self, bounds: Sequence[float | None]) -> list[LinearConstraint]:
        """One rule a unit, the density, bounds on the costs, few rules in a layer."""
        _, layers, heads, rules = self.costs.shape
        units = layers * heads
        rows = [
            (sparse.kron(sparse.eye(units), np.ones((1, rules))), 1, 1),
            (
                sparse.kron(np.ones((1, units)) / units, self.densities),
                self.least * self.density,
                self.density,
            ),
        ]
        rows += [
            (cost.reshape(1, -1), -np.inf, bound)
            for cost, bound in zip(self.costs, bounds, strict=True)
            if bound is not None
        ]
        if heads > self.rules_per_layer:
            # More variables behind the choices: a layer holds a rule where one of its units follows it.
            held = layers * rules
            rows = [
                (sparse.hstack([matrix, sparse.csr_array((matrix.shape[0], held))]), low, high)
                for matrix, low, high in rows
            ]
            owner = sparse.kron(np.ones((heads, 1)), sparse.eye(rules))
            follows = [sparse.eye(units * rules), -sparse.kron(sparse.eye(layers), owner)]
            counted = [
                sparse.csr_array((layers, units * rules)),
                sparse.kron(sparse.eye(layers), np.ones((1, rules))),
            ]
            rows.append((sparse.hstack(follows), -np.inf, 0))
            rows.append((sparse.hstack(counted), -np.inf, self.rules_per_layer))
        return [LinearConstraint(sparse.csr_array(matrix), low, high) for matrix, low, high in rows]

    def _one_a_layer(self) -> Problem:
        return replace(self, costs=self.costs.sum(axis=2, keepdims=True), rules_per_layer=2)


def pareto_choices(problem: Problem, intervals: int = 4) -> list[Int[np.ndarray, "layers heads"]]:
    """Plans of which none is better at every length, by the epsilon-constraint method (section 4.2).

    Each objective alone gives the range of the others, which is cut into intervals; every objective is
    minimised under every cell's upper bounds. With one objective it is the one best choice.

    Raises:
        Infeasible: no plan has the density.
    """
    objectives = range(len(problem.costs))
    alone = [problem.solve(n, [None] * len(objectives)) for n in objectives]
    if len(alone) == 1:
        return alone
    ends = np.stack([problem.cost(choice) for choice in alone])
    found = []
    for primary in objectives:
        grids = [[None] if n == primary else _levels(ends[:, n], intervals) for n in objectives]
        for bounds in itertools.product(*grids):
            try:
                found.append(problem.solve(primary, bounds))
            except Infeasible:  # a cell that no plan reaches
                continue
    return _undominated(problem, found)


def _levels(values: Float[np.ndarray, " objectives"], intervals: int) -> list[float]:
    """Upper ends of the intervals of a range."""
    low, high = values.min(), values.max()
    return [low + (high - low) * step / intervals for step in range(1, intervals + 1)]


def _undominated(problem: Problem, choices: list) -> list:
    """The choices that no other one beats at one length without losing at another; each once."""
    costs = np.stack([problem.cost(choice) for choice in choices])
    kept = []
    for n, cost in enumerate(costs):
        beaten = ((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()
        repeated = any(np.array_equal(costs[m], cost) for m in kept)
        if not beaten and not repeated:
            kept.append(n)
    return [choices[n] for n in kept]
