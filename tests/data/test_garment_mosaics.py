"""Mosaics of garments: every garment whole and in its place, every patch with its garment's class."""

import torch

from reattend.data.garment_mosaics import garment_mosaics


def drawn(tiles=3, count=4, seed=0):
    """Garments of one grey value each, ten times their class plus 50, filling all but a margin."""
    labels = torch.arange(10)
    garments = (50 + 10 * labels).to(torch.uint8)[:, None, None].expand(10, 28, 28)
    generator = torch.Generator().manual_seed(seed)
    return garment_mosaics(garments, labels, count, tiles, generator)


def test_patches_have_the_class_of_the_garment_they_show():
    pixels, labels = drawn()
    assert pixels.shape == (4, 1, 96, 96)
    assert labels.shape == (4, 144)
    middle = pixels[:, 0, 4::8, 4::8].flatten(1)
    assert torch.equal((middle.long() - 50) // 10, labels)


def test_margins_are_black_and_corners_belong_to_a_garment_still():
    pixels, labels = drawn(tiles=2)
    assert not pixels[..., :2].any()
    assert not pixels[..., 30:34].any()
    assert (pixels[..., 2:30, 2:30] >= 50).all()
    assert (labels >= 0).all()  # six by six of eight by eight pixels


def test_dark_patches_have_no_class():
    garments = torch.zeros(2, 28, 28, dtype=torch.uint8)
    garments[:, :, :14] = 200
    _, labels = garment_mosaics(
        garments, torch.tensor([3, 3]), 1, 1, torch.Generator().manual_seed(0)
    )
    assert labels.view(4, 4).tolist() == [[3, 3, -1, -1]] * 4


def test_one_seed_gives_the_same_mosaics_and_another_does_not():
    first, again, other = drawn(), drawn(), drawn(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    assert len(first[1].unique()) > 5
