"""Small Llamas of three sizes that find facts in a context: for questions about model size.

The task is that of a needle in a haystack with several queried keys. A fact is one token that stands
for a pair (key, value); facts lie between filler words, and after the context keys are asked one by
one, each followed by its value. One match of a key finds its fact, so models of this size learn the
task in a minute; with key and value as two tokens they do not. Lengths rise during training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reattend.backbones.store import backbone_path
from reattend.training.loop import TrainingPlan, train

FILLERS, KEYS, VALUES = 32, 64, 16
FIRST_KEY = FILLERS
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_FACT = FIRST_VALUE + VALUES
VOCABULARY = FIRST_FACT + KEYS * VALUES

LAYERS, HEAD_DIM = 2, 8
ASKED = 16  # keys asked of each row in training
TOKENS = 2048  # of a batch, roughly
FEWEST_ROWS = 8
SEED = 1  # of weights and rows; results of seed 0 were known when later questions were asked


@dataclass(frozen=True)
class Setting:
    """What is trained in one profile: widths, and steps at each (length, facts)."""

    widths: tuple[int, ...]
    stages: tuple[tuple[int, int, int], ...]


SETTINGS = {
    "smoke": Setting((16, 24), ((32, 8, 20), (64, 16, 10))),
    "cpu": Setting(
        (16, 24, 32),
        ((32, 8, 400), (64, 16, 100), (128, 32, 150), (256, 48, 150), (512, 64, 300)),
    ),
    "gpu": Setting(
        (16, 24, 32),
        (
            (32, 8, 600),
            (64, 16, 100),
            (128, 32, 150),
            (256, 48, 150),
            (512, 64, 300),
            (1024, 64, 300),
        ),
    ),
}
RATE = 5e-3  # at width 32; Adam's rate has to fall as the width grows


def fact_rows(
    rows: int, length: int, facts: int, asked: int, generator: Generator
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows answer"]]:
    """Prompts that end with the first key asked, and what follows: value, key, value, ..., value.

    Args:
        length: of the prompts, in tokens.
        facts: facts in the context, of different keys; the rest is filler.
        asked: keys asked; the same one may come twice.

    Raises:
        ValueError: when the facts do not fit.
    """
    if not 1 <= facts <= min(KEYS, length - 1) or asked < 1:
        raise ValueError(f"{facts} facts, {asked} asked: 1 to {min(KEYS, length - 1)} facts fit")
    keys = torch.rand(rows, KEYS, generator=generator).topk(facts).indices
    values = torch.randint(VALUES, (rows, facts), generator=generator)
    prompt = torch.randint(FILLERS, (rows, length), generator=generator)
    places = torch.rand(rows, length - 1, generator=generator).topk(facts).indices
    prompt.scatter_(1, places, FIRST_FACT + keys * VALUES + values)
    which = torch.randint(facts, (rows, asked), generator=generator)
    questions = FIRST_KEY + keys.gather(1, which)
    answers = FIRST_VALUE + values.gather(1, which)
    prompt[:, -1] = questions[:, 0]
    answer = torch.stack([answers, questions.roll(-1, 1)], dim=-1).flatten(1)[:, :-1]
    return prompt, answer


def logits_at(
    model: LlamaForCausalLM, tokens: Int[Tensor, "rows length"], places: Int[Tensor, " places"]
) -> Float[Tensor, "rows places vocabulary"]:
    """The model's logits at some places: its last layer has queries and a feed-forward part there alone."""
    *first, last = model.model.layers
    states = model.model.embed_tokens(tokens)
    every = torch.arange(tokens.shape[1], device=tokens.device)
    turns = model.model.rotary_emb(states, every[None])
    for layer in first:
        states = layer(states, position_embeddings=turns)
    mixer, normed = last.self_attn, last.input_layernorm(states)
    query, key, value = (
        part.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
        for part in (mixer.q_proj(normed[:, places]), mixer.k_proj(normed), mixer.v_proj(normed))
    )
    query, _ = apply_rotary_pos_emb(query, query, *(x[:, places] for x in turns))
    _, key = apply_rotary_pos_emb(key, key, *turns)
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=every <= places[:, None], scale=mixer.scaling
    )
    states = states[:, places] + mixer.o_proj(mixed.transpose(1, 2).flatten(2))
    states = states + last.mlp(last.post_attention_layernorm(states))
    return model.lm_head(model.model.norm(states))


def _loss(model: LlamaForCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    prompt, answer = batch
    tokens = torch.cat([prompt, answer[:, :-1]], dim=1)
    asked = torch.arange(prompt.shape[1] - 1, tokens.shape[1], 2, device=tokens.device)
    logits = logits_at(model, tokens, asked)
    return F.cross_entropy(logits.flatten(0, 1), answer[:, ::2].flatten())


def _batches(stages: tuple[tuple[int, int, int], ...]) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED + 1)
    for length, facts, steps in stages:
        for _ in range(steps):
            yield fact_rows(max(FEWEST_ROWS, TOKENS // length), length, facts, ASKED, generator)


def untrained(width: int) -> LlamaForCausalLM:
    """A Llama of this width with random weights; more width means more heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // HEAD_DIM,
            num_key_value_heads=width // HEAD_DIM,
            max_position_embeddings=4096,
            initializer_range=0.1,  # the usual 0.02 makes widths this small start slowly
            tie_word_embeddings=False,
        )
    )


def build(target: Path, profile: str) -> None:
    """Train the models of a profile and write each into a directory named by its width."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    steps = sum(count for *_, count in setting.stages)
    for width in setting.widths:
        torch.manual_seed(SEED)
        plan = TrainingPlan(steps, RATE * 32 / width, 0.01, warmup=min(30, steps // 2))
        model = untrained(width).to(device)
        batches = (tuple(part.to(device) for part in batch) for batch in _batches(setting.stages))
        log = train(model, batches, _loss, plan)
        model.save_pretrained(target / str(width))
        recent = log.losses[-20:]
        print(f"width {width}: loss {sum(recent) / len(recent):.3f}", flush=True)


def load(profile: str = "cpu") -> dict[int, LlamaForCausalLM]:
    """Models by width, in evaluation mode, without gradients; built on first use."""
    directory = backbone_path("small_llamas", profile)
    models = {}
    for width in SETTINGS[profile].widths:
        model = LlamaForCausalLM.from_pretrained(directory / str(width), local_files_only=True)
        models[width] = model.eval().requires_grad_(False)
    return models
