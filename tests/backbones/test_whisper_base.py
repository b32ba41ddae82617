"""Whisper base: the two parts joined are a model that transcribes, and tiny.en's recipe stays its own."""

import pytest
import torch

from reattend.assets.store import AssetError, asset_path
from reattend.backbones.pretrained import whisper, whisper_base
from reattend.data.spoken_prompts import spoken_prompts


def test_shape_and_tokens():
    config = whisper_base.configuration()
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (512, 6, 6)
    assert (config.vocab_size, config.decoder_start_token_id) == (51865, 50258)
    assert whisper.configuration().d_model == 384


@torch.no_grad()
def test_it_transcribes():
    try:
        for name in ("whisper_base_1", "whisper_base_2", "spoken_prompts", "spoken_prompts_text"):
            asset_path(name)
    except AssetError as error:
        pytest.skip(str(error))
    prompt = next(p for p in spoken_prompts() if p.name == "conf-locked")
    tokenizer, model = whisper.load(2.3, 0.4, 20, "whisper_base")
    parameters = {p.data_ptr(): p.numel() for p in model.parameters()}
    cut_off = (1500 - model.config.max_source_positions) * 512
    assert round((sum(parameters.values()) + cut_off) / 1e6, 1) == 72.6
    encoded = model.get_encoder()(
        whisper.log_mel(prompt.samples, model.config.max_source_positions / 50)[None]
    )
    ids = list(whisper_base.PROMPT)
    while len(ids) < 18 and ids[-1] != whisper_base.END:
        logits = model(encoder_outputs=encoded, decoder_input_ids=torch.tensor([ids])).logits
        ids.append(int(logits[0, -1].argmax()))
    assert ids[-1] == whisper_base.END
    said = tokenizer.decode(ids[len(whisper_base.PROMPT) : -1])
    assert said.strip() == "This conference is locked."
