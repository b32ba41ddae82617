"""Small language models with selective attention, without it and with its placebos, on the row language.

Tokens have one, two or six successors, by their identity, so that how sharp a prediction must be depends on
the token that makes it. Every row has a table of its own: what follows a token is to be found in the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from reattend.backbones.store import backbone_path
from reattend.data.row_language import RowLanguage
from reattend.language_modeling.selective_attention import (
    SelectiveAttention,
    Temperature,
    position_temperature,
    token_temperature,
)
from reattend.studies.row_language import fresh_rows, next_token_loss
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.language import FeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

LOSSES = "losses.safetensors"
CHANCES = ((1.0,), (0.5, 0.5), (1 / 6,) * 6)
TEST_SEED = 10**9


@dataclass(frozen=True)
class Shape:
    """Sizes that the models of all arms share; rows have `length` tokens."""

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int

    @property
    def language(self) -> RowLanguage:
        return RowLanguage(self.vocabulary, self.length, CHANCES)


@dataclass(frozen=True)
class Setting:
    """What one profile trains: `seeds` models of each arm, the first `variant_seeds` of each variant."""

    shape: Shape
    batch: int
    steps: int
    rate: float
    seeds: int
    variant_seeds: int
    test_rows: int

    def plan(self) -> TrainingPlan:
        """Warm-up over a fifteenth of the steps, then a cosine to zero."""
        warmup = self.steps // 15
        return TrainingPlan(self.steps, self.rate, warmup=warmup, betas=(0.9, 0.95), fused=True)

    def seeds_of(self, arm: str) -> range:
        return range(self.seeds if arm in MAIN else self.variant_seeds)


MAIN = ("Softmax", "SSA", "Elsewhere", "Constant")
VARIANTS = ("q", "v", "q, k and v", "token", "position", "official", "No mixing")
SETTINGS = {
    "smoke": Setting(Shape(12, 24, 16, 2, 2), 4, 3, 6e-3, 3, 1, 8),
    "cpu": Setting(Shape(32, 128, 64, 2, 4), 16, 300, 6e-3, 5, 2, 256),
    "gpu": Setting(Shape(64, 512, 256, 4, 8), 32, 3000, 2e-3, 8, 4, 512),
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

    In each layer half of the channels that the mixer reads are those of the token before.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")
    torch.manual_seed(seed)
    return Trunk(
        shape.vocabulary,
        shape.width,
        [lambda width: TokenShift(ARMS[arm](shape), width, learned=False)] * shape.layers,
        feed_forward=partial(FeedForward, ratio=2),
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


def fit(
    arm: str, setting: Setting, seed: int, device: str = "cpu"
) -> tuple[Trunk, Float[Tensor, " steps"]]:
    """A trained model of one arm, and the loss of every step; arms of one seed read the same rows."""
    model = untrained(arm, setting.shape, seed).to(device)
    rows = (part.to(device) for part in fresh_rows(setting.shape.language, setting.batch, seed))
    log = train(model, rows, next_token_loss, setting.plan(), groups=parameter_groups)
    return model, torch.tensor(log.losses)


def _file(arm: str, seed: int) -> str:
    return f"{arm.lower().replace(' ', '-').replace(',', '')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights and losses."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    kept = {}
    for arm in MAIN + VARIANTS:
        losses = []
        for seed in setting.seeds_of(arm):
            model, loss = fit(arm, setting, seed, device)
            save_model(model, target / _file(arm, seed))
            losses.append(loss)
        kept[arm] = torch.stack(losses)
        last = ", ".join(f"{loss[-30:].mean():.3f}" for loss in losses)
        print(f"{arm}: {last} nats over the last 30 steps", flush=True)
    save_file(kept, target / LOSSES)


@dataclass(frozen=True)
class RowModels:
    """Trained models by arm, a list over seeds each, their training losses [seeds, steps], and test rows."""

    models: dict[str, list[Trunk]]
    losses: dict[str, Float[Tensor, "seeds steps"]]
    rows: Int[Tensor, "rows length"]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> RowModels:
    """The models of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("selective_attention", profile)

    def read(arm: str, seed: int) -> Trunk:
        model = untrained(arm, setting.shape, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval()

    arms = MAIN + VARIANTS
    models = {arm: [read(arm, seed) for seed in setting.seeds_of(arm)] for arm in arms}
    losses = load_file(directory / LOSSES)
    rows = setting.shape.language.draw(setting.test_rows, TEST_SEED)
    return RowModels(models, {arm: losses[arm] for arm in arms}, rows)
