"""Pictures show the numbers that they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from reattend.studies.in_context_ranking_figures import (
    draw_by_number,
    draw_latency,
    draw_layers,
    draw_masks,
    draw_rankers,
    draw_scores,
    draw_segments,
    draw_training,
)
from reattend.text_matching.blockrank import visible


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def lines(axis):
    return {line.get_label(): line.get_ydata() for line in axis.get_lines()}


def test_masks_are_drawn_as_they_are():
    block = torch.tensor([0, 0, 1, 2, 2, 3])
    fig = draw_masks(
        {"BlockRank": visible(block[None])[0]}, block, torch.tensor([0, 1, 2, 2, 3, 99])
    )
    drawn = fig.axes[0].images[0].get_array()
    assert drawn.tolist() == visible(block[None])[0].int().tolist()
    assert fig.axes[1].get_lines()[0].get_ydata().tolist() == [0, 1, 2, 2, 3, 99]


def test_the_right_document_is_bold():
    _, axis = plt.subplots()
    draw_scores(axis, torch.rand(3, 4), 2)
    assert [label.get_fontweight() for label in axis.get_xticklabels()].index("bold") == 2


def test_rankers_stand_at_their_means_beside_the_papers():
    points = {
        "words": np.array([[1.0, 0, 0, 1]]),
        "reader": np.array([[1.0, 1, 0, 1], [1, 1, 1, 1]]),
    }
    fig = draw_rankers(points, 0.25, {"BlockRank": 29.1})
    here, paper = fig.axes
    diamonds = [x.get_xdata()[0] for x in here.get_lines() if x.get_marker() == "D"]
    assert diamonds == pytest.approx([50, 87.5])
    assert [bar.get_width() for bar in paper.patches] == [29.1]


def test_growing_lists_are_drawn_above_chance():
    hits = {"words": {2: np.array([[1.0, 0, 1, 1]]), 8: np.array([[0.0, 0, 1, 1]])}}
    nats = {"words": {n: np.full((2, 4), -np.log(n)) for n in (2, 8)}}
    fig = draw_by_number(nats, hits, 4, {50: 29.1, 500: 28.7})
    above, first, paper = map(lines, fig.axes)
    assert above["words"] == pytest.approx([0, 0])
    assert above["certain"] == pytest.approx(np.log([2, 8]))
    assert first["words"] == pytest.approx([75, 50])
    assert first["chance"] == pytest.approx([50, 12.5])
    assert next(iter(paper.values())).tolist() == [29.1, 28.7]


def test_latency_has_medians_and_the_papers_curves():
    reported = pd.DataFrame({"method": ["BlockRank", "Full-FT"], "N": [10, 10], "ms": [32, 59]})
    seconds = {"dense": np.array([[1.0, 1, 3], [4, 8, 5]])}
    seconds["block by block"] = np.array([[1.0, 1, 1], [2, 2, 2]])
    drawn = lines(draw_latency([8, 16], seconds, reported).axes[0])
    assert drawn["dense, one layer here"].tolist() == [1, 5]
    assert drawn["BlockRank, paper (Mistral-7B)"].tolist() == [0.032]


def test_other_documents_are_averaged():
    segments, between = np.zeros((4, 2, 9)), np.full((4, 2, 2), 0.5)
    segments[:, :, 6], segments[:, :, 7] = 0.3, 0.6
    right = lines(draw_segments(segments, between, documents=4).axes[2])
    assert right["right document"].tolist() == pytest.approx([0.3, 0.3])
    assert right["each other document"].tolist() == pytest.approx([0.2, 0.2])


def test_layers_and_losses():
    points = {6: np.array([[1.0, 0, 1]]), 11: np.array([[1.0, 1, 1]])}
    drawn = lines(draw_layers(points, points).axes[0])
    assert drawn["reader"] == pytest.approx([200 / 3, 100])
    drawn = lines(draw_training({"full": np.ones((2, 20))}, 2.1).axes[0])
    assert drawn["full"] == pytest.approx(np.ones(19))
