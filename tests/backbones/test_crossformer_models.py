"""The build of the arms of CrossFormer: what an arm changes, equal starts, equal pictures, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import crossformer as build
from reattend.backbones.trained.crossformer import ARMS, GROUP, SETTINGS, STRIDE, untrained
from reattend.trunks.vision import multiply_adds
from reattend.vision.crossformer import (
    DynamicPositionBias,
    GroupAttention,
    PositionTable,
    RandomGroupAttention,
    ShiftedWindowAttention,
    SpatialReductionAttention,
)

SMOKE = SETTINGS["smoke"]
FLAT = [arm for arm in ARMS if not ARMS[arm].merges]


def test_arms_of_one_seed_share_their_start_and_seeds_do_not():
    for reference in ("CEL", "LSDA"):
        first = untrained(reference, SMOKE, 3).state_dict()
        for arm in FLAT if reference == "LSDA" else ("one kernel", "one wide kernel"):
            state = untrained(arm, SMOKE, 3).state_dict()
            shared = [n for n in first if n in state and state[n].shape == first[n].shape]
            assert {"head.weight", "layers.0.blocks.0.mlp.fc1.weight"} <= set(shared)
            for name in shared:
                assert torch.equal(state[name], first[name]), (arm, name)
        other = untrained(reference, SMOKE, 4).state_dict()
        assert not torch.equal(other["head.weight"], first["head.weight"])


def test_arms_are_what_their_names_say():
    second = {
        "shifted windows": (GroupAttention, ShiftedWindowAttention),
        "spatial reduction": (SpatialReductionAttention, SpatialReductionAttention),
        "random groups": (GroupAttention, RandomGroupAttention),
    }
    kernels = {"CEL": [4, 8, 16, 32], "one wide kernel": [14]}
    bias = {"table": PositionTable, "no bias": type(None)}
    intervals = {"SDA only": [1, 1], "LDA only": [2, 2]}
    for arm in ARMS:
        model = untrained(arm, SMOKE, 0)
        found = [block.attn for block in model.layers[0].blocks]
        usual = (GroupAttention, GroupAttention) if arm in FLAT else (GroupAttention,)
        assert tuple(map(type, found)) == second.get(arm, usual), arm
        if arm in FLAT and arm not in second:
            assert [a.interval for a in found] == intervals.get(arm, [1, 2])
        assert len(model.layers) == (1 if arm in FLAT else 2)
        for attention in found:
            assert type(attention.pos) is bias.get(arm, DynamicPositionBias), arm
        sides = [convolve.kernel_size[0] for convolve in model.patch_embed.projs]
        assert sides == kernels.get(arm, [4])
        assert model.patch_embed.projs[0].stride == (STRIDE, STRIDE)


@pytest.mark.parametrize(("arm", "rate", "biases"), [("table", 10, 2), ("LSDA", 1, 28)])
def test_biases_have_a_learning_rate_of_their_own(arm, rate, biases):
    model = untrained(arm, SMOKE, 0)
    own = {id(p) for block in model.layers[0].blocks for p in block.attn.pos.parameters()}
    assert len(own) == biases
    groups = build.groups_of(model, ARMS[arm])
    for group in groups:
        for parameter in group["params"]:
            assert group["rate"] == (rate if id(parameter) in own else 1)
            if parameter.ndim == 1 or (arm == "table" and id(parameter) in own):
                assert group["weight_decay"] == 0
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_costs_of_compared_arms():
    picture = torch.zeros(1, 1, 32, 32)
    counted = {arm: multiply_adds(untrained(arm, SETTINGS["cpu"], 0), picture) for arm in ARMS}
    assert counted["one kernel"] < counted["CEL"] < counted["one wide kernel"]
    for arm in FLAT:
        assert counted[arm] == pytest.approx(counted["LSDA"], rel=0.25), arm
    assert counted["SDA only"] == counted["LDA only"] == counted["LSDA"]


def test_random_deals_differ_by_seed_and_cover_the_map():
    orders = [
        untrained("random groups", SMOKE, seed).layers[0].blocks[1].attn.order for seed in (0, 1)
    ]
    assert not torch.equal(*orders)
    for order in orders:
        assert order.flatten().sort().values.tolist() == list(range(64))
        windows = order // 32 * 2 + order % 8 // GROUP
        assert all(group.bincount().tolist() == [4] * 4 for group in windows)  # as LDA's groups


def test_every_canvas_is_read_once_at_cpu():
    cpu = SETTINGS["cpu"]
    for arm in ARMS.values():
        training = cpu.of(arm)
        assert training.steps * training.batch <= cpu.train_canvases


def test_arms_that_are_close_have_more_seeds_and_all_begin_with_the_same():
    cpu = SETTINGS["cpu"]
    close = ("LSDA", "LDA only", "table", "CEL", "one wide kernel")
    assert [cpu.seeds(ARMS[arm]) for arm in close] == [range(5, 13)] * len(close)
    for arm in ("no bias", "random groups", "one kernel"):
        assert cpu.seeds(ARMS[arm]) == range(5, 9)
    assert "spatial reduction" not in cpu.arms
    assert set(SETTINGS["gpu"].arms) == set(ARMS)


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'windows'; there are: CEL, one kernel"):
        untrained("windows", SMOKE, 0)


def two_kinds(count=64):
    """Canvases that are bright on a half or on a quarter, and which."""
    labels = torch.arange(count) % 2
    pixels = torch.zeros(count, 1, 32, 32, dtype=torch.uint8)
    pixels[labels == 0, :, :, :16] = 255
    pixels[labels == 1, :, :, :8] = 255
    return pixels, labels


@pytest.mark.parametrize("arm", ["CEL", "random groups"])
def test_training_learns_what_is_easy(arm):
    longer = {"batch": 16, "steps": 60, "rate": 1e-2}
    setting = replace(
        SMOKE, pyramid=replace(SMOKE.pyramid, **longer), flat=replace(SMOKE.flat, **longer)
    )
    _, losses = build.fit(arm, setting, *two_kinds(), seed=0)
    assert losses[-5:].mean() < 0.2 * losses[0]


def test_arms_of_one_seed_read_the_same_pictures_and_seeds_do_not(monkeypatch):
    seen = {("CEL", 1): [], ("SDA only", 1): [], ("CEL", 2): []}
    for (arm, seed), rows in seen.items():
        monkeypatch.setattr(
            build,
            "cross_entropy",
            lambda model, batch, rows=rows: rows.append(batch[0]) or model(batch[0]).square().sum(),
        )
        build.fit(arm, SMOKE, *various(), seed=seed)
    first, same_seed, other_seed = (torch.stack(rows) for rows in seen.values())
    assert len(first) == 2
    assert torch.equal(first, same_seed)
    assert not torch.equal(first, other_seed)


def various(count=64):
    """Canvases of different brightness, and labels."""
    labels = torch.arange(count) % 2
    levels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return levels.expand(-1, 1, 32, 32).contiguous(), labels


def test_building_and_reading_back(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path)
    build.build(tmp_path, "smoke")
    setting, trained = SMOKE, build.load("smoke")
    assert list(trained.models) == [arm for arm in ARMS if arm != "spatial reduction"]
    pixels, labels = build.garment_canvases("train", setting.train_canvases, seed=0)
    for arm in ("CEL", "table", "random groups"):
        assert trained.losses[arm].shape == (2 if arm == "random groups" else 3, 2)
        for seed, model in zip(setting.seeds(ARMS[arm]), trained.models[arm], strict=True):
            again, losses = build.fit(arm, setting, pixels, labels, seed)
            assert torch.equal(losses, trained.losses[arm][seed - build.FIRST_SEED])
            assert torch.equal(again.head.weight, model.head.weight)
            assert not model.training
    assert trained.pixels.shape == (setting.test_canvases, 1, 32, 32)
    assert trained.linear.shape == (setting.test_canvases, 10)
