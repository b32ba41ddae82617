"""`reattend attest`: results stand although shared code has changed, because smoke results are the same.

The smoke profile runs on the code of a commit, in a temporary worktree, and on the code as it is. Only
if results.json and evidence.csv agree byte for byte, both fingerprints go into the paper's
attested.json, and DVC is told that the paper is up to date. Parameters are not bridged. A backbone whose
smoke build is the same byte for byte is carried over likewise instead of being built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reattend.backbones.store import carry_over, find_backbone
from reattend.locks import Busy, locked
from reattend.parameters import PROFILES, load_params
from reattend.pipeline.errors import CommandError
from reattend.pipeline.graph import load_records
from reattend.pipeline.manifests import write_json
from reattend.pipeline.needs import provide
from reattend.pipeline.notebooks import Notebook
from reattend.pipeline.provenance import (
    OTHER_CODE,
    TODAY,
    attested,
    attested_equal,
    attested_path,
    fingerprint,
    standing,
)
from reattend.pipeline.run import check_parameters, execute, threads
from reattend.pipeline.workers import run_dvc
from reattend.project import read_json, results_directory
from reattend.records import load_record, record_paths

SAME = ("results.json", "evidence.csv")
_PRINT_OLD = """\
import sys; from pathlib import Path; from reattend.pipeline.provenance import fingerprint
print(fingerprint(Path.cwd(), Path.cwd() / sys.argv[1], "smoke")["code"])
"""

_PRINT_RECIPES = """\
import json; from reattend.backbones.store import catalogue, recipe
from reattend.fingerprints import digest; from reattend.parameters import PROFILES
print(json.dumps({n: {p: digest(recipe(n, p)) for p in PROFILES} for n in catalogue()}))
"""


def attest(root: Path, papers: list[str], ref: str) -> int:
    """Attest `papers` (default: all whose results were made by other code) against the code of `ref`.

    Returns:
        0 when all were attested, 1 when one was refused; the others are attested all the same.

    Raises:
        CommandError: unknown paper or revision, a paper that cannot be read, or a `repro` at work; nothing
            has run.
    """
    known = record_paths(root)
    for slug in papers:
        if slug not in known:
            raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(known)}", 2)
    load_records(root)
    notebooks = [Notebook.read(known[slug].with_suffix(".ipynb")).path for slug in papers or known]
    stale = [path for path in notebooks if _bridgeable(root, path)]
    for path in [path for path in notebooks if papers and path not in stale]:
        print(f"{path.stem}: nothing to attest: {_say(root, path)}")
        _tell_dvc(root, path)  # `reattend run` may have made them without DVC
    refused = 0
    try:
        with locked(root / "build" / "locks" / "repro.lock", wait=False):
            if stale:
                with _worktree(root, ref) as old:
                    refused = sum(not _attested(root, old, path, ref) for path in stale)
    except Busy:
        raise CommandError("`reattend repro` is at work in this checkout; wait for it") from None
    print(f"{len(stale) - refused} papers attested, {refused} refused")
    return int(refused > 0)


def _bridgeable(root: Path, notebook: Path) -> list[str]:
    """Profiles whose results were made by other code with today's parameters."""
    return [name for name in PROFILES if standing(root, notebook, name) == OTHER_CODE]


def _say(root: Path, notebook: Path) -> str:
    found = {name: standing(root, notebook, name) for name in PROFILES}
    said = [f"{name} results were {what}" for name, what in found.items() if what]
    return "; ".join(said) or "no results"


def _attested(root: Path, old: Path, notebook: Path, ref: str) -> bool:
    slug = notebook.stem
    try:
        _attest(root, old, notebook, ref)
    except CommandError as error:
        print(f"{slug}: refused: {error}", file=sys.stderr)
        return False
    print(f"{slug}: attested; smoke results are the same as at {ref}")
    return True


def _attest(root: Path, old: Path, notebook: Path, ref: str) -> None:
    before, now = _old_fingerprint(old, notebook, ref), fingerprint(root, notebook, "smoke")["code"]
    _check_link(root, notebook, before, now, ref)
    theirs = _old_smoke(old, notebook, ref)
    ours = _smoke(root, notebook)
    if differing := [name for name in SAME if theirs[name] != ours[name]]:
        raise CommandError(
            f"its smoke {' and '.join(differing)} differ between {ref} and now; "
            f"run `reattend repro {notebook.stem}`"
        )
    if fingerprint(root, notebook, "smoke")["code"] != now:
        raise CommandError("its code was edited meanwhile; attest it again")
    smoke = hashlib.sha256(b"".join(ours[name] for name in SAME)).hexdigest()
    links = [*attested(root, notebook), {"old": before, "new": now, "smoke": smoke}]
    write_json(attested_path(root, notebook), {"links": links})
    _carry_builds(root, old, notebook, ref)
    _tell_dvc(root, notebook)


def _check_link(root: Path, notebook: Path, before: str, now: str, ref: str) -> None:
    """Refuse a link that would join nothing."""
    commits = []
    for profile in _bridgeable(root, notebook):
        directory = results_directory(root, notebook.parent.name, notebook.stem, profile)
        facts = read_json(directory / "run.json")
        if before in attested_equal(root, notebook, facts["fingerprint"]["code"]) and before != now:
            return
        commits.append(f"{profile}: {facts.get('commit')}")
    which = "today's" if before == now else "other"
    raise CommandError(
        f"{ref} holds {which} code, not that of the results; name their commit with --ref "
        f"({', '.join(commits)})"
    )


def _old_fingerprint(old: Path, notebook: Path, ref: str) -> str:
    done = _in(old, ["-c", _PRINT_OLD, f"notebooks/{notebook.parent.name}/{notebook.name}"])
    if done.returncode:
        raise CommandError(f"the code of {ref} cannot tell its fingerprint ({_last(done.stderr)})")
    return done.stdout.strip()


def _old_smoke(old: Path, notebook: Path, ref: str) -> dict[str, bytes]:
    command = ["-m", "reattend.pipeline.cli", "run", notebook.stem, "--profile", "smoke"]
    done = _in(old, command)
    if done.returncode:
        raise CommandError(f"its smoke run fails at {ref} ({_last(done.stderr)})")
    out = results_directory(old, notebook.parent.name, notebook.stem, "smoke")
    return {name: (out / name).read_bytes() for name in SAME}


def _smoke(root: Path, path: Path) -> dict[str, bytes]:
    """Smoke results of the code as it is; nothing of the checkout changes."""
    notebook, slug = Notebook.read(path), path.stem
    check_parameters(root, notebook, slug, "smoke", {})
    provide(load_record(path.with_suffix(".yaml")), "smoke")
    executed = root / "build" / "executed" / path.parent.name / f"{slug}.attest.ipynb"
    with tempfile.TemporaryDirectory() as scratch:
        execute(notebook, executed, "smoke", {}, Path(scratch), timeout=600)
        return {name: (Path(scratch) / name).read_bytes() for name in SAME}


def _carry_builds(root: Path, old: Path, notebook: Path, ref: str) -> None:
    """Carry over the backbones of a paper whose smoke builds, both made just now, are the same."""
    needs = load_record(notebook.with_suffix(".yaml")).needs.backbones
    below = [other for name in needs for other in find_backbone(name).backbones]
    done = _in(old, ["-c", _PRINT_RECIPES])
    if done.returncode:
        return  # older than recipes: they are built again
    recipes, profile = json.loads(done.stdout), load_params(root)["profile"]
    for name in dict.fromkeys([*below, *needs]):
        if name in recipes and carry_over(name, profile, recipes[name]):
            print(f"backbone '{name}': carried over; its smoke build is the same as at {ref}")


def _tell_dvc(root: Path, notebook: Path) -> None:
    """Let dvc.lock name the present fingerprint and results, if these stand."""
    profile = load_params(root)["profile"]
    if standing(root, notebook, profile) != TODAY:
        return
    stage = f"replicate-{notebook.stem}"
    needs = load_record(notebook.with_suffix(".yaml")).needs
    upstream = [
        "fingerprint",
        *(f"fetch-{n}" for n in needs.assets),
        *(f"build-{n}" for n in needs.backbones),
    ]
    if run_dvc(root, "repro", "--quiet", *upstream) or run_dvc(
        root, "commit", "--quiet", "--force", stage
    ):
        raise CommandError(f"attested, but DVC could not note it; run `dvc commit --force {stage}`")


@contextmanager
def _worktree(root: Path, ref: str) -> Iterator[Path]:
    """A temporary checkout of `ref`."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)

    with tempfile.TemporaryDirectory(prefix="reattend-attest-") as scratch:
        place = Path(scratch) / "old"
        done = git("worktree", "add", "--detach", str(place), f"{ref}^{{commit}}")
        if done.returncode:
            raise CommandError(f"--ref {ref}: {_last(done.stderr)}", 2)
        try:
            yield place
        finally:
            git("worktree", "remove", "--force", str(place))


def _in(old: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(old / "lib")} | threads()
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=old, env=environment, capture_output=True, text=True)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no message"])[-1].removeprefix("reattend: ")
