"""Deconstructing Attention: Investigating Design Principles for Effective Language Modeling (arXiv 2510.11602).

Attention mixes tokens, by a softmax of dot products, of queries and keys that depend on the text, at the
layer where they are used. Each variant here gives up one of these principles and keeps four matrices of
width x width:

* `TokenMLP` mixes no tokens at all;
* `Approximate` has a Taylor polynomial in the exponential's place;
* `NonApproximate` gives every token one score of its own, in the place of a score for each pair of tokens;
* `StreamQK` takes queries and keys from a constant stream, the same for every text: random vectors
  (RndEmbQK) or a fixed text (FixedSeqQK), both of which run through the model's own layers (`StreamTrunk`);
* `StaticEmbQK` takes them from the embeddings before the first layer.

All are mixers of `reattend.trunks.language` with a cache; standard attention is
`reattend.trunks.mixers.SoftmaxAttention`. `placement` says which layers of a stack are simplified.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.dense import causal_token_mask
from reattend.attention.positions import rotary
from reattend.trunks.language import GatedFeedForward, Trunk, TrunkCache

# --- maps ----------------------------------------------------------------------------------------


def softmax_maps(
    q: Float[Tensor, "batch heads queries dim"], k: Float[Tensor, "batch heads keys dim"]
) -> Float[Tensor, "batch heads queries keys"]:
    """softmax(q k^T / sqrt(dim)), causal; the last query stands at the last key."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return logits.masked_fill(~_seen(q, k), float("-inf")).softmax(-1)


def _seen(q: Tensor, k: Tensor) -> Bool[Tensor, "queries keys"]:
    return causal_token_mask(q.shape[-2], k.shape[-2], q.device)


def taylor_weights(
    q: Float[Tensor, "batch heads length dim"], k: Float[Tensor, "batch heads length dim"]
) -> Float[Tensor, "batch heads length length"]:
    """1 + u + u^2 / 2 with u = q . k / sqrt(dim), causal: exp(u) to the second order, not yet divided."""
    more = _with_one(q / math.sqrt(q.shape[-1])) @ _with_one(k).mT  # u + 1
    return torch.addcmul(more.new_tensor(0.5), more, more, value=0.5).tril()


def taylor_maps(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    split: bool = False,
) -> Float[Tensor, "batch heads length length"]:
    """`taylor_weights` over their causal sum.

    `split` divides each order by a sum of its own, as the paper's recurrent form prints it (equations 14 to
    17): rows then sum to 3, and the first order's sum may pass through 0.
    """
    if split:
        u = q @ k.mT / math.sqrt(q.shape[-1])
        orders = [order.tril() for order in (torch.ones_like(u), u, u.square())]
        return sum(order / order.sum(-1, keepdim=True) for order in orders)
    weights = taylor_weights(q, k)
    return weights / weights.sum(-1, keepdim=True)


def taylor_features(x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead features"]:
    """phi with phi(q) . phi(k) = 1 + u + u^2 / 2, u = q . k / sqrt(dim): 1 + dim + dim^2 numbers."""
    x = x / x.shape[-1] ** 0.25
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], dim=-1)


def _with_one(x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead more"]:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def taylor_recurrent(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length dim"],
    state: Float[Tensor, "batch heads features dim_and_one"] | None = None,
) -> tuple[
    Float[Tensor, "batch heads length dim"], Float[Tensor, "batch heads features dim_and_one"]
]:
    """`taylor_maps(q, k) @ v` a token at a time; also the state, the sum of phi(k) [v, 1]^T."""
    q, k, v = taylor_features(q), taylor_features(k), _with_one(v)
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for q_t, k_t, v_t in zip(*(x.split(1, dim=-2) for x in (q, k, v)), strict=True):
        state = state + k_t.mT @ v_t
        out.append(q_t @ state)
    sums = torch.cat(out, dim=-2)
    return sums[..., :-1] / sums[..., -1:], state


def own_scores(
    q: Float[Tensor, "batch heads length dim"], k: Float[Tensor, "batch heads length dim"]
) -> Float[Tensor, "batch heads length"]:
    """silu(q_j) . k_j / sqrt(dim): one score a token, of its own query and key (equation 7)."""
    return (F.silu(q) * k).sum(-1) / math.sqrt(q.shape[-1])


def score_maps(
    scores: Float[Tensor, "batch heads length"],
) -> Float[Tensor, "batch heads length length"]:
    """exp(s_j) / sum over j' <= i of exp(s_j'): each row is the softmax of all scores so far."""
    length = scores.shape[-1]
    seen = causal_token_mask(length, length, scores.device)
    return scores[..., None, :].masked_fill(~seen, float("-inf")).softmax(-1)


def score_recurrent(
    scores: Float[Tensor, "batch heads length"],
    v: Float[Tensor, "batch heads length dim"],
    state: dict[str, Tensor] | None = None,
) -> tuple[Float[Tensor, "batch heads length dim"], dict[str, Tensor]]:
    """`score_maps(scores) @ v` a token at a time; also the state.

    The state is the largest score so far, and the sums of exp(s - largest) v and of exp(s - largest), so that
    no exponential overflows.
    """
    if state is None:
        lead = scores.shape[:2]
        sums = {"numerator": v.new_zeros(*lead, v.shape[-1]), "denominator": v.new_zeros(*lead, 1)}
        state = {"largest": v.new_full((*lead, 1), float("-inf")), **sums}
    largest, numerator, denominator = (state[n] for n in ("largest", "numerator", "denominator"))
    out = []
    for t in range(scores.shape[-1]):
        score = scores[..., t : t + 1]
        before, largest = largest, torch.maximum(largest, score)
        kept, weight = (before - largest).exp(), (score - largest).exp()
        numerator = kept * numerator + weight * v[..., t, :]
        denominator = kept * denominator + weight
        out.append(numerator / denominator)
    state = {"largest": largest, "numerator": numerator, "denominator": denominator}
    return torch.stack(out, dim=-2), state


# --- mixers --------------------------------------------------------------------------------------


class TokenMLP(GatedFeedForward):
    """A SwiGLU in attention's place, as many parameters as four matrices of width x width: no token is mixed.

    Raises:
        ValueError: when 4 / 3 of the width is no whole number, so that the parameters would differ.
    """

    def __init__(self, width: int):
        if 4 * width % 3:
            raise ValueError(
                f"width {width} is not a multiple of 3: 4 / 3 of it is the hidden width"
            )
        super().__init__(width, 4 * width // 3)

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: dict | None = None
    ) -> Float[Tensor, "batch length width"]:
        return super().forward(x)

    def state_size(self, length: int) -> int:
        """Nothing is to be remembered."""
        return 0


class SimplifiedAttention(nn.Module):
    """What the variants with a map share: queries, keys, values and an output projection, without biases.

    Parameters have the names and shapes of `reattend.trunks.mixers.SoftmaxAttention`, whose weights fit.

    Args:
        width: of the trunk.
        heads: number of heads.
        positions: turn queries and keys by their position (rotary), where the variant compares them.

    Raises:
        ValueError: when the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, positions: bool = True):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.positions = heads, positions
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def _read(
        self, x: Float[Tensor, "batch length width"], first: int, last: int
    ) -> list[Float[Tensor, "batch heads length dim"]]:
        """Heads of the parts `first` .. `last` - 1 of queries, keys and values (0, 1, 2)."""
        width = self.out.in_features
        parts = F.linear(x, self.project.weight[first * width : last * width])
        return [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts.split(width, -1)
        ]

    def _queries_keys(
        self, x: Float[Tensor, "batch length width"], start: int
    ) -> tuple[Float[Tensor, "batch heads length dim"], Float[Tensor, "batch heads length dim"]]:
        """Queries and keys of states whose first token stands at place `start`."""
        q, k = self._read(x, 0, 2)
        return (rotary(q, start), rotary(k, start)) if self.positions else (q, k)

    def _values(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length dim"]:
        return self._read(x, 2, 3)[0]

    def _merge(
        self, mixed: Float[Tensor, "batch heads length dim"]
    ) -> Float[Tensor, "batch length width"]:
        return self.out(mixed.transpose(1, 2).flatten(2))


class Approximate(SimplifiedAttention):
    """The exponential of standard attention to the second order (equation 6): see `taylor_maps`.

    Args:
        split: each order over a sum of its own; it has no cached form here.
    """

    def __init__(self, width: int, heads: int, positions: bool = True, split: bool = False):
        super().__init__(width, heads, positions)
        self.split = split

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: dict | None = None
    ) -> Float[Tensor, "batch length width"]:
        """Raises ValueError when the split form is asked to continue a text."""
        v = self._values(x)
        if self.split:
            if cache is not None:
                raise ValueError("the split form has no cache; use split=False")
            return self._merge(self.weights(x) @ v)
        start = cache.get("length", 0) if cache else 0
        q, k = self._queries_keys(x, start)
        if cache is None:
            sums = taylor_weights(q, k) @ _with_one(v)
            return self._merge(sums[..., :-1] / sums[..., -1:])
        mixed, state = taylor_recurrent(q, k, v, cache.get("state"))
        cache.update(state=state, length=start + x.shape[1])
        return self._merge(mixed)

    def weights(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length length"]:
        """The attention maps themselves."""
        return taylor_maps(*self._queries_keys(x, 0), self.split)

    def state_size(self, length: int) -> int:
        """Sums of phi(k) v^T and of phi(k) of every head, whatever the length."""
        dim = self.out.in_features // self.heads
        return self.heads * (1 + dim + dim**2) * (dim + 1)


class NonApproximate(SimplifiedAttention):
    """One score a token, softmax over the scores so far (equations 7 and 18): see `own_scores`, `score_maps`.

    Rotary positions would change nothing: the query and the key of one token turn alike.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, positions=False)

    def scores(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch heads length"]:
        """What the softmax is taken of."""
        return own_scores(*self._queries_keys(x, 0))

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: dict | None = None
    ) -> Float[Tensor, "batch length width"]:
        if cache is None:
            return self._merge(self.weights(x) @ self._values(x))
        mixed, state = score_recurrent(self.scores(x), self._values(x), cache or None)
        cache.update(state)
        return self._merge(mixed)

    def weights(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length length"]:
        """The attention maps themselves."""
        return score_maps(self.scores(x))

    def state_size(self, length: int) -> int:
        """A sum of values, and for every head the sum of weights and the largest score."""
        return self.out.in_features + 2 * self.heads


class StaticEmbQK(SimplifiedAttention):
    """Queries and keys from the embeddings before the first layer, in every layer by its own matrices.

    Args:
        normalise: divide the embeddings by their root mean square first, so that they have the size that the
            norm before a mixer gives the states of other variants.
    """

    reads_embeddings = True

    def __init__(self, width: int, heads: int, positions: bool = True, normalise: bool = True):
        super().__init__(width, heads, positions)
        self.normalise = normalise

    def _compared(
        self, embeddings: Float[Tensor, "batch length width"], start: int
    ) -> tuple[Float[Tensor, "batch heads length dim"], Float[Tensor, "batch heads length dim"]]:
        if self.normalise:
            embeddings = F.rms_norm(embeddings, embeddings.shape[-1:], eps=1e-6)
        return self._queries_keys(embeddings, start)

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        cache: dict | None = None,
        *,
        embeddings: Float[Tensor, "batch length width"],
    ) -> Float[Tensor, "batch length width"]:
        q, k = self._compared(embeddings, _cached_length(cache))
        k, v = _continued(cache, "key", k), _continued(cache, "value", self._values(x))
        if cache is None:  # the fused kernel, for speed
            return self._merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self._merge(softmax_maps(q, k) @ v)

    def weights(
        self,
        x: Float[Tensor, "batch length width"],
        *,
        embeddings: Float[Tensor, "batch length width"],
    ) -> Float[Tensor, "batch heads length length"]:
        """The attention maps themselves, which do not depend on `x`."""
        return softmax_maps(*self._compared(embeddings, 0))

    def state_size(self, length: int) -> int:
        """Keys and values of every token."""
        return 2 * length * self.out.in_features


class StreamQK(SimplifiedAttention):
    """Queries and keys of the first row of the batch alone, values of every row (equation 9).

    The first row is the constant stream of a `StreamTrunk`: RndEmbQK or FixedSeqQK. All rows, the stream too,
    are mixed by its one map.
    """

    def forward(
        self, x: Float[Tensor, "rows length width"], cache: dict | None = None
    ) -> Float[Tensor, "rows length width"]:
        q, k = self._queries_keys(x[:1], _cached_length(cache))
        k, v = _continued(cache, "key", k), _continued(cache, "value", self._values(x))
        return self._merge(softmax_maps(q, k) @ v)

    def weights(
        self, x: Float[Tensor, "rows length width"]
    ) -> Float[Tensor, "one heads length length"]:
        """The attention map of the stream, by which all rows are mixed."""
        return softmax_maps(*self._queries_keys(x[:1], 0))

    def state_size(self, length: int) -> int:
        """Values of every token, and the stream's keys and values, which all texts of a batch share."""
        return 3 * length * self.out.in_features


def _continued(
    cache: dict | None, name: str, new: Float[Tensor, "rows heads new dim"]
) -> Float[Tensor, "rows heads keys dim"]:
    """What the cache holds under a name with `new` behind it; the cache, if there is one, then holds that."""
    if cache is None:
        return new
    if name in cache:
        new = torch.cat([cache[name], new], dim=-2)
    cache[name] = new
    return new


def _cached_length(cache: dict | None) -> int:
    return cache["key"].shape[-2] if cache else 0


class StreamTrunk(Trunk):
    """A trunk through whose layers a constant stream runs beside every text, as the first row of the batch.

    `StreamQK` layers take their maps from it; standard layers attend within each row, so the stream attends to
    itself. The stream is not trained, what the layers make of it is.

    Args:
        stream: random vectors, [longest, width] (RndEmbQK), or a text, [longest] (FixedSeqQK), which the trunk
            embeds like any other. Shorter texts use its beginning.
        more: of `Trunk`.
    """

    def __init__(
        self,
        *args: Any,
        stream: Float[Tensor, "longest width"] | Int[Tensor, " longest"],
        **more: Any,
    ):
        super().__init__(*args, **more)
        self.register_buffer("stream", stream)

    def stream_states(self, start: int, end: int) -> Float[Tensor, "1 length width"]:
        """The stream before the first layer, at places `start` .. `end` - 1.

        Raises:
            ValueError: when it is shorter.
        """
        if end > len(self.stream):
            raise ValueError(f"{end} tokens, but a stream of {len(self.stream)}; give a longer one")
        part = self.stream[None, start:end]
        return part if part.is_floating_point() else self.embed(part, start)

    def hidden(
        self, tokens: Int[Tensor, "batch length"], cache: TrunkCache | None = None
    ) -> Float[Tensor, "batch length width"]:
        """States of the texts after the last layer and its norm."""
        start = 0 if cache is None else cache.length
        own = self.stream_states(start, start + tokens.shape[1])
        x = embeddings = torch.cat([own, self.embed(tokens, start)])
        for layer, block in enumerate(self.blocks):
            x = block(x, None, None if cache is None else cache.layers[layer], embeddings)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x[1:])


# --- where the simplified layers stand -----------------------------------------------------------


def placement(name: str, layers: int) -> tuple[bool, ...]:
    """Which layers are simplified, from the first: the uniform stack and the placements of the paper's figure 3.

    "uniform": all; "hybrid": the first, third, ...; "shifted": the second, fourth, ...; "bottom", "middle",
    "top": half of the layers, there; "quarter": all but each fourth; "all but first", "all but last", "all but
    both ends".

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    half, start = layers // 2, (layers - layers // 2) // 2
    last = layers - 1
    rules = {
        "uniform": lambda layer: True,
        "hybrid": lambda layer: layer % 2 == 0,
        "shifted": lambda layer: layer % 2 == 1,
        "bottom": lambda layer: layer < half,
        "middle": lambda layer: start <= layer < start + half,
        "top": lambda layer: layer >= layers - half,
        "quarter": lambda layer: layer % 4 != 3,
        "all but first": lambda layer: layer > 0,
        "all but last": lambda layer: layer < last,
        "all but both ends": lambda layer: 0 < layer < last,
    }
    if name not in rules:
        raise ValueError(f"unknown placement '{name}'; there are: {', '.join(rules)}")
    return tuple(rules[name](layer) for layer in range(layers))
