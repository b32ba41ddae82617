"""Keep what a user has set up for their own work from kernels: results are the suite's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def isolation(profile: Path) -> dict[str, str]:
    """Environment variables that hide a user's start-up files, styles and plotting backend.

    Args:
        profile: a directory for what IPython keeps.
    """
    matplotlib = Path(find_spec("matplotlib").origin).parent  # without importing it
    return {
        "IPYTHONDIR": str(profile),
        "PYTHONSTARTUP": "",
        "MATPLOTLIBRC": str(matplotlib / "mpl-data" / "matplotlibrc"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
