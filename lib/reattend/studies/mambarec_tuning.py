"""How every recommender of MambaRec's study was tuned: one procedure, one grid, on worlds that no run reads.

`python -m reattend.studies.mambarec_tuning [ARM …]` repeats it (about half an hour on one core) and prints a line a
training. Three numbers are tuned for each arm:

1. every decay of `DECAYS` with every scale of `SCALES` (of the initial tables of users and items), at a rate of `RATE`;
2. from the best of these, half the rate and twice the rate, and on in a direction as long as that gains;
3. from the best so far, a third of the decay and three times the decay, and on likewise.

Best is by Recall@20 on validation, at the check that validation chooses. Pilot worlds hold out 13 interactions of a
user for validation instead of 2, and 1 for test, which nothing here looks at. Training is stopped early.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from reattend.backbones.trained.mambarec import (
    ALL_ARMS,
    MEASURES,
    SETTINGS,
    Arm,
    Setting,
    Worlds,
    chosen,
    fit,
    stamp_content,
)

SEEDS = (100, 101)
COUNTS = (8, 13, 1)  # interactions of a user for training, validation and test
DECAYS, SCALES, RATE = (1e-4, 1e-2, 1e-1), (1.0, 0.1), 1e-2
CAP, PATIENCE = 120, 8  # epochs at most; checks without gain after which training stops


@dataclass(frozen=True)
class Tried:
    """One setting of an arm.

    Attributes:
        arm: with the setting.
        recall: Recall@20 on validation at the best check, mean over worlds.
        epochs: at that check.
    """

    arm: Arm
    recall: float
    epochs: int


def tune(arm: Arm, measure: Callable[[Arm], Tried]) -> Iterator[Tried]:
    """All settings that the procedure tries; the best of them is the first of largest recall."""
    found = []
    for decay in DECAYS:
        for scale in SCALES:
            found.append(measure(arm.at(RATE, decay, scale)))
            yield found[-1]
    for rate_factor, decay_factor in ((2.0, 1.0), (1.0, 3.0)):
        start = top_of(found)
        for power in (-1, 1):
            gained = True
            while gained:
                here = top_of(found).arm
                rate = here.rate * rate_factor**power
                decay = here.weights.decay * decay_factor**power
                found.append(measure(arm.at(rate, decay, here.scale)))
                yield found[-1]
                gained = top_of(found) is found[-1]
            if top_of(found) is not start:
                break  # the other direction leads back


def top_of(found: list[Tried]) -> Tried:
    """The first of largest recall."""
    return max(found, key=lambda tried: tried.recall)


def trial(worlds: Worlds, setting: Setting, patience: int | None) -> Callable[[Arm], Tried]:
    """How a setting is measured on some worlds."""

    def measure(arm: Arm) -> Tried:
        _, curve = fit(worlds, replace(arm, longer=1), setting, patience)
        check = chosen(curve)
        recall = curve[check, :, MEASURES.index("validation R@20")].mean().item()
        return Tried(arm, recall, check * setting.every)

    return measure


def main(names: list[str]) -> None:
    """Tune the named arms, all by default, then train each at its best for twice the cap."""
    setting = SETTINGS["cpu"]
    taste = replace(setting.taste, counts=COUNTS)
    setting = replace(setting, taste=taste, epochs=CAP)
    worlds = Worlds.of(stamp_content(None), taste, SEEDS)
    for name in names or ALL_ARMS:
        found = []
        for tried in tune(ALL_ARMS[name], trial(worlds, setting, PATIENCE)):
            found.append(tried)
            print(line(name, tried), flush=True)
        print("best:", line(name, top_of(found)), flush=True)
        longer = trial(worlds, replace(setting, epochs=2 * CAP), None)(top_of(found).arm)
        print("longer:", line(name, longer), flush=True)


def line(name: str, tried: Tried) -> str:
    """One setting, as it is printed."""
    arm = tried.arm
    return (
        f"{name}, rate {arm.rate:g}, decay {arm.weights.decay:.1g}, scale {arm.scale:g}: "
        f"{tried.recall:.4f} after {tried.epochs} epochs [{time.process_time():.0f} s]"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
