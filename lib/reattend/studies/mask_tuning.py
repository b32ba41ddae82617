"""Few-shot classification with a frozen picture-text model: what is asked of R-AMT and of its rivals.

Scores are accuracies in per cent and NLL in nats, of pictures in the joint space against one vector a class.
`pictures`, `classes`, `joint`, `width` name shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from reattend.backbones.trained.r_amt import (
    ARMS,
    BASE,
    Run,
    Seed,
    Setting,
    Tuned,
    few_shots,
    hand_prompts,
    learnt_prompts,
    masked_features,
    new_masks,
    tune,
    views_of,
)
from reattend.data.shifted_objects import Objects
from reattend.trunks.image_text import ImageTextModel
from reattend.vision_language.r_amt import (
    NORM_WEIGHT,
    WeightMasks,
    imitation_loss,
    unpack_bits,
)


@dataclass(frozen=True)
class Labelled:
    """What classifiers of frozen features see of some pictures."""

    states: Float[Tensor, "pictures width"]  # of [CLS], for the linear probe
    image: Float[Tensor, "pictures joint"]
    labels: Int[Tensor, " pictures"]


@torch.no_grad()
def encoded(model: ImageTextModel, objects: Objects) -> Labelled:
    """Frozen features of pictures."""
    states = model.image(objects.pixels)[:, 0]
    return Labelled(states, F.normalize(model.image_map(states), dim=-1), objects.nouns)


def accuracy(logits: Float[Tensor, "pictures classes"], labels: Int[Tensor, " pictures"]) -> float:
    """Per cent of the pictures whose best class is theirs."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def marks(
    logits: Float[Tensor, "pictures classes"], labels: Int[Tensor, " pictures"]
) -> dict[str, float]:
    """Accuracy in per cent and NLL in nats."""
    nats = F.cross_entropy(logits, labels).item()
    return {"accuracy": accuracy(logits, labels), "NLL": nats}


# --- rivals on frozen features ---------------------------------------------------------------------


def linear_probe(
    shots: Labelled,
    validation: Labelled,
    tested: Labelled,
    strengths: Sequence[float] = (0.001, 0.01, 0.1, 1.0, 10.0),
) -> Float[Tensor, "pictures classes"]:
    """Log probabilities of logistic regression; the inverse L2 strength that does best on validation."""

    def fitted(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=200).fit(standard(shots), shots.labels)

    mean, deviation = shots.states.mean(0), shots.states.std(0) + 1e-6

    def standard(pictures: Labelled) -> np.ndarray:
        return ((pictures.states - mean) / deviation).cpu().numpy()

    probes = [fitted(strength) for strength in strengths]
    best = max(probes, key=lambda probe: probe.score(standard(validation), validation.labels))
    return torch.from_numpy(best.predict_log_proba(standard(tested))).float()


def tip_adapter(
    shots: Labelled,
    views: Labelled,
    validation: Labelled,
    tested: Labelled,
    classes: Float[Tensor, "classes joint"],
    scale: float,
    *,
    steps: int,
    rate: float = 1e-3,
    ratios: Sequence[float] = (1.0, 3.0, 10.0, 30.0),
    sharpnesses: Sequence[float] = (1.0, 3.0, 10.0, 30.0),
) -> Float[Tensor, "pictures classes"]:
    """TIP-Adapter-F (2111.03930): zero-shot logits plus those of a cache whose keys are then fine-tuned.

    Keys start as the features of `shots`; the cache says alpha exp(-beta (1 - image . key)) one-hot(label).
    alpha (`ratios`) and beta (`sharpnesses`) are those that do best on validation before fine-tuning on
    `views`; the keys of the last step count, unless those of the start do better on validation.
    """
    values = F.one_hot(shots.labels, len(classes)).to(shots.image)

    def logits(image: Tensor, keys: Tensor, alpha: float, beta: float) -> Tensor:
        return scale * image @ classes.T + alpha * (-beta * (1 - image @ keys.T)).exp() @ values

    def right(keys: Tensor, alpha: float, beta: float) -> float:
        return accuracy(logits(validation.image, keys, alpha, beta), validation.labels)

    start = shots.image
    grid = [(alpha, beta) for alpha in ratios for beta in sharpnesses]
    alpha, beta = max(grid, key=lambda pair: right(start, *pair))
    keys = start.clone().requires_grad_()
    optimiser = torch.optim.AdamW([keys], lr=rate, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(logits(views.image, keys, alpha, beta), views.labels).backward()
        optimiser.step()
        schedule.step()
    tuned = keys.detach()
    chosen = tuned if right(tuned, alpha, beta) >= right(start, alpha, beta) else start
    return logits(tested.image, chosen, alpha, beta)


# --- masks -----------------------------------------------------------------------------------------


def masks_of(model: ImageTextModel, place: str, values: Sequence[Tensor]) -> WeightMasks:
    """Masks of the image tower with this M."""
    masks = new_masks(model, place).to(model.log_scale.device)
    for mine, value in zip(masks.values, values, strict=True):
        mine.data.copy_(value)
    return masks


@torch.no_grad()
def masked_marks(
    model: ImageTextModel,
    masks: WeightMasks,
    classes: Float[Tensor, "classes joint"],
    objects: Objects,
    first: int = 0,
) -> dict[str, float]:
    """Accuracy and NLL under masks; class 0 of `classes` is the noun number `first`."""
    image = masked_features(model, masks, objects.pixels)
    return marks(model.scale * image @ classes.T, objects.nouns - first)


def shuffled(masks: WeightMasks, seed: int) -> WeightMasks:
    """The same number of zeros in each matrix, elsewhere; the masks themselves stay."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(masks)
    for value in moved.values:
        order = torch.randperm(value.numel(), generator=generator)
        value.data = value.data.flatten()[order.to(value.device)].view_as(value)
    return moved


@torch.no_grad()
def along_the_path(
    model: ImageTextModel,
    place: str,
    tuned: Tuned,
    objects: Objects,
) -> tuple[Float[np.ndarray, " checks"], Float[np.ndarray, " checks"]]:
    """Share of zeros in per cent, and accuracy, at the start and at every check of a training."""
    masks, classes = new_masks(model, place).to(model.log_scale.device), hand_prompts(model)
    shapes = [value.shape for value in masks.values]
    zeros, found = [], []
    for packed in tuned.path:
        masks.set_bits(unpack_bits(packed, shapes))
        zeros.append(100 * masks.zeros())
        if found and zeros[-1] == 0:  # no bit has flipped yet
            found.append(found[0])
        else:
            found.append(masked_marks(model, masks, classes, objects)["accuracy"])
    return np.array(zeros), np.array(found)


def zeros_at(
    zeros: Float[np.ndarray, " checks"], scores: Float[np.ndarray, " checks"], part: float = 0.9
) -> float:
    """Smallest share of zeros at which `part` of the gain of the last check over the first is reached."""
    reached = scores >= scores[0] + part * (scores[-1] - scores[0])
    return float(zeros[reached].min())


def one_step(setting: Setting, found: Seed, run: Run, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """M of one weight after a training, and what both losses say of it on all shots: M, g_a, g_b."""
    model, arm = found.model, ARMS[run.arm]
    masks = masks_of(model, arm.place, found.tuned[run.key].values)
    shots = few_shots(setting, found.seed, model.log_scale.device).shots(run.shots)
    classes = hand_prompts(model)
    logits = model.scale * masked_features(model, masks, shots.pixels) @ classes.T
    with torch.no_grad():
        before = model.scale * model.image_tokens(shots.pixels)[:, 0] @ classes.T
    values = masks.values[masks.names.index(name)]
    old = torch.autograd.grad(imitation_loss(logits, before), values, retain_graph=True)[0]
    task = F.cross_entropy(logits, shots.nouns) + NORM_WEIGHT * masks.norms()
    own = torch.autograd.grad(task, values)[0]
    return values.detach().cpu(), own.cpu(), old.cpu()


def harmonic(base: float, new: float) -> float:
    """Harmonic mean of two accuracies, 0 where one is 0."""
    return 2 * base * new / (base + new) if base and new else 0.0


# --- all of it for one seed ------------------------------------------------------------------------


@dataclass(frozen=True)
class Domains:
    """Test pictures in the shifted domain, and the same ones unshifted (what was known before)."""

    target: Objects
    source: Objects

    def both(
        self, model: ImageTextModel, masks: WeightMasks, classes: Float[Tensor, "classes joint"]
    ) -> dict[str, float]:
        """Marks in both domains and the share of zeros, per cent."""
        old = masked_marks(model, masks, classes, self.source)
        found = masked_marks(model, masks, classes, self.target)
        return (
            found
            | {f"source {name}": value for name, value in old.items()}
            | {"zeros": 100 * masks.zeros()}
        )

    def base_and_new(
        self, model: ImageTextModel, masks: WeightMasks, classes: Float[Tensor, "classes joint"]
    ) -> dict[str, float]:
        """Accuracy among the base classes, among the new ones, both in the target domain, and their mean."""
        known = self.target.nouns < BASE
        base = masked_marks(model, masks, classes[:BASE], self.target[known])["accuracy"]
        new = masked_marks(model, masks, classes[BASE:], self.target[~known], BASE)["accuracy"]
        return {"base": base, "new": new, "harmonic": harmonic(base, new)}


def rivals(
    setting: Setting, found: Seed, tests: Domains, steps: int
) -> list[dict[str, float | str]]:
    """Classifiers of frozen features: linear probe and TIP-Adapter, on each number of shots that masks saw."""
    model, drawn, rows = found.model, few_shots(setting, found.seed), []
    classes, tested = hand_prompts(model), encoded(model, tests.target)
    for count in sorted({run.shots for run in setting.runs(found.seed)}):
        shots, validation = drawn.shots(count), encoded(model, drawn.validation(count))
        views = encoded(model, views_of(shots, found.seed))
        seen, scale = (encoded(model, shots), views, validation, tested), model.scale.item()
        scores = {
            "linear probe": linear_probe(views, validation, tested),
            "TIP-Adapter": tip_adapter(*seen, classes, scale, steps=steps),
        }
        for arm, logits in scores.items():
            rows.append({"arm": arm, "shots": count} | marks(logits, tested.labels))
    return rows


def tuned_marks(
    setting: Setting, found: Seed, tests: Domains
) -> tuple[list[dict[str, float | str]], list[dict[str, float | str]]]:
    """Every training of a seed, and zero-shot and shuffled masks: in both domains, and from base to new."""
    model, most = found.model, setting.few[-1]
    hand, none = hand_prompts(model), new_masks(model, "AMT")
    rows = [{"arm": "zero-shot", "shots": 0} | tests.both(model, none, hand)]
    runs, split = setting.runs(found.seed), []
    if any(run.base for run in runs):
        split.append({"arm": "zero-shot"} | tests.base_and_new(model, none, hand))
    for run in runs:
        if run.arm == "CoOp":
            masks, classes = none, learnt_prompts(model, found.contexts[run.key])
        else:
            arm = ARMS[run.arm]
            masks = masks_of(model, arm.place, found.tuned[run.key].values)
            classes = hand
            if arm.learnt_prompts:
                classes = learnt_prompts(model, found.contexts[Run("CoOp", run.shots).key])
        if run.base:
            split.append({"arm": run.arm} | tests.base_and_new(model, masks, classes))
        else:
            rows.append({"arm": run.arm, "shots": run.shots} | tests.both(model, masks, classes))
        if run.arm == "R-AMT" and run.shots == most:
            moved = shuffled(masks, seed=0)
            if run.base:
                split.append({"arm": "shuffled"} | tests.base_and_new(model, moved, classes))
            else:
                rows.append({"arm": "shuffled", "shots": most} | tests.both(model, moved, classes))
    return rows, split


# --- gradient dropout, asked of seeds that lack its rivals -----------------------------------------

DROPOUT = ("R-AMT", "AMT", "thinned")
"""Gradient dropout, none, and as many entries dropped at random; each finds what it needs before it."""


def with_dropout(setting: Setting, found: Seed, counts: Sequence[int]) -> Seed:
    """The seed with all of `DROPOUT` on these numbers of shots: what it has stays, the rest is trained.

    All three see the same shots in the same order and views, as in the build.
    """
    model, tuned = found.model, dict(found.tuned)
    drawn, hand = few_shots(setting, found.seed, model.log_scale.device), hand_prompts(model)
    for run in (Run(arm, count) for count in counts for arm in DROPOUT):
        if run.key in tuned:
            continue
        arm, extra = ARMS[run.arm], {}
        if arm.gradients == "thinned":
            extra = {"dropped": tuned[Run("R-AMT", run.shots).key].dropped}
        shots = drawn.shots(run.shots)
        tuned[run.key] = tune(model, hand, shots, arm, setting.plan, found.seed, **extra)
    return replace(found, tuned=tuned)


def dropout_marks(
    found: Seed, tests: Domains, counts: Sequence[int]
) -> list[dict[str, float | str]]:
    """Every arm of `DROPOUT` on each of these numbers of shots, in both domains."""
    model, hand, rows = found.model, hand_prompts(found.model), []
    for run in (Run(arm, count) for count in counts for arm in DROPOUT):
        masks = masks_of(model, ARMS[run.arm].place, found.tuned[run.key].values)
        rows.append({"arm": run.arm, "shots": run.shots} | tests.both(model, masks, hand))
    return rows
