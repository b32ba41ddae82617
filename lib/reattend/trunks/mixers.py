"""Mixers that models trained from scratch share: softmax attention, and the token shift."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.dense import causal_token_mask
from reattend.attention.positions import alibi_bias, rotary

Positions = Literal["rotary", "alibi", "none"]
Cache = dict[str, Tensor]


def extend_cache(
    cache: Cache | None, key: Float[Tensor, "*lead new dim"], value: Float[Tensor, "*lead new dim"]
) -> tuple[Float[Tensor, "*lead keys dim"], Float[Tensor, "*lead keys dim"]]:
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

    A mixer of `reattend.trunks.language` with a cache of keys (after the rotary turn) and values.

    Args:
        width: of the trunk.
        heads: number of heads.
        positions: "rotary", "alibi", or "none" (the trunk's own, or no positions).
        qk_norm: LayerNorm of queries and keys over the head width, before the rotary turn.

    Raises:
        ValueError: when the heads do not divide the width.
    """

    def __init__(
        self, width: int, heads: int, positions: Positions = "rotary", qk_norm: bool = False
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.position_kind = heads, positions
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        norms = [nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2)]
        self.query_norm, self.key_norm = norms

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: Cache | None = None
    ) -> Float[Tensor, "batch length width"]:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.key_norm(k)
        if self.position_kind == "rotary":
            start = cached_length(cache)
            q, k = rotary(q, start), rotary(k, start)
        k, v = extend_cache(cache, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, **self._visible(q, k))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _visible(self, q: Tensor, k: Tensor) -> dict:
        """What the fused kernel is told of causality and of the linear bias."""
        queries, keys = q.shape[-2], k.shape[-2]
        if self.position_kind != "alibi" and queries == keys:
            return {"is_causal": True}
        seen = causal_token_mask(queries, keys, q.device)
        if self.position_kind != "alibi":
            return {"attn_mask": seen}
        bias = alibi_bias(self.heads, queries, keys, q.device).to(q)
        return {"attn_mask": bias.masked_fill(~seen, float("-inf"))}

    def state_size(self, length: int) -> int:
        """Keys and values of every token."""
        return 2 * length * self.out.in_features


class TokenShift(nn.Module):
    """Mixes each channel with that of the token before, by a learned share, then applies a mixer.

    A value can then be found by its key in one layer of attention. The shares start at 0 in the first
    channel and rise evenly to 1 in the last; 0 leaves a channel as it is, and the first token has zero
    before it.
    """

    def __init__(self, mixer: nn.Module, width: int):
        super().__init__()
        self.mixer = mixer
        self.share = nn.Parameter(torch.linspace(0, 1, width))

    @property
    def auxiliary_loss(self) -> Tensor:
        """The mixer's own; AttributeError where it has none."""
        return self.mixer.auxiliary_loss

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        return self.mixer(x.lerp(F.pad(x, (0, 0, 1, -1)), self.share))

    def state_size(self, length: int) -> int:
        """The mixer's, and the last token."""
        return self.mixer.state_size(length) + len(self.share)
