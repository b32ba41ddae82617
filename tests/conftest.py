"""Shape annotations are checked at run time in every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from reattend.records import FAMILIES

CHECKED = ["attention", "backbones", "data", "studies", "training", "trunks", *FAMILIES]
install_import_hook([f"reattend.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout under test."""
    return Path(__file__).resolve().parents[1]
