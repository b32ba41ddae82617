"""Decoding along given tokens in one pass, what a selection covers, and the texts of that study."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reattend.attention.decoding import Prompt
from reattend.attention.dense import causal_token_mask, masked_softmax
from reattend.attention.host import attach
from reattend.attention.kv_selection import KVSelection, group_heads
from reattend.attention.method import AttentionMethod
from reattend.data.needles import KEYS, Facts, Haystack, NeedleSample, Tokenizer, hide
from reattend.long_context.recycled_attention import most_important


def grouped_scores(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
) -> Float[Tensor, "batch key_heads group queries keys"]:
    """Unscaled scores, the query heads of one key head beside each other."""
    grouped = group_heads(query, key.shape[1])
    return (grouped.flatten(2, 3) @ key.mT).unflatten(2, grouped.shape[2:4])


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Values under grouped weights, [batch, query_heads, queries, value_dim]."""
    return (weights.flatten(2, 3) @ value).unflatten(2, weights.shape[2:4]).flatten(1, 2)


class StepByStep(AttentionMethod):
    """Reads a chunk behind a prompt as if its tokens were decoded one by one.

    What a layer computes for a token depends on the tokens before it only, so the linear layers may
    take the chunk at once, if inside each layer the method chooses for token after token.
    """

    def __init__(self, method: KVSelection, prompt: Prompt) -> None:
        super().__init__()
        self.method = method
        # Entries, summed over tokens, layers and key heads.
        self.reads = torch.zeros(len(prompt.logits), device=prompt.logits.device)
        self.states = {
            number: method.begin(
                start["query"], prompt.cache.layers[number].keys, scale=start["scale"]
            )
            for number, start in prompt.starts.items()
        }

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        """The chunk's attention; `reads` counts what it read."""
        scores = scale * grouped_scores(query, key)
        weights = torch.zeros_like(scores)
        for t, seen, chosen in self.choices(query, key, scale, layer):
            now = masked_softmax(scores[..., t, :seen], chosen[:, :, None])
            self.method.observe(now, self.states[layer])
            weights[..., t, :seen] = now
            self.reads = self.reads + chosen.sum(dim=(1, 2))
        return _weighted(weights, value)

    def choices(self, query, key, scale, layer) -> Iterator[tuple[int, int, Tensor]]:
        """For token after token: its place, the entries there are, and those that it reads."""
        tokens, keys = query.shape[2], key.shape[2]
        for t in range(tokens):
            seen = keys - tokens + t + 1
            now, before = query[:, :, t : t + 1], key[:, :, :seen]
            yield t, seen, self.method.choose(now, before, self.states[layer], scale=scale)


class Oracle(AttentionMethod):
    """Every token reads the K entries of its own largest weights: the best that any choice can do."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        """Attention of a chunk behind a prompt."""
        scores = scale * grouped_scores(query, key)
        causal = causal_token_mask(query.shape[2], key.shape[2], device=key.device)
        best = most_important(masked_softmax(scores, causal).mean(dim=2), self.budget, 0)
        return _weighted(masked_softmax(scores, (best & causal)[:, :, None]), value)


class Coverage(AttentionMethod):
    """Dense attention over a continuation that notes what each selection would have covered of it.

    After it has read, `covered` has for each selection, for the best K entries of every token and
    for K random ones the covered share of attention, summed over layers: [batch, tokens].
    """

    FRESH, RANDOM = "fresh top-K (upper bound)", "random K"

    def __init__(
        self, selections: Mapping[str, KVSelection], budget: int, prompt: Prompt, seed: int
    ) -> None:
        super().__init__()
        self.readers = {name: StepByStep(method, prompt) for name, method in selections.items()}
        self.budget = budget
        self.generator = torch.Generator().manual_seed(seed)
        self.covered: dict[str, Tensor] = {}

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        """Dense attention of a chunk behind a prompt."""
        causal = causal_token_mask(query.shape[2], key.shape[2], device=key.device)
        weights = masked_softmax(scale * grouped_scores(query, key), causal)
        mean = weights.mean(dim=2)
        chance = torch.rand(mean.shape, generator=self.generator).to(key.device)
        ranked = {self.FRESH: mean, self.RANDOM: chance.masked_fill(~causal, -1)}
        for name, importance in ranked.items():
            chosen = most_important(importance, self.budget, 0)
            self._note(name, weights * chosen[:, :, None])
        for name, reader in self.readers.items():
            covered = torch.zeros_like(weights)
            for t, seen, chosen in reader.choices(query, key, scale, layer):
                covered[..., t, :seen] = weights[..., t, :seen] * chosen[:, :, None]
                reader.method.observe(covered[..., t, :seen], reader.states[layer])
            self._note(name, covered)
        return _weighted(weights, value)

    def _note(self, name: str, covered: Tensor) -> None:
        """Adds one layer's mean over heads."""
        self.covered[name] = self.covered.get(name, 0) + covered.sum(dim=-1).mean(dim=(1, 2)).cpu()


@dataclasses.dataclass(frozen=True)
class Followed:
    """A decoding along given tokens.

    Attributes:
        choices: the greedy choice before each given token, [batch, tokens].
        nll: of the given tokens, in nats, [batch, tokens].
        reads: entries that a key head reads for a token, [batch].
    """

    choices: Tensor
    nll: Tensor
    reads: np.ndarray


@torch.inference_mode()
def follow(
    model: nn.Module, method: AttentionMethod, prompt: Prompt, given: Int[Tensor, "batch tokens"]
) -> Followed:
    """Decodes along given tokens with a method of the cache, `Oracle`, `Coverage` or dense attention.

    The first given token is predicted by the prompt's own dense pass.
    """
    stepwise = isinstance(method, KVSelection)
    reader = StepByStep(method, prompt) if stepwise else method
    # Layers of its own over the prompt's tensors, which are never written to: new entries make new tensors.
    cache = copy.copy(prompt.cache)
    cache.layers = [copy.copy(layer) for layer in prompt.cache.layers]
    logits = prompt.logits[:, None]
    if given.shape[1] > 1:
        with attach(model, reader):
            rest = model(given[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, rest.float()], dim=1)
    nll = -logits.log_softmax(dim=-1).gather(-1, given[..., None]).squeeze(-1)
    length, fed = prompt.cache.get_seq_length(), given.shape[1] - 1
    if stepwise:
        heads = len(prompt.starts) * prompt.cache.layers[0].keys.shape[1]
        reads = reader.reads.cpu().double().numpy() / (heads * max(fed, 1))
    else:
        mean_length = length + (fed + 1) / 2
        reads = np.full(len(given), float(min(getattr(method, "budget", mean_length), mean_length)))
    return Followed(logits.argmax(dim=-1).cpu(), nll.cpu(), reads)


def word_lists(
    haystack: Haystack, length: int, count: int, words: int, seed: int = 0
) -> Iterator[NeedleSample]:
    """Three lists of words hidden in prose, of which one is to be copied; its commas do not count.

    Args:
        length: exact length of every prompt, in tokens.
        words: words of a list.
    """
    random_state = random.Random(f"word_list {length} {seed}")
    comma = haystack.encode(",")[0]
    for number in range(count):
        names = random_state.sample(KEYS, 3)
        lists = [", ".join(random_state.sample(KEYS, words)) for _ in names]
        needles = [f" The list of {name}: {some}." for name, some in zip(names, lists, strict=True)]
        facts = Facts(tuple(needles), 0, f"\n\nThe list of {names[0]}:", f" {lists[0]}")
        depth = (number + 0.5) / count
        sample = hide(haystack, "word_list", facts, length, depth, random_state)
        yield dataclasses.replace(sample, scored=tuple(token != comma for token in sample.answer))


def document_windows(
    tokenizer: Tokenizer, documents: Sequence[str], length: int, count: int, seed: int = 0
) -> Int[Tensor, "count length"]:
    """One stretch of `length` tokens from each of `count` documents, from a sentence's end on.

    Raises:
        ValueError: when fewer documents are long enough.
    """
    random_state = random.Random(f"document windows {length} {seed}")
    windows: list[list[int]] = []
    for document in random_state.sample(documents, len(documents)):
        if len(windows) == count:
            break
        # A token has more than one character, so shorter documents need not be read.
        if len(document) > length:
            prose = Haystack(tokenizer, [document])
            if any(end + length <= len(prose.ids) for end in prose.sentence_ends):
                windows.append(prose.window(length, random_state)[0])
    if len(windows) < count:
        raise ValueError(f"{len(windows)} documents hold a stretch of {length} tokens, not {count}")
    return torch.tensor(windows)
