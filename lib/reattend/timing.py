"""Honest comparisons of time: everything in turns, every round in both orders.

What a pass leaves behind, in caches and in the allocator, helps or hinders the pass after it, so a pass is
slower or faster by what ran before. A round therefore runs all in one order and again in the other
(A B B A): each is once after itself and once after its neighbour, and a drift within the round cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float

Run = Callable[[], object]
Clock = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)


def device_clock(device: torch.device | str) -> Clock:
    """Seconds for work on a device: CPU time of all threads, so that other processes are not counted.

    On a GPU the time of day, once all work that was asked for is done.
    """
    if torch.device(device).type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def interleaved_seconds(
    runs: Mapping[Name, Run],
    rounds: int,
    clock: Clock = time.process_time,
    *,
    warmup: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[Name, Float[np.ndarray, " rounds"]]:
    """Seconds of one pass of every run, round by round.

    A round runs all in the order given and again backwards; its seconds are the mean of the two passes.

    Args:
        warmup: untimed rounds before the first.
        progress: wraps the numbers of the rounds, to show how far they are.
    """
    seconds = {name: np.zeros(rounds) for name in runs}
    both_orders = (*runs, *reversed(runs))
    for name in both_orders * warmup:
        runs[name]()
    for index in progress(range(rounds)):
        for name in both_orders:
            started = clock()
            runs[name]()
            seconds[name][index] += (clock() - started) / 2
    return seconds


def paired_times(
    baseline: Run,
    candidate: Run,
    *,
    rounds: int = 7,
    warmup: int = 1,
    clock: Clock = time.process_time,
) -> tuple[Float[np.ndarray, " rounds"], Float[np.ndarray, " rounds"]]:
    """Seconds of `baseline` and `candidate`, round by round; see `interleaved_seconds`."""
    runs = {"baseline": baseline, "candidate": candidate}
    seconds = interleaved_seconds(runs, rounds, clock, warmup=warmup)
    return seconds["baseline"], seconds["candidate"]


def paired_ratio(
    baseline: Run,
    candidate: Run,
    *,
    rounds: int = 7,
    warmup: int = 1,
    clock: Clock = time.process_time,
) -> Float[np.ndarray, " rounds"]:
    """Speed-up of `candidate` over `baseline`, one ratio a round; see `interleaved_seconds`."""
    slow, fast = paired_times(baseline, candidate, rounds=rounds, warmup=warmup, clock=clock)
    return slow / fast


def log_slope(
    lengths: Sequence[int], seconds: Float[np.ndarray, "lengths rounds"]
) -> Float[np.ndarray, " rounds"]:
    """Least-squares slope of log seconds over log length, for each round: 1 is linear, 2 quadratic."""
    x = np.log(lengths) - np.mean(np.log(lengths))
    return x @ np.log(seconds) / (x @ x)
