"""The record of a paper: citation, reported numbers, and claims with margins fixed beforehand.

One YAML file per paper, `notebooks/<family>/<slug>.yaml`. A record says, before any number is seen,
how each claim is tested here and which effect counts as reproduced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reattend.project import load_yaml

FAMILIES = (
    "long_context",
    "language_modeling",
    "vision",
    "vision_language",
    "multimodal_llm",
    "text_matching",
    "generation",
    "recommendation",
    "speech",
    "theory",
)


class RecordError(ValueError):
    """A record that cannot be used; the message names the file and the field."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Text = Annotated[str, Field(min_length=1)]
Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Test(_Strict):
    """One measured effect of a claim and its margins.

    With `better: higher` the effect's interval is held against `reproduced` (wholly at or above it)
    and `not_reproduced` (wholly below it); `lower` mirrors this. `equal` uses `margin`: reproduced
    within +-margin, not reproduced wholly outside.
    """

    __test__ = False  # pytest: not a test class
    id: Identifier
    measures: Text
    better: Literal["higher", "lower", "equal"]
    reproduced: float | None = None
    not_reproduced: float | None = None
    margin: Annotated[float, Field(ge=0)] | None = None
    decisive: bool = False  # if this is not reproduced, the claim is not reproduced
    exact: bool = False  # a deterministic number: n = 1 decides
    timing: bool = False  # seconds or their ratio: numbers go to run.json
    control: bool = False  # must fail, or the experiment cannot tell

    @model_validator(mode="after")
    def _margins_make_sense(self) -> Test:
        if self.better == "equal":
            if (
                self.margin is None
                or self.reproduced is not None
                or self.not_reproduced is not None
            ):
                raise ValueError("'better: equal' takes 'margin' alone")
            return self
        if self.margin is not None:
            raise ValueError("'margin' belongs to 'better: equal'")
        if self.reproduced is None:
            raise ValueError("'reproduced' is missing")
        worst = self.reproduced if self.not_reproduced is None else self.not_reproduced
        ordered = worst <= self.reproduced if self.better == "higher" else worst >= self.reproduced
        if not ordered:
            raise ValueError(
                f"margins overlap: with 'better: {self.better}' not_reproduced ({worst:g}) must not "
                f"be better than reproduced ({self.reproduced:g})"
            )
        if self.exact and self.timing:
            raise ValueError("a timing is never exact")
        return self


class Claim(_Strict):
    """What a paper says, where, and how that is tested here, or why it cannot be."""

    id: Identifier
    says: Text
    where: Text
    reported: Text
    tests: list[Test] = []
    out_of_reach: Text | None = None

    @model_validator(mode="after")
    def _tested_or_out_of_reach(self) -> Claim:
        if bool(self.tests) == (self.out_of_reach is not None):
            raise ValueError("needs either 'tests' or 'out_of_reach', and not both")
        names = [test.id for test in self.tests]
        if len(set(names)) < len(names):
            raise ValueError("two tests have the same id")
        if self.tests and all(test.control for test in self.tests):
            raise ValueError("a claim needs a test that is not a control")
        return self


class ReportedTable(_Strict):
    """Numbers of the paper, as data."""

    source: Text
    columns: list[str]
    rows: list[list[Any]]

    @model_validator(mode="after")
    def _rectangular(self) -> ReportedTable:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row} has {len(row)} cells for {len(self.columns)} columns")
        return self


class Needs(_Strict):
    """Assets and backbones a notebook uses."""

    assets: list[str] = []
    backbones: list[str] = []


class Budget(_Strict):
    """Seconds one notebook may take in each profile."""

    smoke: Annotated[float, Field(gt=0)] = 20
    cpu: Annotated[float, Field(gt=0)] = 120
    gpu: Annotated[float, Field(gt=0)] = 900


class Record(_Strict):
    """One paper."""

    slug: Identifier
    family: Literal[FAMILIES]
    title: Text
    authors: Text
    year: Annotated[int, Field(ge=2014, le=2100)]
    venue: Text
    arxiv: Text | None = None
    code: Text | None = None
    question: Text
    stands_on: Text
    needs: Needs = Needs()
    budget_seconds: Budget = Budget()
    reported: dict[Identifier, ReportedTable] = {}
    claims: Annotated[list[Claim], Field(min_length=1)]
    deviations: list[Text] = []
    # For `reattend compare`: metric -> relative difference allowed, where it is not the default.
    tolerances: dict[Text, Annotated[float, Field(gt=0)]] = {}

    @model_validator(mode="after")
    def _distinct_claims(self) -> Record:
        names = [claim.id for claim in self.claims]
        if len(set(names)) < len(names):
            raise ValueError("two claims have the same id")
        return self

    def claim(self, name: str) -> Claim:
        """The claim `name`; KeyError lists the known ones."""
        for claim in self.claims:
            if claim.id == name:
                return claim
        known = ", ".join(claim.id for claim in self.claims)
        raise KeyError(f"the record of '{self.slug}' has no claim '{name}'; it has: {known}")

    @property
    def citation(self) -> str:
        """Short citation in Markdown."""
        link = f" [arXiv:{self.arxiv}](https://arxiv.org/abs/{self.arxiv})." if self.arxiv else ""
        return f"{self.authors} ({self.year}). *{self.title}*. {self.venue}.{link}"


def load_record(path: Path) -> Record:
    """Read and check one record.

    Raises:
        RecordError: names the file and the first wrong field.
    """
    try:
        loaded = load_yaml(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise RecordError(f"no record {path.name} beside the notebook") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise RecordError(f"{path.name}, line {line}: not valid YAML") from None
    if not isinstance(loaded, dict):
        raise RecordError(f"{path.name}: must be a mapping of fields")
    try:
        record = Record(**loaded)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(_named(loaded, first["loc"])) or "record"
        message = first["msg"].removeprefix("Value error, ")
        raise RecordError(f"{path.name}: {field}: {message}") from None
    if (record.slug, record.family) != (path.stem, path.parent.name):
        raise RecordError(
            f"{path.name}: slug and family ({record.family}/{record.slug}) must be those of the "
            f"file ({path.parent.name}/{path.stem})"
        )
    return record


def _named(loaded: Any, location: tuple) -> list[str]:
    """A pydantic location with list positions replaced by the ids of the things there."""
    names = []
    for step in location:
        try:
            loaded = loaded[step]
        except (KeyError, IndexError, TypeError):
            loaded = None
        has_id = isinstance(step, int) and isinstance(loaded, dict) and "id" in loaded
        names.append(str(loaded["id"]) if has_id else str(step))
    return names


def record_paths(root: Path) -> dict[str, Path]:
    """Records of all papers of the checkout at `root`: slug -> file, by family and name."""
    return {path.stem: path for path in sorted((root / "notebooks").glob("*/*.yaml"))}
