"""The real pictures: counts, classes, masks, and a split that keeps identities together."""

import pytest
import torch

from reattend.assets.store import AssetError
from reattend.data.images import (
    SPLITS,
    emoji,
    emoji_identity,
    fashion_mnist,
    patch_coverage,
    split_of,
    stamps,
)


def loaded(make, *arguments, **options):
    try:
        return make(*arguments, **options)
    except AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def all_emoji():
    return loaded(emoji)


@pytest.fixture(scope="module")
def all_stamps():
    return loaded(stamps, 48)


def test_split_is_stable_and_has_the_stated_shares():
    # Stored: moving one item to another side would change every result that uses the split.
    assert [split_of(name) for name in ("1f600", "1f607", "1f1e9-1f1ea")] == list(SPLITS)
    sides = [split_of(str(i)) for i in range(20_000)]
    shares = [sides.count(side) / len(sides) for side in SPLITS]
    assert shares == pytest.approx([0.60, 0.15, 0.25], abs=0.01)


def test_variants_of_an_emoji_are_one_identity():
    assert (
        emoji_identity("1F3C3-200D-2640-FE0F") == emoji_identity("1F3C3-200D-2642-FE0F") == "1f3c3"
    )
    assert emoji_identity("1F469-200D-1F33E") == emoji_identity("1F468-200D-1F33E")
    assert emoji_identity("1F9D1") == "1f9d1"  # nothing else is left: the person itself
    assert emoji_identity("1F1E9-1F1EA") != emoji_identity("1F1EB-1F1F7")


def test_emoji_are_those_of_both_vendors(all_emoji):
    assert len(all_emoji) == 3812
    assert len(all_emoji.classes) == 9
    assert all_emoji.pixels.shape == (3812, 3, 64, 64)
    half = len(all_emoji) // 2
    assert all_emoji.identities[:half] == all_emoji.identities[half:]  # google, then twitter
    assert not torch.equal(all_emoji.pixels[:half], all_emoji.pixels[half:])


@pytest.mark.parametrize("fixture", ["all_emoji", "all_stamps"])
def test_no_identity_is_on_two_sides(fixture, request):
    pictures = request.getfixturevalue(fixture)
    sides: dict[str, set[str]] = {}
    for identity, split in zip(pictures.identities, pictures.splits, strict=True):
        sides.setdefault(identity, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    positions = torch.cat([pictures.indices(split) for split in SPLITS])
    assert positions.sort().values.tolist() == list(range(len(pictures)))


def test_every_group_has_pictures_on_every_side(all_emoji):
    for split in SPLITS:
        counts = all_emoji.labels[all_emoji.indices(split)].bincount(minlength=9)
        assert counts.min() >= 10


@pytest.mark.parametrize("fixture", ["all_emoji", "all_stamps"])
def test_pictures_lie_on_white(fixture, request):
    pictures = request.getfixturevalue(fixture)
    clear = (pictures.alpha == 0)[:, None].expand_as(pictures.pixels)
    assert (pictures.pixels[clear] == 255).all()
    assert 0.1 < (pictures.alpha == 0).float().mean() < 0.9


def test_stamps_have_captions_and_folder_classes(all_stamps):
    assert len(all_stamps) == 785
    assert {"animals/birds", "food/fruit", "vehicles/ship"} <= set(all_stamps.classes)
    assert all(all_stamps.captions)
    assert all_stamps.labels.max() == len(all_stamps.classes) - 1
    large = loaded(stamps, 16, smallest_class=20)
    assert large.labels.bincount().min() >= 20
    few = loaded(stamps, 16, smallest_class=20, limit=3)
    assert few.labels.bincount().tolist() == [3] * len(large.classes)


def test_fashion_mnist_keeps_its_own_split():
    pictures = loaded(fashion_mnist, 50)
    assert pictures.pixels.shape == (150, 3, 28, 28)
    assert [pictures.splits.count(split) for split in SPLITS] == [50, 50, 50]
    assert pictures.labels[:4].tolist() == [9, 0, 0, 3]  # the first four of the training file
    assert pictures.labels[100:104].tolist() == [9, 2, 1, 1]  # the first four of the test file
    assert pictures.captions[0] == "ankle boot"


def test_subset_keeps_items_together(all_emoji):
    chosen = torch.tensor([5, 3000, 17])
    part = all_emoji.subset(chosen)
    assert len(part) == 3
    assert part.captions[1] == all_emoji.captions[3000]
    assert torch.equal(part.pixels[2], all_emoji.pixels[17])
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        part.indices("dev")


def test_coverage_is_the_share_of_each_patch():
    alpha = torch.zeros(1, 8, 8, dtype=torch.uint8)
    alpha[0, :4, 4:] = 255  # the upper right quarter
    alpha[0, 4:6, :4] = 255  # half of the lower left quarter
    torch.testing.assert_close(patch_coverage(alpha, 2), torch.tensor([[0.0, 1.0, 0.5, 0.0]]))
