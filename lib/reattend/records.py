"""The record of a paper: citation, reported numbers, and claims with margins fixed beforehand.

One YAML file per paper, `notebooks/<family>/<slug>.yaml`. A record says, before any number is seen,
how each claim is tested here and which effect counts as reproduced. How verdicts follow from it is in
`reattend.evidence`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reattend.project import read_yaml

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
Finite = Annotated[float, Field(allow_inf_nan=False)]


Unit = Literal["seed", "item", "seed x item", "round", "exact"]
Statistic = Literal[
    "mean",
    "share",
    "mean_correlation",
    "share_difference",
    "unpaired_difference",
    "median",
    "ratio_of_sums",
    "difference_of_ratios",
    "pearson",
    "spearman",
    "least_of_means",
]


class Test(_Strict):
    """One measured effect of a claim: its unit, its role, its margins.

    A `test` decides, a `control` must fail, a `gate` must hold. With `better: higher` the effect's
    interval is held against `reproduced`, the bound that the claim has to clear, and `negligible`, the
    effect below which it would not matter (or `not_reproduced`, where the paper gives two bounds);
    `lower` mirrors this. `equal` uses `margin`: reproduced within +-margin, not reproduced wholly
    outside. Rounds of timing have outliers: where the unit is one, the median is taken unless `statistic`
    says otherwise. `runs` counts the runs that have asked a test, where earlier ones left it open: an answer
    that is asked for until it comes is worth less.
    """

    __test__ = False  # pytest: not a test class
    id: Identifier
    measures: Text
    better: Literal["higher", "lower", "equal"]
    unit: Unit
    role: Literal["test", "control", "gate"] = "test"
    statistic: Statistic = "mean"
    reproduced: Finite | None = None
    negligible: Finite | None = None
    not_reproduced: Finite | None = None
    margin: Annotated[Finite, Field(ge=0)] | None = None
    decisive: bool = False  # if this is not reproduced, the claim is not reproduced
    runs: Annotated[int, Field(ge=1, le=5)] = 1

    @model_validator(mode="before")
    @classmethod
    def _times_by_medians(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("unit") == "round":
            return {"statistic": "median"} | given
        return given

    @model_validator(mode="after")
    def _margins_make_sense(self) -> Test:
        if self.better == "equal":
            bounds = (self.reproduced, self.negligible, self.not_reproduced)
            if self.margin is None or any(bound is not None for bound in bounds):
                raise ValueError("'better: equal' takes 'margin' alone")
            return self
        if self.margin is not None:
            raise ValueError("'margin' belongs to 'better: equal'")
        if self.reproduced is None:
            what = "a gate needs a margin: " if self.role == "gate" else ""
            raise ValueError(f"{what}'reproduced' is missing")
        sign = 1 if self.better == "higher" else -1
        if self.not_reproduced is not None and sign * self.not_reproduced > sign * self.reproduced:
            raise ValueError(
                f"margins overlap: with 'better: {self.better}' not_reproduced ({self.not_reproduced:g}) "
                f"must not be better than reproduced ({self.reproduced:g})"
            )
        if self.role != "gate" and self.unit != "exact" and not self._can_lose:
            raise ValueError(
                "no way to lose: without 'negligible' (the effect below which it would not matter) "
                "a null effect stays open at any number of points"
            )
        return self

    @model_validator(mode="after")
    def _unit_fits(self) -> Test:
        if self.statistic != "mean" and self.unit in ("exact", "seed x item"):
            raise ValueError(f"unit '{self.unit}' takes no statistic but the mean")
        if self.decisive and self.role != "test":
            raise ValueError(f"a {self.role} is not decisive")
        if self.runs > 1 and self.role != "test":
            raise ValueError(
                f"'runs' belongs to tests: a setting may be changed until its {self.role} holds"
            )
        return self

    @property
    def _can_lose(self) -> bool:
        """Whether a null effect can be shown to be one, given points enough."""
        sign = 1 if self.better == "higher" else -1
        if self.negligible is not None:
            return sign * self.negligible > 0 or self.negligible != self.reproduced
        if self.not_reproduced is not None:
            return self.not_reproduced != 0 or self.reproduced != 0
        return sign * self.reproduced < 0  # non-inferiority


class Growth(_Strict):
    """How evidence may grow until it decides: a parameter of params.yaml and its values, look by look."""

    parameter: Identifier
    unit: Literal["seed", "item"]
    looks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=5)]

    @model_validator(mode="after")
    def _looks_grow(self) -> Growth:
        if any(after <= before for before, after in pairwise(self.looks)):
            raise ValueError("each look must be larger than the one before")
        return self


class Claim(_Strict):
    """What a paper says, where, and how that is tested here, or why it cannot be.

    `about` says what would be drawn anew if the experiment were repeated: `training` (seeds),
    `backbone` (items read by one frozen model) or `operator` (identities, counts, times).
    """

    id: Identifier
    says: Text
    where: Text
    reported: Text
    about: Literal["training", "backbone", "operator"] | None = None
    placebo: Text | None = None  # the test that has the idea removed, or "none: why none can be"
    tests: list[Test] = []
    out_of_reach: Text | None = None

    @model_validator(mode="after")
    def _tested_or_out_of_reach(self) -> Claim:
        if bool(self.tests) == (self.out_of_reach is not None):
            raise ValueError("needs either 'tests' or 'out_of_reach', and not both")
        names = [test.id for test in self.tests]
        if len(set(names)) < len(names):
            raise ValueError("two tests have the same id")
        if self.tests and all(test.role != "test" for test in self.tests):
            raise ValueError("a claim needs a test that is neither a control nor a gate")
        if self.tests and self.about is None:
            raise ValueError("'about' is missing: training, backbone or operator")
        return self

    @model_validator(mode="after")
    def _units_fit(self) -> Claim:
        for test in self.tests:
            if self.about == "training" and test.unit == "item" and test.role != "gate":
                raise ValueError(
                    f"test '{test.id}': a claim about training has seeds as units; items of one trained "
                    "model are one point"
                )
        return self

    @model_validator(mode="after")
    def _placebo_is_named(self) -> Claim:
        if self.placebo is None:
            if self.about in ("training", "backbone"):
                raise ValueError(
                    "'placebo' is missing: the id of the test with the idea removed, or 'none: why'"
                )
        elif not self.placebo.startswith("none: "):
            named = [test for test in self.tests if test.id == self.placebo]
            if not named or named[0].role == "gate":
                raise ValueError(f"placebo '{self.placebo}' is no test or control of this claim")
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
    """CPU seconds, those of children included, that one notebook may take in each profile."""

    smoke: Annotated[float, Field(gt=0, le=60)] = 15
    cpu: Annotated[float, Field(gt=0, le=600)] = 300
    gpu: Annotated[float, Field(gt=0)] = 480


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
    # "ours" where the method had to be reconstructed: its verdicts are on our reading.
    reading: Literal["ours"] | None = None
    grow: Growth | None = None
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

    def only(self, name: str) -> Record:
        """This record with the claim `name` alone."""
        return self.model_copy(update={"claims": [self.claim(name)]})

    @property
    def citation(self) -> str:
        """Short citation in Markdown."""
        link = f" [arXiv:{self.arxiv}](https://arxiv.org/abs/{self.arxiv})." if self.arxiv else ""
        return f"{self.authors} ({self.year}). *{self.title}*. {self.venue}.{link}"


def load_record(path: Path) -> Record:
    """Read and check one record.

    Raises:
        RecordError: names the file and the first wrong field. FileError: names file and line.
    """
    try:
        loaded = read_yaml(path)
    except FileNotFoundError:
        raise RecordError(f"no record {path.name} beside the notebook") from None
    if not isinstance(loaded, dict):
        raise RecordError(f"{path.name}: must be a mapping of fields")
    try:
        record = Record.model_validate(loaded)
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
    """Records of all papers of the checkout at `root`: slug -> file, by family and name.

    Raises:
        RecordError: two files of one name, whose results could not be told apart.
    """
    paths: dict[str, Path] = {}
    for path in sorted((root / "notebooks").glob("*/*.yaml")):
        if path.stem in paths:
            places = " and ".join(p.relative_to(root).as_posix() for p in (paths[path.stem], path))
            raise RecordError(f"two records of one name: {places}; rename one")
        paths[path.stem] = path
    return paths
