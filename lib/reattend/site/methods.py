"""What the page of methods says: every method that attaches to a language model."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

from reattend.attention.method import AttentionMethod
from reattend.attention.registry import METHODS


@dataclass(frozen=True)
class Method:
    """One attachable method: what it is, its settings with their defaults, and what it acts on."""

    name: str
    about: str
    settings: tuple[tuple[str, str], ...]
    phases: tuple[str, ...]
    module: str


def methods() -> list[Method]:
    """All methods of the registry, in its order."""
    return [_method(name, *place.split(":")) for name, place in METHODS.items()]


def _method(name: str, module: str, class_name: str) -> Method:
    kind = getattr(importlib.import_module(module), class_name)
    hooks = {"prompt": "prefill", "new tokens": "decode"}
    phases = (
        p for p, hook in hooks.items() if getattr(kind, hook) is not getattr(AttentionMethod, hook)
    )
    about = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    parameters = inspect.signature(kind).parameters.values()
    settings = tuple((p.name, _default(p)) for p in parameters)
    return Method(name, about, settings, tuple(phases), module)


def _default(parameter: inspect.Parameter) -> str:
    required = parameter.default is inspect.Parameter.empty
    return "required" if required else repr(parameter.default)
