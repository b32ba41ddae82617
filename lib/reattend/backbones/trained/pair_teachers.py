"""Cross-attentive teachers of four tasks on pairs of texts, and what they say of every pair.

A teacher reads the token states of a frozen MiniLM and the places of the tokens. Every token attends to
the tokens of the other text, is compared with what it finds there, and the comparisons are pooled
(Parikh et al. 2016, "A decomposable attention model"). Without the places it cannot see well that two
words were exchanged. Fine-tuning MiniLM itself as a cross-encoder takes far longer than a
build may, and on two thousand pairs ends below a siamese network.

Files, one pair for each task: `<task>.json` (texts, split, kind, scores) and `<task>.safetensors`
(targets and raw logits, as `<split>/targets` and `<split>/logits`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.backbones.pretrained import minilm
from reattend.backbones.store import backbone_path
from reattend.data import pairs
from reattend.data.pairs import Kind
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.encoders import CachedStates, TextEncoder, index_batches, tokenise

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Setting:
    """What is made in one profile: tasks, pairs of each split, passes over the training pairs."""

    tasks: tuple[str, ...]
    sizes: tuple[int, int, int]
    epochs: int


TASKS = {
    "verses": lambda: pairs.verse_pairs(16),
    "swaps": lambda: pairs.verse_swaps(16),
    "relations": lambda: pairs.gloss_relations(12_000, 12),
    "similarity": lambda: pairs.gloss_similarity(12_000, 12),
}
SETTINGS = {
    "smoke": Setting(("relations", "similarity"), (64, 32, 48), 4),
    "cpu": Setting(tuple(TASKS), (2_000, 500, 1_300), 3),
    "gpu": Setting(tuple(TASKS), (6_000, 1_000, 2_000), 3),
}
LAYERS, LENGTH, BATCH, RATE = 3, 48, 32, 1e-3

Split = tuple[list[str], list[str], Float[Tensor, " pairs"], Float[Tensor, "pairs classes"]]


@dataclass(frozen=True)
class TeacherTask:
    """Pairs of one task with a teacher's logits.

    Attributes:
        kind: "binary" (two logits), "multiclass" (one for each class) or "regression" (one).
        splits: first texts, second texts, targets and logits of each split.
        scores: the teacher's accuracy, or Pearson correlation, on each split.
    """

    kind: Kind
    classes: tuple[str, ...]
    splits: dict[str, Split]
    scores: dict[str, float]

    def of(self, split: str) -> Split:
        """First texts, second texts, targets, raw logits.

        Raises:
            ValueError: for an unknown split.
        """
        if split not in self.splits:
            raise ValueError(f"unknown split '{split}'; there are: {', '.join(self.splits)}")
        return self.splits[split]


class AlignmentTeacher(nn.Module):
    """Cross-attention between the token states of two texts, comparison, pooling, classifier.

    Args:
        width: of the token states.
        outputs: number of logits.
        hidden: width of the projections.
        dropout: before each linear layer but the first.
        waves: sines, and as many cosines, that tell a token's place (0: places are not seen).
    """

    def __init__(
        self, width: int, outputs: int, hidden: int = 200, dropout: float = 0.2, waves: int = 16
    ) -> None:
        super().__init__()
        self.waves, width = waves, width + 2 * waves
        self.attend = nn.Linear(width, hidden)
        self.compare = nn.Sequential(nn.Dropout(dropout), nn.Linear(4 * width, hidden), nn.ReLU())
        self.classify = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(4 * hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        )
        self.scale = 4 * hidden**-0.5  # states are small after the layer norm: a sharper start

    def forward(self, first: CachedStates, second: CachedStates) -> Float[Tensor, "pairs outputs"]:
        """Logits of each pair."""
        a, b = (with_places(text.states.float(), self.waves) for text in (first, second))
        seen_a, seen_b = _without_cls(first.mask), _without_cls(second.mask)
        scores = self.scale * self.attend(a) @ self.attend(b).mT
        found_in_b = scores.masked_fill(~seen_b[:, None], -1e9).softmax(-1) @ b
        found_in_a = scores.mT.masked_fill(~seen_a[:, None], -1e9).softmax(-1) @ a
        both = [self._pooled(a, found_in_b, seen_a), self._pooled(b, found_in_a, seen_b)]
        return self.classify(torch.cat(both, -1))

    def _pooled(self, own: Tensor, found: Tensor, seen: Bool[Tensor, "pairs length"]) -> Tensor:
        """Mean and maximum over tokens of the comparison of each with what it found."""
        features = torch.cat([own, found, own * found, (own - found).abs()], -1)
        # Comparisons are not negative: 0 for padding cannot win the maximum.
        compared = self.compare(features) * seen[..., None]
        return torch.cat([compared.sum(1) / seen.sum(1, keepdim=True), compared.amax(1)], -1)


def with_places(
    states: Float[Tensor, "texts length width"], waves: int
) -> Float[Tensor, "texts length joined"]:
    """States joined with half the sines and cosines of each token's place, joined = width + 2 waves.

    Wave lengths grow from 2 pi tokens to 30 times that, longer than any text here.
    """
    place = torch.arange(states.shape[1], device=states.device, dtype=states.dtype)
    rates = 30.0 ** -(torch.arange(waves, device=states.device, dtype=states.dtype) / max(1, waves))
    angles = place[:, None] * rates
    waved = 0.5 * torch.cat([angles.sin(), angles.cos()], -1)  # about as large as the states
    return torch.cat([states, waved.expand(len(states), -1, -1)], -1)


def _without_cls(mask: Bool[Tensor, "texts length"]) -> Bool[Tensor, "texts length"]:
    mask = mask.clone()
    mask[:, 0] = False
    return mask


def build(target: Path, profile: str) -> None:
    """Train the teachers of a profile and write what they say into the empty directory `target`."""
    setting = SETTINGS[profile]
    for number, name in enumerate(setting.tasks):
        _build_task(target, name, setting, seed=number)


def _build_task(target: Path, name: str, setting: Setting, seed: int) -> None:
    made = TASKS[name]()
    chosen = {s: made.of(s, limit) for s, limit in zip(SPLITS, setting.sizes, strict=True)}
    outputs = {"binary": 2, "multiclass": len(made.classes), "regression": 1}[made.kind]
    states = {split: _states(first, second) for split, (first, second, _) in chosen.items()}
    targets = {split: part[2] for split, part in chosen.items()}
    logits = _teach(states, targets, made.kind, outputs, setting.epochs, seed)
    scores = {split: _score(logits[split], targets[split], made.kind) for split in SPLITS}
    tensors = {f"{split}/targets": targets[split].contiguous() for split in SPLITS}
    tensors |= {f"{split}/logits": logits[split].contiguous() for split in SPLITS}
    save_file(tensors, target / f"{name}.safetensors")
    texts = {split: [first, second] for split, (first, second, _) in chosen.items()}
    facts = {"kind": made.kind, "classes": made.classes, "scores": scores}
    (target / f"{name}.json").write_text(json.dumps(facts | {"texts": texts}), encoding="utf8")
    print(f"{name}: " + ", ".join(f"{s} {v:.3f}" for s, v in scores.items()), flush=True)


def reading_order(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Every text once, similar lengths side by side, for little padding.

    Texts of one length go by the alphabet: a set's order is another one in every process, and with it
    what shares a batch, and how sums round.
    """
    return sorted({*first, *second}, key=lambda text: (len(text), text))


def _states(first: list[str], second: list[str]) -> tuple[CachedStates, CachedStates]:
    """Frozen token states of both texts of every pair; a text that occurs twice is read once."""
    tokenizer, model = minilm.load(LAYERS)
    texts = reading_order(first, second)
    place = {text: row for row, text in enumerate(texts)}
    cached = TextEncoder(model, frozen=LAYERS).cache(tokenise(tokenizer, texts, length=LENGTH))
    return tuple(cached[torch.tensor([place[t] for t in part])] for part in (first, second))


def _teach(
    states: dict[str, tuple[CachedStates, CachedStates]],
    targets: dict[str, Tensor],
    kind: Kind,
    outputs: int,
    epochs: int,
    seed: int,
) -> dict[str, Tensor]:
    """Logits on every split after a fixed number of passes.

    A checkpoint chosen on 200 validation pairs is another one when sums round differently.
    """
    torch.manual_seed(seed)
    first, second = states["train"]
    model = AlignmentTeacher(first.states.shape[-1], outputs)
    steps = epochs * (len(first) // BATCH)

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        return _loss(model(first[index], second[index]), targets["train"][index], kind)

    plan = TrainingPlan(steps, RATE, 0.01, warmup=max(1, steps // 10))
    train(model, index_batches(len(first), BATCH, seed), loss, plan)
    return {split: _logits(model, *both) for split, both in states.items()}


@torch.no_grad()
def _logits(model: nn.Module, first: CachedStates, second: CachedStates) -> Tensor:
    parts = torch.arange(len(first)).split(128)
    return torch.cat([model(first[rows], second[rows]) for rows in parts])


def _loss(logits: Tensor, targets: Tensor, kind: Kind) -> Tensor:
    if kind == "regression":
        return F.mse_loss(logits[:, 0], targets)
    return F.cross_entropy(logits, targets.long())


def _score(logits: Tensor, targets: Tensor, kind: Kind) -> float:
    """Accuracy, or Pearson correlation for regression (0 when the logits are constant)."""
    if kind != "regression":
        return (logits.argmax(1) == targets).double().mean().item()
    predicted = logits[:, 0].double()
    return 0.0 if predicted.std() == 0 else float(pearsonr(predicted, targets.double()).statistic)


def load(profile: str = "cpu") -> dict[str, TeacherTask]:
    """Every task of a profile with its teacher's logits; builds them first when they are missing."""
    directory = backbone_path("pair_teachers", profile)
    return {name: _load_task(directory, name) for name in SETTINGS[profile].tasks}


def _load_task(directory: Path, name: str) -> TeacherTask:
    facts = json.loads((directory / f"{name}.json").read_text(encoding="utf8"))
    tensors = load_file(directory / f"{name}.safetensors")
    splits = {
        split: (*texts, tensors[f"{split}/targets"], tensors[f"{split}/logits"])
        for split, texts in facts["texts"].items()
    }
    return TeacherTask(facts["kind"], tuple(facts["classes"]), splits, facts["scores"])
