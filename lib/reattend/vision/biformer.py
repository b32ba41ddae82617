"""Bi-level routing attention (BRA), the patterns it is compared with, and the BiFormer models.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (arXiv 2303.08810).
Official code: rayleizhu/BiFormer; its T, S and B checkpoints load with the name map
`attn.qkv.qkv -> attn.qkv`, `attn.wo -> attn.proj`.

The image is cut into S x S regions. Every region is routed to the k regions whose mean key answers
its mean query best, and its tokens attend to all tokens of those k regions and to nothing else. Here
a *pattern* says which keys each query sees: it maps queries, keys and values of an image,
`[batch, height, width, channels]` each, to the attended values. The baselines are other patterns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from reattend.trunks.vision import ChannelNorm

Pattern = Callable[..., Tensor]
"""Called as pattern(query, key, value, heads=, scale=) with images [batch, height, width, channels]."""

FULL = -2  # the official code's "top-k" of full attention with local context enhancement

# Regions ------------------------------------------------------------------------------------------


def partition(
    image: Float[Tensor, "batch height width channels"], rows: int, columns: int
) -> Float[Tensor, "batch regions tokens channels"]:
    """Cut an image into rows x columns regions, row by row, with their tokens row by row.

    Raises:
        ValueError: the image cannot be cut into regions of one size.
    """
    height, width = image.shape[1:3]
    if height % rows or width % columns:
        raise ValueError(f"{height} x {width} tokens cannot be cut into {rows} x {columns} regions")
    cells = image.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def unpartition(
    regions: Float[Tensor, "batch regions tokens channels"], rows: int, height: int, width: int
) -> Float[Tensor, "batch height width channels"]:
    """Put regions back into an image of height x width; undoes `partition`."""
    cells = regions.unflatten(2, (height // rows, -1)).unflatten(1, (rows, -1))
    return cells.transpose(2, 3).reshape(len(regions), height, width, -1)


def region_affinity(
    query: Float[Tensor, "batch regions tokens channels"],
    key: Float[Tensor, "batch regions tokens channels"],
) -> Float[Tensor, "batch regions regions"]:
    """A^r = Q^r (K^r)^T with means over the regions, over all channels; no gradient (section 3.2)."""
    return query.detach().mean(2) @ key.detach().mean(2).mT


def route(
    affinity: Float[Tensor, "batch regions regions"], topk: int, *, force_self: bool = False
) -> Int[Tensor, "batch regions topk"]:
    """I^r: the k regions of largest affinity for every region, best first.

    Args:
        force_self: count a region as its own best match, which the paper does not do.

    Raises:
        ValueError: there are fewer than `topk` regions.
    """
    regions = affinity.shape[-1]
    if not 1 <= topk <= regions:
        raise ValueError(f"top-k must be between 1 and the number of regions {regions}, got {topk}")
    if force_self:
        itself = torch.eye(regions, dtype=torch.bool, device=affinity.device)
        affinity = affinity.masked_fill(itself, math.inf)
    return affinity.topk(topk, dim=-1).indices


def gather_regions(
    tensor: Float[Tensor, "batch regions tokens channels"],
    index: Int[Tensor, "batch rows topk"],
) -> Float[Tensor, "batch rows gathered channels"]:
    """K^g or V^g: all tokens of the listed regions, one region after the other (equation 5)."""
    batch, rows, topk = index.shape
    first = torch.arange(batch, device=index.device)[:, None, None] * tensor.shape[1]
    # Rows of one long list: index_select is quicker here than indexing with two tensors.
    chosen = tensor.flatten(0, 1).index_select(0, (index + first).flatten())
    return chosen.view(batch, rows, topk * tensor.shape[2], -1)


def routed_mask(
    index: Int[Tensor, "batch regions topk"], tokens: int
) -> Bool[Tensor, "batch queries keys"]:
    """The same selection as a mask over all tokens, region after region: True = attend."""
    regions = index.shape[1]
    chosen = functional.one_hot(index, regions).bool().any(2)
    return chosen.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)


# Patterns -----------------------------------------------------------------------------------------


def attend(
    query: Float[Tensor, "batch groups queries channels"],
    key: Float[Tensor, "batch groups keys channels"],
    value: Float[Tensor, "batch groups keys channels"],
    *,
    heads: int,
    scale: float,
    mask: Bool[Tensor, "1 groups #queries keys"] | None = None,
) -> Float[Tensor, "batch groups queries channels"]:
    """Multi-head softmax attention inside every group; the groups are independent."""
    batch = len(query)
    folded = (
        x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    mixed = functional.scaled_dot_product_attention(*folded, attn_mask=mask, scale=scale)
    return mixed.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))


def attend_regions(
    query: Float[Tensor, "batch height width channels"],
    key: Float[Tensor, "batch height width channels"],
    value: Float[Tensor, "batch height width channels"],
    *,
    side: int,
    select: Callable[[Tensor, Tensor], Tensor],
    heads: int,
    scale: float,
) -> Float[Tensor, "batch height width channels"]:
    """Token-to-token attention over gathered regions (equations 5 and 6, without LCE).

    Args:
        side: S, regions a side.
        select: maps query and key regions to the indices `[batch, regions, topk]` of what they see.
    """
    height, width = query.shape[1:3]
    query, key, value = (partition(x, side, side) for x in (query, key, value))
    index = select(query, key)
    gathered = (gather_regions(x, index) for x in (key, value))
    return unpartition(attend(query, *gathered, heads=heads, scale=scale), side, height, width)


def routed(side: int, topk: int, *, force_self: bool = False) -> Pattern:
    """Bi-level routing attention: every region sees the k regions that answer it best."""

    def select(query: Tensor, key: Tensor) -> Tensor:
        return route(region_affinity(query, key), topk, force_self=force_self)

    return partial(attend_regions, side=side, select=select)


def fixed(side: int, index: Int[Tensor, "regions topk"]) -> Pattern:
    """Every region sees the regions of a table, whatever the image shows."""

    def select(query: Tensor, key: Tensor) -> Tensor:
        return index.to(query.device).expand(len(query), -1, -1)

    return partial(attend_regions, side=side, select=select)


def nearest_regions(side: int, topk: int) -> Int[Tensor, "regions topk"]:
    """The k regions nearest to each by the distance of centres, itself first; ties by number."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    distance = (places[:, None] - places).square().sum(-1)
    return distance.sort(dim=-1, stable=True).indices[:, :topk]


def random_regions(side: int, topk: int, generator: torch.Generator) -> Int[Tensor, "regions topk"]:
    """k different regions for each, drawn once."""
    return torch.rand(side**2, side**2, generator=generator).topk(topk, dim=-1).indices


def random_groups(side: int, size: int, generator: torch.Generator) -> Int[Tensor, "regions size"]:
    """The regions, dealt at random into groups of `size`; each sees its own group.

    A layer more lets no region hear from another group, unlike tables that are drawn for every layer.

    Raises:
        ValueError: the groups cannot be of one size.
    """
    if side**2 % size:
        raise ValueError(f"{side**2} regions cannot be dealt into groups of {size}")
    groups = torch.randperm(side**2, generator=generator).view(-1, size)
    index = torch.empty(side**2, size, dtype=torch.long)
    index[groups.flatten()] = groups.repeat_interleave(size, 0)
    return index


def dense(
    query: Float[Tensor, "batch height width channels"],
    key: Float[Tensor, "batch height width channels"],
    value: Float[Tensor, "batch height width channels"],
    *,
    heads: int,
    scale: float,
) -> Float[Tensor, "batch height width channels"]:
    """Full attention."""
    whole = (x.flatten(1, 2)[:, None] for x in (query, key, value))
    return attend(*whole, heads=heads, scale=scale).view(value.shape)


def window(
    query: Float[Tensor, "batch height width channels"],
    key: Float[Tensor, "batch height width channels"],
    value: Float[Tensor, "batch height width channels"],
    *,
    size: int,
    heads: int,
    scale: float,
    shifted: bool = False,
) -> Float[Tensor, "batch height width channels"]:
    """Attention inside size x size windows; `shifted` moves their grid by half a window (Swin).

    Shifted windows that reach over the border are split there: their parts do not see each other.

    Raises:
        ValueError: the size does not divide height and width.
    """
    height, width = query.shape[1:3]
    _check_divides("window", size, height, width)
    mask = None
    if shifted:
        query, key, value = (x.roll((-(size // 2),) * 2, (1, 2)) for x in (query, key, value))
        rows, columns = (
            torch.arange(n, device=query.device) >= n - size // 2 for n in (height, width)
        )
        part = (2 * rows[:, None] + columns)[None, :, :, None].float()
        part = partition(part, height // size, width // size)[..., 0]
        mask = part[..., :, None] == part[..., None, :]
    groups = (partition(x, height // size, width // size) for x in (query, key, value))
    mixed = attend(*groups, heads=heads, scale=scale, mask=mask)
    mixed = unpartition(mixed, height // size, height, width)
    return mixed.roll((size // 2,) * 2, (1, 2)) if shifted else mixed


def dilated(
    query: Float[Tensor, "batch height width channels"],
    key: Float[Tensor, "batch height width channels"],
    value: Float[Tensor, "batch height width channels"],
    *,
    interval: int,
    heads: int,
    scale: float,
) -> Float[Tensor, "batch height width channels"]:
    """Attention among tokens whose distance is a multiple of `interval` in both directions (LDA).

    Raises:
        ValueError: the interval does not divide height and width.
    """
    height, width = query.shape[1:3]
    _check_divides("interval", interval, height, width)

    def grouped(x: Tensor) -> Tensor:
        spread = x.unflatten(2, (-1, interval)).unflatten(1, (-1, interval))
        return spread.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)

    mixed = attend(*map(grouped, (query, key, value)), heads=heads, scale=scale)
    spread = mixed.unflatten(2, (height // interval, -1)).unflatten(1, (interval, interval))
    return spread.permute(0, 3, 1, 4, 2, 5).reshape(value.shape)


def sliding(
    query: Float[Tensor, "batch height width channels"],
    key: Float[Tensor, "batch height width channels"],
    value: Float[Tensor, "batch height width channels"],
    *,
    block: int,
    halo: int,
    heads: int,
    scale: float,
) -> Float[Tensor, "batch height width channels"]:
    """Blocks of queries see themselves and a halo around them (HaloNet); the padding is masked.

    Raises:
        ValueError: the block does not divide height and width.
    """
    height, width = query.shape[1:3]
    _check_divides("block", block, height, width)
    size = block + 2 * halo

    def around(x: Tensor) -> Tensor:
        columns = functional.unfold(x.permute(0, 3, 1, 2), size, padding=halo, stride=block)
        return columns.unflatten(1, (x.shape[-1], -1)).permute(0, 3, 2, 1)

    inside = around(query.new_ones(1, height, width, 1))[:, :, None, :, 0] > 0
    blocks = partition(query, height // block, width // block)
    mixed = attend(blocks, around(key), around(value), heads=heads, scale=scale, mask=inside)
    return unpartition(mixed, height // block, height, width)


def _check_divides(name: str, size: int, height: int, width: int) -> None:
    if height % size or width % size:
        raise ValueError(f"{name} {size} does not divide {height} x {width} tokens")


# The module ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Wo(pattern(Q, K, V) + LCE(V)): multi-head attention with local context enhancement.

    Args:
        width: channels C.
        pattern: which keys a query sees.
        scale: factor on the scores. C^(-1/2), not the usual (C / heads)^(-1/2), when None: that is
            what the official BRA does.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        lce: side of the depth-wise convolution LCE; 0 leaves it out.
        lce_of: what LCE convolves; "input" (of this module) in the official full attention.

    Raises:
        ValueError: the heads do not divide the width, or lce is even.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        pattern: Pattern,
        *,
        scale: float | None = None,
        qkv_bias: bool = True,
        lce: int = 5,
        lce_of: Literal["value", "input"] = "value",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads cannot share {width} channels evenly")
        if lce and lce % 2 == 0:
            raise ValueError(f"lce must be odd, or 0 for none, got {lce}")
        self.heads, self.pattern, self.lce_of = heads, pattern, lce_of
        self.scale = width**-0.5 if scale is None else scale
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.lepe = depthwise(width, lce) if lce else None

    def project(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch height width channels"], ...]:
        """Queries, keys and values."""
        return self.qkv(x.permute(0, 2, 3, 1)).chunk(3, dim=-1)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        query, key, value = self.project(x)
        mixed = self.pattern(query, key, value, heads=self.heads, scale=self.scale)
        if self.lepe is not None:
            local = self.lepe(value.permute(0, 3, 1, 2) if self.lce_of == "value" else x)
            mixed = mixed + local.permute(0, 2, 3, 1)
        return self.proj(mixed).permute(0, 3, 1, 2)


def depthwise(width: int, size: int) -> nn.Conv2d:
    """A size x size convolution of every channel by itself."""
    return nn.Conv2d(width, width, size, padding=size // 2, groups=width)


def routed_regions(
    attention: Attention, x: Float[Tensor, "batch channels height width"], side: int, topk: int
) -> Int[Tensor, "batch regions topk"]:
    """The regions that an attention layer routes to on its input x."""
    query, key, _ = (partition(part, side, side) for part in attention.project(x))
    return route(region_affinity(query, key), topk)


# Models -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + DWConv3x3(x), then x + attention(LN x), then x + MLP(LN x) (the paper's block).

    Args:
        ratio: hidden width of the MLP / width.
        position: whether the block begins with the convolution, the only code of positions.
        drop_path: probability that a half-block is skipped for an image in training.
    """

    def __init__(
        self, width: int, attention: Attention, *, ratio: int, position: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_embed = depthwise(width, 3) if position else None
        self.norm1 = ChannelNorm(width, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        # The idle layer keeps the numbers of the official ones.
        widen, narrow = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.mlp = nn.Sequential(widen, nn.Identity(), nn.GELU(), narrow)
        self.drop_path = drop_path

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x + self._kept(self.attn(self.norm1(x)))
        mixed = self.mlp(self.norm2(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + self._kept(mixed)

    def _kept(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep) / keep


class Layout(NamedTuple):
    """Widths and depths of a pyramid; `swin`: plain patches and merging, no position convolution."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    ratio: int = 3
    swin: bool = False


VARIANTS = {
    "T": Layout((64, 128, 256, 512), (2, 2, 8, 2)),
    "S": Layout((64, 128, 256, 512), (4, 4, 18, 4)),
    "B": Layout((96, 192, 384, 768), (4, 4, 18, 4)),
    "STL": Layout((96, 192, 384, 768), (2, 2, 6, 2), ratio=4, swin=True),
}


class BiFormer(nn.Module):
    """The pyramid of the paper: four stages at 1/4, 1/8, 1/16 and 1/32 of the resolution.

    Args:
        side: regions a side, in every stage.
        topks: routed regions of each stage; FULL (-2) is full attention, built as in the official
            code with 8 heads, no bias, scale (C / 8)^(-1/2) and LCE of its input.
        drop_path: of the last block; it rises linearly from 0.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        classes: int = 1000,
        channels: int = 3,
        side: int = 7,
        topks: Sequence[int] = (1, 4, 16, FULL),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        widths, depths, ratio, swin = layout
        entry = _patches(channels, widths[0]) if swin else _overlapping(channels, widths[0])
        merge = _merge if swin else _shrink
        between = (merge(narrow, wide) for narrow, wide in itertools.pairwise(widths))
        self.downsample_layers = nn.ModuleList([entry, *between])
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for width, depth, topk in zip(widths, depths, topks, strict=True):
            blocks = (
                Block(
                    width,
                    _attention(width, side, topk),
                    ratio=ratio,
                    position=not swin,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            )
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        self.apply(_initialise)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        x = images
        for shrink, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(shrink(x))
        return self.head(self.norm(x).mean((2, 3)))


def _attention(width: int, side: int, topk: int) -> Attention:
    if topk != FULL:
        return Attention(width, width // 32, routed(side, topk))
    usual = (width / 8) ** -0.5
    return Attention(width, 8, dense, scale=usual, qkv_bias=False, lce_of="input")


def _shrink(width: int, wider: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, wider, 3, 2, padding=1), nn.BatchNorm2d(wider))


def _overlapping(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*_shrink(channels, width // 2), nn.GELU(), *_shrink(width // 2, width))


def _merge(width: int, wider: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, wider, 2, 2))


def _patches(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 4, 4), nn.BatchNorm2d(width))


def _initialise(module: nn.Module) -> None:
    """Linear layers start from a truncated normal of 0.02, without bias; others as torch has them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# Cost ---------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Multiply-adds of one attention layer on one image."""

    projections: float
    routing: float
    tokens: float

    @property
    def attention(self) -> float:
        """Without the projections, which every pattern pays alike."""
        return self.routing + self.tokens


def bra_cost(tokens: int, side: float | int, topk: int, channels: int) -> Cost:
    """Section 3.3: 4 HW C^2, S^4 C and 2 HW k (HW / S^2) C; the paper's 3 HW C^2 leaves Wo out."""
    keys = topk * tokens / side**2
    return Cost(4 * tokens * channels**2, side**4 * channels, 2 * tokens * keys * channels)


def dense_cost(tokens: int, channels: int) -> Cost:
    """Full attention: every token sees all HW."""
    return Cost(4 * tokens * channels**2, 0, 2 * tokens**2 * channels)


def best_side(tokens: int, topk: int) -> float:
    """S* = (k (HW)^2)^(1/6), where S^4 + 2 k (HW)^2 / S^2 is smallest."""
    return (topk * tokens**2) ** (1 / 6)


def least_attention(tokens: int, topk: int, channels: int) -> float:
    """The attention's multiply-adds at S*: 3 k^(2/3) (HW)^(4/3) C."""
    return 3 * topk ** (2 / 3) * tokens ** (4 / 3) * channels
