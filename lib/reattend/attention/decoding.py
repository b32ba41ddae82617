"""Greedy or given decoding with a choice of what to read of the cache, counted exactly.

A prompt is read once, with any prefill method, and any number of decodings start from it: that is
how methods are compared on the same prompt without reading it again for each.
"""

import copy
import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from reattend.attention.host import attach
from reattend.attention.kv_selection import Combined
from reattend.attention.method import AttentionMethod, CacheView
from reattend.attention.registry import build_method


@dataclass(frozen=True)
class Prompt:
    """A prompt that a model has read.

    Attributes:
        cache: keys and values of every layer.
        logits: of the token that follows the prompt.
        real: True for real tokens, False for padding; None without padding.
        starts: what `begin_decoding` needs, by layer.
    """

    cache: DynamicCache
    logits: Float[Tensor, "batch vocabulary"]
    real: Bool[Tensor, "batch tokens"] | None
    starts: dict[int, dict]


@dataclass(frozen=True)
class Decoding:
    """What one decoding gave and what it read.

    Attributes:
        tokens: the greedy choice at every step.
        log_likelihood: of the token that was fed on (the greedy or the given one), in nats.
        kv_reads: entries of the cache that were attended in each step after the first, over
            layers, key heads and the batch. The first token comes from the prompt and reads
            nothing.
        selection_reads: what was read besides, to choose them, in entries.
        entry_bytes: size of one entry, a key and a value.
        seconds: wall time of all steps after the first.
    """

    tokens: Int[Tensor, "batch steps"]
    log_likelihood: Float[Tensor, "batch steps"]
    kv_reads: tuple[int, ...]
    selection_reads: tuple[float, ...]
    entry_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the whole batch; the first of each sequence is not counted."""
        return len(self.kv_reads) * len(self.tokens) / self.seconds

    @property
    def bytes_per_token(self) -> float:
        """Bytes read of the cache for each token, what was read to choose among them."""
        read = sum(self.kv_reads) + sum(self.selection_reads)
        return read * self.entry_bytes / (len(self.kv_reads) * len(self.tokens))


class _Recorder(AttentionMethod):
    """Keeps what `begin_decoding` is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[int, dict] = {}

    def begin_decoding(
        self, query: Tensor, key: Tensor, *, layer: int, cache: CacheView, **call
    ) -> None:
        # The keys are in the cache: only the queries would be lost.
        self.starts[layer] = {"query": query, **call}


@torch.no_grad()
def read_prompt(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch tokens"],
    *,
    real: Bool[Tensor, "batch tokens"] | None = None,
    prefill: AttentionMethod | None = None,
) -> Prompt:
    """Reads a prompt once, so that decodings may start from it.

    Keeps the queries of every layer (as large as two or three times the cache with grouped heads):
    drop the prompt when its decodings are done.

    Args:
        real: True for real tokens, for a batch padded on the left.
        prefill: attention of the prompt; dense when None.
    """
    recorder = _Recorder()
    cache = DynamicCache(config=model.config)
    with attach(model, Combined(prefill or AttentionMethod(), recorder)):
        read = model(
            tokens,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **_positions(real, tokens.shape[1]),
        )
    return Prompt(cache, read.logits[:, -1].float(), real, recorder.starts)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompt: Prompt,
    method: str | AttentionMethod,
    *,
    steps: int | None = None,
    given: Int[Tensor, "batch steps"] | None = None,
    **settings,
) -> Decoding:
    """Decodes from a prompt, greedily or along given tokens, one token at a time.

    Along given tokens, a greedy choice that equals them all is what free decoding would have
    produced too.

    Args:
        method: what reads the cache, or its registered name with `settings`. Its counters and
            densities start anew.
        steps: tokens to decode greedily.
        given: tokens to feed instead of the greedy choice.

    Raises:
        ValueError: not exactly one of `steps` and `given`, or nothing to decode.
    """
    if (steps is None) == (given is None):
        raise ValueError("decode takes either steps or given tokens")
    steps = given.shape[1] if steps is None else steps
    if steps < 1:
        raise ValueError(f"decode needs at least one step, got {steps}")
    method = build_method(method, **settings) if isinstance(method, str) else method
    cache = copy.deepcopy(prompt.cache)
    method.clear()
    for layer, start in prompt.starts.items():
        view = CacheView(cache, before=None)
        method.begin_decoding(key=cache.layers[layer].keys, layer=layer, cache=view, **start)

    logits, real = prompt.logits, prompt.real
    choices, likelihoods, reads, selecting = [], [], [], []
    started = _clock(logits.device)
    with attach(model, method):
        for step in range(steps):
            choices.append(logits.argmax(dim=-1))
            token = choices[-1] if given is None else given[:, step]
            likelihoods.append(_log_likelihood(logits, token))
            if step + 1 == steps:
                break
            before = method.kv_reads, method.selection_reads
            if real is not None:
                real = torch.cat([real, real.new_ones(len(real), 1)], dim=1)
            logits = (
                model(token[:, None], past_key_values=cache, use_cache=True, **_positions(real, 1))
                .logits[:, -1]
                .float()
            )
            reads.append(method.kv_reads - before[0])
            selecting.append(method.selection_reads - before[1])
    seconds = _clock(logits.device) - started
    keys, values = cache.layers[0].keys, cache.layers[0].values
    return Decoding(
        tokens=torch.stack(choices, dim=1),
        log_likelihood=torch.stack(likelihoods, dim=1),
        kv_reads=tuple(reads),
        selection_reads=tuple(selecting),
        entry_bytes=sum(x.shape[-1] * x.element_size() for x in (keys, values)),
        seconds=seconds,
    )


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _positions(real: Tensor | None, queries: int) -> dict[str, Tensor]:
    """What the model must be told of padding: the mask, and positions that count real tokens."""
    if real is None:
        return {}
    positions = (real.long().cumsum(dim=-1) - 1).clamp_min(0)
    return {"attention_mask": real.long(), "position_ids": positions[:, -queries:]}


def _log_likelihood(
    logits: Float[Tensor, "batch vocabulary"], token: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    return logits.log_softmax(dim=-1).gather(-1, token[:, None]).squeeze(-1)
