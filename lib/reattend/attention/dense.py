"""Dense attention: the reference that every method is held against, and the fused kernel.

`dense_attention` uses plain tensor operations only: it is the ground truth, so it has to be
readable rather than fast.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def causal_token_mask(
    queries: int, keys: int, device: torch.device | str | None = None
) -> Bool[Tensor, "queries keys"]:
    """True where a query may see a key; the last query stands at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def repeat_key_heads(
    x: Float[Tensor, "batch key_heads keys dim"], query_heads: int
) -> Float[Tensor, "batch query_heads keys dim"]:
    """Repeats each key head for the group of query heads that share it.

    Raises:
        ValueError: `query_heads` is no multiple of the number of key heads.
    """
    key_heads = x.shape[1]
    if query_heads % key_heads:
        raise ValueError(f"{query_heads} query heads cannot share {key_heads} key heads evenly")
    return x.repeat_interleave(query_heads // key_heads, dim=1)


def widened(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The same numbers in float32 at least.

    Scores and sums of half precision are taken in it: an unscaled score can lie beyond the largest
    float16, and a running sum in bfloat16 stops growing at 256 times its terms.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dense_attention(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    *,
    mask: Bool[Tensor, "#batch #query_heads #queries #keys"] | None = None,
    bias: Float[Tensor, "#batch #query_heads #queries #keys"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    return_weights: bool = False,
) -> (
    Float[Tensor, "batch query_heads queries value_dim"]
    | tuple[
        Float[Tensor, "batch query_heads queries value_dim"],
        Float[Tensor, "batch query_heads queries keys"],
    ]
):
    """Softmax attention, softmax(scale * Q K^T + bias) V, with grouped-query heads.

    Args:
        mask: True = attend. Combined with `causal` by "and".
        bias: added to the scaled scores.
        scale: factor on the scores; 1 / sqrt(dim) when None.
        causal: each query sees the keys up to its own position; the last query stands at the last
            key, so with fewer queries than keys (decoding with a cache) query i stands at position
            i + keys - queries.
        return_weights: also return the attention weights.

    Returns:
        The output, or (output, weights). The weights are in float32 at least, like everything
        before the output. A query without any allowed key gets zeros, in the output, in its weights
        and in the gradients.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = repeat_key_heads(key, query.shape[1])
    value = repeat_key_heads(value, query.shape[1])
    scores = scale * (widened(query) @ widened(key).transpose(-2, -1))
    if bias is not None:
        scores = scores + bias
    weights = masked_softmax(scores, _allowed(scores, mask, causal))
    output = (weights @ widened(value)).to(value.dtype)
    return (output, weights) if return_weights else output


def masked_softmax(
    scores: Float[Tensor, "*batch keys"], allowed: Bool[Tensor, "*#batch #keys"] | None
) -> Float[Tensor, "*batch keys"]:
    """Softmax over the allowed entries of the last axis; rows without any become zeros."""
    if allowed is None:
        return scores.softmax(dim=-1)
    # The lowest finite number instead of -inf keeps NaN out of rows without any allowed entry, also
    # inside the backward pass.
    filled = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return filled.softmax(dim=-1).masked_fill(~allowed, 0.0)


def _allowed(
    scores: Float[Tensor, "batch query_heads queries keys"], mask: Tensor | None, causal: bool
) -> Bool[Tensor, "#batch #query_heads #queries #keys"] | None:
    """The mask and causality as one boolean tensor, or None when everything is allowed."""
    if not causal:
        return mask
    triangle = causal_token_mask(*scores.shape[-2:], device=scores.device)[None, None]
    return triangle if mask is None else mask & triangle


def causal_sdpa(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """Dense causal attention by torch's fused kernel, the last query standing at the last key."""
    batch, query_heads, queries = query.shape[:3]
    keys = key.shape[2]
    if query.is_cuda and queries > 1:
        # The fused kernel for float32 knows no grouped heads; torch would hold every score instead.
        key, value = (repeat_key_heads(x, query_heads) for x in (key, value))
    if queries == keys:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
    if queries == 1:
        # A single query sees every key, so the query heads that share a key head can stand in for
        # queries of that head.
        grouped = query.reshape(batch, key.shape[1], -1, query.shape[-1])
        output = F.scaled_dot_product_attention(grouped, key, value, scale=scale)
        return output.reshape(batch, query_heads, 1, value.shape[-1])
    # torch's is_causal aligns the first query with the first key, so a chunk behind a cache needs
    # its mask.
    mask = causal_token_mask(queries, keys, device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )


def masked_sdpa(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    mask: Bool[Tensor, "batch query_heads queries keys"],
    *,
    scale: float,
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """Attention under a token mask by torch's fused kernel, which never holds the scores.

    That kernel, on CUDA, knows no grouped heads and turns the mask into numbers: those of one
    sequence at a time. Queries without any allowed key get zeros.
    """
    key, value = (repeat_key_heads(x, query.shape[1]) for x in (key, value))
    outputs = []
    for q, k, v, allowed in zip(*(x.split(1) for x in (query, key, value, mask)), strict=True):
        empty = ~allowed.any(dim=-1, keepdim=True)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | empty, scale=scale)
        outputs.append(output.masked_fill(empty, 0.0))
    return torch.cat(outputs)
