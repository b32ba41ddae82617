"""How well the small CLIP finds the caption of a picture and the picture of a caption, and where words point.

Asked are pictures whose captions were not seen in training, and drawings held out of emoji whose captions were.
Beside the model stand its placebo, chance, and two ways to guess captions from the same tokens without contrast.

Names of shapes: as in `trained/clip.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from reattend.backbones.pretrained.minilm import load as load_minilm
from reattend.backbones.reports.page import Page
from reattend.backbones.trained.clip import (
    ARMS,
    SETTINGS,
    CaptionedTokens,
    Heads,
    load,
    load_tokens,
    pooled,
)
from reattend.data.captioned_pictures import LITTLE, SOURCES, CaptionedPictures, captioned_pictures
from reattend.data.images import patch_coverage
from reattend.evidence.intervals import Estimate, resampled
from reattend.evidence.statistics import difference_of_ratios, ratio_of_sums
from reattend.metrics import ranks_of_first_right
from reattend.plots import COLOURS
from reattend.presentation import interval_text
from reattend.trunks.encoders import masked_mean

KS = (1, 5, 10)
WAYS = ("caption of a picture", "picture of a caption")
ASKED = {"test": "captions never seen", "vendor": "drawings held out"}
"""What the pictures of a side of the split ask."""


@dataclass(frozen=True)
class Gallery:
    """Pictures and captions that are sought among each other.

    Attributes:
        pictures, captions: their positions among all of them.
        right: which caption is whose; a caption without a picture is a candidate and is not asked for.
        concepts: of the pictures, and of the captions that are asked for.
    """

    pictures: Int[Tensor, " pictures"]
    captions: Int[Tensor, " captions"]
    right: Bool[Tensor, "pictures captions"]
    concepts: tuple[tuple[str, ...], tuple[str, ...]]

    def __str__(self) -> str:
        return f"{len(self.pictures):,} pictures, {len(self.captions):,} captions"


def gallery(kept: CaptionedTokens, split: str) -> Gallery:
    """All pictures of a split and their captions, each once; those of "vendor" among all captions of training."""
    pictures = kept.indices(split)
    known = kept.indices("train") if split == "vendor" else pictures
    captions = torch.cat([kept.caption_of[pictures], kept.caption_of[known]]).unique()
    right = kept.caption_of[pictures][:, None] == captions
    of_pictures = tuple(kept.concepts[i] for i in pictures)
    of_captions = tuple(of_pictures[i] for i in right[:, right.any(0)].int().argmax(0))
    return Gallery(pictures, captions, right, (of_pictures, of_captions))


def found_ranks(
    scores: Float[Tensor, "pictures captions"], asked: Gallery
) -> tuple[Int[Tensor, " pictures"], Int[Tensor, " wanted"]]:
    """Rank of each picture's caption, and of the best-placed picture of each caption that is asked for."""
    wanted = asked.right.any(0)
    return (
        ranks_of_first_right(scores, asked.right),
        ranks_of_first_right(scores[:, wanted].T, asked.right[:, wanted].T),
    )


def hits_by_concept(
    ranks: Int[Tensor, " queries"], concepts: Sequence[str], k: int
) -> dict[str, np.ndarray]:
    """Hundred times the hits among the first k ("a") and queries ("b") of each concept, in the alphabet's order.

    Concepts are the units of intervals: an emoji's two drawings are no two pieces of evidence.
    """
    names, unit = np.unique(np.array(concepts), return_inverse=True)
    hits = np.bincount(unit, weights=(ranks <= k).double().numpy(), minlength=len(names))
    return {"a": 100 * hits, "b": np.bincount(unit, minlength=len(names))}


@torch.no_grad()
def cosines(
    heads: Heads, kept: CaptionedTokens, asked: Gallery
) -> Float[Tensor, "pictures captions"]:
    """The model's scores."""
    words = kept.words[asked.captions]
    captions = heads.captions(masked_mean(words.states.float(), words.mask))
    return heads.pictures(pooled(kept.tokens[asked.pictures])) @ captions.T


class Guesses:
    """Captions guessed from the same tokens without contrast, in the space of MiniLM's own sentence vectors.

    By neighbours: the mean vector of training captions, weighted by the similarity of their pictures; by least
    squares: a ridge regression of caption vectors on [CLS] and the mean of the patches.
    """

    TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
    PENALTIES = (1e2, 1e3, 1e4, 1e5)

    def __init__(self, kept: CaptionedTokens) -> None:
        seen = pooled(kept.tokens).flatten(1)
        said = F.normalize(masked_mean(kept.words.states.float(), kept.words.mask), dim=-1)
        self._train = kept.indices("train")
        said = said - said[kept.caption_of[self._train]].mean(0)
        known = seen[self._train]
        self._seen = (seen - known.mean(0)) / (known.std(0) + 1e-6)
        self._said, self._answers = F.normalize(said, dim=-1), said[kept.caption_of[self._train]]

    def neighbours(self, asked: Gallery, temperature: float) -> Float[Tensor, "pictures captions"]:
        """Scores by the pictures that look alike."""
        seen = F.normalize(self._seen, dim=-1)
        weights = (seen[asked.pictures] @ seen[self._train].T / temperature).softmax(1)
        return self._scores(weights @ self._answers, asked)

    def least_squares(self, asked: Gallery, penalty: float) -> Float[Tensor, "pictures captions"]:
        """Scores by the regression."""
        known = self._seen[self._train]
        square = known.T @ known + penalty * torch.eye(known.shape[1])
        map_ = torch.linalg.solve(square, known.T @ self._answers)
        return self._scores(self._seen[asked.pictures] @ map_, asked)

    def _scores(self, guessed: Tensor, asked: Gallery) -> Tensor:
        return F.normalize(guessed, dim=-1) @ self._said[asked.captions].T


def _best(
    settings: Sequence[float], scored: Callable[[Gallery, float], Tensor], asked: Gallery
) -> float:
    """The setting with the highest mean reciprocal rank, both ways taken together."""

    def quality(setting: float) -> float:
        return sum(
            (1 / r.double()).mean().item() for r in found_ranks(scored(asked, setting), asked)
        )

    return max(settings, key=quality)


def all_scores(
    kept: CaptionedTokens, heads: Mapping[str, Heads], splits: Sequence[str]
) -> dict[str, dict[str, Float[Tensor, "pictures captions"]]]:
    """Split -> method -> scores; the settings of those that train nothing are chosen on the validation side."""
    guesses, tried = Guesses(kept), gallery(kept, "validation")
    temperature = _best(guesses.TEMPERATURES, guesses.neighbours, tried)
    penalty = _best(guesses.PENALTIES, guesses.least_squares, tried)
    found = {}
    for split in splits:
        asked = gallery(kept, split)
        found[split] = {
            "model": cosines(heads["paired"], kept, asked),
            "least squares": guesses.least_squares(asked, penalty),
            "neighbours": guesses.neighbours(asked, temperature),
            "model, shuffled captions": cosines(heads["shuffled"], kept, asked),
        }
    return found


def chance(asked: Gallery, k: int) -> tuple[float, float]:
    """Recall at k of a random order in per cent: of captions for a picture, of pictures for a caption."""
    pictures, captions = asked.right.shape
    drawn = min(k, pictures)
    missed = [math.comb(pictures - int(n), drawn) for n in asked.right.sum(0) if n]
    share_missed = np.mean([count / math.comb(pictures, drawn) for count in missed])
    return 100 * min(k, captions) / captions, 100 * (1 - float(share_missed))


def recall_table(
    kept: CaptionedTokens, scores: Mapping[str, Mapping[str, Tensor]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Recall in per cent with 95 % intervals over concepts; and the model's lead over each other method."""
    rows, leads = [], []
    for split, methods in scores.items():
        asked = gallery(kept, split)
        for way, name in enumerate(WAYS):
            head = {"asked": ASKED[split], "sought": name}
            counts = {
                method: [
                    hits_by_concept(found_ranks(values, asked)[way], asked.concepts[way], k)
                    for k in KS
                ]
                for method, values in methods.items()
            }
            for method, hits in counts.items():
                parts = [_text(resampled(part, ratio_of_sums)) for part in hits]
                rows.append(head | {"method": method} | _by_k(parts))
                pairs = zip(counts["model"], hits, strict=True)
                if method != "model":
                    parts = [_text(_lead(*pair)) for pair in pairs]
                    leads.append(head | {"model minus": method} | _by_k(parts))
            parts = [interval_text(chance(asked, k)[way]) for k in KS]
            rows.append(head | {"method": "chance"} | _by_k(parts))
    return pd.DataFrame(rows), pd.DataFrame(leads)


def _lead(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> Estimate:
    paired = {"a": ours["a"], "a_n": ours["b"], "b": theirs["a"], "b_n": theirs["b"]}
    return resampled(paired, difference_of_ratios)


def _text(found: Estimate) -> str:
    return interval_text(found.effect, found.low, found.high)


def _by_k(values: Sequence[str]) -> dict[str, str]:
    return {f"R@{k}": value for k, value in zip(KS, values, strict=True)}


def source_table(kept: CaptionedTokens, scores: Float[Tensor, "pictures captions"]) -> pd.DataFrame:
    """Recall of captions on the test side by where the pictures come from; all captions are candidates."""
    asked = gallery(kept, "test")
    ranks, rows = found_ranks(scores, asked)[0], []
    for source in SOURCES:
        chosen = [i for i, p in enumerate(asked.pictures.tolist()) if kept.sources[p] == source]
        if chosen:
            concepts = [asked.concepts[0][i] for i in chosen]
            parts = [
                resampled(hits_by_concept(ranks[chosen], concepts, k), ratio_of_sums) for k in KS
            ]
            rows.append(
                {"source": source, "pictures": len(chosen)} | _by_k(list(map(_text, parts)))
            )
    return pd.DataFrame(rows)


def telling_words(pieces: Sequence[str]) -> dict[str, list[int]]:
    """Position of the pieces of each word of a caption; little words and what is no word are left out."""
    places: list[tuple[str, list[int]]] = []
    for place, piece in enumerate(pieces):
        if piece.startswith("##"):
            word, where = places.pop()
            places.append((word + piece[2:], [*where, place]))
        else:
            places.append((piece, [place]))
    return {word: where for word, where in places if word.isalpha() and word not in LITTLE}


@torch.no_grad()
def word_cosines(
    heads: Heads, kept: CaptionedTokens, picture: int, words: dict[str, list[int]]
) -> Float[Tensor, "patches words"]:
    """Cosine of every patch of a picture with each of some words of its caption, each the mean of its pieces."""
    caption = kept.caption_of[picture]
    pieces = heads.word_tokens(kept.words.states[caption][None])[0]
    vectors = torch.stack([pieces[where].mean(0) for where in words.values()])
    return heads.picture_tokens(kept.tokens[picture][None])[0, 1:] @ F.normalize(vectors, dim=-1).T


def draw_patches(
    heads: Heads, kept: CaptionedTokens, shown: CaptionedPictures, columns: int = 6
) -> Figure:
    """Twelve stamps of the test side, drawn at random, with the word that each patch on the object prefers."""
    tokenizer = load_minilm()[0]
    chosen = []
    for picture in np.random.default_rng(0).permutation(kept.indices("test")).tolist():
        pieces = tokenizer.convert_ids_to_tokens(kept.ids[kept.caption_of[picture]])
        words = telling_words(pieces)
        if kept.sources[picture] == "stamp" and 2 <= len(words) <= 4:
            chosen.append((picture, words))
    figure, axes = plt.subplots(4, columns, figsize=(1.75 * columns, 7.6))
    for axis in axes.flat:
        axis.axis("off")
    for number, (picture, words) in enumerate(chosen[: 2 * columns]):
        row, column = divmod(number, columns)
        above, below = axes[2 * row : 2 * row + 2, column]
        best = word_cosines(heads, kept, picture, words).argmax(1)
        _show(above, shown, picture)
        above.set_title(shorten(shown.captions[picture], 30, placeholder=" …"), fontsize=7)
        _show(below, shown, picture)
        _paint_patches(below, best, shown.alpha[picture])
        for place, word in enumerate(words):
            style = {"color": COLOURS[place], "weight": "bold", "fontsize": 7, "ha": "center"}
            below.text((place + 0.5) / len(words), 1.04, word, transform=below.transAxes, **style)
    return figure


def _show(axis: Axes, shown: CaptionedPictures, picture: int) -> None:
    axis.imshow(shown.pixels[picture].permute(1, 2, 0).numpy())


def _paint_patches(
    axis: Axes, best: Int[Tensor, " patches"], alpha: UInt8[Tensor, "size size"]
) -> None:
    """Lay the colour of the preferred word over each patch that the object covers to a tenth."""
    side = math.isqrt(len(best))
    covered = patch_coverage(alpha[None], side)[0] > 0.1
    painted = [(*to_rgb(COLOURS[w]), 0.65 * float(c)) for w, c in zip(best, covered, strict=True)]
    extent = axis.get_images()[0].get_extent()
    axis.imshow(np.array(painted).reshape(side, side, 4), extent=extent)


def draw_found(
    kept: CaptionedTokens,
    scores: Float[Tensor, "pictures captions"],
    shown: CaptionedPictures,
    columns: int = 6,
) -> Figure:
    """Three pictures of each source, drawn at random on the test side, with the captions that are put first."""
    asked = gallery(kept, "test")
    ranks = found_ranks(scores, asked)[0]
    order = np.random.default_rng(1).permutation(len(asked.pictures)).tolist()
    sources = [kept.sources[i] for i in asked.pictures]
    chosen = [i for source in SOURCES for i in [p for p in order if sources[p] == source][:3]]
    figure, axes = plt.subplots(2, columns, figsize=(1.9 * columns, 5.6))
    for axis in axes.flat:
        axis.axis("off")
    for axis, place in zip(axes.flat, chosen, strict=False):
        picture = int(asked.pictures[place])
        _show(axis, shown, picture)
        caption = shorten(shown.captions[picture], 28, placeholder=" …")
        axis.set_title(f"{caption}: {ranks[place]}", fontsize=7)
        for line, number in enumerate(scores[place].topk(3).indices):
            text = shorten(kept.captions[asked.captions[number]], 30, placeholder=" …")
            right = bool(asked.right[place, number])
            style = {"color": COLOURS[0], "weight": "bold"} if right else {}
            axis.text(0, -0.09 - 0.11 * line, text, fontsize=7, transform=axis.transAxes, **style)
    return figure


def report(page: Page, profile: str) -> None:
    """Retrieval both ways against chance, placebo and two ways that train nothing; where words point; what is found."""
    setting, kept = SETTINGS[profile], load_tokens(profile)
    heads = {arm: load(profile, arm=arm) for arm in ARMS}
    scores = all_scores(kept, heads, list(ASKED))
    recalls, leads = recall_table(kept, scores)
    galleries = {split: gallery(kept, split) for split in ASKED}
    asked = "; ".join(f"{ASKED[split]}: {sizes}" for split, sizes in galleries.items())
    page.table(
        "recalls",
        recalls,
        f"Recall in per cent, with 95 % intervals over concepts ({asked}). Least squares and neighbours guess "
        "the caption's sentence vector from the same tokens; shuffled captions are the placebo",
    )
    page.table("leads", leads, "How far the model leads, in points of recall, paired by concept")
    page.table(
        "sources",
        source_table(kept, scores["test"]["model"]),
        "Recall of captions never seen, by the source of the picture",
    )
    shown = captioned_pictures(setting.size, setting.limit)
    page.figure(
        "patches",
        draw_patches(heads["paired"], kept, shown),
        "Twelve stamps with captions never seen, drawn at random, and the word of its caption that each patch "
        "on the object prefers",
    )
    page.figure(
        "found",
        draw_found(kept, scores["test"]["model"], shown),
        "Three pictures of each source drawn at random: their caption and its rank among "
        f"{len(galleries['test'].captions)}, and the three captions put first (the right one in bold)",
    )
