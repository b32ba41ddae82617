"""Scenes of recoloured cut-outs: boxes, captions, held-out pairs, and what never comes twice."""

import pytest
import torch
from torch.nn import functional as F

from reattend.data.attribute_scenes import (
    COLOURS,
    NOUNS,
    PAINTS,
    caption_ids,
    colour_word,
    held_out_pair,
    make_attribute_scenes,
    spelled,
)


@pytest.fixture(scope="module")
def scenes():
    return make_attribute_scenes(150, seed=3)


def test_same_arguments_same_bytes(scenes):
    again, other = make_attribute_scenes(150, seed=3), make_attribute_scenes(150, seed=4)
    assert torch.equal(again.pixels, scenes.pixels)
    assert torch.equal(again.nouns, scenes.nouns)
    assert not torch.equal(other.pixels, scenes.pixels)


def test_objects_differ_within_a_scene_and_sets_between_scenes(scenes):
    counts = (scenes.nouns >= 0).sum(1)
    assert counts.unique().tolist() == [2, 3, 4]
    sets = []
    for colours, nouns, n in zip(scenes.colours, scenes.nouns, counts, strict=True):
        assert len(set(colours[:n].tolist())) == len(set(nouns[:n].tolist())) == n
        assert (colours[n:] == -1).all()
        sets.append(frozenset(zip(colours[:n].tolist(), nouns[:n].tolist(), strict=True)))
    assert len(set(sets)) == len(sets)


def test_boxes_lie_apart_inside_the_picture(scenes):
    for boxes, n in zip(scenes.boxes, (scenes.nouns >= 0).sum(1), strict=True):
        taken = torch.zeros(24, 24, dtype=torch.int)
        for x0, y0, x1, y1 in boxes[:n].tolist():
            assert 0 <= x0 < x1 <= 24
            assert 0 <= y0 < y1 <= 24
            assert 8 <= max(x1 - x0, y1 - y0) <= 9
            taken[y0:y1, x0:x1] += 1
        assert taken.max() == 1
        assert not boxes[n:].any()


def test_objects_have_the_colour_of_their_caption():
    """The hue inside a box, the direction of its pixels whatever their shading; grounds and white have none."""
    scenes = make_attribute_scenes(60, side=(20, 20), size=60, seed=1)
    hues = F.normalize(torch.tensor(list(PAINTS.values())[:-1]).double(), dim=1)
    assert COLOURS[-1] == "white"
    for scene in range(60):
        for place in range(int((scenes.nouns[scene] >= 0).sum())):
            x0, y0, x1, y1 = scenes.boxes[scene, place].tolist()
            inside = scenes.pixels[scene, :, y0:y1, x0:x1].flatten(1).T.double()
            close = ((F.normalize(inside, dim=1) @ hues.T) > 0.999).sum(0)
            if scenes.colours[scene, place] == len(hues):
                assert close.sum() == 0
            else:
                assert close.argmax() == scenes.colours[scene, place]
                assert close.max() > 0.7 * close.sum()


def test_held_out_pairs():
    pairs = [held_out_pair(c, n) for c in range(len(COLOURS)) for n in range(len(NOUNS))]
    assert sum(pairs) / len(pairs) == pytest.approx(0.2, abs=0.03)
    for held_out in (False, True):
        scenes = make_attribute_scenes(80, held_out=held_out, seed=5)
        for colours, nouns in zip(scenes.colours.tolist(), scenes.nouns.tolist(), strict=True):
            unseen = [held_out_pair(c, n) for c, n in zip(colours, nouns, strict=True) if n >= 0]
            assert any(unseen) == held_out


def test_captions():
    colours, nouns = torch.tensor([[0, 2, -1], [5, 1, 3]]), torch.tensor([[1, 0, -1], [15, 2, 4]])
    ids, mask = caption_ids(colours, nouns)
    assert ids.shape == (2, 10)
    assert mask.sum(1).tolist() == [7, 10]
    assert spelled(ids[0]) == ["<bos>", "red", "banana", "and", "blue", "apple", "<eos>"]
    words = spelled(ids[1])
    assert words[colour_word(2)] == "yellow"
    assert words[colour_word(2) + 1] == "corn"
    assert words[-1] == "<eos>"


def test_photographs_are_grey_and_those_of_the_sides_differ():
    """Corners without an object: never brighter than half the contrast allows, on average not alike."""
    means = []
    for split in ("train", "test"):
        scenes = make_attribute_scenes(200, objects=(2, 2), split=split)
        free = ~((scenes.boxes[..., 0] == 0) & (scenes.boxes[..., 1] == 0)).any(1)
        corners = scenes.pixels[free, :, 0, 0].double()
        assert torch.equal(corners, corners[:, :1].expand(-1, 3))
        assert corners.min() >= 30
        assert corners.max() <= 158
        means.append(corners.mean())
    assert (means[0] - means[1]).abs() > 3


def test_refusals():
    with pytest.raises(ValueError, match="unknown split"):
        make_attribute_scenes(3, split="dev")
    with pytest.raises(ValueError, match="objects must be"):
        make_attribute_scenes(3, objects=(2, 7))
    with pytest.raises(ValueError, match="no new set of 1 objects"):
        make_attribute_scenes(100, objects=(1, 1))
    with pytest.raises(ValueError, match="find no place on 12 pixels"):
        make_attribute_scenes(3, objects=(4, 4), size=12)
