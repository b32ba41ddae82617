"""Garments on canvases: whole, within the canvas, of the promised scales, the same for one seed."""

import pytest
import torch
from torch.nn import functional as F

from reattend.data.garment_canvases import SCALES, SIDE, garment_canvases
from reattend.data.images import fashion_mnist

COUNT = 300


@pytest.fixture(scope="module")
def canvases():
    return garment_canvases("validation", COUNT, seed=0)


def extent(picture):
    """First and last row and column that are not black."""
    rows, columns = (picture.amax(axis).nonzero()[:, 0] for axis in (1, 0))
    return rows[0], rows[-1], columns[0], columns[-1]


def test_labels_are_those_of_the_garments(canvases):
    plain = fashion_mnist(limit=COUNT)
    assert (canvases[1] == plain.labels[plain.indices("validation")]).all()


def test_shapes_and_spread(canvases):
    pixels = canvases[0]
    assert pixels.shape == (COUNT, 1, SIDE, SIDE)
    assert pixels.dtype == torch.uint8
    found = torch.tensor([extent(picture[0]) for picture in pixels])
    sizes = torch.stack([found[:, 1] - found[:, 0], found[:, 3] - found[:, 2]]).amax(0) + 1
    assert sizes.max() <= SCALES[1]
    # a garment leaves a margin of its own, so its extent is at most its scale
    assert sizes.min() < SCALES[0] + 3
    assert sizes.max() > SCALES[1] - 3
    assert found[:, 0].min() <= 1
    assert found[:, 1].max() >= SIDE - 2
    assert found[:, 2].min() <= 1
    assert found[:, 3].max() >= SIDE - 2


def test_a_garment_of_full_scale_is_the_picture_itself(canvases):
    plain = fashion_mnist(limit=COUNT)
    grey = plain.pixels[plain.indices("validation"), :1].float()
    whole = 0
    for canvas, garment in zip(canvases[0], grey, strict=True):
        kernel = garment[0] - garment.mean()
        best = F.conv2d(canvas[None].float(), kernel[None, None]).flatten().argmax()
        top, left = divmod(best.item(), SIDE - 28 + 1)
        same = canvas[0, top : top + 28, left : left + 28] == garment[0]
        whole += bool(same.all() and canvas.sum() == garment.sum())
    assert COUNT / 19 / 3 < whole < 3 * COUNT / 19  # one scale of nineteen


def test_mean_brightness_survives_shrinking(canvases):
    plain = fashion_mnist(limit=COUNT)
    light = plain.pixels[plain.indices("validation"), 0].float().sum((1, 2))
    shrunk = (canvases[0].float().sum((1, 2, 3)) / light).mean()
    scales = torch.arange(SCALES[0], SCALES[1] + 1)
    assert shrunk == pytest.approx((scales / 28).square().mean().item(), rel=0.1)


def test_one_seed_gives_the_same_canvases(canvases):
    again = garment_canvases("validation", COUNT, seed=0)
    assert all((left == right).all() for left, right in zip(canvases, again, strict=True))
    other = garment_canvases("validation", COUNT, seed=1)
    assert (other[0] != canvases[0]).any()


def test_too_many_are_refused():
    with pytest.raises(ValueError, match="'test' has 10000 garments, 10001 were asked for"):
        garment_canvases("test", 10_001, seed=0)
