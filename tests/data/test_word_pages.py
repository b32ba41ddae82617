"""Pages of words: what is written where, which letters a border cuts, and that pages can be had again."""

import pytest
import torch
from torch import Generator

from reattend.data.word_pages import (
    HEIGHT,
    LETTERS,
    PATCH,
    UNASKED,
    WIDTH,
    draw_word_pages,
    printed_letters,
    words,
)

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")


def pages(count=60, noise=0.0, seed=0, split="train"):
    return draw_word_pages(count, FONTS, 14, noise, Generator().manual_seed(seed), split)


PAGES = pages()


def test_the_same_seed_gives_the_same_pages():
    assert torch.equal(pages(3, 0.1).pixels, pages(3, 0.1).pixels)
    assert not torch.equal(pages(3, 0.1).pixels, pages(3, 0.1, seed=1).pixels)


def test_words_of_the_test_are_never_trained_on():
    known, held = set(words("train")), set(words("test"))
    assert not known & held
    assert 0.08 < len(held) / (len(known) + len(held)) < 0.12
    assert all(3 <= len(word) <= 7 and set(word) <= set(LETTERS) for word in known | held)
    assert {word for page in PAGES.words for word in page} <= known
    assert {word for page in pages(9, split="test").words for word in page} <= held


def test_letters_of_a_font_differ():
    boxes, widths = printed_letters(FONTS, 14)
    assert boxes.shape == (4, 26, 20, 20)
    assert widths.min() >= 5
    for face in boxes.flatten(2):
        assert (torch.cdist(face, face) + 9 * torch.eye(26)).min() > 0.5


def test_places_spell_the_words_and_hold_their_ink():
    for page, written in enumerate(PAGES.words):
        there = PAGES.present[page]
        assert "".join(LETTERS[n] for n in PAGES.letters[page][there]) == "".join(written)
        for row, column in zip(PAGES.rows[page][there], PAGES.columns[page][there], strict=True):
            assert PAGES.pixels[page, row - 4 : row + 5, column - 3 : column + 4].max() > 0.3
    assert PAGES.pixels.shape == (60, HEIGHT, WIDTH)
    empty = ~PAGES.present.any(1)
    assert (PAGES.pixels[empty] == 0).all()


def test_no_two_letters_share_a_token():
    for tokens, there in zip(PAGES.tokens, PAGES.present, strict=True):
        assert len(set(tokens[there].tolist())) == there.sum()


def test_labels_name_the_letter_over_a_token():
    labels = PAGES.labels
    own = labels.flatten(1).gather(1, PAGES.tokens)[PAGES.present]
    assert (
        own == PAGES.letters[PAGES.present]
    ).double().mean() > 0.97  # a neighbour may reach further
    page, row, column = (x[0] for x in (labels != UNASKED).nonzero(as_tuple=True))
    middle = (PATCH * row + PATCH // 2, PATCH * column + PATCH // 2)
    near = (PAGES.rows[page] - middle[0]).abs() <= 4
    near &= 2 * (PAGES.columns[page] - middle[1]).abs() <= PAGES.widths[page]
    assert labels[page, row, column] in PAGES.letters[page][near & PAGES.present[page]]


def test_letters_are_cut_where_the_borders_are():
    kinds = PAGES.kinds
    left, right = PAGES.columns - PAGES.widths / 2, PAGES.columns + PAGES.widths / 2
    assert ((left < WIDTH // 2) & (right > WIDTH // 2))[PAGES.cut_across].all()
    assert (PAGES.rows[PAGES.cut_along] - HEIGHT // 2).abs().max() <= 2
    inner = kinds["inner"]
    assert ((right < WIDTH // 2) | (left > WIDTH // 2))[inner].all()
    assert (PAGES.rows[inner] - HEIGHT // 2).abs().min() >= 14
    assert not (inner & kinds["border"]).any()
    assert ((inner | kinds["border"]) & ~kinds["all"]).sum() == 0
    assert PAGES.cut_across.any(1).double().mean() > 0.5


def test_some_pages_can_be_taken():
    few = PAGES.chosen(torch.tensor([4, 2]))
    assert few.words == (PAGES.words[4], PAGES.words[2])
    assert torch.equal(few.pixels[1], PAGES.pixels[2])
    with pytest.raises(IndexError):
        PAGES.chosen(torch.tensor([60]))
