"""`reattend judge`: verdicts from evidence and records, without running a notebook.

verdicts.json lies beside a paper's result directories and holds the verdicts of every profile that
has results. It follows from evidence.csv, run.json (times), the record and the engine alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from reattend.evidence.files import read_evidence, stored
from reattend.evidence.verdicts import ClaimOutcome, EvidenceError, judge
from reattend.parameters import PROFILES
from reattend.pipeline.errors import CommandError
from reattend.pipeline.graph import METRICS, VERDICTS, read_records
from reattend.pipeline.manifests import write_json
from reattend.pipeline.metrics_file import metrics
from reattend.project import FileError, read_json, read_text, results_directory
from reattend.records import Record, load_record, record_paths

JUDGED = [profile for profile in PROFILES if profile != "smoke"]


def verdicts_path(root: Path, record: Record) -> Path:
    """Where a paper's verdicts are kept."""
    return root / "figures" / record.family / record.slug / VERDICTS


def judge_paper(root: Path, record: Record) -> dict[str, dict]:
    """Verdicts of one paper by profile and claim, for every profile that has evidence.

    Raises:
        CommandError: for evidence that cannot be used; names the file and what is wrong (exit code 2).
    """
    return {
        profile: {name: stored(outcome) for name, outcome in outcomes.items()}
        for profile in JUDGED
        if (outcomes := judge_profile(root, record, profile)) is not None
    }


def judge_papers(root: Path, papers: list[str]) -> int:
    """Write verdicts.json of `papers` (default: all) and print what changed; returns 0.

    Everything is judged before anything is written.

    Raises:
        CommandError: unknown paper, or evidence that cannot be used; nothing is written.
    """
    paths = record_paths(root)
    for slug in papers:
        if slug not in paths:
            raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(paths)}", 2)
    records = [load_record(paths[slug]) for slug in papers or paths]
    fresh = [(record, judge_paper(root, record)) for record in records]
    changes = 0
    for record, verdicts in fresh:
        for line in write_verdicts(root, record, verdicts):
            changes += 1
            print(f"{record.slug}: {line}")
    claims = sum(len(claims) for _, verdicts in fresh for claims in verdicts.values())
    print(f"{claims} verdicts judged, {changes} changed")
    return 0


def judge_usable(root: Path) -> None:
    """Write verdicts.json of every paper whose record and evidence can be used; a line for each other.

    Where a paper's evidence is damaged its earlier verdicts stay.
    """
    for record in read_records(root)[0].values():
        try:
            verdicts = judge_paper(root, record)
        except CommandError as error:
            print(f"{record.slug}: not judged: {error}")
            verdicts = committed_verdicts(verdicts_path(root, record))
        for line in write_verdicts(root, record, verdicts):
            print(f"{record.slug}: {line}")


def write_verdicts(root: Path, record: Record, verdicts: dict[str, dict]) -> list[str]:
    """Write a paper's verdicts, and its metrics for DVC; a line for each verdict that changed."""
    path = verdicts_path(root, record)
    before = committed_verdicts(path)
    write_json(path, verdicts)
    write_json(path.with_name(METRICS), metrics(verdicts))
    return [
        f"{claim} ({profile}): {old} -> {now['verdict']}"
        for profile, claims in verdicts.items()
        for claim, now in claims.items()
        if (old := before.get(profile, {}).get(claim, {}).get("verdict", "new")) != now["verdict"]
    ]


def committed_verdicts(path: Path) -> dict[str, dict]:
    """What a verdicts.json says; empty where there is none or it is damaged: it can be made again."""
    try:
        loaded = json.loads(path.read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def judge_profile(
    root: Path, record: Record, profile: str, place: Callable = results_directory
) -> dict[str, ClaimOutcome] | None:
    """Outcomes of a paper's claims at one profile; None where there is no evidence.

    Args:
        place: `results_directory`, or `study_directory` for a run with other parameters.

    Raises:
        CommandError: for evidence that cannot be used.
    """
    directory = place(root, record.family, record.slug, profile)
    path = directory / "evidence.csv"
    if not path.exists():
        return None
    where = directory.relative_to(root).as_posix()
    try:
        facts = read_json(directory / "run.json")
        evidence = read_evidence(read_text(path), facts.get("timing_evidence", []))
        return judge(record, evidence)
    except FileNotFoundError:
        raise CommandError(
            f"{where}: evidence.csv without run.json; run the paper again", 2
        ) from None
    except FileError as error:
        raise CommandError(f"{error}; run the paper again", 2) from None
    except EvidenceError as error:
        raise CommandError(f"{where}/evidence.csv: {error}", 2) from None
