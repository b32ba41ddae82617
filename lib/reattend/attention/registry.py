"""Names of the attention methods that can be attached to a model, and where each one lives.

Methods are named by "module:Class" and imported when asked for, so that attaching one method does
not import the others.
"""

import importlib
import inspect

from reattend.attention.method import AttentionMethod

METHODS = {
    "dense": "reattend.attention.method:AttentionMethod",
    "streaming_llm": "reattend.attention.baselines.streaming_llm:StreamingLLM",
    "vertical_slash": "reattend.attention.baselines.vertical_slash:VerticalSlash",
    "block_topk": "reattend.attention.baselines.block_topk:BlockTopK",
    "oracle_topk": "reattend.attention.baselines.block_topk:OracleTopK",
    "streaming_cache": "reattend.attention.baselines.cache_bounds:StreamingCache",
    "snapkv": "reattend.attention.baselines.snapkv:SnapKV",
    "ada_snapkv": "reattend.attention.baselines.snapkv:AdaSnapKV",
    "h2o": "reattend.attention.baselines.h2o:H2O",
    "quest": "reattend.attention.baselines.quest:Quest",
    "oracle_cache": "reattend.attention.baselines.cache_bounds:OracleCache",
    "flexprefill": "reattend.long_context.flexprefill:FlexPrefill",
    "vertical_slash_tokens": "reattend.long_context.sparse_frontier:VerticalSlashTokens",
    "flex_vertical_slash": "reattend.long_context.sparse_frontier:FlexVerticalSlash",
    "seer_attention": "reattend.long_context.seer_attention:SeerAttention",
    "recycled_attention": "reattend.long_context.recycled_attention:RecycledAttention",
    "act": "reattend.long_context.act:ACT",
}


def build_method(name: str, **settings) -> AttentionMethod:
    """Builds the method called `name` with its keyword settings.

    Raises:
        ValueError: the name is unknown, or a setting has a wrong value.
        TypeError: the method has no such setting.
    """
    if name not in METHODS:
        raise ValueError(f"unknown attention method {name!r}; known: {', '.join(sorted(METHODS))}")
    module, class_name = METHODS[name].split(":")
    method_class = getattr(importlib.import_module(module), class_name)
    known = inspect.signature(method_class).parameters
    wrong = sorted(set(settings) - set(known))
    if wrong:
        settings_known = ", ".join(known) or "none"
        raise TypeError(f"{name} has no setting {', '.join(wrong)}; it has: {settings_known}")
    return method_class(**settings)
