"""HiP attention under study: placebos of its search, needles beyond its window, trees on dense maps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.blocks import block_count
from reattend.attention.dense import causal_sdpa, dense_attention
from reattend.data.needles import TASKS, Haystack, NeedleSample, hide
from reattend.long_context.hip_attention import (
    Found,
    HiPAttention,
    QueryBlocks,
    Score,
    Tree,
    oracle_score,
    query_blocks,
    representative_unit,
    tree_search,
    unit_scores,
)
from reattend.timing import device_clock, paired_times

RULES = ("first", "centre", "last", "random", "oracle", "blind")


class BlindTree(HiPAttention):
    """Placebo: the same search, with noise for scores."""

    def __init__(self, seed: int, **settings) -> None:
        super().__init__(**settings)
        self.generator = torch.Generator().manual_seed(seed)

    def scorer(self, query: Tensor, key: Tensor, blocks: QueryBlocks) -> Score:
        """Noise."""
        return noise(self.generator)


class OtherHead(HiPAttention):
    """Placebo: each head reads what its neighbour of the layer has found."""

    def select(self, query: Tensor, key: Tensor, blocks: QueryBlocks) -> Found:
        """The units of the next head."""
        found = super().select(query, key, blocks)
        return replace(found, units=found.units.roll(1, dims=1), real=found.real.roll(1, dims=1))


def noise(generator: torch.Generator) -> Score:
    """Scores that know nothing."""
    return lambda start, size, first: torch.rand(start.shape, generator=generator).to(start.device)


def far_needles(
    haystack: Haystack,
    task: str,
    length: int,
    count: int,
    gap: int,
    seed: int = 0,
    distractors: int = 4,
) -> Iterator[NeedleSample]:
    """Prompts whose answer stands at least `gap` tokens before the end, at depths that fill the rest.

    More of them begin with the same ones.

    Args:
        length: exact length of every prompt, in tokens.
        gap: tokens from the answer's needle to the end.

    Raises:
        ValueError: the prompt is no longer than the gap.
    """
    if length <= gap:
        raise ValueError(f"prompts of {length} tokens have no room before a gap of {gap}")
    for number in range(count):
        state = random.Random(f"far {task} {length} {gap} {seed} {distractors} {number}")
        # Multiples of the golden ratio fill an interval evenly, however many there are.
        depth = (seed + number + 0.5) * 0.618034 % 1 * (1 - gap / length)
        sample = None
        while sample is None or sample.depth * length > length - gap:
            facts = TASKS[task](state, distractors)
            sample = hide(haystack, task, facts, length, depth, state)
        yield sample


# --- the tree on dense maps ---


@dataclass(frozen=True)
class UnitMap:
    """One layer of a dense model as the search sees it.

    Attributes:
        scores: score of every unit, from which the search takes those it asks for.
        mass: attention mass of the block's queries on each unit.
        blocks, tree: which queries and units these are.
    """

    scores: Float[Tensor, "batch heads blocks units"]
    mass: Float[Tensor, "batch heads blocks units"]
    blocks: QueryBlocks
    tree: Tree


def unit_map(query: Tensor, key: Tensor, scale: float, tree: Tree) -> UnitMap:
    """Scores and masses of all units of a prompt."""
    keys = key.shape[2]
    blocks = query_blocks(keys, keys, tree.block_q, tree.query_stride, device=key.device)
    scores = unit_scores(query, key, blocks, tree)
    _, weights = dense_attention(query, key, key, scale=scale, causal=True, return_weights=True)
    # A query's own window is read anyway: only what lies before it is searched.
    weights = weights.tril(-tree.window)[..., tree.sink :]
    short = scores.shape[-1] * tree.block_k - weights.shape[-1]
    back = len(blocks.positions) * tree.block_q - keys
    padded = F.pad(weights, (0, short, 0, back))
    mass = padded.unflatten(-1, (-1, tree.block_k)).unflatten(-3, (-1, tree.block_q))
    return UnitMap(scores, mass.sum(dim=(-3, -1)), blocks, tree)


def table_score(scores: Tensor, rule: str, generator: torch.Generator) -> Score:
    """Scores by one of `RULES`, looked up in a table of all units."""
    if rule == "oracle":
        return oracle_score(scores)
    if rule == "blind":
        return noise(generator)

    def score(start: Tensor, size: Tensor, first: int) -> Tensor:
        if rule == "random":
            luck = torch.rand(start.shape, generator=generator).to(start.device)
            unit = start + (luck * size).long()
        else:
            unit = representative_unit(start, size, rule)
        return scores[:, :, first:].gather(-1, unit.clamp_max(scores.shape[-1] - 1))

    return score


def compare_rules(seen: UnitMap, k: int, seed: int) -> pd.DataFrame:
    """Recall of the exact best units and share of the mass, by rule; blocks that leave nothing out apart.

    Returns:
        Columns `rule`, `keys` ("real", or "permuted": units in random order during the search),
        `recall` (mean over heads and blocks), `kept` and `searched` (masses, summed over them).
    """
    units, nodes = seen.tree.units(seen.blocks.last), k // seen.tree.block_k
    deep = units > nodes
    generator = torch.Generator().manual_seed(seed)
    best = _members(
        tree_search(units, nodes, seen.scores.shape[:2], oracle_score(seen.scores)), seen
    )
    order = _shuffled(seen, units, generator)
    rows = []
    for keys in ("real", "permuted"):
        scores = seen.scores if keys == "real" else seen.scores.gather(-1, order)
        for rule in RULES:
            score = table_score(scores, rule, generator)
            found = tree_search(units, nodes, scores.shape[:2], score)
            if keys == "permuted":
                places = found.units.clamp_max(scores.shape[-1] - 1)
                found = replace(found, units=order.gather(-1, places))
            chosen = _members(found, seen)
            hits = (chosen & best).sum(-1) / best.sum(-1).clamp_min(1)
            kept, whole = (seen.mass * chosen)[:, :, deep].sum(), seen.mass[:, :, deep].sum()
            row = {"rule": rule, "keys": keys, "recall": hits[:, :, deep].mean().item()}
            rows.append(row | {"kept": kept.item(), "searched": whole.item()})
    return pd.DataFrame(rows)


def best_mass(seen: UnitMap, k: int) -> float:
    """The most mass that as many units can hold, a share of what is searched."""
    units, nodes = seen.tree.units(seen.blocks.last), k // seen.tree.block_k
    mass = seen.mass[:, :, units > nodes]
    return (mass.topk(nodes, dim=-1).values.sum() / mass.sum()).item()


def branch_hits(seen: UnitMap, k: int, rule: str, permuted: bool, seed: int) -> pd.DataFrame:
    """How often the half with the better score is the half that holds the better unit, by size.

    Returns:
        Columns `size` (units of the larger half, rounded down to a power of two), `right`, `pairs`.

    Raises:
        ValueError: the prompt is too short for a search.
    """
    units, nodes = seen.tree.units(seen.blocks.last), k // seen.tree.block_k
    generator = torch.Generator().manual_seed(seed)
    scores = seen.scores
    if permuted:
        scores = scores.gather(-1, _shuffled(seen, units, generator))
    guess, truth, found = table_score(scores, rule, generator), oracle_score(scores), []

    def score(start: Tensor, size: Tensor, first: int) -> Tensor:
        guessed = guess(start, size, first)
        pairs = [x.unflatten(-1, (-1, 2)) for x in (guessed, truth(start, size, first), size)]
        both = (pairs[2] > 0).all(-1)
        right = (pairs[0].argmax(-1) == pairs[1].argmax(-1))[both]
        level = torch.frexp(pairs[2][..., 1][both].double()).exponent - 1
        found.append(pd.DataFrame({"size": 2 ** level.numpy(), "right": right.numpy()}))
        return guessed

    tree_search(units, nodes, scores.shape[:2], score)
    if not found:
        raise ValueError(f"{int(units.max())} units leave nothing to search for {nodes}")
    grouped = pd.concat(found).groupby("size")["right"]
    return grouped.agg(right="mean", pairs="size").reset_index()


def _members(found: Found, seen: UnitMap) -> Tensor:
    """Whether each unit was found."""
    count = seen.scores.shape[-1]
    mask = torch.zeros(
        *found.units.shape[:-1], count + 1, dtype=torch.bool, device=found.units.device
    )
    return mask.scatter(-1, found.units.masked_fill(~found.real, count), True)[..., :count]


def _shuffled(seen: UnitMap, units: Tensor, generator: torch.Generator) -> Tensor:
    """For each head and block a random order of the units that it sees, the others behind them."""
    luck = torch.rand(seen.scores.shape, generator=generator).to(seen.scores.device)
    unseen = torch.arange(luck.shape[-1], device=luck.device) >= units[:, None]
    return luck.masked_fill(unseen, 2.0).argsort(dim=-1)


# --- counts and times ---


def traced(score: Score, rounds: list[tuple[Tensor, Tensor, Tensor]]) -> Score:
    """The same scores; start, size and score of the candidates of each round are added to `rounds`."""

    def asked(start: Tensor, size: Tensor, first: int) -> Tensor:
        rounds.append((start, size, score(start, size, first)))
        return rounds[-1][2]

    return asked


def count_candidates(length: int, k: int, block_q: int, window: int, sink: int) -> tuple[int, int]:
    """Units scored in one head over a prompt: by the search (with noise for scores), and all of them."""
    tree = Tree(k, block_q, 2, 2, window, sink, "centre")
    units = tree.units(query_blocks(length, length, block_q, 2).last)
    generator = torch.Generator().manual_seed(0)
    return tree_search(units, k // 2, (1, 1), noise(generator)).evaluations, int(units.sum())


def pooled_of_density(density: float, length: int, block_size: int) -> BlockTopK:
    """Block top-k by mean pooling whose share of the causal blocks is nearest to `density`."""
    rows = range(1, block_count(length, block_size) + 1)
    # The first and the diagonal block are read in any case: at least two.
    shares = {n: sum(min(row, n) for row in rows) / sum(rows) for n in (rows[1:] or rows)}
    return BlockTopK(k=min(shares, key=lambda n: abs(shares[n] - density)), block_size=block_size)


@torch.inference_mode()
def layer_times(
    length: int,
    method: HiPAttention,
    rounds: int,
    device: torch.device,
    heads: tuple[int, int] = (9, 3),
) -> list[dict]:
    """Times of one layer's prefill, each interleaved with the fused dense kernel: one row a method.

    `method`, block top-k of the nearest density, and the search alone, on random numbers.

    Args:
        heads: query and key heads, 64 numbers wide.
    """
    shapes = [(1, number, length, 64) for number in (heads[0], heads[1], heads[1])]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    call = {"scale": 0.125, "layer": method.dense_layers}
    method.clear()
    method.prefill(q, k, v, **call)
    pooled = pooled_of_density(method.density(), length, method.tree.block_q)
    timed = {
        "HiP": lambda: method.prefill(q, k, v, **call),
        "block top-k": lambda: pooled.prefill(q, k, v, **call),
        "HiP, the search alone": lambda: [
            method.select(q, k, part) for part in method.blocks(q, k)
        ],
    }
    rows = []
    for name, run in timed.items():
        dense, sparse = paired_times(
            lambda: causal_sdpa(q, k, v), run, rounds=rounds, clock=device_clock(device)
        )
        times = {"milliseconds": 1000 * np.median(sparse), "dense": 1000 * np.median(dense)}
        ratio = {"speed-up over dense": np.median(dense / sparse), "density": method.density()}
        rows.append({"method": name, "length": length} | times | ratio)
    return rows


def methods_table(main: pd.DataFrame) -> pd.DataFrame:
    """One row a method: density, right answers (%), their probability against dense attention's on the same prompts
    (sums over prompts, %), and both losses above dense attention's, nats, by prompt.

    Args:
        main: indexed by prompt ("item"): columns method, density, right, "prose NLL" and "answer NLL".
    """
    dense, table = main[main["method"] == "dense"], []
    for name, found in main.groupby("method", sort=False):
        row = {"method": name, "prompts": len(found), "density": found["density"].mean()}
        row |= {"right, %": found["right"].mean()}
        mine, whole = (np.exp(-x["answer NLL"]).sum() for x in (found, dense.loc[found.index]))
        row |= {"probability, % of dense": 100 * mine / whole}
        for metric in ("prose NLL", "answer NLL"):
            excess = found[metric] - dense.loc[found.index, metric]
            error = excess.sem() if len(excess) > 1 else np.nan
            row |= {f"{metric} above dense": excess.mean(), f"{metric}, s.e.": error}
        table.append(row)
    return pd.DataFrame(table)
