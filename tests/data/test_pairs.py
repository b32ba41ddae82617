"""Pair sets: what they hold, that sides share nothing, and that targets are what the rule says."""

import itertools
import random

import pytest
import torch

from reattend.data.bible import aligned_verses, plain
from reattend.data.pairs import (
    RELATIONS,
    dialogue_replies,
    exchange_words,
    gloss_relations,
    gloss_retrieval,
    gloss_similarity,
    lee_documents,
    report_impressions,
    verse_pairs,
    verse_swaps,
    word_similarities,
)
from reattend.data.wordnet import nouns


def overlap(first, second):
    a, b = set(first.lower().split()), set(second.lower().split())
    return len(a & b) / max(1, len(a | b))


def test_verses_are_aligned_in_every_book():
    verses = aligned_verses()
    assert len(verses) == 30_664
    assert verses[0][0].startswith("In the beginning God created")
    scores = torch.tensor([overlap(*pair) for pair in verses])
    shifted = torch.tensor([overlap(a[0], b[1]) for a, b in itertools.pairwise(verses)])
    assert scores.mean() > 0.5 > 0.15 > shifted.mean()
    # A book that is one verse out of step would sink a stretch of two hundred verses.
    assert scores.unfold(0, 200, 200).mean(1).min() > 0.35


def test_markup_is_taken_out():
    raw = '<title>Of David</title>¶ <w lemma="x">And</w> he<note n="1">or, <i>she</i></note> went'
    assert plain(raw) == "And he went"


def test_verse_pairs_are_balanced_and_their_neighbourhoods_apart():
    assert verse_pairs().targets.mean() == pytest.approx(0.5, abs=0.002)
    pairs = verse_pairs(longest=25)
    assert 0.4 < pairs.targets.mean() < 0.6
    same = set(aligned_verses())
    first, second, targets = pairs.of("test", 200)
    for a, b, target in zip(first, second, targets, strict=True):
        assert ((a, b) in same) == bool(target)
        assert max(len(a.split()), len(b.split())) <= 25


@pytest.mark.parametrize(
    "make",
    [verse_pairs, verse_swaps, gloss_relations, gloss_similarity, report_impressions],
)
def test_no_text_lies_on_two_sides(make):
    pairs = make()
    sides = {}
    for a, b, side in zip(pairs.first, pairs.second, pairs.splits, strict=True):
        for text in (a, b):
            sides.setdefault(text, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())


def test_relations_are_balanced_on_every_side():
    pairs = gloss_relations(6_000, 12)
    for side, least in (("train", 3_000), ("validation", 300), ("test", 300)):
        shares = torch.bincount(pairs.of(side)[2].long()) / len(pairs.of(side)[2])
        assert len(pairs.of(side)[2]) > least
        assert (shares - 1 / 3).abs().max() < 0.06


def test_swapped_words_keep_the_bag_of_words():
    text = "Moses stretched forth his hand over heaven, and there was darkness"
    changed = exchange_words(text, random.Random(0))
    assert changed != text
    assert sorted(changed.replace(",", "").split()) == sorted(text.replace(",", "").split())
    assert exchange_words("he was", random.Random(0)) is None
    pairs = verse_swaps(longest=20)
    assert 0.45 < pairs.targets.mean() < 0.55


def test_gloss_relations_are_those_of_the_tree():
    pairs = gloss_relations(600)
    tree = nouns()
    senses = {}
    for number, synset in tree.synsets.items():
        senses.setdefault(synset.definition, []).append(number)
    assert torch.bincount(pairs.targets.long()).min() > 190
    for a, b, target in list(zip(pairs.first, pairs.second, pairs.targets, strict=True))[:90]:
        relation = RELATIONS[int(target)]
        parents = {p for n in senses[a] for p in tree[n].hypernyms}
        if relation == "hypernym":
            assert parents & set(senses[b])
        if relation == "sibling":
            assert parents & {p for n in senses[b] for p in tree[n].hypernyms}


def test_similarities_span_the_range():
    targets = gloss_similarity(900).targets
    assert 0 <= targets.min() < 0.5 < targets.max() <= 1


def test_wu_palmer_of_known_senses():
    tree = nouns()
    assert len(tree) == 82_115
    dog, cat, car = (
        next(n for n, s in tree.synsets.items() if word in s.words)
        for word in ("dog", "cat", "car")
    )
    assert tree.wu_palmer(dog, dog) == 1
    assert tree.wu_palmer(dog, cat) == tree.wu_palmer(cat, dog) == pytest.approx(6 / 7)
    assert tree.wu_palmer(dog, car) < 0.5
    assert tree[dog].definition.startswith("a member of the genus Canis")


def test_reports_and_their_near_misses():
    pairs = report_impressions(longest=40)
    assert len(pairs) > 1200
    assert 0.45 < pairs.targets.mean() < 0.55


def test_human_judgements():
    lee = lee_documents()
    assert (len(lee), set(lee.splits)) == (1225, {"test"})
    assert 0.1 < lee.targets.min() < lee.targets.max() <= 1
    simlex, wordsim = word_similarities("simlex"), word_similarities("wordsim")
    assert (len(simlex), len(wordsim)) == (999, 353)
    assert (simlex.first[0], simlex.second[0]) == ("old", "new")
    assert simlex.targets[0] == pytest.approx(1.58)
    with pytest.raises(ValueError, match="unknown list"):
        word_similarities("men")


def test_retrieval_sets():
    glosses = gloss_retrieval(500)
    assert len(glosses) == 500
    assert glosses.kind == "retrieval"
    replies = dialogue_replies(longest=8)
    assert len(replies) > 10_000
    with pytest.raises(ValueError, match="unknown split"):
        replies.of("dev")
