"""Progress of a parallel run: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from reattend.pipeline.notebooks import noted_cell

INTERVAL = 2.0  # seconds between looks at the running notebooks


class Display:
    """Which papers are done, running (in which cell), waiting or failed, and the time left.

    Args:
        seconds: what each paper took last time; None where unknown.
        executed: the executed copy of each paper's notebook.
        jobs: how many run at once.
    """

    def __init__(
        self, seconds: dict[str, float | None], executed: dict[str, Path], jobs: int
    ) -> None:
        self.seconds = seconds
        self.executed = executed
        self.jobs = jobs
        self.started = time.monotonic()
        self.launched = time.time()
        self.outcomes: dict[str, object] = {}
        self.live = None

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(self._table(), refresh_per_second=2)
            self.live.__enter__()
        return self

    def __exit__(self, *details) -> None:
        if self.live:
            self.live.update(self._table())
            self.live.__exit__(*details)

    @contextmanager
    def watching(self):
        """Look at the running notebooks now and then, for the length of a `with` block."""
        over = threading.Event()

        def watch() -> None:
            seen: set[str] = set()
            while not over.wait(INTERVAL):
                running = self._running()
                for slug in running.keys() - seen:
                    seen.add(slug)
                    self._say(f"{slug}: started")
                if self.live:
                    self.live.update(self._table())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def ended(self, slug: str, outcome) -> None:
        """Note the end of one paper."""
        self.outcomes[slug] = outcome
        word = f"failed: {outcome.message}" if outcome.code else "done"
        count = f"{len(self.outcomes)}/{len(self.seconds)}"
        self._say(f"[{count}] {slug}: {word} in {outcome.seconds:.0f} s{self._left_text()}")

    def _say(self, line: str) -> None:
        if not self.live:
            print(line, flush=True)

    def _running(self) -> dict[str, str]:
        """Papers whose notebook has begun a cell since the start, with that cell."""
        running = {}
        for slug, path in self.executed.items():
            cell = noted_cell(path, self.launched) if slug not in self.outcomes else None
            if cell:
                running[slug] = f"cell {cell[0]} of {cell[1]}"
        return running

    def _left(self) -> float | None:
        """Seconds left, from the times of the last run; None while nothing is known."""
        waiting = [s for slug, s in self.seconds.items() if slug not in self.outcomes]
        known = [s for s in self.seconds.values() if s]
        if not waiting or not known:
            return None
        typical = sum(known) / len(known)
        return sum(s or typical for s in waiting) / min(self.jobs, len(waiting))

    def _left_text(self) -> str:
        left = self._left()
        return f", about {left:.0f} s left" if left else ""

    def _table(self):
        from rich.table import Table

        running = self._running()
        failed = [slug for slug, o in self.outcomes.items() if o.code]
        done = len(self.outcomes) - len(failed)
        waiting = len(self.seconds) - len(self.outcomes) - len(running)
        elapsed = time.monotonic() - self.started
        title = f"{done} done, {len(running)} running, {waiting} waiting, {len(failed)} failed; "
        title += f"{elapsed:.0f} s{self._left_text()}"
        table = Table("paper", "state", title=title, title_justify="left")
        for slug, cell in running.items():
            table.add_row(slug, cell)
        for slug in failed:
            table.add_row(slug, f"failed: {self.outcomes[slug].message}")
        return table
