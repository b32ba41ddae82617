"""Ranking a few documents for a query: what words alone tell, scores of rankings, latency against their number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Generator, Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from reattend.attention.dense import causal_sdpa
from reattend.data.glove import vectors
from reattend.data.verse_lists import VerseList
from reattend.text_matching.blockrank import block_attention, shared_positions, states_entering
from reattend.timing import device_clock, interleaved_seconds

Encode = Callable[[Sequence[str]], Float[Tensor, "texts width"]]


# Rankers ------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Lower-case words, punctuation left out."""
    return re.findall(r"[a-z]+(?:['’][a-z]+)?", text.lower())


def bm25(
    lists: Sequence[VerseList],
    collection: Sequence[str],
    k1: float = 0.9,
    b: float = 0.4,
) -> Float[Tensor, "lists documents"]:
    """BM25 of each list's documents (Robertson and Zaragoza 2009), in Lucene's form, constants of MS MARCO.

    Sum over the query's words of log(1 + (n - df + .5) / (df + .5)) tf / (tf + k1 (1 - b + b len / mean)).

    Args:
        collection: the texts in which words are counted (n of them, df with the word).
    """
    counted = [Counter(words_of(text)) for text in collection]
    frequency = Counter(word for counts in counted for word in counts)
    mean = np.mean([counts.total() for counts in counted])

    def score(query: list[str], document: str) -> float:
        counts = Counter(words_of(document))
        norm = k1 * (1 - b + b * counts.total() / mean)
        rarity = {
            w: np.log1p((len(counted) - frequency[w] + 0.5) / (frequency[w] + 0.5)) for w in query
        }
        return sum(rarity[w] * counts[w] / (counts[w] + norm) for w in query)

    return torch.tensor([[score(words_of(i.query), d) for d in i.documents] for i in lists])


def glove_mean(texts: Sequence[str]) -> Float[Tensor, "texts 50"]:
    """Unit vectors: mean of the GloVe vectors of a text's known words (zero without any)."""
    words = sorted({word for text in texts for word in words_of(text)})
    table, _ = vectors(words)
    row = {word: i for i, word in enumerate(words)}
    means = torch.stack(
        [table[[row[w] for w in words_of(text)]].sum(0) for text in texts]
    )  # a sum: the length is taken out below
    return F.normalize(means, dim=-1)


def cosines(lists: Sequence[VerseList], encode: Encode) -> Float[Tensor, "lists documents"]:
    """Cosine of each list's query and documents under an encoder of unit vectors."""
    queries = encode([item.query for item in lists])
    documents = encode([text for item in lists for text in item.documents])
    return torch.einsum("iw,idw->id", queries, documents.unflatten(0, (len(lists), -1)))


# Scores of rankings -------------------------------------------------------------------------------


def first_is_right(
    scores: Float[Tensor, "*lead items documents"], right: Int[Tensor, " items"]
) -> Float[Tensor, "*lead items"]:
    """P@1 of each item: 1 if the right document alone scores highest, its share among ties for the first place."""
    best = (scores == scores.amax(-1, keepdim=True)).double()
    chosen = best.gather(-1, right[:, None].expand(*scores.shape[:-1], 1))[..., 0]
    return chosen / best.sum(-1)


def log_likelihood(
    scores: Float[Tensor, "items documents"], right: Int[Tensor, " items"], temperature: float
) -> Float[Tensor, " items"]:
    """log softmax(S / temperature) of the right document, in nats."""
    logits = scores.double() / temperature
    return logits.log_softmax(-1).gather(-1, right[:, None])[:, 0]


def fitted_temperature(
    scores: Float[Tensor, "items documents"], right: Int[Tensor, " items"]
) -> float:
    """The temperature, between 1e-4 and 1e4, at which `log_likelihood` is highest on these items."""

    def cost(log_temperature: float) -> float:
        return -log_likelihood(scores, right, float(np.exp(log_temperature))).mean().item()

    bounds = np.log([1e-4, 1e4])
    grid = np.linspace(*bounds, 40)
    best = grid[np.argmin([cost(x) for x in grid])]
    near = (best - 0.5, best + 0.5)
    return float(np.exp(minimize_scalar(cost, bounds=near, method="bounded").x))


def held_out_likelihood(
    scores: Float[Tensor, "seeds items documents"],
    right: Int[Tensor, " items"],
    drawn: Int[Tensor, "seeds train"],
) -> Float[Tensor, "seeds test"]:
    """`log_likelihood` of the test items, at the temperature that suits the training items left out of a draw.

    Args:
        scores, right: of training items, then test items.
        drawn: how often each training item was drawn for the training of a seed.
    """
    train, rows = drawn.shape[1], []
    for of_seed, count in zip(scores, drawn, strict=True):
        out = (count == 0).nonzero()[:, 0]
        temperature = fitted_temperature(of_seed[out], right[out])
        rows.append(log_likelihood(of_seed[train:], right[train:], temperature))
    return torch.stack(rows)


def fitted_likelihood(
    scores: Float[Tensor, "seeds items documents"], right: Int[Tensor, " items"]
) -> Float[Tensor, "seeds items"]:
    """`log_likelihood` of every item, at the temperature that suits these items best, seed by seed.

    So rankers of any scale, and lists of any length, are compared by the order and the spread of their
    scores. One number fitted to n items gains about .5 / n nats, for every ranker; fitted to others it
    would be zero, and the likelihood without bound, wherever a ranker makes no mistake among those.
    """
    return torch.stack([log_likelihood(s, right, fitted_temperature(s, right)) for s in scores])


def without_slots(
    scores: Float[Tensor, "*lead items documents"], train: int
) -> Float[Tensor, "*lead items documents"]:
    """Scores minus the mean score of each place in the list, over the first `train` items."""
    return scores - scores[..., :train, :].mean(-2, keepdim=True)


# Latency ------------------------------------------------------------------------------------------


def random_prompt(
    documents: int, length: int, seed: int = 0
) -> tuple[Int[Tensor, "1 tokens"], Int[Tensor, "1 tokens"]]:
    """Token ids and block numbers of a prompt of equally long blocks, without padding."""
    generator = Generator().manual_seed(seed)
    ids = torch.randint(100, 4_000, (1, (documents + 2) * length), generator=generator)
    return ids, torch.arange(documents + 2).repeat_interleave(length)[None]


def latencies(
    model: PreTrainedModel,
    numbers: Sequence[int],
    length: int,
    layers: int,
    rounds: int,
    progress: Callable = iter,
) -> dict[str, Float[np.ndarray, "numbers rounds"]]:
    """Seconds in which `layers` layers read a prompt, "dense" and "block by block", for numbers of documents.

    Dense attention is torch's fused causal kernel. All are timed in every round (`interleaved_seconds`).
    """
    runs = {}
    for n in numbers:
        dense, by_block = _both(model, *random_prompt(n, length), n + 2, layers)
        runs |= {("dense", n): dense, ("block by block", n): by_block}
    seconds = interleaved_seconds(runs, rounds, device_clock(model.device), progress=progress)
    kinds = ("dense", "block by block")
    return {kind: np.stack([seconds[kind, n] for n in numbers]) for kind in kinds}


def _both(
    model: PreTrainedModel, ids: Tensor, block: Tensor, blocks: int, layers: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    real = block >= 0

    def by_block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_attention(query, key, value, real, blocks)

    def reading(positions: Tensor, attend: Callable) -> Callable[[], object]:
        @torch.inference_mode()
        def read() -> object:
            return states_entering(model, ids, positions, attend, [layers])

        return read

    in_order = torch.arange(ids.shape[1])[None]
    return reading(in_order, causal_sdpa), reading(shared_positions(block, 1_024), by_block)
