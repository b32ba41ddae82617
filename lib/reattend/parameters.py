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

from reattend.project import load_yaml

PROFILES = ("smoke", "cpu", "gpu")


class ParameterError(ValueError):
    """A wrong paper, profile, parameter name or value; its message is one line naming the cure."""


class Parameters(BaseModel):
    """Base of every notebook's parameter model: unknown names are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _check_bounds(name: str, value: float, bounds: dict[str, float]) -> None:
    for key, bound in bounds.items():
        if not getattr(operator, key)(value, bound):
            raise ValueError(
                f"parameter '{name}': every element must be {_SIGNS[key]} {bound:g}, got {value}"
            )


def load_params(root: Path) -> dict:
    """params.yaml of the checkout at `root`, as a dictionary.

    Raises:
        ParameterError: when the file is missing or not a mapping with `profile` and `papers`.
    """
    path = root / "params.yaml"
    if not path.exists():
        raise ParameterError(
            f"no params.yaml in the project's root; restore it from git ({path.name})"
        )
    loaded = load_yaml(path.read_text(encoding="utf8"))
    if not isinstance(loaded, dict) or not {"profile", "papers"} <= loaded.keys():
        raise ParameterError("params.yaml needs the keys 'profile' and 'papers'")
    return loaded


def profile_values(root: Path, slug: str, profile: str) -> dict[str, Any]:
    """The values params.yaml gives the paper `slug` at `profile`.

    Raises:
        ParameterError: for an unknown paper or profile; the message lists what exists.
    """
    papers = load_params(root)["papers"]
    if slug not in papers:
        raise ParameterError(
            f"unknown paper '{slug}'; params.yaml has: {', '.join(sorted(papers))}"
        )
    if profile not in PROFILES:
        raise ParameterError(f"unknown profile '{profile}'; there are: {', '.join(PROFILES)}")
    if profile not in papers[slug]:
        known = ", ".join(papers[slug])
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
