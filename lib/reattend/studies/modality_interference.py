"""Questions to small vision-language models in clean and perturbed versions, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reattend.backbones.trained.modality_interference import (
    Arm,
    Data,
    Maker,
    Sequences,
    SmallVLM,
    arm_batches,
)
from reattend.data.interference_items import (
    NATURAL_COLOURS,
    NOUNS,
    Question,
    colour_question,
    kind_question,
    nature_question,
    place_question,
    sentences,
)
from reattend.multimodal_llm.modality_interference import (
    answer_loss,
    attack_mask,
    delta_cp,
    text_versions,
)

HEARSAY = "someone said that it could be a {} ."
"""A misleading sentence in another wording than that of the training."""
SEEN = {"image_heavy": ("unrelated", "misleading"), "text_heavy": ("real", "black", "white")}
"""Perturbations that training knows, by kind of item."""
UNSEEN = {"image_heavy": ("other corpus", "hearsay"), "text_heavy": ("words", "screens")}
"""Perturbations that it does not know."""


# --- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model makes of the options of each item.

    Attributes:
        scores: log-probabilities of the options.
        right: position of the right one.
    """

    scores: Float[Tensor, "items 4"]
    right: Int[Tensor, " items"]

    @property
    def choices(self) -> Int[Tensor, " items"]:
        """The likeliest option: no answer can be unparsable."""
        return self.scores.argmax(1)

    @property
    def correct(self) -> Float[Tensor, " items"]:
        """100 for a right choice, 0 for a wrong one: the mean is an accuracy in per cent."""
        return 100.0 * (self.choices == self.right)

    @property
    def log_odds(self) -> Float[Tensor, " items"]:
        """Of the right option against the best other, nats."""
        place = self.right[:, None]
        others = self.scores.scatter(1, place, float("-inf"))
        return self.scores.gather(1, place)[:, 0] - others.max(1).values


@torch.no_grad()
def answers(model: SmallVLM, asked: Sequences, rows: int = 32) -> Answers:
    """Scores of the options of every sequence, at the place that predicts the answer.

    Args:
        rows: computed together; with few of them the states stay in the processor's cache.
    """
    parts = []
    for some in torch.arange(len(asked.tokens)).split(rows):
        part = replace(
            asked,
            pictures=asked.pictures[some],
            tokens=asked.tokens[some],
            options=asked.options[some],
            right=asked.right[some],
            kinds=tuple(asked.kinds[row] for row in some.tolist()),
            items=asked.items[some],
        )
        embeddings = model.embed(part.pictures, part.tokens)
        logits = part.reader(model)(embeddings)[:, -2].log_softmax(-1)
        parts.append(logits.gather(1, part.options))
    return Answers(torch.cat(parts), asked.right)


# --- test items ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TestSet:
    """The same items in several conditions.

    Attributes:
        conditions: name -> sequences, one an item.
        groups: what an item is about: items of one group are one unit.
        pictures: role and index of the picture that each condition shows, by name and item.
        texts: what each condition says before the options, by name and item.
    """

    __test__ = False  # pytest: not a test class
    conditions: dict[str, Sequences]
    groups: list[str]
    pictures: dict[str, list[tuple[str, int]]]
    texts: dict[str, list[str]]


@dataclass(frozen=True)
class _Shown:
    """One condition of one item, before its noise is drawn."""

    role: str
    index: int
    text: str


def _laid_out(
    maker: Maker,
    kind: str,
    items: Sequence[tuple[str, Question, dict[str, _Shown]]],
) -> TestSet:
    """Items as (group, question, condition -> what is shown); one picture has one noise in all conditions."""
    tokens: dict[tuple[int, str, int], Tensor] = {}
    conditions, pictures, texts = {}, {}, {}
    for name in items[0][2]:
        for number, (_, asked, versions) in enumerate(items):
            shown = versions[name]
            key = (number, shown.role, shown.index)
            if key not in tokens:
                tokens[key] = maker.picture(shown.role, shown.index)
            maker.add(kind, asked, [(tokens[key], shown.text)])
        conditions[name] = maker.sequences()
        pictures[name] = [(v[name].role, v[name].index) for _, _, v in items]
        texts[name] = [v[name].text for _, _, v in items]
    return TestSet(conditions, [group for group, _, _ in items], pictures, texts)


def image_heavy(data: Data, repeats: int, seed: int) -> TestSet:
    """Which kind is shown: without text before the question, after training's kinds of text, after unseen ones.

    "misleading" and "hearsay" name a wrong option. "blind" shows another scene. Groups are cut-outs.
    """
    maker, paragraph, items = Maker(data, seed), data.setting.paragraph, []
    draw, foreign = maker.draw, sentences("anarchism")
    for index in [i for i in range(len(data.test)) for _ in range(repeats)]:
        asked = kind_question(data.test.kinds[index], draw)
        wrong = draw.choice(asked.wrong)
        texts = text_versions(
            asked.text, asked.options, data.distractors, draw, sentences=paragraph, depicted=wrong
        )
        texts["other corpus"] = f"{' '.join(draw.choices(foreign, k=paragraph))} {asked.text}"
        texts["hearsay"] = f"{HEARSAY.format(wrong)} {asked.text}"
        shown = {name: _Shown("test", index, text) for name, text in texts.items()}
        shown["blind"] = _Shown("test", draw.randrange(len(data.test)), asked.text)
        items.append((data.test.identities[index], asked, shown))
    return _laid_out(maker, "image_heavy", items)


def text_heavy(data: Data, repeats: int, seed: int) -> TestSet:
    """Which colour a thing has by nature, beside noise (the origin), real, blank and unseen pictures.

    The real picture shows something of another colour that is among the options. Groups are nouns.
    """
    maker, items = Maker(data, seed), []
    draw, features = maker.draw, data.features
    for noun in [n for n in NOUNS for _ in range(repeats)]:
        index = draw.choice(
            [
                i
                for i, c in enumerate(data.test.colours)
                if c in NATURAL_COLOURS and c != NOUNS[noun]
            ]
        )
        asked = nature_question(noun, draw, competing=data.test.colours[index])
        roles = {
            "origin": "noise",
            "black": "black",
            "white": "white",
            "words": "words",
            "screens": "screens",
        }
        shown = {
            name: _Shown(role, draw.randrange(len(features[role])), asked.text)
            for name, role in roles.items()
        }
        shown["real"] = _Shown("test", index, asked.text)
        items.append((noun, asked, shown))
    return _laid_out(maker, "text_heavy", items)


def vqa(data: Data, repeats: int, seed: int) -> TestSet:
    """Colour and place of every test scene; "blind" shows another one. Groups are cut-outs."""
    maker, items = Maker(data, seed), []
    for index in [i for i in range(len(data.test)) for _ in range(repeats)]:
        for asked in (
            colour_question(data.test.colours[index], maker.draw),
            place_question(data.test.places[index], maker.draw),
        ):
            other = maker.draw.randrange(len(data.test))
            shown = {
                "origin": _Shown("test", index, asked.text),
                "blind": _Shown("test", other, asked.text),
            }
            items.append((data.test.identities[index], asked, shown))
    return _laid_out(maker, "vqa", items)


def by_group(values: Float[Tensor, " items"], groups: Sequence[str]) -> dict[str, float]:
    """Mean of each group's items, groups sorted."""
    found: dict[str, list[float]] = {}
    for group, value in zip(groups, values.tolist(), strict=True):
        found.setdefault(group, []).append(value)
    return {group: float(np.mean(found[group])) for group in sorted(found)}


# --- the attack ----------------------------------------------------------------------------------


def attack_slopes(
    model: SmallVLM, data: Data, batches: int, seed: int
) -> dict[str, Float[Tensor, " places"]]:
    """|dCE/dE| of every attacked coordinate of an arm's batches, by kind of item."""
    rows = arm_batches(Maker(data, seed), Arm())
    found: dict[str, list[Tensor]] = {}
    for _ in range(batches):
        drawn = next(rows)
        batch = drawn.batch(model)
        embeddings = batch.embeddings.detach().requires_grad_(True)
        loss = answer_loss(drawn.reader(model)(embeddings), batch.labels)
        (slope,) = torch.autograd.grad(loss, embeddings)
        mask = attack_mask(batch.kinds, batch.visual, batch.labels)
        for kind in ("image_heavy", "text_heavy"):
            mine = mask & torch.tensor([k == kind for k in batch.kinds])[:, None]
            found.setdefault(kind, []).append(slope[mine].abs().flatten())
    return {kind: torch.cat(parts) for kind, parts in found.items()}


# --- tables --------------------------------------------------------------------------------------

Asked = dict[tuple[str, int, str, str], Answers]
"""Answers by model, seed, kind of item and condition."""


def ask_all(models: Mapping[str, Sequence[SmallVLM]], tests: Mapping[str, TestSet]) -> Asked:
    """Every model's answers in every condition."""
    return {
        (name, seed, kind, condition): answers(model, asked)
        for name, seeds in models.items()
        for seed, model in enumerate(seeds)
        for kind, test in tests.items()
        for condition, asked in test.conditions.items()
    }


def score_table(found: Asked) -> pd.DataFrame:
    """One row a model, seed, kind and condition: accuracy in per cent, log-odds in nats, delta_cp.

    delta_cp is the share of choices that differ from those of the origin.
    """
    rows = []
    for (name, seed, kind, condition), given in found.items():
        origin = found[name, seed, kind, "origin"]
        rows.append(
            {
                "model": name,
                "seed": seed,
                "kind": kind,
                "condition": condition,
                "accuracy": given.correct.mean().item(),
                "log_odds": given.log_odds.mean().item(),
                "delta_cp": delta_cp(origin.choices, given.choices),
            }
        )
    return pd.DataFrame(rows)
