"""The pictures and pages, read as text; tests/site/test_browser.py looks at them in a browser."""

from __future__ import annotations

import re
import subprocess
from xml.etree import ElementTree

import pytest
from markupsafe import escape

from reattend.attention.registry import METHODS
from reattend.backbones.store import catalogue
from reattend.evidence.samples import Points
from reattend.findings import STATES, Table
from reattend.pipeline.report import papers_of
from reattend.records import Test
from reattend.site.history import histories
from reattend.site.intervals import Measured, effects_of, interval_svg
from reattend.site.marks import CHARACTERS, MEANINGS, shape
from reattend.site.matrix import WIDTH, matrix_svg, text_width, wrapped
from reattend.site.tables import tables
from tests.site import toy

SVG = "{http://www.w3.org/2000/svg}"


def a_test(**margins) -> Test:
    return Test(id="t", measures="gain, points", better="higher", unit="item", **margins)


def measured(effect, low, high, points=()):
    found = {"effect": effect, "low": low, "high": high, "verdict": "reproduced"}
    return Measured("cpu", found, points)


# The claim matrix ---------------------------------------------------------------------------------


def test_every_state_has_a_shape_a_character_and_a_meaning_of_its_own():
    assert len({shape(state) for state in STATES}) == len(STATES)
    assert len(set(CHARACTERS.values())) == len(STATES) == len(MEANINGS)


def test_matrix_has_a_mark_for_each_claim_and_a_legend(checkout):
    papers = papers_of(checkout)
    picture = ElementTree.fromstring(matrix_svg(papers))
    marks = [g.get("class") for g in picture.iter(f"{SVG}g")]
    claims = sum(len(paper.record.claims) for paper in papers)
    assert len(marks) == claims + len(STATES)
    assert marks[:3] == ["v-reproduced", "v-reproduced", "v-out-of-reach"]
    assert "prefers-color-scheme: dark" in picture.find(f"{SVG}style").text
    assert "judged: reproduced" in picture.find(f"{SVG}desc").text


def test_matrix_text_stays_within_the_picture(checkout):
    for text in ElementTree.fromstring(matrix_svg(papers_of(checkout))).iter(f"{SVG}text"):
        if text.get("text-anchor") != "end":
            assert float(text.get("x")) + text_width(text.text) <= WIDTH


def test_lines_hold_all_words_and_no_more_than_their_width():
    text = "Sampling by nu1 needs fewer source samples than sampling by nu2"
    lines = wrapped(text, 150)
    assert " ".join(lines) == text
    assert len(lines) > 2
    assert all(text_width(line) <= 150 for line in lines)


# Intervals ----------------------------------------------------------------------------------------


def position(svg: str, kind: str) -> float:
    return float(re.search(rf'class="{kind}" d="M([\d.]+)', svg).group(1))


def test_interval_lies_right_of_the_margin_that_it_clears():
    test = a_test(reproduced=0.0, negligible=0.5)
    assert position(interval_svg(test, [measured(2, 1, 3)]), "bar") > position(
        interval_svg(test, [measured(2, 1, 3)]), "margin"
    )
    assert position(interval_svg(test, [measured(-2, -3, -1)]), "bar") < position(
        interval_svg(test, [measured(-2, -3, -1)]), "margin"
    )


def test_points_far_away_do_not_squash_the_interval():
    test = a_test(reproduced=0.0, negligible=0.5)
    near = interval_svg(test, [measured(2, 1, 3, (0.5, 2.0, 4.0))])
    far = interval_svg(test, [measured(2, 1, 3, (-900.0, 2.0, 900.0))])
    assert near.count('class="point"') == 3
    assert far.count('class="point"') == 1
    assert position(far, "bar") == position(interval_svg(test, [measured(2, 1, 3)]), "bar")


def test_an_exact_zero_within_a_margin_of_zero_can_be_drawn():
    test = Test(id="t", measures="difference", better="equal", unit="exact", margin=0.0)
    svg = interval_svg(test, [Measured("cpu", {"effect": 0.0, "verdict": "reproduced"}, (0.0,))])
    assert 'class="bar"' not in svg
    ElementTree.fromstring(svg)


def test_picture_says_in_words_what_it_shows():
    test = a_test(reproduced=0.0, negligible=0.5)
    svg = interval_svg(test, [measured(2, 1, 3)])
    assert 'aria-label="gain, points: cpu 2 [1, 3]; reproduced ≥ 0, negligible &lt; 0.5"' in svg
    assert interval_svg(test, []) == ""


def test_only_points_whose_mean_is_the_effect_are_drawn():
    values = Points({"value": [1.0, 2.0]}, {"item": ("a", "b")})
    pair = Points({"a": [1.0], "b": [2.0]}, {"item": ("a",)})
    assert effects_of(values, "mean") == (1.0, 2.0)
    assert effects_of(values, "share") == effects_of(pair, "ratio_of_sums") == ()
    assert effects_of(None, "mean") == ()


# Tables and history -------------------------------------------------------------------------------


def test_reported_numbers_join_the_table_with_the_same_rows(checkout):
    paper = papers_of(checkout)[0]
    (joined,), rest = tables(paper.record, paper.runs["cpu"])
    assert joined.columns == ("method", "score", "average, reported")
    assert joined.rows[1:] == (("toy", "84.1", "89.2"), ("other", "", "61.6"))
    assert rest == []


def test_reported_numbers_that_fit_no_table_stand_alone(checkout):
    paper = papers_of(checkout)[0]
    other = paper.record.reported["scores"].model_copy(update={"rows": [["dense", 1], ["x", 2]]})
    record = paper.record.model_copy(update={"reported": {"scores": other}})
    (ours,), (rest,) = tables(record, paper.runs["cpu"])
    assert ours.columns == ("method", "score")
    assert rest == Table("scores", "Table 1", ("method", "average"), (("dense", "1"), ("x", "2")))


def test_history_shows_each_change_of_a_verdict(tmp_path):
    toy.make(tmp_path)

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def commit(subject):
        git("add", "--all", "--force")
        git("commit", "--quiet", "--message", subject)

    verdicts = tmp_path / "figures/long_context/judged/verdicts.json"
    old = tmp_path / "figures/long_context/waiting/cpu/results.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"claims": {"keeps_score": {"verdict": "partially"}, "x": {"verdict": null}}}')
    git("init", "--quiet")
    commit("first")
    verdicts.write_text(verdicts.read_text() + "\n")
    commit("the same verdicts")
    verdicts.write_text(verdicts.read_text().replace("inconclusive", "not reproduced"))
    old.write_text("damaged")
    commit("another")
    found = histories(tmp_path)
    assert [(s.subject, s.profile) for s in found["judged"] if s.profile == "cpu"] == [
        ("first", "cpu"),
        ("another", "cpu"),
    ]
    assert found["judged"][-1].verdicts["keeps_score"] == "not reproduced"
    assert [s.verdicts for s in found["waiting"]] == [{"keeps_score": "partially"}]


def test_history_is_empty_without_git(tmp_path):
    assert histories(toy.make(tmp_path)) == {}


# Pages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["judged", "waiting"])
def test_text_of_records_is_escaped(site, slug):
    page = (site / "papers" / f"{slug}.html").read_text()
    assert "<code>Sample</code> and &lt;b&gt;nothing&lt;/b&gt; else" in page
    assert "Small &amp; made up." in page


def test_a_paper_that_has_not_run_says_so(site):
    page = (site / "papers" / "waiting.html").read_text()
    assert "Not run yet." in page
    assert "No verdict has been committed yet." in page
    assert "61.6" in page  # what the paper reports


def test_pages_link_to_nothing_that_is_missing(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == 7
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"


def test_every_method_has_one_line_with_settings_source_and_limits(site):
    page = (site / "methods.html").read_text()
    lines = dict(re.findall(r'<tr id="(\w+)">(.*?)</tr>', page, re.DOTALL))
    assert list(lines) == list(METHODS)
    assert "<code>gamma=0.95</code>" in lines["flexprefill"]
    assert "arXiv 2502.20766" in lines["flexprefill"]
    assert "lib/reattend/long_context/flexprefill.py" in lines["flexprefill"]
    assert "(required)" in lines["seer_attention"]
    assert "new tokens" in lines["quest"]


def test_shared_models_are_listed_and_a_report_is_shown(site):
    page = (site / "models.html").read_text()
    for name, backbone in catalogue().items():
        assert f">{name}</" in page
        assert str(escape(backbone.about)) in page
    sections = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    assert [name for name, _ in sections] == ["mae"]
    assert "<figcaption>Table 1. Scores</figcaption>" in sections[0][1]
    assert "83.93" in sections[0][1]
    assert 'src="figures/backbones/mae/cpu/figure1.png"' in sections[0][1]
    assert 'width="640" height="200"' in sections[0][1]


def test_a_failed_build_leaves_the_site_that_was_there(checkout, tmp_path, monkeypatch):
    from reattend.site import build

    target = tmp_path / "site"
    target.mkdir()
    (target / "index.html").write_text("before")
    monkeypatch.setattr(build, "fetch", lambda name: tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        build.build_site(checkout, toy.records(checkout), target)
    assert (target / "index.html").read_text() == "before"
