"""Small models with sigmoid or softmax attention: what they are trained on, and what is read off them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.data.mqar import RecallTask, recall_accuracy, recall_batch
from reattend.data.word_tokens import token_stream
from reattend.language_modeling.sigmoid_attention import Attention
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.language import Block, FeedForward, Trunk, labelled_loss


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


def recall_curve(
    arm: Mapping[str, Any], task: RecallTask, seed: int, steps: int, device: torch.device
) -> list[float]:
    """Accuracy on 500 rows, %, at eight times of a training of two layers that ends above 99 %."""
    torch.manual_seed(seed)
    mixers = [lambda width: Attention(width, 1, positions="none", **arm)] * 2
    model = Trunk(task.vocabulary, 64, mixers, positions=task.length, embedding_std=64**-0.5)
    model, draw = model.to(device), torch.Generator().manual_seed(seed)
    batches = (tuple(x.to(device) for x in recall_batch(task, 32, draw)) for _ in range(steps))
    tokens, labels = recall_batch(task, 500, torch.Generator().manual_seed(10_000))
    curve: list[float] = []

    @torch.no_grad()
    def solved(model: nn.Module) -> bool:
        answers = model(tokens.to(device)).argmax(-1).cpu()
        curve.append(100 * recall_accuracy(answers, labels).mean().item())
        return curve[-1] > 99

    plan = TrainingPlan(steps=steps, learning_rate=3e-3, warmup=20)
    train(
        model, batches, lambda m, b: labelled_loss(m, *b), plan, stop=solved, check_every=steps // 8
    )
    return curve


class ImageClassifier(nn.Module):
    """A small vision transformer for grey pictures of 28 x 28: 49 patches, mean of the tokens, linear.

    Args:
        arm: options of `Attention`.
        width, layers: of the transformer.
    """

    def __init__(self, arm: Mapping[str, Any], width: int, layers: int, classes: int = 10):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(49, width))
        options = {"causal": False, "positions": "none"} | arm
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, 2, **options), FeedForward(width)) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(
        self, pixels: UInt8[Tensor, "batch channels 28 28"]
    ) -> Float[Tensor, "batch classes"]:
        x = self.embed(pixels[:, :1].float() / 255 - 0.5).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x).mean(1))


class LinearClassifier(nn.Module):
    """Logistic regression on the pixels: what any picture model must beat."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.head = nn.Linear(28 * 28, classes)

    def forward(
        self, pixels: UInt8[Tensor, "batch channels 28 28"]
    ) -> Float[Tensor, "batch classes"]:
        return self.head((pixels[:, :1].float() / 255 - 0.5).flatten(1))
