"""MoA's experiment: calibration texts, prompts with early needles, plans of four search spaces, true losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn

from reattend.attention.blocks import block_count
from reattend.attention.host import attach
from reattend.data.long_tasks import prose_windows
from reattend.data.needles import Haystack, NeedleSample, needle_samples
from reattend.evidence.intervals import mean
from reattend.long_context.moa import (
    Item,
    MoA,
    Plan,
    Problem,
    Profile,
    Rule,
    candidate_rules,
    pareto_choices,
    profile_influence,
)
from reattend.studies.long_context import Answered

TASK = "magic_numbers"

METRICS = ["answer NLL", "prose NLL", "score"]

Arm = tuple[str, float]
"""A way to choose the plan, and its density."""


# Texts


def answered_prompts(
    haystack: Haystack, length: int, count: int, seed: int, distractors: int, latest: float
) -> list[Item]:
    """Prompts of `early_needles` with their answers behind them, `length` tokens together; the answers are scored."""
    behind = len(haystack.encode(" 12345"))  # all answers are five digits
    found = early_needles(haystack, length - behind, count, seed, distractors, latest)
    scored = torch.arange(length) >= length - behind
    return [Item(torch.tensor([*sample.prompt, *sample.answer]), scored) for sample in found]


def prose(haystack: Haystack, length: int, count: int, seed: int) -> list[Item]:
    """Windows of plain prose; every fourth token is scored."""
    scored = torch.arange(length) % 4 == 3
    return [Item(window, scored) for window in prose_windows(haystack, length, count, seed)]


def early_needles(
    haystack: Haystack, length: int, count: int, seed: int, distractors: int, latest: float
) -> list[NeedleSample]:
    """Prompts whose asked needle lies in the first `latest` of the prompt, at even depths."""
    found = needle_samples(haystack, TASK, length, round(count / latest), seed, distractors)
    return list(islice(found, count))


# Plans


class Planner:
    """Plans of one model, from profiles at several lengths.

    Attributes:
        lengths: of the profiles, in tokens.
        longest: length at which a plan shall have its density too.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        longest: int,
        *,
        block_size: int,
        alphas: int,
        least: float,
        intervals: int,
    ) -> None:
        self.lengths, self.longest, self.block_size = list(lengths), longest, block_size
        self.least, self.intervals = least, intervals
        self.shares = candidate_rules(self.lengths, longest, alphas=1)
        self.elastic = candidate_rules(self.lengths, longest, alphas=alphas)

    def uniform(self, model: nn.Module, density: float) -> Plan:
        """StreamingLLM of that density, sinks included."""
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        rule = Rule(-self.block_size, density)
        return Plan.uniform(rule, layers, heads, block_size=self.block_size)

    def windows(self, rules: Sequence[Rule], length: int) -> torch.Tensor:
        """Blocks of each rule's window at a length."""
        blocks = block_count(length, self.block_size)
        return torch.tensor([rule.window(blocks, self.block_size) for rule in rules])

    def densities(
        self, rules: Sequence[Rule], lengths: Sequence[int]
    ) -> Float[np.ndarray, "lengths rules"]:
        """Share of the cache that each rule keeps at each length, sinks included."""
        blocks = [block_count(n, self.block_size) for n in lengths]
        kept = [
            (self.windows(rules, n) + 1).clamp_max(b) / b
            for n, b in zip(lengths, blocks, strict=True)
        ]
        return torch.stack(kept).double().numpy()

    def costs(
        self, profiles: Sequence[Profile], rules: Sequence[Rule], lengths: Sequence[int]
    ) -> Float[np.ndarray, "lengths layers heads rules"]:
        """Predicted rise of the loss under each rule at each length."""
        found = [p.costs(self.windows(rules, n)) for p, n in zip(profiles, lengths, strict=True)]
        return torch.stack(found).numpy()

    def search(
        self, profiles: Mapping[int, Profile], density: float, space: str = "elastic"
    ) -> list[Plan]:
        """The plans of a search space: "layers", "heads" (spans are shares of the prompt) or "elastic".

        Elastic rules are chosen over all profiled lengths, the others at the longest of them.
        """
        elastic = space == "elastic"
        rules = self.elastic if elastic else self.shares
        lengths = self.lengths if elastic else self.lengths[-1:]
        problem = Problem(
            costs=self.costs([profiles[n] for n in lengths], rules, lengths),
            densities=self.densities(rules, [*lengths, self.longest] if elastic else lengths),
            density=density,
            least=self.least,
            rules_per_layer=1 if space == "layers" else 2,
        )
        choices = pareto_choices(problem, self.intervals)
        return [Plan.of(rules, choice, block_size=self.block_size) for choice in choices]


@dataclass(frozen=True)
class Calibration:
    """One draw of calibration texts, of the kinds "answers" (answered prompts), "prose" and, of both together, "both".

    Attributes:
        profiles: kind -> length -> profile.
        held_out: kind -> texts of a length that was not profiled.
    """

    profiles: dict[str, dict[int, Profile]]
    held_out: dict[str, list[Item]]


def calibrate(
    model: nn.Module,
    haystack: Haystack,
    planner: Planner,
    *,
    kinds: Sequence[str],
    texts: int,
    validation: int,
    held_out: int,
    seed: int,
    distractors: int,
    latest: float,
) -> Calibration:
    """Profiles on `texts` texts of every length and kind, and `held_out` texts of the length `validation`.

    Args:
        kinds: "answers", "prose" or the two, which give "both" as well.
    """
    made = {
        "answers": lambda *size: answered_prompts(haystack, *size, seed, distractors, latest),
        "prose": lambda *size: prose(haystack, *size, seed),
    }
    profiles: dict[str, dict[int, Profile]] = {kind: {} for kind in kinds}
    for length in planner.lengths:
        for kind in kinds:
            items = made[kind](length, texts)
            (profiles[kind][length],) = profile_influence(
                model, items, block_size=planner.block_size
            )
    held = {kind: made[kind](validation, held_out) for kind in kinds}
    if len(kinds) > 1:
        profiles["both"] = {
            n: Profile(sum(profiles[kind][n].influence for kind in kinds) / len(kinds))
            for n in planner.lengths
        }
        held["both"] = [items[0] for items in held.values()]
    return Calibration(profiles, held)


def best_plan(
    model: nn.Module,
    planner: Planner,
    calibration: Calibration,
    kind: str,
    density: float,
    space: str = "elastic",
) -> tuple[Plan, list[float]]:
    """The plan of a space and kind of texts that is best on held-out texts, and the true losses of all on its front.

    Texts are not read where the front has one plan.
    """
    plans = planner.search(calibration.profiles[kind], density, space)
    if len(plans) == 1:
        return plans[0], []
    items = calibration.held_out[kind]
    losses = [float(np.mean([true_loss(model, item, plan) for item in items])) for plan in plans]
    return plans[int(np.argmin(losses))], losses


def random_plans(
    planner: Planner, model: nn.Module, density: float, count: int, seed: int
) -> list[Plan]:
    """Plans of one density at the longest profiled length whose rules, shares of the prompt, are drawn at random.

    The program itself draws them: under random costs it picks any plan that keeps to the bounds.
    """
    generator = np.random.default_rng(seed)
    config, rules = model.config, planner.shares
    shape = (1, config.num_hidden_layers, config.num_key_value_heads, len(rules))
    densities = planner.densities(rules, planner.lengths[-1:])
    problems = [
        Problem(generator.random(shape), densities, density, planner.least, shape[2])
        for _ in range(count)
    ]
    choices = [problem.solve(0, [None]) for problem in problems]
    return [Plan.of(rules, choice, block_size=planner.block_size) for choice in choices]


# True losses


@torch.inference_mode()
def read(model: nn.Module, sample: NeedleSample, plan: Plan | None) -> Answered:
    """A prompt and its given answer read in one pass under a plan, with the prompt's spans; None: densely."""
    text = torch.tensor([*sample.prompt, *sample.answer], device=model.device)
    late = torch.tensor(sample.late_prose(), device=model.device)
    scored = torch.tensor(sample.scored, device=model.device)
    length = len(sample.prompt)
    answer = torch.arange(length, len(text), device=model.device)
    asked = torch.cat([late, answer])
    with nullcontext() if plan is None else attach(model, MoA(plan=plan, length=length)):
        # A token is predicted one position before it.
        logits = model(text[None, :-1], logits_to_keep=asked - 1, use_cache=False).logits[0].float()
    prose_nll = F.cross_entropy(logits[: len(late)], text[late]).item()
    return Answered(logits[len(late) :].log_softmax(-1)[scored], text[answer][scored], prose_nll)


@torch.inference_mode()
def true_loss(model: nn.Module, item: Item, plan: Plan | None) -> float:
    """Mean cross-entropy of a text's scored tokens, all of it read under one plan; None: densely."""
    tokens = item.tokens.to(model.device)
    asked = item.scored.to(model.device).nonzero()[:, 0]
    with nullcontext() if plan is None else attach(model, MoA(plan=plan)):
        logits = model(tokens[None], logits_to_keep=asked - 1, use_cache=False).logits[0]
    return F.cross_entropy(logits.float(), tokens[asked]).item()


# Results


def compared_rows(
    model: nn.Module,
    number: int,
    sample: NeedleSample,
    plans: Mapping[Arm, Mapping[int | str, Plan]],
) -> list[dict]:
    """One prompt read densely and under every plan: a row each, with its measures against the dense reading.

    Args:
        number: of the prompt.
        plans: arm -> calibration draw ("all" for an arm that draws do not change) -> plan.
    """
    length = len(sample.prompt)
    dense = read(model, sample, None)
    where = {"length": length, "item": number, "distance": round(length * (1 - sample.depth))}
    rows = [where | {"arm": "dense", "density": 1.0, "draw": "all"} | dense.compared(dense)]
    for (arm, density), made in plans.items():
        for draw, plan in made.items():
            labels = {"arm": arm, "density": density, "draw": draw}
            rows.append(where | labels | read(model, sample, plan).compared(dense))
    return rows


def part_of(results: pd.DataFrame, arm: str, density: float, length: int) -> pd.DataFrame:
    """The rows of one arm at one prompt length."""
    wanted = (results.arm == arm) & (results.density == density) & (results.length == length)
    return results[wanted]


def arms_table(
    results: pd.DataFrame,
    arms: Iterable[Arm],
    length: int,
    reported: Mapping[str, Mapping[str, float]],
) -> pd.DataFrame:
    """One row an arm: means over prompts and draws, with 95 % intervals over prompts, the paper's numbers beside.

    Args:
        results: rows of `compared_rows`.
        reported: name of a column -> arm -> value.
    """
    table = []
    for arm, density in arms:
        by_item = part_of(results, arm, density, length).groupby("item")[METRICS].mean()
        found, prose = (mean(by_item[metric].to_numpy()) for metric in METRICS[:2])
        row = {"arm": arm, "density": density, "answer NLL": found.effect}
        row |= {"low": found.low, "high": found.high}
        row |= {"prose NLL": prose.effect, "exact match": by_item["score"].mean()}
        table.append(row | {f"{name}, reported": has.get(arm) for name, has in reported.items()})
    return pd.DataFrame(table)


def above_dense(results: pd.DataFrame, arms: Sequence[str], length: int) -> pd.DataFrame:
    """The rows of some arms at one length, both losses as rises above the same prompt's dense loss."""
    rows = results[(results.length == length) & results.arm.isin(arms)].copy()
    dense = part_of(results, "dense", 1.0, length).set_index("item")
    for metric in METRICS[:2]:
        rows[metric] -= dense[metric].reindex(rows["item"]).to_numpy()
    return rows


def by_arm(
    frame: pd.DataFrame, key: str, column: str, names: Mapping[str, str]
) -> dict[str, float]:
    """Reported values of a column by our names of the arms; `names`: ours -> the paper's, in the column `key`."""
    values = frame.set_index(key)[column]
    return {ours: float(values[theirs]) for ours, theirs in names.items()}


def largest_gap(
    plans: Mapping[Arm, Mapping[int | str, Plan]], length: int, longer: Mapping[Arm, int]
) -> float:
    """Largest distance of a plan's density from its arm's, at one length and for some arms at a longer one too."""
    return max(
        abs(plan.density(tokens) - arm[1])
        for arm, made in plans.items()
        for plan in made.values()
        for tokens in ([length, longer[arm]] if arm in longer else [length])
    )
