"""A forced run that was stopped goes on where it stopped: what it has done is noted in build/.

What DVC finds up to date is no news to a forced run, so that hours of one would be lost with a closed lid.
"""

from __future__ import annotations

import time
from pathlib import Path

from reattend.fingerprints import digest
from reattend.pipeline.manifests import write_json
from reattend.project import FileError, read_json

FORCED = "build/forced"


class ForcedRun:
    """The stages that a forced run of the same papers at the same profile has done, until it is over.

    Args:
        papers: those named on the command line; none for all.
    """

    def __init__(self, root: Path, profile: str, papers: list[str]) -> None:
        key = digest({"profile": profile, "papers": sorted(papers)})
        self._path = root / FORCED / f"{key}.json"
        noted = self._noted()
        self.began: str = noted.get("began", _now())
        self.done: list[str] = noted.get("done", [])

    def _noted(self) -> dict:
        try:
            return read_json(self._path)
        except (FileNotFoundError, FileError):
            return {}  # a damaged note costs time, nothing else

    def note(self, stage: str) -> None:
        """Keep that a stage is done."""
        self.done.append(stage)
        write_json(self._path, {"began": self.began, "done": self.done})

    def over(self) -> None:
        """Forget what is done: a forced run begins anew."""
        self._path.unlink(missing_ok=True)
        self.began, self.done = _now(), []


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
