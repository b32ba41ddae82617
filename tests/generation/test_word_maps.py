"""What methods read off attention maps, by closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from reattend.generation.word_maps import joined_to_peak, otsu_threshold, overlap, smooth


def random_maps(batch=3, concepts=2, side=5, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, concepts, side, side, generator=generator, dtype=torch.double)


# --- smoothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [5, 6])
def test_smoothing_keeps_constants_and_spreads_a_point_by_its_weights(side):
    flat = torch.full((2, 3, side, side), 0.3).double()
    torch.testing.assert_close(smooth(flat), flat)
    point = torch.zeros(side, side).double()
    point[2, 2] = 1
    total = (1 + 2 / math.e) ** 2
    spread = smooth(point)
    assert spread[2, 2].item() == pytest.approx(1 / total, abs=1e-12)
    assert spread[1, 2].item() == pytest.approx(math.exp(-1) / total, abs=1e-12)
    assert spread[3, 3].item() == pytest.approx(math.exp(-2) / total, abs=1e-12)


def test_smoothing_has_the_weights_of_the_published_code():
    """A unit at the centre, and one beside a corner; line weights .2119, .5761, .2119 of that code."""
    line = torch.tensor([0.21194156, 0.57611688, 0.21194156]).double()
    spot = torch.zeros(1, 1, 5, 5).double()
    spot[..., 2, 2] = 1
    outer = torch.outer(line, line)
    torch.testing.assert_close(smooth(spot)[0, 0, 1:4, 1:4], outer, atol=1e-7, rtol=0)
    corner = torch.zeros(1, 1, 5, 5).double()
    corner[..., 1, 1] = 1  # reflected at both borders, and read twice at the corner
    assert smooth(corner)[0, 0, 0, 0].item() == pytest.approx(4 * 0.21194156**2, abs=1e-6)


# --- overlap ---------------------------------------------------------------------------------------


def test_overlap_of_equal_maps_is_one_half_and_of_disjoint_ones_nothing():
    maps = random_maps()
    half = torch.full((3, 2), 0.5).double()
    torch.testing.assert_close(overlap(maps, maps), half)
    torch.testing.assert_close(overlap(maps, maps * 3), half * 0.5)  # 1 / (1 + 3)
    left, right = maps.clone(), maps.clone()
    left[..., 2:], right[..., :2] = 0, 0
    assert (overlap(left, right) == 0).all()
    assert (overlap(0 * maps, 0 * maps) == 0).all()
    assert torch.equal(overlap(maps, maps.flip(1)), overlap(maps.flip(1), maps))


def test_the_offset_of_an_overlap_is_added_to_the_sum_of_both():
    maps = random_maps()
    sums = maps.sum((-2, -1))
    torch.testing.assert_close(overlap(maps, maps, 0.7), sums / (2 * sums + 0.7))


# --- Otsu's threshold and what hangs together --------------------------------------------------------


def brute_otsu(values: np.ndarray) -> float:
    """Every value tried as threshold; the lowest of equally good ones."""
    best, threshold = -1.0, values.min()
    for candidate in sorted(set(values))[:-1]:
        low, high = values[values <= candidate], values[values > candidate]
        between = len(low) * len(high) * (high.mean() - low.mean()) ** 2
        if between > best * (1 + 1e-12):
            best, threshold = between, candidate
    return threshold


@pytest.mark.parametrize("levels", [None, 255, 7])
def test_otsu_splits_where_trying_every_value_does(levels):
    values = random_maps(40, 3, 5, seed=2).flatten(2) ** 3
    values = values if levels is None else (levels * values).floor()
    found = otsu_threshold(values)
    assert found.shape == (40, 3)
    for row, threshold in zip(values.flatten(0, 1), found.flatten(), strict=True):
        assert threshold.item() == brute_otsu(row.numpy())


def test_otsu_of_equal_values_is_their_value():
    assert otsu_threshold(torch.full((2, 9), 0.7)).tolist() == pytest.approx([0.7, 0.7])


def test_what_hangs_together_with_the_peak_does_so_through_sides_in_all_directions():
    maps = torch.tensor(
        [
            [5, 0, 7, 7, 7, 0],
            [0, 0, 7, 0, 7, 0],
            [7, 7, 7, 0, 7, 7],
            [7, 0, 0, 9, 0, 7],
            [7, 7, 0, 7, 0, 7],
            [0, 7, 7, 7, 7, 7],
        ]
    ).double()
    both = torch.stack([maps, torch.where(maps == 5, 11.0, maps)])[None]
    found = joined_to_peak(both, both > 4)
    assert torch.equal(found[0, 0], (maps > 5))
    assert found[0, 1].nonzero().tolist() == [[0, 0]]  # a peak alone
