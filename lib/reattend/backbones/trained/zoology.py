"""Small models of Zoology: attention, gated convolutions and hybrids, on recall tasks and on real text.

Recall models learn multi-query recall of two lengths at two widths, and hybrids with a look-up layer learn
the longer task. Text models read passages in which each verse comes in two wordings, with rare words as
symbols; half of the rows of a batch are recall rows over the same symbols, because otherwise no model of
this size recalls anything on text. All have several seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

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
    """What is trained in one profile; `tasks` are (length, pairs), the last is that of the look-ups."""

    vocabulary: int
    tasks: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    look_up_width: int
    steps: int
    batch: int
    rate: float
    seeds: int
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
    "smoke": Setting(64, ((16, 2), (32, 4)), (8, 16), 8, 4, 8, 6e-3, 3, SMOKE_TEXT),
    "cpu": Setting(32, ((16, 2), (32, 4)), (32, 96), 32, 1000, 32, 6e-3, 4, CPU_TEXT),
    "gpu": Setting(64, ((32, 4), (64, 8)), (64, 256), 64, 4000, 64, 3e-3, 6, GPU_TEXT),
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


def _recall_model(setting: Setting, cell: tuple[str, int, int], seed: int, device: str) -> Trunk:
    """One model of `Setting.cells`; training stops when 99.5 % of 200 rows are solved."""
    mixer, number, width = cell
    task = setting.task(number)
    model = untrained(mixer, task.vocabulary, width, task.length, seed).to(device)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            yield tuple(part.to(device) for part in recall_batch(task, setting.batch, generator))

    def solved(trained: nn.Module) -> bool:
        return accuracy(trained, task, 200, seed=10) >= 99.5

    plan = TrainingPlan(setting.steps, setting.rate, warmup=min(WARMUP, setting.steps // 2))
    train(model, batches(), lambda m, b: labelled_loss(m, *b), plan, stop=solved)
    return model


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
        for seed in range(setting.seeds):
            model = _recall_model(setting, cell, seed, device)
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

    recall = {}
    for mixer, number, width in setting.cells():
        task = setting.task(number)
        recall[mixer, number, width] = [
            read(
                untrained(mixer, task.vocabulary, width, task.length, seed),
                (mixer, number, width),
                seed,
            )
            for seed in range(setting.seeds)
        ]
    text = {
        name: [
            read(untrained_text(setting.text, name, seed), name, seed)
            for seed in range(setting.text.seeds)
        ]
        for name in setting.text.models
    }
    return recall, text
