"""A small CLIP a seed on pictures of single objects, and what R-AMT and its rivals learn of a shifted domain.

The CLIP is trained on captions "colour noun" and frozen. Every arm then sees the same few pictures of each
noun in the shifted domain. What it learns is kept: bits of masks and their real numbers, or context vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.data.attribute_scenes import COLOURS, NOUNS, VOCABULARY, caption_ids
from reattend.data.shifted_objects import Objects, jittered, make_objects
from reattend.data.shots import draw_shots
from reattend.training.contrastive import shared_targets, symmetric_info_nce
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.encoders import index_batches
from reattend.trunks.image_text import (
    BlockHooks,
    Heads,
    ImageTextModel,
    ImageTower,
    TextTower,
    Tower,
)
from reattend.vision_language.r_amt import (
    NORM_WEIGHT,
    PLACES,
    THRESHOLD,
    WeightMasks,
    imitation_loss,
    pack_bits,
    regularised_gradients,
    weights_in,
    with_gradients,
)

VALIDATION = 4  # labelled pictures a class beside the shots, for baselines that choose something
VIEWS = 8  # jittered ones of each shot
CAPTION = 4  # <bos> colour noun <eos>
BASE = len(NOUNS) // 2  # nouns before this one are the base classes


@dataclass(frozen=True)
class Shape:
    """Sizes of pictures, objects and towers."""

    size: int = 24
    patch: int = 4
    side: tuple[int, int] = (18, 21)
    width: int = 64
    layers: int = 2
    heads: int = 4
    contexts: int = 4

    def objects(self, count: int, split: str, seed: int) -> Objects:
        """Pictures as these models see them."""
        return make_objects(count, size=self.size, side=self.side, split=split, seed=seed)


# --- the pretrained model --------------------------------------------------------------------------


class OneToken(BlockHooks):
    """Of the last block's tokens only the one that is read goes through its MLP: [CLS], or the last word.

    What is said of that token stays the same, for after the last attention tokens no longer meet.

    Args:
        tower: whose blocks these are.
        token: its position.
    """

    def __init__(self, tower: Tower, token: int) -> None:
        self.last, self.token = len(tower.blocks) - 1, token

    def between(
        self, layer: int, x: Float[Tensor, "batch length width"], heads: Heads
    ) -> Float[Tensor, "batch kept width"]:
        """Tokens between attention and MLP: all of them, or after the last attention one."""
        return x[:, self.token, None] if layer == self.last else x


def read_pictures(
    model: ImageTextModel, pixels: UInt8[Tensor, "batch 3 size size"]
) -> Float[Tensor, "batch joint"]:
    """[CLS] in the joint space, of length 1."""
    states = model.image(pixels, OneToken(model.image, 0))
    return F.normalize(model.image_map(states[:, 0]), dim=-1)


def read_captions(
    model: ImageTextModel, ids: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch joint"]:
    """[EOS], the last word of captions of equal length, in the joint space, of length 1."""
    return F.normalize(model.text_map(model.text(ids, OneToken(model.text, -1))[:, 0]), dim=-1)


def untrained(shape: Shape, seed: int) -> ImageTextModel:
    """A model with random weights."""
    torch.manual_seed(seed)
    image = ImageTower(shape.size, shape.patch, shape.width, shape.layers, shape.heads)
    length = CAPTION - 1 + shape.contexts
    text = TextTower(len(VOCABULARY), length, shape.width, 2, shape.heads)
    return ImageTextModel(image, text, shape.width)


def pretrain(
    shape: Shape, objects: Objects, batch: int, plan: TrainingPlan, seed: int
) -> ImageTextModel:
    """CLIP on pictures and captions; pictures of one caption in a batch share their targets."""
    model = untrained(shape, seed).to(objects.pixels.device)
    ids, _ = caption_ids(objects.colours[:, None], objects.nouns[:, None])
    ids = ids.to(objects.pixels.device)
    said = objects.colours * len(NOUNS) + objects.nouns

    def loss(model: ImageTextModel, index: Tensor) -> Tensor:
        image = read_pictures(model, objects.pixels[index])
        logits = model.scale * image @ read_captions(model, ids[index]).T
        return symmetric_info_nce(logits, logits, shared_targets(said[index]))

    batches = index_batches(len(objects), batch, 1000 + seed)
    train(model, batches, loss, plan, groups=decay_matrices)
    return model.requires_grad_(False)


@torch.no_grad()
def hand_prompts(model: ImageTextModel) -> Float[Tensor, "classes joint"]:
    """One vector a noun: the mean of "red apple", "green apple", ... in the joint space, of length 1."""
    colours = torch.arange(len(COLOURS)).repeat(len(NOUNS))[:, None]
    nouns = torch.arange(len(NOUNS)).repeat_interleave(len(COLOURS))[:, None]
    ids, _ = caption_ids(colours, nouns)
    prompts = read_captions(model, ids.to(model.log_scale.device))
    return F.normalize(prompts.unflatten(0, (len(NOUNS), -1)).mean(1), dim=-1)


def views_of(shots: Objects, seed: int) -> Objects:
    """`VIEWS` jittered views of every picture, for those who learn on frozen features."""
    generator = Generator(shots.pixels.device).manual_seed(seed)
    places = torch.arange(len(shots)).repeat(VIEWS)
    many = shots[places]
    return Objects(jittered(many.pixels, generator), many.colours, many.nouns)


class Contexts(nn.Module):
    """CoOp (2109.01134): learnt vectors between <bos> and the noun, the same ones for all classes."""

    def __init__(self, count: int, width: int, seed: int) -> None:
        super().__init__()
        generator = Generator().manual_seed(seed)
        self.vectors = nn.Parameter(0.02 * torch.randn(count, width, generator=generator))

    def forward(self, model: ImageTextModel) -> Float[Tensor, "classes joint"]:
        """One vector a noun, of length 1."""
        device = self.vectors.device
        ids, _ = caption_ids(torch.zeros(len(NOUNS), 1).long(), torch.arange(len(NOUNS))[:, None])
        words = model.text.words[ids.to(device)]
        vectors = self.vectors.expand(len(NOUNS), -1, -1)
        embedded = torch.cat([words[:, :1], vectors, words[:, 2:]], dim=1)
        placed = embedded + model.text.positions[: embedded.shape[1]]
        states = model.text.states(placed, OneToken(model.text, -1))
        return F.normalize(model.text_map(states[:, 0]), dim=-1)


# --- tuning ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What is masked and which gradient the masks get.

    Args:
        place: a key of `PLACES`.
        strength: of gradient dropout.
        gradients: "own", or of a placebo: "permuted" moves the gradient's entries inside each matrix, always
            in the same way; "thinned" drops entries at random, as many as R-AMT dropped in that step.
        learnt_prompts: whether the class vectors are CoOp's instead of those of the hand prompts.
    """

    place: str = "AMT"
    strength: float = 0.0
    gradients: Literal["own", "permuted", "thinned"] = "own"
    learnt_prompts: bool = False


ARMS = {
    "AMT": Arm(),
    "R-AMT": Arm(strength=1.0),
    "thinned": Arm(gradients="thinned"),
    "permuted": Arm(gradients="permuted"),
    "CoOp + R-AMT": Arm(strength=1.0, learnt_prompts=True),
    "CoOp + permuted": Arm(gradients="permuted", learnt_prompts=True),
    "R-MMT": Arm("MMT", strength=1.0),
    "R-PMT": Arm("PMT", strength=1.0),
}
ON_TWO = ("permuted", "R-MMT", "R-PMT")
"""Arms that are trained on the two largest numbers of shots."""
LEAN = ("R-AMT", "R-PMT")
"""Arms of the seeds that are there for the comparisons with a wide spread alone."""


@dataclass(frozen=True)
class Tuned:
    """What one training of masks leaves behind.

    Attributes:
        values: M of every matrix at the end.
        path: bits at the start and after every `check_every` steps, packed.
        losses: of every step.
        dropped: share of the gradient's entries that were set to zero in every step.
    """

    values: list[Float[Tensor, "*_"]]
    path: UInt8[Tensor, "checks bytes"]
    losses: Float[Tensor, " steps"]
    dropped: Float[Tensor, " steps"]


def masked_features(
    model: ImageTextModel, masks: WeightMasks, pixels: UInt8[Tensor, "pictures 3 size size"]
) -> Float[Tensor, "pictures joint"]:
    """[CLS] in the joint space, of length 1, out of the masked image tower."""
    states = masks(model.image, pixels, OneToken(model.image, 0))
    return F.normalize(model.image_map(states[:, 0]), dim=-1)


def new_masks(model: ImageTextModel, place: str) -> WeightMasks:
    """Masks of the image tower with every bit on."""
    return WeightMasks(model.image, weights_in(model.image, PLACES[place]))


@dataclass(frozen=True)
class TuningPlan:
    """Adam on M and on context vectors, cosine schedules to zero, no warm-up, no clipping."""

    steps: int
    batch: int
    rate: float
    check_every: int
    context_steps: int
    context_rate: float

    @property
    def masks(self) -> TrainingPlan:
        """Of M."""
        return _adam(self.steps, self.rate)

    @property
    def contexts(self) -> TrainingPlan:
        """Of CoOp's vectors."""
        return _adam(self.context_steps, self.context_rate)


def _adam(steps: int, rate: float) -> TrainingPlan:
    return TrainingPlan(steps, rate, weight_decay=0.0, clip=math.inf, fused=True)


def tune_contexts(
    model: ImageTextModel,
    shots: Objects,
    count: int,
    plan: TuningPlan,
    seed: int,
    classes: int = len(NOUNS),
) -> Contexts:
    """CoOp on shots of the first `classes` nouns: their cross-entropy, with the image tower as it is."""
    contexts = Contexts(count, model.text.words.shape[1], seed).to(shots.pixels.device)
    shots = views_of(shots, seed)
    with torch.no_grad():
        image = read_pictures(model, shots.pixels)

    def loss(contexts: Contexts, index: Tensor) -> Tensor:
        logits = model.scale * image[index] @ contexts(model).T
        return F.cross_entropy(logits[:, :classes], shots.nouns[index])

    batches = index_batches(len(shots), min(plan.batch, len(shots)), seed)
    train(contexts, batches, loss, plan.contexts)
    return contexts


def tune(
    model: ImageTextModel,
    classes: Float[Tensor, "classes joint"],
    shots: Objects,
    arm: Arm,
    plan: TuningPlan,
    seed: int,
    *,
    dropped: Float[Tensor, " steps"] | None = None,
    until: float = 1.0,
) -> Tuned:
    """Train masks on a few labelled pictures; labels are positions in `classes`.

    Args:
        dropped: share of entries to drop in each step, for "thinned".
        until: share of zeros at which to stop, looked at every fifth step.
    """
    masks = new_masks(model, arm.place).to(classes.device)
    generator = Generator(classes.device).manual_seed(seed)
    views = Generator(classes.device).manual_seed(seed)
    values = list(masks.values)
    orders = [torch.randperm(v.numel(), generator=generator, device=v.device) for v in values]
    path, shares = [pack_bits([b.cpu() for b in masks.bits()])], []

    def gradients(task: Tensor, logits: Tensor, seen: Tensor) -> list[Tensor]:
        if arm.strength:
            with torch.no_grad():
                old = model.scale * read_pictures(model, seen) @ classes.T
            imitation = imitation_loss(logits, old)
            return regularised_gradients(task, imitation, masks, arm.strength, generator)
        own = torch.autograd.grad(task, values)
        if arm.gradients == "permuted":
            return [g.flatten()[o].view_as(g) for g, o in zip(own, orders, strict=True)]
        if arm.gradients == "thinned":
            drawn = [torch.rand(g.shape, generator=generator, device=g.device) for g in own]
            return [g * (u >= dropped[len(shares)]) for g, u in zip(own, drawn, strict=True)]
        return list(own)

    def loss(masks: WeightMasks, index: Tensor) -> Tensor:
        seen = jittered(shots.pixels[index], views)
        logits = model.scale * masked_features(model, masks, seen) @ classes.T
        task = F.cross_entropy(logits, shots.nouns[index]) + NORM_WEIGHT * masks.norms()
        found = gradients(task, logits, seen)
        shares.append(sum((g == 0).sum() for g in found) / sum(g.numel() for g in found))
        return with_gradients(task, values, found)

    def note(step: int) -> None:
        if (step + 1) % plan.check_every == 0:
            path.append(pack_bits([b.cpu() for b in masks.bits()]))

    log = train(
        masks,
        index_batches(len(shots), min(plan.batch, len(shots)), seed),
        loss,
        plan.masks,
        stop=lambda masks: masks.zeros() >= until,
        check_every=5,
        after_step=note,
    )
    final = [value.detach().cpu() for value in values]
    return Tuned(final, torch.stack(path), torch.tensor(log.losses), torch.stack(shares))


# --- the build -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: an arm, or "CoOp", on so many shots of a class; on the base classes alone, or on all."""

    arm: str
    shots: int
    base: bool = False

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.arm}/{self.shots}/{'base' if self.base else 'all'}"


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        first, seeds: the first seed and their number.
        full: so many of them train all arms, the rest `LEAN` alone.
        domain: of the shots, a key of `DOMAINS`.
        pictures: of pretraining; as many more hold the shots.
        few: numbers of shots; `most` are the last two, the last one is that of the arms that are trained on
            one number alone.
        few_arms: arms that are trained on every number of shots, and on the base classes.
    """

    shape: Shape
    first: int
    seeds: int
    full: int
    domain: str
    pictures: int
    batch: int
    steps: int
    rate: float
    pool: int
    plan: TuningPlan
    few: tuple[int, ...] = (1, 2, 4, 8, 16)
    few_arms: tuple[str, ...] = ("AMT", "R-AMT")

    def pretraining(self) -> TrainingPlan:
        """Warm-up over a sixth of the steps, then a cosine to zero."""
        return TrainingPlan(self.steps, self.rate, 0.03, warmup=self.steps // 6, fused=True)

    @property
    def most(self) -> tuple[int, ...]:
        """The two largest numbers of shots."""
        return self.few[-2:]

    def numbered(self) -> range:
        """The seeds."""
        return range(self.first, self.first + self.seeds)

    def runs(self, seed: int) -> list[Run]:
        """All trainings of a seed, in an order in which each finds what it needs."""
        if seed >= self.first + self.full:
            return [Run(arm, shots) for arm in LEAN for shots in self.most]
        last, tuned = self.few[-1], ("CoOp", *self.few_arms)
        few = [Run(arm, shots) for arm in tuned for shots in self.few]
        twice = [Run(arm, shots) for arm in ON_TWO for shots in self.most]
        rest = [Run(arm, last) for arm in ARMS if arm not in (*self.few_arms, *ON_TWO)]
        return [*few, *twice, *rest, *(Run(arm, last, base=True) for arm in tuned)]


SETTINGS = {
    "smoke": Setting(
        Shape(patch=12, side=(21, 24), width=16, layers=1, heads=2),
        first=0,
        seeds=4,
        full=3,
        domain="striped",
        pictures=64,
        batch=16,
        steps=4,
        rate=2e-3,
        pool=256,
        plan=TuningPlan(12, 16, 1e-3, 4, 3, 1e-2),
        few=(1, 2),
    ),
    "cpu": Setting(
        Shape(patch=6, side=(21, 24)),
        first=20,
        seeds=14,
        full=6,
        domain="striped",
        pictures=3000,
        batch=64,
        steps=1000,
        rate=2e-3,
        pool=1000,
        plan=TuningPlan(200, 16, 1e-4, 20, 300, 0.005),
        few=(1, 2, 8, 16),
    ),
    "gpu": Setting(
        Shape(size=96, patch=8, side=(72, 90), width=256, layers=8, heads=8),
        first=0,
        seeds=8,
        full=8,
        domain="striped",
        pictures=20_000,
        batch=512,
        steps=4000,
        rate=1e-3,
        pool=1000,
        plan=TuningPlan(600, 32, 5e-5, 20, 500, 5e-3),
    ),
}


@dataclass(frozen=True)
class FewShots:
    """Labelled pictures of the shifted domain: nested draws, and further ones of each class to choose by."""

    drawn: Objects  # class by class
    most: int

    def shots(self, count: int, base: bool = False) -> Objects:
        """The `count`-shot set, of the base classes or of all."""
        return self._part(0, count, BASE if base else len(NOUNS))

    def validation(self, count: int) -> Objects:
        """As many again, up to `VALIDATION` of each class, which no set of shots holds."""
        return self._part(self.most, self.most + min(count, VALIDATION), len(NOUNS))

    def _part(self, start: int, stop: int, classes: int) -> Objects:
        places = torch.arange(len(self.drawn)).view(len(NOUNS), -1)
        return self.drawn[places[:classes, start:stop].flatten()]


def few_shots(setting: Setting, seed: int, device: torch.device | str = "cpu") -> FewShots:
    """The draw of a seed, from other pictures than those of pretraining."""
    pool = setting.shape.objects(setting.pool, "train", 500 + seed).shifted(setting.domain)
    drawn = draw_shots(pool.nouns, setting.few[-1] + VALIDATION, seed)
    return FewShots(pool[drawn.flatten()].to(device), setting.few[-1])


def tune_all(
    setting: Setting, model: ImageTextModel, seed: int
) -> tuple[dict[str, Tuned], dict[str, Tensor]]:
    """All trainings of a seed by `Run.key`: masks, and context vectors of CoOp."""
    drawn, plan = few_shots(setting, seed, model.log_scale.device), setting.plan
    hand = hand_prompts(model)
    tuned: dict[str, Tuned] = {}
    contexts: dict[str, Tensor] = {}
    for run in setting.runs(seed):
        shots = drawn.shots(run.shots, run.base)
        classes = BASE if run.base else len(NOUNS)
        if run.arm == "CoOp":
            learnt = tune_contexts(model, shots, setting.shape.contexts, plan, seed, classes)
            contexts[run.key] = learnt.vectors.detach()
            continue
        arm, vectors, extra = ARMS[run.arm], hand, {}
        if arm.learnt_prompts:
            vectors = learnt_prompts(model, contexts[Run("CoOp", run.shots).key])
        if arm.gradients == "thinned":
            extra = {"dropped": tuned[Run("R-AMT", run.shots).key].dropped}
        if arm.gradients == "permuted":
            extra = {"until": zeros_of(tuned[Run("AMT", run.shots).key].values)}
        tuned[run.key] = tune(model, vectors[:classes], shots, arm, plan, seed, **extra)
    return tuned, contexts


@torch.no_grad()
def learnt_prompts(
    model: ImageTextModel, vectors: Float[Tensor, "contexts width"]
) -> Float[Tensor, "classes joint"]:
    """One vector a noun out of CoOp's context vectors."""
    contexts = Contexts(*vectors.shape, seed=0)
    contexts.vectors.data = vectors
    return contexts(model)


def zeros_of(values: Sequence[Float[Tensor, "*_"]]) -> float:
    """Share of the entries that lie at the threshold or below."""
    return sum(int((v <= THRESHOLD).sum()) for v in values) / sum(v.numel() for v in values)


def build(target: Path, profile: str) -> None:
    """Pretrain and tune all seeds of a profile; write weights, masks and context vectors."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    for seed in setting.numbered():
        objects = setting.shape.objects(setting.pictures, "train", seed).to(device)
        model = pretrain(setting.shape, objects, setting.batch, setting.pretraining(), seed)
        tuned, contexts = tune_all(setting, model, seed)
        save_model(model, target / f"clip-{seed}.safetensors")
        tensors = {f"{key}/context": vectors for key, vectors in contexts.items()}
        for key, found in tuned.items():
            tensors |= {f"{key}/{i}": value for i, value in enumerate(found.values)}
            parts = {"path": found.path, "losses": found.losses, "dropped": found.dropped}
            tensors |= {f"{key}/{name}": part.cpu() for name, part in parts.items()}
        save_file(tensors, target / f"tuned-{seed}.safetensors")
        print(f"seed {seed}: {len(tuned)} masks, {len(contexts)} sets of contexts", flush=True)


@dataclass(frozen=True)
class Seed:
    """The pretrained model of one seed and what was learnt on it, by `Run.key`."""

    seed: int
    model: ImageTextModel
    tuned: dict[str, Tuned]
    contexts: dict[str, Float[Tensor, "contexts width"]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> list[Seed]:
    """All seeds of a profile, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("r_amt", profile)
    return [_read(setting, directory, seed, device) for seed in setting.numbered()]


def _read(setting: Setting, directory: Path, seed: int, device: torch.device | str) -> Seed:
    model = untrained(setting.shape, seed)
    load_model(model, directory / f"clip-{seed}.safetensors")
    tensors = load_file(directory / f"tuned-{seed}.safetensors", str(device))
    tuned, contexts = {}, {}
    for run in setting.runs(seed):
        if run.arm == "CoOp":
            contexts[run.key] = tensors[f"{run.key}/context"]
            continue
        matrices = len(weights_in(model.image, PLACES[ARMS[run.arm].place]))
        values = [tensors[f"{run.key}/{i}"] for i in range(matrices)]
        rest = {name: tensors[f"{run.key}/{name}"] for name in ("path", "losses", "dropped")}
        tuned[run.key] = Tuned(values, **rest)
    return Seed(seed, model.to(device).eval().requires_grad_(False), tuned, contexts)
