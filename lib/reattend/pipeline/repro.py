"""`reattend repro`: bring results up to date through DVC's graph, several stages at a time.

DVC runs one stage after the other. Here it says what has changed, once for the whole graph, and executes
and records every stage that runs, while this schedules them: fetches, builds and papers are one graph, and
each starts when what it needs is there, on threads of this process or on an existing Dask cluster with a
shared file system.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reattend.findings import count_line
from reattend.locks import Busy, locked
from reattend.parameters import load_params
from reattend.pipeline.display import Display
from reattend.pipeline.errors import CommandError
from reattend.pipeline.forced import FORCED, ForcedRun
from reattend.pipeline.graph import read_records, sync
from reattend.pipeline.judge import committed_verdicts, verdicts_path
from reattend.pipeline.manifests import complete_manifests, write_fingerprints, write_text
from reattend.pipeline.needs import is_built, is_fetched
from reattend.pipeline.notebooks import Notebook
from reattend.pipeline.orphans import forget_ended
from reattend.pipeline.plan import PAPER, Task, reason, stages_of, tasks_of, that_fit
from reattend.pipeline.report import papers_of, write_report
from reattend.pipeline.run import check_parameters, recover, remove_leftovers
from reattend.pipeline.workers import Ended, Outcome, run_dvc, run_tasks
from reattend.project import FileError, read_json, results_directory
from reattend.records import Record, record_paths

FINGERPRINT, REPORT = "fingerprint", "report"  # stages that run before and after all others


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Args:
        jobs: stages at a time.
        force: run even what is up to date, and after a stop go on with what that run has not done.
        dry: say what would run and why, and change nothing.
        scheduler: address of a Dask scheduler; None for threads of this process.
        deadline: seconds from now; what will not end in time is left out. None for no limit.
    """

    jobs: int
    force: bool = False
    dry: bool = False
    scheduler: str | None = None
    deadline: float | None = None


def repro(root: Path, papers: list[str], profile: str, options: Options) -> int:
    """Run what is not up to date of `papers` (default: all) and of what they need.

    A paper that cannot be read or run stops no other. Ends with what failed, which verdicts changed,
    and what differs from the committed results.

    Returns:
        0 when every stage succeeded, 2 when all that failed was bad input, else 1.

    Raises:
        CommandError: unknown paper, a graph that DVC cannot read, or another `repro` at work; nothing
            has run.
    """
    known = record_paths(root)
    for slug in papers:
        if slug not in known:
            raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(known)}", 2)
    try:
        with locked(root / "build" / "locks" / "repro.lock", wait=False):
            if options.dry:
                return _dry(root, papers, profile, options)
            return _repro(root, papers, profile, options)
    except Busy:
        raise CommandError("another `reattend repro` is at work in this checkout") from None


def _repro(root: Path, papers: list[str], profile: str, options: Options) -> int:
    began = time.monotonic()
    recover(root)
    remove_leftovers(root)
    forget_ended(root)
    sync(root)
    if set_profile(root, profile):
        print(f"params.yaml: profile is now '{profile}'")
    changes = _status(root)
    if FINGERPRINT in changes:
        if run_dvc(root, "repro", "--quiet", "--single-item", FINGERPRINT):
            raise CommandError("the fingerprints could not be made; what is above says why")
        changes = _status(root)
    else:
        complete_manifests(root, profile)
    records, unusable = _chosen(root, papers)
    forced = ForcedRun(root, profile, papers) if options.force else None
    todo = _tasks(root, records, profile, changes, forced)
    earlier = _done_earlier(records, forced, todo)
    todo, refused = _without_bad_input(root, todo, records, profile)
    ended = Ended(
        {PAPER + s: Outcome(2, 0.0, message) for s, message in (unusable | refused).items()}
    )
    for name, outcome in ended.outcomes.items():
        print(f"{name.removeprefix(PAPER)}: {outcome.message}")
    before = {slug: _verdicts(root, record, profile) for slug, record in records.items()}
    todo, late = _in_time(todo, options)
    if todo:
        deadline = began + (options.deadline or float("inf"))
        executed = {PAPER + slug: _executed(root, r, profile) for slug, r in records.items()}
        with Display(todo, executed, options.jobs) as display:
            note = forced.note if forced else lambda stage: None
            ran = run_tasks(root, todo, options.jobs, options.scheduler, deadline, display, note)
        ended = Ended(ended.outcomes | ran.outcomes, [*late, *ran.left_out])
    else:
        ended.left_out = late
    whole = not ended.left_out and not any(o.code for o in ended.outcomes.values())
    if forced and whole:
        forced.over()
    if whole and not papers and (ended.outcomes or REPORT in changes):
        run_dvc(root, "repro", "--quiet", "--single-item", REPORT)
    elif ended.outcomes:
        write_report(root)
    _summarise(root, records, profile, before, ended, earlier)
    codes = {outcome.code for outcome in ended.outcomes.values() if outcome.code}
    return int(bool(codes)) + int(codes == {2})


def _dry(root: Path, papers: list[str], profile: str, options: Options) -> int:
    """Say what would run and why, a line each; only build/ is written."""
    with _put_back(root / "params.yaml"), _put_back(root / "dvc.yaml"):
        sync(root)
        set_profile(root, profile)
        write_fingerprints(root)
        records, unusable = _chosen(root, papers)
        forced = ForcedRun(root, profile, papers) if options.force else None
        todo = _tasks(root, records, profile, _status(root), forced)
        todo, refused = _without_bad_input(root, todo, records, profile)
        todo, late = _in_time(todo, options)
    for slug, message in (unusable | refused).items():
        print(f"{slug}: cannot run: {message}")
    for task in todo.values():
        print(f"{task.stage.label}: {task.why} (about {task.stage.seconds:.0f} s)")
    for name in late:
        print(f"{name.removeprefix(PAPER)}: would not end in time")
    print(
        f"{_papers_in(todo)} of {len(records) + len(unusable)} papers would run at profile {profile}"
    )
    return 0


@contextmanager
def _put_back(path: Path) -> Iterator[None]:
    """Leave a file as it was, after a `with` block that writes it."""
    before = path.read_text(encoding="utf8") if path.exists() else None
    try:
        yield
    finally:
        if before is None:
            path.unlink(missing_ok=True)
        elif path.read_text(encoding="utf8") != before:
            write_text(path, before)


def set_profile(root: Path, profile: str) -> bool:
    """Write the chosen profile into params.yaml, where DVC's graph reads it; whether it was another."""
    path = root / "params.yaml"
    if load_params(root)["profile"] == profile:
        return False
    text = path.read_text(encoding="utf8")
    value = r"""("[^"\n]*"|'[^'\n]*'|[^\s#]+)"""
    line = rf"(?m)^profile:[ \t]*{value}(?=\s|$)"
    renewed, found = re.subn(line, f"profile: {profile}", text)
    if found != 1:
        raise CommandError("params.yaml needs one line like `profile: cpu`", 2)
    write_text(path, renewed)
    return True


def _status(root: Path) -> dict[str, list]:
    """What DVC finds changed, by stage: one look at the whole graph.

    Raises:
        CommandError: when there is no DVC repository, or its files cannot be read.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return {name.rpartition(":")[2]: found for name, found in repo.status().items()}
    except DvcException as error:
        raise CommandError(f"DVC: {error}; `git checkout dvc.lock` may mend it", 2) from None


def _chosen(root: Path, papers: list[str]) -> tuple[dict[str, Record], dict[str, str]]:
    """Records of the papers asked for, and what is wrong with those that cannot be used."""
    records, unusable = read_records(root)
    wanted = papers or [*records, *unusable]
    return (
        {slug: records[slug] for slug in wanted if slug in records},
        {slug: unusable[slug] for slug in wanted if slug in unusable},
    )


def _tasks(
    root: Path,
    records: dict[str, Record],
    profile: str,
    changes: dict[str, list],
    forced: ForcedRun | None,
) -> dict[str, Task]:
    """What runs, or may have to, for some papers; of a forced run, what it has not done."""

    def seconds(record: Record) -> float:
        taken = _read(root, record, profile, "run.json").get("seconds")
        return taken or getattr(record.budget_seconds, profile)

    def in_cache(stage: str) -> bool:
        kind, _, name = stage.partition("-")
        return is_fetched(name) if kind == "fetch" else is_built(name, profile)

    stages = stages_of(records, profile, seconds)
    reasons = {name: why for name in stages if (why := reason(changes.get(name, [])))}
    todo = tasks_of(stages, reasons, in_cache, force=forced is not None)
    if forced is None:
        return todo
    stand = {n for n in {*forced.done} - {*reasons} if n.startswith(PAPER) or in_cache(n)}
    left = {name: task for name, task in todo.items() if name not in stand}
    if not left:  # stopped after its last stage
        forced.over()
    return left or todo


def _done_earlier(
    records: dict[str, Record], forced: ForcedRun | None, todo: dict[str, Task]
) -> list[str]:
    """Papers that a forced run had done when it was stopped; says that it goes on."""
    done = {*forced.done} - {*todo} if forced else set()
    earlier = [slug for slug in records if PAPER + slug in done]
    if forced and earlier:
        print(
            f"going on with the forced run of {forced.began}: {len(earlier)} of {len(records)} papers "
            f"are done ('rm -r {FORCED}' begins anew)"
        )
    return earlier


def _without_bad_input(
    root: Path, todo: dict[str, Task], records: dict[str, Record], profile: str
) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks without papers that could not run, and why those could not, by slug.

    Raises:
        CommandError: when all of several papers are refused for the same reason.
    """
    refused = {}
    for slug in records:
        if PAPER + slug in todo:
            try:
                notebook = Notebook.read(record_paths(root)[slug].with_suffix(".ipynb"))
                check_parameters(root, notebook, slug, profile, {})
            except (CommandError, ValueError) as error:
                refused[slug] = str(error).removeprefix(f"{slug}: ")
    if len(refused) > 1 and len({*refused.values()}) == 1 and len(refused) == _papers_in(todo):
        raise CommandError(next(iter(refused.values())), 2)
    kept = {name: task for name, task in todo.items() if name.removeprefix(PAPER) not in refused}
    return kept, refused


def _papers_in(todo: dict[str, Task]) -> int:
    return sum(name.startswith(PAPER) for name in todo)


def _in_time(todo: dict[str, Task], options: Options) -> tuple[dict[str, Task], list[str]]:
    """What is expected to end before the deadline, and the papers that are not."""
    if options.deadline is None:
        return todo, []
    stages = {name: task.stage for name, task in todo.items()}
    fit = that_fit(stages, options.jobs, options.deadline)
    late = [name for name in todo if name.startswith(PAPER) and name not in fit]
    return {name: todo[name] for name in fit}, late


def _read(root: Path, record: Record, profile: str, name: str) -> dict:
    """A JSON file of a paper's results; empty where there is none that can be read."""
    path = results_directory(root, record.family, record.slug, profile) / name
    try:
        return read_json(path)
    except (OSError, FileError):
        return {}  # a run mends it


def _verdicts(root: Path, record: Record, profile: str) -> dict[str, str]:
    claims = committed_verdicts(verdicts_path(root, record)).get(profile, {})
    return {name: claim["verdict"] for name, claim in claims.items()}


def _executed(root: Path, record: Record, profile: str) -> Path:
    return root / "build" / "executed" / record.family / f"{record.slug}.{profile}.ipynb"


def _summarise(
    root: Path,
    records: dict[str, Record],
    profile: str,
    before: dict[str, dict[str, str]],
    ended: Ended,
    earlier: list[str],
) -> None:
    """What failed or was left out, verdicts that changed, the counts, and what differs from Git.

    Args:
        earlier: papers that the same forced run had done before it was stopped.
    """
    from reattend.pipeline.compare import compare, has_revision

    done = {name for name, outcome in ended.outcomes.items() if not outcome.code}
    ran = [slug for slug in records if PAPER + slug in done or slug in earlier]
    for name, outcome in ended.outcomes.items():
        if outcome.code:
            print(f"failed: {name.removeprefix(PAPER)}: {outcome.message}")
    for slug in ran:
        after = _verdicts(root, records[slug], profile)
        for claim, verdict in after.items():
            if claim in before[slug] and before[slug][claim] != verdict:
                print(f"{slug}: {claim}: {before[slug][claim]} -> {verdict}")
    if ended.left_out:
        late = (name.removeprefix(PAPER) for name in ended.left_out if name.startswith(PAPER))
        names = ", ".join(late)
        print(f"left out for lack of time: {names}; the same command goes on with them")
    elif not ended.outcomes:
        print(f"nothing to run: {len(records)} papers are up to date at profile {profile}")
    papers = [paper for paper in papers_of(root) if paper.record.slug in records]
    print(count_line(papers, profile))
    if ran and has_revision(root, "HEAD"):
        compare(root, ran, profile, "HEAD")
