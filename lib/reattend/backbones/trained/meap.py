"""Small language models trained with and without masked inputs, on look-ups and on one table, with checkpoints.

Half of every batch are rows of the row language, where each prediction is a look-up in the row's own
random table; the other half walk on one fixed table, which has to be learned. All arms have the same
Llama-style model with [MASK] in its vocabulary; arms of one seed start alike, read the same rows, and are
disturbed at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.data.row_language import RowLanguage
from reattend.language_modeling.meap import meap_loss, official_seed_cycle, random_masks
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.language import GatedFeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

LOSSES = "losses.safetensors"
TABLE = 7
"""Seed of the fixed table."""


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Args:
        language: of the rows; `length` counts the last target, so inputs are one token shorter.
        batch: rows of a step, half of them on the fixed table.
        checkpoints: steps at which a model is kept.
    """

    language: RowLanguage
    width: int
    layers: int
    heads: int
    arms: tuple[str, ...]
    batch: int
    checkpoints: tuple[int, ...]
    rate: float
    seeds: int

    @property
    def steps(self) -> int:
        return self.checkpoints[-1]

    @property
    def mask_id(self) -> int:
        """[MASK]: the id behind the language's tokens."""
        return self.language.vocabulary

    def plan(self) -> TrainingPlan:
        """The paper's: warm-up over a tenth of the steps, a cosine to a tenth of the rate, its betas and decay."""
        return TrainingPlan(
            self.steps,
            self.rate,
            weight_decay=0.05,
            warmup=self.steps // 10,
            betas=(0.9, 0.95),
            floor=0.1,
            fused=True,
        )


MAIN = ("NTP", "MEAP", "Random tokens")
RATIOS = ("MEAP .05", "MEAP .10", "MEAP .20", "MEAP .30", "MEAP, 51 masks")
SETTINGS = {
    "smoke": Setting(RowLanguage(16, 33), 16, 2, 4, MAIN, 4, (1, 2, 3, 4), 6e-3, 3),
    "cpu": Setting(RowLanguage(32, 129), 64, 2, 4, MAIN, 12, (150, 300, 450, 600), 6e-3, 6),
    "gpu": Setting(
        RowLanguage(64, 513), 256, 4, 8, MAIN + RATIOS, 32, (500, 1000, 1500, 2000), 2e-3, 8
    ),
}


# --- arms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """How the inputs of an arm are disturbed.

    Args:
        ratio: share of the positions.
        random_tokens: random tokens stand at these positions instead of [MASK]: the placebo.
        cycle: the published script's 51 sets of positions instead of fresh ones for every row.
    """

    ratio: float
    random_tokens: bool = False
    cycle: bool = False


ARMS = {
    "NTP": Arm(0.0),
    "MEAP": Arm(0.15),
    "Random tokens": Arm(0.15, random_tokens=True),
    "MEAP, 51 masks": Arm(0.15, cycle=True),
    "MEAP .05": Arm(0.05),
    "MEAP .10": Arm(0.10),
    "MEAP .20": Arm(0.20),
    "MEAP .30": Arm(0.30),
}


def untrained(setting: Setting, seed: int) -> Trunk:
    """The model that all arms start from: RMSNorm, SwiGLU, rotary positions, two groups of keys and values.

    Half of the channels that attention reads are those of the token before.
    """

    def mixer(width: int) -> nn.Module:
        attention = SoftmaxAttention(width, setting.heads, key_heads=2, value_heads=2)
        return TokenShift(attention, width, learned=False)

    torch.manual_seed(seed)
    return Trunk(
        setting.language.vocabulary + 1,
        setting.width,
        [mixer] * setting.layers,
        feed_forward=partial(GatedFeedForward, hidden=2 * setting.width),
        embedding_std=setting.width**-0.5,
        norm="rms",
        tied=False,
    )


# --- rows and what is done to them ----------------------------------------------------------------


def mixed_rows(
    language: RowLanguage, batch: int, seed: int, drawn: int = 512
) -> Iterator[Int[Tensor, "batch length"]]:
    """Batches that never come again: first the rows with tables of their own, then as many on the fixed one.

    Raises:
        ValueError: when the batch has no half.
    """
    half, odd = divmod(batch, 2)
    if odd or not half:
        raise ValueError(f"a batch has two halves of rows; got {batch} rows")
    for part in count():
        start = (seed + 1) * 10**6 + part
        own = language.draw(drawn // half * half, start).split(half)
        fixed = language.draw_fixed(drawn // half * half, TABLE, start).split(half)
        for pair in zip(own, fixed, strict=True):
            yield torch.cat(pair)


Batch = tuple[Tensor, Tensor, Tensor]
"""Rows, one token longer than the inputs; the positions that are disturbed; a random token for each position."""


def disturbed_rows(arm: Arm, setting: Setting, seed: int, device: str = "cpu") -> Iterator[Batch]:
    """`mixed_rows` with the positions of an arm; arms of one seed and ratio draw the same."""
    positions, tokens = Generator().manual_seed(seed), Generator().manual_seed(1000 + seed)
    for step, rows in enumerate(mixed_rows(setting.language, setting.batch, seed)):
        size = len(rows), rows.shape[1] - 1
        masked = (
            official_seed_cycle(*size, arm.ratio, step)
            if arm.cycle
            else random_masks(*size, arm.ratio, positions)
        )
        fill = torch.randint(setting.language.vocabulary, size, generator=tokens)
        yield rows.to(device), masked.to(device), fill.to(device)


def random_token_loss(
    model: Callable[[Tensor], Tensor],
    rows: Int[Tensor, "rows longer"],
    disturbed: Bool[Tensor, "rows length"],
    fill: Int[Tensor, "rows length"],
) -> Float[Tensor, ""]:
    """`meap_loss` with the tokens of `fill` in [MASK]'s place: nothing says where the text is wrong."""
    inputs = torch.where(disturbed, fill, rows[:, :-1])
    return F.cross_entropy(model(inputs).flatten(0, 1), rows[:, 1:].flatten())


def fit(
    name: str, setting: Setting, seed: int, device: str = "cpu"
) -> tuple[list[dict[str, Tensor]], Float[Tensor, " steps"]]:
    """Weights of one arm at every checkpoint, and the training loss of every step.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if name not in ARMS:
        raise ValueError(f"unknown arm '{name}'; there are: {', '.join(ARMS)}")
    arm, model, kept = ARMS[name], untrained(setting, seed).to(device), []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if arm.random_tokens:
            return random_token_loss(model, *batch)
        rows, masked, _ = batch
        return meap_loss(model, rows, masked, setting.mask_id)

    def keep(step: int) -> None:
        if step + 1 in setting.checkpoints:
            kept.append({k: v.detach().cpu().clone() for k, v in model.state_dict().items()})

    batches = disturbed_rows(arm, setting, seed, device)
    log = train(model, batches, loss, setting.plan(), after_step=keep)
    return kept, torch.tensor(log.losses)


# --- the build -----------------------------------------------------------------------------------


def _file(arm: str, seed: int) -> str:
    return f"{arm.lower().replace(' ', '').replace(',', '-')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights at every checkpoint and training losses."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    losses = {}
    for arm in setting.arms:
        found = [fit(arm, setting, seed, device) for seed in range(setting.seeds)]
        for seed, (checkpoints, _) in enumerate(found):
            weights = {
                f"{step}.{name}": value
                for step, checkpoint in zip(setting.checkpoints, checkpoints, strict=True)
                for name, value in checkpoint.items()
            }
            save_file(weights, target / _file(arm, seed))
        losses[arm] = torch.stack([loss for _, loss in found])
        last = ", ".join(f"{loss[-50:].mean():.3f}" for loss in losses[arm])
        print(f"{arm}: {last} nats over the last 50 steps", flush=True)
    save_file(losses, target / LOSSES)


@dataclass(frozen=True)
class MaskedModels:
    """Trained models, and how they got there.

    Attributes:
        models: by arm, [seeds][checkpoints].
        losses: training loss of every step by arm, on disturbed inputs, [seeds, steps].
    """

    models: dict[str, list[list[Trunk]]]
    losses: dict[str, Float[Tensor, "seeds steps"]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> MaskedModels:
    """The models of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("meap", profile)

    def read(arm: str, seed: int) -> list[Trunk]:
        weights, models = load_file(directory / _file(arm, seed)), []
        for step in setting.checkpoints:
            model, prefix = untrained(setting, seed), f"{step}."
            own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            model.load_state_dict(own)
            models.append(model.to(device).eval())
        return models

    models = {arm: [read(arm, seed) for seed in range(setting.seeds)] for arm in setting.arms}
    return MaskedModels(models, load_file(directory / LOSSES))
