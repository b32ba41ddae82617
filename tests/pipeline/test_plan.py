"""What runs, in which order, and what fits into a time: no DVC, no notebooks."""

import pytest

from reattend.pipeline.plan import Stage, makespan, ranks, reason, tasks_of, that_fit


def stages() -> dict[str, Stage]:
    """Two assets, a backbone made of one of them, two papers that use it and one that does not."""
    found = [
        Stage("fetch-text", (), 1, "text.json"),
        Stage("fetch-photos", (), 1, "photos.json"),
        Stage("build-model", ("fetch-text",), 100, "model.json"),
        Stage("replicate-a", ("build-model",), 10),
        Stage("replicate-b", ("build-model", "fetch-photos"), 20),
        Stage("replicate-c", ("fetch-photos",), 50),
    ]
    return {stage.name: stage for stage in found}


def todo(reasons, missing=(), force=False):
    return tasks_of(stages(), dict.fromkeys(reasons, "x"), lambda name: name not in missing, force)


def test_nothing_changed_and_nothing_runs_even_with_an_empty_cache():
    assert todo([], missing=stages()) == {}


def test_a_paper_has_what_it_needs_fetched_and_built_before():
    found = todo(["replicate-b"], missing=["fetch-text", "fetch-photos", "build-model"])
    assert list(found) == ["fetch-text", "fetch-photos", "build-model", "replicate-b"]
    # DVC finds them unchanged: their manifests say what is wanted.
    assert [task.force for task in found.values()] == [True, True, True, False]
    assert list(todo(["replicate-b"])) == ["replicate-b"]


def test_what_reads_a_changed_stage_may_follow():
    found = todo(["fetch-text"])
    assert list(found) == ["fetch-text", "build-model", "replicate-a", "replicate-b"]
    assert [task.only_if_new for task in found.values()] == [False, True, True, True]
    assert found["build-model"].why == "only if 'fetch-text' makes something else"


def test_force_runs_all():
    found = todo([], force=True)
    assert list(found) == list(stages())
    assert all(task.force for task in found.values())
    # What lies in the cache takes no time to build.
    assert found["build-model"].stage.seconds == 2


def test_the_longest_chain_comes_first():
    found = ranks(stages())
    assert found["fetch-text"] == 1 + 100 + 20
    assert found["fetch-photos"] == 1 + 50
    assert found["replicate-a"] == 10


def test_makespan_overlaps_builds_with_papers():
    assert makespan(stages(), jobs=1) == 182
    # text 0-1, photos 0-1, model 1-101, c 1-51, b 101-121, a 101-111
    assert makespan(stages(), jobs=2) == 121
    assert makespan({}, jobs=2) == 0


@pytest.mark.parametrize(
    ("seconds", "papers"),
    [(30, ""), (50, ""), (51, "c"), (161, "c"), (162, "ac"), (181, "ac"), (182, "abc")],
)
def test_as_many_papers_as_end_in_time(seconds, papers):
    """The price of c is 50.5 and that of a 60.5 (half of the model), so c is tried first, then a, b."""
    found = that_fit(stages(), jobs=1, seconds=seconds)
    assert "".join(n[-1] for n in found if n.startswith("replicate")) == papers
    assert makespan(found, jobs=1) <= seconds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], None),
        (["changed command"], "its command or profile changed"),
        ([{"changed deps": {"build/assets/x.json": "deleted"}}], None),
        ([{"changed outs": {"build/assets/x.json": "deleted"}}], None),
        ([{"changed deps": {"build/assets/x.json": "modified"}}], "'x' changed"),
        (
            [{"changed deps": {"build/fingerprints/papers/x.json": "modified"}}],
            "its code, record, parameters or catalogue entry changed",
        ),
        (
            [{"changed outs": {"figures/theory/x/cpu": "modified"}}],
            "its results were edited or damaged",
        ),
        (
            [
                {"changed deps": {"build/fingerprints/papers/x.json": "modified"}},
                {"changed outs": {"figures/theory/x/cpu": "deleted"}},
            ],
            "no results yet at this profile",
        ),
    ],
)
def test_reasons(changes, words):
    assert reason(changes) == words
