"""Passages in two wordings, on verses made up here."""

import pytest

from reattend.data import bible


@pytest.fixture
def verses(monkeypatch):
    pairs = (("a b c", "d e"), ("f g", "h i j"), ("k", "l"), ("m n o p q", "r s t u v"))
    monkeypatch.setattr(bible, "aligned_verses", lambda: pairs)


def test_every_verse_comes_twice_in_passages_of_the_length(verses):
    assert bible.twice_told(10) == ["a b c d e f g h i j", "k l m n o p q r s t u v"]
    assert bible.twice_told(6) == ["a b c d e f g h i j", "k l m n o p q r s t u v"]
    assert bible.twice_told(5) == ["a b c d e", "f g h i j", "k l m n o p q r s t u v"]


def test_a_passage_that_stays_short_is_left_out(verses):
    assert bible.twice_told(11) == ["a b c d e f g h i j k l"]
