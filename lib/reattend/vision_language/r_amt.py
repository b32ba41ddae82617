"""R-AMT: regularised mask tuning (arXiv 2307.15049).

All weights of a pretrained model stay as they are; learnt is which of them take part. Every chosen weight
has a real number M, the weight counts while M lies above a threshold, and gradients pass through that step
unchanged. Where the gradient of the task and that of a loss which keeps the old answers disagree in sign,
the former is dropped at random. Names and constants follow the official code (wuw2019/R-AMT).

Masks of attention weights are the paper's AMT, of the MLP's MMT, of both PMT; R- stands for the dropout of
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Generator, Tensor, nn
from torch.func import functional_call

START, THRESHOLD = 1e-2, 5e-3
NORM_WEIGHT = 1e-4
ATTENTION, MLP, PATCHES = "attention.", "feed_forward.", "patches."
PLACES = {"AMT": (ATTENTION, PATCHES), "MMT": (MLP,), "PMT": (ATTENTION, PATCHES, MLP)}
"""Which weights of an `ImageTower` each kind of mask tuning masks; the released code masks the patch
embedding with those of attention."""


class _Step(torch.autograd.Function):
    """1 above the threshold and 0 elsewhere; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: float) -> Tensor:
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def binary_mask(
    values: Float[Tensor, "*shape"], threshold: float = THRESHOLD
) -> Float[Tensor, "*shape"]:
    """1[M > threshold], with a straight-through gradient that is not clipped, whatever M is."""
    return _Step.apply(values, threshold)


def weights_in(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Names of the weight matrices (not biases, norms, positions) whose name contains one of `parts`.

    Raises:
        ValueError: when there is none; lists the matrices that there are.
    """
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1 and n.endswith("weight")]
    found = [name for name in matrices if any(part in name for part in parts)]
    if not found:
        raise ValueError(
            f"no weight is named like {', '.join(parts)}; there are: {', '.join(matrices)}"
        )
    return found


class WeightMasks(nn.Module):
    """A real M for every entry of the named weights of a model, which itself is not part of this module.

    At first every weight takes part, so that the masked model is the model.

    Args:
        names: of weights, as `model.named_parameters()` has them.
        start: of every entry of M.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        start: float = START,
        threshold: float = THRESHOLD,
    ) -> None:
        super().__init__()
        self.names, self.threshold = tuple(names), threshold
        weights = [model.get_parameter(name) for name in self.names]
        self.values = nn.ParameterList(torch.full_like(weight, start) for weight in weights)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """W * 1[M > threshold] by name; those weights W get no gradient."""
        pairs = zip(self.names, self.values, strict=True)
        return {
            name: model.get_parameter(name).detach() * binary_mask(value, self.threshold)
            for name, value in pairs
        }

    def forward(self, model: nn.Module, *inputs: Any) -> Any:
        """What the model says of `inputs` under the masks."""
        return functional_call(model, self.weights(model), inputs)

    def norms(self) -> Float[Tensor, ""]:
        """Sum over the matrices of the Frobenius norm of M (not squared)."""
        return torch.stack([value.norm() for value in self.values]).sum()

    def bits(self) -> list[Bool[Tensor, "*_"]]:
        """Which weights take part, matrix by matrix."""
        return [value.detach() > self.threshold for value in self.values]

    def zeros(self) -> float:
        """Share of the maskable weights that take no part."""
        bits = self.bits()
        return sum(int((~b).sum()) for b in bits) / sum(b.numel() for b in bits)

    @torch.no_grad()
    def set_bits(self, bits: Sequence[Bool[Tensor, "*_"]]) -> None:
        """Take these bits: M becomes 1 where a weight takes part and 0 elsewhere."""
        for value, chosen in zip(self.values, bits, strict=True):
            value.copy_(chosen)


def pack_bits(bits: Sequence[Bool[Tensor, "*_"]]) -> UInt8[Tensor, " bytes"]:
    """All bits one after another, eight to a byte, the first one highest; zeros fill the last byte."""
    flat = torch.cat([b.flatten() for b in bits])
    padded = torch.zeros(math.ceil(len(flat) / 8) * 8, dtype=torch.uint8)
    padded[: len(flat)] = flat
    places = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8)
    return (padded.view(-1, 8) * places).sum(1, dtype=torch.uint8)


def unpack_bits(
    packed: UInt8[Tensor, " bytes"], shapes: Sequence[torch.Size]
) -> list[Bool[Tensor, "*_"]]:
    """The bits of matrices of these shapes out of `pack_bits`.

    Raises:
        ValueError: when the bytes are not as many as the shapes need.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if len(packed) != math.ceil(sum(sizes) / 8):
        raise ValueError(
            f"{len(packed)} bytes for {sum(sizes)} bits: the masks belong to other weights"
        )
    places = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8)
    flat = (packed[:, None] & places).bool().flatten()[: sum(sizes)]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def imitation_loss(
    logits: Float[Tensor, "batch classes"],
    old: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """T^2 times the cross-entropy of softmax(logits / T) under softmax(old / T), in nats.

    Its gradient in `logits` is that of the KL divergence from the old answers: zero where they agree.
    """
    targets = (old.detach() / temperature).softmax(-1)
    return -(temperature**2) * (targets * (logits / temperature).log_softmax(-1)).sum(-1).mean()


def keep_probability(
    task: Float[Tensor, "*shape"], old: Float[Tensor, "*shape"], epsilon: float = 1e-8
) -> Float[Tensor, "*shape"]:
    """P = (1 + sign(g_a) (g_a + g_b) / (|g_a| + |g_b| + epsilon)) / 2.

    1 where both gradients have one sign, |g_a| / (|g_a| + |g_b|) where they have not.
    """
    return (1 + task.sign() * (task + old) / (task.abs() + old.abs() + epsilon)) / 2


def gradient_dropout(
    task: Float[Tensor, "*shape"],
    old: Float[Tensor, "*shape"],
    strength: float = 1.0,
    generator: Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """((1 - strength) + strength 1[P > u]) g_a with u uniform in [0, 1), entry by entry.

    Only the gradient of the task is ever applied; `old`, that of the imitation loss, decides what is kept.

    Args:
        strength: 0 keeps all, which is tuning without the regulariser, 1 drops wholly.

    Raises:
        ValueError: for a strength outside of 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, got {strength}")
    u = torch.rand(task.shape, generator=generator, dtype=task.dtype, device=task.device)
    kept = (keep_probability(task, old) > u).to(task.dtype)
    return ((1 - strength) + strength * kept) * task


def regularised_gradients(
    task_loss: Float[Tensor, ""],
    old_loss: Float[Tensor, ""],
    masks: WeightMasks,
    strength: float = 1.0,
    generator: Generator | None = None,
) -> list[Float[Tensor, "*_"]]:
    """What the optimiser of M gets: gradients of the task through `gradient_dropout`, matrix by matrix.

    Args:
        task_loss: cross-entropy plus `NORM_WEIGHT` times `masks.norms()`.
        old_loss: `imitation_loss` of the same logits.
    """
    values = list(masks.values)
    old = torch.autograd.grad(old_loss, values, retain_graph=True)
    task = torch.autograd.grad(task_loss, values)
    pairs = zip(task, old, strict=True)
    return [gradient_dropout(a, b, strength, generator) for a, b in pairs]


def with_gradients(
    value: Float[Tensor, ""],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Float[Tensor, ""]:
    """A scalar equal to `value` whose gradients in `parameters` are the given ones.

    So gated gradients go through any training loop that calls `backward` on a loss.
    """
    pairs = zip(parameters, gradients, strict=True)
    return value.detach() + sum(((p - p.detach()) * g.detach()).sum() for p, g in pairs)
