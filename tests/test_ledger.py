"""What CI may leave out: exactly the papers that are as they were when they were green."""

import json
import shutil

import pytest

from reattend.records import load_record, record_paths
from tests import ledger

SLUG = "halonet"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy")
    for name in ("notebooks", "tests"):
        shutil.copytree(
            ledger.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("params.yaml", "constraints.txt"):
        shutil.copy(ledger.ROOT / name, root)
    return root


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("notebooks/vision/halonet.ipynb", None),
        ("tests/vision/test_halonet.py", None),
        ("tests/vision/test_biformer.py", "same"),
        ("tests/conftest.py", None),
        ("constraints.txt", None),
    ],
)
def test_a_key_covers_what_the_tests_of_a_paper_depend_on(copy, name, new):
    record = load_record(record_paths(copy)[SLUG])
    before, kept = ledger.key(copy, record), (copy / name).read_bytes()
    (copy / name).write_bytes(kept + b"\n")
    assert (ledger.key(copy, record) == before) == (new == "same")
    (copy / name).write_bytes(kept)
    assert ledger.key(copy, record) == before


def test_only_ci_leaves_out_and_only_what_is_green(monkeypatch, tmp_path):
    path = tmp_path / "green.json"
    now = ledger.keys(ledger.ROOT)
    path.write_text(json.dumps(now | {SLUG: "another"}))
    monkeypatch.setenv("REATTEND_LEDGER", str(path))
    monkeypatch.delenv("CI", raising=False)
    assert ledger.green(ledger.ROOT) == set()
    assert ledger.papers_to_run(ledger.ROOT).keys() == now.keys()
    monkeypatch.setenv("CI", "true")
    assert ledger.green(ledger.ROOT) == now.keys() - {SLUG}
    assert list(ledger.papers_to_run(ledger.ROOT)) == [SLUG]
    assert not any("halonet" in path.name for path in ledger.files_left_out(ledger.ROOT))
    path.write_text("{half")
    assert ledger.green(ledger.ROOT) == set()
