"""Recycled Attention: most tokens read only what an earlier token attended to.

Xu et al., "Recycled Attention: Efficient inference for long-context language models", 2024, arXiv
2411.05787.

Neighbouring tokens attend to nearly the same entries of the cache. So every S-th token reads all of
it (a *full step*), and its own attention picks the K entries of the *recycled cache*; the tokens in
between (*recycle steps*) read these only. Unlike with eviction nothing is lost: the next full step
sees every entry again. The keys and values that recycle steps have written stay as they are,
computed from approximated states.

A step is a token that is fed to the model. The prompt counts as a full step, of which the last
token selects; the steps after it are counted from 1, and step S, 2S, ... are full.

The budget K is the size of the recycled cache with the token's own entry. The least attended entry
makes room for the next token, so every recycle step reads K entries. Evicting before the new token
attends, by the attention of the step before, instead of after it, is what makes this K and not
K + 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.baselines.vertical_slash import last_weights
from reattend.attention.dense import (
    causal_token_mask,
    dense_attention,
    masked_softmax,
    repeat_key_heads,
    widened,
)
from reattend.attention.kv_selection import KVSelection, best_entries, group_heads
from reattend.attention.method import (
    AttentionMethod,
    Budget,
    Phase,
    budget_of,
    check_budget,
    check_count,
    first_above,
    per_sequence,
)


@dataclass
class RecycledCache:
    """State of one layer.

    Attributes:
        kept: entries of the recycled cache, by their position in the full one.
        importance: what each entry was worth to the step before; ranks them for eviction.
        last_query: query of each sequence's last full step.
        full: whether the current step is a full one, for each sequence.
        budget: K, entries that a recycle step reads.
        step: number of steps since the prompt.
    """

    kept: Bool[Tensor, "batch key_heads keys"]
    importance: Float[Tensor, "batch key_heads keys"]
    last_query: Float[Tensor, "batch query_heads 1 dim"]
    full: Bool[Tensor, " batch"]
    budget: int
    step: int = 0


class RecycledAttention(KVSelection):
    """Full steps on a fixed schedule, or where the query has changed; recycle steps in between.

    Every layer and every key head has a recycled cache of its own; the query heads of a group share
    it. With a threshold, layers and sequences decide about full steps apart from each other.
    """

    looks_back = 1

    def __init__(
        self,
        *,
        budget: Budget = 4096,
        stride: int | None = 50,
        threshold: float | None = None,
        sink: int = 1,
        evict: bool = True,
    ) -> None:
        """
        Args:
            budget: K, entries that a recycle step reads for each key head, the token's own among
                them; a float is a share of the prompt.
            stride: S, every how many steps there is a full one; None is never again after the
                prompt. With a threshold: every how many steps the query is checked (QC).
            threshold: s, the check asks for a full step when the query's cosine similarity to that
                of the last full step, the mean over heads, lies below it. None: every check does.
            sink: entries at the start of the sequence that are always kept.
            evict: False lets the cache grow beyond K until the next full step, by the tokens since
                the last one: the form that `segment_mask` emulates for training.

        Raises:
            ValueError: a setting out of range, no room beside the sinks, or a threshold without
                checks.
        """
        super().__init__()
        self.sink = check_count("sink", sink)
        self.budget = check_budget("budget", budget, at_least=sink + 1)
        if stride is not None:
            check_count("stride", stride, at_least=1)
        elif threshold is not None:
            raise ValueError("a threshold needs a stride, every how many steps it is checked")
        self.stride = stride
        self.threshold = threshold
        self.evict = evict

    def saves_from(self, phase: Phase) -> int | None:
        """Prompts that leave no room in the budget for a token of their own."""
        above = first_above(self.budget, at_least=self.sink + 1)
        if phase == "prefill" or above is None or (self.stride == 1 and self.threshold is None):
            return None
        return max(above - 1, 1)

    def importance(
        self, weights: Float[Tensor, "batch key_heads group keys"]
    ) -> Float[Tensor, "batch key_heads keys"]:
        """What ranks the entries: the attention of one token, the mean over the group."""
        return weights.mean(dim=2)

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> RecycledCache:
        """Selects by the attention of the prompt's last token."""
        weights = last_weights(query, key, 1, scale).squeeze(2)
        importance = self.importance(group_heads(weights, key.shape[1]))
        budget = budget_of(self.budget, key.shape[2], at_least=self.sink + 1)
        return RecycledCache(
            kept=most_important(importance, budget, self.sink),
            importance=importance,
            last_query=query[:, :, -1:],
            full=torch.ones(len(query), dtype=torch.bool, device=query.device),
            budget=budget,
        )

    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: RecycledCache,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        """Everything in a full step, else the recycled cache with the new token."""
        state.step += 1
        state.full = self._is_full(query, state)
        state.last_query = torch.where(state.full[:, None, None, None], query, state.last_query)
        state.kept = F.pad(self._with_room(state), (0, 1), value=True)
        return state.kept | state.full[:, None, None]

    def observe(
        self, weights: Float[Tensor, "batch key_heads group keys"], state: RecycledCache
    ) -> None:
        """Selects anew after a full step."""
        state.importance = self.importance(weights)
        if self._may_be_full(state):
            selected = most_important(state.importance, state.budget, self.sink)
            state.kept = torch.where(state.full[:, None, None], selected, state.kept)

    def _may_be_full(self, state: RecycledCache) -> bool:
        """Whether the schedule has a full step or a check here; known without waiting for a device."""
        return self.stride is not None and state.step % self.stride == 0

    def _is_full(self, query: Tensor, state: RecycledCache) -> Bool[Tensor, " batch"]:
        if not self._may_be_full(state):
            return torch.zeros_like(state.full)
        if self.threshold is None:
            return torch.ones_like(state.full)
        return query_similarity(query, state.last_query) < self.threshold

    def _with_room(self, state: RecycledCache) -> Bool[Tensor, "batch key_heads keys"]:
        """The recycled cache without its least important entry, if it is full."""
        if not self.evict:
            return state.kept
        # The newest entry is never evicted at once, whatever the token paid to itself; sinks never are.
        scores = state.importance.clone()
        scores[..., -1] = torch.finfo(scores.dtype).max
        scores[..., : self.sink] = float("inf")
        least = scores.masked_fill(~state.kept, float("inf")).argmin(dim=-1, keepdim=True)
        has_room = state.kept.sum(dim=-1, keepdim=True) < state.budget
        return state.kept.scatter(-1, least, has_room)


class RefreshedStreaming(RecycledAttention):
    """StreamingLLM++: sinks and the most recent entries, with a full step every S steps.

    The same schedule and number of full steps as Recycled Attention, which learn nothing here: the
    entries are ranked by position. Without full steps (stride None) it is StreamingLLM.
    """

    def importance(
        self, weights: Float[Tensor, "batch key_heads group keys"]
    ) -> Float[Tensor, "batch key_heads keys"]:
        position = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        return position.expand(weights.shape[0], weights.shape[1], -1)


class SegmentAttention(AttentionMethod):
    """Attention of a whole sequence under the mask of the schedule, for continued pre-training.

    Gives each position what step-by-step decoding with `RecycledAttention(evict=False)` behind a
    prompt gives it, in one pass and with gradients. Decoding is dense.
    """

    def __init__(self, *, budget: int, stride: int, prompt: int = 1, sink: int = 1) -> None:
        """
        Args:
            budget: K, entries of the recycled cache after a full step.
            stride: S, positions of a segment.
            prompt: tokens at the start of a sequence that attend densely.
            sink: entries at the start that are always kept.

        Raises:
            ValueError: a setting out of range.
        """
        super().__init__()
        self.sink = check_count("sink", sink)
        self.budget = check_count("budget", budget, at_least=sink + 1)
        self.stride = check_count("stride", stride, at_least=1)
        self.prompt = check_count("prompt", prompt, at_least=1)

    def prefill(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        value: Float[Tensor, "batch key_heads keys value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch query_heads queries value_dim"]:
        """Attention under `segment_mask`.

        Raises:
            ValueError: a chunk behind a cache, whose earlier queries are not known.
        """
        if query.shape[2] != key.shape[2]:
            raise ValueError("SegmentAttention reads whole sequences, not chunks behind a cache")
        settings = {"budget": self.budget, "stride": self.stride, "sink": self.sink}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            start = min(self.prompt, key.shape[2]) - 1
            allowed = segment_mask(query, key, start=start, scale=scale, **settings)
            pairs = allowed.sum(dim=(-2, -1)) / causal_token_mask(*allowed.shape[-2:]).sum()
            group = query.shape[1] // key.shape[1]
            self.record(layer, pairs.repeat_interleave(group, dim=1))
            mask = allowed.repeat_interleave(group, dim=1)
            return dense_attention(query, key, value, mask=mask, scale=scale)

        return per_sequence(attend, query, key, value, padding)


@torch.no_grad()
def segment_mask(
    query: Float[Tensor, "batch query_heads tokens dim"],
    key: Float[Tensor, "batch key_heads tokens dim"],
    *,
    budget: int,
    stride: int,
    start: int,
    scale: float,
    sink: int = 1,
) -> Bool[Tensor, "batch key_heads tokens tokens"]:
    """What each position may see when full steps stand at start, start + S, start + 2 S, ...

    A position of a full step sees all before it, as do those before `start`. The others see the K
    entries that the last full step attended to most, and the tokens since then. For continued
    pre-training; the selection carries no gradient.
    """
    tokens = key.shape[2]
    position = torch.arange(tokens, device=key.device)
    anchors = position[start::stride]
    causal = causal_token_mask(tokens, tokens, device=key.device)
    repeated = widened(repeat_key_heads(key, query.shape[1]))
    scores = scale * (widened(query[:, :, anchors]) @ repeated.mT)
    weights = masked_softmax(scores, causal[anchors])
    importance = group_heads(weights, key.shape[1]).mean(dim=2)
    selected = most_important(importance, budget, sink) & causal[anchors]

    segment = ((position - start) // stride).clamp_min(0)
    anchor = anchors[segment]
    since = causal & (position > anchor[:, None])
    is_full = (position <= start) | (position == anchor)
    return torch.where(is_full[:, None], causal, selected[:, :, segment] | since)


def most_important(
    importance: Float[Tensor, "*batch keys"], count: int, sink: int
) -> Bool[Tensor, "*batch keys"]:
    """The `count` most important entries of each row, the first `sink` ones before all others."""
    first = torch.arange(importance.shape[-1], device=importance.device) < sink
    return best_entries(importance.masked_fill(first, float("inf")), count)


def query_similarity(
    query: Float[Tensor, "batch query_heads 1 dim"],
    other: Float[Tensor, "batch query_heads 1 dim"],
) -> Float[Tensor, " batch"]:
    """Cosine similarity of two tokens' queries, the mean over the heads of a layer."""
    return F.cosine_similarity(widened(query), widened(other), dim=-1).mean(dim=(1, 2))
