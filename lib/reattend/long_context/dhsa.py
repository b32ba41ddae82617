"""DHSA: keys cut into chunks of varying length, where a small network sees a boundary, and tokens chosen by them.

Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
NeurIPS 2025 workshop on efficient reasoning, arXiv 2510.24606 (first version; the official code is
xiongsiheng/DHSA, its folder `legacy`).

Blocks of queries choose among chunks of keys, as block-sparse attention does; but the chunks end where the
text does something else, and a chunk is represented by the *sum* of its keys over the root of its length:

    edges = chunk_edges(predictor.scores(key), limit=64, window=4)            [batch, edges]
    scores = token_scores(query, key, edges, block_size=32)                   [batch, blocks, keys]
    tokens = choose_tokens(scores, ends, budget=256, local=64, sink=16)       [batch, blocks, chosen]
    output, pairs = attend_to_tokens(query, key, value, tokens, block_size=32, scale=scale)

One selection serves all heads of a layer. `edges` of a sequence are 0 = b_0 < b_1 < ... = keys, filled up
with `keys` where another sequence of the batch has more chunks. Blocks of queries are those of
`reattend.attention.blocks`.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reattend.attention.blocks import block_count, pool_blocks
from reattend.attention.dense import causal_sdpa, dense_attention, widened
from reattend.attention.method import AttentionMethod, Phase, check_count, per_sequence

BOUNDARIES = ("jumps", "attention", "fixed")
POOLINGS = ("sqrt", "mean")

LABEL_RATIO = 2.0  # from here on a position is a boundary to the predictor (the paper's beta)

# Upper limit on the copies of keys and values that are alive at once, in numbers.
GATHERED_NUMBERS = 1 << 21


# Where chunks end ---------------------------------------------------------------------------------


class BoundaryPredictor(nn.Module):
    """Says from the keys alone after which positions a chunk ends; one for all layers of a model.

    A position sees its window, the `window` keys up to it and as many behind it, zeros beyond the ends:

        h = LayerNorm(MHA(window)),  l = mean of its left half,  r = mean of its right half
        logit = MLP([l, r, |l - r|, l * r, cos(l, r)])

    There is no residual around the attention, and no position in it. Weights are named as in
    `torch.nn.MultiheadAttention`.
    """

    def __init__(
        self, channels: int, *, heads: int = 4, window: int = 4, hidden: int = 256
    ) -> None:
        """
        Args:
            channels: width of a layer's keys, all key heads together.
            heads: of the attention inside a window.
            window: keys on each side.
            hidden: width of the MLP.
        """
        super().__init__()
        self.window = check_count("window", window, at_least=1)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    @property
    def channels(self) -> int:
        """Width of the keys of a layer, all key heads together."""
        return self.norm.normalized_shape[0]

    def forward(self, key: Float[Tensor, "batch keys channels"]) -> Float[Tensor, "batch keys"]:
        """Logits of a boundary after each position."""
        left, right = self._windows(key).unflatten(2, (2, -1)).mean(dim=3).unbind(dim=2)
        cosine = F.cosine_similarity(left, right, dim=-1)[..., None]
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine], dim=-1)
        return self.mlp(features)[..., 0]

    def scores(self, key: Float[Tensor, "batch key_heads keys dim"]) -> Float[Tensor, "batch keys"]:
        """Logits from keys as a layer has them, after the rotary embedding; -inf where a window is cut.

        Raises:
            ValueError: the keys have another width.
        """
        joined = key.transpose(1, 2).flatten(2).to(self.norm.weight.dtype)
        if joined.shape[-1] != self.channels:
            raise ValueError(
                f"the predictor was made for keys of {self.channels} numbers, this model's have "
                f"{joined.shape[-1]}: train one for it"
            )
        return _inside(self(joined), self.window - 1, self.window)

    def _windows(
        self, key: Float[Tensor, "batch keys channels"]
    ) -> Float[Tensor, "batch keys places channels"]:
        """LayerNorm(MHA(window)) of every window; keys are projected once, not once a window."""
        attention, places = self.attention, 2 * self.window
        padded = F.pad(key, (0, 0, self.window - 1, self.window))
        projected = F.linear(padded, attention.in_proj_weight, attention.in_proj_bias)
        windows = projected.unfold(1, places, 1).unflatten(2, (3, attention.num_heads, -1))
        query, near, value = windows.permute(2, 0, 1, 3, 5, 4).flatten(1, 2)
        attended = F.scaled_dot_product_attention(query, near, value)
        joined = attended.transpose(1, 2).flatten(2).unflatten(0, key.shape[:2])
        return self.norm(attention.out_proj(joined))


def key_jumps(key: Float[Tensor, "batch key_heads keys dim"]) -> Float[Tensor, "batch keys"]:
    """1 - cosine of each key with the next, all key heads together: boundaries without training.

    -inf at the last position.
    """
    joined = widened(key).transpose(1, 2).flatten(2)
    jumps = 1 - F.cosine_similarity(joined[:, :-1], joined[:, 1:], dim=-1)
    return F.pad(jumps, (0, 1), value=-math.inf)


def boundary_ratios(
    weights: Float[Tensor, "batch tokens tokens"], window: int, *, eps: float = 1e-6
) -> Float[Tensor, "batch tokens"]:
    """How unequally later queries use the two sides of each position: what the predictor learns.

    Of the queries behind a window, the attention on its left half, columns i - w + 1 .. i, and on its
    right half, i + 1 .. i + w: ratio = (larger + eps) / (smaller + eps). -inf for the first 2 w - 1
    positions and the last 2 w.

    Args:
        weights: causal attention of a whole sequence, the mean over the heads.
        window: w.
    """
    tokens = weights.shape[-1]
    # Mass that the queries from r on give to the columns before c, in float64: differences follow.
    mass = F.pad(weights.double().flip(1).cumsum(1).flip(1).cumsum(2), (1, 0))
    place = torch.arange(2 * window - 1, max(tokens - 2 * window, 2 * window - 1))
    rows = place + window + 1
    middle = mass[:, rows, place + 1]
    left = middle - mass[:, rows, place + 1 - window]
    right = mass[:, rows, place + 1 + window] - middle
    inner = (torch.maximum(left, right) + eps) / (torch.minimum(left, right) + eps)
    ratios = inner.new_full((len(weights), tokens), -math.inf)
    ratios[:, place] = inner
    return ratios.to(weights.dtype)


def head_mean_weights(
    query: Float[Tensor, "batch query_heads tokens dim"],
    key: Float[Tensor, "batch key_heads tokens dim"],
    scale: float,
) -> Float[Tensor, "batch tokens tokens"]:
    """Causal attention of a whole sequence, the mean over its heads."""
    _, weights = dense_attention(query, key, key, scale=scale, causal=True, return_weights=True)
    return weights.mean(dim=1)


def focal_loss(
    logits: Float[Tensor, "*shape"],
    target: Float[Tensor, "*shape"],
    *,
    gamma: float = 2.0,
    pos_weight: float = 1.3,
) -> Float[Tensor, ""]:
    """Binary cross-entropy in which what is predicted well counts less: mean of (1 - p_t)^gamma BCE."""
    weight = logits.new_tensor(pos_weight)
    entropy = F.binary_cross_entropy_with_logits(
        logits, target, pos_weight=weight, reduction="none"
    )
    missed = (target - logits.sigmoid()).abs()  # 1 - p_t
    return (missed**gamma * entropy).mean()


class Teacher(AttentionMethod):
    """Dense attention that collects what the predictor learns from, in one pass of the frozen model.

    Sequences of a batch have equal lengths, without padding, and are read whole.

    Attributes:
        layers: of each layer the keys, all heads together, and the ratios of `boundary_ratios`.
    """

    def __init__(self, window: int) -> None:
        """
        Args:
            window: of the predictor.
        """
        super().__init__()
        self.window, self.layers = window, {}

    def prefill(
        self,
        query: Float[Tensor, "batch query_heads tokens dim"],
        key: Float[Tensor, "batch key_heads tokens dim"],
        value: Float[Tensor, "batch key_heads tokens value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch query_heads tokens value_dim"]:
        """Dense attention; keeps keys and ratios.

        Raises:
            ValueError: the batch is padded.
        """
        if padding is not None:
            raise ValueError("the predictor is trained on sequences without padding")
        ratios = boundary_ratios(head_mean_weights(query, key, scale), self.window)
        self.layers[layer] = (key.transpose(1, 2).flatten(2), ratios)
        return super().prefill(query, key, value, scale=scale, layer=layer)


def suppress(scores: Float[Tensor, "batch tokens"], window: int) -> Bool[Tensor, "batch tokens"]:
    """Greedy non-maximum suppression: the best position stays, those within `window` of it go, and so on.

    Positions of -inf never stay; of equal scores the earlier comes first. In every round all positions
    that no better one threatens are taken together, which gives what taking them one by one gives.
    """
    tokens = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(tokens, 0, -1, device=scores.device, dtype=torch.float32)
    value = torch.zeros_like(scores, dtype=torch.float32).scatter(-1, order, place.expand_as(order))

    def around(x: Tensor) -> Tensor:
        return F.max_pool1d(x[:, None], 2 * window + 1, stride=1, padding=window)[:, 0]

    free, kept = scores > -math.inf, torch.zeros_like(scores, dtype=torch.bool)
    while free.any():
        open_value = value * free
        best = free & (open_value == around(open_value))
        kept |= best
        free = free & (around(best.float()) == 0)
    return kept


def chunk_edges(
    scores: Float[Tensor, "batch keys"],
    *,
    limit: int,
    window: int,
    threshold: float = -math.inf,
    instruction: int = 0,
) -> Int[Tensor, "batch edges"]:
    """Chunks end after the best positions that leave each other room (step 3 of the method).

    Args:
        scores: of a boundary after each position; -inf for none.
        limit: most boundaries. A sequence in which nothing passes gets chunks of `keys` / `limit` tokens.
        window: positions so near to a better one are suppressed.
        threshold: only larger scores count.
        instruction: the last so many tokens are one chunk, whatever their scores.
    """
    keys = scores.shape[-1]
    scores = scores.masked_fill(scores <= threshold, -math.inf)
    nothing = ~(scores > -math.inf).any(dim=-1, keepdim=True)
    if 0 < instruction < keys:
        scores[:, -instruction - 1], scores[:, -instruction:] = math.inf, -math.inf
    ranked = scores.masked_fill(~suppress(scores, window), -math.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True)
    found = torch.where(best.values > -math.inf, best.indices + 1, keys)[:, :limit]
    even = even_edges(limit, keys, scores.device)[1:]
    even = F.pad(even, (0, found.shape[-1] - len(even)), value=keys)
    inner = torch.where(nothing, even, found).sort(dim=-1).values
    inner = inner[:, : max(int((inner < keys).sum(dim=-1).max()), 0)]
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=keys)


def even_edges(
    count: int, keys: int, device: torch.device | str | None = None
) -> Int[Tensor, " edges"]:
    """Edges of `count` chunks of nearly equal size; of at most as many as there are keys."""
    count = min(max(count, 1), keys)
    return torch.arange(count + 1, device=device) * keys // count


def _inside(scores: Tensor, before: int, behind: int) -> Tensor:
    """The scores with -inf at the first and last positions."""
    place = torch.arange(scores.shape[-1], device=scores.device)
    outside = (place < before) | (place >= scores.shape[-1] - behind)
    return scores.masked_fill(outside, -math.inf)


# Which tokens are read ----------------------------------------------------------------------------


def token_scores(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    edges: Int[Tensor, "batch edges"],
    *,
    block_size: int,
    pooling: str = "sqrt",
    strict: bool = False,
) -> Float[Tensor, "batch blocks keys"]:
    """Every key's score for every block of queries: that of its chunk (steps 4 and 5).

    With C a block of queries or a chunk of keys, x_C = sqrt(|C|) mean_C x ("sqrt") or mean_C x ("mean"),
    also the mean over the heads; the score is q_C . k_C. For keys drawn independently its spread does
    not depend on |C| under "sqrt", while under "mean" short chunks win by noise.

    Args:
        strict: a chunk that reaches into a block counts with its keys before the block only. Otherwise
            the block chooses by means of keys that most of its queries must not see, as the official
            code does.

    Raises:
        ValueError: there is no such pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    power = 0.5 if pooling == "sqrt" else 1.0
    offset = key.shape[2] - query.shape[2]
    mean_query = widened(query).mean(dim=1)
    pooled = pool_blocks(mean_query, block_size, offset=offset)
    begin, end = block_bounds(query.shape[2], key.shape[2], block_size, key.device)
    queries = pooled * (end - begin.clamp_min(offset))[:, None] ** (1 - power)

    # Sums of the keys before each position, in float64, since their differences are wanted.
    before = F.pad(widened(key).mean(dim=1).double().cumsum(dim=1), (0, 0, 1, 0))
    at_edges = _rows(before, edges)

    def normed(sums: Tensor, sizes: Tensor) -> Tensor:
        return (sums / sizes.clamp_min(1)[..., None] ** power).to(queries.dtype)

    chunks = normed(at_edges.diff(dim=1), edges.diff(dim=1))
    scores = queries @ chunks.transpose(1, 2)
    chunk_of = chunk_of_tokens(edges)
    if strict:
        reaching = chunk_of[:, begin]
        first = edges.gather(1, reaching)
        cut = normed(before[:, begin] - _rows(before, first), begin - first)
        scores = scores.scatter(2, reaching[..., None], (queries * cut).sum(-1, keepdim=True))
    return scores.gather(2, chunk_of[:, None].expand(-1, scores.shape[1], -1))


def chunk_of_tokens(edges: Int[Tensor, "batch edges"]) -> Int[Tensor, "batch keys"]:
    """Number of the chunk that each token lies in."""
    keys = int(edges[0, -1])
    token = torch.arange(keys, device=edges.device).expand(len(edges), -1).contiguous()
    return torch.searchsorted(edges.contiguous(), token, right=True) - 1


def block_bounds(
    queries: int, keys: int, block_size: int, device: torch.device | str | None = None
) -> tuple[Int[Tensor, " blocks"], Int[Tensor, " blocks"]]:
    """First position of each block of queries, and the position behind its last."""
    first = (keys - queries) // block_size
    blocks = torch.arange(first, block_count(keys, block_size), device=device)
    return blocks * block_size, ((blocks + 1) * block_size).clamp_max(keys)


def choose_tokens(
    scores: Float[Tensor, "batch blocks keys"],
    ends: Int[Tensor, " blocks"],
    *,
    budget: int,
    local: int,
    sink: int,
) -> Int[Tensor, "batch blocks chosen"]:
    """The keys that each block of queries reads, in order (step 6).

    Of the keys before the block's end: the first `sink`, the last `local`, then by score until there are
    `budget`; all of them where there are no more. Of equal scores, as in one chunk, the earlier comes
    first. Lists that are shorter than the longest one end with the number of keys.
    """
    place = torch.arange(scores.shape[-1], device=scores.device)
    unseen = place >= ends[:, None]
    forced = (place < sink) | (place >= ends[:, None] - local)
    ranked = scores.masked_fill(forced, math.inf).masked_fill(unseen, -math.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return order.masked_fill(order >= ends[:, None], scores.shape[-1]).sort(dim=-1).values


def attend_to_tokens(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    tokens: Int[Tensor, "batch blocks chosen"],
    *,
    block_size: int,
    scale: float,
) -> tuple[Float[Tensor, "batch query_heads queries value_dim"], Int[Tensor, "batch queries"]]:
    """Exact causal attention of every block of queries over its tokens (step 7).

    Args:
        tokens: of `choose_tokens`; a block's own keys must be among them.

    Returns:
        The output, and how many keys each query has read.
    """
    queries, keys, heads = query.shape[2], key.shape[2], key.shape[1]
    front = (keys - queries) % block_size
    padded = F.pad(query, (0, 0, front, -(front + queries) % block_size))
    rows = padded.unflatten(2, (-1, block_size)).unflatten(1, (heads, -1))
    position = torch.arange(padded.shape[2], device=key.device).view(-1, block_size)
    seen = tokens[:, :, None] <= position[..., None] + (keys - queries - front)
    numbers = key.shape[0] * heads * tokens.shape[-1] * (key.shape[-1] + value.shape[-1])
    step = max(1, GATHERED_NUMBERS // numbers)
    outputs = []
    for part, chosen, mask in zip(
        rows.split(step, dim=3), tokens.split(step, dim=1), seen.split(step, dim=1), strict=True
    ):
        # Blocks as a batch; the query heads of a key head side by side, as more queries of it.
        lead, group = (chosen.shape[0] * chosen.shape[1], heads), part.shape[2]
        output = F.scaled_dot_product_attention(
            part.permute(0, 3, 1, 2, 4, 5).reshape(*lead, -1, query.shape[-1]),
            _gathered(key, chosen),
            _gathered(value, chosen),
            attn_mask=mask.flatten(0, 1).repeat(1, group, 1)[:, None],
            scale=scale,
        )
        output = output.unflatten(2, (group, -1)).unflatten(0, chosen.shape[:2])
        outputs.append(output.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2))
    here = slice(front, front + queries)
    return torch.cat(outputs, dim=2)[:, :, here], seen.sum(dim=-1).flatten(1)[:, here]


def _gathered(
    x: Float[Tensor, "batch heads keys dim"], tokens: Int[Tensor, "batch blocks chosen"]
) -> Float[Tensor, "rows heads chosen dim"]:
    """Keys or values by position; another one where a list has ended."""
    batch, heads, keys, dim = x.shape
    row = torch.arange(batch * heads, device=x.device).view(batch, 1, heads, 1) * keys
    index = tokens.clamp_max(keys - 1)[:, :, None] + row
    return (
        x.reshape(-1, dim).index_select(0, index.flatten()).view(-1, heads, tokens.shape[-1], dim)
    )


def _rows(
    x: Float[Tensor, "batch rows dim"], index: Int[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen dim"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# Inside a model -----------------------------------------------------------------------------------


class DHSA(AttentionMethod):
    """The method, for any model that `reattend.attention.host.attach` accepts.

        with attach(model, "dhsa", boundaries=predictor, budget=2048) as method:
            model.generate(**prompt)

    Decoding is dense, as in the official code (the paper describes a sparse one). Prompts of up to
    `budget` tokens are attended densely.
    """

    def __init__(
        self,
        *,
        boundaries: str | BoundaryPredictor = "jumps",
        budget: int = 2048,
        block_size: int = 128,
        local: int = 128,
        sink: int = 128,
        instruction: int = 64,
        chunk: int = 16,
        window: int = 8,
        threshold: float = -math.inf,
        pooling: str = "sqrt",
        strict: bool = False,
    ) -> None:
        """
        Args:
            boundaries: a predictor that was trained for the model (the method); or "jumps" between
                neighbouring keys, "attention", the ratios that the predictor is trained on, at full
                cost, or "fixed" chunks.
            budget: keys that a query of a block may read, the forced ones among them.
            block_size: queries that share a selection.
            local: last keys before a block's end that it reads in any case, its own among them.
            sink: first keys, read by all.
            instruction: last queries of the prompt that read everything; also the last chunk. 0: none.
            chunk: mean tokens of a chunk: at most keys / chunk boundaries.
            window: boundaries lie farther apart than this.
            threshold: least score of a boundary. The official code has 1.1, for ratios and for logits.
            pooling: "sqrt" or "mean", see `token_scores`.
            strict: see `token_scores`.

        Raises:
            ValueError: a setting out of range.
        """
        super().__init__()
        if not isinstance(boundaries, BoundaryPredictor) and boundaries not in BOUNDARIES:
            known = ", ".join(BOUNDARIES)
            raise ValueError(f"boundaries must be a BoundaryPredictor or one of {known}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.boundaries, self.pooling, self.strict = boundaries, pooling, strict
        self.block_size = check_count("block_size", block_size, at_least=1)
        self.local = check_count("local", local)
        self.sink = check_count("sink", sink)
        self.budget = check_count("budget", budget, at_least=1)
        self.instruction = check_count("instruction", instruction)
        self.chunk = check_count("chunk", chunk, at_least=1)
        self.window = check_count("window", window)
        self.threshold = threshold
        if not self.block_size <= self.local <= self.budget - self.sink:
            raise ValueError(
                f"a block of {block_size} queries reads its own keys: local must be at least "
                f"block_size, and sink + local at most budget, got {sink} + {local} of {budget}"
            )

    def saves_from(self, phase: Phase) -> int | None:
        """Least tokens of a prompt of which a key is left out; decoding is dense."""
        return None if phase == "decode" else next(filter(self._saves, itertools.count(1)))

    def _saves(self, keys: int) -> bool:
        last = keys - self.instruction - 1  # the last query that does not read everything
        end = min((last // self.block_size + 1) * self.block_size, keys)
        return last >= 0 and end > self.budget

    def edges(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Int[Tensor, "batch edges"]:
        """Where the chunks of a layer begin and end.

        Raises:
            ValueError: boundaries from attention, but the prompt comes in parts.
        """
        keys = key.shape[2]
        if self.boundaries == "fixed":
            places = torch.arange(0, keys + self.chunk, self.chunk, device=key.device)
            return places.clamp_max(keys).expand(len(key), -1)
        return chunk_edges(
            self.boundary_scores(query, key, scale),
            limit=keys // self.chunk,
            window=self.window,
            threshold=self.threshold,
            instruction=self.instruction,
        )

    def boundary_scores(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        scale: float,
    ) -> Float[Tensor, "batch keys"]:
        """Scores of a boundary after each key; of "attention" the ratios in windows of 4 + 4."""
        if isinstance(self.boundaries, BoundaryPredictor):
            return self.boundaries.scores(key)
        if self.boundaries == "jumps":
            return key_jumps(key)
        if query.shape[2] != key.shape[2]:
            raise ValueError("boundaries from attention need the whole prompt at once")
        return boundary_ratios(head_mean_weights(query, key, scale), 4)

    def scores(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Float[Tensor, "batch blocks keys"]:
        """Every key's score for every block of queries."""
        return token_scores(
            query,
            key,
            self.edges(query, key, scale=scale, layer=layer),
            block_size=self.block_size,
            pooling=self.pooling,
            strict=self.strict,
        )

    def tokens(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Int[Tensor, "batch blocks chosen"]:
        """The keys that each block of queries reads, see `choose_tokens`; without gradients."""
        with torch.no_grad():
            scores = self.scores(query, key, scale=scale, layer=layer)
            _, ends = block_bounds(query.shape[2], key.shape[2], self.block_size, key.device)
            return choose_tokens(scores, ends, budget=self.budget, local=self.local, sink=self.sink)

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
        """Attention of every block of queries over its tokens, of the instruction over everything."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            queries, keys = query.shape[2], key.shape[2]
            if not self._saves(keys):
                return self._dense(query, key, value, scale, layer, None, phase="prefill")
            tokens = self.tokens(query, key, scale=scale, layer=layer)
            output, pairs = attend_to_tokens(
                query, key, value, tokens, block_size=self.block_size, scale=scale
            )
            dense = min(self.instruction, queries)
            if dense:
                last = causal_sdpa(query[:, :, -dense:], key, value, scale=scale)
                output = torch.cat([output[:, :, :-dense], last], dim=2)
                pairs[:, -dense:] = torch.arange(keys - dense, keys, device=key.device) + 1
            visible = queries * keys - queries * (queries - 1) // 2
            self.record(layer, (pairs.sum(-1, keepdim=True) / visible).expand(-1, query.shape[1]))
            return output

        return per_sequence(attend, query, key, value, padding)
