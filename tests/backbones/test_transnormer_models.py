"""The build of TransNormerLLM's arms: equal sizes, equal starts, equal text, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import transnormer as build
from reattend.backbones.trained.transnormer import (
    ARMS,
    MAIN,
    SETTINGS,
    Shape,
    pair_counts,
    spread_rows,
    untrained,
)
from reattend.language_modeling.transnormer import GatedLinearAttention, decay_slopes
from reattend.trunks.language import innermost, same_size
from reattend.trunks.mixers import TokenShift

SMALL = Shape(40, 16, 16, 2, 2)


def stream(length=2000, seed=0):
    return torch.randint(40, (length,), generator=torch.Generator().manual_seed(seed))


def slopes(model):
    return torch.stack([innermost(block.mixer).slopes for block in model.blocks])


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_arms_have_as_many_parameters_within_one_per_cent(profile):
    shape = SETTINGS[profile].shape
    with torch.device("meta"):
        same_size({arm: untrained(arm, shape, 0) for arm in ARMS}, tolerance=0.01)


def test_arms_of_one_seed_start_alike_and_seeds_do_not():
    first = untrained("TNL", SMALL, 3)
    for arm in MAIN:
        assert torch.equal(untrained(arm, SMALL, 3).tokens.weight, first.tokens.weight)
    assert not torch.equal(untrained("TNL", SMALL, 4).tokens.weight, first.tokens.weight)


def test_the_mixture_turns_in_the_first_layer_and_decays_in_all():
    shape = replace(SMALL, layers=3)
    turned = {
        arm: [innermost(b.mixer).rates is not None for b in untrained(arm, shape, 0).blocks]
        for arm in ("TNL", "LRPE", "APE", "LRPE-d", "Exp-decay")
    }
    assert turned["TNL"] == [True, False, False]
    assert turned["LRPE"] == turned["LRPE-d"] == [True] * 3
    assert turned["APE"] == turned["Exp-decay"] == [False] * 3
    for arm in ("TNL", "LRPE-d", "Exp-decay", "No content", "No gate"):
        assert torch.equal(slopes(untrained(arm, shape, 0)), decay_slopes(2, 3))
    for arm in ("LRPE", "APE"):
        assert not slopes(untrained(arm, shape, 0)).any()
    constant = slopes(untrained("No temperature", shape, 0))
    assert torch.equal(constant, decay_slopes(2, 3)[:1].expand(3, -1))


def test_only_arms_without_other_positions_learn_absolute_ones():
    with_positions = {arm for arm in ARMS if untrained(arm, SMALL, 0).positions is not None}
    assert with_positions == {"1 + elu", "APE"}


def test_a_shift_goes_around_every_mixer():
    model = untrained("TNL", replace(SMALL, shift=True), 0)
    for block in model.blocks:
        assert isinstance(block.mixer, TokenShift)
        assert isinstance(innermost(block.mixer), GatedLinearAttention)
        assert block.mixer.share.sum() == 8


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'RWKV'; there are: Softmax, 1"):
        untrained("RWKV", SMALL, 0)


def test_pairs_are_counted_and_rows_spread():
    tokens = torch.tensor([0, 1, 1, 2, 0, 1])
    assert pair_counts(tokens, 3).tolist() == [[0, 2, 0], [0, 1, 1], [1, 0, 0]]
    assert spread_rows(torch.arange(11), 2, 3).tolist() == [[0, 1, 2], [5, 6, 7]]
    with pytest.raises(ValueError, match="11 tokens hold no 4 rows of 3"):
        spread_rows(torch.arange(11), 4, 3)


def test_training_lowers_the_loss_on_a_text_that_repeats_itself():
    setting = replace(SETTINGS["smoke"], shape=SMALL, steps=60, rate=1e-2)
    text = torch.arange(40).repeat(50)
    for arm in ("TNL", "Softmax"):
        _, losses = build.fit(arm, setting, text, 0)
        assert losses[-1] < 0.5 * losses[0]


def test_training_and_reading_back(tmp_path, monkeypatch):
    small = replace(SETTINGS["smoke"], shape=SMALL, seeds=2, test_rows=3)
    monkeypatch.setitem(SETTINGS, "smoke", small)
    monkeypatch.setattr(build, "streams", lambda entries: (stream(), stream(seed=1)))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build.build(tmp_path / name, "smoke")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path / "first")
    found = build.load("smoke")
    assert list(found.models) == list(found.losses) == list(small.arms)
    assert found.losses["TNL"].shape == (2, small.steps)
    assert found.held_out.shape == (3, 17)
    assert found.pairs.sum() == 1999
    trained = found.models["TNL"][1]
    assert not trained.training
    assert not torch.equal(trained.head.weight, untrained("TNL", SMALL, 1).head.weight)
