"""The Sparse Frontier: six training-free sparse attention methods under one cost model.

Nawrot et al., "The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs", 2025, arXiv
2504.17768; claims of version 1 (April 2025), cost formulas of version 3 (appendix B). Three of the
methods read the prompt sparsely and decode densely: two of them are here, with the paper's
selection of single tokens; the third, Block-Sparse, is `BlockTopK(k=top_chunks, local=1,
block_size=16)` of `reattend.attention.baselines`. There are also the three that decode sparsely:
SnapKV, Ada-SnapKV and Quest.

A prefill method is a mask over (query, key) pairs, and attention under it is masked dense
attention: this is a study of what the masks keep, not of kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.baselines.vertical_slash import last_weights
from reattend.attention.blocks import diagonal_sums
from reattend.attention.dense import masked_sdpa
from reattend.attention.method import (
    AttentionMethod,
    Budget,
    Phase,
    budget_of,
    check_budget,
    check_count,
    check_share,
    first_above,
    per_sequence,
)

# Prefill methods ----------------------------------------------------------------------------------

ROWS = 128  # of a mask that are attended at once on a CPU


class LineMethod(AttentionMethod, ABC):
    """Prefill over columns of keys and diagonals of constant distance, per query head.

    Both are ranked by the attention that the last queries of the prompt pay to them. A subclass
    says how many of each are kept.
    """

    def __init__(self, *, last_queries: int = 256, sink: int = 4, local: int = 64) -> None:
        """
        Args:
            last_queries: queries at the end of the prompt whose attention ranks the lines.
            sink: columns at the start that are always kept.
            local: diagonals next to the main one, itself included, that are always kept.
        """
        super().__init__()
        self.last_queries = check_count("last_queries", last_queries, at_least=1)
        self.sink = check_count("sink", sink)
        self.local = check_count("local", local, at_least=1)

    @abstractmethod
    def least_lines(self) -> Budget:
        """Columns, and diagonals, that are kept in any case: of a prompt of no attention at all."""

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts of more tokens than lines that are kept; decoding is dense."""
        return None if phase == "decode" else first_above(self.least_lines())

    @abstractmethod
    def budget(
        self, mass: Float[Tensor, "batch heads keys"], forced: int
    ) -> Int[Tensor, "#batch #heads"]:
        """Lines to keep of those with this mass, `forced` of them in any case."""

    def lines(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> tuple[Bool[Tensor, "batch query_heads keys"], Bool[Tensor, "batch query_heads keys"]]:
        """The columns that each head keeps, and its diagonals by their distance query - key."""
        return self.best(*line_mass(last_weights(query, key, self.last_queries, scale)))

    def best(
        self,
        vertical: Float[Tensor, "batch heads keys"],
        slash: Float[Tensor, "batch heads keys"],
    ) -> tuple[Bool[Tensor, "batch heads keys"], Bool[Tensor, "batch heads keys"]]:
        """The columns and diagonals kept of those with these masses."""
        return (
            best_lines(vertical, self.budget(vertical, self.sink), self.sink),
            best_lines(slash, self.budget(slash, self.local), self.local),
        )

    def prefill(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        value: Float[Tensor, "batch key_heads keys value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch query_heads queries value_dim"]:
        """Attention over the union of the kept lines; the record counts pairs of tokens."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with torch.no_grad():
                lines = self.lines(query, key, scale=scale)
                mask = line_mask(*lines, query.shape[2])
            # Counting the mask itself would take a quarter of the time of reading a prompt.
            self.record(layer, line_density(*lines, query.shape[2]))
            # The main diagonal is always kept, so no row of the mask is empty.
            if query.is_cuda:
                return masked_sdpa(query, key, value, mask, scale=scale)
            # Some rows at a time, which saves the keys behind them.
            past, parts = key.shape[2] - query.shape[2], []
            for rows in torch.arange(query.shape[2]).split(ROWS):
                here, seen = slice(rows[0], rows[-1] + 1), slice(past + int(rows[-1]) + 1)
                part = query[:, :, here], key[:, :, seen], value[:, :, seen]
                kept = mask[:, :, here, seen]
                parts.append(
                    F.scaled_dot_product_attention(
                        *part, attn_mask=kept, scale=scale, enable_gqa=True
                    )
                )
            return torch.cat(parts, dim=2)

        return per_sequence(attend, query, key, value, padding)


class VerticalSlashTokens(LineMethod):
    """Vertical-Slash: as many columns as diagonals, the same number in every head."""

    def __init__(
        self, *, lines: Budget = 1024, last_queries: int = 256, sink: int = 4, local: int = 64
    ) -> None:
        """
        Args:
            lines: columns, and diagonals, of each head (k_v = k_s), the forced ones among them; a
                float is a share of the keys.

        Raises:
            ValueError: a setting out of range, or fewer lines than are forced.
        """
        super().__init__(last_queries=last_queries, sink=sink, local=local)
        self.kept = check_budget("lines", lines, at_least=max(sink, local))

    def least_lines(self) -> Budget:
        return self.kept

    def budget(
        self, mass: Float[Tensor, "batch heads keys"], forced: int
    ) -> Int[Tensor, "#batch #heads"]:
        kept = budget_of(self.kept, mass.shape[-1], at_least=forced)
        return torch.full((1, 1), kept, device=mass.device)


class FlexVerticalSlash(LineMethod):
    """FlexPrefill as the paper runs it: Vertical-Slash whose budget follows head and input.

    The query-aware pattern and the switch between patterns of FlexPrefill are left out.
    """

    def __init__(
        self,
        *,
        coverage: float = 0.8,
        least: int = 512,
        last_queries: int = 512,
        sink: int = 4,
        local: int = 64,
    ) -> None:
        """
        Args:
            coverage: alpha, the share of attention mass that columns, and diagonals, must hold.
            least: columns, and diagonals, of every head in any case.
        """
        super().__init__(last_queries=last_queries, sink=sink, local=local)
        self.coverage = check_share("coverage", coverage)
        self.least = check_count("least", least)

    def least_lines(self) -> Budget:
        return max(self.least, self.sink, self.local)

    def budget(
        self, mass: Float[Tensor, "batch heads keys"], forced: int
    ) -> Int[Tensor, "#batch #heads"]:
        """What each head needs by itself: the official code calls the method head by head."""
        return lines_to_cover(mass, self.coverage).clamp_min(max(self.least, forced))


def line_mass(
    weights: Float[Tensor, "batch heads last_queries keys"],
) -> tuple[Float[Tensor, "batch heads keys"], Float[Tensor, "batch heads keys"]]:
    """Attention summed over each column (vertical score) and each diagonal (slash score)."""
    return weights.sum(dim=-2), diagonal_sums(weights)


def best_lines(
    mass: Float[Tensor, "batch heads keys"],
    count: Int[Tensor, "#batch #heads"],
    forced: int,
) -> Bool[Tensor, "batch heads keys"]:
    """The `count` heaviest lines of each head, the first `forced` lines before all others."""
    ranked = mass.clone()
    ranked[..., :forced] = torch.inf
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(mass.shape[-1], device=mass.device) < count[..., None]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, kept.expand_as(order))


def lines_to_cover(
    mass: Float[Tensor, "batch heads keys"], coverage: float
) -> Int[Tensor, "batch heads"]:
    """Smallest number of lines, the heaviest first, that hold at least this share of the mass."""
    ranked = mass.double().sort(dim=-1, descending=True).values
    running = ranked.cumsum(dim=-1)
    # Compared with its own end, so that a coverage of 1 does not lose the tail to rounding.
    return (running < coverage * running[..., -1:]).sum(dim=-1) + 1


def line_mask(
    columns: Bool[Tensor, "batch heads keys"],
    diagonals: Bool[Tensor, "batch heads keys"],
    queries: int,
) -> Bool[Tensor, "batch heads queries keys"]:
    """Causal union of columns and diagonals; the last query stands at the last key."""
    keys = columns.shape[-1]
    # Row by row the distances shift by one: windows on the reversed diagonals, nothing beyond distance 0.
    reversed_diagonals = F.pad(diagonals.flip(-1), (0, queries - 1))
    on_diagonal = reversed_diagonals.unfold(-1, keys, 1).flip(-2)
    causal = torch.ones(queries, keys, dtype=torch.bool, device=columns.device)
    return (columns[..., None, :] & causal.tril(keys - queries)) | on_diagonal


def pair_density(
    mask: Bool[Tensor, "batch heads queries keys"],
) -> Float[Tensor, "batch heads"]:
    """Share of the causal pairs that a mask keeps, per head."""
    queries, keys = mask.shape[-2:]
    pairs = queries * keys - queries * (queries - 1) // 2
    return mask.sum(dim=(-2, -1)) / pairs


def line_density(
    columns: Bool[Tensor, "*batch keys"], diagonals: Bool[Tensor, "*batch keys"], queries: int
) -> Float[Tensor, "*batch"]:
    """`pair_density` of `line_mask` without the mask.

    Of the last q of T tokens column c holds min(T - c, q) pairs, diagonal o as many; they cross where
    T - q <= c + o < T.
    """
    keys = columns.shape[-1]
    size = torch.arange(keys, 0, -1, device=columns.device).clamp_max(queries)
    # At column c: diagonals that cross it above the last query, less those that do so above the first.
    above_last = diagonals.cumsum(dim=-1).flip(-1)
    above_first = F.pad(above_last[..., queries:], (0, min(queries, keys)))
    crossings = (columns * (above_last - above_first)).sum(dim=-1)
    pairs = ((columns.int() + diagonals.int()) * size).sum(dim=-1) - crossings
    return pairs / (queries * keys - queries * (queries - 1) // 2)


def chunks_density(top_chunks: int, chunks: int) -> float:
    """Share of causal chunk pairs that Block-Sparse computes: k(k+1)/2 + (n-k)k of n(n+1)/2."""
    k = min(top_chunks, chunks)
    return (k * (k + 1) / 2 + (chunks - k) * k) / (chunks * (chunks + 1) / 2)


# Costs (version 3, appendix B) --------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """Sizes that the cost formulas need."""

    width: int  # d
    layers: int  # N
    heads: int  # h
    key_heads: int  # n_kv
    head_dim: int  # d_h
    feed_forward: int  # d_mlp
    vocabulary: int  # |V|

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape in a Hugging Face configuration of the Llama kind."""
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            feed_forward=config.intermediate_size,
            vocabulary=config.vocab_size,
        )


def attention_flops(shape: ModelShape, length: int, density: float = 1.0) -> float:
    """Operations of attention itself on one prompt: N rho h L^2 (4 d_h + 3).

    The full square, as the paper counts: causality halves dense and sparse attention alike.
    """
    return shape.layers * density * shape.heads * length**2 * (4 * shape.head_dim + 3)


def prefill_flops(
    shape: ModelShape, length: int, density: float = 1.0, overhead: float = 0.0, batch: int = 1
) -> float:
    """Operations to read a batch of prompts.

    Args:
        density: rho, share of the attention map that is computed.
        overhead: operations of choosing it, for one prompt.
    """
    s = shape
    project = 2 * length * s.width * (2 * s.width + 2 * s.head_dim * s.key_heads)
    feed_forward = 2 * length * s.feed_forward * (3 * s.width + 1)
    embeddings = 2 * length * s.width + 2 * length * s.width * s.vocabulary
    attention = attention_flops(s, length, density)
    return batch * (embeddings + s.layers * (project + feed_forward) + attention + overhead)


def vertical_slash_overhead(
    shape: ModelShape, length: int, last_queries: int, columns: float, diagonals: float
) -> float:
    """Operations of choosing the lines: N h (2 d_h L q + 5 L q + 2 L log2 L + 64 L (k_v + k_s)).

    The paper prints d for the width of a head's product; the heads' own width is meant and used.
    """
    strip = (2 * shape.head_dim + 5) * length * last_queries
    lines = 2 * length * log2(length) + 64 * length * (columns + diagonals)
    return shape.layers * shape.heads * (strip + lines)


def decode_transfers(
    shape: ModelShape, length: int, density: float = 1.0, overhead: float = 0.0, batch: int = 1
) -> float:
    """Numbers moved from memory for each decoded token: weights once, the read cache per sequence.

    Args:
        density: share of the cache that is read.
        overhead: numbers read to choose it, for one sequence.
    """
    s = shape
    weights = s.layers * (4 * s.width**2 + 3 * s.width * s.feed_forward)
    weights += s.width * (s.vocabulary + 1)
    cache = 2 * s.layers * length * s.head_dim * s.key_heads * density
    return weights + batch * (cache + overhead)


def quest_overhead(shape: ModelShape, length: int, page: int) -> float:
    """Smallest and largest keys read to choose pages: 2 N n_kv d_h L / p.

    The paper prints d where one key head's d_h is meant.
    """
    return 2 * shape.layers * shape.key_heads * shape.head_dim * length / page


def pareto_front(
    cost: Float[np.ndarray, " points"], score: Float[np.ndarray, " points"]
) -> Bool[np.ndarray, " points"]:
    """Points that no other one beats by being better at no more cost, or cheaper and no worse."""
    no_worse = (cost[None] <= cost[:, None]) & (score[None] >= score[:, None])
    better = (cost[None] < cost[:, None]) | (score[None] > score[:, None])
    return ~(no_worse & better).any(axis=1)


# Statistics ---------------------------------------------------------------------------------------

MARGIN = 0.05  # of the dense score that a sparse one may lose without being worse
RESAMPLES = 200


def retained(
    dense: Float[np.ndarray, "*#levels samples"],
    sparse: Float[np.ndarray, "*levels samples"],
    *,
    margin: float = MARGIN,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Bool[np.ndarray, "*levels"]:
    """Whether each level is not inferior to dense, by a bootstrap paired over the samples.

    Not inferior: the one-sided lower bound of mean(sparse) - (1 - margin) mean(dense) is not below
    0. Identical scores are therefore never inferior.
    """
    gain = sparse - (1 - margin) * dense
    draws = np.random.default_rng(0).integers(gain.shape[-1], size=(resamples, gain.shape[-1]))
    means = gain[..., draws].mean(axis=-1)
    return np.quantile(means, 1 - confidence, axis=-1) >= -1e-12


def max_compression(
    compressions: Float[np.ndarray, " levels"], kept: Bool[np.ndarray, " levels *tasks"]
) -> Float[np.ndarray, "*tasks"]:
    """The largest compression up to which every level is retained; 1 when the first is not.

    Args:
        compressions: 1 / budget of the levels, rising.
    """
    reached = np.logical_and.accumulate(kept, axis=0).sum(axis=0)
    return np.append(1.0, compressions)[np.asarray(reached)]


@dataclass(frozen=True)
class ScalingLaw:
    """logit(score) = constant + b_N log N + b_L log L + b_C log C (version 1)."""

    constant: float
    size: float
    length: float
    compression: float

    def predict(
        self,
        sizes: Float[np.ndarray, " points"],
        lengths: Float[np.ndarray, " points"],
        compressions: Float[np.ndarray, " points"],
    ) -> Float[np.ndarray, " points"]:
        """Scores in (0, 1)."""
        slopes = np.array([self.constant, self.size, self.length, self.compression])
        return 1 / (1 + np.exp(-_features(sizes, lengths, compressions) @ slopes))


def fit_scaling_law(
    sizes: Float[np.ndarray, " points"],
    lengths: Float[np.ndarray, " points"],
    compressions: Float[np.ndarray, " points"],
    scores: Float[np.ndarray, " points"],
    *,
    clip: float = 0.01,
) -> ScalingLaw:
    """Least squares of the logits.

    Args:
        clip: scores are kept this far from 0 and 1, where the logit is infinite.

    Raises:
        ValueError: fewer than four independent points.
    """
    features = _features(sizes, lengths, compressions)
    slopes, _, rank, _ = np.linalg.lstsq(features, logit(scores, clip), rcond=None)
    if rank < features.shape[1]:
        raise ValueError("a scaling law needs at least two sizes, lengths and compressions")
    return ScalingLaw(*slopes.tolist())


def logit(scores: Float[np.ndarray, " points"], clip: float = 0.01) -> Float[np.ndarray, " points"]:
    """log(s / (1 - s)) of scores clipped to [clip, 1 - clip]."""
    clipped = np.clip(scores, clip, 1 - clip)
    return np.log(clipped / (1 - clipped))


def r_squared(
    predicted: Float[np.ndarray, " points"], observed: Float[np.ndarray, " points"]
) -> float:
    """Share of the variance that a prediction explains; negative when it is worse than the mean."""
    return float(
        1 - ((observed - predicted) ** 2).sum() / ((observed - observed.mean()) ** 2).sum()
    )


def _features(sizes, lengths, compressions) -> Float[np.ndarray, "points 4"]:
    logs = [np.log(np.asarray(x, dtype=float)) for x in (sizes, lengths, compressions)]
    return np.stack([np.ones_like(logs[0]), *logs], axis=1)
