"""The procedure by which all arms of MambaRec's study were tuned."""

import math

import pytest
import torch

from reattend.backbones.trained.mambarec import (
    MODALITIES,
    Arm,
    Setting,
    Worlds,
    chosen,
    fit,
)
from reattend.data.tastes import Taste
from reattend.studies.mambarec_tuning import (
    DECAYS,
    RATE,
    SCALES,
    Tried,
    line,
    top_of,
    trial,
    tune,
)

TASTE = Taste(users=23, items=31, components=2, counts=(4, 5, 2))
SETTING = Setting(None, TASTE, 2, 2, 1, 1, 6, 2, 37, 6, 2)


def hill(rate, decay, scale):
    """An arm's recall, a smooth hill with its top at the given place."""

    def measure(arm):
        away = math.log2(arm.rate / rate) ** 2 + math.log(arm.weights.decay / decay, 3) ** 2
        return Tried(arm, 1 - 0.01 * away - 0.05 * (arm.scale != scale), 5)

    return measure


@pytest.mark.parametrize("rate", [RATE / 8, RATE, 2 * RATE])
@pytest.mark.parametrize("decay", [DECAYS[0] / 3, DECAYS[1], 3 * DECAYS[2]])
def test_the_top_is_found_beyond_the_grid_in_every_direction(rate, decay):
    found = list(tune(Arm("vbpr"), hill(rate, decay, SCALES[1])))
    best = top_of(found).arm
    assert (best.rate, best.scale) == (pytest.approx(rate), SCALES[1])
    assert best.weights.decay == pytest.approx(decay)
    assert best.kind == "vbpr"
    tried = [(t.arm.rate, t.arm.weights.decay, t.arm.scale) for t in found]
    assert tried[:6] == [(RATE, d, s) for d in DECAYS for s in SCALES]
    assert len(set(tried)) == len(tried)


def test_of_equal_settings_the_first_is_kept():
    found = list(tune(Arm(), lambda arm: Tried(arm, 0.2, 5)))
    assert top_of(found) is found[0]
    assert len(found) == 10


def test_a_setting_is_measured_on_validation_at_the_check_that_it_chooses():
    content = {m: torch.randn(44, 9) for m in MODALITIES}
    worlds = Worlds.of(content, TASTE, (3, 4))
    tried = trial(worlds, SETTING, None)(Arm("vbpr", rate=0.05, longer=7))
    _, curve = fit(worlds, Arm("vbpr", rate=0.05, longer=1), SETTING)
    check = chosen(curve)
    assert tried.epochs == 2 * check
    assert tried.recall == pytest.approx(curve[check, :, 0].mean().item())
    assert line("VBPR", tried).startswith("VBPR, rate 0.05, decay 0.0001, scale 1: ")
