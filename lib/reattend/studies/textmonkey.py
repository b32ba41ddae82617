"""What is asked of TextMonkey: reading words that a border cuts, shorter sequences, redundancy of real features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Generator, Tensor
from torch.nn import functional as F
from transformers import Dinov2Model

from reattend.backbones.pretrained.vit import hidden_states
from reattend.backbones.trained.textmonkey import (
    CROPS,
    LinearReader,
    PageModels,
    PageNetwork,
    Setting,
    ShortReader,
)
from reattend.data.word_pages import COLUMNS, LETTERS, ROWS, WordPages
from reattend.multimodal_llm.textmonkey import CropGrid, partition, redundant_tokens

TEST_SEED = 99
LAYER = 8
"""Of the ViT-S/14; its layers 8 to 10 have the best features."""
SIDE = 168
"""Pixels of a side that the ViT reads at once, 144 tokens."""

# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Answers about the letters of test pages.

    Attributes:
        nll: of the letter at each place, in nats.
        answers: the likeliest letter.
    """

    pages: WordPages
    nll: Float[Tensor, "pages places"]
    answers: Int[Tensor, "pages places"]

    def scores(self) -> dict[str, float]:
        """Mean negative log-likelihood in nats and accuracy in %: within a crop, cut by a border, of all letters."""
        right = 100 * (self.answers == self.pages.letters)
        kinds = self.pages.kinds
        nll = {f"{kind} NLL": self.nll[at].double().mean().item() for kind, at in kinds.items()}
        return nll | {f"{kind} %": right[at].double().mean().item() for kind, at in kinds.items()}

    def read_words(self) -> Iterator[list[str]]:
        """The words of every page as they were read, wrong letters as capitals."""
        for words, answers, truth in zip(
            self.pages.words, self.answers.tolist(), self.pages.letters.tolist(), strict=True
        ):
            letters = iter(
                LETTERS[found] if found == asked else LETTERS[found].upper()
                for found, asked in zip(answers, truth, strict=True)
            )
            yield ["".join(islice(letters, len(word))) for word in words]


def test_pages(setting: Setting, count: int) -> WordPages:
    """Pages of words that no training has seen, the same for every arm and seed."""
    return setting.draw(count, Generator().manual_seed(TEST_SEED), "test")


def _reading(scores: Float[Tensor, "pages places letters"], pages: WordPages) -> Reading:
    scores = scores.cpu()
    nll = F.cross_entropy(scores.mT, pages.letters, reduction="none")
    return Reading(pages, nll, scores.argmax(-1))


@torch.no_grad()
def tokens_of(network: PageNetwork, pages: WordPages) -> Float[Tensor, "pages crops tokens dim"]:
    """What readers see of pages: the network's tokens."""
    device = network.head.weight.device
    return torch.cat([network.tokens(part.to(device)).cpu() for part in pages.pixels.split(100)])


@torch.no_grad()
def read_tokens(
    network: PageNetwork, tokens: Float[Tensor, "pages crops tokens dim"], pages: WordPages
) -> Reading:
    """The weakest reader: the network's linear head on the one token in the middle of each letter."""
    scores = network.scores(tokens.to(network.head.weight.device)).cpu()
    places = pages.tokens[..., None].expand(-1, -1, scores.shape[-1])
    return _reading(scores.flatten(1, 2).gather(1, places), pages)


@torch.no_grad()
def read_places(
    reader: ShortReader, tokens: Float[Tensor, "pages crops tokens dim"], pages: WordPages
) -> Reading:
    """The stronger reader: cross-attention to the tokens of all crops, or to those that are kept of them."""
    device = reader.reader.head.weight.device
    parts = zip(tokens.flatten(1, 2).split(100), pages.tokens.split(100), strict=True)
    found = [reader(some.to(device), asked.to(device)).cpu() for some, asked in parts]
    return _reading(torch.cat(found), pages)


@torch.no_grad()
def read_linearly(reader: LinearReader, pages: WordPages) -> Reading:
    """The linear reader of pixels."""
    return _reading(reader(pages.to(reader.read.weight.device)), pages)


@dataclass(frozen=True)
class AllRead:
    """What the trained networks and readers make of test pages, lists over seeds.

    Attributes:
        tokens, weak: of every network; "linear on pixels" has no tokens.
        strong: by arm whose tokens are read, of every seed the readings by the reader's name.
    """

    tokens: dict[str, list[Float[Tensor, "pages crops tokens dim"]]]
    weak: dict[str, list[Reading]]
    strong: dict[str, list[dict[str, Reading]]]


def read_all(trained: PageModels, pages: WordPages) -> AllRead:
    """Every network and reader on the same pages; a network's tokens are computed once for all its readers."""
    tokens = {arm: [tokens_of(n, pages) for n in found] for arm, found in trained.networks.items()}
    weak = {
        arm: [read_tokens(*pair, pages) for pair in zip(networks, tokens[arm], strict=True)]
        for arm, networks in trained.networks.items()
    }
    weak["linear on pixels"] = [read_linearly(reader, pages) for reader in trained.linear]
    strong = {
        arm: [
            {name: read_places(reader, seen, pages) for name, reader in readers.items()}
            for readers, seen in zip(seeds, tokens[arm], strict=True)
        ]
        for arm, seeds in trained.readers.items()
    }
    return AllRead(tokens, weak, strong)


def score_table(readings: Mapping[str, Sequence[Reading]]) -> pd.DataFrame:
    """A row for every arm and seed: arm, seed and `Reading.scores`."""
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed} | reading.scores()
            for arm, seeds in readings.items()
            for seed, reading in enumerate(seeds)
        ]
    )


def by_seed(scores: pd.DataFrame, arm: str, column: str) -> Float[np.ndarray, " seeds"]:
    """One column of an arm's rows, in the order of the seeds."""
    return scores[scores.arm == arm].sort_values("seed")[column].to_numpy()


def shorter_table(scores: pd.DataFrame, kept: Mapping[str, float]) -> pd.DataFrame:
    """Means over seeds for every reader of a `score_table`: how many tokens, how chosen, NLL, accuracy.

    Args:
        kept: per cent of the letters' tokens that readers keep, for some by name.
    """
    columns = ["all NLL", "inner NLL", "border NLL", "all %"]
    means = scores.groupby("arm", sort=False)[columns].mean()
    names = means.index.to_series()
    numbered = names.str.match(r"\d")
    parts = names.str.split(" ", n=1)
    means.insert(0, "tokens", parts.str[0].where(numbered, ROWS * COLUMNS).astype(int))
    means.insert(1, "choice", parts.str[1].where(numbered, names))
    means["kept of the letters' tokens, %"] = pd.Series(kept)
    return means.reset_index(drop=True)


def early_loss(losses: Float[Tensor, "seeds steps"]) -> Float[np.ndarray, " seeds"]:
    """Mean training loss after the first step and within the first tenth: steps 2 to a tenth of all."""
    return losses[:, 1 : max(2, losses.shape[1] // 10)].double().mean(1).numpy()


@torch.no_grad()
def kept_places(
    reader: ShortReader, tokens: Float[Tensor, "pages crops tokens dim"]
) -> Bool[Tensor, "pages crops tokens"]:
    """Which tokens of each page a reader keeps; random ones are those of its next reading of these pages."""
    flat = tokens.flatten(1, 2)
    found = torch.zeros(flat.shape[:2], dtype=torch.bool)
    state = reader.generator.get_state()
    found.scatter_(1, reader.kept(flat.to(reader.reader.head.weight.device)).cpu(), True)
    reader.generator.set_state(state)
    return found.unflatten(1, tokens.shape[1:3])


def kept_of_letters(
    reader: ShortReader, tokens: Float[Tensor, "pages crops tokens dim"], pages: WordPages
) -> float:
    """Per cent of the tokens in the middles of letters that a reader keeps."""
    kept = CROPS.stitch(kept_places(reader, tokens)[..., None].double())
    there = kept.flatten(1).gather(1, pages.tokens)[pages.present]
    return 100 * there.mean().item()


# Redundancy ---------------------------------------------------------------------------------------


def first_layers(model: Dinov2Model) -> Dinov2Model:
    """The model without the layers behind `LAYER`, which nobody asks for; changed in place."""
    model.encoder.layer = model.encoder.layer[:LAYER]
    return model


def page_tokens(
    model: Dinov2Model, pages: UInt8[Tensor, "pages places side side"], crops: int, size: int = SIDE
) -> Float[Tensor, "pages tokens dim"]:
    """Tokens of pages that are cut into crops x crops pieces, each read alone at `size` pixels."""
    grid = CropGrid(crops, crops, pages.shape[-1] // crops, pages.shape[-1] // crops)
    cut = partition(pages.movedim(1, -1).float(), (grid.height, grid.width))
    cut = cut.unflatten(2, (grid.height, grid.width)).movedim(-1, 2).flatten(0, 1).byte()
    states = (hidden_states(model, part.to(model.device), [LAYER], size) for part in cut.split(8))
    return (
        torch.cat([found[0, :, 1:].cpu() for found in states])
        .unflatten(0, (len(pages), -1))
        .flatten(1, 2)
    )


def largest_similarity(tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n"]:
    """Largest cosine of every token to another."""
    unit = F.normalize(tokens.double(), dim=-1)
    cosine = unit @ unit.mT
    return cosine.masked_fill(torch.eye(cosine.shape[-1], dtype=torch.bool), -1.0).amax(-1)


def page_shares(
    tokens: Float[Tensor, "pages n dim"], threshold: float, candidates: int | None = None
) -> Float[np.ndarray, " pages"]:
    """Per cent of redundant tokens of every page."""
    return 100 * redundant_tokens(tokens, threshold, candidates).mean(1).numpy()
