"""The boundary predictor of DHSA for SmolLM2, trained on the model's own attention over real prose.

Files: `full.safetensors`, `half.safetensors` (a training of half as many steps, which says whether more
steps would matter), `losses.json` (of every step of the full one).
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from reattend.attention.host import attach
from reattend.backbones.pretrained.smollm2 import load as load_smollm2
from reattend.backbones.store import backbone_path
from reattend.data.needles import Haystack
from reattend.data.prose import documents, split_documents
from reattend.long_context.dhsa import LABEL_RATIO, BoundaryPredictor, Teacher, focal_loss
from reattend.training.loop import TrainingPlan, train

WINDOW, HIDDEN = 4, 64
STRETCHES, STRETCH = (
    8,
    128,
)  # of a step: of so many documents one layer's keys, so many tokens of each
RATE = 2e-3

# Of one document and layer: its keys, [tokens, channels], and the ratios of their attention, [tokens].
Layer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """What is trained on in one profile: documents, tokens of each, steps."""

    documents: int
    tokens: int
    steps: int


SETTINGS = {
    "smoke": Setting(2, 96, 4),
    "cpu": Setting(52, 512, 1400),
    "gpu": Setting(48, 2048, 3000),
}


def chapters(side: str) -> list[str]:
    """Chapters of prose, half of them to train on ("train"), the others held out ("test").

    In an order that mixes their subjects.

    Raises:
        ValueError: for another side.
    """
    if side not in ("train", "test"):
        raise ValueError(f"side must be train or test, got {side!r}")
    sides = split_documents(documents("anarchism"), held_out=0.5)
    texts = sides[side == "test"]
    return random.Random(side).sample(texts, len(texts))


def new_predictor(model: PreTrainedModel) -> BoundaryPredictor:
    """An untrained predictor that fits a model of the Llama kind."""
    config = model.config
    channels = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    torch.manual_seed(0)
    return BoundaryPredictor(channels, window=WINDOW, hidden=HIDDEN)


@torch.no_grad()
def examples(
    model: PreTrainedModel, haystacks: Sequence[Haystack], tokens: int
) -> list[list[Layer]]:
    """Of a stretch of every document, what each layer has to learn from."""
    found = []
    for number, haystack in enumerate(haystacks):
        ids, _ = haystack.window(tokens, random.Random(f"dhsa {tokens} {number}"))
        with attach(model, Teacher(WINDOW)) as teacher:
            model(torch.tensor([ids], device=model.device), logits_to_keep=1)
        found.append([(key[0], ratios[0]) for key, ratios in teacher.layers.values()])
    return found


def boundary_loss(predictor: nn.Module, batch: Sequence[Layer]) -> Tensor:
    """Focal loss over the positions with whole windows; the layers of a batch count alike."""
    keys, ratios = (torch.stack(part) for part in zip(*batch, strict=True))
    known = ratios > 0
    return focal_loss(predictor(keys)[known], (ratios[known] >= LABEL_RATIO).float())


def drawn(data: Sequence[list[Layer]]) -> Iterator[list[Layer]]:
    """Stretches of several documents a step, of one layer each; all documents before any comes again."""
    draw = random.Random(0)
    order = (one for _ in itertools.count() for one in draw.sample(data, len(data)))
    while True:
        some = itertools.islice(order, STRETCHES)
        yield [stretch(*draw.choice(document), draw) for document in some]


def stretch(keys: Tensor, ratios: Tensor, draw: random.Random) -> Layer:
    """A random part of a layer, or all of a short one, without labels where its windows are cut."""
    begin = draw.randrange(max(1, len(keys) - STRETCH + 1))
    part = slice(begin, begin + STRETCH)
    ratios = ratios[part].clone()
    ratios[: WINDOW - 1] = ratios[-WINDOW:] = -torch.inf
    return keys[part], ratios


def build(target: Path, profile: str) -> None:
    """Train a predictor, and one of half as many steps, on what SmolLM2 attends to."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    model, tokenizer = load_smollm2(device=device)
    # A few chapters are too short for a stretch of prose.
    long = [text for text in chapters("train") if len(text) >= 8 * setting.tokens]
    texts = long[: setting.documents]
    data = examples(model, [Haystack(tokenizer, [text]) for text in texts], setting.tokens)
    for name, steps in (("half", setting.steps // 2), ("full", setting.steps)):
        predictor = new_predictor(model).to(device)
        plan = TrainingPlan(steps, RATE, weight_decay=0.0, warmup=steps // 20)
        log = train(predictor, drawn(data), boundary_loss, plan)
        save_file(predictor.cpu().state_dict(), target / f"{name}.safetensors")
        recent = log.losses[-20:]
        print(f"{name}: {steps} steps, loss {sum(recent) / len(recent):.4f}", flush=True)
    (target / "losses.json").write_text(json.dumps(log.losses), encoding="utf8")


@dataclass(frozen=True)
class Trained:
    """The predictor, the one of half as many steps, and the loss of every step."""

    full: BoundaryPredictor
    half: BoundaryPredictor
    losses: list[float]


def load(model: PreTrainedModel, profile: str = "cpu") -> Trained:
    """The trained predictors, on the model's device, without gradients; built on first use."""
    directory = backbone_path("dhsa", profile)
    predictors = []
    for name in ("full", "half"):
        predictor = new_predictor(model)
        predictor.load_state_dict(load_file(directory / f"{name}.safetensors"))
        predictors.append(predictor.to(model.device).eval().requires_grad_(False))
    losses = json.loads((directory / "losses.json").read_text(encoding="utf8"))
    return Trained(*predictors, losses)
