"""The build of selective attention's arms: equal starts and rows, what placebos keep, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import selective_attention as build
from reattend.backbones.trained.selective_attention import (
    ARMS,
    MAIN,
    SETTINGS,
    ConstantTemperature,
    ElsewhereTemperature,
    Setting,
    Shape,
    parameter_groups,
    untrained,
)
from reattend.language_modeling.selective_attention import SelectiveAttention, Temperature
from reattend.trunks.language import innermost, parameter_count, same_size

SMALL = Shape(12, 23, 16, 2, 2, shift=True)
ROWS = Setting("rows", SMALL, 4, 3, 6e-3, 2, MAIN, ("q",), 8)
TEXT = replace(ROWS, corpus="text", shape=replace(SMALL, shift=False))


def stream(seed):
    return torch.randint(12, (500,), generator=torch.Generator().manual_seed(seed))


def temperatures(arm):
    return innermost(untrained(arm, SMALL, 0).blocks[1].mixer).temperatures


def test_arms_differ_by_less_than_a_per_cent():
    shape = SETTINGS["cpu"][0].shape
    models = {arm: untrained(arm, shape, 0) for arm in ARMS if arm != "No mixing"}
    same_size(models, tolerance=0.01)
    added = parameter_count(models["SSA"]) - parameter_count(models["Softmax"])
    assert added == shape.layers * 2 * (shape.width + 1)
    assert parameter_count(models["SSA"]) == parameter_count(models["Elsewhere"])


def test_arms_of_one_seed_start_alike_and_seeds_do_not():
    first = untrained("Softmax", SMALL, 3)
    for arm in MAIN:
        model = untrained(arm, SMALL, 3)
        assert torch.equal(model.tokens.weight, first.tokens.weight)
        project = innermost(model.blocks[0].mixer).project.weight
        assert torch.equal(project, innermost(first.blocks[0].mixer).project.weight)
    assert not torch.equal(untrained("Softmax", SMALL, 4).tokens.weight, first.tokens.weight)


def test_each_arm_has_its_temperatures():
    kinds = {arm: {part: type(tau) for part, tau in temperatures(arm).items()} for arm in MAIN[1:]}
    for arm, kind in zip(
        MAIN[1:], (Temperature, ElsewhereTemperature, ConstantTemperature), strict=True
    ):
        assert kinds[arm] == {"query": kind, "value": kind}
    assert set(temperatures("q")) == set(temperatures("official")) == {"query"}
    assert set(temperatures("v")) == {"value"}
    assert set(temperatures("q, k and v")) == {"query", "key", "value"}
    assert temperatures("token")["query"].strength is None
    assert temperatures("position")["query"].direction is None
    plain = innermost(untrained("Softmax", SMALL, 0).blocks[0].mixer)
    assert not isinstance(plain, SelectiveAttention)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_placebo_takes_whole_temperatures_from_visible_places(seed):
    torch.manual_seed(seed)
    tau = ElsewhereTemperature(2, 5)
    torch.nn.init.normal_(tau.direction)
    torch.nn.init.constant_(tau.strength, 1.0)
    features, places = torch.randn(3, 2, 40, 5), torch.arange(1, 41)
    own = Temperature.forward(tau, features, places)[..., 0]
    dealt, again = tau(features, places)[..., 0], tau(features, places)[..., 0]
    assert not torch.equal(dealt, again)
    assert torch.equal(dealt[:, :, 0], own[:, :, 0])
    moved = 0
    for row in range(3):
        for place in range(40):
            # The same place for both heads, at or before this one.
            same = (own[row, :, : place + 1] - dealt[row, :, place, None]).abs().amax(0) < 1e-5
            assert same.any()
            moved += not same[place]
    assert moved > 80


def test_constant_temperatures_are_the_same_everywhere_and_trained():
    tau = ConstantTemperature(2)
    assert torch.equal(tau(torch.randn(3, 2, 7, 5), torch.arange(1, 8)), torch.ones(2, 1, 1))
    torch.nn.init.constant_(tau.level, 0.5)
    found = tau(torch.randn(3, 2, 7, 5), torch.arange(1, 8))
    torch.testing.assert_close(
        found, torch.full((2, 1, 1), 1 + torch.tanh(torch.tensor(0.5)).item())
    )


def test_no_mixing_sees_one_token():
    model = untrained("No mixing", SMALL, 0)
    rows = torch.randint(12, (2, 24), generator=torch.Generator().manual_seed(0))
    other = rows.clone()
    other[:, :10] = 0
    torch.testing.assert_close(model(rows)[:, 10:], model(other)[:, 10:])


@pytest.mark.parametrize("arm", ["SSA", "official", "Softmax"])
def test_strengths_train_faster_and_every_parameter_once(arm):
    model = untrained(arm, SMALL, 0)
    groups = parameter_groups(model)
    counted = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in counted}) == len(counted) == len(list(model.parameters()))
    fast = list(groups[-1]["params"])
    assert len(fast) == {"SSA": 4, "official": 2, "Softmax": 0}[arm]
    assert all(p.ndim == 0 for p in fast)
    assert groups[-1]["rate"] == 10
    decayed = [p for group in groups if "weight_decay" not in group for p in group["params"]]
    assert all(p.ndim == 2 for p in decayed)


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'Yarn'; there are: Softmax, SSA"):
        untrained("Yarn", SMALL, 0)


def test_tokens_differ_in_the_number_of_their_successors():
    counts = (SETTINGS["cpu"][1].language.transitions > 0).sum(-1)
    assert sorted(set(counts.tolist())) == [1, 2, 6]


def test_arms_read_the_same_rows_and_are_tested_on_others(monkeypatch):
    monkeypatch.setattr(build, "text_streams", lambda entries: (stream(0), stream(1)))
    for setting in (ROWS, TEXT):
        first, again, other = (next(build.batches(setting, seed)) for seed in (0, 0, 1))
        assert first.shape == (4, 24)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert build.test_rows(setting).shape == (8, 24)
    # Text is tested on what is held out.
    assert torch.equal(build.test_rows(TEXT)[0], stream(1)[:24])


def test_training_and_reading_back(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "smoke", (TEXT, ROWS))
    monkeypatch.setattr(build, "text_streams", lambda entries: (stream(0), stream(1)))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build.build(tmp_path / name, "smoke")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path / "first")
    found = build.load("smoke")
    assert list(found) == ["text", "rows"]
    for trained in found.values():
        assert list(trained.models) == list(trained.losses) == [*MAIN, "q"]
        assert trained.losses["SSA"].shape == (2, 3)
        assert trained.losses["q"].shape == (1, 3)
        assert trained.rows.shape == (8, 24)
        model = trained.models["SSA"][1]
        assert not model.training
        start = untrained("SSA", trained.setting.shape, 1)
        pairs = zip(model.named_parameters(), start.parameters(), strict=True)
        for (name, now), before in pairs:
            assert not torch.equal(now, before), name
