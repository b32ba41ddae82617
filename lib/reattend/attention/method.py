"""The interface of attention methods inside a language model, and the base of block-sparse ones.

A method is three hooks, `prefill`, `begin_decoding` and `decode`, dense by default (after
sparse-frontier, whose hooks are prefill, cache compression and decoding). It records its own
measured density and what it reads of the cache, so that no experiment reports nominal numbers.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reattend.attention.block_sparse import Backend, block_sparse_attention, check_backend
from reattend.attention.blocks import (
    block_count,
    causal_block_mask,
    density,
    query_block_count,
)
from reattend.attention.dense import causal_sdpa

Phase = Literal["prefill", "decode"]


# A number of tokens or entries, or a share in (0, 1] of those that are there.
Budget = int | float


@dataclass(frozen=True)
class CacheView:
    """The cache that a layer's keys come from.

    Attributes:
        owner: the cache object. What a method remembers of a cache goes when the object goes.
        before: the layer's keys as they lay in the cache before this call added its own; None where
            there were none. The same tensor as after the last call means that nothing has happened
            to the cache since: every reordering, cut or copy makes a new one.
    """

    owner: object
    before: Float[Tensor, "batch key_heads keys dim"] | None


class AttentionMethod:
    """Dense attention, and the interface that every method overrides in part.

    Tensors come from the model after the rotary embedding; key and value are not repeated over
    grouped query heads and hold the cache, so keys >= queries and the last query stands at the last
    key. `padding` is None or `Bool[Tensor, "batch keys"]`, True for real tokens; real tokens of a
    sequence are contiguous. `per_sequence` and `unpadded` reduce a padded batch to sequences without
    padding; methods should use them rather than handle padding themselves.

    Attributes:
        kv_reads: what decoding has read so far: entries of the cache (a key and its value, of one
            key head at one position) that were attended.
        selection_reads: what it has read besides, to choose them, in the same unit: a key alone
            counts 1/2.
    """

    kv_reads: int
    selection_reads: float

    def __init__(self) -> None:
        self.clear()

    def prepare(self, model: nn.Module) -> None:
        """Called by `attach` before anything is run: the place to look at the model.

        Raises:
            ValueError: the method cannot be right in this model.
        """

    def saves_from(self, phase: Phase) -> int | None:
        """Least tokens of a prompt from which the method can read less than everything.

        None where it never does.
        """
        return None

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
        """Attention of a prompt, or of a chunk behind a cache (queries < keys).

        Tokens that arrive several at once are a chunk, also the candidates of assisted decoding.
        """
        return self._dense(query, key, value, scale, layer, padding, phase="prefill")

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
        """Chooses what decoding will read; called after each prompt, or chunk of one.

        The model's cache keeps every entry: a method that compresses the cache reads only what it
        kept. Of a prompt in chunks it sees the queries of the last one.

        Args:
            cache: where the keys lie; None for plain tensors.
        """

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
        """Attention of one new token over the cache."""
        return self._dense(query, key, value, scale, layer, padding, phase="decode")

    def record(
        self,
        layer: int,
        computed: Float[Tensor, "batch heads"],
        *,
        phase: Phase = "prefill",
    ) -> None:
        """Notes the density of one call, per sequence and head.

        Args:
            computed: shares in [0, 1], in blocks for block methods, in token pairs for others.
        """
        total, calls = self._recorded.get((phase, layer), (0.0, 0))
        self._recorded[phase, layer] = (
            total + computed.detach().double().sum(dim=0),
            calls + computed.shape[0],
        )

    def count_reads(self, entries: int, *, to_choose: float = 0.0) -> None:
        """Adds what one decoding call read to `kv_reads` and `selection_reads`."""
        self.kv_reads += entries
        self.selection_reads += to_choose

    def density(self, phase: Phase = "prefill") -> float:
        """Measured density, the mean over all recorded calls, layers and heads.

        Raises:
            ValueError: nothing was recorded in this phase.
        """
        return self.densities(phase).mean().item()

    def has_recorded(self, phase: Phase) -> bool:
        """Whether `density` has something to say of this phase."""
        return any(recorded == phase for recorded, _ in self._recorded)

    def densities(self, phase: Phase = "prefill") -> Float[Tensor, "layers heads"]:
        """Measured density of each head, the mean over calls; rows are the layers in order.

        Raises:
            ValueError: nothing was recorded in this phase.
        """
        layers = sorted(layer for recorded, layer in self._recorded if recorded == phase)
        if not layers:
            raise ValueError(
                f"no {phase} was recorded: run the model before asking for its density"
            )
        means = [total / calls for total, calls in (self._recorded[phase, n] for n in layers)]
        return torch.stack(means).float().cpu()

    def clear(self) -> None:
        """Forgets the recorded densities and reads."""
        self._recorded: dict[tuple[Phase, int], tuple[Tensor | float, int]] = {}
        self.kv_reads = 0
        self.selection_reads = 0.0

    def _dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        layer: int,
        padding: Tensor | None,
        phase: Phase,
    ) -> Tensor:
        """Dense attention, recorded with density 1."""
        self.record(layer, query.new_ones(query.shape[:2]), phase=phase)
        if phase == "decode":
            real = key.shape[0] * key.shape[2] if padding is None else int(padding.sum())
            self.count_reads(real * key.shape[1])
        return per_sequence(
            lambda q, k, v: causal_sdpa(q, k, v, scale=scale), query, key, value, padding
        )


class BlockSparseMethod(AttentionMethod, ABC):
    """A method that selects key blocks for query blocks in prefill, and decodes densely.

    A subclass implements `select`; attention, causality, padding, short sequences and the record of
    the density are handled here.
    """

    def __init__(self, *, block_size: int = 64, backend: Backend = "auto") -> None:
        """
        Args:
            block_size: tokens of a block.
            backend: see `block_sparse_attention`.
        """
        super().__init__()
        self.block_size = check_count("block_size", block_size, at_least=1)
        self.backend = check_backend(backend)

    @abstractmethod
    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        """The blocks of each head, on the grid of `reattend.attention.blocks`; without gradients.

        Never called for sequences that `is_short` says to attend densely, and never with padded
        tokens. Blocks above the causal diagonal are ignored.
        """

    def is_short(self, keys: int) -> bool:
        """Whether a sequence of `keys` tokens is attended densely; here: when it fits one block."""
        return keys <= self.block_size

    def fewest_blocks(self) -> int | None:
        """Key blocks from which `select` can leave one out; None where it never does."""
        return 2

    def saves_from(self, phase: Phase) -> int | None:
        """Least tokens of a prompt of which a block can be left out; decoding is dense."""
        blocks = self.fewest_blocks()
        if phase == "decode" or blocks is None:
            return None
        tokens = (blocks - 1) * self.block_size + 1
        return next(n for n in itertools.count(tokens) if not self.is_short(n))

    def block_mask(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float | None = None,
        layer: int = 0,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        """The blocks that `prefill` computes: the causal selection, or all for a short sequence."""
        queries, keys = query.shape[2], key.shape[2]
        rows, columns = (
            query_block_count(queries, keys, self.block_size),
            block_count(keys, self.block_size),
        )
        causal = causal_block_mask(rows, columns, device=query.device)
        if self.is_short(keys):
            return causal.expand(*query.shape[:2], -1, -1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        with torch.no_grad():
            return self.select(query, key, scale=scale, layer=layer) & causal

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
        """Attention over the selected blocks; causal by tokens inside the diagonal blocks."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            selected = self.block_mask(query, key, scale=scale, layer=layer)
            self.record(layer, density(selected))
            return block_sparse_attention(
                query,
                key,
                value,
                selected,
                block_size=self.block_size,
                scale=scale,
                backend=self.backend,
            )

        return per_sequence(attend, query, key, value, padding)


def per_sequence(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    padding: Bool[Tensor, "batch keys"] | None,
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """Runs `attend` on each sequence cut to its real tokens; on the batch when none is padded.

    Padded queries return zeros. So a sequence in a padded batch is computed exactly as it is alone:
    padded keys are never attended, blocks start at the first real token, and densities count real
    pairs.

    Raises:
        ValueError: the real tokens of a sequence are not contiguous.
    """
    if padding is None:
        return attend(query, key, value)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for rows, queries, keys in unpadded(query.shape[2], key, padding):
        output[rows, :, queries] = attend(
            query[rows, :, queries], key[rows, :, keys], value[rows, :, keys]
        )
    return output


def unpadded(
    queries: int,
    key: Float[Tensor, "batch key_heads keys dim"],
    padding: Bool[Tensor, "batch keys"] | None,
) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of a batch that hold no padding: (rows of the batch, queries, keys), as slices.

    The whole batch without padding; else each sequence that has real queries.

    Args:
        queries: number of queries; they are the last positions.

    Raises:
        ValueError: the real tokens of a sequence are not contiguous.
    """
    if padding is None:
        yield slice(None), slice(None), slice(None)
        return
    for sequence, (start, stop) in enumerate(_real_ranges(padding)):
        # The first query stands at keys - queries.
        shift = queries - key.shape[2]
        first, last = max(start + shift, 0), stop + shift
        if first < last:
            yield slice(sequence, sequence + 1), slice(first, last), slice(start, stop)


def _real_ranges(padding: Bool[Tensor, "batch keys"]) -> list[tuple[int, int]]:
    """First real token of each sequence, and the position behind its last."""
    length = padding.sum(dim=-1)
    start = padding.int().argmax(dim=-1)
    position = torch.arange(padding.shape[-1], device=padding.device)
    inside = (position >= start[:, None]) & (position < (start + length)[:, None])
    if not torch.equal(inside, padding):
        raise ValueError("the real tokens of a padded sequence must be contiguous")
    return list(zip(start.tolist(), (start + length).tolist(), strict=True))


def check_count(name: str, value: object, *, at_least: int = 0) -> int:
    """Returns a whole number that passed the check.

    Raises:
        ValueError: `value` is no integer of at least `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return value


def check_share(name: str, value: float) -> float:
    """Returns a share that passed the check.

    Raises:
        ValueError: `value` does not lie in (0, 1].
    """
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
    return value


def check_budget(name: str, value: Budget, *, at_least: int = 1) -> Budget:
    """Returns a budget that passed the check: a whole number, or a share as a float.

    Raises:
        ValueError: an integer below `at_least`, a share outside (0, 1], or something else.
    """
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if isinstance(value, float):
        raise ValueError(
            f"{name} must lie in (0, 1] as a share, or be an integer of at least {at_least}, "
            f"got {value!r}"
        )
    return check_count(name, value, at_least=at_least)


def budget_of(budget: Budget, total: int, *, at_least: int = 1) -> int:
    """A budget as a number: itself, or its share of `total`, rounded, of at least `at_least`."""
    if isinstance(budget, float):
        return max(at_least, round(budget * total))
    return budget


def first_above(budget: Budget, *, at_least: int = 1) -> int | None:
    """The smallest total that exceeds its budget; None for a share of 1."""
    if budget == 1.0 and isinstance(budget, float):
        return None
    return next(
        total for total in itertools.count(1) if total > budget_of(budget, total, at_least=at_least)
    )
