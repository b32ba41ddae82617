"""The small files that stand for code, assets and backbones in DVC's graph."""

from __future__ import annotations

import json
import os
from pathlib import Path

from reattend.assets.store import find
from reattend.backbones.store import find_backbone, recipe
from reattend.fingerprints import digest, module_fingerprint, paper_fingerprint
from reattend.parameters import load_params
from reattend.pipeline.graph import (
    FINGERPRINTS,
    asset_manifest,
    backbone_manifest,
    load_records,
    needed_assets,
    needed_backbones,
)
from reattend.records import record_paths


def write_fingerprints(root: Path) -> None:
    """One file per paper, backbone and asset: what its results depend on, at the chosen profile."""
    params = load_params(root)
    for slug, path in record_paths(root).items():
        fingerprint = paper_fingerprint(path.with_suffix(".ipynb"))
        # A paper without values is told so when it is run.
        fingerprint["parameters"] = params["papers"].get(slug, {}).get(params["profile"])
        write_json(root / FINGERPRINTS / "papers" / f"{slug}.json", fingerprint)
    records = load_records(root).values()
    for name in {name for record in records for name in needed_assets(record)}:
        fingerprint = find(name).model_dump(mode="json")
        write_json(root / FINGERPRINTS / "assets" / f"{name}.json", fingerprint)
    for name in {name for record in records for name in needed_backbones(record)}:
        fingerprint = module_fingerprint(find_backbone(name).module)
        write_json(root / FINGERPRINTS / "backbones" / f"{name}.json", fingerprint)


def write_asset_manifest(root: Path, name: str) -> None:
    """Says that an asset was fetched and verified, and which files it holds."""
    asset = find(name)
    facts = {"package": asset.package, "members": [m.model_dump() for m in asset.members]}
    write_json(root / asset_manifest(name), facts)


def write_backbone_manifest(root: Path, name: str, profile: str) -> None:
    """Says that a backbone was built, and from which recipe."""
    made = recipe(name, profile)
    facts = {"backbone": name, "profile": made["profile"], "recipe": digest(made)}
    write_json(root / backbone_manifest(name), facts)


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
