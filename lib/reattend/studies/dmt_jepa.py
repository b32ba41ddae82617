"""Targets of joint-embedding prediction on a real frozen encoder: which neighbours, and how discriminative.

Scenes of several real cut-outs tell for every patch what it shows. A second set takes the colours away: grey,
and every object with the mean and contrast of what surrounds it, so that brightness tells objects apart less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from reattend.backbones.pretrained.vit import PATCH, configuration, hidden_states
from reattend.backbones.trained.dmt_jepa import JepaModels
from reattend.data.scenes import CLASSES, Scenes, SceneSettings, make_scenes
from reattend.vision.dmt_jepa import (
    BlockMasks,
    Jepa,
    JepaSize,
    LocalAggregationHead,
    choose_neighbours,
    mean_of_chosen,
    neighbour_similarity,
    neighbour_table,
    step_multiply_adds,
)

SIZE = 112  # pixels
GRID = SIZE // PATCH
SCENES = SceneSettings(size=SIZE, objects=(4, 6), scale=(0.4, 0.6), overlap=0.5)
PURE = 0.8  # share of a patch that one thing must cover for the patch to have a label
DIRECT = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.float32)
"""Scores by which the four patches above, left, right and below are chosen of a 3 x 3 window."""

# Scenes -----------------------------------------------------------------------------------------------


def things_and_labels(
    masks: Bool[Tensor, "scenes objects height width"], labels: Int[Tensor, "scenes objects"]
) -> tuple[Int[Tensor, "scenes patches"], Int[Tensor, "scenes patches"]]:
    """The thing that covers most of each patch, and the class of that thing where the patch is pure.

    Things: 0 background, 1.. the scene's objects. Classes: 0 background, 1.. those of `CLASSES`; -1 where no
    thing covers more than `PURE` of the patch.
    """
    background = ~masks.any(1, keepdim=True)
    shares = F.avg_pool2d(torch.cat([background, masks], 1).float(), PATCH).flatten(2)
    most, things = shares.max(1)
    classes = F.pad(labels + 1, (1, 0)).gather(1, things)
    return things, torch.where(most > PURE, classes, -1)


def camouflaged(scenes: Scenes) -> UInt8[Tensor, "scenes 3 height width"]:
    """The pictures in grey, every object with the mean and contrast of the background around it.

    Around: within a patch's width of its box; where other objects fill that, the whole background.
    """
    grey = scenes.pixels.float().mean(1)
    out = grey.clone()
    for number, (picture, masks) in enumerate(zip(grey, scenes.masks, strict=True)):
        background = ~masks.any(0)
        for mask, box in zip(masks, scenes.boxes[number].int().tolist(), strict=True):
            if mask.sum() < 2:
                continue
            near = torch.zeros_like(background)
            x0, y0, x1, y1 = box
            near[max(0, y0 - PATCH) : y1 + PATCH, max(0, x0 - PATCH) : x1 + PATCH] = True
            around = picture[near & background]
            if len(around) < 2:
                around = picture[background]
            own = picture[mask]
            scaled = (own - own.mean()) / own.std().clamp(min=1) * around.std() + around.mean()
            out[number][mask] = scaled
    return out.clamp(0, 255).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class PatchScenes:
    """Scenes as patches of a frozen encoder.

    Attributes:
        pixels: the pictures.
        things: what covers most of each patch: 0 background, 1.. the objects.
        labels: its class where the patch shows nothing else (`things_and_labels`), or -1.
        colour: mean colour of each patch, 0..1.
        features: layer -> layer-normalised tokens of each patch.
    """

    pixels: UInt8[Tensor, "scenes 3 height width"]
    things: Int[Tensor, "scenes patches"]
    labels: Int[Tensor, "scenes patches"]
    colour: Float[Tensor, "scenes patches 3"]
    features: dict[int, Float[Tensor, "scenes patches dim"]]

    def subset(self, chosen: Bool[Tensor, " scenes"]) -> PatchScenes:
        """The chosen scenes."""
        kept = {layer: tokens[chosen] for layer, tokens in self.features.items()}
        parts = (self.pixels, self.things, self.labels, self.colour)
        return PatchScenes(*(part[chosen] for part in parts), kept)


def patch_scenes(
    model: Dinov2Model,
    count: int,
    split: str,
    seed: int,
    layers: tuple[int, ...],
    camouflage: bool = False,
    batch: int = 32,
) -> PatchScenes:
    """Scenes of one side of the split, read by an encoder."""
    scenes = make_scenes(count, SCENES, split=split, seed=seed)
    pixels = camouflaged(scenes) if camouflage else scenes.pixels
    states = torch.cat(
        [hidden_states(model, part.to(model.device), layers, SIZE) for part in pixels.split(batch)],
        1,
    )
    tokens = F.layer_norm(states[:, :, 1:], states.shape[-1:])
    colour = F.avg_pool2d(pixels.float() / 255, PATCH).flatten(2).transpose(1, 2)
    things, labels = things_and_labels(scenes.masks, scenes.labels)
    return PatchScenes(pixels, things, labels, colour, dict(zip(layers, tokens, strict=True)))


def untrained_vit(seed: int) -> Dinov2Model:
    """The real encoder's architecture with random weights."""
    torch.manual_seed(seed)
    return Dinov2Model(configuration()).eval().requires_grad_(False)


# Which neighbours -------------------------------------------------------------------------------------


def table() -> tuple[Int[Tensor, "patches 8"], Bool[Tensor, "patches 8"]]:
    """3 x 3 neighbours on the grid of the scenes."""
    return neighbour_table(GRID, GRID)


def by_distance(
    values: Float[Tensor, "scenes patches dim"],
) -> Float[Tensor, "scenes patches slots"]:
    """Scores of the neighbours: the nearer in these values, the higher."""
    index, _ = table()
    return -(values[:, :, None] - values[:, index]).norm(dim=-1)


def by_chance(scenes: int, seed: int) -> Float[Tensor, "scenes patches slots"]:
    """Random scores."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(scenes, GRID**2, 8, generator=generator)


def by_direction(scenes: int) -> Float[Tensor, "scenes patches slots"]:
    """Scores that put the four patches above, left, right and below first."""
    return DIRECT.expand(scenes, GRID**2, 8)


def boundary_patches(scenes: PatchScenes) -> Bool[Tensor, "scenes patches"]:
    """Pure patches off the picture's border with another thing than their own among their neighbours."""
    index, present = table()
    other = (scenes.things[:, index] != scenes.things[..., None]).any(-1)
    return (scenes.labels >= 0) & present.all(-1) & other


def purity(
    scenes: PatchScenes, index: Int[Tensor, "scenes patches k"]
) -> Float[np.ndarray, " scenes"]:
    """Share of the chosen neighbours that show the patch's own thing, mean over a scene's boundary patches.

    NaN for a scene without any.
    """
    chosen = scenes.things.gather(1, index.flatten(1)).view_as(index)
    same = chosen == scenes.things[..., None]
    return _per_scene(same.float().mean(-1), boundary_patches(scenes))


def _per_scene(
    values: Float[Tensor, "scenes patches"], wanted: Bool[Tensor, "scenes patches"]
) -> Float[np.ndarray, " scenes"]:
    """Means over the wanted patches of each scene."""
    sums = (values * wanted).sum(1) / wanted.sum(1)
    return sums.double().numpy()


# Targets ----------------------------------------------------------------------------------------------

KINDS = ("own", "mean-8", "random-4", "direct-4", "colour-4", "top-4", "top-4 + own")


def chosen_by(
    kind: str, tokens: Float[Tensor, "scenes patches dim"], colour: Tensor, seed: int
) -> Float[Tensor, "scenes patches slots"]:
    """Scores by which a kind of target chooses its neighbours.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind.startswith("top"):
        return neighbour_similarity(tokens, table()[0])
    if kind.startswith("colour"):
        return by_distance(colour)
    if kind.startswith("direct"):
        return by_direction(len(tokens))
    if kind.startswith(("random", "mean")):
        return by_chance(len(tokens), seed)
    raise ValueError(f"unknown kind of target '{kind}'; there are: {', '.join(KINDS)}")


RULES = {
    "mean-8": "all eight",
    "random-4": "four random",
    "direct-4": "four direct",
    "colour-4": "four by colour",
    "top-4": "four by feature",
}
"""Kinds by how they choose neighbours, in words."""


def chosen_by_rule(scenes: PatchScenes, kind: str, layer: int) -> Int[Tensor, "scenes patches k"]:
    """Positions of the neighbours that a kind of target chooses on the features of a layer."""
    scores = chosen_by(kind, scenes.features[layer], scenes.colour, seed=0)
    return choose_neighbours(scores, *table(), int(kind.rpartition("-")[2]))[0]


def make_targets(
    kind: str,
    tokens: Float[Tensor, "scenes patches dim"],
    colour: Float[Tensor, "scenes patches 3"],
    seed: int = 0,
) -> Float[Tensor, "scenes patches dim"]:
    """Targets of a kind, without a head: "own", or the plain mean of chosen neighbours.

    Args:
        kind: one of `KINDS`; "top-<k>" for any k.
        tokens: layer-normalised features.
    """
    if kind == "own":
        return tokens
    name, _, own = kind.partition(" + ")
    k = int(name.rpartition("-")[2])
    index, exists = choose_neighbours(chosen_by(kind, tokens, colour, seed), *table(), k)
    mean = mean_of_chosen(tokens, index, exists)
    if not own:
        return mean
    count = exists.sum(-1, keepdim=True)
    return (count * mean + tokens) / (count + 1)


@torch.no_grad()
def untrained_head_targets(
    tokens: Float[Tensor, "scenes patches dim"],
    seed: int,
    swapped_queries: bool = False,
    device: torch.device | str = "cpu",
    batch: int = 32,
) -> Float[Tensor, "scenes patches dim"]:
    """Targets of a head as it is before training; queries are swapped within batches."""
    torch.manual_seed(seed)
    width = tokens.shape[-1]
    head = LocalAggregationHead(width, width // 64, swapped_queries=swapped_queries).to(device)
    parts = tokens.to(device).split(batch)
    return torch.cat([head.targets(part, (GRID, GRID)).cpu() for part in parts])


# Probes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatchProbe:
    """A linear classifier of patches on standardised features."""

    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    weight: Float[Tensor, "inputs classes"]

    def logits(
        self, targets: Float[Tensor, "scenes patches dim"]
    ) -> Float[Tensor, "scenes patches classes"]:
        """Scores of all classes for every patch."""
        return _with_one((targets - self.mean) / self.scale) @ self.weight

    def nats(
        self, targets: Float[Tensor, "scenes patches dim"], labels: Int[Tensor, "scenes patches"]
    ) -> Float[Tensor, "scenes patches"]:
        """Nats of every patch's label; 0 where it has none."""
        scores = self.logits(targets).movedim(-1, 1)
        return F.cross_entropy(scores, labels, ignore_index=-1, reduction="none")


def _with_one(x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead inputs"]:
    return F.pad(x, (0, 1), value=1.0)


def fit_probe(
    targets: Float[Tensor, "scenes patches dim"],
    labels: Int[Tensor, "scenes patches"],
    decay: float,
    steps: int,
    classes: int = len(CLASSES) + 1,
) -> PatchProbe:
    """Softmax regression of patch labels, weights shrunk by `decay` / 2 x their squares, by L-BFGS."""
    there = labels >= 0
    x, y = targets[there], labels[there]
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x = _with_one((x - mean) / scale)
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(x @ weight, y) + decay / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return PatchProbe(mean, scale, weight.detach())


def choose_decay(
    targets: Mapping[str, Float[Tensor, "scenes patches dim"]],
    labels: Mapping[str, Int[Tensor, "scenes patches"]],
    decays: tuple[float, ...],
    steps: int,
) -> tuple[float, PatchProbe]:
    """The decay, and its probe of "train", with the fewest nats on "validation"."""
    probes = {d: fit_probe(targets["train"], labels["train"], d, steps) for d in decays}

    def nats(decay: float) -> float:
        there = labels["validation"] >= 0
        found = probes[decay].nats(targets["validation"], labels["validation"])
        return found[there].mean().item()

    best = min(decays, key=nats)
    return best, probes[best]


def scene_nats(
    probe: PatchProbe,
    targets: Float[Tensor, "scenes patches dim"],
    labels: Int[Tensor, "scenes patches"],
    wanted: Bool[Tensor, "scenes patches"] | None = None,
) -> Float[np.ndarray, " scenes"]:
    """Mean nats of a scene's labelled (and wanted) patches."""
    there = labels >= 0 if wanted is None else (labels >= 0) & wanted
    return _per_scene(probe.nats(targets, labels), there)


def scene_accuracy(
    probe: PatchProbe,
    targets: Float[Tensor, "scenes patches dim"],
    labels: Int[Tensor, "scenes patches"],
    wanted: Bool[Tensor, "scenes patches"],
) -> Float[np.ndarray, " scenes"]:
    """Share of a scene's wanted patches that the probe names rightly, in %."""
    right = probe.logits(targets).argmax(-1) == labels
    return 100 * _per_scene(right.float(), wanted)


def neighbour_accuracy(
    bank: Float[Tensor, "scenes patches dim"],
    bank_labels: Int[Tensor, "scenes patches"],
    targets: Float[Tensor, "others places dim"],
    labels: Int[Tensor, "others places"],
    k: int,
) -> Float[np.ndarray, " others"]:
    """k-NN by cosine: share (%) of a scene's labelled patches whose label most of k labelled patches have."""
    there = bank_labels >= 0
    keys, votes = F.normalize(bank[there], dim=-1), bank_labels[there]
    right = []
    for tokens, truth in zip(F.normalize(targets, dim=-1), labels, strict=True):
        nearest = (tokens @ keys.T).topk(k, -1).indices
        ballots = F.one_hot(votes[nearest], int(votes.max()) + 1).sum(1)
        right.append(ballots.argmax(-1) == truth)
    return 100 * _per_scene(torch.stack(right).float(), labels >= 0)


def raw_patches(scenes: PatchScenes, side: int = 7) -> Float[Tensor, "scenes patches pixels"]:
    """Pixels of every patch, shrunk to side x side: what a probe reads without an encoder."""
    size = GRID * side
    small = F.interpolate(scenes.pixels.float() / 255, (size, size), mode="area")
    return F.unfold(small, side, stride=side).transpose(1, 2)


# How alike targets are --------------------------------------------------------------------------------


def patch_distance() -> Int[Tensor, "patches patches"]:
    """Steps of a king between two patches."""
    place = torch.arange(GRID**2)
    rows, columns = place // GRID, place % GRID
    return torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())


def mean_cosine(
    targets: Float[Tensor, "scenes patches dim"],
    labels: Int[Tensor, "scenes patches"],
    same: bool,
    near: bool,
) -> Float[np.ndarray, " scenes"]:
    """Mean cosine of pairs of labelled patches of a scene, of the same or of different labels.

    Near: side by side or corner to corner. Far: three steps and more apart, so that no window is shared.
    NaN for a scene without such pairs.
    """
    distance = patch_distance()
    apart = distance == 1 if near else distance >= 3
    alike = labels[:, :, None] == labels[:, None]
    there = (labels >= 0)[:, :, None] & (labels >= 0)[:, None]
    wanted = there & apart & (alike if same else ~alike)
    unit = F.normalize(targets, dim=-1)
    return _per_scene((unit @ unit.mT).flatten(1), wanted.flatten(1))


def similarity_maps(
    targets: Float[Tensor, "scenes patches dim"], patches: Sequence[int]
) -> list[Float[np.ndarray, "rows columns"]]:
    """Cosine of one target of each scene with all its targets, as maps."""
    pairs = zip(targets, patches, strict=True)
    maps = [F.cosine_similarity(scene[patch], scene, dim=-1) for scene, patch in pairs]
    return [found.view(GRID, GRID).numpy() for found in maps]


def between_share(
    targets: Float[Tensor, "scenes patches dim"], labels: Int[Tensor, "scenes patches"]
) -> Float[np.ndarray, " scenes"]:
    """Share of a scene's variance over labelled patches that lies between the means of its labels."""
    found = []
    for tokens, names in zip(targets.double(), labels, strict=True):
        x, y = tokens[names >= 0], names[names >= 0]
        centred = x - x.mean(0)
        between = sum(
            int((y == c).sum()) * centred[y == c].mean(0).square().sum() for c in y.unique()
        )
        found.append(float(between / centred.square().sum()))
    return np.array(found)


def effective_rank(targets: Float[Tensor, "scenes patches dim"]) -> float:
    """exp of the entropy of the spectrum of the covariance over all patches."""
    x = targets.flatten(0, 1).double()
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T)).clamp(min=0)
    share = spectrum / spectrum.sum()
    return math.exp(-torch.xlogy(share, share).sum().item())


# All measures of a kind of target -----------------------------------------------------------------------

Sets = Mapping[str, PatchScenes]
"""Scenes by side of the split: "train", "validation" and "test"."""


@dataclass(frozen=True)
class TargetScores:
    """What is measured of one kind of target on the test scenes; arrays over scenes, nan where there is no case.

    Attributes:
        decay: of the probe, chosen on the validation scenes.
        nats: of the class of a labelled patch, by a linear probe.
        boundary: the same, boundary patches alone.
        accuracy: of that probe on patches of objects, %.
        neighbours: accuracy of k-NN on labelled patches, %.
        between: share of the variance that lies between labels.
        cosine: mean cosine of pairs, by ("same" or "different" labels, "near" or "far").
        rank: effective rank over all patches of all test scenes.
    """

    decay: float
    nats: Float[np.ndarray, " scenes"]
    boundary: Float[np.ndarray, " scenes"]
    accuracy: Float[np.ndarray, " scenes"]
    neighbours: Float[np.ndarray, " scenes"]
    between: Float[np.ndarray, " scenes"]
    cosine: dict[tuple[str, str], Float[np.ndarray, " scenes"]]
    rank: float

    def means(self) -> dict[str, float]:
        """Means over the scenes that have a case."""
        found = {
            "nats": self.nats,
            "object_patches": self.accuracy,
            "knn": self.neighbours,
            "between_labels": self.between,
        }
        found |= {f"cosine_{near}_{same}": c for (same, near), c in self.cosine.items()}
        means = {name: float(np.nanmean(values)) for name, values in found.items()}
        return means | {"rank": self.rank, "decay": self.decay}


def measure_targets(
    targets: Mapping[str, Float[Tensor, "scenes patches dim"]],
    scenes: Sets,
    decays: tuple[float, ...],
    steps: int,
    k: int,
) -> TargetScores:
    """Train and choose the probes of one kind of target, and measure it on the test scenes.

    Args:
        targets: of all patches, by side of the split.
        decays: of the probe, to choose from.
        steps: of L-BFGS.
        k: neighbours of k-NN.
    """
    labels = {side: part.labels for side, part in scenes.items()}
    decay, probe = choose_decay(targets, labels, decays, steps)
    shown, truth = targets["test"], labels["test"]
    cosine = {
        (same, near): mean_cosine(shown, truth, same == "same", near == "near")
        for same in ("same", "different")
        for near in ("near", "far")
    }
    return TargetScores(
        decay,
        scene_nats(probe, shown, truth),
        scene_nats(probe, shown, truth, boundary_patches(scenes["test"])),
        scene_accuracy(probe, shown, truth, truth > 0),
        neighbour_accuracy(targets["train"], labels["train"], shown, truth, k),
        between_share(shown, truth),
        cosine,
        effective_rank(shown),
    )


def neighbours_grid(
    scenes: Sets, layers: Iterable[int], kinds: Sequence[str], decay: float, steps: int
) -> tuple[dict[int, dict[str, Float[np.ndarray, " scenes"]]], pd.DataFrame]:
    """Nats of the probe on the test scenes by layer of the encoder and kind of target, and a table of means.

    Args:
        decay: of all probes.
        steps: of L-BFGS.
    """
    train, test = scenes["train"], scenes["test"]
    grid: dict[int, dict[str, np.ndarray]] = {}
    rows = []
    for layer in layers:
        grid[layer] = {}
        for kind in kinds:
            made, shown = (make_targets(kind, x.features[layer], x.colour) for x in (train, test))
            probe = fit_probe(made, train.labels, decay, steps)
            grid[layer][kind] = scene_nats(probe, shown, test.labels)
            far = mean_cosine(shown, test.labels, same=False, near=False)
            row = {"layer": layer, "target": kind, "nats": grid[layer][kind].mean()}
            rows.append(row | {"cosine_far_different": np.nanmean(far)})
    return grid, pd.DataFrame(rows)


def targets_table(
    scores: Mapping[str, TargetScores], drawn: Mapping[str, Sequence[TargetScores]]
) -> pd.DataFrame:
    """Means of every measure, one row a target; `drawn`: targets with several draws, which are averaged."""
    rows = [{"target": kind} | found.means() for kind, found in scores.items()]
    for name, found in drawn.items():
        rows.append(
            {"target": name} | pd.DataFrame([one.means() for one in found]).mean().to_dict()
        )
    return pd.DataFrame(rows)


# Pretrained encoders and time ---------------------------------------------------------------------------


def probe_arm(
    read: Callable[[Tensor], Tensor],
    pixels: Mapping[str, UInt8[Tensor, "mosaics 1 side side"]],
    labels: Mapping[str, Int[Tensor, "mosaics patches"]],
    decay: float,
    steps: int,
    k: int,
) -> tuple[float, float]:
    """Accuracy (%) of a linear probe and of k-NN on labelled patches of test mosaics.

    Args:
        read: pixels to tokens of every patch.
        pixels, labels: mosaics and classes of their patches, by side: "train" and "test".
    """
    with torch.no_grad():
        tokens = {side: read(shown) for side, shown in pixels.items()}
    classes = int(labels["train"].max()) + 1
    probe = fit_probe(tokens["train"], labels["train"], decay, steps, classes)
    there = labels["test"] >= 0
    right = (probe.logits(tokens["test"]).argmax(-1) == labels["test"])[there]
    nearest = neighbour_accuracy(
        tokens["train"], labels["train"], tokens["test"], labels["test"], k
    )
    return 100 * right.double().mean().item(), float(np.nanmean(nearest))


def arms_table(
    trained: JepaModels,
    probes: Mapping[str, Float[np.ndarray, "seeds 2"]],
    of_targets: Mapping[str, Float[np.ndarray, " seeds"]],
    spreads: Mapping[str, Float[np.ndarray, " seeds"]],
    trivial: Mapping[str, Sequence[float]],
) -> pd.DataFrame:
    """Pretrained arms, means over seeds, and what needs no pretraining.

    Args:
        probes: by arm, accuracy (%) of the linear and of the k-NN probe.
        of_targets: by arm, accuracy of the linear probe on the arm's own targets.
        spreads: by arm, spread of the features over pictures.
        trivial: name -> accuracy of both probes.
    """
    rows: list[dict] = []
    for arm, found in probes.items():
        linear = found[:, 0]
        row = {"arm": arm, "patch_probe": linear.mean()}
        row |= {"lowest": linear.min(), "highest": linear.max(), "knn": found[:, 1].mean()}
        row |= {"probe_of_targets": of_targets[arm].mean(), "spread_features": spreads[arm].mean()}
        row |= {"spread_targets": trained.spreads[arm][:, -1].mean().item()}
        rows.append(row | {"last_loss": trained.losses[arm][:, -20:].mean().item()})
    for name, (linear, nearest) in trivial.items():
        rows.append({"arm": name, "patch_probe": linear, "knn": nearest})
    return pd.DataFrame(rows)


def published_multiply_adds(seed: int, batch: int = 256) -> tuple[int, int]:
    """Multiply-adds of a training step of I-JEPA and of DMT-JEPA for one picture, ViT-B/16 at 224 pixels.

    Mask sizes are those of one draw for a batch.
    """
    size, generator = JepaSize(), torch.Generator().manual_seed(seed)
    context, targets = BlockMasks(size.side, size.side).sample(batch, generator)
    blocks, target = targets.shape[1:]
    plain, with_head = (
        step_multiply_adds(size, context.shape[1], blocks, target, head) for head in (False, True)
    )
    return plain, with_head


def timed_steps(
    width: int, batch: int, device: torch.device | str = "cpu"
) -> dict[str, Callable[[], object]]:
    """A training step of I-JEPA and of DMT-JEPA, without the optimiser's, on the grid of the scenes.

    Twelve layers and a predictor of half the width and half the depth, as published.
    """
    heads = max(1, width // 64)
    size = JepaSize(SIZE, PATCH, width, 12, heads, width // 2, 6)
    generator = torch.Generator().manual_seed(0)
    context, targets = BlockMasks(GRID, GRID, fewest=GRID).sample(batch, generator)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator)
    given = [part.to(device) for part in (images, context, targets)]

    def step_of(model: Jepa) -> Callable[[], object]:
        def run() -> None:
            model.zero_grad()
            model.loss(*given).backward()
            model.update_targets(0.996)

        return run

    models = {"I-JEPA": Jepa(size), "DMT-JEPA": Jepa(size, LocalAggregationHead(width, heads))}
    return {name: step_of(model.to(device)) for name, model in models.items()}
