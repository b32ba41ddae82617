"""Damage that a look at names and sizes shows."""

import pytest

from reattend.sizes import NOTE, damage, note_sizes


@pytest.fixture
def whole(tmp_path):
    directory = tmp_path / "made"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "weights").write_bytes(b"12345")
    note_sizes(directory)
    return directory


def test_a_whole_directory_shows_none(whole):
    assert damage(whole) is None


def test_a_truncated_and_a_missing_file_are_named(whole):
    (whole / "deep" / "weights").write_bytes(b"123")
    assert damage(whole) == "is damaged in the cache (deep/weights)"
    (whole / "deep" / "weights").unlink()
    assert damage(whole) == "is damaged in the cache (deep/weights)"


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "\xff"])
def test_a_note_that_is_damaged_itself(whole, text):
    (whole / NOTE).write_bytes(text.encode("latin1"))
    assert damage(whole) == f"is damaged in the cache ({NOTE})"


def test_what_was_never_finished_is_not_there(whole, tmp_path):
    (whole / NOTE).unlink()
    assert damage(whole) == damage(tmp_path / "nothing") == "is not in the cache"
