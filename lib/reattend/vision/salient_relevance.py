"""Salient relevance: context-aware saliency of layer-wise relevance (arXiv 1712.08268).

Step 1, layer-wise relevance propagation (LRP): the logit of the predicted class is handed back layer
by layer until every input value has its share. Here relevance travels in place of the gradient: a
forward hook swaps the backward of each layer for its rule, so that any topology works, tensors used
twice add up, and max-pooling needs no rule (its gradient already goes to the winner and adds where
windows overlap).

Step 2, context-aware saliency (Goferman et al. 2010) of the relevance map: a patch is salient if
even the patches most like it differ, the more so the nearer they are; pixels far from every salient
focus are turned down.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

# Rules of one layer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer that is linear in its inputs: what rules need of it.

    apply: (inputs, weight) -> outputs without the bias.
    back: (values of the outputs, weight, inputs for their shape) -> the transposed layer's outputs.
    bias: broadcasts to the outputs; None for none.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    back: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None

    @property
    def signed_weights(self) -> tuple[Tensor, Tensor]:
        """Positive and negative part."""
        return self.weight.clamp(min=0), self.weight.clamp(max=0)


Rule = Callable[[Layer, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, inputs, outputs with bias, relevance of the outputs) -> (relevance of the inputs,
relevance that each output kept: the shares of its bias and of the stabiliser)."""


def _stable(outputs: Tensor, size: Tensor | float) -> Tensor:
    """Moves outputs away from zero, to the side on which they are."""
    return outputs + size * torch.where(outputs >= 0, 1.0, -1.0).to(outputs)


def z_rule(layer, inputs, outputs, relevance, *, epsilon: float = 0.0):
    """R_i = x_i sum_j w_ij R_j / z_j with z_j the output with its bias (LRP-0).

    `epsilon` > 0 adds that many root mean squares of z to each |z| (LRP-epsilon); without, only 1e-9
    guards against division by zero. The bias keeps its share b_j R_j / z_j.
    """
    size = outputs.square().flatten(1).mean(1).sqrt().view(-1, *[1] * (outputs.ndim - 1))
    share = relevance / _stable(outputs, 1e-9 + epsilon * size)
    plain = outputs if layer.bias is None else outputs - layer.bias
    return inputs * layer.back(share, layer.weight, inputs), relevance - plain * share


def z_plus_rule(layer, inputs, outputs, relevance):
    """R goes to the contributions x_i w_ij that have the sign of the output, in proportion.

    After a ReLU (x >= 0, relevance only where the output is positive) this is the paper's rule of
    linear layers: V = max(W, 0), S = R / (V x), R_i = x_i (V^T S). Outputs of layers without an
    activation may be negative: their relevance belongs to what made them so. The bias only
    decides that sign; an output without such contributions keeps its relevance.
    """
    up, down = inputs.clamp(min=0), inputs.clamp(max=0)
    raising, lowering = layer.signed_weights
    helping = layer.apply(up, raising)
    signed = bool((inputs < 0).any())
    if signed:
        helping = helping + layer.apply(down, lowering)
    plain = outputs if layer.bias is None else outputs - layer.bias
    opposing = (plain - helping).clamp(max=0)
    helped = torch.where(outputs >= 0, relevance, 0) / _stable(helping, 1e-9)
    opposed = torch.where(outputs >= 0, 0, relevance) / _stable(opposing, 1e-9)
    leaving = up * (layer.back(helped, raising, inputs) + layer.back(opposed, lowering, inputs))
    if signed:
        below = layer.back(helped, lowering, inputs) + layer.back(opposed, raising, inputs)
        leaving = leaving + down * below
    return leaving, relevance - helping * helped - opposing * opposed


def z_box_rule(layer, inputs, outputs, relevance, *, low: Tensor, high: Tensor):
    """z^B: first layer, pixels in [low, high] (broadcast to the inputs); no bias.

    z_j = sum_i x_i w_ij - low_i max(w_ij, 0) - high_i min(w_ij, 0), so that every term is >= 0.
    """
    raising, lowering = layer.signed_weights
    terms = [(inputs, layer.weight), (-low, raising), (-high, lowering)]
    terms = [(values.expand_as(inputs), weight) for values, weight in terms]
    total = sum(layer.apply(values, weight) for values, weight in terms)
    share = relevance / _stable(total, 1e-9)
    leaving = sum(values * layer.back(share, weight, inputs) for values, weight in terms)
    return leaving, relevance - total * share


@dataclass(frozen=True)
class Rules:
    """Which rule each kind of layer gets; `first` is the layer that sees the pixels.

    `split_by_size` shares the relevance of a residual sum a + b in proportion to |a| and |b|, as fits
    z+; without it the z rule does, a R / (a + b), which blows up where a and b cancel unless the rules
    around it are z rules too.
    """

    first: Rule = z_rule
    convolution: Rule = z_rule
    linear: Rule = z_plus_rule
    split_by_size: bool = False


PAPER = Rules()
"""The authors' code: z for convolutions, the first included, z+ for linear layers."""
ALL_Z = Rules(linear=z_rule)
EPSILON = Rules(*[partial(z_rule, epsilon=0.25)] * 3)


def z_plus(low: Tensor, high: Tensor) -> Rules:
    """z^B for the pixels, which lie in [low, high], and z+ everywhere else."""
    first = partial(z_box_rule, low=low, high=high)
    return Rules(first, z_plus_rule, z_plus_rule, split_by_size=True)


# Step 1: relevance of a whole network ----------------------------------------------------------------


@dataclass(frozen=True)
class Balance:
    """What one layer did with the relevance of each image: arriving = leaving + kept."""

    layer: str
    arriving: Float[Tensor, " batch"]
    leaving: Float[Tensor, " batch"]
    kept: Float[Tensor, " batch"]


@dataclass(frozen=True)
class Explanation:
    """Relevance of the input, and the account of every layer from the last to the first."""

    relevance: Float[Tensor, "batch channels height width"]
    classes: Int[Tensor, " batch"]
    logits: Float[Tensor, " batch"]
    balances: tuple[Balance, ...]

    @property
    def unaccounted(self) -> Float[Tensor, " batch"]:
        """Logit minus all relevance found, in the input or kept by a layer; 0 but for rounding."""
        kept = sum(balance.kept for balance in self.balances)
        return self.logits - self.relevance.flatten(1).sum(1) - kept


POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6)
# Through these the gradient itself carries relevance: they move values and never scale them.
MOVES = (nn.MaxPool2d, nn.Flatten, nn.Dropout, nn.Identity, nn.ZeroPad2d, nn.Sequential)


class _Reroute(torch.autograd.Function):
    """Forward: `outputs`; backward: `route(relevance)`, one tensor for each of the inputs."""

    @staticmethod
    def forward(context, route, outputs, *inputs):
        context.route = route
        return outputs.clone()

    @staticmethod
    def backward(context, relevance):
        return None, None, *context.route(relevance)


def as_layer(module: nn.Module) -> Layer:
    """A linear layer, a convolution or an average pool, as the rules see it.

    Raises:
        TypeError: for a convolution that pads with anything but zeros.
    """
    if isinstance(module, POOLS):
        return Layer(partial(_pool, module), partial(_unpool, module), torch.empty(0), None)
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    if isinstance(module, nn.Linear):
        return Layer(functional.linear, lambda values, weight, _: values @ weight, weight, bias)
    if module.padding_mode != "zeros":
        raise TypeError(f"padding with '{module.padding_mode}' has no rule, only with zeros")
    names = ("stride", "padding", "dilation", "groups")
    settings = {name: getattr(module, name) for name in names}
    apply = partial(functional.conv2d, **settings)

    def back(values: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
        return nn.grad.conv2d_input(inputs.shape, weight, values, **settings)

    return Layer(apply, back, weight, None if bias is None else bias.view(-1, 1, 1))


def _pool(module: nn.Module, inputs: Tensor, _weight: Tensor) -> Tensor:
    return type(module).forward(module, inputs)  # calling the module would run the hooks again


def _unpool(module: nn.Module, values: Tensor, _weight: Tensor, inputs: Tensor) -> Tensor:
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        return torch.autograd.grad(_pool(module, inputs, _weight), inputs, values)[0]


def split_sum(
    first: Float[Tensor, "..."],
    second: Float[Tensor, "..."],
    relevance: Float[Tensor, "..."],
    by_size: bool = False,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Relevance of the two terms of a residual sum, in proportion to them or to their sizes.

    Returns:
        (relevance of the first, of the second), and what cancelling terms kept.
    """
    if by_size:
        first, second = first.abs(), second.abs()
    share = relevance / _stable(first + second, 1e-9)
    return (first * share, second * share), relevance - (first + second) * share


def _totals(relevance: Tensor) -> Float[Tensor, " batch"]:
    return relevance.flatten(1).sum(1)


@contextmanager
def _relevance_for_gradient(model, rules: Rules, sums: tuple[type, ...], balances: list[Balance]):
    """Inside, backward through `model` carries relevance by `rules` and fills `balances`."""
    weighted: list[str] = []

    def rule_of(name: str, module: nn.Module) -> Rule:
        if isinstance(module, POOLS):
            return z_rule
        weighted.append(name)
        if len(weighted) == 1:
            return rules.first
        return rules.linear if isinstance(module, nn.Linear) else rules.convolution

    def watch(name: str, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        held = tuple(tensor.detach() for tensor in inputs)
        if isinstance(module, sums):
            hand_back = partial(split_sum, *held, by_size=rules.split_by_size)
        else:
            rule, layer = rule_of(name, module), as_layer(module)

            def hand_back(relevance):
                leaving, kept = rule(layer, *held, outputs.detach(), relevance)
                return (leaving,), kept

        def route(relevance: Tensor) -> tuple[Tensor, ...]:
            parts, kept = hand_back(relevance)
            leaving = sum(_totals(part) for part in parts)
            balances.append(Balance(name, _totals(relevance), leaving, _totals(kept)))
            return parts

        return _Reroute.apply(route, outputs.detach(), *inputs)

    def pass_on(_module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        return _Reroute.apply(lambda relevance: (relevance,), outputs.detach(), *inputs)

    handles, in_place = [], []
    try:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, *POOLS, *sums)):
                handles.append(module.register_forward_hook(partial(watch, name)))
            elif isinstance(module, ACTIVATIONS):
                handles.append(module.register_forward_hook(pass_on))
                if module.inplace:  # would leave its own gradient in the way
                    in_place.append(module)
                    module.inplace = False
            elif not isinstance(module, MOVES) and not list(module.children()):
                kind = type(module).__name__
                cure = "fold it into its convolution first" if "Norm" in kind else "is it a sum?"
                raise TypeError(f"no relevance rule for layer '{name}' ({kind}): {cure}")
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in in_place:
            module.inplace = True


def explain(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    rules: Rules = PAPER,
    *,
    classes: Int[Tensor, " batch"] | None = None,
    sums: tuple[type, ...] = (),
) -> Explanation:
    """Relevance of every input value for the logit of one class (the paper's step 1).

    Args:
        model: of convolutions, linear layers, ReLU or ReLU6, pools and sums, each a module of its
            own, in evaluation mode; normalisation folded.
        classes: whose logit is handed back; the predicted classes without it.
        sums: types of modules that add their two inputs (residual connections).

    Raises:
        TypeError: a layer has no rule. ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("put the model into evaluation mode first")
    balances: list[Balance] = []
    images = images.detach().requires_grad_()
    with torch.enable_grad(), _relevance_for_gradient(model, rules, sums, balances):
        logits = model(images)
        classes = logits.argmax(1) if classes is None else classes
        chosen = logits.detach().gather(1, classes[:, None])
        start = torch.zeros_like(logits).scatter(1, classes[:, None], chosen)
        (relevance,) = torch.autograd.grad(logits, images, start)
    return Explanation(relevance, classes, chosen[:, 0], tuple(balances))


# Other maps ---------------------------------------------------------------------------------------


def gradient_times_input(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    classes: Int[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """x_i times the derivative of the class's logit by x_i."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        chosen = model(images).gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, images)
    return (images * gradient).detach()


def grad_cam(
    model: nn.Module,
    layer: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    classes: Int[Tensor, " batch"],
) -> Float[Tensor, "batch height width"]:
    """Positive part of the outputs of `layer`, weighted by their mean gradient (Selvaraju et al.)."""
    caught: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _m, _i, outputs: caught.append(outputs))
    try:
        with torch.enable_grad():
            # The image asks for a gradient so that frozen networks have one at the layer, too.
            chosen = model(images.detach().requires_grad_()).gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, caught[0])
    finally:
        handle.remove()
    weighted = (gradient.mean((2, 3), keepdim=True) * caught[0]).sum(1, keepdim=True)
    return resize(functional.relu(weighted.detach()), images.shape[-2:])[:, 0]


def resize(maps: Float[Tensor, "batch channels _ _"], size: tuple[int, int]) -> Tensor:
    """Bilinear, averaging when it shrinks."""
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", antialias=True)


def smooth(
    maps: Float[Tensor, "batch height width"], sigma: float
) -> Float[Tensor, "batch height width"]:
    """Gaussian blur, `sigma` in pixels, cut at three sigma, mirrored at the border."""
    reach = min(max(1, math.ceil(3 * sigma)), min(maps.shape[-2:]) - 1)
    steps = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = functional.pad(maps[:, None], [reach] * 4, mode="reflect")
    rows = functional.conv2d(padded, kernel.view(1, 1, -1, 1))
    return functional.conv2d(rows, kernel.view(1, 1, 1, -1))[:, 0]


def edges(
    images: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch height width"]:
    """Length of the Sobel gradient of the mean over the channels."""
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).to(images)
    kernels = torch.stack([across, across.T])[:, None]
    grey = functional.pad(images.mean(1, keepdim=True), [1] * 4, mode="replicate")
    return functional.conv2d(grey, kernels).square().sum(1).sqrt()


def lab(
    images: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """CIE L*a*b* (D65) over 100 of sRGB colours in [0, 1]: the colours of context-aware saliency."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ).to(images)
    xyz = torch.einsum("cd,bdhw->bchw", to_xyz / to_xyz.sum(1, keepdim=True), linear)
    root = torch.where(xyz > 216 / 24389, xyz.clamp(min=1e-9) ** (1 / 3), xyz * 841 / 108 + 4 / 29)
    x, y, z = root.unbind(1)
    return torch.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)], 1)


# Step 2: context-aware saliency -----------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """Constants of context-aware saliency; the defaults are Goferman et al.'s.

    patch, stride: side of a patch and distance of two, in pixels.
    scales: of the map, 1 = as given. neighbours: K, the patches most like a patch.
    position: c, how much distance excuses likeness. foci: saliency from which a pixel is a focus,
    or None to leave the last step out.
    """

    patch: int = 7
    stride: int = 3
    scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3)
    neighbours: int = 64
    position: float = 3.0
    smallest: float = 0.2
    foci: float | None = 0.8

    def places(self, side: int, scale: float) -> int:
        """Patches along a side."""
        return max(1, 1 + round((side * scale - self.patch) / self.stride))


def relevance_map(
    relevance: Float[Tensor, "batch channels height width"], quantile: float = 0.995
) -> Float[Tensor, "batch height width"]:
    """|sum over channels|, clipped at a quantile of each image and scaled to [0, 1]."""
    sizes = relevance.sum(1).abs()
    top = sizes.flatten(1).quantile(quantile, dim=1).view(-1, 1, 1)
    return sizes.clamp(max=top) / top.clamp(min=torch.finfo(sizes.dtype).tiny)


def patches(
    maps: Float[Tensor, "batch channels height width"], scale: float, context: Context
) -> tuple[Float[Tensor, "batch count values"], Float[Tensor, "count 2"], tuple[int, int]]:
    """Overlapping patches of the maps at one scale.

    Sides are rounded so that patches tile them without a rest, which keeps the grid symmetric.

    Returns:
        Values of the patches; their centres (row, column) over the larger side; rows and columns.
    """
    grid = tuple(context.places(side, scale) for side in maps.shape[-2:])
    sides = tuple(context.patch + (number - 1) * context.stride for number in grid)
    values = functional.unfold(resize(maps, sides), context.patch, stride=context.stride).mT
    # Each axis over its own side first: rounding must not move the middle from scale to scale.
    steps = [context.patch / 2 + context.stride * torch.arange(n).to(maps) for n in grid]
    whole = max(maps.shape[-2:])
    axes = [s / side * n / whole for s, side, n in zip(steps, sides, maps.shape[-2:], strict=True)]
    centres = torch.cartesian_prod(*axes)
    return values, centres, grid


def dissimilarity(
    values: Float[Tensor, "batch queries size"],
    centres: Float[Tensor, "queries 2"],
    other_values: Float[Tensor, "batch others size"],
    other_centres: Float[Tensor, "others 2"],
    position: float = 3.0,
) -> Float[Tensor, "batch queries others"]:
    """d = d_value / (1 + c d_position); d_value over its maximum in the image (0 if all are alike)."""
    # About their mean, because the fast form of the distance loses digits far from the origin.
    middle = other_values.mean(1, keepdim=True)
    distances = torch.cdist(values - middle, other_values - middle)
    precision = 16 * torch.finfo(distances.dtype).eps * other_values.norm(dim=-1).amax(1)
    distances = distances.where(distances > precision.view(-1, 1, 1), 0)  # alike but for rounding
    largest = distances.amax((1, 2), keepdim=True).clamp(min=torch.finfo(distances.dtype).tiny)
    return distances / largest / (1 + position * torch.cdist(centres, other_centres))


def scale_saliency(
    maps: Float[Tensor, "batch channels height width"], scale: float, context: Context
) -> Float[Tensor, "batch rows columns"]:
    """S = 1 - exp(-mean of the K smallest d) of every patch at one scale; in [0, 1).

    Candidates are the patches at the scale, its half and its quarter, without the patch itself.
    """
    values, centres, grid = patches(maps, scale, context)
    shrunk = [scale / 2**k for k in range(3) if k == 0 or scale / 2**k >= context.smallest]
    found = [(values, centres, grid), *(patches(maps, s, context) for s in shrunk[1:])]
    others = torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found])
    distances = dissimilarity(values, centres, *others, context.position)
    distances.diagonal(dim1=1, dim2=2).fill_(math.inf)
    nearest = distances.topk(
        min(context.neighbours, distances.shape[-1] - 1), largest=False, sorted=False
    ).values
    return (1 - torch.exp(-nearest.mean(-1))).unflatten(1, grid)


def at_centres(
    grid: Float[Tensor, "batch rows columns"], size: tuple[int, int], context: Context
) -> Float[Tensor, "batch height width"]:
    """Interpolates values of patches between the centres of the patches; constant beyond them."""
    inner = [1 + (n - 1) * context.stride for n in grid.shape[-2:]]
    filled = functional.interpolate(grid[:, None], size=inner, mode="bilinear", align_corners=True)
    whole = functional.pad(filled, [context.patch // 2] * 4, mode="replicate")
    return functional.interpolate(whole, size=tuple(size), mode="bilinear")[:, 0]


def distance_to(chosen: Bool[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
    """Euclidean distance of every pixel to the nearest chosen one, first along rows, then columns.

    Every image needs a chosen pixel.
    """

    def squares(side: int) -> Tensor:
        steps = torch.arange(side, device=chosen.device, dtype=torch.float32)
        return (steps[:, None] - steps).square()

    height, width = chosen.shape[-2:]
    missing = torch.where(chosen, 0.0, math.inf)
    along = (missing[..., None, :] + squares(width)).amin(-1)
    return (along[:, None] + squares(height)[:, :, None]).amin(2).sqrt()


def near_foci(
    saliency: Float[Tensor, "batch height width"], threshold: float = 0.8
) -> Float[Tensor, "batch height width"]:
    """S (1 - d) with d the distance to the nearest focus (S > threshold) over the largest of them.

    The maximum is the focus where nothing exceeds the threshold.
    """
    top = saliency.amax((1, 2), keepdim=True)
    foci = (saliency > threshold) | (saliency == top)
    distances = distance_to(foci).to(saliency)
    return saliency * (1 - distances / distances.amax((1, 2), keepdim=True).clamp(min=1))


def to_unit(maps: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
    """Each map from its minimum to its maximum onto [0, 1]; a constant map to 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).eps)


def context_aware_saliency(
    maps: Float[Tensor, "batch channels height width"], context: Context = Context()
) -> Float[Tensor, "batch height width"]:
    """What stands out of its surroundings, from 0 to 1 in each map (the paper's step 2).

    Raises:
        ValueError: at the smallest scale a side of the map does not hold two patches.
    """
    size, coarsest = maps.shape[-2:], min(context.scales)
    if context.places(min(size), coarsest) < 2:
        raise ValueError(
            f"maps of {size[0]} x {size[1]} are too small for patches of {context.patch} "
            f"at scale {coarsest}"
        )
    levels = [at_centres(scale_saliency(maps, s, context), size, context) for s in context.scales]
    saliency = to_unit(torch.stack(levels).mean(0))
    return saliency if context.foci is None else near_foci(saliency, context.foci)


def salient_relevance(
    relevance: Float[Tensor, "batch channels _ _"],
    size: tuple[int, int],
    context: Context = Context(),
    quantile: float = 0.995,
) -> Float[Tensor, "batch height width"]:
    """SR map: context-aware saliency of the map of relevance, which is resized to `size` first."""
    return context_aware_saliency(
        resize(relevance_map(relevance, quantile)[:, None], size), context
    )


# Measures -----------------------------------------------------------------------------------------


def share_inside(
    maps: Float[Tensor, "batch height width"], masks: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Share of a map's sum that lies inside its mask; maps are not negative."""
    totals = _totals(maps).clamp(min=torch.finfo(maps.dtype).tiny)
    return _totals(maps * masks) / totals


def points_inside(
    maps: Float[Tensor, "batch height width"],
    masks: Bool[Tensor, "batch height width"],
    tolerance: int = 0,
) -> Bool[Tensor, " batch"]:
    """Pointing game: is the (first) maximum inside the mask, or within `tolerance` pixels of it?"""
    wide = functional.max_pool2d(masks[:, None].float(), 2 * tolerance + 1, 1, tolerance)
    return wide.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0] > 0


def top_area(
    maps: Float[Tensor, "batch height width"], share: float
) -> Bool[Tensor, "batch height width"]:
    """The given share of the pixels with the largest values; the first ones of ties."""
    count = round(share * maps[0].numel())
    ranked = maps.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = torch.zeros_like(maps.flatten(1), dtype=torch.bool).scatter(1, ranked, True)
    return chosen.view_as(maps)


def intersection_over_union(
    first: Bool[Tensor, "batch height width"], second: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Shared over joint area."""
    return _totals((first & second).float()) / _totals((first | second).float()).clamp(min=1)


def gini(maps: Float[Tensor, "batch height width"]) -> Float[Tensor, " batch"]:
    """Gini coefficient of the values: 0 all equal, near 1 all in one pixel."""
    values = maps.flatten(1).sort(dim=1).values
    ranks = torch.arange(1, values.shape[1] + 1, device=maps.device, dtype=maps.dtype)
    weighted = (values * ranks).sum(1) / values.sum(1).clamp(min=torch.finfo(maps.dtype).tiny)
    return (2 * weighted - (values.shape[1] + 1)) / values.shape[1]


def components(chosen: Bool[Tensor, "height width"]) -> tuple[int, float]:
    """Number of connected components (corners touch) and the largest one's share of the area."""
    labels, count = ndimage.label(chosen.cpu().numpy(), structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    return count, float(sizes.max() / sizes.sum()) if count else 0.0


def regions_first(
    maps: Float[Tensor, "batch height width"], cells: int
) -> Int[Tensor, "batch regions"]:
    """Cells of a cells x cells grid (numbered row by row) in falling order of the map's mean."""
    means = functional.adaptive_avg_pool2d(maps[:, None], cells).flatten(1)
    return means.sort(dim=1, descending=True, stable=True).indices


def replace_regions(
    images: Float[Tensor, "batch channels height width"],
    fill: Float[Tensor, "batch channels height width"],
    order: Int[Tensor, "batch regions"],
    count: int,
) -> Float[Tensor, "batch channels height width"]:
    """Images in which the first `count` regions of the order show `fill` (deletion; swap the two
    pictures for insertion)."""
    cells = math.isqrt(order.shape[1])
    gone = torch.zeros_like(order, dtype=images.dtype).scatter(1, order[:, :count], 1.0)
    mask = functional.interpolate(gone.view(-1, 1, cells, cells), size=images.shape[-2:])
    return torch.where(mask > 0, fill, images)
