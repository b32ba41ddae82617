"""Candidate lists: the right document is a verse's other wording, and sides share no stretch."""

import pytest

from reattend.data.bible import aligned_verses
from reattend.data.images import split_of
from reattend.data.verse_lists import STRETCH, verse_lists


@pytest.fixture(scope="module")
def where():
    """Verse numbers by the first twelve words of each wording."""
    found = {}
    for i, (archaic, modern) in enumerate(aligned_verses()):
        for kind, text in (("old", archaic), ("new", modern)):
            found.setdefault((kind, " ".join(text.split()[:12])), set()).add(i)
    return found


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_lists_are_neighbours_of_the_right_verse(where, split):
    lists = verse_lists(40, 8, split, seed=3)
    assert len({item.query for item in lists}) == 40
    for item in lists:
        assert len(set(item.documents)) == 8
        assert all(len(text.split()) == 12 for text in (item.query, *item.documents))
        of_query = where["new", item.query]
        i = next(iter(of_query & where["old", item.documents[item.right]]))
        for text in item.documents:
            near = [
                j for j in where["old", text] if abs(j - i) <= 30 and j // STRETCH == i // STRETCH
            ]
            assert near
        assert split_of(f"stretch {i // STRETCH}") == split


def test_places_of_the_right_document_are_mixed():
    rights = [item.right for item in verse_lists(200, 4, "train", 0)]
    assert all(30 <= rights.count(place) <= 70 for place in range(4))


def test_seeds_and_impossible_numbers():
    assert verse_lists(5, 4, "train", 0) == verse_lists(5, 4, "train", 0)
    assert verse_lists(5, 4, "train", 0) != verse_lists(5, 4, "train", 1)
    with pytest.raises(ValueError, match="the test side has 0 such lists; 5 are wanted"):
        verse_lists(5, 40, "test", 0)
