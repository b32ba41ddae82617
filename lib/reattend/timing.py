"""Honest wall-clock comparisons: interleaved rounds, paired ratios."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def paired_times(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    rounds: int = 7,
    warmup: int = 1,
    synchronise: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of `baseline` and `candidate`, measured in turns so that a busy machine hits both.

    The order within a round alternates. On a GPU pass `synchronise=torch.cuda.synchronize`.

    Returns:
        Two arrays of length `rounds`; element i of both comes from the same round.
    """
    pair = (baseline, candidate)
    for _ in range(warmup):
        for run in pair:
            run()
    seconds = np.empty((2, rounds))
    for index in range(rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            synchronise()
            started = time.perf_counter()
            pair[which]()
            synchronise()
            seconds[which, index] = time.perf_counter() - started
    return seconds[0], seconds[1]


def paired_ratio(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    rounds: int = 7,
    warmup: int = 1,
    synchronise: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Speed-up of `candidate` over `baseline`, one ratio per interleaved round; see `paired_times`."""
    slow, fast = paired_times(
        baseline, candidate, rounds=rounds, warmup=warmup, synchronise=synchronise
    )
    return slow / fast
