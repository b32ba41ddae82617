"""What is asked of A-STAR: prompts of two things drawn by several methods from the same noises, and judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from reattend.backbones.scene_judge import Judgement, SceneJudge
from reattend.data.prompt_scenes import (
    END,
    NOUN_AT,
    Prompts,
    category,
    empty_captions,
)
from reattend.generation.a_star import (
    LatentUpdates,
    Loss,
    active_regions,
    excitement_loss,
    half_height_regions,
    of_concepts,
    overlap,
    processed_maps,
    retention_loss,
    segregation_loss,
    step_sizes,
)
from reattend.trunks.diffusion import AttentionHooks, DiffusionUNet, sample

FUNCTION_WORDS_AT = (1, 4)
"""Positions of the first "a" and of "and"."""

# What is drawn --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Prompts, each with several noises, and how they are drawn; the same for all methods.

    Attributes:
        prompts: one for each picture.
        item: number of each picture's prompt.
        chunk: pictures that are drawn together.
    """

    model: DiffusionUNet
    judge: SceneJudge
    prompts: Prompts
    item: Int[Tensor, " pictures"]
    noise: Float[Tensor, "pictures 3 side side"]
    steps: int
    guidance: float
    chunk: int = 128

    @classmethod
    def of(
        cls,
        model: DiffusionUNet,
        judge: SceneJudge,
        prompts: Prompts,
        noises: int,
        seed: int,
        *,
        steps: int,
        guidance: float,
    ) -> Bench:
        """`noises` pictures of each prompt, from the noises of a seed."""
        item = torch.arange(len(prompts)).repeat_interleave(noises)
        side, generator = model.shape.side, Generator().manual_seed(seed)
        noise = torch.randn(len(item), 3, side, side, generator=generator)
        return cls(model, judge, prompts[item], item, noise, steps, guidance)

    def __len__(self) -> int:
        return len(self.item)

    def part(self, rows: Tensor | slice) -> Bench:
        """Some of the pictures."""
        return replace(
            self, prompts=self.prompts[rows], item=self.item[rows], noise=self.noise[rows]
        )

    def chunks(self) -> Iterable[Bench]:
        """Parts that are drawn together."""
        for start in range(0, len(self), self.chunk):
            yield self.part(slice(start, start + self.chunk))

    @property
    def ids(self) -> Int[Tensor, "pictures tokens"]:
        return self.prompts.ids()

    @property
    def words(self) -> Bool[Tensor, "pictures tokens"]:
        """Which tokens are words: neither start, end nor padding."""
        return self.ids > END

    @property
    def blocks(self) -> tuple[str, ...]:
        """The UNet's blocks of the coarsest maps: those that tell things apart."""
        return self.model.blocks_of_side(min(self.model.blocks.values()))

    def concepts(self, at: Sequence[int] = NOUN_AT) -> Int[Tensor, "pictures concepts"]:
        """The tokens at these positions as concepts of every picture."""
        return torch.tensor(at).expand(len(self), -1)

    def draw(
        self, updates: LatentUpdates | None = None, hooks: AttentionHooks | None = None
    ) -> Float[Tensor, "pictures 3 side side"]:
        """All pictures in one batch."""
        device = next(self.model.parameters()).device
        return sample(
            self.model,
            self.noise.to(device),
            self.ids.to(device),
            empty_captions(len(self)).to(device),
            steps=self.steps,
            guidance=self.guidance,
            hooks=AttentionHooks() if hooks is None else hooks,
            before_step=updates,
        ).cpu()


@dataclass(frozen=True)
class Drawn:
    """Pictures of one method.

    Attributes:
        maps: processed maps of all tokens before each step's update; empty where they were not kept.
        passes: passes through the UNet with a gradient, a picture.
    """

    pictures: Float[Tensor, "pictures 3 side side"]
    maps: Float[Tensor, "steps pictures tokens rows columns"]
    passes: float = 0.0


class MapDiary:
    """Keeps, for each pass, the mean cross-attention map over some blocks and all heads."""

    def __init__(self, blocks: tuple[str, ...]) -> None:
        self.blocks = blocks
        self.passes: list[list[Tensor]] = []
        self.hooks = AttentionHooks(on_map=self._note)

    def _note(self, block: str, kind: str, weights: Tensor) -> None:
        if kind != "cross" or block not in self.blocks:
            return
        if block == self.blocks[0]:
            self.passes.append([])
        self.passes[-1].append(weights.mean(1))

    def maps(self, words: Bool[Tensor, "pictures tokens"]) -> Tensor:
        """Processed maps of the captioned half: [passes, pictures, tokens, rows, columns]."""
        of_passes = [torch.stack(some).mean(0)[: len(words)] for some in self.passes]
        return torch.stack([processed_maps(some, words.to(some.device)) for some in of_passes])


def draw_plain(bench: Bench) -> Drawn:
    """The unmodified model, with its maps at every step."""
    pictures, maps = [], []
    for part in bench.chunks():
        diary = MapDiary(part.blocks)
        pictures.append(part.draw(hooks=diary.hooks))
        maps.append(diary.maps(part.words).cpu())
    return Drawn(torch.cat(pictures), torch.cat(maps, 1))


# The methods ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A loss on the maps and how it is used; see `LatentUpdates`.

    Attributes:
        concepts: positions in the caption.
        regions: what makes the masks; None for a loss without.
        share: of the steps, from the first, that move the latent.
        refine: share of the steps at which, and peak to which, the weakest concept is raised before.
        borrowed: each picture is given the masks of another prompt's picture.
    """

    loss: Loss
    concepts: tuple[int, ...] = NOUN_AT
    regions: object = None
    share: float = 1.0
    refine: Mapping[float, float] = field(default_factory=dict)
    borrowed: bool = False

    def updates(self, bench: Bench, scale: float, track: bool = False) -> LatentUpdates:
        """The updates of these pictures, with steps of `scale` times sqrt(linspace(1, .5))."""
        device, last = next(bench.model.parameters()).device, round(self.share * bench.steps)
        sizes = step_sizes(scale, bench.steps)
        lenders = None
        if self.borrowed:  # the nearest picture of another prompt, whatever the number of noises
            lenders = (torch.arange(len(bench)) + int(bench.item.bincount().max())) % len(bench)
        return LatentUpdates(
            bench.model,
            self.loss,
            bench.concepts(self.concepts).to(device),
            bench.words.to(device),
            bench.blocks,
            [size if step < last else 0.0 for step, size in enumerate(sizes)],
            regions=self.regions,
            lenders=lenders,
            refine={round(at * bench.steps): peak for at, peak in self.refine.items()},
            track=track,
        )


def segregate(maps: Tensor, masks: Tensor | None) -> Tensor:
    """L_seg."""
    return segregation_loss(maps)


def segregate_shapes(maps: Tensor, masks: Tensor | None) -> Tensor:
    """L_seg of maps that each sum to one: only where they lie counts, not how high they are."""
    return segregation_loss(maps / maps.sum((-2, -1), keepdim=True))


def retain(maps: Tensor, masks: Tensor | None) -> Tensor:
    """L_ret; nothing at the first step, which has no masks."""
    return maps.new_zeros(len(maps)) if masks is None else retention_loss(maps, masks)


def both(maps: Tensor, masks: Tensor | None) -> Tensor:
    """L_seg + L_ret, A-STAR's loss."""
    return segregate(maps, masks) + retain(maps, masks)


def excite(maps: Tensor, masks: Tensor | None) -> Tensor:
    """Attend-and-Excite's loss."""
    return excitement_loss(maps)


METHODS = {
    "Attend-and-Excite": Method(excite, share=0.5, refine={0.0: 0.05, 0.2: 0.5, 0.4: 0.8}),
    "+ L_ret": Method(retain, regions=active_regions),
    "+ L_seg": Method(segregate),
    "A-STAR": Method(both, regions=active_regions),
    "function words": Method(both, FUNCTION_WORDS_AT, active_regions),
    "borrowed masks": Method(retain, regions=active_regions, borrowed=True),
}
"""The paper's rows in its order, and two placebos: A-STAR on "a" and "and", L_ret with another picture's masks."""

VARIANTS = {
    "first quarter of the steps": replace(METHODS["A-STAR"], share=0.25),
    "masks at half height": replace(METHODS["A-STAR"], regions=half_height_regions),
    "L_seg of shapes": Method(segregate_shapes),
}


def step_scales(bench: Bench, methods: Mapping[str, Method], share: float) -> dict[str, float]:
    """By method, the scale at which its updates along the unmodified path have `share` of the latent's RMS.

    Ratio of means over the pictures and over the steps at which the method moves the latent, with the shape
    sqrt(linspace(1, .5)) in it; refinement is left out.
    """
    plain = {name: replace(method, refine={}) for name, method in methods.items()}
    updates = {name: method.updates(bench, 1.0) for name, method in plain.items()}
    moved = dict.fromkeys(plain, 0.0)
    stayed = dict.fromkeys(plain, 0.0)

    def watch(step, latent, time, text):
        for name, update in updates.items():
            change = (update(step, latent, time, text) - latent).flatten(1)
            if update.sizes[step]:
                moved[name] += change.square().mean(1).sqrt().mean().item()
                stayed[name] += latent.flatten(1).square().mean(1).sqrt().mean().item()
        return latent

    bench.draw(watch)
    return {name: share * stayed[name] / moved[name] for name in plain}


def draw_steered(bench: Bench, method: Method, scale: float, track: bool = False) -> Drawn:
    """Pictures under a method; their maps are kept if `track`."""
    pictures, maps, passes = [], [], 0
    for part in bench.chunks():
        updates = method.updates(part, scale, track)
        pictures.append(part.draw(updates))
        passes += updates.passes
        if track:
            maps.append(torch.stack(updates.history).cpu())
    kept = torch.cat(maps, 1) if maps else torch.empty(0, len(bench), 0, 0, 0)
    return Drawn(torch.cat(pictures), kept, passes / len(bench))


# Judging ----------------------------------------------------------------------------------------------


def scores(bench: Bench, pictures: Float[Tensor, "pictures 3 side side"]) -> pd.DataFrame:
    """One row a picture: prompt, log-odds of the less certain thing (`weaker`) and with its colour, presence of
    each and of both, both in their colours, things beyond those asked for, and what reads as the caption."""
    said: Judgement = bench.judge(pictures)
    there, paired = said.asked_presence(bench.prompts), said.asked_pairs(bench.prompts)
    return pd.DataFrame(
        {
            "item": bench.item.numpy(),
            "weaker": there.amin(1).double().numpy(),
            "weaker pair": paired.amin(1).double().numpy(),
            "both": (there > 0).all(1).double().numpy(),
            "both in their colours": ((there > 0) & (paired > 0)).all(1).double().numpy(),
            "surplus": (said.surplus(bench.prompts) > 0).double().numpy(),
            "first": (there[:, 0] > 0).numpy(),
            "second": (there[:, -1] > 0).numpy(),
            "category": [
                category([n for n in row if n >= 0]) for row in bench.prompts.nouns.tolist()
            ],
        }
    )


# Overlap and decay at the unmodified model ----------------------------------------------------------


def overlaps(
    maps: Float[Tensor, "steps pictures tokens rows columns"], at: Sequence[int]
) -> Float[np.ndarray, "steps pictures"]:
    """Eq. 2 of the tokens at two positions, at every step."""
    return overlap(maps[:, :, at[0]], maps[:, :, at[1]]).double().numpy()


def placements(
    score: Float[np.ndarray, " pictures"], failed: Bool[np.ndarray, " pictures"]
) -> Float[np.ndarray, " pictures"]:
    """Of each picture the share of good pictures whose score is lower (ties half).

    Their mean over the failed pictures is the area under the ROC curve of the score for failure.
    """
    good = score[~failed]
    below = (score[:, None] > good).mean(1)
    return below + 0.5 * (score[:, None] == good).mean(1)


def peaks(
    maps: Float[Tensor, "steps pictures tokens rows columns"],
    concepts: Int[Tensor, "pictures concepts"],
) -> Float[np.ndarray, "steps pictures concepts"]:
    """The highest value of each concept's map at every step."""
    return np.stack([of_concepts(some, concepts).amax((-2, -1)).double().numpy() for some in maps])


def decay_gap(
    peaks: Float[np.ndarray, "steps pictures 2"],
    missing: Int[np.ndarray, " pictures"],
    early: slice,
    late: slice,
) -> tuple[Float[np.ndarray, " pictures"], Float[np.ndarray, " pictures"]]:
    """Missing minus present concept: of late minus early peaks, and of the early peaks.

    Args:
        missing: which of the two concepts each picture lacks.
    """
    rows = np.arange(peaks.shape[1])
    first = peaks[early].mean(0)
    change = peaks[late].mean(0) - first
    return tuple(part[rows, missing] - part[rows, 1 - missing] for part in (change, first))


def other_picture(item: Int[np.ndarray, " pictures"]) -> Int[np.ndarray, " pictures"]:
    """For each picture another one of the same prompt: the next one, the first for the last."""
    found = np.empty_like(item)
    for number in np.unique(item):
        rows = np.flatnonzero(item == number)
        found[rows] = np.roll(rows, -1)
    return found
