"""Prompts of one or two things drawn from given noises, watched at every step, and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from reattend.backbones.scene_judge import Judgement, SceneJudge, asked_surely
from reattend.data.prompt_scenes import END, NOUN_AT, Prompts, category, empty_captions, matched
from reattend.generation.a_star import processed_maps
from reattend.metrics import pseudo_values
from reattend.trunks.diffusion import AttentionHooks, DiffusionUNet, sample

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
    chunk: int

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
        """`noises` pictures of each prompt, from the noises of a seed.

        On a CPU 32 are drawn together: their activations stay in its cache.
        """
        item = torch.arange(len(prompts)).repeat_interleave(noises)
        side, generator = model.shape.side, Generator().manual_seed(seed)
        noise = torch.randn(len(item), 3, side, side, generator=generator)
        together = 32 if next(model.parameters()).device.type == "cpu" else 256
        return cls(model, judge, prompts[item], item, noise, steps, guidance, together)

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
        self, before_step: Callable | None = None, hooks: AttentionHooks | None = None
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
            before_step=before_step,
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

    def of(self, rows: Int[Tensor, " some"]) -> Drawn:
        """Some of the pictures."""
        return replace(self, pictures=self.pictures[rows], maps=self.maps[:, rows])


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


# Judging ----------------------------------------------------------------------------------------------


def scores(bench: Bench, pictures: Float[Tensor, "pictures 3 side side"]) -> pd.DataFrame:
    """One row a picture: its prompt; log-odds of the less certain thing, and of that in its colour; whether both
    are there, also in their colours, by the judge and by rule; whether there is more than asked; whether
    each thing is there; of how many asked things the rule is sure, and on how many of these the judge agrees.
    """
    said: Judgement = bench.judge(pictures)
    there, paired = said.asked_presence(bench.prompts), said.asked_pairs(bench.prompts)
    fitted, in_colour = asked_by_rule(bench.prompts, pictures)
    rule, sure = asked_surely(pictures, bench.prompts)
    return pd.DataFrame(
        {
            "item": bench.item.numpy(),
            "weaker": there.amin(1).double().numpy(),
            "weaker pair": paired.amin(1).double().numpy(),
            "both": (there > 0).all(1).double().numpy(),
            "both in their colours": ((there > 0) & (paired > 0)).all(1).double().numpy(),
            "both, by rule": fitted.all(1).double().numpy(),
            "both in their colours, by rule": in_colour.all(1).double().numpy(),
            "surplus": (said.surplus(bench.prompts) > 0).double().numpy(),
            "first": (there[:, 0] > 0).numpy(),
            "second": (there[:, -1] > 0).numpy(),
            "sure": sure.sum(1).numpy(),
            "agreed": (sure & (rule == (there > 0))).sum(1).numpy(),
            "category": [
                category([n for n in row if n >= 0]) for row in bench.prompts.nouns.tolist()
            ],
        }
    )


def agreement(frame: pd.DataFrame) -> float:
    """Per cent on whose presence the judge agrees, of the asked things of which the rule is sure (`asked_surely`)."""
    return 100 * float(frame["agreed"].sum() / max(1, frame["sure"].sum()))


def asked_by_rule(
    prompts: Prompts, pictures: Float[Tensor, "pictures 3 side side"]
) -> tuple[Bool[Tensor, "pictures things"], Bool[Tensor, "pictures things"]]:
    """Whether the rule of sprite matching finds each asked thing, and finds it in its colour; True where none
    was asked for."""
    found = matched(pictures)[0].flatten(3).any(-1)
    rows, nouns = torch.arange(len(prompts))[:, None], prompts.nouns.clamp(min=0)
    none = prompts.nouns < 0
    there = found.any(2).gather(1, nouns)
    return there | none, found[rows, nouns, prompts.colours.clamp(min=0)] | none


def by_prompt(frame: pd.DataFrame) -> pd.DataFrame:
    """Means of a frame of `scores` over the pictures of each prompt."""
    return frame.groupby("item").mean(numeric_only=True)


def area_within(
    score: Float[np.ndarray, "prompts noises"], failed: Bool[np.ndarray, "prompts noises"]
) -> Float[np.ndarray, " prompts"]:
    """Pseudo-values by prompt of the area under the ROC curve of a score for failure, within prompts.

    The area is the chance that of a failed and a good picture of one prompt the failed one has the higher score,
    over all such pairs (ties half):

        sum_p #{(i, j): s_pi > s_pj} / sum_p #{(i, j)},   i failed and j good, both of prompt p;

    .5 without any. What makes prompts hard has no part in it. Leaving out prompts takes their failed and their
    good pictures together, so that neither group is held fixed.
    """
    above = np.sign(score[:, :, None] - score[:, None, :]) / 2 + 0.5
    pair = failed[:, :, None] & ~failed[:, None, :]
    counts = {"right": (above * pair).sum((1, 2)), "pairs": pair.sum((1, 2)).astype(float)}
    return pseudo_values(counts, _share_right)


def _share_right(counts: Mapping[str, np.ndarray]) -> float:
    pairs = counts["pairs"].sum()
    return counts["right"].sum() / pairs if pairs else 0.5
