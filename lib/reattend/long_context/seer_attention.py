"""SeerAttention: a small learned gate per layer predicts which blocks of the attention map matter.

Gao et al., "SeerAttention: Self-distilled Attention Gating for Efficient Long-context Prefilling",
NeurIPS 2025, arXiv 2410.13276 (version 4; the official code is microsoft/SeerAttention).

Queries and keys *before* the rotary embedding are pooled into blocks and mapped by one linear map
per head; a product of the two gives a block-level attention map. The maps are distilled from the
model itself, whose weights stay frozen:

    gates = AttentionGates(layers=30, query_heads=9, key_heads=3, dim=64, block_size=16)
    scores = gates(gates.pool_queries(query), gates.pool_keys(key))    [..., layers, heads, n, n]
    truth = truth_map(rotated_query, rotated_key, 16, scale)           [..., heads, n, n]
    loss = distillation_loss(scores, truth)

Blocks are those of `reattend.attention.blocks`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reattend.attention.block_sparse import Backend
from reattend.attention.blocks import (
    block_count,
    causal_block_mask,
    forced_blocks,
    pool_blocks,
    top_k_blocks,
)
from reattend.attention.dense import causal_token_mask, repeat_key_heads, widened
from reattend.attention.method import (
    AttentionMethod,
    BlockSparseMethod,
    check_count,
    check_share,
)

POOLINGS = ("avg", "max", "min")

# Tokens whose rows of the attention map are held at once.
TRUTH_ROWS = 512


# Pooling and positions ------------------------------------------------------------------------------


def pool(
    x: Float[Tensor, "*batch tokens dim"],
    block_size: int,
    kinds: Sequence[str],
    *,
    offset: int = 0,
) -> Float[Tensor, "*batch blocks channels"]:
    """Pools the tokens of each block in several ways, side by side in the channels.

    A partial block counts its real tokens only (pooling in ceil mode).

    Args:
        kinds: of `POOLINGS`, in the order of the channels.
        offset: absolute position of the first token.

    Raises:
        ValueError: there is no such pooling.
    """
    unknown = sorted(set(kinds) - set(POOLINGS))
    if unknown or not kinds:
        raise ValueError(f"poolings are {', '.join(POOLINGS)}, got {', '.join(kinds) or 'none'}")
    pooled = {
        "avg": lambda: pool_blocks(x, block_size, offset=offset),
        "max": lambda: _block_maximum(x, block_size, offset),
        "min": lambda: -_block_maximum(-x, block_size, offset),
    }
    return torch.cat([pooled[kind]() for kind in kinds], dim=-1)


def _block_maximum(x: Tensor, block_size: int, offset: int) -> Tensor:
    front = offset % block_size
    back = -(front + x.shape[-2]) % block_size
    padded = F.pad(x, (0, 0, front, back), value=float("-inf"))
    return padded.unflatten(-2, (-1, block_size)).amax(dim=-2)


def rotate(
    x: Float[Tensor, "*batch tokens dim"],
    positions: Int[Tensor, " tokens"],
    inv_freq: Float[Tensor, " half_dim"],
    *,
    inverse: bool = False,
) -> Float[Tensor, "*batch tokens dim"]:
    """Rotary embedding at given positions, in the half-split layout of Llama; or its inverse.

    Args:
        inv_freq: radians per position of each pair of dimensions (i, i + dim / 2).
        inverse: turn back, which undoes the embedding: it is an orthogonal map.

    Raises:
        ValueError: the frequencies do not fit the width.
    """
    if x.shape[-1] != 2 * len(inv_freq):
        raise ValueError(f"{len(inv_freq)} frequencies do not fit a width of {x.shape[-1]}")
    # transformers multiplies positions and frequencies in float32; the same angles have to be used
    # to undo a rotation.
    precise = x.dtype if x.dtype == torch.float64 else torch.float32
    angles = positions[:, None].to(precise) * inv_freq.to(x.device, precise)
    cosine, sine = angles.cos(), (-angles if inverse else angles).sin()
    first, second = x.to(precise).chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1).to(x.dtype)


def frequencies(dim: int, base: float) -> Float[Tensor, " half_dim"]:
    """Rotary frequencies base ** (-2 i / dim) of a width.

    Raises:
        ValueError: for an odd width.
    """
    if dim % 2:
        raise ValueError(f"rotary embedding needs an even width, got {dim}")
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)


# The gate -------------------------------------------------------------------------------------------


class AttentionGates(nn.Module):
    """The gates of all layers of a model, stacked so that they can be trained in one product.

        Q = pool(q) W_q,  K = pool(k) W_k,  both rotated by the position of their block
        G = Q K^T / sqrt(width), lowest where the key block lies in the future

    Parameters: `query_map` [layers, query_heads, channels, width] (None in the single-linear form)
    and `key_map` [layers, key_heads, channels, width] (one for each *query* head in that form).
    """

    def __init__(
        self,
        *,
        layers: int,
        query_heads: int,
        key_heads: int,
        dim: int,
        block_size: int = 64,
        width: int | None = None,
        query_pooling: Sequence[str] = ("avg",),
        key_pooling: Sequence[str] = ("max", "min", "avg"),
        rotary_base: float | None = 10_000.0,
        single_linear: bool = False,
        std: float = 0.02,
    ) -> None:
        """
        Args:
            dim: width of the model's heads.
            width: width of the gate's heads; None is `dim`.
            query_pooling, key_pooling: of `POOLINGS`. The default, Qavg_Kmaxminavg, is the best of
                the paper's search.
            rotary_base: base of the rotary embedding of the blocks, that of the model; None is
                without. The ablation of the paper: without it a gate does not reach beyond the
                length that it was trained at.
            single_linear: leave the query map out; needs one query pooling and width = dim.
            std: of the initial weights, normal, as for the model's other linear maps.

        Raises:
            ValueError: a size or a combination of them is wrong.
        """
        super().__init__()
        width = dim if width is None else width
        if query_heads % key_heads:
            raise ValueError(f"{query_heads} query heads cannot share {key_heads} key heads evenly")
        if single_linear and (len(query_pooling) != 1 or width != dim):
            raise ValueError("the single-linear form needs one query pooling and width = dim")
        self.block_size = check_count("block_size", block_size, at_least=1)
        self.query_pooling, self.key_pooling = tuple(query_pooling), tuple(key_pooling)
        self.query_heads = query_heads
        self.width = width
        inv_freq = None if rotary_base is None else frequencies(width, rotary_base)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.query_map = None
        if not single_linear:
            shape = (layers, query_heads, len(query_pooling) * dim, width)
            self.query_map = nn.Parameter(std * torch.randn(shape))
        mapped_heads = query_heads if single_linear else key_heads
        self.key_map = nn.Parameter(
            std * torch.randn(layers, mapped_heads, len(key_pooling) * dim, width)
        )

    @classmethod
    def for_model(cls, model: nn.Module, **settings) -> AttentionGates:
        """Untrained gates that fit a transformers model of the Llama kind.

        Args:
            settings: of the constructor, besides the model's sizes and its rotary base.

        Raises:
            ValueError: the model's rotary embedding cannot be undone.
        """
        config, rotary = model.config, rotary_of(model)
        rotary.check(rotary.inv_freq, rotary.scaling)
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            query_heads=heads,
            key_heads=getattr(config, "num_key_value_heads", heads),
            dim=head_width(config),
            **{"rotary_base": config.rope_parameters["rope_theta"], **settings},
        )

    def pool_queries(
        self, query: Float[Tensor, "*batch tokens dim"], *, offset: int = 0
    ) -> Float[Tensor, "*batch rows channels"]:
        """Pooled queries, from those before the rotary embedding; the first stands at `offset`."""
        return pool(query, self.block_size, self.query_pooling, offset=offset)

    def pool_keys(
        self, key: Float[Tensor, "*batch tokens dim"]
    ) -> Float[Tensor, "*batch columns channels"]:
        """Pooled keys, from those before the rotary embedding."""
        return pool(key, self.block_size, self.key_pooling)

    def forward(
        self,
        pooled_query: Float[Tensor, "*batch layers query_heads rows query_channels"],
        pooled_key: Float[Tensor, "*batch layers key_heads columns key_channels"],
        *,
        layers: slice = slice(None),
        blocks: Int[Tensor, " columns"] | None = None,
    ) -> Float[Tensor, "*batch layers query_heads rows columns"]:
        """Scores of all pairs of blocks, the lowest number of their type in the future.

        Rows are the last blocks of queries, as in `reattend.attention.blocks`.

        Args:
            layers: the layers whose gates are used.
            blocks: number of each key block in the sequence; 0, 1, 2, ... when None.
        """
        rows, columns = pooled_query.shape[-2], pooled_key.shape[-2]
        column = torch.arange(columns, device=pooled_key.device) if blocks is None else blocks
        row = torch.arange(columns - rows, columns, device=pooled_key.device)
        if self.query_map is None:
            query, key = pooled_query, self._to_query_heads(pooled_key) @ self.key_map[layers]
        else:
            query = pooled_query @ self.query_map[layers]
            key = self._to_query_heads(pooled_key @ self.key_map[layers])
        if self.inv_freq is not None:
            query = rotate(query, row * self.block_size, self.inv_freq)
            key = rotate(key, column * self.block_size, self.inv_freq)
        scores = query @ key.transpose(-2, -1) / math.sqrt(self.width)
        return scores.masked_fill(column > row[:, None], torch.finfo(scores.dtype).min)

    def _to_query_heads(self, key: Tensor) -> Tensor:
        return key.repeat_interleave(self.query_heads // key.shape[-3], dim=-3)


# What the gate learns -------------------------------------------------------------------------------


def block_maximum_map(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch query_heads blocks blocks"]:
    """Largest attention probability inside each block, from queries and keys after the rotary.

    max over a tile of softmax = max over its rows of exp(r - lse), where r is the row's largest
    score inside the tile and lse its log-sum-exp over all keys: no probability has to be stored.

    Raises:
        ValueError: the queries are not those of the whole sequence.
    """
    tokens = _whole_sequence(query, key)
    repeated = repeat_key_heads(key, query.shape[1])
    step = max(TRUTH_ROWS // block_size, 1) * block_size
    parts = []
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        seen = repeated[:, :, :stop]
        scores = scale * widened(query[:, :, start:stop]) @ widened(seen).transpose(-2, -1)
        causal = causal_token_mask(stop - start, stop, device=query.device)
        scores = scores.masked_fill(~causal, float("-inf"))
        log_sum = scores.logsumexp(dim=-1, keepdim=True)
        back = -stop % block_size
        padded = F.pad(scores, (0, back), value=float("-inf"))
        row_maxima = padded.unflatten(-1, (-1, block_size)).amax(dim=-1)
        largest = (row_maxima - log_sum).exp()
        largest = F.pad(largest, (0, block_count(tokens, block_size) - largest.shape[-1], 0, back))
        parts.append(largest.unflatten(-2, (-1, block_size)).amax(dim=-2))
    return torch.cat(parts, dim=-2)


def streaming_block_maximum_map(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch query_heads blocks blocks"]:
    """The same map as the paper's kernel computes it, tile by tile in one pass over the keys.

    As in FlashAttention a running maximum m and a running sum l are kept for each query; the row
    maxima r of every tile are stored besides, and become exp(r - m) / l at the end (Section 3.3).
    """
    tokens = _whole_sequence(query, key)
    query, repeated = widened(query), widened(repeat_key_heads(key, query.shape[1]))
    maximum = query.new_full(query.shape[:3], float("-inf"))
    total = query.new_zeros(query.shape[:3])
    row_maxima = []
    for start in range(0, tokens, block_size):
        tile = repeated[:, :, start : start + block_size]
        position = torch.arange(start, start + tile.shape[2], device=query.device)
        future = position > torch.arange(tokens, device=query.device)[:, None]
        scores = (scale * query @ tile.transpose(-2, -1)).masked_fill(future, float("-inf"))
        row_maxima.append(scores.amax(dim=-1))
        updated = torch.maximum(maximum, row_maxima[-1])
        total = total * (maximum - updated).exp() + (scores - updated[..., None]).exp().sum(dim=-1)
        maximum = updated
    largest = (torch.stack(row_maxima, dim=-1) - maximum[..., None]).exp() / total[..., None]
    padded = F.pad(largest, (0, 0, 0, -tokens % block_size))
    return padded.unflatten(-2, (-1, block_size)).amax(dim=-2)


def truth_map(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    block_size: int,
    scale: float,
) -> Float[Tensor, "batch query_heads blocks blocks"]:
    """What the gate has to predict: the largest probability of each block, rows scaled to sum 1."""
    largest = block_maximum_map(query, key, block_size, scale)
    return largest / largest.sum(dim=-1, keepdim=True)


def distillation_loss(
    scores: Float[Tensor, "*batch layers heads blocks blocks"],
    truth: Float[Tensor, "*batch layers heads blocks blocks"],
    *,
    dropped: float = 0.25,
) -> Float[Tensor, ""]:
    """KL(truth || softmax(scores)), summed over layers; no gradient reaches the truth.

    Within a layer it is the mean over *all* entries of the kept rows, the future ones included, as
    KLDivLoss(reduction="mean") takes it; the training multiplies it by 10.

    Args:
        dropped: share of the rows at the beginning that are left out.
    """
    first = int(dropped * scores.shape[-2])
    predicted = scores[..., first:, :].log_softmax(dim=-1)
    target = truth[..., first:, :].detach()
    # Written out: kl_div(reduction="mean") warns that its meaning will change.
    pointwise = torch.xlogy(target, target) - target * predicted
    return pointwise.mean() * scores.shape[-4]


class Example(NamedTuple):
    """One batch of sequences of equal length, as the gates see them in training."""

    pooled_query: Float[Tensor, "batch layers query_heads blocks query_channels"]
    pooled_key: Float[Tensor, "batch layers key_heads blocks key_channels"]
    truth: Float[Tensor, "batch layers query_heads blocks blocks"]


class Distillation(AttentionMethod):
    """Dense attention that collects what the gates learn from: one pass of the frozen model.

        with attach(model, Distillation(gates, inv_freq)) as collector:
            model(tokens)
        example = collector.example()

    Sequences of a batch must have equal lengths, without padding, read whole.
    """

    def __init__(
        self,
        gates: AttentionGates,
        inv_freq: Float[Tensor, " half_dim"],
        *,
        rotary_scaling: float = 1.0,
    ) -> None:
        """
        Args:
            gates: say how to pool.
            inv_freq, rotary_scaling: see `SeerAttention`.
        """
        super().__init__()
        self.gates, self.inv_freq, self.rotary_scaling = gates, inv_freq, rotary_scaling

    def prepare(self, model: nn.Module) -> None:
        """Looks at the model's rotary embedding.

        Raises:
            ValueError: it is not undone by `unrotate`.
        """
        rotary_of(model).check(self.inv_freq, self.rotary_scaling)

    @torch.no_grad()
    def _collect(self, query: Tensor, key: Tensor, scale: float, layer: int) -> None:
        before = [unrotate(x, 0, self.inv_freq, self.rotary_scaling) for x in (query, key)]
        self._layers[layer] = (
            self.gates.pool_queries(before[0]),
            self.gates.pool_keys(before[1]),
            truth_map(query, key, self.gates.block_size, scale),
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
        """Dense attention; keeps the pooled vectors and the truth of the layer.

        Raises:
            ValueError: the batch is padded, or the sequence is not read whole.
        """
        if padding is not None:
            raise ValueError("gates are trained on sequences without padding")
        self._collect(query, key, scale, layer)
        return super().prefill(query, key, value, scale=scale, layer=layer)

    def example(self) -> Example:
        """What the last pass gave, layer by layer in order; forgets it.

        Raises:
            ValueError: nothing was read.
        """
        if not self._layers:
            raise ValueError("no sequence was read: run the model first")
        parts = zip(*(self._layers[layer] for layer in sorted(self._layers)), strict=True)
        example = Example(*(torch.stack(part, dim=1) for part in parts))
        self._layers = {}
        return example

    def clear(self) -> None:
        """Forgets the recorded densities and the collected layers."""
        super().clear()
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}


# Selection ------------------------------------------------------------------------------------------


def blocks_per_row(density: float, blocks: int) -> int:
    """Blocks kept in each row for a density of the causal triangle (official `nz_ratio`).

    Keeping a share r of every row, of which a row's causal part may hold fewer, covers 2 r - r^2 of
    the triangle; so k = max(1, int((1 - sqrt(1 - density)) n)). The cut to an integer makes it
    sparser than asked for when there are few blocks: report measured densities.
    """
    check_share("density", density)
    return max(1, int((1 - math.sqrt(1 - density)) * blocks))


def threshold_blocks(
    scores: Float[Tensor, "batch heads query_blocks key_blocks"], threshold: float
) -> Bool[Tensor, "batch heads query_blocks key_blocks"]:
    """Blocks whose share of the row, softmax(scores), exceeds a threshold, and the diagonal.

    The diagonal is our addition: a row without any block would have no softmax.
    """
    rows, columns = scores.shape[-2:]
    causal = causal_block_mask(rows, columns, device=scores.device)
    diagonal = forced_blocks(rows, columns, device=scores.device)
    return ((widened(scores).softmax(dim=-1) > threshold) & causal) | diagonal


def unrotate(
    x: Float[Tensor, "*batch tokens dim"],
    offset: int,
    inv_freq: Float[Tensor, " half_dim"],
    scaling: float = 1.0,
) -> Float[Tensor, "*batch tokens dim"]:
    """Queries or keys as they were before the rotary embedding; the first stands at `offset`.

    In float32 at least.
    """
    positions = torch.arange(offset, offset + x.shape[-2], device=x.device)
    return rotate(widened(x), positions, inv_freq, inverse=True) / scaling


class Rotary(NamedTuple):
    """The rotary embedding of a model, as its own code computes it."""

    module: nn.Module
    apply: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    inv_freq: Float[Tensor, " half_dim"]
    scaling: float
    width: int

    def check(self, inv_freq: Float[Tensor, " half_dim"], scaling: float) -> None:
        """Embeds a few vectors with the model's code and undoes it with `unrotate`.

        Raises:
            ValueError: other vectors come back: the embedding pairs neighbouring dimensions, covers
                a part of the width only, or has other frequencies.
        """
        device = self.inv_freq.device
        before = torch.linspace(-9, 9, 5 * self.width, device=device).sin()
        before = before.view(1, 1, 5, self.width)
        if 2 * len(inv_freq) != self.width or 2 * len(self.inv_freq) != self.width:
            raise ValueError(_WRONG_ROTARY)
        cosine, sine = self.module(before, torch.arange(3, 8, device=device)[None])
        after, _ = self.apply(before, before, cosine, sine)
        if not (unrotate(after, 3, inv_freq, scaling) - before).abs().max() < 1e-3:
            raise ValueError(_WRONG_ROTARY)


_WRONG_ROTARY = (
    "seer_attention has to undo the rotary embedding, which must be that of Llama (halves of the whole "
    "width are paired, known frequencies); this model's is another: interleaved, partial or rescaled"
)


def rotary_of(model: nn.Module) -> Rotary:
    """The rotary embedding of a transformers model.

    Raises:
        ValueError: it has none, or several kinds, or none that one function applies.
    """
    modules = [m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "forward")]
    names = vars(sys.modules[type(modules[0]).__module__]) if modules else {}
    apply = names.get("apply_rotary_pos_emb")
    interleaved = getattr(model.config, "rope_interleave", False)
    if len(modules) != 1 or apply is None or interleaved:
        raise ValueError(_WRONG_ROTARY)
    module = modules[0]
    scaling = getattr(module, "attention_scaling", 1.0)
    return Rotary(module, apply, module.inv_freq, scaling, head_width(model.config))


def head_width(config: Any) -> int:
    """Width of the heads in a transformers configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class SeerAttention(BlockSparseMethod):
    """Attention over the blocks that trained gates select, for any model with rotary embeddings.

        with attach(model, "seer_attention", gates=gates, density=0.2) as method:
            model.generate(**prompt)

    Gates want queries and keys before the rotary embedding, and methods get them after it. The
    embedding is undone exactly, given the positions: those of each sequence must start at 0 at its
    first real token. `generate` numbers them so; a plain forward pass of a batch padded on the left
    does so only when it is given `position_ids`. Decoding is dense.
    """

    def __init__(
        self,
        *,
        gates: AttentionGates,
        inv_freq: Float[Tensor, " half_dim"] | None = None,
        density: float | None = None,
        k: int | None = None,
        threshold: float | None = None,
        dense_last: int = 0,
        rotary_scaling: float | None = None,
        backend: Backend = "auto",
    ) -> None:
        """
        Args:
            gates: trained gates of all layers; their block size is the method's.
            inv_freq: the model's rotary frequencies; None is those of the model that the method is
                attached to (`model.model.rotary_emb.inv_freq`).
            density: share of the causal triangle to aim at, see `blocks_per_row`.
            k: blocks of each row instead.
            threshold: least share of a row in the gate's map instead (the paper: 5e-4 to 2e-3).
            dense_last: query blocks at the end that see everything (an option of the official code,
                where it is 2).
            rotary_scaling: factor on the model's cosines and sines, 1 except with YaRN; None is
                that of the model (`model.model.rotary_emb.attention_scaling`).
            backend: see `reattend.attention.block_sparse.block_sparse_attention`.

        Raises:
            ValueError: not exactly one of density, k and threshold, or a value out of range.
        """
        super().__init__(block_size=gates.block_size, backend=backend)
        if sum(setting is not None for setting in (density, k, threshold)) != 1:
            raise ValueError("SeerAttention takes exactly one of density, k and threshold")
        self.density_aimed_at = None if density is None else check_share("density", density)
        self.k = None if k is None else check_count("k", k, at_least=1)
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold!r}")
        self.threshold = threshold
        self.dense_last = check_count("dense_last", dense_last)
        self.gates = gates
        self._given = inv_freq, rotary_scaling
        self.inv_freq = inv_freq
        self.rotary_scaling = 1.0 if rotary_scaling is None else rotary_scaling

    def prepare(self, model: nn.Module) -> None:
        """Takes the rotary frequencies from the model, where they were not given.

        Raises:
            ValueError: the model's rotary embedding is not undone by `unrotate`.
        """
        rotary = rotary_of(model)
        frequencies, scaling = self._given
        self.inv_freq = rotary.inv_freq if frequencies is None else frequencies
        self.rotary_scaling = rotary.scaling if scaling is None else scaling
        rotary.check(self.inv_freq, self.rotary_scaling)

    def fewest_blocks(self) -> int | None:
        """With a budget of blocks, one more; with shares and thresholds any second block."""
        return 2 + self.dense_last if self.k is None else self.k + 1 + self.dense_last

    @torch.no_grad()
    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        """The blocks that the layer's gate selects."""
        scores = self.gate_scores(query, key, layer=layer)
        if self.threshold is not None:
            blocks = threshold_blocks(scores, self.threshold)
        else:
            k = self.k or blocks_per_row(self.density_aimed_at, scores.shape[-1])
            # The raw scores, and no block forced, as in the official code.
            blocks = top_k_blocks(scores, k, diagonal=False)
        if self.dense_last:
            blocks[..., -self.dense_last :, :] = True
        return blocks

    def gate_scores(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        layer: int,
    ) -> Float[Tensor, "batch query_heads query_blocks key_blocks"]:
        """The gate's map from queries and keys after the rotary embedding, before any softmax."""
        offset = key.shape[2] - query.shape[2]
        before_query = unrotate(query, offset, self.inv_freq, self.rotary_scaling)
        before_key = unrotate(key, 0, self.inv_freq, self.rotary_scaling)
        # The gates keep their own precision: pooled vectors are few.
        own = self.gates.key_map.dtype
        pooled_query = self.gates.pool_queries(before_query, offset=offset).to(own)
        pooled_key = self.gates.pool_keys(before_key).to(own)
        one = slice(layer, layer + 1)
        return self.gates(pooled_query[:, None], pooled_key[:, None], layers=one)[:, 0]


def _whole_sequence(query: Tensor, key: Tensor) -> int:
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"the map of a whole sequence is needed, got {query.shape[2]} queries "
            f"and {key.shape[2]} keys"
        )
    return key.shape[2]
