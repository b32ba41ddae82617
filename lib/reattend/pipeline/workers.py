"""Run DVC stages side by side, each when what it needs is there, and end them cleanly.

Every stage is one `dvc repro --single-item`, so DVC executes, records and compares it. The workers are
threads of this process that wait for one such process each, or those of a Dask cluster.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from reattend.pipeline.orphans import VARIABLE, end_with_parent
from reattend.pipeline.plan import PAPER, Task, ranks
from reattend.pipeline.run import threads

RETRIES = 1  # for a stage whose process was killed (out of memory, kill -9)
PATIENCE = 20  # seconds that stopped stages get to end their kernels


@dataclass(frozen=True)
class Outcome:
    """How one stage ended; code 0 means well."""

    code: int
    seconds: float
    message: str = ""


@dataclass
class Ended:
    """What came of a run: outcomes of what ran, in order of completion, and what was left out."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def run_dvc(root: Path, *arguments: str) -> int:
    """Run DVC in the foreground; its exit code."""
    return subprocess.run(_command(*arguments), cwd=root, env=environment()).returncode


def run_tasks(
    root: Path,
    todo: dict[str, Task],
    jobs: int,
    scheduler: str | None,
    deadline: float,
    display,
    done: Callable[[str], None],
) -> Ended:
    """Run tasks, `jobs` at a time, those first for which the longest chain waits.

    A task that fails stops only those that need what it makes.

    Args:
        scheduler: address of a Dask scheduler whose workers see the same files, and whose threads then
            count instead of `jobs`; None starts threads here.
        deadline: on the monotonic clock; what is not expected to end by then is not begun.
        display: told of every start and end.
        done: called with the name of every stage that has succeeded, at once.
    """
    work = _Work(root, todo, deadline, display, done)
    with _kernels(scheduler), _workers(root, jobs, scheduler) as (submit, slots):
        running: dict[Future, str] = {}
        try:
            while True:
                for name in work.ready(slots() - len(running)):
                    running[submit(name, todo[name].force)] = name
                if not running:
                    return work.ended
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    work.end(running.pop(future), future)
        except KeyboardInterrupt:
            _children.stop()
            for future in running:
                future.cancel()
            raise


class _Work:
    """Which tasks wait, run, and have ended how."""

    def __init__(
        self,
        root: Path,
        todo: dict[str, Task],
        deadline: float,
        display,
        done: Callable[[str], None],
    ) -> None:
        self.root, self.todo, self.deadline, self.display = root, todo, deadline, display
        self.done = done
        self.ended = Ended()
        rank = ranks({name: task.stage for name, task in todo.items()})
        self._waiting = sorted(todo, key=lambda name: -rank[name])
        self._running: set[str] = set()
        self._missing: dict[str, str] = {}  # what could not be made, and is not there, by its stage
        self._new: set[str] = set()  # stages whose manifest has changed
        self._before: dict[str, bytes | None] = {}

    def ready(self, count: int) -> Iterator[str]:
        """Up to `count` tasks that can be started now, which counts as starting them.

        What cannot or need not be run is settled on the way.
        """
        again = True
        while again:
            again = False
            for name in list(self._waiting):
                if not {*self._waiting, *self._running}.isdisjoint(self.todo[name].stage.needs):
                    continue
                if self._settled(name):
                    again = True
                elif count > 0:
                    count -= 1
                    self._waiting.remove(name)
                    self._running.add(name)
                    self._before[name] = self._manifest(name)
                    self.display.started(name)
                    yield name

    def end(self, name: str, future: Future) -> None:
        """Note how a task ended."""
        error = future.exception()
        lost = Outcome(1, 0.0, f"its worker was lost: {error}")
        self._running.remove(name)
        self._end(name, lost if error else future.result(), missing=name)
        if self._manifest(name) != self._before[name]:
            self._new.add(name)

    def _end(self, name: str, outcome: Outcome, missing: str) -> None:
        self.ended.outcomes[name] = outcome
        if outcome.code:
            self._missing[name] = missing
        else:
            self.done(name)
        self.display.ended(name, outcome)

    def _settled(self, name: str) -> bool:
        """Whether a task whose needs have all ended is not to be started."""
        task = self.todo[name]
        missing = next((need for need in task.stage.needs if need in self._missing), None)
        if missing:
            cause = self._missing[missing]
            self._end(name, Outcome(1, 0.0, f"needs {_thing(cause)}"), missing=cause)
        elif any(need in self.ended.left_out for need in task.stage.needs) or self._too_late(name):
            self.ended.left_out.append(name)
            self.display.dropped(name)
        elif task.only_if_new and self._new.isdisjoint(task.stage.needs):
            self.display.dropped(name)
        else:
            return False
        self._waiting.remove(name)
        return True

    def _too_late(self, name: str) -> bool:
        return time.monotonic() + self._shortest(name) > self.deadline

    def _shortest(self, name: str) -> float:
        """Seconds to the end of the first paper that this stage could lead to."""
        users = [user for user in self._waiting if name in self.todo[user].stage.needs]
        return self.todo[name].stage.seconds + min(map(self._shortest, users), default=0.0)

    def _manifest(self, name: str) -> bytes | None:
        path = self.todo[name].stage.manifest
        try:
            return (self.root / path).read_bytes() if path else None
        except OSError:
            return None


def _thing(stage: str) -> str:
    kind, _, name = stage.partition("-")
    return f"{'asset' if kind == 'fetch' else 'backbone'} '{name}'"


def run_stage(root: str, name: str, force: bool) -> Outcome:
    """Execute one stage through DVC; a stage whose process is killed is tried once more."""
    options = ["--single-item", *(["--force"] if force else [])]
    command = _command("--wait-for-lock", "repro", *options, name)
    started = time.monotonic()
    for _ in range(1 + RETRIES):
        code, errors = _children.run(command, root)
        killed = code < 0 or " exited with -" in errors or "exited with 137" in errors
        if not killed or _children.stopping:
            break
    return Outcome(code, time.monotonic() - started, "" if code == 0 else _reason(errors))


def environment() -> dict[str, str]:
    """The environment of DVC's commands: this Python's programs come first, one thread each."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"} | threads()


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
    from reattend.pipeline.warm_kernels import VARIABLE, kernel_server

    # Whoever started this command may have such a process for it.
    return nullcontext() if VARIABLE in os.environ else kernel_server(environment())


@contextmanager
def _workers(
    root: Path, jobs: int, scheduler: str | None
) -> Iterator[tuple[Callable[[str, bool], Future], Callable[[], int]]]:
    """How to start a stage, and how many may run at once."""
    if scheduler is None:
        with ThreadPoolExecutor(jobs) as pool:
            yield (lambda name, force: pool.submit(run_stage, str(root), name, force)), lambda: jobs
        return
    import dask
    from distributed import Client

    dask.config.set({"distributed.scheduler.allowed-failures": RETRIES})
    gpu = {"GPU": 1} if _profile_is_gpu(root) else None
    with Client(scheduler, timeout="20s") as client:
        plain: Executor = client.get_executor(pure=False)
        papers: Executor = client.get_executor(pure=False, resources=gpu)

        def submit(name: str, force: bool) -> Future:
            pool = papers if name.startswith(PAPER) else plain
            return pool.submit(run_stage, str(root), name, force)

        yield submit, lambda: max(1, sum(client.nthreads().values()))


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
