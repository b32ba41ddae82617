"""Rendered document pages: columns of news text and bar charts, black on white, in the fonts of matplotlib."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import matplotlib
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from reattend.data.prose import documents

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
KINDS = ("text", "chart")


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that ships with matplotlib, by the name of its file; size in pixels."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf", f"{name}.ttf"), size)


def make_pages(
    count: int, side: int = 672, seed: int = 0
) -> tuple[UInt8[Tensor, "count 3 side side"], list[str]]:
    """Pages and their kinds, text and charts in turn; the same arguments give the same pages.

    Args:
        side: height and width in pixels.

    Raises:
        AssetError: when the news articles have not been fetched.
    """
    articles = documents("bbc_news")
    pages, kinds = [], []
    for number in range(count):
        choice, kind = Random(f"{seed} {number}"), KINDS[number % len(KINDS)]
        words = choice.choice(articles).split()
        page = Image.new("L", (side, side), 255)
        (_write if kind == "text" else _chart)(ImageDraw.Draw(page), side, words, choice)
        pages.append(torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8))
        kinds.append(kind)
    grey = torch.stack(pages).view(count, 1, side, side)
    return grey.expand(-1, 3, -1, -1).contiguous(), kinds


def _write(draw: ImageDraw.ImageDraw, side: int, words: list[str], choice: Random) -> None:
    """A headline and lines of text between margins, down to a random height."""
    name, margin = choice.choice(FONTS), choice.randint(side // 24, side // 10)
    size = choice.randint(side // 45, side // 25)
    headline, body = font(name, round(1.6 * size)), font(name, size)
    draw.text((margin, margin), " ".join(words[:4]), fill=0, font=headline)
    top, words = margin + 3 * size, words[4:]
    end = side - margin - choice.randint(0, side // 3)
    while words and top + size < end:
        line = 1
        while line < len(words) and body.getlength(" ".join(words[: line + 1])) < side - 2 * margin:
            line += 1
        draw.text((margin, top), " ".join(words[:line]), fill=0, font=body)
        top, words = top + round(1.35 * size), words[line:]


def _chart(draw: ImageDraw.ImageDraw, side: int, words: list[str], choice: Random) -> None:
    """A bar chart: title, axes, numbers at the ticks, a word under every bar."""
    name, size = choice.choice(FONTS), choice.randint(side // 45, side // 30)
    letters, margin = font(name, size), side // 10
    draw.text((margin, size), " ".join(words[:5]), fill=0, font=letters)
    floor, ceiling, bars = side - margin, margin, choice.randint(3, 6)
    draw.line([(margin, ceiling), (margin, floor), (side - size, floor)], fill=0, width=2)
    for tick in range(6):
        height = floor - tick * (floor - ceiling) // 6
        draw.line([(margin - 6, height), (margin, height)], fill=0, width=2)
        draw.text((size // 2, height - size // 2), str(10 * tick), fill=0, font=letters)
    step = (side - size - margin) // bars
    for bar in range(bars):
        left = margin + bar * step + step // 5
        top = choice.randint(ceiling, floor - side // 12)
        draw.rectangle(
            [left, top, left + 3 * step // 5, floor - 1],
            fill=choice.choice((60, 120, 180)),
            outline=0,
        )
        draw.text((left, floor + size // 3), words[5 + bar][:9], fill=0, font=letters)


def phase_scrambled(
    pages: UInt8[Tensor, "count 3 side side"], seed: int = 0
) -> UInt8[Tensor, "count 3 side side"]:
    """Grey pages with the amplitudes of their Fourier transforms kept and the phases drawn at random.

    What is left is texture of the same frequencies and contrast, without letters, lines or empty ground.
    """
    grey = pages[:, 0].double()
    noise = torch.randn(grey.shape, generator=Generator().manual_seed(seed), dtype=torch.float64)
    phases = torch.fft.rfft2(noise)
    phases = phases / phases.abs()
    phases[:, 0, 0] = 1  # keeps the mean
    found = torch.fft.irfft2(torch.fft.rfft2(grey).abs() * phases, s=grey.shape[-2:])
    return found.round().clamp(0, 255).byte()[:, None].expand(-1, 3, -1, -1).contiguous()
