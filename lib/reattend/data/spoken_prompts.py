"""Telephone prompts of one professional speaker, with what they say.

The prompts of a telephone exchange, 8 kHz, recorded in one voice: short commands, sentences, digits and
letters. Their text is a list of lines "name: text"; sounds that are no speech stand in brackets there.
"""

from __future__ import annotations

import gzip
import re
import wave
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from reattend.assets.store import asset_path

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
RATE = 16_000  # samples a second, after doubling


@dataclass(frozen=True)
class Prompt:
    """One prompt: its name, what it says, and its sound at 16 kHz, mono, in [-1, 1]."""

    name: str
    text: str
    samples: np.ndarray

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / RATE


@cache
def spoken_prompts() -> tuple[Prompt, ...]:
    """All prompts that are speech, in the order of the list.

    Raises:
        AssetError: when the assets have not been fetched.
    """
    folder = asset_path("spoken_prompts") / SOUNDS
    listed = transcripts((asset_path("spoken_prompts_text") / TEXTS).read_bytes())
    files = {name: folder / f"{name}.wav" for name in listed}
    return tuple(
        Prompt(name, listed[name], read_sound(file))
        for name, file in files.items()
        if file.exists()
    )


def transcripts(packed: bytes) -> dict[str, str]:
    """Text by name out of the gzipped list; comments and sounds in brackets are left out."""
    text = gzip.decompress(packed).decode("utf8", "replace")
    lines = re.findall(r"(?m)^([^;:\s]+):[ \t]*(\S.*)$", text)
    return {name: said.strip() for name, said in lines if not said.startswith("[")}


def read_sound(path: Path) -> np.ndarray:
    """A 16-bit mono file of 8 kHz as 16 kHz in [-1, 1], float32.

    Raises:
        ValueError: for a file of another kind.
    """
    with wave.open(str(path)) as file:
        kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        data = file.readframes(file.getnframes())
    if kind != (1, 2, 8000):
        raise ValueError(f"{path.name} has {kind} channels, bytes and Hz, not (1, 2, 8000)")
    samples = np.frombuffer(data, "<i2") / 32768
    return resample_poly(samples, 2, 1).astype(np.float32)
