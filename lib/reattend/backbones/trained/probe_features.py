"""Frozen features of the emoji through the two encoders that probing studies compare.

`vit` is the real (saliency-tuned) ViT-S/14; `mae` is the small masked autoencoder trained here. Both
see the 64-pixel emoji as 8 x 8 patches (`vit`: enlarged to 112 pixels) in the smoke and cpu profiles.
Files: one per encoder and layer, half precision, [CLS] first; labels, split and the object's share of
every patch beside them. At cpu 1.1 GB and about 4 minutes of one core.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from reattend.backbones.features import extract, read_tokens, write_tokens
from reattend.backbones.pretrained import vit
from reattend.backbones.store import backbone_path
from reattend.backbones.trained import mae
from reattend.data.images import emoji, patch_coverage

ENCODERS = ("mae", "vit")


@dataclass(frozen=True)
class Setting:
    """What is extracted in one profile.

    Attributes:
        pictures: emoji of each group (None: all), in the drawings of both vendors.
        vit_size: side in pixels at which the ViT sees them.
        vit_layers, mae_layers: layers that are kept, counted from 1.
    """

    pictures: int | None
    vit_size: int
    vit_layers: tuple[int, ...]
    mae_layers: tuple[int, ...]


SETTINGS = {
    "smoke": Setting(5, 112, (4, 10), (2, 4)),
    "cpu": Setting(None, 112, (4, 7, 10, 12), (1, 2, 3, 4)),
    "gpu": Setting(None, 168, (2, 4, 6, 8, 10, 12), (2, 4, 6, 8, 10, 12)),
}


def build(target: Path, profile: str) -> None:
    """Extract all features of a profile into the empty directory `target`."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    pictures = emoji(mae.SIZE, setting.pictures)
    real, masked = vit.load(device), mae.load(profile, device)
    encoders = {
        "vit": (
            setting.vit_layers,
            partial(vit.hidden_states, layers=setting.vit_layers, size=setting.vit_size),
            real,
        ),
        "mae": (setting.mae_layers, partial(mae.hidden_states, layers=setting.mae_layers), masked),
    }
    coverage = {}
    for name, (layers, states, model) in encoders.items():
        tokens = extract(lambda x, s=states, m=model: s(m, x.to(device)), pictures.pixels, name)
        for layer, kept in zip(layers, tokens, strict=True):
            write_tokens(target / f"{name}_{layer}.safetensors", kept)
        grid = round((tokens.shape[2] - 1) ** 0.5)
        coverage[name] = patch_coverage(pictures.alpha, grid)
    save_file({"labels": pictures.labels} | coverage, target / "items.safetensors")
    words = {
        "classes": pictures.classes,
        "identities": pictures.identities,
        "splits": pictures.splits,
        "captions": pictures.captions,
    }
    (target / "items.json").write_text(json.dumps(words))


@dataclass(frozen=True)
class ProbeFeatures:
    """The extracted features of a profile; tokens are read when they are asked for.

    Attributes:
        labels: class number of each picture.
        classes: names of the classes.
        identities: what a picture shows; the drawings of one identity share a side of the split.
        splits: "train", "validation" or "test" for each picture.
        captions: an English phrase for each picture.
        coverage: encoder -> share of every patch that the object covers, in [0, 1].
    """

    directory: Path
    labels: Int[Tensor, " items"]
    classes: tuple[str, ...]
    identities: tuple[str, ...]
    splits: tuple[str, ...]
    captions: tuple[str, ...]
    coverage: dict[str, Float[Tensor, "items patches"]]

    def tokens(self, encoder: str, layer: int) -> Float16[Tensor, "items tokens dim"]:
        """[CLS] and patch tokens of all pictures after a layer.

        Raises:
            ValueError: when that layer was not extracted; names those that were.
        """
        path = self.directory / f"{encoder}_{layer}.safetensors"
        if not path.is_file():
            raise ValueError(
                f"no features of layer {layer} of '{encoder}'; layers: {self.layers(encoder)}"
            )
        return read_tokens(path)

    def layers(self, encoder: str) -> list[int]:
        """Layers of an encoder that were extracted.

        Raises:
            ValueError: for an unknown encoder.
        """
        if encoder not in ENCODERS:
            raise ValueError(f"unknown encoder '{encoder}'; there are: {', '.join(ENCODERS)}")
        files = self.directory.glob(f"{encoder}_*.safetensors")
        return sorted(int(path.stem.split("_")[1]) for path in files)

    def indices(self, split: str) -> Int[Tensor, " chosen"]:
        """Positions of the pictures of one split."""
        return torch.from_numpy(np.flatnonzero(np.array(self.splits) == split))


def load(profile: str) -> ProbeFeatures:
    """The features of a profile; extracted on first use."""
    directory = backbone_path("probe_features", profile)
    words = json.loads((directory / "items.json").read_text())
    items = load_file(directory / "items.safetensors")
    return ProbeFeatures(
        directory,
        items.pop("labels"),
        **{name: tuple(values) for name, values in words.items()},
        coverage=items,
    )
