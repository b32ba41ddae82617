"""What is shown of running notebooks."""

import os

from reattend.pipeline.display import Display
from reattend.pipeline.notebooks import note_cell
from reattend.pipeline.plan import Stage, Task
from reattend.pipeline.workers import Outcome


def test_cells_of_this_run_and_time_left(tmp_path, capsys):
    names = [f"replicate-{name}" for name in ("now", "before", "waiting")]
    todo = {name: Task(Stage(name, (), 10.0), "x") for name in [*names, "build-model"]}
    executed = {name: tmp_path / f"{name}.smoke.ipynb" for name in names}
    now, before, _ = names
    with Display(todo, executed, jobs=2) as display:
        for name in (now, before):
            display.started(name)
            note_cell(executed[name], 3, 7)
        os.utime(executed[before].with_suffix(".cell"), (0, display.running[before] - 5))
        # A file's time comes from a coarser clock than the start's.
        os.utime(executed[now].with_suffix(".cell"), (0, display.running[now] + 1))
        assert display._cell(now) == "cell 3 of 7"
        assert display._cell(before) == "running"  # that of an earlier run
        executed[now].with_suffix(".cell").write_text("")  # just being written
        assert display._cell(now) == "running"
        display.dropped("build-model")
        display.ended(now, Outcome(0, 12.0))
        display.ended("replicate-waiting", Outcome(1, 0.0, "needs asset 'x'"))
    assert capsys.readouterr().out.splitlines() == [
        "now: started",
        "before: started",
        "[1/3] now: done in 12 s, about 10 s left",
        "[2/3] waiting: failed: needs asset 'x' in 0 s, about 10 s left",
    ]
