"""Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models (arXiv 2501.13629).

DiffQKV attention gives queries, keys and values sizes of their own: fewer key heads than value heads,
keys that may be narrower than values, and queries that pass a gated unit behind their projection
(`DiffQKVAttention`, a mixer of `reattend.trunks.language`). What the cache holds is `cache_bytes`; one
token is decoded over it by `shared_weights` and `shared_sum`, which copy no head. At decoding, `SelectiveV`
reads of the values only those of the largest weights; it attaches to any model.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.dense import causal_token_mask, widened
from reattend.attention.method import (
    AttentionMethod,
    Budget,
    CacheView,
    Phase,
    budget_of,
    check_budget,
    first_above,
    unpadded,
)
from reattend.attention.positions import rotary
from reattend.trunks.language import GatedFeedForward
from reattend.trunks.mixers import Cache, cached_length, extend_cache

# --- heads that are shared, and never copied -----------------------------------------------------


def cache_bytes(
    length: int,
    key_heads: int,
    value_heads: int,
    *,
    key_width: int,
    value_width: int,
    number_bytes: int = 2,
) -> int:
    """Bytes of one layer's cache: number_bytes * length * (n_k d_k + n_v d_v), nothing replicated."""
    return number_bytes * length * (key_heads * key_width + value_heads * value_width)


def shared_weights(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch key_heads keys dim"],
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Causal softmax weights; query head i reads key head floor(i * key_heads / heads) (equation 3).

    The queries of a group are stacked on their key head, so that no key is copied. The last query
    stands at the last key; `scale` is 1 / sqrt(dim) where not given.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    stacked = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
    scores = (stacked @ k.mT).view(*q.shape[:3], keys)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if queries > 1:
        seen = causal_token_mask(queries, keys, q.device)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(dim=-1)


def shared_sum(
    weights: Float[Tensor, "batch heads queries keys"],
    v: Float[Tensor, "batch value_heads keys dim"],
) -> Float[Tensor, "batch heads queries dim"]:
    """Sums of values; query head i reads value head floor(i * value_heads / heads), without copies."""
    stacked = weights.reshape(weights.shape[0], v.shape[1], -1, v.shape[-2])
    return (stacked @ v).view(*weights.shape[:3], v.shape[-1])


def replicated(
    x: Float[Tensor, "batch fewer length dim"], heads: int
) -> Float[Tensor, "batch heads length dim"]:
    """Each head copied for as many neighbouring heads as share it: what loses the gain at decoding."""
    share = heads // x.shape[1]
    return x if share == 1 else x.repeat_interleave(share, dim=1)


# --- the mixer -----------------------------------------------------------------------------------


class DiffQKVAttention(nn.Module):
    """Softmax attention with sizes of their own for queries, keys and values (section 2).

    q0 = W_Q x; q = W_down(silu(W_gate q0) * W_up q0) where queries are augmented (appendix E: behind
    the projection, no residual, no norm), else q0. Keys narrower than queries are lifted to their width
    by one linear map that all heads share; the cache holds them as they were before the lift, and the
    rotary turn comes after it. Scores are scaled by the width of the product that is taken.

    Args:
        width: of the trunk.
        heads: number of query heads.
        key_heads, value_heads: as many as query heads where not given.
        head_width: of queries and values; width / heads where not given.
        key_width: of a cached key; the head width where not given.
        augmented: hidden width of the augmented queries, over all heads together ("d_q" of Tables 3
            and 4); None for plain queries.
        rotary_base: of the rotary rates.

    Raises:
        ValueError: when the heads do not divide the width, or key or value heads the heads, or keys are
            wider than queries.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_heads: int | None = None,
        value_heads: int | None = None,
        head_width: int | None = None,
        key_width: int | None = None,
        augmented: int | None = None,
        rotary_base: float = 10_000.0,
    ):
        super().__init__()
        if head_width is None and width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.rotary_base = heads, rotary_base
        self.key_heads, self.value_heads = key_heads or heads, value_heads or heads
        for fewer in (self.key_heads, self.value_heads):
            if heads % fewer:
                raise ValueError(f"{fewer} key or value heads do not divide {heads} heads")
        self.head_width = head_width or width // heads
        self.key_width = key_width or self.head_width
        if self.key_width > self.head_width:
            raise ValueError(
                f"keys of {self.key_width} are wider than queries of {self.head_width}"
            )
        total = heads * self.head_width
        self.query = nn.Linear(width, total, bias=False)
        self.augment = None if augmented is None else GatedFeedForward(total, augmented)
        self.key = nn.Linear(width, self.key_heads * self.key_width, bias=False)
        narrow = self.key_width < self.head_width
        self.lift = nn.Linear(self.key_width, self.head_width, bias=False) if narrow else None
        self.value = nn.Linear(width, self.value_heads * self.head_width, bias=False)
        self.out = nn.Linear(total, width, bias=False)

    def queries(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length total"]:
        """Queries of all heads side by side, before the rotary turn."""
        q = self.query(x)
        return q if self.augment is None else self.augment(q)

    def _heads(
        self, x: Float[Tensor, "batch length width"], cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, and keys and values of all tokens so far, in as many heads as each has."""
        start = cached_length(cache)
        parts, counts = (self.queries(x), self.key(x), self.value(x)), self._counts
        q, k, v = (
            p.unflatten(-1, (n, -1)).transpose(1, 2) for p, n in zip(parts, counts, strict=True)
        )
        q = rotary(q, start, self.rotary_base)
        if self.lift is None:
            k, v = extend_cache(cache, rotary(k, start, self.rotary_base), v)
        else:
            # The lift mixes the channels that a turn would pair: the turn has to come after it.
            k, v = extend_cache(cache, k, v)
            k = rotary(self.lift(k), 0, self.rotary_base)
        return q, k, v

    @property
    def _counts(self) -> tuple[int, int, int]:
        return self.heads, self.key_heads, self.value_heads

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: Cache | None = None
    ) -> Float[Tensor, "batch length width"]:
        """Causal; a cache holds the keys, before their lift where there is one, and the values."""
        q, k, v = self._heads(x, cache)
        if q.shape[-2] == k.shape[-2]:
            k, v = (replicated(t, self.heads) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = shared_sum(shared_weights(q, k), v)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length length"]:
        """The attention maps themselves, for looking at."""
        q, k, _ = self._heads(x)
        return shared_weights(q, k)

    def state_size(self, length: int) -> int:
        """Keys and values of every token, as the cache holds them."""
        return length * (self.key_heads * self.key_width + self.value_heads * self.head_width)


# --- selective V ---------------------------------------------------------------------------------


def largest(
    scores: Float[Tensor, "batch heads queries keys"], keep: Int[Tensor, " queries"]
) -> Bool[Tensor, "batch heads queries keys"]:
    """The `keep[i]` largest scores of query i, for every head; each query has at least as many keys."""
    most = int(keep.max())
    ranked = torch.arange(most, device=scores.device) < keep[:, None]
    places = scores.topk(most).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, places, ranked.expand(places.shape))


class SelectiveV(AttentionMethod):
    """Decoding that reads, of the values, only those of the largest weights (section 2, Table 8).

    Every key is read to find them, for each query head its own.
    """

    def __init__(self, *, keep: Budget = 100, renormalise: bool = True) -> None:
        """
        Args:
            keep: values read by each query head; a float is a share of the cache as it stands.
            renormalise: divide the kept weights by their sum; else what is left out counts as zero. The
                paper does not say which.

        Raises:
            ValueError: a setting out of range.
        """
        super().__init__()
        self.keep = check_budget("keep", keep)
        self.renormalise = renormalise

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts that leave no room in the budget for a token of their own."""
        above = first_above(self.keep)
        return None if phase == "prefill" or above is None else max(above - 1, 1)

    def values_read(self, keys: int) -> int:
        """How many values a query head reads of a cache of `keys` entries."""
        return min(budget_of(self.keep, keys), keys)

    def kept(
        self,
        weights: Float[Tensor, "batch heads queries keys"],
        chosen: Bool[Tensor, "batch heads queries keys"],
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The weights of the chosen values, zero elsewhere."""
        left = weights.masked_fill(~chosen, 0)
        return left / left.sum(-1, keepdim=True) if self.renormalise else left

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
        """Attention of one new token with the chosen values."""
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        for rows, _, keys in unpadded(1, key, padding):
            part = query[rows], key[rows, :, keys], value[rows, :, keys]
            output[rows] = self._decode_part(*part, scale=scale, layer=layer)
        return output

    def _decode_part(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, layer: int
    ) -> Tensor:
        weights = shared_weights(widened(query), widened(key), scale)
        reads = torch.tensor([self.values_read(key.shape[2])], device=key.device)
        chosen = largest(weights, reads)
        self.record(layer, chosen.float().mean(-1).squeeze(-1), phase="decode")
        self._count(chosen, key.shape[1])
        return shared_sum(self.kept(weights, chosen), widened(value)).to(value.dtype)

    def _count(self, chosen: Bool[Tensor, "batch heads 1 keys"], key_heads: int) -> None:
        """A value that any head of a group reads is read once; of the other entries, the key."""
        of_group = chosen.unflatten(1, (key_heads, -1)).any(2)
        entries = int(of_group.sum())
        self.count_reads(entries, to_choose=(of_group.numel() - entries) / 2)
