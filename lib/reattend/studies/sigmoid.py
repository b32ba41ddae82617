"""Small models with sigmoid or softmax attention: what they are trained on, and what is read off them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

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


def tail_averages(
    model: Trunk, stops: Sequence[int]
) -> tuple[dict[int, Trunk], Callable[[int], None]]:
    """Models whose weights are the mean over the last sixth of the steps before each stop.

    Under a constant learning rate such a mean is as good as a model whose rate was brought down to zero at
    that stop, and one training gives it for every stop. A stop is a number of steps.

    Returns:
        Stop -> averaged model, in evaluation mode, and what the training loop has to call after each step.
    """
    averages = {stop: AveragedModel(model).eval() for stop in stops}

    def note(step: int) -> None:
        for stop, average in averages.items():
            if stop - max(1, stop // 6) <= step < stop:
                average.update_parameters(model)

    return {stop: average.module for stop, average in averages.items()}, note


@dataclass(frozen=True)
class Run:
    """A language model at its stops, its training, and the norm of the attention output at every step."""

    models: dict[int, Trunk]
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

    def train(self, arm: Arm, seed: int, rate: float, stops: Sequence[int]) -> Run:
        """AdamW at a constant rate, the betas of the official code; models are averages before each stop.

        Warm-up takes a tenth of the first stop; the rows of a step depend on `seed` alone.
        """
        model = self.untrained(arm, seed)
        models, average = tail_averages(model, stops)
        norms = watch_norms(model)
        draw = torch.Generator().manual_seed(seed)
        rows = random_windows(self.stream, self.batch, self.length + 1, draw)
        plan = TrainingPlan(
            max(stops),
            rate,
            warmup=min(stops) // 10,
            betas=(0.9, 0.95),
            schedule="constant",
            fused=True,
        )
        batches = (each.to(self.device) for each in rows)
        log = train(model, batches, next_byte_loss, plan, after_step=average)
        return Run(models, log, norms)


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


class Sheets(NamedTuple):
    """Sheets of small pictures, the place on each that is asked about, and the class of what lies there."""

    pieces: Float[Tensor, "sheets places pixels"]
    asked: Int[Tensor, " sheets"]
    labels: Int[Tensor, " sheets"]


PLACES, PIXELS = 16, 49
"""Pictures on a sheet, and pixels of a picture of 7 x 7."""


@dataclass(frozen=True)
class Pieces:
    """Pictures of 28 x 28 made small, means of 4 x 4 pixels, by which sheets are filled.

    Attributes:
        pixels: standardised by the mean of Fashion-MNIST and roughly its deviation.
    """

    pixels: Float[Tensor, "items pixels"]
    labels: Int[Tensor, " items"]

    @classmethod
    def of(cls, pictures: ImageSet, device: torch.device) -> Pieces:
        """All pictures of a set."""
        small = F.avg_pool2d(pictures.pixels[:, 0].float(), 4).flatten(1) / 255
        return cls(((small - 0.286) / 0.3).to(device), pictures.labels.to(device))

    def sheets(self, count: int, seed: int) -> Iterator[Sheets]:
        """Endless batches of `count` sheets, pictures and places drawn at random, with replacement."""
        draw, device = torch.Generator().manual_seed(seed), self.labels.device
        while True:
            items = torch.randint(len(self.labels), (count, PLACES), generator=draw).to(device)
            asked = torch.randint(PLACES, (count,), generator=draw).to(device)
            chosen = items.gather(1, asked[:, None])[:, 0]
            yield Sheets(self.pixels[items], asked, self.labels[chosen])


class SheetReader(nn.Module):
    """A small vision transformer that says what lies at the place it is asked about.

    A patch is a whole small picture, and one token asks: the head reads its state alone. What it says of
    the picture must come by attention, to the key of the asked place.

    Args:
        arm: options of `Attention`.
        width, layers: of the transformer.
    """

    def __init__(self, arm: Arm, width: int, layers: int, classes: int = 10):
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.positions = nn.Parameter(0.5 * torch.randn(PLACES, width))
        self.question = nn.Embedding(PLACES, width)
        options = {"causal": False, "positions": "none"} | arm
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, 2, **options), FeedForward(width)) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, sheets: Sheets) -> Float[Tensor, "sheets classes"]:
        patches = self.embed(sheets.pieces) + self.positions
        x = torch.cat([self.question(sheets.asked)[:, None], patches], dim=1)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x[:, 0]))


class LinearReader(nn.Module):
    """Logistic regression on all pixels and the asked place: what any reader must beat."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.head, self.question = (
            nn.Linear(PLACES * PIXELS, classes),
            nn.Embedding(PLACES, classes),
        )

    def forward(self, sheets: Sheets) -> Float[Tensor, "sheets classes"]:
        return self.head(sheets.pieces.flatten(1)) + self.question(sheets.asked)


def fit_reader(
    model: nn.Module, pieces: Pieces, batch: int, rate: float, steps: int, seed: int
) -> nn.Module:
    """Train a reader on sheets that depend on `seed` alone; AdamW, cosine to zero."""

    def loss(model: nn.Module, sheets: Sheets) -> Tensor:
        return F.cross_entropy(model(sheets), sheets.labels)

    plan = TrainingPlan(steps, rate, weight_decay=0.05, warmup=20, fused=True)
    train(model, pieces.sheets(batch, seed), loss, plan)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, sheets: Sheets) -> float:
    """Share of the sheets that are read rightly, %."""
    return 100 * (model(sheets).argmax(1) == sheets.labels).double().mean().item()


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
