"""Active multi-task learning tried out: on synthetic tasks with known answers, and on pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import t
from torch import Tensor
from torch.nn import functional

from reattend.data.images import fashion_mnist
from reattend.theory.a_mtrl import (
    CORRUPTIONS,
    Problem,
    Statistics,
    active_sampling,
    allocate,
    balanced_error,
    balanced_order,
    bound_constants,
    concatenated,
    corrupt,
    draw,
    erm_constant,
    excess_risk,
    fit_heads,
    fit_representation,
    head_error,
    lasso_path,
    make_problem,
    predictor,
    representation_error,
    ridge_predictor,
    sampling_weights,
    stacked,
    statistics_of,
    total_cost,
    whitening,
)

RELEVANCE = {
    "L1": "known",
    "L2": "known",
    "L2, |nu2|": "known",
    "single source": "known",
    "L1-A-MTRL": "estimated",
    "L2-A-MTRL": "estimated",
    "L2-A-MTRL, doubling": "estimated",
    "uniform": "not used",
    "target only": "not used",
}
"""How each method comes by the relevance of the sources."""

INSTANCES = ("separating", "blocks", "random", "identical")
Cell = tuple[str, int, str]
"""Instance, source samples in all, method."""


@dataclass(frozen=True)
class SyntheticSetting:
    """Sizes of the synthetic tasks.

    Attributes:
        runs: repetitions.
        floor: fewest samples of every source when the relevance is known.
        exploration: share of the total spent on exploring, at least d samples a source.
    """

    runs: int
    sources: int
    dimension: int
    rank: int
    noise: float
    target_samples: int
    floor: int
    exploration: float


class SyntheticTasks:
    """All allocations on all instances; every method gets the same total and the same target samples.

    Attributes:
        problems, targets: by instance; all repetitions at once.
        risk, error: excess target risk and its representation part, one value a repetition.
        support: estimated relevance of the methods that do not know it, [runs, sources].

    Args:
        seed: of bases, heads and target samples.
    """

    def __init__(self, setting: SyntheticSetting, seed: int) -> None:
        self.setting = s = setting
        self.problems: dict[str, Problem] = {}
        self.targets: dict[str, Statistics] = {}
        self.risk: dict[Cell, np.ndarray] = {}
        self.error: dict[Cell, np.ndarray] = {}
        self.support: dict[Cell, Tensor] = {}
        for i, name in enumerate(INSTANCES):
            random = np.random.default_rng([seed, i])
            made = make_problem(name, s.runs, s.sources, s.dimension, s.rank, random)
            wanted = torch.full((s.runs, 1), s.target_samples)
            self.problems[name] = made
            self.targets[name] = draw(random, wanted, made.truth[:, None], s.noise)

    def learn(
        self, name: str, counts: Int[Tensor, "runs sources"], random: np.random.Generator
    ) -> Float[Tensor, "runs d k"]:
        """Basis learned from fresh samples in the given numbers."""
        problem = self.problems[name]
        data = draw(random, counts, problem.predictors, self.setting.noise)
        return fit_representation(data, problem.rank)[0]

    def run(self, name: str, total: int, random: np.random.Generator) -> None:
        """Every method on one instance with `total` source samples."""
        self._known(name, total, random)
        if name != "identical":
            self._unknown(name, total, random)
        nothing = torch.eye(self.setting.dimension, dtype=torch.float64)
        self._keep(name, total, "target only", nothing.expand(self.setting.runs, -1, -1))

    def log_ratio(
        self, names: Sequence[str], totals: Sequence[int], above: str, below: str
    ) -> Float[np.ndarray, " runs"]:
        """ln of a ratio of excess target risks, mean over budgets and instances."""
        cells = [(name, total) for name in names for total in totals]
        return np.mean([np.log(self.risk[*c, above] / self.risk[*c, below]) for c in cells], axis=0)

    def better_l2(self, name: str, totals: Sequence[int]) -> str:
        """The form of L2-A-MTRL with the lower mean risk."""
        forms = ("L2-A-MTRL", "L2-A-MTRL, doubling")
        return min(forms, key=lambda m: np.mean([self.risk[name, n, m].mean() for n in totals]))

    def support_shares(
        self, name: str, totals: Sequence[int]
    ) -> tuple[Float[np.ndarray, " runs"], Float[np.ndarray, " runs"], float]:
        """Precision and recall of the Lasso's support against that of nu^1, mean over budgets; its mean size."""
        true = self.problems[name].nu1 != 0
        found = torch.stack([self.support[name, n, "L1-A-MTRL"] != 0 for n in totals])
        hits, size = (found & true).sum(-1).double(), found.sum(-1)
        precision, recall = (hits / size).mean(0), (hits / true.sum(-1)).mean(0)
        return precision.numpy(), recall.numpy(), float(size.double().mean())

    def supports_table(self, names: Sequence[str], totals: Sequence[int]) -> pd.DataFrame:
        """Support of the Lasso's estimate against that of nu^1, one row an instance; means over budgets and runs."""
        rows = []
        for name in names:
            precision, recall, size = self.support_shares(name, totals)
            row = {"instance": name, "k": self.problems[name].rank, "sources in the estimate": size}
            rows.append(row | {"precision": precision.mean(), "recall": recall.mean()})
        return pd.DataFrame(rows)

    def risks_table(self, names: Sequence[str], totals: Sequence[int]) -> pd.DataFrame:
        """Excess target risk x 1000 by budget, one row an instance and method of `RELEVANCE`, mean over runs.

        The last column is its representation part at the last budget.
        """
        rows = []
        for name in names:
            for method, use in RELEVANCE.items():
                row = {"instance": name, "method": method, "relevance": use}
                row |= {f"N = {t}": 1000 * self.risk[name, t, method].mean() for t in totals}
                part = 1000 * self.error[name, totals[-1], method].mean()
                rows.append(row | {"representation only": part})
        return pd.DataFrame(rows)

    def laws(self) -> dict[tuple[str, str], float]:
        """What least squares attains to first order (`erm_constant`), mean over runs, by instance and allocation."""
        found = {}
        for name, p in self.problems.items():
            for method, weights in p.weights().items():
                each = zip(p.heads, p.target, weights, strict=True)
                found[name, method] = float(np.mean([erm_constant(*one) for one in each]))
        return found

    def constants(self, total: int, reported: Mapping[str, str]) -> pd.DataFrame:
        """Each allocation's representation error over that of L1: bound, first-order law, measured with its 95 %.

        Args:
            reported: the paper's sample complexity by allocation.
        """
        rows, laws = [], self.laws()
        for name, p in self.problems.items():
            pairs = [bound_constants(a, b) for a, b in zip(p.nu1, p.nu2, strict=True)]
            bounds = pd.DataFrame(pairs).mean()
            for method in p.weights():
                ratio = np.log(self.error[name, total, method] / self.error[name, total, "L1"])
                half = t.ppf(0.975, len(ratio) - 1) * ratio.std(ddof=1) / math.sqrt(len(ratio))
                low, high = np.exp(ratio.mean() - half), np.exp(ratio.mean() + half)
                bound = bounds.get(method.lower(), math.nan)
                rows.append(
                    {
                        "instance": name,
                        "allocation": method,
                        "reported": reported.get(method, "not stated"),
                        "bound": bound,
                        "over L1: bound": bound / bounds["l1"],
                        "over L1: least squares": laws[name, method] / laws[name, "L1"],
                        "over L1: measured": math.exp(ratio.mean()),
                        "95 %": "" if method == "L1" else f"[{low:.3g}, {high:.3g}]",
                    }
                )
        return pd.DataFrame(rows)

    def example_path(
        self, name: str, total: int, random: np.random.Generator
    ) -> tuple[Float[Tensor, " steps"], Float[Tensor, "steps sources"], float | None]:
        """Penalties, Lasso path and the penalty taken (None: even the smallest leaves too much) of one fresh run."""
        s, p = self.setting, self.problems[name]
        explored = draw(
            random, torch.full((s.sources,), self._explored(total)), p.predictors[0], s.noise
        )
        few = draw(random, torch.tensor([s.target_samples]), p.truth[:1], s.noise)
        basis, heads = fit_representation(explored, p.rank)
        head = fit_heads(basis, few)
        penalties, path = lasso_path(heads, head[:, 0])
        short = (path @ heads.T - head[:, 0]).norm(dim=-1) <= head_error(basis, head, few)
        return penalties, path, float(penalties[short][0]) if short.any() else None

    def _explored(self, total: int) -> int:
        """Samples of every source before anything is estimated."""
        return max(
            self.setting.dimension, int(self.setting.exploration * total / self.setting.sources)
        )

    def _keep(self, name: str, total: int, method: str, basis: Float[Tensor, "runs d k"]) -> None:
        truth = self.problems[name].truth
        found = predictor(basis, self.targets[name])
        self.risk[name, total, method] = excess_risk(found, truth).numpy()
        self.error[name, total, method] = representation_error(basis, truth).numpy()

    def _known(self, name: str, total: int, random: np.random.Generator) -> None:
        s, problem = self.setting, self.problems[name]
        for method, weights in problem.weights().items():
            counts = allocate(weights, total, torch.full((s.runs, s.sources), s.floor))
            self._keep(name, total, method, self.learn(name, counts, random))
        single = functional.one_hot(problem.nu1.abs().argmax(-1), s.sources)
        data = draw(random, total * single, problem.predictors, s.noise)
        self._keep(name, total, "single source", fit_representation(data, 1)[0])

    def _unknown(self, name: str, total: int, random: np.random.Generator) -> None:
        s, problem = self.setting, self.problems[name]

        def draw_more(counts: Int[Tensor, "runs sources"]) -> Statistics:
            return draw(random, counts, problem.predictors, s.noise)

        each = self._explored(total)
        explored = draw_more(torch.full((s.runs, s.sources), each))
        first = fit_representation(explored, problem.rank)
        doubled = (each * s.sources * 2**i for i in range(1, 20))
        doubling = [more for more in doubled if more < total] + [total]
        forms = {"L1-A-MTRL": ("l1", [total]), "L2-A-MTRL": ("l2", [total])}
        forms["L2-A-MTRL, doubling"] = ("l2", doubling)
        for method, (rule, totals) in forms.items():
            target = self.targets[name]
            learned = active_sampling(explored, first, draw_more, target, totals, rule)
            self._keep(name, total, method, learned.basis)
            self.support[name, total, method] = learned.relevance


class Costs:
    """Samples, and their cost, that reach one representation error on the block instance.

    Relevance is known and nothing is forced: an unopened source stays unopened. The error asked for is
    what uniform sampling should reach with the largest budget by the paper's constant.

    Args:
        constants: of the bound on the block instance (`bound_constants`).
        opening: fixed cost of opening a source, in samples.
    """

    def __init__(
        self,
        tasks: SyntheticTasks,
        totals: Sequence[int],
        constants: dict[str, float],
        opening: float,
        random: np.random.Generator,
    ) -> None:
        s, blocks = tasks.setting, tasks.problems["blocks"]
        self.totals, self.constants, self.opening = totals, constants, opening
        self.shares = {m: blocks.weights()[m][0] for m in ("L1", "L2", "uniform")}
        unforced = torch.zeros(s.runs, s.sources, dtype=torch.long)
        curves: dict[str, list[np.ndarray]] = {m: [] for m in self.shares}
        for total in totals:
            for method, share in self.shares.items():
                counts = allocate(share.expand(s.runs, s.sources), total, unforced)
                basis = tasks.learn("blocks", counts, random)
                curves[method].append(representation_error(basis, blocks.truth).numpy())
        self._curves = {m: np.stack(errors, axis=1) for m, errors in curves.items()}
        free = s.dimension - s.rank
        self._goal = s.noise**2 * free * constants["uniform"] / totals[-1]

    def of(self, method: str, total: float, kind: str) -> float:
        """Cost of so many samples in the method's shares."""
        return total_cost(total * self.shares[method], kind, self.opening)

    def predicted(self, method: str, kind: str) -> float:
        """Cost by the paper's constants."""
        return self.by_constant(method, self.constants[method.lower()], kind)

    def by_constant(self, method: str, constant: float, kind: str) -> float:
        """Cost where N_tot samples leave an error of sigma^2 (d - k) constant / N_tot."""
        return self.of(method, self.totals[-1] * constant / self.constants["uniform"], kind)

    def measured(self, method: str, kind: str) -> np.ndarray:
        """Cost for each repetition: its errors' line in logarithms, read off at the goal."""
        return np.array([self.of(method, self._needed(e), kind) for e in self._curves[method]])

    def pooled(self, method: str, kind: str) -> float:
        """The same from the errors' mean over the repetitions."""
        return self.of(method, self._needed(self._curves[method].mean(0)), kind)

    def _needed(self, errors: np.ndarray) -> float:
        slope, height = np.polyfit(np.log(self.totals), np.log(errors), 1)
        return float(np.exp((math.log(self._goal) - height) / slope))


@dataclass(frozen=True)
class PictureSetting:
    """Sizes of the tasks on corrupted pictures.

    Attributes:
        pictures, test_pictures: under every corruption.
        features: principal components that are kept.
        explored, per_source: samples that every source gives first, and on average in all.
        target: samples of a target.
        informed: samples of every task for the relevance without estimation error.
        classes: how many classes are targets under every corruption, evenly spaced.
    """

    pictures: int
    test_pictures: int
    features: int
    rank: int
    explored: int
    per_source: int
    target: int
    informed: int
    classes: int


Task = tuple[int, int]
"""Number of the corruption, number of the class."""


class PictureTasks:
    """Fashion-MNIST under eight corruptions: one class against the rest, balanced, labelled -1 and 1.

    Sources of a target are all tasks under the other corruptions. Pictures are reduced to 14 x 14 and to
    whitened principal components, plus a constant.

    Attributes:
        raw: training pictures in [0, 1], [corruptions, items, 196].
        kept: share of the variance that the components keep.
        chosen: classes that are targets.
    """

    def __init__(self, setting: PictureSetting) -> None:
        self.setting = s = setting
        clothes = fashion_mnist(limit=max(s.pictures, s.test_pictures))
        train = clothes.indices("train")[: s.pictures]
        test = clothes.indices("test")[: s.test_pictures]

        def reduced(
            part: Int[Tensor, " items"], seed: int
        ) -> Float[Tensor, "corruptions items 196"]:
            grey = clothes.pixels[part, 0].float() / 255
            generator = torch.Generator().manual_seed(seed)
            kinds = [corrupt(grey, kind, generator)[:, None] for kind in CORRUPTIONS]
            return torch.stack([functional.avg_pool2d(x, 2).flatten(1) for x in kinds])

        self.raw = reduced(train, 0)
        centre, whiten, self.kept = whitening(self.raw.flatten(0, 1), s.features)

        def featured(x: Tensor) -> Tensor:
            return functional.pad((x - centre) @ whiten, (0, 1), value=1.0)

        self._inputs, self._labels = featured(self.raw), clothes.labels[train]
        self._checks = featured(reduced(test, 1)).double()
        self._answers = clothes.labels[test]
        self.classes = clothes.classes
        self.chosen = [int(i * len(self.classes) / s.classes) for i in range(s.classes)]

    def draw_orders(self, random: np.random.Generator) -> None:
        """Draw anew which samples every task gives, and in what order."""
        kinds = range(len(CORRUPTIONS))
        tasks = [(c, j) for c in kinds for j in range(len(self.classes))]
        self._orders = {(c, j): balanced_order(self._labels, j, random) for c, j in tasks}
        self._plenty: dict[Task, Statistics] = {}

    def run(
        self, kind: int, compared: bool = True
    ) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
        """All methods on the targets under one corruption.

        Args:
            compared: with L2-A-MTRL and the informed diagnosis, not only L1-A-MTRL, passive sampling
                and the target alone. The others' results are the same without them.

        Returns:
            balanced errors in %, one a target, by method; estimated relevance [targets, sources] by
            method.
        """
        s, others = self.setting, [c for c in range(len(CORRUPTIONS)) if c != kind]
        sources = [(c, j) for c in others for j in range(len(self.classes))]
        aims = [(kind, j) for j in self.chosen]
        own = stacked([self._gathered([aim], 0, [s.target]) for aim in aims])
        bases, relevance = self._learned(sources, aims, own, compared)
        found = {method: predictor(basis, own) for method, basis in bases.items()}
        strengths = [10.0**p for p in range(-1, 4)]
        alone = [ridge_predictor(*self._samples(aim, 0, s.target), strengths) for aim in aims]
        found["target only"] = torch.stack(alone)
        errors = {method: self._errors(kind, rows) for method, rows in found.items()}
        return errors, relevance

    def shares(
        self, relevance: Sequence[Sequence[Float[Tensor, "targets sources"]]]
    ) -> tuple[Float[np.ndarray, "kinds kinds"], Float[np.ndarray, "targets classes"]]:
        """Share of |relevance| in %, by corruption (NaN for a target's own) and by class of target and source.

        Args:
            relevance: by draw, then by corruption of the targets.
        """
        count, classes = len(CORRUPTIONS), len(self.classes)
        by_kind, by_class = np.full((count, count), np.nan), np.zeros((len(self.chosen), classes))
        for c in range(count):
            draws = [sampling_weights(one[c], "l1") for one in relevance]
            share = 100 * torch.stack(draws).mean(0).view(-1, count - 1, classes).numpy()
            by_kind[c, [o for o in range(count) if o != c]] = share.mean(0).sum(1)
            by_class += share.sum(1) / count
        return by_kind, by_class

    def _learned(
        self, sources: list[Task], aims: list[Task], own: Statistics, compared: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        s = self.setting

        def evenly(each: int) -> Statistics:
            return self._gathered(sources, 0, [each] * len(sources))

        def started(data: Statistics) -> tuple[Tensor, Tensor]:
            basis, heads = fit_representation(data, s.rank)
            return basis.expand(len(aims), -1, -1), heads.expand(len(aims), -1, -1)

        def draw_more(counts: Int[Tensor, "targets sources"]) -> Statistics:
            stops = (s.explored + counts).tolist()
            return stacked([self._gathered(sources, s.explored, row) for row in stops])

        explored = evenly(s.explored)
        first = started(explored)
        judged = {"L1-A-MTRL": ("l1", first, own)}
        if compared:
            judged["L2-A-MTRL"] = ("l2", first, own)
            informed = started(concatenated([self._much(source) for source in sources]))
            judged["L1, informed"] = ("l1", informed, stacked([self._much(aim) for aim in aims]))
        bases, relevance = {"passive": started(evenly(s.per_source))[0]}, {}
        total = s.per_source * len(sources)
        for method, (rule, start, seen) in judged.items():
            data = stacked([explored] * len(aims))
            learned = active_sampling(data, start, draw_more, seen, [total], rule)
            bases[method], relevance[method] = learned.basis, learned.relevance
        return bases, relevance

    def _errors(self, kind: int, predictors: Float[Tensor, "targets d"]) -> list[float]:
        pairs = zip(self.chosen, predictors, strict=True)
        return [balanced_error(self._checks[kind] @ f, self._answers == j) for j, f in pairs]

    def _samples(self, task: Task, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a task's samples start .. stop in its own random order."""
        kind, category = task
        if stop > len(self._orders[task]):
            raise ValueError(f"{stop} samples wanted of a task that has {len(self._orders[task])}")
        chosen = self._orders[task][start:stop]
        return self._inputs[kind, chosen], 2.0 * (self._labels[chosen] == category) - 1

    def _much(self, task: Task) -> Statistics:
        """Statistics of a task's first `informed` samples, gathered once a draw."""
        if task not in self._plenty:
            self._plenty[task] = self._gathered([task], 0, [self.setting.informed])
        return self._plenty[task]

    def _gathered(self, tasks: list[Task], start: int, stops: list[int]) -> Statistics:
        """Statistics of several tasks side by side."""
        pairs = zip(tasks, stops, strict=True)
        parts = [statistics_of(*self._samples(task, start, stop)) for task, stop in pairs]
        return concatenated(parts)


def wins(
    first: Float[np.ndarray, "draws targets"], second: Float[np.ndarray, "draws targets"]
) -> Float[np.ndarray, "draws targets"]:
    """100 for every draw and target where the first error is lower, 50 for a tie."""
    return 50 * (1 + np.sign(second - first))


def gains_table(
    errors: Mapping[str, Float[np.ndarray, "draws targets"]], ours: str, reported: pd.DataFrame
) -> pd.DataFrame:
    """Errors of every method over the draws, what `ours` gains over them, and the paper's gains below.

    Args:
        errors: in %, by method. One with fewer draws has the first ones, and is compared on them.
        reported: columns comparison, targets_won and error_saved, in %.
    """
    rows = []
    for method, found in errors.items():
        each = found.mean(1)
        same = errors[ours][: len(found)]
        won, saved = wins(same, found).mean(), 100 * (1 - same.mean() / each.mean())
        gains = (math.nan, math.nan) if method == ours else (won, saved)
        rows.append((method, len(found), each.mean(), each.min(), each.max(), *gains))
    for row in reported.itertuples():
        no_errors = (math.nan,) * 4
        rows.append((f"reported: {row.comparison}", *no_errors, row.targets_won, row.error_saved))
    columns = ["method", "draws", "error (%)", "lowest draw", "highest draw"]
    gained = ["targets won by L1 (%)", "error saved by L1 (%)"]
    return pd.DataFrame(rows, columns=[*columns, *gained])
