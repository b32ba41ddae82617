"""Spoken prompts: the list's format, and sounds at twice their rate."""

import gzip
import wave

import numpy as np
import pytest

from reattend.data.spoken_prompts import read_sound, transcripts


def test_comments_and_sounds_in_brackets_are_no_prompts():
    text = "; Core sounds\n\nagent-pass: Please enter: pound.\nbeep: [a beep]\nletters/a:  A\nempty: \n"
    found = transcripts(gzip.compress(text.encode()))
    assert found == {"agent-pass": "Please enter: pound.", "letters/a": "A"}


def write(path, data, rate=8000, width=2):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, width, rate, 0, "NONE", ""))
        file.writeframes(data)


def test_a_sound_doubles_its_rate_and_keeps_its_shape(tmp_path):
    times = np.arange(2000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 440 * times)
    write(tmp_path / "tone.wav", (tone * 32768).astype("<i2").tobytes())
    samples = read_sound(tmp_path / "tone.wav")
    assert samples.shape == (4000,)
    assert samples.dtype == np.float32
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / 16000)
    assert np.abs(samples - expected)[100:-100].max() < 2e-3


def test_other_kinds_of_files_are_refused(tmp_path):
    write(tmp_path / "fast.wav", bytes(8), rate=16000)
    with pytest.raises(ValueError, match=r"fast.wav has \(1, 2, 16000\)"):
        read_sound(tmp_path / "fast.wav")
