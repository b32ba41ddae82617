"""What a command builds in its own process is what the pipeline builds: one thread, or as many as asked for."""

import os

import pytest

from reattend.pipeline.cli import main

COMMANDS = {
    "build vit": "reattend.backbones.store.build",
    "run zoology": "reattend.pipeline.run.run",
    "grow": "reattend.pipeline.grow.grow",
    "attest": "reattend.pipeline.attest.attest",
    "study zoology": "reattend.pipeline.study.study",
}


@pytest.mark.parametrize("asked", [None, "3"])
@pytest.mark.parametrize("command", COMMANDS)
def test_threads_are_fixed_before_anything_is_built(command, asked, root, monkeypatch):
    seen = []

    def stop(*_, **__):
        seen.append(os.environ.get("OMP_NUM_THREADS"))
        raise KeyboardInterrupt

    monkeypatch.chdir(root)
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "9")  # noted, so that it is put back
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("reattend.pipeline.orphans.end_with_repro", lambda: None)
    monkeypatch.setattr(COMMANDS[command], stop)
    with pytest.raises(SystemExit):
        main(command.split())
    assert seen == [asked or "1"]
