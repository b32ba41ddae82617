"""Whether a directory of the cache is whole: names and sizes of its files, noted when it was made."""

from __future__ import annotations

import json
from pathlib import Path

NOTE = ".reattend.json"


def note_sizes(directory: Path) -> None:
    """Write down which files a finished directory holds, and how many bytes each has."""
    sizes = {
        p.relative_to(directory).as_posix(): p.stat().st_size
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != NOTE
    }
    (directory / NOTE).write_text(json.dumps(sizes), encoding="utf8")


def damage(directory: Path) -> str | None:
    """What a look at names and sizes shows: None for a whole directory, or words for a message."""
    try:
        sizes = json.loads((directory / NOTE).read_text(encoding="utf8"))
        changed = [path for path, size in sizes.items() if _size(directory / path) != size]
    except (FileNotFoundError, NotADirectoryError):
        return "is not in the cache"
    except (ValueError, AttributeError):
        changed = [NOTE]
    return f"is damaged in the cache ({changed[0]})" if changed else None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
