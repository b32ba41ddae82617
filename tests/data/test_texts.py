"""Labelled texts: counts, sides that share nothing, word vectors."""

import pytest
import torch

from reattend.data.glove import vectors
from reattend.data.images import SPLITS
from reattend.data.texts import bbc_topics, movie_reviews, newsgroups, sms_spam, trec_questions


@pytest.mark.parametrize(
    ("read", "items", "classes"),
    [
        (movie_reviews, 10_566, 2),
        (trec_questions, 5_381, 6),
        (sms_spam, 4_512, 2),
        (bbc_topics, 2_125, 5),
    ],
)
def test_counts_and_sides(read, items, classes):
    texts = read()
    assert (len(texts), len(texts.classes)) == (items, classes)
    sides = {split: set(texts.of(split)[0]) for split in SPLITS}
    assert sum(map(len, sides.values())) == items
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["validation"]
    assert 0.55 < len(sides["train"]) / items < 0.65
    labels = texts.of("train", 300)[1]
    assert torch.bincount(labels, minlength=classes).min() >= 1  # the first items mix the classes


def test_newsgroups_keep_the_published_test_side():
    texts = newsgroups(["sci.med", "sci.space"])
    assert texts.classes == ("sci.med", "sci.space")
    assert 750 < len(texts.of("test")[0]) < 800
    with pytest.raises(ValueError, match=r"no newsgroup sci\.fi"):
        newsgroups(["sci.fi"])


def test_unknown_side():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        sms_spam().of("dev")


def test_word_vectors():
    table, known = vectors(["king", "queen", "cabbage", "qqqzzz"])
    assert known.tolist() == [True, True, True, False]
    assert not table[3].any()
    king, queen, cabbage = torch.nn.functional.normalize(table[:3])
    assert king @ queen > 0.7 > 0.4 > king @ cabbage
