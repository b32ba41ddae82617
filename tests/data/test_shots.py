"""Draws of k labelled examples a class, and balanced sides of a set."""

import pytest
import torch

from reattend.data.label_texts import LABEL_TEXTS, descriptions, names, padded_names
from reattend.data.shots import balanced, draw_shots
from reattend.data.texts import TextSet

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 2, 1])


@pytest.mark.parametrize("seed", range(4))
def test_a_draw_has_different_items_of_each_class_in_its_row(seed):
    drawn = draw_shots(LABELS, 3, seed)
    assert (LABELS[drawn] == torch.arange(3)[:, None]).all()
    assert len(drawn.unique()) == drawn.numel() == 9
    assert torch.equal(drawn, draw_shots(LABELS, 3, seed))


def test_draws_are_nested():
    whole = draw_shots(LABELS, 4, 5)
    for k in (1, 2, 3):
        assert torch.equal(draw_shots(LABELS, k, 5), whole[:, :k])


def test_every_item_is_drawn_as_often():
    counts = torch.zeros(len(LABELS))
    for seed in range(600):
        counts[draw_shots(LABELS, 1, seed).flatten()] += 1
    assert (counts / 600 - 1 / 4).abs().max() < 0.08


def test_too_few_items_are_named():
    with pytest.raises(ValueError, match="class 1 has 1 items, 2 of each"):
        draw_shots(torch.tensor([0, 0, 1]), 2, 0)
    with pytest.raises(ValueError, match="at least one"):
        draw_shots(LABELS, 0, 0)


def test_balanced_takes_what_there_is():
    data = TextSet(
        tuple("abcdef"),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        ("x", "y"),
        ("test",) * 4 + ("train",) * 2,
    )
    sentences, labels = balanced(data, "test", 2)
    assert labels.tolist() == [0, 0, 1]
    assert set(sentences[:2]) < set("abc")
    assert sentences[2] == "d"
    with pytest.raises(ValueError, match="no text of class x on the side 'train'"):
        balanced(data, "train", 2)


@pytest.mark.parametrize("data", LABEL_TEXTS)
def test_label_texts_come_in_the_order_of_the_classes(data):
    classes = sorted(LABEL_TEXTS[data])
    for of in (names, descriptions, padded_names):
        assert len(set(of(data))) == len(classes)
    for name, text, padded, key in zip(
        names(data), descriptions(data), padded_names(data), classes, strict=True
    ):
        assert (name, text) == LABEL_TEXTS[data][key]
        assert len(text) > len(name)
        assert name in padded
