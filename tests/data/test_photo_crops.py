"""Crops of photographs: sizes, seeds, and that each row shows one photograph."""

import pytest
import torch
from torch.nn import functional as F

from reattend.data.photo_crops import _opened, _paths, photo_crops


def test_crops_have_their_size_and_depend_on_the_seed():
    found = photo_crops(3, 4, 28, seed=0)
    assert found.shape == (3, 4, 3, 28, 28)
    assert found.dtype == torch.uint8
    assert torch.equal(found, photo_crops(3, 4, 28, seed=0))
    assert not torch.equal(found, photo_crops(3, 4, 28, seed=1))
    assert torch.equal(found[:2], photo_crops(2, 4, 28, seed=0))
    assert not torch.equal(found[0, 0], found[0, 1])


def test_a_row_shows_its_photograph():
    for path, crops in zip(_paths(), photo_crops(3, 2, 14, seed=0), strict=False):
        photo = _opened(path, 28)
        assert min(photo.shape[1:]) == 28
        windows = F.unfold(photo[None].float(), 14)[0].T
        for crop in crops:
            assert (windows == crop.float().flatten()).all(1).any()


def test_all_seventeen_and_no_more():
    assert len(photo_crops(17, 1, 8, seed=0)) == 17
    with pytest.raises(ValueError, match="18 photographs were asked for, there are 17"):
        photo_crops(18, 1, 8, seed=0)
