"""A small decoder by mask and pooling, for the study of KaLM-Embedding.

A Llama of two layers learns dictionary entries as a causal language model, once. From there it is trained as
an encoder of nouns and their definitions (`reattend.data.retrieval.word_glosses`), with its mask or without, read
by the mean or at the last token, several seeds each.

File: `decoders.safetensors`, what each reading says of the nouns that were not trained on; see `load`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from reattend.backbones.pretrained import minilm
from reattend.backbones.store import backbone_path
from reattend.backbones.trained.kalm_heads import BATCH, LENGTH, SIDES, TEMPERATURE, piece_means
from reattend.data.retrieval import word_glosses
from reattend.text_matching.kalm_embedding import embed
from reattend.training.contrastive import answer_log_probability, cosine_logits
from reattend.training.loop import TrainingLog, TrainingPlan, train
from reattend.trunks.decoders import decoder_states
from reattend.trunks.encoders import Tokens, length_batches, outputs, tokenise

LANGUAGE_RATE = 2e-3
WIDTH, LAYERS = 128, 2


@dataclass(frozen=True)
class Reading:
    """How a decoder is read: with its causal mask or without, by "mean" or "last"; and its rate."""

    causal: bool
    pooling: Literal["mean", "last"]
    rate: float


COMPARED = ("free mask, mean", "causal mask, mean")
"""Readings that claims are about; of the others one seed is trained, for the table."""
READINGS = {
    "free mask, mean": Reading(False, "mean", 3e-3),
    "causal mask, mean": Reading(True, "mean", 3e-3),
    "free mask, last token": Reading(False, "last", 1e-3),
    "causal mask, last token": Reading(True, "last", 1e-3),
}


class SmallDecoder(nn.Module):
    """A Llama of two layers above fixed input vectors, with a head that maps states back to them.

    Since the head is a linear map of its own, states need not give up the word that they stand at.
    """

    def __init__(self, table: Float[Tensor, "pieces narrow"]) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=len(table),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        self.body = LlamaModel(config)
        self.body.embed_tokens = nn.Embedding.from_pretrained(table, freeze=True)
        self.head = nn.Linear(WIDTH, WIDTH)


def narrow_table(table: Float[Tensor, "pieces wide"]) -> Float[Tensor, "pieces narrow"]:
    """MiniLM's input vectors on their principal axes, scaled to a standard deviation of .5."""
    axes = torch.linalg.svd(table - table.mean(0), full_matrices=False).Vh[:WIDTH]
    narrow = table @ axes.T
    return 0.5 * narrow / narrow.std()


def language_loss(decoder: SmallDecoder, tokens: Tokens) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next piece, among the pieces of the batch.

    The normaliser over the whole vocabulary would cost ten times the decoder.
    """
    states = decoder_states(decoder.body, tokens.ids, tokens.mask, causal=True)
    present, places = tokens.ids.unique(return_inverse=True)
    real = tokens.mask[:, 1:]
    answers = decoder.body.embed_tokens.weight[present]
    return F.cross_entropy(decoder.head(states[:, :-1][real]) @ answers.T, places[:, 1:][real])


def fit_language(decoder: SmallDecoder, entries: Tokens, steps: int) -> TrainingLog:
    """Train a decoder as a causal language model of dictionary entries."""
    rows = length_batches(entries.mask.sum(1), BATCH, 0)
    plan = TrainingPlan(steps, LANGUAGE_RATE, 0.01, warmup=max(1, steps // 10))
    return train(decoder, (entries[some] for some in rows), language_loss, plan)


def fit_reading(
    start: LlamaModel,
    queries: Tokens,
    documents: Tokens,
    reading: Reading,
    steps: int,
    seed: int,
    drawn: int,
) -> tuple[LlamaModel, TrainingLog]:
    """A copy of `start` trained as an encoder by InfoNCE, on `drawn` pairs that depend on the seed.

    Documents of similar length share a batch, which saves padding.
    """
    order = torch.randperm(len(queries), generator=Generator().manual_seed(seed))[:drawn]

    def loss(model: LlamaModel, rows: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        sides = (read(model, side[order[rows]], reading) for side in (queries, documents))
        return -answer_log_probability(cosine_logits(*sides, TEMPERATURE)).mean()

    plan = TrainingPlan(steps, reading.rate, 0.01, warmup=max(1, steps // 10))
    rows = length_batches(documents.mask[order].sum(1), BATCH, seed)
    model = copy.deepcopy(start)
    return model, train(model, rows, loss, plan)


def read(model: LlamaModel, tokens: Tokens, reading: Reading) -> Float[Tensor, "texts width"]:
    """Vectors of texts by one reading."""
    return embed(model, tokens.ids, tokens.mask, causal=reading.causal, pooling=reading.pooling)


# The build ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How much is trained in one profile.

    Attributes:
        entries: that the decoder learns as a language model.
        drawn: of them, pairs that one seed of a reading is trained on.
        asked: queries to validate, and as many to test.
        language_steps, steps: of the language model, and of a reading.
        seeds: of each compared reading.
    """

    entries: int
    drawn: int
    asked: int
    language_steps: int
    steps: int
    seeds: int


SETTINGS = {
    "smoke": Setting(90, 70, 40, 3, 2, 3),
    "cpu": Setting(17_000, 12_000, 1_000, 300, 200, 7),
    "gpu": Setting(17_000, 12_000, 2_000, 4_000, 2_000, 16),
}
INPUTS = "mean of its input vectors"  # the reading without any layer


@dataclass(frozen=True)
class Decoders:
    """What was trained in a profile.

    Attributes:
        language_losses: of every step of the language model.
        read: by side ("validation", "test"), reading and seed, the vectors of queries and documents.
            "start: …" is a reading before its training, `INPUTS` the decoder's input vectors; of both there is
            seed 0 alone.
    """

    language_losses: Float[Tensor, " steps"]
    read: dict[tuple[str, str, int], tuple[Tensor, Tensor]]


def build(target: Path, profile: str) -> None:
    """Train the language model and all readings, and write what they say into the directory `target`."""
    setting = SETTINGS[profile]
    counts = dict(zip(SIDES, (setting.entries, setting.asked, setting.asked), strict=True))
    sets = {side: word_glosses(side, count) for side, count in counts.items()}
    tokenizer, model = minilm.load()
    table = narrow_table(model.embeddings.word_embeddings.weight.detach())
    texts = {side: (list(found.queries), list(found.documents)) for side, found in sets.items()}
    tokens = {
        side: [tokenise(tokenizer, part, length=LENGTH) for part in parts]
        for side, parts in texts.items()
    }
    entries = [f"{word}: {gloss}" for word, gloss in zip(*texts["train"], strict=True)]
    torch.manual_seed(0)
    decoder = SmallDecoder(table)
    log = fit_language(decoder, tokenise(tokenizer, entries, length=LENGTH), setting.language_steps)
    print(f"language model: loss {sum(log.losses[-20:]) / 20:.3f}", flush=True)
    found = {"language losses": torch.tensor(log.losses)}

    def keep(name: str, side: str, vectors: list[Tensor]) -> None:
        for part, said in zip(("queries", "documents"), vectors, strict=True):
            found[f"{side}/{name}/{part}"] = said.contiguous()

    def keep_reading(name: str, model: LlamaModel, reading: Reading) -> None:
        for side in SIDES[1:]:
            keep(name, side, [outputs(lambda t: read(model, t, reading), t) for t in tokens[side]])

    for side in SIDES[1:]:
        keep(f"{INPUTS}/0", side, [piece_means(tokenizer, table, part) for part in texts[side]])
    for name, reading in READINGS.items():
        keep_reading(f"start: {name}/0", decoder.body, reading)
        seeds = setting.seeds if name in COMPARED else 1
        for seed in range(seeds):
            trained, _ = fit_reading(
                decoder.body, *tokens["train"], reading, setting.steps, seed, setting.drawn
            )
            keep_reading(f"{name}/{seed}", trained, reading)
        print(f"{name}: {seeds} seeds", flush=True)
    save_file(found, target / "decoders.safetensors")


def load(profile: str = "cpu") -> Decoders:
    """What was trained in a profile; builds it first when it is missing."""
    found = load_file(backbone_path("kalm_decoders", profile) / "decoders.safetensors")
    losses = found.pop("language losses")
    read = {}
    for key in sorted(key for key in found if key.endswith("/queries")):
        side, name, seed, _ = key.split("/")
        read[side, name, int(seed)] = found[key], found[f"{side}/{name}/{seed}/documents"]
    return Decoders(losses, read)
