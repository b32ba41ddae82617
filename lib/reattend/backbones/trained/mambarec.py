"""MambaRec, MGCN, their ablations and baselines, trained on simulated tastes over real stamps, many seeds each.

The catalogue is the captioned Tux Paint stamps: features are [CLS] and the mean patch of a frozen ViT-S/14 for the
picture, and MiniLM's vector of caption and folder for the words. A seed is a world (which stamps are
items, who likes what, the split; `reattend.data.tastes`) with its own initial values, batches, negatives and
dropout, all the same for every arm. All seeds of an arm are trained side by side.

Files: `content.safetensors` and `curves.safetensors`; see `load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.features import extract
from reattend.backbones.pretrained import minilm, vit
from reattend.backbones.store import backbone_path
from reattend.data.images import stamps
from reattend.data.tastes import Taste, World, draw_world, stack
from reattend.recommendation.baselines import VBPR, LightGCN, popularity
from reattend.recommendation.mambarec import (
    Batch,
    Design,
    Graphs,
    MambaRec,
    Rows,
    Views,
    Weights,
    alignment_loss,
    contrastive_loss,
    mmd,
    occurrences,
    recommendation_loss,
)
from reattend.recommendation.ranking import list_scores
from reattend.trunks.encoders import BiEncoder, TextEncoder, tokenise

VIT_LAYER, VIT_SIZE = 10, 112
MODALITIES = ("picture", "words")
BANDWIDTHS = (
    0.5,
    1.0,
)  # of the MMD that is measured: half of the one that is trained, and that one


# Content ------------------------------------------------------------------------------------------


@torch.inference_mode()
def stamp_content(limit: int | None) -> dict[str, Float[Tensor, "stamps dim"]]:
    """Frozen features of all stamps by modality, centred, with a mean square of 1."""
    pictures = stamps(64, limit=limit)
    model = vit.load()

    def encode(pixels: Tensor) -> Tensor:
        tokens = vit.hidden_states(model, pixels, [VIT_LAYER], VIT_SIZE)
        return torch.cat([tokens[:, :, :1], tokens[:, :, 1:].mean(2, keepdim=True)], 3)

    seen = extract(encode, pictures.pixels, "stamps through the ViT")[0, :, 0].float()
    names = [pictures.classes[label] for label in pictures.labels]
    texts = [f"{c} ({n})" for c, n in zip(pictures.captions, names, strict=True)]
    tokenizer, language = minilm.load()
    encoder = BiEncoder(TextEncoder(language)).eval()
    tokens = tokenise(tokenizer, texts, length=48)
    read = torch.cat([encoder(tokens[rows]) for rows in torch.arange(len(texts)).split(64)])
    tables = dict(zip(MODALITIES, (seen, read), strict=True))
    return {name: standardised(table) for name, table in tables.items()}


def standardised(table: Float[Tensor, "things dim"]) -> Float[Tensor, "things dim"]:
    """Centred, and divided by one number so that the mean square is 1."""
    centred = table - table.mean(0)
    return centred / centred.square().mean().sqrt()


# Arms ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train a recommender.

    Attributes:
        rate: of Adam, tuned for this arm on other seeds.
        kind: of model.
        design, weights: of MambaRec and its kin.
        layers: of the interaction graph.
        pairs: whether InfoNCE sets a batch member against itself ("own") or against another ("permuted").
        align_to: what MMD brings a modality together with: the "other" one, or a random "cloud" of its own.
        content: whose features an item has: its "own", or those of a random item ("permuted").
    """

    rate: float
    kind: Literal["mambarec", "lightgcn", "vbpr"] = "mambarec"
    design: Design = field(default_factory=Design)
    weights: Weights = field(default_factory=Weights)
    layers: int = 4
    pairs: Literal["own", "permuted"] = "own"
    align_to: Literal["other", "cloud"] = "other"
    content: Literal["own", "permuted"] = "own"


@dataclass(frozen=True)
class Setting:
    """How much is trained in one profile.

    Attributes:
        limit: stamps of each class (None: all).
        taste: size and kind of the worlds.
        seeds, few: of ARMS, and of MORE_ARMS.
        epochs, every: of training, and between two checks.
        batch: interactions of a step.
        width: of embeddings.
        together: seeds trained side by side.
    """

    limit: int | None
    taste: Taste
    seeds: int
    few: int
    epochs: int
    every: int
    batch: int
    width: int
    together: int


# Worlds -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worlds:
    """Several worlds side by side, with what a step draws.

    Attributes:
        seeds: of the worlds.
        world: the worlds, stacked.
        content: features of their items.
        unseen: features of the stamps that are no items.
    """

    seeds: tuple[int, ...]
    world: World
    content: dict[str, Float[Tensor, "worlds items dim"]]
    unseen: dict[str, Float[Tensor, "worlds others dim"]]

    @staticmethod
    def of(
        catalogue: Mapping[str, Float[Tensor, "stamps dim"]], taste: Taste, seeds: Sequence[int]
    ) -> Worlds:
        """The worlds of some seeds."""
        world = stack([draw_world(catalogue, taste, seed) for seed in seeds])
        items = taste.items
        chosen = F.one_hot(world.catalogue, len(next(iter(catalogue.values())))).sum(1)
        others = chosen.argsort(dim=1, stable=True)[:, : chosen.shape[1] - items]
        content = {name: table[world.catalogue] for name, table in catalogue.items()}
        return Worlds(
            tuple(seeds), world, content, {name: table[others] for name, table in catalogue.items()}
        )


@dataclass(frozen=True)
class Drawn:
    """One step's draws for every world.

    Attributes:
        batch: interactions and negatives.
        others: for every batch member another one, as a permutation.
        keep: dropout's factors.
    """

    batch: Batch
    others: Rows
    keep: Float[Tensor, "worlds modalities items width"]


DROPOUT = 0.2


def steps(worlds: Worlds, setting: Setting, epoch: int) -> Iterator[Drawn]:
    """All steps of an epoch; a world's draws depend on its seed and the epoch alone."""
    trained = worlds.world.parts["train"]
    generators = [Generator().manual_seed(1_000_003 * seed + epoch) for seed in worlds.seeds]
    orders, missing = [], []
    for mask, generator in zip(trained, generators, strict=True):
        users, positives = mask.nonzero(as_tuple=True)
        order = torch.randperm(len(users), generator=generator)
        users, positives = users[order], positives[order]
        orders.append(torch.stack([users, positives]))
        missing.append(negatives(mask, users, generator))
    rows, negative = torch.stack(orders), torch.stack(missing)
    items, width = trained.shape[2], setting.width
    for part in torch.arange(rows.shape[2]).split(setting.batch):
        keep = torch.stack([torch.rand(2, items, width, generator=g) for g in generators])
        others = torch.stack([torch.randperm(len(part), generator=g) for g in generators])
        batch = Batch(rows[:, 0, part], rows[:, 1, part], negative[:, part])
        yield Drawn(batch, others, (keep >= DROPOUT).float() / (1 - DROPOUT))


def negatives(
    trained: Tensor, users: Int[Tensor, " interactions"], generator: Generator
) -> Int[Tensor, " interactions"]:
    """A uniform item for each interaction that its user has no training interaction with."""
    items = trained.shape[1]
    drawn = torch.randint(items, users.shape, generator=generator)
    while (taken := trained[users, drawn]).any():
        drawn[taken] = torch.randint(items, (int(taken.sum()),), generator=generator)
    return drawn


# Training -----------------------------------------------------------------------------------------


def make_model(worlds: Worlds, arm: Arm, setting: Setting) -> nn.Module:
    """An untrained model of an arm for every world."""
    generators = [Generator().manual_seed(20_000 + seed) for seed in worlds.seeds]
    trained = worlds.world.parts["train"]
    if arm.kind == "lightgcn":
        return LightGCN(generators, trained, arm.layers, setting.width)
    content = worlds.content
    if arm.content == "permuted":
        content = permuted(content, worlds.seeds)
    if arm.kind == "vbpr":
        return VBPR(generators, content, trained.shape[1], setting.width)
    graphs = Graphs.of(trained, content, arm.layers)
    return MambaRec(generators, content, graphs, replace(arm.design, width=setting.width))


def permuted(content: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Features of all modalities dealt out anew over the items, together."""
    items = next(iter(content.values())).shape[1]
    orders = [torch.randperm(items, generator=Generator().manual_seed(30_000 + s)) for s in seeds]
    rows = torch.stack(orders)[..., None]
    return {name: table.gather(1, rows.expand(table.shape)) for name, table in content.items()}


def clouds(worlds: Worlds, width: int) -> dict[str, Float[Tensor, "worlds items width"]]:
    """For every modality a cloud of the shape that DREAM's output has, about a random centre of its own."""
    items, found = worlds.world.catalogue.shape[1], []
    for seed in worlds.seeds:
        generator = Generator().manual_seed(40_000 + seed)
        centres = torch.randn(len(MODALITIES), 1, width, generator=generator)
        found.append(
            F.relu(centres + torch.randn(len(MODALITIES), items, width, generator=generator))
        )
    return dict(zip(MODALITIES, torch.stack(found, 1), strict=True))


def loss_of(views: Views, drawn: Drawn, arm: Arm, cloud: Mapping[str, Tensor]) -> Tensor:
    """An arm's objective on one step, for every world."""
    batch, weights = drawn.batch, arm.weights
    loss = recommendation_loss(views, batch, weights.decay)
    if arm.kind != "mambarec":
        return loss
    if weights.contrast:
        pairs = [(rows, rows) for rows in (batch.users, batch.positives)]
        if arm.pairs == "permuted":
            pairs = [(rows, rows.gather(1, drawn.others)) for rows, _ in pairs]
        loss = loss + weights.contrast * contrastive_loss(views, *pairs, weights.temperature)
    if weights.align and arm.align_to == "other":
        loss = loss + weights.align * alignment_loss(views, batch.positives, weights.bandwidth)
    elif weights.align:
        shares = occurrences(batch.positives, len(cloud["picture"][0])) / batch.positives.shape[1]
        apart = [mmd(views.refined[m], cloud[m], shares, weights.bandwidth) for m in MODALITIES]
        loss = loss + weights.align * sum(apart) / len(apart)
    return loss


MEASURES = (
    "validation R@20",
    "validation N@20",
    "R@10",
    "N@10",
    "R@20",
    "N@20",
    *(f"MMD at {s}" for s in BANDWIDTHS),
)


@torch.no_grad()
def check(model: nn.Module, worlds: Worlds) -> Float[Tensor, "worlds measures"]:
    """All measures of the models as they are; MMD between the modalities of stamps that are no items."""
    model.eval()
    views = model()
    found = scores_of(views.scores(), worlds.world)
    apart = torch.full((len(worlds.seeds), len(BANDWIDTHS)), torch.nan, dtype=found.dtype)
    if views.refined:
        x, y = (model.refined(name, worlds.unseen[name]) for name in MODALITIES)
        even = torch.full(x.shape[:2], 1 / x.shape[1])
        apart = torch.stack([mmd(x, y, even, s) for s in BANDWIDTHS], 1).to(found.dtype)
    model.train()
    return torch.cat([found, apart], 1)


def scores_of(scores: Tensor, world: World) -> Float[Tensor, "worlds measures"]:
    """Validation and test measures of some scores, without MMD; validation items stay candidates at test."""
    parts = world.parts
    validation = list_scores(scores, parts["train"], parts["validation"], 20)
    tested = [m for k in (10, 20) for m in list_scores(scores, parts["train"], parts["test"], k)]
    return torch.stack([*validation, *tested], 1)


def fit(
    worlds: Worlds, arm: Arm, setting: Setting
) -> tuple[nn.Module, Float[Tensor, "checks worlds measures"]]:
    """Models of an arm trained on all worlds side by side, and what the checks found, the untrained first."""
    model, cloud = make_model(worlds, arm, setting), clouds(worlds, setting.width)
    optimiser = torch.optim.Adam(model.parameters(), lr=arm.rate)
    found = [check(model, worlds)]
    for epoch in range(setting.epochs):
        for group in optimiser.param_groups:
            group["lr"] = arm.rate * 0.96 ** (epoch / 50)
        for drawn in steps(worlds, setting, epoch):
            optimiser.zero_grad()
            # Summed: worlds do not share a parameter, so each sees the gradient of its own mean.
            loss_of(model(drawn.keep), drawn, arm, cloud).sum().backward()
            optimiser.step()
        if (epoch + 1) % setting.every == 0:
            found.append(check(model, worlds))
    return model, torch.stack(found)
