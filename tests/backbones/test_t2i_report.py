"""The report on the text-to-image model: a picture is told right by its title's colour."""

import matplotlib.pyplot as plt
import torch

from reattend.backbones.reports.t2i import draw_grid
from reattend.backbones.scene_judge import Judgement
from reattend.data.prompt_scenes import COLOURS as PAINTS
from reattend.data.prompt_scenes import NOUNS, Prompts
from reattend.plots import COLOURS


def test_titles_say_where_the_judge_sees_all():
    prompts = Prompts(
        torch.tensor([[0, 1], [2, 3], [1, -1]]), torch.tensor([[0, 3], [1, 2], [4, -1]])
    )
    logits = torch.full((3, len(NOUNS), 3), -5.0)
    logits[..., 0] = 5.0  # nothing is there
    pairs = torch.zeros(3, len(NOUNS), len(PAINTS))
    for picture, noun in ((0, 0), (0, 3), (1, 1), (2, 4)):
        logits[picture, noun] = torch.tensor([-5.0, 5.0, -5.0])
    fig = draw_grid(torch.zeros(3, 3, 24, 24), prompts, Judgement(logits, pairs))
    colours = [axis.title.get_color() for axis in fig.axes[:3]]
    assert colours == [COLOURS[0], "0.35", COLOURS[0]]
    assert "\n" in fig.axes[0].get_title()
    plt.close(fig)
