"""Attention over selected blocks, by three backends that agree forward and backward.

`dense` expands the block mask to tokens and calls the reference. `gather` copies the selected key
blocks of each row together and runs torch's fused kernel on them: differentiable, no compiler, the
backend for CPUs. `flex` hands the block mask to torch's flex_attention, the backend for GPUs.
"""

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.blocks import (
    block_count,
    causal_block_mask,
    expand_to_tokens,
    query_block_count,
)
from reattend.attention.dense import causal_sdpa, dense_attention, masked_sdpa

Backend = Literal["auto", "dense", "gather", "masked", "flex"]

# Upper limit on the copies of keys and values that are alive at once, in numbers; small enough to
# stay near the cache.
GATHERED_NUMBERS = 1 << 19


def check_backend(backend: str) -> Backend:
    """Returns the name of a backend that exists.

    Raises:
        ValueError: there is no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    return backend


def block_sparse_attention(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    block_mask: Bool[Tensor, "#batch #query_heads query_blocks key_blocks"],
    *,
    block_size: int,
    scale: float | None = None,
    backend: Backend = "auto",
    causal: bool = True,
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """Softmax attention over the selected blocks, with grouped-query heads.

    Args:
        block_mask: the selected blocks, on the grid of `reattend.attention.blocks`.
        scale: factor on the scores; 1 / sqrt(dim) when None.
        backend: "auto" is masked on CUDA and gather elsewhere. Masked is torch's fused kernel under
            the token mask: it computes what is not selected, needs no compiler, and takes any block
            size; flex skips it, but on a GPU wants blocks of a multiple of 128. Except for "dense",
            the reference, a selection of every block runs through the fused dense kernel.
        causal: blocks above the diagonal are dropped and diagonal blocks are causal by tokens.
            Otherwise queries and keys are two unrelated sequences whose grids both start at 0.

    Returns:
        The output; queries without any selected key get zeros.

    Raises:
        ValueError: the block mask does not fit the lengths, or the backend is unknown.
        NotImplementedError: "flex" on a CPU with gradients.
        RuntimeError: "flex" on a CPU without a C++ compiler.
    """
    check_backend(backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    block_mask = _checked_mask(block_mask, query, key, block_size, causal)
    if backend == "dense":
        tokens = expand_to_tokens(
            block_mask, block_size, query.shape[2], key.shape[2], causal=causal
        )
        return dense_attention(query, key, value, mask=tokens, scale=scale)
    if _selects_everything(block_mask, causal):
        return _plain(query, key, value, scale, causal)
    if backend == "flex":
        return _flex(query, key, value, block_mask, block_size, scale, causal)
    if backend == "masked" or (backend == "auto" and query.is_cuda):
        return _masked(query, key, value, block_mask, block_size, scale, causal)
    return _gather(query, key, value, block_mask, block_size, scale, causal)


def _checked_mask(
    block_mask: Tensor, query: Tensor, key: Tensor, block_size: int, causal: bool
) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
    """The mask for every sequence and head, without blocks of the future; refuses a wrong shape."""
    queries, keys = query.shape[2], key.shape[2]
    if causal and queries > keys:
        raise ValueError(f"causal attention needs queries <= keys, got {queries} > {keys}")
    rows = query_block_count(queries, keys if causal else queries, block_size)
    expected = (rows, block_count(keys, block_size))
    if tuple(block_mask.shape[-2:]) != expected:
        raise ValueError(
            f"block mask of {queries} queries and {keys} keys in blocks of {block_size} must be "
            f"{expected[0]} x {expected[1]}, got {block_mask.shape[-2]} x {block_mask.shape[-1]}"
        )
    if causal:
        block_mask = block_mask & causal_block_mask(*expected, device=block_mask.device)
    return block_mask.expand(*query.shape[:2], -1, -1)


def _selects_everything(block_mask: Tensor, causal: bool) -> bool:
    if not causal:
        return bool(block_mask.all())
    triangle = causal_block_mask(*block_mask.shape[-2:], device=block_mask.device)
    return bool((block_mask == triangle).all())


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    if causal:
        return causal_sdpa(query, key, value, scale=scale)
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """Torch's fused kernel under the token mask, of which there is one at a time."""
    outputs = []
    for q, k, v, blocks in zip(*(x.split(1) for x in (query, key, value, block_mask)), strict=True):
        tokens = expand_to_tokens(blocks, block_size, q.shape[2], k.shape[2], causal=causal)
        outputs.append(masked_sdpa(q, k, v, tokens, scale=scale))
    return torch.cat(outputs)


# --- gather ---


class _Bucket(NamedTuple):
    """Rows with equally many blocks, agreeing on whether the last one is only partly visible."""

    rows: Int[Tensor, " rows"]
    blocks: Int[Tensor, "rows count"]  # indices into the flat list of key blocks
    partial: bool


def _gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """One fused attention per group of rows (head, query block) with equally many blocks."""
    batch, heads, queries = query.shape[:3]
    keys = key.shape[2]
    front = (keys - queries) % block_size if causal else 0
    query_rows = _to_blocks(query, block_size, front)
    key_blocks, value_blocks = _to_blocks(key, block_size), _to_blocks(value, block_size)
    widest = _token_bias(query, block_size, keys, causal)
    # Starts with rows that select nothing, whose output is zero.
    empty = (~block_mask.any(dim=-1)).flatten().nonzero()[:, 0]
    order, outputs = [empty], [query_rows.new_zeros(len(empty), block_size, value.shape[-1])]
    for bucket in _buckets(block_mask, key.shape[1], causal, widest is not None):
        for rows, blocks in _chunks(bucket, key_blocks, value_blocks):
            bias = widest[:, -blocks.shape[1] * block_size :] if bucket.partial else None
            outputs.append(
                F.scaled_dot_product_attention(
                    query_rows[rows][None],
                    _take(key_blocks, blocks)[None],
                    _take(value_blocks, blocks)[None],
                    attn_mask=bias,
                    scale=scale,
                )[0]
            )
            order.append(rows)
    # Sorting the order of computation gives where each row was computed.
    result = torch.cat(outputs).index_select(0, torch.cat(order).argsort())
    return result.view(batch, heads, -1, value.shape[-1])[:, :, front : front + queries]


def _to_blocks(
    x: Float[Tensor, "batch heads tokens dim"], block_size: int, front: int = 0
) -> Float[Tensor, "blocks block_size dim"]:
    """All blocks of all heads in one list, partial ones filled with zeros (`front` first)."""
    back = -(front + x.shape[2]) % block_size
    if front or back:  # F.pad copies even when there is nothing to pad
        x = F.pad(x, (0, 0, front, back))
    return x.reshape(-1, block_size, x.shape[-1])


def _token_bias(
    query: Tensor, block_size: int, keys: int, causal: bool
) -> Float[Tensor, "block_size tokens"] | None:
    """Additive mask of a row whose last block is partly visible; None when no block is partial.

    Rows with few blocks use its last columns. With causality the partly visible block is the
    diagonal one; that also hides the filled-up keys of the last block, which lie in the future of
    every real query. Without causality it is a partial last block.
    """
    if not causal and keys % block_size == 0:
        return None
    tokens = block_count(keys, block_size) * block_size
    bias = query.new_zeros(block_size, tokens)
    last = bias[:, -block_size:]
    if causal:
        hidden = torch.ones_like(last, dtype=torch.bool).triu(1)
        last.masked_fill_(hidden, float("-inf"))
    else:
        last[:, keys % block_size :] = float("-inf")
    return bias


def _buckets(
    block_mask: Bool[Tensor, "batch heads query_blocks key_blocks"],
    key_heads: int,
    causal: bool,
    has_partial: bool,
) -> Iterator[_Bucket]:
    """Groups the rows by number of selected blocks; rows without any are left out.

    Exact counts rather than padded ones: at most as many groups as key blocks, and no work on
    padding.
    """
    batch, heads, query_blocks, key_blocks = block_mask.shape
    device = block_mask.device
    row = torch.arange(batch * heads * query_blocks, device=device)
    selected = block_mask.reshape(-1, key_blocks)
    counts = selected.sum(dim=-1)
    # The partly visible block is the largest column a row can select, so it always comes last in
    # its list.
    largest = row % query_blocks + key_blocks - query_blocks if causal else key_blocks - 1
    partial = selected[row, largest] if has_partial else torch.zeros_like(row, dtype=torch.bool)
    columns = selected.nonzero()[:, 1]
    first = counts.cumsum(0) - counts
    head = row // query_blocks
    key_head = head // heads * key_heads + head % heads // (heads // key_heads)
    kind, by_kind = (2 * counts + partial).sort(stable=True)
    kinds, sizes = kind.unique_consecutive(return_counts=True)
    for (count, is_partial), rows in zip(
        ((kind // 2, kind % 2) for kind in kinds.tolist()),
        by_kind.split(sizes.tolist()),
        strict=True,
    ):
        if count:
            listed = columns[first[rows, None] + torch.arange(count, device=device)]
            yield _Bucket(rows, listed + key_head[rows, None] * key_blocks, bool(is_partial))


def _chunks(
    bucket: _Bucket, key_blocks: Tensor, value_blocks: Tensor
) -> Iterator[tuple[Int[Tensor, " rows"], Int[Tensor, "rows count"]]]:
    """Cuts a bucket so that gathered keys and values stay within GATHERED_NUMBERS."""
    numbers = bucket.blocks.shape[1] * (key_blocks[0].numel() + value_blocks[0].numel())
    size = max(1, GATHERED_NUMBERS // numbers)
    return zip(bucket.rows.split(size), bucket.blocks.split(size), strict=True)


def _take(
    blocks: Float[Tensor, "blocks block_size dim"], index: Int[Tensor, "rows count"]
) -> Float[Tensor, "rows keys dim"]:
    """The listed blocks of each row, one after the other."""
    return blocks.index_select(0, index.flatten()).view(index.shape[0], -1, blocks.shape[-1])


# --- flex ---


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Tensor,
    block_size: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """torch's flex_attention, compiled, with a BlockMask built from the block indices."""
    if query.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise NotImplementedError(
                "flex_attention has no backward on CPU: use backend='gather', or torch.no_grad()"
            )
        # On CPU flex_attention refuses tensors that require gradients even under no_grad.
        query, key, value = query.detach(), key.detach(), value.detach()
    queries, keys = query.shape[2], key.shape[2]
    front = (keys - queries) % block_size if causal else 0
    query = F.pad(query, (0, 0, front, 0))
    mask = _flex_block_mask(block_mask, block_size, query.shape[2], keys, causal)
    try:
        output = _compiled_flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    except Exception as error:
        if "InvalidCxxCompiler" not in f"{type(error).__name__} {error}":
            raise
        raise RuntimeError(
            "backend='flex' needs a working C++ compiler on CPU; backend='gather' does not"
        ) from error
    return output[:, :, front:]


@functools.cache
def _compiled_flex():
    # Imported here: it pulls in the compiler, which no other backend needs.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex_block_mask(
    block_mask: Bool[Tensor, "batch heads query_blocks key_blocks"],
    block_size: int,
    queries: int,
    keys: int,
    causal: bool,
):
    """Torch's BlockMask: wholly visible blocks skip the token mask, the others apply it."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = block_mask.shape[-2:]
    if causal:
        inside = causal_block_mask(rows, columns, device=block_mask.device).tril(columns - rows - 1)
    else:
        inside = torch.ones(rows, columns, dtype=torch.bool, device=block_mask.device)
        inside[:, keys // block_size :] = False
    offset = keys - queries

    partial_count, partial_index = _listed(block_mask & ~inside)
    full_count, full_index = _listed(block_mask & inside)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=block_size,
        # A lambda: run-time type checks, as the tests set them on functions, cannot be compiled.
        mask_mod=lambda batch, head, query, key: query + offset >= key if causal else key < keys,
        seq_lengths=(queries, keys),
    )


def _listed(
    block_mask: Bool[Tensor, "batch heads query_blocks key_blocks"],
) -> tuple[
    Int[Tensor, "batch heads query_blocks"], Int[Tensor, "batch heads query_blocks key_blocks"]
]:
    """Number of selected blocks of each row, and the columns with the selected ones first."""
    columns = block_mask.int().argsort(dim=-1, descending=True, stable=True)
    return block_mask.sum(dim=-1).int(), columns.int()
