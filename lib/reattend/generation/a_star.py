"""A-STAR: test-time attention segregation and retention for text-to-image synthesis (arXiv 2306.14544).

Two losses on the cross-attention maps of the words that name the concepts of a prompt. Before every step of
sampling the latent takes one step down their gradient; no weight changes.

    segregation (Eq. 2)   overlap of the maps of each pair of concepts
    retention (Eq. 3)     1 - overlap of each concept's map with its own active region at the step before

Beside it Attend-and-Excite (arXiv 2301.13826), which raises the weakest concept's highest value. All work on
any model of `reattend.trunks.diffusion`; each sample of a batch has a loss of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reattend.trunks.diffusion import DiffusionUNet, EncodedText, MapRecorder

Loss = Callable[[Float[Tensor, "batch concepts rows columns"], Tensor | None], Tensor]
"""From the concepts' maps and the masks of the step before (None at the first) to one number a sample."""


# --- maps ------------------------------------------------------------------------------------------


def processed_maps(
    weights: Float[Tensor, "batch places tokens"], words: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens rows columns"]:
    """Maps of all tokens as the losses read them: shares among the words, smoothed.

    Attention on tokens that are no words (the start, the end, padding) is dropped and the rest brought to sum
    one at every place; then a 3 x 3 Gaussian with reflected borders.
    """
    kept = weights * words[:, None, :]
    shares = kept / kept.sum(-1, keepdim=True).clamp(min=1e-9)
    side = round(weights.shape[1] ** 0.5)
    return smoothed(shares.transpose(1, 2).unflatten(-1, (side, side)))


def smoothed(
    maps: Float[Tensor, "batch tokens rows columns"], deviation: float = 0.5**0.5
) -> Float[Tensor, "batch tokens rows columns"]:
    """3 x 3 Gaussian with reflected borders.

    Attend-and-Excite's code calls its smoothing one of s.d. .5, but its exponent is (x / 2 s)^2: .71.
    """
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * deviation**2)).to(maps)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), "reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0].unflatten(0, maps.shape[:2])


def of_concepts(
    maps: Float[Tensor, "batch tokens rows columns"], concepts: Int[Tensor, "batch concepts"]
) -> Float[Tensor, "batch concepts rows columns"]:
    """The maps of the tokens at these positions of each caption."""
    return maps[torch.arange(len(maps))[:, None], concepts]


# --- losses ----------------------------------------------------------------------------------------


def overlap(
    first: Float[Tensor, "*batch rows columns"], second: Float[Tensor, "*batch rows columns"]
) -> Float[Tensor, "*batch"]:
    """sum min(A, B) / sum (A + B): the paper's "IoU"; one half for equal maps, 0 for disjoint ones."""
    shared = torch.minimum(first, second).sum((-2, -1))
    return shared / (first + second).sum((-2, -1)).clamp(min=1e-9)


def segregation_loss(
    maps: Float[Tensor, "batch concepts rows columns"],
) -> Float[Tensor, " batch"]:
    """Eq. 2: the sum of the overlaps of all pairs of concepts; 0 for a single one."""
    one, other = torch.triu_indices(maps.shape[1], maps.shape[1], 1)
    return overlap(maps[:, one], maps[:, other]).sum(1)


def retention_loss(
    maps: Float[Tensor, "batch concepts rows columns"],
    masks: Float[Tensor, "batch concepts rows columns"],
) -> Float[Tensor, " batch"]:
    """Eq. 3: the sum over concepts of 1 - overlap with the mask, each map brought to maximum one before.

    Bringing to maximum one is not in the paper: a map far below one against a mask of zeros and ones has next
    to no overlap, whatever its shape.
    """
    heights = maps.amax((-2, -1), keepdim=True).clamp(min=1e-9)
    return (1 - overlap(maps / heights, masks)).sum(1)


def excitement_loss(
    maps: Float[Tensor, "batch concepts rows columns"],
) -> Float[Tensor, " batch"]:
    """Attend-and-Excite: 1 - the highest value of the concept whose highest value is least."""
    return (1 - maps.amax((-2, -1)).amin(1)).clamp(min=0)


# --- active regions --------------------------------------------------------------------------------


def active_regions(
    maps: Float[Tensor, "batch concepts rows columns"],
) -> Float[Tensor, "batch concepts rows columns"]:
    """1 where a map lies above its Otsu threshold and hangs together with its peak, else 0; no gradient."""
    maps = maps.detach()
    above = maps > otsu_threshold(maps.flatten(-2))[..., None, None]
    return _with_peak(maps, above).to(maps)


def half_height_regions(
    maps: Float[Tensor, "batch concepts rows columns"],
) -> Float[Tensor, "batch concepts rows columns"]:
    """1 where a map is at least half as high as its peak, else 0; no gradient."""
    maps = maps.detach()
    return (maps >= 0.5 * maps.amax((-2, -1), keepdim=True)).to(maps)


def otsu_threshold(values: Float[Tensor, "*batch items"]) -> Float[Tensor, "*batch"]:
    """The value that splits a set into "at most" and "above" with the largest variance between the two."""
    ordered = values.sort(-1).values
    count = values.shape[-1]
    below = torch.arange(1, count).to(values)
    running = ordered.cumsum(-1)
    low = running[..., :-1] / below
    high = (running[..., -1:] - running[..., :-1]) / (count - below)
    between = below * (count - below) * (high - low).square()
    return ordered.gather(-1, between.argmax(-1, keepdim=True))[..., 0]


def _with_peak(
    maps: Float[Tensor, "batch concepts rows columns"],
    above: Bool[Tensor, "batch concepts rows columns"],
) -> Bool[Tensor, "batch concepts rows columns"]:
    """The 4-connected component of `above` that holds each map's highest place."""
    reached = F.one_hot(maps.flatten(-2).argmax(-1), maps[0, 0].numel()).bool().view_as(maps)
    while True:
        padded = F.pad(reached, (1, 1, 1, 1))
        spread = padded[..., :-2, 1:-1] | padded[..., 2:, 1:-1]
        spread |= padded[..., 1:-1, :-2] | padded[..., 1:-1, 2:]
        grown = reached | (spread & above)
        if torch.equal(grown, reached):
            return reached
        reached = grown


# --- updates during sampling -----------------------------------------------------------------------


@dataclass
class LatentUpdates:
    """Moves the latent down a loss on attention maps before each step; pass it as `sample(before_step=...)`.

    Attributes:
        loss: of the concepts' maps and the masks of the step before.
        concepts: positions of the concepts in each caption.
        words: which tokens of each caption are words.
        blocks: names of the UNet's blocks whose maps are averaged.
        sizes: factor of the gradient at each step; 0 leaves the latent as it is.
        regions: from maps to the masks that the next step is given; None: no masks.
        lenders: whose masks each sample is given; None: its own.
        refine: by step, the peak that the weakest concept must reach before the step, as Attend-and-Excite
            asks for; up to `most` further updates.
        track: keeps the maps of all tokens that each step starts from in `history`.
    """

    model: DiffusionUNet
    loss: Loss
    concepts: Int[Tensor, "batch concepts"]
    words: Bool[Tensor, "batch tokens"]
    blocks: tuple[str, ...]
    sizes: Sequence[float]
    regions: Callable[[Tensor], Tensor] | None = None
    lenders: Int[Tensor, " batch"] | None = None
    refine: dict[int, float] = field(default_factory=dict)
    most: int = 20
    track: bool = False
    history: list[Tensor] = field(default_factory=list)
    passes: int = 0
    """Samples that were passed through the UNet with a gradient so far."""
    _masks: Tensor | None = None

    def __call__(
        self,
        step: int,
        latent: Float[Tensor, "batch 3 side side"],
        time: Float[Tensor, " batch"],
        text: EncodedText,
    ) -> Float[Tensor, "batch 3 side side"]:
        if step == 0:
            self._masks, self.passes = None, 0
            self.history.clear()
        if step in self.refine:
            latent = self._refined(step, latent, time, text)
        gradient, maps = self._gradient(latent, time, text, self._masks)
        if self.track:
            self.history.append(maps)
        if self.regions is not None:
            masks = self.regions(of_concepts(maps, self.concepts))
            self._masks = masks if self.lenders is None else masks[self.lenders]
        return latent if self.sizes[step] == 0 else latent - self.sizes[step] * gradient

    def _gradient(
        self,
        latent: Tensor,
        time: Tensor,
        text: EncodedText,
        masks: Tensor | None,
        rows: Tensor | slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """Gradient of each sample's loss to its latent, and the maps of all tokens."""
        recorder = MapRecorder(("cross",), self.blocks)
        self.passes += len(latent)
        with torch.enable_grad():
            moving = latent.detach().requires_grad_()
            self.model(moving, time, text, recorder.hooks)
            maps = processed_maps(recorder.mean("cross"), self.words[rows])
            total = self.loss(of_concepts(maps, self.concepts[rows]), masks).sum()
            if not total.requires_grad:  # a loss that reads nothing of the latent
                return torch.zeros_like(latent), maps.detach()
            (gradient,) = torch.autograd.grad(total, moving)
        return gradient, maps.detach()

    def _refined(self, step: int, latent: Tensor, time: Tensor, text: EncodedText) -> Tensor:
        """Further updates of those samples whose weakest concept has not reached the step's peak."""
        left, latent = torch.arange(len(latent)), latent.clone()
        for _ in range(self.most):
            part = EncodedText(text.states[left], text.mask[left])
            gradient, maps = self._gradient(latent[left], time[left], part, None, left)
            peaks = of_concepts(maps, self.concepts[left]).amax((-2, -1)).amin(1)
            short = peaks < self.refine[step]
            if not short.any():
                break
            left, gradient = left[short], gradient[short]
            latent[left] = latent[left] - self.sizes[step] * gradient
        return latent


def step_sizes(scale: float, steps: int) -> list[float]:
    """`scale` times sqrt(linspace(1, .5)), as Attend-and-Excite's code has it (there the scale is 20)."""
    return (scale * torch.linspace(1, 0.5, steps).sqrt()).tolist()
