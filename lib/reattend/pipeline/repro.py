"""`reattend repro`: bring results up to date through DVC's graph, several papers at a time.

DVC runs one stage after the other. Here every paper's stage is still executed, recorded and cached
by DVC, one `dvc repro --single-item` a paper, but Dask schedules them: on threads of this process
by default, or on an existing cluster with a shared file system. What papers share is brought up to
date first, so that their stages are independent of each other.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from reattend.assets.store import AssetError, asset_path
from reattend.locks import Busy, locked
from reattend.pipeline.compare import compare, has_revision
from reattend.pipeline.display import Display
from reattend.pipeline.errors import CommandError
from reattend.pipeline.graph import (
    asset_manifest,
    backbone_manifest,
    load_records,
    needed_assets,
    needed_backbones,
    sync,
)
from reattend.pipeline.manifests import write_text
from reattend.pipeline.notebooks import Notebook
from reattend.pipeline.orphans import forget_ended
from reattend.pipeline.report import summary, write_report
from reattend.pipeline.run import check_parameters, recover, remove_leftovers
from reattend.pipeline.workers import Outcome, run_dvc, run_stages
from reattend.project import results_directory
from reattend.records import Record, record_paths


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    jobs: int
    force: bool = False
    scheduler: str | None = None


def repro(root: Path, papers: list[str], profile: str, options: Options) -> int:
    """Run the stages of `papers` (default: all) that are not up to date, or all with `force`.

    A failing paper stops only what depends on it. Ends with times, the scoreboard, and what differs
    from the committed results.

    Returns:
        0 when every stage succeeded, else 1.

    Raises:
        CommandError: unknown paper, parameters that a notebook does not take, or another `repro`
            at work; nothing has run.
    """
    records = load_records(root)
    chosen = {slug: records[slug] for slug in papers or records if _known(slug, records)}
    _check_parameters(root, chosen, profile)
    try:
        with locked(root / "build" / "locks" / "repro.lock", wait=False):
            return _repro(root, chosen, profile, options, everything=not papers)
    except Busy:
        raise CommandError("another `reattend repro` is at work in this checkout") from None


def _repro(
    root: Path, chosen: dict[str, Record], profile: str, options: Options, everything: bool
) -> int:
    recover(root)
    remove_leftovers(root)
    forget_ended(root)
    sync(root)
    set_profile(root, profile)
    _forget_damaged_assets(root, chosen)
    before = {slug: _results(root, record, profile) for slug, record in chosen.items()}
    if not _bring_shared_up_to_date(root, chosen, options.force):
        print("some models or data are missing; papers that need them are left out")
    blocked = {slug: gap for slug, record in chosen.items() if (gap := _missing(root, record))}
    stale = [slug for slug in chosen if slug not in blocked]
    if not options.force:
        wanted = stale_stages(root, [f"replicate-{slug}" for slug in stale])
        stale = [slug for slug in stale if f"replicate-{slug}" in wanted]
    outcomes = {slug: Outcome(1, 0.0, f"needs {gap}") for slug, gap in blocked.items()}
    if stale:
        times = {slug: before[slug].get("seconds") for slug in stale}
        # The longest first, and first of all those never timed: a long one begun last would run alone.
        stale.sort(key=lambda slug: -(times[slug] or float("inf")))
        executed = {slug: _executed(root, chosen[slug], profile) for slug in stale}
        with Display(times, executed, options.jobs) as display:
            outcomes |= run_stages(
                root, stale, options.jobs, options.force, options.scheduler, display
            )
    failed = {slug: outcome for slug, outcome in outcomes.items() if outcome.code}
    if everything and not failed:
        run_dvc(root, "repro", "--quiet", "--single-item", "report")
    _summarise(root, chosen, profile, before, outcomes)
    return int(bool(failed))


def stale_stages(root: Path, names: list[str]) -> set[str]:
    """Which of the stages DVC does not find up to date."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        status = repo.status(targets=names) if names else {}
    return {name.rpartition(":")[2] for name in status}


def set_profile(root: Path, profile: str) -> None:
    """Write the chosen profile into params.yaml, where DVC's graph reads it."""
    path = root / "params.yaml"
    text = path.read_text(encoding="utf8")
    renewed = re.sub(r"(?m)^profile: *\w+", f"profile: {profile}", text, count=1)
    if renewed != text:
        write_text(path, renewed)
        print(f"params.yaml: profile is now '{profile}'")


def _bring_shared_up_to_date(root: Path, chosen: dict[str, Record], force: bool) -> bool:
    """Fingerprints, then the assets and backbones of the chosen papers; whether all succeeded."""
    assets = sorted({name for record in chosen.values() for name in needed_assets(record)})
    backbones = {name: None for record in chosen.values() for name in needed_backbones(record)}
    stages = ["fingerprint", *(f"fetch-{a}" for a in assets), *(f"build-{b}" for b in backbones)]
    if not force:
        # Upstream stages that are stale make those below them stale once they have run.
        stages = stages if stale_stages(root, stages) else []
    options = ["--keep-going", *(["--force"] if force else [])]
    return not stages or run_dvc(root, "repro", *options, *stages) == 0


def _forget_damaged_assets(root: Path, chosen: dict[str, Record]) -> None:
    """Remove manifests of assets that are no longer whole in the cache: DVC fetches them anew."""
    for name in {name for record in chosen.values() for name in needed_assets(record)}:
        try:
            asset_path(name)
        except AssetError:
            (root / asset_manifest(name)).unlink(missing_ok=True)


def _missing(root: Path, record: Record) -> str | None:
    """The first asset or backbone of a paper that could not be had."""
    needs = [(f"asset '{name}'", asset_manifest(name)) for name in needed_assets(record)]
    needs += [(f"backbone '{name}'", backbone_manifest(name)) for name in needed_backbones(record)]
    return next((what for what, path in needs if not (root / path).exists()), None)


def _results(root: Path, record: Record, profile: str) -> dict:
    """Seconds and verdicts of a paper's present results."""
    directory = results_directory(root, record.family, record.slug, profile)
    try:
        claims = json.loads((directory / "results.json").read_text())["claims"]
        seconds = json.loads((directory / "run.json").read_text())["seconds"]
    except FileNotFoundError:
        return {}
    return {"seconds": seconds, "verdicts": {name: c["verdict"] for name, c in claims.items()}}


def _executed(root: Path, record: Record, profile: str) -> Path:
    return root / "build" / "executed" / record.family / f"{record.slug}.{profile}.ipynb"


def _summarise(
    root: Path,
    chosen: dict[str, Record],
    profile: str,
    before: dict[str, dict],
    outcomes: dict[str, Outcome],
) -> None:
    """Times and verdict changes of what ran, the scoreboard, what differs from the commit."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if outcomes:
        table = Table("paper", "seconds", "result", "verdict changes", title="what ran")
        for slug, outcome in outcomes.items():
            after = _results(root, chosen[slug], profile)
            changes = _verdict_changes(before[slug], after) if not outcome.code else ""
            result = f"failed: {outcome.message}" if outcome.code else "done"
            table.add_row(slug, f"{outcome.seconds:.0f}", result, changes)
        console.print(table)
    else:
        console.print("nothing to run: every result is up to date")
    rows = [row for row in write_report(root, profile) if row.paper in chosen]
    table = Table("paper", "claim", "ours", "verdict", title=summary(rows))
    for row in rows:
        table.add_row(row.paper, row.claim, row.ours, row.verdict)
    console.print(table)
    if has_revision(root, "HEAD"):
        compare(root, list(chosen), profile, "HEAD")


def _verdict_changes(before: dict, after: dict) -> str:
    old, new = before.get("verdicts", {}), after.get("verdicts", {})
    changed = [f"{n}: {old.get(n)} -> {v}" for n, v in new.items() if n in old and old[n] != v]
    return "; ".join(changed) or "none"


def _known(slug: str, records: dict[str, Record]) -> bool:
    if slug not in records:
        raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(records)}", 2)
    return True


def _check_parameters(root: Path, chosen: dict[str, Record], profile: str) -> None:
    for slug in chosen:
        notebook = Notebook.read(record_paths(root)[slug].with_suffix(".ipynb"))
        check_parameters(root, notebook, slug, profile, {})
