"""A small vision classifier whose token mixer is a parameter: flat or pyramid, transformer or bottleneck.

A mixer is made by `mixer(width, stride)` and maps `[batch, width, height, width of the map]` to the
same, or to height / stride x width / stride; attention, convolution and pooling all fit. Mixers of
transformer blocks are always asked for stride 1: there a strided convolution between stages shrinks
the map, as in most hierarchical transformers. In bottleneck blocks the mixer stands in the place of
the 3 x 3 convolution and has the stride of its stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

MixerFactory = Callable[[int, int], nn.Module]
"""Called with width and stride; see above."""


@dataclass(frozen=True)
class Stage:
    """Blocks of one width at one resolution; `stride` shrinks the map on entry."""

    width: int
    blocks: int
    mixer: MixerFactory
    stride: int = 1


def convolution(width: int, stride: int) -> nn.Module:
    """The plain mixer: a 3 x 3 convolution."""
    return nn.Conv2d(width, width, 3, stride, padding=1, bias=False)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position."""

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TransformerBlock(nn.Module):
    """x + depth-wise 3 x 3 (if `position`), x + mixer(LN(x)), x + MLP(LN(x))."""

    def __init__(self, width: int, mixer: nn.Module, mlp_ratio: float, position: bool) -> None:
        super().__init__()
        hidden = round(mlp_ratio * width)
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width) if position else None
        self.mixer_norm, self.mixer = ChannelNorm(width, eps=1e-6), mixer
        self.mlp_norm = ChannelNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1)
        )

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        if self.position is not None:
            x = x + self.position(x)
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class BottleneckBlock(nn.Module):
    """1 x 1 convolution, mixer, 1 x 1 convolution, each with BatchNorm, beside a shortcut (ResNet)."""

    def __init__(self, inputs: int, width: int, mixer: MixerFactory, stride: int, expansion: float):
        super().__init__()
        inner = round(width / expansion)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            mixer(inner, stride),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        return F.relu(self.shortcut(x) + self.body(x))


def stem(channels: int, width: int, stride: int) -> nn.Sequential:
    """Overlapping 3 x 3 convolutions with BatchNorm, each halving the map, until `stride` is reached.

    Raises:
        ValueError: when `stride` is no power of two.
    """
    if stride < 1 or stride & (stride - 1):
        raise ValueError(f"the stem's stride must be a power of two, got {stride}")
    halvings = max(1, stride.bit_length() - 1)
    layers, inputs = [], channels
    for left in reversed(range(halvings)):
        outputs = max(width >> left, 1)
        step = 2 if stride > 1 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, step, 1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()] if left == 0 else [nn.GELU()]
        inputs = outputs
    return nn.Sequential(*layers)


class VisionTrunk(nn.Module):
    """Stem, stages, norm, mean over the map, linear classifier. Takes pixels as bytes, 0..255.

    Args:
        classes: number of classes.
        stages: from fine to coarse.
        block: "transformer" or "bottleneck" (see the module's head).
        channels: of the pictures.
        stem_stride: how much the stem shrinks the picture, a power of two.
        mlp_ratio, position: of transformer blocks: hidden width of the MLP / width; whether a
            depth-wise convolution tells each block where tokens are.
        expansion: of bottleneck blocks: width / width of the mixer.
    """

    def __init__(
        self,
        classes: int,
        stages: Sequence[Stage],
        *,
        block: Literal["transformer", "bottleneck"] = "transformer",
        channels: int = 3,
        stem_stride: int = 2,
        mlp_ratio: float = 3.0,
        position: bool = True,
        expansion: float = 2.0,
    ) -> None:
        super().__init__()
        width = stages[0].width
        self.stem = stem(channels, width, stem_stride)
        layers: list[nn.Module] = []
        for stage in stages:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                if block == "bottleneck":
                    layers.append(
                        BottleneckBlock(width, stage.width, stage.mixer, stride, expansion)
                    )
                else:
                    if stride > 1 or width != stage.width:
                        layers.append(_shrink(width, stage.width, stride))
                    mixer = stage.mixer(stage.width, 1)
                    layers.append(TransformerBlock(stage.width, mixer, mlp_ratio, position))
                width = stage.width
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Linear(width, classes)

    def features(
        self, pixels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        """The map after the last stage and its norm."""
        x = (pixels.to(self.classify.weight.dtype) - 127.5) / 127.5
        return self.norm(self.blocks(self.stem(x)))

    def forward(
        self, pixels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.classify(self.features(pixels).mean((2, 3)))


def _shrink(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
    )


@torch.no_grad()
def multiply_adds(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of the matrix products and convolutions of one forward pass, by torch's count.

    Element-wise work (norms, softmax, activations) is not counted; masked scores are.
    """
    # Torch counts the fused attention of GPUs but not that of processors.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: _fused_attention_flops})
    with counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def _fused_attention_flops(query: tuple, key: tuple, value: tuple, *_, **__) -> int:
    """Called by torch's counter with the shapes of the tensors."""
    return sdpa_flop_count(query, key, value)
