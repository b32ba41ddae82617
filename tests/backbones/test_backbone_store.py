"""The cache of backbones: built once, and again when damaged."""

import pytest

from reattend.backbones import store
from reattend.backbones.trained import prose_bpe


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """A backbone that is quick to build; the profiles of its builds."""
    done = []

    def build(target, profile):
        (target / "weights").write_bytes(b"12345")
        done.append(profile)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prose_bpe, "build", build)
    monkeypatch.setattr(store, "asset_path", lambda name: tmp_path)
    return done


def test_a_backbone_is_built_once(builds):
    assert not store.is_built("prose_bpe", "cpu")
    directory = store.backbone_path("prose_bpe")
    assert store.is_built("prose_bpe", "cpu")
    assert store.build("prose_bpe") == store.backbone_path("prose_bpe") == directory
    assert builds == ["cpu"]


def test_a_truncated_backbone_is_built_again(builds):
    directory = store.backbone_path("prose_bpe")
    (directory / "weights").write_bytes(b"1")
    assert not store.is_built("prose_bpe", "cpu")
    assert (store.backbone_path("prose_bpe") / "weights").read_bytes() == b"12345"
    assert builds == ["cpu", "cpu"]
    assert [p.name for p in directory.parent.iterdir() if p.is_dir()] == [directory.name]
