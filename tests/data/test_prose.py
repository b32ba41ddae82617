"""Documents are split whole, and a repeated document is on one side only."""

from reattend.data.prose import split_documents


def test_a_split_is_stable_and_complete():
    texts = [f"text {i}" for i in range(40)]
    train, held_out = split_documents(texts, 0.25)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted(train + held_out) == sorted(texts)
    assert split_documents(texts, 0.25) == (train, held_out)
    assert split_documents(texts, 0.25, seed=1) != (train, held_out)


def test_a_repeated_document_is_on_one_side():
    texts = [f"text {i % 20}" for i in range(40)]
    train, held_out = split_documents(texts, 0.5)
    assert not set(train) & set(held_out)
    assert (len(train), len(held_out)) == (10, 10)
