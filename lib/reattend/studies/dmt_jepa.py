"""Targets of joint-embedding prediction on a real frozen encoder: which neighbours, and how discriminative.

Scenes of several real cut-outs tell for every patch what it shows. A second set takes the colours away: grey,
and every object with the mean and contrast of what surrounds it, so that brightness tells objects apart less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from reattend.backbones.pretrained.vit import PATCH, configuration, hidden_states
from reattend.data.scenes import CLASSES, SceneSettings, Scenes, make_scenes
from reattend.vision.dmt_jepa import (
    choose_neighbours,
    gather_patches,
    mean_of_chosen,
    neighbour_similarity,
    neighbour_table,
)

SIZE = 112  # pixels
GRID = SIZE // PATCH
SCENES = SceneSettings(size=SIZE, objects=(4, 6), scale=(0.4, 0.6), overlap=0.5)
PURE = 0.8  # share of a patch that one thing must cover for the patch to have a label
DIRECT = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.float32)
"""Scores by which the four patches above, left, right and below are chosen of a 3 x 3 window."""

# Scenes -----------------------------------------------------------------------------------------------


def patch_labels(
    masks: Bool[Tensor, "scenes objects height width"], labels: Int[Tensor, "scenes objects"]
) -> Int[Tensor, "scenes patches"]:
    """What each patch shows: 0 background, 1.. the class of an object plus one, -1 no one thing.

    Two objects of one class share a label.
    """
    classes = labels.max().item() + 1
    there = F.one_hot(labels.clamp(min=0), classes) * (labels >= 0)[..., None]
    shown = torch.einsum("sohw,soc->schw", masks.float(), there.float())
    background = 1 - masks.any(1, keepdim=True).float()
    shares = F.avg_pool2d(torch.cat([background, shown], 1), PATCH).flatten(2)
    most, label = shares.max(1)
    return torch.where(most > PURE, label, -1)


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
        labels: what each patch shows (`patch_labels`).
        colour: mean colour of each patch, 0..1.
        features: layer -> layer-normalised tokens of each patch.
    """

    pixels: UInt8[Tensor, "scenes 3 height width"]
    labels: Int[Tensor, "scenes patches"]
    colour: Float[Tensor, "scenes patches 3"]
    features: dict[int, Float[Tensor, "scenes patches dim"]]

    def first(self, count: int) -> PatchScenes:
        """The first `count` scenes."""
        kept = {layer: tokens[:count] for layer, tokens in self.features.items()}
        return replace(
            self,
            pixels=self.pixels[:count],
            labels=self.labels[:count],
            colour=self.colour[:count],
            features=kept,
        )


def patch_scenes(
    model: Dinov2Model,
    count: int,
    split: str,
    seed: int,
    layers: tuple[int, ...],
    camouflage: bool = False,
    batch: int = 32,
) -> PatchScenes:
    """Scenes of one side of the split, read by an encoder; those of a smaller count are the first ones."""
    scenes = make_scenes(count, SCENES, split=split, seed=seed)
    pixels = camouflaged(scenes) if camouflage else scenes.pixels
    states = torch.cat(
        [hidden_states(model, part.to(model.device), layers, SIZE) for part in pixels.split(batch)],
        1,
    )
    tokens = F.layer_norm(states[:, :, 1:], states.shape[-1:])
    colour = F.avg_pool2d(pixels.float() / 255, PATCH).flatten(2).transpose(1, 2)
    labels = patch_labels(scenes.masks, scenes.labels)
    return PatchScenes(pixels, labels, colour, dict(zip(layers, tokens, strict=True)))


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


def boundary_patches(labels: Int[Tensor, "scenes patches"]) -> Bool[Tensor, "scenes patches"]:
    """Patches off the picture's border with a label of their own and another one among their neighbours."""
    index, present = table()
    around = labels[:, index]
    other = ((around >= 0) & (around != labels[..., None])).any(-1)
    return (labels >= 0) & present.all(-1) & other


def purity(
    labels: Int[Tensor, "scenes patches"], index: Int[Tensor, "scenes patches k"]
) -> Float[np.ndarray, " scenes"]:
    """Share of the chosen neighbours that show what the patch shows, mean over a scene's boundary patches.

    NaN for a scene without any.
    """
    same = gather_patches(labels[..., None], index)[..., 0] == labels[..., None]
    return _per_scene(same.float().mean(-1), boundary_patches(labels))


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


def neighbour_accuracy(
    bank: Float[Tensor, "scenes patches dim"],
    bank_labels: Int[Tensor, "scenes patches"],
    targets: Float[Tensor, "others patches dim"],
    labels: Int[Tensor, "others patches"],
    k: int,
) -> Float[np.ndarray, " others"]:
    """k-NN by cosine: share of a scene's labelled patches whose label most of k labelled patches have."""
    there = bank_labels >= 0
    keys, votes = F.normalize(bank[there], dim=-1), bank_labels[there]
    right = []
    for tokens, truth in zip(F.normalize(targets, dim=-1), labels, strict=True):
        nearest = (tokens @ keys.T).topk(k, -1).indices
        ballots = F.one_hot(votes[nearest], int(votes.max()) + 1).sum(1)
        right.append(ballots.argmax(-1) == truth)
    return _per_scene(torch.stack(right).float(), labels >= 0)


# How alike targets are --------------------------------------------------------------------------------


def patch_distance() -> Int[Tensor, "patches patches"]:
    """Steps of a king between two patches."""
    place = torch.arange(GRID**2)
    rows, columns = place // GRID, place % GRID
    return torch.maximum(
        (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    )


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


Targets = Callable[[Tensor, Tensor], Tensor]
