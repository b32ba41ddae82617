"""Whisper: the converted weights transcribe, and a cut window is what its positions say."""

import struct

import numpy as np
import pytest
import torch

from reattend.assets.store import AssetError, asset_path
from reattend.backbones.pretrained import whisper
from reattend.data.spoken_prompts import spoken_prompts


@pytest.fixture
def fetched():
    try:
        for name in ("whisper_tiny_en", "spoken_prompts", "spoken_prompts_text"):
            asset_path(name)
    except AssetError as error:
        pytest.skip(str(error))


@torch.no_grad()
def greedy(model, features, longest=18):
    ids = list(whisper.PROMPT)
    encoded = model.get_encoder()(features[None])
    while len(ids) < longest:
        logits = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == whisper.END:
            break
    return ids[2:]


@pytest.mark.usefixtures("fetched")
def test_it_transcribes_with_the_last_positions_of_the_window():
    prompt = next(p for p in spoken_prompts() if p.name == "conf-locked")
    tokenizer, model = whisper.load(2.0, 2.0)
    said = greedy(model, whisper.log_mel(prompt.samples, 4.0))
    assert said[-1] == whisper.END
    assert tokenizer.decode(said[:-1]).strip() == "This conference is locked."
    _, short = whisper.load(2.0)
    looping = greedy(short, whisper.log_mel(prompt.samples, 2.0))
    assert looping[: len(said) - 1] == said[:-1]
    assert whisper.END not in looping


@pytest.mark.usefixtures("fetched")
def test_a_cut_window_keeps_first_and_last_positions():
    _, whole = whisper.load()
    _, model = whisper.load(1.0, 0.5)
    rows = whole.get_encoder().embed_positions.weight
    expected = torch.cat([rows[:50], rows[-25:]])
    assert torch.equal(model.get_encoder().embed_positions.weight, expected)
    assert len(rows) == 1500
    _, sampled = whisper.load(1.0, 0.5, 500)
    expected = torch.cat([rows[:50], rows[[50, 550, 1050]], rows[-25:]])
    assert torch.equal(sampled.get_encoder().embed_positions.weight, expected)
    assert sampled.config.max_source_positions == 78


@pytest.mark.usefixtures("fetched")
def test_the_whole_window_is_the_unmodified_model():
    prompt = next(p for p in spoken_prompts() if p.name == "conf-locked")
    features = whisper.log_mel(prompt.samples)
    _, model = whisper.load()
    with torch.no_grad():
        before = model.get_encoder()(features[None]).last_hidden_state
        whisper.cut(model, 20.0, 10.0)
        after = model.get_encoder()(features[None]).last_hidden_state
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="must fit 30 seconds, got 20 and 11"):
        whisper.cut(model, 20.0, 11.0)


def test_log_mel_is_whispers():
    """Silence lies at the floor, a tone in its bin; the floor is 8 decades below the maximum."""
    time = np.arange(16000) / 16000
    features = whisper.log_mel(np.sin(2 * np.pi * 1000 * time).astype(np.float32), 2.0)
    assert features.shape == (80, 200)
    assert features.max() - features.min() == pytest.approx(2.0, abs=1e-5)
    # 80 bins over 45.25 mels up to 8 kHz; 1 kHz is at 15 mels, bin 15 x 81 / 45.25 - 1.
    assert abs(features[:, 10:90].mean(1).argmax().item() - 25.85) < 1
    assert features[:, 110:].max() == features.min()
    with pytest.raises(ValueError, match=r"1.00 s of speech do not fit a window of 0.5 s"):
        whisper.log_mel(np.zeros(16000, np.float32), 0.5)


@pytest.mark.parametrize(("samples", "frames"), [(320, 2), (321, 4), (15999, 100), (16000, 100)])
def test_frames_of_speech_are_whole_positions(samples, frames):
    assert whisper.frames_of(np.zeros(samples, np.float32)) == frames


def test_ctranslate2_files_are_read_with_their_aliases():
    def text(word):
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    numbers = np.arange(6, dtype=np.float16).reshape(2, 3)
    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<I", 3)
    data += struct.pack("<I", 1) + text("a/weight") + struct.pack("<B2I", 2, 2, 3)
    data += struct.pack("<BI", 4, numbers.nbytes) + numbers.tobytes()
    data += struct.pack("<I", 1) + text("b/weight") + text("a/weight")
    arrays = whisper.read_ctranslate2(data)
    assert set(arrays) == {"a/weight", "b/weight"}
    assert np.array_equal(arrays["b/weight"], numbers)
    assert numbers.dtype == arrays["a/weight"].dtype
    with pytest.raises(ValueError, match="version 7"):
        whisper.read_ctranslate2(struct.pack("<I", 7) + data[4:])
