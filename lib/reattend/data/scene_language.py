"""What can be said about a scene: captions, questions with answers, referring phrases, relations.

Everything follows from the annotations of `reattend.data.scenes`, from templates, in a fixed order.
Yes/no questions come in pairs of one true and one false statement about the same scene, and the false
one asks for something plausible (a class of the set, the opposite relation), so that an answer cannot be
guessed from the question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from reattend.data.scenes import CLASSES, COLOURS, MOTIONS, Scenes

Relation = Literal["left of", "right of", "above", "below"]
OPPOSITES: dict[str, str] = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


@dataclass(frozen=True)
class Question:
    """A question about a scene: its kind, its words, its one-word answer, and the object it is about."""

    kind: Literal["what", "exist", "count", "colour", "where", "read", "motion"]
    text: str
    answer: str
    about: int = -1  # position of the object in the scene, or -1


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def described(scenes: Scenes, scene: int, index: int, colour: bool = True) -> str:
    """ "red flower", or "flower" without its colour."""
    noun = CLASSES[scenes.labels[scene, index]]
    return f"{COLOURS[scenes.colours[scene, index]]} {noun}" if colour else noun


def present(scenes: Scenes, scene: int) -> list[int]:
    """Positions of the objects that a scene really has."""
    return [i for i, label in enumerate(scenes.labels[scene].tolist()) if label >= 0]


def relation(scenes: Scenes, scene: int, first: int, second: int) -> Relation:
    """Where the first object lies, seen from the second: along the axis on which they are further apart.

    Of a video, in its first frame.
    """
    boxes = scenes.boxes[scene] if scenes.boxes.dim() == 3 else scenes.boxes[scene, 0]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    dx, dy = (centres[first] - centres[second]).tolist()
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def caption(scenes: Scenes, scene: int) -> str:
    """One English sentence: what is there, where the first two objects lie, what the sign says."""
    objects = present(scenes, scene)
    names = [article(described(scenes, scene, i)) for i in objects]
    if len(objects) == 1:
        text = names[0]
    else:
        where = relation(scenes, scene, objects[0], objects[1])
        text = f"{names[0]} {where} {names[1]}"
        if rest := names[2:]:
            text += f", with {' and '.join(rest)}"
    if scenes.words[scene]:
        text += f" and a sign that says {scenes.words[scene].lower()}"
    moving = scenes.motions[scene, objects[0]]
    if scenes.pixels.dim() == 5 and moving > 0:
        text += f", the first moving {list(MOTIONS)[moving]}"
    return text


def referring_phrases(scenes: Scenes, scene: int) -> list[tuple[str, int]]:
    """Phrases that name exactly one object of the scene, with its position.

    The class alone where it is unique, else with the colour, else with a relation to another object, else
    (of two) with the size; objects that none of these tells apart are left out.
    """
    objects = present(scenes, scene)
    phrases = []
    for index in objects:
        for colour in (False, True):
            name = described(scenes, scene, index, colour)
            if sum(described(scenes, scene, i, colour) == name for i in objects) == 1:
                phrases.append((f"the {name}", index))
                break
        else:
            name = described(scenes, scene, index)
            twins = [i for i in objects if i != index and described(scenes, scene, i) == name]
            found = _by_relation(scenes, scene, index, objects, twins)
            phrases += (found or _by_size(scenes, scene, index, twins))[:1]
    return phrases


def _by_size(scenes: Scenes, scene: int, index: int, twins: list[int]) -> list:
    """ "the larger red bird", of two whose boxes differ by half in area."""
    if len(twins) > 1 or scenes.pixels.dim() == 5:
        return []
    sides = scenes.boxes[scene, [index, *twins], 2:] - scenes.boxes[scene, [index, *twins], :2]
    mine, other = sides.prod(1).tolist()
    if max(mine, other) < 1.5 * min(mine, other):
        return []
    size = "larger" if mine > other else "smaller"
    return [(f"the {size} {described(scenes, scene, index)}", index)]


def _by_relation(
    scenes: Scenes, scene: int, index: int, objects: list[int], twins: list[int]
) -> list:
    name = described(scenes, scene, index)
    found = []
    for other in objects:
        anchor = described(scenes, scene, other)
        unique = sum(described(scenes, scene, i) == anchor for i in objects) == 1
        if other == index or not unique:
            continue
        where = relation(scenes, scene, index, other)
        if all(relation(scenes, scene, twin, other) != where for twin in twins):
            found.append((f"the {name} {where} the {anchor}", index))
    return found


def questions(scenes: Scenes, scene: int, seed: int = 0) -> list[Question]:
    """Questions about one scene with one-word answers; `seed` chooses what false statements name."""
    rng = random.Random(f"{seed} {scene}")
    objects = present(scenes, scene)
    labels = [int(scenes.labels[scene, i]) for i in objects]
    asked: list[Question] = []
    shown = rng.choice(objects)
    absent = rng.choice([c for c in range(len(CLASSES)) if c not in labels])
    name = CLASSES[scenes.labels[scene, shown]]
    asked.append(Question("exist", f"is there {article(name)} ?", "yes", shown))
    asked.append(Question("exist", f"is there {article(CLASSES[absent])} ?", "no"))
    count = labels.count(labels[objects.index(shown)])
    asked.append(Question("count", "how many objects are there ?", NUMBERS[len(objects)]))
    asked.append(Question("count", f"how many {name} objects are there ?", NUMBERS[count]))
    for phrase, index in referring_phrases(scenes, scene):
        if phrase == f"the {described(scenes, scene, index, colour=False)}":
            colour = COLOURS[scenes.colours[scene, index]]
            asked.append(Question("colour", f"what colour is {phrase} ?", colour, index))
        if scenes.pixels.dim() == 5:
            motion = list(MOTIONS)[scenes.motions[scene, index]]
            asked.append(Question("motion", f"how does {phrase} move ?", motion, index))
    asked += _where_questions(scenes, scene, objects, rng)
    if len(objects) == 1:
        asked.append(Question("what", "what is in the picture ?", name, shown))
    if word := scenes.words[scene]:
        asked.append(Question("read", "what does the sign say ?", word.lower()))
    return asked


def _where_questions(scenes: Scenes, scene: int, objects: list[int], rng) -> list[Question]:
    """A true and a false relation of two objects with phrases of their own, and what lies there."""
    named = {index: phrase for phrase, index in referring_phrases(scenes, scene)}
    pairs = list(combinations([i for i in objects if i in named], 2))
    if not pairs:
        return []
    first, second = rng.choice(pairs)
    where = relation(scenes, scene, first, second)
    start = f"is {named[first]}"
    asked = [
        Question("where", f"{start} {where} {named[second]} ?", "yes", first),
        Question("where", f"{start} {OPPOSITES[where]} {named[second]} ?", "no", first),
    ]
    others = [i for i in objects if i != second]
    if sum(relation(scenes, scene, i, second) == where for i in others) == 1:
        answer = CLASSES[scenes.labels[scene, first]]
        asked.append(Question("what", f"what is {where} {named[second]} ?", answer, first))
    return asked
