"""Maps of a speech recogniser over short prompts: which are drawn, how they are compared, and placebos.

A map says for each token of a transcript how much each position of the speech (an encoder frame of 20 ms)
matters: [tokens, positions]. All are of the text alone; the step that predicts the end of the text is kept
apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, WhisperForConditionalGeneration

from reattend.backbones.pretrained.whisper import END, PROMPT, frames_of, load, log_mel
from reattend.data.spoken_prompts import Prompt, spoken_prompts
from reattend.metrics import pseudo_values
from reattend.speech import s2t_cross_attention as method
from reattend.speech.s2t_cross_attention import Speech

LONGEST = 18  # tokens of a transcript: the prompts have at most eight words

PILOT = ("conf-unmuted", "dir-pls-enter", "vm-from-phonenumber", "vm-num-i-have")
"""Prompts on which the settings of the experiment were chosen; it leaves them out."""

Map = Float[Tensor, "_ _"]
"""[tokens, positions], which differ from prompt to prompt."""


def words(text: str) -> list[str]:
    """Words as they are counted in errors: lower case, hyphens split, no punctuation, digits spelt."""
    for digit, name in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    ):
        text = re.sub(rf"\b{digit}\b", name, text)
    return re.sub(r"[^a-z' ]", "", text.lower().replace("-", " ")).split()


def short_prompts(seconds: tuple[float, float], said: tuple[int, int]) -> list[Prompt]:
    """Spoken prompts of so many seconds and words, in an order that is shuffled once and for all."""
    least, most = said
    chosen = [
        prompt
        for prompt in spoken_prompts()
        if seconds[0] <= prompt.seconds <= seconds[1]
        and least <= len(words(prompt.text)) <= most
        and prompt.name not in PILOT
        and "silence" not in prompt.name
    ]
    return [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]


def error_rate(text: str, prompt: Prompt) -> float:
    """Word errors in per cent of the prompt's words, at most 100."""
    meant = words(prompt.text)
    return min(100.0, 100 * method.word_errors(words(text), meant) / len(meant))


# Recognising ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recogniser:
    """Whisper with a window of `head` + `tail` seconds (see `reattend.backbones.pretrained.whisper`)."""

    tokenizer: PreTrainedTokenizerFast
    model: WhisperForConditionalGeneration
    head: float
    tail: float

    @classmethod
    def of(cls, head: float, tail: float, device: torch.device) -> Recogniser:
        """The recogniser with this window."""
        tokenizer, model = load(head, tail)
        return cls(tokenizer, model.to(device), head, tail)

    @property
    def prompt(self) -> Tensor:
        """What the decoder is always given first."""
        return torch.tensor(PROMPT, device=self.model.device)

    def features(self, prompt: Prompt) -> Float[Tensor, "bins window"]:
        """Spectrogram of a prompt, padded with silence to the window."""
        return log_mel(prompt.samples, self.head + self.tail).to(self.model.device)

    def texts(self, features: Float[Tensor, "batch bins window"]) -> list[str]:
        """Greedy transcripts."""
        found = method.transcribe(self.model, features, self.prompt, END, LONGEST)
        return [self.tokenizer.decode(tokens) for tokens in found]

    def error_rates(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Word error rate of each prompt, per cent."""
        rates = []
        for start in range(0, len(prompts), 8):
            part = prompts[start : start + 8]
            texts = self.texts(torch.stack([self.features(prompt) for prompt in part]))
            rates += [error_rate(*pair) for pair in zip(texts, part, strict=True)]
        return np.array(rates)

    def hear(self, prompt: Prompt) -> Speech:
        """A prompt with its greedy transcript."""
        features = self.features(prompt)
        [found] = method.transcribe(self.model, features[None], self.prompt, END, LONGEST)
        tokens = torch.cat([found, torch.tensor([END], device=found.device)])
        return Speech(features, frames_of(prompt.samples), self.prompt, tokens)

    def pieces(self, speech: Speech) -> list[str]:
        """The transcript's tokens as text, without the end."""
        return [self.tokenizer.decode(token) for token in speech.tokens[:-1]]


# Maps of one prompt -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """How parts of the speech are removed.

    Args:
        input_masks, output_masks: how many for the spectrogram and for the encoder's output.
        blocks: sides of the rectangles in frames and bins; the masks are shared among them.
        run: positions of the encoder's output that are kept or removed together.
        bins: the first so many mel bins are removed; the recordings have nothing above.
        fill: what replaces a cell of the spectrogram: "mean" of the utterance, or its "floor".
        batch: masks in one forward pass.
    """

    input_masks: int
    output_masks: int
    blocks: Sequence[tuple[int, int]]
    run: int
    bins: int
    fill: str = "mean"
    batch: int = 8

    def filling(self, speech: Speech) -> float:
        """The value that replaces a removed cell of the spectrogram."""
        cells = speech.features[: self.bins, : speech.frames]
        return {"mean": cells.mean, "floor": cells.min}[self.fill]().item()

    def draw_input(self, speech: Speech, generator: torch.Generator) -> Tensor:
        """Masks of the spectrogram, an equal number on every grid."""
        pairs = self.input_masks // (2 * len(self.blocks))
        shape = speech.frames, self.bins
        grids = [method.rectangle_masks(pairs, shape, b, generator) for b in self.blocks]
        # Pairs of all grids in turn: the two halves of a split then hold as many of each.
        paired = torch.stack([masks.unflatten(0, (pairs, 2)) for masks in grids], 1)
        return paired.flatten(0, 2)

    def draw_output(self, speech: Speech, generator: torch.Generator) -> Tensor:
        """Masks of the encoder's output, of all its values at a position."""
        shape, block = (speech.positions, 1), (self.run, 1)
        return method.rectangle_masks(self.output_masks // 2, shape, block, generator)[:, :, 0]


def text_rows(relevance: Float[Tensor, "tokens ..."]) -> Float[Tensor, "text ..."]:
    """The rows of the text: all but the last, which predicts the end."""
    return relevance[:-1]


@dataclass(frozen=True)
class Explained:
    """One prompt with its maps, on the CPU; `heads` and `norm_heads` are per layer and head.

    Args:
        maps: name -> map of the text's tokens.
        end: name -> the row of the step that predicts the end of the text.
        reliability: name of a saliency map -> its split-half reliability.
        padding: share of each head's attention that lay on positions without speech.
        cells: relevance of each cell of the spectrogram, of the text's tokens.
        growth: saliency -> (number of masks, reliability, correlation with cross-attention).
    """

    prompt: Prompt
    speech: Speech
    pieces: list[str]
    heads: Float[Tensor, "layers heads tokens positions"]
    norm_heads: Float[Tensor, "layers heads tokens positions"]
    padding: Float[Tensor, "layers heads"]
    maps: dict[str, Map]
    end: dict[str, Tensor]
    reliability: dict[str, float]
    cells: Float[Tensor, "tokens frames bins"]
    growth: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)


def explain(
    recogniser: Recogniser,
    prompt: Prompt,
    removal: Removal,
    seed: int,
    counts: Sequence[int] = (),
) -> Explained:
    """All maps of a prompt.

    Args:
        counts: numbers of masks at which reliability and correlation are noted as well.
    """
    model, speech = recogniser.model, recogniser.hear(prompt)
    generator = torch.Generator().manual_seed(seed)
    fill = removal.filling(speech)
    attention = method.cross_attention(model, speech)
    heads, padding = method.cut_to_speech(attention, speech.positions)
    encoded = method.encode(model, speech.features[None])[0, : speech.positions]
    weighted = heads * method.value_norms(model, encoded)[:, :, None]
    gradient = method.gradient_times_input(model, speech, fill)[..., : removal.bins]

    x_masks = removal.draw_input(speech, generator)
    x_scores = method.input_scores(model, speech, x_masks, fill, removal.batch).cpu()
    h_masks = removal.draw_output(speech, generator)
    h_scores = method.output_scores(model, speech, h_masks, batch=removal.batch).cpu()
    cells = method.removal_relevance(x_masks, x_scores)
    every = {
        "CA": heads.mean((0, 1)).cpu(),
        "CA x value norms": weighted.mean((0, 1)).cpu(),
        "gradient x input": method.pool(gradient).cpu(),
        "SM^X": method.pool(cells),
        "SM^X, mean": method.pool(cells, "mean"),
        "SM^H": method.removal_relevance(h_masks, h_scores),
    }
    sources = {
        "SM^X": (x_masks, x_scores, method.pool),
        "SM^X, mean": (x_masks, x_scores, lambda cells: method.pool(cells, "mean")),
        "SM^H": (h_masks, h_scores, lambda relevance: relevance),
    }
    maps = {name: text_rows(m) for name, m in every.items()}
    return Explained(
        prompt,
        Speech(speech.features.cpu(), speech.frames, speech.prompt.cpu(), speech.tokens.cpu()),
        recogniser.pieces(speech),
        heads[:, :, :-1].cpu(),
        weighted[:, :, :-1].cpu(),
        padding[:, :, :-1].mean(-1).cpu(),
        maps,
        {name: m[-1] for name, m in every.items()},
        {
            name: method.reliability(masks, scores, lambda r, f=form: text_rows(f(r)))
            for name, (masks, scores, form) in sources.items()
        },
        text_rows(cells),
        {
            name: [_at_count(*sources[name], maps["CA"], count) for count in counts]
            for name in ("SM^X", "SM^H")
        },
    )


def _at_count(
    masks: Tensor, scores: Tensor, form: Callable, attention: Map, count: int
) -> tuple[int, float, float]:
    """Reliability, and correlation with attention, of the first `count` masks."""
    masks, scores = masks[:count], scores[:count]
    reliable = method.reliability(masks, scores, lambda r: text_rows(form(r)))
    found = text_rows(form(method.removal_relevance(masks, scores)))
    return len(masks), reliable, method.row_correlation(attention, found).item()


def corrected(
    rho: Float[np.ndarray, " prompts"], reliability: Float[np.ndarray, " prompts"]
) -> Float[np.ndarray, " prompts"]:
    """Correlation with a noisy map as it would be without the noise, as one value a prompt.

    Mean correlation over the root of the mean reliability (Spearman's correction for attenuation, the
    other map being free of noise); the values are the jackknife's, so that their spread holds that of the
    reliability as well.

    Raises:
        ValueError: the mean reliability is not positive: the maps hold nothing but noise.
    """
    if reliability.mean() <= 0:
        raise ValueError("the maps have no reliability: use more masks")
    arrays = {"rho": rho, "reliability": reliability}
    return pseudo_values(arrays, lambda a: a["rho"].mean() / a["reliability"].mean() ** 0.5)


def correlations(explained: Sequence[Explained], name: str, target: str) -> np.ndarray:
    """Row-wise correlation of a map with a target, each prompt."""
    return np.array(
        [method.row_correlation(e.maps[name], e.maps[target]).item() for e in explained]
    )


# Placebos -----------------------------------------------------------------------------------------------


def diagonal(tokens: int, positions: int, start: float, slope: float, width: float) -> Map:
    """A band along the diagonal: token k looks at start + slope (k + 1/2) / tokens of the speech.

    Args:
        width: standard deviation of the band, share of the speech.
    """
    centre = start + slope * (torch.arange(tokens) + 0.5) / tokens
    time = (torch.arange(positions) + 0.5) / positions
    return torch.exp(-(((time - centre[:, None]) / width) ** 2) / 2)


STARTS = (-0.2, -0.1, 0.0, 0.1, 0.2)
SLOPES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
WIDTHS = (0.04, 0.07, 0.1, 0.15, 0.2, 0.3)


def fitted_diagonals(targets: Sequence[Map]) -> list[Map]:
    """For each target the diagonal that correlates best, on average, with all the *other* targets."""
    grid = list(product(STARTS, SLOPES, WIDTHS))
    bands = [torch.stack([diagonal(*target.shape, *point) for point in grid]) for target in targets]
    rho = torch.stack([method.row_correlation(b, t) for b, t in zip(bands, targets, strict=True)])
    best = (rho.sum(0) - rho).argmax(1)
    return [band[number] for band, number in zip(bands, best, strict=True)]


def rescaled(relevance: Map, tokens: int, positions: int) -> Map:
    """A map stretched to another number of tokens and positions, linearly between cells."""
    size = tokens, positions
    return functional.interpolate(relevance[None, None], size, mode="bilinear")[0, 0]


def borrowed(maps: Sequence[Map], lenders: int = 4) -> list[Float[Tensor, "lenders _ _"]]:
    """For each prompt the maps of others of like length, stretched to its own size.

    Those nearest in the number of tokens come first, then those nearest in duration.
    """
    found = []
    for number, own in enumerate(maps):
        tokens, positions = own.shape

        def distance(other: int, tokens=tokens, positions=positions) -> tuple[int, int]:
            theirs = maps[other].shape
            return abs(theirs[0] - tokens), abs(theirs[1] - positions)

        others = sorted((i for i in range(len(maps)) if i != number), key=distance)[:lenders]
        found.append(torch.stack([rescaled(maps[i], tokens, positions) for i in others]))
    return found


def shifted_mean(
    heads: Float[Tensor, "layers heads tokens positions"],
    copies: int,
    width: float,
    generator: torch.Generator,
) -> Float[Tensor, "layers heads tokens positions"]:
    """Each head averaged with copies of itself, shifted in time at random (normal, `width` positions).

    Averaging over heads also smooths; this smooths as much, and joins no other head.
    """
    shifts = (torch.randn(copies, generator=generator) * width).round().int().tolist()
    return torch.stack([shifted(heads, shift) for shift in shifts]).mean(0)


def shifted(maps: Float[Tensor, "*maps positions"], shift: int) -> Float[Tensor, "*maps positions"]:
    """Moved later by `shift` positions (earlier if negative); what comes in is zero."""
    positions = maps.shape[-1]
    moved = torch.zeros_like(maps)
    if abs(shift) < positions:
        moved[..., max(shift, 0) : positions + min(shift, 0)] = maps[
            ..., max(-shift, 0) : positions + min(-shift, 0)
        ]
    return moved


# Deletion -------------------------------------------------------------------------------------------------


def deletion_curves(
    recogniser: Recogniser,
    explained: Explained,
    maps: Mapping[str, Float[Tensor, "tokens frames bins"]],
    shares: Sequence[float],
    fill: float,
    seed: int,
) -> dict[str, list[float]]:
    """Word error rate, each map, when its most important cells are replaced by `fill`.

    At share 0 nothing is gone and at share 1 everything, so these are transcribed once for all maps.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = [share for share in shares if 0 < share < 1]
    features, device = explained.speech.features, recogniser.model.device
    any_map = method.sentence_map(next(iter(maps.values())))
    copies = [method.deleted(features, any_map, [0.0, 1.0], fill, generator)]
    for relevance in maps.values():
        importance = method.sentence_map(relevance)
        copies.append(method.deleted(features, importance, inner, fill, generator))
    texts = recogniser.texts(torch.cat(copies).to(device))
    rates = [error_rate(text, explained.prompt) for text in texts]
    ends = dict(zip((0.0, 1.0), rates[:2], strict=True))
    curves = {}
    for number, name in enumerate(maps):
        part = rates[2 + number * len(inner) : 2 + (number + 1) * len(inner)]
        known = ends | dict(zip(inner, part, strict=True))
        curves[name] = [known[share] for share in shares]
    return curves
