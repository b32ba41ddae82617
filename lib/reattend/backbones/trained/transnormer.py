"""Small language models of TransNormerLLM and of what it is compared with, on news and essays.

All arms have the same blocks (SRMSNorm, SGLU) and read the same text in the same order, and they have as
many parameters within 1 %: what a mixer has fewer, the feed-forward parts have more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from reattend.backbones.store import backbone_path
from reattend.backbones.trained.prose_bpe import held_out_split
from reattend.backbones.trained.prose_bpe import load as load_tokenizer
from reattend.data.word_tokens import random_windows, token_stream
from reattend.language_modeling.transnormer import (
    GatedLinearAttention,
    NormalisedLinearAttention,
    decay_slopes,
)
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.language import GatedFeedForward, Trunk, labelled_loss, parameter_count
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

TEXT = "text.safetensors"


@dataclass(frozen=True)
class Shape:
    """Sizes that the models of all arms share.

    Args:
        length: tokens of a row, and the most that learned positions hold.
        shift: whether half of the channels that a mixer reads are those of the token before.
    """

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    shift: bool = False


@dataclass(frozen=True)
class Setting:
    """What one profile trains: `arms` are names in `ARMS`; every batch has `batch` rows of `shape.length`."""

    shape: Shape
    arms: tuple[str, ...]
    batch: int
    steps: int
    rate: float
    seeds: int
    test_rows: int

    def plan(self) -> TrainingPlan:
        """Warm-up over a fifteenth of the steps, then a cosine to zero; the paper's betas and weight decay."""
        warmup = self.steps // 15
        return TrainingPlan(self.steps, self.rate, warmup=warmup, betas=(0.9, 0.95), fused=True)


MAIN = ("Softmax", "1 + elu", "TNL", "LRPE", "APE", "No content")
ABLATIONS = ("LRPE-d", "Exp-decay", "No gate", "No temperature")
SETTINGS = {
    "smoke": Setting(Shape(300, 16, 16, 2, 2), MAIN, 2, 3, 1e-3, 3, 4),
    "cpu": Setting(Shape(258, 128, 64, 3, 4), MAIN, 8, 360, 6e-3, 4, 512),  # 258: bytes
    "gpu": Setting(Shape(2048, 1024, 512, 8, 8), MAIN + ABLATIONS, 16, 2000, 1e-3, 8, 64),
}


# --- arms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """`mixer(layer, shape)` of every layer, and whether the trunk has learned absolute positions."""

    mixer: Callable[[int, Shape], nn.Module]
    positions: bool = False


def _no_decay(heads: int, layers: int) -> Float[Tensor, "layers heads"]:
    return torch.zeros(layers, heads)


def _same_decay(heads: int, layers: int) -> Float[Tensor, "layers heads"]:
    """The first layer's in all of them: no temperature."""
    return decay_slopes(heads, layers)[:1].expand(layers, -1)


def _gated(
    layer: int, shape: Shape, *, relative: str = "first", decay: Callable = decay_slopes, **options
) -> nn.Module:
    """The method: `relative` positions in the "first" layer, in "all" of them or in "none"."""
    slopes = decay(shape.heads, shape.layers)[layer]
    turned = relative == "all" or (relative == "first" and layer == 0)
    return GatedLinearAttention(shape.width, shape.heads, slopes, relative=turned, **options)


def _softmax(layer: int, shape: Shape) -> nn.Module:
    return SoftmaxAttention(shape.width, shape.heads)


def _normalised(layer: int, shape: Shape) -> nn.Module:
    return NormalisedLinearAttention(shape.width, shape.heads)


ARMS = {
    "Softmax": Arm(_softmax),
    "1 + elu": Arm(_normalised, positions=True),
    "TNL": Arm(_gated),
    "LRPE": Arm(partial(_gated, relative="all", decay=_no_decay)),
    "APE": Arm(partial(_gated, relative="none", decay=_no_decay), positions=True),
    "No content": Arm(partial(_gated, relative="none", content=False)),
    "LRPE-d": Arm(partial(_gated, relative="all")),
    "Exp-decay": Arm(partial(_gated, relative="none")),
    "No gate": Arm(partial(_gated, gate=False)),
    "No temperature": Arm(partial(_gated, decay=_same_decay)),
}


def _trunk(arm: str, shape: Shape, hidden: int) -> Trunk:
    def layer(number: int, width: int) -> nn.Module:
        mixer = ARMS[arm].mixer(number, shape)
        return TokenShift(mixer, width, learned=False) if shape.shift else mixer

    return Trunk(
        shape.vocabulary,
        shape.width,
        [partial(layer, number) for number in range(shape.layers)],
        positions=shape.length if ARMS[arm].positions else None,
        feed_forward=partial(GatedFeedForward, hidden=hidden, activation=nn.Identity()),
        embedding_std=shape.width**-0.5,
        norm="simple_rms",
    )


def untrained(arm: str, shape: Shape, seed: int) -> Trunk:
    """A model with random weights; models of one seed start with the same embeddings.

    The method's feed-forward parts are twice as wide as the model; those of other arms are as wide as
    gives the nearest number of parameters.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")
    hidden = 2 * shape.width
    short = parameter_count(_trunk("TNL", shape, hidden)) - parameter_count(
        _trunk(arm, shape, hidden)
    )
    hidden += round(short / (3 * shape.width * shape.layers))
    torch.manual_seed(seed)
    return _trunk(arm, shape, hidden)


# --- text ----------------------------------------------------------------------------------------


def text_loss(model: Trunk, rows: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean nats of every next token."""
    return labelled_loss(model, rows[:, :-1], rows[:, 1:])


def spread_rows(
    stream: Int[Tensor, " tokens"], rows: int, length: int
) -> Int[Tensor, "rows length"]:
    """Rows that do not overlap, spread evenly over a stream.

    Raises:
        ValueError: when the stream is too short.
    """
    if len(stream) < rows * length:
        raise ValueError(f"{len(stream)} tokens hold no {rows} rows of {length}")
    return stream[: len(stream) // rows * rows].view(rows, -1)[:, :length].contiguous()


def pair_counts(stream: Int[Tensor, " tokens"], entries: int) -> Int[Tensor, "entries entries"]:
    """How often token b follows token a, at [a, b]."""
    pairs = torch.bincount(stream[:-1] * entries + stream[1:], minlength=entries**2)
    return pairs.view(entries, entries)


def streams(entries: int) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Training and held-out text as tokens."""
    tokenizer = load_tokenizer(entries)
    train_texts, held_out = held_out_split()
    return token_stream(train_texts, tokenizer), token_stream(held_out, tokenizer)


def fit(
    arm: str, setting: Setting, stream: Int[Tensor, " tokens"], seed: int, device: str = "cpu"
) -> tuple[Trunk, Float[Tensor, " steps"]]:
    """A trained model of one arm, and the loss of every step; arms of one seed read the same batches."""
    model = untrained(arm, setting.shape, seed).to(device)
    generator = torch.Generator().manual_seed(1000 + seed)
    windows = random_windows(stream, setting.batch, setting.shape.length + 1, generator)
    batches: Iterator[Tensor] = (rows.to(device) for rows in windows)
    log = train(model, batches, text_loss, setting.plan(), groups=decay_matrices)
    return model, torch.tensor(log.losses)


# --- the build -----------------------------------------------------------------------------------


def _file(arm: str, seed: int) -> str:
    return f"{arm.lower().replace(' ', '')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights, losses, held-out rows and the counts of token pairs."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    stream, held_out = streams(setting.shape.vocabulary)
    kept = {
        "held_out": spread_rows(held_out, setting.test_rows, setting.shape.length + 1),
        "pairs": pair_counts(stream, setting.shape.vocabulary),
    }
    for arm in setting.arms:
        losses = []
        for seed in range(setting.seeds):
            model, loss = fit(arm, setting, stream, seed, device)
            save_model(model, target / _file(arm, seed))
            losses.append(loss)
        kept[f"losses of {arm}"] = torch.stack(losses)
        last = ", ".join(f"{loss[-50:].mean():.3f}" for loss in losses)
        print(f"{arm}: {last} nats over the last 50 steps", flush=True)
    save_file(kept, target / TEXT)


@dataclass(frozen=True)
class TextModels:
    """Trained models by arm, a list over seeds each, and the text they are asked about.

    Attributes:
        losses: training loss of every step by arm, [seeds, steps].
        held_out: rows of held-out text.
        pairs: counts of token pairs in the training text.
    """

    models: dict[str, list[Trunk]]
    losses: dict[str, Float[Tensor, "seeds steps"]]
    held_out: Int[Tensor, "rows length"]
    pairs: Int[Tensor, "entries entries"]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> TextModels:
    """The models of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("transnormer", profile)

    def read(arm: str, seed: int) -> Trunk:
        model = untrained(arm, setting.shape, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval()

    kept = load_file(directory / TEXT)
    models = {arm: [read(arm, seed) for seed in range(setting.seeds)] for arm in setting.arms}
    losses = {arm: kept[f"losses of {arm}"] for arm in setting.arms}
    return TextModels(models, losses, kept["held_out"], kept["pairs"])
