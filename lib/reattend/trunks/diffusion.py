"""A small text-to-image diffusion model in pixel space whose attention can be watched, steered and thinned.

A UNet with self- and cross-attention at every level predicts the velocity v = alpha eps - sigma x0 of
Salimans and Ho (2022, arXiv 2202.00512) under the cosine schedule; a deterministic sampler (DDIM, Song et
al. 2021, arXiv 2010.02502) with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) draws
pictures. Time runs from 1 (pure noise) to 0 (the picture).

`AttentionHooks` sees every attention map, with gradients to the latent, and may let self-attention run on
fewer tokens. Hooks that do nothing change no bit of the output.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["self", "cross"]


# --- hooks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """How one self-attention runs on fewer tokens.

    Attributes:
        reduce: from the normalised hidden states [batch, tokens, width] to those that attend
            [batch, kept, width].
        recover: from their attention output [batch, kept, width] to one for every token
            [batch, tokens, width]; the residual connection is added afterwards.
        key_bias: added to every query's logits, for instance the log of how many tokens each stands for.
    """

    reduce: Callable[[Tensor], Tensor]
    recover: Callable[[Tensor], Tensor]
    key_bias: Float[Tensor, "batch kept"] | None = None


def keep_and_copy(
    kept: Int[Tensor, "batch kept"], source: Int[Tensor, "batch tokens"]
) -> Reduction:
    """Only the tokens at `kept` attend; token i takes the output of the kept token number `source[:, i]`.

    `source` counts within `kept`, so a kept token has its own place in `kept` as source.
    """

    def take(x: Tensor, places: Tensor) -> Tensor:
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))

    return Reduction(lambda x: take(x, kept), lambda x: take(x, source))


@dataclass(frozen=True)
class AttentionHooks:
    """What is done at each attention of the UNet; blocks are named in `DiffusionUNet.blocks`.

    Attributes:
        on_map: called with the block's name, "self" or "cross", and the map
            [batch, heads, queries, keys], whose rows sum to one. Of a reduced self-attention, queries and
            keys are the kept tokens.
        reduce: called before each self-attention with the block's name and its hidden states
            [batch, tokens, width] before the first norm; None: all tokens attend.
    """

    on_map: Callable[[str, Kind, Tensor], None] | None = None
    reduce: Callable[[str, Tensor], Reduction | None] | None = None


NO_HOOKS = AttentionHooks()


class MapRecorder:
    """Keeps the maps that the last pass made, by block and kind; pass `recorder.hooks`.

    Args:
        kinds: which maps to keep.
        blocks: names of the blocks to keep; None: all.
    """

    def __init__(
        self, kinds: tuple[Kind, ...] = ("self", "cross"), blocks: tuple[str, ...] | None = None
    ) -> None:
        self.kinds, self.blocks = kinds, blocks
        self.maps: dict[tuple[str, Kind], Float[Tensor, "batch heads queries keys"]] = {}
        self.hooks = AttentionHooks(on_map=self._keep)

    def _keep(self, block: str, kind: Kind, weights: Tensor) -> None:
        if kind in self.kinds and (self.blocks is None or block in self.blocks):
            self.maps[block, kind] = weights

    def mean(self, kind: Kind) -> Float[Tensor, "batch queries keys"]:
        """The mean of the kept maps over blocks and heads; they must be of one resolution."""
        chosen = [m.mean(1) for (_, which), m in self.maps.items() if which == kind]
        return torch.stack(chosen).mean(0)


# --- the network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiffusionShape:
    """Sizes of text encoder and UNet.

    Attributes:
        side: of the pictures in pixels.
        shuffle: pixels of a square of this side become channels, so the finest level has
            side / shuffle rows.
        width: channels of the finest level; `multiples` of it at each level, each half as fine.
        group: channels of a group in GroupNorm.
        centre, spread: mean and standard deviation of the pictures' values; latents are (picture - centre) /
            spread, so that noise of variance one is as strong as what it hides.
    """

    vocabulary: int
    length: int
    side: int = 24
    shuffle: int = 2
    width: int = 48
    multiples: tuple[int, ...] = (1, 1)
    heads: int = 2
    text_width: int = 64
    text_layers: int = 1
    group: int = 8
    centre: float = 0.0
    spread: float = 1.0


@dataclass(frozen=True)
class EncodedText:
    """Captions as the UNet reads them: one state a token, False where there is padding."""

    states: Float[Tensor, "batch length width"]
    mask: Bool[Tensor, "batch length"]

    def __len__(self) -> int:
        return len(self.states)

    def followed_by(self, other: "EncodedText") -> "EncodedText":
        """Both batches, one after the other."""
        states = torch.cat([self.states, other.states])
        return EncodedText(states, torch.cat([self.mask, other.mask]))


class Attention(nn.Module):
    """Multi-head attention that computes its map; self-attention where `context_width` is None."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        source = width if context_width is None else context_width
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(source, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch queries width"],
        context: Float[Tensor, "batch keys context_width"],
        bias: Float[Tensor, "batch keys"] | None = None,
    ) -> tuple[Float[Tensor, "batch queries width"], Float[Tensor, "batch heads queries keys"]]:
        """The attention's output and its map; `bias` is added to every query's logits."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pair = self.key_value(context).unflatten(-1, (2, self.heads, -1))
        k, v = pair.permute(2, 0, 3, 1, 4)
        logits = (q * self.scale) @ k.transpose(-1, -2)
        if bias is not None:
            logits = logits + bias[:, None, None, :]
        weights = logits.softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


class TransformerBlock(nn.Module):
    """x + self(LN(x)), x + cross(LN(x), text), x + MLP(LN(x)), on the positions of a map, row by row."""

    def __init__(self, name: str, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.name = name
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, heads)
        self.cross_attention = Attention(width, heads, text_width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self,
        x: Float[Tensor, "batch width rows columns"],
        text: EncodedText,
        text_bias: Float[Tensor, "batch length"],
        hooks: AttentionHooks,
    ) -> Float[Tensor, "batch width rows columns"]:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self._attend_to_self(tokens, hooks)
        attended, weights = self.cross_attention(self.norm2(tokens), text.states, text_bias)
        if hooks.on_map is not None:
            hooks.on_map(self.name, "cross", weights)
        tokens = tokens + attended
        tokens = tokens + self.mlp(self.norm3(tokens))
        return tokens.transpose(1, 2).unflatten(-1, x.shape[-2:])

    def _attend_to_self(
        self, tokens: Float[Tensor, "batch tokens width"], hooks: AttentionHooks
    ) -> Float[Tensor, "batch tokens width"]:
        reduction = None if hooks.reduce is None else hooks.reduce(self.name, tokens)
        states = self.norm1(tokens)
        if reduction is not None:
            states = reduction.reduce(states)
        bias = None if reduction is None else reduction.key_bias
        attended, weights = self.self_attention(states, states, bias)
        if hooks.on_map is not None:
            hooks.on_map(self.name, "self", weights)
        return attended if reduction is None else reduction.recover(attended)


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm beside a shortcut; the time scales and shifts the second norm."""

    def __init__(self, inputs: int, width: int, time_width: int, group: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.GroupNorm(inputs // group, inputs),
            nn.GroupNorm(width // group, width),
        )
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * width)
        self.shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(
        self, x: Float[Tensor, "batch inputs rows columns"], time: Float[Tensor, "batch time_width"]
    ) -> Float[Tensor, "batch width rows columns"]:
        scale, shift = self.time(time)[..., None, None].chunk(2, 1)
        hidden = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(hidden))


class Stage(nn.Module):
    """A residual block and a transformer block."""

    def __init__(self, name: str, inputs: int, width: int, shape: DiffusionShape) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, width, 4 * shape.width, shape.group)
        self.transformer = TransformerBlock(name, width, shape.heads, shape.text_width)

    def start_as_identity(self) -> None:
        """Zero what each branch adds to its shortcut, so that training starts from the shortcuts alone."""
        block = self.transformer
        branches = (block.self_attention.out, block.cross_attention.out, block.mlp[-1])
        for last in (self.residual.conv2, *branches):
            silence(last)

    def forward(
        self,
        x: Float[Tensor, "batch inputs rows columns"],
        time: Float[Tensor, "batch time_width"],
        text: EncodedText,
        text_bias: Float[Tensor, "batch length"],
        hooks: AttentionHooks,
    ) -> Float[Tensor, "batch width rows columns"]:
        return self.transformer(self.residual(x, time), text, text_bias, hooks)


def silence(layer: nn.Linear | nn.Conv2d) -> None:
    """Zero a layer's weights and bias."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class TextEncoder(nn.Module):
    """A small transformer over the caption."""

    def __init__(self, shape: DiffusionShape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.text_width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.length, shape.text_width))
        layer = nn.TransformerEncoderLayer(
            shape.text_width,
            shape.heads,
            2 * shape.text_width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, shape.text_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(shape.text_width)

    def forward(self, ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]):
        hidden = self.embed(ids) + self.positions[: ids.shape[1]]
        return EncodedText(self.norm(self.layers(hidden, src_key_padding_mask=~mask)), mask)


class DiffusionUNet(nn.Module):
    """Text encoder and UNet: predicts the velocity of noisy pictures.

    `blocks` names the transformer blocks in the order in which they run and gives the side of their maps,
    for instance {"down12": 12, "down6": 6, "mid6": 6, "up6": 6, "up12": 12}.

    Raises:
        ValueError: when the side does not halve at every level.
    """

    def __init__(self, shape: DiffusionShape) -> None:
        super().__init__()
        levels = len(shape.multiples)
        if shape.side % (shape.shuffle << (levels - 1)):
            raise ValueError(
                f"a side of {shape.side} pixels does not halve {levels - 1} times after {shape.shuffle}"
            )
        self.shape = shape
        self.text = TextEncoder(shape)
        time_width = 4 * shape.width
        self.time = nn.Sequential(
            nn.Linear(shape.width, time_width),
            nn.SiLU(),
            nn.Linear(time_width, time_width),
            nn.SiLU(),
        )
        pixels = 3 * shape.shuffle**2
        self.enter = nn.Conv2d(pixels, shape.width, 3, padding=1)
        widths = [shape.width * multiple for multiple in shape.multiples]
        sides = [shape.side // (shape.shuffle << level) for level in range(levels)]
        before = [shape.width, *widths[:-1]]
        self.down = nn.ModuleList(
            Stage(f"down{side}", inputs, width, shape)
            for side, inputs, width in zip(sides, before, widths, strict=True)
        )
        self.shrink = nn.ModuleList(
            nn.Conv2d(width, width, 3, 2, padding=1) for width in widths[:-1]
        )
        self.mid = Stage(f"mid{sides[-1]}", widths[-1], widths[-1], shape)
        below = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Stage(f"up{side}", lower + width, width, shape)
            for side, lower, width in zip(sides, below, widths, strict=True)
        )
        self.leave = nn.Sequential(
            nn.GroupNorm(shape.width // shape.group, shape.width),
            nn.SiLU(),
            nn.Conv2d(shape.width, pixels, 3, padding=1),
        )
        for stage in (*self.down, self.mid, *self.up):
            stage.start_as_identity()
        silence(self.leave[-1])
        stages = [*self.down, self.mid, *reversed(self.up)]
        order = zip(stages, [*sides, sides[-1], *reversed(sides)], strict=True)
        self.blocks = {stage.transformer.name: of for stage, of in order}

    def encode(self, ids: Int[Tensor, "batch length"], padding: int = 0) -> EncodedText:
        """Encode captions; tokens equal to `padding` are read by nothing."""
        return self.text(ids, ids != padding)

    def blocks_of_side(self, side: int) -> tuple[str, ...]:
        """Names of the blocks whose maps have this side."""
        return tuple(name for name, of in self.blocks.items() if of == side)

    def latent_of(
        self, pictures: Float[Tensor, "batch 3 side side"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """What is noised: pictures with mean about 0 and variance about 1."""
        return (pictures - self.shape.centre) / self.shape.spread

    def picture_of(
        self, latents: Float[Tensor, "batch 3 side side"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """The inverse of `latent_of`."""
        return latents * self.shape.spread + self.shape.centre

    @property
    def range(self) -> tuple[float, float]:
        """The latents of black and white: pictures lie in [-1, 1]."""
        low, high = ((end - self.shape.centre) / self.shape.spread for end in (-1.0, 1.0))
        return low, high

    def forward(
        self,
        x: Float[Tensor, "batch 3 side side"],
        time: Float[Tensor, " batch"],
        text: EncodedText,
        hooks: AttentionHooks = NO_HOOKS,
    ) -> Float[Tensor, "batch 3 side side"]:
        """Velocity of noisy pictures `x` at times in [0, 1]."""
        context = self.time(time_features(time, self.shape.width))
        bias = torch.zeros_like(text.mask, dtype=x.dtype).masked_fill(~text.mask, -torch.inf)
        hidden = self.enter(F.pixel_unshuffle(x, self.shape.shuffle))
        skips = []
        for level, stage in enumerate(self.down):
            hidden = stage(hidden, context, text, bias, hooks)
            skips.append(hidden)
            if level < len(self.shrink):
                hidden = self.shrink[level](hidden)
        hidden = self.mid(hidden, context, text, bias, hooks)
        for level in reversed(range(len(self.up))):
            joined = torch.cat([hidden, skips[level]], 1)
            hidden = self.up[level](joined, context, text, bias, hooks)
            if level:
                hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
        return F.pixel_shuffle(self.leave(hidden), self.shape.shuffle)


def time_features(time: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Sines and cosines of 1,000 times the time, at `width` / 2 geometrically spaced rates."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10_000) / half))
    angles = 1000 * time[:, None] * rates.to(time.dtype)
    return torch.cat([angles.sin(), angles.cos()], 1)


# --- the process -----------------------------------------------------------------------------------


def alpha_sigma(
    time: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch 1 1 1"], Float[Tensor, "batch 1 1 1"]]:
    """Share of picture and of noise under the cosine schedule: cos(pi t / 2), sin(pi t / 2)."""
    angle = (math.pi / 2 * time)[:, None, None, None]
    return angle.cos(), angle.sin()


def noised(
    x0: Float[Tensor, "batch 3 side side"],
    noise: Float[Tensor, "batch 3 side side"],
    time: Float[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch 3 side side"], Float[Tensor, "batch 3 side side"]]:
    """Noisy pictures alpha x0 + sigma eps, and their velocities alpha eps - sigma x0."""
    alpha, sigma = alpha_sigma(time)
    return alpha * x0 + sigma * noise, alpha * noise - sigma * x0


def predicted_picture(
    x: Float[Tensor, "batch 3 side side"],
    velocity: Float[Tensor, "batch 3 side side"],
    time: Float[Tensor, " batch"],
) -> Float[Tensor, "batch 3 side side"]:
    """The x0 that a velocity stands for: alpha x - sigma v."""
    alpha, sigma = alpha_sigma(time)
    return alpha * x - sigma * velocity


def velocity_loss(
    model: DiffusionUNet,
    pictures: Float[Tensor, "batch 3 side side"],
    ids: Int[Tensor, "batch length"],
    noise: Float[Tensor, "batch 3 side side"],
    time: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Mean squared error of the predicted velocity."""
    x, velocity = noised(model.latent_of(pictures), noise, time)
    return F.mse_loss(model(x, time, model.encode(ids)), velocity)


def sampling_times(steps: int) -> Float[Tensor, " times"]:
    """Evenly spaced times from 1 to 0, one more than there are steps."""
    return torch.linspace(1, 0, steps + 1)


def ddim_step(
    x: Float[Tensor, "batch 3 side side"],
    velocity: Float[Tensor, "batch 3 side side"],
    time: Float[Tensor, " batch"],
    target: Float[Tensor, " batch"],
    bounds: tuple[float, float] | None = None,
) -> Float[Tensor, "batch 3 side side"]:
    """One deterministic step from `time` to the earlier `target`.

    `bounds`: the predicted picture is held within them, and the noise follows from it.
    """
    alpha, sigma = alpha_sigma(time)
    picture = predicted_picture(x, velocity, time)
    if bounds is not None:
        picture = picture.clamp(*bounds)
    noise = (x - alpha * picture) / sigma
    alpha, sigma = alpha_sigma(target)
    return alpha * picture + sigma * noise


def guided_velocity(
    model: DiffusionUNet,
    x: Float[Tensor, "batch 3 side side"],
    time: Float[Tensor, " batch"],
    text: EncodedText,
    empty: EncodedText,
    guidance: float,
    hooks: AttentionHooks = NO_HOOKS,
) -> Float[Tensor, "batch 3 side side"]:
    """empty + guidance (text - empty), both in one pass, the captioned half first; 1: the captioned pass alone."""
    if guidance == 1:
        return model(x, time, text, hooks)
    both = model(torch.cat([x, x]), torch.cat([time, time]), text.followed_by(empty), hooks)
    captioned, plain = both.chunk(2)
    return plain + guidance * (captioned - plain)


@torch.no_grad()
def sample(
    model: DiffusionUNet,
    noise: Float[Tensor, "batch 3 side side"],
    ids: Int[Tensor, "batch length"],
    empty_ids: Int[Tensor, "batch length"],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    hooks: AttentionHooks = NO_HOOKS,
    before_step: Callable[[int, Tensor, Tensor, EncodedText], Tensor] | None = None,
) -> Float[Tensor, "batch 3 side side"]:
    """Draw pictures from noise, all of a batch at once.

    Args:
        ids, empty_ids: captions, and captions without words.
        before_step: called with the step's number, the latent, its times and the encoded captions; returns
            the latent from which the step is taken. Gradients are off: turn them on inside where needed.

    Returns:
        Pictures in [-1, 1].
    """
    text, empty = model.encode(ids), model.encode(empty_ids)
    times = sampling_times(steps).to(noise)
    x = noise
    for step in range(steps):
        time, target = times[step].expand(len(x)), times[step + 1].expand(len(x))
        if before_step is not None:
            x = before_step(step, x, time, text)
        velocity = guided_velocity(model, x, time, text, empty, guidance, hooks)
        x = ddim_step(x, velocity, time, target, model.range)
    return model.picture_of(x)
