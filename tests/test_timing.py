"""Interleaved rounds: every run equally often, in turns, in both orders."""

import time

import numpy as np
import pytest

from reattend.timing import (
    device_clock,
    interleaved_seconds,
    log_slope,
    paired_ratio,
    paired_times,
)


def test_a_round_holds_both_orders_and_times_are_each_runs_own():
    now, order = [0.0], []

    def run(name, seconds):
        def go():
            order.append(name)
            now[0] += seconds

        return go

    runs = {"a": run("a", 1.0), "b": run("b", 3.0), "c": run("c", 0.5)}
    found = interleaved_seconds(runs, 2, clock=lambda: now[0])
    assert {name: list(x) for name, x in found.items()} == {
        "a": [1, 1],
        "b": [3, 3],
        "c": [0.5, 0.5],
    }
    assert "".join(order) == "abccba" * 3


def test_what_a_pass_leaves_behind_is_in_every_round_alike():
    """A pass that follows its own kind is faster: whole rounds show their mean, none of them one or the other."""
    now, last = [0.0], [None]

    def run(name):
        def go():
            now[0] += 1.0 if last[0] == name else 1.4
            last[0] = name

        return go

    found = interleaved_seconds({"a": run("a"), "b": run("b")}, 4, clock=lambda: now[0])
    assert found["a"] == pytest.approx(np.full(4, 1.2))
    assert found["b"] == pytest.approx(np.full(4, 1.2))


def test_untimed_rounds_come_first_and_progress_sees_every_round():
    calls, seen = [], []

    def progress(rounds):
        for number in rounds:
            seen.append(number)
            yield number

    found = interleaved_seconds({"a": lambda: calls.append("a")}, 3, warmup=2, progress=progress)
    assert len(calls) == 2 * 2 + 2 * 3
    assert seen == [0, 1, 2]
    assert found["a"].shape == (3,)


def test_pairs_take_turns_in_both_orders():
    calls = []
    slow, fast = paired_times(
        lambda: calls.append("a"), lambda: calls.append("b"), rounds=2, clock=lambda: len(calls)
    )
    assert "".join(calls) == "abba" * 3
    assert slow.tolist() == fast.tolist() == [1, 1]


def test_the_ratio_is_baseline_over_candidate_of_the_same_round():
    clock = iter(np.cumsum([0, 3, 0, 1, 0, 1, 0, 5, 0, 2, 0, 1, 0, 3, 0, 4]))
    # rounds: baseline 3 s, candidate 1 s, candidate 1 s, baseline 5 s; then 2, 1, 3 and 4 s
    ratios = paired_ratio(lambda: None, lambda: None, rounds=2, warmup=0, clock=lambda: next(clock))
    assert ratios == pytest.approx([4.0, 1.5])


def test_on_a_cpu_the_clock_counts_processor_time():
    assert device_clock("cpu") is time.process_time


def test_the_slope_is_the_power_of_the_length():
    lengths = [512, 1024, 4096]
    seconds = np.array([[2e-3 * n**p for p in (1, 2, 1.5)] for n in lengths])
    assert log_slope(lengths, seconds) == pytest.approx([1, 2, 1.5])
