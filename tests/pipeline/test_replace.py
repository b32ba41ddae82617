"""Replacing a directory of results: one of the two versions is always whole."""

from pathlib import Path

import pytest

from reattend.locks import locked
from reattend.pipeline.errors import CommandError
from reattend.pipeline.run import recover, remove_leftovers, replace_directory


@pytest.fixture
def places(tmp_path):
    (tmp_path / "params.yaml").touch()
    old, new = tmp_path / "figures/theory/toy/cpu", tmp_path / "build/running/toy"
    for directory, text in ((old, "old"), (new, "new")):
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(text)
    return tmp_path, old, new


def test_replace(places):
    root, old, new = places
    replace_directory(new, old)
    assert (old / "results.json").read_text() == "new"
    assert not new.exists()
    assert not list((root / "build/replaced").rglob("results.json"))


def test_replace_where_nothing_was(places):
    root, _, new = places
    replace_directory(new, root / "figures/theory/other/cpu")
    assert (root / "figures/theory/other/cpu/results.json").read_text() == "new"


def test_a_rename_that_fails_puts_the_old_results_back(places, monkeypatch):
    _, old, new = places
    rename = Path.rename

    def fail(self, target):
        if self == new:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CommandError, match="No space left on device; earlier results kept"):
        replace_directory(new, old)
    assert (old / "results.json").read_text() == "old"


def test_a_crash_between_the_renames_is_mended(places, monkeypatch):
    root, old, new = places
    rename = Path.rename

    def crash(self, target):
        if self == new:
            raise SystemExit  # as if killed here
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(SystemExit):
        replace_directory(new, old)
    monkeypatch.undo()
    assert not old.exists()
    recover(root)
    assert (old / "results.json").read_text() == "old"
    recover(root)
    assert (old / "results.json").read_text() == "old"


def test_leftovers_of_killed_runs_go_and_those_of_a_run_at_work_stay(tmp_path):
    running = tmp_path / "build" / "running"
    for slug in ("dead", "at_work"):
        (running / f"{slug}-smoke").mkdir(parents=True)
    with locked(tmp_path / "build" / "locks" / "at_work.lock", wait=False):
        remove_leftovers(tmp_path)
    assert [path.name for path in running.iterdir()] == ["at_work-smoke"]
