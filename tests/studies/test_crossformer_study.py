"""The measures of the study of CrossFormer, on cases whose answer is known."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.backbones.trained.crossformer import SETTINGS, untrained
from reattend.backbones.trained.inline_attention import centred
from reattend.studies.crossformer import (
    TWO_BLOCKS,
    TokenClassifier,
    attention,
    canvas_scores,
    enlarged,
    groups_of,
    on_larger_canvas,
    sees,
    small_garments,
    steps_to_solve,
)
from reattend.studies.crossformer_figures import (
    draw_arms,
    draw_biases,
    draw_groups,
    draw_patches,
    draw_reach,
    draw_sizes,
    draw_tokens,
)
from reattend.studies.pairs import accuracy
from reattend.training.loop import TrainingPlan

SMOKE = SETTINGS["smoke"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(kinds, size):
    torch.manual_seed(0)
    return [attention(kind, 4, 1, size, seed=0) for kind in kinds]


@pytest.mark.parametrize("size", [2, 3])
def test_who_hears_of_whom_in_one_block(size):
    side = size**2
    rows, columns = torch.cartesian_prod(torch.arange(side), torch.arange(side)).unbind(1)
    codes = {"SDA": (rows // size, columns // size), "LDA": (rows % size, columns % size)}
    for kind, (row, column) in codes.items():
        expected = (row[:, None] == row) & (column[:, None] == column)
        assert torch.equal(sees(layers([kind], size), 4, side), expected), kind
    assert sees(layers(["full"], size), 4, side).all()
    assert sees(layers(["reduced"], size), 4, side).all()
    dealt = sees(layers(["random"], size), 4, side)
    assert (dealt.sum(1) == size**2).all()
    assert torch.equal(sees([nn.Identity()], 4, side), torch.eye(side**2, dtype=torch.bool))


def test_who_hears_of_whom_in_two_blocks():
    shares = {
        arm: sees(layers(kinds, 3), 4, 9).double().mean() for arm, kinds in TWO_BLOCKS.items()
    }
    for arm in ("full attention", "SDA, LDA", "SDA, random groups", "spatial reduction"):
        assert shares[arm] == 1
    for arm in ("SDA twice", "LDA twice"):
        assert shares[arm] == pytest.approx(1 / 9)
    assert shares["SDA, shifted windows"] < 0.4


def test_which_way_is_heard():
    class Down(nn.Module):
        """Every token reads the one above it."""

        def forward(self, x):
            return F.pad(x, (0, 0, 1, 0))[:, :, :-1]

    found = sees([Down()], 2, 3)
    expected = torch.eye(9, dtype=torch.bool)
    expected[range(3, 9), range(6)] = True  # output, input
    assert torch.equal(found, expected)


@pytest.mark.parametrize("arm", list(TWO_BLOCKS))
def test_a_token_answers_from_what_it_hears(arm):
    model = TokenClassifier(arm, 3, 4, 2, 2, seed=0).eval()
    pixels = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    changed = pixels.clone()
    changed[:, :, 8:16, 24:32] = 255 - changed[:, :, 8:16, 24:32]  # token (1, 3)
    with torch.no_grad():
        moved = (model(changed) - model(pixels)).abs().amax(1)[0].flatten() > 1e-7
    assert torch.equal(moved, sees(layers(TWO_BLOCKS[arm], 2), 4, 4)[:, 1 * 4 + 3])


def test_token_classifiers_of_one_seed_start_alike():
    first = TokenClassifier("SDA, LDA", 3, 4, 2, 3, seed=5).state_dict()
    for arm in TWO_BLOCKS:
        if arm != "spatial reduction":
            state = TokenClassifier(arm, 3, 4, 2, 3, seed=5).state_dict()
            assert all(torch.equal(state[name], weights) for name, weights in first.items())


def test_training_stops_where_the_task_is_solved():
    """An easy task is solved within the steps, its reverse is not; the next check after solving ends it."""

    def draw(generator, items=16):
        x = torch.randn(items, 2, generator=generator)
        return x, (x[:, 0] > 0).long()

    inputs, labels = draw(torch.Generator().manual_seed(9), 400)
    plan = TrainingPlan(200, 0.05, weight_decay=0.0, schedule="constant")
    torch.manual_seed(0)
    start = nn.Linear(2, 2).state_dict()

    def run(check, share, every, seed=3):
        model = nn.Linear(2, 2)
        model.load_state_dict(start)
        found = steps_to_solve(model, draw, plan, seed, check, share, every)
        return *found, accuracy(model, *check), model.weight.tolist()

    fine, solved, reached, weights = run((inputs, labels), 95.0, 1)
    assert solved
    assert 1 < fine < 200
    assert reached >= 95
    coarse, solved, *_ = run((inputs, labels), 95.0, 30)
    assert solved
    assert coarse % 30 == 0
    assert fine <= coarse
    assert run((inputs, labels), 95.0, 1)[3] == weights  # batches depend on the seed alone
    assert run((inputs, labels), 95.0, 1, seed=4)[3] != weights
    steps, solved, reached, _ = run((inputs, 1 - labels), 95.0, 30)
    assert (steps, solved) == (200, False)
    assert reached < 50


def test_small_garments():
    pixels, labels = small_garments("test", [8, 1], 8)
    assert pixels.shape[1:] == (1, 8, 8)
    assert labels.unique().tolist() == [0, 1]
    trouser, bag = (pixels[labels == label].float().mean((0, 1)) for label in (0, 1))
    assert trouser[4, 0] < 0.3 * trouser[4, 4]  # trousers are narrow, bags are not
    assert bag[5, 1] > 0.5 * bag[5, 4]


def test_scores_of_networks_are_those_of_their_logits():
    model = untrained("LSDA", SMOKE, 0).eval()
    pixels = torch.randint(0, 256, (7, 1, 32, 32), dtype=torch.uint8)
    labels = torch.arange(7)
    with torch.no_grad():
        logits = model(centred(pixels))
    nats, accuracy = canvas_scores(model, pixels, labels, batch=3)
    assert nats == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_canvases_grow_in_two_ways():
    pixels = torch.randint(1, 256, (20, 1, 4, 4), dtype=torch.uint8)
    grown = enlarged(pixels, 8)
    assert grown.shape == (20, 1, 8, 8)
    assert (grown.float().mean((1, 2, 3)) - pixels.float().mean((1, 2, 3))).abs().max() < 3
    placed, corners = on_larger_canvas(pixels, 7, seed=0), set()
    for old, new in zip(pixels, placed, strict=True):
        assert new.long().sum() == old.long().sum()
        row, column = new[0].nonzero()[0].tolist()
        assert torch.equal(new[:, row : row + 4, column : column + 4], old)
        corners.add((row, column))
    assert len(corners) > 5
    assert not torch.equal(placed, on_larger_canvas(pixels, 7, seed=1))


def test_groups_change_their_size_and_come_back():
    model = untrained("LSDA", SMOKE, 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * random(*parameter.shape)
    pixels = centred(torch.randint(0, 256, (2, 1, 48, 48), dtype=torch.uint8))
    layer = model.layers[0].blocks[1].attn
    with torch.no_grad():
        plain = model(pixels)
        with groups_of(model, 6) as grown:
            assert (layer.size, layer.interval) == (6, 2)
            wide = grown(pixels)
        with groups_of(model, 6, clamp=3) as grown:
            assert layer.pos.clamp == 3
            cut = grown(pixels)
        assert layer.size == 4
        assert layer.pos.clamp == float("inf")
        assert torch.equal(model(pixels), plain)
    assert (wide - plain).abs().max() > 1e-5
    assert (cut - wide).abs().max() > 1e-6


def test_figures_draw_every_arm():
    drawn = draw_patches(np.zeros((32, 32), np.uint8), (4, 8, 16), 4, (0, 7))
    assert len(drawn.axes) == 4
    assert [patch.get_width() for patch in drawn.axes[0].patches] == [4, 8, 16]
    assert drawn.axes[0].patches[1].get_xy() == (7 * 4 - 2 - 0.5, -2 - 0.5)
    drawn = draw_groups({"SDA": np.arange(16).reshape(4, 4) // 4})
    assert len(drawn.axes[0].texts) == 4
    one = np.eye(9, dtype=bool)[4]
    draw_reach({"SDA, LDA": (one, np.ones(9, bool)), "SDA twice": (one, one)}, 4)
    drawn = draw_tokens(
        {"SDA, LDA": [95.0, 96.0, 97.0], "SDA twice": []},  # not trained
        {"SDA, LDA": 100.0, "SDA twice": 33.0},
        {"SDA, LDA": [100, 200, 400]},
        2000,
    )
    assert drawn.axes[1].lines[0].get_xdata().tolist() == [100, 200, 400]
    assert drawn.axes[1].lines[1].get_xdata()[0] == 2000
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == [
        "SDA, LDA",
        "SDA twice",
    ]
    arms = {"LSDA": [1.0, 1.1, 1.2], "random groups": [1.2, 1.3, 1.5]}
    reported = pd.DataFrame({"arm": ["LSDA"], "top1": [82.5]})
    drawn = draw_arms(arms, arms, (2.0, 30.0), reported)
    assert [line.get_xdata()[0] for line in drawn.axes[2].lines] == [82.5]
    drawn = draw_biases({"DPB": random(7, 7).numpy(), "larger": random(11, 11).numpy()}, 4)
    assert drawn.axes[1].patches[0].get_width() == 7
    draw_sizes({"more canvas": arms, "higher resolution": arms}, "32 px")
    plt.close("all")
