"""Where things lie in a checkout, and how its YAML files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

# The C parser where PyYAML was built with it: ten times as fast.
_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def find_root(start: Path | None = None) -> Path:
    """The checkout that `start` (default: the working directory) lies in.

    Raises:
        FileNotFoundError: outside a checkout.
    """
    here = (start or Path.cwd()).resolve()
    for directory in (here, *here.parents):
        if (directory / "params.yaml").is_file() and (directory / "notebooks").is_dir():
            return directory
    raise FileNotFoundError(
        "not inside a Reattend checkout (no params.yaml above the working directory); cd into one"
    )


def study_directory(root: Path, family: str, slug: str, profile: str) -> Path:
    """Where a notebook that is run by hand writes: never over the committed results."""
    return root / "build" / "study" / family / slug / profile


def results_directory(root: Path, family: str, slug: str, profile: str) -> Path:
    """Where the pipeline puts a paper's tables, figures and results."""
    return root / "figures" / family / slug / profile


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: when it is not valid.
    """
    return yaml.load(text, Loader=_SAFE_LOADER)
