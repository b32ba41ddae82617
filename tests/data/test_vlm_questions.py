"""Questions for the vision-language model: true of their scenes, balanced, and encoded word by word."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from reattend.data.scenes import CLASSES, COLOURS, make_scenes
from reattend.data.vlm_questions import (
    BOS,
    IDS,
    LENGTH,
    PAD,
    QUARTERS,
    TYPES,
    WORDS,
    balanced,
    encode,
    patch_contents,
    questions,
    scene_questions,
)

# A bird upper left, a small fish and a large house below, all in a picture of 100 pixels.
KINDS = [CLASSES.index(name) for name in ("bird", "fish", "house")]
COLOUR = [COLOURS.index(name) for name in ("red", "blue", "grey")]
BOXES = np.array([[5.0, 10, 35, 40], [10, 70, 20, 80], [55, 50, 95, 95]])


def drawn(seed, kinds=KINDS, boxes=BOXES):
    asked = questions(kinds, COLOUR[: len(kinds)], boxes, 100, np.random.default_rng(seed))
    return {question.text: question for question in asked}


def test_every_type_is_asked_of_a_scene_and_answered_from_its_annotations():
    asked = drawn(0)
    assert {q.type for q in asked.values()} == set(TYPES)
    expected = {
        "how many objects ?": ("three", -1),
        "what is largest ?": ("house", 2),
        "what is upper-left ?": ("bird", 0),
        "what is lower-left ?": ("fish", 1),
        "what is lower-right ?": ("house", 2),
        "what colour is fish ?": ("blue", 1),
        "where is bird ?": ("upper-left", 0),
        "where is house ?": ("lower-right", 2),
    }
    assert {text: (asked[text].answer, asked[text].about) for text in expected} == expected
    assert "what is upper-right ?" not in asked
    exist = {text: q.answer for text, q in asked.items() if q.type == "exist"}
    assert len(exist) == 4
    for text, answer in exist.items():
        assert (answer == "yes") == (text.split()[2] in ("bird", "fish", "house"))


@pytest.mark.parametrize("seed", range(5))
def test_relations_hold_along_the_axis_on_which_things_are_further_apart(seed):
    true = {
        ("bird", "fish"): "above", ("fish", "bird"): "below",
        ("bird", "house"): "left-of", ("house", "bird"): "right-of",
        ("fish", "house"): "left-of", ("house", "fish"): "right-of",
    }  # fmt: skip
    asked = [q for q in drawn(seed).values() if q.type == "relation"]
    assert len(asked) == 3
    opposite = {"above": "below", "below": "above", "left-of": "right-of", "right-of": "left-of"}
    for question in asked:
        _, one, said, other, _ = question.text.split()
        right = true[one, other]
        assert said == (right if question.answer == "yes" else opposite[right])
        assert CLASSES[KINDS[question.about]] == one


def test_nothing_is_asked_that_two_answers_fit():
    twins = drawn(0, [KINDS[0], KINDS[0], KINDS[2]])
    assert not [
        t for t in twins if "bird" in t and twins[t].type in ("colour", "where", "relation")
    ]
    assert "where is house ?" in twins
    near = BOXES.copy()
    near[1] = [40, 10, 50, 20]  # centre at 45: nearer than 8 % to the middle
    assert "where is fish ?" not in drawn(0, boxes=near)
    crowded = BOXES.copy()
    crowded[1] = [5, 5, 15, 15]
    assert "what is upper-left ?" not in drawn(0, boxes=crowded)
    equal = BOXES.copy()
    equal[0] = [0, 0, 40, 40]  # 1,600 against the house's 1,800
    assert "what is largest ?" not in drawn(0, boxes=equal)


@pytest.fixture(scope="module")
def asked_of_many():
    """Questions of 1,500 scenes whose objects lie anywhere; no pictures are needed."""
    random, found = np.random.default_rng(0), []
    for _ in range(1500):
        count = random.integers(1, 5)
        extents = random.uniform(25, 40, (count, 2))
        corners = random.uniform(0, 100 - extents)
        boxes = np.concatenate([corners, corners + extents], 1)
        kinds, colours = (
            random.integers(len(CLASSES), size=count),
            random.integers(len(COLOURS), size=count),
        )
        found += questions(kinds.tolist(), colours.tolist(), boxes, 100, random)
    return found


def test_questions_do_not_give_their_answers_away(asked_of_many):
    counts = defaultdict(Counter)
    for question in asked_of_many:
        counts[question.type, question.text][question.answer] += 1
    for (kind, text), answers in counts.items():
        total = answers.total()
        if kind in ("exist", "relation") and total > 30:
            assert abs(answers["yes"] / total - 0.5) < 4 * 0.5 / total**0.5, text
        if kind in ("kind", "largest"):
            assert max(answers.values()) / total < 0.15, text
        if kind == "where":
            assert set(answers) == set(QUARTERS), text
            assert max(answers.values()) / total < 0.4, text
        assert set(answers) <= set(TYPES[kind])


def test_balanced_takes_types_in_turn():
    asked = balanced(list(drawn(3).values()), 9)
    assert len(asked) == 9
    assert {q.type for q in asked[:7]} == set(TYPES)
    assert len({(q.type, q.text) for q in asked}) == 9
    assert len(balanced(asked, 50)) == 9


def test_encoding_is_word_by_word_and_padded():
    asked = list(drawn(1).values())
    words, answers = encode([asked[:1], asked[1:4]])
    assert words.shape == (2, 3, LENGTH)
    assert (words[0, 1:] == IDS[PAD]).all()
    for row, question in zip(words[1], asked[1:4], strict=True):
        assert [WORDS[i] for i in row if i != IDS[PAD]] == question.text.split()
    assert [WORDS[i] for i in answers] == [q.answer for q in asked[:4]]
    assert len(set(WORDS)) == len(WORDS)
    assert (WORDS[0], WORDS[1]) == (PAD, BOS)


def test_patches_show_what_the_masks_cover():
    scenes = make_scenes(4, "several", objects=(1, 4), size=70, seed=3)
    shares = patch_contents(scenes, 5)
    block = scenes.masks[2, 0, 28:42, 14:28].float().mean()
    torch.testing.assert_close(shares[2, 0, 2 * 5 + 1], block)
    torch.testing.assert_close(shares.sum(2) * 196, scenes.masks.flatten(2).sum(2).float())
    random = np.random.default_rng(0)
    asked = scene_questions(scenes, 1, random)
    there = int((scenes.labels[1] >= 0).sum())
    assert {q.answer for q in asked if q.type == "count"} == {
        ("one", "two", "three", "four")[there - 1]
    }
    for question in asked:
        if question.type == "colour":
            assert question.answer == COLOURS[scenes.colours[1, question.about]]
