"""What is asked of CrossFormer: which tokens hear of which, lone garments, canvases of another size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.backbones.trained.inline_attention import centred
from reattend.data.images import fashion_mnist
from reattend.studies.inline_attention import nats_and_accuracy
from reattend.studies.pairs import Draw, accuracy
from reattend.training.loop import TrainingPlan, train
from reattend.vision.crossformer import (
    CrossFormer,
    DynamicPositionBias,
    GroupAttention,
    Layout,
    RandomGroupAttention,
    ShiftedWindowAttention,
    SpatialReductionAttention,
)

# Two attentions in a row on one map -----------------------------------------------------------------

TWO_BLOCKS = {
    "full attention": ("full", "full"),
    "SDA, LDA": ("SDA", "LDA"),
    "SDA, random groups": ("SDA", "random"),
    "SDA, shifted windows": ("SDA", "shifted"),
    "SDA twice": ("SDA", "SDA"),
    "LDA twice": ("LDA", "LDA"),
    "spatial reduction": ("reduced", "reduced"),
}
"""What two blocks in a row do, by arm."""


def attention(kind: str, width: int, heads: int, size: int, seed: int) -> nn.Module:
    """One attention on maps of size^2 tokens a side: groups of size x size, interval and reduction `size`.

    Args:
        kind: "full", "SDA", "LDA", "shifted", "random" or "reduced".
        seed: of the random groups.
    """
    if kind == "reduced":
        return SpatialReductionAttention(width, heads, size)
    if kind == "random":
        return RandomGroupAttention(width, heads, size, size, side=size**2, seed=seed)
    if kind == "shifted":
        return ShiftedWindowAttention(width, heads, size)
    groups = {"full": (size**2, 1), "SDA": (size, 1), "LDA": (size, size)}
    return GroupAttention(width, heads, *groups[kind])


@torch.no_grad()
def sees(attentions: Sequence[nn.Module], width: int, side: int) -> Bool[Tensor, "outputs inputs"]:
    """Which tokens of a map an output token depends on after layers with shortcuts, found by moving each."""
    attentions = [layer.double() for layer in attentions]

    def outputs(x: Tensor) -> Tensor:
        for layer in attentions:
            x = x + layer(x)
        return x.flatten(2)

    start = torch.randn(1, width, side, side, generator=Generator().manual_seed(0)).double()
    moved = start.repeat(side**2, 1, 1, 1).flatten(2)
    tokens = torch.arange(side**2)
    moved[tokens, :, tokens] += 1
    changed = outputs(moved.view(-1, width, side, side)) - outputs(start)
    return (changed.abs().amax(1) > 1e-13).T


LONE_SEED = 8
"""First seed of `TokenClassifier`; 0 to 7 were those of earlier runs."""


class TokenClassifier(nn.Module):
    """Two blocks of an arm on maps of size^2 tokens a side, and a class for every token.

    A token is embedded from 8 x 8 pixels of its own, so that it hears of others through attention alone. Takes
    pixels as bytes. Models of one seed start from the same weights, but for spatial reduction.

    Args:
        arm: of `TWO_BLOCKS`.
        size: G and I.
    """

    def __init__(
        self, arm: str, classes: int, width: int, heads: int, size: int, seed: int
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        kinds = TWO_BLOCKS[arm]
        self.network = CrossFormer(
            Layout(width, (2,), (heads,)),
            classes=classes,
            channels=1,
            kernels=(8,),
            intervals=(size,),
            ratio=2,
            std=0.1,
            attention=lambda wide, heads, _, block: attention(
                kinds[block], wide, heads, size, seed
            ),
        )

    def forward(
        self, pixels: UInt8[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch classes rows columns"]:
        features = self.network.features(centred(pixels)).movedim(1, -1)
        return self.network.head(features).movedim(-1, 1)


def steps_to_solve(
    model: nn.Module,
    draw: Draw,
    plan: TrainingPlan,
    seed: int,
    check: tuple[Tensor, Tensor],
    share: float,
    every: int = 25,
) -> tuple[int, bool]:
    """Train a classifier in place on batches that depend on `seed` alone, until it solves its task.

    Args:
        check: inputs and labels; it is solved when `share` per cent of the answers on them are right, which is
            asked after `every` steps, 2 `every`, ...

    Returns:
        Steps taken, at most `plan.steps`, and whether it is solved.
    """
    device = next(model.parameters()).device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = Generator().manual_seed(1_000 + seed)
        while True:
            inputs, labels = draw(generator)
            yield inputs.to(device), labels.to(device)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def solved(model: nn.Module) -> bool:
        return accuracy(model, *check) >= share

    log = train(model, batches(), loss, plan, stop=solved, check_every=every)
    return log.steps, log.stopped_early


def small_garments(
    split: str, classes: Sequence[int], side: int
) -> tuple[UInt8[Tensor, "items 1 side side"], Int[Tensor, " items"]]:
    """Grey Fashion-MNIST pictures of some classes, shrunk, and the numbers 0, 1, ... of their classes."""
    everything, kept = fashion_mnist(), torch.tensor(sorted(classes))
    part = everything.subset(everything.indices(split))
    chosen = torch.isin(part.labels, kept)
    grey = part.pixels[chosen][:, :1].float()
    shrunk = F.interpolate(grey, size=side, mode="bilinear", antialias=True)
    return shrunk.round().to(torch.uint8), torch.searchsorted(kept, part.labels[chosen])


# Networks on canvases -------------------------------------------------------------------------------


@torch.no_grad()
def canvas_scores(
    model: CrossFormer,
    pixels: UInt8[Tensor, "items 1 height width"],
    labels: Int[Tensor, " items"],
    batch: int = 250,
) -> tuple[float, float]:
    """Mean nats of the right class, and the share of canvases that are classified rightly in per cent."""
    device = model.head.weight.device
    logits = torch.cat([model(centred(part).to(device)).cpu() for part in pixels.split(batch)])
    return nats_and_accuracy(logits, labels)


def enlarged(
    pixels: UInt8[Tensor, "items 1 side side"], side: int
) -> UInt8[Tensor, "items 1 larger larger"]:
    """Canvases at a higher resolution (bilinear)."""
    grown = F.interpolate(pixels.float(), size=side, mode="bilinear")
    return grown.round().to(torch.uint8)


def on_larger_canvas(
    pixels: UInt8[Tensor, "items 1 side side"], side: int, seed: int
) -> UInt8[Tensor, "items 1 larger larger"]:
    """Canvases at random places of larger black ones."""
    old = pixels.shape[-1]
    places = torch.randint(
        side - old + 1, (2, len(pixels)), generator=Generator().manual_seed(seed)
    )
    rows, columns = (start[:, None] + torch.arange(old) for start in places)
    grown = pixels.new_zeros(len(pixels), 1, side, side)
    items = torch.arange(len(pixels))[:, None, None]
    grown[items, 0, rows[:, :, None], columns[:, None]] = pixels[:, 0]
    return grown


@contextmanager
def groups_of(model: CrossFormer, size: int, clamp: int | None = None) -> Iterator[CrossFormer]:
    """A network whose groups have another size, inside this block.

    Args:
        clamp: cut the offsets that DPB reads to this.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GroupAttention)]
    biases = [m for m in model.modules() if isinstance(m, DynamicPositionBias)] if clamp else []
    before = [layer.size for layer in layers], [bias.clamp for bias in biases]
    for layer in layers:
        layer.size = size
    for bias in biases:
        bias.clamp = clamp
    try:
        yield model
    finally:
        for layer, old in zip(layers, before[0], strict=True):
            layer.size = old
        for bias, old in zip(biases, before[1], strict=True):
            bias.clamp = old
