"""Progress of a parallel run: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from reattend.pipeline.notebooks import noted_cell
from reattend.pipeline.plan import Task, makespan


class Display:
    """Which papers and builds are done, running (in which cell), waiting or failed, and the time left.

    Args:
        todo: what runs, or may have to.
        executed: the executed copy of each paper's notebook, by its stage.
        jobs: how many run at once.
    """

    def __init__(self, todo: dict[str, Task], executed: dict[str, Path], jobs: int) -> None:
        self.stages = {name: task.stage for name, task in todo.items()}
        self.executed = executed
        self.jobs = jobs
        self.began = time.monotonic()
        self.running: dict[str, float] = {}  # since when, on the clock of files
        self.outcomes: dict[str, object] = {}
        self.live = None

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(get_renderable=self._table, refresh_per_second=1)
            self.live.__enter__()
        return self

    def __exit__(self, *details) -> None:
        if self.live:
            self.live.__exit__(*details)

    def started(self, name: str) -> None:
        """Note the start of one stage."""
        self.running[name] = time.time()
        self._say(f"{self.stages[name].label}: started")

    def ended(self, name: str, outcome) -> None:
        """Note the end of one stage."""
        self.running.pop(name, None)
        self.outcomes[name] = outcome
        word = f"failed: {outcome.message}" if outcome.code else "done"
        count = f"{len(self.outcomes)}/{len(self.stages)}"
        label = self.stages[name].label
        self._say(f"[{count}] {label}: {word} in {outcome.seconds:.0f} s{self._left_text()}")

    def dropped(self, name: str) -> None:
        """Note that a stage need not run after all, or is left out."""
        del self.stages[name]

    def _say(self, line: str) -> None:
        if not self.live:
            print(line, flush=True)

    def _cell(self, name: str) -> str:
        """Where a running stage is."""
        path = self.executed.get(name)
        cell = noted_cell(path, self.running.get(name, 0.0)) if path else None
        return f"cell {cell[0]} of {cell[1]}" if cell else "running"

    def _left_text(self) -> str:
        left = {n: stage for n, stage in list(self.stages.items()) if n not in self.outcomes}
        return f", about {makespan(left, self.jobs):.0f} s left" if left else ""

    def _table(self):
        from rich.table import Table

        failed = {name: o for name, o in list(self.outcomes.items()) if o.code}
        running = list(self.running)
        done = len(self.outcomes) - len(failed)
        waiting = len(self.stages) - len(self.outcomes) - len(running)
        title = f"{done} done, {len(running)} running, {waiting} waiting, {len(failed)} failed; "
        title += f"{time.monotonic() - self.began:.0f} s{self._left_text()}"
        table = Table("stage", "state", title=title, title_justify="left")
        for name in running:
            table.add_row(self.stages[name].label, self._cell(name))
        for name, outcome in failed.items():
            table.add_row(self.stages[name].label, f"failed: {outcome.message}")
        return table
