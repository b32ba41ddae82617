"""A shared model's report: kept like a paper's run, replaced as a whole, and no part of the recipe."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from reattend.backbones.reports import Page, read_reports, write_report
from reattend.backbones.store import made_from
from reattend.backbones.trained import prose_bpe

FRAME = pd.DataFrame({"profile": ["first"], "score": [1.25]})


def draw(page: Page, profile: str) -> None:
    page.table("scores", FRAME.assign(profile=profile), "Scores & more")
    page.figure("curve", plt.figure(figsize=(2, 1)), "A curve")


def found(root):
    return {report.name: report.runs for report in read_reports(root)}["prose_bpe"]


def test_a_report_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prose_bpe, "report", draw, raising=False)
    assert found(tmp_path) == {}
    directory = write_report("prose_bpe", "cpu", tmp_path)
    assert directory == tmp_path / "figures/backbones/prose_bpe/cpu"
    (run,) = found(tmp_path).values()
    (table,) = run.tables
    assert (table.caption, table.columns, table.rows) == (
        "Scores & more",
        ("profile", "score"),
        (("cpu", "1.25"),),
    )
    assert run.figures == [("curve", "A curve")]
    write_report("prose_bpe", "smoke", tmp_path)
    assert list(found(tmp_path)) == ["cpu"]  # smoke is not shown
    write_report("prose_bpe", "gpu", tmp_path)
    assert list(found(tmp_path)) == ["gpu", "cpu"]


def test_a_new_report_replaces_the_old_one_and_a_failed_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(prose_bpe, "report", draw, raising=False)
    directory = write_report("prose_bpe", "cpu", tmp_path)
    (directory / "old.csv").write_text("a\n")
    write_report("prose_bpe", "cpu", tmp_path)
    files = {"scores.csv", "curve.png", "results.json"}
    assert {path.name for path in directory.iterdir()} == files

    def fails(page: Page, profile: str) -> None:
        draw(page, profile)
        draw(page, profile)

    monkeypatch.setattr(prose_bpe, "report", fails)
    with pytest.raises(ValueError, match="already a table or figure 'scores'"):
        write_report("prose_bpe", "cpu", tmp_path)
    assert {path.name for path in directory.iterdir()} == files
    assert [path.name for path in directory.parent.iterdir()] == ["cpu"]


def test_a_module_without_a_report_writes_nothing(tmp_path):
    assert write_report("prose_bpe", "cpu", tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_no_part_of_the_recipe():
    used = made_from("clip")["code"]["definitions"]["reattend.backbones.trained.clip"]
    assert "build" in used
    assert not {"report", "recall_table", "draw_patches"} & used.keys()
