"""Papers that CI has found green before, and may leave out: `make test` itself leaves out nothing.

A paper's key covers all that its tests and its smoke run depend on: fingerprint, notebook with its
checked outputs, parameters, what it needs, tests, constraints, and the Python. CI keeps the keys
between its runs in the file that REATTEND_LEDGER names, and writes them only after everything passed:

    python -m tests.ledger
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path

from reattend.fingerprints import LIBRARY, NO_RESULT, definitions, digest
from reattend.parameters import profile_values
from reattend.pipeline.graph import load_records
from reattend.pipeline.provenance import paper_code
from reattend.records import Record, record_paths

ROOT = Path(__file__).resolve().parents[1]


def ledger() -> Path | None:
    """The file in which CI keeps green keys; None everywhere else, whatever is set."""
    name = os.environ.get("REATTEND_LEDGER")
    return Path(name) if name and os.environ.get("CI") == "true" else None


def own_files(root: Path, record: Record) -> list[Path]:
    """The files whose tests are about one paper alone: its notebook and the oracles of its method."""
    place = Path(record.family, record.slug)
    return [
        root / "notebooks" / place.with_suffix(".ipynb"),
        root / "tests" / place.with_name(f"test_{record.slug}.py"),
    ]


def library_files(root: Path, record: Record, code: dict) -> list[Path]:
    """Modules that a paper's notebook and tests use, whole: tests look at messages too."""
    test = own_files(root, record)[1].read_text(encoding="utf8")
    used = {*code["definitions"], *definitions([test])["definitions"]}
    used |= {name.partition(":")[0] for name in NO_RESULT}
    bases = [LIBRARY.joinpath(*name.split(".")[1:]) for name in sorted(used)]
    return [base / "__init__.py" if base.is_dir() else base.with_suffix(".py") for base in bases]


def key(root: Path, record: Record) -> str:
    """Hash of all that a paper's tests and its smoke run depend on."""
    shared = [*(root / "tests").glob("*.py"), *(root / "tests" / "pipeline").glob("*.py")]
    code = paper_code(root, own_files(root, record)[0])
    files = [*own_files(root, record), root / "constraints.txt", *sorted(shared)]
    files += library_files(root, record, code)
    return digest(
        {
            "code": code,
            "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
            "parameters": profile_values(root, record.slug, "smoke"),
            "python": platform.python_version(),
        }
    )


def keys(root: Path) -> dict[str, str]:
    """The keys of all papers as they are now."""
    return {slug: key(root, record) for slug, record in load_records(root).items()}


def green(root: Path) -> set[str]:
    """Papers that the ledger holds with the key that they have now."""
    path = ledger()
    try:
        known = json.loads(path.read_text(encoding="utf8")) if path else {}
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    if not known:
        return set()
    return {slug for slug, now in keys(root).items() if known.get(slug) == now}


def files_left_out(root: Path) -> set[Path]:
    """Files whose tests need not run."""
    known = green(root)
    records = load_records(root) if known else {}
    return {path for slug in known for path in own_files(root, records[slug])}


def papers_to_run(root: Path) -> dict[str, str]:
    """Papers that one pass of the pipeline has to cover: slug -> family."""
    known = green(root)
    return {slug: p.parent.name for slug, p in record_paths(root).items() if slug not in known}


if __name__ == "__main__":
    path = ledger()
    if path is None:
        raise SystemExit("the ledger is CI's: needs CI=true and REATTEND_LEDGER")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(keys(ROOT), indent=1) + "\n", encoding="utf8")
