"""The tokenizer of the models trained from scratch."""

from reattend.backbones.trained.prose_bpe import VOCABULARY, held_out_split, load
from reattend.data.word_tokens import END, document_rows, token_stream


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
