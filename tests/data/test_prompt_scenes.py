"""Prompts and scenes: captions by the book, pictures that show them, and a rule that reads pictures."""

import pytest
import torch
from torch import Generator

from reattend.data.prompt_scenes import (
    COLOUR_AT,
    COLOURS,
    LENGTH,
    NOUN_AT,
    NOUNS,
    VOCABULARY,
    Prompts,
    category,
    draw_prompts,
    empty_captions,
    match_margins,
    matched,
    paint,
    paint_things,
    pair_prompts,
    single_prompts,
    spelled,
)


def generator(seed=0) -> Generator:
    return Generator().manual_seed(seed)


def contents(prompts: Prompts) -> list[set]:
    return [
        {(n, c) for n, c in zip(nouns, colours, strict=True) if n >= 0}
        for nouns, colours in zip(prompts.nouns.tolist(), prompts.colours.tolist(), strict=True)
    ]


def test_captions_read_as_their_prompts_and_words_stand_where_they_should():
    prompts = Prompts(torch.tensor([[0, 2], [3, -1]]), torch.tensor([[1, 3], [7, -1]]))
    assert prompts.texts() == ["a red car and a blue duck", "a yellow star"]
    ids = prompts.ids()
    assert ids.shape == (2, LENGTH)
    words = [[VOCABULARY[i] for i in row] for row in ids]
    assert words[0][0] == words[1][0] == "<bos>"
    assert words[0][-1] == words[1][4] == "<eos>"
    assert words[1][5:] == ["<pad>"] * 4
    assert [words[0][at] for at in COLOUR_AT] == ["red", "blue"]
    assert [words[0][at] for at in NOUN_AT] == ["car", "duck"]
    assert [spelled(row) for row in empty_captions(2)] == ["", ""]
    assert (empty_captions(2)[:, :3] == torch.tensor([1, 2, 0])).all()


def test_pair_prompts_ask_for_every_pair_of_nouns_equally_often_in_both_orders():
    prompts = pair_prompts(56, seed=3)
    pairs = [frozenset(row) for row in prompts.nouns.tolist()]
    assert sorted(pairs.count(pair) for pair in set(pairs)) == [2] * 28
    assert (prompts.colours[:, 0] != prompts.colours[:, 1]).all()
    assert 10 < (prompts.nouns[:, 0] < prompts.nouns[:, 1]).sum() < 46
    assert torch.equal(prompts.nouns, pair_prompts(56, seed=3).nouns)
    assert not torch.equal(prompts.nouns, pair_prompts(56, seed=4).nouns)
    assert len({frozenset(row) for row in pair_prompts(16).nouns.tolist()}) == 16


def test_single_prompts_are_every_noun_in_every_colour():
    prompts = single_prompts()
    assert len(set(prompts.texts())) == len(NOUNS) * len(COLOURS) == len(prompts)


def test_categories():
    numbers = {name: NOUNS.index(name) for name in NOUNS}
    assert category([numbers["cat"], numbers["fish"]]) == "animal-animal"
    assert category([numbers["mug"], numbers["duck"]]) == "animal-object"
    assert category([numbers["mug"], numbers["car"]]) == "object-object"


def test_drawn_prompts_differ_within_a_picture_and_have_the_share_of_two():
    prompts = draw_prompts(2000, generator(), two=0.3)
    both = prompts.nouns[:, 1] >= 0
    assert both.double().mean().item() == pytest.approx(0.3, abs=0.04)
    assert (prompts.nouns[both, 0] != prompts.nouns[both, 1]).all()
    assert (prompts.colours[both, 0] != prompts.colours[both, 1]).all()
    assert (prompts.colours[~both, 1] == -1).all()


@pytest.mark.parametrize("size", [24, 40])
def test_the_rule_reads_what_was_painted(size):
    prompts = draw_prompts(80, generator(1))
    scenes = paint(prompts, size, generator(2))
    peaks, fits = matched(scenes.pixels)
    assert peaks.shape[:3] == (80, len(NOUNS), len(COLOURS))
    found = [
        {(noun, colour) for noun, colour, *_ in picture.nonzero().tolist()} for picture in peaks
    ]
    assert found == contents(prompts)
    assert (peaks.sum((1, 2, 3, 4)) == (prompts.nouns >= 0).sum(1)).all()
    assert (fits[torch.arange(80), prompts.nouns[:, 0]] > 0.97).all()


def test_the_rule_counts_repeated_things_and_finds_none_on_white():
    nouns = torch.tensor([[2, 2]]).repeat(30, 1)
    scenes = paint_things(torch.tensor([[0, 3]]).repeat(30, 1), nouns, 24, generator())
    peaks = matched(scenes.pixels)[0]
    assert (peaks[:, 2].sum((1, 2, 3)) == 2).all()
    assert not matched(torch.ones(1, 3, 24, 24))[0].any()


def test_margins_say_what_the_rule_finds_and_how_narrowly():
    nouns = torch.randint(8, (100, 3), generator=generator(5))
    colours = torch.randint(4, (100, 3), generator=generator(9))
    clean = paint_things(colours, nouns, 24, generator(6)).pixels
    rough = clean + 0.4 * torch.randn(clean.shape, generator=generator(7))
    crowded = torch.minimum(clean, clean.roll((4, 3), (-1, -2)))
    for pixels in (clean, rough, crowded):
        found = matched(pixels)[0].flatten(2).any(-1)
        assert torch.equal(match_margins(pixels) >= 0, found)
    alone = paint_things(torch.tensor([[1]]), torch.tensor([[7]]), 24, generator(8)).pixels
    first = match_margins(alone)[0]
    assert first.argmax() == 7
    faded = match_margins(1 - 0.5 * (1 - alone))[0]  # fits by .75, and no other thing better
    assert 0 < faded[7] < first[7]
    assert match_margins(torch.ones(1, 3, 24, 24))[0].tolist() == pytest.approx([-0.6] * 8)


def test_boxes_hold_the_paint_and_do_not_overlap():
    scenes = paint(draw_prompts(200, generator(3), two=1.0), 24, generator(4))
    rows, columns = torch.arange(24)[:, None], torch.arange(24)[None]
    covered = torch.zeros(200, 24, 24)
    for place in range(2):
        x0, y0, x1, y1 = (scenes.boxes[:, place, i, None, None] for i in range(4))
        covered += (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    assert covered.max() == 1
    assert (scenes.boxes[..., :2] % 2 == 0).all()
    painted = scenes.pixels.amin(1) < 0.6
    assert painted.any(2).any(1).all()
    assert not (painted & (covered == 0)).any()
    assert scenes.pixels.abs().max() <= 1


def test_same_seed_same_picture_and_other_seed_other_picture():
    prompts = single_prompts()
    first, again, other = (paint(prompts, 24, generator(seed)).pixels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_three_things_overlap_little_and_missing_ones_leave_no_trace():
    nouns = torch.tensor([[0, 5, 6]]).repeat(50, 1)
    colours = torch.tensor([[0, 1, 2]]).repeat(50, 1)
    peaks = matched(paint_things(colours, nouns, 24, generator()).pixels)[0]
    assert peaks[:, [0, 5, 6], [0, 1, 2]].flatten(2).any(2).double().mean() > 0.85
    nothing = paint_things(colours - 9, torch.full_like(nouns, -1), 24, generator())
    assert not matched(nothing.pixels)[0].any()
    assert (nothing.boxes == 0).all()
