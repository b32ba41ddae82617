"""Mixers that models trained from scratch share: softmax attention, and the token shift."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.dense import causal_token_mask
from reattend.attention.positions import alibi_bias, rotary
from reattend.trunks.language import MixerWrapper

Positions = Literal["rotary", "alibi", "none"]
Cache = dict[str, Tensor]


def extend_cache(
    cache: Cache | None,
    key: Float[Tensor, "batch key_heads new dim"],
    value: Float[Tensor, "batch value_heads new value_dim"],
) -> tuple[
    Float[Tensor, "batch key_heads keys dim"], Float[Tensor, "batch value_heads keys value_dim"]
]:
    """Keys and values of all tokens so far; the cache, if there is one, then holds them."""
    if cache is None:
        return key, value
    if cache:
        key = torch.cat([cache["key"], key], dim=-2)
        value = torch.cat([cache["value"], value], dim=-2)
    cache.update(key=key, value=value)
    return key, value


def cached_length(cache: Cache | None) -> int:
    """Tokens that a mixer's cache holds."""
    return cache["key"].shape[-2] if cache else 0


class SoftmaxAttention(nn.Module):
    """softmax(q k^T / sqrt(head width) + position bias, causal) v, then an output projection.

    A mixer of `reattend.trunks.language` with a cache of keys (after the rotary turn) and values. Keys and
    values may have fewer heads than queries, each its own number: query head i reads key head
    floor(i * key_heads / heads), and likewise for values.

    Args:
        width: of the trunk.
        heads: number of query heads.
        positions: "rotary", "alibi", or "none" (the trunk's own, or no positions).
        qk_norm: LayerNorm of queries and keys over the head width, before the rotary turn.
        key_heads, value_heads: as many as query heads where not given.
        head_width: of queries and keys; width / heads where not given.
        value_width: of a value head; the head width where not given.
        rotary_base: of the rotary rates.
        causal: whether a token reads those before it alone.

    Raises:
        ValueError: when the heads do not divide the width, or key or value heads the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        positions: Positions = "rotary",
        qk_norm: bool = False,
        *,
        key_heads: int | None = None,
        value_heads: int | None = None,
        head_width: int | None = None,
        value_width: int | None = None,
        rotary_base: float = 10_000.0,
        causal: bool = True,
    ):
        super().__init__()
        if head_width is None and width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.position_kind = heads, positions
        self.key_heads, self.value_heads = key_heads or heads, value_heads or heads
        for fewer in (self.key_heads, self.value_heads):
            if heads % fewer:
                raise ValueError(f"{fewer} key or value heads do not divide {heads} heads")
        self.head_width = head_width or width // heads
        self.value_width = value_width or self.head_width
        self.rotary_base, self.causal = rotary_base, causal
        self.project = nn.Linear(width, sum(self._widths), bias=False)
        self.out = nn.Linear(heads * self.value_width, width, bias=False)
        norms = [nn.LayerNorm(self.head_width) if qk_norm else nn.Identity() for _ in range(2)]
        self.query_norm, self.key_norm = norms

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Total widths of queries, keys and values."""
        of_keys, of_values = self.key_heads * self.head_width, self.value_heads * self.value_width
        return self.heads * self.head_width, of_keys, of_values

    def _heads(
        self, x: Float[Tensor, "batch length width"], cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, and keys and values of all tokens so far, every head of its own."""
        parts = self.project(x).split(self._widths, dim=-1)
        counts = (self.heads, self.key_heads, self.value_heads)
        q, k, v = (
            p.unflatten(-1, (n, -1)).transpose(1, 2) for p, n in zip(parts, counts, strict=True)
        )
        q, k = self.query_norm(q), self.key_norm(k)
        if self.position_kind == "rotary":
            start = cached_length(cache)
            q, k = (rotary(t, start, self.rotary_base) for t in (q, k))
        k, v = extend_cache(cache, k, v)
        return q, _shared(k, self.heads), _shared(v, self.heads)

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: Cache | None = None
    ) -> Float[Tensor, "batch length width"]:
        q, k, v = self._heads(x, cache)
        mixed = F.scaled_dot_product_attention(q, k, v, **self._visible(q, k))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length length"]:
        """The attention maps themselves, for looking at."""
        q, k, _ = self._heads(x)
        here = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        return F.scaled_dot_product_attention(q, k, here, **self._visible(q, k))

    def _visible(self, q: Tensor, k: Tensor) -> dict:
        """What the fused kernel is told of causality and of the linear bias."""
        queries, keys = q.shape[-2], k.shape[-2]
        bias = None
        if self.position_kind == "alibi":
            bias = alibi_bias(self.heads, queries, keys, q.device).to(q)
        if not self.causal:
            return {"attn_mask": None if bias is None else -bias.abs()}
        if bias is None and queries == keys:
            return {"is_causal": True}
        seen = causal_token_mask(queries, keys, q.device)
        return {"attn_mask": seen if bias is None else bias.masked_fill(~seen, float("-inf"))}

    def state_size(self, length: int) -> int:
        """Keys and values of every token."""
        return length * sum(self._widths[1:])


def _shared(
    x: Float[Tensor, "batch fewer length dim"], heads: int
) -> Float[Tensor, "batch heads length dim"]:
    """Each head for as many neighbouring query heads as share it."""
    share = heads // x.shape[1]
    return x if share == 1 else x.repeat_interleave(share, dim=1)


class TokenShift(MixerWrapper):
    """Mixes each channel with that of the token before, by a share, then applies a mixer.

    A value can then be found by its key in one layer of attention. Learned shares start at 0 in the first
    channel and rise evenly to 1 in the last; fixed ones are 0 in the first half and 1 in the second. 0
    leaves a channel as it is, and the first token has zero before it.
    """

    def __init__(self, mixer: nn.Module, width: int, learned: bool = True):
        super().__init__(mixer)
        if learned:
            self.share = nn.Parameter(torch.linspace(0, 1, width))
        else:
            self.register_buffer("share", (torch.arange(width) >= width // 2).float())

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        *read: Tensor,
        cache: dict | None = None,
        **more: Any,
    ) -> Float[Tensor, "batch length width"]:
        before = F.pad(x, (0, 0, 1, -1))
        if cache is not None:
            if "before" in cache:
                before = torch.cat([cache["before"], before[:, 1:]], dim=1)
            cache["before"] = x[:, -1:]
        return self.inner(x.lerp(before, self.share.to(x)), *read, cache=cache, **more)

    def state_size(self, length: int) -> int:
        """The mixer's, and the last token."""
        return self.mixer.state_size(length) + len(self.share)
