"""What the committed runs found, paper by paper: verdicts, points, tables and figures. Only reads.

The best evidence for a claim is that of the largest profile that has judged it.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from reattend.evidence.files import Evidence, read_evidence
from reattend.evidence.verdicts import OUT_OF_REACH, VERDICTS
from reattend.project import FileError, read_json, results_directory
from reattend.records import Claim, Record

PROFILES = ("gpu", "cpu")  # the best evidence first; smoke never yields a verdict
NOT_RUN = "not run"
STATES = (*VERDICTS, NOT_RUN)
"""What can be said of a claim."""


@dataclass(frozen=True)
class Table:
    """A table that a run or a paper's record holds: cells as text."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Conclusion:
    """What is known of a claim and from which profile; `tests` are those of verdicts.json."""

    verdict: str
    profile: str = ""
    reason: str = ""
    tests: Mapping[str, dict] | None = None


@dataclass(frozen=True)
class Run:
    """What one run of a paper left in its directory."""

    profile: str
    directory: Path
    claims: Mapping[str, dict]  # of this profile in verdicts.json

    @cached_property
    def results(self) -> dict:
        """results.json."""
        return _read(self.directory / "results.json")

    @cached_property
    def facts(self) -> dict:
        """run.json: times, versions, device."""
        return _read(self.directory / "run.json")

    @cached_property
    def evidence(self) -> Evidence:
        """The points of each test by (claim, test)."""
        path = self.directory / "evidence.csv"
        if not path.exists():
            return {}
        return read_evidence(path.read_text(encoding="utf8"), self.facts.get("timing_evidence", ()))

    @property
    def figures(self) -> list[tuple[str, str]]:
        """(name, caption) of each picture."""
        return [pair for pair in self._captions if (self.directory / f"{pair[0]}.png").exists()]

    @property
    def tables(self) -> list[Table]:
        """Each table with its caption."""
        found = []
        for name, caption in self._captions:
            path = self.directory / f"{name}.csv"
            if path.exists():
                with path.open(encoding="utf8", newline="") as stream:
                    columns, *rows = map(tuple, csv.reader(stream))
                found.append(Table(name, caption, columns, tuple(rows)))
        return found

    @property
    def _captions(self) -> list[tuple[str, str]]:
        return [(name, caption) for name, caption in self.results.get("captions", [])]


@dataclass(frozen=True)
class Paper:
    """A paper's record and its committed runs, the best evidence first."""

    record: Record
    runs: Mapping[str, Run]

    @classmethod
    def read(cls, root: Path, record: Record) -> Paper:
        """What lies in figures/<family>/<slug>."""
        runs = {}
        home = root / "figures" / record.family / record.slug
        try:
            verdicts = _read(home / "verdicts.json")
        except FileError:
            verdicts = {}  # judging makes it again
        for profile in PROFILES:
            directory = results_directory(root, record.family, record.slug, profile)
            if (directory / "results.json").exists():
                runs[profile] = Run(profile, directory, verdicts.get(profile, {}))
        return cls(record, runs)

    def at(self, claim: Claim, profile: str) -> Conclusion:
        """What one profile's run says of a claim."""
        if claim.out_of_reach:
            return Conclusion(OUT_OF_REACH, reason=claim.out_of_reach)
        found = self.runs[profile].claims.get(claim.id) if profile in self.runs else None
        if found is None:
            return Conclusion(NOT_RUN)
        return Conclusion(found["verdict"], profile, found.get("reason", ""), found["tests"])

    def best(self, claim: Claim) -> Conclusion:
        """What the best evidence says of a claim."""
        said = [self.at(claim, profile) for profile in PROFILES]
        return next((found for found in said if found.verdict != NOT_RUN), said[0])

    def verdicts(self, profile: str | None = None) -> list[str]:
        """The verdict of each claim, in the record's order; without `profile`, the best."""
        claims = self.record.claims
        return [(self.at(c, profile) if profile else self.best(c)).verdict for c in claims]

    def answer(self, profile: str | None = None) -> str:
        """The paper's question answered in one line: the verdict on its first claim that can be asked.

        Records put the claim first that the paper is about. Without `profile`, from the best evidence.
        """
        asked = [claim for claim in self.record.claims if not claim.out_of_reach]
        if not asked:
            return "None of its claims can be asked at this scale."
        found = self.at(asked[0], profile) if profile else self.best(asked[0])
        verdict = found.verdict
        if verdict == NOT_RUN:
            return "Not run yet."
        lead = "on our reading " if self.record.reading == "ours" else ""
        return f"{(lead + verdict).capitalize()}: {asked[0].says}."

    @property
    def seconds(self) -> dict[str, float]:
        """How long each profile's run took, of those that have been judged."""
        judged = {p: run.facts.get("seconds") for p, run in self.runs.items() if run.claims}
        return {profile: seconds for profile, seconds in judged.items() if seconds is not None}


def read_papers(root: Path, records: Mapping[str, Record]) -> list[Paper]:
    """All papers in the order of their records."""
    return [Paper.read(root, record) for record in records.values()]


def count_line(papers: list[Paper], profile: str | None = None) -> str:
    """How many papers have results and how their claims ended, in one line.

    Without `profile`, by the best evidence.
    """
    ended = [paper.verdicts(profile) for paper in papers]
    done = [verdicts for verdicts in ended if NOT_RUN not in verdicts]
    counts = Counter(verdict for verdicts in done for verdict in verdicts)
    claims = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    line = f"{len(done)} of {len(papers)} papers have results"
    return f"{line}: {counts.total()} claims, {claims}." if done else f"{line}."


def _read(path: Path) -> dict:
    """The mapping in a JSON file, empty where there is none; FileError where it is damaged."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
