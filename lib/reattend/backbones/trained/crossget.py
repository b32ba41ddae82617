"""Small image-text towers, fine-tuned with tokens merged by CrossGET and by what it is compared with.

A seed's towers are trained without any merging, as FILIP's arm "global" but deeper and on scenes that come in
twos (`reattend.data.twin_scenes`): every batch holds both twins, so that no bag of words tells its captions
apart. Every arm starts from these towers and is fine-tuned on the same scenes in the same order, for a short
time: after a long one towers get on with random pairs too. Captions of three objects need no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from reattend.backbones.store import backbone_path
from reattend.backbones.trained.filip import (
    Pairs,
    Shape,
    contrastive_loss,
    global_similarity,
    paired,
    untrained,
)
from reattend.data.attribute_scenes import AttributeScenes
from reattend.data.twin_scenes import make_twin_scenes
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.encoders import index_batches
from reattend.trunks.image_text import ImageTextModel
from reattend.vision_language.crossget import (
    CrossTokens,
    Importance,
    Matcher,
    Merging,
    Reduction,
    Vectors,
    bipartite_matching,
    complete_graph_matching,
    crossget_loss,
    guided_importance,
    merging_into_best,
    reduced_vectors,
)

LOSSES = "losses.safetensors"


@dataclass(frozen=True)
class Setting:
    """What one profile trains.

    Attributes:
        shape: of the towers.
        arms: names in `ARMS` with their numbers of seeds.
        first: the first of these seeds.
        merged: tokens that CrossGET merges in each block of the image tower.
        words: tokens that it merges in each block of the text tower, where an arm does so.
        twos: twins for both trainings of each seed, half as many as scenes.
        base_rate, base_steps: of the towers.
        rate, steps: of the fine-tuning.
        offsets: how many times `rate` is the rate of the cross tokens' offsets.
        galleries, gallery: how many test galleries of how many pairs.
    """

    shape: Shape
    arms: Mapping[str, int]
    first: int
    merged: int
    words: int
    twos: int
    batch: int
    base_rate: float
    base_steps: int
    rate: float
    steps: int
    offsets: float
    galleries: int
    gallery: int

    def base_plan(self) -> TrainingPlan:
        """Warm-up over a sixth of the steps, then a cosine to zero."""
        steps = self.base_steps
        return TrainingPlan(steps, self.base_rate, 0.03, warmup=steps // 6, fused=True)

    def plan(self) -> TrainingPlan:
        """A cosine to zero."""
        return TrainingPlan(self.steps, self.rate, weight_decay=0.03, fused=True)

    def pictures(self, count: int, split: str, seed: int) -> AttributeScenes:
        """`count` scenes, an even number, in twos."""
        return make_twin_scenes(
            count // 2,
            objects=self.shape.objects[1],
            size=self.shape.size,
            side=self.shape.side,
            split=split,
            seed=seed,
        )


# --- arms ----------------------------------------------------------------------------------------


def random_matching(generator: torch.Generator) -> Matcher:
    """The placebo of all matchings: random tokens into random survivors; protected ones take no part."""

    def match(
        similarity: Float[Tensor, "batch length length"],
        r: int,
        importance: Float[Tensor, "batch length"] | None,
    ) -> Merging:
        free = similarity.isfinite().any(-1)
        draw = torch.rand(free.shape, generator=generator).to(similarity).masked_fill(~free, -1)
        wishes = torch.rand(similarity.shape, generator=generator).to(similarity)
        sources = draw.argsort(descending=True)[:, :r]
        return merging_into_best(sources, wishes.masked_fill(~free[:, None], -1))

    return match


def shuffled_importance(generator: torch.Generator) -> Importance:
    """The placebo of guidance: the same values on other tokens; first and last token, protected, keep theirs."""

    def importance(
        guide: Float[Tensor, "batch width"], keys: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length"]:
        found = guided_importance(guide, keys)
        inner = found[:, 1:-1]
        order = torch.rand(inner.shape, generator=generator).argsort(1).to(inner.device)
        return torch.cat([found[:, :1], inner.gather(1, order), found[:, -1:]], 1)

    return importance


@dataclass(frozen=True)
class Arm:
    """How an arm merges and learns.

    Attributes:
        cross: whether it has cross tokens; without them the first block of the image tower merges one token
            less, so that all merged arms have as many tokens in every later place.
        weight: of the divergence in the loss; with 0 the offsets stay at zero as well.
    """

    reduction: Reduction
    cross: bool = False
    weight: float = 0.0


Make = Callable[[Setting, torch.Generator], Arm]


def _rs(setting: Setting, share: float = 1.0, cross: bool = True) -> tuple[int, ...]:
    """Tokens merged in each block: at most half of those that are neither [CLS] nor the cross token."""
    free, rs = (setting.shape.size // setting.shape.patch) ** 2, []
    for _ in range(setting.shape.layers):
        rs.append(min(round(share * setting.merged), free // 2))
        free -= rs[-1]
    return (rs[0] if cross else rs[0] - 1, *rs[1:])


def _words(setting: Setting, share: float = 1.0) -> tuple[int, ...]:
    return (round(share * setting.words),) * setting.shape.layers


def _unguided(match: Callable[[torch.Generator], Matcher]) -> Make:
    return lambda setting, generator: Arm(
        Reduction(_rs(setting, cross=False), _words(setting, 0.0), match(generator), None)
    )


def _guided(
    share: float = 1.0,
    words: float = 0.0,
    weight: float = 0.5,
    importance: Callable[[torch.Generator], Importance] = lambda generator: guided_importance,
) -> Make:
    return lambda setting, generator: Arm(
        Reduction(_rs(setting, share), _words(setting, words), importance=importance(generator)),
        cross=True,
        weight=weight,
    )


def _dense(setting: Setting, generator: torch.Generator) -> Arm:
    nothing = (0,) * setting.shape.layers
    return Arm(Reduction(nothing, nothing, importance=None))


ARMS: Mapping[str, Make] = {
    "dense": _dense,
    "random pairs": _unguided(random_matching),
    "ToMe": _unguided(lambda generator: bipartite_matching),
    "CGSM": _unguided(lambda generator: complete_graph_matching),
    "CrossGET": _guided(),
    "own guide": _guided(weight=0.0),
    "shuffled": _guided(importance=shuffled_importance),
    "half as many": _guided(share=0.5),
    "text": _guided(share=0.0, words=1.0),
    "both": _guided(words=1.0),
}
"""By name. "own guide" is CrossGET without the other modality: offsets at zero, so that [CLS] guides, and no
divergence. "shuffled" has CrossGET's training and its importances on the wrong tokens. "half as many" merges
half the patches, "text" words alone, "both" patches and words."""


class Reduced(nn.Module):
    """A model with its cross tokens, if its arm has them."""

    def __init__(self, model: ImageTextModel, arm: Arm) -> None:
        super().__init__()
        self.model, self.arm = model, arm
        self.cross = CrossTokens(model) if arm.cross else None
        if self.cross is not None and arm.weight == 0:
            self.cross.requires_grad_(False)

    def forward(self, pairs: Pairs) -> Vectors:
        return reduced_vectors(
            self.model, self.cross, self.arm.reduction, pairs.pixels, pairs.ids, pairs.mask
        )


def arm_of(name: str, setting: Setting, seed: int) -> Arm:
    """An arm with the random numbers of a seed.

    Raises:
        KeyError: for an unknown arm.
    """
    return ARMS[name](setting, torch.Generator().manual_seed(3000 + seed))


def fine_tune(
    name: str, base: ImageTextModel, setting: Setting, pairs: Pairs, seed: int
) -> tuple[Reduced, Float[Tensor, " steps"]]:
    """A fine-tuned copy of the base for one arm, and the contrastive loss of every step in nats."""
    model = untrained(setting.shape, seed).to(pairs.ids.device)
    model.load_state_dict(base.state_dict())
    reduced = Reduced(model, arm_of(name, setting, seed)).to(pairs.ids.device)
    losses = []

    def loss(reduced: Reduced, index: Tensor) -> Tensor:
        total, contrastive = crossget_loss(reduced.model, reduced(pairs[index]), reduced.arm.weight)
        losses.append(contrastive.item())
        return total

    batches = twin_batches(len(pairs), setting.batch, 2000 + seed)
    groups = _groups(reduced, setting.offsets)
    train(reduced, batches, loss, setting.plan(), groups=lambda reduced: groups)
    return reduced, torch.tensor(losses)


def _groups(reduced: Reduced, offsets: float) -> list[dict]:
    """AdamW's groups: the offsets of cross tokens at a rate of their own, without decay."""
    groups = decay_matrices(reduced.model)
    if reduced.cross is not None:
        groups.append({"params": reduced.cross.parameters(), "weight_decay": 0.0, "rate": offsets})
    return groups


def twin_batches(scenes: int, batch: int, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    """Endless batches of positions, both twins in one batch; every scene once before any comes again."""
    for twos in index_batches(scenes // 2, batch // 2, seed):
        yield torch.stack([2 * twos, 2 * twos + 1], 1).flatten()


# --- the build -----------------------------------------------------------------------------------

SETTINGS = {
    "smoke": Setting(
        Shape(24, 4, 16, 2, 2, 16, (3, 3)),
        dict.fromkeys(ARMS, 3), first=0,
        merged=8, words=1, twos=12, batch=8, base_rate=1e-3, base_steps=2,
        rate=1e-4, steps=2, offsets=10.0, galleries=1, gallery=16,
    ),
    "cpu": Setting(
        Shape(24, 4, 64, 4, 4, 64, (3, 3)),
        dict.fromkeys(ARMS, 6) | {"text": 3, "both": 3}, first=10,
        merged=16, words=1, twos=4000, batch=48, base_rate=1e-3, base_steps=600,
        rate=1e-4, steps=30, offsets=10.0, galleries=4, gallery=256,
    ),
    "gpu": Setting(
        Shape(96, 8, 256, 6, 8, 256, (4, 4), (16, 24)),
        dict.fromkeys(ARMS, 8), first=0,
        merged=40, words=2, twos=20_000, batch=512, base_rate=1e-3, base_steps=4000,
        rate=5e-5, steps=200, offsets=10.0, galleries=4, gallery=1000,
    ),
}  # fmt: skip


def train_towers(setting: Setting, pairs: Pairs, seed: int) -> ImageTextModel:
    """Towers of one seed before any merging."""
    towers = untrained(setting.shape, seed).to(pairs.ids.device)
    train(
        towers,
        twin_batches(len(pairs), setting.batch, 1000 + seed),
        lambda towers, index: contrastive_loss(towers, pairs[index], global_similarity),
        setting.base_plan(),
        groups=decay_matrices,
    )
    return towers


def build(target: Path, profile: str) -> None:
    """Train the towers, fine-tune all arms of a profile; write weights and losses."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    losses: dict[str, list[Tensor]] = {name: [] for name in setting.arms}
    for number in range(max(setting.arms.values())):
        seed = setting.first + number
        pairs = paired(setting.pictures(2 * setting.twos, "train", seed)).to(device)
        towers = train_towers(setting, pairs, seed)
        save_model(towers, target / f"towers-{seed}.safetensors")
        for name, seeds in setting.arms.items():
            if number < seeds:
                reduced, loss = fine_tune(name, towers, setting, pairs, seed)
                save_model(reduced, target / f"{name}-{seed}.safetensors")
                losses[name].append(loss)
    for name, rows in losses.items():
        last = ", ".join(f"{row[-20:].mean():.3f}" for row in rows)
        print(f"{name}: {last} nats over the last 20 steps", flush=True)
    save_file({name: torch.stack(rows) for name, rows in losses.items()}, target / LOSSES)


@dataclass(frozen=True)
class TrainedModels:
    """Towers before fine-tuning, a list over seeds; fine-tuned models by arm; the loss of every step."""

    towers: list[ImageTextModel]
    arms: dict[str, list[Reduced]]
    losses: dict[str, Float[Tensor, "seeds steps"]]


def load(profile: str = "cpu", device: torch.device | str = "cpu") -> TrainedModels:
    """The models of a profile in evaluation mode, built on first use."""
    setting, directory = SETTINGS[profile], backbone_path("crossget", profile)

    def read(name: str, seed: int) -> Reduced:
        reduced = Reduced(untrained(setting.shape, seed), arm_of(name, setting, seed))
        load_model(reduced, directory / f"{name}-{seed}.safetensors")
        return reduced.to(device).eval()

    def read_towers(seed: int) -> ImageTextModel:
        towers = untrained(setting.shape, seed)
        load_model(towers, directory / f"towers-{seed}.safetensors")
        return towers.to(device).eval()

    def seeds(count: int) -> range:
        return range(setting.first, setting.first + count)

    arms = {name: [read(name, seed) for seed in seeds(n)] for name, n in setting.arms.items()}
    towers = [read_towers(seed) for seed in seeds(max(setting.arms.values()))]
    return TrainedModels(towers, arms, load_file(directory / LOSSES))
