"""Cross-attention as an explanation of speech-to-text models (arXiv 2509.18010).

A recogniser's cross-attention says where in the speech the decoder looks for each token. The paper holds
it against what the speech does for the token: SPES saliency. Parts of the input are removed at random
many times; a cell's relevance is the mean change of the output's distribution over the times that it was
removed. The same with frames of the encoder's output, which the decoder reads, needs no encoder.

    input saliency SM^X     cells (frame x mel bin) of the log-mel spectrogram   [tokens, frames, bins]
    output saliency SM^H    frames of the encoder's output                       [tokens, positions]
    cross-attention CA      per layer and head                                   [tokens, positions]

Works with transformers' Whisper models of any size and window. Positions are encoder frames, two frames of
the spectrogram each. Speech is padded to the model's window; only frames that hold speech are removed,
scored and compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration

STRIDE = 2
"""Frames of the spectrogram to one position of the encoder."""


@dataclass(frozen=True)
class Speech:
    """One utterance and what the model made of it.

    Args:
        features: log-mel spectrogram over the whole window.
        frames: how many of its frames hold speech, a multiple of `STRIDE`.
        prompt: tokens that the decoder is always given first.
        tokens: the hypothesis, ending with the end of the text.
    """

    features: Float[Tensor, "bins window"]
    frames: int
    prompt: Int[Tensor, " prompt"]
    tokens: Int[Tensor, " tokens"]

    def __post_init__(self) -> None:
        if self.frames % STRIDE or not 0 < self.frames <= self.features.shape[1]:
            raise ValueError(
                f"frames must be a multiple of {STRIDE} in 1..{self.features.shape[1]}, got {self.frames}"
            )

    @property
    def positions(self) -> int:
        """Frames of the encoder that hold speech."""
        return self.frames // STRIDE


# The model ----------------------------------------------------------------------------------------


def encode(
    model: WhisperForConditionalGeneration, features: Float[Tensor, "batch bins window"]
) -> Float[Tensor, "batch positions width"]:
    """The encoder's output."""
    return model.get_encoder()(features).last_hidden_state


def forced_log_probabilities(
    model: WhisperForConditionalGeneration,
    encoded: Float[Tensor, "batch positions width"],
    prompt: Int[Tensor, " prompt"],
    tokens: Int[Tensor, " tokens"],
) -> Float[Tensor, "batch tokens words"]:
    """Log-probabilities over all words at each step, while the decoder is given `tokens`."""
    read = torch.cat([prompt, tokens[:-1]]).expand(len(encoded), -1)
    states = model.get_decoder()(read, encoder_hidden_states=encoded).last_hidden_state
    # Contiguous: else the product with the vocabulary runs once an utterance, five times slower.
    predicting = states[:, len(prompt) - 1 :].contiguous()
    words = model.proj_out(predicting)
    return words.log_softmax(-1, dtype=torch.promote_types(words.dtype, torch.float32))


@torch.no_grad()
def transcribe(
    model: WhisperForConditionalGeneration,
    features: Float[Tensor, "batch bins window"],
    prompt: Int[Tensor, " prompt"],
    end: int,
    longest: int,
) -> list[Int[Tensor, " _"]]:
    """Greedy hypotheses without the end of the text, of at most `longest` tokens."""
    encoded = encode(model, features)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    read, found = prompt.expand(len(features), -1), []
    done = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    while len(found) < longest and not done.all():
        states = model.get_decoder()(
            read, encoder_hidden_states=encoded, past_key_values=cache, use_cache=True
        ).last_hidden_state
        chosen = model.proj_out(states[:, -1]).argmax(-1).masked_fill(done, end)
        done |= chosen == end
        found.append(chosen)
        read = chosen[:, None]
    rows = torch.stack(found, 1) if found else read[:, :0]
    return [row[: int((row != end).sum())] for row in rows]


# SPES saliency --------------------------------------------------------------------------------------


def rectangle_masks(
    pairs: int,
    shape: tuple[int, int],
    block: tuple[int, int],
    generator: torch.Generator,
    removed: float = 0.5,
) -> Bool[Tensor, "masks rows columns"]:
    """Masks that keep (True) or remove whole rectangles, on a grid whose offset is random in each pair.

    With `removed` = .5 the second mask of a pair is the complement of the first (antithetic), so that
    every cell is removed exactly once a pair; else it is another draw.

    Args:
        shape: rows and columns of the map; block: those of a rectangle, cut at the edges.
        removed: probability of a rectangle to be removed.
    """
    cells = []
    for size, side in zip(shape, block, strict=True):
        offset = torch.randint(side, (2 * pairs, 1), generator=generator)
        offset = offset[::2].repeat_interleave(2, 0)
        cells.append((torch.arange(size) + offset) // side)
    rows, columns = cells
    size = int(rows.max()) + 1, int(columns.max()) + 1
    draws = torch.rand(2 * pairs, *size, generator=generator)
    if removed == 0.5:
        draws[1::2] = 1 - draws[::2]
    kept = draws >= removed
    each = torch.arange(2 * pairs)[:, None, None]
    return kept[each, rows[:, :, None], columns[:, None, :]]


def divergence(
    reference: Float[Tensor, "tokens words"], perturbed: Float[Tensor, "batch tokens words"]
) -> Float[Tensor, "batch tokens"]:
    """KL(P || P^m) of each step over the whole vocabulary, from log-probabilities, in nats."""
    return (reference.exp() * (reference - perturbed)).sum(-1)


@torch.no_grad()
def input_scores(
    model: WhisperForConditionalGeneration,
    speech: Speech,
    masks: Bool[Tensor, "masks frames rows"],
    fill: float | Float[Tensor, " rows"],
    batch: int = 8,
) -> Float[Tensor, "masks tokens"]:
    """Change of each step's distribution when cells of the spectrogram are replaced by `fill`.

    `masks` cover the frames that hold speech and the first `rows` mel bins.
    """
    frames, rows = masks.shape[1:]
    reference = _reference(model, speech)
    scores = []
    for part in masks.split(batch):
        features = speech.features.expand(len(part), -1, -1).clone()
        region = features[:, :rows, :frames]
        filled = torch.as_tensor(fill, dtype=region.dtype, device=region.device).view(-1, 1)
        features[:, :rows, :frames] = torch.where(part.to(region.device).mT, region, filled)
        perturbed = forced_log_probabilities(
            model, encode(model, features), speech.prompt, speech.tokens
        )
        scores.append(divergence(reference, perturbed))
    return torch.cat(scores)


@torch.no_grad()
def output_scores(
    model: WhisperForConditionalGeneration,
    speech: Speech,
    masks: Bool[Tensor, "masks positions"],
    fill: float | Float[Tensor, " width"] = 0.0,
    batch: int = 32,
) -> Float[Tensor, "masks tokens"]:
    """The same when frames of the encoder's output are replaced by `fill`: only the decoder runs."""
    encoded = encode(model, speech.features[None])
    reference = forced_log_probabilities(model, encoded, speech.prompt, speech.tokens)[0]
    filled = torch.as_tensor(fill, dtype=encoded.dtype, device=encoded.device)
    scores = []
    for part in masks.split(batch):
        states = encoded.expand(len(part), -1, -1).clone()
        region = states[:, : part.shape[1]]
        states[:, : part.shape[1]] = torch.where(part.to(region.device)[..., None], region, filled)
        perturbed = forced_log_probabilities(model, states, speech.prompt, speech.tokens)
        scores.append(divergence(reference, perturbed))
    return torch.cat(scores)


def _reference(
    model: WhisperForConditionalGeneration, speech: Speech
) -> Float[Tensor, "tokens words"]:
    encoded = encode(model, speech.features[None])
    return forced_log_probabilities(model, encoded, speech.prompt, speech.tokens)[0]


def removal_relevance(
    masks: Bool[Tensor, "masks ..."], scores: Float[Tensor, "masks tokens"]
) -> Float[Tensor, "tokens ..."]:
    """R = sum (1 - m) score / sum (1 - m): mean score of the masks that removed a cell; 0 if none did."""
    removed = (~masks).to(scores).flatten(1)
    times = removed.sum(0)
    sums = scores.T @ removed
    return torch.where(times > 0, sums / times.clamp(min=1), 0).unflatten(1, masks.shape[1:])


# Cross-attention ------------------------------------------------------------------------------------


@torch.no_grad()
def cross_attention(
    model: WhisperForConditionalGeneration, speech: Speech
) -> Float[Tensor, "layers heads tokens window"]:
    """Attention of the step that predicts each token over all positions of the window.

    Only transformers' "eager" attention gives weights; the model is set to it for this call.
    """
    encoded = encode(model, speech.features[None])
    read = torch.cat([speech.prompt, speech.tokens[:-1]])[None]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found = model.get_decoder()(read, encoder_hidden_states=encoded, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return torch.cat(found.cross_attentions)[:, :, len(speech.prompt) - 1 :]


def cut_to_speech(
    attention: Float[Tensor, "*maps tokens window"], positions: int
) -> tuple[Float[Tensor, "*maps tokens positions"], Float[Tensor, "*maps tokens"]]:
    """Rows over the positions that hold speech, summing to 1 again, and the mass that was cut off."""
    kept = attention[..., :positions]
    mass = kept.sum(-1)
    return kept / mass[..., None], 1 - mass


@torch.no_grad()
def value_norms(
    model: WhisperForConditionalGeneration, encoded: Float[Tensor, "positions width"]
) -> Float[Tensor, "layers heads positions"]:
    """||v_t W_o|| of each head: what a unit of attention on a position adds to the decoder's state."""
    norms = []
    for layer in model.get_decoder().layers:
        block = layer.encoder_attn
        values = block.v_proj(encoded).unflatten(-1, (block.num_heads, block.head_dim))
        outputs = block.out_proj.weight.unflatten(1, (block.num_heads, block.head_dim))
        norms.append(torch.einsum("thd,whd->htw", values, outputs).norm(dim=-1))
    return torch.stack(norms)


def gradient_times_input(
    model: WhisperForConditionalGeneration, speech: Speech, fill: float = 0.0
) -> Float[Tensor, "tokens frames bins"]:
    """|(x - fill) d log P(token) / dx| of the cells that hold speech."""
    count = len(speech.tokens)
    with torch.enable_grad():
        features = speech.features.expand(count, -1, -1).clone().requires_grad_()
        logs = forced_log_probabilities(
            model, encode(model, features), speech.prompt, speech.tokens
        )
        each = torch.arange(count, device=logs.device)
        (gradient,) = torch.autograd.grad(logs[each, each, speech.tokens].sum(), features)
    return ((speech.features - fill) * gradient).abs()[:, :, : speech.frames].mT


# Comparison -----------------------------------------------------------------------------------------


def pool(
    relevance: Float[Tensor, "tokens frames bins"], how: str = "max"
) -> Float[Tensor, "tokens positions"]:
    """Relevance of cells brought to the encoder's positions: 2D pooling over `STRIDE` frames x all bins.

    Raises:
        ValueError: `how` is neither "max" nor "mean".
    """
    reduce: dict[str, Callable] = {"max": torch.amax, "mean": torch.mean}
    if how not in reduce:
        raise ValueError(f"pooling must be one of {', '.join(reduce)}, got '{how}'")
    return reduce[how](relevance.unflatten(1, (-1, STRIDE)), dim=(2, 3))


def standardise(relevance: Float[Tensor, "tokens ..."]) -> Float[Tensor, "tokens ..."]:
    """Every token's map with mean 0 and sample variance 1 over its cells; a constant map becomes 0."""
    flat = relevance.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    scale = flat.std(1, keepdim=True)
    return torch.where(scale > 0, centred / scale, 0).view_as(relevance)


def row_correlation(
    first: Float[Tensor, "*#maps tokens positions"],
    second: Float[Tensor, "*#maps tokens positions"],
) -> Float[Tensor, "..."]:
    """Mean over tokens of Pearson's correlation over positions; 0 for a constant row.

    The same as one correlation over all cells after `standardise`: differences between tokens in their
    total relevance do not count.
    """
    first, second = (m - m.mean(-1, keepdim=True) for m in (first, second))
    scale = first.norm(dim=-1) * second.norm(dim=-1)
    return torch.where(scale > 0, (first * second).sum(-1) / scale.clamp(min=1e-30), 0).mean(-1)


def flat_correlation(
    first: Float[Tensor, "*#maps tokens positions"],
    second: Float[Tensor, "*#maps tokens positions"],
) -> Float[Tensor, "..."]:
    """Pearson's correlation over all cells of the maps as they are."""
    return row_correlation(first.flatten(-2)[..., None, :], second.flatten(-2)[..., None, :])


def reliability(
    masks: Bool[Tensor, "masks ..."],
    scores: Float[Tensor, "masks tokens"],
    comparable: Callable[[Tensor], Float[Tensor, "tokens positions"]] = lambda relevance: relevance,
) -> float:
    """Correlation that the map of all masks would have with another of as many masks.

    Halves of the masks, split by pairs, give two maps; Spearman-Brown's 2 r / (1 + r) brings their
    correlation r to the whole number. `comparable` brings relevance to the form that is correlated.

    Raises:
        ValueError: fewer than four masks.
    """
    if len(masks) < 4:
        raise ValueError(f"two halves of pairs need at least 4 masks, got {len(masks)}")
    second = torch.arange(len(masks)) // 2 % 2 == 1
    halves = [
        comparable(removal_relevance(masks[half], scores[half])) for half in (~second, second)
    ]
    r = row_correlation(*halves).item()
    return 2 * r / (1 + r)


# Words in time --------------------------------------------------------------------------------------


def token_starts(relevance: Float[Tensor, "tokens positions"]) -> list[int]:
    """Where each token begins when the speech is cut into one piece a token, in order.

    Starts 0 = s_0 < s_1 < ... maximise the sum over tokens k and positions s_k <= t < s_(k+1) of Z[k, t],
    relevance standardised over the tokens at each position as Whisper's own time stamps have it: dynamic
    time warping in which every position belongs to one token, and every token has one at least.

    Raises:
        ValueError: more tokens than positions.
    """
    tokens, positions = relevance.shape
    if tokens > positions:
        raise ValueError(f"{tokens} tokens do not fit {positions} positions")
    even = standardise(relevance.double().mT).mT
    # best[k, t]: with position t in token k, from the same token or the one before at t - 1.
    best = torch.full((tokens, positions), -torch.inf, dtype=torch.float64)
    entered = torch.zeros(tokens, positions, dtype=torch.bool)
    best[0, 0] = even[0, 0]
    for time in range(1, positions):
        stay, enter = best[:, time - 1], best[:, time - 1].roll(1)
        enter[0] = -torch.inf
        entered[:, time] = enter > stay
        best[:, time] = torch.maximum(stay, enter) + even[:, time]
    starts, token = [], tokens - 1
    for time in range(positions - 1, 0, -1):
        if entered[token, time]:
            starts.append(time)
            token -= 1
    return [0, *starts[::-1]]


def token_middles(relevance: Float[Tensor, "tokens positions"]) -> list[int]:
    """Where each token begins if it peaks where its row does: halfway between neighbouring peaks."""
    peaks = relevance.argmax(1).tolist()
    return [0, *[round((a + b) / 2) for a, b in pairwise(peaks)]]


# Deletion -------------------------------------------------------------------------------------------


def spread(relevance: Float[Tensor, "tokens positions"], bins: int) -> Float[Tensor, "tokens f b"]:
    """A map over positions given to all frames and bins that they cover."""
    return relevance.repeat_interleave(STRIDE, 1)[..., None].expand(-1, -1, bins)


def sentence_map(relevance: Float[Tensor, "tokens frames bins"]) -> Float[Tensor, "frames bins"]:
    """One map of the utterance: standardised per token, brought to [0, 1] over all, mean over tokens."""
    even = standardise(relevance)
    low, high = even.min(), even.max()
    return ((even - low) / (high - low).clamp(min=1e-30)).mean(0)


def deleted(
    features: Float[Tensor, "bins window"],
    importance: Float[Tensor, "frames rows"],
    shares: Sequence[float],
    fill: float,
    generator: torch.Generator,
) -> Float[Tensor, "shares bins window"]:
    """The spectrogram without its most important cells, for each share of them; ties at random."""
    order = torch.randperm(importance.numel(), generator=generator)
    order = order[importance.flatten()[order].argsort(descending=True, stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    place = place.view_as(importance).mT
    rows, frames = place.shape
    copies = features.expand(len(shares), -1, -1).clone()
    limits = torch.tensor([round(share * place.numel()) for share in shares])
    region = copies[:, :rows, :frames]
    gone = place < limits[:, None, None]
    copies[:, :rows, :frames] = region.masked_fill(gone.to(region.device), fill)
    return copies


def word_errors(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """Least substitutions, insertions and deletions that make the reference out of the hypothesis."""
    row = list(range(len(reference) + 1))
    for i, said in enumerate(hypothesis, 1):
        previous, row = row, [i]
        for j, meant in enumerate(reference, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (said != meant)))
    return row[-1]


def area(shares: Sequence[float], rates: Sequence[float]) -> float:
    """Area under a curve of error rates (per cent) by the share deleted (0 .. 1), by trapezoids: 0 .. 100."""
    x, y = torch.tensor(shares, dtype=torch.float64), torch.tensor(rates, dtype=torch.float64)
    return torch.trapezoid(y, x).item()
