"""The README's part about results, the scoreboard, and `reattend show`."""

import csv
import io

import pytest
from rich.console import Console

from reattend.pipeline.errors import CommandError
from reattend.pipeline.report import papers_of, readme_with_results, scoreboard, write_report
from reattend.pipeline.show import show
from tests.site import toy


def shown(root, slug):
    out = Console(file=io.StringIO(), width=200)
    show(root, slug, out)
    return out.file.getvalue()


def test_report_writes_between_the_markers_alone(tmp_path):
    text = (toy.make(tmp_path) / "README.md").read_text()
    assert text.startswith("# Toy\n\n<!-- scoreboard -->\n\n1 of 2 papers have results")
    assert text.endswith("<!-- /scoreboard -->\n\nEnd.\n")
    assert "](figures/claims.svg)" in text
    assert "[judged](notebooks/long_context/judged.ipynb)" in text
    assert "| ● ● – | gpu 12, cpu 12 |" in text
    assert "| ○ ○ – |  |" in text
    assert readme_with_results("no markers", papers_of(tmp_path)) == "no markers"


def test_methods_stand_beside_the_verdicts_of_their_paper(tmp_path):
    papers = papers_of(toy.make(tmp_path))

    def readme(claims):
        rows = [
            f"| [{m}](lib/reattend/long_context/{m}.py) | prompt |" for m in ("judged", "other")
        ]
        return f"<!-- methods -->\n{rows[0]} {claims} |\n{rows[1]} |\n<!-- /methods -->"

    assert readme_with_results(readme("old"), papers) == readme("● ● –")
    assert readme_with_results(readme(""), papers) == readme("● ● –")


def test_report_changes_nothing_twice(tmp_path):
    toy.make(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    before = {path: path.read_bytes() for path in files}
    write_report(tmp_path)
    assert {path: path.read_bytes() for path in files} == before


def test_scoreboard_has_every_claim_with_its_best_evidence(tmp_path):
    rows = list(csv.DictReader(io.StringIO(scoreboard(papers_of(toy.make(tmp_path))))))
    assert [row["claim"] for row in rows] == ["keeps_score", "identity", "latency"] * 2
    first = rows[0]
    assert (first["verdict"], first["profile"], first["n"]) == ("reproduced", "gpu", "40")
    assert first["ours"].startswith("loss 3")
    assert first["seconds"] == "12"
    assert rows[3]["verdict"] == "not run"


def test_show_prints_claims_verdicts_and_evidence(tmp_path):
    text = shown(toy.make(tmp_path), "judged")
    assert "● reproduced (gpu)  ? inconclusive (cpu)  Toy attention keeps the score" in text
    assert "(40 items)" in text
    assert "reproduced ≥ 0, negligible < 0.5; a control, which must fail" in text
    assert "– out of reach  It is three times as fast" in text
    assert "gpu 12 s, cpu 12 s" in text


def test_show_says_what_has_not_run(tmp_path):
    text = shown(toy.make(tmp_path), "waiting")
    assert "○ not run  Toy attention" in text
    assert "not run yet: reattend run waiting" in text


def test_show_names_the_papers_there_are(tmp_path):
    with pytest.raises(
        CommandError, match="unknown paper 'x'; there are: judged, waiting"
    ) as error:
        show(toy.make(tmp_path), "x")
    assert error.value.exit_code == 2
