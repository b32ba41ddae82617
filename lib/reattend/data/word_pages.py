"""Pages of rendered words, cut into 2 x 2 crops whose borders run through words and lines.

A page of 48 x 96 pixels holds up to three lines of real words in the fonts of matplotlib: one in the upper crops, one
on the border between upper and lower crops, one in the lower crops. A line starts anywhere near the left edge, so that
the border between left and right crops falls where it will, through letters or between them. Words come from news
articles; one in ten never appears in training.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from reattend.data.document_pages import font
from reattend.data.prose import documents

HEIGHT, WIDTH = 48, 96
PATCH = 4  # pixels of a token's side
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLACES = 48
"""Letters that a page can hold; places behind the last letter are empty."""
UNASKED = -100
"""Label of a token that shows no letter: ignored by torch's cross-entropy."""

_LINES = (
    (8, 10),
    (22, 26),
    (38, 40),
)  # first and last row of the middles of small letters, by line
_STARTS, _SPACES, _MARGIN = (2, 14), (5, 9), 2  # columns
_BOX = 20  # side in pixels of the box that a letter is drawn into
_NARROWEST = 5  # pixels from one letter to the next at the least: then no two share a token


@cache
def words(split: str) -> tuple[str, ...]:
    """Words of 3 to 7 small letters that occur at least three times in the news articles, in alphabetical order.

    Args:
        split: "train", or "test" for the tenth that is never seen in training.

    Raises:
        AssetError: when the news articles have not been fetched.
    """
    texts = documents("bbc_news")
    whole = re.compile(r"(?<![\w'-])[a-z]{3,7}(?![\w'-])")
    counts = Counter(word for text in texts for word in whole.findall(text))
    held = ((word, Random(word).random() < 0.1) for word in sorted(counts) if counts[word] > 2)
    return tuple(word for word, out in held if out == (split == "test"))


@cache
def printed_letters(
    fonts: tuple[str, ...], size: int
) -> tuple[Float[Tensor, "fonts letters box box"], Int[Tensor, "fonts letters"]]:
    """Letters, centred across and with the middles of small letters in the middle row, and their widths in pixels."""
    boxes, widths = [], []
    for name in fonts:
        face = font(name, size)
        _, top, _, bottom = face.getbbox("x", anchor="ls")
        for letter in LETTERS:
            left, _, right, _ = face.getbbox(letter, anchor="ls")
            box = Image.new("L", (_BOX, _BOX), 0)
            corner = (round((_BOX - left - right) / 2), round((_BOX - top - bottom) / 2))
            ImageDraw.Draw(box).text(corner, letter, fill=255, font=face, anchor="ls")
            boxes.append(torch.frombuffer(bytearray(box.tobytes()), dtype=torch.uint8))
            widths.append(max(_NARROWEST, round(face.getlength(letter))))
    letters = torch.stack(boxes).view(len(fonts), len(LETTERS), _BOX, _BOX) / 255
    return letters, torch.tensor(widths).view(len(fonts), -1)


@dataclass(frozen=True)
class WordPages:
    """Pages and what is written on them.

    Attributes:
        pixels: ink between 0 and 1, plus noise.
        letters: by place: line after line, from the left.
        present: whether there is a letter at the place.
        rows, columns: pixel in the middle of each letter.
        widths: of each letter in pixels.
        words: the words of every page, line after line.
    """

    pixels: Float[Tensor, "pages height width"]
    letters: Int[Tensor, "pages places"]
    present: Bool[Tensor, "pages places"]
    rows: Int[Tensor, "pages places"]
    columns: Int[Tensor, "pages places"]
    widths: Int[Tensor, "pages places"]
    words: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.letters)

    def to(self, device: torch.device | str) -> WordPages:
        """The same on a device."""
        *parts, written = vars(self).values()
        return WordPages(*(part.to(device) for part in parts), written)

    def chosen(self, pages: Int[Tensor, " chosen"]) -> WordPages:
        """Some of the pages."""
        *parts, written = vars(self).values()
        return WordPages(*(part[pages] for part in parts), tuple(written[n] for n in pages))

    @property
    def tokens(self) -> Int[Tensor, "pages places"]:
        """Number of the token in the middle of each letter, on the page's map of 12 x 24, row by row."""
        return self.rows // PATCH * COLUMNS + self.columns // PATCH

    @property
    def labels(self) -> Int[Tensor, "pages rows columns"]:
        """For every token the letter that its centre lies on, `UNASKED` where there is none."""
        device = self.letters.device
        across = PATCH * torch.arange(COLUMNS, device=device) + PATCH // 2
        down = (PATCH * torch.arange(ROWS, device=device) + PATCH // 2)[:, None]
        rows, columns, widths, there, letters = (
            part[..., None, None]
            for part in (self.rows, self.columns, self.widths, self.present, self.letters)
        )
        on_it = (2 * (across - columns).abs() <= widths) & ((down - rows).abs() <= 4) & there
        found = torch.where(on_it, letters, -1).amax(1)
        return torch.where(found < 0, UNASKED, found)

    @property
    def cut_across(self) -> Bool[Tensor, "pages places"]:
        """Letters that the border between left and right crops cuts, a pixel or more on each side."""
        return self.present & (2 * (self.columns - WIDTH // 2).abs() <= self.widths - 2)

    @property
    def cut_along(self) -> Bool[Tensor, "pages places"]:
        """Letters of the line that the border between upper and lower crops cuts."""
        return self.present & ((self.rows - HEIGHT // 2).abs() <= 2)

    @property
    def kinds(self) -> dict[str, Bool[Tensor, "pages places"]]:
        """Places by kind: "inner" within a crop, "border" cut by one, "all" with those that touch one."""
        cut = self.cut_across | self.cut_along
        beside = 2 * (self.columns - WIDTH // 2).abs() <= self.widths
        return {"inner": self.present & ~cut & ~beside, "border": cut, "all": self.present}


def draw_word_pages(
    count: int,
    fonts: tuple[str, ...],
    size: int,
    noise: float,
    generator: Generator,
    split: str = "train",
) -> WordPages:
    """Pages with random words, each line in a random font and paleness; four of five lines are there.

    Args:
        size: of the letters in pixels; small letters of 14 are 8 pixels high.
        noise: standard deviation of the normal noise on every pixel.
        split: of `words`.
    """
    choice = Random(int(torch.randint(2**62, (), generator=generator)))
    boxes, widths = printed_letters(fonts, size)
    known, wide = words(split), widths.tolist()
    empty = (0, 0, 0, 0, 0, 0.0)  # letter, font, row, column, width, ink
    pages, written = [], []
    for _ in range(count):
        marks, found = [], []
        for first, last in _LINES:
            face, row = choice.randrange(len(fonts)), choice.randint(first, last)
            column, paleness = choice.randint(*_STARTS), choice.uniform(0.6, 1)
            there = choice.random() < 0.8
            while there:
                word = choice.choice(known)
                numbers = [LETTERS.index(letter) for letter in word]
                if column + sum(wide[face][n] for n in numbers) > WIDTH - _MARGIN:
                    break
                for number in numbers:
                    width = wide[face][number]
                    marks.append((number, face, row, column + width // 2, width, paleness))
                    column += width
                found.append(word)
                column += choice.randint(*_SPACES)
        pages.append(marks + [empty] * (PLACES - len(marks)))
        written.append(tuple(found))
    drawn = torch.tensor(pages, dtype=torch.float64)
    letters, faces, rows, columns, sizes = drawn[..., :-1].long().unbind(-1)
    ink = drawn[..., -1].float()
    pixels = torch.zeros(count, HEIGHT + 2 * _BOX, WIDTH + 2 * _BOX)
    page = torch.arange(count)[:, None, None, None]
    offsets = torch.arange(_BOX) + _BOX // 2
    down, across = rows[..., None, None] + offsets[:, None], columns[..., None, None] + offsets
    inked = boxes[faces, letters] * ink[..., None, None]
    pixels.index_put_((page, down, across), inked, accumulate=True)
    pixels = pixels[:, _BOX:-_BOX, _BOX:-_BOX].clamp(max=1)
    pixels = pixels + noise * torch.randn(pixels.shape, generator=generator)
    return WordPages(pixels, letters, ink > 0, rows, columns, sizes, tuple(written))
