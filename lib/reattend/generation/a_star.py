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
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.generation.word_maps import joined_to_peak, otsu_threshold, overlap, smooth
from reattend.trunks.diffusion import AttentionHooks, DiffusionUNet, EncodedText, Kind, MapRecorder

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
    return smooth(shares.transpose(1, 2).unflatten(-1, (side, side)))


def of_concepts(
    maps: Float[Tensor, "batch tokens rows columns"], concepts: Int[Tensor, "batch concepts"]
) -> Float[Tensor, "batch concepts rows columns"]:
    """The maps of the tokens at these positions of each caption."""
    return maps[torch.arange(len(maps))[:, None], concepts]


# --- losses ----------------------------------------------------------------------------------------


def segregation_loss(
    maps: Float[Tensor, "batch concepts rows columns"],
) -> Float[Tensor, " batch"]:
    """Eq. 2: the sum of the overlaps of all pairs of concepts; 0 for a single one.

    The overlap is what the paper calls "IoU": one half for equal maps.
    """
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
    return joined_to_peak(maps, above).to(maps)


def half_height_regions(
    maps: Float[Tensor, "batch concepts rows columns"],
) -> Float[Tensor, "batch concepts rows columns"]:
    """1 where a map is at least half as high as its peak, else 0; no gradient."""
    maps = maps.detach()
    return (maps >= 0.5 * maps.amax((-2, -1), keepdim=True)).to(maps)


# --- updates during sampling -----------------------------------------------------------------------


class _AllSeenError(Exception):
    """Ends a pass through the UNet whose output nobody reads."""


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
        scramble: seed of a fixed turn of each sample's gradients, see `scrambled`; None: the gradients as they are.
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
    scramble: int | None = None
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
        if self.sizes[step] == 0:
            maps = self._maps(latent, time, text)
        else:
            gradient, maps = self._gradient(latent, time, text, self._masks)
            if self.scramble is not None:
                gradient = scrambled(gradient, self.scramble)
            latent = latent - self.sizes[step] * gradient
        if self.track:
            self.history.append(maps)
        if self.regions is not None:
            masks = self.regions(of_concepts(maps, self.concepts))
            self._masks = masks if self.lenders is None else masks[self.lenders]
        return latent

    def _maps(
        self, latent: Tensor, time: Tensor, text: EncodedText, rows: Tensor | slice = slice(None)
    ) -> Tensor:
        """Maps of all tokens; what the UNet does after the last of the blocks is left out."""
        recorder = MapRecorder(("cross",), self.blocks)
        last = [name for name in self.model.blocks if name in self.blocks][-1]

        def keep(block: str, kind: Kind, weights: Tensor) -> None:
            recorder.hooks.on_map(block, kind, weights)
            if (block, kind) == (last, "cross"):
                raise _AllSeenError

        with suppress(_AllSeenError):
            self.model(latent, time, text, AttentionHooks(on_map=keep))
        return processed_maps(recorder.mean("cross"), self.words[rows])

    def _gradient(
        self,
        latent: Tensor,
        time: Tensor,
        text: EncodedText,
        masks: Tensor | None,
        rows: Tensor | slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """Gradient of each sample's loss to its latent, and the maps of all tokens."""
        self.passes += len(latent)
        with torch.enable_grad():
            moving = latent.detach().requires_grad_()
            maps = self._maps(moving, time, text, rows)
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


def scrambled(gradient: Float[Tensor, "batch ..."], seed: int) -> Float[Tensor, "batch ..."]:
    """Each sample's elements in an order and with signs of their own, both fixed by the seed.

    A turn of the space of latents, the same at every step: lengths, and angles between the gradients of different
    steps, stay as they are; where the gradient points is lost.
    """
    flat, generator = gradient.flatten(1), torch.Generator().manual_seed(seed)
    order = torch.rand(flat.shape, generator=generator).argsort(-1).to(flat.device)
    signs = torch.randint(0, 2, flat.shape, generator=generator).to(flat) * 2 - 1
    return (flat.gather(1, order) * signs).view_as(gradient)


def step_sizes(scale: float, steps: int) -> list[float]:
    """`scale` times sqrt(linspace(1, .5)), as Attend-and-Excite's code has it (there the scale is 20)."""
    return (scale * torch.linspace(1, 0.5, steps).sqrt()).tolist()
