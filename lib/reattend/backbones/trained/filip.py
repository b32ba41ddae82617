"""Small image-text models of FILIP and of what it is compared with, on scenes of recoloured cut-outs.

All arms have the same towers and maps. Arms of one seed start from the same weights and see the same pairs
in the same order; another seed has other weights, other training scenes and another order.

The rate stays where the warm-up ends, and what is kept is a mean of the weights that can be taken at any step: so one
training gives the models of several lengths of training, each as good as if it had been planned for that length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from reattend.backbones.store import backbone_path
from reattend.data.attribute_scenes import (
    VOCABULARY,
    AttributeScenes,
    caption_ids,
    make_attribute_scenes,
)
from reattend.training.contrastive import symmetric_info_nce
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.encoders import index_batches, masked_mean
from reattend.trunks.image_text import ImageTextModel, ImageTower, TextTower, last_words
from reattend.vision_language.filip import gathered, late_similarity, telling_tokens

LOSSES = "losses.safetensors"
PER_WORKER = 8  # pairs among whose words a worker looks for a picture's telling patches


@dataclass(frozen=True)
class Shape:
    """Sizes that the models of all arms share; `objects` are the fewest and most of a scene."""

    size: int
    patch: int
    width: int
    layers: int
    heads: int
    joint: int
    objects: tuple[int, int] = (2, 4)
    side: tuple[int, int] = (8, 9)

    def scenes(self, count: int, split: str, seed: int, held_out: bool = False) -> AttributeScenes:
        """Scenes as these models see them."""
        return make_attribute_scenes(
            count,
            objects=self.objects,
            size=self.size,
            side=self.side,
            split=split,
            held_out=held_out,
            seed=seed,
        )


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        seeds: how many models of each arm in `ARMS`; those of all arms have the same seeds, from the first on.
        first: the first of these seeds.
        rates: learning rate of each arm.
        warmup: steps until the rate is reached; it stays there.
        marks: steps after which a model is kept, in order; the training ends at the last.
        longer: how many steps of "global" one of "late" is taken to last; the notebook measures it and has a gate.
        scenes: training scenes of each seed.
        galleries, gallery: how many test galleries of how many pairs.
    """

    shape: Shape
    seeds: Mapping[str, int]
    first: int
    rates: Mapping[str, float]
    batch: int
    warmup: int
    marks: tuple[int, ...]
    longer: float
    scenes: int
    galleries: int
    gallery: int

    @property
    def in_the_same_time(self) -> dict[int, int]:
        """The most steps of "late" that take no more time than so many of "global", where both are marks."""
        shorter = {mark: int(mark / self.longer) for mark in self.marks}
        return {mark: less for mark, less in shorter.items() if less in self.marks}

    def seeds_of(self, arm: str) -> range:
        """The seeds of an arm; "late", with which all are compared, has every seed that any arm has."""
        return range(self.first, self.first + self.seeds[arm])

    def plan(self, arm: str) -> TrainingPlan:
        """A constant rate, so that the first steps of a long training are a short one."""
        return TrainingPlan(
            self.marks[-1],
            self.rates[arm],
            weight_decay=0.03,
            warmup=self.warmup,
            schedule="constant",
            fused=True,
        )


# --- arms ----------------------------------------------------------------------------------------

Similarities = tuple[Float[Tensor, "images texts"], Float[Tensor, "images texts"]]
Compare = Callable[
    [
        Float[Tensor, "images length joint"],
        Float[Tensor, "texts words joint"],
        Bool[Tensor, "texts words"],
    ],
    Similarities,
]
"""From [CLS] and patches, words, and which words are real, to the similarity that ranks texts for a picture
and the one that ranks pictures for a text."""


def global_similarity(image: Tensor, text: Tensor, mask: Tensor) -> Similarities:
    """CLIP's: the cosine of [CLS] and [EOS]."""
    cosines = image[:, 0] @ last_words(text, mask).T
    return cosines, cosines


def late(image: Tensor, text: Tensor, mask: Tensor) -> Similarities:
    """The method."""
    return late_similarity(image[:, 1:], text, mask)


def mean_mean(image: Tensor, text: Tensor, mask: Tensor) -> Similarities:
    """The placebo: the mean over all pairs of patch and word, without any maximum; same tokens, same maps."""
    means = image[:, 1:].mean(1) @ masked_mean(text, mask).T
    return means, means


def unmasked(image: Tensor, text: Tensor, mask: Tensor) -> Similarities:
    """The method with padding taken for words."""
    return late_similarity(image[:, 1:], text, torch.ones_like(mask))


def some_patches(share: float, local: int = PER_WORKER) -> Compare:
    """The method on the share of each picture's patches that workers of `local` pairs would send on, and all words.

    All words, because the port takes a quarter of 77 padded places, which are more than its captions have.
    """

    def compare(image: Tensor, text: Tensor, mask: Tensor) -> Similarities:
        patches = image[:, 1:]
        kept = telling_tokens(patches, text, share, other_mask=mask, local=local)
        return late_similarity(gathered(patches, kept), text, mask)

    return compare


@dataclass(frozen=True)
class Arm:
    """How an arm compares in training, and at test, where it differs (all tokens take part)."""

    train: Compare
    test: Compare


ARMS = {
    "global": Arm(global_similarity, global_similarity),
    "late": Arm(late, late),
    "mean-mean": Arm(mean_mean, mean_mean),
    "unmasked": Arm(unmasked, unmasked),
    "quarter": Arm(some_patches(0.25), late),
}
RATES = {"global": 1e-3} | dict.fromkeys(("late", "mean-mean", "unmasked", "quarter"), 1.5e-3)
SETTINGS = {
    "smoke": Setting(
        Shape(20, 4, 16, 1, 2, 16, (2, 3)),
        {"global": 3, "late": 3, "mean-mean": 2, "unmasked": 3, "quarter": 2},
        0,
        RATES,
        8,
        1,
        (1, 4, 5, 8),
        1.6,
        24,
        1,
        16,
    ),
    "cpu": Setting(
        Shape(20, 4, 48, 2, 3, 48, (2, 3)),
        {"global": 7, "late": 7, "mean-mean": 4, "unmasked": 5, "quarter": 4},
        20,
        RATES,
        32,
        50,
        (456, 600, 912, 1200),
        1.315,
        1000,
        4,
        256,
    ),
    "gpu": Setting(
        Shape(96, 8, 256, 6, 8, 256, (4, 6), (16, 24)),
        dict.fromkeys(ARMS, 8),
        10,
        dict.fromkeys(ARMS, 1e-3),
        512,
        500,
        (1000, 1600, 2000, 2500, 4000),
        1.6,
        20_000,
        4,
        1000,
    ),
}


def untrained(shape: Shape, seed: int) -> ImageTextModel:
    """A model with random weights: the same for all arms of a seed."""
    torch.manual_seed(seed)
    image = ImageTower(shape.size, shape.patch, shape.width, shape.layers, shape.heads)
    length = 3 * shape.objects[1] + 1
    text = TextTower(len(VOCABULARY), length, shape.width, shape.layers, shape.heads)
    return ImageTextModel(image, text, shape.joint)


@dataclass(frozen=True)
class Pairs:
    """Pictures with their captions as the models read them."""

    pixels: UInt8[Tensor, "pairs 3 size size"]
    ids: Int[Tensor, "pairs length"]
    mask: Bool[Tensor, "pairs length"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor | slice) -> Pairs:
        return Pairs(self.pixels[index], self.ids[index], self.mask[index])

    def to(self, device: torch.device | str) -> Pairs:
        """The same on a device."""
        return Pairs(self.pixels.to(device), self.ids.to(device), self.mask.to(device))


def paired(scenes: AttributeScenes) -> Pairs:
    """Scenes and their captions."""
    return Pairs(scenes.pixels, *caption_ids(scenes.colours, scenes.nouns))


def contrastive_loss(model: ImageTextModel, pairs: Pairs, compare: Compare) -> Float[Tensor, ""]:
    """Symmetric InfoNCE of a batch in nats; no two captions of a batch say the same (see the scenes)."""
    image, text = model.image_tokens(pairs.pixels), model.text_tokens(pairs.ids)
    by_patches, by_words = compare(image, text, pairs.mask)
    return symmetric_info_nce(model.scale * by_patches, model.scale * by_words)


class AnytimeMean:
    """A mean of weights over a training in which late steps count most, at any step (Shamir and Zhang 2013, 1212.1824).

    mean_t = mean_{t-1} + w_t (weights_t - mean_{t-1}) with w_t = (LATENESS + 1) / (t + LATENESS): step s counts about
    as s to the power LATENESS, so that the mean lies about a tenth of the steps back, however long the training is.

    Args:
        model: whose weights are averaged; they are read at each call.
    """

    LATENESS = 8

    def __init__(self, model: nn.Module) -> None:
        self.model, self.mean = model, deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Take the weights after step number `step`, which counts from 1 and comes once each."""
        share = (self.LATENESS + 1) / (step + self.LATENESS)
        for mean, now in zip(self.mean.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, share)


def fit(
    arm: str, setting: Setting, pairs: Pairs, seed: int
) -> tuple[dict[int, ImageTextModel], Float[Tensor, " steps"]]:
    """Trained models of one arm by the number of steps, and the loss of every step.

    Raises:
        KeyError: for an unknown arm.
    """
    model = untrained(setting.shape, seed).to(pairs.ids.device)
    compare, average, kept = ARMS[arm].train, AnytimeMean(model), {}

    def after_step(step: int) -> None:
        average.take(step + 1)
        if step + 1 in setting.marks:
            kept[step + 1] = deepcopy(average.mean)

    log = train(
        model,
        index_batches(len(pairs), setting.batch, 1000 + seed),
        lambda model, index: contrastive_loss(model, pairs[index], compare),
        setting.plan(arm),
        groups=decay_matrices,
        after_step=after_step,
    )
    return kept, torch.tensor(log.losses)


# --- the build -----------------------------------------------------------------------------------


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile; write weights and losses."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    losses: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for seed in setting.seeds_of("late"):
        pairs = paired(setting.shape.scenes(setting.scenes, "train", seed)).to(device)
        for arm in (arm for arm in ARMS if seed in setting.seeds_of(arm)):
            kept, loss = fit(arm, setting, pairs, seed)
            for mark, model in kept.items():
                save_model(model, target / f"{arm}-{seed}-{mark}.safetensors")
            losses[arm].append(loss)
    for arm, rows in losses.items():
        last = ", ".join(f"{row[-20:].mean():.3f}" for row in rows)
        print(f"{arm}: {last} nats over the last 20 steps", flush=True)
    save_file({arm: torch.stack(rows) for arm, rows in losses.items()}, target / LOSSES)


@dataclass(frozen=True)
class TrainedArms:
    """Trained models by arm and by the number of steps, a list over seeds each, and the loss of every step."""

    models: dict[str, dict[int, list[ImageTextModel]]]
    losses: dict[str, Float[Tensor, "_ steps"]]

    def at(self, mark: int) -> dict[str, list[ImageTextModel]]:
        """The models after so many steps, by arm, a list over seeds each."""
        return {arm: by_mark[mark] for arm, by_mark in self.models.items()}


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> TrainedArms:
    """The models of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("filip", profile)

    def read(arm: str, seed: int, mark: int) -> ImageTextModel:
        model = untrained(setting.shape, seed)
        load_model(model, directory / f"{arm}-{seed}-{mark}.safetensors")
        return model.to(device).eval()

    models = {
        arm: {
            mark: [read(arm, seed, mark) for seed in setting.seeds_of(arm)]
            for mark in setting.marks
        }
        for arm in ARMS
    }
    return TrainedArms(models, load_file(directory / LOSSES))


def moved_on(
    half: Float[np.ndarray, " seeds"], end: Float[np.ndarray, " seeds"], between: float
) -> Float[np.ndarray, " seeds"]:
    """How far the second half of a training moved a difference of two arms away from `between`, a value a seed.

    (end - half) sign(mean(end) - between): what a difference above `between` has risen, or one below has fallen.
    Negative: it is on its way to the other side, so that the side it is found on hangs on when training stops.

    Args:
        half, end: the difference after half and after all of the steps.
        between: half-way between the margins of its test.
    """
    return (end - half) * (1.0 if np.mean(end) >= between else -1.0)
