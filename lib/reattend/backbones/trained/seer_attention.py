"""The gates of SeerAttention for SmolLM2, distilled from the model's own attention over real prose.

Files: `gates.safetensors` for all layers; for every fifth layer `other.safetensors` (another
initialisation and order), `half.safetensors` (half as many steps), `fewer.safetensors` (half as many
chapters) and `unplaced.safetensors` (without the rotary embedding of the blocks); `training.json` (loss
of every step; loss and blocks found on a document kept out).
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from reattend.attention.blocks import block_count, causal_block_mask, top_k_blocks
from reattend.attention.host import attach
from reattend.backbones.pretrained.smollm2 import load as load_smollm2
from reattend.backbones.store import backbone_path
from reattend.data.long_tasks import multi_query
from reattend.data.needles import Haystack
from reattend.data.prose import documents, split_documents
from reattend.long_context.seer_attention import (
    AttentionGates,
    Distillation,
    Example,
    distillation_loss,
    head_width,
)
from reattend.training.loop import TrainingPlan, train

RATE = 3e-3
HIDDEN_EVERY = 4  # every fourth sequence has words hidden in it
QUESTIONS = 5  # as many as are asked for
LONG, TAKEN = 20_000, 40_000  # letters of a chapter: at least, and at most (its beginning)
LISTS = ("Bibliography", "Other Anarchist Web-pages")  # no prose
THINNED = 5  # all gates but the main ones are those of every fifth layer
NAMES = ("gates", "other", "half", "fewer", "unplaced")
WATCHED = (0.1, 0.2, 0.3)  # densities at which the found blocks are counted


@dataclass(frozen=True)
class Setting:
    """What is trained on in one profile: documents, tokens of each and of a block, steps, warm-up."""

    documents: int
    tokens: int
    block_size: int
    steps: int
    warmup: int


SETTINGS = {
    "smoke": Setting(2, 128, 16, 4, 2),
    "cpu": Setting(20, 1024, 16, 600, 20),
    "gpu": Setting(40, 2048, 32, 1000, 50),
}


def chapters(side: str) -> list[str]:
    """Chapters of prose that are long enough, half of them to train on ("train"), the others held out ("test").

    In an order that mixes their subjects. The book's appendix has older versions of some chapters, which
    repeat up to 80 % of their text; their titles start with a number, and they are left out.

    Raises:
        ValueError: for another side.
    """
    if side not in ("train", "test"):
        raise ValueError(f"side must be train or test, got {side!r}")
    sides = split_documents(documents("anarchism"), held_out=0.5)
    texts = [
        text[:TAKEN]
        for text in sides[side == "test"]
        if len(text) >= LONG and not text[0].isdigit() and not text.startswith(LISTS)
    ]
    return random.Random(f"seer {side}").sample(texts, len(texts))


def kept(share: float, blocks: int) -> int:
    """Blocks of each row whose measured density is nearest to `share`."""
    return min(range(1, blocks + 1), key=lambda k: abs(rows_density(k, blocks) - share))


def rows_density(k: int, blocks: int) -> float:
    """Share of the causal blocks when each row keeps `k`: k(k+1)/2 + (n-k)k of n(n+1)/2."""
    return rows_blocks(k, blocks) / (blocks * (blocks + 1) / 2)


def rows_blocks(k: int, blocks: int) -> int:
    """Number of causal blocks when each row keeps `k`, a row above as many as it has."""
    return k * (k + 1) // 2 + (blocks - k) * k


def new_gates(
    model: PreTrainedModel, block_size: int, seed: int, name: str = "gates"
) -> AttentionGates:
    """Untrained gates that fit a model of the Llama kind; see the files above for the names."""
    torch.manual_seed(seed)
    config = model.config
    layers = range(0, config.num_hidden_layers, 1 if name == "gates" else THINNED)
    base = None if name == "unplaced" else config.rope_parameters["rope_theta"]
    gates = AttentionGates(
        layers=len(layers),
        query_heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        dim=head_width(config),
        block_size=block_size,
        rotary_base=base,
    )
    return gates.to(model.device)


@torch.no_grad()
def collect(
    model: PreTrainedModel, pooling: AttentionGates, tokens: Int[Tensor, " length"]
) -> Example:
    """Pooled vectors and truth of one sequence, all layers; `pooling` says how to pool."""
    rotary = model.model.rotary_emb
    scaling = {"rotary_scaling": rotary.attention_scaling}
    with attach(model, Distillation(pooling, rotary.inv_freq, **scaling)) as collector:
        model(tokens[None].to(model.device), logits_to_keep=1)
    return collector.example()


def thin(example: Example) -> Example:
    """Every fifth layer of an example."""
    return Example(*(part[:, ::THINNED] for part in example))


def gate_loss(gates: AttentionGates, example: Example) -> Tensor:
    """The paper's loss: 10 times the divergence from the truth."""
    return 10 * distillation_loss(gates(*example[:2]), example.truth)


@torch.no_grad()
def found_blocks(gates: AttentionGates, example: Example, k: int) -> float:
    """Share of the truth's k best blocks of each row that the gates select too."""
    maps = gates(*example[:2]), example.truth
    ours, best = (top_k_blocks(x.flatten(1, 2), k, diagonal=False)[..., k:, :] for x in maps)
    return ((ours & best).sum() / best.sum()).item()


def map_correlation(
    predicted: Float[Tensor, "*batch blocks blocks"], truth: Float[Tensor, "*batch blocks blocks"]
) -> float:
    """Correlation of two maps over the causal blocks of the rows that are trained, mean over heads.

    Args:
        predicted, truth: rows of sum 1.
    """
    blocks = truth.shape[-1]
    counted = causal_block_mask(blocks, blocks, device=truth.device)
    counted[: blocks // 4] = False
    ours, true = (
        x[..., counted] - x[..., counted].mean(-1, keepdim=True) for x in (predicted, truth)
    )
    return ((ours * true).sum(-1) / (ours.norm(dim=-1) * true.norm(dim=-1))).mean().item()


def distil(
    gates: AttentionGates,
    examples: Sequence[Example],
    plan: TrainingPlan,
    seed: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Trains gates on the examples, one a step, in an order of their own; the loss of every step."""
    order = random.Random(seed)
    shuffled = (x for _ in itertools.count() for x in order.sample(examples, len(examples)))
    log = train(gates, shuffled, gate_loss, plan, after_step=after_step)
    gates.requires_grad_(False)
    return log.losses


def stretches(
    tokenizer, texts: Iterable[str], length: int, hidden_every: int | None = None
) -> list[Int[Tensor, " length"]]:
    """A stretch of each document; every so many of them with words hidden in it and asked for."""
    found = []
    for number, text in enumerate(texts):
        haystack = Haystack(tokenizer, [text])
        if hidden_every and number % hidden_every == hidden_every - 1:
            (sample,) = multi_query(haystack, length, 1, number, distractors=0, queries=QUESTIONS)
            found.append(torch.tensor(sample.prompt))
        else:
            ids, _ = haystack.window(length, random.Random(f"seer {length} {number}"))
            found.append(torch.tensor(ids))
    return found


def build(target: Path, profile: str) -> None:
    """Distil the gates, and for every fifth layer the others (see NAMES)."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    model, tokenizer = load_smollm2(device=device)
    texts = chapters("train")[: setting.documents + 1]
    pooling = new_gates(model, setting.block_size, 0)
    taken = stretches(tokenizer, texts, setting.tokens, HIDDEN_EVERY)
    watched_text, *examples = (collect(model, pooling, tokens) for tokens in taken)
    blocks = block_count(setting.tokens, setting.block_size)
    watched = []

    def watch(gates: AttentionGates, step: int) -> None:
        if (step + 1) % max(setting.steps // 10, 1) == 0 or step == 0:
            with torch.no_grad():
                loss = gate_loss(gates, watched_text).item()
            found = {f"{d:g}": found_blocks(gates, watched_text, kept(d, blocks)) for d in WATCHED}
            watched.append({"step": step + 1, "loss": loss} | found)

    losses = {}
    thinned = [thin(example) for example in examples]
    for name, seed, steps, read in (
        ("gates", 0, setting.steps, examples),
        ("other", 1, setting.steps, thinned),
        ("half", 0, setting.steps // 2, thinned),
        ("fewer", 0, setting.steps, thinned[: len(thinned) // 2]),
        ("unplaced", 2, setting.steps, thinned),
    ):
        gates = new_gates(model, setting.block_size, seed, name)
        plan = TrainingPlan(
            steps, RATE, weight_decay=0.0, warmup=min(setting.warmup, steps), clip=math.inf
        )
        after = {"after_step": partial(watch, gates)} if name == "gates" else {}
        losses[name] = distil(gates, read, plan, seed, **after)
        save_file(gates.cpu().state_dict(), target / f"{name}.safetensors")
        recent = losses[name][-20:]
        print(f"{name}: {steps} steps, loss {sum(recent) / len(recent):.4f}", flush=True)
    text = json.dumps({"losses": losses, "watched": watched})
    (target / "training.json").write_text(text, encoding="utf8")


@dataclass(frozen=True)
class Trained:
    """Gates by name (see NAMES), and how they were trained.

    Attributes:
        losses: of every step, by name.
        watched: rows of the main ones with "step", "loss" and the share of blocks found at each density.
    """

    setting: Setting
    gates: dict[str, AttentionGates]
    losses: dict[str, list[float]]
    watched: list[dict]


def load(model: PreTrainedModel, profile: str = "cpu") -> Trained:
    """The trained gates, on the model's device, without gradients; built on first use."""
    directory, setting = backbone_path("seer_attention", profile), SETTINGS[profile]
    gates = {}
    for name in NAMES:
        made = new_gates(model, setting.block_size, 0, name)
        made.load_state_dict(load_file(directory / f"{name}.safetensors"))
        gates[name] = made.to(model.device).eval().requires_grad_(False)
    noted = json.loads((directory / "training.json").read_text(encoding="utf8"))
    return Trained(setting, gates, noted["losses"], noted["watched"])
