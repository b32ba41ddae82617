"""Shape annotations are checked at run time in every test; CI leaves out what its ledger holds."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from reattend.records import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ["attention", "backbones", "data", "studies", "training", "trunks", *FAMILIES]
install_import_hook([f"reattend.{name}" for name in CHECKED], "beartype.beartype")


KERNELS = ExitStack()


def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Notebooks, here and in the pipeline's tests, get kernels that have torch imported: seconds less each."""
    from reattend.pipeline.run import threads
    from reattend.pipeline.warm_kernels import VARIABLE, kernel_server, provisioner

    runs_notebooks = item.path.suffix == ".ipynb" or item.path.parent.name == "pipeline"
    if runs_notebooks and VARIABLE not in os.environ and sys.platform == "linux":
        KERNELS.enter_context(kernel_server(os.environ | threads()))
        os.environ.update(provisioner())


def pytest_sessionfinish() -> None:
    """End that process."""
    KERNELS.close()


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
