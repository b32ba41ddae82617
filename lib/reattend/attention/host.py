"""Puts an attention method into a Hugging Face causal language model.

Built on transformers' AttentionInterface and AttentionMaskInterface: the model's attention layers
call the method with queries, keys and values after the rotary embedding, with the cache joined and
the key heads not repeated.

A configuration says which attention its modules call, and models may share one configuration. So
the modules of an attached model get stand-ins of their configurations, which differ in that one
answer and in nothing else; other models, and copies of this one, never see them.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from reattend.attention.method import AttentionMethod, CacheView, Phase
from reattend.attention.registry import build_method

# Under this name transformers finds the attention of attached modules.
_NAME = "reattend"

# What a layer may ask of its attention that no method, and not the fused kernel of layers with a
# sliding window either, can honour, with the values that ask for nothing.
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
    computed as it would be alone. What a method remembers belongs to one cache: any number of
    caches may be read in turn, copied, reordered (beam search) or cut (assisted decoding). Layers
    with a sliding window keep the model's own attention and are not part of the method's record.

    Attachments may be nested and closed in any order; the last one opened counts. Other models are
    never touched, nor copies made of this one.

    Args:
        model: a causal language model of transformers; None only builds the method, for use on
            plain tensors.
        method: a name of `reattend.attention.registry.METHODS` with `settings`, or a method that is
            built already. `reattend.attention.kv_selection.Combined` takes one for the prompt and
            another for the new tokens.

    Raises:
        ValueError: unknown name, wrong value of a setting, or a model that cannot be attached to.
        TypeError: a setting that the method does not have or lacks, or settings beside a method
            that is built already.
        NotImplementedError: the configuration asks for attention weights.

    Warns:
        UserWarning: at the end, where every prompt was too short for the settings to save anything.

    While attached, the model raises NotImplementedError where the method could not be exact: static
    caches, packed sequences and custom masks, soft-capped scores, attention sinks, attention
    dropout, returned attention weights, re-entrant gradient checkpointing, and a sliding window in
    every layer. A method raises ValueError for a cache that has changed in a way it cannot follow.
    """
    method = _resolve(method, settings)
    if model is None:
        yield method
        return
    _check_model(model)
    method.prepare(model)
    attachment = _Attachment(model, method)
    attachment.open()
    try:
        yield method
    finally:
        attachment.close()
    attachment.warn_of_short_prompts()


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


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"attach needs a transformers model, got {type(model).__name__}")
    if model.config.is_encoder_decoder or not getattr(model.config, "is_causal", True):
        raise ValueError(f"attach needs a causal language model, got {type(model).__name__}")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} does not use transformers' AttentionInterface")
    if model.config.output_attentions:
        # Only here: transformers itself refuses to set it on an attached model.
        raise NotImplementedError(
            "config.output_attentions is set, but attached methods return no attention weights"
        )


class _Attachment:
    """One method in one model, from `open` to `close`."""

    def __init__(self, model: PreTrainedModel, method: AttentionMethod) -> None:
        self.model, self.method = model, method
        self.modules = [module for module in model.modules() if _configuration(module) is not None]
        self.last_layer = max(
            (module.layer_idx for module in self.modules if _is_attention(module)), default=None
        )
        # The cache behind the call that is under way, as its layer's forward hook has seen it.
        self.view: CacheView | None = None
        self.was_called = False
        self.longest_prompt = 0

    def open(self) -> None:
        if not _OPEN:
            AttentionInterface.register(_NAME, _attend)
            AttentionMaskInterface.register(_NAME, _mask)
        for module in self.modules:
            if module not in _OPEN:
                _OPEN[module] = _Attached(module)
            _OPEN[module].attachments.append(self)

    def close(self) -> None:
        for module in self.modules:
            attached = _OPEN[module]
            attached.attachments.remove(self)
            if not attached.attachments:
                attached.restore(module)
                del _OPEN[module]
        if not _OPEN:
            # transformers has no call that takes a registered name back.
            AttentionInterface._global_mapping.pop(_NAME)
            AttentionMaskInterface._global_mapping.pop(_NAME)

    def recomputes_reentrantly(self) -> bool:
        """Whether a layer would run a second time, in the backward pass, behind our back."""
        return any(
            module._gradient_checkpointing_func.keywords.get("use_reentrant", True)
            for module in self.model.modules()
            if getattr(module, "gradient_checkpointing", False)
            and isinstance(getattr(module, "_gradient_checkpointing_func", None), functools.partial)
        )

    def warn_of_short_prompts(self) -> None:
        phases: tuple[Phase, ...] = ("prefill", "decode")
        for phase in phases:
            enough = self.method.saves_from(phase)
            if enough is None or not 0 < self.longest_prompt < enough:
                continue
            if self.method.has_recorded(phase) and self.method.density(phase) == 1.0:
                warnings.warn(
                    f"{type(self.method).__name__} left nothing out in {phase} (density 1.0): with "
                    f"these settings a prompt needs at least {enough} tokens, the longest one had "
                    f"{self.longest_prompt}",
                    stacklevel=4,
                )


class _Attached:
    """A module with its stand-in configuration, and the attachments that it is part of."""

    def __init__(self, module: nn.Module) -> None:
        self.attachments: list[_Attachment] = []
        self.configuration = module.config
        module.config = _stand_in(module.config)
        self.hook = None
        if hasattr(module, "layer_idx"):
            self.hook = module.register_forward_pre_hook(_see_cache, with_kwargs=True)

    def restore(self, module: nn.Module) -> None:
        module.config = self.configuration
        if self.hook is not None:
            self.hook.remove()


# The modules of all attached models.
_OPEN: WeakKeyDictionary[nn.Module, _Attached] = WeakKeyDictionary()

# By the identity of the attributes, which live as long as the stand-in that shares them.
_STAND_INS: WeakValueDictionary[int, PreTrainedConfig] = WeakValueDictionary()


def _configuration(module: nn.Module) -> PreTrainedConfig | None:
    config = module.__dict__.get("config")
    return config if isinstance(config, PreTrainedConfig) else None


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "is_causal") and isinstance(getattr(module, "layer_idx", None), int)


def _stand_in(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration that shares every attribute with `config` but names the attached method.

    One for each configuration, so that modules which share theirs still do.
    """
    attributes = config.__dict__
    stand_in = _STAND_INS.get(id(attributes))
    if stand_in is None:
        stand_in = object.__new__(_stand_in_class(type(config)))
        stand_in.__dict__ = attributes
        _STAND_INS[id(attributes)] = stand_in
    return stand_in


@functools.cache
def _stand_in_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    if hasattr(base, "_stands_in_for"):
        return base

    def read(self, name: str):
        value = base.__getattribute__(self, name)
        # The parts of a model with several configurations are reached through their owner too.
        return _stand_in(value) if isinstance(value, PreTrainedConfig) else value

    def reduce(self, protocol: int):
        # A copy, also one by pickle, is of the plain configuration.
        return _plain_configuration, (base, self.__dict__)

    body = {
        "_stands_in_for": base,
        "_attn_implementation": property(
            lambda self: _NAME, lambda self, value: base._attn_implementation.__set__(self, value)
        ),
        "__reduce_ex__": reduce,
    }
    if base.sub_configs:  # else it would only slow down every look at a setting
        body["__getattribute__"] = read
    return type(base.__name__, (base,), body)


def _plain_configuration(base: type[PreTrainedConfig], attributes: dict) -> PreTrainedConfig:
    config = object.__new__(base)
    config.__dict__.update(attributes)
    return config


def _see_cache(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward hook of a layer: notes the cache, and its keys, before the layer adds its own.

    The innermost module with a number is the last to run before the attention itself.
    """
    attached = _OPEN.get(module)
    if attached is None:  # a copy of an attached model, which took the hook along
        return
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    view = None
    if cache is not None:
        layers, number = cache.layers, module.layer_idx
        before = getattr(layers[number], "keys", None) if number < len(layers) else None
        view = CacheView(cache, before)
    attached.attachments[-1].view = view


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


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings,
) -> tuple[Tensor, None]:
    """The attention function that a layer calls, in transformers' signature."""
    attachment = _OPEN[module].attachments[-1]
    view, attachment.view = attachment.view, None
    _refuse_what_nobody_honours(module, settings)
    if settings.get("sliding_window") is not None or not getattr(module, "is_causal", True):
        if module.layer_idx == attachment.last_layer and not attachment.was_called:
            raise NotImplementedError(
                f"every layer of this model has a sliding window ({settings['sliding_window']} "
                "tokens), so an attached method would do nothing; for full attention set "
                "config.sliding_window = None before the model is built"
            )
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
    _refuse_what_no_method_honours(module, attention_mask, dropout, attachment)
    attachment.was_called, method = True, attachment.method
    call = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "layer": module.layer_idx,
        "padding": attention_mask,
    }
    if query.shape[2] == 1 and key.shape[2] > 1:
        output = method.decode(query, key, value, **call, cache=view)
    else:
        attachment.longest_prompt = max(attachment.longest_prompt, key.shape[2])
        output = method.prefill(query, key, value, **call)
        if view is not None:  # without a cache nothing will be decoded
            method.begin_decoding(query, key, **call, cache=view)
    return output.transpose(1, 2).contiguous(), None


def _refuse_what_nobody_honours(module: nn.Module, settings: dict) -> None:
    asked = [name for name, neutral in _REFUSED.items() if settings.get(name) not in neutral]
    if asked:
        raise NotImplementedError(
            f"layer {module.layer_idx} asks for {', '.join(asked)}, "
            "which attached methods do not support"
        )


def _refuse_what_no_method_honours(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, attachment: _Attachment
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
    if module.training and attachment.recomputes_reentrantly():
        raise NotImplementedError(
            f"layer {module.layer_idx}: re-entrant gradient checkpointing would compute the layer a "
            "second time outside the attachment; call model.gradient_checkpointing_enable("
            'gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
