"""The tasks of pairs: what their maps show, that labels hold, and that nothing gives them away."""

import pytest
import torch

from reattend.data.pair_grids import (
    displaced_pairs,
    distant_places,
    finds_partner,
    near_places,
    neighbour_pairs,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Neighbour pairs ----------------------------------------------------------------------------------


def test_near_places_are_all_pairs_within_reach():
    pairs = near_places(5, 2)
    distance = (pairs[:, 0] - pairs[:, 1]).abs().amax(-1)
    assert distance.min() == 1
    assert distance.max() == 2
    along = 5 + 2 * 4 + 2 * 3  # ordered pairs of one axis at most 2 apart, equal ones among them
    assert len(pairs) == len(torch.unique(pairs, dim=0)) == along**2 - 25


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_marks_agree_within_pairs_as_the_labels_say(seed):
    maps, labels, places = neighbour_pairs(2_000, 12, 3, generator(seed))
    assert maps.shape == (2_000, 1, 12, 12)
    assert maps.ne(0).sum((1, 2, 3)).eq(4).all()
    marks = maps[torch.arange(2_000)[:, None, None], 0, places[..., 0], places[..., 1]]
    alike = marks[..., 0] == marks[..., 1]
    assert torch.equal(alike, labels[:, None].bool().expand(-1, 2))
    within = (places[:, :, 0] - places[:, :, 1]).abs().amax(-1)
    between = (places[:, 0, :, None] - places[:, 1, None]).abs().amax(-1)
    assert within.min() == 1
    assert within.max() == 3
    assert between.min() == 7


def test_no_single_place_and_no_sum_gives_the_label_away():
    maps, labels, _ = neighbour_pairs(20_000, 12, 2, generator())
    assert maps.sum((1, 2, 3)).abs().max() == 0
    assert labels.double().mean().item() == pytest.approx(0.5, abs=0.02)
    one, other = (maps[labels == label, 0].double() for label in (0, 1))
    # Marks stand everywhere alike, whatever the label: means and means of squares per place.
    assert (one.mean(0) - other.mean(0)).abs().max() < 0.02
    assert (one.square().mean(0) - other.square().mean(0)).abs().max() < 0.02


def test_noise_has_its_standard_deviation_and_comes_on_top():
    noisy = neighbour_pairs(200, 12, 3, generator(), noise=0.25)
    plain = neighbour_pairs(200, 12, 3, generator())
    assert torch.equal(noisy.places, plain.places)
    assert torch.equal(noisy.labels, plain.labels)
    assert (noisy.maps - plain.maps).std().item() == pytest.approx(0.25, rel=0.02)


def test_a_map_without_room_is_refused():
    with pytest.raises(ValueError, match="at least 12 places"):
        neighbour_pairs(1, 11, 3, generator())


# Displaced pairs ----------------------------------------------------------------------------------


def test_distant_places_do_not_touch():
    pairs = distant_places(4).tolist()
    assert len(pairs) == 16 * 15 - 84  # 42 neighbouring pairs of a 4 x 4 grid, in both orders
    for one, other in pairs:
        assert max(abs(one // 4 - other // 4), abs(one % 4 - other % 4)) > 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairs_show_what_their_labels_say(seed):
    classes = torch.arange(60) % 5
    pictures = (1 + torch.arange(60, dtype=torch.uint8)).view(60, 1, 1, 1).expand(60, 2, 3, 3)
    pairs = displaced_pairs(pictures, classes, 4_000, 4, torch.Generator().manual_seed(seed))
    assert pairs.canvases.shape == (4_000, 2, 12, 12)
    regions = pairs.canvases.unflatten(3, (4, 3)).unflatten(2, (4, 3)).double()
    regions = regions.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
    rows = torch.arange(4_000)[:, None]
    shown = regions[rows, pairs.places]
    assert torch.equal(shown.amin((2, 3)), shown.amax((2, 3)))  # one whole picture
    kinds = classes[shown[..., 0, 0].long() - 1]
    assert torch.equal((kinds[:, 0] == kinds[:, 1]).long(), pairs.labels)
    assert ((regions.sum((2, 3)) > 0).sum(1) == 2).all()
    assert pairs.labels.double().mean().item() == pytest.approx(0.5, abs=0.04)
    # A picture's class says nothing about the answer.
    for kind in range(5):
        share = pairs.labels[kinds[:, 1] == kind].double().mean().item()
        assert share == pytest.approx(0.5, abs=0.08)


def test_partners_are_found_in_the_rows_of_the_index():
    index = torch.zeros(2, 4, 2, dtype=torch.long)
    index[0, 1] = torch.tensor([2, 3])
    index[1, 3] = torch.tensor([1, 0])
    found = finds_partner(index, torch.tensor([[1, 3], [0, 3]]))
    assert found.tolist() == [[True, False], [False, True]]
