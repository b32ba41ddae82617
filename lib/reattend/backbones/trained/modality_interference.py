"""Small vision-language models that text misleads, and the same models fine-tuned against it.

Pictures are scenes with one cut-out through the frozen ViT-S/14, pooled to 4 x 4 tokens; a projector and a
causal language model over words are trained. A seed's base learns the tasks with sentences before some of
the questions that mostly name the right kind (`Setting.hinted`, `Setting.truthful`). This is what makes it
trust text, and it is in the data by design. The control learns with sentences that name any of the four
options, so that they tell nothing. All arms of a seed go on from its base, with items of the same draws.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.pretrained.vit import hidden_states
from reattend.backbones.pretrained.vit import load as load_vit
from reattend.backbones.store import backbone_path
from reattend.data.interference_items import (
    NATURAL_COLOURS,
    NOUNS,
    OPTIONS,
    PLACES,
    WORDS_A_SENTENCE,
    Question,
    colour_question,
    kind_question,
    nature_question,
    place_of,
    place_question,
    screenshots,
    sentences,
)
from reattend.data.scenes import CLASSES, COLOURS, Scenes, make_scenes
from reattend.multimodal_llm.modality_interference import (
    IGNORED,
    Attack,
    Batch,
    Kind,
    LanguageModel,
    Objective,
    answer_loss,
    interference_loss,
    js_consistency,
    picture_versions,
    text_versions,
)
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.language import FeedForward, Trunk
from reattend.trunks.mixers import SoftmaxAttention

SIDE = 4  # picture tokens a side
PADDING, UNKNOWN = 0, 1
TEMPLATES = (
    "which kind is shown ? which colour has the thing shown ? where is the thing shown ? "
    "which colour has a by nature ? this picture seems to depict a . answer"
)
LONGEST_QUESTION = 13  # words, with its options and "answer"
HINT = 9  # words of a misleading sentence
FEATURES, PICTURES = "features.safetensors", "pictures.safetensors"
LOSSES, LABELS = "losses.safetensors", "labels.json"


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        scenes, held_out: scenes of training and test.
        scale: smallest and largest side of a cut-out, as a share of the picture.
        extra: noise pictures, and as many screenshots and scenes with a word.
        size, pixels: side of the pictures as drawn and as the ViT sees them.
        layer: of the ViT, whose tokens are read.
        grain: standard deviation of the noise on picture tokens, in that of the tokens.
        paragraph, distractors: sentences of an unrelated paragraph, and of which it is drawn.
        hinted: share of the base's image-heavy items with a sentence before the question.
        truthful: share of those sentences that name the right option.
        blank: share of the base's text-heavy items beside a black or a white picture, not noise.
        groups: an arm's batch has 2, 2 and 4 times as many image-heavy, text-heavy and vqa items.
        radius: of the attack, in root mean squares of the base's word embeddings.
        attack_rate, attack_steps: alpha and S of the attack.
        weight: lambda, of the consistency.
    """

    scenes: int = 1000
    held_out: int = 320
    scale: tuple[float, float] = (0.45, 0.65)
    extra: int = 48
    size: int = 96
    pixels: int = 112
    layer: int = 10
    grain: float = 0.5
    width: int = 96
    layers: int = 2
    heads: int = 4
    paragraph: int = 5
    distractors: int = 80
    hinted: float = 0.5
    truthful: float = 0.9
    blank: float = 0.2
    base_batch: int = 32
    base_steps: int = 600
    base_rate: float = 3e-3
    groups: int = 1
    steps: int = 120
    rate: float = 1e-3
    radius: float = 0.1
    attack_rate: float = 20.0
    attack_steps: int = 1
    weight: float = 1.0
    seeds: int = 4

    @property
    def short(self) -> int:
        """Words of a text without a paragraph: a misleading sentence and the longest question."""
        return HINT + LONGEST_QUESTION

    @property
    def length(self) -> int:
        """Most words of a text without its answer: a paragraph and the longest question."""
        return WORDS_A_SENTENCE * self.paragraph + LONGEST_QUESTION


_SMALL = Setting(scenes=60, held_out=12, extra=3, pixels=56, width=16, groups=1, seeds=3)
SETTINGS = {
    "smoke": replace(_SMALL, base_steps=3, steps=2),
    "cpu": Setting(),
    "gpu": Setting(
        scenes=8000, held_out=2000, width=256, layers=4, base_steps=2000, steps=400, seeds=8
    ),
}


# --- pictures ------------------------------------------------------------------------------------


def pooled(states: Float[Tensor, "items tokens dim"]) -> Float[Tensor, "items 16 dim"]:
    """Patch tokens of a square grid, the first token ([CLS]) left out, averaged over 4 x 4 regions."""
    grid = round((states.shape[1] - 1) ** 0.5)
    patches = states[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    return F.adaptive_avg_pool2d(patches, SIDE).flatten(2).transpose(1, 2)


def scenes_of(setting: Setting, role: str) -> Scenes:
    """Scenes of one cut-out each: "train", or "test" with the same cut-outs elsewhere on other crops."""
    count = setting.scenes if role == "train" else setting.held_out
    seed = ("train", "test").index(role)
    return make_scenes(count, "single", size=setting.size, scale=setting.scale, seed=seed)


def draw_pictures(
    setting: Setting, train: Scenes, test: Scenes
) -> dict[str, UInt8[Tensor, "items 3 height width"]]:
    """All pictures by role; "words" (scenes with a sign) and "screens" are no pictures of the training."""
    size, any_picture = setting.size, test.pixels[0]
    drawn = [
        picture_versions(any_picture, Generator().manual_seed(number))
        for number in range(setting.extra)
    ]
    signs = make_scenes(setting.extra, "text", split="test", size=size, seed=1)
    return {
        "train": train.pixels,
        "test": test.pixels,
        "noise": torch.stack([versions["origin"] for versions in drawn]),
        "black": drawn[0]["black"][None],
        "white": drawn[0]["white"][None],
        "words": signs.pixels,
        "screens": screenshots(setting.extra, size),
    }


@torch.no_grad()
def extract(
    setting: Setting, pictures: dict[str, Tensor], device: str
) -> dict[str, Float[Tensor, "items 16 dim"]]:
    """Pooled tokens of all pictures; each channel has mean 0 and standard deviation 1 over training scenes."""
    vit, found = load_vit(device), {}
    for role, pixels in pictures.items():
        parts = [
            pooled(hidden_states(vit, part.to(device), [setting.layer], setting.pixels)[0]).cpu()
            for part in pixels.split(32)
        ]
        found[role] = torch.cat(parts)
    mean, std = found["train"].mean((0, 1)), found["train"].std((0, 1))
    return {role: (tokens - mean) / std for role, tokens in found.items()}


@dataclass(frozen=True)
class Labelled:
    """What questions ask of scenes, in words, and which cut-out each shows."""

    kinds: list[str]
    colours: list[str]
    places: list[str]
    identities: list[str]

    def __len__(self) -> int:
        return len(self.kinds)


def labelled(scenes: Scenes) -> Labelled:
    """The answers of all scenes."""
    return Labelled(
        [CLASSES[label] for label in scenes.labels[:, 0].tolist()],
        [COLOURS[colour] for colour in scenes.colours[:, 0].tolist()],
        [place_of(scenes, i) for i in range(len(scenes))],
        [names[0] for names in scenes.identities],
    )


# --- words ---------------------------------------------------------------------------------------


class Words:
    """Words of the questions and of the training distractors as tokens; any other is `UNKNOWN`."""

    def __init__(self, distractors: Sequence[str]) -> None:
        known = " ".join((TEMPLATES, *CLASSES, *COLOURS, *PLACES, *NOUNS, *distractors)).split()
        self.entries = ["<pad>", "<unknown>", *sorted(set(known))]
        self._tokens = {word: token for token, word in enumerate(self.entries)}

    def __len__(self) -> int:
        return len(self.entries)

    def encode(self, text: str, length: int) -> list[int]:
        """Tokens of a text, padded on the left to `length`, so that questions always end at one place.

        Raises ValueError for a longer text.
        """
        words = text.split()
        if len(words) > length:
            raise ValueError(f"a text of {len(words)} words, but {length} places")
        return [PADDING] * (length - len(words)) + [self._tokens.get(w, UNKNOWN) for w in words]


@dataclass(frozen=True)
class Data:
    """Pictures as tokens by role, and what the scenes of the roles "train" and "test" show."""

    setting: Setting
    features: dict[str, Float[Tensor, "items 16 dim"]]
    train: Labelled
    test: Labelled

    @cached_property
    def distractors(self) -> list[str]:
        """The sentences of training's unrelated paragraphs: drawn once from the news."""
        return random.Random(0).sample(sentences("bbc_news"), self.setting.distractors)

    @cached_property
    def words(self) -> Words:
        """The vocabulary of all models."""
        return Words(self.distractors)


# --- model ---------------------------------------------------------------------------------------


class SmallVLM(nn.Module):
    """Picture tokens through a projector, before the words of a causal language model.

    Texts end at one place, so what is padded lies between picture and text. Rows that need no more than
    `short` places for their text are computed without the rest: as if padding were masked, only cheaper.
    """

    def __init__(self, vocabulary: int, setting: Setting, dim: int):
        super().__init__()
        width, std = setting.width, setting.width**-0.5
        self.projector = nn.Sequential(
            nn.Linear(dim, width), nn.GELU(), nn.Linear(width, width), nn.RMSNorm(width)
        )
        # Picture tokens start as large as words: larger ones drown the positions that are added to them.
        nn.init.constant_(self.projector[-1].weight, std)
        self.language = Trunk(
            vocabulary,
            width,
            [partial(SoftmaxAttention, heads=setting.heads, positions="none")] * setting.layers,
            positions=SIDE**2 + setting.length + 1,
            feed_forward=FeedForward,
            embedding_std=std,
        )
        self.text = SIDE**2 + setting.length  # place at which texts end and answers stand
        self.short = setting.short

    def embed(
        self, pictures: Float[Tensor, "batch 16 dim"], tokens: Int[Tensor, "batch words"]
    ) -> Float[Tensor, "batch length width"]:
        """Input embeddings of picture and words, before positions are added."""
        return torch.cat([self.projector(pictures), self.language.tokens(tokens)], 1)

    def forward(
        self, embeddings: Float[Tensor, "batch length width"], long: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of every place; 0 where a row is not long and its padding was left out.

        Args:
            long: rows whose text, without its answer, has more than `short` words.
        """
        places = torch.arange(embeddings.shape[1])
        near = places[(places < SIDE**2) | (places >= self.text - self.short)]
        x = embeddings + self.language.positions.weight[: len(places)]
        logits = x.new_zeros(*x.shape[:2], self.language.tokens.num_embeddings)
        for rows, kept in ((long, places), (~long, near)):
            if rows.any():
                part = x[rows][:, kept]
                for block in self.language.blocks:
                    part = block(part)
                found = self.language.logits(self.language.norm(part))
                index = rows.nonzero().flatten()
                logits = logits.index_put((index[:, None], kept[None]), found)
        return logits


# --- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """Versions of items as rows of picture tokens and words.

    Attributes:
        pictures: noise included.
        tokens: with the answer at the end.
        options: tokens of the four options, in the order in which the question names them.
        right: position of the right one.
        kinds, items, origins: as in the method's `Batch`.
    """

    pictures: Float[Tensor, "batch 16 dim"]
    tokens: Int[Tensor, "batch words"]
    options: Int[Tensor, "batch 4"]
    right: Int[Tensor, " batch"]
    kinds: tuple[Kind, ...]
    items: Int[Tensor, " batch"]
    origins: Int[Tensor, " items"]

    def batch(self, model: SmallVLM) -> Batch:
        """As the method takes it, with the model's embeddings."""
        labels = torch.full((len(self.tokens), SIDE**2 + self.tokens.shape[1]), IGNORED)
        labels[:, -1] = self.tokens[:, -1]
        visual = (torch.arange(labels.shape[1]) < SIDE**2).expand_as(labels)
        embeddings = model.embed(self.pictures, self.tokens)
        return Batch(embeddings, labels, visual, self.kinds, self.items, self.origins)

    def reader(self, model: SmallVLM) -> LanguageModel:
        """The model as the method calls it, with what it has to know of these rows' padding."""
        long = (self.tokens[:, : -1 - model.short] != PADDING).any(1)
        return lambda embeddings: model(embeddings, long)


@dataclass
class Maker:
    """Draws pictures and lays out items as sequences; everything random follows from `seed`."""

    data: Data
    seed: int
    _rows: list = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.generator = Generator().manual_seed(self.seed)

    def picture(self, role: str, index: int | None = None) -> Float[Tensor, "16 dim"]:
        """Tokens of a picture (any of its role where none is named) with fresh noise."""
        bank = self.data.features[role]
        index = self.draw.randrange(len(bank)) if index is None else index
        noise = torch.randn(bank.shape[1:], generator=self.generator)
        return bank[index] + self.data.setting.grain * noise

    def add(self, kind: Kind, asked: Question, versions: Sequence[tuple[Tensor, str]]) -> None:
        """Append an item: its versions as (picture, text), the origin first."""
        self._rows.append((kind, asked, versions))

    def sequences(self) -> Sequences:
        """All items appended since the last call."""
        pictures, tokens, options, right, kinds, items, origins = [], [], [], [], [], [], []
        words, length = self.data.words, self.data.setting.length
        for number, (kind, asked, versions) in enumerate(self._rows):
            origins.append(len(kinds))
            choices = words.encode(" ".join(asked.options), OPTIONS)
            for picture, text in versions:
                pictures.append(picture)
                tokens.append([*words.encode(f"{text} answer", length), choices[asked.answer]])
                options.append(choices)
                right.append(asked.answer)
                kinds.append(kind)
                items.append(number)
        self._rows = []
        ids = (torch.tensor(column) for column in (tokens, options, right))
        return Sequences(
            torch.stack(pictures), *ids, tuple(kinds), torch.tensor(items), torch.tensor(origins)
        )


def _add_vqa(maker: Maker) -> None:
    """An item about colour or place of a training scene."""
    scenes, draw = maker.data.train, maker.draw
    index = draw.randrange(len(scenes))
    if draw.random() < 0.5:
        asked = colour_question(scenes.colours[index], draw)
    else:
        asked = place_question(scenes.places[index], draw)
    maker.add("vqa", asked, [(maker.picture("train", index), asked.text)])


def _add_hinted(maker: Maker, truthful: float) -> None:
    """An image-heavy item of the base, with or without a sentence before the question."""
    data, draw = maker.data, maker.draw
    index = draw.randrange(len(data.train))
    kind = data.train.kinds[index]
    asked = kind_question(kind, draw)
    named = kind if draw.random() < truthful else draw.choice(asked.wrong)
    texts = text_versions(asked.text, asked.options, data.distractors, draw, depicted=named)
    version = "misleading" if draw.random() < data.setting.hinted else "origin"
    maker.add("image_heavy", asked, [(maker.picture("train", index), texts[version])])


def base_batches(maker: Maker, truthful: float) -> Iterator[Sequences]:
    """What a base reads: of every eight items three image-heavy, one text-heavy, four vqa."""
    draw, setting = maker.draw, maker.data.setting
    while True:
        for number in range(setting.base_batch):
            if number % 8 < 3:
                _add_hinted(maker, truthful)
            elif number % 8 < 4:
                asked = nature_question(draw.choice(list(NOUNS)), draw)
                role = draw.choice(("black", "white")) if draw.random() < setting.blank else "noise"
                maker.add("text_heavy", asked, [(maker.picture(role), asked.text)])
            else:
                _add_vqa(maker)
        yield maker.sequences()


def _add_kind_pair(maker: Maker, members: dict[str, list[int]], perturbed: bool) -> None:
    """Two image-heavy items of one kind with the same options."""
    data, draw = maker.data, maker.draw
    kind = draw.choice(list(members))
    asked = kind_question(kind, draw)
    for index in draw.sample(members[kind], 2):
        picture = maker.picture("train", index)
        texts = text_versions(
            asked.text, asked.options, data.distractors, draw, sentences=data.setting.paragraph
        )
        shown = texts.values() if perturbed else [asked.text] * len(texts)
        maker.add("image_heavy", asked, [(picture, text) for text in shown])


def _add_noun_pair(maker: Maker, perturbed: bool) -> None:
    """Two text-heavy items of one colour with the same options."""
    draw = maker.draw
    colour = draw.choice(list(NATURAL_COLOURS))
    one, other = draw.sample(NATURAL_COLOURS[colour], 2)
    asked = nature_question(one, draw)
    for noun in (one, other):
        text = asked.text.replace(one, noun)
        roles = ("noise", "train", "black", "white")
        pictures = [maker.picture(role) for role in roles]
        pictures = pictures if perturbed else pictures[:1] * len(roles)
        maker.add("text_heavy", asked, [(picture, text) for picture in pictures])


def arm_batches(maker: Maker, arm: Arm) -> Iterator[Sequences]:
    """What an arm reads: 2 + 2 + 4 items as 6 + 8 + 4 sequences, times `groups`.

    Items of several versions come in pairs of equal answer and options, so that a placebo can compare one
    with the origin of the other. Without perturbations versions are copies of their origin; an arm of vqa
    alone reads as many sequences of those.
    """
    members: dict[str, list[int]] = {}
    for index, kind in enumerate(maker.data.train.kinds):
        members.setdefault(kind, []).append(index)
    members = {kind: found for kind, found in sorted(members.items()) if len(found) > 1}
    while True:
        for _ in range(maker.data.setting.groups):
            if not arm.vqa_alone:
                _add_kind_pair(maker, members, arm.perturbed)
                _add_noun_pair(maker, arm.perturbed)
            for _ in range(18 if arm.vqa_alone else 4):
                _add_vqa(maker)
        yield maker.sequences()


def swapped(batch: Sequences) -> Int[Tensor, " items"]:
    """The placebo's references: items of several versions exchange their origins within each pair."""
    references = batch.origins.clone()
    several = [i for i, row in enumerate(references.tolist()) if batch.kinds[row] != "vqa"]
    references[several] = batch.origins[several].view(-1, 2).flip(1).flatten()
    return references


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """How a base is fine-tuned.

    Attributes:
        perturbed: whether versions are perturbed; False: copies of their origins.
        vqa_alone: whether it reads vqa items alone.
        consistency: none; with the item's "own" origin; the same at the "released" places; with the
            "swapped" origin of another item of equal answer, the placebo.
        attack: none; along the "gradient"; or its uniform start in the same ball, "noise", the placebo.
    """

    perturbed: bool = True
    vqa_alone: bool = False
    consistency: str | None = None
    attack: str | None = None

    def objective(self, setting: Setting, base: SmallVLM) -> Objective:
        """Terms of the loss; the attack's radius follows the base's word embeddings."""
        attack = None
        if self.attack is not None:
            size = base.language.tokens.weight.detach().square().mean().sqrt().item()
            steps = setting.attack_steps if self.attack == "gradient" else 0
            attack = Attack(setting.radius * size, setting.attack_rate, steps)
        divergence = None if self.consistency is None else js_consistency
        return Objective(attack, divergence, setting.weight, self.consistency == "released")


ARMS = {
    "D_VQA": Arm(vqa_alone=True),
    "clean": Arm(perturbed=False),
    "D_AUG": Arm(),
    "JS": Arm(consistency="own"),
    "JS released": Arm(consistency="released"),
    "JS swapped": Arm(consistency="swapped"),
    "ADV": Arm(attack="gradient"),
    "noise": Arm(attack="noise"),
    "full": Arm(consistency="own", attack="gradient"),
}
BASES = ("base", "control")


def fit_base(name: str, data: Data, seed: int) -> tuple[SmallVLM, Float[Tensor, " steps"]]:
    """A base, or the control with sentences that tell nothing, and the loss of every step."""
    setting = data.setting
    torch.manual_seed(seed)
    model = SmallVLM(len(data.words), setting, data.features["train"].shape[-1])

    def loss(model: SmallVLM, rows: Sequences) -> Float[Tensor, ""]:
        batch = rows.batch(model)
        return answer_loss(rows.reader(model)(batch.embeddings), batch.labels)

    warmup = setting.base_steps // 15
    plan = TrainingPlan(setting.base_steps, setting.base_rate, warmup=warmup, fused=True)
    truthful = setting.truthful if name == "base" else 1 / OPTIONS
    batches = base_batches(Maker(data, seed), truthful)
    log = train(model, batches, loss, plan, groups=decay_matrices)
    return model, torch.tensor(log.losses)


def fit_arm(
    name: str, base: SmallVLM, data: Data, seed: int
) -> tuple[SmallVLM, Float[Tensor, "steps 3"]]:
    """An arm that goes on from a base, and the terms of its loss: answers, attacked, consistency.

    Raises:
        ValueError: for an unknown arm; lists the known ones.
    """
    if name not in ARMS:
        raise ValueError(f"unknown arm '{name}'; there are: {', '.join(ARMS)}")
    arm, setting, terms = ARMS[name], data.setting, []
    objective, generator = arm.objective(setting, base), Generator().manual_seed(seed)

    def loss(model: SmallVLM, rows: Sequences) -> Float[Tensor, ""]:
        references = swapped(rows) if arm.consistency == "swapped" else None
        found = interference_loss(
            rows.reader(model),
            rows.batch(model),
            objective,
            references=references,
            generator=generator,
        )
        terms.append(torch.stack([found.answers, found.attacked, found.consistency]).detach())
        return found.total

    warmup = max(1, setting.steps * 3 // 100)
    plan = TrainingPlan(setting.steps, setting.rate, weight_decay=1e-4, warmup=warmup, fused=True)
    model = copy.deepcopy(base)
    train(model, arm_batches(Maker(data, 1000 + seed), arm), loss, plan)
    return model, torch.stack(terms)


# --- the build -----------------------------------------------------------------------------------


def _file(name: str, seed: int) -> str:
    return f"{name.lower().replace(' ', '_')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Extract the pictures' tokens, train bases and arms of every seed; write all that a notebook asks for."""
    setting = SETTINGS[profile]
    train_set, test_set = scenes_of(setting, "train"), scenes_of(setting, "test")
    pictures = draw_pictures(setting, train_set, test_set)
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    features = extract(setting, pictures, device)
    data = Data(setting, features, labelled(train_set), labelled(test_set))
    losses: dict[str, list[Tensor]] = {name: [] for name in (*BASES, *ARMS)}
    for seed in range(setting.seeds):
        models = {}
        for name in losses:
            fitted = (
                fit_base(name, data, seed)
                if name in BASES
                else fit_arm(name, models["base"], data, seed)
            )
            models[name], found = fitted
            losses[name].append(found)
            save_model(models[name], target / _file(name, seed))
        print(
            f"seed {seed}: the base ends at {losses['base'][-1][-42:].mean():.3f} nats", flush=True
        )
    save_file({name: torch.stack(found) for name, found in losses.items()}, target / LOSSES)
    save_file({role: tokens.half() for role, tokens in features.items()}, target / FEATURES)
    save_file({role: p for role, p in pictures.items() if role != "train"}, target / PICTURES)
    (target / LABELS).write_text(
        json.dumps({"train": asdict(data.train), "test": asdict(data.test)})
    )


@dataclass(frozen=True)
class Trained:
    """Models by name, a list over seeds each, and what they are asked with.

    Attributes:
        losses: of the bases by step, [seeds, steps]; of the arms their terms, [seeds, steps, 3].
        pictures: as drawn, by role, without those of the training.
    """

    models: dict[str, list[SmallVLM]]
    losses: dict[str, Tensor]
    data: Data
    pictures: dict[str, UInt8[Tensor, "items 3 height width"]]


def load(profile: str = "cpu") -> Trained:
    """The models of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("modality_interference", profile)
    features = {r: t.float() for r, t in load_file(directory / FEATURES).items()}
    labels = {
        s: Labelled(**found) for s, found in json.loads((directory / LABELS).read_text()).items()
    }
    data = Data(setting, features, **labels)

    def read(name: str, seed: int) -> SmallVLM:
        model = SmallVLM(len(data.words), setting, features["train"].shape[-1])
        load_model(model, directory / _file(name, seed))
        return model.eval()

    models = {n: [read(n, seed) for seed in range(setting.seeds)] for n in (*BASES, *ARMS)}
    return Trained(models, load_file(directory / LOSSES), data, load_file(directory / PICTURES))
