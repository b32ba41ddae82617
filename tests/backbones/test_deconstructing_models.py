"""The build of the simplified models: equal sizes, equal starts, the stream, the shift, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import deconstructing_attention as build
from reattend.backbones.trained.deconstructing_attention import (
    HYBRIDS,
    SETTINGS,
    VARIANTS,
    Shape,
    ShiftedEmbeddings,
    untrained,
    variants,
)
from reattend.language_modeling.deconstructing_attention import StaticEmbQK, StreamTrunk
from reattend.trunks.language import innermost, parameter_count, same_size
from reattend.trunks.mixers import SoftmaxAttention, TokenShift

SMALL = Shape(40, 16, 12, 4, 2, 16)


def stream(length=2000, seed=0):
    return torch.randint(40, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_all_arms_but_half_have_equally_many_parameters(profile):
    setting = SETTINGS[profile]
    arms = {arm: untrained(arm, setting.shape, 0) for arm in setting.arms}
    half = arms.pop("Half")
    same_size(arms, tolerance=0.0)
    standard = arms["Standard"]
    layers = parameter_count(standard.blocks)
    assert parameter_count(standard) - parameter_count(half) == layers // 2
    assert parameter_count(half.blocks) == layers // 2


def test_an_arm_names_its_layers():
    assert variants("Standard", 4) == ("Standard",) * 4
    assert variants("Half", 4) == ("Standard",) * 2
    assert variants("MLP", 3) == ("MLP",) * 3
    assert variants("RndEmbQK hybrid", 4) == ("RndEmbQK", "Standard") * 2
    both_ends = variants("RndEmbQK all but both ends", 4)
    assert both_ends == ("Standard", "RndEmbQK", "RndEmbQK", "Standard")
    with pytest.raises(ValueError, match="unknown variant 'RWKV'; there are: Half, Standard, MLP"):
        variants("RWKV hybrid", 4)


def test_layers_are_what_the_arm_says():
    for arm in ("Half", *HYBRIDS):
        model = untrained(arm, SMALL, 0)
        kinds = [type(block.mixer) for block in model.blocks]
        named = [VARIANTS[v] for v in variants(arm, 4)]
        assert kinds == named
    assert SoftmaxAttention in kinds


def test_arms_of_one_seed_start_alike_and_seeds_do_not():
    first = untrained("Standard", SMALL, 3)
    for arm in SETTINGS["cpu"].arms:
        assert torch.equal(untrained(arm, SMALL, 3).tokens.weight, first.tokens.weight)
    assert not torch.equal(untrained("Standard", SMALL, 4).tokens.weight, first.tokens.weight)


def test_streams_are_noise_of_the_embeddings_size_or_the_beginning_of_the_text():
    noise = [untrained("RndEmbQK hybrid", SMALL, seed).stream for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    wide = untrained("RndEmbQK", replace(SMALL, length=400), 0).stream
    assert wide.std().item() == pytest.approx(12**-0.5, rel=0.05)
    text = stream()[:16]
    assert torch.equal(untrained("FixedSeqQK", SMALL, 0, text).stream, text)
    for arm in ("Standard", "StaticEmbQK", "MLP"):
        assert not isinstance(untrained(arm, SMALL, 0, text), StreamTrunk)


def test_a_shift_goes_around_every_mixer_and_to_the_embeddings_of_static():
    shape = replace(SMALL, shift=True)
    for arm, kind in (("Standard", TokenShift), ("StaticEmbQK", ShiftedEmbeddings)):
        mixer = untrained(arm, shape, 0).blocks[1].mixer
        assert type(mixer) is kind
        assert mixer.share.tolist() == [0.0] * 6 + [1.0] * 6
    mixer = mixer.double()
    inner = innermost(mixer)
    assert isinstance(inner, StaticEmbQK)
    x, e = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    shifted = [torch.cat([t[..., :6], torch.zeros_like(t[..., 6:])], -1) for t in (x, e)]
    for whole, to in zip((x, e), shifted, strict=True):
        to[:, 1:, 6:] = whole[:, :-1, 6:]
    expected = inner(shifted[0], embeddings=shifted[1])
    torch.testing.assert_close(mixer(x, embeddings=e), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no cached form"):
        mixer(x, embeddings=e, cache={})


def test_training_lowers_the_loss_on_a_text_that_repeats_itself():
    setting = replace(SETTINGS["smoke"], shape=SMALL, steps=60, rate=1e-2)
    text = torch.arange(40).repeat(50)
    for arm in ("Standard", "RndEmbQK hybrid", "FixedSeqQK"):
        model, losses = build.fit(arm, setting, text, 0)
        assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.stream, text[:16])


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
    assert found.losses["RndEmbQK"].shape == (2, small.steps)
    assert found.held_out.shape == (3, 17)
    assert found.pairs.sum() == 1999
    trained = found.models["FixedSeqQK"][1]
    assert not trained.training
    assert torch.equal(trained.stream, stream()[:16])
    assert not torch.equal(trained.head.weight, untrained("FixedSeqQK", SMALL, 1).head.weight)
