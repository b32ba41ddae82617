"""The study of speech maps: placebos hold no more than they should, and curves start and end together."""

import numpy as np
import pytest
import torch

from reattend.data.spoken_prompts import Prompt
from reattend.speech import s2t_cross_attention as method
from reattend.speech.s2t_cross_attention import Speech
from reattend.studies import speech_maps as study
from reattend.studies.speech_maps import Explained, Heard, Joined, Recogniser, Removal


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
    changes = (masks[:, 1:] != masks[:, :-1]).flatten(1).sum(1).view(5, 2, 4)
    fine, coarse = changes[:, 0], changes[:, 1]
    assert fine.min() > coarse.max(), "two pairs of rectangles of 2 frames, then two of 20"
    outputs = removal.draw_output(speech, generator())
    assert outputs.shape == (12, 10)
    assert (outputs[::2] ^ outputs[1::2]).all()


def test_halves_for_the_reliability_have_as_many_masks_of_each_grid():
    """Else their maps differ in grain, and the correction for noise is too large."""
    masks = Removal(80, 4, [(2, 8), (20, 8)], 3, 8).draw_input(some_speech(), generator())
    fine = (masks[:, 1:] != masks[:, :-1]).flatten(1).any(1)
    second = torch.arange(80) // 2 % 2 == 1
    assert fine[second].sum() == fine[~second].sum() > 15


def test_half_precision_is_near_enough_and_only_under_masks():
    torch.manual_seed(0)
    product = torch.nn.Linear(64, 64)
    states, half = torch.randn(8, 64), Removal(4, 4, [(1, 1)], 1, 8, precision="bfloat16")
    with torch.no_grad():
        exact = product(states)
        with half.products(torch.device("cpu")):
            rounded = product(states)
        with Removal(4, 4, [(1, 1)], 1, 8).products(torch.device("cpu")):
            assert torch.equal(product(states), exact)
        assert torch.equal(product(states), exact)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.02, rtol=0.02)


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


def test_each_item_gets_the_setting_that_suits_the_others():
    scores = np.array([[9.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 3.0, 4.0]])
    assert study.best_of_others(scores) == [1, 0, 0]


def test_smoothing_is_a_normal_average_over_time():
    maps = torch.zeros(2, 3, 101).double()
    maps[1, 2, 50] = 1
    blurred = study.smoothed(maps, 3.0)
    assert blurred[0].abs().sum() == 0
    assert blurred[1, :2].abs().sum() == 0
    time = torch.arange(101).double()
    weight = blurred[1, 2]
    assert weight.sum().item() == pytest.approx(1, abs=1e-6)
    assert ((time - 50) ** 2 * weight).sum().sqrt().item() == pytest.approx(3.0, rel=1e-3)
    level = torch.full((1, 9), 0.7)
    torch.testing.assert_close(study.smoothed(level, 4.0), level)  # the edges as well
    assert study.smoothed(maps, 0.0) is maps


def test_the_grain_is_chosen_on_other_prompts():
    """Targets are smoothed maps: every prompt gets that width; one that differs does not choose its own."""
    torch.manual_seed(0)
    maps = [torch.rand(3, size) for size in (60, 70, 80, 90)]
    widths = [0.0, 1.0, 3.0]
    targets = [study.smoothed(m, 3.0) for m in maps]
    rho, chosen = study.at_best_grain(maps, targets, widths)
    assert chosen == [3.0] * 4
    assert rho == pytest.approx(np.ones(4), abs=1e-5)
    rho, chosen = study.at_best_grain(maps, [maps[0], *targets[1:]], widths)
    assert chosen[0] == 3.0
    assert rho[0] < 0.9
    several = [torch.stack([m, m.flip(1)]) for m in maps]
    both, _ = study.at_best_grain(several, targets, [3.0])
    each = [study.at_best_grain([m[k] for m in several], targets, [3.0])[0] for k in (0, 1)]
    assert both == pytest.approx(np.mean(each, 0), abs=1e-5)


# Word boundaries ----------------------------------------------------------------------------------------


def recordings():
    """A tone for each name, of another length each, between silences of .1 and .2 s."""
    for number, name in enumerate([*study.DAYS, *study.MONTHS, *study.CALLS]):
        time = np.arange(3200 + 800 * (number % 5)) / 16000
        tone = np.cos(2 * np.pi * 500 * time).astype(np.float32)
        padded = [np.zeros(1600, np.float32), tone, np.zeros(3200, np.float32)]
        yield Prompt(name, name.split("/")[1].translate({45: 32, 95: 32}), np.concatenate(padded))


def test_trimming_leaves_the_sound():
    one = next(recordings())
    assert len(study.trimmed(one.samples)) == 3200
    assert np.array_equal(study.trimmed(one.samples), one.samples[1600:4800])


def test_joined_words_have_silence_exactly_in_their_gaps(monkeypatch):
    monkeypatch.setattr(study, "spoken_prompts", lambda: tuple(recordings()))
    found = study.joined_words(20, 3, 0.3, 1.3, 0)
    assert len(found) == 20
    for joined in found:
        samples, silent = joined.prompt.samples, 0
        assert len(samples) <= 1.3 * 16000
        for end, start in joined.gaps:
            a, b = round(end * 16000), round(start * 16000)
            assert not samples[a:b].any()
            assert np.abs(samples[a - 160 : a]).max() > 0.5
            assert np.abs(samples[b : b + 160]).max() > 0.5
            silent += b - a
        assert len(set(joined.prompt.name.split("+"))) == 3
    assert found[0].prompt.name != study.joined_words(1, 3, 0.3, 1.3, 1)[0].prompt.name
    assert max(start - end for joined in found for end, start in joined.gaps) > 0.2


def heard(gaps, first, shape=(3, 50)):
    prompt = Prompt("p", "a b", np.zeros(1, np.float32))
    return Heard(Joined(prompt, gaps), ["a"] * shape[0], torch.zeros(1, 1, *shape), first)


def test_a_start_is_right_anywhere_in_the_silence_before_its_word():
    one = heard([(0.20, 0.30), (0.60, 0.60)], [1, 2])
    assert study.boundary_error([0, 10, 30], one) == 0
    assert study.boundary_error([0, 15, 30], one) == 0
    assert study.boundary_error([0, 9, 32], one) == pytest.approx((20 + 40) / 2)
    assert study.boundary_error([0, 9, 32], one, shift=1) == pytest.approx((0 + 60) / 2)
    assert study.boundary_error([0, 17, 30], one) == pytest.approx(20)


def test_shift_and_map_are_chosen_on_other_sequences():
    late = [heard([(0.2, 0.2)], [1]) for _ in range(4)]
    found = study.boundary_errors([[[0, 14, 20]]] * 4, late)  # all 80 ms late: moved back
    assert found.tolist() == [0] * 4
    wrong = study.boundary_errors([[[0, 17, 20]], *[[[0, 10, 20]]] * 3], late)
    assert wrong.tolist() == [140, 0, 0, 0], "its own shift is not its own choice"
    two = study.boundary_errors(
        [[[0, 10 + 9 * (-1) ** n, 20], [0, 10, 20]] for n in range(4)], late
    )
    assert two.tolist() == [0] * 4


def test_evenly_long_tokens_start_on_a_line():
    starts = study.even_starts(4, 100)
    assert len(starts) == len(study.STARTS) * len(study.SLOPES)
    assert [0, 25, 50, 75] in starts
    assert [10, 30, 50, 70] in starts


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
