"""Blocked local self-attention with halos, and the HaloNet family (arXiv 2103.12731).

A map of H x W pixels is cut into b x b blocks. All queries of a block share one window: the block
and h pixels around it, m = b + 2h on a side (section on blocked local self-attention). Extremes:

    b = 1, h = (k - 1) / 2    stand-alone self-attention (SASA): a k x k window around every pixel
    b = H = W, h = 0          global attention
    h = 0                     attention in non-overlapping windows

A window is the product of an interval of rows and an interval of columns, and so is everything that
depends on positions: relative logits and masks are written axis by axis and meet in one sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# Blocks and windows -------------------------------------------------------------------------------


def split_blocks(
    x: Float[Tensor, "*batch height width dim"], block: int
) -> Float[Tensor, "*batch rows columns block block dim"]:
    """Cut a map into its block x block blocks.

    Raises:
        ValueError: when the block does not divide the map.
    """
    height, width = x.shape[-3:-1]
    if block < 1 or height % block or width % block:
        raise ValueError(f"a block of {block} does not divide a map of {height} x {width}")
    split = x.unflatten(-2, (width // block, block)).unflatten(-4, (height // block, block))
    return split.transpose(-4, -3)


def join_blocks(
    x: Float[Tensor, "*batch rows columns block block dim"],
) -> Float[Tensor, "*batch height width dim"]:
    """Put blocks back into a map; the inverse of `split_blocks`."""
    return x.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


def window_index(
    height: int, width: int, block: int, halo: int, wrap: bool = False
) -> Int[Tensor, "rows columns window window"]:
    """Places of every block's window in the flattened map, which is padded by `halo` on all sides.

    With `wrap`: places in the map itself, where the halo repeats the pixels of its own block.
    """
    inner = torch.arange(block + 2 * halo)
    if wrap:
        inner = (inner - halo) % block
    down, across = (torch.arange(0, size, block)[:, None] + inner for size in (height, width))
    length = width if wrap else width + 2 * halo
    return down[:, None, :, None] * length + across[None, :, None, :]


def gather_windows(
    x: Float[Tensor, "*batch height width dim"], block: int, halo: int, wrap: bool = False
) -> Float[Tensor, "*batch rows columns window window dim"]:
    """The haloed neighbourhood of every block, zero outside the map.

    With `wrap` the halo repeats the pixels of its own block: as many keys, and none from outside.
    A copy by index rather than a view: its backward pass is three times as fast as that of two
    `Tensor.unfold`, and the products that follow would copy a view anyway.
    """
    height, width = x.shape[-3:-1]
    places = window_index(height, width, block, halo, wrap).to(x.device)
    padded = x if wrap else F.pad(x, (0, 0, halo, halo, halo, halo))
    return padded.flatten(-3, -2).index_select(-2, places.flatten()).unflatten(-2, places.shape)


# Positions, one axis at a time --------------------------------------------------------------------


def axis_mask(
    size: int,
    block: int,
    halo: int,
    stride: int = 1,
    reach: int | None = None,
    padding: bool = False,
) -> Bool[Tensor, "blocks queries window"]:
    """Which window positions the queries of every block may attend to, along one axis.

    Args:
        size: pixels of the map along the axis.
        stride: the queries of a block stand at its pixels 0, stride, 2 stride, ...
        reach: furthest key of a query in pixels; None: the whole window. With reach = halo the
            windows are those of SASA, whatever the block.
        padding: whether keys outside the map may be attended to.
    """
    starts = torch.arange(0, size, block)[:, None, None]
    queries = starts + torch.arange(0, block, stride)[:, None]
    keys = starts + torch.arange(-halo, block + halo)
    allowed = ((keys >= 0) & (keys < size)) | padding
    if reach is not None:
        return allowed & ((keys - queries).abs() <= reach)
    return allowed.expand(-1, queries.shape[1], -1)


def relative_rows(
    table: Float[Tensor, "offsets dim"], block: int, window: int, stride: int = 1
) -> Float[Tensor, "queries window dim"]:
    """Row `key - query + window - 1` of a table of relative positions, for every pair on one axis.

    Positions count from the start of the window for keys and from the start of the block for
    queries: the shift between the two, `halo`, is a constant that the table absorbs. Strided
    queries keep their true coordinates.
    """
    keys, queries = torch.arange(window), torch.arange(0, block, stride)
    return table[(keys - queries[:, None] + window - 1).to(table.device)]


# Attention ----------------------------------------------------------------------------------------


def halo_attention(
    queries: Float[Tensor, "batch heads query_height query_width dim"],
    keys: Float[Tensor, "batch heads height width dim"],
    values: Float[Tensor, "batch heads height width value_dim"],
    block: int,
    halo: int,
    tables: Float[Tensor, "2 offsets dim"] | None = None,
    *,
    reach: int | None = None,
    mask_padding: bool = True,
    wrap: bool = False,
    scale: float | None = None,
    scale_relative: bool = False,
) -> Float[Tensor, "batch heads query_height query_width value_dim"]:
    """Softmax attention of every block's queries over the block's haloed window.

        logit = scale q·k + q·height_rel[y' - y + m - 1] + q·width_rel[x' - x + m - 1]

    Queries may be sampled with a stride (section on attention downsampling): on a map s times
    smaller than that of the keys, query (i, j) stands at pixel (s i, s j).

    Args:
        tables: height and width embeddings of 2m - 1 relative positions; None: no positions.
        reach: further limit, in pixels around each query; see `axis_mask`.
        mask_padding: leave keys outside the map out; else they weigh in with zero values.
        wrap: the halo repeats the pixels of its own block: same cost, nothing new to see (a placebo).
        scale: of q·k; 1 / sqrt(dim) when None. The paper has none: pass 1.
        scale_relative: scale the relative logits too.

    Raises:
        ValueError: when the block does not divide the map or the stride the block, or when the
            tables do not fit the window.
    """
    stride = _stride(queries.shape[2:4], keys.shape[2:4], block)
    window = block + 2 * halo
    if tables is not None and tables.shape[1] != 2 * window - 1:
        raise ValueError(
            f"a window of {window} needs {2 * window - 1} offsets, got {tables.shape[1]}"
        )
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    own = split_blocks(queries, block // stride)
    near, read = (gather_windows(x, block, halo, wrap).flatten(-3, -2) for x in (keys, values))
    logits = scale * own.flatten(-3, -2) @ near.mT
    if tables is not None or mask_padding or reach is not None:
        rows, columns = (
            axis_mask(size, block, halo, stride, reach, wrap or not mask_padding).to(keys.device)
            for size in keys.shape[2:4]
        )
        relative = scale if scale_relative else 1.0
        down = _axis_logits(own * relative, tables, 0, block, window, stride)
        across = _axis_logits(own * relative, tables, 1, block, window, stride)
        down = down.masked_fill(~rows[:, None, :, None], -math.inf)
        across = across.masked_fill(~columns[None, :, None, :], -math.inf)
        logits = logits.view(*own.shape[:-1], window, window)
        logits = (logits + down[..., None] + across[..., None, :]).flatten(-2).flatten(-3, -2)
    attended = logits.softmax(-1) @ read
    return join_blocks(attended.unflatten(-2, own.shape[-3:-1]))


def _stride(queries: Sequence[int], keys: Sequence[int], block: int) -> int:
    """Stride of the queries, from the sizes of both maps."""
    stride = keys[0] // queries[0]
    if (queries[0] * stride, queries[1] * stride) != tuple(keys):
        raise ValueError(f"queries on {tuple(queries)} are no even sample of keys on {tuple(keys)}")
    if keys[0] % block or keys[1] % block:
        raise ValueError(f"a block of {block} does not divide a map of {keys[0]} x {keys[1]}")
    if block % stride:
        raise ValueError(f"a stride of {stride} does not divide a block of {block}")
    return stride


def _axis_logits(
    own: Float[Tensor, "batch heads rows columns y x dim"],
    tables: Float[Tensor, "2 offsets dim"] | None,
    axis: int,
    block: int,
    window: int,
    stride: int,
) -> Float[Tensor, "batch heads rows columns y x window"]:
    """q·r along the rows (axis 0) or the columns (axis 1) of the window; zeros without tables."""
    if tables is None:
        return own.new_zeros(*own.shape[:-1], window)
    embedded = relative_rows(tables[axis], block, window, stride)
    pattern = ("...yxd,ymd->...yxm", "...yxd,xmd->...yxm")[axis]
    return torch.einsum(pattern, own, embedded)


class HaloAttention(nn.Module):
    """Multi-head halo attention on a map; projections without biases, positions shared by heads.

    Args:
        inputs: channels of the map, and total width of queries and keys.
        heads: number of heads.
        block, halo: b and h in pixels.
        values: total width of the values, and channels of the output; `inputs` when None.
        stride: of the queries; the output map is so many times smaller.
        relative: learn relative positions.
        reach, mask_padding, wrap, scale_relative: see `halo_attention`.

    Raises:
        ValueError: when the heads do not divide the widths.
    """

    def __init__(
        self,
        inputs: int,
        heads: int,
        block: int,
        halo: int,
        *,
        values: int | None = None,
        stride: int = 1,
        relative: bool = True,
        reach: int | None = None,
        mask_padding: bool = True,
        wrap: bool = False,
        scale_relative: bool = False,
    ) -> None:
        super().__init__()
        values = inputs if values is None else values
        if inputs % heads or values % heads:
            raise ValueError(f"{heads} heads do not divide widths of {inputs} and {values}")
        self.heads, self.block, self.halo = heads, block, halo
        self.options = {
            "reach": reach,
            "mask_padding": mask_padding,
            "wrap": wrap,
            "scale_relative": scale_relative,
        }
        self.query = nn.Conv2d(inputs, inputs, 1, stride, bias=False)
        self.key = nn.Conv2d(inputs, inputs, 1, bias=False)
        self.value = nn.Conv2d(inputs, values, 1, bias=False)
        self.tables = None
        if relative:
            offsets, dim = 2 * (block + 2 * halo) - 1, inputs // heads
            self.tables = nn.Parameter(torch.randn(2, offsets, dim) * dim**-0.5)

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch values rows columns"]:
        split = (
            project(x).unflatten(1, (self.heads, -1)).movedim(2, -1).contiguous()
            for project in (self.query, self.key, self.value)
        )
        out = halo_attention(*split, self.block, self.halo, self.tables, **self.options)
        return out.movedim(-1, 2).flatten(1, 2)

    def weights(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch heads rows columns places"]:
        """Attention weights of every query on all places of the map: the output for one-hot values."""
        queries, keys = (
            project(x).unflatten(1, (self.heads, -1)).movedim(2, -1)
            for project in (self.query, self.key)
        )
        places = torch.eye(x[0, 0].numel(), dtype=x.dtype, device=x.device)
        values = places.view(*keys.shape[2:4], -1).expand(*keys.shape[:4], -1)
        return halo_attention(
            queries, keys, values, self.block, self.halo, self.tables, **self.options
        )


# Costs, in closed form ----------------------------------------------------------------------------


def neighbourhood_elements(height: int, width: int, channels: int, block: int, halo: int) -> int:
    """Numbers that the gathered keys (or the values) of one image take: H W c (b + 2h)² / b²."""
    return (height // block) * (width // block) * (block + 2 * halo) ** 2 * channels


def attention_multiply_adds(
    height: int, width: int, channels: int, window: int, stride: int = 1, relative: bool = False
) -> int:
    """Multiply-adds of Q Kᵀ and A V of one image, 2 H W m² c / s²; relative logits add 2 H W m c / s².

    They depend on the window m alone, not on how it is made of block and halo.
    """
    keys = window**2 + (window if relative else 0)
    return 2 * (height // stride) * (width // stride) * keys * channels


# The HaloNet family -------------------------------------------------------------------------------


@dataclass(frozen=True)
class HaloNetConfig:
    """One row of the paper's table of models.

    `value_ratio` (r_v): width of the values over that of the queries; `bottleneck_ratio` (r_b): width
    between blocks over that of the queries; `third_stage`: blocks in it; `final_width` (d_f): of a
    last 1 x 1 convolution, 0 for none.
    """

    block: int
    halo: int
    value_ratio: float
    bottleneck_ratio: float
    third_stage: int
    final_width: int = 0


FAMILY = {
    "H0": HaloNetConfig(8, 3, 1.0, 0.5, 7),
    "H1": HaloNetConfig(8, 3, 1.0, 1.0, 10),
    "H2": HaloNetConfig(8, 3, 1.0, 1.25, 11),
    "H3": HaloNetConfig(10, 3, 1.0, 1.5, 12, 1024),
    "H4": HaloNetConfig(12, 2, 1.0, 3.0, 12, 1280),
    "H5": HaloNetConfig(14, 2, 2.5, 2.0, 23, 1536),
    "H6": HaloNetConfig(8, 4, 3.0, 2.75, 24, 1536),
    "H7": HaloNetConfig(10, 3, 4.0, 3.5, 26, 2048),
}


def _convolution(inputs: int, outputs: int, stride: int = 1, size: int = 1) -> nn.Sequential:
    """Convolution without bias, and BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class HaloBlock(nn.Module):
    """Bottleneck with halo attention in the place of the 3 x 3 convolution, beside a shortcut."""

    def __init__(
        self, inputs: int, base: int, heads: int, config: HaloNetConfig, stride: int
    ) -> None:
        super().__init__()
        values, outputs = (
            round(base * ratio) for ratio in (config.value_ratio, config.bottleneck_ratio)
        )
        self.body = nn.Sequential(
            _convolution(inputs, base),
            nn.SiLU(),
            HaloAttention(base, heads, config.block, config.halo, values=values, stride=stride),
            nn.BatchNorm2d(values),
            nn.SiLU(),
            _convolution(values, outputs),
        )
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else _convolution(inputs, outputs, stride)

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        return F.silu(self.shortcut(x) + self.body(x))


class HaloNet(nn.Sequential):
    """The paper's network: 7 x 7 stem, four stages of halo blocks, classifier.

    Args:
        config: a row of the table of models, for example `FAMILY["H1"]`.
        classes: outputs of the classifier.
        bases, heads: width of queries and number of heads in the four stages.
        depths: blocks of the stages 1, 2 and 4; the third is in `config`.
    """

    def __init__(
        self,
        config: HaloNetConfig,
        classes: int = 1000,
        bases: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (4, 8, 8, 8),
        depths: tuple[int, int, int] = (3, 3, 3),
    ) -> None:
        layers: list[nn.Module] = [_convolution(3, 64, 2, size=7), nn.SiLU()]
        layers.append(nn.MaxPool2d(3, 2, padding=1))
        width = 64
        counts = (*depths[:2], config.third_stage, depths[2])
        for stage, (base, head, count) in enumerate(zip(bases, heads, counts, strict=True)):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(HaloBlock(width, base, head, config, stride))
                width = round(base * config.bottleneck_ratio)
        if config.final_width:
            layers += [_convolution(width, config.final_width), nn.SiLU()]
            width = config.final_width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        super().__init__(*layers)
