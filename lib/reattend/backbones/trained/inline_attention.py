"""Small vision transformers with softmax, linear and InLine attention, on garments at random scale and place.

Arms of one seed start from the same weights where their shapes agree, and read the same pictures in the same
order; no picture comes twice at cpu, so the training loss is a loss on new pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.data.garment_canvases import garment_canvases
from reattend.data.images import FASHION_CLASSES
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.vision.inline_attention import DeiTSize, InlineDeiT

KEPT = "kept.safetensors"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """What one profile trains: `arms` are names in `ARMS`; every step reads `batch` canvases.

    Attributes:
        seeds: how many, from `FIRST_SEED`; `more_seeds` of arms that are `CLOSE`.
    """

    size: DeiTSize
    arms: tuple[str, ...]
    batch: int
    steps: int
    rate: float
    seeds: int
    more_seeds: int
    train_canvases: int
    test_canvases: int

    def plan(self) -> TrainingPlan:
        """AdamW with a warm-up over a fifteenth of the steps, then a cosine to zero."""
        warmup = self.steps // 15
        return TrainingPlan(self.steps, self.rate, weight_decay=0.05, warmup=warmup, fused=True)

    def seeds_of(self, arm: str) -> range:
        """The seeds of an arm."""
        return range(FIRST_SEED, FIRST_SEED + (self.more_seeds if arm in CLOSE else self.seeds))


ARMS: dict[str, dict[str, str]] = {
    "softmax": {"operator": "softmax", "residual": "none"},
    "linear, relu": {"operator": "linear", "kernel": "relu", "residual": "none"},
    "InLine, relu": {"kernel": "relu", "residual": "none"},
    "one query, relu": {"kernel": "relu", "residual": "none", "queries": "mean"},
    "linear, identity": {"operator": "linear", "residual": "none"},
    "InLine, identity": {"residual": "none"},
    "mean": {"operator": "mean", "residual": "none"},
    "softmax + residual": {"operator": "softmax"},
    "InLine + residual": {},
    "InLine + shared kernel": {"residual": "shared"},
    "rolled query, relu": {"kernel": "relu", "residual": "none", "queries": "rolled"},
    "linear, leaky relu": {"operator": "linear", "kernel": "leaky_relu", "residual": "none"},
    "InLine, leaky relu": {"kernel": "leaky_relu", "residual": "none"},
    "linear, affine relu": {"operator": "linear", "kernel": "affine_relu", "residual": "none"},
    "InLine, affine relu": {"kernel": "affine_relu", "residual": "none"},
    "mean + residual": {"operator": "mean"},
    "softmax + shared kernel": {"operator": "softmax", "residual": "shared"},
}
"""Options of `InlineAttention` by arm. "one query" is the placebo of "InLine, relu"; "rolled query" keeps its cost too,
but moves something from token to token."""

MAIN = tuple(ARMS)[:10]
CLOSE = (
    "linear, relu",
    "InLine, relu",
    "softmax + residual",
    "InLine + residual",
    "InLine + shared kernel",
)
"""Arms whose comparisons earlier runs left open."""
FIRST_SEED = 4
"""Seeds 0 to 3 were those of earlier runs."""

SETTINGS = {
    "smoke": Setting(DeiTSize(8, 2, 2, 32, 8), MAIN, 8, 3, 3e-3, 3, 4, 60, 40),
    "cpu": Setting(DeiTSize(48, 2, 2, 32, 4), MAIN, 24, 700, 3e-3, 4, 7, 50_000, 2000),
    "gpu": Setting(DeiTSize(96, 4, 3, 32, 4), tuple(ARMS), 256, 1000, 1e-3, 4, 4, 50_000, 10_000),
}


def centred(
    pixels: UInt8[Tensor, "batch 1 height width"],
) -> Float[Tensor, "batch 1 height width"]:
    """What the networks read: bytes to -1 .. 1."""
    return (pixels.float() - 127.5) / 127.5


def untrained(arm: str, size: DeiTSize, seed: int) -> InlineDeiT:
    """A network without class token, from truncated normals of .1, its attention that of one arm.

    Networks of one seed start with the same weights in all that they share.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")

    def network(**options: str) -> InlineDeiT:
        torch.manual_seed(seed)
        classes = len(FASHION_CLASSES)
        shape = {"channels": 1, "mlp_ratio": 2.0, "class_token": False, "std": 0.1}
        return InlineDeiT(size, classes, **shape, **options)

    model = network(**ARMS[arm])
    model.load_state_dict(network(residual="none").state_dict(), strict=False)
    return model


def shuffled(
    pixels: UInt8[Tensor, "items 1 height width"],
    labels: Int[Tensor, " items"],
    batch: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Endless batches of centred pictures; every picture once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(pixels), generator=generator)
        for chosen in order[: len(order) // batch * batch].split(batch):
            yield centred(pixels[chosen]).to(device), labels[chosen].to(device)


def cross_entropy(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean nats of the right class."""
    return F.cross_entropy(model(batch[0]), batch[1])


def fit(
    arm: str,
    setting: Setting,
    pixels: UInt8[Tensor, "items 1 height width"],
    labels: Int[Tensor, " items"],
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[InlineDeiT, Float[Tensor, " steps"]]:
    """A trained network of one arm, and the loss of every step."""
    model = untrained(arm, setting.size, seed).to(device)
    batches = shuffled(pixels, labels, setting.batch, 1000 + seed, device)
    log = train(model, batches, cross_entropy, setting.plan(), groups=decay_matrices)
    return model, torch.tensor(log.losses)


def linear_classifier(
    setting: Setting, pixels: UInt8[Tensor, "items 1 height width"], labels: Int[Tensor, " items"]
) -> nn.Module:
    """Softmax regression on the pixels of all training canvases: the trivial model to beat."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels[0].numel(), len(FASHION_CLASSES)))
    batch = min(256, len(pixels))
    plan = TrainingPlan(min(600, 10 * setting.steps), 1e-3, weight_decay=0.01, warmup=20)
    train(model, shuffled(pixels, labels, batch, 0), cross_entropy, plan)
    return model


def _file(arm: str, seed: int) -> str:
    return f"{arm.replace(',', '').replace(' ', '-')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights, losses, test canvases and what the linear classifier says."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    pixels, labels = garment_canvases("train", setting.train_canvases, seed=0)
    test, test_labels = garment_canvases("test", setting.test_canvases, seed=0)
    linear = linear_classifier(setting, pixels, labels)
    with torch.no_grad():
        logits = linear(centred(test))
    kept = {"pixels": test, "labels": test_labels, "linear classifier": logits}
    for arm in setting.arms:
        losses = []
        for seed in setting.seeds_of(arm):
            model, loss = fit(arm, setting, pixels, labels, seed, device)
            save_model(model, target / _file(arm, seed))
            losses.append(loss)
        kept[f"losses of {arm}"] = torch.stack(losses)
        last = ", ".join(f"{loss[-100:].mean():.3f}" for loss in losses)
        print(f"{arm}: {last} nats over the last 100 steps", flush=True)
    save_file(kept, target / KEPT)


@dataclass(frozen=True)
class GarmentModels:
    """Trained networks by arm, a list over seeds each, and the canvases they are asked about.

    Attributes:
        losses: training loss of every step by arm, [seeds, steps].
        pixels, labels: test canvases.
        linear: logits of the linear classifier on them.
    """

    models: dict[str, list[InlineDeiT]]
    losses: dict[str, Float[Tensor, "seeds steps"]]
    pixels: UInt8[Tensor, "items 1 height width"]
    labels: Int[Tensor, " items"]
    linear: Float[Tensor, "items classes"]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> GarmentModels:
    """The networks of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("inline_attention", profile)

    def read(arm: str, seed: int) -> InlineDeiT:
        model = untrained(arm, setting.size, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval()

    kept = load_file(directory / KEPT)
    models = {arm: [read(arm, seed) for seed in setting.seeds_of(arm)] for arm in setting.arms}
    losses = {arm: kept[f"losses of {arm}"] for arm in setting.arms}
    return GarmentModels(models, losses, kept["pixels"], kept["labels"], kept["linear classifier"])
