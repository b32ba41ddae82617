"""The figures of the study of Recycled Attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from reattend.evidence.intervals import mean
from reattend.plots import BASELINE, COLOURS, REPORTED

MARKS = {  # of a method: its mark, its colour, and what its settings are
    "Recycled Attention": ("o-", 0, "fixed schedule, S"),
    "StreamingLLM": ("D", 1, None),
    "dynamic": ("s--", 3, "dynamic schedule, checked every {}, s"),
    "StreamingLLM++": ("v", 2, None),
    "H2O": ("^", 4, None),
    "oracle": ("*", 7, None),
}


def draw_coverage(
    covered: Mapping[str, np.ndarray], reported: Mapping[str, float], bounds: Sequence[str]
) -> Figure:
    """Share of dense attention that a selection covers, by distance from its full step, with 95 % intervals.

    Args:
        covered: by selection, %, [windows, tokens since the full step].
        reported: values of the paper, each a line across.
        bounds: the selections that bound the others, from above and from below.
    """
    fig, axis = plt.subplots(figsize=(9, 4))
    styles = dict(zip(bounds, [(BASELINE, "--"), (COLOURS[7], ":")], strict=True))
    methods = [name for name in covered if name not in styles]
    styles |= {name: (COLOURS[n], "-") for n, name in enumerate(methods)}
    for name in [bounds[0], *methods, bounds[1]]:
        colour, line = styles[name]
        distance = range(1, covered[name].shape[1] + 1)
        found = [mean(column) for column in covered[name].T]
        axis.plot(distance, [f.effect for f in found], color=colour, linestyle=line, label=name)
        low, high = [f.low for f in found], [f.high for f in found]
        axis.fill_between(distance, low, high, color=colour, alpha=0.2, lw=0)
    for (name, level), line in zip(reported.items(), ("-", "-."), strict=True):
        axis.axhline(level, color=REPORTED, linewidth=1.5, linestyle=line, label=name)
    axis.set_ylim(0, 100)
    axis.set_xlabel("tokens since the full step")
    axis.set_ylabel("attention covered, %")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return fig


def draw_tradeoff(above: pd.DataFrame, check_every: int) -> Figure:
    """Loss above dense against the entries read, means over documents with 95 % intervals.

    Args:
        above: one row a document, method and setting; columns method, setting, reads, nll (above dense).
        check_every: tokens between two checks of the dynamic schedule.
    """
    fig, axis = plt.subplots(figsize=(9, 4.2))
    points = above.groupby(["method", "setting"]).agg(
        reads=("reads", "mean"),
        nll=("nll", "mean"),
        half=("nll", lambda losses: mean(losses.to_numpy()).high - losses.mean()),
    )
    for name, (mark, colour, label) in MARKS.items():
        cell = points.loc[name].sort_values("reads")
        where = cell["reads"], cell["nll"]
        text = label.format(check_every) if label else name
        style = {"fmt": mark, "color": COLOURS[colour], "label": text}
        axis.errorbar(*where, cell["half"], **style, capsize=2, lw=1)
        for setting, x, y in zip(cell.index, *where, strict=True) if label else ():
            axis.annotate(f"{setting:g}", (x, y), (4, 5), textcoords="offset points", fontsize=8)
    axis.axhline(0, color=BASELINE, linestyle=":", label="dense (reads all)")
    axis.set_xlabel("entries of the cache read for a token, by a key head")
    axis.set_ylabel("loss above dense, nats a token")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return fig
