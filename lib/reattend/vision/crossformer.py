"""CrossFormer: cross-scale embedding, attention in short and long groups, position bias from an MLP.

Wang et al., "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention" (arXiv
2108.00154). Official code: cheerss/CrossFormer; `CrossFormer` has the parameter names of its
checkpoints (with `USE_ACL` off: on, it is CrossFormer++).

Attention runs inside groups of G x G tokens: neighbours (SDA) in one block, tokens a fixed interval
apart (LDA) in the next. Attention modules here take and give maps `[batch, channels, height, width]`,
so that each fits a `VisionTrunk` or another network of maps; the attentions that the paper compares
with are among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.trunks.vision import ChannelNorm

Position = Literal["dynamic", "table", "none"]
AttentionFactory = Callable[[int, int, int, int], nn.Module]
"""Called with width, heads, interval of the stage and number of the block in its stage."""

# Cross-scale embedding (section 3.1) --------------------------------------------------------------


def channel_shares(width: int, kernels: int) -> list[int]:
    """How many channels each kernel gets: half, a quarter, ...; the last as many as the one before.

    Raises:
        ValueError: the width cannot be halved so often.
    """
    if width % 2 ** (kernels - 1):
        raise ValueError(
            f"width {width} cannot be shared by {kernels} kernels: halve it {kernels - 1} times"
        )
    return [width >> min(i + 1, kernels - 1) for i in range(kernels)]


def cross_scale_convolutions(
    inputs: int, width: int, kernels: Sequence[int], stride: int
) -> nn.ModuleList:
    """One convolution a kernel, all on the same grid: padding (kernel - stride) / 2.

    Raises:
        ValueError: a kernel is smaller than the stride or cannot be centred on it.
    """
    if any(kernel < stride or (kernel - stride) % 2 for kernel in kernels):
        raise ValueError(
            f"kernels {tuple(kernels)} must exceed the stride {stride} by even numbers"
        )
    shares = channel_shares(width, len(kernels))
    return nn.ModuleList(
        nn.Conv2d(inputs, share, kernel, stride, padding=(kernel - stride) // 2)
        for share, kernel in zip(shares, kernels, strict=True)
    )


class PatchEmbedding(nn.Module):
    """Pixels to tokens: every token concatenates patches of several sizes around one centre, then LN."""

    def __init__(self, inputs: int, width: int, kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        self.projs = cross_scale_convolutions(inputs, width, kernels, stride)
        self.norm = ChannelNorm(width)

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        return self.norm(torch.cat([convolve(x) for convolve in self.projs], 1))


class PatchMerging(nn.Module):
    """LN, then the same between two stages: twice the channels, half the side."""

    def __init__(self, width: int, kernels: Sequence[int]) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.reductions = cross_scale_convolutions(width, 2 * width, kernels, 2)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        x = self.norm(x)
        return torch.cat([convolve(x) for convolve in self.reductions], 1)


# Groups (section 3.2.1) ---------------------------------------------------------------------------


def grouped(
    x: Float[Tensor, "batch height width channels"], size: int, interval: int = 1
) -> Float[Tensor, "batch groups tokens channels"]:
    """Deal a map into groups of size x size tokens that lie `interval` apart in both directions.

    Interval 1 gives windows of adjacent tokens (SDA). With a larger interval (LDA) the map is cut into
    squares of size * interval tokens a side, and tokens of one remainder in a square form a group.

    Raises:
        ValueError: size * interval does not divide height and width: pad the map first.
    """
    height, width = x.shape[1:3]
    square = size * interval
    if height % square or width % square:
        raise ValueError(f"{square} (size x interval) does not divide {height} x {width} tokens")
    cells = x.unflatten(2, (-1, size, interval)).unflatten(1, (-1, size, interval))
    return cells.permute(0, 1, 4, 3, 6, 2, 5, 7).flatten(5, 6).flatten(1, 4)


def ungrouped(
    groups: Float[Tensor, "batch groups tokens channels"],
    size: int,
    interval: int,
    height: int,
    width: int,
) -> Float[Tensor, "batch height width channels"]:
    """Put groups back into a map of height x width; undoes `grouped`."""
    tall, wide = height // (size * interval), width // (size * interval)
    cells = groups.unflatten(2, (size, size)).unflatten(1, (tall, wide, interval, interval))
    return cells.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(len(groups), height, width, -1)


# Position bias (section 3.2.2) --------------------------------------------------------------------


@lru_cache(maxsize=64)
def offsets(size: int) -> Float[Tensor, "pairs 2"]:
    """The (2 size - 1)^2 offsets (rows, columns) between two tokens of a group, row by row."""
    steps = torch.arange(1 - size, size, dtype=torch.float32, device="cpu")
    return torch.cartesian_prod(steps, steps)


@lru_cache(maxsize=64)
def offset_index(size: int) -> Int[Tensor, "queries keys"]:
    """Which of `offsets(size)` leads from each key to each query of a group."""
    places = torch.cartesian_prod(*[torch.arange(size, device="cpu")] * 2)
    rows, columns = (places[:, None] - places + size - 1).unbind(-1)
    return rows * (2 * size - 1) + columns


class DynamicPositionBias(nn.Module):
    """An MLP from an offset to the bias of each head (DPB).

    Args:
        hidden: width of its three hidden steps.
        residual: add each hidden step to its input; off in all released models.

    Attributes:
        clamp: offsets beyond it are cut to it; infinite unless set.
    """

    def __init__(self, heads: int, hidden: int, *, residual: bool = False) -> None:
        super().__init__()
        self.residual, self.clamp = residual, math.inf
        self.pos_proj = nn.Linear(2, hidden)
        steps = (
            nn.Sequential(nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, outputs))
            for outputs in (hidden, hidden, heads)
        )
        self.pos1, self.pos2, self.pos3 = steps

    def forward(self, offset: Float[Tensor, "*pairs 2"]) -> Float[Tensor, "*pairs heads"]:
        """Biases of any offsets, in tokens, whole or not."""
        x = self.pos_proj(offset.clamp(-self.clamp, self.clamp))
        for step in (self.pos1, self.pos2):
            x = x + step(x) if self.residual else step(x)
        return self.pos3(x)

    def group(self, size: int) -> Float[Tensor, "heads queries keys"]:
        """The bias inside a group of size x size tokens; every offset is computed once."""
        values = self(offsets(size).to(self.pos_proj.weight))
        return values[offset_index(size)].movedim(-1, 0)


class PositionTable(nn.Module):
    """A learned bias for each offset and head inside groups of size x size (RPB, as in Swin)."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, 2 * size - 1, 2 * size - 1))

    def group(self, size: int) -> Float[Tensor, "heads queries keys"]:
        """The bias inside a group; for another size than its own the table is resized (bicubic)."""
        table = self.table
        if 2 * size - 1 != table.shape[-1]:
            side = (2 * size - 1,) * 2
            table = F.interpolate(table[None], side, mode="bicubic", align_corners=True)[0]
        return table.flatten(1)[:, offset_index(size)]


# Attention ----------------------------------------------------------------------------------------


class GroupAttention(nn.Module):
    """Multi-head attention inside groups of a map: SDA, or LDA where the interval exceeds 1.

    On a map that is no larger than a group, the group is the whole map, as in the official code. Maps
    are padded at the bottom and the right; padded keys are not seen.

    Args:
        width: channels; `heads` must divide them.
        size: G, tokens a side of a group.
        interval: I, between the tokens of a group.
        position: bias by DPB, by a table, or none.
        hidden: width of the DPB; a sixteenth of the width (the code's; the paper says a quarter),
            at least 4, when None.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        size: int,
        interval: int = 1,
        *,
        position: Position = "dynamic",
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide the width {width}")
        self.heads, self.size, self.interval = heads, size, interval
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.pos: DynamicPositionBias | PositionTable | None = None
        if position == "dynamic":
            self.pos = DynamicPositionBias(heads, hidden or max(4, width // 16))
        elif position == "table":
            self.pos = PositionTable(heads, size)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        x = x.movedim(1, -1)
        height, width = x.shape[1:3]
        size, interval = self.groups_on(height, width)
        down, right = -height % (size * interval), -width % (size * interval)
        padded = F.pad(x, (0, 0, 0, right, 0, down))
        groups = grouped(padded, size, interval)
        bias = None if self.pos is None else self.pos.group(size)
        seen = None
        if down or right:
            inside = F.pad(x.new_ones(1, height, width, 1), (0, 0, 0, right, 0, down))
            seen = grouped(inside, size, interval)[0, :, None, :, 0] > 0
        mixed = self.attend(groups, bias, seen)
        mixed = ungrouped(mixed, size, interval, height + down, width + right)
        return mixed[:, :height, :width].movedim(-1, 1)

    def groups_on(self, height: int, width: int) -> tuple[int, int]:
        """Size and interval of the groups on a map."""
        if min(height, width) <= self.size:
            return min(height, width), 1
        return self.size, self.interval

    def attend(
        self,
        groups: Float[Tensor, "batch groups tokens channels"],
        bias: Float[Tensor, "*groups heads tokens tokens"] | None,
        seen: Bool[Tensor, "groups rows tokens"] | None = None,
    ) -> Float[Tensor, "batch groups tokens channels"]:
        """softmax(Q K^T / sqrt(d) + B) V in every group, and the output projection (section 3.2.1).

        `seen` says which keys count, in one row for all queries of a group or in a row for each.
        """
        q, k, v = self.qkv(groups).unflatten(-1, (3, self.heads, -1)).movedim(-2, 2).unbind(-2)
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -math.inf)
        mixed = scores.softmax(-1) @ v
        return self.proj(mixed.transpose(2, 3).flatten(3))


class ShiftedWindowAttention(GroupAttention):
    """Windows of adjacent tokens, moved by half a window; parts across the border do not see each other.

    Raises:
        ValueError: the size does not divide height and width.
    """

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        height, width = x.shape[2:]
        size, _ = self.groups_on(height, width)
        if size == min(height, width):
            return super().forward(x)
        shift = size // 2
        rows, columns = (torch.arange(n, device=x.device) >= n - shift for n in (height, width))
        part = (2 * rows[:, None] + columns).to(x.dtype)[None, :, :, None]
        part = grouped(part, size)[0, :, :, 0]
        moved = grouped(x.movedim(1, -1).roll((-shift, -shift), (1, 2)), size)
        bias = None if self.pos is None else self.pos.group(size)
        mixed = self.attend(moved, bias, part[:, :, None] == part[:, None, :])
        mixed = ungrouped(mixed, size, 1, height, width).roll((shift, shift), (1, 2))
        return mixed.movedim(-1, 1)


class RandomGroupAttention(GroupAttention):
    """Groups of as many tokens, dealt at random once: LDA without its interval, but with its reach.

    As in LDA every group takes equally many tokens of every SDA window, so that SDA and these groups in turns
    connect all tokens of the map. The bias is that of LDA: an MLP of the offset on the map over the interval.

    Args:
        side: tokens a side of the maps it takes.
        seed: of the deal.

    Raises:
        ValueError: the windows of size x size tokens do not tile the map, or their number does not divide
            that of a window's tokens.
    """

    def __init__(
        self, width: int, heads: int, size: int, interval: int, *, side: int, seed: int, **options
    ):
        super().__init__(width, heads, size, interval, **options)
        numbers = torch.arange(float(side**2), dtype=torch.float64).view(1, side, side, 1)
        windows = grouped(numbers, size)[0, :, :, 0].long()
        groups, tokens = windows.shape
        if tokens % groups:
            raise ValueError(
                f"{tokens} tokens of a window cannot be dealt evenly to {groups} groups"
            )
        generator = torch.Generator().manual_seed(seed)
        dealt = windows.gather(1, torch.rand(windows.shape, generator=generator).argsort(1))
        order = dealt.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1).sort(1).values
        self.register_buffer("order", order, persistent=False)
        places = torch.stack([order // side, order % side], -1).float()
        between = (places[:, :, None] - places[:, None]) / interval
        self.register_buffer("between", between, persistent=False)

    def forward(
        self, x: Float[Tensor, "batch channels side side"]
    ) -> Float[Tensor, "batch channels side side"]:
        flat = x.flatten(2).mT
        groups = flat.index_select(1, self.order.flatten()).unflatten(1, self.order.shape)
        bias = None if self.pos is None else self.pos(self.between.to(x)).movedim(-1, 1)
        mixed = self.attend(groups, bias).flatten(1, 2)
        back = self.order.flatten().argsort()
        return mixed.index_select(1, back).mT.unflatten(2, x.shape[2:])


class SpatialReductionAttention(nn.Module):
    """Every token attends to the map shrunk by a convolution (PVT), with the bias of the offsets.

    Args:
        reduction: how much smaller the side of the map of keys is; it must divide height and width.
        hidden: as in `GroupAttention`.
    """

    def __init__(
        self, width: int, heads: int, reduction: int, *, hidden: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, reduction, reduction)
        self.norm = nn.LayerNorm(width)
        self.pos = DynamicPositionBias(heads, hidden or max(4, width // 16))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        height, width = x.shape[2:]
        q = self.q(x.flatten(2).mT).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        small = self.norm(self.sr(x).flatten(2).mT)
        k, v = self.kv(small).unflatten(-1, (2, self.heads, -1)).movedim(-2, 1).unbind(-2)
        between = reduced_offsets(height, width, self.reduction).to(x) / self.reduction
        scores = (q * q.shape[-1] ** -0.5) @ k.mT + self.pos(between).movedim(-1, 0)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(mixed).mT.unflatten(2, (height, width))


@lru_cache(maxsize=16)
def reduced_offsets(height: int, width: int, reduction: int) -> Float[Tensor, "queries keys 2"]:
    """Offsets from the centres of reduction x reduction patches to tokens, in tokens."""
    sides = [torch.arange(n, dtype=torch.float32, device="cpu") for n in (height, width)]
    centres = [s[::reduction] + (reduction - 1) / 2 for s in sides]
    return torch.cartesian_prod(*sides)[:, None] - torch.cartesian_prod(*centres)


def lsda(size: int = 7, **options) -> AttentionFactory:
    """SDA and LDA in turns, SDA first in every stage; `options` are those of `GroupAttention`."""

    def make(width: int, heads: int, interval: int, block: int) -> nn.Module:
        return GroupAttention(width, heads, size, interval if block % 2 else 1, **options)

    return make


# The model ----------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two linear layers with GELU between, on the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(LN(x)), x + MLP(LN(x)) on a map.

    Args:
        drop_path: probability that a half-block is skipped for an image in training.
    """

    def __init__(self, width: int, attention: nn.Module, *, ratio: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1, self.attn = ChannelNorm(width), attention
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, ratio * width)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1))

    def _kept(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return x
        keep = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(keep) / keep


class Stage(nn.Module):
    """Blocks of one resolution, then the merging to the next, if there is one."""

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks, self.downsample = nn.Sequential(*blocks), downsample

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class Layout(NamedTuple):
    """Width of the first stage; blocks and heads by stage; drop path of the last block."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    drop_path: float = 0.0


VARIANTS = {
    "T": Layout(64, (1, 1, 8, 6), (2, 4, 8, 16), 0.1),
    "S": Layout(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "B": Layout(96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "L": Layout(128, (2, 2, 18, 2), (4, 8, 16, 32), 0.5),
}


class CrossFormer(nn.Module):
    """The pyramid of the paper: embedding, stages of twice the channels at half the side, LN, mean, linear.

    Args:
        kernels: of the embedding; the first is its stride unless `stride` says otherwise.
        merges: kernels of the embeddings between stages.
        intervals: of LDA, by stage.
        ratio: hidden width of the MLPs / width.
        std: of the truncated normal from which linear layers start.
        attention: of every block; LSDA with groups of 7 x 7 when None.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        classes: int = 1000,
        channels: int = 3,
        kernels: Sequence[int] = (4, 8, 16, 32),
        stride: int | None = None,
        merges: Sequence[int] = (2, 4),
        intervals: Sequence[int] = (8, 4, 2, 1),
        ratio: int = 4,
        std: float = 0.02,
        attention: AttentionFactory | None = None,
    ) -> None:
        super().__init__()
        attention = attention or lsda()
        width, depths, heads, drop_path = layout
        self.patch_embed = PatchEmbedding(channels, width, kernels, stride or kernels[0])
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for number, depth in enumerate(depths):
            wide, last = width << number, number == len(depths) - 1
            blocks = [
                Block(
                    wide,
                    attention(wide, heads[number], intervals[number], block),
                    ratio=ratio,
                    drop_path=next(rates),
                )
                for block in range(depth)
            ]
            self.layers.append(Stage(blocks, None if last else PatchMerging(wide, merges)))
        self.norm = ChannelNorm(wide)
        self.head = nn.Linear(wide, classes)
        self.apply(partial(_initialise, std=std))

    def features(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        """The map after the last stage and its norm."""
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.features(images).mean((2, 3)))


def _initialise(module: nn.Module, std: float) -> None:
    """Linear layers start from a truncated normal (within 2), without bias; others as torch has them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)


# Cost and reach -----------------------------------------------------------------------------------


def group_cost(height: int, width: int, size: int, channels: int) -> int:
    """Multiply-adds of Q K^T and A V in one block, SDA or LDA: 2 H W G^2 C (section 3.2.1)."""
    return 2 * height * width * size**2 * channels


def dense_cost(height: int, width: int, channels: int) -> int:
    """The same of attention among all tokens: 2 (H W)^2 C."""
    return 2 * (height * width) ** 2 * channels
