"""Small language models that differ in the tokens that meet: local, random, routing and full heads.

All are one trunk, trained on the same recall rows (pairs that come again beyond the reach of the local
heads) for the same number of steps, with several seeds. What the study of the Routing Transformer asks
is asked of these models, so that a new question trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_model, save_model
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.store import backbone_path
from reattend.language_modeling.routing_transformer import (
    RoutingAttention,
    membership,
    repeated_pairs,
)
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.language import FeedForward, Trunk, labelled_loss
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

Arm = Literal["local", "random", "routing", "full"]
ARMS: tuple[Arm, ...] = ("local", "random", "routing", "full")
CLOSE: tuple[Arm, ...] = ("routing", "full")  # their distance is a claim: they have more seeds

LAYERS = 2
DECAY = 0.99
RATE = 6e-3
WARMUP = 20


@dataclass(frozen=True)
class Setting:
    """What is trained in one profile.

    `length` of a row in tokens; `block` of the local heads, which also see the block before; `clusters`
    of a routing head, each of length / clusters tokens; `keys`, and as many values; `pools`: how many
    different keys a row may have; `rows` in a batch; `seeds` of every arm, `close_seeds` of the two arms
    that are close to each other; `watch_rows` behind the curves of the training.
    """

    length: int
    width: int
    heads: int
    block: int
    clusters: int
    keys: int
    pools: tuple[int, ...]
    rows: int
    steps: int
    seeds: int
    close_seeds: int
    watch_every: int
    watch_rows: int

    @property
    def reach(self) -> int:
        """Tokens that a model with local heads alone can look back, token shift included."""
        return LAYERS * 2 * self.block

    @property
    def window(self) -> int:
        """Tokens of a cluster or a random set."""
        return self.length // self.clusters

    def seeds_of(self, arm: Arm) -> range:
        """Training seeds of an arm; those of all arms begin alike."""
        return range(self.close_seeds if arm in CLOSE else self.seeds)


SETTINGS = {
    "smoke": Setting(64, 32, 4, 4, 4, 8, (4, 8), 2, 4, 3, 4, 2, 4),
    "cpu": Setting(256, 64, 4, 8, 8, 32, (4, 8, 16, 24), 6, 500, 5, 9, 50, 12),
    "gpu": Setting(512, 128, 8, 8, 16, 64, (4, 8, 16, 32, 48), 16, 1000, 8, 9, 100, 32),
}


def untrained(arm: Arm, setting: Setting, seed: int) -> Trunk:
    """One model with random weights."""

    def mixer(width: int) -> TokenShift:
        if arm == "full":
            return TokenShift(SoftmaxAttention(width, setting.heads), width)
        heads = RoutingAttention(
            width,
            setting.heads,
            0 if arm == "local" else setting.heads // 2,
            "random" if arm == "random" else "routing",
            block=setting.block,
            clusters=setting.clusters,
            window=setting.window,
            decay=DECAY,
            attend_self=False,
        )
        return TokenShift(heads, width)

    torch.manual_seed(seed)
    return Trunk(
        2 * setting.keys,
        setting.width,
        [mixer] * LAYERS,
        feed_forward=partial(FeedForward, ratio=2),
        embedding_std=setting.width**-0.5,
    )


def routing_layers(model: nn.Module) -> list[RoutingAttention]:
    """The layers with local heads, in order; none in a model of full heads."""
    return [module for module in model.modules() if isinstance(module, RoutingAttention)]


def recall_rows(
    setting: Setting, rows: int, generator: Generator, pools: tuple[int, ...] | None = None
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Tokens, labels and distances of `repeated_pairs`; `pools` are the setting's if not given."""
    return repeated_pairs(rows, setting.length, setting.keys, pools or setting.pools, generator)


@torch.no_grad()
def logits(
    model: Trunk, tokens: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows length vocabulary"]:
    """Answers of a model in evaluation, on its device; random sets are the same in every call."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return torch.cat([model(part.to(device)) for part in tokens.split(8)])


def _watched(model: Trunk, setting: Setting) -> list[dict]:
    """Accuracy beyond the local reach and, by routing layer, how full its clusters are."""
    tokens, labels, distance = recall_rows(
        setting, setting.watch_rows, torch.Generator().manual_seed(7), setting.pools[-1:]
    )
    seen: list[Tensor] = []
    routing = [layer for layer in routing_layers(model) if layer.routes]
    hooks = [
        layer.register_forward_hook(
            lambda module, inputs, _: seen.append(module.routed_scores(inputs[0]))
        )
        for layer in routing
    ]
    model.eval()
    right = logits(model, tokens).argmax(-1).cpu() == labels
    model.train()
    for hook in hooks:
        hook.remove()
    found = [("accuracy", None, right[distance > setting.reach + 1].double().mean().item())]
    for layer in range(len(routing)):
        scores = torch.cat(seen[layer :: len(routing)])
        shares = F.one_hot(scores.argmax(-1), setting.clusters).double().mean((0, 2))
        missed = membership(routing[layer].members(scores), setting.length) == 0
        found += [("smallest", layer, shares.min().item()), ("largest", layer, shares.max().item())]
        found += [("in_none", layer, missed.double().mean().item())]
    return [dict(zip(("what", "layer", "value"), row, strict=True)) for row in found]


def _train(arm: Arm, setting: Setting, seed: int, device: str) -> tuple[Trunk, list[dict]]:
    """A trained model, and what was seen on the way."""
    model = untrained(arm, setting, seed).to(device)
    trace: list[dict] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            tokens, labels, _ = recall_rows(setting, setting.rows, generator)
            yield tokens.to(device), labels.to(device)

    def after_step(step: int) -> None:
        for layer in routing_layers(model):
            layer.move_centroids()
        if (step + 1) % setting.watch_every == 0:
            about = {"arm": arm, "seed": seed, "step": step + 1}
            trace.extend(about | seen for seen in _watched(model, setting))

    plan = TrainingPlan(setting.steps, RATE, warmup=min(WARMUP, setting.steps // 2), fused=True)
    train(model, batches(), lambda m, b: labelled_loss(m, *b), plan, after_step=after_step)
    return model, trace


def build(target: Path, profile: str) -> None:
    """Train every arm with every seed; write the weights, and trace.csv with the curves."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    trace: list[dict] = []
    for arm in ARMS:
        for seed in setting.seeds_of(arm):
            model, seen = _train(arm, setting, seed, device)
            save_model(model, target / f"{arm}-{seed}.safetensors")
            trace += seen
            last = next(row for row in reversed(seen) if row["what"] == "accuracy")
            print(f"{arm}, seed {seed}: {100 * last['value']:.1f} % beyond the reach", flush=True)
    pd.DataFrame(trace).to_csv(target / "trace.csv", index=False)


def load(
    profile: str = "cpu", device: torch.device | str = "cpu"
) -> tuple[dict[Arm, list[Trunk]], pd.DataFrame]:
    """Models by arm and seed, in evaluation mode; and the curves of their training.

    The curves have the columns arm, seed, step, what, layer, value; `what` is "accuracy" beyond the
    local reach, "smallest" and "largest" share of the tokens nearest to one centroid, "in_none": share
    of the tokens that no cluster takes. Built on first use.
    """
    setting, directory = SETTINGS[profile], backbone_path("routing_transformer", profile)
    models: dict[Arm, list[Trunk]] = {arm: [] for arm in ARMS}
    for arm, found in models.items():
        for seed in setting.seeds_of(arm):
            model = untrained(arm, setting, seed)
            load_model(model, directory / f"{arm}-{seed}.safetensors")
            found.append(model.to(device).eval())
    return models, pd.read_csv(directory / "trace.csv")
