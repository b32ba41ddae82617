"""How good a shared model is: tables and figures of what was built, kept like those of a paper's run.

A model may have a module of its name beside this one with a function `report(page, profile)`. `reattend build
NAME` calls it and keeps what it makes in figures/backbones/NAME/PROFILE; the site shows it. It is no part of the
model's recipe: another figure trains nothing.
"""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from reattend.backbones.store import Backbone, catalogue
from reattend.findings import PROFILES, Run
from reattend.plots import save_png
from reattend.project import results_directory

FAMILY = "backbones"  # the folder of figures/ beside those of the papers' families


class Page:
    """Takes the tables and figures of one model, each with the caption that it is shown with."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._captions: dict[str, str] = {}

    def table(self, name: str, frame: pd.DataFrame, caption: str) -> None:
        """Write a table as `<name>.csv`."""
        self._named(name, caption)
        frame.to_csv(self._directory / f"{name}.csv", index=False, float_format="%.6g")

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Write a figure as `<name>.png` and close it."""
        self._named(name, caption)
        save_png(figure, self._directory / f"{name}.png")

    def _named(self, name: str, caption: str) -> None:
        if name in self._captions:
            raise ValueError(f"there is already a table or figure '{name}'")
        self._captions[name] = caption
        text = json.dumps({"captions": list(self._captions.items())}, indent=1, ensure_ascii=False)
        (self._directory / "results.json").write_text(text + "\n", encoding="utf8")


def write_report(name: str, profile: str, root: Path) -> Path | None:
    """Make the report of a model that is built; the directory, or None where the model has none.

    The report that was there is replaced as a whole, once all of the new one is written.
    """
    place = f"reattend.backbones.reports.{name}"
    if find_spec(place) is None:
        return None
    module = importlib.import_module(place)
    target = results_directory(root, FAMILY, name, profile)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{profile}-") as scratch:
        fresh = Path(scratch) / profile
        fresh.mkdir()
        module.report(Page(fresh), profile)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return target


@dataclass(frozen=True)
class Report:
    """A model's entry in the catalogue, and the reports on it that a checkout holds, the largest profile first."""

    name: str
    backbone: Backbone
    runs: dict[str, Run]


def read_reports(root: Path) -> list[Report]:
    """All models of the catalogue, with or without a report."""
    return [Report(name, backbone, _runs(root, name)) for name, backbone in catalogue().items()]


def _runs(root: Path, name: str) -> dict[str, Run]:
    places = {profile: results_directory(root, FAMILY, name, profile) for profile in PROFILES}
    return {p: Run(p, at, {}) for p, at in places.items() if (at / "results.json").exists()}
