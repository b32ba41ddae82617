"""A small CLIP on real captioned pictures: frozen tokens of two real encoders, and linear maps trained on them.

Pictures go through the ViT-S/14 and captions through MiniLM once; their tokens are kept in half precision.
What is trained are linear maps of both into one space, contrastively (CLIP, 2103.00020); captions that come
twice in a batch share their target. A picture is the direction of A cls + B mean(patches), a caption that of
C mean(words). Both are sums over tokens, so that B patch and C word can be compared too.

Layers, dropout, batch and width were chosen on another random split of the same pictures.

`report` measures retrieval on pictures whose captions were not seen in training, and on drawings held out of
emoji whose captions were.

Names of shapes: `pictures`, `captions` (each once), `tokens` ([CLS], then patches row by row), `words` (pieces
of words, padded), `joint`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float16, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.backbones.features import extract
from reattend.backbones.pretrained.minilm import load as load_minilm
from reattend.backbones.pretrained.vit import hidden_states
from reattend.backbones.pretrained.vit import load as load_vit
from reattend.backbones.reports import Page
from reattend.backbones.store import backbone_path
from reattend.data.captioned_pictures import LITTLE, SOURCES, CaptionedPictures, captioned_pictures
from reattend.data.images import patch_coverage
from reattend.evidence.intervals import resampled
from reattend.evidence.statistics import difference_of_ratios, ratio_of_sums
from reattend.metrics import ranks_of_first_right
from reattend.plots import COLOURS
from reattend.presentation import interval_text
from reattend.training.contrastive import shared_targets, symmetric_info_nce
from reattend.training.loop import TrainingPlan, decay_matrices, train
from reattend.trunks.encoders import (
    CachedStates,
    TextEncoder,
    Tokens,
    index_batches,
    masked_mean,
    tokenise,
)

# Of the ViT: the saliency training has moved the last ones away. Two layers side by side found more than one.
LAYERS = (7, 10)
SEEN, SAID = 384 * len(LAYERS), 384  # channels of a token of a picture and of a caption
LONGEST = 32  # pieces of words in a caption, [CLS] and [SEP] among them
ARMS = ("paired", "shuffled")
"""The model, and its placebo: trained alike after the captions have been dealt out anew among the concepts."""
KS = (1, 5, 10)


@dataclass(frozen=True)
class Setting:
    """What one profile makes.

    Attributes:
        size: side of the pictures in pixels, as the ViT sees them.
        limit: pictures of each class or folder; None: all.
        rate, decay: learning rate and weight decay.
        dropped: share of channels that training leaves out of every picture and caption at random.
    """

    size: int
    limit: int | None
    joint: int
    batch: int
    steps: int
    rate: float
    decay: float
    dropped: float

    @property
    def plan(self) -> TrainingPlan:
        """Warm-up over a tenth of the steps, then a cosine to zero."""
        return TrainingPlan(
            self.steps, self.rate, self.decay, warmup=max(1, self.steps // 10), fused=True
        )


SETTINGS = {
    "smoke": Setting(56, 2, 32, 16, 4, 1e-3, 0.1, 0.5),
    "cpu": Setting(112, None, 512, 512, 1000, 1e-3, 0.1, 0.5),
    "gpu": Setting(224, None, 512, 1024, 3000, 1e-3, 0.1, 0.5),
}


# --- the model -----------------------------------------------------------------------------------


class Heads(nn.Module):
    """Linear maps of the tokens of both encoders into the joint space, after channels are standardised.

    `scale` is the factor of cosines in the logits, 1 / temperature: learned as its logarithm, at most 100.

    Args:
        dropped: share of standardised channels that are left out at random while training.
    """

    def __init__(self, joint: int, dropped: float = 0.0) -> None:
        super().__init__()
        self.cls = nn.Linear(SEEN, joint)
        self.patch = nn.Linear(SEEN, joint, bias=False)
        self.word = nn.Linear(SAID, joint)
        self.dropout = nn.Dropout(dropped)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20)))
        for kind, width in (("cls", SEEN), ("patch", SEEN), ("word", SAID)):
            self.register_buffer(f"{kind}_mean", torch.zeros(width))
            self.register_buffer(f"{kind}_spread", torch.ones(width))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature, at most 100."""
        return self.log_scale.clamp(max=math.log(100)).exp()

    def standardise_by(self, **states: Float[Tensor, "_ _"]) -> None:
        """Set mean and spread of the channels of "cls", "patch" and "word" to those of some states."""
        for kind, rows in states.items():
            getattr(self, f"{kind}_mean").copy_(rows.mean(0))
            getattr(self, f"{kind}_spread").copy_(rows.std(0) + 1e-6)

    def _mapped(
        self, kind: str, states: Float[Tensor, "*rows channels"]
    ) -> Float[Tensor, "*rows joint"]:
        mean, spread = getattr(self, f"{kind}_mean"), getattr(self, f"{kind}_spread")
        return getattr(self, kind)(self.dropout((states.float() - mean) / spread))

    def picture_tokens(
        self, tokens: Float[Tensor, "pictures tokens seen"]
    ) -> Float[Tensor, "pictures tokens joint"]:
        """[CLS] and patches in the joint space, every token of length 1."""
        cls, patches = self._mapped("cls", tokens[:, :1]), self._mapped("patch", tokens[:, 1:])
        return F.normalize(torch.cat([cls, patches], 1), dim=-1)

    def word_tokens(
        self, states: Float[Tensor, "captions words said"]
    ) -> Float[Tensor, "captions words joint"]:
        """Words, those of padding too, in the joint space, every token of length 1."""
        return F.normalize(self._mapped("word", states), dim=-1)

    def pictures(self, pooled: Float[Tensor, "pictures 2 seen"]) -> Float[Tensor, "pictures joint"]:
        """One vector of length 1 a picture, from what `pooled` makes of its tokens."""
        cls, patches = pooled.unbind(1)
        return F.normalize(self._mapped("cls", cls) + self._mapped("patch", patches), dim=-1)

    def captions(self, means: Float[Tensor, "captions said"]) -> Float[Tensor, "captions joint"]:
        """One vector of length 1 a caption, from the mean of its words."""
        return F.normalize(self._mapped("word", means), dim=-1)


def pooled(
    tokens: Float[Tensor, "pictures tokens seen"],
) -> Float[Tensor, "pictures 2 seen"]:
    """[CLS] and the mean of the patches."""
    return torch.stack([tokens[:, 0].float(), tokens[:, 1:].mean(1, dtype=torch.float32)], 1)


@dataclass(frozen=True)
class CaptionedTokens:
    """What the frozen encoders say of all pictures and captions, in half precision.

    Attributes:
        tokens: of the ViT; [CLS], then the patches row by row; the states after both layers side by side.
        words: of MiniLM, for each caption once; [CLS] and [SEP] are among them.
        ids: MiniLM's numbers of these pieces of words.
        caption_of: which caption each picture has.
        captions: each caption once, in the order of the alphabet.
        concepts, sources, splits: of each picture, see `captioned_pictures`.
    """

    tokens: Float16[Tensor, "pictures tokens seen"]
    words: CachedStates
    ids: Int[Tensor, "captions words"]
    caption_of: Int[Tensor, " pictures"]
    captions: tuple[str, ...]
    concepts: tuple[str, ...]
    sources: tuple[str, ...]
    splits: tuple[str, ...]

    def indices(self, split: str) -> Int[Tensor, " chosen"]:
        """Positions of the pictures of one split."""
        return torch.from_numpy(np.flatnonzero(np.array(self.splits) == split))


# --- the build -----------------------------------------------------------------------------------


def build(target: Path, profile: str) -> None:
    """Keep the tokens of all pictures and captions, and train the maps on those of the training side."""
    setting = SETTINGS[profile]
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    pictures = captioned_pictures(setting.size, setting.limit)
    captions = sorted(set(pictures.captions))
    pieces, words = read_captions(captions)
    tokens = see_pictures(pictures.pixels, setting.size, device)
    caption_of = torch.tensor([captions.index(caption) for caption in pictures.captions])
    arrays = {"tokens": tokens, "words": words.states, "mask": words.mask, "ids": pieces.ids}
    save_file(arrays | {"caption_of": caption_of}, target / "tokens.safetensors")
    names = ("concepts", "sources", "splits")
    facts = {"captions": captions} | {name: getattr(pictures, name) for name in names}
    (target / "items.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf8")
    kept = _read(target)
    for arm in ARMS:
        heads, losses = fit(arm, setting, kept, device)
        save_model(heads, target / f"{arm}.safetensors")
        print(f"{arm}: {np.mean(losses[-20:]):.2f} nats over the last 20 steps", flush=True)


def see_pictures(
    pixels: UInt8[Tensor, "pictures 3 height width"], size: int, device: str | torch.device = "cpu"
) -> Float16[Tensor, "pictures tokens seen"]:
    """[CLS] and patch tokens of pictures as the maps take them."""
    model = load_vit(device)
    model.encoder.layer = model.encoder.layer[: max(LAYERS)]  # those above are of no use here

    def encode(part: Tensor) -> Tensor:
        states = hidden_states(model, part.to(device), LAYERS, size)
        return torch.cat([*states], dim=-1)[None]

    return extract(encode, pixels, "pictures through the ViT")[0]


def read_captions(captions: Sequence[str]) -> tuple[Tokens, CachedStates]:
    """Captions in pieces of words, and MiniLM's last states of them, as the maps take them."""
    tokenizer, model = load_minilm()
    pieces = tokenise(tokenizer, list(captions), length=LONGEST)
    encoder = TextEncoder(model, frozen=len(model.encoder.layer))
    return pieces, encoder.cache(pieces)


def dealt_out(
    caption_of: Int[Tensor, " pictures"], concepts: Sequence[str], seed: int
) -> Int[Tensor, " pictures"]:
    """A caption of another concept for each picture: concepts pass their captions on in a random ring.

    Pictures of one concept get one and the same caption, the first of their giver.
    """
    names = sorted(set(concepts))
    order = np.random.default_rng(seed).permutation(len(names))
    receiver = {names[a]: names[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    first = {name: int(caption_of[concepts.index(name)]) for name in names}
    return torch.tensor([first[receiver[name]] for name in concepts])


def fit(
    arm: str, setting: Setting, kept: CaptionedTokens, device: str | torch.device = "cpu"
) -> tuple[Heads, list[float]]:
    """Train the maps of one arm on the training side; the maps, and the loss of every step in nats."""
    rows = kept.indices("train")
    seen, caption_of = pooled(kept.tokens[rows]).to(device), kept.caption_of[rows]
    said = masked_mean(kept.words.states.float(), kept.words.mask).to(device)
    torch.manual_seed(0)
    heads = Heads(setting.joint, setting.dropped).to(device)
    heads.standardise_by(cls=seen[:, 0], patch=seen[:, 1], word=said[caption_of])
    if arm == "shuffled":
        caption_of = dealt_out(caption_of, [kept.concepts[i] for i in rows], seed=0)

    def loss(heads: Heads, index: Tensor) -> Tensor:
        chosen = caption_of[index]
        logits = heads.scale * heads.pictures(seen[index]) @ heads.captions(said[chosen]).T
        return symmetric_info_nce(logits, logits, shared_targets(chosen).to(device))

    batches = index_batches(len(rows), min(setting.batch, len(rows)), seed=0)
    log = train(heads, batches, loss, setting.plan, groups=decay_matrices)
    return heads, log.losses


def _read(directory: Path) -> CaptionedTokens:
    arrays = load_file(directory / "tokens.safetensors")
    facts = json.loads((directory / "items.json").read_text(encoding="utf8"))
    words = CachedStates(arrays["words"], arrays["mask"])
    names = {name: tuple(values) for name, values in facts.items()}
    return CaptionedTokens(arrays["tokens"], words, arrays["ids"], arrays["caption_of"], **names)


def load(profile: str = "cpu", device: str | torch.device = "cpu", arm: str = "paired") -> Heads:
    """The trained maps of a profile, in evaluation mode; built on first use.

    Args:
        arm: "paired", or "shuffled" for the placebo.
    """
    heads = Heads(SETTINGS[profile].joint)
    load_model(heads, backbone_path("clip", profile) / f"{arm}.safetensors")
    return heads.to(device).eval().requires_grad_(False)


def load_tokens(profile: str = "cpu") -> CaptionedTokens:
    """The kept tokens of all pictures and captions of a profile; built on first use."""
    return _read(backbone_path("clip", profile))


# --- the report ----------------------------------------------------------------------------------


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


def _best(settings: Sequence[float], scored, asked: Gallery) -> float:
    """The setting with the highest mean reciprocal rank, both ways taken together."""

    def quality(setting: float) -> float:
        return sum(
            (1 / r.double()).mean().item() for r in found_ranks(scored(asked, setting), asked)
        )

    return max(settings, key=quality)


def all_scores(
    kept: CaptionedTokens, heads: dict[str, Heads], splits: Sequence[str]
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


WAYS = ("caption of a picture", "picture of a caption")
ASKED = {"test": "captions never seen", "vendor": "drawings held out"}


def recall_table(
    kept: CaptionedTokens, scores: dict[str, dict[str, Tensor]]
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


def _lead(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]):
    paired = {"a": ours["a"], "a_n": ours["b"], "b": theirs["a"], "b_n": theirs["b"]}
    return resampled(paired, difference_of_ratios)


def _text(found) -> str:
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
