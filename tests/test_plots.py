"""Figures are written small, the same bytes for the same picture."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from reattend.plots import MAX_BYTES, save_png


def drawn(scale=1.0):
    figure, axes = plt.subplots()
    axes.plot([0, scale], label="line")
    axes.legend()
    return figure


def test_same_picture_same_bytes(tmp_path):
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_png(drawn(scale), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def photograph(size):
    noise = np.random.default_rng(0).random((size, size, 3))
    figure, axes = plt.subplots()
    axes.imshow(noise)
    return figure


def test_large_pictures_are_reduced_or_refused(tmp_path):
    save_png(photograph(60), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size <= MAX_BYTES
    with pytest.raises(ValueError, match=r"b\.png takes \d+ kB, more than 150 kB"):
        save_png(photograph(400), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
