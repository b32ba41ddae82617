"""Questions with one-word answers about scenes of cut-outs, for a small vision-language model.

The scenes are those of `reattend.data.scenes` (one to four cut-outs of twelve kinds on a photograph). What is
asked follows from the annotations: the kind of what lies in a quarter of the picture or is largest, whether a
kind is there, how many objects there are, the colour of a thing, the quarter in which it lies, and whether it
lies left of, right of, above or below another. Things are named by their kind, and only where it is the
only one of its kind. Answers are balanced: yes and no equally often for every kind and relation; kinds, numbers
and quarters as evenly as the scenes are. A model that does not see the picture can thus learn next to
nothing but which colours a kind has.

`patch_contents` says what every patch of the picture shows, for aligning a projector with words, and for
`word_patches`: pictures made of words instead of pixels, on which a language model learns what is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from reattend.data.scenes import CLASSES, COLOURS, Scenes

PAD, BOS, NOWHERE = "<pad>", "<bos>", "background"
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
    PAD, BOS, NOWHERE, "yes", "no", *NUMBERS, *QUARTERS, *RELATIONS, *COLOURS, *CLASSES,
    "what", "is", "in", "the", "largest", "object", "objects", "there", "a", "how", "many", "are",
    "colour", "where", "?",
)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
LENGTH = 7
"""Words of the longest question."""


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
    size: float,
    random: np.random.Generator,
) -> list[Question]:
    """All questions about one scene, in random order; what "no" questions name is drawn by `random`.

    Args:
        kinds, colours, boxes: of the objects that are there (positions in `CLASSES`, `COLOURS`; pixels).
        size: side of the picture in pixels.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / size
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    names = [CLASSES[k] for k in kinds]
    alone = [i for i, k in enumerate(kinds) if list(kinds).count(k) == 1]
    asked = [Question("count", "how many objects are there ?", NUMBERS[len(kinds) - 1])]
    shown = int(random.choice(len(kinds)))
    absent = int(random.choice([k for k in range(len(CLASSES)) if k not in kinds]))
    asked.append(Question("exist", f"is there a {names[shown]} ?", "yes", shown))
    asked.append(Question("exist", f"is there a {CLASSES[absent]} ?", "no"))
    order = areas.argsort()
    if len(kinds) > 1 and areas[order[-1]] > 1.3 * areas[order[-2]]:
        largest = int(order[-1])
        asked.append(Question("largest", "what is the largest object ?", names[largest], largest))
    clear = np.abs(centres - 0.5).min(1) > 0.08
    quarter = (2 * (centres[:, 1] > 0.5) + (centres[:, 0] > 0.5)).astype(int)
    for i in range(len(kinds)):
        if clear[i] and (quarter == quarter[i]).sum() == 1:
            asked.append(Question("kind", f"what is in the {QUARTERS[quarter[i]]} ?", names[i], i))
        if i in alone:
            asked.append(Question("colour", f"what colour is the {names[i]} ?", COLOURS[colours[i]], i))
            if clear[i]:
                asked.append(Question("where", f"where is the {names[i]} ?", QUARTERS[quarter[i]], i))
    for i in alone:
        for j in alone:
            if i < j:
                asked.append(_relation_question(names, centres, i, j, random))
    return [asked[i] for i in random.permutation(len(asked))]


def _relation_question(names, centres, i: int, j: int, random: np.random.Generator) -> Question:
    """Whether one thing lies on a side of another, along the axis on which they are further apart."""
    i, j = (i, j) if random.random() < 0.5 else (j, i)
    apart = centres[i] - centres[j]
    axis = int(abs(apart[1]) > abs(apart[0]))
    true = RELATIONS[2 * axis + int(apart[axis] > 0)]
    false = RELATIONS[2 * axis + int(apart[axis] < 0)]
    said, answer = (true, "yes") if random.random() < 0.5 else (false, "no")
    return Question("relation", f"is the {names[i]} {said} the {names[j]} ?", answer, i)


def balanced(asked: Sequence[Question], count: int) -> list[Question]:
    """At most `count` of the questions, types in turn, so that no type crowds out the others."""
    by_type: dict[str, list[Question]] = {}
    for question in asked:
        by_type.setdefault(question.type, []).append(question)
    chosen = []
    while len(chosen) < count and any(by_type.values()):
        for waiting in by_type.values():
            if waiting and len(chosen) < count:
                chosen.append(waiting.pop())
    return chosen


def encode(batch: Sequence[Sequence[Question]]) -> tuple[Int[Tensor, "batch questions 7"], Int[Tensor, "batch questions"]]:
    """Word ids of packed questions, padded on the right, and ids of their answers (of PAD where there is none)."""
    most = max(map(len, batch))
    words = torch.full((len(batch), most, LENGTH), IDS[PAD])
    answers = torch.full((len(batch), most), IDS[PAD])
    for i, asked in enumerate(batch):
        for j, question in enumerate(asked):
            ids = [IDS[word] for word in question.text.split()]
            words[i, j, : len(ids)] = torch.tensor(ids)
            answers[i, j] = IDS[question.answer]
    return words, answers


def patch_contents(scenes: Scenes, side: int) -> Float[Tensor, "scenes objects patches"]:
    """Share of every patch that every object covers; side x side patches in raster order."""
    shares = F.adaptive_avg_pool2d(scenes.masks.float(), side)
    return shares.flatten(2)
