"""How the verdicts of a paper changed: what Git kept of its committed results."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Until verdicts.json there were verdicts in each profile's results.json.
_PATTERNS = ("figures/*/*/verdicts.json", "figures/*/*/*/results.json")


@dataclass(frozen=True)
class State:
    """The verdicts of one paper at one profile after one commit, by claim."""

    commit: str
    date: str
    subject: str
    profile: str
    verdicts: dict[str, str]


def histories(root: Path) -> dict[str, list[State]]:
    """Slug -> the states in which a verdict changed, the oldest first; empty without Git's history."""
    found: dict[str, list[State]] = {}
    commits = list(_commits(root))
    texts = _contents(root, [f"{commit[0]}:{path}" for *commit, path in commits])
    for (commit, date, subject, path), text in zip(commits, texts, strict=True):
        slug = path.split("/")[2]
        for profile, verdicts in _verdicts(path, text).items():
            states = found.setdefault(slug, [])
            before = next((s.verdicts for s in reversed(states) if s.profile == profile), {})
            if verdicts and verdicts != before:
                states.append(State(commit, date, subject, profile, verdicts))
    return found


def _verdicts(path: str, text: str) -> dict[str, dict[str, str]]:
    """Profile -> claim -> verdict in one version of a file; nothing of one that cannot be read."""
    try:
        content = json.loads(text)
        if path.endswith("results.json"):
            content = {path.split("/")[3]: content["claims"]}
        return {
            profile: {
                claim: entry["verdict"] for claim, entry in claims.items() if entry["verdict"]
            }
            for profile, claims in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _commits(root: Path) -> Iterable[tuple[str, str, str, str]]:
    """(commit, date, subject, path) of every change of a results file, the oldest first."""
    if shutil.which("git") is None:
        return
    paths = [f":(glob){pattern}" for pattern in _PATTERNS]
    form = "--format=%x00%h%x09%as%x09%s"
    log = ["log", "--reverse", "--diff-filter=AM", form, "--name-only", "--relative", "--", *paths]
    done = _git(root, log).decode(errors="replace")
    for block in done.split("\0")[1:]:
        head, *names = [line for line in block.splitlines() if line]
        commit, date, subject = head.split("\t", 2)
        for name in names:
            yield commit, date, subject, name


def _contents(root: Path, objects: list[str]) -> list[str]:
    """The text of each `commit:path`."""
    if not objects:
        return []
    prefix = _git(root, ["rev-parse", "--show-prefix"]).decode().strip()
    asked = [name.replace(":", f":{prefix}", 1) for name in objects]
    out = _git(root, ["cat-file", "--batch"], "\n".join(asked) + "\n")
    texts, place = [], 0
    for _ in objects:
        end = out.index(b"\n", place)
        header = out[place:end].split()
        size = int(header[2]) if header[-1] != b"missing" else 0
        start = end + 1
        texts.append(out[start : start + size].decode(errors="replace"))
        place = start + size + (1 if header[-1] != b"missing" else 0)
    return texts


def _git(root: Path, arguments: list[str], given: str = "") -> bytes:
    """What a Git command prints; nothing where it fails, as outside a repository."""
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, input=given.encode(), capture_output=True)
    return done.stdout if done.returncode == 0 else b""
