"""Pictures of embedding studies: what the reach measures, and what each picture draws."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from reattend.studies.embedding_figures import (
    draw_differences,
    draw_hardness,
    draw_reach,
    draw_readings,
    draw_slices,
    reach,
)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def maps():
    torch.manual_seed(0)
    shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(**shape, num_hidden_layers=2, initializer_range=0.3)).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    return {
        name: reach(model, ids, causal=c) for name, c in {"causal": True, "free": False}.items()
    }


def test_the_reach_is_a_triangle_with_the_mask_and_full_without():
    found = maps()
    assert torch.equal(found["causal"] > 0, torch.ones(5, 5, dtype=torch.bool).tril())
    assert (found["free"] > 0).all()


def test_reach_has_one_panel_a_mask_with_words():
    fig = draw_reach(maps(), list("abcde"))
    assert [axis.get_title() for axis in fig.axes] == ["causal", "free"]
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == list("abcde")


def test_differences_stand_beside_the_reported_ones():
    found = {"a - b": [0.1, 0.2, 0.3], "a - c": [-0.1, 0.0, 0.1]}
    fig = draw_differences(found, 0.05, {"a - c": 1.5})
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()] == list(found)
    (point,) = [line for line in fig.axes[1].lines if len(line.get_xdata()) == 1]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (1.5, 1)
    assert len(draw_differences(found, 0.05).axes) == 1


def test_slices_readings_and_hardness_draw_every_series():
    curves = {"one": np.random.default_rng(0).random((3, 4)), "two": np.zeros((3, 4))}
    axis = draw_slices(curves, [8, 4, 2, 1], 0.6, 0.4).axes[0]
    assert axis.get_legend_handles_labels()[1] == ["one", "two", "untrained, all numbers"]
    axis = draw_readings({"mean": np.ones(3), "last": np.zeros(3)}, {"bag": 0.5}).axes[0]
    assert axis.get_legend_handles_labels()[1] == ["bag"]
    p = {"start": np.full(10, 0.1), "end": np.full(10, 0.9)}
    ranks = np.array([[0, 1, 1, 3], [2, 2, 0, 1]])
    axes = draw_hardness(p, p, ranks).axes
    heights = [bar.get_height() for bar in axes[2].patches]
    assert heights == [1, 2, 0, 1, 1, 1, 2, 0]
