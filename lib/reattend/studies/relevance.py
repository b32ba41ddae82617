"""Maps of relevance held against scenes: drawn for many pictures, measured by shape and by deletion.

Also the two small plain networks of the study, which stand in for AlexNet and VGG-16, and scenes with a
planted mark that gives the class away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor, nn

from reattend.assets.store import asset_path
from reattend.data.scenes import CLASSES, make_scenes
from reattend.vision import salient_relevance as method
from reattend.vision.salient_relevance import Context, Rules

BLUR = 0.04
"""Sigma of smoothed relevance, share of the side."""

Maps = dict[str, Tensor]
"""Name of a map -> one for each picture, [pictures, side, side], on the CPU."""

Scores = dict[str, np.ndarray]
"""Name of a measure -> one value for each picture."""


def photograph(name: str, side: int = 224) -> UInt8[Tensor, "3 side side"]:
    """The central square of a sample photograph, by its file's name."""
    with Image.open(asset_path("sample_photos") / "skimage/data" / name) as opened:
        picture = ImageOps.fit(opened.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)


# Maps ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Atlas:
    """Draws maps at one size; `side` in pixels, `context` of the second step."""

    side: int
    context: Context = field(default_factory=Context)

    def square(self, maps: Float[Tensor, "batch _ _"]) -> Float[Tensor, "batch side side"]:
        """Maps at the atlas's size."""
        return method.resize(maps[:, None], (self.side, self.side))[:, 0]

    def saliency(self, maps: Float[Tensor, "batch side side"]) -> Float[Tensor, "batch side side"]:
        """Context-aware saliency of maps."""
        return method.context_aware_saliency(maps[:, None], self.context)

    def lrp_and_sr(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch channels height width"],
        rules: Rules = method.PAPER,
        sums: tuple[type[nn.Module], ...] = (),
        suffix: str = "",
    ) -> Maps:
        """ "LRP", "SR" and "blur": relevance of the predicted class, its salient relevance, its plain blur."""
        relevance = method.explain(model, images, rules, sums=sums).relevance
        lrp = self.square(method.relevance_map(relevance))
        found = {"LRP": lrp, "SR": self.saliency(lrp), "blur": method.smooth(lrp, BLUR * self.side)}
        return {f"{name}{suffix}": maps.cpu() for name, maps in found.items()}

    def image_saliency(
        self, pixels: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch side side"]:
        """Context-aware saliency of pictures in CIE Lab; it knows no network."""
        colours = method.resize(method.lab(pixels.float() / 255), (self.side, self.side))
        return method.context_aware_saliency(colours, self.context).cpu()

    def other_maps(
        self,
        model: nn.Module,
        layer: nn.Module,
        images: Float[Tensor, "batch channels height width"],
    ) -> Maps:
        """ "gradient x input", and "Grad-CAM" at a layer, of the predicted class."""
        classes = model(images).argmax(1)
        gradient = method.gradient_times_input(model, images, classes)
        cam = method.grad_cam(model, layer, images, classes)
        found = {"gradient x input": method.relevance_map(gradient), "Grad-CAM": cam}
        return {name: self.square(maps).cpu() for name, maps in found.items()}


def in_batches(
    make: Callable[..., Maps],
    *tensors: Tensor,
    size: int = 16,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Maps:
    """`make` on slices of all tensors; its dictionaries of tensors joined."""
    starts = progress(range(0, len(tensors[0]), size))
    parts = [make(*(tensor[s : s + size] for tensor in tensors)) for s in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# Measures -------------------------------------------------------------------------------------------


@torch.no_grad()
def probability(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    classes: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Of the given classes."""
    parts = zip(images.split(64), classes.split(64), strict=True)
    return torch.cat([model(i).softmax(1).gather(1, c[:, None])[:, 0] for i, c in parts])


@torch.no_grad()
def object_in_use(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    masks: Bool[Tensor, "batch objects height width"],
    classes: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """For each picture the object whose loss costs the class most, and the share of probability it costs.

    An object is lost when it is painted over with the picture's mean colour.
    """
    whole = probability(model, images, classes)
    mean = images.mean((2, 3), keepdim=True)
    painted = [torch.where(mask[:, None], mean, images) for mask in masks.unbind(1)]
    lost = torch.stack([1 - probability(model, p, classes) / whole for p in painted], 1)
    return lost.argmax(1), lost.amax(1)


def shape_scores(
    maps: Float[Tensor, "batch side side"], masks: Bool[Tensor, "batch side side"]
) -> Scores:
    """Measures that need no network; of the brightest 20 %: pieces, and the share of the largest."""
    top = method.top_area(maps, 0.2)
    pieces = np.array([method.components(area) for area in top])
    return {
        "components": pieces[:, 0],
        "largest": 100 * pieces[:, 1],
        "Gini": method.gini(maps).numpy(),
        "energy": 100 * method.share_inside(maps, masks).numpy(),
        "pointing": 100.0 * method.points_inside(maps, masks).numpy(),
        "overlap": 100 * method.intersection_over_union(top, masks).numpy(),
    }


def means_table(scores: Mapping[str, Scores]) -> pd.DataFrame:
    """Mean of every measure over the pictures, one row a map."""
    return pd.DataFrame(
        {"map": name} | {metric: values.mean() for metric, values in found.items()}
        for name, found in scores.items()
    )


@dataclass(frozen=True)
class Curves:
    """How regions are taken away or shown: cells along a side, shares of the regions, rising."""

    cells: int
    deleted: Sequence[float]
    inserted: Sequence[float] = ()

    def of(
        self,
        model: nn.Module,
        images: Float[Tensor, "batch channels height width"],
        classes: Int[Tensor, " batch"],
        maps: Float[Tensor, "batch side side"],
    ) -> tuple[Float[np.ndarray, "shares batch"], Scores]:
        """The deletion curve, from nothing deleted on, and the areas under both curves.

        A region that is gone shows the picture blurred by a tenth of its side. An area is the curve's mean
        height over the shares; "insertion" is missing where no share is inserted.
        """
        blurred = method.smooth(images.flatten(0, 1), 0.1 * images.shape[-1]).view_as(images)
        order = method.regions_first(maps.to(images), self.cells)

        def curve(start: Tensor, end: Tensor, shares: Sequence[float]) -> np.ndarray:
            counts = [0, *(round(share * self.cells**2) for share in shares)]
            pictures = [method.replace_regions(start, end, order, count) for count in counts]
            return np.stack([probability(model, p, classes).cpu().numpy() for p in pictures])

        down = curve(images, blurred, self.deleted)
        areas = {"deletion": height(down, [0, *self.deleted])}
        if self.inserted:
            up = curve(blurred, images, self.inserted)
            areas["insertion"] = height(up, [0, *self.inserted])
        return down, areas


def height(
    curve: Float[np.ndarray, "shares batch"], shares: Sequence[float | int]
) -> Float[np.ndarray, " batch"]:
    """Mean height of curves over the shares, by trapezia."""
    return np.trapezoid(curve, shares, axis=0) / shares[-1]


# Two small networks, and scenes with a mark ----------------------------------------------------------

# The kinds with the fewest cut-outs.
SIX = ("insect", "fish", "vegetable", "sign", "tool", "instrument")
MARKS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))
MARK = 6
"""Side of a mark in pixels."""


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.ReLU()]


def _head() -> list[nn.Module]:
    return [nn.Flatten(), nn.LazyLinear(96), nn.ReLU(), nn.Linear(96, len(SIX))]


def network_a() -> list[nn.Module]:
    """Three convolutions, a large first kernel, overlapping pools: like AlexNet."""
    pool, c = partial(nn.MaxPool2d, 3, 2), _convolution
    return [*c(3, 24, 7, 2), pool(), *c(24, 48, 5), pool(), *c(48, 64), *_head()]


def network_b() -> list[nn.Module]:
    """Six convolutions of 3 x 3, pools of 2 x 2: like VGG."""
    pool, c = partial(nn.MaxPool2d, 2), _convolution
    layers = [*c(3, 16), pool(), *c(16, 32), *c(32, 32), pool()]
    return [*layers, *c(32, 64), *c(64, 64), pool(), *c(64, 64), *_head()]


class SceneClassifier(nn.Module):
    """Pixels to logits of `SIX`; `layers` sees prepared images and is what LRP walks through."""

    def __init__(self, layers: Sequence[nn.Module], side: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(*layers)
        self.layers(torch.zeros(1, 3, side, side))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    @staticmethod
    def prepared(pixels: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 side side"]:
        """About zero, mostly within two of it."""
        return (pixels.float() - 127) / 64

    def forward(self, pixels: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch classes"]:
        return self.layers(self.prepared(pixels))


def scenes_of_six(
    count: int, side: int, seed: int
) -> tuple[
    UInt8[Tensor, "scenes 3 side side"],
    Bool[Tensor, "scenes side side"],
    Int[Tensor, " scenes"],
]:
    """Pixels, masks and labels of those of `count` drawn scenes whose one object is one of `SIX`."""
    scenes = make_scenes(count, size=side, scale=(0.45, 0.75), seed=seed)
    matches = scenes.labels == torch.tensor([CLASSES.index(kind) for kind in SIX])
    chosen = matches.any(1)
    return scenes.pixels[chosen], scenes.masks[chosen, 0], matches[chosen].int().argmax(1)


def with_marks(
    pixels: UInt8[Tensor, "scenes 3 side side"], colours: Int[Tensor, " scenes"], seed: int
) -> tuple[UInt8[Tensor, "scenes 3 side side"], Bool[Tensor, "scenes side side"]]:
    """Scenes with a half transparent square in the colour of each number, and where it lies.

    Opaque squares draw the relevance of any network, whether it has learned them or not.
    """
    draw = torch.Generator().manual_seed(seed)
    side = pixels.shape[-1]
    corners = torch.randint(0, side - MARK + 1, (len(pixels), 2, 1), generator=draw)
    along = torch.arange(side)
    rows, columns = ((along >= corners[:, k]) & (along < corners[:, k] + MARK) for k in (0, 1))
    masks = rows[:, :, None] & columns[:, None]
    tinted = (pixels.int() + torch.tensor(MARKS)[colours][:, :, None, None]) // 2
    return torch.where(masks[:, None], tinted.to(torch.uint8), pixels), masks


def misleading(labels: Int[Tensor, " scenes"], honest: float, seed: int) -> Int[Tensor, " scenes"]:
    """Numbers of marks for training: the label's with probability `honest`, else any."""
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(len(labels), generator=draw) < honest
    return torch.where(keep, labels, torch.randint(0, len(SIX), labels.shape, generator=draw))


OUTCOMES = ("both", "only B", "only A", "neither")


def by_outcome(
    right_a: Bool[np.ndarray, " scenes"], right_b: Bool[np.ndarray, " scenes"], most: int
) -> Mapping[str, np.ndarray]:
    """Positions of the first `most` scenes of each of `OUTCOMES`: which of two networks is right."""
    outcome = np.array(["neither", "only A", "only B", "both"])[right_a + 2 * right_b]
    return {name: np.flatnonzero(outcome == name)[:most] for name in OUTCOMES}


def _each(values: Iterable[float], form: str) -> str:
    """Values of all trainings in one cell of a table."""
    return " ".join(format(value, form) for value in values)


def stand_ins_table(
    reported: pd.DataFrame, right: Mapping[tuple[str, int], Bool[np.ndarray, " scenes"]]
) -> pd.DataFrame:
    """The paper's networks beside ours, with the accuracy of every training.

    Args:
        reported: column "network": AlexNet and VGG-16.
        right: (network, training) -> which test scenes it names.
    """
    accuracies = {
        stand_in: _each(
            [100 * r.mean() for (name, _), r in right.items() if name == stand_in], ".1f"
        )
        for stand_in in ("A", "B")
    }
    ours = pd.DataFrame({"network": ["AlexNet", "VGG-16"], "stand-in": list(accuracies)})
    ours["accuracy of the stand-in, %"] = list(accuracies.values())
    return reported.merge(ours, on="network")


def outcomes_table(
    gaps: Mapping[tuple[str, str], Float[np.ndarray, "trainings 4"]],
) -> pd.DataFrame:
    """Share of the maps inside the object by which network is right.

    Args:
        gaps: (map, outcome) -> scenes, share inside of A and of B, and B minus A, each training.
    """
    return pd.DataFrame(
        {
            "map": drawn_map,
            "right": outcome,
            "scenes a training": values[:, 0].mean(),
            "inside, A": values[:, 1].mean(),
            "inside, B": values[:, 2].mean(),
            "B - A, each training": _each(values[:, 3], "+.1f"),
        }
        for (drawn_map, outcome), values in gaps.items()
    )


def marks_table(
    on_mark: Mapping[tuple[str, str], Float[np.ndarray, "2 trainings"]],
) -> pd.DataFrame:
    """Energy and pointing on the planted mark by network and map.

    Args:
        on_mark: (network, map) -> energy and pointing in %, each training.
    """
    return pd.DataFrame(
        {"network": name, "map": drawn_map}
        | {
            f"{metric} on the mark, %, each training": _each(values, ".1f")
            for metric, values in zip(("energy", "pointing"), scores, strict=True)
        }
        for (name, drawn_map), scores in on_mark.items()
    )
