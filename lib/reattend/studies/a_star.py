"""What is asked of A-STAR: several methods from the same noises, and overlap and decay at the unmodified model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.data.prompt_scenes import (
    NOUN_AT,
    Prompts,
    matched,
)
from reattend.generation.a_star import (
    LatentUpdates,
    Loss,
    active_regions,
    excitement_loss,
    half_height_regions,
    of_concepts,
    retention_loss,
    segregation_loss,
    step_sizes,
)
from reattend.generation.word_maps import overlap
from reattend.studies.text_to_image import Bench, Drawn

FUNCTION_WORDS_AT = (1, 4)
"""Positions of the first "a" and of "and"."""

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
        scrambled: updates of the same size in a random direction.
    """

    loss: Loss
    concepts: tuple[int, ...] = NOUN_AT
    regions: object = None
    share: float = 1.0
    refine: Mapping[float, float] = field(default_factory=dict)
    borrowed: bool = False
    scrambled: bool = False

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
            # Parts that are drawn together begin with different noises, so each has a turn of its own.
            scramble=int(1e6 * bench.noise[0, 0, 0, 0].abs()) if self.scrambled else None,
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
    "random direction": Method(both, regions=active_regions, scrambled=True),
    "L_ret, random direction": Method(retain, regions=active_regions, scrambled=True),
}
"""The paper's rows in its order, and two placebos: the gradients of A-STAR and of L_ret alone, turned."""
EVERY_NOISE = ("Attend-and-Excite", "A-STAR", "random direction")
"""The methods whose differences are small beside their spread: drawn from all noises of a prompt."""


def halves(maps: Tensor) -> Tensor:
    """A layout drawn by hand: the left half for the first concept, the right half for the second."""
    masks = torch.zeros_like(maps)
    middle = maps.shape[-1] // 2
    masks[:, 0, :, :middle], masks[:, 1, :, middle:] = 1, 1
    return masks


LAYOUT = Method(retain, regions=halves)
SINGLE_THING = replace(METHODS["A-STAR"], concepts=NOUN_AT[:1])
"""A-STAR on prompts of one thing, where retention alone is left."""
VARIANTS = {
    "first quarter of the steps": replace(METHODS["A-STAR"], share=0.25),
    "masks at half height": replace(METHODS["A-STAR"], regions=half_height_regions),
    "L_seg of shapes": Method(segregate_shapes),
    "borrowed masks": Method(retain, regions=active_regions, borrowed=True),
}


def step_scales(bench: Bench, methods: Mapping[str, Method]) -> dict[str, float]:
    """By method, the scale at which its updates along the unmodified path are as large as the latent.

    Sizes are root mean squares; ratio of means over the pictures and over the steps at which the method moves
    the latent, with the shape sqrt(linspace(1, .5)) in it; refinement is left out.
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
    return {name: stayed[name] / moved[name] for name in plain}


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


# Judging ------------------------------------------------------------------------------------------


def means(frames: Mapping[str, pd.DataFrame], seconds: Mapping[str, float]) -> pd.DataFrame:
    """Table of methods: shares in per cent and mean log-odds over all pictures."""
    shares = {
        "both things": "both",
        "both in their colours": "both in their colours",
        "both, by rule": "both, by rule",
        "both in their colours, by rule": "both in their colours, by rule",
        "more than asked": "surplus",
    }
    rows = []
    for name, frame in frames.items():
        row = {"method": name} | {title: 100 * frame[c].mean() for title, c in shares.items()}
        row |= {"weaker thing, log-odds": frame["weaker"].mean()}
        kinds = frame.groupby("category")["both"].mean()
        row |= {f"both, {kind}": 100 * share for kind, share in kinds.items()}
        rows.append(row | {"passes with gradient": seconds.get(name, 0.0)})
    return pd.DataFrame(rows)


def ordered(
    pictures: Float[Tensor, "pictures 3 side side"], prompts: Prompts
) -> Float[np.ndarray, " pictures"]:
    """1 where the first thing lies left of the second, else 0; NaN where the rule does not find both."""
    columns = (
        matched(pictures)[0].any(3).any(2).double()
    )  # noun and column, whatever colour and row
    places = torch.arange(columns.shape[-1]).double()
    centres = (columns * places).sum(-1) / columns.sum(-1)
    pair = centres.gather(1, prompts.nouns)
    left = (pair[:, 0] < pair[:, 1]).double()
    return left.where(pair.isfinite().all(1), torch.nan).numpy()


# Overlap and decay at the unmodified model ----------------------------------------------------------


def overlaps(
    maps: Float[Tensor, "steps pictures tokens rows columns"], at: Sequence[int]
) -> Float[np.ndarray, "steps pictures"]:
    """Eq. 2 of the tokens at two positions, at every step."""
    return overlap(maps[:, :, at[0]], maps[:, :, at[1]]).double().numpy()


def mean_by_prompt(
    values: Float[np.ndarray, "steps pictures"],
    item: Int[np.ndarray, " pictures"],
    rows: Bool[np.ndarray, " pictures"] | None = None,
) -> Float[np.ndarray, "prompts steps"]:
    """Means over the pictures of each prompt, of the chosen `rows` alone; prompts without any are left out."""
    chosen = np.ones(len(item), dtype=bool) if rows is None else rows
    return np.stack([values[:, chosen & (item == i)].mean(1) for i in np.unique(item[chosen])])


def retention_by_step(
    maps: Float[Tensor, "steps pictures tokens rows columns"],
    concepts: Int[Tensor, "pictures concepts"],
) -> Float[np.ndarray, "later_steps pictures"]:
    """Eq. 3 at every step but the first, with the masks of the step before."""
    of_steps = [of_concepts(some, concepts) for some in maps]
    pairs = pairwise(of_steps)
    return np.stack([retention_loss(b, active_regions(a)).double().numpy() for a, b in pairs])


def split_peaks(
    peaks: Float[np.ndarray, "steps pictures 2"], missing: Int[np.ndarray, " pictures"]
) -> dict[str, Float[np.ndarray, "steps pictures"]]:
    """Peaks of the present and of the missing thing of each picture."""
    rows = np.arange(peaks.shape[1])
    return {
        "the present thing": peaks[:, rows, 1 - missing],
        "the missing thing": peaks[:, rows, missing],
    }


def peaks(
    maps: Float[Tensor, "steps pictures tokens rows columns"],
    concepts: Int[Tensor, "pictures concepts"],
) -> Float[np.ndarray, "steps pictures concepts"]:
    """The highest value of each concept's map at every step."""
    return np.stack([of_concepts(some, concepts).amax((-2, -1)).double().numpy() for some in maps])


def early_and_change(
    peaks: Float[np.ndarray, "steps pictures 2"], early: slice, late: slice
) -> tuple[Float[np.ndarray, "pictures 2"], Float[np.ndarray, "pictures 2"]]:
    """Each concept's early peak, and its late minus its early peak."""
    first = peaks[early].mean(0)
    return first, peaks[late].mean(0) - first


def missing_less_present(
    values: Float[np.ndarray, "pictures 2"], missing: Int[np.ndarray, " pictures"]
) -> Float[np.ndarray, " pictures"]:
    """The value of the concept that each picture lacks, less that of the other one."""
    rows = np.arange(len(values))
    return values[rows, missing] - values[rows, 1 - missing]


def over_other_pictures(
    values: Float[np.ndarray, "pictures 2"], item: Int[np.ndarray, " pictures"]
) -> Float[np.ndarray, "pictures 2"]:
    """Each concept's value less its mean over the other pictures of the same prompt.

    What a word has in every picture of its prompt is gone; prompts need two pictures.
    """
    rest = np.empty_like(values)
    for number in np.unique(item):
        rows = item == number
        rest[rows] = (values[rows].sum(0) - values[rows]) / (rows.sum() - 1)
    return values - rest
