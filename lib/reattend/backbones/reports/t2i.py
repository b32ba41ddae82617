"""What the text-to-image model and its judge are worth: what the build measured, and pictures to look at."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from reattend.backbones.reports.page import Page
from reattend.backbones.scene_judge import Judgement
from reattend.backbones.trained.t2i import (
    MEASURED,
    SETTINGS,
    draw,
    load,
    load_judge,
    quality,
)
from reattend.data.prompt_scenes import Prompts, pair_prompts, single_prompts
from reattend.plots import COLOURS

COLUMNS = 8


def report(page: Page, profile: str) -> None:
    """A table of what was measured after training, and pictures of single things and of pairs."""
    setting = SETTINGS[profile]
    found = pd.DataFrame([quality(profile, seed) for seed in range(setting.seeds)])
    rows = {"measured": found.columns, "share, %": 100 * found.mean()}
    caption = (
        f"After training, at noises that no study uses: {setting.measured} prompts of two things, half as many of one, "
        f"500 painted scenes for the judge and 128 for the maps (its box is where a thing was painted)"
    )
    page.table("quality", pd.DataFrame(rows), caption)
    model, judge = load(profile), load_judge(profile)
    singles = single_prompts()
    for name, prompts in {
        "one": singles[:: len(singles) // COLUMNS],
        "two": pair_prompts(16, MEASURED),
    }.items():
        pictures = draw(
            model, prompts, MEASURED, steps=setting.sampling_steps, guidance=setting.guidance
        )
        things = "one thing" if name == "one" else "two things"
        caption = (
            f"Pictures of {things}, the first noise of each; titles in blue: the judge sees all"
        )
        page.figure(f"pictures_{name}", draw_grid(pictures, prompts, judge(pictures)), caption)


def draw_grid(
    pictures: Float[Tensor, "pictures 3 side side"], prompts: Prompts, said: Judgement
) -> Figure:
    """Pictures under their prompts, coloured where the judge sees everything that was asked for."""
    count = -(-len(pictures) // COLUMNS)
    fig, axes = plt.subplots(count, COLUMNS, figsize=(11, 1.75 * count), squeeze=False)
    there = (said.asked_presence(prompts) > 0).all(1).tolist()
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, text, right in zip(
        axes.flat, pictures, prompts.texts(), there, strict=False
    ):
        axis.imshow(picture.movedim(0, -1).add(1).div(2).clamp(0, 1), interpolation="nearest")
        axis.set_title(
            text.replace(" and ", " and\n"), fontsize=8, color=COLOURS[0] if right else "0.35"
        )
    return fig
