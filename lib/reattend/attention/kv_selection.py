"""Decoding that reads a selection of the cache: the base of such methods.

The two families of sparse-frontier share it: methods that compress the cache once after the prompt
(SnapKV, H2O) and methods that choose anew for every token from all of it (Quest). In both the
model's cache keeps every entry with its original position; what a method did not choose it does not
read.

What a method carries along belongs to the keys that it was made from, and is kept beside them. A
cache may be reordered, copied or cut between two tokens; the keys say what has happened, and the
states follow, or the method refuses.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reattend.attention.dense import dense_attention, masked_softmax, widened
from reattend.attention.method import AttentionMethod, CacheView, Phase, unpadded

# Rows of attention weights that are held at once, in tokens: few enough for the cache of a processor.
ROWS = 64

# How many of the latest tokens may be taken back (assisted decoding rejects a few at a time).
REJECTABLE = 64


@dataclasses.dataclass(frozen=True)
class Unread:
    """The state of a sequence of which only padding has been read."""


@dataclasses.dataclass
class Latest:
    """Queries of the last tokens that were read together: to begin again when some are rejected.

    Attributes:
        query: the last of them.
        all: whether it is all of them.
    """

    query: Float[Tensor, "batch query_heads latest dim"]
    all: bool


@dataclasses.dataclass
class Memory:
    """What a method remembers of one layer of one cache.

    Attributes:
        key: the keys that the states have seen.
        whole: whether there is one state for the whole batch; else there is one for each sequence.
        states: the states.
        latest: None once a token was decoded.
    """

    key: Float[Tensor, "batch key_heads known dim"]
    whole: bool
    states: list[Any]
    latest: Latest | None

    def of_rows(self, rows: list[int], key: Float[Tensor, "rows key_heads keys dim"]) -> "Memory":
        """The same for the named sequences, in this order, with their keys; shares no state."""
        index = torch.tensor(rows, device=key.device)
        if self.whole:
            states = [take_rows(self.states[0], index)]
        else:
            states = [take_rows(self.states[row], index.new_zeros(1)) for row in rows]
        return Memory(key, self.whole, states, take_rows(self.latest, index))

    def arrange(self, *, whole: bool) -> None:
        """Makes it one state for the whole batch, or one for each sequence.

        Raises:
            ValueError: the sequences have not been read alike.
        """
        if whole and not self.whole:
            self.states = [join_rows(self.states)]
        elif self.whole and not whole:
            one = torch.arange(len(self.key), device=self.key.device)
            self.states = [take_rows(self.states[0], row) for row in one.split(1)]
        self.whole = whole


class KVSelection(AttentionMethod, ABC):
    """Dense prefill; each new token attends to chosen entries of the cache.

    A subclass implements `choose`, and `begin`, `observe` and `rewound` where it carries something
    along. All see sequences without padding. A state is None, a number that all sequences share, a
    tensor with one row a sequence, or a dataclass of such; it is replaced or its attributes are, but
    no tensor is written to in place.
    """

    # How many of the last queries `begin` looks at; None for all.
    looks_back: int | None = 0

    def begin(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
    ) -> Any:
        """The state of one layer after the prompt."""
        return None

    @abstractmethod
    def choose(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        state: Any,
        *,
        scale: float,
    ) -> Bool[Tensor, "batch key_heads keys"]:
        """The entries that this token reads; the newest, at the end, is the token's own."""

    def observe(
        self,
        weights: Float[Tensor, "batch key_heads group keys"],
        state: Any,
    ) -> None:
        """Takes note of the attention that one token paid, zero where nothing was read."""

    def rewound(self, state: Any, keys: int) -> Any:
        """The state as it was when the cache held `keys` entries, after decoded tokens were cut off.

        Raises:
            ValueError: that is not known any more.
        """
        if state is None:
            return None
        raise ValueError(
            f"the cache was cut back to {keys} entries, but {type(self).__name__} does not know any "
            "more what it would have chosen there: read the prompt again"
        )

    def reads_to_choose(self, keys: int) -> float:
        """What `choose` reads for one key head of `keys` entries, in entries."""
        return 0.0

    def begin_decoding(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
        cache: CacheView | None = None,
    ) -> None:
        """Starts the state of this layer of the cache anew."""
        states = self._begin(query, key, padding, scale)
        count, latest = (self.looks_back or 0) + REJECTABLE, None
        if self.looks_back is not None or query.shape[2] <= count:
            # A copy: a part of the queries would keep all of them.
            latest = Latest(query[:, :, -count:].detach().clone(), query.shape[2] <= count)
        self._memories_of(cache)[layer] = Memory(key, padding is None, states, latest)

    def decode(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        value: Float[Tensor, "batch key_heads keys value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
        cache: CacheView | None = None,
    ) -> Float[Tensor, "batch query_heads 1 value_dim"]:
        """Attention of one new token over the entries that `choose` names.

        Raises:
            ValueError: the prompt in the cache was not read with this method, or the cache has been
                changed in a way that the method cannot follow.
        """
        memory = self._recall(layer, key, padding, cache, scale)
        memory.arrange(whole=padding is None)
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        for rows, _, keys in unpadded(1, key, padding):
            number = rows.start or 0
            part = query[rows], key[rows, :, keys], value[rows, :, keys]
            state = memory.states[number]
            if isinstance(state, Unread):
                # The sequence was nothing but padding so far: this token is its prompt.
                with torch.no_grad():
                    memory.states[number] = self.begin(*part[:2], scale=scale)
                output[rows] = self._dense(*part, scale, layer, None, phase="decode")
            else:
                output[rows] = self._decode_part(*part, state, scale=scale, layer=layer)
        memory.key, memory.latest = key, None
        return output

    def states(self, layer: int, cache: object | None = None) -> list[Any]:
        """What is remembered of a layer: one state for the batch, or with padding one a sequence.

        Args:
            cache: the model's cache object; None for what was read as plain tensors.

        Raises:
            KeyError: nothing is.
        """
        memories = self._plain if cache is None else self._memories[cache]
        return memories[layer].states

    @torch.no_grad()
    def _begin(self, query: Tensor, key: Tensor, padding: Tensor | None, scale: float) -> list[Any]:
        """The states of a batch, as `Memory.states`."""
        states: list[Any] = [Unread()] * (1 if padding is None else len(key))
        for rows, queries, keys in unpadded(query.shape[2], key, padding):
            states[rows.start or 0] = self.begin(
                query[rows, :, queries], key[rows, :, keys], scale=scale
            )
        return states

    @torch.no_grad()
    def _recall(
        self,
        layer: int,
        key: Tensor,
        padding: Tensor | None,
        cache: CacheView | None,
        scale: float,
    ) -> Memory:
        """The memory that belongs to the keys before the newest one; brought into their form."""
        here = self._memories_of(cache)
        known = here.get(layer)
        if known is not None and cache is not None and known.key is cache.before:
            return known
        before = key[:, :, :-1]
        others = (memories.get(layer) for memories in (self._plain, *self._memories.values()))
        for memory in (known, *others):
            rows = None if memory is None else matching_rows(before, memory.key)
            if rows is not None:
                found = memory.of_rows(rows, before)
                rejected = memory.key.shape[2] - before.shape[2]
                if rejected:
                    past = None if padding is None else padding[:, :-1]
                    self._take_back(found, rejected, past, scale)
                here[layer] = found
                return found
        if known is None:
            raise ValueError(
                f"layer {layer} has a cache that this method knows nothing of: read the prompt "
                "inside attach, or start from reattend.attention.decoding.read_prompt"
            )
        raise ValueError(
            f"layer {layer}: the cache of {before.shape[2]} entries is not the one of "
            f"{known.key.shape[2]} that {type(self).__name__} has followed: entries were changed, or "
            "added without it; read the prompt again inside attach"
        )

    def _take_back(
        self, memory: Memory, rejected: int, padding: Tensor | None, scale: float
    ) -> None:
        """Forgets the latest tokens, which are not in the memory's keys any more."""
        if memory.latest is not None:
            latest = memory.latest.query[:, :, :-rejected]
            if latest.shape[2] and (memory.latest.all or latest.shape[2] >= self.looks_back):
                memory.whole = padding is None
                memory.states = self._begin(latest, memory.key, padding, scale)
                return
        memory.arrange(whole=padding is None)
        total = memory.key.shape[2]
        for rows, _, keys in unpadded(total, memory.key, padding):
            number = rows.start or 0
            length = len(range(total)[keys])
            memory.states[number] = self.rewound(memory.states[number], length)

    def _memories_of(self, cache: CacheView | None) -> dict[int, Memory]:
        if cache is None:
            return self._plain
        return self._memories.setdefault(cache.owner, {})

    def _decode_part(
        self, query: Tensor, key: Tensor, value: Tensor, state: Any, *, scale: float, layer: int
    ) -> Tensor:
        with torch.no_grad():
            chosen = self.choose(query, key, state, scale=scale)
        output, weights = attend_to_chosen(query, key, value, chosen, scale=scale)
        self.observe(weights.detach(), state)
        heads, keys = chosen.shape[0] * chosen.shape[1], chosen.shape[2]
        self.count_reads(int(chosen.sum()), to_choose=heads * self.reads_to_choose(keys))
        group = query.shape[1] // key.shape[1]
        share = chosen.float().mean(dim=-1).repeat_interleave(group, dim=1)
        self.record(layer, share, phase="decode")
        return output

    def clear(self) -> None:
        """Forgets the recorded densities and reads, and the state of every layer."""
        super().clear()
        self._plain: dict[int, Memory] = {}
        self._memories: WeakKeyDictionary[object, dict[int, Memory]] = WeakKeyDictionary()


class Combined(AttentionMethod):
    """One method for the prompt, another one for the new tokens."""

    def __init__(self, prefill: AttentionMethod, decode: AttentionMethod) -> None:
        self.parts: dict[Phase, AttentionMethod] = {"prefill": prefill, "decode": decode}
        self.prefill = prefill.prefill
        self.begin_decoding = decode.begin_decoding
        self.decode = decode.decode

    def prepare(self, model: nn.Module) -> None:
        for part in self.parts.values():
            part.prepare(model)

    def saves_from(self, phase: Phase) -> int | None:
        return self.parts[phase].saves_from(phase)

    @property
    def kv_reads(self) -> int:
        return self.parts["decode"].kv_reads

    @property
    def selection_reads(self) -> float:
        return self.parts["decode"].selection_reads

    def has_recorded(self, phase: Phase) -> bool:
        return self.parts[phase].has_recorded(phase)

    def densities(self, phase: Phase = "prefill") -> Float[Tensor, "layers heads"]:
        return self.parts[phase].densities(phase)

    def clear(self) -> None:
        for part in self.parts.values():
            part.clear()


def attend_to_chosen(
    query: Float[Tensor, "batch query_heads 1 dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    chosen: Bool[Tensor, "batch key_heads keys"],
    *,
    scale: float,
) -> tuple[
    Float[Tensor, "batch query_heads 1 value_dim"],
    Float[Tensor, "batch key_heads group keys"],
]:
    """Attention of one token over chosen entries, which are gathered; and its weights.

    Scores, weights and sums are in float32 at least, whatever the tensors are. The query heads of a
    group share their key head's entries. Heads may have chosen different numbers of entries.
    """
    grouped = group_heads(query.squeeze(2), key.shape[1])
    if chosen.all():
        # Nothing to gather: a full step costs what a dense one does.
        weights = (scale * (widened(grouped) @ widened(key).transpose(-2, -1))).softmax(dim=-1)
        output = (weights @ widened(value)).to(value.dtype)
        return output.flatten(1, 2)[:, :, None], weights
    counts = chosen.sum(dim=-1, keepdim=True)
    width = int(counts.max())
    # Chosen positions first, in their order; a head with fewer than `width` is filled up, masked.
    places = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    real = torch.arange(width, device=key.device) < counts
    keys, values = (widened(x.take_along_dim(places[..., None], dim=2)) for x in (key, value))
    scores = scale * (widened(grouped) @ keys.transpose(-2, -1))
    weights = masked_softmax(scores, real[:, :, None])
    output = (weights @ values).to(value.dtype).flatten(1, 2)[:, :, None]
    everywhere = weights.new_zeros(*weights.shape[:-1], key.shape[2])
    spread = places[:, :, None].expand_as(weights)
    return output, everywhere.scatter(-1, spread, weights)


def group_heads(
    x: Float[Tensor, "batch query_heads *rest"], key_heads: int
) -> Float[Tensor, "batch key_heads group *rest"]:
    """Splits query heads into the groups that share a key head."""
    return x.unflatten(1, (key_heads, -1))


def received_attention(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    *,
    scale: float,
) -> Float[Tensor, "batch query_heads keys"]:
    """Attention that each key receives, summed over the queries, a limited number at a time."""
    queries, keys = query.shape[2], key.shape[2]
    total = widened(query.new_zeros(*query.shape[:2], keys))
    for start in range(0, queries, ROWS):
        stop = min(start + ROWS, queries)
        seen = key[:, :, : keys - queries + stop]
        _, weights = dense_attention(
            query[:, :, start:stop], seen, seen, scale=scale, causal=True, return_weights=True
        )
        total[..., : seen.shape[2]] += weights.sum(dim=2)
    return total


def best_entries(
    scores: Float[Tensor, "*batch entries"], count: int
) -> Bool[Tensor, "*batch entries"]:
    """The `count` best entries of each row (all of them where there are fewer)."""
    best = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def matching_rows(
    key: Float[Tensor, "rows key_heads keys dim"],
    known: Float[Tensor, "batch key_heads known dim"],
) -> list[int] | None:
    """For each sequence one of `known` that begins with the same keys; None if some have none."""
    keys = key.shape[2]
    if (key.dtype, key.device) != (known.dtype, known.device):
        return None
    if keys > known.shape[2] or key.shape[1::2] != known.shape[1::2]:
        return None
    known = known[:, :, :keys]
    if torch.equal(key, known):
        return list(range(len(key)))
    found = []
    for row in key:
        # The last entry tells most sequences apart, without reading all of them.
        same = (
            number
            for number, other in enumerate(known)
            if torch.equal(row[:, -1:], other[:, -1:]) and torch.equal(row, other)
        )
        found.append(next(same, None))
    return None if None in found else found


def take_rows(state: Any, index: Tensor) -> Any:
    """The state of the named sequences, in their order; shares no tensor."""
    if isinstance(state, Tensor):
        return state.index_select(0, index)
    if dataclasses.is_dataclass(state):
        parts = {part.name: getattr(state, part.name) for part in dataclasses.fields(state)}
        return type(state)(**{name: take_rows(part, index) for name, part in parts.items()})
    return state


def join_rows(states: list[Any]) -> Any:
    """One state for a batch, from one for each sequence.

    Raises:
        ValueError: they are of different lengths or ages.
    """
    first = states[0]
    if len({type(state) for state in states}) == 1:
        if isinstance(first, Tensor) and len({state.shape for state in states}) == 1:
            return torch.cat(states)
        if dataclasses.is_dataclass(first):
            names = [part.name for part in dataclasses.fields(first)]
            return type(first)(
                **{name: join_rows([getattr(state, name) for state in states]) for name in names}
            )
        if not isinstance(first, Tensor) and all(state == first for state in states):
            return first
    raise ValueError(
        "sequences of different lengths, or read at different times, are decoded as one batch "
        "without padding: read their prompts together"
    )
