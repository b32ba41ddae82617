"""Build shared models once and find them again.

A backbone is made by `build(target, profile)` of its module `reattend.backbones.<room>.<name>` from assets;
its room is `pretrained` (weights out of packages) or `trained` (trained here).
It is kept in the user's cache under a key made of its recipe: the definitions that `build` uses,
the hashes of its assets, and the profile where the profile matters. Clones share it, and a
changed recipe makes a new one.
"""

from __future__ import annotations

import filecmp
import importlib
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from reattend.assets.store import (
    AssetError,
    asset_path,
    cache_directory,
    check_declared,
    fetch,
    pinned,
)
from reattend.fingerprints import digest, module_fingerprint
from reattend.locks import locked
from reattend.project import load_yaml
from reattend.sizes import damage, note_sizes

CATALOGUE = Path(__file__).with_name("catalogue.yaml")


class BackboneError(RuntimeError):
    """A backbone that is not in the catalogue or cannot be built; the message names the cure."""


class Backbone(BaseModel):
    """One entry of the catalogue of backbones."""

    model_config = ConfigDict(extra="forbid")
    module: str  # of the library, whose `build` makes it
    about: str
    assets: list[str]
    backbones: list[str] = []  # backbones this one is built from
    seconds: int  # at cpu, one thread
    profiles: bool = False  # whether it is made differently at smoke, cpu and gpu


def catalogue() -> dict[str, Backbone]:
    """All backbones by name."""
    return dict(_parsed(CATALOGUE.read_text(encoding="utf8")))


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, Backbone]:
    return {
        name: Backbone(module=f"reattend.backbones.{room}.{name}", **entry)
        for room, entries in load_yaml(text).items()
        for name, entry in entries.items()
    }


def find_backbone(name: str) -> Backbone:
    """The catalogue's entry for `name`.

    Raises:
        BackboneError: for an unknown name; lists the known ones.
    """
    known = catalogue()
    if name not in known:
        raise BackboneError(f"unknown backbone '{name}'; there are: {', '.join(known)}")
    return known[name]


def made_from(name: str) -> dict:
    """The code and the assets that a backbone is made from; the same in every profile and machine."""
    entry = find_backbone(name)
    return {
        "code": module_fingerprint(entry.module),
        "assets": {asset: pinned(asset)["files"] for asset in entry.assets},
        "backbones": {other: made_from(other) for other in entry.backbones},
    }


def recipe(name: str, profile: str) -> dict:
    """Everything the built files depend on; the same on every machine."""
    which = profile if _varies(name) else "any"
    return {"backbone": name, "profile": which, **made_from(name)}


def _varies(name: str) -> bool:
    entry = find_backbone(name)
    return entry.profiles or any(map(_varies, entry.backbones))


def backbone_path(name: str, profile: str = "cpu") -> Path:
    """Directory of a built backbone; builds it first, saying how long that takes, when it is missing
    or damaged (a file of another size than when it was built).

    Raises:
        BackboneError, AssetError: when it is unknown, or something it is made from is missing.
    """
    directory = _directory(name, profile)
    check_declared(f"backbone '{name}'", name)
    if damage(directory):
        build(name, profile)
    return directory


def is_built(name: str, profile: str) -> bool:
    """Whether a backbone of today's recipe lies in the cache, whole."""
    return damage(_directory(name, profile)) is None


def _directory(name: str, profile: str) -> Path:
    return _kept(name, digest(recipe(name, profile)))


def _kept(name: str, key: str) -> Path:
    return cache_directory() / "backbones" / f"{name}-{key}"


def carry_over(name: str, profile: str, older: Mapping[str, str]) -> bool:
    """Take the build of an older recipe for today's, where both recipes give the same smoke build.

    Args:
        older: by profile, the digest of the older recipe (of `recipe`).

    Returns:
        Whether a build was taken. None is where today's is there already, or one of the three others is
        not, or the files of the two smoke builds differ in a byte.
    """
    directory, source = _directory(name, profile), _kept(name, older[profile])
    smoke = _directory(name, "smoke"), _kept(name, older["smoke"])
    with locked(directory.with_name(directory.name + ".lock"), wait=True):
        if damage(directory) is None or any(map(damage, (source, *smoke))):
            return False
        if not _same_files(*smoke):
            return False
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{name}-") as scratch:
            copy = shutil.copytree(source, Path(scratch) / name)
            shutil.rmtree(directory, ignore_errors=True)
            copy.rename(directory)
    return True


def _same_files(one: Path, other: Path) -> bool:
    names = [p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file()]
    others = [p.relative_to(other).as_posix() for p in other.rglob("*") if p.is_file()]
    if sorted(names) != sorted(others):
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def build(name: str, profile: str = "cpu") -> Path:
    """Build a backbone unless it is there, whole; return its directory.

    Files appear in place only when all of them are written. Missing assets are fetched.
    """
    entry = find_backbone(name)
    directory = _directory(name, profile)
    with locked(directory.with_name(directory.name + ".lock"), wait=True):
        if damage(directory) is None:
            return directory
        for asset in entry.assets:
            try:
                asset_path(asset)
            except AssetError:
                fetch(asset)
        for other in entry.backbones:
            build(other, profile)
        expected = f"about {entry.seconds} s" if profile != "smoke" else "a few seconds"
        print(f"building backbone '{name}' ({entry.about}): {expected}", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{name}-") as scratch:
            target = Path(scratch) / name
            target.mkdir()
            importlib.import_module(entry.module).build(target, profile)
            note_sizes(target)
            shutil.rmtree(directory, ignore_errors=True)
            target.rename(directory)
        print(f"built '{name}' in {time.monotonic() - started:.0f} s", flush=True)
    return directory
