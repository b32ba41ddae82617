"""What is shown of running notebooks."""

import os

from reattend.pipeline.display import Display
from reattend.pipeline.notebooks import note_cell
from reattend.pipeline.workers import Outcome


def test_only_what_runs_now_is_shown_with_its_cell(tmp_path, capsys):
    executed = {name: tmp_path / f"{name}.smoke.ipynb" for name in ("now", "before", "waiting")}
    note_cell(executed["before"], 9, 9)
    with Display(dict.fromkeys(executed, 10.0), executed, jobs=2) as display:
        note_cell(executed["now"], 3, 7)
        os.utime(executed["before"].with_suffix(".cell"), (0, display.launched - 5))
        assert display._running() == {"now": "cell 3 of 7"}
        executed["now"].with_suffix(".cell").write_text("")  # just being written
        assert display._running() == {}
        note_cell(executed["now"], 4, 7)
        display.ended("now", Outcome(0, 12.0))
        assert display._running() == {}
    assert capsys.readouterr().out == "[1/3] now: done in 12 s, about 10 s left\n"
