"""Copies of the notebooks for readers: pictures show, nothing committed changes, nothing saved is lost."""

import json
import os
import re

import pytest

from reattend.pipeline.errors import CommandError
from reattend.pipeline.study import copy_notebooks, jupyter
from tests.site import toy

COPY = "build/study/long_context/judged.ipynb"
COMMITTED = "notebooks/long_context/judged.ipynb"


def test_links_of_a_copy_lead_to_the_committed_pictures(tmp_path):
    toy.make(tmp_path)
    before = (tmp_path / COMMITTED).read_bytes()
    assert copy_notebooks(tmp_path) == []
    links = re.findall(r"\]\(([^)]*png)\)", (tmp_path / COPY).read_text())
    assert len(links) == 1
    assert all(((tmp_path / COPY).parent / link).resolve().is_file() for link in links)
    assert (tmp_path / COMMITTED).read_bytes() == before


def test_every_link_of_every_real_notebook_leads_where_it_did(root, tmp_path):
    (tmp_path / "notebooks").symlink_to(root / "notebooks")
    copy_notebooks(tmp_path)
    copies = sorted((tmp_path / "build" / "study").rglob("*.ipynb"))
    assert copies
    for copy in copies:
        committed = tmp_path / "notebooks" / copy.parent.name / copy.name
        targets = [
            [os.path.normpath(path.parent / link) for link in links(path)]
            for path in (committed, copy)
        ]
        assert targets[0] == targets[1] != [], copy.name


def links(path):
    return re.findall(r"\]\((\.\./[^)]*)\)", path.read_text())


def test_a_copy_follows_the_notebook_until_its_reader_saves_it(tmp_path):
    toy.make(tmp_path)
    copy_notebooks(tmp_path)
    edit(tmp_path / COMMITTED, "6 * 7", "6 * 8")
    assert copy_notebooks(tmp_path) == []
    assert "6 * 8" in (tmp_path / COPY).read_text()
    edit(tmp_path / COPY, "6 * 8", "6 * 9")
    assert copy_notebooks(tmp_path) == []  # its notebook is still the one it was made of
    edit(tmp_path / COMMITTED, "6 * 8", "6 * 10")
    (line,) = copy_notebooks(tmp_path)
    assert line.startswith(f"{COPY}: kept as you saved it")
    assert "6 * 9" in (tmp_path / COPY).read_text()


def test_a_damaged_note_of_what_was_written_loses_nothing(tmp_path):
    toy.make(tmp_path)
    copy_notebooks(tmp_path)
    edit(tmp_path / COPY, "6 * 7", "6 * 9")
    (tmp_path / "build/study/.copies.json").write_text("{")
    copy_notebooks(tmp_path)
    assert "6 * 9" in (tmp_path / COPY).read_text()


def test_jupyter_serves_the_checkout_and_runs_as_root_in_a_container(tmp_path):
    toy.make(tmp_path)
    arguments = jupyter(tmp_path, "judged", as_root=True)
    assert f"--ServerApp.root_dir={tmp_path}" in arguments
    assert f"--LabApp.default_url=/lab/tree/{COPY}" in arguments
    assert "--allow-root" in arguments
    assert "--allow-root" not in jupyter(tmp_path, None, as_root=False)
    with pytest.raises(CommandError, match="unknown paper 'x'"):
        jupyter(tmp_path, "x", as_root=False)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    json.loads(text)
    path.write_text(text.replace(old, new))
