"""Small CrossFormers on garments at random scale and place: embeddings, groupings and biases.

Arms of one seed read the same pictures in the same order; no picture comes twice at cpu, so the training loss
is a loss on new pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from reattend.backbones.store import backbone_path
from reattend.backbones.trained.inline_attention import SETTINGS as GARMENTS
from reattend.backbones.trained.inline_attention import (
    centred,
    cross_entropy,
    linear_classifier,
    shuffled,
)
from reattend.data.garment_canvases import garment_canvases
from reattend.data.images import FASHION_CLASSES
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.vision.crossformer import (
    AttentionFactory,
    CrossFormer,
    DynamicPositionBias,
    GroupAttention,
    Layout,
    PositionTable,
    RandomGroupAttention,
    ShiftedWindowAttention,
    SpatialReductionAttention,
)

KEPT = "kept.safetensors"
GROUP, STRIDE = 4, 4
"""Tokens a side of a group, and pixels a side of a token."""
INTERVALS = (2, 1)
"""Of LDA on the maps of 8 x 8 and, in the second stage of a pyramid, 4 x 4 tokens: as the paper's of 14 and 7."""


@dataclass(frozen=True)
class Arm:
    """What an arm trains.

    Attributes:
        kernels: of the embedding, pixels a side.
        merges: of the merging between two stages, tokens a side; none in a network of one stage.
        blocks: attentions of the blocks of a stage, in turns.
        position: of the biases.
        position_rate: learning rate of the biases over that of all else.
        close: whether what it is compared with is so close that it takes more seeds.
    """

    kernels: tuple[int, ...] = (4,)
    merges: tuple[int, ...] = ()
    blocks: tuple[str, str] = ("SDA", "LDA")
    position: str = "dynamic"
    position_rate: float = 1.0
    close: bool = False


ARMS = {
    "CEL": Arm((4, 8, 16, 32), (2, 4), close=True),
    "one kernel": Arm((4,), (2,)),
    "one wide kernel": Arm((14,), (4,), close=True),
    "LSDA": Arm(close=True),
    "shifted windows": Arm(blocks=("SDA", "shifted")),
    "spatial reduction": Arm(blocks=("reduced", "reduced")),
    "random groups": Arm(blocks=("SDA", "random")),
    "SDA only": Arm(blocks=("SDA", "SDA")),
    "LDA only": Arm(blocks=("LDA", "LDA"), close=True),
    "table": Arm(position="table", position_rate=10.0, close=True),
    "no bias": Arm(position="none"),
}
"""By name: three pyramids that differ in their embeddings, and flat networks that differ in their attention from
"LSDA". "one wide kernel" and "random groups" are placebos: overlap without scales, reach without interval.
"""

FIRST_SEED = 5
"""Seeds 0 to 4 were those of earlier runs, in sight of which the settings were chosen."""


@dataclass(frozen=True)
class Training:
    """Networks of one layout: steps of `batch` canvases, learning rate, seeds `FIRST_SEED`, ...

    Attributes:
        seeds: how many; `more_seeds` of arms that are `close`.
    """

    layout: Layout
    batch: int
    steps: int
    rate: float
    seeds: int
    more_seeds: int

    def plan(self) -> TrainingPlan:
        """AdamW with a warm-up over a fifteenth of the steps, then a cosine to zero."""
        warmup = self.steps // 15
        return TrainingPlan(self.steps, self.rate, weight_decay=0.05, warmup=warmup, fused=True)


@dataclass(frozen=True)
class Setting:
    """What one profile trains; `arms` are names in `ARMS`."""

    arms: tuple[str, ...]
    pyramid: Training
    flat: Training
    train_canvases: int
    test_canvases: int

    def of(self, arm: Arm) -> Training:
        """How an arm is trained: arms that merge are pyramids."""
        return self.pyramid if arm.merges else self.flat

    def seeds(self, arm: Arm) -> range:
        """The seeds of an arm."""
        training = self.of(arm)
        return range(
            FIRST_SEED, FIRST_SEED + (training.more_seeds if arm.close else training.seeds)
        )


EVERY_ARM = tuple(ARMS)
DECIDABLE = tuple(arm for arm in ARMS if arm != "spatial reduction")
"""Those whose claims a few seeds can decide."""

SETTINGS = {
    "smoke": Setting(
        DECIDABLE,
        Training(Layout(8, (1, 1), (1, 2)), 8, 2, 4e-3, 2, 3),
        Training(Layout(8, (2,), (1,)), 8, 2, 4e-3, 2, 3),
        *(60, 40),
    ),
    "cpu": Setting(
        DECIDABLE,
        Training(Layout(24, (1, 1), (2, 4)), 32, 800, 4e-3, 4, 8),
        Training(Layout(32, (2,), (2,)), 24, 600, 5e-3, 4, 8),
        *(25_600, 2000),
    ),
    "gpu": Setting(
        EVERY_ARM,
        Training(Layout(64, (2, 2), (2, 4)), 512, 600, 2e-3, 4, 4),
        Training(Layout(96, (4,), (3,)), 512, 600, 2e-3, 4, 8),
        *(50_000, 10_000),
    ),
}


def attention_of(arm: Arm, seed: int) -> AttentionFactory:
    """The attentions of an arm; the MLP of the bias has 8 channels."""
    options = {"position": arm.position, "hidden": 8}

    def make(width: int, heads: int, interval: int, block: int) -> nn.Module:
        kind = arm.blocks[block % 2]
        if kind == "reduced":
            return SpatialReductionAttention(width, heads, interval, hidden=8)
        if kind == "shifted":
            return ShiftedWindowAttention(width, heads, GROUP, **options)
        if kind == "random":
            deal = {"side": GROUP * interval, "seed": 100 * seed + block}
            return RandomGroupAttention(width, heads, GROUP, interval, **deal, **options)
        return GroupAttention(width, heads, GROUP, interval if kind == "LDA" else 1, **options)

    return make


def untrained(arm: str, setting: Setting, seed: int) -> CrossFormer:
    """A network of one arm; networks of one layout and seed start with the same weights in all that they share.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")

    def network(of: Arm) -> CrossFormer:
        torch.manual_seed(seed)
        return CrossFormer(
            setting.of(of).layout,
            classes=len(FASHION_CLASSES),
            channels=1,
            kernels=of.kernels,
            stride=STRIDE,
            merges=of.merges,
            intervals=INTERVALS,
            ratio=2,
            std=0.1,
            attention=attention_of(of, seed),
        )

    own = ARMS[arm]
    model, start = network(own), network(ARMS["CEL" if own.merges else "LSDA"]).state_dict()
    state = model.state_dict()
    shared = {n: w for n, w in start.items() if n in state and state[n].shape == w.shape}
    model.load_state_dict(shared, strict=False)
    return model


def groups_of(model: CrossFormer, arm: Arm) -> list[dict]:
    """Parameter groups for `train`: no decay but for matrices, and the biases' own learning rate."""
    biases = [m for m in model.modules() if isinstance(m, DynamicPositionBias | PositionTable)]
    own = {id(p) for bias in biases for p in bias.parameters()}
    groups = []
    for group in decay_matrices(model):
        for mine, rate in ((False, 1.0), (True, arm.position_rate)):
            kept = [p for p in group["params"] if (id(p) in own) == mine]
            groups.append(group | {"params": kept, "rate": rate})
    return groups


def fit(
    arm: str,
    setting: Setting,
    pixels: UInt8[Tensor, "items 1 height width"],
    labels: Int[Tensor, " items"],
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[CrossFormer, Float[Tensor, " steps"]]:
    """A trained network of one arm, and the loss of every step."""
    model, training = untrained(arm, setting, seed).to(device), setting.of(ARMS[arm])
    batches = shuffled(pixels, labels, training.batch, 1000 + seed, device)
    groups = partial(groups_of, arm=ARMS[arm])
    log = train(model, batches, cross_entropy, training.plan(), groups=groups)
    return model, torch.tensor(log.losses)


def _file(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights, losses, test canvases and what the linear classifier says."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    pixels, labels = garment_canvases("train", setting.train_canvases, seed=0)
    test, test_labels = garment_canvases("test", setting.test_canvases, seed=0)
    linear = linear_classifier(GARMENTS[profile], pixels, labels)
    with torch.no_grad():
        logits = linear(centred(test))
    kept = {"pixels": test, "labels": test_labels, "linear classifier": logits}
    for arm in setting.arms:
        losses = []
        for seed in setting.seeds(ARMS[arm]):
            model, loss = fit(arm, setting, pixels, labels, seed, device)
            save_model(model, target / _file(arm, seed))
            losses.append(loss)
        kept[f"losses of {arm}"] = torch.stack(losses)
        last = ", ".join(f"{loss[-100:].mean():.3f}" for loss in losses)
        print(f"{arm}: {last} nats over the last 100 steps", flush=True)
    save_file(kept, target / KEPT)


@dataclass(frozen=True)
class GarmentCrossFormers:
    """Trained networks by arm, a list over seeds each, and the canvases they are asked about.

    Attributes:
        losses: training loss of every step by arm, [seeds, steps].
        pixels, labels: test canvases.
        linear: logits of the linear classifier on them.
    """

    models: dict[str, list[CrossFormer]]
    losses: dict[str, Float[Tensor, "seeds steps"]]
    pixels: UInt8[Tensor, "items 1 height width"]
    labels: Int[Tensor, " items"]
    linear: Float[Tensor, "items classes"]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> GarmentCrossFormers:
    """The networks of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("crossformer", profile)

    def read(arm: str, seed: int) -> CrossFormer:
        model = untrained(arm, setting, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval()

    kept = load_file(directory / KEPT)
    models = {arm: [read(arm, seed) for seed in setting.seeds(ARMS[arm])] for arm in setting.arms}
    losses = {arm: kept[f"losses of {arm}"] for arm in setting.arms}
    return GarmentCrossFormers(
        models, losses, kept["pixels"], kept["labels"], kept["linear classifier"]
    )
