"""Pages of digits: where they stand, what is labelled, and that pages can be had again."""

import torch
from torch import Generator

from reattend.data.digit_pages import (
    BORDER,
    HEIGHT,
    INNER,
    UNASKED,
    WIDTH,
    draw_digit_pages,
    printed_digits,
)

FONTS = ("DejaVuSans", "DejaVuSerif")


def pages(count=400, noise=0.0, seed=0):
    return draw_digit_pages(count, FONTS, 16, noise, Generator().manual_seed(seed))


def test_the_same_seed_gives_the_same_pages():
    assert torch.equal(pages(3, 0.1).pixels, pages(3, 0.1).pixels)
    assert not torch.equal(pages(3, 0.1).pixels, pages(3, 0.1, seed=1).pixels)


def test_digits_differ_and_touch_no_edge_of_their_boxes_by_half():
    drawn = printed_digits(FONTS, 16)
    assert drawn.shape == (2, 10, 16, 12)
    for face in drawn.flatten(2):
        apart = torch.cdist(face, face) + 9 * torch.eye(10)
        assert apart.min() > 1
    centre = (drawn * torch.arange(12)).sum((2, 3)) / drawn.sum((2, 3))
    assert ((centre - 5.5).abs() < 1.5).all()


def test_only_the_middle_digit_is_cut_by_the_border():
    found = pages()
    ink = printed_digits(FONTS, 16).sum((0, 1, 2)) > 0
    reach = ink.nonzero().flatten()
    first, last = reach.min().item() - 6, reach.max().item() - 6  # columns of ink around the centre
    inner = found.columns[:, INNER]
    assert ((inner[:, 0] + last < WIDTH // 2) & (inner[:, 1] + first >= WIDTH // 2)).all()
    middle = found.columns[:, BORDER]
    assert ((middle + first < WIDTH // 2) & (middle + last >= WIDTH // 2)).all()


def test_pages_hold_the_digits_that_are_present_and_nothing_else():
    found = pages()
    for page in range(20):
        for place in range(3):
            column, row = found.columns[page, place], found.rows[page, place]
            box = found.pixels[page, row - 8 : row + 8, max(column - 3, 0) : column + 3]
            assert (box.max() > 0.3) == found.present[page, place]
    assert 0.7 < found.present.double().mean() < 0.8
    assert found.pixels.shape == (400, HEIGHT, WIDTH)


def test_tokens_and_labels_point_at_the_digits():
    found = pages()
    flat = found.labels.flatten(1)
    asked = flat.gather(1, found.tokens)
    assert torch.equal(asked[found.present], found.digits[found.present])
    assert (asked[~found.present] == UNASKED).all()
    # Tokens of the middle digit lie on both sides of the border.
    lone = found.present[:, BORDER] & ~found.present[:, INNER].any(1)
    columns = (found.labels[lone] != UNASKED).any(1)
    assert columns[:, :6].any(1).all()
    assert columns[:, 6:].any(1).all()
    assert columns.sum(1).max() <= 3
