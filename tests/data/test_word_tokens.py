"""Word tokens, windows, and anonymising rare words."""

import itertools

import pytest
import torch

from reattend.data.word_tokens import (
    END,
    UNKNOWN,
    Vocabulary,
    anonymise,
    document_rows,
    random_windows,
    token_stream,
    words,
)

TEXTS = ["The cat saw the dog.", "The dog, the cat and a bird: 2 legs!"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_words_are_lower_case_and_keep_punctuation():
    assert words("Mr. O'Neil's £5m") == ["mr", ".", "o", "'", "neil", "'", "s", "£", "5m"]


def test_the_most_frequent_words_come_first():
    vocabulary = Vocabulary(TEXTS)
    assert vocabulary.entries[2:5] == ["the", "cat", "dog"]
    assert vocabulary.decode(vocabulary.encode(TEXTS[0])) == words(TEXTS[0])
    assert vocabulary.encode("the zebra").tolist() == [2, UNKNOWN]


def test_the_stream_ends_every_text():
    vocabulary = Vocabulary(TEXTS)
    stream = token_stream(TEXTS, vocabulary)
    assert (stream == END).nonzero().squeeze(1).tolist() == [6, len(stream) - 1]


def test_windows_are_pieces_of_the_stream():
    stream = torch.arange(20)
    for rows in itertools.islice(random_windows(stream, 50, 7, generator()), 3):
        assert (rows.diff(dim=1) == 1).all()
        assert rows.min() == 0
        assert rows.max() == 19
    with pytest.raises(ValueError, match="no window of 21"):
        next(random_windows(stream, 1, 21, generator()))


def test_document_rows_start_each_long_enough_text():
    vocabulary = Vocabulary(TEXTS)
    rows = document_rows(TEXTS, vocabulary, 8)
    assert vocabulary.decode(rows[0]) == words(TEXTS[1])[:8]
    assert len(rows) == 1
    with pytest.raises(ValueError, match="no text has 50"):
        document_rows(TEXTS, vocabulary, 50)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_symbols_keep_identity_within_a_row_and_lose_it_between_rows(seed):
    rows = torch.randint(40, (30, 25), generator=generator(seed))
    out = anonymise(rows, 10, 30, generator(seed + 1))
    common = rows < 10
    assert torch.equal(out[common], rows[common])
    assert ((out[~common] >= 10) & (out[~common] < 40)).all()
    same = rows[:, :, None] == rows[:, None, :]
    assert torch.equal(out[:, :, None] == out[:, None, :], same)
    assert len(out[rows == 20].unique()) > 5
    assert torch.equal(out, anonymise(rows, 10, 30, generator(seed + 1)))


def test_words_beyond_the_symbols_are_unknown():
    rows = torch.arange(10, 30)[None]
    out = anonymise(rows, 10, 5, generator())
    assert (out != UNKNOWN).sum() == 5
    assert len(out[out != UNKNOWN].unique()) == 5
