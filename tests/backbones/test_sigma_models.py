"""The build of Sigma's arms: sizes, equal starts, the placebo, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import sigma as build
from reattend.backbones.trained.sigma import ARMS, CPU, SETTINGS, ElsewhereAttention, untrained
from reattend.data.row_language import RowLanguage
from reattend.trunks.language import innermost, parameter_count

SMALL = replace(SETTINGS["smoke"], language=RowLanguage(vocabulary=7, length=12))


def first_mixer(arm, setting=SETTINGS["cpu"], seed=0):
    return innermost(untrained(arm, setting, seed).blocks[0].mixer)


def test_arms_have_the_heads_that_their_names_say():
    for name in ("K8 V8", "K1 V8", "K8 V1", "K2 V8", "K8 V2", "K2 V2"):
        mixer = first_mixer(name)
        assert f"K{mixer.key_heads} V{mixer.value_heads}" == name
        assert (mixer.augment, mixer.lift) == (None, None)
    half = first_mixer("half K")
    assert (half.key_heads, half.key_width, half.head_width) == (8, 4, 8)
    for name in ("AugQ", "AugQ elsewhere"):
        mixer = first_mixer(name)
        assert (mixer.key_heads, mixer.value_heads) == (2, 2)
        assert mixer.augment.gate.out_features == 96
        assert isinstance(mixer, ElsewhereAttention) == (name == "AugQ elsewhere")


def test_compared_arms_have_equally_many_parameters_and_cached_numbers():
    models = {arm: untrained(arm, SETTINGS["cpu"], 0) for arm in ARMS}
    for pair in (("K1 V8", "K8 V1"), ("K2 V8", "K8 V2")):
        assert len({parameter_count(models[arm]) for arm in pair}) == 1
        assert len({models[arm].state_size(50) for arm in pair}) == 1
    matched = {parameter_count(models[arm]) for arm in ("AugQ", "AugQ elsewhere", "AugF")}
    assert len(matched) == 1
    assert matched.pop() - parameter_count(models["K2 V2"]) == 2 * 3 * 64 * 96


def test_arms_of_one_seed_start_alike_and_seeds_do_not():
    first = dict(untrained("K8 V8", SMALL, 3).named_parameters())
    shared = 0
    for arm in ARMS:
        for name, weight in untrained(arm, SMALL, 3).named_parameters():
            if name in first and weight.shape == first[name].shape:
                assert torch.equal(weight, first[name]), (arm, name)
                shared += 1
    assert shared > 10 * len(ARMS)
    other = untrained("K8 V8", SMALL, 4)
    assert not torch.equal(other.tokens.weight, first["tokens.weight"])
    assert not torch.equal(
        other.blocks[0].mixer.mixer.query.weight, other.blocks[1].mixer.mixer.query.weight
    )


def test_the_placebo_adds_what_the_unit_says_of_an_earlier_token():
    torch.manual_seed(0)
    mixer = ElsewhereAttention(24, 3, augmented=10)
    x = torch.randn(2, 9, 24)
    q0 = mixer.query(x)
    added = mixer.queries(x) - q0
    candidates = mixer.augment(q0)
    distance = torch.cdist(added, candidates)
    nearest = distance.argmin(-1)
    assert distance.amin(-1).max() < 1e-5
    places = torch.arange(9)
    assert (nearest[:, 1:] < places[1:]).all()
    assert (nearest[:, 0] == 0).all()  # the first token has none before it
    draws = torch.stack(
        [torch.cdist(mixer.queries(x) - q0, candidates).argmin(-1)[0] for _ in range(200)]
    )
    assert draws[:, 8].unique().tolist() == list(range(8))
    assert abs(draws[:, 8].float().mean() - 3.5) < 0.7
    mixer.augment.down.weight.data.zero_()
    torch.testing.assert_close(mixer.queries(x), q0)


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'K3 V3'; there are: K8 V8, K1 V8"):
        untrained("K3 V3", SMALL, 0)


def test_training_learns_what_follows_in_rows_that_repeat_themselves():
    sure = RowLanguage(vocabulary=5, length=16, chances=((1.0,),))
    setting = replace(SETTINGS["smoke"], width=32, batch=32, steps=150, rate=1e-2, language=sure)
    for arm in ("K8 V8", "AugQ"):
        _, losses = build.fit(arm, setting, 0)
        assert losses[-10:].mean() < 0.6 * losses[0]


def test_training_and_reading_back(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "smoke", replace(SMALL, seeds=2))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build.build(tmp_path / name, "smoke")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path / "first")
    found = build.load("smoke")
    assert list(found.models) == list(CPU)
    assert found.losses["AugQ"].shape == (2, SMALL.steps)
    trained = found.models["K1 V8"][1]
    assert not trained.training
    assert not torch.equal(trained.head.weight, untrained("K1 V8", SMALL, 1).head.weight)
