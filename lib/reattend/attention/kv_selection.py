"""Decoding that reads a selection of the cache: the base of such methods.

The two families of sparse-frontier share it: methods that compress the cache once after the prompt
(SnapKV, H2O) and methods that choose anew for every token from all of it (Quest). In both the
model's cache keeps every entry with its original position; what a method did not choose it does not
read.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.attention.dense import dense_attention, masked_softmax
from reattend.attention.method import AttentionMethod, Phase, unpadded

# Rows of attention weights that are held at once, in tokens: few enough for the cache of a processor.
ROWS = 64


class KVSelection(AttentionMethod, ABC):
    """Dense prefill; each new token attends to chosen entries of the cache.

    A subclass implements `choose`, and `begin` and `observe` where it carries something along. All
    three see sequences without padding; the state of each layer is the subclass's own.
    """

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
    ) -> None:
        """Starts the state of this layer anew."""
        with torch.no_grad():
            self._states[layer] = [
                self.begin(query[rows, :, queries], key[rows, :, keys], scale=scale)
                for rows, queries, keys in unpadded(query.shape[2], key, padding)
            ]

    def decode(
        self,
        query: Float[Tensor, "batch query_heads 1 dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        value: Float[Tensor, "batch key_heads keys value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch query_heads 1 value_dim"]:
        """Attention of one new token over the entries that `choose` names.

        Raises:
            ValueError: the prompt in the cache was not read with this method.
        """
        if layer not in self._states:
            raise ValueError(
                f"layer {layer} has a cache that this method knows nothing of: read the prompt "
                "inside attach, or start from reattend.attention.decoding.read_prompt"
            )
        output = query.new_zeros(*query.shape[:3], value.shape[-1])
        parts = unpadded(1, key, padding)
        for state, (rows, _, keys) in zip(self._states[layer], parts, strict=True):
            part = query[rows], key[rows, :, keys], value[rows, :, keys]
            output[rows] = self._decode_part(*part, state, scale=scale, layer=layer)
        return output

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
        self._states: dict[int, list] = {}


class Combined(AttentionMethod):
    """One method for the prompt, another one for the new tokens."""

    def __init__(self, prefill: AttentionMethod, decode: AttentionMethod) -> None:
        self.parts: dict[Phase, AttentionMethod] = {"prefill": prefill, "decode": decode}
        self.prefill = prefill.prefill
        self.begin_decoding = decode.begin_decoding
        self.decode = decode.decode

    @property
    def kv_reads(self) -> int:
        return self.parts["decode"].kv_reads

    @property
    def selection_reads(self) -> float:
        return self.parts["decode"].selection_reads

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

    The query heads of a group share their key head's entries. Heads may have chosen different
    numbers of entries.
    """
    grouped = group_heads(query.squeeze(2), key.shape[1])
    if chosen.all():
        # Nothing to gather: a full step costs what a dense one does.
        weights = (scale * (grouped @ key.transpose(-2, -1))).softmax(dim=-1)
        return (weights @ value).flatten(1, 2)[:, :, None], weights
    counts = chosen.sum(dim=-1, keepdim=True)
    width = int(counts.max())
    # Chosen positions first, in their order; a head with fewer than `width` is filled up, masked.
    places = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    real = torch.arange(width, device=key.device) < counts
    keys, values = (x.take_along_dim(places[..., None], dim=2) for x in (key, value))
    scores = scale * (grouped @ keys.transpose(-2, -1))
    weights = masked_softmax(scores, real[:, :, None])
    output = (weights @ values).flatten(1, 2)[:, :, None]
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
    total = query.new_zeros(*query.shape[:2], keys)
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
