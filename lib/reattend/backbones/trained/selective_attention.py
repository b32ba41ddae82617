"""Small language models with selective attention, without it and with its placebos, on text and on rows.

Text is news and essays, byte by byte. The row language is recall alone: what follows a token is to be found in
its row; tokens have one, two or six successors, by their identity, so how sure a prediction can be depends on
the token that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from reattend.backbones.store import backbone_path
from reattend.backbones.trained.transnormer import spread_rows, streams, text_loss
from reattend.data.row_language import RowLanguage, fresh_rows
from reattend.data.word_tokens import random_windows
from reattend.language_modeling.selective_attention import (
    SelectiveAttention,
    Temperature,
    position_temperature,
    token_temperature,
)
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.language import FeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

LOSSES = "losses.safetensors"
CHANCES = ((1.0,), (0.5, 0.5), (1 / 6,) * 6)
TEST_SEED = 10**9
Corpus = Literal["text", "rows"]


@dataclass(frozen=True)
class Shape:
    """Sizes that the models of all arms share.

    Args:
        length: tokens that a model reads.
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
    """What one profile trains on one corpus: `seeds` models of each arm, `variant_seeds` of each variant."""

    corpus: Corpus
    shape: Shape
    batch: int
    steps: int
    rate: float
    seeds: int
    arms: tuple[str, ...]
    variants: tuple[str, ...]
    test_rows: int
    variant_seeds: int = 1

    @property
    def trained(self) -> tuple[str, ...]:
        return self.arms + self.variants

    @property
    def language(self) -> RowLanguage:
        """Rows one longer than what a model reads: the last token is only predicted."""
        return RowLanguage(self.shape.vocabulary, self.shape.length + 1, CHANCES)

    def plan(self) -> TrainingPlan:
        """Warm-up over a fifteenth of the steps, then a cosine to zero."""
        warmup = self.steps // 15
        return TrainingPlan(self.steps, self.rate, warmup=warmup, betas=(0.9, 0.95), fused=True)

    def seeds_of(self, arm: str) -> range:
        return range(self.seeds if arm in self.arms else self.variant_seeds)


MAIN = ("Softmax", "SSA", "Elsewhere", "Constant")
PARTS = ("q", "v", "token", "position", "official")
PAIR, ALONE = ("Softmax", "SSA"), ("No mixing",)
_SMALL = Shape(300, 16, 16, 2, 2)
_FEW = replace(_SMALL, vocabulary=12, shift=True)
_BYTES = Shape(258, 128, 64, 3, 4)
_ROWS = Shape(32, 127, 64, 2, 4, shift=True)
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "smoke": (
        Setting("text", _SMALL, 2, 3, 6e-3, 3, MAIN, ("official",), 4),
        Setting("rows", _FEW, 4, 3, 6e-3, 3, PAIR, ALONE, 8),
    ),
    "cpu": (
        Setting("text", _BYTES, 8, 360, 6e-3, 4, MAIN, PARTS, 512),
        Setting("rows", _ROWS, 16, 300, 1.2e-2, 4, PAIR, ALONE, 256),
    ),
    "gpu": (
        Setting("text", Shape(2048, 1024, 512, 8, 8), 16, 2000, 1e-3, 8, MAIN, PARTS, 64, 4),
        Setting("rows", replace(_ROWS, length=511, width=256), 32, 3000, 2e-3, 8, PAIR, ALONE, 512),
    ),
}


# --- arms ----------------------------------------------------------------------------------------


class ElsewhereTemperature(Temperature):
    """A placebo: every token has the tau of a random token before it or of itself, drawn afresh each time.

    Both parts of it, at the same cost.
    """

    def forward(
        self, features: Float[Tensor, "batch heads length width"], places: Int[Tensor, " length"]
    ) -> Float[Tensor, "batch heads length 1"]:
        batch, _, length, _ = features.shape
        upto = torch.arange(1, length + 1, device=features.device)
        drawn = (torch.rand(batch, length, device=features.device) * upto).long()
        tau = position_temperature(places, self.strength)[drawn][:, None]
        own = token_temperature(features, self.direction)
        return tau + own.gather(2, drawn[:, None, :, None].expand(-1, own.shape[1], -1, -1))


class ConstantTemperature(nn.Module):
    """A placebo: one learned tau a head, for all tokens and places: 1 + tanh(b)."""

    def __init__(self, heads: int):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(
        self, features: Float[Tensor, "batch heads length width"], places: Int[Tensor, " length"]
    ) -> Float[Tensor, "heads 1 1"]:
        return 1 + self.level.tanh()


class NoMixing(nn.Module):
    """Reads nothing: what a model knows that looks at one token alone."""

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        return torch.zeros_like(x)

    def state_size(self, length: int) -> int:
        return 0


def _softmax(shape: Shape) -> nn.Module:
    return SoftmaxAttention(shape.width, shape.heads)


def _selective(
    shape: Shape, replace: Callable[[int, int], nn.Module] | None = None, **options
) -> nn.Module:
    """The method; `replace(heads, features)` makes other temperatures in the same places."""
    mixer = SelectiveAttention(shape.width, shape.heads, **options)
    for part in mixer.temperatures if replace else ():
        mixer.temperatures[part] = replace(shape.heads, shape.width // shape.heads)
    return mixer


ARMS: dict[str, Callable[[Shape], nn.Module]] = {
    "Softmax": _softmax,
    "SSA": _selective,
    "Elsewhere": partial(_selective, replace=ElsewhereTemperature),
    "Constant": partial(_selective, replace=lambda heads, _: ConstantTemperature(heads)),
    "q": partial(_selective, on=("query",)),
    "v": partial(_selective, on=("value",)),
    "q, k and v": partial(_selective, on=("query", "key", "value")),
    "token": partial(_selective, position=False),
    "position": partial(_selective, token=False),
    "official": partial(_selective, pos_only_official=True),
    "No mixing": lambda shape: NoMixing(),
}


def untrained(arm: str, shape: Shape, seed: int) -> Trunk:
    """A model with random weights; models of one seed start with the same embeddings.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")

    def layer(width: int) -> nn.Module:
        mixer = ARMS[arm](shape)
        return TokenShift(mixer, width, learned=False) if shape.shift else mixer

    torch.manual_seed(seed)
    return Trunk(
        shape.vocabulary,
        shape.width,
        [layer] * shape.layers,
        feed_forward=partial(FeedForward, ratio=3),
        embedding_std=shape.width**-0.5,
    )


STRENGTH_RATE = 10.0


def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay for linear maps alone; strengths of the position at ten times the rate.

    Their sigmoid starts where it is flat; the published code trains beta at a thousand times the rate of the
    weights.
    """
    strengths = [
        p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] in ("strength", "beta")
    ]
    known = {id(p) for p in strengths}
    groups = [
        {**group, "params": [p for p in group["params"] if id(p) not in known]}
        for group in decay_matrices(model)
    ]
    return [*groups, {"params": strengths, "weight_decay": 0.0, "rate": STRENGTH_RATE}]


# --- the build -----------------------------------------------------------------------------------


@cache
def text_streams(entries: int) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Training and held-out text as tokens; splitting it takes seconds, so once."""
    return streams(entries)


def batches(setting: Setting, seed: int) -> Iterator[Int[Tensor, "batch length"]]:
    """What models of one seed are trained on, in the same order for all arms."""
    if setting.corpus == "rows":
        return fresh_rows(setting.language, setting.batch, seed)
    stream, _ = text_streams(setting.shape.vocabulary)
    generator = torch.Generator().manual_seed(1000 + seed)
    return random_windows(stream, setting.batch, setting.shape.length + 1, generator)


def test_rows(setting: Setting) -> Int[Tensor, "rows length"]:
    """Held-out text, spread evenly over it, or rows that no training has."""
    if setting.corpus == "rows":
        return setting.language.draw(setting.test_rows, TEST_SEED)
    _, held_out = text_streams(setting.shape.vocabulary)
    return spread_rows(held_out, setting.test_rows, setting.shape.length + 1)


def fit(
    arm: str, setting: Setting, seed: int, device: str = "cpu"
) -> tuple[Trunk, Float[Tensor, " steps"]]:
    """A trained model of one arm, and the loss of every step; arms of one seed read the same text."""
    model = untrained(arm, setting.shape, seed).to(device)
    rows = (part.to(device) for part in batches(setting, seed))
    log = train(model, rows, text_loss, setting.plan(), groups=parameter_groups)
    return model, torch.tensor(log.losses)


def _file(setting: Setting, arm: str, seed: int) -> str:
    name = arm.lower().replace(" ", "-").replace(",", "")
    return f"{setting.corpus}-{name}-{seed}.safetensors"


def _key(setting: Setting, arm: str) -> str:
    return f"{setting.corpus} of {arm}"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights and losses."""
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    kept = {}
    for setting in SETTINGS[profile]:
        for arm in setting.trained:
            losses = []
            for seed in setting.seeds_of(arm):
                model, loss = fit(arm, setting, seed, device)
                save_model(model, target / _file(setting, arm, seed))
                losses.append(loss)
            kept[_key(setting, arm)] = torch.stack(losses)
            last = ", ".join(f"{loss[-30:].mean():.3f}" for loss in losses)
            print(f"{setting.corpus}, {arm}: {last} nats over the last 30 steps", flush=True)
    save_file(kept, target / LOSSES)


@dataclass(frozen=True)
class Trained:
    """Models of one corpus by arm, a list over seeds each; losses [seeds, steps]; rows to test on."""

    setting: Setting
    models: dict[str, list[Trunk]]
    losses: dict[str, Float[Tensor, "seeds steps"]]
    rows: Int[Tensor, "rows length"]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> dict[Corpus, Trained]:
    """The models of a profile in evaluation mode, by corpus, built on first use."""
    directory = backbone_path("selective_attention", profile)
    losses = load_file(directory / LOSSES)

    def read(setting: Setting, arm: str, seed: int) -> Trunk:
        model = untrained(arm, setting.shape, seed)
        load_model(model, directory / _file(setting, arm, seed))
        return model.to(device).eval()

    found = {}
    for setting in SETTINGS[profile]:
        models = {
            a: [read(setting, a, seed) for seed in setting.seeds_of(a)] for a in setting.trained
        }
        own = {arm: losses[_key(setting, arm)] for arm in setting.trained}
        found[setting.corpus] = Trained(setting, models, own, test_rows(setting))
    return found
