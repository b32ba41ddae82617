"""Multiple-choice questions about single-object scenes and about the natural colours of things.

Three kinds of question: which kind of thing a picture shows (the picture decides), which colour a named
thing has by nature (no picture is needed), and colour or place of what a picture shows. All answers are
one word, one of four options that stand in the question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reattend.data.prose import documents
from reattend.data.scenes import CLASSES, COLOURS, Scenes

NATURAL_COLOURS = {
    "red": ("strawberry", "tomato", "ladybird"),
    "orange": ("carrot", "pumpkin", "tangerine"),
    "yellow": ("lemon", "banana", "canary"),
    "green": ("frog", "lettuce", "cucumber"),
    "blue": ("sapphire", "cornflower", "kingfisher"),
    "brown": ("chestnut", "beaver", "walnut"),
    "grey": ("elephant", "dolphin", "mouse"),
    "black": ("raven", "panther", "coal"),
}
"""Things by the colour that they have by nature."""
NOUNS = {noun: colour for colour, nouns in NATURAL_COLOURS.items() for noun in nouns}
PLACES = ("topleft", "topright", "bottomleft", "bottomright")
OPTIONS = 4
WORDS_A_SENTENCE = 8


@dataclass(frozen=True)
class Question:
    """A question with its options at the end, in words.

    Attributes:
        text: lower-case words separated by blanks.
        options: in the order in which the text names them.
        answer: position of the right one.
    """

    text: str
    options: tuple[str, ...]
    answer: int

    @property
    def wrong(self) -> list[str]:
        """The options that are not right."""
        return [option for place, option in enumerate(self.options) if place != self.answer]


def _asked(text: str, options: Sequence[str], right: str, draw: random.Random) -> Question:
    """A question about `right`, with options drawn from those given, in random order."""
    chosen = [right, *draw.sample([o for o in options if o != right], OPTIONS - 1)]
    draw.shuffle(chosen)
    return Question(f"{text} ? {' '.join(chosen)}", tuple(chosen), chosen.index(right))


def kind_question(kind: str, draw: random.Random) -> Question:
    """Which kind of thing the picture shows; `kind` is one of `CLASSES`."""
    return _asked("which kind is shown", CLASSES, kind, draw)


def colour_question(colour: str, draw: random.Random) -> Question:
    """Which colour the thing shown has; `colour` is one of `COLOURS`."""
    return _asked("which colour has the thing shown", COLOURS, colour, draw)


def place_question(place: str, draw: random.Random) -> Question:
    """In which quarter of the picture the thing is; `place` is one of `PLACES`."""
    return _asked("where is the thing shown", PLACES, place, draw)


def nature_question(noun: str, draw: random.Random, competing: str | None = None) -> Question:
    """Which colour a thing has by nature.

    Args:
        noun: one of `NOUNS`.
        competing: a wrong colour that is to be among the options; None: any.
    """
    right, colours = NOUNS[noun], list(NATURAL_COLOURS)
    wrong = [c for c in colours if c not in (right, competing)]
    draw.shuffle(wrong)
    others = ([] if competing is None else [competing]) + wrong
    return _asked(
        f"which colour has a {noun} by nature", [right, *others[: OPTIONS - 1]], right, draw
    )


def place_of(scenes: Scenes, scene: int) -> str:
    """The quarter in which the middle of a scene's object lies."""
    x0, y0, x1, y1 = scenes.boxes[scene, 0].tolist()
    size = scenes.pixels.shape[-1]
    return PLACES[2 * (y0 + y1 > size) + (x0 + x1 > size)]


@cache
def sentences(asset: str) -> tuple[str, ...]:
    """All sentences of exactly eight words of a prose asset: lower case, letters alone, sorted."""
    whole = (
        part[:-1].lower().split()
        for text in documents(asset)
        for part in re.split(r"(?<=[.])\s+", text)
        if re.fullmatch(r"[A-Za-z ]+\.", part)
    )
    return tuple(sorted({" ".join(words) for words in whole if len(words) == WORDS_A_SENTENCE}))


def screenshots(count: int, size: int, seed: int = 0) -> UInt8[Tensor, "count 3 size size"]:
    """Drawn windows of programs: a title bar, a side bar, lines of real text, a button."""
    draw, lines = random.Random(seed), sentences("anarchism")
    shots = []
    for _ in range(count):
        light = draw.random() < 0.5
        ground, ink = ("white", "black") if light else ("#202428", "#d8d8d8")
        accent = draw.choice(("#2d6cdf", "#c0392b", "#27864a", "#8e44ad", "#d08a10", "#777777"))
        page = Image.new("RGB", (size, size), ground)
        pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=max(7, size // 12))
        bar, side = size // 8, draw.choice((0, size // 5))
        pen.rectangle((0, 0, size, bar), fill=accent)
        pen.text((2, 0), draw.choice(lines), fill="white", font=font)
        pen.rectangle((0, bar, side, size), fill="#9aa0a6")
        for top in range(bar + 3, size - bar, size // 9):
            pen.text((side + 3, top), draw.choice(lines), fill=ink, font=font)
        left, top = (draw.randrange(size // 2, size - size // 4), size - bar)
        pen.rectangle((left, top, left + size // 5, size - 3), fill=accent)
        shots.append(torch.from_numpy(np.asarray(page).copy()).movedim(-1, 0))
    return torch.stack(shots)
