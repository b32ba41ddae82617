"""Tables of few-shot studies: means over draws with 95 % intervals, and differences paired by draw."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from reattend.studies.few_shot_figures import spread

OURS = "CrossTune"


def means_of_draws(scores: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and log-probability by k, method and draw, means over the sets.

    Args:
        scores: columns set, k, draw, method, accuracy, log_probability.
    """
    return scores.groupby(["k", "method", "draw"])[["accuracy", "log_probability"]].mean()


def main_table(scores: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """One row for each k and method: accuracy in % by set and over the sets, and what CrossTune gains over it.

    Args:
        scores: columns set, k, draw, method, accuracy, log_probability.
    """
    sets, means, lines = dict.fromkeys(scores.set), means_of_draws(scores).accuracy, []
    for k in sorted(scores.k.unique()):
        for method in methods:
            here = scores[(scores.k == k) & (scores.method == method)]
            line = {"k": k, "method": method}
            line |= {name: here.accuracy[here.set == name].mean() for name in sets}
            line["mean"], line["± (95 %)"] = spread(means[k, method])
            line["CrossTune minus it"] = (means[k, OURS] - means[k, method]).mean()
            lines.append(line)
    return pd.DataFrame(lines)


def asked_table(asked: pd.DataFrame) -> pd.DataFrame:
    """The same for one set: one row for each k and method.

    Args:
        asked: columns k, draw, method, accuracy.
    """
    lines = []
    for k in sorted(asked.k.unique()):
        here = asked[asked.k == k]
        ours = here[here.method == OURS].accuracy.to_numpy()
        for method in dict.fromkeys(asked.method):
            values = here[here.method == method].accuracy.to_numpy()
            centre, half = spread(values)
            line = {"k": k, "method": method, "accuracy, %": centre, "± (95 %)": half}
            lines.append(line | {"CrossTune minus it": (ours - values).mean()})
    return pd.DataFrame(lines)


def labels_table(means: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """What stands for the labels: scores of CrossTune's arms, and what descriptions gain, by k.

    Args:
        means: what `means_of_draws` gives.
        arms: "CrossTune" has the descriptions; arms that were not trained at some k are left out there.
    """
    lines = []
    for k in sorted(means.index.unique("k")):
        for arm in arms:
            if (k, arm) in means.index.droplevel("draw"):
                line = {"k": k, "labels": "descriptions" if arm == OURS else arm}
                line["accuracy, %"] = means.accuracy[k, arm].mean()
                line["log-probability, nats"] = means.log_probability[k, arm].mean()
                gap = spread(means.accuracy[k, OURS] - means.accuracy[k, arm])
                line["descriptions minus it"], line["± (95 %)"] = gap
                lines.append(line)
    return pd.DataFrame(lines)


def switch_table(switched: pd.DataFrame) -> pd.DataFrame:
    """What each kind of further data gives in each way to use it; gains over never using it, paired by draw.

    Args:
        switched: columns data, draw, use, accuracy, log_probability, kept (share), texts.
    """
    by_use = switched.set_index(["data", "use", "draw"]).sort_index()
    lines = []
    for kind in dict.fromkeys(switched.data):
        for use in dict.fromkeys(switched.use):
            part = by_use.loc[kind, use]
            line = {
                "further data": kind,
                "used": use,
                "draws": len(part),
                "texts": part.texts.mean(),
            }
            line |= {"of them used, %": 100 * part.kept.mean()}
            line |= {"accuracy, %": part.accuracy.mean()}
            line |= {"log-probability, nats": part.log_probability.mean()}
            gain = spread(part.accuracy - by_use.loc[kind, "never"].accuracy)
            line["minus never"], line["± (95 %)"] = gain
            lines.append(line)
    return pd.DataFrame(lines)


def with_reported(table: pd.DataFrame, gain: float) -> pd.DataFrame:
    """A table of `main_table` or `asked_table` with the paper's gain over the best gradient-free tuning below."""
    paper = {"k": 16, "method": "paper: best gradient-free tuning", "CrossTune minus it": gain}
    return pd.DataFrame([*table.to_dict("records"), paper])
