"""What pruning visual tokens costs a small vision-language model: the same pictures and questions under every method.

All methods answer the same questions. Those that prune before the language model keep a `Reduction` a
picture; FastV lets the first layers read everything and keeps a `Reduction` a question. Answers are chosen
among those of the question's type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.backbones.pretrained.vit import prepare
from reattend.data.scenes import Scenes
from reattend.data.vlm_questions import (
    BOS,
    IDS,
    PAD,
    TYPES,
    Question,
    balanced,
    encode,
    scene_questions,
)
from reattend.multimodal_llm.fastervlm import (
    attention_curves,
    cls_scores,
    fastv_scores,
    index_correlation,
    read_layers,
)
from reattend.trunks.visual_tokens import (
    Reduction,
    merged_tokens,
    pooled_tokens,
    top_tokens,
    uniform_tokens,
)
from reattend.trunks.vlm import Prompt, Rows, VisionLanguageModel, last_asked

# --- pictures and questions --------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """What the vision tower gives of some pictures.

    Attributes:
        tokens: features of the patches that the language model reads.
        scores: [CLS] attention of each patch, mean over heads, by layer of the tower.
    """

    tokens: Float[Tensor, "pictures patches tower"]
    scores: dict[int, Float[Tensor, "pictures patches"]]


@torch.no_grad()
def view(
    tower: nn.Module,
    pixels: UInt8[Tensor, "pictures 3 height width"],
    layers: Sequence[int],
    features: int,
    size: int,
    batch: int = 16,
) -> Views:
    """Read pictures with the tower, on the tower's device.

    Args:
        layers: whose [CLS] attention is kept; `features` is one of them.
        features: the layer whose patches the language model reads.
        size: side in pixels at which the tower sees pictures.
    """
    device = next(tower.parameters()).device
    parts = [
        read_layers(tower, prepare(some.to(device), size), layers) for some in pixels.split(batch)
    ]
    place = list(layers).index(features)
    return Views(
        torch.cat([part[place].features for part in parts]),
        {
            layer: torch.cat([cls_scores(part[i].attention) for part in parts])
            for i, layer in enumerate(layers)
        },
    )


@dataclass(frozen=True)
class Album:
    """Pictures with their questions; what is flat runs over all questions, picture by picture.

    Attributes:
        scenes: the pictures, with what is known of them.
        asked: questions of each picture.
        words: their words, packed by picture and padded.
        picture: flat: whose question it is.
        answer: flat: place of the right answer among those of the question's type.
    """

    scenes: Scenes
    asked: list[list[Question]]
    words: Int[Tensor, "pictures most length"]
    picture: Int[Tensor, " questions"]
    answer: Int[Tensor, " questions"]

    def __len__(self) -> int:
        return len(self.asked)

    @property
    def types(self) -> list[str]:
        """Flat: the type of each question."""
        return [question.type for some in self.asked for question in some]


def make_album(scenes: Scenes, *, seed: int, most: int, types: Sequence[str]) -> Album:
    """Ask at most `most` questions about each scene, of `types` alone, types in turn.

    Raises:
        ValueError: when there is a scene about which none of these can be asked.
    """
    random = np.random.default_rng([seed, 1])
    asked = [
        balanced([q for q in scene_questions(scenes, i, random) if q.type in types], most)
        for i in range(len(scenes))
    ]
    if not all(asked):
        raise ValueError(
            "a scene without questions: ask for 'count' or 'exist', which every scene has"
        )
    words, _ = encode(asked)
    flat = [q for some in asked for q in some]
    return Album(
        scenes,
        asked,
        words,
        torch.tensor([i for i, some in enumerate(asked) for _ in some]),
        torch.tensor([TYPES[q.type].index(q.answer) for q in flat]),
    )


def inside_objects(scenes: Scenes, side: int) -> Float[Tensor, "scenes patches"]:
    """Share of every patch of a side x side grid that lies on any object."""
    covered = scenes.masks.any(1).float()
    return F.adaptive_avg_pool2d(covered, side).flatten(1)


# --- answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replies:
    """How all questions were answered under one method.

    Attributes:
        nll: nats of the right answer in a softmax over the answers of its type.
        right: 1 where the likeliest answer of the type is the right one; a mean over draws is a share.
        chosen: place of the likeliest answer among those of the type.
    """

    nll: Float[Tensor, " questions"]
    right: Float[Tensor, " questions"]
    chosen: Int[Tensor, " questions"]


def judged(logits: Float[Tensor, "questions vocabulary"], album: Album) -> Replies:
    """Compare scores of words with the right answers, among the answers of each question's type."""
    nll, chosen = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.long)
    types = np.array(album.types)
    for name in set(types):
        at = torch.from_numpy(np.flatnonzero(types == name))
        among = logits[at][:, [IDS[word] for word in TYPES[name]]].float().log_softmax(1)
        nll[at] = -among.gather(1, album.answer[at, None])[:, 0]
        chosen[at] = among.argmax(1)
    return Replies(nll, (chosen == album.answer).float(), chosen)


def mean_replies(draws: Sequence[Replies]) -> Replies:
    """Draws of a random method as one: means of nll and of right, the first draw's choices."""
    nll, right = (
        torch.stack([getattr(d, name) for d in draws]).mean(0) for name in ("nll", "right")
    )
    return Replies(nll, right, draws[0].chosen)


Select = Callable[[slice, int], Reduction]
"""From a slice of the pictures and the number of tokens to keep to what is kept of each."""


def by_score(scores: Float[Tensor, "pictures patches"]) -> Select:
    """Keep the patches of the highest scores."""
    return lambda some, kept: top_tokens(scores[some], kept)


METHODS = (
    "FasterVLM",
    "FastV",
    "FastV, random ranking",
    "FastV's ranking",
    "FastV's ranking minus mean map",
    "mean [CLS] map",
    "random",
    "uniform grid",
    "pooling",
    "merging",
    "objects",
)
"""All that prune. "FastV's ranking" keeps what FastV's scores choose, but before the model as FasterVLM does;
"objects" keeps the patches that objects cover most: what knowing where they are would give."""


def selections(
    views: Views,
    layer: int,
    mean_map: Float[Tensor, " patches"],
    inside: Float[Tensor, "pictures patches"],
    draws: int,
    seed: int,
) -> dict[str, list[Select]]:
    """Every method that prunes before the language model, with its draws.

    Args:
        layer: of the tower whose [CLS] FasterVLM asks.
        mean_map: [CLS] attention averaged over other pictures: position alone.
        inside: how much of each patch lies on objects.
        draws: of the random method.
    """
    generator, shape, device = torch.Generator().manual_seed(seed), inside.shape, inside.device
    grid = (math.isqrt(shape[1]),) * 2
    random = [torch.rand(shape, generator=generator).to(device) for _ in range(draws)]
    return {
        "FasterVLM": [by_score(views.scores[layer])],
        "mean [CLS] map": [by_score(mean_map.expand(shape))],
        "random": [by_score(scores) for scores in random],
        "uniform grid": [
            lambda some, kept: uniform_tokens(grid, kept, _count(some, shape)).to(device)
        ],
        "pooling": [lambda some, kept: pooled_tokens(grid, kept, _count(some, shape)).to(device)],
        "merging": [lambda some, kept: merged_tokens(views.tokens[some], kept)],
        "objects": [by_score(inside)],
    }


def _count(some: slice, shape: torch.Size) -> int:
    return len(range(*some.indices(shape[0])))


class Reader:
    """The frozen language model, and how it answers an album's questions.

    Args:
        model: the vision-language model.
        views: of the album's pictures.
        depth: K, layers that read all tokens under FastV.
        batch: pictures read together.
    """

    def __init__(
        self, model: VisionLanguageModel, album: Album, views: Views, depth: int, batch: int = 24
    ) -> None:
        self.model, self.album, self.depth, self.batch = model, album, depth, batch
        self.words = album.words.to(views.tokens.device)
        with torch.no_grad():
            self.pictures = model.project(views.tokens)

    @torch.no_grad()
    def blind(self) -> Replies:
        """Questions without the picture's tokens."""
        parts = [self._answers(None, None, some) for some in self._slices()]
        return judged(torch.cat(parts).cpu(), self.album)

    @torch.no_grad()
    def pruned(self, select: Select, kept: int) -> Replies:
        """Pruned before the model; positions are counted anew."""
        parts = []
        for some in self._slices():
            reduction = select(some, kept)
            short = reduction.keep(self.pictures[some])
            parts.append(self._answers(short, reduction.places, some))
        return judged(torch.cat(parts).cpu(), self.album)

    @torch.no_grad()
    def fastv(
        self,
        ranks: Mapping[str, Callable[[Float[Tensor, "questions patches"]], Tensor]],
        counts: Sequence[int],
        progress: Callable = lambda items: items,
    ) -> tuple[Replies, Float[Tensor, "questions patches"], dict[tuple[str, int], Replies]]:
        """Dense answers, FastV's scores of every question, and answers pruned before layer K at old positions.

        Args:
            ranks: by name: from FastV's scores to those by which tokens are kept.
            counts: of tokens to keep.
        """
        dense, scores = [], []
        pruned: dict[tuple[str, int], list[Tensor]] = {(n, k): [] for n in ranks for k in counts}
        for some in progress(list(self._slices())):
            logits, score, halfway = self._first_layers(some)
            dense.append(logits)
            scores.append(score)
            for name, rank in ranks.items():
                ranked = rank(score)
                for kept in counts:
                    left = halfway.keep_patches(top_tokens(ranked, kept).places)
                    read = self.model.read(left, first=self.depth)
                    pruned[name, kept].append(self.model.answers(read))
        replies = {k: judged(torch.cat(v).cpu(), self.album) for k, v in pruned.items()}
        return judged(torch.cat(dense).cpu(), self.album), torch.cat(scores), replies

    @torch.no_grad()
    def pruned_by_question(
        self, scores: Float[Tensor, "questions patches"], kept: int, batch: int = 128
    ) -> Replies:
        """Pruned before the model for each question by scores of its own; positions are counted anew."""
        album, parts = self.album, []
        number = torch.cat([torch.arange(len(some)) for some in album.asked])
        for at in torch.arange(len(album.answer)).split(batch):
            picture = album.picture[at]
            reduction = top_tokens(scores[at], kept)
            short = reduction.keep(self.pictures[picture])
            words = self.words[picture, number[at]][:, None]
            prompt = self.model.prompt(IDS[BOS], short, words, IDS[PAD], reduction.places)
            parts.append(self.model.answers(self.model.read(prompt)))
        return judged(torch.cat(parts).cpu(), album)

    def _slices(self) -> Iterator[slice]:
        for start in range(0, len(self.album), self.batch):
            yield slice(start, min(start + self.batch, len(self.album)))

    def _answers(self, pictures: Tensor | None, places: Tensor | None, some: slice) -> Tensor:
        prompt = self.model.prompt(IDS[BOS], pictures, self.words[some], IDS[PAD], places)
        return self.model.answers(self.model.read(prompt))

    def _first_layers(self, some: slice) -> tuple[Tensor, Tensor, Prompt]:
        """Dense scores of words, FastV's scores, and the states before layer K, a prompt for each question."""
        prompt = self.model.prompt(IDS[BOS], self.pictures[some], self.words[some], IDS[PAD])
        counts = prompt.asked.sum(1)
        real = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        order = prompt.asked.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        places = order[:, : real.shape[1]]
        rows, halfway = Rows((self.depth - 1,), lambda _: places), []

        def watch(number: int, now: Prompt, _found: Mapping) -> Prompt:
            if number == self.depth:
                halfway.append(now)
            return now

        logits = self.model.answers(self.model.read(prompt, rows=rows, before_layer=watch))
        last = rows.found[self.depth - 1].transpose(1, 2)[real]
        common = 1 + self.pictures.shape[1]
        scores = fastv_scores(last, slice(1, common))
        return logits, scores, self._one_prompt_each(halfway[0], real, common)

    def _one_prompt_each(
        self, packed: Prompt, real: Bool[Tensor, "pictures most"], common: int
    ) -> Prompt:
        picture, number = real.nonzero().T
        length = self.words.shape[2]
        shared = torch.arange(common, device=real.device).expand(len(picture), -1)
        own = common + number[:, None] * length + torch.arange(length, device=real.device)
        of = Prompt(**{name: value[picture] for name, value in vars(packed).items()})
        return of.take(torch.cat([shared, own], 1))


# --- scores of a method -------------------------------------------------------------------------------------


def average_percent(
    right: Float[Tensor, " questions"], dense: Float[Tensor, " questions"], album: Album
) -> Float[np.ndarray, " pictures"]:
    """One value a picture whose mean is the paper's Average: of each type's accuracy relative to dense, in per cent.

    A picture without questions of a type adds nothing to that type; the dense accuracies are held fixed. Of a type
    that the unpruned model never answers one right answer is taken as 100 %.
    """
    types, picture = np.array(album.types), album.picture.numpy()
    values = np.zeros(len(album))
    names = sorted(set(types))
    for name in names:
        at = types == name
        share = right.numpy()[at] / max(dense.numpy()[at].sum(), 1) / len(names)
        np.add.at(values, picture[at], 100 * len(album) * share)
    return values


def of_pictures(
    values: Float[Tensor, " questions"], album: Album
) -> Float[np.ndarray, " pictures"]:
    """Mean over each picture's questions."""
    picture = album.picture.numpy()
    sums = np.bincount(picture, values.numpy().astype(float), len(album))
    return sums / np.bincount(picture, minlength=len(album))


def type_accuracy(right: Float[Tensor, " questions"], album: Album) -> dict[str, float]:
    """Per cent of right answers by type."""
    types = np.array(album.types)
    return {
        name: 100 * float(right.numpy()[types == name].mean()) for name in TYPES if name in types
    }


def type_shares(
    values: Float[Tensor, " questions"], album: Album
) -> dict[str, Float[np.ndarray, " pictures"]]:
    """By type, one number a picture whose mean is the mean over the type's questions, in per cent."""
    types, picture = np.array(album.types), album.picture.numpy()
    found = {}
    for name in dict.fromkeys(album.types):
        at = types == name
        found[name] = np.zeros(len(album))
        np.add.at(found[name], picture[at], 100 * len(album) * values.numpy()[at] / at.sum())
    return found


def one_question_each(album: Album, pictures: int) -> list[int]:
    """Flat places of one question about each of the first pictures: the next type each time, where there is one."""
    chosen = []
    for picture in range(min(pictures, len(album))):
        own = (album.picture == picture).nonzero()[:, 0].tolist()
        chosen.append(own[picture % len(own)])
    return chosen


def said_of(replies: Replies, album: Album, flat: int) -> tuple[str, bool]:
    """The answer given to a question, and whether it is right."""
    return TYPES[album.types[flat]][replies.chosen[flat]], bool(
        replies.chosen[flat] == album.answer[flat]
    )


def question_of(album: Album, flat: int) -> str:
    """A question with its right answer, on two lines."""
    question = [question for some in album.asked for question in some][flat]
    return f"{question.text}\n{question.answer}"


# --- attention shift ------------------------------------------------------------------------------------------


@torch.no_grad()
def lm_curves(
    model: VisionLanguageModel,
    pictures: Float[Tensor, "pictures patches width"],
    words: Int[Tensor, "pictures length"],
    batch: int = 24,
) -> dict[str, Float[np.ndarray, "pictures layers patches"]]:
    """Attention that visual tokens receive in every layer of the language model, one question a picture.

    Prompts of equally many words are read together, so that none has padding.
    """
    layers, patches = model.shape.layers, pictures.shape[1]
    found: dict[str, Tensor] = {}
    lengths = (words != IDS[PAD]).sum(1)
    for length in lengths.unique().tolist():
        for at in (lengths == length).nonzero()[:, 0].split(batch):
            prompt = model.prompt(IDS[BOS], pictures[at], words[at, None, :length], IDS[PAD])
            everything = torch.arange(prompt.length, device=words.device).expand(len(at), -1)
            rows = Rows(range(layers), lambda _, all=everything: all)
            model.read(prompt, rows=rows)
            for layer, weights in rows.found.items():
                curves = attention_curves(weights.mean(1), slice(1, 1 + patches))
                for name, curve in curves.items():
                    shape = (len(words), layers, patches)
                    kept = found.setdefault(name, torch.empty(shape))
                    kept[at.cpu(), layer] = curve.float().cpu()
    return {name: curve.numpy() for name, curve in found.items()}


def group_rho(
    curves: Float[np.ndarray, "pictures patches"], group: int
) -> Float[np.ndarray, " groups"]:
    """Spearman's rho of index and attention, of the mean curve of every `group` pictures in turn.

    The paper draws mean curves; a rank correlation is no mean over pictures, and a single picture's curve is mostly
    content, so groups are the points. Pictures beyond the last whole group are left out.
    """
    count = len(curves) // group
    means = curves[: count * group].reshape(count, group, -1).mean(1)
    return index_correlation(torch.from_numpy(means)).numpy()


def twin_curves(
    reader: Reader, tower: nn.Module, pictures: int, layer: int, size: int, seed: int
) -> dict[str, Float[np.ndarray, "pictures layers patches"]]:
    """Curves of the first pictures, each the mean of the picture's and of that of its upside-down twin.

    A turn by 180 degrees makes patch j patch N - 1 - j, so that what follows content is as high at both ends.

    Returns:
        image, text, last and full of every layer of the language model; permuted: last, once the patches were
        put in random order before it; cls: of the tower, with one layer.
    """
    scenes, device = reader.album.scenes, reader.pictures.device
    words = reader.words[:pictures, 0]
    order = torch.Generator().manual_seed(seed)
    found: list[dict[str, np.ndarray]] = []
    for pixels in (scenes.pixels[:pictures], scenes.pixels[:pictures].flip(2, 3)):
        seen = view(tower, pixels, (layer,), layer, size)
        with torch.no_grad():
            projected = reader.model.project(seen.tokens)
        curves = lm_curves(reader.model, projected, words, reader.batch)
        mixed = torch.rand(projected.shape[:2], generator=order).argsort(dim=1).to(device)
        shuffled = projected.gather(1, mixed[..., None].expand(projected.shape))
        curves["permuted"] = lm_curves(reader.model, shuffled, words, reader.batch)["last"]
        curves["cls"] = seen.scores[layer][:, None].cpu().numpy()
        found.append(curves)
    return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}


# --- time ------------------------------------------------------------------------------------------------------


def prefill_runs(
    reader: Reader, select: Select, counts: Mapping[float, int]
) -> dict[tuple[str, float], Callable[[], object]]:
    """Prompts of one question each, read unpruned, with FasterVLM's and with FastV's pruning; choosing included.

    The tower is left out, and with it the row of [CLS]: it reads every picture whole in all three.

    Args:
        counts: removed share -> tokens kept.
    """
    model, some = reader.model, slice(0, min(8, len(reader.album)))
    words, pictures = reader.words[some, :1], reader.pictures[some]
    read = torch.no_grad()(model.read)

    def unpruned() -> object:
        return read(model.prompt(IDS[BOS], pictures, words, IDS[PAD]))

    def faster(kept: int) -> object:
        reduction = select(some, kept)
        short = reduction.keep(pictures)
        return read(model.prompt(IDS[BOS], short, words, IDS[PAD], reduction.places))

    def fastv(kept: int) -> object:
        rows = Rows((reader.depth - 1,), last_asked)

        def drop(number: int, now: Prompt, seen: Mapping[int, Tensor]) -> Prompt:
            if number != reader.depth:
                return now
            scores = fastv_scores(seen[number - 1][:, :, 0], slice(1, 1 + pictures.shape[1]))
            return now.keep_patches(top_tokens(scores, kept).places)

        prompt = model.prompt(IDS[BOS], pictures, words, IDS[PAD])
        return read(prompt, rows=rows, before_layer=drop)

    runs: dict[tuple[str, float], Callable[[], object]] = {("none", 0.0): unpruned}
    for share, kept in counts.items():
        runs["FastV", share] = lambda kept=kept: fastv(kept)
        runs["FasterVLM", share] = lambda kept=kept: faster(kept)
    return runs
