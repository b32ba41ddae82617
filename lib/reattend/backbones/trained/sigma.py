"""Small language models on the row language, with heads of queries, keys and values of several sizes.

All arms have the same blocks (RMSNorm, SwiGLU, half of the channels of every mixer's input shifted by one
token) and, of one seed, the same rows in the same order and the same initial weights where shapes agree.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from reattend.backbones.store import backbone_path
from reattend.data.row_language import RowLanguage, fresh_rows
from reattend.language_modeling.sigma import DiffQKVAttention
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.language import GatedFeedForward, Trunk, labelled_loss
from reattend.trunks.mixers import TokenShift

LOSSES = "losses.safetensors"


@dataclass(frozen=True)
class Setting:
    """What one profile trains: `arms` are names in `ARMS`; every batch has `batch` rows."""

    arms: tuple[str, ...]
    width: int = 64
    layers: int = 2
    heads: int = 8
    batch: int = 8
    steps: int = 400
    rate: float = 1e-2
    seeds: int = 4
    language: RowLanguage = field(default_factory=RowLanguage)

    def plan(self, arm: str) -> TrainingPlan:
        """Warm-up over a fifteenth of the steps, then a cosine to zero, at the rate that suits the arm."""
        rate, warmup = ARMS[arm].rate * self.rate, self.steps // 15
        return TrainingPlan(self.steps, rate, warmup=warmup, betas=(0.9, 0.95), fused=True)


class ElsewhereAttention(DiffQKVAttention):
    """The placebo of augmented queries: q = q0 + augment(q0 of a random earlier token), drawn anew in each pass.

    The gated unit keeps its parameters and its cost, but reads no query that is to be asked. q0 stays, so
    that nothing is taken from the model; an earlier token keeps it causal.
    """

    def queries(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length total"]:
        q = self.query(x)
        places = torch.arange(x.shape[1], device=x.device)
        elsewhere = (torch.rand(x.shape[:2], device=x.device) * places).long()
        return q + self.augment(q.take_along_dim(elsewhere[..., None], dim=1))


@dataclass(frozen=True)
class Arm:
    """Sizes of an arm's attention, as shares of what full attention has.

    Args:
        keys, values: of the query heads.
        key_width: of the head width.
        augmented: hidden width of the augmented queries, of the trunk's width; 0 for none.
        feed_forward: hidden width of the feed-forward part, of the trunk's width.
        elsewhere: whether the augmented queries are the placebo's.
        rate: of learning, as a share of the setting's.
    """

    keys: float = 1.0
    values: float = 1.0
    key_width: float = 1.0
    augmented: float = 0.0
    feed_forward: float = 2.0
    elsewhere: bool = False
    rate: float = 1.0

    def mixer(self, setting: Setting, width: int) -> nn.Module:
        """The attention of one layer."""
        heads = setting.heads
        kind = ElsewhereAttention if self.elsewhere else DiffQKVAttention
        return kind(
            width,
            heads,
            key_heads=round(self.keys * heads),
            value_heads=round(self.values * heads),
            key_width=round(self.key_width * width // heads),
            augmented=round(self.augmented * width) or None,
        )


_GROUPED = Arm(keys=1 / 4, values=1 / 4)
ARMS = {
    "K8 V8": Arm(),
    "K1 V8": Arm(keys=1 / 8),
    "K8 V1": Arm(values=1 / 8),
    "K2 V8": Arm(keys=1 / 4),
    "K8 V2": Arm(values=1 / 4),
    "half K": Arm(key_width=1 / 2),
    "K2 V2": _GROUPED,
    "AugQ": replace(_GROUPED, augmented=1.5, rate=0.5),
    "AugQ elsewhere": replace(_GROUPED, augmented=1.5, elsewhere=True),
    "AugF": replace(_GROUPED, feed_forward=3.5),
}

CPU = ("K8 V8", "K1 V8", "K8 V1", "K2 V2", "AugQ", "AugQ elsewhere")
SETTINGS = {
    "smoke": Setting(CPU, width=16, heads=8, batch=4, steps=3, seeds=3),
    "cpu": Setting(CPU),
    "gpu": Setting(
        tuple(ARMS), width=512, layers=8, heads=16, batch=64, steps=2000, rate=1e-3, seeds=8
    ),
}


def untrained(arm: str, setting: Setting, seed: int) -> Trunk:
    """A model with random weights; models of one seed agree in all weights of equal shape and name.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")
    chosen, language = ARMS[arm], setting.language

    def layer(width: int) -> nn.Module:
        return TokenShift(chosen.mixer(setting, width), width, learned=False)

    hidden = round(chosen.feed_forward * setting.width)
    model = Trunk(
        language.vocabulary,
        setting.width,
        [layer] * setting.layers,
        feed_forward=partial(GatedFeedForward, hidden=hidden),
        embedding_std=setting.width**-0.5,
        norm="rms",
    )
    for name, module in model.named_modules():
        # A seed of its own for each name: what one arm has more must not move what all have.
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=setting.width**-0.5)
    return model


def next_token_loss(model: Trunk, rows: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Mean nats of every next token."""
    return labelled_loss(model, rows[:, :-1], rows[:, 1:])


def fit(
    arm: str, setting: Setting, seed: int, device: str = "cpu"
) -> tuple[Trunk, Float[Tensor, " steps"]]:
    """A trained model of one arm, and the loss of every step."""
    model = untrained(arm, setting, seed).to(device)
    torch.manual_seed(seed)  # of the placebo's draws
    rows = (batch.to(device) for batch in fresh_rows(setting.language, setting.batch, seed))
    log = train(model, rows, next_token_loss, setting.plan(arm), groups=decay_matrices)
    return model, torch.tensor(log.losses)


# --- the build -----------------------------------------------------------------------------------


def _file(arm: str, seed: int) -> str:
    return f"{arm.lower().replace(' ', '')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write their weights and losses."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    kept = {}
    for arm in setting.arms:
        losses = []
        for seed in range(setting.seeds):
            model, loss = fit(arm, setting, seed, device)
            save_model(model, target / _file(arm, seed))
            losses.append(loss)
        kept[arm] = torch.stack(losses)
        last = ", ".join(f"{loss[-50:].mean():.3f}" for loss in losses)
        print(f"{arm}: {last} nats over the last 50 steps", flush=True)
    save_file(kept, target / LOSSES)


@dataclass(frozen=True)
class RowModels:
    """Trained models by arm, a list over seeds each, and their losses by step, [seeds, steps]."""

    models: dict[str, list[Trunk]]
    losses: dict[str, Float[Tensor, "seeds steps"]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> RowModels:
    """The models of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("sigma", profile)

    def read(arm: str, seed: int) -> Trunk:
        model = untrained(arm, setting, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval()

    models = {arm: [read(arm, seed) for seed in range(setting.seeds)] for arm in setting.arms}
    return RowModels(models, load_file(directory / LOSSES))
