"""MambaRec, MGCN, their ablations and baselines, trained on simulated tastes over real stamps, many seeds each.

The catalogue is the captioned Tux Paint stamps: features are [CLS] and the mean patch of a frozen ViT-S/14 for the
picture, and MiniLM's vector of caption and folder for the words. A seed is a world (which stamps are
items, who likes what, the split; `reattend.data.tastes`) with its own initial values, batches, negatives and
dropout, all the same for every arm. All seeds of an arm are trained side by side.

Files: `content`, `levels`, `curves` and `refined`, all safetensors; see `load`.
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
from reattend.recommendation.baselines import (
    FREEDOM,
    VBPR,
    LightGCN,
    MatrixFactorisation,
    feature_loss,
    popularity,
)
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
        kind: of model.
        design, weights: of MambaRec and its kin.
        layers: of the interaction graph.
        pairs: whether InfoNCE sets a batch member against itself ("own") or against another ("permuted").
        align_to: what MMD brings a modality together with: the "other" one, or a random "cloud" of its own.
        content: whose features an item has: its "own", or those of a random item ("permuted").
        longer: as many times the epochs of the setting.
        dropped: share of interactions that FREEDOM leaves out of the graph, drawn anew every epoch.
        features: weight of FREEDOM's `feature_loss`.
        rate: of Adam.
        scale: what the initial tables of users and items are multiplied by.
    """

    kind: Literal["mambarec", "bpr", "lightgcn", "vbpr", "freedom"] = "mambarec"
    design: Design = field(default_factory=Design)
    weights: Weights = field(default_factory=Weights)
    layers: int = 4
    pairs: Literal["own", "permuted"] = "own"
    align_to: Literal["other", "cloud"] = "other"
    content: Literal["own", "permuted"] = "own"
    longer: int = 2
    dropped: float = 0.0
    features: float = 0.0
    rate: float = 1e-2
    scale: float = 1.0

    def at(self, rate: float, decay: float, scale: float) -> Arm:
        """The same with other values of what is tuned, `TUNED`."""
        return replace(self, rate=rate, scale=scale, weights=replace(self.weights, decay=decay))


@dataclass(frozen=True)
class Setting:
    """How much is trained in one profile.

    Attributes:
        limit: stamps of each class (None: all).
        taste: size and kind of the worlds.
        worlds: seeds of WIDE_ARMS, of the oracle and of popularity, `seeds` or more.
        seeds, few, grid: of ARMS, of MORE_ARMS, and of GRID.
        epochs, every: of training, a multiple of them for each arm (`Arm.longer`), and between two checks.
        batch: interactions of a step.
        width: of embeddings.
        together: seeds trained side by side.
    """

    limit: int | None
    taste: Taste
    worlds: int
    seeds: int
    few: int
    grid: int
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
        unseen = {name: table[others] for name, table in catalogue.items()}
        return Worlds(tuple(seeds), world, content, unseen)

    @property
    def device(self) -> torch.device:
        return self.world.utility.device

    def to(self, device: torch.device | str) -> Worlds:
        """The same on a device; models made for them and their draws follow."""
        parts = {part: mask.to(device) for part, mask in self.world.parts.items()}
        catalogue, utility = self.world.catalogue.to(device), self.world.utility.to(device)
        content = {name: table.to(device) for name, table in self.content.items()}
        unseen = {name: table.to(device) for name, table in self.unseen.items()}
        return Worlds(self.seeds, World(catalogue, utility, parts), content, unseen)

    def first(self, count: int) -> Worlds | None:
        """The first worlds, all where they are fewer; None where none is asked for."""
        if count <= 0:
            return None
        return Worlds(
            self.seeds[:count],
            World(
                self.world.catalogue[:count],
                self.world.utility[:count],
                {part: mask[:count] for part, mask in self.world.parts.items()},
            ),
            {name: table[:count] for name, table in self.content.items()},
            {name: table[:count] for name, table in self.unseen.items()},
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
    """All steps of an epoch; a world's draws depend on its seed and the epoch alone.

    They are made on the CPU, so that every device trains on the same, and lie on the worlds' device.
    """
    trained, device = worlds.world.parts["train"].cpu(), worlds.device
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
        drawn = (rows[:, 0, part], rows[:, 1, part], negative[:, part])
        factors = (keep >= DROPOUT).float() / (1 - DROPOUT)
        yield Drawn(Batch(*(x.to(device) for x in drawn)), others.to(device), factors.to(device))


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
    """An untrained model of an arm for every world, on their device."""
    generators = [Generator().manual_seed(20_000 + seed) for seed in worlds.seeds]
    trained, content, width = worlds.world.parts["train"], worlds.content, setting.width
    if arm.content == "permuted":
        content = permuted(content, worlds.seeds)
    if arm.kind == "bpr":
        model = MatrixFactorisation(generators, *trained.shape[1:], width)
    elif arm.kind == "lightgcn":
        model = LightGCN(generators, trained, arm.layers, width)
    elif arm.kind == "vbpr":
        model = VBPR(generators, content, trained.shape[1], width)
    elif arm.kind == "freedom":
        model = FREEDOM(generators, trained, content, layers=arm.layers, width=width)
    else:
        graphs = Graphs.of(trained, content, arm.layers)
        model = MambaRec(generators, content, graphs, replace(arm.design, width=width))
    with torch.no_grad():
        for table in (model.user_table, model.item_table):
            table.mul_(arm.scale)
    return model.to(worlds.device)


def permuted(content: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Features of all modalities dealt out anew over the items, together."""
    first = next(iter(content.values()))
    generators = [Generator().manual_seed(30_000 + seed) for seed in seeds]
    orders = [torch.randperm(first.shape[1], generator=g) for g in generators]
    rows = torch.stack(orders)[..., None].to(first.device)
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
    return dict(zip(MODALITIES, torch.stack(found, 1).to(worlds.device), strict=True))


def loss_of(views: Views, drawn: Drawn, arm: Arm, cloud: Mapping[str, Tensor]) -> Tensor:
    """An arm's objective on one step, for every world."""
    batch, weights = drawn.batch, arm.weights
    loss = recommendation_loss(views, batch, weights.decay)
    if arm.kind == "freedom":
        return loss + arm.features * feature_loss(views, batch)
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
    apart = found.new_full((len(worlds.seeds), len(BANDWIDTHS)), torch.nan)
    if views.refined:
        x, y = (model.refined(name, worlds.unseen[name]) for name in MODALITIES)
        even = x.new_full(x.shape[:2], 1 / x.shape[1])
        apart = torch.stack([mmd(x, y, even, s) for s in BANDWIDTHS], 1).to(found.dtype)
    model.train()
    return torch.cat([found, apart], 1)


def scores_of(scores: Tensor, world: World) -> Float[Tensor, "worlds scores"]:
    """Validation and test measures of some scores, without MMD; validation items stay candidates at test."""
    parts = world.parts
    validation = list_scores(scores, parts["train"], parts["validation"], 20)
    tested = [m for k in (10, 20) for m in list_scores(scores, parts["train"], parts["test"], k)]
    return torch.stack([*validation, *tested], 1)


WARM = 4


def fit(
    worlds: Worlds, arm: Arm, setting: Setting, patience: int | None = None
) -> tuple[nn.Module, Float[Tensor, "checks worlds measures"]]:
    """Models of an arm trained on all worlds side by side, on their device.

    Beside them, on the CPU, what the checks found, the untrained models first. Training ends after `patience` checks
    in a row (None: at the end of its epochs) that are no better than an earlier one, see `chosen`; the first
    `WARM` do not count, for a graph over hardly trained tables is better than what follows it for a while.
    """
    model, cloud = make_model(worlds, arm, setting), clouds(worlds, setting.width)
    optimiser = torch.optim.Adam(model.parameters(), lr=arm.rate, fused=True)
    found = [check(model, worlds).cpu()]
    for epoch in range(arm.longer * setting.epochs):
        for group in optimiser.param_groups:
            group["lr"] = arm.rate * 0.96 ** (epoch / 50)
        if arm.dropped:
            thinners = [
                Generator().manual_seed(1_000_003 * s + 500_000 + epoch) for s in worlds.seeds
            ]
            model.thin(arm.dropped, thinners)
        for drawn in steps(worlds, setting, epoch):
            optimiser.zero_grad()
            # Summed: worlds do not share a parameter, so each sees the gradient of its own mean.
            loss_of(model(drawn.keep), drawn, arm, cloud).sum().backward()
            optimiser.step()
        if (epoch + 1) % setting.every == 0:
            found.append(check(model, worlds).cpu())
            if patience is None or len(found) <= 1 + WARM:
                continue
            if len(found) > WARM + chosen(torch.stack(found[WARM:])) + patience:
                break
    return model, torch.stack(found)


# The build ----------------------------------------------------------------------------------------

FIRST_SEED = 300
"""Of the worlds; smaller ones have been trained with arms that were not tuned alike, or to tune."""

OFF = Design(refine="off")
UNALIGNED = Weights(align=0.0)

TUNED = {
    "MambaRec": (2e-2, 1e-4 / 3, 0.1),
    "MGCN": (2e-2, 1e-4, 0.1),
    "BPR-MF": (1e-2, 1e-1, 0.1),
    "LightGCN": (1e-2, 1e-2, 1.0),
    "VBPR": (1e-2 / 32, 3e-4, 0.1),
    "FREEDOM": (1e-2, 1e-2, 1.0),
    "FREEDOM, whole graph": (1e-2, 1e-2, 0.1),
    "MGCN as released": (2e-2, 1e-4 / 3, 0.1),
    "no CL": (5e-3, 1e-4, 0.1),
    "permuted pairs": (5e-3, 1e-4, 0.1),
}
"""Rate, decay and scale of each arm, by one procedure for all (`reattend.studies.mambarec_tuning`), on other worlds.

MambaRec's stand for the arms that are not named."""


def tuned(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Arms at the settings that were found for them."""
    return {name: arm.at(*TUNED.get(name, TUNED["MambaRec"])) for name, arm in arms.items()}


WIDE_ARMS = tuned(
    {
        "MambaRec": Arm(),
        "MGCN": Arm(design=OFF, weights=UNALIGNED, longer=3),
        "no DREAM": Arm(design=OFF),
        "plain layer": Arm(design=Design(refine="plain")),
        "no MMD": Arm(weights=UNALIGNED),
        "random clouds": Arm(align_to="cloud"),
        "factor 1": Arm(design=Design(factor=1)),
    }
)
"""Trained in all worlds, for they differ least.

"MGCN" is MambaRec without DREAM and MMD: equal depth, projections, dropout."""
ARMS = tuned(
    {
        "no CL": Arm(weights=Weights(contrast=0.0), longer=6),
        "permuted pairs": Arm(pairs="permuted", longer=6),
        "BPR-MF": Arm("bpr", longer=10),
        "LightGCN": Arm("lightgcn", longer=12),
        "VBPR": Arm("vbpr", longer=10),
    }
)
"""Trained in the first worlds."""
MORE_ARMS = tuned(
    {
        "permuted features": Arm(content="permuted"),
        "FREEDOM": Arm("freedom", layers=2, dropped=0.8, features=1.0, longer=8),
        "FREEDOM, whole graph": Arm("freedom", layers=2, features=1.0, longer=8),
        "MGCN as released": Arm(
            design=replace(OFF, wide=(), norm=False), weights=UNALIGNED, layers=2, longer=3
        ),
        "square": Arm(design=Design(refine="square")),
        "gates of the figure": Arm(design=Design(refine="figure")),
        "factor 192": Arm(design=Design(factor=192)),
    }
)
"""Trained in fewer still, for tables and for a difference that cannot be missed."""
GRID = tuned(
    {
        f"MMD {align:g}, s {bandwidth:g}": Arm(weights=Weights(align=align, bandwidth=bandwidth))
        for align in (0.1, 0.15, 0.2)
        for bandwidth in (1.0, 1.5, 2.0)
    }
)
"""The settings among which the released runner keeps the one that is best on test; the first is MambaRec's."""
ALL_ARMS = WIDE_ARMS | ARMS | MORE_ARMS | GRID

SETTINGS = {
    "smoke": Setting(3, Taste(30, 40, 2, counts=(5, 2, 6)), 4, 3, 3, 1, 1, 1, 75, 8, 2),
    "cpu": Setting(None, Taste(), 11, 5, 3, 1, 30, 5, 2_000, 64, 4),
    "gpu": Setting(None, Taste(2_000, 700), 24, 24, 8, 8, 30, 5, 8_000, 64, 24),
}


@dataclass(frozen=True)
class Trained:
    """All that was trained in a profile.

    Attributes:
        content: features of all stamps.
        levels: scores of the true utility ("oracle") and of "popularity" in all worlds, without MMD.
        curves: what the checks of an arm found, by seed; the first check is of the untrained models.
        refined: embeddings of the unseen stamps of the first seed at the end, by arm and modality.
    """

    content: dict[str, Float[Tensor, "stamps dim"]]
    levels: dict[str, Float[Tensor, "worlds scores"]]
    curves: dict[str, Float[Tensor, "checks seeds measures"]]
    refined: dict[str, dict[str, Float[Tensor, "others width"]]]


def build(target: Path, profile: str) -> None:
    """Train all arms of a profile and write what they found into the empty directory `target`."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    content = stamp_content(setting.limit)
    parts = torch.arange(FIRST_SEED, FIRST_SEED + setting.worlds).split(setting.together)
    groups = [Worlds.of(content, setting.taste, part.tolist()).to(device) for part in parts]
    levels = {
        "oracle": [scores_of(worlds.world.utility, worlds.world) for worlds in groups],
        "popularity": [
            scores_of(popularity(worlds.world.parts["train"]), worlds.world) for worlds in groups
        ],
    }
    curves, refined = {}, {}
    counts = (
        (WIDE_ARMS, setting.worlds),
        (ARMS, setting.seeds),
        (MORE_ARMS, setting.few),
        (GRID, setting.grid),
    )
    for name, arm, count in ((n, arm, count) for arms, count in counts for n, arm in arms.items()):
        found = []
        for worlds in groups:
            if (asked := worlds.first(count - sum(len(f[0]) for f in found))) is None:
                break
            model, curve = fit(asked, arm, setting)
            if not found and arm.kind == "mambarec":
                refined |= {f"{name}/{m}": r for m, r in embedded(model, asked).items()}
            found.append(curve)
        curves[name] = torch.cat(found, 1).contiguous()
        print(f"{name}: {curves[name].shape[1]} seeds", flush=True)
    levels = {name: torch.cat(found).cpu() for name, found in levels.items()}
    save_file(content, target / "content.safetensors")
    save_file(levels, target / "levels.safetensors")
    save_file(curves, target / "curves.safetensors")
    save_file(refined, target / "refined.safetensors")


@torch.no_grad()
def embedded(model: MambaRec, worlds: Worlds) -> dict[str, Float[Tensor, "others width"]]:
    """Refined embeddings of the unseen stamps of the first world, by modality, on the CPU."""
    model.eval()
    return {m: model.refined(m, worlds.unseen[m])[0].cpu().contiguous() for m in MODALITIES}


def load(profile: str = "cpu") -> Trained:
    """All that was trained in a profile; builds it first when it is missing."""
    directory = backbone_path("mambarec", profile)
    files = ("content", "levels", "curves", "refined")
    read = {name: load_file(directory / f"{name}.safetensors") for name in files}
    refined: dict[str, dict[str, Tensor]] = {}
    for key, table in read["refined"].items():
        arm, _, modality = key.rpartition("/")
        refined.setdefault(arm, {})[modality] = table
    curves = {name: read["curves"][name] for name in ALL_ARMS}
    return Trained(read["content"], read["levels"], curves, refined)


def chosen(curve: Float[Tensor, "checks seeds measures"]) -> int:
    """The check at which an arm has its best validation Recall@20, mean over its seeds.

    One check for all seeds: chosen seed by seed, two arms that agree to half a percent at every check differ by
    five. The untrained models cannot be chosen; of equal checks the earliest is.
    """
    return int(curve[1:, :, MEASURES.index("validation R@20")].mean(1).argmax()) + 1
