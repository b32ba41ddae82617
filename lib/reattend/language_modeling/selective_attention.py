"""Selective Attention: Enhancing Transformer through Principled Context Control (arXiv 2411.12892).

Selective self-attention (SSA) gives tokens inverse temperatures,

    SSA(X) = softmax([tau_q(X) Q] [tau_k(X) K]^T / sqrt(d) + causal) [tau_v(X) V],
    tau(x_i) = tanh(f(x_i)) + 1 + sigmoid(alpha) log i,

on queries and values in the paper's default: a query's sharpens or flattens its own row, a value's weighs
that token down or up wherever it is read. f is u . GELU(W x), and W is the layer's own projection
("shared": as many new numbers as the layer is wide) or a matrix of its own. `SelectiveAttention` is a mixer
of `reattend.trunks.language`. The published code has another factor, of the position alone and on the
logits: `official_position_temperature`.
"""

from collections.abc import Collection
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.dense import repeat_key_heads
from reattend.attention.positions import rotary
from reattend.trunks.mixers import Cache, SoftmaxAttention, cached_length, extend_cache

Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")

# --- temperatures --------------------------------------------------------------------------------


def token_temperature(
    features: Float[Tensor, "*shown length width"], direction: Float[Tensor, "*heads width 1"]
) -> Float[Tensor, "*both length 1"]:
    """tanh(u . GELU(features)), in (-1, 1): the part of tau that depends on what the token is."""
    return torch.tanh(F.gelu(features) @ direction)


def position_temperature(
    places: Int[Tensor, " length"], strength: Float[Tensor, ""]
) -> Float[Tensor, "length 1"]:
    """1 + sigmoid(alpha) log i: the part of tau that grows with the number i >= 1 of visible tokens."""
    return (1 + strength.sigmoid() * places.to(strength).log())[:, None]


def official_position_temperature(
    places: Int[Tensor, " length"], beta: Float[Tensor, ""]
) -> Float[Tensor, "length 1"]:
    """1 + exp(-exp(beta)) log i: the published code's whole temperature, of queries alone."""
    return (1 + torch.exp(-beta.exp()) * places.to(beta).log())[:, None]


def visible_counts(x: Float[Tensor, "batch length width"], start: int) -> Int[Tensor, " length"]:
    """How many tokens each token of `x` may read, itself included, behind `start` earlier ones."""
    return torch.arange(start + 1, start + x.shape[1] + 1, device=x.device)


class Temperature(nn.Module):
    """tau of every token and head: tanh(u_h . GELU(features)) + 1 + sigmoid(alpha) log i.

    It starts at 1 where i is 1, and near it elsewhere: u at zero, alpha at -5 (.0067 log i). Between the
    bounds of tanh it is positive.

    Args:
        heads: each has a u of its own; alpha is the layer's.
        width: of the features that a head is given.
        token, position: which of the two parts there are; without the first tau is 1 + sigmoid(alpha) log i.

    Raises:
        ValueError: when there is neither part.
    """

    def __init__(self, heads: int, width: int, *, token: bool = True, position: bool = True):
        super().__init__()
        if not (token or position):
            raise ValueError("a temperature needs a token part or a position part")
        self.direction = nn.Parameter(torch.zeros(heads, width, 1)) if token else None
        self.strength = nn.Parameter(torch.tensor(-5.0)) if position else None

    def forward(
        self,
        features: Float[Tensor, "*batch #heads length width"],
        places: Int[Tensor, " length"],
    ) -> Float[Tensor, "*batch heads length 1"]:
        """tau of tokens that see `places` tokens each."""
        tau = torch.ones_like(features[..., :1])
        if self.strength is not None:
            tau = tau * position_temperature(places, self.strength)
        return tau if self.direction is None else tau + token_temperature(features, self.direction)


class OfficialTemperature(nn.Module):
    """The published code's: `official_position_temperature` with one beta a layer, from 2 (Pythia, Llama)."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(2.0))

    def forward(
        self,
        features: Float[Tensor, "batch heads length width"],
        places: Int[Tensor, " length"],
    ) -> Float[Tensor, "length 1"]:
        return official_position_temperature(places, self.beta)


# --- the mixer -----------------------------------------------------------------------------------


class SelectiveAttention(SoftmaxAttention):
    """Softmax attention whose queries and values (and keys, if asked for) are scaled token by token.

    Args:
        width, heads, positions, attention: of `SoftmaxAttention`; the mixer is causal.
        on: what is scaled, of "query", "key" and "value".
        token, position: the parts of tau, see `Temperature`.
        hidden: width of an own first layer of f; None shares the projection of what is scaled, each head its
            own part of it.
        pos_only_official: the published code's temperature of the queries instead of all this.

    Raises:
        ValueError: for an unknown or empty `on`, a mixer that is not causal, and as `SoftmaxAttention`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        positions: Literal["rotary", "alibi", "none"] = "rotary",
        *,
        on: Collection[str] = ("query", "value"),
        token: bool = True,
        position: bool = True,
        hidden: int | None = None,
        pos_only_official: bool = False,
        **attention,
    ):
        super().__init__(width, heads, positions, **attention)
        if not self.causal:
            raise ValueError("a temperature counts the visible tokens: the mixer must be causal")
        if not on or not set(on) <= set(PARTS):
            raise ValueError(f"on must name some of {', '.join(PARTS)}; got {tuple(on)}")
        self.temperatures, self.own = nn.ModuleDict(), nn.ModuleDict()
        if pos_only_official:
            self.temperatures["query"] = OfficialTemperature()
            return
        counts = (self.heads, self.key_heads, self.value_heads)
        for part, count, total in zip(PARTS, counts, self._widths, strict=True):
            if part not in on:
                continue
            features = hidden or total // count
            self.temperatures[part] = Temperature(count, features, token=token, position=position)
            if hidden and token:
                self.own[part] = nn.Linear(width, hidden)

    def scales(
        self, x: Float[Tensor, "batch length width"], start: int = 0
    ) -> dict[Part, Float[Tensor, "..."]]:
        """tau of each scaled part, [batch, heads, length, 1], of tokens behind `start` earlier ones."""
        return self._scales(x, self._projected(x), start)

    def _projected(self, x: Float[Tensor, "batch length width"]) -> dict[Part, Tensor]:
        """Queries, keys and values by head, before norm and rotary turn."""
        counts = (self.heads, self.key_heads, self.value_heads)
        parts = self.project(x).split(self._widths, dim=-1)
        return {
            name: part.unflatten(-1, (count, -1)).transpose(1, 2)
            for name, part, count in zip(PARTS, parts, counts, strict=True)
        }

    def _scales(self, x: Tensor, projected: dict[Part, Tensor], start: int) -> dict[Part, Tensor]:
        places = visible_counts(x, start)
        own = {part: widen(x)[:, None] for part, widen in self.own.items()}
        return {
            part: tau({**projected, **own}[part], places) for part, tau in self.temperatures.items()
        }

    def _heads(
        self, x: Float[Tensor, "batch length width"], cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries of `x`, and scaled keys and values of all tokens; the cache holds them scaled."""
        start, projected = cached_length(cache), self._projected(x)
        tau = self._scales(x, projected, start)
        q, k, v = projected["query"], projected["key"], projected["value"]
        q, k = self.query_norm(q), self.key_norm(k)
        if self.position_kind == "rotary":
            q, k = (rotary(t, start, self.rotary_base) for t in (q, k))
        q, k, v = (t * tau.get(part, 1.0) for part, t in zip(PARTS, (q, k, v), strict=True))
        k, v = extend_cache(cache, k, v)
        return q, repeat_key_heads(k, self.heads), repeat_key_heads(v, self.heads)


# --- what is measured ----------------------------------------------------------------------------


def spikiness(
    weights: Float[Tensor, "*batch queries keys"], visible: Int[Tensor, " queries"] | None = None
) -> Float[Tensor, "*batch queries"]:
    """|s|_1 / (|s|_2^2 L) of each row s: the share of its L visible tokens that it reads, effectively.

    1 / L where all weight lies on one token, 1 where it is even: lower is spikier.

    Args:
        visible: L of every query; None: all keys.
    """
    lengths = weights.shape[-1] if visible is None else visible
    return weights.abs().sum(-1) / (weights.square().sum(-1) * lengths)
