"""Single objects and the shifts of their pixels."""

import pytest
import torch

from reattend.data.attribute_scenes import NOUNS
from reattend.data.shifted_objects import DOMAINS, jittered, make_objects


@pytest.fixture(scope="module")
def objects():
    return make_objects(150, size=24, side=(21, 24), seed=3)


def test_same_arguments_same_bytes(objects):
    again = make_objects(150, size=24, side=(21, 24), seed=3)
    other = make_objects(150, size=24, side=(21, 24), seed=4)
    assert torch.equal(again.pixels, objects.pixels)
    assert torch.equal(again.nouns, objects.nouns)
    assert not torch.equal(other.pixels, objects.pixels)


def test_all_nouns_and_colours_come(objects):
    assert objects.pixels.shape == (150, 3, 24, 24)
    assert len(objects) == 150
    assert objects.nouns.unique().tolist() == list(range(len(NOUNS)))
    assert objects.colours.unique().tolist() == list(range(6))
    assert objects.nouns.bincount().max() <= 20  # about nine each, no noun in a majority


def test_parts_of_one_seed_differ(objects):
    """No picture of the first call comes again in the second one."""
    flat = objects.pixels.flatten(1).float()
    assert (torch.cdist(flat[:64], flat[64:128]) > 1).all()


def test_stripes_by_hand(objects):
    found = objects.shifted("striped").pixels
    column = torch.arange(24)
    signs = torch.where(column % 4 < 2, 1.0, -1.0)
    expected = (127.5 + 0.7 * (objects.pixels.float() - 127.5) + 0.3 * 127.5 * signs).round()
    assert torch.equal(found, expected.clamp(0, 255).to(torch.uint8))
    slanted = objects.shifted("slanted").pixels
    assert torch.equal(slanted[:, :, 0], found[:, :, 0])
    assert torch.equal(slanted[:, :, 3, :-3], _striped(objects.pixels[:, :, 3], 3)[..., :-3])


def _striped(line, offset):
    signs = torch.where((torch.arange(24) + offset) % 4 < 2, 1.0, -1.0)
    changed = 127.5 + 0.7 * (line.float() - 127.5) + 0.3 * 127.5 * signs
    return changed.round().clamp(0, 255).to(torch.uint8)


def test_other_domains(objects):
    assert torch.equal(objects.shifted("source").pixels, objects.pixels)
    assert torch.equal(255 - objects.shifted("negative").pixels, objects.pixels)
    turned = objects.shifted("turned")
    assert torch.equal(turned.pixels[:, :, 0], objects.pixels[:, :, :, -1])
    for domain in DOMAINS:
        assert torch.equal(objects.shifted(domain).nouns, objects.nouns)
    with pytest.raises(ValueError, match="there are: source, striped"):
        objects.shifted("foggy")


def test_jitter_moves_and_mirrors(objects):
    """Every view is the picture moved by two pixels at most, or its mirror image moved."""
    pixels = objects.pixels[:40]
    found = jittered(pixels, torch.Generator().manual_seed(0))
    inner = slice(4, 20)
    seen = set()
    for picture, view in zip(pixels, found, strict=True):
        fits = [
            (dy, dx, mirrored)
            for mirrored in (False, True)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(
                (view.flip(2) if mirrored else view)[:, inner, inner],
                picture.roll((-dy, -dx), (1, 2))[:, inner, inner],
            )
        ]
        assert fits
        seen |= set(fits[:1])
    assert len({fit[0] for fit in seen}) == len({fit[1] for fit in seen}) == 5
    assert {fit[2] for fit in seen} == {False, True}
    still = jittered(pixels, torch.Generator().manual_seed(1), most=0)
    same = (still == pixels).flatten(1).all(1)
    assert 5 < same.sum() < 35
    assert torch.equal(still[~same], pixels[~same].flip(3))
    assert torch.equal(found, jittered(pixels, torch.Generator().manual_seed(0)))
