"""What has to be there before DVC and Dask are asked for anything: they say it in tracebacks."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

from reattend.pipeline.errors import CommandError
from reattend.pipeline.manifests import write_text
from reattend.project import read_yaml

PATIENCE = 10.0  # seconds that a scheduler gets to accept a connection
_NO_GIT = "[core]\n    no_scm = true\n"


def check_repository(root: Path) -> None:
    """See that DVC can work in this checkout; let it work without Git in a downloaded archive.

    Raises:
        CommandError: DVC's directory is missing, or its lock file cannot be used (exit code 2).
        FileError: its lock file cannot be read.
    """
    if not (root / ".dvc" / "config").is_file():
        raise CommandError("no .dvc/config in the project's root; restore it from git (.dvc)", 2)
    try:
        lock = read_yaml(root / "dvc.lock")
    except FileNotFoundError:
        lock = {"stages": {}}
    if not isinstance(lock, dict) or not isinstance(lock.get("stages", {}), dict):
        raise CommandError("dvc.lock holds no stages; restore it from git, or delete it", 2)
    local = root / ".dvc" / "config.local"
    if not (root / ".git").exists() and not local.exists():
        write_text(local, _NO_GIT)
        print("no Git repository here: DVC works without one (.dvc/config.local)")


def check_scheduler(address: str) -> None:
    """See that something listens at a Dask scheduler's address, before anything is run for it.

    Raises:
        CommandError: nothing does.
    """
    where = urlsplit(address)
    try:
        with socket.create_connection((where.hostname, where.port), timeout=PATIENCE):
            pass
    except (OSError, ValueError) as error:
        raise CommandError(f"no Dask scheduler answers at {address}: {error}") from None
