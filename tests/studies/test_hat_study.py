"""What the study of HAT measures, on networks and maps whose answers are known."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from reattend.backbones.trained.hat import DENOISING, GAIN, SIGNS, TaskNetwork, untrained_restorer
from reattend.data.window_tasks import has_source
from reattend.studies.hat import (
    attribution,
    best_from,
    diffusion,
    gain_contributions,
    gain_diffusion,
    mean_error,
    mean_psnr,
    middle_crops,
    photograph_scores,
    pixel_classes,
    pixels_seen,
    published_sizes,
    restored,
    spoilt_crop,
    structured_patches,
    task_errors,
)


class Answer(TaskNetwork):
    """A network that answers by a given function of its input."""

    def __init__(self, function):
        nn.Module.__init__(self)
        self.read = nn.Linear(1, 1)
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


def test_pixels_by_window():
    kinds = pixel_classes(SIGNS)
    some = has_source(16, 2)
    assert sum(v.int() for v in kinds.values()).equal(some.int())
    assert {k: int(v.sum()) for k, v in kinds.items()} == {
        "plain": 144,
        "shifted only": 36,
        "neither": 16,
    }


def test_errors_of_known_answers():
    silent = Answer(lambda x: torch.zeros(x.shape[:3]))

    def shifted(x):
        answer = torch.zeros(x.shape[:3])
        answer[:, 2:, 2:] = x[:, :-2, :-2, 0]
        answer[:, 8:] = 0
        return answer

    errors = task_errors([silent, Answer(shifted)], SIGNS, 30)
    upper = has_source(16, 2)
    upper[8:] = False
    torch.testing.assert_close(mean_error(errors, upper), torch.tensor([100.0, 0]).double())
    lower = has_source(16, 2) & ~upper
    torch.testing.assert_close(mean_error(errors, lower), torch.tensor([100.0, 100]).double())
    flat = torch.full((2, 4, 4), 0.5)
    torch.testing.assert_close(mean_error(flat), torch.tensor([50.0, 50]).double())


def test_best_answer_in_closed_form():
    assert best_from(16, 5.0) == pytest.approx(60.98, abs=0.01)
    assert best_from(576, 5.0) == pytest.approx(4.16, abs=0.01)


def test_pixels_seen_by_a_convolution():
    convolution = nn.Conv2d(3, 2, 3, padding=1)
    seen = pixels_seen(
        lambda x: convolution(x.movedim(-1, 1)).movedim(1, -1), torch.rand(1, 6, 7, 3), (2, 3)
    )
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[1:4, 2:5] = True
    assert torch.equal(seen, expected)


def test_contributions_of_a_mean_are_the_readings():
    def mean_of_readings(x):
        return x[..., 0] * x[..., 1].mean((1, 2), keepdim=True)

    task = replace(GAIN, side=8)
    model = Answer(mean_of_readings)
    found = gain_contributions(model, task, 3)
    inputs = task.draw(3, torch.Generator().manual_seed(98)).inputs
    expected = inputs[..., 1] * inputs[:, 4:5, 4:5, 0] / 64
    torch.testing.assert_close(torch.stack(found), expected)
    wide = gain_diffusion([model], replace(GAIN, side=24), 20).mean()
    assert abs(wide - 58.6) < 1.5  # 100 (2 - sqrt 2), half-normal weights
    narrow = gain_diffusion([Answer(lambda x: x[..., 0] * x[..., 1])], task, 4)
    torch.testing.assert_close(narrow, torch.full((1, 4), 100 / 64), atol=1e-2, rtol=0)


def test_crops_lie_in_the_photographs():
    crops = middle_crops(16)
    assert len(crops) == 5
    assert all(c.shape == (4, 3, 16, 16) for c in crops.values())
    patches = structured_patches(2, 48, 8)
    assert len(patches) == 10
    assert len({p.sum().item() for p in patches.values()}) == 10
    detail = [p[:, 20:28, 20:28].std().item() for p in patches.values()]
    plain = [c[0, :, 4:12, 4:12].std().item() for c in crops.values()]
    assert sum(detail) / len(detail) > sum(plain) / len(plain)


def test_scores_of_untrained_restorers_are_those_of_the_input():
    models = {"SwinIR": [untrained_restorer("SwinIR", DENOISING, 0).eval()]}
    scores = photograph_scores(models, DENOISING, 16)
    table = scores.pivot_table(index="arm", columns="photograph", values="psnr")
    assert table.shape == (2, 5)
    torch.testing.assert_close(
        *(torch.tensor(table.loc[a].to_numpy()) for a in ("input", "SwinIR"))
    )
    # noise of 25 on three channels, weighed 65, 129 and 25, is noise of 14.4 on luma
    assert (table.loc["input"] - 24.97).abs().max() < 1.5


def test_attribution_of_a_copy_is_its_patch():
    model = untrained_restorer("SwinIR", DENOISING, 0).eval()
    crop = middle_crops(16)["coffee"][0]
    found, _ = attribution(model, DENOISING, crop, 4, 20)
    seen = found.abs().sum(0) > 1e-9
    assert seen[6:9, 6:9].all()
    assert not seen[:6].any()
    assert not seen[:, 10:].any()
    indices, missed = diffusion([model], DENOISING, {"one": crop, "two": crop.flip(1)}, 4, 20)
    assert indices.shape == missed.shape == (1, 2)
    assert indices.max() < 100 * 16 / 256
    assert not torch.equal(spoilt_crop(crop, DENOISING), crop)
    assert restored(model, crop[None]).shape == (1, 3, 16, 16)


def test_sizes_are_near_the_published_ones():
    sizes = published_sizes().set_index("model")
    reported = {"SwinIR": (11.9, 53.6), "HAT-S": (9.6, 54.9), "HAT": (20.8, 102.4)}
    for name, (count, adds) in reported.items():
        assert sizes.parameters[name] == pytest.approx(count, abs=0.05)
        assert sizes.multiply_adds[name] == pytest.approx(adds, rel=0.02)


def test_mean_psnr_is_a_mean_over_photographs_of_every_seed():
    rows = [
        ("HAT", 0, "a", 30.0),
        ("HAT", 0, "b", 32.0),
        ("HAT", 1, "a", 31.0),
        ("HAT", 1, "b", 35.0),
    ]
    rows += [("SwinIR", 0, "a", 20.0), ("SwinIR", 0, "b", 21.0)]
    scores = pd.DataFrame(rows, columns=["arm", "seed", "photograph", "psnr"])
    assert mean_psnr(scores) == {"HAT": [31.0, 33.0], "SwinIR": [20.5]}
