"""A shared model's report: kept like a paper's run, replaced as a whole, and no part of the recipe."""

from pkgutil import iter_modules

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from reattend.backbones import reports
from reattend.backbones.reports import clip
from reattend.backbones.reports.page import Page, read_reports, write_report
from reattend.backbones.store import catalogue, made_from

FRAME = pd.DataFrame({"profile": ["first"], "score": [1.25]})


def draw(page: Page, profile: str) -> None:
    page.table("scores", FRAME.assign(profile=profile), "Scores & more")
    page.figure("curve", plt.figure(figsize=(2, 1)), "A curve")


def found(root):
    return {report.name: report.runs for report in read_reports(root)}["clip"]


def test_a_report_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "report", draw)
    assert found(tmp_path) == {}
    directory = write_report("clip", "cpu", tmp_path)
    assert directory == tmp_path / "figures/backbones/clip/cpu"
    (run,) = found(tmp_path).values()
    (table,) = run.tables
    assert (table.caption, table.columns, table.rows) == (
        "Scores & more",
        ("profile", "score"),
        (("cpu", "1.25"),),
    )
    assert run.figures == [("curve", "A curve")]
    write_report("clip", "smoke", tmp_path)
    assert list(found(tmp_path)) == ["cpu"]  # smoke is not shown
    write_report("clip", "gpu", tmp_path)
    assert list(found(tmp_path)) == ["gpu", "cpu"]


def test_a_new_report_replaces_the_old_one_and_a_failed_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "report", draw)
    directory = write_report("clip", "cpu", tmp_path)
    (directory / "old.csv").write_text("a\n")
    write_report("clip", "cpu", tmp_path)
    files = {"scores.csv", "curve.png", "results.json"}
    assert {path.name for path in directory.iterdir()} == files

    def fails(page: Page, profile: str) -> None:
        draw(page, profile)
        draw(page, profile)

    monkeypatch.setattr(clip, "report", fails)
    with pytest.raises(ValueError, match="already a table or figure 'scores'"):
        write_report("clip", "cpu", tmp_path)
    assert {path.name for path in directory.iterdir()} == files
    assert [path.name for path in directory.parent.iterdir()] == ["cpu"]


def test_a_model_without_a_report_writes_nothing(tmp_path):
    assert write_report("mae", "cpu", tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_no_part_of_the_recipe():
    used = made_from("clip")["code"]["definitions"]
    assert "build" in used["reattend.backbones.trained.clip"]
    assert not any("reports" in module for module in used)


def test_every_report_is_of_a_model_of_the_catalogue():
    names = {module.name for module in iter_modules(reports.__path__)} - {"page"}
    assert "clip" in names
    assert names <= catalogue().keys()
