"""Zoology: Measuring and Improving Recall in Efficient Language Models (arXiv 2312.04927).

Mixers that replace attention by gated convolutions, the look-up layers that give them recall back,
and the split of a text's loss into associative-recall (AR) hits and the rest. Mixers follow the
interface of `reattend.trunks.language`: `[batch, length, width]` to the same, causal, plus
`state_size(length)`.
"""

import itertools
import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# --- attention -----------------------------------------------------------------------------------


class CausalAttention(nn.Module):
    """Softmax attention: softmax(q k^T / sqrt(head width), causal) v, then an output projection."""

    def __init__(self, width: int, heads: int = 1, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def state_size(self, length: int) -> int:
        """Keys and values of every token."""
        return 2 * length * self.out.in_features


# --- convolutions --------------------------------------------------------------------------------


def causal_convolution(
    x: Float[Tensor, "batch length width"], taps: Float[Tensor, "width lags"]
) -> Float[Tensor, "batch length width"]:
    """y[t] = sum_s taps[s] x[t - s], channel by channel, through the FFT.

    Padding to length + lags keeps the circular product from wrapping into the start.
    """
    length, lags = x.shape[1], taps.shape[1]
    size = length + lags
    signal = torch.fft.rfft(x.transpose(1, 2), n=size)
    response = torch.fft.rfft(taps, n=size)
    return torch.fft.irfft(signal * response, n=size)[..., :length].transpose(1, 2)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over the last `lags` tokens, with bias."""

    def __init__(self, width: int, lags: int = 3):
        super().__init__()
        bound = 1 / math.sqrt(lags)
        self.taps = nn.Parameter(torch.empty(width, lags).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        lags = self.taps.shape[1]
        padded = F.pad(x.transpose(1, 2), (lags - 1, 0))
        # conv1d correlates, so the taps are turned round: taps[:, 0] meets the newest token.
        taps = self.taps.flip(1)[:, None]
        return F.conv1d(padded, taps, self.bias, groups=len(taps)).transpose(1, 2)

    def state_size(self, length: int) -> int:
        """The last `lags` inputs."""
        return min(length, self.taps.shape[1]) * self.taps.shape[0]


def positional_features(length: int, bands: int = 1) -> Float[Tensor, "length features"]:
    """[t, cos, sin] of time t in [0, 1] at `bands` frequencies: the input of implicit filters."""
    t = torch.linspace(0, 1, length)[:, None]
    steps = 2 * math.pi * torch.arange(length)[:, None] / length
    angles = steps * torch.linspace(1e-4, max(bands - 1, 1e-4), bands)
    return torch.cat([t, angles.cos(), -angles.sin()], dim=1)


class LongConvolution(nn.Module):
    """Convolution as long as the text, with an implicit filter (section 4).

    The filter is a small network of the position: features 3 -> 16 -> ReLU -> width, so its
    parameters do not grow with the length. Raises ValueError for texts longer than `length`.
    """

    def __init__(self, width: int, length: int, hidden: int = 16):
        super().__init__()
        self.register_buffer("features", positional_features(length))
        self.filter = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def taps(self, length: int) -> Float[Tensor, "width length"]:
        """The filter's first `length` lags."""
        if length > len(self.features):
            raise ValueError(f"{length} tokens, but a filter of {len(self.features)} lags")
        return self.filter(self.features[:length]).T

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        return causal_convolution(x, self.taps(x.shape[1])) + self.bias

    def state_size(self, length: int) -> int:
        """All inputs: a data-independent filter without recurrence must keep them."""
        return length * self.bias.shape[0]


class BaseConv(nn.Module):
    """Gated convolution: y = (x W + b) * (h conv x + bias), elementwise product (section 4).

    `convolution` is a ShortConvolution or a LongConvolution of the same width. The official code adds x
    to y, and the input to what its long convolution gives; the paper's equation has neither.
    """

    def __init__(self, width: int, convolution: nn.Module):
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.convolution = convolution

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        return self.gate(x) * self.convolution(x)

    def state_size(self, length: int) -> int:
        return self.convolution.state_size(length)


class HyenaFilter(nn.Module):
    """Long filter of Hyena: a sine network of the position under an exponential window."""

    def __init__(self, width: int, length: int, hidden: int = 64, inner_layers: int = 2):
        super().__init__()
        self.register_buffer("features", positional_features(length))
        sizes = [3] + [hidden] * (inner_layers + 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.out = nn.Linear(hidden, width, bias=False)
        # Channels decay to `target` after between 0.3 (fast) and 1.5 (slow) of the length.
        fast, slow, target = 0.3, 1.5, 1e-2
        rates = torch.linspace(-math.log(target) / slow, -math.log(target) / fast, width)
        self.register_buffer("window", (-self.features[:, :1] * rates).exp())

    def forward(self, length: int) -> Float[Tensor, "width length"]:
        """The filter's first `length` lags. Raises ValueError beyond its longest."""
        if length > len(self.features):
            raise ValueError(f"{length} tokens, but a filter of {len(self.features)} lags")
        x = self.features[:length]
        for layer in self.layers:
            x = layer(x).sin()
        return (self.out(x) * self.window[:length]).T


class Hyena(nn.Module):
    """Order-2 Hyena: y = out(x1 * (h conv (x2 * v) + D (x2 * v))).

    x1, x2, v are projections of x, each followed by a short convolution.
    """

    def __init__(self, width: int, length: int):
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.short = ShortConvolution(3 * width)
        self.filter = HyenaFilter(width, length)
        self.direct = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        x1, x2, v = self.short(self.project(x)).chunk(3, dim=-1)
        gated = x2 * v
        mixed = causal_convolution(gated, self.filter(x.shape[1])) + self.direct * gated
        return self.out(x1 * mixed)

    def state_size(self, length: int) -> int:
        """All gated inputs of the long filter, and the last inputs of the short one."""
        return length * self.direct.shape[0] + self.short.state_size(length)


# --- linear attention ----------------------------------------------------------------------------


def taylor_features(x: Float[Tensor, "*places d"]) -> Float[Tensor, "*places features"]:
    """phi(x) = [1, x / d^(1/4), (x kron x) / sqrt(2 d)], the second-order Taylor map of exp.

    phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(d).
    """
    d = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * d)
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, square], dim=-1)


class TaylorAttention(nn.Module):
    """Linear attention of Based: weights phi(q_t) . phi(k_s), s <= t, normalised over s.

    Computed in the masked quadratic form, which is faster than the recurrence for short texts.
    """

    def __init__(self, width: int, feature_width: int = 8):
        super().__init__()
        self.queries = nn.Linear(width, feature_width, bias=False)
        self.keys = nn.Linear(width, feature_width, bias=False)
        self.values = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        q, k = taylor_features(self.queries(x)), taylor_features(self.keys(x))
        weights = (q @ k.mT).tril()
        return self.out(weights @ self.values(x) / weights.sum(-1, keepdim=True))

    def state_size(self, length: int) -> int:
        """One sum of phi(k) v^T and one of phi(k), whatever the length."""
        d = self.queries.out_features
        return (1 + d + d * d) * (self.values.out_features + 1)


# --- hybrids: attention at chosen positions only ---------------------------------------------------


def seen_before(
    tokens: Int[Tensor, "batch length"], ignore: int | None = None
) -> Bool[Tensor, "batch length"]:
    """True where the same token stands earlier in the row; never at the token `ignore`."""
    same = tokens[:, :, None] == tokens[:, None, :]
    seen = same.tril(-1).any(-1)
    return seen if ignore is None else seen & (tokens != ignore)


def top_positions(
    scores: Float[Tensor, "batch length"], count: int
) -> Bool[Tensor, "batch length"]:
    """True at the `count` highest scores of each row."""
    chosen = scores.topk(min(count, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


class LookUp(nn.Module):
    """Attention whose output is kept at selected positions: s_t * attention_t (section 5).

    * "full": s = 1 everywhere, plain attention.
    * "random": a fixed random set of ceil(sqrt(N)) positions, N = `length`: the placebo.
    * "programmatic": s_t = 1 where the token occurred earlier (all but the token `ignore`).
    * "learned": s_t = sigmoid(w . x_t + b), soft in training with the auxiliary loss
      0.001 relu(mean(s) - sqrt(N) / N); in evaluation only the ceil(sqrt(N)) highest s_t are kept.
    """

    reads_tokens = True

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        selection: Literal["full", "random", "programmatic", "learned"],
        length: int,
        *,
        ignore: int | None = None,
        auxiliary_weight: float = 1e-3,
    ):
        super().__init__()
        self.attention, self.selection = attention, selection
        self.budget, self.ignore = math.ceil(math.sqrt(length)), ignore
        self.auxiliary_weight = auxiliary_weight
        if selection == "random":
            self.register_buffer("subset", top_positions(torch.rand(1, length), self.budget))
        if selection == "learned":
            self.gate = nn.Linear(width, 1)

    def gates(
        self, x: Float[Tensor, "batch length width"], tokens: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length"]:
        """The selection s; for "learned" in training this also sets `auxiliary_loss`."""
        if self.selection == "full":
            return x.new_ones(x.shape[:2])
        if self.selection == "random":
            return self.subset[:, : x.shape[1]].expand(len(x), -1).to(x.dtype)
        if self.selection == "programmatic":
            return seen_before(tokens, self.ignore).to(x.dtype)
        scores = self.gate(x).squeeze(-1).sigmoid()
        if not self.training:
            return scores * top_positions(scores, self.budget)
        excess = scores.mean() - self.budget / x.shape[1]
        self.auxiliary_loss = self.auxiliary_weight * excess.relu()
        return scores

    def forward(
        self, x: Float[Tensor, "batch length width"], tokens: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length width"]:
        return self.gates(x, tokens)[..., None] * self.attention(x)

    def state_size(self, length: int) -> int:
        return self.attention.state_size(length)


# --- associative-recall hits on text -------------------------------------------------------------


def bigrams(tokens: Int[Tensor, "*rows length"], vocabulary: int) -> Int[Tensor, "*rows pairs"]:
    """One number per pair of neighbours: first * vocabulary + second."""
    return tokens[..., :-1] * vocabulary + tokens[..., 1:]


class BigramCounts:
    """How often each pair of neighbouring tokens occurs in a stream of training tokens."""

    def __init__(self, stream: Int[Tensor, " tokens"], vocabulary: int):
        self.vocabulary = vocabulary
        self.keys, self.counts = bigrams(stream, vocabulary).unique(return_counts=True)

    def of(self, tokens: Int[Tensor, "rows length"]) -> Int[Tensor, "rows pairs"]:
        """Count of each bigram of `tokens`; 0 for one never seen."""
        wanted = bigrams(tokens, self.vocabulary)
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == wanted, self.counts[place], 0)


def ar_hits(
    tokens: Int[Tensor, "rows length"], counts: BigramCounts, threshold: int
) -> Bool[Tensor, "rows pairs"]:
    """Which predictions are AR hits (section 3): entry t is about predicting token t + 1.

    A hit completes a bigram that already occurred in the same row and that training saw fewer
    than `threshold` times, so that it must be recalled and cannot have been memorised.
    """
    repeated = seen_before(bigrams(tokens, counts.vocabulary))
    return repeated & (counts.of(tokens) < threshold)


def gap_share(
    losses: Float[Tensor, " predictions"],
    reference: Float[Tensor, " predictions"],
    hits: Bool[Tensor, " predictions"],
) -> Float[Tensor, ""]:
    """Share of the loss gap to `reference` that lies on AR hits (Table 1, last column).

    (mean gap on hits x share of hits) / mean gap. It may leave [0, 1] when the two parts of the gap
    have opposite signs; the paper cuts it to [0, 1].
    """
    gap = losses - reference
    return gap[hits].sum() / gap.sum()


def matched_mean(
    values: Float[Tensor, "*places"],
    places: Bool[Tensor, "*places"],
    others: Bool[Tensor, "*places"],
    classes: Int[Tensor, "*places"],
) -> Float[Tensor, ""]:
    """Mean of `values` at `others`, each class weighted as often as it occurs at `places`.

    What the predictions at `places` are compared with when they shall differ from it in nothing but what
    the classes do not say. Classes without `others` count on neither side.

    Raises:
        ValueError: when no class has both.
    """
    parts, weights = [], []
    for kind in classes[places].unique():
        same = classes == kind
        if (same & others).any():
            parts.append(values[same & others].mean())
            weights.append((same & places).sum())
    if not parts:
        raise ValueError("no class holds both kinds of predictions")
    weight = torch.stack(weights).to(values.dtype)
    return (torch.stack(parts) * weight).sum() / weight.sum()
