"""Small language models of Deconstructing Attention on news and essays, read byte by byte.

Simplified mixers in all layers, or in some beside standard attention. All arms have equally many parameters but
"Half", which is a hybrid's standard layers without the simplified ones. A hybrid whose other layers are MLPs is the
placebo of the other hybrids. Arms of one seed start with the same embeddings and read the same text in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.backbones.trained.transnormer import pair_counts, spread_rows, streams, text_loss
from reattend.data.word_tokens import random_windows
from reattend.language_modeling.deconstructing_attention import (
    Approximate,
    NonApproximate,
    StaticEmbQK,
    StreamQK,
    StreamTrunk,
    TokenMLP,
    placement,
)
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.language import GatedFeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

TEXT = "text.safetensors"


@dataclass(frozen=True)
class Shape:
    """Sizes that the models of all arms share.

    Args:
        length: tokens of a row, and of the constant stream.
        hidden: width of the feed-forward parts.
        shift: whether half of the channels that a mixer reads are those of the token before.
    """

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    hidden: int
    shift: bool = False


@dataclass(frozen=True)
class Setting:
    """What one profile trains: every batch has `batch` rows of `shape.length` tokens and their followers."""

    shape: Shape
    arms: tuple[str, ...]
    batch: int
    steps: int
    rate: float
    seeds: int
    test_rows: int


def plan(steps: int, rate: float) -> TrainingPlan:
    """Warm-up over a fifteenth of the steps (the paper: 2,000 of 28,600), then a cosine to zero."""
    return TrainingPlan(steps, rate, warmup=steps // 15, betas=(0.9, 0.95), fused=True)


SIMPLE = ("MLP", "Approximate", "Non-approximate", "RndEmbQK", "FixedSeqQK", "StaticEmbQK")
HYBRIDS = ("Non-approximate hybrid", "RndEmbQK hybrid", "StaticEmbQK hybrid")
MAIN = ("Standard", "Half", *SIMPLE, *HYBRIDS, "MLP hybrid")
MORE = ("Approximate hybrid", "FixedSeqQK hybrid")
PLACES = ("shifted", "bottom", "middle", "top", "quarter", "all but first", "all but last")
PLACED = tuple(f"RndEmbQK {place}" for place in (*PLACES, "all but both ends"))
SETTINGS = {
    "smoke": Setting(Shape(258, 16, 12, 4, 2, 16), MAIN, 2, 2, 1e-3, 3, 8),
    "cpu": Setting(Shape(258, 96, 48, 4, 4, 128), MAIN, 8, 360, 6e-3, 4, 256),  # 258: bytes
    "gpu": Setting(Shape(2048, 512, 384, 8, 8, 1024), MAIN + MORE + PLACED, 16, 2000, 1e-3, 5, 64),
}


# --- arms ----------------------------------------------------------------------------------------


class ShiftedEmbeddings(TokenShift):
    """A `TokenShift` that treats the embeddings that its mixer reads as it treats the states."""

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        *read: Tensor,
        cache: dict | None = None,
        embeddings: Float[Tensor, "batch length width"],
        **more: Any,
    ) -> Float[Tensor, "batch length width"]:
        """Raises ValueError for a cache: the embedding before is not kept."""
        if cache is not None:
            raise ValueError("shifted embeddings have no cached form")
        before = F.pad(embeddings, (0, 0, 1, -1))
        embeddings = embeddings.lerp(before, self.share.to(embeddings))
        return super().forward(x, *read, embeddings=embeddings, **more)


VARIANTS: dict[str, Callable[[int, int], nn.Module]] = {
    "Standard": SoftmaxAttention,
    "MLP": lambda width, heads: TokenMLP(width),
    "Approximate": Approximate,
    "Non-approximate": NonApproximate,
    "RndEmbQK": StreamQK,
    "FixedSeqQK": StreamQK,
    "StaticEmbQK": StaticEmbQK,
}


def variants(arm: str, layers: int) -> tuple[str, ...]:
    """What each layer of an arm is, from the first.

    An arm is "Half", or a name in `VARIANTS` and, after a space, a placement; without one all layers are alike.

    Raises:
        ValueError: for an unknown variant or placement; lists the known ones.
    """
    if arm == "Half":
        return ("Standard",) * (layers // 2)
    variant, _, where = arm.partition(" ")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant '{variant}'; there are: Half, {', '.join(VARIANTS)}")
    simplified = placement(where or "uniform", layers)
    return tuple(variant if simple else "Standard" for simple in simplified)


def _mixer(variant: str, shape: Shape, width: int) -> nn.Module:
    mixer = VARIANTS[variant](width, shape.heads)
    if not shape.shift:
        return mixer
    shift = ShiftedEmbeddings if isinstance(mixer, StaticEmbQK) else TokenShift
    return shift(mixer, width, learned=False)


def untrained(
    arm: str, shape: Shape, seed: int, text: Int[Tensor, " length"] | None = None
) -> Trunk:
    """A model with random weights; models of one seed start with the same embeddings.

    Args:
        text: the constant text of FixedSeqQK; zeros where not given, to be filled from a file.

    Raises:
        ValueError: for an unknown arm.
    """
    layers, deviation = variants(arm, shape.layers), shape.width**-0.5
    kind = Trunk
    if "RndEmbQK" in layers:
        noise = torch.randn(
            shape.length, shape.width, generator=torch.Generator().manual_seed(seed)
        )
        kind = partial(StreamTrunk, stream=deviation * noise)
    elif "FixedSeqQK" in layers:
        kind = partial(StreamTrunk, stream=torch.zeros(shape.length, dtype=torch.long))
    torch.manual_seed(seed)
    model = kind(
        shape.vocabulary,
        shape.width,
        [partial(_mixer, variant, shape) for variant in layers],
        feed_forward=partial(GatedFeedForward, hidden=shape.hidden),
        embedding_std=deviation,
        norm="rms",
    )
    if text is not None and "FixedSeqQK" in layers:
        model.stream.copy_(text)
    return model


# --- the build -----------------------------------------------------------------------------------


def fit(
    arm: str, setting: Setting, stream: Int[Tensor, " tokens"], seed: int, device: str = "cpu"
) -> tuple[Trunk, Float[Tensor, " steps"]]:
    """A trained model of one arm, and the loss of every step; arms of one seed read the same batches."""
    shape = setting.shape
    model = untrained(arm, shape, seed, stream[: shape.length]).to(device)
    generator = torch.Generator().manual_seed(1000 + seed)
    windows = random_windows(stream, setting.batch, shape.length + 1, generator)
    batches = (rows.to(device) for rows in windows)
    log = train(model, batches, text_loss, plan(setting.steps, setting.rate), groups=decay_matrices)
    return model, torch.tensor(log.losses)


def _file(arm: str, seed: int) -> str:
    return f"{arm.lower().replace(' ', '-')}-{seed}.safetensors"


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
    setting, directory = SETTINGS[profile], backbone_path("deconstructing_attention", profile)

    def read(arm: str, seed: int) -> Trunk:
        model = untrained(arm, setting.shape, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval()

    kept = load_file(directory / TEXT)
    models = {arm: [read(arm, seed) for seed in range(setting.seeds)] for arm in setting.arms}
    losses = {arm: kept[f"losses of {arm}"] for arm in setting.arms}
    return TextModels(models, losses, kept["held_out"], kept["pairs"])
