"""A decoder language model as a text encoder, with its causal mask or without, and pooling of states."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel


def attention_bias(
    mask: Bool[Tensor, "texts length"], *, causal: bool, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "texts 1 length length"]:
    """What is added to attention scores: 0 where a token may look, the least number elsewhere.

    Padding is never looked at; but each token may look at itself, so that no row is empty.

    Args:
        mask: True on real tokens; padding on either side.
        causal: whether tokens behind are hidden too.
    """
    length = mask.shape[1]
    seen = mask[:, None, :].expand(-1, length, -1)
    if causal:
        seen = seen.tril()
    seen = seen | torch.eye(length, dtype=torch.bool, device=mask.device)
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )[:, None]


def decoder_states(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts length"],
    mask: Bool[Tensor, "texts length"],
    *,
    causal: bool,
) -> Float[Tensor, "texts length width"]:
    """Last hidden states of a Hugging Face decoder without its head (`LlamaModel`, `Qwen2Model`).

    Positions count real tokens only, so that padding on the left changes nothing. A mask of four
    dimensions is handed over, which such models use as it is; without one they would fall back on
    their own causal mask.
    """
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    bias = attention_bias(mask, causal=causal, dtype=model.dtype)
    found = model(
        input_ids=ids,
        attention_mask=bias,
        position_ids=positions,
        use_cache=False,
        return_dict=True,
    )
    return found.last_hidden_state


def pool_tokens(
    states: Float[Tensor, "texts length width"],
    mask: Bool[Tensor, "texts length"],
    how: str,
) -> Float[Tensor, "texts width"]:
    """One vector for each text, from its real tokens alone: their "max" or "mean", or the "last".

    "last" is for a causal model: the state of the last real token, which has seen the others.

    Raises:
        ValueError: for a text without a real token, or an unknown way to pool.
    """
    if not mask.any(1).all():
        raise ValueError("a text without any real token cannot be pooled")
    if how == "max":
        return states.masked_fill(~mask[..., None], -torch.inf).amax(1)
    if how == "mean":
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)
    if how == "last":
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        last = places.masked_fill(~mask, -1).amax(1)
        return states[torch.arange(len(states), device=states.device), last]
    raise ValueError(f"unknown pooling '{how}'; there are: max, mean, last")
