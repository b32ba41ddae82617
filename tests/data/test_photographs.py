"""Photographs: two sides that share nothing, crops that lie in them, and how they are spoilt."""

import numpy as np
import pytest
import torch
from PIL import Image

from reattend.data.photographs import photographs, random_crops, spoil


def test_the_two_sides():
    train, test = photographs("train"), photographs("test")
    assert len(train) == 12
    assert len(test) == 5
    assert not set(train) & set(test)
    assert min(min(photo.shape[1:]) for photo in train.values()) >= 128
    with pytest.raises(ValueError, match="train, test"):
        photographs("validation")


def test_crops_are_pieces_of_one_photograph():
    photo = torch.arange(2 * 3 * 20 * 30, dtype=torch.int32).view(2, 3, 20, 30) % 251
    photos = list(photo.to(torch.uint8))
    crops = random_crops(photos, 6, 8, torch.Generator().manual_seed(0))
    assert crops.shape == (6, 3, 8, 8)
    assert crops.max() <= 1
    orders = set()
    for crop in (255 * crops).round().to(torch.uint8):
        # turned and mirrored back, each is a window of a photograph
        found = [
            (number, mirror, turns)
            for number, one in enumerate(photos)
            for mirror in (0, 1)
            for turns in range(4)
            for window in [one.unfold(1, 8, 1).unfold(2, 8, 1)]
            for upright in [crop.rot90(-turns, (1, 2))]
            for again in [upright.flip(2) if mirror else upright]
            if (window == again[:, None, None]).all((0, 3, 4)).any()
        ]
        assert found
        orders.add(found[0])
    assert len(orders) > 2
    with pytest.raises(ValueError, match="smaller"):
        random_crops(photos, 1, 21, torch.Generator())


def test_spoiling_is_pillows_bicubic_and_noise():
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (1, 3, 24, 32), generator=generator).float()
    small = spoil(picture / 255, 4, 0.0, generator)
    assert small.shape == (1, 3, 6, 8)
    for channel in range(3):
        image = Image.fromarray(picture[0, channel].numpy(), mode="F")
        expected = np.array(image.resize((8, 6), Image.Resampling.BICUBIC))
        # Pillow's kernel has a = -.5 and is antialiased
        assert np.abs(255 * small[0, channel].numpy() - expected).max() < 0.1
    noisy = spoil(torch.full((1, 3, 100, 100), 0.5), 1, 0.1, generator)
    assert abs(noisy.std() - 0.1) < 0.003
    assert abs(noisy.mean() - 0.5) < 0.003
