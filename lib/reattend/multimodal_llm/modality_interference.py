"""Modality interference: perturbations of the irrelevant modality, and fine-tuning against them.

Diagnosing and Mitigating Modality Interference in Multimodal Large Language Models (arXiv 2505.19616).
An item is *image-heavy* (the picture decides, text can mislead), *text-heavy* (a question of knowledge
beside an irrelevant picture) or *vqa* (both are needed). It is shown in several versions: the origin and
perturbations of what should not matter. Fine-tuning adds up the cross-entropy of all versions, that of all
versions under an attack on the embeddings of the irrelevant modality, and a consistency between the
prediction for the origin and for the other versions.

Nothing here knows the model: a `LanguageModel` maps input embeddings, after the projector, to logits. For a
Hugging Face model that is `lambda x: model(inputs_embeds=x, attention_mask=mask).logits`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Generator, Tensor
from torch.nn import functional as F

LanguageModel = Callable[[Tensor], Tensor]
"""Input embeddings [batch, length, width] -> logits [batch, length, vocabulary]."""

Kind = Literal["image_heavy", "text_heavy", "vqa"]
KINDS: tuple[Kind, ...] = ("image_heavy", "text_heavy", "vqa")
IGNORED = -100
"""Label of a place at which no answer stands."""


# --- versions of an item -------------------------------------------------------------------------


def text_versions(
    question: str,
    options: Sequence[str],
    distractors: Sequence[str],
    draw: random.Random,
    *,
    sentences: int = 10,
    depicted: str | None = None,
) -> dict[str, str]:
    """What an image-heavy item is asked in training: origin, misleading and unrelated text before it.

    The misleading sentence names `depicted`, by default any option, the right one included (as in the
    official data set, where no fact about an option is stored); an evaluation hands a wrong one. The
    unrelated text is a paragraph of distractors, drawn with replacement.

    Args:
        sentences: of the unrelated paragraph.
    """
    named = draw.choice(options) if depicted is None else depicted
    paragraph = " ".join(draw.choices(distractors, k=sentences))
    return {
        "origin": question,
        "misleading": f"this picture seems to depict a {named} . {question}",
        "unrelated": f"{paragraph} {question}",
    }


def picture_versions(
    real: UInt8[Tensor, "3 height width"], generator: Generator
) -> dict[str, UInt8[Tensor, "3 height width"]]:
    """Pictures beside a text-heavy item: uniform pixel noise (the origin), a real one, black, white."""
    noise = torch.randint(0, 256, real.shape, generator=generator, dtype=torch.uint8)
    return {
        "origin": noise,
        "real": real,
        "black": torch.zeros_like(real),
        "white": torch.full_like(real, 255),
    }


def delta_cp(before: Int[Tensor, " items"], after: Int[Tensor, " items"]) -> float:
    """Share of decisions that a perturbation changes (the paper's causal effect), in [0, 1].

    Raises:
        ValueError: without items.
    """
    if not len(before):
        raise ValueError("delta_cp needs at least one item")
    return (before != after).double().mean().item()


# --- adversarial embeddings ----------------------------------------------------------------------


def attack_mask(
    kinds: Sequence[str],
    visual: Bool[Tensor, "batch length"],
    labels: Int[Tensor, "batch length"],
) -> Bool[Tensor, "batch length"]:
    """Places that may be attacked: those of the irrelevant modality.

    All but picture and answer for image-heavy sequences (padding included, as in the official code), the
    picture for text-heavy ones, none for vqa.

    Raises:
        ValueError: for an unknown kind, or as many kinds as there are not sequences.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kind '{unknown.pop()}'; there are: {', '.join(KINDS)}")
    if len(kinds) != len(labels):
        raise ValueError(f"{len(kinds)} kinds for {len(labels)} sequences")

    def rows(kind: str) -> Bool[Tensor, "batch 1"]:
        return torch.tensor([k == kind for k in kinds], device=labels.device)[:, None]

    return rows("image_heavy") & ~visual & (labels == IGNORED) | rows("text_heavy") & visual


def answer_loss(
    logits: Float[Tensor, "batch length vocabulary"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the answers' tokens, each predicted one place before; mean over all of them."""
    asked = labels[:, 1:] != IGNORED
    return F.cross_entropy(logits[:, :-1][asked], labels[:, 1:][asked])


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on embeddings.

    Attributes:
        radius: largest change of a coordinate, epsilon.
        rate: alpha, by which the raw gradient is multiplied.
        steps: S; the published settings take one to four; 0 leaves uniform noise.
    """

    radius: float
    rate: float
    steps: int = 1


def adversarial_change(
    model: LanguageModel,
    embeddings: Float[Tensor, "batch length width"],
    labels: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    attack: Attack,
    generator: Generator | None = None,
) -> Float[Tensor, "batch length width"]:
    """delta M: what the attack adds to the embeddings; constant to autograd, zero outside the mask.

    delta starts uniform in the ball and rises `attack.steps` times: clip(delta + alpha dCE/ddelta), with the
    raw gradient of the answers' loss at sg(E) + delta M. The model's parameters get no gradient.
    """
    fixed, places = embeddings.detach(), mask[..., None].to(embeddings)
    start = torch.rand(embeddings.shape, generator=generator).to(embeddings)
    change = attack.radius * (2 * start - 1)
    for _ in range(attack.steps):
        change.requires_grad_(True)
        loss = answer_loss(model(fixed + change * places), labels)
        (slope,) = torch.autograd.grad(loss, change)
        change = (change.detach() + attack.rate * slope).clamp(-attack.radius, attack.radius)
    return change * places


# --- consistency ---------------------------------------------------------------------------------

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Logits of the origin [answer, vocabulary] and of its versions [versions, answer, vocabulary] -> scalar."""
FLOOR = 1e-6
"""Least probability of a version, before it is normalised again."""


def _floored(logits: Float[Tensor, "*any vocabulary"]) -> Float[Tensor, "*any vocabulary"]:
    probabilities = logits.softmax(-1).clamp(min=FLOOR)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _kl(
    p: Float[Tensor, "*#any vocabulary"], log_q: Float[Tensor, "*#any vocabulary"]
) -> Float[Tensor, "*any"]:
    return (p * (p.log() - log_q)).sum(-1)


def kl_consistency(
    origin: Float[Tensor, "answer vocabulary"],
    versions: Float[Tensor, "versions answer vocabulary"],
) -> Float[Tensor, ""]:
    """KL(q || p) summed over versions and answer places; the origin's p is constant to autograd."""
    return _kl(_floored(versions), origin.detach().log_softmax(-1)).sum()


def js_consistency(
    origin: Float[Tensor, "answer vocabulary"],
    versions: Float[Tensor, "versions answer vocabulary"],
) -> Float[Tensor, ""]:
    """(KL(m || p) + KL(m || q)) / 2 with m = (p + q) / 2: the official code's form, with the origin constant.

    That is not the Jensen-Shannon divergence (`jensen_shannon`), whose terms are KL(p || m) and KL(q || m):
    it has no upper bound. The first term is summed over versions, the second averaged over them.
    """
    origin = origin.detach()
    middle = (_floored(origin) + _floored(versions)) / 2
    to_origin = _kl(middle, origin.log_softmax(-1)).sum()
    to_versions = _kl(middle, versions.log_softmax(-1)).sum() / len(versions)
    return (to_origin + to_versions) / 2


def jensen_shannon(
    origin: Float[Tensor, "answer vocabulary"],
    versions: Float[Tensor, "versions answer vocabulary"],
) -> Float[Tensor, ""]:
    """(KL(p || m) + KL(q || m)) / 2, at most log 2; summed like `kl_consistency`, the origin constant."""
    p, q = _floored(origin.detach()), _floored(versions)
    log_middle = ((p + q) / 2).log()
    return (_kl(p.expand_as(q), log_middle) + _kl(q, log_middle)).sum() / 2


def answer_logits(
    logits: Float[Tensor, "length vocabulary"],
    labels: Int[Tensor, " length"],
    released: bool = False,
) -> Float[Tensor, "answer vocabulary"]:
    """Logits that predict an answer's tokens; in the released form those that follow each of them.

    The official code shifts labels for its cross-entropy, but not for its consistency: with one-token
    answers it compares what comes after the answer, a place that is never trained.
    """
    asked = labels != IGNORED
    return logits[asked] if released else logits[:-1][asked[1:]]


def consistency(
    logits: Float[Tensor, "batch length vocabulary"],
    labels: Int[Tensor, "batch length"],
    items: Int[Tensor, " batch"],
    origins: Int[Tensor, " items"],
    divergence: Divergence,
    *,
    references: Int[Tensor, " items"] | None = None,
    released: bool = False,
) -> Float[Tensor, ""]:
    """Divergence between each item's origin and its other versions, mean over the items that have any.

    Args:
        items: number of the item that each sequence shows.
        origins: sequence that is the origin of each item.
        references: sequence with which each item's versions are compared, if not its own origin.
        released: whether to read the places that the official code reads; see `answer_logits`.
    """
    references = origins if references is None else references
    rest = torch.ones(len(items), dtype=torch.bool, device=items.device)
    rest[origins] = False
    parts = []
    for item in items[rest].unique().tolist():
        rows = (rest & (items == item)).nonzero().flatten().tolist()
        versions = torch.stack([answer_logits(logits[r], labels[r], released) for r in rows])
        reference = int(references[item])
        parts.append(
            divergence(answer_logits(logits[reference], labels[reference], released), versions)
        )
    return torch.stack(parts).mean() if parts else logits.new_zeros(())


# --- the whole loss ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Versions of several items, one a row.

    Attributes:
        embeddings: of the whole sequence, picture and text, after the projector.
        labels: answer tokens at their own places (not shifted), `IGNORED` elsewhere.
        visual: places of the picture.
        kinds: of each sequence's item.
        items: number of the item that each sequence shows, from 0.
        origins: sequence that is the origin of each item.
    """

    embeddings: Float[Tensor, "batch length width"]
    labels: Int[Tensor, "batch length"]
    visual: Bool[Tensor, "batch length"]
    kinds: Sequence[Kind]
    items: Int[Tensor, " batch"]
    origins: Int[Tensor, " items"]


@dataclass(frozen=True)
class Objective:
    """Terms of the loss beside the answers' cross-entropy.

    Attributes:
        divergence: of the consistency; None: none.
        weight: lambda, of the consistency.
        released: see `answer_logits`.
    """

    attack: Attack | None = None
    divergence: Divergence | None = None
    weight: float = 1.0
    released: bool = False


@dataclass(frozen=True)
class Losses:
    """The terms and their sum: total = answers + attacked + weight * consistency."""

    total: Float[Tensor, ""]
    answers: Float[Tensor, ""]
    attacked: Float[Tensor, ""]
    consistency: Float[Tensor, ""]


def interference_loss(
    model: LanguageModel,
    batch: Batch,
    objective: Objective,
    *,
    references: Int[Tensor, " items"] | None = None,
    generator: Generator | None = None,
) -> Losses:
    """The loss of section 4: answers, answers under attack, consistency.

    The attacked half starts from detached embeddings, so it trains the language model and neither projector
    nor word embeddings as inputs. With an attack, attacked sequences count as versions of their items.

    Args:
        references: see `consistency`.
        generator: of the attack's start, on the CPU.
    """
    logits, labels, items = model(batch.embeddings), batch.labels, batch.items
    answers = answer_loss(logits, labels)
    attacked = steadiness = logits.new_zeros(())
    if objective.attack is not None:
        mask = attack_mask(batch.kinds, batch.visual, labels)
        change = adversarial_change(
            model, batch.embeddings, labels, mask, objective.attack, generator
        )
        beside = model(batch.embeddings.detach() + change)
        attacked = answer_loss(beside, labels)
        logits, labels, items = (
            torch.cat(p) for p in ((logits, beside), 2 * (labels,), 2 * (items,))
        )
    if objective.divergence is not None:
        steadiness = consistency(
            logits,
            labels,
            items,
            batch.origins,
            objective.divergence,
            references=references,
            released=objective.released,
        )
    total = answers + attacked + objective.weight * steadiness
    return Losses(total, answers, attacked, steadiness)
