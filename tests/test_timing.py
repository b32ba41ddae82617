"""Interleaved rounds: both sides run equally often, in turns."""

import numpy as np
import pytest

from reattend.timing import paired_ratio, paired_times


def test_rounds_interleave_and_swap_order():
    calls = []
    slow, fast = paired_times(lambda: calls.append("a"), lambda: calls.append("b"), rounds=4)
    assert "".join(calls) == "ab" + "abba" * 2
    assert slow.shape == fast.shape == (4,)
    assert (slow > 0).all()


def test_ratio_is_baseline_over_candidate(monkeypatch):
    clock = iter(np.cumsum([0, 3, 0, 1, 0, 2, 0, 4]))
    monkeypatch.setattr("reattend.timing.time.perf_counter", lambda: float(next(clock)))
    # rounds: baseline 3 s, candidate 1 s; then candidate 2 s, baseline 4 s
    ratios = paired_ratio(lambda: None, lambda: None, rounds=2, warmup=0)
    assert ratios == pytest.approx([3.0, 2.0])
