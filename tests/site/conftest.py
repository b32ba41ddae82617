"""One toy checkout and its site for all tests of pages."""

from pathlib import Path

import pytest

from reattend.assets.store import AssetError
from reattend.site.build import build_site
from tests.site import toy


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """The toy checkout; tests only read it."""
    return toy.make(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="session")
def site(checkout, tmp_path_factory) -> Path:
    """The site of the toy checkout."""
    target = tmp_path_factory.mktemp("built") / "site"
    try:
        build_site(checkout, toy.records(checkout), target)
    except AssetError as error:
        pytest.skip(f"no KaTeX: {error}")
    return target
