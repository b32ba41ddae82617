"""`reattend grow`: buy points where they decide, look by look, within a budget of time.

A look is a value of the parameter that a record's `grow` names. params.yaml stays the only place that
says what was run: the next look is written there before it is run, and taken back when the run fails.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reattend.pipeline.errors import CommandError
from reattend.pipeline.manifests import write_text
from reattend.pipeline.power import (
    chosen_records,
    open_tests,
    present_look,
    run_seconds,
)
from reattend.records import Record


@dataclass(frozen=True)
class NextLook:
    """What could be run next for a paper: a value of what grows, and its expected CPU seconds.

    `decides` is whether the present spread says that it would decide an open test.
    """

    record: Record
    value: int
    seconds: float
    decides: bool


def grow(
    root: Path, papers: list[str], profile: str, budget: float | None, run: Callable[..., object]
) -> int:
    """Run next looks of `papers` (default: all with open claims), the cheapest decision first.

    Args:
        budget: seconds within which looks are begun if they are expected to end; None: no limit.
        run: executes a paper, `reattend.pipeline.run.run`.

    Returns:
        0 when all that was run succeeded, else 1.

    Raises:
        CommandError: unknown paper, or a value in params.yaml that is none of the record's looks.
    """
    records = chosen_records(root, papers)
    began, spent, failed = time.monotonic(), [], set()
    while looks := [look for r in records if (look := next_look(root, r, profile))]:
        left = None if budget is None else budget - (time.monotonic() - began)
        looks = [x for x in looks if x.record.slug not in failed and _fits(x, left)]
        if not looks:
            break
        look = min(looks, key=lambda x: (not x.decides, x.seconds))
        slug, parameter = look.record.slug, look.record.grow.parameter
        print(f"{slug}: {parameter} = {look.value}, about {look.seconds:.0f} CPU s", flush=True)
        before = {test.claim for test in open_tests(root, look.record, profile)}
        started = time.monotonic()
        if not _run_look(root, look, profile, run):
            failed.add(slug)
            continue
        after = {test.claim for test in open_tests(root, look.record, profile)}
        seconds = time.monotonic() - started
        spent.append(seconds)
        decided = ", ".join(sorted(before - after)) or "nothing"
        print(f"{slug}: decided {decided} in {seconds:.0f} s", flush=True)
    print(f"{len(spent)} looks in {sum(spent):.0f} s; what is open:")
    for record in records:
        for test in open_tests(root, record, profile):
            print(f"  {test.paper}: {test.claim}.{test.outcome.id}: {test.advice}")
    return int(bool(failed))


def next_look(root: Path, record: Record, profile: str) -> NextLook | None:
    """A paper's next look; None when nothing is open, nothing grows, or its last look is taken."""
    if record.grow is None:
        return None
    grown = [t for t in open_tests(root, record, profile) if t.seconds is not None]
    now = present_look(root, record, profile)
    seconds = run_seconds(root, record, profile)
    if not grown or now == record.grow.looks[-1] or seconds is None:
        return None
    value = record.grow.looks[record.grow.looks.index(now) + 1]
    decides = any(t.outcome.needed <= t.outcome.estimate.n * value / now for t in grown)
    return NextLook(record, value, seconds * value / now, decides)


def set_parameter(text: str, slug: str, profile: str, name: str, value: int) -> str:
    """The text of params.yaml with one value changed and all else as it was.

    Raises:
        CommandError: when the paper, the profile or the parameter has no line of its own.
    """
    lines, path = text.splitlines(keepends=True), []
    for number, line in enumerate(lines):
        match = re.match(r"( *)([\w-]+):(.*)", line)
        if not match:
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        if path == ["papers", slug, profile, name]:
            rest = re.sub(r"^\s*\S+", f" {value}", match[3], count=1)
            lines[number] = f"{match[1]}{name}:{rest}\n"
            return "".join(lines)
    raise CommandError(f"params.yaml has no line for {slug}, {profile}, {name}", 2)


def _run_look(root: Path, look: NextLook, profile: str, run: Callable[..., object]) -> bool:
    """Write a look into params.yaml and run it; on any failure params.yaml is as before."""
    path = root / "params.yaml"
    text = path.read_text(encoding="utf8")
    slug = look.record.slug
    grown = set_parameter(text, slug, profile, look.record.grow.parameter, look.value)
    write_text(path, grown)
    try:
        run(root, slug, profile, {})
    except CommandError as error:
        write_text(path, text)
        print(f"{slug}: {error}")
        return False
    except BaseException:
        write_text(path, text)
        raise
    return True


def _fits(look: NextLook, left: float | None) -> bool:
    return left is None or look.seconds <= left
