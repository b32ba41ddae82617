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


def build_by_an_older_recipe(monkeypatch, weights: dict[str, bytes]) -> dict[str, str]:
    """Build by another recipe than today's; its digests."""
    digests = {profile: f"older-{profile}" for profile in ("smoke", "cpu")}

    def build(target, profile):
        (target / "weights").write_bytes(weights[profile])

    with monkeypatch.context() as then:
        then.setattr(prose_bpe, "build", build)
        then.setattr(store, "digest", lambda recipe: digests[recipe["profile"]])
        for profile in digests:
            store.build("prose_bpe", profile)
    return digests


@pytest.fixture
def varied(builds, monkeypatch):
    entry = store.find_backbone("prose_bpe").model_copy(update={"profiles": True})
    monkeypatch.setattr(store, "find_backbone", lambda name: entry)
    return builds


def test_a_build_is_carried_over_where_the_smoke_build_is_the_same(varied, monkeypatch):
    older = build_by_an_older_recipe(monkeypatch, {"smoke": b"12345", "cpu": b"trained for hours"})
    assert not store.carry_over("prose_bpe", "cpu", older)  # no smoke build of today's recipe yet
    store.build("prose_bpe", "smoke")
    assert store.carry_over("prose_bpe", "cpu", older)
    assert (store.backbone_path("prose_bpe") / "weights").read_bytes() == b"trained for hours"
    assert varied == ["smoke"]
    assert not store.carry_over("prose_bpe", "cpu", older)  # it is there


@pytest.mark.parametrize("smoke", [b"12346", b"123456"])
def test_a_build_is_not_carried_over_where_the_smoke_build_differs(varied, monkeypatch, smoke):
    older = build_by_an_older_recipe(monkeypatch, {"smoke": smoke, "cpu": b"trained for hours"})
    store.build("prose_bpe", "smoke")
    assert not store.carry_over("prose_bpe", "cpu", older)
    assert not store.is_built("prose_bpe", "cpu")


def test_a_damaged_build_is_not_carried_over(varied, monkeypatch):
    older = build_by_an_older_recipe(monkeypatch, {"smoke": b"12345", "cpu": b"trained for hours"})
    store.build("prose_bpe", "smoke")
    (store._kept("prose_bpe", older["cpu"]) / "weights").write_bytes(b"1")
    assert not store.carry_over("prose_bpe", "cpu", older)
