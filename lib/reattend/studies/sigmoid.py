"""Small models with sigmoid or softmax attention: what they are trained on, and what is read off them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from reattend.data.images import ImageSet
from reattend.data.word_tokens import random_windows, token_stream
from reattend.language_modeling.sigmoid_attention import (
    Attention,
    LayerScale,
    jacobian_norm,
    length_bias,
    outlier_tokens,
    sigmoid_jacobian_bound,
    single_head,
)
from reattend.training.loop import TrainingLog, TrainingPlan, train
from reattend.training.vision import Recipe, correct
from reattend.training.vision import fit as fit_images
from reattend.trunks.language import Block, FeedForward, Trunk

Arm = Mapping[str, Any]
"""Options of `Attention`; in a language model also "layer_scale", the start of both branches' scales."""


class Bytes:
    """A text's UTF-8 bytes are its tokens; byte 1, which no text holds, closes a document."""

    def encode(self, text: str) -> Int[Tensor, " bytes"]:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def even_rows(texts: list[str], rows: int, length: int) -> Int[Tensor, "rows length"]:
    """Rows of bytes at even distances of the joined texts."""
    stream = token_stream(texts, Bytes())
    return stream.unfold(0, length, (len(stream) - length) // rows)[:rows]


def next_byte_loss(model: nn.Module, rows: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of every byte but the first, nats."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def test_loss(model: nn.Module, rows: Int[Tensor, "batch length"]) -> float:
    """`next_byte_loss` of all rows, fifty at a time; every row counts alike."""
    parts = [next_byte_loss(model, part).item() * len(part) for part in rows.split(50)]
    return sum(parts) / len(rows)


def watch_norms(model: Trunk) -> list[float]:
    """A list that grows by the mean norm of the mixers' outputs, per token, at every training step."""
    norms, parts = [], []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training:
            parts.append(output.detach().norm(dim=-1).mean())
            if len(parts) == len(model.blocks):
                norms.append(torch.stack(parts).mean().item())
                parts.clear()

    for block in model.blocks:
        block.mixer.register_forward_hook(note)
    return norms


@dataclass(frozen=True)
class Run:
    """A trained language model, its training, and the norm of the attention output at every step."""

    model: Trunk
    log: TrainingLog
    norms: list[float]


@dataclass(frozen=True)
class ByteModels:
    """Language models of one size on one stream of bytes.

    Attributes:
        stream: the bytes to train on, END after each document.
        length: of a row, in bytes.
        batch: rows of a step.
    """

    stream: Int[Tensor, " bytes"]
    length: int
    batch: int
    width: int
    layers: int
    device: torch.device

    def untrained(self, arm: Arm, seed: int) -> Trunk:
        """A model with the weights of `seed`: the same for every activation."""
        options = dict(arm)
        scale = options.pop("layer_scale", None)

        def scaled(part):
            if scale is None:
                return part
            return lambda width: LayerScale(width, part(width), scale)

        torch.manual_seed(seed)
        mixers = [scaled(lambda width: Attention(width, **options))] * self.layers
        model = Trunk(
            256,
            self.width,
            mixers,
            feed_forward=scaled(FeedForward),
            embedding_std=self.width**-0.5,
        )
        return model.to(self.device)

    def train(self, arm: Arm, seed: int, rate: float, steps: int) -> Run:
        """AdamW with the betas of the official code; the rows of a step depend on `seed` alone."""
        model = self.untrained(arm, seed)
        norms = watch_norms(model)
        draw = torch.Generator().manual_seed(seed)
        rows = random_windows(self.stream, self.batch, self.length + 1, draw)
        plan = TrainingPlan(steps, rate, warmup=steps // 10, betas=(0.9, 0.95), fused=True)
        log = train(model, (each.to(self.device) for each in rows), next_byte_loss, plan)
        return Run(model, log, norms)


@contextlib.contextmanager
def other_bias(model: Trunk, bias: float | None) -> Iterator[None]:
    """All attention layers have this b inside the block; None leaves them alone."""
    mixers = [block.mixer for block in model.blocks]
    trained = [mixer.bias for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.bias = mixer.bias if bias is None else bias
        yield
    finally:
        for mixer, value in zip(mixers, trained, strict=True):
            mixer.bias = value


class ImageClassifier(nn.Module):
    """A small vision transformer for grey pictures of 28 x 28: 49 patches, a linear head on all their states.

    Pixels are standardised by mean and deviation of Fashion-MNIST. Learned positions start as large as the
    patches, standard deviation 0.5: with 0.02, the usual start, a short training hardly finds them.

    Args:
        arm: options of `Attention`.
        width, layers: of the transformer.
    """

    def __init__(self, arm: Arm, width: int, layers: int, classes: int = 10):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.positions = nn.Parameter(0.5 * torch.randn(49, width))
        options = {"causal": False, "positions": "none"} | arm
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, 2, **options), FeedForward(width)) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(49 * width, classes)

    def forward(
        self, pixels: UInt8[Tensor, "batch channels 28 28"]
    ) -> Float[Tensor, "batch classes"]:
        x = self.embed((pixels[:, :1].float() / 255 - 0.286) / 0.353).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x).flatten(1))


class LinearClassifier(nn.Module):
    """Logistic regression on the pixels: what any picture model must beat."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.head = nn.Linear(28 * 28, classes)

    def forward(
        self, pixels: UInt8[Tensor, "batch channels 28 28"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head((pixels[:, :1].float() / 255 - 0.5).flatten(1))


def fit_classifier(
    model: nn.Module, pictures: ImageSet, recipe: Recipe, seed: int, device: torch.device
) -> nn.Module:
    """Train a classifier on the training pictures."""
    model = model.to(device)
    fit_images(model, pictures.pixels, pictures.labels, recipe, seed=seed)
    return model


def accuracy(model: nn.Module, pictures: ImageSet, count: int) -> float:
    """Share of the first `count` pictures that are classified rightly, %."""
    right = correct(model, pictures.pixels[:count], pictures.labels[:count])
    return 100 * right.double().mean().item()


# --- regularity ------------------------------------------------------------------------------------


def jacobian_norms(
    outliers: list[float],
    draws: int,
    seed: int,
    device: torch.device,
    length: int = 32,
    width: int = 16,
) -> dict[str, np.ndarray]:
    """Local Lipschitz constants of random heads on normal tokens, the first enlarged (`outlier_tokens`).

    Weights are normal with variance 1 / width. The same heads and tokens serve every activation and outlier.

    Returns:
        "softmax", "sigmoid" (b = -log n), "sigmoid b = 0", and "bound" of the sigmoid -> [outliers, draws].
    """
    generator = torch.Generator().manual_seed(seed)
    w_q, w_k, w_v, starts = (
        torch.randn(draws, rows, width, generator=generator, dtype=torch.float64).to(device)
        / width**0.5
        for rows in (width, width, width, length)
    )
    a = w_q @ w_k.mT / width**0.5
    b = length_bias(length)
    heads = {
        "softmax": ("softmax", 0.0),
        "sigmoid": ("sigmoid", b),
        "sigmoid b = 0": ("sigmoid", 0.0),
    }
    norms: dict[str, list[np.ndarray]] = {name: [] for name in [*heads, "bound"]}
    for ratio in outliers:
        x = outlier_tokens(draws, length, width, ratio, torch.Generator().manual_seed(seed + 1))
        x = x.to(device)
        for name, (activation, bias) in heads.items():

            def norm(x, a, w_v, start, activation=activation, bias=bias):
                head = partial(single_head, a=a, w_v=w_v, activation=activation, bias=bias)
                return jacobian_norm(head, x, start)

            norms[name].append(vmap(norm)(x, a, w_v, starts).cpu().numpy())
        bound = partial(sigmoid_jacobian_bound, bias=b)
        norms["bound"].append(vmap(bound)(x, a, w_v).cpu().numpy())
    return {name: np.array(values) for name, values in norms.items()}
