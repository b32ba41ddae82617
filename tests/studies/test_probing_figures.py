"""The shared figures draw every probe, and the front."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from reattend.studies.probing_figures import draw_curves, draw_pareto


def test_pareto_figure_names_every_probe():
    rows = [("LP-GAP", 1e3, 60.0), ("EP_8", 2e4, 66.0), ("EP_8/2", 1e4, 66.1), ("MHCA", 6e4, 65.0)]
    fig, ax = plt.subplots()
    draw_pareto(ax, pd.DataFrame(rows, columns=["probe", "parameters", "test"]), ["EP_8", "EP_8/2"])
    labels = {text.get_text(): text.xyann for text in ax.texts}
    assert set(labels) == {row[0] for row in rows}
    assert abs(labels["EP_8"][1] - labels["EP_8/2"][1]) > 0.2  # pushed apart
    front = ax.lines[0].get_xydata()
    assert front[-1].tolist() == [1e4, 66.1]
    plt.close(fig)


def test_curves_show_mean_and_range_over_seeds():
    fig, ax = plt.subplots()
    draw_curves(ax, {"EP_8": {2: np.array([1.0, 3.0]), 1: np.array([0.0, 4.0])}})
    assert ax.lines[0].get_xydata().tolist() == [[1.0, 2.0], [2.0, 2.0]]
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.0
    assert band[:, 1].max() == 4.0
    plt.close(fig)
