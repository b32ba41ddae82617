"""Replacing a directory of results: one of the two versions is always whole."""

import errno
import shutil
import tempfile
from pathlib import Path

import pytest

from reattend.locks import locked
from reattend.pipeline.errors import CommandError
from reattend.pipeline.run import recover, remove_leftovers, replace_directory


def hidden(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


@pytest.fixture
def places(tmp_path):
    (tmp_path / "params.yaml").touch()
    old, new = tmp_path / "figures/theory/toy/cpu", tmp_path / "build/running/toy"
    for directory, text in ((old, "old"), (new, "new")):
        directory.mkdir(parents=True)
        (directory / "results.json").write_text(text)
    return tmp_path, old, new


def test_replace(places):
    _, old, new = places
    replace_directory(new, old)
    assert (old / "results.json").read_text() == "new"
    assert not new.exists()
    assert hidden(old.parent) == []


def test_replace_where_nothing_was(places):
    root, _, new = places
    replace_directory(new, root / "figures/theory/other/cpu")
    assert (root / "figures/theory/other/cpu/results.json").read_text() == "new"


def test_results_on_another_disk_behind_a_link(places):
    _, old, new = places
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        shutil.move(old.parent, f"{disk}/toy")
        old.parent.symlink_to(f"{disk}/toy")
        replace_directory(new, old)
        assert (old / "results.json").read_text() == "new"
        assert old.parent.is_symlink()


def failing(monkeypatch, name: str, error: BaseException) -> None:
    """Have the renaming of directories of that name end like this."""
    rename = Path.rename

    def fail(self, target):
        if self.name == name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)


def test_a_directory_that_cannot_be_renamed_is_copied(places, monkeypatch):
    _, old, new = places
    failing(monkeypatch, "cpu", OSError(errno.EXDEV, "Invalid cross-device link"))
    replace_directory(new, old)
    assert (old / "results.json").read_text() == "new"
    assert hidden(old.parent) == []


@pytest.mark.parametrize("name", ["cpu", ".cpu.new"])
def test_a_rename_that_fails_puts_the_old_results_back(places, monkeypatch, name):
    _, old, new = places
    failing(monkeypatch, name, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CommandError, match="No space left on device; earlier results kept"):
        replace_directory(new, old)
    assert (old / "results.json").read_text() == "old"
    assert (new / "results.json").read_text() == "new"
    assert hidden(old.parent) == []


@pytest.mark.parametrize("name", ["cpu", ".cpu.new"])
def test_a_crash_at_either_rename_is_mended(places, monkeypatch, name):
    root, old, new = places
    failing(monkeypatch, name, SystemExit())  # as if killed here
    with pytest.raises(SystemExit):
        replace_directory(new, old)
    monkeypatch.undo()
    assert hidden(old.parent)
    for _ in range(2):
        recover(root)
        assert (old / "results.json").read_text() == "old"
        assert hidden(old.parent) == []


def test_a_crash_after_the_new_results_took_their_place_keeps_them(places, monkeypatch):
    root, old, new = places

    def crash(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", crash)
        with pytest.raises(SystemExit):
            replace_directory(new, old)
    recover(root)
    assert (old / "results.json").read_text() == "new"
    assert hidden(old.parent) == []


def test_recovery_leaves_a_paper_at_work_alone(places):
    root, old, _ = places
    waiting = old.with_name(".cpu.new")
    waiting.mkdir()
    with locked(root / "build" / "locks" / "toy.lock", wait=False):
        recover(root)
        assert waiting.exists()
    recover(root)
    assert not waiting.exists()


def test_leftovers_of_killed_runs_go_and_those_of_a_run_at_work_stay(tmp_path):
    running = tmp_path / "build" / "running"
    for slug in ("dead", "at_work"):
        (running / f"{slug}-smoke").mkdir(parents=True)
    with locked(tmp_path / "build" / "locks" / "at_work.lock", wait=False):
        remove_leftovers(tmp_path)
    assert [path.name for path in running.iterdir()] == ["at_work-smoke"]
