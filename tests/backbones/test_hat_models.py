"""The arms of HAT's study: what they share, what their placebos lack, and what they are trained on."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from reattend.backbones.trained import hat as build
from reattend.backbones.trained.hat import (
    ARMS,
    DENOISING,
    ENLARGING,
    EQUAL_PARAMETERS,
    GAIN,
    PARTS,
    RIVALS,
    SETTINGS,
    SIGNS,
    equal_time_steps,
    faster_tables,
    fit_restorer,
    fit_solver,
    step_runs,
    untrained_restorer,
    untrained_solver,
)
from reattend.trunks.language import parameter_count
from reattend.trunks.vision import multiply_adds


def test_arms_of_a_seed_share_their_weights():
    full = untrained_solver("HAT", GAIN, 3).state_dict()
    for arm in (*ARMS, *RIVALS):
        own = untrained_solver(arm, GAIN, 3).state_dict()
        shared = [k for k in own if k in full and full[k].shape == own[k].shape]
        assert {"embed.weight", "read.bias"} <= set(shared)
        assert all(torch.equal(own[k], full[k]) for k in shared)
    other = untrained_solver("HAT", GAIN, 4).state_dict()
    assert not torch.equal(other["embed.weight"], full["embed.weight"])
    with pytest.raises(ValueError, match="there are: SwinIR"):
        untrained_solver("nothing", GAIN, 0)


@pytest.mark.parametrize(
    ("method", "placebo"),
    [
        ("+ OCAB", "+ OCAB, own window"),
        ("+ CAB", "+ CAB, blind"),
        ("HAT", "HAT, placebo"),
        ("RCAN", "EDSR"),
    ],
)
def test_placebos_have_as_many_parameters(method, placebo):
    counts = [parameter_count(untrained_solver(arm, GAIN, 0)) for arm in (method, placebo)]
    assert counts[0] == counts[1]


def answer_reach(arm, task):
    """How many pixels the answer in the middle depends on."""
    model = untrained_solver(arm, task, 0).double()
    channels = 1 if task.distance else 2
    generator = torch.Generator().manual_seed(0)
    shape = (1, task.side, task.side, channels)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    model(x)[0, task.side // 2, task.side // 2].backward()
    return int((x.grad[0].abs().sum(-1) > 0).sum())


def test_only_seeing_gates_reach_the_whole_map():
    everything = GAIN.side**2
    assert answer_reach("+ CAB", GAIN) == answer_reach("RCAN", GAIN) == everything
    # one window of 4 at the second, four of them at the first
    assert answer_reach("SwinIR", GAIN) == 64
    assert answer_reach("EDSR", GAIN) == 81
    for arm in ("+ CAB, blind", "HAT, placebo"):
        assert 64 < answer_reach(arm, GAIN) < everything


def test_tables_learn_faster():
    model = untrained_solver("HAT", SIGNS, 0)
    rest, tables = faster_tables(model)
    assert tables["rate"] == 10
    assert [p.shape[1] for p in tables["params"]] == [4, 4, 4]
    assert len(rest["params"]) + len(tables["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("scale", [1, 2])
def test_restorers_start_from_their_input(scale):
    setting = replace(DENOISING, scale=scale)
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for arm in setting.arms:
        model = untrained_restorer(arm, setting, 0).eval()
        assert model(x).shape == (1, 3, 16 * scale, 16 * scale)
        if scale == 1:
            assert torch.equal(model(x), x)


def test_training_repeats_itself_and_learns():
    task = replace(SIGNS, steps=40, batch=4)
    first, log = fit_solver("+ OCAB", task, 0)
    again, _ = fit_solver("+ OCAB", task, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert sum(log.losses[-5:]) < 0.95 * sum(log.losses[:5])
    setting = replace(DENOISING, steps=12, batch=2, crop=16)
    _, log = fit_restorer("RCAN", setting, 0)
    assert sum(log.losses[-4:]) < sum(log.losses[:4])


def test_every_profile_is_told():
    assert set(SETTINGS) == {"smoke", "cpu", "gpu"}
    for setting in SETTINGS.values():
        assert set(setting.signs.arms) <= set(ARMS)
        assert set(setting.restoration.arms) <= set(ARMS) | set(RIVALS)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_restorers_of_every_profile_take_a_step(profile):
    setting = replace(SETTINGS[profile].restoration, steps=1, batch=1)
    model, log = fit_restorer("HAT", setting, 0)
    assert len(log.losses) == 1
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model(x).shape == (1, 3, 32 * setting.scale, 32 * setting.scale)


def test_the_grid_of_parts_at_equal_parameters_and_cost():
    """Each part on and off: without its idea the layers stay, in the paper's grid they go."""
    for arms, off in ((PARTS, {"off"}), (EQUAL_PARAMETERS, {"own", "blind"})):
        corners = {tuple(ARMS[arm].get(part, "on") for part in ("ocab", "cab")) for arm in arms}
        assert len(corners) == 4
        assert {value for corner in corners for value in corner} == off | {"on"}
    picture = torch.zeros(1, 3, 16, 16)
    counted = {
        arm: (parameter_count(model), multiply_adds(model.eval(), picture))
        for arm in (*PARTS, *EQUAL_PARAMETERS)
        for model in [untrained_restorer(arm, DENOISING, 0)]
    }
    assert {counted[arm] for arm in EQUAL_PARAMETERS} == {counted["HAT"]}
    assert len({counted[arm] for arm in PARTS}) == 4
    assert set(PARTS[:-1]) == set(ENLARGING.equal_time)
    assert {*PARTS, *EQUAL_PARAMETERS} <= set(ENLARGING.arms)


@pytest.mark.parametrize(("most", "expected"), [(90, {"SwinIR": 60, "+ CAB": 20}), (50, None)])
def test_equal_time_is_steps_times_the_ratio_of_costs(monkeypatch, most, expected):
    """HAT's step costs three times SwinIR's and half of the other's; which does not get fewer steps than HAT."""
    cost, now = {"HAT": 9.0, "SwinIR": 3.0, "+ CAB": 18.0}, [0.0]

    def step(arm):
        now[0] += cost[arm]

    monkeypatch.setattr(build, "device_clock", lambda device: lambda: now[0])
    monkeypatch.setattr(build, "step_runs", lambda arms, *_: {a: partial(step, a) for a in arms})
    setting = replace(DENOISING, steps=20, equal_time=("SwinIR", "+ CAB"), most=most)
    found = equal_time_steps(setting, rounds=3)
    assert found == (expected or {"SwinIR": 50, "+ CAB": 20})
    assert max(found.values()) <= most


def test_nothing_is_timed_where_no_arm_is_trained_for_equal_time():
    assert equal_time_steps(DENOISING) == {}


def test_a_timed_run_is_the_training_itself():
    setting = replace(DENOISING, batch=1, crop=16)
    log = step_runs(["SwinIR"], setting, steps=3)["SwinIR"]()
    _, whole = fit_restorer("SwinIR", replace(setting, steps=3), 0)
    assert log.losses == whole.losses


def test_arms_of_equal_time_are_read_back_with_their_own_steps(tmp_path, monkeypatch):
    shorter = replace(SETTINGS["smoke"].restoration, most=5)
    quick = replace(SETTINGS["smoke"], seeds=1, restoration=shorter)
    monkeypatch.setitem(SETTINGS, "smoke", quick)
    monkeypatch.setattr(build, "equal_time_steps", lambda *_: {"SwinIR": 4})
    monkeypatch.setattr(build, "backbone_path", lambda *_: tmp_path)
    build.build(tmp_path, "smoke")
    trained = build.load("smoke")
    assert trained.losses["equal time"]["SwinIR"].shape == (1, 4)
    assert trained.losses["restoration"]["SwinIR"].shape == (1, 2)
    again, _ = fit_restorer("SwinIR", replace(shorter, steps=4), 0)
    read = trained.networks["equal time"]["SwinIR"][0].state_dict()
    assert all(torch.equal(weights, read[name]) for name, weights in again.state_dict().items())
