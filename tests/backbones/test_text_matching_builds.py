"""Builds that ask SmolLM2 give the same files again, each time from an empty directory."""

from dataclasses import replace

import pytest

from reattend.backbones.trained import blockrank, crosstune

LESS = {
    blockrank: {"train": 4, "test": 3, "looked": 1, "nested": 2, "steps": 2, "batch": 2},
    crosstune: {"sets": ("questions",), "pool": 8, "asked_pool": 3, "seeds": (0,)},
}


@pytest.mark.parametrize("module", LESS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_build_gives_the_same_files_twice(module, tmp_path, monkeypatch):
    monkeypatch.setitem(module.SETTINGS, "smoke", replace(module.SETTINGS["smoke"], **LESS[module]))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        module.build(tmp_path / name, "smoke")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert len(first) == 2
    assert first == second
