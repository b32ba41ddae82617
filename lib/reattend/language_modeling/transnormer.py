"""TransNormerLLM: A Faster and Better LLM with Improved TransNormer (arXiv 2307.14995).

Linear attention whose weights decay with the distance, without softmax and without denominator,

    o_t = sum_{s <= t} lambda^(t - s) (q_t . k_s) v_s,

in three forms that give the same numbers: `left_product` (quadratic, the definition), `lightning`
(chunks, linear in the length: arXiv 2405.17381, algorithm 1) and `recurrent` (one token at a time, the
robust inference of section 3.4). Around it: `lrpe` (linearised relative positions, section 3.1),
`decay_slopes` by head and layer, and `GatedLinearAttention` (section 3.2), where one norm over all heads
takes the denominator's place. SRMSNorm and SGLU are `norm_layer("simple_rms", ...)` and
`GatedFeedForward` with the identity, both of `reattend.trunks.language`. Mixers follow the interface of
that module, with a cache.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.positions import alibi_slopes
from reattend.trunks.language import norm_layer

# --- decay and positions -------------------------------------------------------------------------


def decay_slopes(heads: int, layers: int) -> Float[Tensor, "layers heads"]:
    """-log lambda of every layer and head, as the official code has it.

    Head h of H has the slope 2^(-8 h / H) in the first layer (h from 1), and 1e-5 of it in the last: in
    between it falls evenly, slope * (1 - l / (L - 1) + 1e-5).

    Raises:
        ValueError: for fewer than two layers, between which nothing can fall.
    """
    if layers < 2:
        raise ValueError(f"the decay falls from the first layer to the last; got {layers} layers")
    temperature = 1 - torch.arange(layers) / (layers - 1) + 1e-5
    return temperature[:, None] * alibi_slopes(heads)


def printed_decay_slopes(heads: int, layers: int) -> Float[Tensor, "layers heads"]:
    """-log lambda as the paper prints it: (8 h / H) (1 - l / L); no published code uses it."""
    temperature = 1 - torch.arange(layers) / layers
    return temperature[:, None] * 8 * torch.arange(1, heads + 1) / heads


def decay_mask(
    slopes: Float[Tensor, " heads"], length: int
) -> Float[Tensor, "heads length length"]:
    """lambda^(t - s) where s <= t, else 0.

    The distance comes before the exponential: lambda^t and lambda^-s apart overflow.
    """
    places = torch.arange(length, device=slopes.device)
    distance = places[:, None] - places
    return (-slopes[:, None, None] * distance.clamp(min=0)).exp().tril()


def lrpe_rates(heads: int, head_width: int) -> Float[Tensor, "heads 1 head_width"]:
    """Start of the learned angles a token: 10000^(-2 j / (heads head_width)), j over heads and channels."""
    flat = torch.arange(heads * head_width) / (heads * head_width)
    return (10_000.0 ** (-2 * flat)).view(heads, 1, head_width)


def lrpe(
    x: Float[Tensor, "batch heads length dim"], rates: Float[Tensor, "heads 1 dim"], start: int = 0
) -> Float[Tensor, "batch heads length twice_dim"]:
    """[x cos(t rates), x sin(t rates)], t from `start`: linearised relative positional encoding.

    lrpe(q, t) . lrpe(k, s) = sum_i q_i k_i cos(rates_i (t - s)).
    """
    places = torch.arange(start, start + x.shape[-2], device=x.device, dtype=x.dtype)
    angles = places[:, None] * rates
    return torch.cat([x * angles.cos(), x * angles.sin()], dim=-1)


# --- three forms of one operator ------------------------------------------------------------------


def left_product(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    slopes: Float[Tensor, " heads"],
) -> Float[Tensor, "batch heads length value_dim"]:
    """((Q K^T) * M) V with M = `decay_mask`: the definition, quadratic in the length."""
    return (q @ k.mT * decay_mask(slopes, q.shape[-2])) @ v


def lightning(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    slopes: Float[Tensor, " heads"],
    *,
    block: int = 64,
    state: Float[Tensor, "batch heads dim value_dim"] | None = None,
) -> tuple[
    Float[Tensor, "batch heads length value_dim"], Float[Tensor, "batch heads dim value_dim"]
]:
    """The same in chunks of `block` tokens, linear in the length; also the state after the last token.

    Inside a chunk it is the left product; what came before is read from the state K^T V, decayed to the
    chunk's border (arXiv 2405.17381, algorithm 1). `state` continues a text; None starts one.
    """
    length = q.shape[-2]
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    mask = decay_mask(slopes, min(block, length))
    since = -slopes[:, None, None] * torch.arange(1, block + 1, device=q.device)[:, None]
    fall = since.exp()  # lambda^1 .. lambda^block, [heads, block, 1]
    parts = []
    # Not slices: the gradient of each would be as long as the text.
    for q_i, k_i, v_i in zip(*(x.split(block, dim=-2) for x in (q, k, v)), strict=True):
        size = q_i.shape[-2]
        inside = (q_i @ k_i.mT * mask[:, :size, :size]) @ v_i
        parts.append(inside + q_i * fall[:, :size] @ state)
        to_border = mask[:, size - 1, :size, None]  # lambda^(size - 1) .. lambda^0
        state = fall[:, size - 1 : size] * state + (k_i * to_border).mT @ v_i
    return torch.cat(parts, dim=-2), state


def recurrent(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    slopes: Float[Tensor, " heads"],
) -> Float[Tensor, "batch heads length value_dim"]:
    """KV_t = lambda KV_{t-1} + k_t^T v_t; o_t = q_t KV_t: a token at a time, at constant cost each.

    Only decayed sums are kept, so nothing overflows: the robust form of section 3.4.
    """
    decay = (-slopes).exp()[:, None, None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    out = []
    for q_t, k_t, v_t in zip(*(x.split(1, dim=-2) for x in (q, k, v)), strict=True):
        state = decay * state + k_t.mT @ v_t
        out.append(q_t @ state)
    return torch.cat(out, dim=-2)


def split_recurrent(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    slopes: Float[Tensor, " heads"],
) -> Float[Tensor, "batch heads length value_dim"]:
    """(lambda^t q_t) sum_s (lambda^-s k_s)^T v_s: the form that the robust one replaces (section 3.4).

    The same in exact arithmetic; lambda^-s overflows at long texts.
    """
    places = torch.arange(q.shape[-2], device=q.device, dtype=q.dtype)
    growth = (slopes[:, None, None] * places[:, None]).exp()
    state = ((k * growth)[..., :, None] * v[..., None, :]).cumsum(dim=-3)
    return ((q / growth)[..., None, :] @ state)[..., 0, :]


# --- mixers --------------------------------------------------------------------------------------


def split_heads(
    x: Float[Tensor, "batch length width"], heads: int
) -> Float[Tensor, "batch heads length dim"]:
    """The channels dealt to heads, in order."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class GatedLinearAttention(nn.Module):
    """SRMSNorm(linear attention with decay) * u, then an output projection (section 3.2, GLA).

    q = silu(W_q x), k = silu(W_k x), v = W_v x, and the gate u = W_u x, without biases. The norm runs over
    all heads together.

    Args:
        width: of the trunk.
        heads: number of heads.
        slopes: of the layer's decays, one a head; a row of `decay_slopes`, or zeros for no decay.
        relative: apply `lrpe` to queries and keys; it doubles the state.
        gate: whether there is a u.
        content: False replaces every q . k by 1, so that the decay alone says what is read: a placebo.
        block: tokens of a chunk.

    Raises:
        ValueError: when the heads do not divide the width, or slopes and heads differ in number.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        slopes: Float[Tensor, " slopes"],
        *,
        relative: bool = False,
        gate: bool = True,
        content: bool = True,
        block: int = 64,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        if len(slopes) != heads:
            raise ValueError(f"{len(slopes)} slopes for {heads} heads")
        self.heads, self.gated, self.content, self.block = heads, gate, content, block
        self.register_buffer("slopes", slopes.clone())
        self.compare = nn.Linear(width, 2 * width, bias=False) if content else None
        self.read = nn.Linear(width, (2 if gate else 1) * width, bias=False)
        self.rates = nn.Parameter(lrpe_rates(heads, width // heads)) if relative else None
        self.norm = norm_layer("simple_rms", width)
        self.out = nn.Linear(width, width, bias=False)

    def _queries_keys(
        self, x: Float[Tensor, "batch length width"], start: int
    ) -> tuple[Tensor, Tensor]:
        if not self.content:
            ones = x.new_ones(x.shape[0], self.heads, x.shape[1], 1)
            return ones, ones
        q, k = (split_heads(F.silu(part), self.heads) for part in self.compare(x).chunk(2, -1))
        if self.rates is None:
            return q, k
        return lrpe(q, self.rates, start), lrpe(k, self.rates, start)

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: dict | None = None
    ) -> Float[Tensor, "batch length width"]:
        """Causal; a cache holds the state and the number of tokens so far, whatever that number is."""
        start = cache.get("length", 0) if cache else 0
        q, k = self._queries_keys(x, start)
        v, *u = self.read(x).split(x.shape[-1], dim=-1)
        state = cache["state"] if cache else None
        mixed, state = lightning(
            q, k, split_heads(v, self.heads), self.slopes.to(x), block=self.block, state=state
        )
        if cache is not None:
            cache.update(state=state, length=start + x.shape[1])
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))
        return self.out(mixed * u[0] if self.gated else mixed)

    def weights(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length length"]:
        """lambda^(t - s) (q_t . k_s), for looking at: signed and without a sum of one."""
        q, k = self._queries_keys(x, 0)
        return q @ k.mT * decay_mask(self.slopes.to(x), x.shape[1])

    def state_size(self, length: int) -> int:
        """One sum of k^T v a head, whatever the length."""
        width = self.out.in_features
        twice = 1 if self.rates is None else 2
        return width * (twice * width // self.heads if self.content else 1)


class NormalisedLinearAttention(nn.Module):
    """Linear attention with a denominator: phi(q_t) S_t / (phi(q_t) . z_t), phi = 1 + elu (arXiv 2006.16236).

    S_t sums phi(k_s) v_s^T and z_t sums phi(k_s), s <= t: `lightning` without decay on values with a one
    behind them. The baseline.

    Raises:
        ValueError: when the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, block: int = 64):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.block = heads, block
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch length width"], cache: dict | None = None
    ) -> Float[Tensor, "batch length width"]:
        q, k, v = (split_heads(part, self.heads) for part in self.project(x).chunk(3, -1))
        values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        state = cache["state"] if cache else None
        sums, state = lightning(
            1 + F.elu(q),
            1 + F.elu(k),
            values,
            x.new_zeros(self.heads),
            block=self.block,
            state=state,
        )
        if cache is not None:
            cache.update(state=state)
        mixed = sums[..., :-1] / sums[..., -1:]
        return self.out(mixed.transpose(1, 2).flatten(2))

    def state_size(self, length: int) -> int:
        """S and z of every head, whatever the length."""
        width = self.out.in_features
        return width * (width // self.heads + 1)
