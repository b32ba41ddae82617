"""Records are checked, and errors name the file and the field."""

import copy
import json
import subprocess

import pytest
import yaml

from reattend.project import FileError
from reattend.records import RecordError, load_record, record_paths
from tests.pipeline.toy import RECORD


@pytest.fixture
def write(tmp_path):
    def _write(change=lambda record: None):
        record = copy.deepcopy(RECORD) | {"slug": "toy"}
        change(record)
        path = tmp_path / "theory" / "toy.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(record))
        return path

    return _write


def test_a_good_record_loads(write):
    record = load_record(write())
    assert record.claim("gain").tests[0].better == "higher"
    assert "arXiv" not in record.citation
    with pytest.raises(KeyError, match="it has: gain"):
        record.claim("loss")


def mean_test(record):
    return record["claims"][0]["tests"][0]


def test_times_are_judged_by_medians_unless_the_record_says_otherwise(write):
    def statistic(**more):
        changed = load_record(write(lambda r: mean_test(r).update(more)))
        return changed.claims[0].tests[0].statistic

    assert statistic() == "mean"
    assert statistic(unit="round") == "median"
    assert statistic(unit="round", statistic="mean") == "mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(claims=[]), r"toy.yaml: claims"),
        (lambda r: r.pop("claims"), r"toy.yaml: claims"),
        (lambda r: r.update(colour="red"), r"toy.yaml: colour"),
        (lambda r: r.update(family="theories"), r"toy.yaml: family"),
        (
            lambda r: mean_test(r).update(not_reproduced=3.0),
            r"claims.gain.tests.mean: margins overlap",
        ),
        (lambda r: mean_test(r).update(better="lower"), r"claims.gain.tests.mean: margins overlap"),
        (lambda r: mean_test(r).update(better="equal"), r"tests.mean: 'better: equal' takes"),
        (lambda r: mean_test(r).update(better="more"), r"claims.gain.tests.mean.better"),
        (lambda r: mean_test(r).pop("reproduced"), r"tests.mean: 'reproduced' is missing"),
        (lambda r: mean_test(r).update(margin=-1.0), r"tests.mean.margin"),
        (lambda r: r["claims"][0].update(out_of_reach="x"), r"claims.gain: needs either"),
        (lambda r: r["claims"][0].pop("tests"), r"claims.gain: needs either"),
        (lambda r: r["claims"].append(r["claims"][0]), r"two claims have the same id"),
        (lambda r: mean_test(r).update(role="control"), r"neither a control nor a gate"),
        (lambda r: mean_test(r).update(role="placebo"), r"tests.mean.role"),
        (lambda r: mean_test(r).update(role="gate", runs=2), r"'runs' belongs to tests"),
        (lambda r: mean_test(r).update(runs=0), r"claims.gain.tests.mean.runs"),
        (lambda r: mean_test(r).pop("unit"), r"claims.gain.tests.mean.unit: Field required"),
        (lambda r: mean_test(r).update(unit="prompt"), r"claims.gain.tests.mean.unit"),
        (
            lambda r: mean_test(r).update(unit="item"),
            r"claims.gain: test 'mean': a claim about train",
        ),
        (lambda r: r["claims"][0].pop("about"), r"claims.gain: 'about' is missing"),
        (lambda r: r["claims"][0].pop("placebo"), r"claims.gain: 'placebo' is missing"),
        (
            lambda r: r["claims"][0].update(placebo="none"),
            r"claims.gain: placebo 'none' is no test",
        ),
        (lambda r: mean_test(r).pop("not_reproduced"), r"tests.mean: no way to lose"),
        (
            lambda r: mean_test(r).update(reproduced=0.0, not_reproduced=0.0),
            r"tests.mean: no way to lose",
        ),
        (lambda r: mean_test(r).update(reproduced=float("nan")), r"tests.mean.reproduced"),
        (lambda r: mean_test(r).update(statistic="mode"), r"tests.mean.statistic"),
        (
            lambda r: mean_test(r).update(unit="seed x item", statistic="median"),
            r"takes no statistic but the mean",
        ),
        (
            lambda r: r["claims"][0]["tests"].append(
                {"id": "g", "measures": "m", "better": "higher", "unit": "item", "role": "gate"}
            ),
            r"claims.gain.tests.g: a gate needs a margin: 'reproduced' is missing",
        ),
        (
            lambda r: r.update(grow={"parameter": "n", "unit": "seed", "looks": [8, 8]}),
            r"toy.yaml: grow: each look must be larger",
        ),
        (
            lambda r: r.update(grow={"parameter": "n", "unit": "seed", "looks": [8]}),
            r"toy.yaml: grow.looks",
        ),
        (lambda r: r.update(budget_seconds={"cpu": 601}), r"toy.yaml: budget_seconds.cpu"),
        (
            lambda r: r.update(reported={"t": {"source": "s", "columns": ["a"], "rows": [[1, 2]]}}),
            r"reported.t: row",
        ),
        (lambda r: r.update(slug="other"), r"slug and family"),
    ],
)
def test_bad_records_name_file_and_field(write, change, message):
    with pytest.raises(RecordError, match=message):
        load_record(write(change))


def test_ways_to_lose(write):
    """A negligible effect, two bounds, or a claim of being no worse: each can be refuted."""
    for margins in (
        {"reproduced": 0.0, "negligible": 0.5},
        {"reproduced": 5.0, "not_reproduced": 0.0},
        {"reproduced": -0.5},
    ):

        def change(record, margins=margins):
            test = mean_test(record)
            del test["reproduced"], test["not_reproduced"]
            test.update(margins)

        load_record(write(change))


def test_broken_yaml_names_the_line(write):
    path = write()
    path.write_text("slug: toy\nclaims: [")
    with pytest.raises(FileError, match=r"toy.yaml, line \d: not valid YAML"):
        load_record(path)


def test_all_records_of_the_suite_are_sound(root):
    for path in record_paths(root).values():
        record = load_record(path)
        assert len(record.claims) >= 3


def committed(root, path):
    """A file of JSON at each of its commits, the first one first."""
    at = ["git", "-C", root]
    log = [*at, "log", "--reverse", "--format=%H", "--", path]
    commits = subprocess.run(log, capture_output=True, text=True, check=True).stdout.split()
    for commit in commits:
        text = subprocess.run(
            [*at, "show", f"{commit}:{path}"], capture_output=True, text=True
        ).stdout
        yield json.loads(text) if text.startswith("{") else {}


def open_before(root, path):
    """How many committed results at cpu left a test open, by claim and test, the present one not counted."""
    results = {}
    for verdicts in committed(root, path):
        for name, claim in verdicts.get("cpu", {}).items():
            for test, found in claim.get("tests", {}).items():
                points = (found["effect"], found.get("n"))
                results.setdefault((name, test), {})[points] = found["verdict"] == "inconclusive"
    return {key: sum(list(found.values())[:-1]) for key, found in results.items()}


def test_a_question_asked_again_says_so(root):
    """Asking until an answer comes is held to the level of as many looks (`Test.runs`); history counts."""
    shallow = ["git", "-C", root, "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, capture_output=True, text=True).stdout.strip() != "false":
        pytest.skip("the history of the results is not here")
    silent = []
    for path in record_paths(root).values():
        record = load_record(path)
        before = open_before(root, f"figures/{record.family}/{record.slug}/verdicts.json")
        silent += [
            f"{record.slug}: {claim.id}.{test.id}: runs: {before[claim.id, test.id] + 1}"
            for claim in record.claims
            for test in claim.tests
            if test.role == "test" and test.runs <= min(before.get((claim.id, test.id), 0), 4)
        ]
    assert not silent
