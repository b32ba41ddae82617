"""What MambaRec's study reads off its trained arms: chosen checks, paired gains, what choosing on test adds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from reattend.backbones.trained.mambarec import FIRST_SEED, MEASURES, chosen

RANKING = ("R@10", "R@20", "N@10", "N@20")


def chosen_scores(curves: Mapping[str, Float[Tensor, "checks seeds measures"]]) -> pd.DataFrame:
    """One row an arm and seed: all measures at the check that validation chose for the arm.

    Columns: arm, seed, check, last (whether there is no later check), and `MEASURES`.
    """
    rows = []
    for arm, curve in curves.items():
        check = chosen(curve)
        for seed, values in enumerate(curve[check].tolist(), FIRST_SEED):
            head = {"arm": arm, "seed": seed, "check": check, "last": check == len(curve) - 1}
            rows.append(head | dict(zip(MEASURES, values, strict=True)))
    return pd.DataFrame(rows)


def later_gain(curve: Float[Tensor, "checks seeds measures"]) -> float:
    """What twice the steps bring, in %: best validation Recall@20 of all checks over the best of the first half.

    Recall is a mean over seeds; the untrained models count for none.
    """
    recall = curve[1:, :, MEASURES.index("validation R@20")].mean(1)
    return 100 * (recall.max() / recall[: len(recall) // 2].max() - 1).item()


def by_seed(scores: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One measure as a table of seeds (rows) by arms (columns); NaN where a seed was not trained."""
    return scores.pivot(index="seed", columns="arm", values=measure)


def gains(table: pd.DataFrame, arm: str, other: str, reference: str = "MGCN") -> pd.Series:
    """Paired differences of two arms by seed, in % of the reference's mean over all its seeds."""
    return (100 * (table[arm] - table[other]) / table[reference].mean()).dropna()


def mean_and_spread(scores: pd.DataFrame, arms: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Mean and standard deviation over seeds of every ranking measure, arms as rows in their order.

    Args:
        arms: those to show, with the names to show them by; all by default.
    """
    arms = arms or {arm: arm for arm in scores.arm.unique()}
    rows = []
    for arm, shown in arms.items():
        own = scores[scores.arm == arm]
        line = {"model": shown, "seeds": len(own)}
        for measure in RANKING:
            spread = own[measure].std(ddof=1) if len(own) > 1 else float("nan")
            line[measure] = f"{own[measure].mean():.4f} ± {spread:.4f}"
        rows.append(line)
    return pd.DataFrame(rows)


def selection_effect(
    curves: Mapping[str, Float[Tensor, "checks seeds measures"]],
) -> pd.DataFrame:
    """What choosing among the given arms on test adds to test Recall@20, by seed.

    Within an arm the check is chosen by validation. Columns: seed, the arm and the
    test recall that validation chooses, those that test chooses, and the difference.
    """
    scores = chosen_scores(curves)
    rows = []
    for seed, own in scores.groupby("seed"):
        # Scores to four digits, as the released code keeps them; of equal ones the first is chosen.
        own = own.round(dict.fromkeys(("validation R@20", "R@20"), 4))
        fair = own.loc[own["validation R@20"].idxmax()]
        best = own.loc[own["R@20"].idxmax()]
        rows.append(
            {
                "seed": seed,
                "by validation": fair.arm,
                "R@20 by validation": fair["R@20"],
                "by test": best.arm,
                "R@20 by test": best["R@20"],
                "gain, %": 100 * (best["R@20"] / fair["R@20"] - 1),
            }
        )
    return pd.DataFrame(rows)


def shared_plane(
    parts: Mapping[str, Float[Tensor, "items width"]],
) -> dict[str, Float[np.ndarray, "items 2"]]:
    """Rows of length 1 of all parts on the two leading principal axes of all of them together."""
    unit = {
        name: (t / t.norm(dim=1, keepdim=True).clamp_min(1e-9)).numpy() for name, t in parts.items()
    }
    together = np.concatenate(list(unit.values()))
    centre = together.mean(0)
    axes = np.linalg.svd(together - centre, full_matrices=False)[2][:2]
    # The sign of an axis is arbitrary: its largest entry is positive.
    axes = axes * np.sign(axes[range(2), np.abs(axes).argmax(1)])[:, None]
    return {name: (table - centre) @ axes.T for name, table in unit.items()}
