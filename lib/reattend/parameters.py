"""A notebook's parameters: names, units, ranges and meanings, checked before anything runs.

Every notebook declares one subclass of `Parameters` in its cell tagged `schema`; params.yaml holds
the values of each profile. The command line runs that one cell to check values before it starts a
kernel, so a schema cell imports nothing but this module (and typing).
"""

from __future__ import annotations

import operator
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reattend.project import read_yaml

PROFILES = ("smoke", "cpu", "gpu")


class ParameterError(ValueError):
    """A wrong paper, profile, parameter name or value; its message is one line naming the cure."""


class Parameters(BaseModel):
    """Base of every notebook's parameter model: unknown names are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_kinds(cls, values: dict) -> dict:
        # pydantic would take true for 1 and "3" for 3.
        for name, field in cls.model_fields.items():
            kinds = _kinds(field.annotation)
            for leaf in _leaves(values.get(name)):
                if isinstance(leaf, bool | str) and type(leaf) not in kinds:
                    raise ValueError(f"parameter '{name}' = {leaf!r}: {describe(cls, name)}")
        return values

    @model_validator(mode="after")
    def _check_elements(self) -> Parameters:
        for name, field in type(self).model_fields.items():
            bounds = (field.json_schema_extra or {}).get("each", {})
            value = getattr(self, name)
            for element in value if isinstance(value, list | tuple) else ():
                _check_bounds(name, element, bounds)
        return self


def parameter(
    meaning: str,
    *,
    unit: str = "",
    ge_each: float | None = None,
    gt_each: float | None = None,
    le_each: float | None = None,
    lt_each: float | None = None,
    **bounds: Any,
) -> Any:
    """Declare one parameter.

    Args:
        meaning: what the value does, in words.
        unit: its unit ("tokens", "1" for a share, "" for a plain count).
        ge_each, gt_each, le_each, lt_each: bounds of every element of a list parameter.
        bounds: pydantic's bounds of the value itself (ge, gt, le, lt, min_length, max_length).
    """
    each = {"ge": ge_each, "gt": gt_each, "le": le_each, "lt": lt_each}
    each = {key: bound for key, bound in each.items() if bound is not None}
    extra = {"unit": unit, "each": each}
    return Field(description=meaning, json_schema_extra=extra, **bounds)


def _kinds(annotation: Any) -> set[type]:
    """The types of the numbers, texts and truth values that an annotation is made of."""
    if typing.get_origin(annotation) is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    inner = typing.get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}


def _leaves(value: Any) -> list:
    """The values in nested lists."""
    if isinstance(value, list | tuple):
        return [leaf for element in value for leaf in _leaves(element)]
    return [value]


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _check_bounds(name: str, value: float, bounds: dict[str, float]) -> None:
    for key, bound in bounds.items():
        if not getattr(operator, key)(value, bound):
            raise ValueError(
                f"parameter '{name}': every element must be {_SIGNS[key]} {bound:g}, got {value}"
            )


def load_params(root: Path) -> dict:
    """params.yaml of the checkout at `root`: its `profile`, and `papers` -> profile -> values.

    Raises:
        ParameterError: when it is missing or does not hold that. FileError: when it cannot be read.
    """
    try:
        loaded = read_yaml(root / "params.yaml")
    except FileNotFoundError:
        raise ParameterError(
            "no params.yaml in the project's root; restore it from git (params.yaml)"
        ) from None
    if not isinstance(loaded, dict) or not {"profile", "papers"} <= loaded.keys():
        raise ParameterError("params.yaml needs the keys 'profile' and 'papers'")
    if loaded["profile"] not in PROFILES:
        raise ParameterError(
            f"params.yaml: unknown profile {loaded['profile']!r}; there are: {', '.join(PROFILES)}"
        )
    if not isinstance(loaded["papers"], dict):
        raise ParameterError("params.yaml: 'papers' must map each paper to its profiles")
    for slug, profiles in loaded["papers"].items():
        _check_profiles(slug, profiles)
    return loaded


def _check_profiles(slug: object, profiles: object) -> None:
    if not isinstance(profiles, dict):
        raise ParameterError(f"params.yaml: '{slug}' must map profiles to values")
    for name, values in profiles.items():
        if name not in PROFILES:
            known = ", ".join(PROFILES)
            raise ParameterError(
                f"params.yaml: '{slug}' has a profile {name!r}; there are: {known}"
            )
        if not isinstance(values, dict | None):
            raise ParameterError(f"params.yaml: '{slug}', '{name}' must map names to values")
        if wrong := [key for key in values or {} if not isinstance(key, str)]:
            raise ParameterError(f"params.yaml: '{slug}', '{name}': {wrong[0]!r} is no name")


def profile_values(root: Path, slug: str, profile: str) -> dict[str, Any]:
    """The values params.yaml gives the paper `slug` at `profile`.

    Raises:
        ParameterError: for an unknown paper or profile; the message lists what exists.
    """
    papers = load_params(root)["papers"]
    if slug not in papers:
        known = ", ".join(sorted(map(str, papers))) or "none"
        raise ParameterError(f"unknown paper '{slug}'; params.yaml has: {known}")
    if profile not in PROFILES:
        raise ParameterError(f"unknown profile '{profile}'; there are: {', '.join(PROFILES)}")
    if profile not in papers[slug]:
        known = ", ".join(papers[slug]) or "none"
        raise ParameterError(f"'{slug}' has no profile '{profile}' in params.yaml; it has: {known}")
    return dict(papers[slug][profile] or {})


def resolve(
    model: type[Parameters], values: dict[str, Any], overrides: dict[str, Any] | None = None
) -> Parameters:
    """Check `values`, with `overrides` laid over them, against a notebook's parameter model.

    Raises:
        ParameterError: one line that names the parameter and what is allowed.
    """
    try:
        return model(**{**values, **(overrides or {})})
    except ValidationError as error:
        raise ParameterError(_one_line(model, error)) from None


def _one_line(model: type[Parameters], error: ValidationError) -> str:
    """The first problem of a pydantic report, in one line that names the cure."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        return f"unknown parameter '{name}'; this notebook has: {known}"
    if first["type"] == "missing":
        return f"params.yaml gives no value for the parameter '{name}' ({describe(model, name)})"
    if not name:
        return first["msg"].removeprefix("Value error, ")
    got = repr(first["input"])
    got = got if len(got) <= 60 else got[:57] + "..."
    return f"parameter '{name}' = {got}: {describe(model, name)}"


def describe(model: type[Parameters], name: str) -> str:
    """What is allowed for one parameter: type, bounds, unit and meaning, in words."""
    field = model.model_fields[name]
    extra = field.json_schema_extra or {}
    limits = [
        f"{_SIGNS[key]} {getattr(item, key)}"
        for item in field.metadata
        for key in _SIGNS
        if hasattr(item, key)
    ]
    limits += [
        f"{label} {getattr(item, key)}"
        for item in field.metadata
        for key, label in (("min_length", "at least"), ("max_length", "at most"))
        if hasattr(item, key)
    ]
    limits += [f"each {_SIGNS[key]} {bound}" for key, bound in extra.get("each", {}).items()]
    unit = f" in {extra['unit']}" if extra.get("unit") not in ("", None, "1") else ""
    bounds = f" ({', '.join(limits)})" if limits else ""
    return f"must be {_type_name(field.annotation)}{unit}{bounds}: {field.description}"


def _type_name(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in names:
        return names[annotation]
    if origin in (list, tuple):
        return f"a list of {_type_name(arguments[0]).removeprefix('a ')}s"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    return getattr(annotation, "__name__", str(annotation))
