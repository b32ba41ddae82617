"""Processes that end when the one that started them is killed, and what the killed leave behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import psutil

VARIABLE = "REATTEND_REPRO"  # set for everything that `reattend repro` starts
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent dies, however that dies."""
    if _libc:
        _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def end_with_repro() -> None:
    """The same, if this process belongs to a `reattend repro`."""
    if VARIABLE in os.environ:
        end_with_parent()


def forget_ended(root: Path) -> None:
    """Remove DVC's file of stages at work when none of the processes in it is.

    DVC does so itself for a process that is gone, but not for one that was killed and has not been
    waited for (a zombie, which in a container may stay for ever), nor for a file half written.
    """
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        modes = json.loads(path.read_text(encoding="utf8"))
        holders = [h for paths in modes.values() for h in paths.values()]
        # Many may read a path, one may write it.
        pids = [one["pid"] for h in holders for one in (h if isinstance(h, list) else [h]) if one]
    except FileNotFoundError:
        return
    except ValueError:
        pids = []
    if not any(map(_is_at_work, pids)):
        path.unlink(missing_ok=True)


def _is_at_work(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
