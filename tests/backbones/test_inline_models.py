"""The build of the arms of InLine attention: equal starts, equal pictures, training, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import inline_attention as build
from reattend.backbones.trained.inline_attention import (
    ARMS,
    CLOSE,
    FIRST_SEED,
    MAIN,
    SETTINGS,
    centred,
    linear_classifier,
    shuffled,
    untrained,
)
from reattend.vision.inline_attention import DeiTSize, InlineAttention

SMALL = DeiTSize(8, 2, 2, 32, 8)


def test_arms_of_one_seed_share_their_start_and_seeds_do_not():
    first = untrained("softmax", SMALL, 3).state_dict()
    for arm in ARMS:
        state = untrained(arm, SMALL, 3).state_dict()
        for name, weights in first.items():
            assert torch.equal(state[name], weights), (arm, name)
    other = untrained("softmax", SMALL, 4).state_dict()
    assert not torch.equal(other["pos_embed"], first["pos_embed"])


def test_arms_are_what_their_names_say():
    for arm in ARMS:
        attention = untrained(arm, SMALL, 0).blocks[1].attn
        assert isinstance(attention, InlineAttention)
        first = arm.replace(",", " ").split()[0]
        operator = {"one": "inline", "rolled": "inline"}.get(first, first.lower())
        assert attention.operator == operator
        assert attention.queries == {"one": "mean", "rolled": "rolled"}.get(first, "own")
        with_residual = arm.endswith(("residual", "shared kernel"))
        assert (attention.residual is not None) == with_residual
        kernel = {"relu": "ReLU", "leaky": "LeakyReLU", "affine": "Sequential"}
        names = [kernel[word] for word in ("leaky", "affine", "relu") if word in arm]
        assert type(attention.phi).__name__ == (names or ["Identity"])[0]


def test_profiles_train_known_arms_and_every_canvas_once_at_cpu():
    for setting in SETTINGS.values():
        assert set(setting.arms) <= set(ARMS)
    cpu = SETTINGS["cpu"]
    assert cpu.arms == MAIN
    assert cpu.steps * cpu.batch <= cpu.train_canvases


def test_arms_of_open_questions_have_more_seeds_and_none_that_earlier_runs_had():
    cpu = SETTINGS["cpu"]
    assert set(CLOSE) <= set(MAIN)
    for arm in cpu.arms:
        seeds = cpu.seeds_of(arm)
        assert len(seeds) == (7 if arm in CLOSE else 4)
        assert min(seeds) == FIRST_SEED == 4


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'cosine'; there are: softmax, linear, relu"):
        untrained("cosine", SMALL, 0)


def test_batches_show_every_picture_once_before_any_comes_again():
    pixels = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 2, 2)
    source = shuffled(pixels, torch.arange(10), 3, 0)
    rounds = [[next(source) for _ in range(3)] for _ in range(2)]
    for batches in rounds:
        labels = torch.cat([labels for _, labels in batches])
        assert len(set(labels.tolist())) == 9
        for shown, labels in batches:
            assert torch.equal(shown[:, 0, 0, 0], (labels - 127.5) / 127.5)
    again = shuffled(pixels, torch.arange(10), 3, 0)
    assert torch.equal(next(again)[1], rounds[0][0][1])
    assert centred(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).tolist() == [[[[-1, 1]]]]


def two_kinds(count=64):
    """Canvases that are bright on the left or on the right, and which."""
    labels = torch.arange(count) % 2
    pixels = torch.zeros(count, 1, 32, 32, dtype=torch.uint8)
    pixels[labels == 0, :, :, :16] = 255
    pixels[labels == 1, :, :, 16:] = 255
    return pixels, labels


@pytest.mark.parametrize("arm", ["softmax", "linear, relu", "InLine + residual"])
def test_training_learns_what_is_easy(arm):
    setting = replace(SETTINGS["smoke"], size=SMALL, steps=150, rate=1e-2, batch=16)
    _, losses = build.fit(arm, setting, *two_kinds(), seed=0)
    assert losses[-5:].mean() < 0.2 * losses[0]
    pixels, labels = two_kinds()
    model = linear_classifier(setting, pixels, labels)
    assert (model(centred(pixels)).argmax(1) == labels).float().mean() > 0.95


def test_arms_of_one_seed_read_the_same_pictures(monkeypatch):
    setting = replace(SETTINGS["smoke"], size=SMALL, steps=2)
    seen = {"softmax": [], "mean": []}
    for arm, rows in seen.items():
        monkeypatch.setattr(
            build,
            "cross_entropy",
            lambda model, batch, rows=rows: rows.append(batch[0]) or model(batch[0]).square().sum(),
        )
        build.fit(arm, setting, *two_kinds(), seed=1)
    for left, right in zip(*seen.values(), strict=True):
        assert torch.equal(left, right)


def test_building_and_reading_back(tmp_path, monkeypatch):
    arms = ("softmax", "InLine + residual")
    setting = replace(SETTINGS["smoke"], arms=arms, seeds=2, more_seeds=3)
    monkeypatch.setitem(SETTINGS, "smoke", setting)
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path)
    build.build(tmp_path, "smoke")
    trained = build.load("smoke")
    assert list(trained.models) == ["softmax", "InLine + residual"]
    pixels, labels = build.garment_canvases("train", setting.train_canvases, seed=0)
    for arm, found in trained.models.items():
        assert trained.losses[arm].shape == (3 if arm in CLOSE else 2, setting.steps)
        for number, model in enumerate(found):
            again, losses = build.fit(arm, setting, pixels, labels, FIRST_SEED + number)
            assert torch.equal(losses, trained.losses[arm][number])
            assert torch.equal(again.head.weight, model.head.weight)
            assert not model.training
    assert trained.pixels.shape == (setting.test_canvases, 1, 32, 32)
    assert trained.linear.shape == (setting.test_canvases, 10)
    assert len(trained.labels) == setting.test_canvases
