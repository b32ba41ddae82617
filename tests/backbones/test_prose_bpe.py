"""The tokenizer of the models trained from scratch."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from reattend.backbones.trained.prose_bpe import VOCABULARY, held_out_split, load
from reattend.data.word_tokens import END, SPECIAL, document_rows, token_stream


def test_it_gives_every_text_back():
    tokenizer = load()
    text = "A £5 note, naïvely – 日本 – \n\tkept.  "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == VOCABULARY


def test_it_compresses_held_out_prose():
    tokenizer = load()
    train, held_out = held_out_split()
    assert not set(train) & set(held_out)
    assert (len(train), len(held_out)) == (1958, 218)
    text = held_out[0]
    assert len(text) / len(tokenizer.encode(text)) > 2.5


def test_streams_and_rows_are_cut_from_it():
    tokenizer = load()
    texts = held_out_split()[1][:3]
    stream = token_stream(texts, tokenizer)
    assert (stream == END).sum() == 3
    assert stream[-1] == END
    assert document_rows(texts, tokenizer, 20).shape == (3, 20)


def test_fewer_entries_give_the_tokenizer_trained_to_so_many():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(held_out_split()[0], trainer)
    short, text = load(300), held_out_split()[1][0]
    assert len(short) == 300
    assert short.encode(text).tolist() == tokenizer.encode(text).ids
    assert short.decode(short.encode(text)) == text


@pytest.mark.parametrize("entries", [257, VOCABULARY + 1])
def test_a_size_that_was_not_trained_is_refused(entries):
    with pytest.raises(ValueError, match=f"{entries} entries; it can have 258 to {VOCABULARY}"):
        load(entries)
