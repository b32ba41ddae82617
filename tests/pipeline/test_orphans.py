"""What killed processes leave in DVC's file of stages at work."""

import json
import os
import subprocess
import sys

import pytest

from reattend.pipeline.orphans import forget_ended


@pytest.fixture
def rwlock(tmp_path):
    path = tmp_path / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def zombie():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet waited for
    yield process.pid
    process.wait()


def entries(reader, writer):
    return {
        "read": {"lib": [{"pid": reader, "cmd": "dvc repro"}]},
        "write": {"figures": {"pid": writer, "cmd": "dvc repro"}},
    }


def test_a_killed_process_holds_nothing(tmp_path, rwlock, zombie):
    rwlock.write_text(json.dumps(entries(zombie, zombie)))
    forget_ended(tmp_path)
    assert not rwlock.exists()


def test_a_process_at_work_keeps_what_it_holds(tmp_path, rwlock, zombie):
    for reader, writer in ((os.getpid(), zombie), (zombie, os.getpid())):
        rwlock.write_text(json.dumps(entries(reader, writer)))
        forget_ended(tmp_path)
        assert rwlock.exists()


def test_half_a_file_is_removed_and_none_is_no_error(tmp_path, rwlock):
    rwlock.write_text('{"read": {"lib"')
    forget_ended(tmp_path)
    assert not rwlock.exists()
    forget_ended(tmp_path)
