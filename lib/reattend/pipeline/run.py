"""`reattend run`: execute one paper's notebook and keep its results only if all of it succeeded."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from reattend.assets.store import NEEDS_VARIABLE
from reattend.locks import Busy, locked
from reattend.parameters import ParameterError, Parameters, profile_values, resolve
from reattend.pipeline.errors import CommandError
from reattend.pipeline.graph import check_needs, needed_assets, needed_backbones
from reattend.pipeline.isolation import isolation
from reattend.pipeline.judge import judge_paper, write_verdicts
from reattend.pipeline.needs import provide
from reattend.pipeline.notebooks import Notebook, running_cell, tidy
from reattend.pipeline.provenance import fingerprint
from reattend.project import FileError, read_json, results_directory, study_directory
from reattend.records import Record, load_record, record_paths

TIMEOUT_FACTOR = 10  # a notebook is stopped after this many times its budget
START_TIMEOUT = 600  # seconds that a kernel gets to start: machines are loaded


def run(root: Path, slug: str, profile: str, overrides: dict) -> Path:
    """Execute the notebook of `slug` at `profile`; return the directory of its results.

    Results go to figures/, or, with overrides, to build/study/, so that the committed reference is
    only ever replaced by a run with the profile's own parameters. They are moved into place when the
    whole notebook has succeeded.

    Raises:
        CommandError: wrong paper, profile or parameter (exit code 2, before a kernel starts), a cell
            that failed, a kernel that died, a timeout, or another run of the same paper.
    """
    record_path = _record_path(root, slug)
    record = load_record(record_path)
    check_needs(record)
    notebook = Notebook.read(record_path.with_suffix(".ipynb"))
    parameters = check_parameters(root, notebook, slug, profile, overrides)
    place = study_directory if overrides else results_directory
    target = place(root, record.family, slug, profile)
    executed = root / "build" / "executed" / record.family / f"{slug}.{profile}.ipynb"
    timeout = TIMEOUT_FACTOR * getattr(record.budget_seconds, profile)
    try:
        with locked(root / "build" / "locks" / f"{slug}.lock", wait=False):
            _recover(target)
            scratch = root / "build" / "running" / f"{slug}-{profile}"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            provide(record, profile)
            inputs = fingerprint(root, notebook.path, profile)
            try:
                execute(notebook, executed, profile, overrides, scratch, timeout)
                _check_results(scratch, notebook, slug, profile, parameters)
                try:
                    _check_unedited(slug, inputs, fingerprint(root, notebook.path, profile))
                    _stamp(scratch / "run.json", inputs)
                    replace_directory(scratch, target)
                except (CommandError, FileError, OSError) as error:
                    raise _kept(root, scratch, error) from None
                if not overrides:
                    _judge(root, record, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except Busy:
        raise CommandError(
            f"'{slug}' is being run by another process; wait for it to end"
        ) from None
    return target


def tidy_paper(root: Path, slug: str) -> None:
    """Execute a notebook at smoke and store the outputs of its checked cells in it, no others.

    Raises:
        CommandError: as `run`; the notebook is then left as it was.
    """
    path = _record_path(root, slug)
    notebook = Notebook.read(path.with_suffix(".ipynb"))
    check_parameters(root, notebook, slug, "smoke", {})
    executed = root / "build" / "executed" / path.parent.name / f"{slug}.tidy.ipynb"
    with tempfile.TemporaryDirectory() as scratch:
        execute(notebook, executed, "smoke", {}, Path(scratch), timeout=600)
    tidy(notebook, executed)


def check_parameters(
    root: Path, notebook: Notebook, slug: str, profile: str, overrides: dict
) -> Parameters:
    """Validate what the notebook would get, and that the machine has what the profile needs.

    Raises:
        CommandError: one line naming what is allowed.
    """
    notebook.check_injection()
    try:
        parameters = resolve(
            notebook.parameter_model(), profile_values(root, slug, profile), overrides
        )
    except ParameterError as error:
        raise CommandError(f"{slug}: {error}", exit_code=2) from None
    if profile == "gpu" and not _has_gpu():
        raise CommandError("profile 'gpu' needs a CUDA GPU, and none is visible; use 'cpu'", 2)
    return parameters


def execute(
    notebook: Notebook,
    executed: Path,
    profile: str,
    overrides: dict,
    out: Path,
    timeout: float,
) -> None:
    """Run all cells in a fresh kernel, writing the executed copy now and then and at the end.

    Raises:
        CommandError: names the notebook, the cell and the copy to look at.
    """
    # What papermill and jsonschema import if they can, at up to a second: access to remote files and
    # a grammar for web addresses, which no notebook's execution needs.
    for name in ("rfc3987_syntax", "pyarrow"):
        sys.modules.setdefault(name, None)
    # Imported here: papermill takes half a second that other commands should not pay.
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from nbformat import ValidationError
    from papermill.exceptions import PapermillExecutionError

    from reattend.pipeline import engine
    from reattend.pipeline.warm_kernels import provisioner

    for name in ("papermill", "asyncio"):  # the raised error says it better
        logging.getLogger(name).setLevel(logging.CRITICAL)
    executed.parent.mkdir(parents=True, exist_ok=True)
    parameters = {"profile": profile} | ({"overrides": overrides} if overrides else {})
    own = isolation(notebook.root / "build" / "ipython")
    variables = {"REATTEND_OUT": str(out)} | own | threads() | provisioner()
    if profile == "smoke":  # before a long run is lost to it
        record = load_record(notebook.path.with_suffix(".yaml"))
        variables[NEEDS_VARIABLE] = ",".join([*needed_assets(record), *needed_backbones(record)])
    try:
        with _environment(**variables), _interruptible():
            papermill.execute_notebook(
                _literal(notebook.path),
                _literal(executed),
                parameters=parameters,
                engine_name=engine.NAME,
                kernel_name="python3",
                language="python",
                cwd=str(notebook.path.parent),
                progress_bar=sys.stderr.isatty(),
                start_timeout=START_TIMEOUT,
                execution_timeout=int(timeout),
                config=kernel_config(),
            )
    except PapermillExecutionError as error:
        what = f"{error.ename}: {error.evalue}"
        raise _failure(notebook, executed, what, failed=error.source) from None
    except CellTimeoutError:
        raise _failure(notebook, executed, f"a cell did not end in {timeout:.0f} s") from None
    except DeadKernelError:
        raise _failure(notebook, executed, "the kernel died (out of memory?)") from None
    except ValidationError as error:
        said = str(error).partition("\n")[0]
        raise CommandError(f"{notebook.name} is not a notebook: {said}", 2) from None


def _literal(path: Path) -> str:
    """A path for papermill, which would fill in what it finds between braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def recover(root: Path) -> None:
    """Finish or undo what interrupted calls of `replace_directory` left, where nothing runs."""
    for slug_directory in _result_directories(root):
        leftovers = [p for p in slug_directory.glob(".*") if p.suffix in (".new", ".old")]
        lock = root / "build" / "locks" / f"{slug_directory.name}.lock"
        for leftover in leftovers:
            with suppress(Busy), locked(lock, wait=False):
                _recover(leftover.with_name(leftover.stem.removeprefix(".")))


def _result_directories(root: Path) -> list[Path]:
    return [p for top in ("figures", "build/study") for p in (root / top).glob("*/*") if p.is_dir()]


def remove_leftovers(root: Path) -> None:
    """Delete what killed runs left in build/running; a paper that is being run keeps its directory."""
    for scratch in (root / "build" / "running").glob("*"):
        slug = scratch.name.rpartition("-")[0]
        with suppress(Busy), locked(root / "build" / "locks" / f"{slug}.lock", wait=False):
            shutil.rmtree(scratch, ignore_errors=True)


def replace_directory(source: Path, target: Path) -> None:
    """Put `source` in the place of `target`; an interruption leaves one of the two whole.

    Both wait beside the target, on its file system: `.<name>.new` until it takes the target's name,
    `.<name>.old` until then. What a crash leaves tells how far it was (see `_recover`).

    Raises:
        CommandError: it cannot be written; `target` is as it was, `source` still there.
    """
    where = target.relative_to(_root_of(target))
    target = target.resolve()  # results may lie on another disk, behind a link
    new, old = _waiting(target)
    try:
        _recover(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, new)
        if target.exists():
            _move(target, old)
        new.rename(target)
    except OSError as error:
        with suppress(OSError):
            _recover(target)
        reason = error.strerror or str(error)
        raise CommandError(f"cannot write {where}: {reason}; earlier results kept") from None
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(source, ignore_errors=True)


def _recover(target: Path) -> None:
    """Put the old results back while the new have not taken their place; remove what is left over."""
    target = target.resolve()
    new, old = _waiting(target)
    if old.exists() and new.exists():
        shutil.rmtree(target, ignore_errors=True)
        old.rename(target)
    for leftover in (new, old, old.with_suffix(".part")):
        if leftover.exists():
            shutil.rmtree(leftover)


def _waiting(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")


def _move(directory: Path, there: Path) -> None:
    """Rename a directory, or copy it where that is refused (of a container's image, on overlayfs)."""
    try:
        directory.rename(there)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = there.with_suffix(".part")
        shutil.copytree(directory, partial)
        partial.rename(there)
        shutil.rmtree(directory)


def _root_of(target: Path) -> Path:
    return next(p for p in target.parents if (p / "params.yaml").exists())


def _record_path(root: Path, slug: str) -> Path:
    papers = record_paths(root)
    if slug not in papers:
        raise CommandError(f"unknown paper '{slug}'; there are: {', '.join(papers)}", exit_code=2)
    return papers[slug]


def _stamp(path: Path, inputs: dict[str, str]) -> None:
    """Say in run.json what the results follow from; nothing else of the file changes."""
    text = path.read_text(encoding="utf8")
    path.write_text(f'{{\n "fingerprint": {json.dumps(inputs)},{text[1:]}', encoding="utf8")


def _check_results(
    out: Path, notebook: Notebook, slug: str, profile: str, parameters: Parameters
) -> None:
    """Refuse results that are not whole, or not of what was asked for."""
    try:
        results = read_json(out / "results.json")
        read_json(out / "run.json")
    except FileNotFoundError:
        raise CommandError(
            f"{notebook.name}: ended without results; its last cell is rep.finish()"
        ) from None
    except FileError as error:
        raise CommandError(f"{notebook.name}: wrote a damaged file: {error}") from None
    asked = {"slug": slug, "profile": profile, "parameters": parameters.model_dump(mode="json")}
    for name, value in asked.items():
        if results.get(name) != value:
            got, wanted = (json.dumps(v)[:80] for v in (results.get(name), value))
            raise CommandError(
                f"{notebook.name}: its results say {name} {got} where {wanted} was asked for, so they "
                f"are not kept; earlier results are untouched"
            )


def _check_unedited(slug: str, before: dict, after: dict) -> None:
    if before != after:
        raise CommandError(f"{slug}: its code or parameters were edited while it ran; run it again")


def _judge(root: Path, record: Record, target: Path) -> None:
    try:
        write_verdicts(root, record, judge_paper(root, record))
    except (CommandError, FileError) as error:
        raise CommandError(
            f"{error} (the new results are in {target.relative_to(root)}; no verdicts yet: mend this, "
            f"then `reattend judge {record.slug}`)"
        ) from None


def _kept(root: Path, scratch: Path, error: Exception) -> CommandError:
    """Keep whole results that could not take their place; the error that says where they are."""
    place = root / "build" / "kept" / scratch.name
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch.rename(place)
    return CommandError(f"{error} (what this run found: {place.relative_to(root)})")


def _failure(
    notebook: Notebook, executed: Path, what: str, failed: str | None = None
) -> CommandError:
    """The error for a notebook that did not finish: which cell, why, and where to look."""
    failed = failed or running_cell(executed)
    lines = [line for line in what.strip().splitlines() if line.strip()]
    where = executed.relative_to(notebook.root)
    return CommandError(
        f"{notebook.name}, {notebook.describe_cell(failed)}: {lines[0] if lines else 'failed'} "
        f"(half-executed copy: {where}; earlier results are untouched)"
    )


def kernel_config():
    """Encrypt the connection to the kernel: an open one makes it print a warning at every start."""
    from traitlets.config import Config

    return Config({"KernelManager": {"transport_encryption": "auto"}})


def threads() -> dict[str, str]:
    """One thread a kernel, unless OMP_NUM_THREADS says otherwise.

    Sums are split by threads and round differently, so a fixed number makes results independent of
    the machine's cores and of how many notebooks run at once.
    """
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class _environment:
    """Environment variables for the length of a `with` block (the kernel inherits them)."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


class _interruptible:
    """Turn SIGTERM into KeyboardInterrupt, so that a stopped run also ends its kernel."""

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self.before)
