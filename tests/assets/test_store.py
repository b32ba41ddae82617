"""Fetching and verifying, on made-up packages that stand in for the registries' own."""

import hashlib
import io
import tarfile
import zipfile

import pytest
import yaml

from reattend.assets import store
from reattend.assets.store import AssetError, asset_path, catalogue, fetch, member_hash
from reattend.sizes import NOTE

FILES = {"pkg/a.txt": b"alpha", "pkg/data/b.txt": b"beta", "pkg/data/c.txt": b"gamma"}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pattern_sha(paths) -> str:
    return sha("".join(f"{sha(FILES[p])}  {p}\n" for p in sorted(paths)).encode())


def entry(manager="pip", **changes) -> dict:
    members = [
        {"path": "pkg/a.txt", "sha256": sha(b"alpha")},
        {
            "path": "pkg/data/*.txt",
            "sha256": pattern_sha(["pkg/data/b.txt", "pkg/data/c.txt"]),
            "files": 2,
        },
    ]
    base = {"about": "x", "manager": manager, "package": "pkg", "version": "1", "licence": "MIT"}
    return base | {"members": members, "megabytes": 0.1} | changes


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A cache of its own, a catalogue of one asset, and downloads that copy a made-up package."""

    def prepare(manager="pip", files=FILES, **changes):
        (tmp_path / "catalogue.yaml").write_text(yaml.safe_dump({"toy": entry(manager, **changes)}))
        monkeypatch.setattr(store, "CATALOGUE", tmp_path / "catalogue.yaml")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("REATTEND_ASSETS", raising=False)
        monkeypatch.setattr(store, "_require_manager", lambda *_: None)
        downloads = []

        def download(name, asset, scratch):
            downloads.append(name)
            return _package(scratch, manager, files)

        monkeypatch.setattr(store, "_download", download)
        return downloads

    return prepare


def _package(scratch, manager, files):
    if manager == "pip":
        path = scratch / "pkg.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        path = scratch / "pkg.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("manager", ["pip", "npm"])
def test_fetch_unpacks_only_the_wanted_members_once(registry, manager):
    downloads = registry(manager, files=FILES | {"pkg/unwanted.bin": b"0" * 10})
    directory = fetch("toy")
    found = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*.*"))
    assert [name for name in found if not name.startswith(".")] == sorted(FILES)
    assert asset_path("toy") == directory
    assert fetch("toy") == directory
    assert downloads == ["toy"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (FILES | {"pkg/a.txt": b"other"}, r"'toy' .* refused: wrong sha256 of pkg/a.txt"),
        (FILES | {"pkg/data/c.txt": b"other"}, r"wrong sha256 of pkg/data/\*.txt"),
        (FILES | {"pkg/data/d.txt": b"more"}, r"pkg/data/\*.txt: 3 files instead of 2"),
        ({"pkg/a.txt": b"alpha"}, r"0 files instead of 2"),
    ],
)
def test_wrong_content_is_refused_and_nothing_is_kept(registry, tmp_path, files, message):
    registry(files=files)
    with pytest.raises(AssetError, match=message):
        fetch("toy")
    kept = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert kept == []


def test_damage_in_the_cache_is_seen_and_mended(registry):
    downloads = registry()
    directory = fetch("toy")
    (directory / "pkg/a.txt").write_bytes(b"al")
    with pytest.raises(
        AssetError, match=r"damaged in the cache \(pkg/a.txt\); run `reattend fetch"
    ):
        asset_path("toy")
    fetch("toy")
    assert (asset_path("toy") / "pkg/a.txt").read_bytes() == b"alpha"
    (directory / "pkg/a.txt").write_bytes(b"alphA")  # same size: only the hash shows it
    fetch("toy")
    assert (directory / "pkg/a.txt").read_bytes() == b"alpha"
    assert len(downloads) == 3


def test_a_damaged_note_is_written_anew_without_a_download(registry):
    downloads = registry()
    directory = fetch("toy")
    (directory / NOTE).write_text("{")
    with pytest.raises(AssetError, match=r"is damaged in the cache \(.reattend.json\)"):
        asset_path("toy")
    fetch("toy")
    assert asset_path("toy") == directory
    assert len(downloads) == 1


def test_missing_asset_names_the_command(registry):
    registry()
    with pytest.raises(AssetError, match="not in the cache; run `reattend fetch toy`"):
        asset_path("toy")
    with pytest.raises(AssetError, match="unknown asset 'toi'; the catalogue has: toy"):
        fetch("toi")


def test_missing_package_manager_names_the_cure(registry, monkeypatch):
    registry("npm")
    monkeypatch.undo()
    asset = store.Asset(**entry("npm"))
    monkeypatch.setattr(store.shutil, "which", lambda program: None)
    with pytest.raises(AssetError, match=r"`npm` is not on this machine; .* REATTEND_ASSETS="):
        store._require_manager("toy", asset)
    store._require_manager("toy", store.Asset(**entry("pip")))


def test_a_directory_replaces_fetching(registry, tmp_path, monkeypatch):
    downloads = registry()
    for name, data in FILES.items():
        path = tmp_path / "mine" / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setenv("REATTEND_ASSETS", str(tmp_path / "mine"))
    assert fetch("toy") == asset_path("toy") == tmp_path / "mine" / "toy"
    assert downloads == []
    (tmp_path / "mine/toy/pkg/a.txt").write_bytes(b"other")
    with pytest.raises(AssetError, match="wrong sha256"):
        fetch("toy")
    with pytest.raises(AssetError, match=r"REATTEND_ASSETS names are not .* wrong sha256 of pkg/a"):
        asset_path("toy")
    monkeypatch.setenv("REATTEND_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match="has no directory 'toy'"):
        asset_path("toy")


def test_a_member_cannot_leave_its_directory(registry):
    registry(
        files=FILES | {"pkg/data/../../../x.txt": b"evil"},
    )
    with pytest.raises(AssetError, match="would leave its directory"):
        fetch("toy")


def test_a_package_that_unpacks_to_far_more_than_it_says_is_refused(registry, tmp_path):
    registry(files=FILES | {"pkg/a.txt": bytes(1_100_000)})  # a zip file of a kilobyte
    with pytest.raises(
        AssetError, match=r"more than 10 times the 0.1 MB .* nothing of it was kept"
    ):
        fetch("toy")
    assert not list((tmp_path / "cache").rglob("a.txt"))


@pytest.mark.parametrize("manager", ["pip", "npm"])
@pytest.mark.parametrize("harm", ["cut", "garbage", "flipped"])
def test_a_damaged_package_is_refused_in_one_line(registry, monkeypatch, manager, harm):
    registry(manager, FILES | {"pkg/a.txt": bytes(range(256)) * 400})
    download = store._download

    def harmed(name, asset, scratch):
        package = download(name, asset, scratch)
        data = bytearray(package.read_bytes())
        data[len(data) // 3] ^= 255
        spoilt = {"cut": data[: len(data) // 2], "garbage": b"no archive", "flipped": data}
        package.write_bytes(spoilt[harm])
        return package

    monkeypatch.setattr(store, "_download", harmed)
    with pytest.raises(AssetError) as caught:
        fetch("toy")
    assert "\n" not in str(caught.value)
    assert "cannot be unpacked" in str(caught.value) or "refused" in str(caught.value)


def test_hash_of_several_files_covers_names(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    before = member_hash(tmp_path, "*")
    (tmp_path / "b").rename(tmp_path / "c")
    assert before[1] == 2
    assert member_hash(tmp_path, "*") != before


def test_the_catalogue_is_sound():
    for name, asset in catalogue().items():
        assert asset.licence, name
        assert all(len(member.sha256) == 64 for member in asset.members), name
