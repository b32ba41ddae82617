"""Two small towers, one that reads pictures and one that reads captions, into one space (CLIP, 2103.00020).

Both are pre-norm transformers that give all their token states, [CLS] and patches or words, not a pooled
vector. What a method does inside the blocks it says in a `BlockHooks`: change the tokens before a block
(cross tokens, prompts), add a bias to the attention scores (sizes of merged tokens), drop or merge tokens
between attention and MLP, where it is given queries, keys and values. Masks on weights need no hook:
`torch.func.functional_call(model, masked_parameters, ...)` runs a tower on other weights.

Captions are padded on the right. The text tower is causal, so padding never reaches a real word.

Names of shapes: `batch`, `length` (tokens of a tower), `width`, `heads`, `dim` (width of a head), `joint`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.dense import causal_token_mask
from reattend.trunks.language import FeedForward


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one block, after the projection with its bias and before any scaling."""

    queries: Float[Tensor, "batch heads length dim"]
    keys: Float[Tensor, "batch heads length dim"]
    values: Float[Tensor, "batch heads length dim"]

    def maps(
        self, bias: Float[Tensor, "*of_scores"] | None = None
    ) -> Float[Tensor, "batch heads length length"]:
        """The attention maps, for looking at or for scoring tokens; `bias` as in `TowerAttention`."""
        scores = self.queries @ self.keys.mT / math.sqrt(self.queries.shape[-1])
        return (scores if bias is None else scores + bias).softmax(-1)


class BlockHooks:
    """What a method does inside a tower; this one does nothing. `layer` counts from 0.

    One tower calls, for every block in turn: `before`, `bias`, `between`. A method that merges tokens keeps
    its own account of their sizes in its instance, a fresh one for each forward pass.
    """

    def before(
        self, layer: int, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch changed width"]:
        """Tokens as they enter the block."""
        return x

    def bias(
        self, layer: int, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "*of_scores"] | None:
        """Added to the attention scores before the softmax, broadcast to [batch, heads, length, length].

        Of two dimensions at least: the logarithms of sizes are [1, length], or [batch, 1, 1, length].
        """
        return None

    def between(
        self, layer: int, x: Float[Tensor, "batch length width"], heads: Heads
    ) -> Float[Tensor, "batch kept width"]:
        """Tokens between attention and MLP, after the residual sum."""
        return x


NO_HOOKS = BlockHooks()


class TowerAttention(nn.Module):
    """softmax(q k^T / sqrt(dim) + bias) v, then an output projection; both projections have biases.

    Args:
        causal: whether a token reads those before it, and itself, alone.

    Raises:
        ValueError: when the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads, self.causal = heads, causal
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"], bias: Float[Tensor, "*of_scores"] | None
    ) -> tuple[Float[Tensor, "batch length width"], Heads]:
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if bias is not None and self.causal:
            seen = causal_token_mask(q.shape[-2], k.shape[-2], x.device)
            bias = torch.where(seen, bias, -torch.inf)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=self.causal and bias is None
        )
        return self.out(mixed.transpose(1, 2).flatten(2)), Heads(q, k, v)


class TowerBlock(nn.Module):
    """x + attention(LN(x)), the hook `between`, x + MLP(LN(x))."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = TowerAttention(width, heads, causal)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(
        self, x: Float[Tensor, "batch length width"], layer: int = 0, hooks: BlockHooks = NO_HOOKS
    ) -> Float[Tensor, "batch kept width"]:
        x = hooks.before(layer, x)
        mixed, heads = self.attention(self.attention_norm(x), hooks.bias(layer, x))
        x = hooks.between(layer, x + mixed, heads)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Tower(nn.Module):
    """Blocks and a last LayerNorm over embedded tokens; the two towers differ in how they embed."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TowerBlock(width, heads, causal) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def states(
        self, embedded: Float[Tensor, "batch length width"], hooks: BlockHooks = NO_HOOKS
    ) -> Float[Tensor, "batch kept width"]:
        """Token states after the last LayerNorm."""
        x = embedded
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, hooks)
        return self.norm(x)


class ImageTower(Tower):
    """A small ViT; [CLS] is the first token, then the patches row by row.

    Args:
        size, patch: sides of picture and patch in pixels.

    Raises:
        ValueError: when the patch does not divide the size.
    """

    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__(width, layers, heads, causal=False)
        if size % patch:
            raise ValueError(
                f"pictures of {size} pixels are not a whole number of {patch}-pixel patches"
            )
        self.patch = patch
        self.patches = nn.Linear(3 * patch**2, width)
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + (size // patch) ** 2, width))

    def embed(
        self, pixels: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch length channels"]:
        """States before the first block, of pictures as bytes 0..255."""
        scaled = (pixels.to(self.cls.dtype) - 127.5) / 127.5
        cut = F.unfold(scaled, self.patch, stride=self.patch).mT
        cls = self.cls.expand(len(pixels), 1, -1)
        return torch.cat([cls, self.patches(cut)], dim=1) + self.positions

    def forward(
        self, pixels: UInt8[Tensor, "batch 3 height width"], hooks: BlockHooks = NO_HOOKS
    ) -> Float[Tensor, "batch kept channels"]:
        return self.states(self.embed(pixels), hooks)


class TextTower(Tower):
    """A small causal transformer over captions of at most `length` tokens, [BOS] and [EOS] among them."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__(width, layers, heads, causal=True)
        self.words = nn.Parameter(0.02 * torch.randn(vocabulary, width))
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))

    def embed(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """States before the first block.

        Raises:
            ValueError: for captions longer than the tower has positions.
        """
        if ids.shape[1] > len(self.positions):
            raise ValueError(f"{ids.shape[1]} tokens, but positions for {len(self.positions)}")
        return F.embedding(ids, self.words) + self.positions[: ids.shape[1]]

    def forward(
        self, ids: Int[Tensor, "batch length"], hooks: BlockHooks = NO_HOOKS
    ) -> Float[Tensor, "batch kept width"]:
        return self.states(self.embed(ids), hooks)


class ImageTextModel(nn.Module):
    """Two towers and, on top of every token, one linear map a modality without bias to `joint` channels.

    `scale` is the factor of similarities in the logits, 1 / temperature: it is learned as its logarithm,
    starts at 1 / .07 and is clamped to 100 at most, as in CLIP.
    """

    def __init__(self, image: ImageTower, text: TextTower, joint: int) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.image_map = nn.Linear(image.norm.normalized_shape[0], joint, bias=False)
        self.text_map = nn.Linear(text.norm.normalized_shape[0], joint, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature, at most 100."""
        return self.log_scale.clamp(max=math.log(100)).exp()

    def image_tokens(
        self, pixels: UInt8[Tensor, "batch 3 height width"], hooks: BlockHooks = NO_HOOKS
    ) -> Float[Tensor, "batch length joint"]:
        """[CLS] and patches in the joint space, every token of length 1."""
        return F.normalize(self.image_map(self.image(pixels, hooks)), dim=-1)

    def text_tokens(
        self, ids: Int[Tensor, "batch length"], hooks: BlockHooks = NO_HOOKS
    ) -> Float[Tensor, "batch length joint"]:
        """Words, those of padding too, in the joint space, every token of length 1."""
        return F.normalize(self.text_map(self.text(ids, hooks)), dim=-1)


def last_words(
    tokens: Float[Tensor, "batch length joint"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch joint"]:
    """The token of [EOS], the last real one of each caption."""
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]
