"""Throw-away checkouts with made-up papers."""

from __future__ import annotations

import pytest

from reattend.pipeline.warm_kernels import VARIABLE
from tests.pipeline.toy import Checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    """Two papers that ran once at smoke through DVC, committed."""
    made = Checkout(tmp_path_factory.mktemp("checkout"), ["toy_a", "toy_b"])
    made.reattend("repro", "--profile", "smoke", check=True)
    made.commit()
    return made


@pytest.fixture
def bare(tmp_path) -> Checkout:
    """One paper, no DVC, nothing has run."""
    return Checkout(tmp_path / "bare", ["toy"], dvc=False)


@pytest.fixture
def ordinary_kernels(monkeypatch) -> None:
    """Nobody has started a process to fork kernels from, as where a user types a command."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("JUPYTER_DEFAULT_PROVISIONER_NAME", raising=False)
