"""HAT, the Hybrid Attention Transformer for image restoration (arXiv 2309.05239, first in 2205.04437).

A SwinIR whose windows of M x M pixels are helped in two ways:

    HAB     (shifted) window attention, and beside it alpha times a block with *channel* attention,
            which weighs channels by what the whole picture holds
    OCAB    overlapping cross-attention: the queries of an M x M window read keys and values from the
            M_o x M_o pixels around it, M_o = (1 + gamma) M, so that windows overlap

A group (RHAG) is several HABs, one OCAB and a convolution. Maps are [batch, height, width, channels]
inside the groups. Names follow the official code, so that its checkpoints load by `from_official`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.vision.halonet import gather_windows, join_blocks, split_blocks

MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of the paper's training pictures (DF2K), subtracted from what the network reads."""

# Windows ------------------------------------------------------------------------------------------


def relative_index(window: int, keys: int) -> Int[Tensor, "queries keys"]:
    """Row of the bias table for every query of a window and every key of the window around it.

    Along each axis key - query + M - 1, both counted from the start of their own window; the table
    has (M + M_o - 1)² rows. With keys = window this is the index of plain window attention.

    Args:
        window: M, queries a side.
        keys: M_o, keys a side.
    """
    axis = torch.arange(keys) - torch.arange(window)[:, None] + window - 1
    rows = axis[:, None, :, None] * (window + keys - 1) + axis[None, :, None, :]
    return rows.flatten(2).flatten(0, 1)


def shift_mask(
    height: int, width: int, window: int, shift: int
) -> Bool[Tensor, "rows columns queries keys"]:
    """Which pixels of a rolled map's windows were neighbours before it was rolled by `shift`.

    The last windows of a rolled map hold pixels from both ends of the map: they may not see each other.
    """
    sides = []
    for size in (height, width):
        places = torch.arange(size)
        sides.append((places >= size - window).int() + (places >= size - shift).int())
    regions = (3.0 * sides[0][:, None] + sides[1])[..., None]
    regions = split_blocks(regions, window).flatten(2)
    return regions[..., :, None] == regions[..., None, :]


def attend_windows(
    queries: Float[Tensor, "*windows queries dim"],
    keys: Float[Tensor, "*windows keys dim"],
    values: Float[Tensor, "*windows keys dim"],
    heads: int,
    bias: Float[Tensor, "heads queries keys"],
    mask: Bool[Tensor, "rows columns queries keys"] | None = None,
) -> Float[Tensor, "*windows queries dim"]:
    """Multi-head attention in every window, softmax(q kᵀ / sqrt(d) + bias) v, without projections.

    Args:
        mask: pairs that may see each other, in every window of a map; None: all.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (queries, keys, values))
    if mask is not None:
        # Masked before it is added: the logits of all pictures would be larger.
        bias = bias.masked_fill(~mask[:, :, None], -math.inf)
    logits = q * q.shape[-1] ** -0.5 @ k.mT + bias
    return (logits.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


class WindowAttention(nn.Module):
    """Self-attention in M x M windows of a map, with relative position bias: (S)W-MSA.

    Args:
        shift: the windows are moved by so many pixels, by rolling the map; 0 for none.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int = 0) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_index(window, window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        mask = None
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            mask = shift_mask(*x.shape[1:3], self.window, self.shift).to(x.device)
        blocks = split_blocks(self.qkv(x), self.window)
        bias = self.relative_position_bias_table[self.index].movedim(-1, 0)
        read = attend_windows(*blocks.flatten(3, 4).chunk(3, -1), self.heads, bias, mask)
        y = self.proj(join_blocks(read.unflatten(3, blocks.shape[3:5])))
        return y.roll((self.shift, self.shift), (1, 2)) if self.shift else y


class OverlappingAttention(nn.Module):
    """Cross-attention from M x M windows to the overlapping M_o x M_o windows around them.

    Keys and values are projected on the whole map, then gathered: pixels outside the map have zero
    keys and values and are not masked, so their logit is the bias alone (as in the official code).

    Args:
        overlap: gamma, M_o = (1 + gamma) M; gamma M must be even.
        wrap: the overlap repeats the pixels of its own window: same cost, no reach (a placebo).

    Raises:
        ValueError: when gamma M is not even, for then the overlap is lopsided.
    """

    def __init__(self, dim: int, heads: int, window: int, overlap: float, wrap: bool = False):
        super().__init__()
        margin = round(overlap * window)
        if margin % 2 or abs(margin - overlap * window) > 1e-6:
            raise ValueError(f"overlap x window must be even, not {overlap:g} x {window}")
        self.heads, self.window, self.halo, self.wrap = heads, window, margin // 2, wrap
        table = torch.zeros((2 * window + margin - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("index", relative_index(window, window + margin), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        queries, keys_values = self.qkv(x).split((x.shape[-1], 2 * x.shape[-1]), -1)
        blocks = split_blocks(queries, self.window)
        around = gather_windows(keys_values, self.window, self.halo, self.wrap).flatten(3, 4)
        bias = self.relative_position_bias_table[self.index].movedim(-1, 0)
        read = attend_windows(blocks.flatten(3, 4), *around.chunk(2, -1), self.heads, bias)
        return self.proj(join_blocks(read.unflatten(3, blocks.shape[3:5])))


# Blocks -------------------------------------------------------------------------------------------


class ChannelAttention(nn.Module):
    """x times a gate for each channel, made from the mean of all channels over the picture.

    Args:
        squeeze: the gate's hidden layer is so many times narrower than the map.
        blind: the gate reads zeros and is the same for all pictures (a placebo).
    """

    def __init__(self, dim: int, squeeze: int, blind: bool = False) -> None:
        super().__init__()
        self.blind = blind
        hidden = max(1, dim // squeeze)
        self.attention = nn.Sequential(
            nn.Conv2d(dim, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, dim, 1), nn.Sigmoid()
        )

    def forward(
        self, x: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.attention(torch.zeros_like(pooled) if self.blind else pooled)


class ChannelBlock(nn.Sequential):
    """CAB: two 3 x 3 convolutions, narrower by `compress` between them, then channel attention."""

    def __init__(self, dim: int, compress: int, squeeze: int, blind: bool = False) -> None:
        super().__init__(
            nn.Conv2d(dim, dim // compress, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // compress, dim, 3, padding=1),
            ChannelAttention(dim, squeeze, blind),
        )

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class MLP(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, ratio: float) -> None:
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


@dataclass(frozen=True)
class HATConfig:
    """A network of the family.

    Attributes:
        dim: channels C.
        groups, blocks: RHAGs, and HABs in each.
        window: M, in pixels; every second HAB is shifted by half of it.
        compress, squeeze: beta and s of the CAB.
        alpha: weight of the CAB, fixed.
        overlap: gamma of the OCAB.
        cab, ocab: "on"; "off" leaves the module out; the rest are placebos: a "blind" gate, an
            overlap that repeats its "own" window. With both off this is SwinIR.
        conv: whether a group ends with its 3 x 3 convolution.
        drop_path: largest rate of stochastic depth, reached in the last HAB.
    """

    dim: int = 180
    groups: int = 6
    blocks: int = 6
    heads: int = 6
    window: int = 16
    compress: int = 3
    squeeze: int = 30
    alpha: float = 0.01
    overlap: float = 0.5
    mlp_ratio: float = 2.0
    cab: Literal["on", "blind", "off"] = "on"
    ocab: Literal["on", "own", "off"] = "on"
    conv: bool = True
    drop_path: float = 0.0


SIZES = {
    "SwinIR": HATConfig(window=8, cab="off", ocab="off"),
    "HAT-S": HATConfig(dim=144, compress=24, squeeze=24),
    "HAT": HATConfig(),
    "HAT-L": HATConfig(groups=12),
}
"""The published networks by name; SwinIR is the one that HAT starts from."""


def drop_path(
    x: Float[Tensor, "batch height width dim"], rate: float, training: bool
) -> Float[Tensor, "batch height width dim"]:
    """Leave a branch out for a random share of the pictures, and scale it up for the others."""
    if not training or rate == 0:
        return x
    kept = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype) >= rate
    return x * kept / (1 - rate)


class HybridBlock(nn.Module):
    """HAB: x + (S)W-MSA(LN(x)) + alpha CAB(LN(x)), then x + MLP(LN(x)).

    The CAB reads the map before it is shifted, and stochastic depth never drops it.
    """

    def __init__(self, config: HATConfig, shift: int, rate: float = 0.0) -> None:
        super().__init__()
        self.alpha, self.rate = config.alpha, rate
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = WindowAttention(config.dim, config.heads, config.window, shift)
        self.conv_block = None
        if config.cab != "off":
            blind = config.cab == "blind"
            self.conv_block = ChannelBlock(config.dim, config.compress, config.squeeze, blind)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        normed = self.norm1(x)
        x = x + drop_path(self.attn(normed), self.rate, self.training)
        if self.conv_block is not None:
            x = x + self.alpha * self.conv_block(normed)
        return x + drop_path(self.mlp(self.norm2(x)), self.rate, self.training)


class OverlappingBlock(nn.Module):
    """OCAB: x + overlapping cross-attention of LN(x), then x + MLP(LN(x))."""

    def __init__(self, config: HATConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        own = config.ocab == "own"
        self.attn = OverlappingAttention(
            config.dim, config.heads, config.window, config.overlap, own
        )
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, config.mlp_ratio)

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HybridGroup(nn.Module):
    """RHAG: x + convolution(OCAB(HAB(...HAB(x)))).

    Args:
        rates: stochastic depth of each HAB.
    """

    def __init__(self, config: HATConfig, rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                HybridBlock(config, config.window // 2 if number % 2 else 0, rate)
                for number, rate in enumerate(rates)
            )
        )
        self.overlap_attn = None if config.ocab == "off" else OverlappingBlock(config)
        self.conv = nn.Conv2d(config.dim, config.dim, 3, padding=1) if config.conv else None

    def forward(
        self, x: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        y = self.blocks(x)
        if self.overlap_attn is not None:
            y = self.overlap_attn(y)
        if self.conv is not None:
            y = self.conv(y.movedim(-1, 1)).movedim(1, -1)
        return x + y


# Network ------------------------------------------------------------------------------------------


def upsampler(scale: int, width: int) -> nn.Sequential:
    """Convolutions with pixel shuffle: one for each factor of two, or one for a factor of three.

    Raises:
        ValueError: for other scales.
    """
    if scale == 3:
        factors = [3]
    elif scale > 0 and scale & (scale - 1) == 0:
        factors = [2] * (scale.bit_length() - 1)
    else:
        raise ValueError(f"the scale must be 3 or a power of two, not {scale}")
    steps = ((nn.Conv2d(width, f * f * width, 3, padding=1), nn.PixelShuffle(f)) for f in factors)
    return nn.Sequential(*(layer for step in steps for layer in step))


def depth_rates(config: HATConfig) -> list[list[float]]:
    """Rates of stochastic depth, a list for each group, growing evenly from 0 to the largest."""
    last = max(1, config.groups * config.blocks - 1)
    numbers = range(config.groups * config.blocks)
    rates = [config.drop_path * number / last for number in numbers]
    return [rates[first : first + config.blocks] for first in numbers[:: config.blocks]]


class HAT(nn.Module):
    """Pictures in [0, 1] to pictures `scale` times larger (section on the network's architecture).

    The sides of a picture must be multiples of the window: see `restore`.

    Args:
        scale: 1, 3 or a power of two.
        channels: of the pictures.
        skip: add the bicubic enlargement of the input to the output, the last convolution starting
            from zero: the network then learns what is missing (in SwinIR at scale 1 alone).
        features: width between the groups and the last convolution.
    """

    def __init__(
        self,
        config: HATConfig,
        scale: int = 4,
        channels: int = 3,
        skip: bool = False,
        features: int = 64,
    ) -> None:
        super().__init__()
        self.config, self.scale, self.skip = config, scale, skip
        mean = torch.tensor(MEAN if channels == 3 else (0.0,) * channels)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.conv_first = nn.Conv2d(channels, config.dim, 3, padding=1)
        self.patch_norm = nn.LayerNorm(config.dim)
        self.layers = nn.Sequential(*(HybridGroup(config, rates) for rates in depth_rates(config)))
        self.norm = nn.LayerNorm(config.dim)
        self.conv_after_body = nn.Conv2d(config.dim, config.dim, 3, padding=1)
        self.conv_before_upsample = nn.Conv2d(config.dim, features, 3, padding=1)
        self.upsample = upsampler(scale, features)
        self.conv_last = nn.Conv2d(features, channels, 3, padding=1)
        initialise(self)
        if skip:
            nn.init.zeros_(self.conv_last.weight)
            nn.init.zeros_(self.conv_last.bias)

    def forward(
        self, pictures: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        x = self.conv_first(pictures - self.mean)
        y = self.norm(self.layers(self.patch_norm(x.movedim(1, -1)))).movedim(-1, 1)
        x = F.leaky_relu(self.conv_before_upsample(self.conv_after_body(y) + x))
        x = self.conv_last(self.upsample(x))
        return x + (enlarge(pictures, self.scale) if self.skip else self.mean)


def enlarge(
    pictures: Float[Tensor, "batch channels height width"], scale: int
) -> Float[Tensor, "batch channels rows columns"]:
    """Bicubic enlargement; pictures as they are at scale 1."""
    if scale == 1:
        return pictures
    return F.interpolate(pictures, scale_factor=scale, mode="bicubic", align_corners=False)


def initialise(model: nn.Module, std: float = 0.02) -> None:
    """Truncated normals for linear layers, of .02 for bias tables; convolutions keep their default.

    Args:
        std: of the linear layers; .02 in the published networks.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.trunc_normal_(parameter, std=0.02)


def restore(
    model: HAT, pictures: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch channels rows columns"]:
    """Pictures of any size: mirrored at the lower and right ends up to whole windows, then cropped.

    Raises:
        ValueError: when a picture is smaller than what has to be mirrored.
    """
    height, width = pictures.shape[2:]
    down, right = (-size % model.config.window for size in (height, width))
    if down >= height or right >= width:
        raise ValueError(f"a picture of {height} x {width} is too small for the window")
    padded = F.pad(pictures, (0, right, 0, down), mode="reflect")
    return model(padded)[..., : height * model.scale, : width * model.scale]


# Official checkpoints -----------------------------------------------------------------------------

_NAMES = (
    ("patch_embed.norm.", "patch_norm."),
    ("residual_group.", ""),
    ("conv_block.cab.", "conv_block."),
    (".3.attention.3.", ".3.attention.2."),
    (".3.attention.1.", ".3.attention.0."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("conv_before_upsample.0.", "conv_before_upsample."),
)
_OCAB = ("relative_position_bias_table", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias")


def from_official(state: Mapping[str, Tensor], config: HATConfig) -> dict[str, Tensor]:
    """The official checkpoint's tensors under the names and in the order that `HAT` has.

    Only the rows of the bias tables are in another order: the official index of window attention
    counts query - key, that of the OCAB key - query from another start, and wraps around.
    """
    window, keys = config.window, config.window + round(config.overlap * config.window)
    axis = torch.arange(window + keys - 1) - (window - 1)
    start, length = window - keys + 1, window + keys - 1
    overlapping = ((axis[:, None] + start) * length + axis + start).flatten() % length**2
    converted = {}
    for name, tensor in state.items():
        if name.startswith("relative_position_index"):
            continue
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        if ".overlap_attn." in name and name.endswith(_OCAB):
            name = name.replace(".overlap_attn.", ".overlap_attn.attn.")
        if name.endswith("relative_position_bias_table"):
            tensor = tensor[overlapping] if ".overlap_attn." in name else tensor.flip(0)
        converted[name] = tensor
    return converted
