"""Run DVC stages on Dask workers, and end them cleanly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from reattend.pipeline.orphans import VARIABLE, end_with_parent
from reattend.pipeline.run import threads

RETRIES = 1  # for a stage whose process was killed (out of memory, kill -9)
PATIENCE = 20  # seconds that stopped stages get to end their kernels


@dataclass(frozen=True)
class Outcome:
    """How one paper's stage ended."""

    code: int
    seconds: float
    message: str = ""


def run_dvc(root: Path, *arguments: str) -> int:
    """Run DVC in the foreground; its exit code."""
    return subprocess.run(_command(*arguments), cwd=root, env=environment()).returncode


def run_stages(
    root: Path, slugs: list[str], jobs: int, force: bool, scheduler: str | None, display
) -> dict[str, Outcome]:
    """Run the stages of independent papers, `jobs` at a time; outcomes in order of completion.

    Args:
        scheduler: address of a Dask scheduler whose workers see the same files; None starts workers
            here.
        display: told of every start and end.
    """
    from distributed import as_completed

    outcomes: dict[str, Outcome] = {}
    with _kernels(scheduler), _client(jobs, scheduler) as client:
        resources = {"GPU": 1} if _profile_is_gpu(root) and scheduler else None
        futures = {
            client.submit(run_stage, str(root), slug, force, pure=False, resources=resources): slug
            for slug in slugs
        }
        try:
            with display.watching():
                for future in as_completed(futures):
                    slug = futures[future]
                    error = future.exception()
                    outcome = (
                        Outcome(1, 0.0, f"its worker was lost: {error}")
                        if error
                        else future.result()
                    )
                    outcomes[slug] = outcome
                    display.ended(slug, outcome)
        except KeyboardInterrupt:
            client.cancel(list(futures))
            _children.stop()
            raise
    return outcomes


def run_stage(root: str, slug: str, force: bool) -> Outcome:
    """Execute one paper's stage through DVC; a stage whose process is killed is tried once more."""
    options = ["--single-item", *(["--force"] if force else [])]
    command = _command("--wait-for-lock", "repro", *options, f"replicate-{slug}")
    started = time.monotonic()
    for _ in range(1 + RETRIES):
        code, errors = _children.run(command, root)
        killed = code < 0 or " exited with -" in errors or "exited with 137" in errors
        if not killed or _children.stopping:
            break
    return Outcome(code, time.monotonic() - started, "" if code == 0 else _reason(errors))


def environment() -> dict[str, str]:
    """The environment of DVC's commands: this Python's programs come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _reason(errors: str) -> str:
    """What went wrong, from the output of a failed stage: `reattend run`'s own line if there is one."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    own = [line.removeprefix("reattend: ") for line in lines if line.startswith("reattend: ")]
    return (own or lines or ["no message"])[-1]


def _profile_is_gpu(root: Path) -> bool:
    from reattend.parameters import load_params

    return load_params(root)["profile"] == "gpu"


def _kernels(scheduler: str | None) -> AbstractContextManager:
    """A process to fork kernels from, here and on Linux: elsewhere libraries do not survive a fork."""
    if scheduler or sys.platform != "linux":
        return nullcontext()
    from reattend.pipeline.warm_kernels import kernel_server

    return kernel_server(environment() | threads())


@contextmanager
def _client(jobs: int, scheduler: str | None) -> Iterable:
    """A Dask client: threads of this process, each of which waits for one stage's process."""
    import dask
    from distributed import Client, LocalCluster

    dask.config.set({"distributed.scheduler.allowed-failures": RETRIES})
    if scheduler:
        with Client(scheduler, timeout="20s") as client:
            yield client
        return
    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=jobs,
        processes=False,
        dashboard_address=None,
        silence_logs=50,
    )
    with cluster, Client(cluster) as client:
        yield client


class _Children:
    """Processes that this one has started, each leading a session of its own."""

    def __init__(self) -> None:
        self.stopping = False
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self, command: list[str], root: str) -> tuple[int, str]:
        """Run a command to its end; exit code and what it wrote to stderr."""
        with self._lock:
            if self.stopping:
                return -signal.SIGINT, ""
            process = subprocess.Popen(
                command,
                cwd=root,
                env=environment() | {VARIABLE: "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=end_with_parent,  # one call to the kernel, takes no lock
            )
            self._running.add(process)
        try:
            _, errors = process.communicate()
        finally:
            self._running.discard(process)
        return process.returncode, errors

    def stop(self) -> None:
        """Interrupt all, so that they end their kernels; kill those that do not."""
        with self._lock:
            self.stopping = True
        for number in (signal.SIGINT, signal.SIGKILL):
            for process in list(self._running):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    self._running.discard(process)
            deadline = time.monotonic() + PATIENCE
            while self._running and time.monotonic() < deadline:
                time.sleep(0.1)


_children = _Children()
