"""Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More (arXiv 2502.07490).

Next-token prediction on inputs of which a few are hidden: at P T of the T positions the input is [MASK],
the targets stay what they are, and the loss is the mean over all positions. The model and its causal mask
are unchanged, and nothing is masked at inference.

`random_masks` draws positions for every row, `official_seed_cycle` those of the published script,
`meap_loss` is the training loss (section 3, pre-training). `sft_examples` builds what the published script
fine-tunes on. `score_decay` and `variance_gain` are the paper's measures of attention.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

UNLABELLED = -100
"""Label of a position that no loss is taken at, as PyTorch and transformers have it."""


# --- pre-training --------------------------------------------------------------------------------


def mask_count(length: int, ratio: float) -> int:
    """Positions that are masked of `length`: max(1, int(ratio length)), and none at a ratio of 0.

    Raises:
        ValueError: when the ratio is below 0, or asks for the last position too.
    """
    count = max(1, int(ratio * length)) if ratio else 0
    if not 0 <= ratio <= 1 or count > length - 1:
        raise ValueError(
            f"a mask ratio of {ratio} of {length} positions: it must be at least 0 and leave the last one"
        )
    return count


def random_masks(
    rows: int, length: int, ratio: float, generator: Generator
) -> Bool[Tensor, "rows length"]:
    """Fresh positions for every row, without replacement; the last one is never among them."""
    count = mask_count(length, ratio)
    chosen = torch.rand(rows, length - 1, generator=generator).topk(count).indices
    return torch.zeros(rows, length, dtype=torch.bool).scatter_(1, chosen, True)


def official_seed_cycle(
    rows: int, length: int, ratio: float, step: int
) -> Bool[Tensor, "rows length"]:
    """The published script's positions at an optimiser step: the same for all rows, 51 sets in turn."""
    chosen = random.Random(50 + step % 51).sample(range(length - 1), mask_count(length, ratio))
    masked = torch.zeros(rows, length, dtype=torch.bool)
    masked[:, chosen] = True
    return masked


def mask_inputs(
    tokens: Int[Tensor, "rows length"], masked: Bool[Tensor, "rows length"], mask_id: int
) -> Int[Tensor, "rows length"]:
    """A copy of the tokens with [MASK] at the masked positions."""
    return tokens.masked_fill(masked, mask_id)


def meap_loss(
    model: Callable[[Tensor], Tensor],
    tokens: Int[Tensor, "rows longer"],
    masked: Bool[Tensor, "rows length"],
    mask_id: int,
) -> Float[Tensor, ""]:
    """Mean nats of every next token, masked or not, from inputs that are [MASK] at the masked positions.

    Args:
        model: token ids [rows, length] to logits [rows, length, vocabulary], causal.
        tokens: one more than the inputs, so `longer` is `length` + 1.

    Without a masked position this is next-token prediction.
    """
    inputs = mask_inputs(tokens[:, :-1], masked, mask_id)
    return F.cross_entropy(model(inputs).flatten(0, 1), tokens[:, 1:].flatten())


# --- fine-tuning ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Token ids and the label of each place, `UNLABELLED` where no loss is taken.

    A label stands at its own token's place, as transformers wants it: the logits of the place before
    predict it.
    """

    inputs: list[int]
    labels: list[int]


def sft_examples(
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    mask_id: int,
    end_id: int,
    rng: random.Random,
    ratio: float = 0.1,
    longer_than: int = 50,
    max_length: int = 4096,
) -> list[Example]:
    """What the published script makes of a prompt and its answer: one example, or two for a long answer.

    The first is the usual one, with labels on the answer and the closing token. An answer of more than
    `longer_than` tokens gives a second one with [MASK] at max(1, int(ratio length)) places of the answer
    and labels at these places alone. The two are apart: the masked copy does not see its clean twin, from
    which it could copy. Text over `max_length` is cut at its end.

    Raises:
        ValueError: when the prompt leaves no place for the answer.
    """
    start, text = len(prompt), [*prompt, *answer][: max_length - 1]
    if len(text) <= start:
        raise ValueError(
            f"a prompt of {start} tokens leaves no token of the answer within max_length {max_length}: "
            "cut the prompt"
        )
    labels = [UNLABELLED] * start + [*answer, end_id]
    examples = [Example([*text, end_id], labels[:max_length])]
    if len(answer) > longer_than:
        count = max(1, int(ratio * (len(text) - start)))
        inputs, labels = [*text, end_id], [UNLABELLED] * (len(text) + 1)
        for place in rng.sample(range(start, len(text)), count):
            inputs[place], labels[place] = mask_id, text[place]
        examples.append(Example(inputs, labels))
    return examples


# --- what masking does to attention --------------------------------------------------------------


def visible_pairs(keys: Bool[Tensor, "rows length"]) -> Bool[Tensor, "rows 1 length length"]:
    """Which key a query may see, causally, of the keys that are asked for: [rows, 1, queries, keys]."""
    length = keys.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
    return keys[:, None, None] & causal


def mean_attention(
    maps: Float[Tensor, "rows maps length length"], keys: Bool[Tensor, "rows length"]
) -> Float[Tensor, ""]:
    """Att(X[keys]): mean weight over all pairs of a key that is asked for and a query that sees it."""
    pairs = visible_pairs(keys)
    return (maps * pairs).sum() / (pairs.sum() * maps.shape[1])


def score_decay(
    plain: Float[Tensor, "rows maps length length"],
    with_masks: Float[Tensor, "rows maps length length"],
    masked: Bool[Tensor, "rows length"],
) -> Float[Tensor, ""]:
    """(Att_N - Att_M) / Att_N over the masked places: how much less they get for being [MASK].

    Args:
        plain: causal attention maps on the tokens; `maps` are heads, of one layer or of several.
        with_masks: of the same model on the same rows, with [MASK] at `masked`.
    """
    before = mean_attention(plain, masked)
    return (before - mean_attention(with_masks, masked)) / before


def attention_variance(
    maps: Float[Tensor, "rows maps length length"], keys: Bool[Tensor, "rows length"]
) -> Float[Tensor, ""]:
    """Variance of a query's weights over the keys that are asked for, as a mean over queries and maps.

    Queries that see fewer than two of them do not count.
    """
    pairs = visible_pairs(keys)
    count = pairs.sum(-1, keepdim=True).clamp(min=1)
    centred = maps - (maps * pairs).sum(-1, keepdim=True) / count
    variance = (centred.square() * pairs).sum(-1) / count[..., 0]
    counted = (pairs.sum(-1) > 1).expand_as(variance)
    return variance[counted].mean()


def variance_gain(
    plain: Float[Tensor, "rows maps length length"],
    with_masks: Float[Tensor, "rows maps length length"],
    masked: Bool[Tensor, "rows length"],
) -> Float[Tensor, ""]:
    """Var_M / Var_N - 1 over the places that are not masked, of the maps that `score_decay` compares."""
    return attention_variance(with_masks, ~masked) / attention_variance(plain, ~masked) - 1
