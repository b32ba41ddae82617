"""Bridging the Divide: Reconsidering Softmax and Linear Attention (arXiv 2412.06590): InLine attention.

Linear attention divides its scores by their sum, so queries phi(p) = alpha phi(q) get the same scores: it is
not injective. InLine attention subtracts their mean instead (equation 5), with s = d^(-1/2):

    InL(q)_j = (s / N) (phi(q) . phi(k_j) - phi(q) . mean_i phi(k_i)) + 1 / N

Weights sum to one, may be negative, and o = sum_j InL(q)_j v_j takes a time linear in N (`inline_attention`).
The paper's equation leaves out s / N; the published models have it. Second part: a local residual, a 3 x 3
depth-wise convolution of the values whose kernel is predicted from each picture (`local_residual`).

Every operator has two forms: scores, the N x N weights themselves, and the output in the cheapest order of
products. Queries and keys of both have phi applied. `InlineAttention` is the layer and `InlineDeiT` the
network, with the parameter names of the official code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 1e-6  # added to the divisor of linear attention, which is 0 where relu leaves nothing of a query

# Kernels ------------------------------------------------------------------------------------------

KERNELS: dict[str, Callable[[int], nn.Module]] = {
    "identity": lambda width: nn.Identity(),
    "relu": lambda width: nn.ReLU(),
    "leaky_relu": lambda width: nn.LeakyReLU(),
    "affine_relu": lambda width: nn.Sequential(nn.Linear(width, width), nn.ReLU()),
}
"""phi by name, made for a width: x, max(x, 0), max(x, .01 x), max(A x + b, 0) (the paper's table of kernels).

One phi serves queries and keys, before the channels are split into heads.
"""

# Scores: the weights of every query over all keys --------------------------------------------------


def softmax_scores(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    visible: Bool[Tensor, "queries keys"] | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """exp(s q . k_j) / sum_i exp(s q . k_i), over the visible keys."""
    logits = q.shape[-1] ** -0.5 * q @ k.mT
    return (logits if visible is None else logits.masked_fill(~visible, -torch.inf)).softmax(-1)


def linear_scores(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    visible: Bool[Tensor, "queries keys"] | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """q . k_j / sum_i q . k_i, over the visible keys: normalised by division."""
    products = q @ k.mT if visible is None else q @ k.mT * visible
    return products / (products.sum(-1, keepdim=True) + SMALLEST)


def inline_scores(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    visible: Bool[Tensor, "queries keys"] | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """(s / N) (q . k_j - mean_i q . k_i) + 1 / N, over the visible keys: by subtraction (equation 5)."""
    count = k.shape[-2] if visible is None else visible.sum(-1, keepdim=True).to(q)
    products = q.shape[-1] ** -0.5 / count * q @ k.mT
    if visible is None:
        return products - products.mean(-1, keepdim=True) + 1 / count
    mean = (products * visible).sum(-1, keepdim=True) / count
    return (products - mean + 1 / count) * visible


def mean_scores(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    visible: Bool[Tensor, "queries keys"] | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """1 / N for every visible key: nothing is compared."""
    ones = q.new_ones(*q.shape[:-1], k.shape[-2])
    ones = ones if visible is None else ones * visible
    return ones / ones.sum(-1, keepdim=True)


SCORES = {
    "inline": inline_scores,
    "linear": linear_scores,
    "softmax": softmax_scores,
    "mean": mean_scores,
}

# Outputs in the cheapest order of products ---------------------------------------------------------


def inline_attention(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    v: Float[Tensor, "*batch keys value_dim"],
) -> Float[Tensor, "*batch queries value_dim"]:
    """(s / N) q (K^T V) + (1 - s q . mean k) mean v: `inline_scores` times v, linear in N."""
    scale = q.shape[-1] ** -0.5
    each = (scale / k.shape[-2]) ** 0.5  # on both sides, so that sums over many tokens stay small
    state = (k * each).mT @ (v * each)
    centre = 1 - scale * q @ k.mean(-2, keepdim=True).mT
    return q @ state + centre * v.mean(-2, keepdim=True)


def linear_attention(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    v: Float[Tensor, "*batch keys value_dim"],
) -> Float[Tensor, "*batch queries value_dim"]:
    """q (K^T V) / (q . sum k): `linear_scores` times v, linear in N."""
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + SMALLEST)


def mean_attention(
    q: Float[Tensor, "*batch queries dim"],
    k: Float[Tensor, "*batch keys dim"],
    v: Float[Tensor, "*batch keys value_dim"],
) -> Float[Tensor, "*batch queries value_dim"]:
    """The mean of the values, for every query."""
    return v.mean(-2, keepdim=True).expand(*q.shape[:-1], -1)


OUTPUTS = {
    "inline": inline_attention,
    "linear": linear_attention,
    "softmax": F.scaled_dot_product_attention,
    "mean": mean_attention,
}


def operator_multiply_adds(operator: Literal["inline", "softmax"], tokens: int, dim: int) -> int:
    """Of the two matrix products of one head: 2 N d^2 for InLine, 2 N^2 d for softmax; equal at N = d."""
    return 2 * tokens * dim * (dim if operator == "inline" else tokens)


# Injectivity ----------------------------------------------------------------------------------------


def unseen_directions(
    keys: Float[Tensor, "keys dim"], tolerance: float = 1e-9
) -> Float[Tensor, "directions dim"]:
    """Orthonormal directions in which a query may move without changing InLine or softmax scores.

    They are orthogonal to all centred keys k_j - mean k (propositions 1 and 3); none is left when these span
    the space, for which at least d + 1 keys are needed. `tolerance` is relative to the largest singular value.
    """
    centred = keys - keys.mean(0)
    singular, right = torch.linalg.svd(centred, full_matrices=True)[1:]
    return right[(singular > tolerance * singular.max()).sum() :]


QUERIES: dict[str, Callable[[Tensor], Tensor]] = {
    "own": lambda q: q,
    "rolled": lambda q: q.roll(q.shape[1] // 2, 1),
    "mean": lambda q: q.mean(1, keepdim=True).expand_as(q),
}
"""Whose query a token reads with, of queries [batch, tokens, width]: as much work, and less and less its own."""

# Local residual -------------------------------------------------------------------------------------


def local_residual(
    v: Float[Tensor, "batch height width channels"], kernel: Float[Tensor, "batch channels 3 3"]
) -> Float[Tensor, "batch height width channels"]:
    """Every value replaced by the sum of its 3 x 3 neighbourhood, weighted by its picture's and channel's kernel.

    One grouped convolution with batch x channels groups; zeros outside the map (section on local modelling).
    """
    batch, height, width, channels = v.shape
    maps = v.movedim(-1, 1).reshape(1, batch * channels, height, width)
    mixed = F.conv2d(maps, kernel.reshape(-1, 1, 3, 3), padding=1, groups=batch * channels)
    return mixed.view(batch, channels, height, width).movedim(1, -1)


class KernelPredictor(nn.Sequential):
    """r = W2 gelu(W1 mean x): the 3 x 3 kernel of every channel of every picture, from its mean token.

    Both maps are grouped by heads; `0` and `2` are their names in official checkpoints.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(
            nn.Conv1d(width, width, 1, groups=heads),
            nn.GELU(),
            nn.Conv1d(width, 9 * width, 1, groups=heads),
        )

    def forward(
        self, x: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch channels 3 3"]:
        return (
            super()
            .forward(x.mean(1)[..., None])
            .unflatten(1, (-1, 9))[..., 0]
            .unflatten(-1, (3, 3))
        )


class SharedKernel(nn.Module):
    """One learned 3 x 3 kernel a channel for all pictures: the residual without its input-dependence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(width, 3, 3).uniform_(-1 / 3, 1 / 3))

    def forward(
        self, x: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch channels 3 3"]:
        return self.kernel.expand(len(x), -1, -1, -1)


# Layer ----------------------------------------------------------------------------------------------


class InlineAttention(nn.Module):
    """Multi-head attention over the tokens of a square map, with any of the operators and the local residual.

    Takes the place of the attention of a vision transformer: `[batch, tokens, width]` to the same.

    Args:
        width: channels.
        heads: number of heads; the published models have heads of 32.
        operator: "inline" (the method), or "linear", "softmax", "mean" to compare with.
        kernel: phi, a name in `KERNELS`; softmax and the mean take queries and keys as they are.
        residual: "sample" (the method's, one kernel for each picture), "shared" (one for all) or "none".
        class_tokens: tokens before those of the map; they attend and are attended to, the residual leaves
            them out.
        queries: whose query a token reads with: its "own", that of the token half the picture away
            ("rolled"), or the mean of all, which is one for all tokens ("mean"). The last two are placebos.

    Raises:
        ValueError: when the heads do not divide the width; for an unknown operator, kernel or residual.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        operator: str = "inline",
        kernel: str = "identity",
        residual: str = "sample",
        class_tokens: int = 0,
        queries: str = "own",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        residuals = {
            "sample": lambda: KernelPredictor(width, heads),
            "shared": lambda: SharedKernel(width),
            "none": lambda: None,
        }
        _known("operator", operator, OUTPUTS)
        _known("kernel", kernel, KERNELS)
        _known("residual", residual, residuals)
        _known("queries", queries, QUERIES)
        self.heads, self.operator, self.queries = heads, operator, queries
        self.class_tokens = class_tokens
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.phi = KERNELS[kernel if operator in ("inline", "linear") else "identity"](width)
        self.residual = residuals[residual]()

    def queries_keys_values(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> tuple[
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch heads tokens dim"],
        Float[Tensor, "batch heads tokens dim"],
    ]:
        """By head, phi applied to queries and keys."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.phi(q), self.phi(k)
        q = QUERIES[self.queries](q)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return q, k, v

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        visible: Bool[Tensor, "tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Attend, add the local residual, project.

        Args:
            visible: which keys each query may see, through the N x N scores; all when None. The residual
                is not masked.
        """
        q, k, v = self.queries_keys_values(x)
        scores, attend = SCORES[self.operator], OUTPUTS[self.operator]
        mixed = attend(q, k, v) if visible is None else scores(q, k, visible) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.residual is not None:
            own = v.transpose(1, 2).flatten(2)[:, self.class_tokens :]
            near = local_residual(self._on_map(own), self.residual(x)).flatten(1, 2)
            mixed = mixed + F.pad(near, (0, 0, self.class_tokens, 0))
        return self.proj(mixed)

    def scores(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """The weights of every query over all keys, without the residual."""
        q, k, _ = self.queries_keys_values(x)
        return SCORES[self.operator](q, k)

    @staticmethod
    def _on_map(
        tokens: Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch side side width"]:
        side = round(tokens.shape[1] ** 0.5)
        if side**2 != tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens are no square map: set class_tokens, or residual to 'none'"
            )
        return tokens.unflatten(1, (side, side))


def _known(what: str, name: str, names: dict) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} '{name}'; there are: {', '.join(names)}")


# Network --------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Linear, GELU, linear, on every token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, attention: nn.Module, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.mlp = Mlp(width, round(mlp_ratio * width))

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        visible: Bool[Tensor, "tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        x = x + self.attn(self.norm1(x), visible)
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class DeiTSize:
    """Width, depth and heads of a network, and the side of its pictures and patches in pixels."""

    width: int
    depth: int
    heads: int
    image: int
    patch: int = 16


SIZES = {
    "T": DeiTSize(192, 12, 6, 224),
    "S": DeiTSize(320, 12, 10, 288),
    "B": DeiTSize(384, 12, 12, 448),
}
"""InLine-DeiT as published: S and B trade width for resolution, and heads are 32 wide throughout."""


class InlineDeiT(nn.Module):
    """Patches, learned positions, blocks, norm, linear classifier; InLine-DeiT with its defaults.

    `InlineDeiT(SIZES["T"], 1000)` takes an official checkpoint by `load_state_dict`.

    Args:
        size: of the network; see `SIZES`.
        classes: number of classes.
        channels: of the pictures.
        mlp_ratio: hidden width of the MLP over width.
        class_token: classify by a token of its own; by the mean of all tokens when False.
        std: of the truncated normal that linear layers and embeddings start from.
        options: of `InlineAttention`: operator, kernel, residual, queries.

    Raises:
        ValueError: when the patch does not divide the picture.
    """

    def __init__(
        self,
        size: DeiTSize,
        classes: int,
        *,
        channels: int = 3,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        std: float = 0.02,
        **options: str | int,
    ) -> None:
        super().__init__()
        if size.image % size.patch:
            raise ValueError(f"patches of {size.patch} do not divide pictures of {size.image}")
        width, tokens = size.width, (size.image // size.patch) ** 2 + class_token
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(channels, width, size.patch, size.patch))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        attention = partial(
            InlineAttention, width, size.heads, class_tokens=int(class_token), **options
        )
        self.blocks = nn.ModuleList(Block(width, attention(), mlp_ratio) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self._start(std)

    def _start(self, std: float) -> None:
        """Truncated normals for linear layers and embeddings; convolutions as PyTorch has them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        for embedding in (self.cls_token, self.pos_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=std)

    def embed(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch tokens features"]:
        """What the first block reads."""
        x = self.patch_embed(pixels).flatten(2).mT
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed

    def forward(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        visible: Bool[Tensor, "tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Logits. `visible` masks the attention of every block; see `InlineAttention`."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x, visible)
        x = self.norm(x)
        return self.head(x.mean(1) if self.cls_token is None else x[:, 0])

    @torch.no_grad()
    def attention_inputs(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch tokens features"]]:
        """What the attention of every block reads, for looking at its queries and scores."""
        x, found = self.embed(pixels), []
        for block in self.blocks:
            found.append(block.norm1(x))
            x = block(x)
        return found
