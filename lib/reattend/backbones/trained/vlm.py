"""A small vision-language model that answers questions about scenes, trained here in three stages.

1. Words: the language model reads pictures made of words: each patch is the sum of the words of what it shows, with
   some patches mistaken. It learns what the questions mean, from kinds and colours drawn anew each time.
2. Alignment: the projector learns to make those sums of words out of the tokens of the frozen tower (`vit`).
3. Questions: projector and language model together, on real pictures. One prompt of a batch has no picture, so that
   the answer without one is the model's best guess (the blind control, same weights).

In the first stage only some of the background's patches are read, which is most of the saving in time, with
position ids of either kind (gaps closed or left). The tower reads scenes in bfloat16 where the processor has
matrix units for that, and so do stages 1 to 3: without them the build takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from reattend.backbones.features import extract
from reattend.backbones.pretrained.vit import PATCH, hidden_states
from reattend.backbones.pretrained.vit import load as load_tower
from reattend.backbones.store import backbone_path
from reattend.data.scenes import CLASSES, COLOURS, Scenes, make_scenes
from reattend.data.vlm_questions import (
    BOS,
    IDS,
    NOTHING,
    PAD,
    TYPES,
    WORDS,
    Question,
    balanced,
    encode,
    patch_contents,
    questions,
    scene_questions,
)
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.vlm import Prompt, VisionLanguageModel, VLMShape

TOWER_LAYER = 10
"""Of the tower: features are its tokens after this layer (1 .. 12)."""
WEIGHTS, LOSSES = "vlm.safetensors", "losses.safetensors"


@dataclass(frozen=True)
class Stage:
    """One stage of training: optimiser steps, pictures a step, peak learning rate."""

    steps: int
    batch: int
    rate: float

    def plan(self) -> TrainingPlan:
        """Short warm-up, then a cosine to zero."""
        return TrainingPlan(
            self.steps,
            self.rate,
            weight_decay=0.01,
            warmup=self.steps // 20,
            betas=(0.9, 0.98),
            fused=True,
        )


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        shape: of the model; its grid also says how large pictures are.
        scenes: training scenes.
        asked: questions packed behind a picture.
        read: patches that are read in the stage of words.
        blind: prompts of a batch of the last stage that have no picture.
    """

    shape: VLMShape
    scenes: int
    words: Stage
    align: Stage
    answer: Stage
    asked: int = 12
    read: int = 20
    blind: int = 1

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        return PATCH * self.shape.grid[0]

    def make_scenes(self, count: int, split: str, seed: int) -> Scenes:
        """Scenes of one to four objects as this model knows them."""
        return make_scenes(
            count,
            "several",
            objects=(1, 4),
            scale=(0.25, 0.45),
            size=self.size,
            split=split,
            seed=seed,
        )


def _shape(side: int, **sizes) -> VLMShape:
    return VLMShape(len(WORDS), (side, side), **sizes)


SETTINGS = {
    "smoke": Setting(
        _shape(4, width=32, layers=3, heads=2, hidden=48),
        16, Stage(4, 4, 1e-3), Stage(4, 4, 1e-3), Stage(4, 4, 1e-3), read=12,
    ),
    "cpu": Setting(_shape(12), 3000, Stage(1200, 16, 2e-3), Stage(600, 32, 2e-3), Stage(420, 16, 1e-3)),
    "gpu": Setting(
        _shape(24, width=512, layers=12, heads=8, hidden=1376),
        40_000, Stage(10_000, 64, 1e-3), Stage(5000, 64, 1e-3), Stage(20_000, 64, 5e-4),
    ),
}  # fmt: skip


def fast_products(device: str = "cpu") -> torch.autocast:
    """bfloat16 for matrix products where there are units for them: without, it is slower than single precision."""
    return torch.autocast(
        device, torch.bfloat16, enabled=device != "cpu" or torch.cpu._is_amx_tile_supported()
    )


@torch.no_grad()
def tower_tokens(
    pixels: UInt8[Tensor, "items 3 size size"], device: str = "cpu"
) -> Float[Tensor, "items patches 384"]:
    """Patch tokens of the frozen tower after `TOWER_LAYER`, in half precision; a multiple of 14 pixels a side."""
    tower = load_tower(device)

    def encode_batch(batch: Tensor) -> Tensor:
        with fast_products(device):
            return hidden_states(tower, batch.to(device), [TOWER_LAYER], pixels.shape[-1])

    return extract(encode_batch, pixels, "tokens of the tower")[0, :, 1:]


def untrained(shape: VLMShape, seed: int = 0) -> VisionLanguageModel:
    """The model that training starts from.

    From the third layer on keys start as the queries' map, so that like attends to like. That the first two
    do not was meant to have pictures read later than there; trained models read them in the first layer
    all the same (measured in the report).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionLanguageModel(shape)
        for layer in model.layers[2:]:
            torch.nn.init.normal_(layer.q.weight, std=shape.width**-0.5)
            layer.k.weight.data.copy_(layer.q.weight.data)
    return model


@dataclass(frozen=True)
class Material:
    """Training scenes with what the stages read of them.

    Attributes:
        contents: share of each patch that each object covers.
        tokens: of the tower.
    """

    scenes: Scenes
    contents: Float[Tensor, "scenes objects patches"]
    tokens: Float[Tensor, "scenes patches 384"]


def training_material(setting: Setting, device: str = "cpu") -> Material:
    """Scenes of the training side and their tokens; nobody else uses the seed."""
    scenes = setting.make_scenes(setting.scenes, "train", seed=0)
    contents = patch_contents(scenes, setting.shape.grid[0])
    return Material(scenes, contents, tower_tokens(scenes.pixels, device))


# --- stage 1: pictures of words ------------------------------------------------------------------------

MISTAKEN = 0.05
"""Share of patches whose kind, and share whose colour, is another one in pictures of words."""
_KINDS = torch.tensor([IDS[word] for word in CLASSES])
_COLOURS = torch.tensor([IDS[word] for word in COLOURS])


@dataclass(frozen=True)
class WordPictures:
    """Pictures of words with questions: which patches are read, and the two words that each shows.

    Attributes:
        patches: raster places, ascending.
        shown: ids of kind and colour; twice the background's where there is no object.
    """

    patches: Int[Tensor, "batch read"]
    shown: Int[Tensor, "batch read 2"]
    asked: list[list[Question]]


def draw_word_pictures(
    setting: Setting,
    scenes: Scenes,
    contents: Float[Tensor, "scenes objects patches"],
    random: np.random.Generator,
) -> WordPictures:
    """Objects where those of training scenes lie, of kinds and colours drawn anew; all patches of objects, at
    most `setting.read`, and some of the background."""
    chosen = random.integers(len(scenes), size=setting.words.batch)
    count = (scenes.labels[chosen] >= 0).sum(1).tolist()
    kinds = random.integers(len(CLASSES), size=scenes.labels[chosen].shape)
    colours = random.integers(len(COLOURS), size=kinds.shape)
    asked = [
        balanced(
            questions(
                kinds[b, :n].tolist(),
                colours[b, :n].tolist(),
                scenes.boxes[i, :n].numpy(),
                setting.size,
                random,
            ),
            setting.asked,
        )
        for b, (i, n) in enumerate(zip(chosen.tolist(), count, strict=True))
    ]
    share, owner = contents[chosen].max(1)
    most = (
        F.one_hot(contents[chosen].argmax(2), share.shape[1]).bool().any(1)
    )  # no object without a patch
    covered = (share > 0.4) | most & (share > 0.1)
    order = covered + torch.from_numpy(random.random(share.shape))
    patches = order.topk(setting.read, 1).indices.sort(1).values
    owner, covered = owner.gather(1, patches), covered.gather(1, patches)
    shown = [
        _mistaken(torch.from_numpy(values).gather(1, owner), number, random)
        for values, number in ((kinds, len(CLASSES)), (colours, len(COLOURS)))
    ]
    ids = torch.stack([_KINDS[shown[0]], _COLOURS[shown[1]]], 2)
    return WordPictures(patches, ids.where(covered[..., None], IDS[NOTHING]), asked)


def _mistaken(
    values: Int[Tensor, "batch read"], number: int, random: np.random.Generator
) -> Int[Tensor, "batch read"]:
    other = torch.from_numpy(random.integers(number, size=values.shape))
    return torch.where(torch.from_numpy(random.random(values.shape) < MISTAKEN), other, values)


def word_loss(
    model: VisionLanguageModel, pictures: WordPictures, random: np.random.Generator
) -> Float[Tensor, ""]:
    """Loss of the answers about pictures of words; on half of the batches position ids have gaps."""
    states = model.words(pictures.shown).sum(2) + model.place(pictures.patches)
    states = states + 0.02 * torch.from_numpy(random.standard_normal(states.shape)).to(states)
    words, answers = encode(pictures.asked)
    prompt = model.prompt(IDS[BOS], states, words, IDS[PAD], pictures.patches)
    if random.random() < 0.5:
        spread = torch.where(prompt.patches >= 0, prompt.patches + 1, prompt.positions)
        behind = prompt.positions + model.shape.patches - pictures.patches.shape[1]
        gaps = torch.where(prompt.segments == 0, spread, behind)
        prompt = replace(prompt, positions=gaps)
    return answer_loss(model, prompt, answers)


def answer_loss(
    model: VisionLanguageModel, prompt: Prompt, answers: Int[Tensor, " asked"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the answers over the whole vocabulary."""
    return F.cross_entropy(model.answers(model.read(prompt)).float(), answers)


# --- stage 2: alignment --------------------------------------------------------------------------------


def word_sums(
    model: VisionLanguageModel,
    scenes: Scenes,
    contents: Float[Tensor, "batch objects patches"],
    chosen: Int[np.ndarray, " batch"],
) -> Float[Tensor, "batch patches width"]:
    """What the projector shall make of patches: words of what they show, each by the share that it covers."""
    table = model.words.weight.detach()
    kinds, colours = (part[chosen].clamp(min=0) for part in (scenes.labels, scenes.colours))
    objects = table[_KINDS[kinds]] + table[_COLOURS[colours]]
    background = 2 * table[IDS[NOTHING]]
    share = contents.sum(1)[..., None]
    return torch.einsum("bon,bow->bnw", contents, objects) + (1 - share) * background


def alignment_loss(
    model: VisionLanguageModel, material: Material, chosen: Int[np.ndarray, " batch"]
) -> Float[Tensor, ""]:
    """Squared distance of projected tokens to sums of words; patches of objects count five times."""
    contents = material.contents[chosen]
    made = model.projector(model.tower_norm(material.tokens[chosen].float()))
    distance = (made - word_sums(model, material.scenes, contents, chosen)).square().sum(2)
    return (distance * (1 + 4 * (contents.sum(1) > 0.3))).mean()


# --- build and load ------------------------------------------------------------------------------------


def build(target: Path, profile: str) -> None:
    """Train the model at the profile's size and write weights and losses of all steps into `target`."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    model, losses = fit(setting, training_material(setting, device))
    save_model(model, target / WEIGHTS)
    save_file({name: torch.tensor(values) for name, values in losses.items()}, target / LOSSES)


def fit(
    setting: Setting, material: Material, seed: int = 0
) -> tuple[VisionLanguageModel, dict[str, list[float]]]:
    """A trained model, and the losses of each stage step by step."""
    model, random = untrained(setting.shape, seed), np.random.default_rng(seed)
    scenes, losses = material.scenes, {}

    def stage(
        name: str, plan: TrainingPlan, batch: Callable, loss: Callable, part: torch.nn.Module
    ) -> None:
        def fast_loss(_: torch.nn.Module, given) -> Tensor:
            with (
                fast_products(),
                sdpa_kernel(SDPBackend.MATH),
            ):  # fused attention is slow backwards on CPUs
                return loss(given)

        losses[name] = train(
            part,
            (batch() for _ in iter(int, 1)),
            fast_loss,
            plan,
            progress=lambda steps: tqdm(steps, desc=name, mininterval=2.0),
        ).losses

    def drawn(count: int) -> Callable:
        return lambda: random.integers(len(scenes), size=count)

    stage(
        "words",
        setting.words.plan(),
        lambda: draw_word_pictures(setting, scenes, material.contents, random),
        lambda pictures: word_loss(model, pictures, random),
        model,
    )
    stage(
        "alignment",
        setting.align.plan(),
        drawn(setting.align.batch),
        lambda chosen: alignment_loss(model, material, chosen),
        model.projector,
    )
    stage(
        "answers",
        setting.answer.plan(),
        drawn(setting.answer.batch),
        lambda chosen: picture_loss(model, setting, material, chosen, random),
        model,
    )
    return model, losses


def picture_loss(
    model: VisionLanguageModel,
    setting: Setting,
    material: Material,
    chosen: Int[np.ndarray, " batch"],
    random: np.random.Generator,
) -> Float[Tensor, ""]:
    """Loss of the answers about real pictures, and of `setting.blind` prompts of the batch without theirs."""
    asked = [
        balanced(scene_questions(material.scenes, i, random), setting.asked)
        for i in chosen.tolist()
    ]
    seen, unseen = asked[setting.blind :], asked[: setting.blind]
    pictures = model.project(material.tokens[chosen[setting.blind :]])
    total = 0
    for shown, of in ((pictures, seen), (None, unseen)):
        words, answers = encode(of)
        prompt = model.prompt(IDS[BOS], shown, words, IDS[PAD])
        total = total + answer_loss(model, prompt, answers) * len(of) / len(asked)
    return total


def load(profile: str, device: str | torch.device = "cpu") -> VisionLanguageModel:
    """Read the trained model, in evaluation mode, without gradients to its weights; trained on first use.

    Raises:
        KeyError: for an unknown profile.
    """
    model = VisionLanguageModel(SETTINGS[profile].shape)
    load_model(model, backbone_path("vlm", profile) / WEIGHTS)
    return model.to(device).eval().requires_grad_(False)


def losses(profile: str) -> dict[str, Float[Tensor, " steps"]]:
    """Loss of every step of each stage of training."""
    return load_file(backbone_path("vlm", profile) / LOSSES)


# --- what it answers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """Scenes that were not trained on, with all questions about them.

    Attributes:
        tokens: of the tower.
        asked: questions of each scene.
    """

    scenes: Scenes
    tokens: Float[Tensor, "scenes patches 384"]
    asked: list[list[Question]]


def exam(profile: str, count: int, seed: int, split: str = "train") -> Exam:
    """New scenes with all their questions; `split`: "train" has the cut-outs and photographs of training in other
    scenes, "test" others.

    Raises:
        ValueError: for seed 0 of the training side, which was trained on.
    """
    if split == "train" and seed == 0:
        raise ValueError("seed 0 of the training side was trained on; take another")
    scenes = SETTINGS[profile].make_scenes(count, split, seed)
    random = np.random.default_rng([seed, 1])
    asked = [scene_questions(scenes, i, random) for i in range(count)]
    return Exam(scenes, tower_tokens(scenes.pixels), asked)


def choices(
    scores: Float[Tensor, "asked vocabulary"], asked: Sequence[Question]
) -> list[Float[Tensor, " answers"]]:
    """Log-probabilities of each question's possible answers, in the order of `TYPES`."""
    return [
        row[[IDS[word] for word in TYPES[question.type]]].log_softmax(0)
        for row, question in zip(scores, asked, strict=True)
    ]


@torch.no_grad()
def answer(
    model: VisionLanguageModel, given: Exam, blind: bool = False, batch: int = 50
) -> list[Float[Tensor, " answers"]]:
    """`choices` of all questions of an exam in turn, with the pictures or without."""
    found = []
    for start in range(0, len(given.asked), batch):
        asked = given.asked[start : start + batch]
        pictures = None if blind else model.project(given.tokens[start : start + batch])
        prompt = model.prompt(IDS[BOS], pictures, encode(asked)[0], IDS[PAD])
        found += choices(model.answers(model.read(prompt)), [q for of in asked for q in of])
    return found
