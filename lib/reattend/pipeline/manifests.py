"""The small files that stand for code, assets and backbones in DVC's graph."""

from __future__ import annotations

import json
import os
from pathlib import Path

from reattend.assets.store import find, pinned
from reattend.backbones.store import made_from, recipe
from reattend.fingerprints import digest
from reattend.parameters import load_params
from reattend.pipeline.graph import (
    FINGERPRINTS,
    asset_manifest,
    backbone_manifest,
    needed_assets,
    needed_backbones,
    read_records,
)
from reattend.pipeline.provenance import all_papers


def write_fingerprints(root: Path) -> None:
    """One file per paper, backbone and asset: what its results depend on, at the chosen profile.

    A paper that cannot be read gets a fingerprint that says so: running it tells what is wrong, and
    the others go on. Missing manifests are written as well (see `complete_manifests`).
    """
    for slug, fingerprint in all_papers(root).items():
        write_json(root / FINGERPRINTS / "papers" / f"{slug}.json", fingerprint)
    records = read_records(root)[0].values()
    for name in {name for record in records for name in needed_assets(record)}:
        write_json(root / FINGERPRINTS / "assets" / f"{name}.json", pinned(name))
    for name in {name for record in records for name in needed_backbones(record)}:
        write_json(root / FINGERPRINTS / "backbones" / f"{name}.json", made_from(name))
    complete_manifests(root, load_params(root)["profile"])


def complete_manifests(root: Path, profile: str) -> None:
    """Write the manifests of needed assets and backbones that have none.

    They say what is wanted, the same on every machine, and `reattend run` fetches and builds what
    of it is missing; so a fresh clone has nothing to fetch for papers whose results stand.
    """
    records = read_records(root)[0].values()
    for name in {name for record in records for name in needed_assets(record)}:
        if not (root / asset_manifest(name)).exists():
            write_asset_manifest(root, name)
    for name in {name for record in records for name in needed_backbones(record)}:
        if not (root / backbone_manifest(name, profile)).exists():
            write_backbone_manifest(root, name, profile)


def write_asset_manifest(root: Path, name: str) -> None:
    """Says which files an asset holds."""
    asset = find(name)
    facts = {"package": asset.package, "members": [m.model_dump() for m in asset.members]}
    write_json(root / asset_manifest(name), facts)


def write_backbone_manifest(root: Path, name: str, profile: str) -> None:
    """Says from which recipe a backbone is made."""
    made = recipe(name, profile)
    facts = {"backbone": name, "profile": made["profile"], "recipe": digest(made)}
    write_json(root / backbone_manifest(name, profile), facts)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
