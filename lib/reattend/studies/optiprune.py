"""OptiPrune on the small text-to-image model: scores of noises, judged pictures, pruning errors, block times.

A row is one picture: a prompt with one noise. Rows of a prompt follow each other: [rows] is [prompts, noises].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from reattend.data.prompt_scenes import NOUN_AT, NOUNS, Prompts, empty_captions
from reattend.generation.optiprune import (
    Optimised,
    Scorer,
    Scores,
    Selection,
    Shift,
    SimPrune,
    base_tokens,
)
from reattend.studies.text_to_image import Bench, scores
from reattend.timing import paired_times
from reattend.trunks.diffusion import (
    AttentionHooks,
    DiffusionUNet,
    EncodedText,
    MapRecorder,
    guided_velocity,
)

WORDS = slice(1, 8)
"""Positions in a caption of its words, without its start and its end."""
NOISIEST = 0.957
"""Time at which a noise is scored: that of Stable Diffusion's first step, where the picture's share is .068.

At time 1, where the sampler begins, a picture has no share at all: nothing depends on the noise that is there.
"""


# Noises and their scores ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Painter:
    """A bench whose noises are scored, and drawn with or without pruning.

    Args:
        gate: see `Scores`.
    """

    bench: Bench
    gate: float = 0.5

    def __len__(self) -> int:
        return len(self.bench)

    @property
    def model(self) -> DiffusionUNet:
        return self.bench.model

    @property
    def finest(self) -> tuple[str, ...]:
        """Blocks of the highest resolution, in which tokens are pruned."""
        return self.model.blocks_of_side(max(self.model.blocks.values()))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def noise(self) -> Float[Tensor, "rows 3 side side"]:
        """The noises as they were drawn."""
        return self.bench.noise.to(self.device)

    def of(self, rows: Tensor | slice) -> Painter:
        """The same with some of the rows."""
        return replace(self, bench=self.bench.part(rows))

    def hooks(self, prune: SimPrune | None, on_map: Callable | None = None) -> AttentionHooks:
        """Pruning in the finest blocks, or none."""
        if prune is None:
            return AttentionHooks(on_map)
        return prune.hooks(self.finest, on_map)

    def maps(
        self, noise: Float[Tensor, "rows 3 side side"], rows: Tensor, prune: SimPrune | None = None
    ) -> tuple[Float[Tensor, "rows words cells cells"], Float[Tensor, "rows positions positions"]]:
        """Cross-attention of the words, as shares of all words, and self-attention, at `NOISIEST`.

        Means over the coarsest blocks and their heads.
        """
        recorder = MapRecorder(blocks=self.bench.blocks)
        text = self.model.encode(self.bench.ids.to(self.device)[rows])
        time = torch.full((len(noise),), NOISIEST, device=self.device)
        self.model(noise, time, text, self.hooks(prune, recorder.hooks.on_map))
        words = recorder.mean("cross")[..., WORDS]
        shares = (words / words.sum(-1, keepdim=True)).mT
        side = math.isqrt(shares.shape[-1])
        return shares.unflatten(-1, (side, side)), recorder.mean("self")

    def asking(self, prompts: Prompts) -> Painter:
        """The same noises under other captions, one a row."""
        return replace(self, bench=replace(self.bench, prompts=prompts))

    def scorer(self, prune: SimPrune | None = None) -> Scorer:
        """Scores of noises for the two nouns of their captions, by one pass."""
        places = torch.tensor(NOUN_AT) - WORDS.start

        def score(noise: Tensor, rows: Tensor) -> Scores:
            words, own = self.maps(noise, rows, prune)
            return Scores.of(words[:, places], own, self.gate)

        return score

    def pictures(
        self, noise: Float[Tensor, "rows 3 side side"], prune: SimPrune | None = None
    ) -> Float[Tensor, "rows 3 side side"]:
        """Guided samples from these noises."""
        begun = replace(self.bench, noise=noise)
        return torch.cat([part.draw(hooks=self.hooks(prune)) for part in begun.chunks()])

    def judged(self, pictures: Float[Tensor, "rows 3 side side"]) -> pd.DataFrame:
        """`scores` of `text_to_image`, and how uneven the ground is."""
        return scores(self.bench, pictures).assign(ground=ground_deviation(pictures).double())


def ground_deviation(pictures: Float[Tensor, "rows 3 side side"]) -> Float[Tensor, " rows"]:
    """Mean absolute deviation from each colour's median over a picture's border of one pixel.

    The ground is nearly even; what a broken sample does to it shows here.
    """
    across = [pictures[..., 0, :], pictures[..., -1, :]]
    edge = torch.cat([*across, pictures[..., 1:-1, 0], pictures[..., 1:-1, -1]], -1)
    return (edge - edge.median(-1, keepdim=True).values).abs().mean((1, 2))


def fresh_scores(score: Scorer, noise: Tensor, chunk: int = 128) -> Scores:
    """Scores of all rows, without gradients."""
    with torch.no_grad():
        rows = torch.arange(len(noise), device=noise.device)
        parts = [score(noise[part], part) for part in rows.split(chunk)]
    joined = (
        torch.cat([getattr(p, name) for p in parts]) for name in ("neglect", "conflict", "stray")
    )
    return Scores(*joined, parts[0].gate)


def limits_at(scores: Scores, percentile: float) -> tuple[float, float]:
    """Limits of neglect and conflict below which this share of fresh noises lies, each by itself."""
    found = (np.percentile(s.cpu().numpy(), percentile) for s in (scores.neglect, scores.conflict))
    return tuple(float(f) for f in found)


def other_things(prompts: Prompts, seed: int) -> Prompts:
    """For each prompt one with the same colours and two other nouns, neither of which it names."""
    random = np.random.default_rng([seed, 6])
    rest = [np.setdiff1d(np.arange(len(NOUNS)), row) for row in prompts.nouns.numpy()]
    nouns = np.stack([random.permutation(row)[:2] for row in rest])
    return Prompts(prompts.colours, torch.from_numpy(nouns))


def within(shift: Shift, bound: float) -> Shift:
    """A shift scaled back, row by row, until its divergence is at most `bound`."""
    low = torch.zeros(len(shift.mean), *[1] * (shift.mean.ndim - 1), device=shift.mean.device)
    high = torch.ones_like(low)
    for _ in range(30):
        middle = (low + high) / 2
        over = Shift(middle * shift.mean, middle * shift.log_variance).divergence() > bound
        over = over.reshape(low.shape)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    keep = (shift.divergence() <= bound).reshape(low.shape)
    factor = torch.where(keep, torch.ones_like(low), low)
    return Shift(factor * shift.mean, factor * shift.log_variance)


# Cost -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassCost:
    """Multiply-adds for one row of a scoring pass alone, and of one with the gradient of the noise."""

    forward: int
    gradient: int

    def of_search(self, found: Optimised) -> float:
        """Mean over rows of a search."""
        passes, steps = found.passes.double().mean(), found.steps.double().mean()
        return float(self.forward * (passes - steps) + self.gradient * steps)


def pass_cost(painter: Painter, prune: SimPrune | None) -> PassCost:
    """By torch's count of matrix products and convolutions."""
    painter = painter.of(slice(0, 2))
    score, rows = painter.scorer(prune), torch.arange(2, device=painter.device)
    noise = painter.noise.clone()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        score(noise, rows)
    moved = noise.requires_grad_()
    with FlopCounterMode(display=False) as both:
        score(moved, rows).loss.sum().backward()
    return PassCost(forward.get_total_flops() // 4, both.get_total_flops() // 4)


@torch.no_grad()
def sampling_cost(painter: Painter, prune: SimPrune | None) -> int:
    """Multiply-adds of one picture: both guidance halves in every step."""
    painter = painter.of(slice(0, 2))
    with FlopCounterMode(display=False) as counter:
        painter.pictures(painter.noise, prune)
    return counter.get_total_flops() // 4


def equal_candidates(cost: float, one: int) -> int:
    """How many fresh noises can be scored for a cost; at least one, rounded up in their favour."""
    return max(1, math.ceil(cost / one))


# Errors of pruning ----------------------------------------------------------------------------------


@torch.no_grad()
def pruning_errors(
    painter: Painter, arms: Mapping[Hashable, SimPrune], at: Sequence[int]
) -> dict[Hashable, Float[np.ndarray, " rows"]]:
    """Natural logarithm of the relative error of the guided velocity, mean over the steps `at` of plain sampling.

    Every arm sees the latents of the unpruned model.
    """
    text = painter.model.encode(painter.bench.ids.to(painter.device))
    empty = painter.model.encode(empty_captions(len(painter)).to(painter.device))
    logs: dict[Hashable, list[Tensor]] = {name: [] for name in arms}

    def compare(step: int, x: Tensor, time: Tensor, _) -> Tensor:
        if step in at:
            given = (painter.model, x, time, text, empty, painter.bench.guidance)
            plain = guided_velocity(*given)
            for name, prune in arms.items():
                other = guided_velocity(*given, painter.hooks(prune))
                error = (other - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
                logs[name].append(error.log())
        return x

    painter.bench.draw(compare)
    return {name: torch.stack(rows).mean(0).cpu().double().numpy() for name, rows in logs.items()}


@torch.no_grad()
def hidden_states(painter: Painter, block: str) -> Float[Tensor, "rows tokens width"]:
    """Hidden states before the self-attention of a block, of fresh noises at `NOISIEST`."""
    seen = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x

    text = painter.model.encode(painter.bench.ids.to(painter.device))
    time = torch.full((len(painter),), NOISIEST, device=painter.device)
    painter.model(painter.noise, time, text, AttentionHooks(reduce=keep))
    return seen[block]


@torch.no_grad()
def selections(painter: Painter, prune: SimPrune, at: Sequence[int]) -> dict[str, Selection]:
    """What is kept in the last of the finest blocks at some steps of plain sampling, captioned half, by step."""
    found = {}

    def look(step: int, x: Tensor, time: Tensor, text: EncodedText) -> Tensor:
        def choose(name: str, states: Tensor) -> None:
            if name == painter.finest[-1]:
                found[f"step {step + 1}"] = prune.select(states)

        if step in at:
            painter.model(x, time, text, AttentionHooks(reduce=choose))
        return x

    painter.bench.draw(look)
    return found


@torch.no_grad()
def unpruned_difference(painter: Painter) -> float:
    """Largest difference that pruning at ratio 0 makes to pictures."""
    plain = painter.pictures(painter.noise)
    none = SimPrune(0.0, noise=0.0)
    return float((painter.pictures(painter.noise, none) - plain).abs().max())


def selection_entropy(prune: SimPrune, x: Float[Tensor, "rows tokens width"], draws: int) -> float:
    """Entropy of which token of a 2 x 2 patch is the base token, over draws; 0 for always the same, 1 for uniform."""
    tokens = x.shape[1]
    side = math.isqrt(tokens)
    counts = torch.zeros(len(x), tokens)
    for _ in range(draws):
        base = prune.select(x).kept[:, -(tokens // 4) :].cpu()
        counts.scatter_add_(1, base, torch.ones_like(base, dtype=counts.dtype))
    share = counts.reshape(len(x), side // 2, 2, side // 2, 2).transpose(2, 3).flatten(3) / draws
    return float((-torch.xlogy(share, share).sum(-1) / math.log(4)).mean())


# Time of a block ------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Norm, projections and the fused attention of torch: what pruning has to beat."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.project, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        prune: Callable[[Tensor], Selection] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Without the residual; `prune` selects from the states before the norm."""
        chosen, states = None if prune is None else prune(x), self.norm(x)
        if chosen is not None:
            states = chosen.of(states)
        q, k, v = self.project(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended if chosen is None else chosen.recovered(attended)


@torch.no_grad()
def graph_select(x: Float[Tensor, "batch tokens width"], ratio: float) -> Selection:
    """`SimPrune.select` without noise, by the whole graph of similarities, in the order of the released code."""
    tokens, base_count = x.shape[1], x.shape[1] // 4
    unit = F.normalize(x, dim=-1)
    graph = unit @ unit.mT
    score = graph.sum(-1)
    order = base_tokens(score, "typical", score).long().argsort(dim=-1, stable=True)
    others, base = order.split([tokens - base_count, base_count], -1)
    rows = graph.gather(1, others[..., None].expand(-1, -1, tokens))
    nearest = rows.gather(2, base[:, None].expand(-1, others.shape[1], -1)).amax(-1)
    ranked = others.gather(1, nearest.argsort(dim=-1, descending=True, stable=True))
    gone, spared = ranked.split([int(ratio * tokens), others.shape[1] - int(ratio * tokens)], -1)
    kept = torch.cat([spared, base], 1)
    weights = graph.gather(1, kept[..., None].expand(-1, -1, tokens))
    source = weights.gather(2, gone[:, None].expand(-1, kept.shape[1], -1)).argmax(1)
    return Selection(kept, gone, source)


def time_ratios(
    tokens: int, width: int, ratio: float, rounds: int, batch: int
) -> dict[str, Float[np.ndarray, " rounds"]]:
    """Seconds relative to full attention in the same round: a pruned block, its selection, and with the graph."""
    generator = torch.Generator().manual_seed(0)
    block = SelfAttention(width).requires_grad_(False)
    x = torch.randn(batch, tokens, width, generator=generator)
    prune = SimPrune(ratio, generator=generator)
    runs = {
        "pruned": lambda: block(x, prune.select),
        "selection alone": lambda: prune.select(x),
        "pruned, by the graph": lambda: block(x, lambda states: graph_select(states, ratio)),
    }
    found = {}
    for name, run in runs.items():
        full, part = paired_times(lambda: block(x), run, rounds=rounds)
        found[name] = part / full
    return found
