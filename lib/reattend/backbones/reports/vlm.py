"""How well the small vision-language model answers, beside what it says without the picture; where it looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from reattend.backbones.reports.page import Page
from reattend.backbones.trained.vlm import (
    SETTINGS,
    Exam,
    answer,
    choices,
    exam,
    load,
    losses,
)
from reattend.data.vlm_questions import BOS, IDS, LENGTH, PAD, TYPES, Question, encode
from reattend.evidence.intervals import Estimate, resampled
from reattend.evidence.statistics import difference_of_ratios, ratio_of_sums
from reattend.plots import COLOURS
from reattend.presentation import interval_text
from reattend.trunks.vlm import PADDING, Prompt, Rows, VisionLanguageModel
from reattend.trunks.vlm_options import choose

SEED = 800
"""Of the scenes on which the model is measured; no study may use it."""
PICTURES = {"smoke": 8, "cpu": 300, "gpu": 600}
DEPTH = 100
"""Pictures on which it is measured how deep the model reads."""
OPTIONS = 4
"""Letters of a question of multiple choice."""
SIDES = {"train": "new scenes of known cut-outs", "test": "unknown cut-outs and photographs"}


def right_answers(given: Exam, found: Sequence[Tensor]) -> list[list[bool]]:
    """For each picture and each of its questions, whether the likeliest answer is the right one."""
    told = iter(found)
    return [
        [TYPES[q.type][next(told).argmax()] == q.answer for q in asked] for asked in given.asked
    ]


def commonest(given: Exam) -> list[list[bool]]:
    """The same for whoever always says the answer that is right most often, chosen in hindsight by type."""
    counts: dict[str, Counter] = {kind: Counter() for kind in TYPES}
    for asked in given.asked:
        for question in asked:
            counts[question.type][question.answer] += 1
    best = {kind: max(of, key=of.get) for kind, of in counts.items() if of}
    return [[q.answer == best[q.type] for q in asked] for asked in given.asked]


def by_picture(given: Exam, right: Sequence[Sequence[bool]], kind: str) -> dict[str, np.ndarray]:
    """Right answers `a` and questions `b` of one type by picture; pictures without such a question left out."""
    pairs = [
        [(hit, 1) for hit, question in zip(hits, asked, strict=True) if question.type == kind]
        for hits, asked in zip(right, given.asked, strict=True)
    ]
    sums = np.array([np.sum(of, axis=0) for of in pairs if of], dtype=float).reshape(-1, 2)
    return {"a": sums[:, 0], "b": sums[:, 1]}


def accuracy_table(sides: Mapping[str, Exam], model: VisionLanguageModel) -> pd.DataFrame:
    """Accuracy in per cent by type with 95 % intervals over pictures, and the lead over the blind model in points."""
    rows = []
    for side, given in sides.items():
        sighted, blind = (
            right_answers(given, answer(model, given, blind=b)) for b in (False, True)
        )
        for kind in TYPES:
            with_picture, without, constant = (
                by_picture(given, right, kind) for right in (sighted, blind, commonest(given))
            )
            if not len(with_picture["b"]):
                continue
            paired = with_picture | {f"{name}2": values for name, values in without.items()}
            pair = {"a": paired["a"], "a_n": paired["b"], "b": paired["a2"], "b_n": paired["b2"]}
            rows.append(
                {
                    "asked": SIDES[side],
                    "type": kind,
                    "answers": len(TYPES[kind]),
                    "questions": int(with_picture["b"].sum()),
                    "with picture": _text(resampled(with_picture, ratio_of_sums)),
                    "without": _text(resampled(without, ratio_of_sums)),
                    "commonest": _text(resampled(constant, ratio_of_sums)),
                    "lead": _text(resampled(pair, difference_of_ratios)),
                }
            )
    return pd.DataFrame(rows)


def _text(found: Estimate) -> str:
    return interval_text(100 * found.effect, 100 * found.low, 100 * found.high)


@torch.no_grad()
def depth_table(model: VisionLanguageModel, given: Exam, kept: int) -> pd.DataFrame:
    """Accuracy in per cent by type when only `kept` random patches are left from a layer on (counted from 0)."""
    patches, generator = model.shape.patches, torch.Generator().manual_seed(SEED)
    chosen = torch.rand(len(given.asked), patches, generator=generator).topk(kept, 1).indices
    projected = model.project(given.tokens)
    words = encode(given.asked)[0]
    questions, rows = [q for asked in given.asked for q in asked], []
    for layer in range(model.shape.layers + 1):

        def drop(number: int, prompt: Prompt, _: Mapping, layer: int = layer) -> Prompt:
            return prompt.keep_patches(chosen) if number == layer else prompt

        prompt = model.prompt(IDS[BOS], projected, words, IDS[PAD])
        found = choices(model.answers(model.read(prompt, before_layer=drop)), questions)
        right = right_answers(given, found)
        name = "all" if layer == model.shape.layers else f"{kept} from layer {layer}"
        sums = {kind: by_picture(given, right, kind) for kind in TYPES}
        shares = {k: 100 * of["a"].sum() / of["b"].sum() for k, of in sums.items() if len(of["b"])}
        rows.append({"patches": name} | shares)
    return pd.DataFrame(rows)


def lettered(question: Question, random: np.random.Generator) -> list[str]:
    """The options A, B, C, D of a question: its answer among three others of its type, in random order."""
    others = [word for word in TYPES[question.type] if word != question.answer]
    words = [question.answer, *random.choice(others, OPTIONS - 1, replace=False).tolist()]
    return [words[place] for place in random.permutation(OPTIONS)]


def options_table(model: VisionLanguageModel, given: Exam) -> pd.DataFrame:
    """Per cent of questions whose right letter is chosen of four, by type, and how often each letter is chosen."""
    random, types = (
        np.random.default_rng(SEED),
        [k for k, of in TYPES.items() if len(of) >= OPTIONS],
    )
    right, letters = [], {kind: Counter() for kind in types}
    for tokens, asked in zip(given.tokens, given.asked, strict=True):
        picture, hits = model.project(tokens[None]), []
        for question in asked:
            hits.append(False)
            if question.type in types:
                words = lettered(question, random)
                prompt = model.prompt(IDS[BOS], picture, encode([[question]])[0], IDS[PAD])
                found = choose(model, prompt, [[IDS[word]] for word in words])
                letters[question.type][found.letters[0]] += 1
                hits[-1] = words[found.best.item()] == question.answer
        right.append(hits)
    rows = []
    for kind in types:
        counts = by_picture(given, right, kind)
        if len(counts["b"]):
            row = {"type": kind, "questions": int(counts["b"].sum())}
            row["right letter"] = _text(resampled(counts, ratio_of_sums))
            total = letters[kind].total()
            rows.append(row | {f"says {a}": 100 * letters[kind][a] / total for a in "ABCD"})
    return pd.DataFrame(rows)


def loss_table(logged: Mapping[str, Float[Tensor, " steps"]]) -> pd.DataFrame:
    """Mean losses over the last two tenths of each stage, to see whether it has come to rest."""
    rows = []
    for stage, values in logged.items():
        tenth = max(1, len(values) // 10)
        before, last = values[-2 * tenth : -tenth].mean().item(), values[-tenth:].mean().item()
        change = 100 * (last / before - 1)
        rows.append(
            {
                "stage": stage,
                "steps": len(values),
                "ninth tenth": before,
                "last tenth": last,
                "change, %": change,
            }
        )
    return pd.DataFrame(rows)


def _question_words(prompt: Prompt) -> Int[Tensor, "items words"]:
    """The places of the words of one question a prompt, with its padding."""
    places = torch.arange(prompt.length - LENGTH, prompt.length)
    return places.expand(len(prompt.states), -1)


@torch.no_grad()
def looked_at(
    model: VisionLanguageModel,
    tokens: Float[Tensor, "items patches 384"],
    asked: Sequence[Question],
) -> tuple[Float[Tensor, "items patches"], list[str]]:
    """Attention of each question's words to the patches, averaged over words, layers and heads, and the answers.

    The averages are divided by their largest value in each picture.
    """
    rows = Rows(range(model.shape.layers), _question_words)
    prompt = model.prompt(
        IDS[BOS], model.project(tokens), encode([[q] for q in asked])[0], IDS[PAD]
    )
    found = choices(model.answers(model.read(prompt, rows=rows)), asked)
    words = (prompt.segments[:, -LENGTH:] != PADDING).to(prompt.states)[:, None, :, None]
    weights = torch.stack([(rows.found[n] * words).mean((1, 2)) for n in rows.layers]).mean(0)
    seen = weights.gather(1, prompt.picture_tokens())
    said = [TYPES[q.type][values.argmax()] for q, values in zip(asked, found, strict=True)]
    return seen / seen.amax(1, keepdim=True), said


def one_of_each(given: Exam, types: Sequence[str]) -> list[tuple[int, Question]]:
    """For each wanted type the next picture, in turn, that asks a question of it."""
    chosen, start = [], 0
    for kind in types:
        order = [(start + step) % len(given.asked) for step in range(len(given.asked))]
        place = next((i for i in order if any(q.type == kind for q in given.asked[i])), None)
        if place is not None:
            chosen.append((place, next(q for q in given.asked[place] if q.type == kind)))
            start = place + 1
    return chosen


def draw_looks(
    pixels: UInt8[Tensor, "items 3 size size"],
    seen: Float[Tensor, "items patches"],
    asked: Sequence[Question],
    said: Sequence[str],
) -> Figure:
    """Each picture under its question, and below it the same darkened where no attention goes."""
    side, columns = int(seen.shape[1] ** 0.5), 7
    rows = -(-len(asked) // columns)
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(1.6 * columns, 3.9 * rows), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for number, question in enumerate(asked):
        row, column = divmod(number, columns)
        above, below = axes[2 * row : 2 * row + 2, column]
        picture = pixels[number].movedim(0, -1).float() / 255
        above.imshow(picture.numpy())
        above.set_title(question.text, fontsize=8)
        light = torch.nn.functional.interpolate(
            seen[number].view(1, 1, side, side), scale_factor=pixels.shape[2] / side
        )
        below.imshow((picture * (0.15 + 0.85 * light[0, 0, :, :, None])).numpy())
        right = said[number] == question.answer
        text = said[number] if right else f"{said[number]} (right: {question.answer})"
        below.set_title(
            text,
            fontsize=8,
            color=COLOURS[0] if right else "0.35",
            weight="bold" if right else None,
        )
    return figure


def report(page: Page, profile: str) -> None:
    """Accuracy by type on both sides, the losses' last tenths, and questions with pictures, answers and looks."""
    model, count = load(profile), PICTURES[profile]
    sides = {side: exam(profile, count, SEED, side) for side in SIDES}
    page.table(
        "accuracy",
        accuracy_table(sides, model),
        f"Accuracy in per cent over all questions about {count} scenes of each side, 95 % intervals over pictures; "
        "without: the same weights with the picture's tokens left out, as in part of their training; commonest: "
        "always the answer that is right most often; lead: with the picture minus without, paired by picture",
    )
    given, patches = sides["train"], SETTINGS[profile].shape.patches
    first = Exam(given.scenes, given.tokens[:DEPTH], given.asked[:DEPTH])
    page.table(
        "depth",
        depth_table(model, first, max(1, round(0.05 * patches))),
        f"Accuracy in per cent on {len(first.asked)} {SIDES['train']} when a twentieth of the {patches} patches, drawn "
        "at random, is left from a layer on: how deep the model still reads the picture",
    )
    page.table(
        "options",
        options_table(model, first),
        f"Multiple choice on the same {len(first.asked)} scenes: per cent of questions whose right letter is chosen of "
        "four (chance: 25), 95 % intervals over pictures, and how often each letter is chosen; the model never sees "
        "the letters, the options' words are scored",
    )
    page.table(
        "losses",
        loss_table(losses(profile)),
        "Loss over the last two tenths of each stage of training",
    )
    chosen = one_of_each(given, list(TYPES))
    places, asked = [place for place, _ in chosen], [question for _, question in chosen]
    seen, said = looked_at(model, given.tokens[places], asked)
    page.figure(
        "looks",
        draw_looks(given.scenes.pixels[places], seen, asked, said),
        f"A question of each type about {SIDES['train']}, the first that ask them; below the answer (blue: right) "
        f"and the picture, dark where the question's words pay no attention (mean of words, layers and heads; "
        f"pictures of {SETTINGS[profile].size} pixels, {SETTINGS[profile].shape.patches} patches)",
    )
