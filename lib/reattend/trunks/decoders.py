"""A decoder language model as a text encoder, with its causal mask or without."""

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
