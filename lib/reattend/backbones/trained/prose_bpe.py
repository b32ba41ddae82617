"""Byte-level BPE of real prose: the tokenizer of the language models trained from scratch.

Trained on the training side of 2,127 different news articles and 49 essays; no model that uses it sees the
held-out documents, and neither did the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from reattend.backbones.store import backbone_path
from reattend.data.prose import documents, split_documents
from reattend.data.word_tokens import SPECIAL

VOCABULARY = 2048
SOURCES = ("bbc_news", "needles")
HELD_OUT = 0.1  # share of the documents
FILE = "tokenizer.json"


def held_out_split() -> tuple[list[str], list[str]]:
    """(training, held-out) documents: a tenth of the articles and of the essays is held out."""
    splits = [split_documents(documents(source), HELD_OUT) for source in SOURCES]
    return [t for train, _ in splits for t in train], [t for _, held in splits for t in held]


def build(target: Path, profile: str) -> None:
    """Train the tokenizer (the same for every profile) and write it into `target`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(held_out_split()[0], trainer)
    tokenizer.save(str(target / FILE))


def first_merges(stored: dict, entries: int) -> dict:
    """A stored BPE tokenizer that stops at `entries`: merges are in the order in which they were found.

    Raises:
        ValueError: for more entries than were trained, or fewer than special tokens and bytes take.
    """
    model = stored["model"]
    least, most = len(SPECIAL) + 256, len(model["vocab"])
    if not least <= entries <= most:
        raise ValueError(f"a tokenizer of {entries} entries; it can have {least} to {most}")
    kept = {entry: number for entry, number in model["vocab"].items() if number < entries}
    merges = [pair for pair in model["merges"] if "".join(pair) in kept]
    return stored | {"model": model | {"vocab": kept, "merges": merges}}


class ProseTokenizer:
    """Token 1 closes a document; every text can be encoded, and decoding gives it back."""

    def __init__(self, path: Path, entries: int = VOCABULARY) -> None:
        stored = json.loads(path.read_text(encoding="utf8"))
        self._tokenizer = Tokenizer.from_str(json.dumps(first_merges(stored, entries)))

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> Int[Tensor, " tokens"]:
        """Tokens of a text, without the closing one."""
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.long)

    def decode(self, tokens: Int[Tensor, " tokens"]) -> str:
        """The text of some tokens; special tokens are left out."""
        return self._tokenizer.decode(tokens.tolist())


def load(entries: int = VOCABULARY) -> ProseTokenizer:
    """The tokenizer, built on first use; fewer `entries` give the one that was trained to so many."""
    return ProseTokenizer(backbone_path("prose_bpe") / FILE, entries)
