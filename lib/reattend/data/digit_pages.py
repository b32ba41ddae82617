"""Small pages with printed digits, one of which is cut by the border between the page's two crops.

A page of 24 x 48 pixels falls into two crops of 24 x 24. Up to three digits stand on it: one within the left crop,
one across the border, one within the right crop. All are of one kind, so that what the border costs can be told apart
from what a digit costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from reattend.data.document_pages import font

HEIGHT, WIDTH = 24, 48
PATCH = 4  # pixels of a token's side
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH
LEFT, BORDER, RIGHT = range(3)
INNER = [LEFT, RIGHT]
UNASKED = -100
"""Label of a token that shows no digit: ignored by torch's cross-entropy."""

_BOX = (16, 12)  # height and width in pixels of the box that a digit is drawn into
_ROWS = (8, 16)  # first and last row of a digit's centre
_CENTRES = ((6, 9), (21, 27), (39, 42))  # first and last column of the centre, by place


@dataclass(frozen=True)
class DigitPages:
    """Pages and what is written on them.

    Attributes:
        pixels: ink between 0 and 1, plus noise.
        digits: by place: left, across the border, right.
        present: whether there is a digit at the place.
        rows, columns: pixel at the centre of each digit.
    """

    pixels: Float[Tensor, "pages height width"]
    digits: Int[Tensor, "pages 3"]
    present: Bool[Tensor, "pages 3"]
    rows: Int[Tensor, "pages 3"]
    columns: Int[Tensor, "pages 3"]

    def __len__(self) -> int:
        return len(self.digits)

    def to(self, device: torch.device | str) -> DigitPages:
        """The same on a device."""
        return DigitPages(*(part.to(device) for part in vars(self).values()))

    @property
    def tokens(self) -> Int[Tensor, "pages 3"]:
        """Number of the token at the centre of each digit, on the page's map of 6 x 12, row by row."""
        return self.rows // PATCH * COLUMNS + self.columns // PATCH

    @property
    def labels(self) -> Int[Tensor, "pages rows columns"]:
        """For every token the digit that its centre lies on, `UNASKED` where there is none."""
        device = self.digits.device
        across = PATCH * torch.arange(COLUMNS, device=device) + PATCH // 2
        down = PATCH * torch.arange(ROWS, device=device)[:, None] + PATCH // 2
        found = torch.full((len(self), ROWS, COLUMNS), UNASKED, device=device)
        for place in range(3):
            digit, row, column, there = (
                part[:, place, None, None]
                for part in (self.digits, self.rows, self.columns, self.present)
            )
            on_it = ((across - column).abs() <= 5) & ((down - row).abs() <= 6) & there
            found = torch.where(on_it, digit, found)
        return found


@cache
def printed_digits(fonts: tuple[str, ...], size: int) -> Float[Tensor, "fonts 10 16 12"]:
    """The ten digits in each font, centred in their boxes; ink from 0 to 1."""
    height, width = _BOX
    boxes = []
    for name in fonts:
        for digit in "0123456789":
            letters = font(name, size)
            left, top, right, bottom = letters.getbbox(digit)
            corner = (round((width - right - left) / 2), round((height - bottom - top) / 2))
            box = Image.new("L", (width, height), 0)
            ImageDraw.Draw(box).text(corner, digit, fill=255, font=letters)
            boxes.append(torch.frombuffer(bytearray(box.tobytes()), dtype=torch.uint8))
    return torch.stack(boxes).view(len(fonts), 10, height, width) / 255


def draw_digit_pages(
    count: int, fonts: tuple[str, ...], size: int, noise: float, generator: Generator
) -> DigitPages:
    """Pages with random digits in random fonts, at random heights and paleness.

    Each of the three places is taken with probability 3/4. The digit across the border is centred within three
    pixels of it.

    Args:
        size: of the letters in pixels; digits of 16 are 12 pixels high and up to 10 wide.
        noise: standard deviation of the normal noise on every pixel.
    """

    def drawn(first: int, last: int, *shape: int) -> Tensor:
        return torch.randint(first, last + 1, (count, *shape), generator=generator)

    digits, rows, face = drawn(0, 9, 3), drawn(*_ROWS, 3), drawn(0, len(fonts) - 1, 3)
    columns = torch.stack([drawn(*centres) for centres in _CENTRES], 1)
    present = torch.rand(count, 3, generator=generator) < 0.75
    ink = (0.6 + 0.4 * torch.rand(count, 3, generator=generator)) * present
    boxes = printed_digits(fonts, size)[face, digits] * ink[..., None, None]
    pixels = noise * torch.randn(count, HEIGHT, WIDTH, generator=generator)
    page = torch.arange(count)[:, None, None]
    for place in range(3):
        down = torch.arange(_BOX[0])[:, None] + (rows[:, place] - _BOX[0] // 2)[:, None, None]
        across = torch.arange(_BOX[1]) + (columns[:, place] - _BOX[1] // 2)[:, None, None]
        pixels[page, down, across] += boxes[:, place]
    return DigitPages(pixels, digits, present, rows, columns)
