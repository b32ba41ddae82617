"""A judge of pictures of coloured things: which are there, how often, and in which colours.

A small convolutional network that has only seen painted scenes of `reattend.data.prompt_scenes`: none to
three things, nouns and colours repeated at will, shifted, bent, blurred and noisy, so that a faint, doubled
or crooked thing, or one off the grid of the painted ones, is nothing new to it. No model that draws pictures
has a part in its training. It is held against the rule of sprite matching where that is sure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.data.prompt_scenes import (
    COLOURS,
    NOUNS,
    Prompts,
    PromptScenes,
    match_margins,
    paint_things,
)
from reattend.training.loop import TrainingPlan, train

MOST = 2
"""Counts above this are taken for it."""
BEND = 0.3
"""Standard deviation, in pixels, of the field that bends pictures, at its 4 x 4 knots."""
SURE = 0.1
"""Margin of sprite matching (`match_margins`) beyond which it is taken for the truth."""
CLIP = 6.0
"""Bound of log-odds: beyond it a judge of this size is sure and its numbers mean no more."""


@dataclass(frozen=True)
class Judgement:
    """What the judge says of pictures.

    Attributes:
        counts: logits of none, one, two or more of each noun.
        pairs: log-odds that a noun is there in a colour.
    """

    counts: Float[Tensor, "pictures nouns 3"]
    pairs: Float[Tensor, "pictures nouns colours"]

    def presence(self) -> Float[Tensor, "pictures nouns"]:
        """Log-odds that a noun is there at all, within +-`CLIP`."""
        there = self.counts[..., 1:].logsumexp(-1) - self.counts[..., 0]
        return there.clamp(-CLIP, CLIP)

    def number(self) -> Int[Tensor, "pictures nouns"]:
        """The likeliest count of each noun."""
        return self.counts.argmax(-1)

    def asked_presence(self, prompts: Prompts) -> Float[Tensor, "pictures things"]:
        """Log-odds that each thing of a picture's prompt is there; infinite where none was asked for."""
        found = self.presence().gather(1, prompts.nouns.clamp(min=0))
        return found.where(prompts.nouns >= 0, torch.inf)

    def asked_pairs(self, prompts: Prompts) -> Float[Tensor, "pictures things"]:
        """Log-odds that each thing is there in its colour, within +-`CLIP`; infinite where none was asked for."""
        rows = torch.arange(len(prompts))[:, None]
        found = self.pairs[rows, prompts.nouns.clamp(min=0), prompts.colours.clamp(min=0)]
        return found.clamp(-CLIP, CLIP).where(prompts.nouns >= 0, torch.inf)

    def surplus(self, prompts: Prompts) -> Int[Tensor, " pictures"]:
        """How many things there are beyond one of each that was asked for."""
        asked = torch.zeros(len(prompts), len(NOUNS) + 1, dtype=torch.long)
        asked.scatter_(1, prompts.nouns.where(prompts.nouns >= 0, len(NOUNS)), 1)
        return (self.number() - asked[:, :-1]).clamp(min=0).sum(1)


class SceneJudge(nn.Module):
    """Four convolutions, and two layers on the mean and the maximum over places."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GELU(),
        )
        answers = len(NOUNS) * (MOST + 1 + len(COLOURS))
        self.head = nn.Sequential(
            nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, answers)
        )

    def forward(self, pixels: Float[Tensor, "pictures 3 size size"]) -> Judgement:
        places = self.body(pixels)
        pooled = torch.cat([places.mean((-2, -1)), places.amax((-2, -1))], 1)
        logits = self.head(pooled).unflatten(1, (len(NOUNS), -1))
        return Judgement(logits[..., : MOST + 1], logits[..., MOST + 1 :])


def judge_loss(judgement: Judgement, scenes: PromptScenes) -> Float[Tensor, ""]:
    """Cross-entropy of a noun's count plus those of its colours, mean over nouns."""
    counts, pairs = true_contents(scenes)
    counted = F.cross_entropy(judgement.counts.flatten(0, 1), counts.clamp(max=MOST).flatten())
    paired = F.binary_cross_entropy_with_logits(judgement.pairs, pairs, reduction="none")
    return counted + paired.sum(-1).mean()


def true_contents(
    scenes: PromptScenes,
) -> tuple[Int[Tensor, "scenes nouns"], Float[Tensor, "scenes nouns colours"]]:
    """How often each noun was painted, and 1 where it was in a colour."""
    nouns, colours = (F.one_hot(x + 1)[..., 1:] for x in (scenes.nouns, scenes.colours))
    nouns = F.pad(nouns, (0, len(NOUNS) - nouns.shape[-1]))
    colours = F.pad(colours, (0, len(COLOURS) - colours.shape[-1]))
    together = (nouns[..., :, None] * colours[..., None, :]).amax(1)
    return nouns.sum(1), together.float()


def judge_scenes(count: int, size: int, generator: Generator) -> PromptScenes:
    """Clean scenes of none to three things, any nouns in any colours; half of the later ones repeat a noun."""
    nouns = torch.randint(len(NOUNS), (count, 3), generator=generator)
    colours = torch.randint(len(COLOURS), (count, 3), generator=generator)
    again = torch.rand(count, 2, generator=generator) < 0.25
    nouns[:, 1:] = nouns[:, :1].where(again, nouns[:, 1:])
    many = torch.randint(4, (count, 1), generator=generator)
    absent = torch.arange(3) >= many
    return paint_things(
        colours.masked_fill(absent, -1), nouns.masked_fill(absent, -1), size, generator
    )


def bent(
    pixels: Float[Tensor, "pictures 3 size size"], generator: Generator
) -> Float[Tensor, "pictures 3 size size"]:
    """Each picture shifted by up to two pixels, and bent by a smooth field with an s.d. of `BEND` pixels.

    Things are painted on every second pixel, and a judge that halves pictures reads no others unless it has seen
    them there. What is shifted in from beyond the border repeats the border.
    """
    count, _, size, _ = pixels.shape
    shift = torch.randint(-2, 3, (count, 1, 1, 2), generator=generator)
    knots = BEND * torch.randn(count, 2, 4, 4, generator=generator)
    field = F.interpolate(knots, (size, size), mode="bicubic", align_corners=True).movedim(1, -1)
    ruler = torch.arange(size)
    places = torch.stack(torch.meshgrid(ruler, ruler, indexing="xy"), -1) + shift + field
    grid = 2 * places / (size - 1) - 1
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=True)


def roughened(
    pixels: Float[Tensor, "pictures 3 size size"], generator: Generator
) -> Float[Tensor, "pictures 3 size size"]:
    """Each picture blended with its blur by a random share, and noisy with s.d. of 0 to .15."""
    count = len(pixels)
    share, height = torch.rand(2, count, 1, 1, 1, generator=generator)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels + share * (blurred - pixels) + 0.15 * height * noise


def asked_surely(
    pixels: Float[Tensor, "pictures 3 size size"], prompts: Prompts
) -> tuple[Bool[Tensor, "pictures things"], Bool[Tensor, "pictures things"]]:
    """Whether the rule of sprite matching finds each asked thing, and whether it was asked for and the rule is sure.

    The rule is sure beyond a margin of `SURE`: there it errs on less than one thing in a hundred of painted
    scenes, even where they are bent twice as much as those that the judge is trained on.
    """
    margins = match_margins(pixels).gather(1, prompts.nouns.clamp(min=0))
    return margins >= 0, (margins.abs() > SURE) & (prompts.nouns >= 0)


def train_judge(size: int, steps: int, batch: int, seed: int) -> SceneJudge:
    """A judge for pictures of `size` pixels."""
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = SceneJudge()

    def batches():
        while True:
            scenes = judge_scenes(batch, size, generator)
            yield roughened(bent(scenes.pixels, generator), generator), scenes

    plan = TrainingPlan(steps, 3e-3, weight_decay=0.01, warmup=steps // 20, fused=True)
    train(judge, batches(), lambda net, given: judge_loss(net(given[0]), given[1]), plan)
    return judge.requires_grad_(False)
