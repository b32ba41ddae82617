"""What a run has to do, in which order, and what of it fits into a given time.

Stages are DVC's: `fetch-<asset>`, `build-<backbone>`, `replicate-<paper>`. One that DVC finds changed has
a reason to run. One that only reads what such a stage makes may have to run as well: that is known when
the manifest has been written, and is another than before or the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from reattend.backbones.store import catalogue as backbones
from reattend.pipeline.graph import (
    FINGERPRINTS,
    asset_manifest,
    backbone_manifest,
    needed_assets,
    needed_backbones,
)
from reattend.records import Record

PAPER = "replicate-"
FETCH_SECONDS = 5.0  # most are in the cache and only checked
MADE_SECONDS = 2.0  # a backbone that lies in the cache
SMOKE_SECONDS = 10.0  # a backbone at smoke
OVERHEAD = 3.0  # what DVC and the start of a kernel take beyond the seconds that a run notes


@dataclass(frozen=True)
class Stage:
    """One stage of DVC's graph.

    Args:
        needs: stages whose manifests it reads.
        seconds: how long it is expected to take.
        manifest: the file, relative to the root, that says what it made; None for a paper.
    """

    name: str
    needs: tuple[str, ...]
    seconds: float
    manifest: str | None = None

    @property
    def label(self) -> str:
        """The name to show: a paper's slug, or the stage's."""
        return self.name.removeprefix(PAPER)


@dataclass(frozen=True)
class Task:
    """A stage that runs, or may have to.

    Args:
        why: the reason, in words.
        force: have DVC run it although it finds nothing changed.
        only_if_new: run it only if the manifest of something it needs has changed by then.
    """

    stage: Stage
    why: str
    force: bool = False
    only_if_new: bool = False


def stages_of(
    records: Mapping[str, Record], profile: str, paper_seconds: Callable[[Record], float]
) -> dict[str, Stage]:
    """The stages of some papers and of all they need, those needed first.

    Args:
        paper_seconds: what a paper is expected to take.
    """
    assets = sorted({name for record in records.values() for name in needed_assets(record)})
    stages = [Stage(f"fetch-{a}", (), FETCH_SECONDS, asset_manifest(a)) for a in assets]
    for name in dict.fromkeys(b for r in records.values() for b in needed_backbones(r)):
        entry = backbones()[name]
        seconds = SMOKE_SECONDS if profile == "smoke" else entry.seconds + OVERHEAD
        needs = _names(entry.assets, entry.backbones)
        stages.append(Stage(f"build-{name}", needs, seconds, backbone_manifest(name, profile)))
    for slug, record in records.items():
        needs = _names(record.needs.assets, record.needs.backbones)
        stages.append(Stage(PAPER + slug, needs, paper_seconds(record) + OVERHEAD))
    return {stage.name: stage for stage in stages}


def _names(assets: Iterable[str], made: Iterable[str]) -> tuple[str, ...]:
    return (*(f"fetch-{a}" for a in assets), *(f"build-{b}" for b in made))


def reason(changes: list) -> str | None:
    """Why DVC would run a stage, in words, from its status; None when only a manifest is missing.

    Args:
        changes: a stage's entry of DVC's `status`.
    """
    reasons = []
    for change in changes:
        if isinstance(change, str):
            reasons.append("its command or profile changed")
            continue
        for path, state in change.get("changed outs", {}).items():
            if not path.endswith(".json"):
                if state != "modified":
                    return "no results yet at this profile"
                reasons.append("its results were edited or damaged")
            elif state == "modified":
                reasons.append("what it makes is another")
        for path, state in change.get("changed deps", {}).items():
            if path.startswith(FINGERPRINTS):
                reasons.append("its code, record, parameters or catalogue entry changed")
            elif state != "deleted":
                reasons.append(f"'{path.rpartition('/')[2].removesuffix('.json')}' changed")
    return ", ".join(dict.fromkeys(reasons)) or None


def tasks_of(
    stages: dict[str, Stage],
    reasons: Mapping[str, str],
    in_cache: Callable[[str], bool],
    force: bool,
) -> dict[str, Task]:
    """What runs, or may have to, those needed first.

    Args:
        stages: those of the chosen papers and of all they need.
        reasons: why DVC would run a stage, for those it would.
        in_cache: whether what a fetch or a build makes lies in the cache, whole. What runs needs that;
            what does not run has no use for it.
        force: run them all.
    """
    if force:
        return {
            name: Task(_timed(stage, in_cache), "forced", True) for name, stage in stages.items()
        }
    found: dict[str, Task] = {}
    for name, stage in stages.items():
        first = next((need for need in stage.needs if need in found), None)
        if name in reasons:
            found[name] = Task(_timed(stage, in_cache), reasons[name])
        elif first:
            why = f"only if '{first}' makes something else"
            found[name] = Task(_timed(stage, in_cache), why, only_if_new=True)
    for name in reversed(stages):  # papers, then what they need
        needed = any(name in task.stage.needs for task in found.values())
        if needed and (name not in found or found[name].only_if_new) and not in_cache(name):
            found[name] = Task(stages[name], "not in the cache, or damaged there", force=True)
    return {name: found[name] for name in stages if name in found}


def _timed(stage: Stage, in_cache: Callable[[str], bool]) -> Stage:
    made = stage.name.startswith("build-") and in_cache(stage.name)
    return replace(stage, seconds=MADE_SECONDS) if made else stage


def ranks(todo: dict[str, Stage]) -> dict[str, float]:
    """Seconds from the start of each stage to the end of the longest chain that waits for it."""
    found: dict[str, float] = {}
    for name in reversed(todo):
        after = [found[user] for user, stage in todo.items() if name in stage.needs]
        found[name] = todo[name].seconds + max(after, default=0.0)
    return found


def makespan(todo: dict[str, Stage], jobs: int) -> float:
    """Seconds that `jobs` workers take, each starting the stage with the longest chain that it can."""
    rank = ranks(todo)
    waiting, running, now = sorted(todo, key=lambda name: -rank[name]), [], 0.0
    while waiting or running:
        unfinished = {*waiting, *(name for _, name in running)}
        for name in [n for n in waiting if unfinished.isdisjoint(todo[n].needs)]:
            if len(running) < jobs:
                waiting.remove(name)
                heapq.heappush(running, (now + todo[name].seconds, name))
        now, _ = heapq.heappop(running)
    return now


def that_fit(todo: dict[str, Stage], jobs: int, seconds: float) -> dict[str, Stage]:
    """As many papers as end in time, and what they need.

    With one deadline for all, the cheapest first leaves the fewest out (exactly so where papers share
    nothing; the best choice of what to share is not searched for). A paper's price is its own
    time and, of each stage it needs that nobody before it has paid for, the share that falls on it
    when all waiting papers that need the stage pay alike. Papers are taken in the order of price, each
    if all taken so far still end in time.
    """
    closures = {name: _closure(todo, name) for name in todo if name.startswith(PAPER)}
    taken: set[str] = set()
    while closures:
        sharers = {name: sum(name in c for c in closures.values()) for name in todo}
        price = {
            paper: sum(todo[name].seconds / sharers[name] for name in closure - taken)
            for paper, closure in closures.items()
        }
        wanted = taken | closures.pop(min(price, key=price.get))
        if makespan(_only(todo, wanted), jobs) <= seconds:
            taken = wanted
    return _only(todo, taken)


def _closure(todo: dict[str, Stage], name: str) -> set[str]:
    needs = [need for need in todo[name].needs if need in todo]
    return {name}.union(*(_closure(todo, need) for need in needs))


def _only(todo: dict[str, Stage], names: set[str]) -> dict[str, Stage]:
    return {name: stage for name, stage in todo.items() if name in names}
