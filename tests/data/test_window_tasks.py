"""The window tasks: targets by plain loops, who can see a source, what the best answer leaves."""

import torch

from reattend.data.window_tasks import displaced_signs, faint_gain, has_source, source_in_window


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_displaced_signs_by_a_loop():
    inputs, targets = displaced_signs(3, 7, 2, generator())
    assert inputs.shape == (3, 7, 7, 1)
    assert set(inputs.unique().tolist()) == {-1.0, 1.0}
    known = has_source(7, 2)
    assert known.sum() == 25
    for row in range(7):
        for column in range(7):
            source = inputs[:, row - 2, column - 2, 0]
            expected = source if row >= 2 and column >= 2 else torch.zeros(3)
            assert torch.equal(targets[:, row, column], expected)
            assert known[row, column] == (row >= 2 and column >= 2)


def test_sources_in_windows_by_a_loop():
    for shift in (0, 2):
        found = source_in_window(9, 1, 4, shift)
        for row in range(9):
            for column in range(9):
                places = [(p - shift) // 4 for p in (row, row - 1, column, column - 1)]
                same = places[0] == places[1] and places[2] == places[3]
                assert found[row, column] == (same and row >= 1 and column >= 1)


def test_some_sources_lie_in_neither_kind_of_window():
    plain, shifted = source_in_window(16, 2, 8), source_in_window(16, 2, 8, 4)
    neither = has_source(16, 2) & ~plain & ~shifted
    assert neither.sum() == 16
    assert neither[8, 4]
    assert neither[13, 9]
    assert not neither[8, 8]


def test_the_best_answer_from_n_readings():
    noise, items, side = 3.0, 20_000, 4
    inputs, targets = faint_gain(items, side, noise, generator(1))
    assert inputs.shape == (items, side, side, 2)
    assert targets.shape == (items, side, side)
    n = side**2
    best = inputs[..., 0] * inputs[..., 1].mean((1, 2), keepdim=True) * n / (n + noise**2)
    left = (best - targets).square().mean() / targets.square().mean()
    assert abs(left - noise**2 / (noise**2 + n)) < 0.01
    gains = targets / inputs[..., 0]
    assert (gains - gains[:, :1, :1]).abs().max() == 0
    assert abs(gains[:, 0, 0].std() - 1) < 0.03
