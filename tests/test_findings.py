"""What is read of committed runs."""

from reattend.findings import NOT_RUN, count_line
from reattend.pipeline.report import papers_of
from tests.site import toy


def papers(root):
    return {paper.record.slug: paper for paper in papers_of(root)}


def test_the_best_evidence_is_that_of_the_gpu(tmp_path):
    paper = papers(toy.make(tmp_path))["judged"]
    claim = paper.record.claim("keeps_score")
    assert paper.at(claim, "cpu").verdict == "inconclusive"
    assert paper.at(claim, "gpu").verdict == paper.best(claim).verdict == "reproduced"
    assert paper.best(claim).profile == "gpu"
    assert paper.verdicts() == ["reproduced", "reproduced", "out of reach"]
    assert paper.verdicts("cpu")[0] == "inconclusive"


def test_the_answer_is_the_verdict_on_the_first_claim(tmp_path):
    found = papers(toy.make(tmp_path))
    says = "Toy attention keeps the score of dense attention."
    assert found["judged"].answer() == f"Reproduced: {says}"
    assert found["judged"].answer("cpu") == f"Inconclusive: {says}"
    assert found["waiting"].answer() == "Not run yet."


def test_the_answer_names_our_reading(tmp_path):
    toy.make(tmp_path)
    toy.write_paper(tmp_path, toy.record("judged", reading="ours"))
    assert papers(tmp_path)["judged"].answer().startswith("On our reading reproduced: ")


def test_a_paper_without_runs_is_not_run(tmp_path):
    paper = papers(toy.make(tmp_path))["waiting"]
    assert paper.verdicts() == [NOT_RUN, NOT_RUN, "out of reach"]
    assert paper.seconds == {}


def test_a_run_that_was_not_judged_shows_figures_but_no_verdict(tmp_path):
    toy.make(tmp_path)
    (tmp_path / "figures/long_context/judged/verdicts.json").write_text("{ damaged")
    paper = papers(tmp_path)["judged"]
    assert paper.verdicts()[0] == NOT_RUN
    assert paper.runs["cpu"].figures == [("figure1", "Figure 1. A curve")]
    assert paper.seconds == {}


def test_points_of_times_come_from_run_json(tmp_path):
    run = papers(toy.make(tmp_path))["judged"].runs["cpu"]
    assert len(run.evidence["identity", "speed"]) == 9
    assert len(run.evidence["keeps_score", "loss"]) == 8


def test_counts_are_of_papers_that_are_done(tmp_path):
    found = list(papers(toy.make(tmp_path)).values())
    assert count_line(found) == (
        "1 of 2 papers have results: 3 claims, 2 reproduced, 1 out of reach."
    )
    assert "1 inconclusive" in count_line(found, "cpu")
    assert count_line(found[1:]) == "0 of 1 papers have results."
