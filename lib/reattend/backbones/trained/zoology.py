"""Small models of Zoology: attention, gated convolutions and hybrids, on recall tasks and on real text.

Recall models learn multi-query recall of two lengths at two widths, and hybrids with a look-up layer learn
the longer task. Convolutions have more seeds than the rest, and several are trained at a time. Text models
read passages in which each verse comes in two wordings, with rare words as symbols; half of the rows of a
batch are recall rows over the same symbols, because otherwise no model of this size recalls anything on text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.data.bible import twice_told
from reattend.data.mqar import FILLER, RecallTask, recall_accuracy, recall_batch
from reattend.data.prose import split_documents
from reattend.data.word_tokens import (
    Vocabulary,
    anonymise,
    document_rows,
    random_windows,
    token_stream,
)
from reattend.language_modeling.routing_transformer import repeated_pairs
from reattend.language_modeling.zoology import (
    BaseConv,
    CausalAttention,
    LongConvolution,
    LookUp,
    ShortConvolution,
)
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.language import FeedForward, ModuleFactory, Trunk, labelled_loss
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

LOOK_UPS = ("full", "random", "programmatic", "learned")
POOLS = (4, 8, 16, 24)  # different keys in a recall row among the text
HELD_OUT = 0.1
FEED_FORWARD = 2
WARMUP = 20
FIRST_SEED = 4  # of the recall models: an earlier run asked the ones before
TOGETHER = 4  # convolutions trained at once


@dataclass(frozen=True)
class TextSetting:
    """Text models of one profile: words kept, symbols of a row, rows of each kind in a batch, sizes.

    `models`: name -> (mixer, width).
    """

    common: int
    symbols: int
    length: int
    rows: int
    heads: int
    models: dict[str, tuple[str, int]]
    steps: int
    rate: float
    seeds: int
    test_rows: int


@dataclass(frozen=True)
class Setting:
    """What is trained in one profile; `tasks` are (length, pairs), the last is that of the look-ups.

    `seeds` are those of attention and of the look-ups, `convolution_seeds` of BaseConv, for each width.
    """

    vocabulary: int
    tasks: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    look_up_width: int
    steps: int
    batch: int
    rate: float
    seeds: int
    convolution_seeds: tuple[int, ...]
    text: TextSetting

    def task(self, number: int) -> RecallTask:
        """The task at a place of `tasks`."""
        return RecallTask(self.vocabulary, *self.tasks[number])

    def cells(self) -> list[tuple[str, int, int]]:
        """(mixer, place of the task, width) of every recall model."""
        last = len(self.tasks) - 1
        grid = [
            (mixer, task, width)
            for mixer in ("attention", "baseconv")
            for task in range(len(self.tasks))
            for width in self.widths
        ]
        look_ups = [
            (mixer, last, self.look_up_width) for mixer in ("attention", "baseconv", *LOOK_UPS)
        ]
        return list(dict.fromkeys(grid + look_ups))

    def seeds_of(self, cell: tuple[str, int, int]) -> range:
        """The seeds of one of `cells`; of two cells, all those of one are the first of the other."""
        mixer, _, width = cell
        more = self.convolution_seeds[self.widths.index(width)]
        return range(FIRST_SEED, FIRST_SEED + (more if mixer == "baseconv" else self.seeds))


SMOKE_TEXT = TextSetting(
    64, 80, 48, 2, 2, {"Attention": ("attention", 8), "BaseConv": ("baseconv", 8), "BaseConv, large": ("baseconv", 24)},
    3, 5e-3, 3, 12,
)  # fmt: skip
CPU_TEXT = TextSetting(
    128, 96, 128, 8, 4,
    {"Attention": ("attention", 48), "BaseConv": ("baseconv", 56), "BaseConv, large": ("baseconv", 128)},
    600, 5e-3, 4, 128,
)  # fmt: skip
GPU_TEXT = TextSetting(
    512, 96, 256, 32, 4,
    {"Attention": ("attention", 128), "BaseConv": ("baseconv", 152), "BaseConv, large": ("baseconv", 352)},
    3000, 3e-3, 6, 300,
)  # fmt: skip
SETTINGS = {
    "smoke": Setting(64, ((16, 2), (32, 4)), (8, 16), 8, 4, 8, 6e-3, 3, (5, 3), SMOKE_TEXT),
    "cpu": Setting(32, ((16, 2), (32, 4)), (32, 96), 32, 1000, 32, 6e-3, 4, (14, 9), CPU_TEXT),
    "gpu": Setting(64, ((32, 4), (64, 8)), (64, 256), 64, 4000, 64, 3e-3, 6, (14, 9), GPU_TEXT),
}


def mixers(mixer: str, length: int, heads: int = 1) -> list[ModuleFactory]:
    """The two layers of "attention", "baseconv" or a hybrid named by its look-ups.

    Raises:
        ValueError: for another name.
    """

    def attention(width: int) -> nn.Module:
        return TokenShift(SoftmaxAttention(width, heads), width)

    def short(width: int) -> nn.Module:
        return BaseConv(width, ShortConvolution(width))

    def long(width: int) -> nn.Module:
        return BaseConv(width, LongConvolution(width, length))

    def look_up(width: int) -> nn.Module:
        return LookUp(width, CausalAttention(width), mixer, length, ignore=FILLER)

    if mixer in LOOK_UPS:
        return [short, look_up]
    layers = {"attention": [attention, attention], "baseconv": [short, long]}
    if mixer not in layers:
        raise ValueError(f"unknown mixer '{mixer}'; there are: {', '.join([*layers, *LOOK_UPS])}")
    return layers[mixer]


def untrained(
    mixer: str, vocabulary: int, width: int, length: int, seed: int, heads: int = 1
) -> Trunk:
    """A model of two layers with random weights; every mixer is followed by a feed-forward part."""
    torch.manual_seed(seed)
    return Trunk(
        vocabulary,
        width,
        mixers(mixer, length, heads),
        feed_forward=partial(FeedForward, ratio=FEED_FORWARD),
        embedding_std=width**-0.5,
    )


# --- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passages:
    """Text to train and to test on: its words, the training stream, and held-out rows of words."""

    words: Vocabulary
    stream: Int[Tensor, " tokens"]
    held_out: Int[Tensor, "rows length"]

    def batches(self, setting: TextSetting, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches: rows of text with rare words as symbols, then as many recall rows of symbols."""
        generator = torch.Generator().manual_seed(1000 + seed)
        for windows in random_windows(self.stream, setting.rows, setting.length + 1, generator):
            text = anonymise(windows, setting.common, setting.symbols, generator)
            pairs, labels, _ = repeated_pairs(
                setting.rows, setting.length, setting.symbols // 2, POOLS, generator
            )
            labels = torch.where(labels >= 0, labels + setting.common, labels)
            yield (
                torch.cat([text[:, :-1], pairs + setting.common]),
                torch.cat([text[:, 1:], labels]),
            )

    def test(self, setting: TextSetting) -> Int[Tensor, "rows length"]:
        """The held-out rows as models read them."""
        return anonymise(
            self.held_out, setting.common, setting.symbols, torch.Generator().manual_seed(5)
        )


@cache
def passages(profile: str) -> Passages:
    """The text of a profile, split by passages."""
    setting = SETTINGS[profile].text
    texts = twice_told(setting.length)
    training, held_out = split_documents(texts, HELD_OUT)
    words = Vocabulary(texts)
    rows = document_rows(held_out, words, setting.length + 1)[: setting.test_rows]
    return Passages(words, token_stream(training, words), rows)


# --- training ------------------------------------------------------------------------------------


def accuracy(model: Trunk, task: RecallTask, rows: int, seed: int) -> float:
    """Share of right answers on fresh rows, in %."""
    device = next(model.parameters()).device
    tokens, labels = recall_batch(task, rows, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        answers = model(tokens.to(device)).argmax(-1).cpu()
    return 100 * recall_accuracy(answers, labels).mean().item()


class Answers(nn.Module):
    """A trunk's scores at given places alone: its last feed-forward part and its head run nowhere else."""

    def __init__(self, trunk: Trunk):
        super().__init__()
        self.trunk = trunk

    def forward(
        self, tokens: Int[Tensor, "batch length"], places: Int[Tensor, " asked"]
    ) -> Float[Tensor, "asked vocabulary"]:
        """`places` are numbered through all rows."""
        x = self.trunk.embed(tokens)
        *first, last = self.trunk.blocks
        for block in first:
            x = block(x)
        x = (x + last.mixer(last.mixer_norm(x))).flatten(0, 1)[None, places]
        x = x + last.feed_forward(last.feed_forward_norm(x))
        return self.trunk.logits(self.trunk.norm(x))[0]


class ClippedApart(torch.autograd.Function):
    """The identity on tensors of several models [models, ...]; clips the gradient of each model by itself.

    With the norm |g_m| over all tensors of model m its gradients become g_m min(1, bound / |g_m|).
    """

    @staticmethod
    def forward(ctx, bound: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.bound = bound
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        share = (ctx.bound / (norms + 1e-6)).clamp(max=1)
        return None, *(g * share.view(-1, *[1] * (g.dim() - 1)) for g in gradients)


class Together(nn.Module):
    """Models of one shape as one module, each trained as it would be alone: overheads are paid once."""

    def __init__(self, models: Sequence[Trunk], clip: float):
        super().__init__()
        self.models, self.clip = tuple(models), clip  # no ModuleList: the copies are trained
        stacked, self.fixed = stack_module_state([Answers(model) for model in models])
        self.names, self.weights = tuple(stacked), nn.ParameterList(stacked.values())

    def forward(
        self, tokens: Int[Tensor, "models batch length"], places: Int[Tensor, "models asked"]
    ) -> Float[Tensor, "models asked vocabulary"]:
        """Each model's answers to its own rows."""
        weights = dict(zip(self.names, ClippedApart.apply(self.clip, *self.weights), strict=True))
        one = Answers(self.models[0])

        def answers(weights: dict, fixed: dict, tokens: Tensor, places: Tensor) -> Tensor:
            # The tied head is the embedding itself: tied once more, it would not get its own weight back.
            return functional_call(one, (weights, fixed), (tokens, places), tie_weights=False)

        return vmap(answers)(weights, self.fixed, tokens, places)

    def loss(
        self,
        tokens: Int[Tensor, "models batch length"],
        labels: Int[Tensor, "models batch length"],
    ) -> Float[Tensor, ""]:
        """Sum over models of their mean cross-entropy; each must have equally many labels."""
        labels = labels.flatten(1)
        places = (labels != -100).nonzero()[:, 1].view(len(labels), -1)
        answers, right = self(tokens, places), labels.gather(1, places)
        return F.cross_entropy(answers.flatten(0, 1), right.flatten()) * len(labels)

    def hand_back(self) -> tuple[Trunk, ...]:
        """The models with the weights of now, in evaluation mode."""
        with torch.no_grad():
            for name, weights in zip(self.names, self.weights, strict=True):
                for model, own in zip(self.models, weights, strict=True):
                    Answers(model).get_parameter(name).copy_(own)
        return tuple(model.eval() for model in self.models)


def _plan(setting: Setting) -> TrainingPlan:
    """How all recall models are trained."""
    warmup = min(WARMUP, setting.steps // 2)
    return TrainingPlan(setting.steps, setting.rate, warmup=warmup, fused=True)


def _rows(task: RecallTask, setting: Setting, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of one seed: tokens and labels."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        yield recall_batch(task, setting.batch, generator)


def _fresh(setting: Setting, cell: tuple[str, int, int], seed: int) -> Trunk:
    """A recall model with random weights."""
    mixer, number, width = cell
    task = setting.task(number)
    return untrained(mixer, task.vocabulary, width, task.length, seed)


def _solver(setting: Setting, cell: tuple[str, int, int], seed: int, device: str) -> Trunk:
    """One model of `Setting.cells`; training stops when 99.5 % of 200 rows are solved."""
    task, model = setting.task(cell[1]), _fresh(setting, cell, seed).to(device)
    batches = (tuple(part.to(device) for part in batch) for batch in _rows(task, setting, seed))

    def solved(trained: nn.Module) -> bool:
        return accuracy(trained, task, 200, seed=10) >= 99.5

    train(model, batches, lambda m, b: labelled_loss(m, *b), _plan(setting), stop=solved)
    return model


def _convolutions(
    setting: Setting, cell: tuple[str, int, int], seeds: Sequence[int], device: str
) -> Sequence[Trunk]:
    """Models of one cell of BaseConv, for some seeds; they use all steps."""
    plan, task = _plan(setting), setting.task(cell[1])
    models = [_fresh(setting, cell, seed).to(device) for seed in seeds]
    together = Together(models, plan.clip)
    batches = (
        tuple(torch.stack(parts).to(device) for parts in zip(*batch, strict=True))
        for batch in zip(*(_rows(task, setting, seed) for seed in seeds), strict=True)
    )
    train(together, batches, lambda m, b: m.loss(*b), replace(plan, clip=math.inf))
    return together.hand_back()


def _recall_models(
    setting: Setting, cell: tuple[str, int, int], device: str
) -> Iterator[tuple[int, Trunk]]:
    """All seeds of a cell and their trained models."""
    seeds = setting.seeds_of(cell)
    if cell[0] != "baseconv":
        yield from ((seed, _solver(setting, cell, seed, device)) for seed in seeds)
        return
    for start in range(0, len(seeds), TOGETHER):
        some = seeds[start : start + TOGETHER]
        yield from zip(some, _convolutions(setting, cell, some, device), strict=True)


def _text_model(profile: str, name: str, seed: int, device: str) -> Trunk:
    """One text model of a profile."""
    setting = SETTINGS[profile].text
    model = untrained_text(setting, name, seed).to(device)
    batches = (
        tuple(part.to(device) for part in batch)
        for batch in passages(profile).batches(setting, seed)
    )
    plan = TrainingPlan(setting.steps, setting.rate, warmup=min(WARMUP, setting.steps // 2))
    train(model, batches, lambda m, b: labelled_loss(m, *b), plan)
    return model


def untrained_text(setting: TextSetting, name: str, seed: int) -> Trunk:
    """A text model with random weights."""
    mixer, width = setting.models[name]
    vocabulary = setting.common + setting.symbols
    return untrained(mixer, vocabulary, width, setting.length, seed, setting.heads)


def _file(cell: tuple[str, int, int] | str, seed: int) -> str:
    label = cell if isinstance(cell, str) else "-".join(map(str, cell))
    return f"{label.lower().replace(', ', '-')}-{seed}.safetensors"


def build(target: Path, profile: str) -> None:
    """Train all models of a profile and write their weights."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    for cell in setting.cells():
        found = []
        for seed, model in _recall_models(setting, cell, device):
            save_model(model, target / _file(cell, seed))
            found.append(accuracy(model, setting.task(cell[1]), 200, seed=10))
        print(f"{cell}: {', '.join(f'{score:.1f}' for score in found)} %", flush=True)
    for name in setting.text.models:
        for seed in range(setting.text.seeds):
            save_model(_text_model(profile, name, seed, device), target / _file(name, seed))
        print(name, flush=True)


def load(
    profile: str = "cpu", device: torch.device | str = "cpu"
) -> tuple[dict[tuple[str, int, int], list[Trunk]], dict[str, list[Trunk]]]:
    """Recall models by cell and text models by name, a list over seeds each; built on first use.

    All in evaluation mode.
    """
    setting, directory = SETTINGS[profile], backbone_path("zoology", profile)

    def read(model: Trunk, label: tuple[str, int, int] | str, seed: int) -> Trunk:
        load_model(model, directory / _file(label, seed))
        return model.to(device).eval()

    recall = {
        cell: [read(_fresh(setting, cell, seed), cell, seed) for seed in setting.seeds_of(cell)]
        for cell in setting.cells()
    }
    text = {
        name: [
            read(untrained_text(setting.text, name, seed), name, seed)
            for seed in range(setting.text.seeds)
        ]
        for name in setting.text.models
    }
    return recall, text
