"""The retrieval set of nouns and definitions: one right answer each, sides apart, siblings that are wrong."""

import pytest

from reattend.data.retrieval import word_glosses
from reattend.data.wordnet import nouns


@pytest.fixture(scope="module")
def sides():
    return {side: word_glosses(side) for side in ("train", "validation", "test")}


def test_every_query_has_one_right_document(sides):
    everything = [d for found in sides.values() for d in found.documents]
    asked = [q for found in sides.values() for q in found.queries]
    assert len(set(everything)) == len(everything)
    assert len(set(asked)) == len(asked)
    senses = {}
    for synset in nouns().synsets.values():
        for word in synset.words:
            senses.setdefault(word.lower(), []).append(synset.definition)
    for found in sides.values():
        for query, document in list(zip(found.queries, found.documents, strict=True))[::50]:
            assert senses[query] == [document]


def test_siblings_answer_no_query_and_lie_below_the_same_sense(sides):
    answers = {d for found in sides.values() for d in found.documents}
    known, number = nouns(), {}
    for n, synset in known.synsets.items():
        number.setdefault(synset.definition, []).append(n)
    some = 0
    for found in sides.values():
        for document, siblings in list(zip(found.documents, found.siblings, strict=True))[::50]:
            assert not answers & set(siblings)
            parents = set(known[number[document][0]].hypernyms)
            for sibling in siblings:
                assert any(parents & set(known[n].hypernyms) for n in number[sibling])
            some += bool(siblings)
    assert some > 100


def test_fewer_are_the_first_and_the_length_is_bounded(sides):
    few = word_glosses("test", 30)
    assert few.queries == sides["test"].queries[:30]
    assert len(few) == 30
    lengths = [len(d.split()) for d in word_glosses("test", longest=9).documents]
    assert min(lengths) == 3
    assert max(lengths) == 9


def test_an_unknown_side_is_refused():
    with pytest.raises(ValueError, match="train, validation or test"):
        word_glosses("dev")
