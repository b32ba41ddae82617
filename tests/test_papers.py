"""Every paper is finished: what `reattend check` calls hard, it does not lack."""

import pytest

from reattend.pipeline.check import lacks
from reattend.records import record_paths
from tests.pipeline.toy import ROOT


@pytest.mark.parametrize("slug", record_paths(ROOT))
def test_a_paper_is_finished(slug):
    assert [lack.what for lack in lacks(ROOT, slug) if lack.hard] == []
