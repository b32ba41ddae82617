"""Theory, Analysis, and Best Practices for Sigmoid Self-Attention (arXiv 2409.04431).

SigmoidAttn(X) = sigma(Q K^T / sqrt(d) + b) V: every key is weighed by itself, rows are not
normalised, and the constant b = -log(n) keeps the sum of a row near one at the start (section 3).
The same module holds the activations that the paper compares: softmax, and elementwise ones that
are divided by the number of visible keys.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import jvp, vjp

from reattend.attention.dense import causal_token_mask
from reattend.attention.positions import alibi_bias, rotary
from reattend.trunks.language import MixerWrapper

Positions = Literal["rotary", "alibi", "none"]

ELEMENTWISE: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sigmoid": (torch.sigmoid, 0.0),
    "sigmoid/i": (torch.sigmoid, 1.0),
    "sigmoid/sqrt(i)": (torch.sigmoid, 0.5),
    "relu/i": (torch.relu, 1.0),
}
"""Function of the logit, and the power of the number of visible keys it is divided by."""

ACTIVATIONS = ("softmax", "mean", *ELEMENTWISE)


def length_bias(length: int) -> float:
    """b = -log(n): with logits of zero every weight is 1 / (1 + n) (section 3).

    Raises ValueError for a length below one.
    """
    if length < 1:
        raise ValueError(f"a text of {length} tokens has no bias")
    return -math.log(length)


def attention_weights(
    scores: Float[Tensor, "*lead queries keys"],
    visible: Bool[Tensor, "queries keys"] | None = None,
    activation: str = "sigmoid",
    bias: float = 0.0,
) -> Float[Tensor, "*lead queries keys"]:
    """Weights of the keys; exactly 0 where a key is not visible.

    Args:
        scores: logits, scaled and with their position bias.
        visible: which keys a query may see; None: all.
        activation: "sigmoid" is sigma(u + b). With "/i" or "/sqrt(i)" it is divided by that power of
            the number of visible keys (i for row i of a causal mask). "softmax" is the baseline.
            "mean" gives each visible key the same weight, whatever the scores.
        bias: b of the elementwise activations. Softmax would not notice it and takes none.

    A query that sees no key has weights 0 with every elementwise activation.

    Raises:
        ValueError: for an unknown activation, or a bias with "softmax" or "mean".
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}'; there are: {', '.join(ACTIVATIONS)}")
    if activation in ("softmax", "mean") and bias != 0:
        raise ValueError(f"'{activation}' takes no bias, got {bias:g}")
    if activation == "mean":
        scores = torch.zeros_like(scores)
    # Mask and bias in one sum: -inf + b = -inf, and sigma(-inf) = relu(-inf) = exp(-inf) = 0 exactly.
    if visible is not None:
        scores = scores + scores.new_full((), bias).where(visible, -math.inf)
    elif bias != 0:
        scores = scores + bias
    if activation in ("softmax", "mean"):
        return scores.softmax(-1)
    function, power = ELEMENTWISE[activation]
    weights = function(scores)
    if power == 0:
        return weights
    keys = scores.shape[-1]
    count = weights.new_tensor([keys]) if visible is None else visible.sum(-1, keepdim=True)
    return weights / count.clamp(min=1).to(weights.dtype) ** power


def sigmoid_attention(
    q: Float[Tensor, "*lead queries dim"],
    k: Float[Tensor, "*lead keys dim"],
    v: Float[Tensor, "*lead keys value_dim"],
    *,
    bias: float | None = None,
    position: Float[Tensor, "*heads queries keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "*lead queries value_dim"]:
    """sigma(q k^T / sqrt(dim) + position + b) v, the equation of section 2.

    Args:
        bias: b; None: -log(number of keys).
        position: added to the logits, for instance ALiBi.
        causal: each query sees the keys up to its own place; the last query stands at the last key.
    """
    bias = length_bias(k.shape[-2]) if bias is None else bias
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if position is not None:
        scores = scores + position
    visible = causal_token_mask(q.shape[-2], k.shape[-2], q.device) if causal else None
    return attention_weights(scores, visible, "sigmoid", bias) @ v


def chunked_sigmoid_attention(
    q: Float[Tensor, "*lead queries dim"],
    k: Float[Tensor, "*lead keys dim"],
    v: Float[Tensor, "*lead keys value_dim"],
    chunk: int,
    *,
    bias: float | None = None,
) -> Float[Tensor, "*lead queries value_dim"]:
    """The same without a mask, over blocks of `chunk` keys: a plain sum, no running maximum or sum.

    This is what makes the fused kernel simpler than that of softmax (section 4).
    """
    bias = length_bias(k.shape[-2]) if bias is None else bias
    blocks = zip(k.split(chunk, dim=-2), v.split(chunk, dim=-2), strict=True)
    return sum(sigmoid_attention(q, keys, values, bias=bias) for keys, values in blocks)


class Attention(nn.Module):
    """Multi-head attention with the paper's stabilisers, for `reattend.trunks.language`.

    Order (as in the official code): norm of q and k -> rotary turn -> scale -> q k^T -> ALiBi -> mask
    -> + b -> activation -> values -> projection -> hybrid norm. Linear layers have no biases, and b is
    a constant. Parameters are named as in `reattend.trunks.mixers.SoftmaxAttention`.

    Args:
        width: of the trunk.
        heads: number of heads.
        activation: see `attention_weights`.
        bias: b of the elementwise activations.
        positions: "rotary", "alibi" (causal only), or "none".
        qk_norm: LayerNorm of queries and keys over the head width; bounds a logit by sqrt(head width).
        causal: False lets every token see all tokens, as in vision.
        hybrid_norm: LayerNorm of the output, x + LN(attention(LN(x))).

    Raises:
        ValueError: when the heads do not divide the width, or ALiBi is asked for without causality.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        activation: str = "sigmoid",
        *,
        bias: float = 0.0,
        positions: Positions = "rotary",
        qk_norm: bool = True,
        causal: bool = True,
        hybrid_norm: bool = False,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        if positions == "alibi" and not causal:
            raise ValueError("ALiBi needs causal attention: its bias grows after the query")
        self.heads, self.activation, self.bias = heads, activation, bias
        self.position_kind, self.causal = positions, causal
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        head_norms = [nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2 * qk_norm)]
        self.query_norm, self.key_norm = head_norms or (nn.Identity(), nn.Identity())
        self.output_norm = nn.LayerNorm(width, eps=1e-6) if hybrid_norm else nn.Identity()

    def weights_and_values(
        self, x: Float[Tensor, "batch length width"]
    ) -> tuple[
        Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length head_width"]
    ]:
        """Attention weights of every head, and the values they weigh."""
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.key_norm(k)
        if self.position_kind == "rotary":
            q, k = rotary(q), rotary(k)
        length, head_width = q.shape[-2:]
        scores = q * head_width**-0.5 @ k.mT
        if self.position_kind == "alibi":
            scores = scores + alibi_bias(self.heads, length, length, x.device).to(scores)
        visible = causal_token_mask(length, length, x.device) if self.causal else None
        return attention_weights(scores, visible, self.activation, self.bias), v

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        weights, v = self.weights_and_values(x)
        return self.output_norm(self.out((weights @ v).transpose(1, 2).flatten(2)))

    def state_size(self, length: int) -> int:
        """Keys and values of every token."""
        return 2 * length * self.out.in_features


class LayerScale(MixerWrapper):
    """gamma * mixer(x), one trained gamma per channel, all equal at the start.

    Wraps a mixer or a feed-forward network of width `width`.
    """

    def __init__(self, width: int, mixer: nn.Module, start: float = 1e-4):
        super().__init__(mixer)
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(
        self,
        x: Float[Tensor, "*places width"],
        *read: Tensor,
        cache: dict | None = None,
        **more: Any,
    ) -> Float[Tensor, "*places width"]:
        return self.gamma * self.inner(x, *read, cache=cache, **more)


# --- regularity: the Jacobian of one head ----------------------------------------------------------


def single_head(
    x: Float[Tensor, "length width"],
    a: Float[Tensor, "width width"],
    w_v: Float[Tensor, "width width"],
    activation: str = "sigmoid",
    bias: float = 0.0,
) -> Float[Tensor, "length width"]:
    """One head without mask and positions: weights of x A x^T, times x W_v (section 3.2).

    A = W_q W_k^T / sqrt(head width).
    """
    return attention_weights(x @ a @ x.mT, None, activation, bias) @ (x @ w_v)


def outlier_tokens(
    draws: int, length: int, width: int, ratio: float, generator: torch.Generator
) -> Float[Tensor, "draws length width"]:
    """Normal tokens; the first of each draw has `ratio` times the typical norm sqrt(width).

    Drawn in float64. The same generator state gives the same tokens for every ratio, up to that factor.
    """
    x = torch.randn(draws, length, width, generator=generator, dtype=torch.float64)
    first = x[:, :1]
    x[:, :1] = ratio * width**0.5 * first / first.norm(dim=-1, keepdim=True)
    return x


def jacobian_norm(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*shape"],
    start: Float[Tensor, "*shape"],
    iterations: int = 60,
) -> Float[Tensor, ""]:
    """Largest singular value of the Jacobian of `function` at x, the local Lipschitz constant.

    Power iteration on J^T J from `start`, by products with J and J^T; approaches it from below.
    """
    _, pull = vjp(function, x)
    direction = start / start.norm()
    for _ in range(iterations):
        stretched = jvp(function, (x,), (direction,))[1]
        (back,) = pull(stretched)
        direction = back / back.norm()
    return jvp(function, (x,), (direction,))[1].norm()


def sigmoid_jacobian_bound(
    x: Float[Tensor, "length width"],
    a: Float[Tensor, "width width"],
    w_v: Float[Tensor, "width width"],
    bias: float,
) -> Float[Tensor, ""]:
    """Upper bound of the Jacobian norm of `single_head` with the sigmoid:

        |W_v| (|sigma(x A x^T + b)| + 2 max|sigma'| |A| sum_i |x_i|^2),

    spectral norms, and Euclidean ones of the tokens. The sum is n times the *average* squared norm,
    the quantity of Theorem 3.2; there is no term in the largest norm.
    """
    weights = torch.sigmoid(x @ a @ x.mT + bias)
    slope = (weights * (1 - weights)).max()
    spectral = torch.linalg.matrix_norm
    sizes = spectral(weights, 2) + 2 * slope * spectral(a, 2) * x.square().sum()
    return spectral(w_v, 2) * sizes
