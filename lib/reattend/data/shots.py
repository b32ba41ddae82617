"""k labelled examples a class, drawn anew for each repetition of a few-shot experiment.

The draw of the shots dominates the spread of few-shot results, so it is the unit: one seed, one draw.
Draws are nested: the first k columns are the k-shot set, for every k, and the columns behind them are
further labelled texts that it does not hold.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from reattend.data.texts import TextSet, mixed_items


def draw_shots(
    labels: Int[Tensor, " items"], per_class: int, seed: int
) -> Int[Tensor, "classes {per_class}"]:
    """Positions of `per_class` different items of every class 0 .. C - 1, in random order.

    Raises:
        ValueError: when a class has fewer items than that.
    """
    _enough(labels, per_class)
    generator = Generator().manual_seed(seed)
    rows = []
    for c in range(int(labels.max()) + 1):
        found = (labels == c).nonzero()[:, 0]
        rows.append(found[torch.randperm(len(found), generator=generator)[:per_class]])
    return torch.stack(rows)


def _enough(labels: Int[Tensor, " items"], per_class: int) -> None:
    counts = labels.bincount()
    if per_class < 1 or counts.min() < per_class:
        scarce = int(counts.argmin())
        raise ValueError(
            f"class {scarce} has {int(counts[scarce])} items, {per_class} of each class are wanted; "
            "take more items, or fewer shots (at least one)"
        )


def balanced(data: TextSet, split: str, per_class: int) -> tuple[list[str], Int[Tensor, " chosen"]]:
    """Up to `per_class` texts of every class on one side of the split, class by class.

    The first ones in the fixed order of `mixed_items`; a class with fewer gives all it has.

    Raises:
        ValueError: for an unknown split, or a class without any text on that side.
    """
    side = torch.tensor(mixed_items(data.splits, split))
    rows = [side[data.labels[side] == c][:per_class] for c in range(len(data.classes))]
    if empty := [name for name, row in zip(data.classes, rows, strict=True) if not len(row)]:
        raise ValueError(f"no text of class {', '.join(empty)} on the side '{split}'")
    chosen = torch.cat(rows)
    return [data.texts[i] for i in chosen.tolist()], data.labels[chosen]
