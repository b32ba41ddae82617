"""Block masks: which blocks of keys each block of queries attends to.

A block mask is a plain boolean tensor `[batch, heads, query_blocks, key_blocks]` next to a block
size b. Blocks are cut at absolute positions: key block j holds the keys [j b, (j + 1) b). Queries
are the last tokens of the sequence (all of it in a plain prefill, its tail in a chunked prefill)
and share that grid: a query at position p lies in block p // b. So the rows of a mask are the last
`query_block_count` rows of the square grid, and row i has its diagonal at column i + key_blocks -
query_blocks. The first row may hold fewer than b queries (chunked prefill), and so may the last.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.dense import widened


def block_count(length: int, block_size: int) -> int:
    """Number of blocks that hold `length` tokens, the last one possibly partial."""
    return -(-length // block_size)


def query_block_count(queries: int, keys: int, block_size: int) -> int:
    """Number of rows of a block mask: blocks that hold one of the last `queries` positions."""
    return block_count(keys, block_size) - (keys - queries) // block_size


def causal_block_mask(
    query_blocks: int, key_blocks: int, device: torch.device | str | None = None
) -> Bool[Tensor, "query_blocks key_blocks"]:
    """True on and below the causal diagonal, which ends in the last row and column."""
    return torch.ones(query_blocks, key_blocks, dtype=torch.bool, device=device).tril(
        key_blocks - query_blocks
    )


def pool_blocks(
    x: Float[Tensor, "*batch tokens dim"], block_size: int, *, offset: int = 0
) -> Float[Tensor, "*batch blocks dim"]:
    """Mean over the tokens of each block; partial blocks are averaged over their real tokens.

    Summed and returned in float32 at least.

    Args:
        offset: absolute position of the first token (`keys - queries` for the queries of a chunked
            prefill).
    """
    x = widened(x)
    tokens, front = x.shape[-2], offset % block_size
    blocks = block_count(front + tokens, block_size)
    padded = F.pad(x, (0, 0, front, blocks * block_size - front - tokens))
    real = F.pad(x.new_ones(tokens), (front, blocks * block_size - front - tokens))
    sums = padded.unflatten(-2, (blocks, block_size)).sum(dim=-2)
    return sums / real.view(blocks, block_size).sum(dim=-1, keepdim=True)


def forced_blocks(
    query_blocks: int,
    key_blocks: int,
    *,
    sink: int = 0,
    diagonal: bool = True,
    local: int = 0,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "query_blocks key_blocks"]:
    """The first `sink` columns, the diagonal block and the `local` blocks before it."""
    row = torch.arange(query_blocks, device=device)[:, None] + key_blocks - query_blocks
    column = torch.arange(key_blocks, device=device)[None, :]
    distance = row - column
    nearby = (distance >= (0 if diagonal else 1)) & (distance <= local)
    return ((column < sink) | nearby) & (distance >= 0)


def top_k_blocks(
    scores: Float[Tensor, "batch heads query_blocks key_blocks"],
    k: int | Int[Tensor, "#batch #heads #query_blocks"],
    *,
    sink: int = 0,
    diagonal: bool = True,
    local: int = 0,
) -> Bool[Tensor, "batch heads query_blocks key_blocks"]:
    """The k best causal blocks of each row.

    Forced blocks (see `forced_blocks`) count within the budget k and come first; when they alone
    exceed k they are all kept. A row with fewer than k causal blocks takes all of them. Ties go to
    the earlier block.

    Args:
        k: budget of each row, one number or one per (batch, head, row).
    """
    causal, forced = _causal_and_forced(scores, sink, diagonal, local)
    order = _ranking(scores, causal, forced)
    position = torch.arange(scores.shape[-1], device=scores.device)
    budget = torch.as_tensor(k, device=scores.device)[..., None]
    kept = (position < budget).expand(scores.shape)
    return (torch.zeros_like(kept).scatter(-1, order, kept) & causal) | forced


def cumulative_mass_blocks(
    scores: Float[Tensor, "batch heads query_blocks key_blocks"],
    mass: float,
    *,
    sink: int = 0,
    diagonal: bool = False,
    local: int = 0,
) -> Bool[Tensor, "batch heads query_blocks key_blocks"]:
    """The smallest set of causal blocks of each row whose softmax mass reaches `mass`.

    Forced blocks (see `forced_blocks`) are always in; their mass counts. `mass` >= 1 keeps every
    causal block.

    Args:
        scores: logits of the blocks. For blocks whose mass is known already, pass its logarithm.
    """
    causal, forced = _causal_and_forced(scores, sink, diagonal, local)
    if mass >= 1:
        return causal.expand(scores.shape).clone()
    # float64: the running sum over hundreds of blocks is compared with the threshold.
    share = scores.double().masked_fill(~causal, float("-inf")).softmax(dim=-1)
    order = _ranking(share, causal, forced)
    ranked = share.gather(-1, order)
    reached_before = ranked.cumsum(dim=-1) - ranked
    kept = reached_before < mass
    return (torch.zeros_like(kept).scatter(-1, order, kept) & causal) | forced


def diagonal_sums(weights: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch keys"]:
    """Sum along each diagonal: entry o sums the pairs whose key lies o tokens before the query.

    The last query stands at the last key. Pairs above the causal diagonal are not counted.
    """
    queries, keys = weights.shape[-2:]
    # Reading a row-major matrix of width w with rows of length w - 1 shifts row i to the right by
    # i, which turns diagonals into columns; flipping the keys first makes it the diagonals of
    # constant distance.
    width = keys + queries
    padded = F.pad(weights.flip(-1), (0, queries))
    skewed = padded.flatten(-2)[..., : queries * (width - 1)].unflatten(-1, (queries, width - 1))
    return skewed.sum(dim=-2)[..., queries - 1 :]


def union(*block_masks: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Blocks that any of the masks selects (shapes are broadcast).

    Raises:
        ValueError: no mask is given.
    """
    if not block_masks:
        raise ValueError("union needs at least one block mask")
    result = block_masks[0]
    for other in block_masks[1:]:
        result = result | other
    return result


def expand_to_tokens(
    block_mask: Bool[Tensor, "*batch query_blocks key_blocks"],
    block_size: int,
    queries: int,
    keys: int,
    *,
    causal: bool = True,
) -> Bool[Tensor, "*batch queries keys"]:
    """The token mask of a block mask, including the causality of tokens unless `causal` is False.

    Without causality queries and keys are two unrelated sequences, and both grids start at 0.
    """
    offset = keys - queries if causal else 0
    position = torch.arange(queries, device=block_mask.device) + offset
    row = position // block_size - offset // block_size
    key_position = torch.arange(keys, device=block_mask.device)
    tokens = block_mask[..., row, :][..., key_position // block_size]
    return tokens & (key_position <= position[:, None]) if causal else tokens


def causal_pairs(
    queries: int, keys: int, block_size: int
) -> Int[Tensor, "query_blocks key_blocks"]:
    """Number of causal (query, key) pairs inside each block."""
    offset = keys - queries
    position = torch.arange(queries) + offset
    start = torch.arange(block_count(keys, block_size)) * block_size
    seen = (position[:, None] - start + 1).clamp(0, block_size)
    rows = query_block_count(queries, keys, block_size)
    pairs = torch.zeros(rows, len(start), dtype=seen.dtype)
    return pairs.index_add(0, position // block_size - offset // block_size, seen)


def density(
    block_mask: Bool[Tensor, "*batch query_blocks key_blocks"],
    block_size: int | None = None,
    *,
    queries: int | None = None,
    keys: int | None = None,
) -> Float[Tensor, "*batch"]:
    """Selected share of the causal triangle, per head; blocks above the diagonal do not count.

    Counted in blocks, which is what a block kernel computes; with `block_size`, `queries` and
    `keys` in token pairs.

    Raises:
        ValueError: only some of `block_size`, `queries`, `keys` are given.
    """
    given = [block_size is not None, queries is not None, keys is not None]
    if any(given) and not all(given):
        raise ValueError("density in token pairs needs block_size, queries and keys together")
    causal = causal_block_mask(*block_mask.shape[-2:], device=block_mask.device)
    selected = block_mask & causal
    if not all(given):
        return selected.sum(dim=(-2, -1)) / causal.sum()
    # float64 keeps pair counts exact up to 2**53.
    pairs = causal_pairs(queries, keys, block_size).to(block_mask.device).double()
    return ((selected * pairs).sum(dim=(-2, -1)) / pairs.sum()).float()


def _causal_and_forced(
    scores: Tensor, sink: int, diagonal: bool, local: int
) -> tuple[Bool[Tensor, "query_blocks key_blocks"], Bool[Tensor, "query_blocks key_blocks"]]:
    rows, columns = scores.shape[-2:]
    causal = causal_block_mask(rows, columns, device=scores.device)
    forced = forced_blocks(
        rows, columns, sink=sink, diagonal=diagonal, local=local, device=scores.device
    )
    return causal, forced


def _ranking(
    scores: Float[Tensor, "batch heads query_blocks key_blocks"],
    causal: Bool[Tensor, "query_blocks key_blocks"],
    forced: Bool[Tensor, "query_blocks key_blocks"],
) -> Int[Tensor, "batch heads query_blocks key_blocks"]:
    """Columns of each row, best first: forced blocks, then by score, the future last."""
    ranked = scores.masked_fill(~causal, float("-inf")).masked_fill(forced, float("inf"))
    return ranked.sort(dim=-1, descending=True, stable=True).indices
