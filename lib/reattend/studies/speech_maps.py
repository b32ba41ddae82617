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

from reattend.backbones.pretrained.whisper import END, PROMPT, RATE, frames_of, load, log_mel
from reattend.backbones.pretrained.whisper_base import END as BASE_END
from reattend.backbones.pretrained.whisper_base import PROMPT as BASE_PROMPT
from reattend.data.spoken_prompts import Prompt, spoken_prompts
from reattend.metrics import pseudo_values
from reattend.speech import s2t_cross_attention as method
from reattend.speech.s2t_cross_attention import Speech

LONGEST = 24  # tokens of a transcript: the prompts have at most ten words

PILOT = ("conf-unmuted", "dir-pls-enter", "vm-from-phonenumber", "vm-num-i-have")
"""Prompts on which the settings of the experiment were chosen; it leaves them out."""

SIZES = {
    "tiny.en": ("whisper", PROMPT, END),
    "base": ("whisper_base", BASE_PROMPT, BASE_END),
}
"""Backbone, what the decoder is given first, and the end of the text, by the size of Whisper."""

POSITION = 20  # milliseconds of a position

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
    """Whisper that reads a part of its window (see `reattend.backbones.pretrained.whisper.cut`)."""

    tokenizer: PreTrainedTokenizerFast
    model: WhisperForConditionalGeneration
    first: tuple[int, ...]
    end: int

    @classmethod
    def of(
        cls, size: str, head: float, tail: float, every: int | None, device: torch.device
    ) -> Recogniser:
        """The recogniser of this size (of `SIZES`) with these positions of its window."""
        name, first, end = SIZES[size]
        tokenizer, model = load(head, tail, every, name)
        return cls(tokenizer, model.to(device), first, end)

    @property
    def prompt(self) -> Tensor:
        """What the decoder is always given first."""
        return torch.tensor(self.first, device=self.model.device)

    def features(self, prompt: Prompt) -> Float[Tensor, "bins window"]:
        """Spectrogram of a prompt, padded with silence to the window."""
        window = self.model.config.max_source_positions * POSITION / 1000
        return log_mel(prompt.samples, window).to(self.model.device)

    def texts(self, features: Float[Tensor, "batch bins window"]) -> list[str]:
        """Greedy transcripts."""
        found = method.transcribe(self.model, features, self.prompt, self.end, LONGEST)
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
        [found] = method.transcribe(self.model, features[None], self.prompt, self.end, LONGEST)
        tokens = torch.cat([found, torch.tensor([self.end], device=found.device)])
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
        precision: "float32" or "bfloat16" of the products in these passes.
    """

    input_masks: int
    output_masks: int
    blocks: Sequence[tuple[int, int]]
    run: int
    bins: int
    fill: str = "mean"
    batch: int = 8
    precision: str = "float32"

    def filling(self, speech: Speech) -> float:
        """The value that replaces a removed cell of the spectrogram."""
        cells = speech.features[: self.bins, : speech.frames]
        return {"mean": cells.mean, "floor": cells.min}[self.fill]().item()

    def products(self, device: torch.device) -> torch.autocast:
        """The precision of matrix products within; sums and softmax stay in float32."""
        half = self.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=half)

    def draw_input(self, speech: Speech, generator: torch.Generator) -> Tensor:
        """Masks of the spectrogram, an equal number on every grid."""
        fours = self.input_masks // (4 * len(self.blocks))
        shape = speech.frames, self.bins
        grids = [method.rectangle_masks(2 * fours, shape, b, generator) for b in self.blocks]
        # Two pairs of each grid in turn: halves by every other pair then hold as many of each grid.
        return torch.stack([masks.unflatten(0, (fours, 4)) for masks in grids], 1).flatten(0, 2)

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
    h_masks = removal.draw_output(speech, generator)
    with removal.products(model.device):
        x_scores = method.input_scores(model, speech, x_masks, fill, removal.batch).cpu()
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
    bands = [diagonals(*target.shape) for target in targets]
    rho = [method.row_correlation(b, t).numpy() for b, t in zip(bands, targets, strict=True)]
    best = best_of_others(np.array(rho))
    return [band[number] for band, number in zip(bands, best, strict=True)]


def diagonals(tokens: int, positions: int) -> Float[Tensor, "grid tokens positions"]:
    """Bands of every start, slope and width of the grid."""
    grid = product(STARTS, SLOPES, WIDTHS)
    return torch.stack([diagonal(tokens, positions, *point) for point in grid])


def best_of_others(scores: Float[np.ndarray, "items settings"]) -> list[int]:
    """For each item the setting whose mean score over all *other* items is highest (cross-fitting)."""
    return (scores.sum(0) - scores).argmax(1).tolist()


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


def smoothed(
    maps: Float[Tensor, "*maps positions"], width: float
) -> Float[Tensor, "*maps positions"]:
    """Averaged over time with normal weights of standard deviation `width` positions; 0 changes nothing.

    At the edges the weights that fall inside count as all.
    """
    if width == 0:
        return maps
    time = torch.arange(maps.shape[-1], dtype=maps.dtype)
    weights = torch.exp(-(((time[:, None] - time) / width) ** 2) / 2)
    return maps @ (weights / weights.sum(0))


def at_best_grain(
    maps: Sequence[Float[Tensor, "... _ _"]],
    targets: Sequence[Map],
    widths: Sequence[float],
) -> tuple[Float[np.ndarray, " prompts"], list[float]]:
    """Correlation of smoothed maps with their targets, mean over maps, and each prompt's width.

    Removal has a coarser grain than attention. Each prompt's width of `smoothed` is the one that suits
    the *other* prompts best, so that no map is fitted to what it is held against.
    """
    scores = np.array(
        [
            [method.row_correlation(smoothed(m, w), t.expand_as(m)).mean().item() for w in widths]
            for m, t in zip(maps, targets, strict=True)
        ]
    )
    best = best_of_others(scores)
    return scores[range(len(best)), best], [widths[number] for number in best]


# Word boundaries ------------------------------------------------------------------------------------------

DAYS = [f"digits/day-{number}" for number in range(7)]
MONTHS = [f"digits/mon-{number}" for number in range(12)]
CALLS = [f"phonetic/{letter}_p" for letter in "abcdefhijlmopqrstuvwyz"]
"""Recordings of one word each. Of the spelling alphabet's calls November is a month, x-ray two words, and
golf and kilo were taken for other words in the pilot."""

SHIFTS = range(-5, 16)  # positions


@dataclass(frozen=True)
class Joined:
    """Recordings of single words, cut free of silence, with silence of random length between them.

    Args:
        prompt: what is heard, with the words as its text.
        gaps: end of a word and start of the next, seconds, known because the recordings were joined there.
    """

    prompt: Prompt
    gaps: list[tuple[float, float]]


def trimmed(samples: Float[np.ndarray, " samples"], below: float = 0.02) -> np.ndarray:
    """Without silence at both ends: pieces of 10 ms of which no sample reaches this share of the peak."""
    window = RATE // 100
    pieces = np.abs(samples[: len(samples) // window * window]).reshape(-1, window).max(1)
    loud = np.flatnonzero(pieces >= below * pieces.max())
    return samples[loud[0] * window : (loud[-1] + 1) * window]


def joined_words(
    count: int, words_each: int, silence: float, longest: float, seed: int
) -> list[Joined]:
    """Sequences of different words, drawn at random, of at most `longest` seconds.

    Args:
        silence: most seconds of silence between two words; drawn evenly from 0 on.
    """
    rng, known = np.random.default_rng(seed), {p.name: p for p in spoken_prompts()}
    every = {n: (known[n].text, trimmed(known[n].samples)) for n in [*DAYS, *MONTHS, *CALLS]}
    found: list[Joined] = []
    while len(found) < count:
        names = rng.choice(list(every), words_each, replace=False)
        texts, sounds = zip(*(every[name] for name in names), strict=True)
        silences = (rng.uniform(0, silence, words_each - 1) * RATE).astype(int)
        parts, gaps = [sounds[0]], []
        for quiet, sound in zip(silences, sounds[1:], strict=True):
            end = sum(map(len, parts))
            gaps.append((end / RATE, (end + quiet) / RATE))
            parts += [np.zeros(quiet, np.float32), sound]
        samples = np.concatenate(parts)
        if len(samples) <= longest * RATE:
            found.append(Joined(Prompt("+".join(names), ", ".join(texts), samples), gaps))
    return found


@dataclass(frozen=True)
class Heard:
    """Attention over joined words whose transcript is right, on the CPU.

    Args:
        first: the first token of each word but the first.
    """

    joined: Joined
    pieces: list[str]
    heads: Float[Tensor, "layers heads tokens positions"]
    first: list[int]


def hear_joined(recogniser: Recogniser, joined: Joined) -> tuple[float, Heard | None]:
    """Error rate of the transcript, per cent, and attention where all words are right."""
    speech = recogniser.hear(joined.prompt)
    pieces = recogniser.pieces(speech)
    begins = [n for n, piece in enumerate(pieces) if n == 0 or piece.startswith(" ")]
    wrong = error_rate("".join(pieces), joined.prompt)
    if wrong or len(begins) != len(words(joined.prompt.text)):
        return wrong, None
    attention = method.cross_attention(recogniser.model, speech)
    heads, _ = method.cut_to_speech(attention, speech.positions)
    return wrong, Heard(joined, pieces, heads[:, :, :-1].cpu(), begins[1:])


def boundary_error(starts: Sequence[int], heard: Heard, shift: int = 0) -> float:
    """Mean distance, in milliseconds, of words' starts from the silence before the word; 0 inside of it.

    Args:
        starts: first position of each token; shift: positions that are added.
    """
    off = []
    for token, (end, start) in zip(heard.first, heard.joined.gaps, strict=True):
        found = (starts[token] + shift) * POSITION / 1000
        off.append(max(end - found, found - start, 0.0))
    return 1000 * float(np.mean(off))


def boundary_errors(
    starts: Sequence[Sequence[Sequence[int]]], heard: Sequence[Heard]
) -> Float[np.ndarray, " sequences"]:
    """`boundary_error` of each sequence, of those starts and that shift that err least on the *other* ones.

    Args:
        starts: of each sequence those among which is chosen, the same number for all.
    """
    grid = np.array(
        [
            [boundary_error(found, one, shift) for found in own for shift in SHIFTS]
            for own, one in zip(starts, heard, strict=True)
        ]
    )
    return grid[range(len(grid)), best_of_others(-grid)]


def even_starts(tokens: int, positions: int) -> list[list[int]]:
    """Starts of tokens that are evenly long, for every start and slope of the diagonals."""
    return [
        [round(positions * (start + slope * token / tokens)) for token in range(tokens)]
        for start, slope in product(STARTS, SLOPES)
    ]


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
