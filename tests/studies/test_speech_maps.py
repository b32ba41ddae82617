"""The study of speech maps: placebos hold no more than they should, and curves start and end together."""

import numpy as np
import pytest
import torch

from reattend.data.spoken_prompts import Prompt
from reattend.speech import s2t_cross_attention as method
from reattend.speech.s2t_cross_attention import Speech
from reattend.studies import speech_maps as study
from reattend.studies.speech_maps import Explained, Recogniser, Removal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_speech(frames=20, bins=80, tokens=4):
    features = torch.rand(bins, frames + 6, generator=generator()) - 0.4
    return Speech(features, frames, torch.tensor([0]), torch.arange(tokens + 1))


def explained(text="press star now please", frames=20, tokens=4):
    prompt = Prompt("p", text, np.zeros(3200, np.float32))
    empty = torch.zeros(1, 1, tokens, frames // 2)
    speech = some_speech(frames, tokens=tokens)
    cells = torch.zeros(tokens, frames, 8)
    return Explained(
        prompt, speech, ["x"] * tokens, empty, empty, empty[..., 0, 0], {}, {}, {}, cells
    )


# Words and errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("Call-Forward on Busy.", "call forward on busy"),
        ("Press 1, then 0!", "press one then zero"),
        ("you're ... 12 there", "you're there"),
    ],
)
def test_words_are_counted_without_case_and_punctuation(text, counted):
    assert study.words(text) == counted.split()


def test_error_rates_are_clipped_per_prompt():
    prompt = Prompt("p", "press star", np.zeros(1, np.float32))
    assert study.error_rate("Press, star.", prompt) == 0
    assert study.error_rate("press a star", prompt) == 50
    assert study.error_rate("press star press star press star", prompt) == 100


# Masks ------------------------------------------------------------------------------------------------


def test_grids_take_turns_and_stay_in_pairs():
    removal = Removal(40, 12, [(2, 5), (20, 8)], 3, 8)
    speech = some_speech()
    masks = removal.draw_input(speech, generator())
    assert masks.shape == (40, 20, 8)
    assert (masks[::2] ^ masks[1::2]).all()
    changes = (masks[:, 1:] != masks[:, :-1]).flatten(1).sum(1).view(10, 2, 2)
    fine, coarse = changes[:, 0], changes[:, 1]
    assert fine.min() > coarse.max(), "pair by pair, rectangles of 2 frames and then of 20"
    outputs = removal.draw_output(speech, generator())
    assert outputs.shape == (12, 10)
    assert (outputs[::2] ^ outputs[1::2]).all()


def test_the_filling_is_that_of_the_speech_and_the_bins_in_use():
    speech = some_speech()
    cells = speech.features[:8, :20]
    mean = Removal(2, 2, [(1, 1)], 1, 8, "mean").filling(speech)
    assert mean == pytest.approx(cells.mean().item())
    assert Removal(2, 2, [(1, 1)], 1, 8, "floor").filling(speech) == cells.min().item()


# The correction for noise -------------------------------------------------------------------------------


def test_correction_takes_the_noise_out():
    """Maps with noise of known size correlate less; corrected they correlate as the clean ones do."""
    rng, raw, reliable = np.random.default_rng(0), [], []
    for _ in range(400):
        clean = rng.normal(size=60)
        other = 0.6 * clean + 0.8 * rng.normal(size=60)
        noisy = [clean + 1.2 * rng.normal(size=60) for _ in range(2)]
        raw.append(np.corrcoef(other, noisy[0])[0, 1])
        reliable.append(np.corrcoef(*noisy)[0, 1])
    raw, reliable = np.array(raw), np.array(reliable)
    found = study.corrected(raw, reliable)
    assert raw.mean() < 0.42
    assert found.mean() == pytest.approx(0.6, abs=0.02)
    linear = raw - raw.mean() - raw.mean() / reliable.mean() / 2 * (reliable - reliable.mean())
    assert found.std() == pytest.approx((linear / reliable.mean() ** 0.5).std(), rel=0.01)
    with pytest.raises(ValueError, match="more masks"):
        study.corrected(raw, -reliable)


# Placebos -----------------------------------------------------------------------------------------------


def test_a_diagonal_has_its_centres_and_width():
    band = study.diagonal(4, 1000, 0.1, 0.8, 0.05)
    centres = (band.argmax(1) + 0.5) / 1000
    torch.testing.assert_close(
        centres, 0.1 + 0.8 * torch.tensor([0.125, 0.375, 0.625, 0.875]), atol=2e-3, rtol=0
    )
    time = (torch.arange(1000) + 0.5) / 1000
    spread = ((time - 0.4) ** 2 * band[1]).sum() / band[1].sum()
    assert spread.sqrt().item() == pytest.approx(0.05, rel=0.02)


def test_diagonals_are_fitted_to_the_others_alone():
    shapes = [(5, 40), (4, 31), (6, 55), (5, 48)]
    targets = [study.diagonal(*shape, 0.1, 0.8, 0.07) for shape in shapes]
    for found, target in zip(study.fitted_diagonals(targets), targets, strict=True):
        torch.testing.assert_close(found, target)
    pair = [study.diagonal(*shapes[0], -0.2, 0.6, 0.3), targets[1]]
    torch.testing.assert_close(study.fitted_diagonals(pair)[0], targets[0])


def test_borrowed_maps_are_those_of_the_nearest_and_never_the_own():
    shapes = [(4, 30), (4, 34), (6, 33), (4, 50), (5, 30)]
    maps = [torch.full(shape, float(number)) for number, shape in enumerate(shapes)]
    found = study.borrowed(maps, 2)
    assert [m.shape for m in found] == [(2, *shape) for shape in shapes]
    assert [sorted(set(m.flatten().round().tolist())) for m in found] == [
        [1.0, 3.0],  # four tokens, then by duration
        [0.0, 3.0],
        [1.0, 4.0],  # of five tokens, then of four and nearest in duration
        [0.0, 1.0],
        [0.0, 2.0],
    ]


def test_rescaling_keeps_a_diagonal_a_diagonal():
    for shape in ((7, 61), (3, 20)):
        stretched = study.rescaled(study.diagonal(5, 40, 0.0, 1.0, 0.15), *shape)
        rho = method.row_correlation(stretched, study.diagonal(*shape, 0.0, 1.0, 0.15))
        assert stretched.shape == shape
        assert rho > 0.9


def test_shifts_move_in_time_and_let_zeros_in():
    maps = torch.tensor([[1.0, 2.0, 3.0]])
    assert study.shifted(maps, 1).tolist() == [[0, 1, 2]]
    assert study.shifted(maps, -2).tolist() == [[3, 0, 0]]
    assert study.shifted(maps, 0).tolist() == maps.tolist()
    assert study.shifted(maps, -3).abs().sum() == 0


def test_the_smoothing_placebo_blurs_each_head_and_joins_none():
    heads = torch.zeros(2, 3, 1, 101)
    heads[1, 2, 0, 50] = 1
    blurred = study.shifted_mean(heads, 4000, 3.0, generator())
    assert blurred.flatten(2)[:, :2].abs().sum() == 0
    assert blurred[0].abs().sum() == 0
    time = torch.arange(101.0)
    weight = blurred[1, 2, 0]
    assert weight.sum().item() == pytest.approx(1, abs=1e-4)
    assert ((time - 50) ** 2 * weight).sum().sqrt().item() == pytest.approx(3.0, rel=0.05)
    once = study.shifted_mean(heads, 1, 0.0, generator())
    assert torch.equal(once, heads)


# Deletion -----------------------------------------------------------------------------------------------


class Fake(Recogniser):
    """Says as many of the prompt's words as are left of the speech, in four parts by time."""

    def __init__(self):
        pass

    model = type("Model", (), {"device": torch.device("cpu")})

    def texts(self, features):
        words = ["press", "star", "now", "please"]
        kept = (features[:, :8, :20] != -9.0).float().unflatten(2, (4, 5)).mean((1, 3))
        return [" ".join(w for w, k in zip(words, row, strict=True) if k > 0.5) for row in kept]


def test_curves_start_and_end_together_and_a_better_map_rises_sooner():
    one = explained()
    position = torch.arange(10.0).expand(4, -1)
    maps = {"early": method.spread(-position, 8), "flat": torch.ones(4, 20, 8)}
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = study.deletion_curves(Fake(), one, maps, shares, -9.0, 0)
    assert found["early"] == [0, 25, 50, 75, 100]
    assert found["flat"][0] == 0
    assert found["flat"][-1] == 100
    assert found["flat"][1] == 0, "a quarter of all cells, at random, leaves most of each part"


def test_a_step_of_text_is_all_but_the_last():
    assert study.text_rows(torch.arange(6.0).view(3, 2)).tolist() == [[0, 1], [2, 3]]


def test_prompts_of_the_pilot_are_left_out(monkeypatch):
    def prompt(name, words, seconds):
        return Prompt(name, " ".join(["word"] * words), np.zeros(int(16000 * seconds), np.float32))

    made = (
        prompt("conf-unmuted", 4, 1.5),
        prompt("a", 4, 1.5),
        prompt("b", 3, 1.5),
        prompt("c", 8, 0.8),
        prompt("d", 5, 1.91),
        prompt("silence/1", 5, 1.0),
    )
    monkeypatch.setattr(study, "spoken_prompts", lambda: made)
    found = study.short_prompts((0.8, 1.9), (4, 8))
    assert sorted(p.name for p in found) == ["a", "c"]
    assert [p.name for p in found] == [p.name for p in study.short_prompts((0.8, 1.9), (4, 8))]
