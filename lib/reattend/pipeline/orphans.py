"""Processes that end when the one that started them is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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
