"""Candidate lists: the right document is a verse's other wording, and sides share no stretch."""

import pytest
import torch
from torch.nn import functional as F

from reattend.data.bible import aligned_verses
from reattend.data.images import split_of
from reattend.data.verse_lists import STRETCH, NestedLists, nested_lists, verse_lists


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


def encode(texts):
    """Unit vectors of letters' frequencies."""
    counts = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
    return F.normalize(torch.tensor(counts).double(), dim=-1)


def test_lists_are_nested_by_hand():
    lists = NestedLists("q", "right", ("a", "b", "c"), (2, 3, 4), (1, 0, 2))
    assert lists.at(2).documents == ("a", "right")
    assert lists.at(3).documents == ("right", "a", "b")
    assert lists.at(4).documents == ("b", "a", "right", "c")
    assert [lists.at(n).right for n in (2, 3, 4)] == [1, 0, 2]


@pytest.fixture(scope="module")
def nested():
    return nested_lists(60, (3, 5, 20), "validation", 1, encode, words=6, pool=150)


def test_growing_lists_hold_the_shorter_ones(nested):
    lists, _ = nested
    assert len({item.query for item in lists}) == 60
    for item in lists:
        sets = [set(item.at(n).documents) for n in (3, 5, 20)]
        assert [len(s) for s in sets] == [3, 5, 20]
        assert sets[0] < sets[1] < sets[2]
        for n in (3, 5, 20):
            held = item.at(n)
            assert held.documents[held.right] == item.right
            assert all(len(text.split()) == 6 for text in (held.query, *held.documents))
    counts = torch.tensor([item.places for item in lists])
    assert 8 <= (counts[:, 0] == 0).sum() <= 32
    assert counts[:, 2].unique().numel() > 12


def test_right_documents_are_the_queries_other_wording(nested):
    """And of no other verse, on whichever side."""
    beginnings = [[" ".join(t.split()[:6]) for t in verse] for verse in aligned_verses()]
    archaic, modern = map(list, zip(*beginnings, strict=True))
    for item in nested[0]:
        assert archaic.count(item.right) == modern.count(item.query) == 1
        i = archaic.index(item.right)
        assert modern[i] == item.query
        assert split_of(f"stretch {i // STRETCH}") == "validation"


def test_wrong_documents_are_the_nearest_in_random_order(nested):
    """Of every text that stands in a list, none left out is nearer to the right one than one taken."""
    lists, cosines = nested
    texts = sorted({text for item in lists for text in (item.right, *item.others)})
    vectors = encode(texts)
    for item, found in zip(lists, cosines, strict=True):
        near = dict(zip(texts, (vectors @ encode([item.right])[0]).tolist(), strict=True))
        taken = [near[text] for text in item.others]
        left = set(texts) - {item.right, *item.others}
        assert min(taken) >= max(near[text] for text in left) - 1e-12
        expected = encode([item.right, *item.others]) @ encode([item.query])[0]
        torch.testing.assert_close(found, expected)
    ordered = [sorted(row, reverse=True) == row for row in cosines[:, 1:].tolist()]
    assert not any(ordered)


def test_nested_lists_have_seeds_and_limits(nested):
    assert nested_lists(60, (3, 5, 20), "validation", 1, encode, pool=150)[0] == nested[0]
    assert nested_lists(60, (3, 5, 20), "validation", 2, encode, pool=150)[0] != nested[0]
    with pytest.raises(ValueError, match="the validation side has 30 such texts, too few"):
        nested_lists(40, (3, 5), "validation", 1, encode, pool=30)
