"""Twin scenes: the same words paired otherwise, nothing twice, and grey things that no caption names."""

import pytest
import torch

from reattend.data.attribute_scenes import COLOURS, NOUNS, caption_ids
from reattend.data.twin_scenes import make_twin_scenes


def sets(scenes):
    return [
        frozenset(zip(colours, nouns, strict=True))
        for colours, nouns in zip(scenes.colours.tolist(), scenes.nouns.tolist(), strict=True)
    ]


@pytest.mark.parametrize("objects", [2, 3, 4])
def test_twins_have_the_same_words_paired_otherwise(objects):
    scenes = make_twin_scenes(30, objects=objects, unnamed=1, size=36, seed=3)
    ids, mask = caption_ids(scenes.colours, scenes.nouns)
    assert mask.all()
    assert torch.equal(ids[::2].sort(1).values, ids[1::2].sort(1).values)
    found = sets(scenes)
    assert len(set(found)) == 60
    for one, other in zip(found[::2], found[1::2], strict=True):
        assert len(one & other) == objects - 2
    for values in (scenes.colours, scenes.nouns):
        assert all(len(set(row)) == objects for row in values.tolist())


def test_every_pair_of_colour_and_noun_comes_and_no_set_comes_twice():
    """By chance about five of 800 sets out of 67,200 would be one that has come before."""
    found = sets(make_twin_scenes(400, unnamed=0))
    assert len(frozenset().union(*found)) == len(COLOURS) * len(NOUNS)
    assert len(set(found)) == 800


def test_an_object_of_a_twin_stands_at_any_place_of_the_caption():
    scenes = make_twin_scenes(300, unnamed=0)
    swapped = scenes.nouns[::2] == scenes.nouns[1::2]
    assert (swapped.double().mean(0) - 1 / 3).abs().max() < 0.1


def test_the_same_arguments_give_the_same_bytes_and_others_do_not():
    one, same = make_twin_scenes(4, seed=1), make_twin_scenes(4, seed=1)
    assert torch.equal(one.pixels, same.pixels)
    for other in (make_twin_scenes(4, seed=2), make_twin_scenes(4, seed=1, split="test")):
        assert not torch.equal(one.pixels, other.pixels)


def test_colours_are_where_the_boxes_say():
    """Saturated pixels lie inside boxes alone: ground and unnamed things are grey."""
    scenes = make_twin_scenes(20, unnamed=4, seed=5)
    spread = scenes.pixels.int().amax(1) - scenes.pixels.int().amin(1)
    for picture, boxes in zip(spread, scenes.boxes.tolist(), strict=True):
        inside = torch.zeros_like(picture, dtype=torch.bool)
        for x0, y0, x1, y1 in boxes:
            assert not inside[y0:y1, x0:x1].any()
            inside[y0:y1, x0:x1] = True
        assert picture[~inside].max() == 0
        assert picture[inside].max() > 100


def test_unnamed_things_change_the_ground():
    """Ground pixels vary more with grey cut-outs than without."""
    plain, full = (
        make_twin_scenes(40, objects=2, unnamed=n, seed=7).pixels.double() for n in (0, 6)
    )
    assert full.std((2, 3)).mean() > 1.2 * plain.std((2, 3)).mean()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "holiday"}, "unknown split"),
        ({"objects": 1}, "2 to 6 objects"),
        ({"objects": 7}, "2 to 6 objects"),
        ({"size": 12, "objects": 5}, "find no place"),
    ],
)
def test_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        make_twin_scenes(1, **changed)
