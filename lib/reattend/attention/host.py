"""Puts an attention method into a Hugging Face causal language model.

Built on transformers' AttentionInterface and AttentionMaskInterface: the model's attention layers
call the method with queries, keys and values after the rotary embedding, with the cache joined and
the key heads not repeated.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from reattend.attention.method import AttentionMethod
from reattend.attention.registry import build_method

# Every attachment gets a name of its own, so that attachments can be nested and two models can be
# attached at once.
_numbers = itertools.count()

# What a layer may ask of its attention that no method can honour, with the values that ask for
# nothing.
_REFUSED = {
    "softcap": (None,),
    "s_aux": (None,),
    "position_bias": (None,),
    "output_attentions": (None, False),
}


@contextmanager
def attach(
    model: nn.Module | None, method: str | AttentionMethod, **settings
) -> Iterator[AttentionMethod]:
    """Runs `model` with an attention method inside the `with` block, its own one afterwards.

        with attach(model, "flexprefill", gamma=0.9) as method:
            model.generate(**prompt)
        print(method.density())

    Prompts (whole or in chunks behind a cache) go to `method.prefill` and `method.begin_decoding`,
    single new tokens to `method.decode`. Batches may be padded on either side: a padded sequence is
    computed as it would be alone. Layers with a sliding window keep the model's own attention and
    are not part of the method's record. Attachments may be nested; the innermost one counts.

    Args:
        model: a causal language model of transformers; None only builds the method, for use on
            plain tensors.
        method: a name of `reattend.attention.registry.METHODS` with `settings`, or a method that is
            built already.

    Raises:
        ValueError: unknown name, wrong value of a setting, or a model that cannot be attached to.
        TypeError: a setting that the method does not have, or settings beside a method that is
            built already.

    While attached, the model raises NotImplementedError where the method could not be exact: static
    caches, packed sequences and custom masks, soft-capped scores, attention sinks, attention
    dropout, returned attention weights.
    """
    method = _resolve(method, settings)
    if model is None:
        yield method
        return
    configs = _attention_configs(model)
    previous = [config._attn_implementation for config in configs]
    name = f"reattend_{next(_numbers)}"
    AttentionInterface.register(name, _attention_of(method))
    AttentionMaskInterface.register(name, _mask)
    try:
        for config in configs:
            config._attn_implementation = name
        yield method
    finally:
        for config, implementation in zip(configs, previous, strict=True):
            config._attn_implementation = implementation
        # transformers has no call that takes a registered name back.
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def _resolve(method: str | AttentionMethod, settings: dict) -> AttentionMethod:
    if isinstance(method, str):
        return build_method(method, **settings)
    if not isinstance(method, AttentionMethod):
        raise TypeError(f"method must be a name or an AttentionMethod, got {type(method).__name__}")
    if settings:
        raise TypeError(
            f"settings ({', '.join(settings)}) go with a method's name, "
            "not with a method built already"
        )
    return method


def _attention_configs(model: nn.Module) -> list:
    """The configurations that name the attention of the model's parts, each once."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"attach needs a transformers model, got {type(model).__name__}")
    if model.config.is_encoder_decoder or not getattr(model.config, "is_causal", True):
        raise ValueError(f"attach needs a causal language model, got {type(model).__name__}")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} does not use transformers' AttentionInterface")
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return list({id(part.config): part.config for part in parts}.values())


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    **settings,
) -> Tensor | None:
    """The mask that transformers builds once per forward pass and hands to every layer.

    Returns the padding, `[batch, keys]` with True for real tokens, or None without padding: methods
    see to causality themselves, and no mask of queries x keys is ever built. Anything but plain
    causal attention (a sliding window, packed sequences) gets transformers' own `[batch, 1,
    queries, keys]` mask.
    """
    if mask_function is not causal_mask_function:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            **settings,
        )
    if kv_offset or q_offset + q_length != kv_length:
        raise NotImplementedError(
            "attached methods need a cache that holds exactly the tokens seen so far "
            "(no static cache, no prefix)"
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return None if padding is None or bool(padding.all()) else padding


def _attention_of(method: AttentionMethod):
    """The attention function that a layer calls, in transformers' signature."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **settings,
    ) -> tuple[Tensor, None]:
        if settings.get("sliding_window") is not None or not getattr(module, "is_causal", True):
            return sdpa_attention_forward(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                **settings,
            )
        _refuse_what_no_method_honours(module, attention_mask, dropout, settings)
        call = {
            "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "layer": module.layer_idx,
            "padding": attention_mask,
        }
        if query.shape[2] == 1 and key.shape[2] > 1:
            output = method.decode(query, key, value, **call)
        else:
            output = method.prefill(query, key, value, **call)
            method.begin_decoding(query, key, **call)
        return output.transpose(1, 2).contiguous(), None

    return attend


def _refuse_what_no_method_honours(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, settings: dict
) -> None:
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"layer {module.layer_idx}: attached methods support causal attention with padding, "
            "not packed sequences or custom masks"
        )
    if dropout:
        raise NotImplementedError(
            f"layer {module.layer_idx}: attached methods have no attention dropout ({dropout}); "
            "call model.eval()"
        )
    asked = [name for name, neutral in _REFUSED.items() if settings.get(name) not in neutral]
    if asked:
        raise NotImplementedError(
            f"layer {module.layer_idx} asks for {', '.join(asked)}, "
            "which attached methods do not support"
        )
