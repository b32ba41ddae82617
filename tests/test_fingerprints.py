"""Fingerprints move with meaning only, on made-up modules and on the suite's own graph."""

import json
import shutil

import pytest

from reattend.fingerprints import (
    LIBRARY,
    imported_modules,
    module_fingerprint,
    paper_fingerprint,
    source_hash,
)
from reattend.records import record_paths

SOURCE = '''
"""Module."""


def f(x):
    """Doc."""
    return x + 1  # why
'''


def test_comments_docstrings_and_layout_do_not_count():
    assert source_hash(SOURCE) == source_hash("def f(x):\n    return (x+1)")
    assert source_hash(SOURCE) == source_hash(
        SOURCE.replace("Doc.", "Other.").replace("why", "what")
    )
    assert source_hash(SOURCE) != source_hash(SOURCE.replace("+ 1", "+ 2"))


def test_a_string_that_is_no_docstring_counts():
    assert source_hash('x = "a"') != source_hash('x = "b"')


@pytest.fixture
def library(tmp_path):
    files = {
        "__init__.py": "",
        "a.py": "from reattend.sub.b import g\n",
        "sub/__init__.py": "",
        "sub/b.py": "def g():\n    from reattend import c\n    return c\n",
        "c.py": "X = 1\n",
        "d.py": "import numpy\n",
    }
    for name, text in files.items():
        path = tmp_path / "reattend" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "reattend"


def test_imports_are_followed_transitively(library):
    names = set(imported_modules(["import reattend.a"], library))
    assert names == {"reattend", "reattend.a", "reattend.sub", "reattend.sub.b", "reattend.c"}


def test_module_fingerprint_moves_with_what_it_imports(library):
    before = module_fingerprint("reattend.a", library)
    (library / "d.py").write_text("import scipy\n")
    assert module_fingerprint("reattend.a", library) == before
    (library / "c.py").write_text("X = 2\n")
    assert module_fingerprint("reattend.a", library) != before


# The real graph ---------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, root):
    """A copy of the suite's library and notebooks to edit, and a way to fingerprint it."""
    shutil.copytree(LIBRARY, tmp_path / "reattend", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "notebooks", tmp_path / "notebooks")

    def fingerprints():
        return {
            path.stem: paper_fingerprint(path.with_suffix(".ipynb"), tmp_path / "reattend")
            for path in sorted((tmp_path / "notebooks").glob("*/*.yaml"))
        }

    before = fingerprints()

    def changed():
        after = fingerprints()
        return {slug for slug in after if after[slug] != before[slug]}

    return tmp_path, changed


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def papers_importing(root, module):
    return {
        slug
        for slug, path in record_paths(root).items()
        if module in paper_fingerprint(path.with_suffix(".ipynb"))["modules"]
    }


def test_editing_comments_and_docstrings_changes_nothing(checkout):
    path, changed = checkout
    for file in (path / "reattend").rglob("*.py"):
        text = file.read_text()
        file.write_text(text + "\n# a remark\n")
    assert changed() == set()


def test_editing_outputs_and_metadata_changes_nothing(checkout):
    path, changed = checkout
    for file in (path / "notebooks").glob("*/*.ipynb"):
        notebook = json.loads(file.read_text())
        notebook["metadata"]["touched"] = True
        for cell in notebook["cells"]:
            cell["metadata"]["collapsed"] = True
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        file.write_text(json.dumps(notebook))
    assert changed() == set()


def test_editing_one_method_changes_its_paper_alone(checkout):
    path, changed = checkout
    method = path / "reattend/long_context/flexprefill.py"
    method.write_text(method.read_text() + "\nEDITED = True\n")
    assert changed() == {"flexprefill"}


def test_editing_the_block_sparse_operator_changes_those_who_import_it(checkout, root):
    path, changed = checkout
    operator = path / "reattend/attention/block_sparse.py"
    operator.write_text(operator.read_text() + "\nEDITED = True\n")
    expected = papers_importing(root, "reattend.attention.block_sparse")
    assert "flexprefill" in expected
    assert not {"zoology", "efficient_probing"} & expected
    assert changed() == expected


def test_editing_the_replication_changes_all(checkout, root):
    path, changed = checkout
    edit(
        path / "reattend/replication.py",
        "class Replication:",
        "EDITED = True\n\n\nclass Replication:",
    )
    assert changed() == set(record_paths(root))


def test_editing_a_record_changes_its_paper(checkout):
    path, changed = checkout
    record = path / "notebooks/language_modeling/zoology.yaml"
    record.write_text(record.read_text() + "\ntolerance: 0.03\n")
    assert changed() == {"zoology"}
