"""What a paper needs in the user's cache: is it there, whole, and how to have it."""

from __future__ import annotations

from reattend.assets.store import AssetError, asset_path, fetch
from reattend.backbones.store import backbone_path, is_built
from reattend.records import Record


def is_fetched(name: str) -> bool:
    """Whether an asset lies in the cache, with files of the right sizes."""
    try:
        asset_path(name)
    except AssetError:
        return False
    return True


def provide(record: Record, profile: str) -> None:
    """Fetch and build what a paper needs and the cache does not hold whole.

    `reattend repro` does so before, side by side; this is for `reattend run`, by hand or by DVC.

    Raises:
        AssetError, BackboneError: when something cannot be had.
    """
    for name in record.needs.assets:
        if not is_fetched(name):
            fetch(name)
    for name in record.needs.backbones:
        backbone_path(name, profile)


__all__ = ["is_built", "is_fetched", "provide"]
