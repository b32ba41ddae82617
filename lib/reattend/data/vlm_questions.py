"""Questions with one-word answers about scenes of cut-outs, for a small vision-language model.

The scenes are those of `reattend.data.scenes`: one to four cut-outs of twelve kinds on a photograph, about a third of
the cut-outs drawn and the rest photographed. What is asked follows from the annotations: the kind of what
lies in a quarter of the picture or is largest, whether a kind is there, how many objects there are, the
colour of a thing, the quarter in which it lies, and whether it lies left of, right of, above or below
another. Things are named by their kind, and only where it is the only one of its kind.

Yes and no are equally often right for every kind and every relation; kinds, numbers and quarters are as even
as the scenes, which draw them at random. A model that does not see the picture can learn little more
than which colours a kind has. Colours are those of `scenes.dominant_colour`, which calls some things otherwise
than people would.

`patch_contents` says what the patches show, for aligning a projector with words, and for pictures made of words
instead of pixels, on which a language model learns what the questions mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from reattend.data.scenes import CLASSES, COLOURS, Scenes

PAD, BOS, NOTHING = "<pad>", "<bos>", "background"
QUARTERS = ("upper-left", "upper-right", "lower-left", "lower-right")
RELATIONS = ("left-of", "right-of", "above", "below")
NUMBERS = ("one", "two", "three", "four")
TYPES: dict[str, tuple[str, ...]] = {
    "kind": CLASSES,
    "largest": CLASSES,
    "exist": ("yes", "no"),
    "count": NUMBERS,
    "colour": COLOURS,
    "where": QUARTERS,
    "relation": ("yes", "no"),
}
"""Types of questions, with the answers among which a model chooses."""
WORDS = (
    PAD, BOS, NOTHING, "yes", "no", *NUMBERS, *QUARTERS, *RELATIONS, *COLOURS, *CLASSES,
    "what", "is", "largest", "there", "how", "many", "objects", "colour", "where", "?",
)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
LENGTH = 5
"""Words of the longest question."""

_CLEAR = 0.08
"""Centres nearer than this to a middle line, as a share of the picture, lie in no quarter."""
_LARGER = 1.3
"""The largest object's box has at least this many times the area of the next one's."""


@dataclass(frozen=True)
class Question:
    """A question: its type, words and answer, and the position of the object it is about, or -1."""

    type: str
    text: str
    answer: str
    about: int = -1


def questions(
    kinds: Sequence[int],
    colours: Sequence[int],
    boxes: Float[np.ndarray, "objects 4"],
    size: int,
    random: np.random.Generator,
) -> list[Question]:
    """All questions about one scene, in random order.

    Args:
        kinds, colours, boxes: of the objects that are there (positions in `CLASSES`, `COLOURS`; pixels).
        size: side of the picture in pixels.
        random: draws the order, and what questions name whose answer is "no".
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / size
    names = [CLASSES[k] for k in kinds]
    alone = [i for i, k in enumerate(kinds) if list(kinds).count(k) == 1]
    quarter = (2 * (centres[:, 1] > 0.5) + (centres[:, 0] > 0.5)).astype(int)
    clear = np.abs(centres - 0.5).min(1) > _CLEAR
    asked = [Question("count", "how many objects ?", NUMBERS[len(kinds) - 1])]
    asked += _exist_questions(kinds, random) + _largest_question(names, boxes)
    for i, name in enumerate(names):
        if clear[i] and (quarter == quarter[i]).sum() == 1:
            asked.append(Question("kind", f"what is {QUARTERS[quarter[i]]} ?", name, i))
        if i in alone:
            asked.append(Question("colour", f"what colour is {name} ?", COLOURS[colours[i]], i))
        if i in alone and clear[i]:
            asked.append(Question("where", f"where is {name} ?", QUARTERS[quarter[i]], i))
        asked += [
            _relation_question(names, centres, i, j, random) for j in alone if i in alone and j < i
        ]
    return [asked[i] for i in random.permutation(len(asked))]


def _exist_questions(kinds: Sequence[int], random: np.random.Generator) -> list[Question]:
    """As many kinds that are there as kinds that are not, at most two of each."""
    there = sorted(set(kinds))
    absent = [k for k in range(len(CLASSES)) if k not in there]
    pairs = min(2, len(there))
    drawn = {a: random.permutation(k)[:pairs] for a, k in (("yes", there), ("no", absent))}
    return [
        Question(
            "exist",
            f"is there {CLASSES[k]} ?",
            answer,
            list(kinds).index(k) if answer == "yes" else -1,
        )
        for answer, of in drawn.items()
        for k in of
    ]


def _largest_question(names: Sequence[str], boxes: np.ndarray) -> list[Question]:
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = areas.argsort()
    if len(names) < 2 or areas[order[-1]] < _LARGER * areas[order[-2]]:
        return []
    return [Question("largest", "what is largest ?", names[order[-1]], int(order[-1]))]


def _relation_question(
    names: Sequence[str], centres: np.ndarray, i: int, j: int, random: np.random.Generator
) -> Question:
    """Whether one thing lies on a side of another, along the axis on which they are further apart."""
    i, j = (i, j) if random.random() < 0.5 else (j, i)
    apart = centres[i] - centres[j]
    axis = int(abs(apart[1]) > abs(apart[0]))
    sides = RELATIONS[2 * axis : 2 * axis + 2]
    true = int(apart[axis] > 0)
    said, answer = (sides[true], "yes") if random.random() < 0.5 else (sides[1 - true], "no")
    return Question("relation", f"is {names[i]} {said} {names[j]} ?", answer, i)


def scene_questions(scenes: Scenes, scene: int, random: np.random.Generator) -> list[Question]:
    """All questions about one still scene; see `questions`."""
    there = int((scenes.labels[scene] >= 0).sum())
    kinds, colours = (part[scene, :there].tolist() for part in (scenes.labels, scenes.colours))
    boxes = scenes.boxes[scene, :there].numpy()
    return questions(kinds, colours, boxes, scenes.pixels.shape[-1], random)


def balanced(asked: Sequence[Question], count: int) -> list[Question]:
    """At most `count` of the questions, types in turn, so that no type crowds out the others."""
    by_type: dict[str, list[Question]] = {}
    for question in asked:
        by_type.setdefault(question.type, []).append(question)
    longest = max(map(len, by_type.values()))
    turns = [of[k] for k in range(longest) for of in by_type.values() if k < len(of)]
    return turns[:count]


def encode(
    batch: Sequence[Sequence[Question]],
) -> tuple[Int[Tensor, "batch questions 5"], Int[Tensor, " asked"]]:
    """Word ids of the questions of each picture, padded on the right, and ids of all answers in turn."""
    most = max(map(len, batch))
    words = torch.full((len(batch), most, LENGTH), IDS[PAD])
    for i, asked in enumerate(batch):
        for j, question in enumerate(asked):
            ids = [IDS[word] for word in question.text.split()]
            words[i, j, : len(ids)] = torch.tensor(ids)
    return words, torch.tensor([IDS[q.answer] for asked in batch for q in asked])


def patch_contents(scenes: Scenes, side: int) -> Float[Tensor, "scenes objects patches"]:
    """Share of every patch that every object covers; side x side patches in raster order."""
    parts = [F.adaptive_avg_pool2d(masks.float(), side) for masks in scenes.masks.split(256)]
    return torch.cat(parts).flatten(2)
