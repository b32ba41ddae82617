import random

import pytest

from reattend.data.interference_items import (
    NATURAL_COLOURS,
    NOUNS,
    PLACES,
    colour_question,
    kind_question,
    nature_question,
    place_of,
    place_question,
    screenshots,
    sentences,
)
from reattend.data.scenes import CLASSES, COLOURS, make_scenes


@pytest.mark.parametrize("seed", range(5))
def test_questions_name_their_four_options_in_order(seed):
    draw = random.Random(seed)
    for asked, right, pool in (
        (kind_question("fish", draw), "fish", CLASSES),
        (colour_question("red", draw), "red", COLOURS),
        (place_question("topleft", draw), "topleft", PLACES),
        (nature_question("lemon", draw), "yellow", NATURAL_COLOURS),
    ):
        assert asked.text.split()[-4:] == list(asked.options)
        assert len(set(asked.options)) == 4
        assert asked.options[asked.answer] == right
        assert set(asked.options) <= set(pool)
        assert len(asked.wrong) == 3
        assert right not in asked.wrong


def test_the_right_option_stands_in_every_place():
    draw = random.Random(0)
    places = [kind_question("bird", draw).answer for _ in range(400)]
    assert all(70 < places.count(place) < 130 for place in range(4))


def test_a_competing_colour_is_an_option():
    for seed in range(20):
        asked = nature_question("raven", random.Random(seed), competing="brown")
        assert "brown" in asked.wrong
        assert asked.options[asked.answer] == "black"


def test_every_thing_has_one_colour_and_every_colour_three_things():
    assert len(NOUNS) == 3 * len(NATURAL_COLOURS) == 24
    assert all(NOUNS[noun] == colour for colour, nouns in NATURAL_COLOURS.items() for noun in nouns)
    assert set(NATURAL_COLOURS) <= set(COLOURS)


def test_place_is_the_quarter_of_the_middle():
    scenes = make_scenes(24, "single", seed=5)
    for i in range(len(scenes)):
        x0, y0, x1, y1 = scenes.boxes[i, 0].tolist()
        vertical = "bottom" if (y0 + y1) / 2 > 48 else "top"
        horizontal = "right" if (x0 + x1) / 2 > 48 else "left"
        assert place_of(scenes, i) == vertical + horizontal
    assert len({place_of(scenes, i) for i in range(24)}) == 4


@pytest.mark.parametrize("asset", ["bbc_news", "anarchism"])
def test_sentences_have_eight_plain_words(asset):
    found = sentences(asset)
    assert len(found) > 80
    assert len(set(found)) == len(found)
    assert all(len(s.split()) == 8 and s.replace(" ", "").isalpha() and s.islower() for s in found)


def test_corpora_share_no_sentence():
    assert not set(sentences("bbc_news")) & set(sentences("anarchism"))


def test_screenshots_differ_and_repeat():
    found = screenshots(4, 96, seed=3)
    assert found.shape == (4, 3, 96, 96)
    assert (found == screenshots(4, 96, seed=3)).all()
    assert all((found[0] != found[i]).any() for i in range(1, 4))
