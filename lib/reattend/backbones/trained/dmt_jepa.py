"""I-JEPA and DMT-JEPA pretrained on mosaics of garments, beside two arms that take parts of the method away.

Arms of one seed start from the same encoder and predictor and read the same pictures through the same masks.
No label is used. At cpu this is far too little training to ask which is better (the paper's record says so):
what is seen there is how targets collapse or do not. The gpu profile trains larger encoders for longer.
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
from reattend.data.garment_mosaics import PATCH, TILE, garment_mosaics
from reattend.data.images import fashion_mnist
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.vision.dmt_jepa import (
    BlockMasks,
    Jepa,
    JepaSize,
    LocalAggregationHead,
    momentum_at,
)

KEPT = "kept.safetensors"
MEAN, SPREAD = 72.0, 90.0  # of the grey values of garments
Batch = tuple[Tensor, Tensor, Tensor, Tensor]

ARMS = ("I-JEPA", "DMT-JEPA", "random neighbours", "averaged neighbours")
"""The last two: DMT-JEPA with four random of the eight neighbours, and targets without a head, the plain mean of
the four most similar neighbours."""


@dataclass(frozen=True)
class Setting:
    """What one profile trains; sizes of `Jepa`, and of the mosaics, `tiles` garments wide.

    Attributes:
        momentum: of the target side at the first step; 1 at the last.
        looks: how often the spread of the targets is noted in training.
        garments: training garments of which mosaics are made.
        mosaics: labelled mosaics that train the probes; half as many test them.
    """

    width: int
    layers: int
    heads: int
    predictor_width: int
    predictor_layers: int
    tiles: int
    batch: int
    steps: int
    rate: float
    momentum: float
    seeds: int
    looks: int
    garments: int
    mosaics: int

    @property
    def size(self) -> JepaSize:
        """Sizes of encoder and predictor."""
        return JepaSize(
            self.tiles * TILE,
            PATCH,
            self.width,
            self.layers,
            self.heads,
            self.predictor_width,
            self.predictor_layers,
            channels=1,
        )

    def masks(self) -> BlockMasks:
        """The paper's blocks; on a grid of 8 x 8 their contexts may be smaller than its eleven patches."""
        side = self.size.side
        return BlockMasks(side, side, fewest=min(10, side))

    def plan(self) -> TrainingPlan:
        """AdamW without clipping, a warm-up over a fifteenth of the steps, then a cosine to zero."""
        return TrainingPlan(
            self.steps,
            self.rate,
            weight_decay=0.05,
            warmup=self.steps // 15,
            clip=float("inf"),
            fused=True,
        )


SETTINGS = {
    "smoke": Setting(16, 1, 2, 8, 1, 2, 4, 3, 5e-4, 0.996, 3, 3, 60, 8),
    "cpu": Setting(48, 2, 3, 24, 1, 2, 32, 200, 5e-4, 0.996, 3, 8, 20_000, 300),
    "gpu": Setting(192, 6, 6, 96, 3, 3, 256, 2000, 5e-4, 0.996, 4, 20, 50_000, 1000),
}


def centred(
    pixels: UInt8[Tensor, "batch 1 height width"],
) -> Float[Tensor, "batch 1 height width"]:
    """What the encoders read."""
    return (pixels.float() - MEAN) / SPREAD


def untrained(arm: str, setting: Setting, seed: int) -> Jepa:
    """An architecture before training; those of one seed start from the same encoder and predictor.

    The map of patches is drawn so that a patch of unit variance keeps it: at 64 values a patch the published
    deviation of .02 leaves the content at a fifth of the positions, and the features of different pictures
    become the same within a few hundred steps.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm '{arm}'; there are: {', '.join(ARMS)}")
    size = setting.size
    torch.manual_seed(seed)
    start = Jepa(size)
    nn.init.normal_(start.encoder.patch_embed.proj.weight, std=1 / PATCH)
    head = None
    if arm in ("DMT-JEPA", "random neighbours"):
        head = LocalAggregationHead(size.width, size.heads)
    model = Jepa(size, head, averaged=4 if arm == "averaged neighbours" else 0)
    model.encoder.load_state_dict(start.encoder.state_dict())
    model.target_encoder.load_state_dict(start.encoder.state_dict())
    model.predictor.load_state_dict(start.predictor.state_dict())
    return model


def masked_mosaics(
    garments: UInt8[Tensor, "items 28 28"],
    labels: Int[Tensor, " items"],
    setting: Setting,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Endless pictures, context and target patches, and random scores of the eight neighbours."""
    generator, masks = torch.Generator().manual_seed(seed), setting.masks()
    while True:
        pixels, _ = garment_mosaics(garments, labels, setting.batch, setting.tiles, generator)
        context, targets = masks.sample(setting.batch, generator)
        scores = torch.rand(setting.batch, setting.size.side**2, 8, generator=generator)
        parts = (centred(pixels), context, targets, scores)
        yield tuple(part.to(device, non_blocking=True) for part in parts)


def jepa_loss(arm: str, model: Jepa, batch: Batch) -> Float[Tensor, ""]:
    """The loss of an arm on a batch; one arm chooses its neighbours by the random scores."""
    images, context, targets, scores = batch
    return model.loss(images, context, targets, scores if arm == "random neighbours" else None)


@torch.no_grad()
def spread_over_pictures(tokens: Float[Tensor, "pictures patches dim"]) -> float:
    """Standard deviation over pictures of layer-normalised tokens, position by position, mean of all.

    1 at the most; near 0 when features say where a patch is and not what it shows (collapse).
    """
    return F.layer_norm(tokens, tokens.shape[-1:]).std(0).mean().item()


def fit(
    arm: str,
    setting: Setting,
    garments: UInt8[Tensor, "items 28 28"],
    labels: Int[Tensor, " items"],
    watched: UInt8[Tensor, "mosaics 1 side side"],
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[Jepa, Float[Tensor, " steps"], Float[Tensor, " looks"]]:
    """A trained arm, the loss of every step, and the spread of its targets on watched mosaics over training."""
    model = untrained(arm, setting, seed).to(device)
    images, every = centred(watched).to(device), max(1, setting.steps // setting.looks)
    spreads = [spread_over_pictures(model.targets(images))]

    def after_step(step: int) -> None:
        model.update_targets(momentum_at(step, setting.steps, setting.momentum))
        if (step + 1) % every == 0:
            spreads.append(spread_over_pictures(model.targets(images)))

    log = train(
        model,
        masked_mosaics(garments, labels, setting, 1000 + seed, device),
        lambda net, batch: jepa_loss(arm, net, batch),
        setting.plan(),
        groups=decay_matrices,
        after_step=after_step,
    )
    return model, torch.tensor(log.losses), torch.tensor(spreads)


def _file(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights, losses, spreads and the labelled mosaics."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    data = fashion_mnist(limit=setting.garments)
    kept, sides = {}, {}
    for number, (side, count) in enumerate(
        (("train", setting.mosaics), ("test", setting.mosaics // 2))
    ):
        chosen = data.indices(side)
        sides[side] = data.pixels[chosen, 0], data.labels[chosen]
        generator = torch.Generator().manual_seed(number)
        pixels, labels = garment_mosaics(*sides[side], count, setting.tiles, generator)
        kept |= {f"{side} pixels": pixels, f"{side} labels": labels}
    watched = kept["test pixels"][:64]
    for arm in ARMS:
        losses, spreads = [], []
        for seed in range(setting.seeds):
            model, loss, spread = fit(arm, setting, *sides["train"], watched, seed, device)
            save_model(model, target / _file(arm, seed))
            losses.append(loss)
            spreads.append(spread)
        kept |= {f"losses of {arm}": torch.stack(losses), f"spreads of {arm}": torch.stack(spreads)}
        print(f"{arm}: spread of the targets at the end {spreads[-1][-1]:.3f}", flush=True)
    save_file(kept, target / KEPT)


@dataclass(frozen=True)
class JepaModels:
    """Trained arms, a list over seeds each, and labelled mosaics ("train" and "test").

    Attributes:
        losses: training loss of every step by arm, [seeds, steps].
        spreads: `spread_over_pictures` of the targets before and in training by arm, [seeds, looks + 1].
        pixels, labels: mosaics by side, and the class of every patch.
    """

    models: dict[str, list[Jepa]]
    losses: dict[str, Float[Tensor, "seeds steps"]]
    spreads: dict[str, Float[Tensor, "seeds looks"]]
    pixels: dict[str, UInt8[Tensor, "mosaics 1 side side"]]
    labels: dict[str, Int[Tensor, "mosaics patches"]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> JepaModels:
    """The arms of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("dmt_jepa", profile)

    def read(arm: str, seed: int) -> Jepa:
        model = untrained(arm, setting, seed)
        load_model(model, directory / _file(arm, seed))
        return model.to(device).eval().requires_grad_(False)

    kept = load_file(directory / KEPT)
    sides = ("train", "test")
    return JepaModels(
        {arm: [read(arm, seed) for seed in range(setting.seeds)] for arm in ARMS},
        {arm: kept[f"losses of {arm}"] for arm in ARMS},
        {arm: kept[f"spreads of {arm}"] for arm in ARMS},
        {side: kept[f"{side} pixels"] for side in sides},
        {side: kept[f"{side} labels"] for side in sides},
    )
