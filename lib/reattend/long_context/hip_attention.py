"""HiP attention: the keys of largest score, found by a tree search instead of by scoring them all.

Lee et al., "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically
Pruned Attention", ICLR 2025, arXiv 2406.09827 (first version: "HiP Attention: Sparse Sub-Quadratic
Attention with Hierarchical Attention Pruning").

Neighbouring keys score alike (attention locality). So every query head and block of queries looks for its
k best keys as follows: the keys before its window are cut into as many intervals as it may keep; every
interval is split in two; one unit of keys in each half, its *representative*, is scored; the better half
of all the halves stays; and so on until an interval is a single unit. That takes log2(T / k) rounds of
2 k scores instead of T. Attention is exact over what was found, the first tokens and a window.

Shapes: `blocks` counts blocks of queries, `nodes` intervals, and a *unit* is `block_k` consecutive keys;
unit 0 begins behind the sink tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.blocks import block_count
from reattend.attention.dense import repeat_key_heads, widened
from reattend.attention.kv_selection import KVSelection, attend_to_chosen
from reattend.attention.method import (
    AttentionMethod,
    Budget,
    CacheView,
    Phase,
    budget_of,
    check_budget,
    check_count,
    per_sequence,
)

REPRESENTATIVES = ("centre", "first", "last", "oracle")

# Upper limit on the copies of keys that are alive at once, in numbers.
GATHERED_NUMBERS = 1 << 20

# Scores of candidate intervals, from their first unit, their size in units, and the number of the first
# block of queries that they belong to.
Score = Callable[
    [Int[Tensor, "batch heads open nodes"], Int[Tensor, "batch heads open nodes"], int],
    Float[Tensor, "batch heads open nodes"],
]


@dataclass(frozen=True)
class Tree:
    """What is searched and kept; see `HiPAttention` for the settings.

    Raises:
        ValueError: a setting out of range.
    """

    k: Budget
    block_q: int
    query_stride: int
    block_k: int
    window: int
    sink: int
    representative: str

    def __post_init__(self) -> None:
        check_budget("k", self.k, at_least=0)
        for name in ("block_q", "query_stride", "block_k", "window"):
            check_count(name, getattr(self, name), at_least=1)
        check_count("sink", self.sink)
        if self.representative not in REPRESENTATIVES:
            known = ", ".join(REPRESENTATIVES)
            raise ValueError(f"representative must be one of {known}, got {self.representative!r}")

    def nodes(self, keys: int) -> int:
        """Units that each block of queries may keep."""
        return budget_of(self.k, keys, at_least=0) // self.block_k

    def saves_from(self) -> int | None:
        """Least keys of which one is left out; None where none ever is."""
        if self.k == 1.0 and isinstance(self.k, float):
            return None
        kept = self.window + self.sink
        return next(n for n in itertools.count(1) if n - kept > self.nodes(n) * self.block_k)

    def units(self, last: Int[Tensor, " blocks"]) -> Int[Tensor, " blocks"]:
        """Units between the sinks and the window of the query at `last`; the last may be partial."""
        searched = (last + 1 - self.window - self.sink).clamp_min(0)
        return (searched + self.block_k - 1) // self.block_k

    def tokens(self, units: Int[Tensor, "*shape units"]) -> Int[Tensor, "*shape tokens"]:
        """Positions of the keys in each unit, one unit after the other."""
        inside = torch.arange(self.block_k, device=units.device)
        return (self.sink + units[..., None] * self.block_k + inside).flatten(-2)


class QueryBlocks(NamedTuple):
    """Blocks of queries, cut at absolute positions; of a chunk behind a cache the first may be partial.

    The scored queries are every `query_stride`-th, counted back from the last one of the block.
    """

    positions: Int[Tensor, "blocks block_q"]
    real: Bool[Tensor, "blocks block_q"]
    scored: Int[Tensor, "blocks scored"]
    is_scored: Bool[Tensor, "blocks scored"]

    @property
    def last(self) -> Int[Tensor, " blocks"]:
        """Position of the last query of each block."""
        return self.scored[:, 0]

    def split(self, size: int) -> list[QueryBlocks]:
        """Parts of `size` blocks."""
        return [QueryBlocks(*part) for part in zip(*(x.split(size) for x in self), strict=True)]


def query_blocks(
    queries: int, keys: int, block_q: int, stride: int, device: torch.device | str | None = None
) -> QueryBlocks:
    """The blocks that hold the last `queries` of `keys` positions."""
    first = keys - queries
    start = torch.arange(first // block_q, block_count(keys, block_q), device=device) * block_q
    positions = start[:, None] + torch.arange(block_q, device=device)
    last = (start + block_q).clamp_max(keys) - 1
    scored = last[:, None] - torch.arange(0, block_q, stride, device=device)
    return QueryBlocks(
        positions,
        (positions >= first) & (positions < keys),
        scored,
        scored >= start.clamp_min(first)[:, None],
    )


# --- the search ---


@dataclass(frozen=True)
class Found:
    """The units that a search has found.

    Attributes:
        units: their numbers, ascending; in blocks that see fewer units than nodes the others are not
            `real`.
        evaluations: how many candidates were scored, over sequences, heads and blocks.
    """

    units: Int[Tensor, "batch heads blocks nodes"]
    real: Bool[Tensor, "batch heads blocks nodes"]
    evaluations: int


def first_intervals(
    units: Int[Tensor, " blocks"], nodes: int
) -> tuple[Int[Tensor, "blocks nodes"], Int[Tensor, "blocks nodes"]]:
    """`nodes` intervals of nearly equal size that cover the units: their starts and sizes.

    Where there are no more units than nodes, each unit is an interval and the others are empty.
    """
    edges = units[:, None] * torch.arange(nodes + 1, device=units.device) // max(nodes, 1)
    return edges[:, :-1], edges[:, 1:] - edges[:, :-1]


def halves(
    start: Int[Tensor, "*shape nodes"], size: Int[Tensor, "*shape nodes"]
) -> tuple[Int[Tensor, "*shape children"], Int[Tensor, "*shape children"]]:
    """Both halves of each interval side by side, the first rounded down: their starts and sizes."""
    left = size // 2
    return (
        torch.stack([start, start + left], dim=-1).flatten(-2),
        torch.stack([left, size - left], dim=-1).flatten(-2),
    )


def rounds_needed(units: int, nodes: int) -> int:
    """Rounds until every interval is one unit: ceil(log2(units / nodes))."""
    return (block_count(units, nodes) - 1).bit_length() if nodes and units else 0


def tree_search(
    units: Int[Tensor, " blocks"], nodes: int, lead: tuple[int, int], score: Score
) -> Found:
    """The hierarchical search: at most `nodes` units for each block of queries of each head.

    Args:
        units: how many units each block of queries sees; they rise.
        lead: number of sequences and of heads.
        score: see `Score`. Candidates of resolved blocks are never asked for.
    """
    start, size = (x.expand(*lead, -1, -1).clone() for x in first_intervals(units, nodes))
    evaluations = 0
    for number in range(rounds_needed(int(units.max()), nodes)):
        # Blocks with fewer units are through earlier, and come first.
        open_from = int((units <= nodes << number).sum())
        starts, sizes = halves(start[:, :, open_from:], size[:, :, open_from:])
        scores = score(starts, sizes, open_from)
        # A real candidate ranks before an empty one, also where no query may see it.
        scores = scores.clamp_min(torch.finfo(scores.dtype).min).masked_fill(sizes < 1, -torch.inf)
        best = scores.topk(nodes, dim=-1).indices
        start[:, :, open_from:], size[:, :, open_from:] = (
            starts.gather(-1, best),
            sizes.gather(-1, best),
        )
        evaluations += int((sizes > 0).sum())
    # Empty intervals sort behind the real ones.
    behind = int(units.max())
    found = start.masked_fill(size < 1, behind).sort(dim=-1).values
    return Found(found, found < behind, evaluations)


def representative_unit(
    start: Int[Tensor, "*shape"], size: Int[Tensor, "*shape"], which: str
) -> Int[Tensor, "*shape"]:
    """The unit that stands for an interval; the centre is start + floor(size / 2)."""
    place = {"first": torch.zeros_like(size), "centre": size // 2, "last": size - 1}[which]
    return start + place.clamp_min(0)


def sampled_score(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    blocks: QueryBlocks,
    tree: Tree,
) -> Score:
    """Scores of representatives: the largest q.k over the scored queries and the keys of the unit.

    Unscaled, in float32 at least. A pair counts only where the key lies before the query's window. The
    keys asked for are gathered; no other product is computed.
    """
    scored = widened(_queries_at(query, key.shape[2], blocks.scored))
    limit = (blocks.scored - tree.window).masked_fill(~blocks.is_scored, -1)

    def score(start: Tensor, size: Tensor, first: int) -> Tensor:
        tokens = tree.tokens(representative_unit(start, size, tree.representative))
        products = scored[:, :, first:] @ widened(_keys_at(key, tokens)).mT
        seen = tokens[..., None, :] <= limit[first:, :, None]
        best = products.masked_fill(~seen, -torch.inf).amax(dim=-2)
        return best.unflatten(-1, (-1, tree.block_k)).amax(dim=-1)

    return score


def unit_scores(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    blocks: QueryBlocks,
    tree: Tree,
) -> Float[Tensor, "batch query_heads blocks units"]:
    """The same score of every unit: quadratic, for upper bounds and for looking at the tree."""
    scored = widened(_queries_at(query, key.shape[2], blocks.scored))
    count = max(int(tree.units(blocks.last).max()), 1)
    tokens = tree.tokens(torch.arange(count, device=key.device))
    keys = repeat_key_heads(key, query.shape[1])[:, :, tokens.clamp_max(key.shape[2] - 1)]
    products = scored.flatten(2, 3) @ widened(keys).mT
    limit = (blocks.scored - tree.window).masked_fill(~blocks.is_scored, -1)
    products = products.unflatten(2, blocks.scored.shape)
    best = products.masked_fill(tokens > limit[..., None], -torch.inf).amax(dim=-2)
    return best.unflatten(-1, (-1, tree.block_k)).amax(dim=-1)


def oracle_score(table: Float[Tensor, "batch heads blocks units"]) -> Score:
    """Scores of the best unit of each interval, by range maxima: what a representative stands for.

    A search by them finds exactly the best units (at every level at most `nodes` intervals hold one of
    them, and each outscores all that hold none), so what a tree misses its representatives have missed.
    """
    maxima = [table]  # of 1, 2, 4, ... units from each unit on
    while 2 ** len(maxima) <= table.shape[-1]:
        half = 2 ** (len(maxima) - 1)
        maxima.append(torch.maximum(maxima[-1][..., :-half], maxima[-1][..., half:]))
    levels = torch.stack([F.pad(x, (0, table.shape[-1] - x.shape[-1])) for x in maxima], dim=-2)

    def score(start: Tensor, size: Tensor, first: int) -> Tensor:
        level = torch.frexp(size.clamp_min(1).double()).exponent.long() - 1  # floor(log2(size))
        ends = (start, start + size - (1 << level))
        flat = levels[:, :, first:].flatten(-2)
        places = ((level * table.shape[-1] + end).clamp_min(0) for end in ends)
        return torch.maximum(*(flat.gather(-1, place) for place in places))

    return score


def score_of(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    blocks: QueryBlocks,
    tree: Tree,
) -> Score:
    """The scores that the tree's representative gives."""
    if tree.representative == "oracle":
        return oracle_score(unit_scores(query, key, blocks, tree))
    return sampled_score(query, key, blocks, tree)


# --- attention over what was found ---


def attend_to_units(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    found: Found,
    blocks: QueryBlocks,
    tree: Tree,
    scale: float,
) -> tuple[
    Float[Tensor, "batch query_heads queries_of_blocks value_dim"], Int[Tensor, "batch query_heads"]
]:
    """Exact attention of blocks of queries over their units, the sinks and each query's window.

    The window of a query is its own position and the `window` - 1 before it; a unit's key counts where
    it lies before that.

    Returns:
        The output, also of positions that are not `real`, and the number of pairs it is made of.
    """
    position, lead = blocks.positions[..., None], found.units.shape[:2]
    fixed = _sinks_and_windows(blocks, tree)
    is_sink, in_window = fixed < tree.sink, fixed[:, None] > position - tree.window
    fixed_seen = (
        (is_sink[:, None] | in_window) & (fixed >= 0)[:, None] & (fixed[:, None] <= position)
    )
    units = tree.tokens(found.units)
    real = found.real.repeat_interleave(tree.block_k, dim=-1)
    units_seen = real[..., None, :] & (units[..., None, :] <= position - tree.window)
    tokens = torch.cat([fixed.expand(*lead, -1, -1), units], dim=-1)
    seen = torch.cat([fixed_seen.expand(*lead, -1, -1, -1), units_seen], dim=-1)
    padding = ~blocks.real[..., None]
    output = F.scaled_dot_product_attention(
        _queries_at(query, key.shape[2], blocks.positions).flatten(0, 1),
        _keys_at(key, tokens).flatten(0, 1),
        _keys_at(value, tokens).flatten(0, 1),
        # What stands in for a missing query sees everything: its softmax must not be NaN.
        attn_mask=(seen | padding).flatten(0, 1),
        scale=scale,
    )
    return output.unflatten(0, lead).flatten(2, 3), (seen & ~padding).sum(dim=(-3, -2, -1))


def _sinks_and_windows(blocks: QueryBlocks, tree: Tree) -> Int[Tensor, "blocks tokens"]:
    """Positions that the queries of each block see whatever is found; none twice, -1 for none."""
    near = torch.arange(1 - tree.window, tree.block_q, device=blocks.positions.device)
    near = near + blocks.positions[:, :1]
    near = near.masked_fill(near < tree.sink, -1)
    sinks = torch.arange(tree.sink, device=near.device).expand(len(near), -1)
    return torch.cat([sinks, near], dim=-1)


def _queries_at(
    query: Float[Tensor, "batch heads queries dim"],
    keys: int,
    positions: Int[Tensor, "blocks places"],
) -> Float[Tensor, "batch heads blocks places dim"]:
    """Queries by absolute position; another one where there is none at that position."""
    first = keys - query.shape[2]
    return query[:, :, (positions - first).clamp(0, query.shape[2] - 1)]


def _keys_at(
    x: Float[Tensor, "batch key_heads keys dim"],
    tokens: Int[Tensor, "batch query_heads blocks tokens"],
) -> Float[Tensor, "batch query_heads blocks tokens dim"]:
    """Keys or values of each query head by position; another one where there is none."""
    batch, key_heads, keys, dim = x.shape
    row = torch.arange(batch * tokens.shape[1], device=x.device)
    row = row // (tokens.shape[1] // key_heads) * keys
    index = tokens.clamp(0, keys - 1) + row.view(batch, -1, 1, 1)
    return x.reshape(-1, dim).index_select(0, index.flatten()).view(*tokens.shape, dim)


# --- inside a model ---


class HiPAttention(AttentionMethod):
    """Every query head and block of queries searches its own keys of the prompt. Decoding is dense.

    Prompts of up to about k + window + sink tokens are attended densely.

    Attributes:
        evaluations: candidates scored so far, over sequences, heads, blocks of queries and layers; each
            is `block_k` keys against `block_q` / `query_stride` queries.
    """

    def __init__(
        self,
        *,
        k: Budget = 512,
        block_q: int = 64,
        query_stride: int = 2,
        block_k: int = 2,
        window: int = 256,
        sink: int = 16,
        representative: str = "centre",
        dense_layers: int = 3,
    ) -> None:
        """
        Args:
            k: keys to find for each block of queries, rounded down to whole units; a float is a share
                of the keys. 0 leaves sinks and window: StreamingLLM, token by token.
            block_q: queries that share what they find.
            query_stride: every how many of them one is scored.
            block_k: keys of a unit.
            window: most recent keys that every query reads, its own among them.
            sink: first keys, read by all.
            representative: unit that is scored for an interval: "centre" (the paper), "first" (the
                authors' draft), "last", or "oracle", the best one: the exact k best, at full cost.
            dense_layers: first layers that stay dense; the authors' evaluation leaves three.

        Raises:
            ValueError: a setting out of range.
        """
        super().__init__()
        self.tree = Tree(k, block_q, query_stride, block_k, window, sink, representative)
        self.dense_layers = check_count("dense_layers", dense_layers)

    def saves_from(self, phase: Phase) -> int | None:
        """Least tokens of a prompt of which a key is left out; decoding is dense."""
        return self.tree.saves_from() if phase == "prefill" else None

    def scorer(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        blocks: QueryBlocks,
    ) -> Score:
        """What ranks the intervals."""
        return score_of(query, key, blocks, self.tree)

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        blocks: QueryBlocks,
    ) -> Found:
        """The units of each head for some of the blocks of queries; without gradients."""
        with torch.no_grad():
            units, nodes = self.tree.units(blocks.last), self.tree.nodes(key.shape[2])
            score = self.scorer(query, key, blocks)
            return tree_search(units, nodes, query.shape[:2], score)

    def blocks(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
    ) -> list[QueryBlocks]:
        """The blocks of queries, as many together as memory bears."""
        tree, keys = self.tree, key.shape[2]
        searched = keys if tree.representative == "oracle" else 2 * tree.nodes(keys) * tree.block_k
        read = tree.sink + tree.window + tree.block_q + tree.nodes(keys) * tree.block_k
        numbers = query.shape[0] * query.shape[1] * query.shape[3] * max(searched, read)
        everything = query_blocks(
            query.shape[2], keys, tree.block_q, tree.query_stride, device=query.device
        )
        return everything.split(max(1, GATHERED_NUMBERS // numbers))

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
        """Attention over what each block of queries finds, the sinks and the windows."""
        if layer < self.dense_layers:
            return self._dense(query, key, value, scale, layer, padding, phase="prefill")
        enough = self.tree.saves_from()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            queries, keys = query.shape[2], key.shape[2]
            if enough is None or keys < enough:
                return self._dense(query, key, value, scale, layer, None, phase="prefill")
            outputs, pairs = [], 0
            for blocks in self.blocks(query, key):
                found = self.select(query, key, blocks)
                self.evaluations += found.evaluations
                output, seen = attend_to_units(query, key, value, found, blocks, self.tree, scale)
                outputs.append(output)
                pairs = pairs + seen
            self.record(layer, pairs / (queries * keys - queries * (queries - 1) // 2))
            front = (keys - queries) % self.tree.block_q
            return torch.cat(outputs, dim=2)[:, :, front : front + queries]

        return per_sequence(attend, query, key, value, padding)

    def clear(self) -> None:
        """Forgets the recorded densities and the count of candidates."""
        super().clear()
        self.evaluations = 0


@dataclass
class Reused:
    """What a layer found at its last search.

    Attributes:
        found: the keys found, of those that were there.
        age: tokens since that search; 0 before the first.
    """

    found: Bool[Tensor, "batch query_heads keys"]
    age: int


class HiPDecoding(KVSelection):
    """Every query head of each new token searches the cache, or reads what it found a few tokens ago.

    The prompt is read densely; for both phases see `reattend.attention.kv_selection.Combined`. What is
    read is counted once for the query heads that share a key head.
    """

    def __init__(
        self,
        *,
        k: Budget = 512,
        block_k: int = 2,
        window: int = 256,
        sink: int = 16,
        representative: str = "centre",
        dense_layers: int = 3,
        refresh: int = 1,
    ) -> None:
        """
        Args:
            k, block_k, window, sink, representative, dense_layers: see `HiPAttention`.
            refresh: tokens that use one search, the one that searches among them; sinks and window
                follow every token. The paper's r_m.

        Raises:
            ValueError: a setting out of range.
        """
        super().__init__()
        self.tree = Tree(k, 1, 1, block_k, window, sink, representative)
        self.dense_layers = check_count("dense_layers", dense_layers)
        self.refresh = check_count("refresh", refresh, at_least=1)

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts that leave no room in the budget for a token of their own."""
        above = self.tree.saves_from()
        return None if phase == "prefill" or above is None else max(above - 1, 1)

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> Reused | None:
        """Nothing found yet; None where every token searches, which needs no memory."""
        nothing = key.new_zeros(*query.shape[:2], 0, dtype=torch.bool)
        return Reused(nothing, 0) if self.refresh > 1 else None

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: Reused | None,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch query_heads keys"]:
        """The entries that each query head reads."""
        keys = key.shape[2]
        if state is None or state.age % self.refresh == 0:
            found = self._search(query, key)
        else:
            found = F.pad(state.found, (0, keys - state.found.shape[-1]))
        if state is not None:
            state.found, state.age = found, state.age + 1
        position = torch.arange(keys, device=key.device)
        return found | (position < self.tree.sink) | (position >= keys - self.tree.window)

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
        """Attention of one new token; dense in the first layers."""
        if layer < self.dense_layers:
            return self._dense(query, key, value, scale, layer, padding, phase="decode")
        call = {"scale": scale, "layer": layer, "padding": padding, "cache": cache}
        return super().decode(query, key, value, **call)

    def _search(self, query: Tensor, key: Tensor) -> Bool[Tensor, "batch query_heads keys"]:
        keys = key.shape[2]
        blocks = query_blocks(1, keys, 1, 1, device=key.device)
        score = score_of(query, key, blocks, self.tree)
        units, nodes = self.tree.units(blocks.last), self.tree.nodes(keys)
        found = tree_search(units, nodes, query.shape[:2], score)
        # A key without its value is half an entry.
        self.count_reads(0, to_choose=found.evaluations * self.tree.block_k / 2)
        tokens = self.tree.tokens(found.units)[:, :, 0]
        seen = found.real.repeat_interleave(self.tree.block_k, dim=-1)[:, :, 0]
        seen = seen & (tokens < keys - self.tree.window)
        # One column more takes what is not seen.
        mask = seen.new_zeros(*query.shape[:2], keys + 1)
        return mask.scatter(-1, tokens.masked_fill(~seen, keys), True)[..., :keys]

    def _decode_part(
        self, query: Tensor, key: Tensor, value: Tensor, state: Any, *, scale: float, layer: int
    ) -> Tensor:
        with torch.no_grad():
            chosen = self.choose(query, key, state, scale=scale)
        heads, group = query.shape[1], query.shape[1] // key.shape[1]
        own = (repeat_key_heads(x, heads) for x in (key, value))
        output, _ = attend_to_chosen(query, *own, chosen, scale=scale)
        self.count_reads(int(chosen.unflatten(1, (-1, group)).any(dim=2).sum()))
        self.record(layer, chosen.float().mean(dim=-1), phase="decode")
        return output
