"""What a run measures for one test of a claim: values with the labels of their units.

A unit is what would be drawn anew if the experiment were repeated: a seed (a whole training), an item (a
prompt, a picture, a document), a pair of both, a timing round. Several measurements of one unit are one
point: they are averaged here, and rounded to the six digits that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

LABELS = {
    "seed": ("seed",),
    "item": ("item",),
    "seed x item": ("seed", "item"),
    "round": ("round",),
    "exact": (),
}
"""The labels that identify one point, by unit."""

VALUE = "value"  # name of the only quantity of a sample that is no mapping


class Exact:
    """A deterministic number: a count, or an identity that holds or does not.

    Raises:
        ValueError: when it is NaN or infinite.
    """

    def __init__(self, value: float) -> None:
        self.value = float(value)
        if not math.isfinite(self.value):
            raise ValueError(f"an exact measurement must be finite, not {self.value}")


class Sample:
    """Measurements with the labels of their units.

    Args:
        values: one number for each measurement; or a matrix [seeds, items] whose rows `seed` names and
            whose columns `item` names; or several quantities by name, equally long, from which the
            statistic that the record names is computed.
        seed, item, round: a label for each measurement. Measurements that share a label belong to the
            same training, item or timing round.

    Raises:
        ValueError: for NaN or infinite values, wrong lengths, no values or no labels.
    """

    def __init__(
        self,
        values: Iterable | Mapping[str, Iterable],
        *,
        seed: Iterable | None = None,
        item: Iterable | None = None,
        round: Iterable | None = None,
    ) -> None:
        given = {"seed": seed, "item": item, "round": round}
        labels = {name: _labels(some) for name, some in given.items() if some is not None}
        named = values if isinstance(values, Mapping) else {VALUE: values}
        arrays = {str(name): np.asarray(_listed(some), dtype=float) for name, some in named.items()}
        if not labels:
            raise ValueError("a sample names its units: seed=…, item=… or round=…")
        if set(arrays) == {VALUE} and arrays[VALUE].ndim == 2:
            arrays[VALUE], labels = _unfolded(arrays[VALUE], labels)
        lengths = {len(label) for label in labels.values()}
        lengths |= {len(array) if array.ndim == 1 else -1 for array in arrays.values()}
        if lengths == {0}:
            raise ValueError("a sample without measurements")
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError("a sample needs one label for each value")
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"'{name}' holds NaN or infinite measurements")
        self.quantities, self.labels = arrays, labels

    def __len__(self) -> int:
        return len(next(iter(self.quantities.values())))


@dataclass(frozen=True)
class Points:
    """The points of one test: each quantity's value at every unit, with the units' labels.

    A deterministic number is one point without labels.
    """

    quantities: dict[str, np.ndarray]
    labels: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(next(iter(self.quantities.values())))

    @property
    def unit(self) -> str:
        """The unit that the labels identify."""
        return next(unit for unit, names in LABELS.items() if set(names) == set(self.labels))


def points(measured: Sample | Exact, unit: str) -> Points:
    """One point a unit, six digits: what is kept of a measurement.

    Raises:
        TypeError: an `Exact` where a sample is declared, or the reverse.
        ValueError: when the labels that `unit` needs are missing.
    """
    if isinstance(measured, Exact) != (unit == "exact"):
        kind = "Exact(…)" if unit == "exact" else f"Sample(…) with labels of unit '{unit}'"
        raise TypeError(f"takes {kind}")
    if isinstance(measured, Exact):
        return Points({VALUE: np.array([six_digits(measured.value)])}, {})
    missing = [name for name in LABELS[unit] if name not in measured.labels]
    if missing:
        given = ", ".join(measured.labels)
        raise ValueError(f"unit '{unit}' needs the label '{missing[0]}'; given: {given}")
    keys = list(zip(*(measured.labels[name] for name in LABELS[unit]), strict=True))
    place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    index = np.array([place[key] for key in keys])
    counts = np.bincount(index)
    means = {n: np.bincount(index, weights=a) / counts for n, a in measured.quantities.items()}
    rounded = {n: np.array([six_digits(value) for value in array]) for n, array in means.items()}
    labels = dict(zip(LABELS[unit], map(tuple, zip(*place, strict=True)), strict=True))
    return Points(rounded, labels)


def six_digits(value: float) -> float:
    """Six significant digits: what two runs on one machine must agree on."""
    return float(f"{value:.6g}")


def _listed(values: Iterable) -> np.ndarray | list:
    return values if hasattr(values, "__array__") else list(values)


def _labels(labels: Iterable) -> tuple[str, ...]:
    return tuple(str(label.item() if hasattr(label, "item") else label) for label in labels)


def _unfolded(
    matrix: np.ndarray, labels: dict[str, tuple[str, ...]]
) -> tuple[np.ndarray, dict[str, tuple[str, ...]]]:
    """A matrix [seeds, items] as one list of measurements with two labels each."""
    if set(labels) != {"seed", "item"}:
        raise ValueError("a matrix of values takes seed= for its rows and item= for its columns")
    if matrix.shape != (len(labels["seed"]), len(labels["item"])):
        raise ValueError("a matrix of values needs a seed for each row and an item for each column")
    seeds = np.repeat(labels["seed"], matrix.shape[1])
    items = np.tile(labels["item"], matrix.shape[0])
    return matrix.ravel(), {"seed": tuple(map(str, seeds)), "item": tuple(map(str, items))}
