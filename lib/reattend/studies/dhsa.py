"""DHSA under study: its placebo and baselines, and boundaries and poolings compared on dense maps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.dense import causal_sdpa
from reattend.data.needles import TASKS, Haystack, NeedleSample, Tokenizer, hide
from reattend.long_context.dhsa import (
    DHSA,
    LABEL_RATIO,
    BoundaryPredictor,
    block_bounds,
    boundary_ratios,
    choose_tokens,
    chunk_edges,
    chunk_of_tokens,
    even_edges,
    head_mean_weights,
    key_jumps,
    token_scores,
)
from reattend.timing import device_clock, paired_ratio


class RandomTokens(DHSA):
    """Placebo: as many tokens at random beside the same forced ones."""

    def __init__(self, seed: int, **settings) -> None:
        super().__init__(**settings)
        self.generator = torch.Generator().manual_seed(seed)

    def scores(self, query: Tensor, key: Tensor, *, scale: float, layer: int) -> Tensor:
        """Noise, every token apart."""
        begin, _ = block_bounds(query.shape[2], key.shape[2], self.block_size)
        shape = (len(key), len(begin), key.shape[2])
        return torch.rand(shape, generator=self.generator).to(key.device)


class SharedBoundaries(DHSA):
    """The chunks of the first layer for all layers, as the shipped scripts do; one prompt at a time."""

    def edges(self, query: Tensor, key: Tensor, *, scale: float, layer: int) -> Tensor:
        """The edges that layer 0 has found."""
        if layer == 0:
            self._first = super().edges(query, key, scale=scale, layer=layer)
        return self._first


@dataclass(frozen=True)
class Sizes:
    """What the arms of a study share; see `DHSA`."""

    block_size: int
    local: int
    sink: int
    chunk: int
    window: int

    def method(self, boundaries: str | BoundaryPredictor, budget: int, **settings) -> DHSA:
        """DHSA of these sizes; without a dense instruction unless the settings say so."""
        return DHSA(boundaries=boundaries, budget=budget, **self._shared() | settings)

    def random_tokens(self, budget: int, seed: int, **settings) -> DHSA:
        """The placebo."""
        return RandomTokens(seed, boundaries="fixed", budget=budget, **self._shared() | settings)

    def shared_boundaries(self, predictor: BoundaryPredictor, budget: int) -> DHSA:
        """Chunks of the first layer for all."""
        return SharedBoundaries(boundaries=predictor, budget=budget, **self._shared())

    def completed_blocks(self, budget: int) -> DHSA:
        """Block-sparse attention with the sinks and local tokens of DHSA: mean keys of fixed blocks."""
        shared = self._shared() | {"chunk": self.block_size, "pooling": "mean"}
        return DHSA(boundaries="fixed", budget=budget, **shared)

    def published_blocks(self, budget: int) -> DHSA:
        """The paper's block-sparse baseline: only a query's own block is forced."""
        shared = self._shared() | {"chunk": self.block_size, "pooling": "mean"}
        return DHSA(
            boundaries="fixed", budget=budget, **shared | {"local": self.block_size, "sink": 0}
        )

    def _shared(self) -> dict:
        return {"instruction": 0, **vars(self)}


# Prompts ------------------------------------------------------------------------------------------


def document_prompts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    task: str,
    length: int,
    count: int,
    distractors: int,
    seed: int,
) -> Iterator[tuple[int, NeedleSample]]:
    """One prompt of each document that is long enough, with needles in it: (document, prompt).

    More of them begin with the same ones. The depth of the answer runs evenly, in an order that mixes.

    Raises:
        ValueError: there are too few documents of that length.
    """
    made = 0
    for number, text in enumerate(texts):
        if made == count:
            return
        haystack = Haystack(tokenizer, [text])
        if len(haystack.ids) < 2 * length:
            continue
        state = random.Random(f"dhsa {task} {length} {seed} {distractors} {number}")
        facts = TASKS[task](state, distractors)
        # Multiples of the golden ratio fill an interval evenly, however many there are.
        depth = (seed + made + 0.5) * 0.618034 % 1
        yield number, hide(haystack, task, facts, length, depth, state)
        made += 1
    if made < count:
        raise ValueError(
            f"{made} of {len(texts)} documents have {2 * length} tokens, {count} wanted"
        )


# Dense maps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMap:
    """One layer of a dense pass over a prompt.

    Attributes:
        mass: attention of each block of queries on each key, the mean over heads and queries.
        ratios: of `boundary_ratios`.
    """

    query: Float[Tensor, "1 query_heads tokens dim"]
    key: Float[Tensor, "1 key_heads tokens dim"]
    mass: Float[Tensor, "1 blocks tokens"]
    ratios: Float[Tensor, "1 tokens"]


def layer_map(query: Tensor, key: Tensor, scale: float, block_size: int) -> LayerMap:
    """Masses and ratios (in windows of 4 + 4) of a layer; whole blocks of queries.

    Raises:
        ValueError: the last block is not whole.
    """
    if key.shape[2] % block_size:
        raise ValueError(f"{key.shape[2]} tokens are no whole blocks of {block_size}")
    weights = head_mean_weights(query, key, scale)
    mass = weights.unflatten(1, (-1, block_size)).mean(dim=2)
    return LayerMap(query, key, mass, boundary_ratios(weights, 4))


def mass_kept(
    scores: Float[Tensor, "1 blocks tokens"], seen: LayerMap, sizes: Sizes, budget: int
) -> float:
    """Attention mass on the chosen tokens that are not forced, as a share of all attention.

    Mean over the blocks of queries that must leave something out.
    """
    tokens = seen.mass.shape[-1]
    _, ends = block_bounds(tokens, tokens, sizes.block_size, scores.device)
    chosen = choose_tokens(scores, ends, budget=budget, local=sizes.local, sink=sizes.sink)
    place = torch.arange(tokens, device=scores.device)
    free = (place >= sizes.sink) & (place < ends[:, None] - sizes.local)
    # One column more takes the ends of short lists.
    mask = torch.zeros_like(F.pad(scores, (0, 1)), dtype=torch.bool)
    mask = mask.scatter(2, chosen, True)[..., :tokens] & free
    return (seen.mass * mask).sum(-1)[:, ends > budget].mean().item()


def all_edges(
    seen: LayerMap,
    predictors: Mapping[str, BoundaryPredictor],
    sizes: Sizes,
    generator: torch.Generator,
    threshold: float = -torch.inf,
) -> dict[str, Int[Tensor, "1 edges"]]:
    """Chunks by every rule, as many as the first predictor finds."""
    tokens = seen.key.shape[2]
    cut = {"window": sizes.window}
    found = {
        name: chunk_edges(
            predictor.scores(seen.key), limit=tokens // sizes.chunk, threshold=threshold, **cut
        )
        for name, predictor in predictors.items()
    }
    count = next(iter(found.values())).shape[1] - 1
    noise = torch.rand(1, tokens, generator=generator).to(seen.key.device)
    noise[:, -1] = -torch.inf  # no boundary lies behind the last token
    others = {"labelled": seen.ratios, "key jumps": key_jumps(seen.key), "random": noise}
    found |= {name: chunk_edges(x, limit=count - 1, **cut) for name, x in others.items()}
    return found | {"fixed": even_edges(count, tokens, seen.key.device)[None]}


def pooled_scores(
    seen: LayerMap, edges: Int[Tensor, "1 edges"], pooling: str, block_size: int
) -> Float[Tensor, "1 blocks tokens"]:
    """Scores by "sqrt" and "mean" as the method has them, or by "max": the best key of the chunk."""
    if pooling != "max":
        return token_scores(seen.query, seen.key, edges, block_size=block_size, pooling=pooling)
    alone = single_scores(seen, block_size)
    chunk = chunk_of_tokens(edges)[:, None].expand(alone.shape)
    best = alone.new_zeros(*alone.shape[:2], edges.shape[1] - 1)
    return best.scatter_reduce(2, chunk, alone, "amax", include_self=False).gather(2, chunk)


def single_scores(seen: LayerMap, block_size: int) -> Float[Tensor, "1 blocks tokens"]:
    """Scores of single keys: chunks of one token."""
    every = torch.arange(seen.key.shape[2] + 1, device=seen.key.device)[None]
    return token_scores(seen.query, seen.key, every, block_size=block_size)


def other_scores(
    seen: LayerMap, sizes: Sizes, generator: torch.Generator
) -> dict[str, Float[Tensor, "1 blocks tokens"]]:
    """Selections without chunks of varying length, from the best possible to the latest tokens."""
    shape, size = seen.mass.shape, sizes.block_size
    blocks = even_edges(shape[-1] // size, shape[-1], seen.key.device)[None]
    return {
        "best possible": seen.mass,
        "single keys": single_scores(seen, size),
        f"mean keys of {size}": pooled_scores(seen, blocks, "mean", size),
        "random tokens": torch.rand(shape, generator=generator).to(seen.key.device),
        "latest tokens": torch.arange(shape[-1], device=seen.key.device).expand(shape).float(),
    }


# Boundaries against labels ------------------------------------------------------------------------


def f1_scores(
    predictor: BoundaryPredictor, layers: Sequence[LayerMap]
) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of boundaries against the labels (ratio >= 2), layers of a document together.

    Of the predictor (probability above a half), of the key jumps ranked to the same number in each
    layer, and of calling every position a boundary.
    """
    hits: dict[str, list[tuple[Bool[Tensor, " n"], Bool[Tensor, " n"]]]] = {}
    for seen in layers:
        known = torch.isfinite(seen.ratios)
        truth = seen.ratios[known] >= LABEL_RATIO
        said = predictor.scores(seen.key)[known] > 0
        jumps = key_jumps(seen.key)[known]
        ranked = jumps.argsort(descending=True).argsort() < said.sum()
        guesses = {"predictor": said, "key jumps": ranked, "all positive": torch.ones_like(said)}
        for name, guess in guesses.items():
            hits.setdefault(name, []).append((guess, truth))
    return {name: _f1(*map(torch.cat, zip(*pairs, strict=True))) for name, pairs in hits.items()}


def _f1(guess: Tensor, truth: Tensor) -> dict[str, float]:
    both = (guess & truth).sum().item()
    precision, recall = both / max(guess.sum().item(), 1), both / max(truth.sum().item(), 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-12)
    return {"precision": precision, "recall": recall, "F1": f1}


# Times --------------------------------------------------------------------------------------------


@torch.inference_mode()
def layer_times(
    length: int, budget: int, predictor: BoundaryPredictor, rounds: int, device: torch.device
) -> list[dict]:
    """Times of one layer's prefill, each interleaved with the fused dense kernel: one row a method.

    On random numbers, 9 query and 3 key heads, 64 wide, blocks of 128 queries.

    Returns:
        Rows with `method`, `times as fast` as dense attention (median), the same of its selection
        alone, `pairs read` (a share) and `keys held`: copies of keys that a block of queries holds.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, length, 64, generator=generator).to(device) for n in (9, 3, 3))
    call = {"scale": 0.125, "layer": 0}
    shared = {"budget": budget, "instruction": 0, "sink": budget // 16}
    methods = {
        "DHSA": DHSA(boundaries=predictor, **shared),
        "completed blocks": DHSA(boundaries="fixed", chunk=128, pooling="mean", **shared),
    }
    settings = {"rounds": rounds, "clock": device_clock(device)}

    def dense() -> Tensor:
        return causal_sdpa(q, k, v, scale=0.125)

    rows = []
    for name, method in methods.items():
        whole = paired_ratio(dense, lambda m=method: m.prefill(q, k, v, **call), **settings)
        alone = paired_ratio(dense, lambda m=method: m.tokens(q, k, **call), **settings)
        row = {"method": name, "times as fast": np.median(whole)}
        row |= {"selection alone": np.median(alone), "pairs read": method.density()}
        rows.append(row | {"keys held": budget})
    return rows
