"""Shape annotations are checked at run time in every test; CI leaves out what its ledger holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from reattend.records import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ["attention", "backbones", "data", "studies", "training", "trunks", *FAMILIES]
install_import_hook([f"reattend.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout under test."""
    return ROOT


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of papers that CI has found green as they are."""
    # Imported here: whatever of the library it imports must have its shapes checked.
    from tests.ledger import files_left_out

    known = files_left_out(ROOT)
    left_out = [item for item in items if item.path in known]
    if left_out:
        items[:] = [item for item in items if item.path not in known]
        config.hook.pytest_deselected(items=left_out)
