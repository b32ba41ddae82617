"""What is asked of linear attention with decay: what its forms cost, what decoding costs, what counting achieves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from reattend.language_modeling.transnormer import decay_slopes, left_product, lightning
from reattend.timing import Run, device_clock, interleaved_seconds
from reattend.trunks.language import Trunk, TrunkCache


def operator_runs(
    length: int, heads: int, dim: int, block: int, device: torch.device | str = "cpu"
) -> dict[str, Run]:
    """Forward and backward of one layer's attention on random inputs, in four forms.

    "left product"; "lightning"; "one block", which is lightning's code with a single chunk and so does
    the left product's work; and "softmax", PyTorch's fused kernel.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, length, dim, generator=generator).to(device) for _ in range(3)]
    q, k, v = (x.requires_grad_() for x in inputs)
    slopes = decay_slopes(heads, 2)[0].to(device)
    forms: dict[str, Callable[[], Tensor]] = {
        "left product": lambda: left_product(q, k, v, slopes),
        "lightning": lambda: lightning(q, k, v, slopes, block=block)[0],
        "one block": lambda: lightning(q, k, v, slopes, block=length)[0],
        "softmax": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }

    def both_ways(form: Callable[[], Tensor]) -> Run:
        return lambda: torch.autograd.grad(form().sum(), (q, k, v))

    return {name: both_ways(form) for name, form in forms.items()}


@torch.no_grad()
def token_milliseconds(
    models: Mapping[str, Trunk],
    tokens: Int[Tensor, "1 length"],
    contexts: Sequence[int],
    rounds: int,
    repeats: int = 4,
) -> dict[str, Float[np.ndarray, "contexts rounds"]]:
    """Milliseconds to decode one token behind `contexts` tokens, by `device_clock`; all are measured in turns.

    Each measurement is the mean of `repeats` tokens, which start from the same cache in every round.
    """

    def decode(model: Trunk, cache: TrunkCache) -> Run:
        def run() -> None:
            copy = TrunkCache([dict(layer) for layer in cache.layers], cache.length)
            for _ in range(repeats):
                model(tokens[:, :1], copy)

        return run

    runs = {}
    for name, model in models.items():
        for context in contexts:
            cache = model.start_cache()
            model(tokens[:, :context], cache)
            runs[name, context] = decode(model, cache)
    seconds = interleaved_seconds(runs, rounds, device_clock(tokens.device))
    return {
        name: 1000 / repeats * np.stack([seconds[name, context] for context in contexts])
        for name in models
    }


def bigram_nats(
    pairs: Int[Tensor, "entries entries"],
    rows: Int[Tensor, "rows length"],
    weights: Sequence[float] = (1.0, 3.0, 10.0, 30.0, 100.0),
) -> float:
    """Mean nats of the next token under counted pairs, smoothed by `weights` counts of the unigram.

    The best weight is chosen on the rows themselves, in the bigram model's favour.
    """
    counts = pairs.double()
    unigram = (counts.sum(0) + 1) / (counts.sum() + len(counts))
    here, following = rows[:, :-1], rows[:, 1:]
    found = []
    for weight in weights:
        chance = (counts + weight * unigram) / (counts.sum(1, keepdim=True) + weight)
        found.append(-chance[here, following].log().mean().item())
    return min(found)
