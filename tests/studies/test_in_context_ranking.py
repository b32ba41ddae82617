"""BM25 by hand, scores of rankings by hand, temperatures recovered, slopes of known curves."""

import math

import pytest
import torch

from reattend.data.verse_lists import VerseList
from reattend.studies.in_context_ranking import (
    bm25,
    cosines,
    first_is_right,
    fitted_likelihood,
    fitted_temperature,
    glove_mean,
    held_out_likelihood,
    log_likelihood,
    random_prompt,
    without_slots,
    words_of,
)

DRAWN = VerseList("the King's sea", ("the sea, the sea", "a king's house", "nothing"), 0)


def test_words_are_lower_case_without_punctuation():
    assert words_of("“The LORD’s king, and (David's) 3 sons!”") == [
        "the",
        "lord’s",
        "king",
        "and",
        "david's",
        "sons",
    ]


def test_bm25_by_hand():
    collection = ["the sea the sea", "a king's house", "nothing", "the end"]
    found = bm25([DRAWN], collection, k1=0.9, b=0.4)[0]
    mean = (4 + 3 + 1 + 2) / 4

    def part(df, tf, length):
        rarity = math.log(1 + (4 - df + 0.5) / (df + 0.5))
        return rarity * tf / (tf + 0.9 * (0.6 + 0.4 * length / mean))

    expected = [part(2, 2, 4) + part(1, 2, 4), part(1, 1, 3), 0]
    assert found.tolist() == pytest.approx(expected)


def test_cosines_are_those_of_each_list():
    places = {"the King's sea": 0, "the sea, the sea": 0, "a king's house": 1, "nothing": 2, "q": 1}

    def encode(texts):
        return torch.eye(3)[[places[text] for text in texts]]

    other = VerseList("q", ("nothing", "a king's house", "the sea, the sea"), 1)
    assert cosines([DRAWN, other], encode).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_glove_vectors_have_length_one_and_forget_order():
    found = glove_mean(["the king of israel", "Israel of the king!", "qqqqzzz"])
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([1.0, 1, 0]))
    torch.testing.assert_close(found[0], found[1])


def test_ties_share_the_first_place():
    scores = torch.tensor([[1.0, 2, 2], [3, 2, 1], [0, 0, 1], [5, 5, 5]])
    found = first_is_right(scores, torch.tensor([1, 0, 0, 2]))
    assert found.tolist() == pytest.approx([0.5, 1, 0, 1 / 3])
    by_seed = first_is_right(torch.stack([scores, -scores]), torch.tensor([1, 0, 0, 2]))
    assert by_seed[1].tolist() == pytest.approx([0, 0, 0.5, 1 / 3])


def test_likelihood_by_hand():
    scores = torch.tensor([[0.1, 0.3]])
    found = log_likelihood(scores, torch.tensor([1]), 0.1)
    assert found.item() == pytest.approx(-math.log(1 + math.exp(-2)), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.003, 0.05, 2.0])
def test_the_temperature_that_made_the_data_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    scores = temperature * 2 * torch.randn(20_000, 4, generator=generator)
    right = torch.multinomial((scores / temperature).softmax(1), 1, generator=generator)[:, 0]
    assert fitted_temperature(scores, right) == pytest.approx(temperature, rel=0.05)


def test_temperature_is_fitted_on_what_was_not_drawn():
    """Item 0 was drawn and would call for a sharp temperature, items 1 to 4 for log 3 over .1."""
    scores = torch.tensor([[[9.0, 0], [0.1, 0], [0.1, 0], [0.1, 0], [0.1, 0], [0.1, 0]]])
    right = torch.tensor([0, 0, 0, 0, 1, 1])
    found = held_out_likelihood(scores, right, torch.tensor([[2, 0, 0, 0, 0]]))
    assert found.tolist() == [[pytest.approx(math.log(1 / 4), abs=1e-3)]]


def test_every_seed_has_the_temperature_that_suits_its_scores():
    """Three of four items are right at a margin of .1, or ten times that: both call for log 3."""
    even = torch.tensor([[0.1, 0.0]]).expand(4, -1)
    found = fitted_likelihood(torch.stack([even, 10 * even]), torch.tensor([0, 0, 0, 1]))
    expected = [math.log(3 / 4)] * 3 + [math.log(1 / 4)]
    assert found.tolist() == [pytest.approx(expected, abs=1e-3)] * 2
    certain = fitted_likelihood(even[None], torch.zeros(4, dtype=torch.long))
    assert certain.tolist() == [pytest.approx([0] * 4, abs=1e-6)]


def test_slots_lose_their_mean_over_training_items():
    scores = torch.tensor([[1.0, 5], [3, 7], [4, 4]])
    assert without_slots(scores, 2).tolist() == [[-1, -1], [1, 1], [2, -2]]


def test_random_prompts_have_equal_blocks():
    ids, block = random_prompt(3, 4)
    assert ids.shape == (1, 20)
    assert block[0].bincount().tolist() == [4] * 5
