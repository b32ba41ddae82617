"""Every paper is finished: what `reattend check` calls hard, it does not lack. Those that are not yet are named."""

import json

import pytest

from reattend.pipeline.check import lacks
from reattend.records import record_paths
from tests.pipeline.toy import ROOT

# Papers whose experiment or notebook is still in its first form. The list only ever gets shorter: a paper
# that lacks nothing may not stand here.
UNFINISHED = frozenset(
    {
        "sigmoid_attention",
        "flexprefill",
        "recycled_attention",
        "salient_relevance",
    }
)


def made_before_the_chain(slug: str) -> bool:
    """Whether an unfinished paper's results are older than fingerprints in run.json: they await a new run."""
    record = record_paths(ROOT)[slug]
    run = ROOT / "figures" / record.parent.name / slug / "cpu" / "run.json"
    return slug in UNFINISHED and "fingerprint" not in json.loads(run.read_text())


@pytest.mark.parametrize("slug", record_paths(ROOT))
def test_a_paper_is_finished(slug):
    lacking = [lack.what for lack in lacks(ROOT, slug) if lack.hard]
    if slug in UNFINISHED:
        assert lacking, f"{slug} is finished: take it from the list"
    else:
        assert lacking == []
