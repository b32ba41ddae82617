"""Prompts answered under six sparse methods at equal budgets and under placebos; small Llamas at equal cost."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reattend.attention.baselines.block_topk import BlockTopK
from reattend.attention.baselines.quest import Pages, Quest
from reattend.attention.baselines.snapkv import AdaSnapKV, SnapKV
from reattend.attention.baselines.vertical_slash import last_weights
from reattend.attention.decoding import Prompt, decode, read_prompt
from reattend.attention.host import attach
from reattend.attention.kv_selection import KVSelection, best_entries
from reattend.attention.method import AttentionMethod
from reattend.backbones.trained.small_llamas import fact_rows
from reattend.data.long_tasks import long_samples, multi_query, share_right, stack_samples
from reattend.data.needles import Haystack, NeedleSample
from reattend.long_context.sparse_frontier import (
    FlexVerticalSlash,
    LineMethod,
    ModelShape,
    VerticalSlashTokens,
    best_lines,
    chunks_density,
    decode_transfers,
    fit_scaling_law,
    line_density,
    line_mass,
    logit,
    max_compression,
    prefill_flops,
    quest_overhead,
    r_squared,
    retained,
    vertical_slash_overhead,
)
from reattend.metrics import pseudo_values
from reattend.studies.long_context import BFloat16Linear
from reattend.studies.prefill import Capture, RandomLike
from reattend.studies.recycled import follow

PREFILL = ("Vertical-Slash", "FlexPrefill", "Block-Sparse")
DECODE = ("SnapKV", "Ada-SnapKV", "Quest")
PLACEBOS = {
    "Vertical-Slash": "random lines",
    "FlexPrefill": "random lines",
    "Block-Sparse": "random chunks",
    "SnapKV": "random entries",
    "Ada-SnapKV": "random entries",
    "Quest": "random pages",
}
"""The placebo of each method: as much at random, with the same forced parts."""


# Placebos -----------------------------------------------------------------------------------------


class RandomLines(VerticalSlashTokens):
    """As many columns and diagonals of each head as Vertical-Slash keeps, at random beside the forced ones."""

    def __init__(self, *, seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.generator = torch.Generator().manual_seed(seed)

    def best(self, vertical, slash):
        chance = [
            torch.rand(x.shape, generator=self.generator).to(x.device) for x in (vertical, slash)
        ]
        kept = torch.full((1, 1), self.kept, device=vertical.device)
        forced = self.sink, self.local
        return tuple(best_lines(x, kept, first) for x, first in zip(chance, forced, strict=True))


class RandomEntries(SnapKV):
    """As many entries of each key head as SnapKV keeps, at random beside the forced ones."""

    def __init__(self, *, seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, query, key, *, scale):
        chance = torch.rand(key.shape[:3], generator=self.generator).to(key.device)
        return self.keep(self._forced(chance))


class RandomPages(Quest):
    """As many pages as Quest reads for each token, at random before the current one."""

    def __init__(self, *, seed: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, query, key, state: Pages, *, scale):
        keys = key.shape[2]
        places = *key.shape[:2], (keys - 1) // self.page
        chance = torch.rand(places, generator=self.generator).to(key.device)
        entries = best_entries(chance, self._pages(keys)).repeat_interleave(self.page, dim=-1)
        return F.pad(entries, (0, keys - entries.shape[-1]), value=True)


# Methods at budgets -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Everything that is a number of tokens, in tokens."""

    last_queries: int
    sink: int
    local: int
    chunk: int = 1
    page: int = 1
    kernel: int = 1

    @property
    def lines(self) -> dict[str, int]:
        """The settings of a `LineMethod`."""
        return {"last_queries": self.last_queries, "sink": self.sink, "local": self.local}


class Calibration:
    """Masses of columns and diagonals of prompts read densely, on which the numbers of lines are set."""

    def __init__(
        self, model: nn.Module, prompts: Int[Tensor, "batch length"], sizes: Sizes
    ) -> None:
        with torch.inference_mode(), attach(model, Capture()) as read:
            model(prompts.to(model.device), logits_to_keep=1)
        seen = read.seen.values()
        self.masses = [line_mass(last_weights(q, k, sizes.last_queries, s)) for q, k, s in seen]
        self.length, self.sizes = prompts.shape[1], sizes

    def density(self, method: LineMethod) -> float:
        """Share of the causal pairs of tokens that it keeps, mean over layers and heads."""
        kept = (line_density(*method.best(*mass), self.length) for mass in self.masses)
        return float(np.mean([shares.mean().item() for shares in kept]))

    def vertical_slash(self, compression: float) -> VerticalSlashTokens:
        """As many lines as the budget 1 / `compression` allows."""
        return self._largest_lines(VerticalSlashTokens, compression)

    def random_lines(self, compression: float, seed: int) -> RandomLines:
        """The placebo at the same budget."""
        return self._largest_lines(lambda **lines: RandomLines(seed=seed, **lines), compression)

    def flex(self, compression: float) -> FlexVerticalSlash:
        """The largest coverage within the budget; twice the forced diagonals are the least lines."""
        shares = [round(0.02 * i, 2) for i in range(5, 50)]
        settings = {"least": 2 * self.sizes.local, **self.sizes.lines}
        make = lambda share: FlexVerticalSlash(coverage=share, **settings)  # noqa: E731
        return largest(make, shares, self.density, 1 / compression)

    def _largest_lines(self, make: Callable[..., Any], compression: float) -> Any:
        counts = range(max(self.sizes.sink, self.sizes.local), self.length + 1)
        sized = lambda count: make(lines=count, **self.sizes.lines)  # noqa: E731
        return largest(sized, counts, self.density, 1 / compression)


def largest(make: Callable, sizes: Sequence, measure: Callable[[Any], float], limit: float) -> Any:
    """`make(size)` with the largest of the rising sizes that `measure` puts within the limit."""
    found = bisect.bisect_right(sizes, limit, key=lambda size: measure(make(size)))
    return make(sizes[max(found - 1, 0)])


def block_sparse(length: int, compression: float, chunk: int) -> BlockTopK:
    """Block-Sparse with as many chunks a row as the budget allows."""
    chunks = -(-length // chunk)
    make = lambda k: BlockTopK(k=k, local=1, block_size=chunk)  # noqa: E731
    return largest(
        make, range(1, chunks + 1), lambda m: chunks_density(m.k, chunks), 1 / compression
    )


def decoders(length: int, compression: float, sizes: Sizes, seed: int) -> dict[str, KVSelection]:
    """The decoding methods and their placebos, each with `length` / `compression` entries."""
    kept = round(length / compression)
    snap = {"capacity": max(kept, sizes.local + sizes.sink), "window": sizes.last_queries}
    snap |= {"kernel": sizes.kernel, "recent": sizes.local, "sink": sizes.sink}
    quest = {"budget": max(kept, sizes.page), "page": sizes.page}
    return {
        "SnapKV": SnapKV(**snap),
        "Ada-SnapKV": AdaSnapKV(**snap),
        "Quest": Quest(**quest),
        "random entries": RandomEntries(seed=seed, **snap),
        "random pages": RandomPages(seed=seed, **quest),
    }


def readers(
    calibration: Calibration, compressions: Iterable[float], flex_at: float, seed: int
) -> list[tuple[str, float, AttentionMethod]]:
    """(name, compression, method) of the prefill methods; FlexPrefill and the placebos at one budget."""
    length, chunk = calibration.length, calibration.sizes.chunk
    made = [
        ("FlexPrefill", flex_at, calibration.flex(flex_at)),
        ("random lines", flex_at, calibration.random_lines(flex_at, seed)),
        ("random chunks", flex_at, RandomLike(block_sparse(length, flex_at, chunk), seed)),
    ]
    for c in compressions:
        made.append(("Vertical-Slash", c, calibration.vertical_slash(c)))
        made.append(("Block-Sparse", c, block_sparse(length, c, chunk)))
    return made


@dataclass(frozen=True)
class Draws:
    """How many draws of each task are answered, and by which methods.

    Attributes:
        length: of the main comparison, in tokens; between lengths SnapKV, Quest and their placebos are compared.
        by_length: draws at each length.
        read, written: those that prefill and decoding methods answer at `length`, by compression.
        flex_compression: where the placebos of all methods are compared.
        length_compression: where lengths are.
    """

    length: int
    by_length: Mapping[int, int]
    read: Mapping[float, int]
    written: Mapping[float, int]
    flex_compression: float
    length_compression: float

    def __str__(self) -> str:
        """For a caption."""
        phases = ("prefill", self.read), ("decoding", self.written)
        counts = (
            f"{phase} " + ", ".join(f"{count} at 1/{c:g}" for c, count in some.items())
            for phase, some in phases
        )
        return "prompts of a task: " + "; ".join(counts)

    def arms(
        self,
        length: int,
        first: int,
        readers: Sequence[tuple[str, float, AttentionMethod]],
        decoders: Mapping[float, Mapping[str, KVSelection]],
    ) -> list[tuple[str, float, AttentionMethod]]:
        """(name, compression, method) of all that answers the draws from `first` on.

        Args:
            readers: the prefill methods, as from `readers`.
            decoders: the decoding methods and their placebos by compression, as from `decoders`.
        """
        main, made = length == self.length, [("dense", 1.0, AttentionMethod())]
        elsewhere = max(count for n, count in self.by_length.items() if n != self.length)
        for c, methods in decoders.items():
            among_methods = main and first < self.written[c]
            # A length is compared with another on the draws that both have.
            among_lengths = c == self.length_compression and first < elsewhere
            # Placebos where a test asks for them, on as many draws as it has.
            at_ends = c == self.length_compression and first < min(self.by_length.values())
            at_methods = main and c == self.flex_compression and first < self.read[c]
            for name, method in methods.items():
                real = among_methods or (among_lengths and name != "Ada-SnapKV")
                if real if name in DECODE else at_ends or at_methods:
                    made.append((name, c, method))
        return made + [arm for arm in readers if main and first < self.read[arm[1]]]


# Answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Prompts of one task and length with their answers, and the prompts read densely."""

    prompts: Int[Tensor, "batch length"]
    given: Int[Tensor, "batch answer"]
    scored: Bool[Tensor, "batch answer"]
    read: Prompt

    def scores(self, model: nn.Module, method: AttentionMethod) -> pd.DataFrame:
        """Answers under a method, one row a prompt: "probability" of the scored tokens, share "right", "density".

        A method of the cache, or dense attention, decodes after the dense reading; another one reads the
        prompts, and their answers are decoded densely.
        """
        method.clear()
        given, scored = self.given.cpu(), self.scored.cpu()
        if isinstance(method, KVSelection) or type(method) is AttentionMethod:
            done = follow(model, method, self.read, self.given)
            likelihood, choices = -done.nll, done.choices
            share = done.reads / (self.prompts.shape[1] + self.given.shape[1] / 2)
        else:
            likelihood, choices = _read_with(model, self.prompts, self.given, method)
            share = method.density()
        probability = (likelihood.cpu().exp() * scored).sum(1) / scored.sum(1)
        right = share_right(choices.cpu(), given, scored)
        found = {"probability": probability.numpy(), "right": right.numpy()}
        return pd.DataFrame(found | {"density": share}).rename_axis("draw").reset_index()


@torch.inference_mode()
def _read_with(
    model: nn.Module, prompts: Tensor, answers: Tensor, method: AttentionMethod
) -> tuple[Tensor, Tensor]:
    """Log-likelihoods and greedy choices along the answers: prompt read with `method`, answer decoded densely."""
    with attach(model, method):
        read = model(prompts, use_cache=True, logits_to_keep=1)
    logits = read.logits[:, -1:]
    if answers.shape[1] > 1:
        rest = model(answers[:, :-1], past_key_values=read.past_key_values, use_cache=True)
        logits = torch.cat([logits, rest.logits], dim=1)
    logits = logits.float().log_softmax(-1)
    return logits.gather(-1, answers[..., None]).squeeze(-1), logits.argmax(-1)


def quick_to_read(model: nn.Module) -> nn.Module:
    """A Llama whose feed-forward parts and attention's linear maps take bfloat16; all else stays in float32.

    Changes the model. Where processors have units for bfloat16 a prompt is read in half the time. The head
    is fed contiguous states: of a slice torch would multiply one copy of the embedding a prompt.
    """
    for layer in model.model.layers:
        for name, part in list(layer.self_attn.named_children()):
            if isinstance(part, nn.Linear) and part.bias is None:
                setattr(layer.self_attn, name, BFloat16Linear(part))
        layer.mlp.bfloat16()
        layer.mlp.register_forward_pre_hook(lambda part, states: (states[0].bfloat16(),))
        layer.mlp.register_forward_hook(lambda part, states, made: made.float())
    model.lm_head.register_forward_pre_hook(lambda head, states: (states[0].contiguous(),))
    return model


def samples_of(
    haystack: Haystack,
    articles: Sequence[str],
    task: str,
    length: int,
    count: int,
    seed: int,
    distractors: int,
    queries: int,
) -> list[NeedleSample]:
    """Samples of a task; `queries` keys are asked in multi_query."""
    if task == "multi_query":
        return list(multi_query(haystack, length, count, seed, distractors, queries))
    more = {"distractors": distractors, "documents": articles}
    return long_samples(haystack, task, length, count, seed=seed, **more)


def shortened(sample: NeedleSample, length: int) -> NeedleSample:
    """The same facts and question with less prose: each stretch of it loses its end, in proportion.

    Args:
        length: of the prompt, in tokens.

    Raises:
        ValueError: for more tokens than the prompt has, or fewer than its facts and question take.
    """
    spare, whole = len(sample.prompt) - length, sum(sample.prose)
    if not 0 <= spare <= whole:
        least = len(sample.prompt) - whole
        raise ValueError(f"length must lie in {least}..{len(sample.prompt)} tokens, got {length}")
    kept, seen = [], 0
    for is_prose, run in itertools.groupby(range(len(sample.prompt)), sample.prose.__getitem__):
        places = list(run)
        if is_prose:
            before, seen = seen, seen + len(places)
            share = [n * (whole - spare) // whole for n in (before, seen)]
            places = places[: share[1] - share[0]]
        kept += places
    found_at = bisect.bisect_left(kept, round(sample.depth * len(sample.prompt)))
    tokens, prose = (tuple(part[i] for i in kept) for part in (sample.prompt, sample.prose))
    return replace(sample, prompt=tokens, prose=prose, depth=found_at / length)


def answers_to(model: nn.Module, samples: Sequence[NeedleSample]) -> Answers:
    """Samples of equal length as a batch, read densely."""
    prompts, given, scored = stack_samples(samples)
    # All but the last token are fed at once, and one alone would count as a decoding step, which is dense.
    missing = max(3 - given.shape[1], 0)
    given = torch.cat([given, given[:, -1:].expand(-1, missing)], dim=1)
    scored = F.pad(scored, (0, missing))
    prompts, given, scored = (x.to(model.device) for x in (prompts, given, scored))
    return Answers(prompts, given, scored, read_prompt(model, prompts))


def relative_loss(
    dense: Float[np.ndarray, "draws tasks"], sparse: Float[np.ndarray, "draws tasks"]
) -> Float[np.ndarray, " tasks"]:
    """Loss of each task in shares of its dense score."""
    return 1 - sparse.mean(0) / dense.mean(0)


def mean_loss(
    arrays: Mapping[str, Float[np.ndarray, "draws tasks"]],
    method: str,
    compressions: Sequence[float],
) -> float:
    """Relative loss of a method, mean over tasks and compressions; `arrays` as in `worst_beyond_median`."""
    sparse = [arrays[f"{method} {c:g}"] for c in compressions]
    return np.mean([relative_loss(arrays["dense"], scores).mean() for scores in sparse])


def limits_table(
    arrays: Mapping[str, Float[np.ndarray, "draws tasks"]],
    methods: Sequence[str],
    compressions: Sequence[float],
    tasks: Sequence[str],
) -> pd.DataFrame:
    """Largest compression without loss of each task, one column a method; `arrays` as in `worst_beyond_median`."""
    limits = {}
    for method in methods:
        sparse = np.stack([arrays[f"{method} {c:g}"] for c in compressions])
        kept = retained(arrays["dense"].T, sparse.swapaxes(1, 2))
        limits[method] = max_compression(np.array(compressions), kept)
    return pd.DataFrame(limits, index=tasks).rename_axis("task").reset_index()


def worst_beyond_median(
    arrays: Mapping[str, Float[np.ndarray, "draws tasks"]],
    methods: Sequence[str],
    compression: float,
) -> Float[np.ndarray, " draws"]:
    """Loss of the worst task beyond 3 times the median loss, mean over the methods; pseudo-values of the draws.

    Args:
        arrays: scores by "dense" and "<method> <compression>".
    """

    def losses_of(arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [relative_loss(arrays["dense"], arrays[f"{m} {compression:g}"]) for m in methods]

    # Which task is the worst and which are in the middle is chosen once, on all draws.
    orders = [loss.argsort() for loss in losses_of(arrays)]
    tasks = arrays["dense"].shape[1]
    middle = slice((tasks - 1) // 2, tasks // 2 + 1)

    def statistic(arrays: Mapping[str, np.ndarray]) -> float:
        pairs = zip(losses_of(arrays), orders, strict=True)
        beyond = [loss[order[-1]] - 3 * loss[order[middle]].mean() for loss, order in pairs]
        return float(np.mean(beyond))

    return pseudo_values(arrays, statistic)


def nearly_every_worst(
    arrays: Mapping[str, Float[np.ndarray, "draws tasks"]],
    methods: Sequence[str],
    compression: float,
) -> Float[np.ndarray, " draws"]:
    """Loss of the worst task that all methods but one reach; pseudo-values of the draws, `arrays` as above."""

    def losses(arrays: Mapping[str, np.ndarray], method: str) -> np.ndarray:
        return relative_loss(arrays["dense"], arrays[f"{method} {compression:g}"])

    # The method, the second from below, and its worst task are chosen once, on all draws.
    method = sorted(methods, key=lambda m: losses(arrays, m).max())[min(1, len(methods) - 1)]
    task = losses(arrays, method).argmax()
    return pseudo_values(arrays, lambda a: float(losses(a, method)[task]))


def methods_table(
    results: pd.DataFrame, compressions: Sequence[float], chunk: int, page: int
) -> pd.DataFrame:
    """The six methods: phase, unit and budget; by compression the measured density, score and placebo's score.

    Args:
        results: columns method, compression, density and probability, of one prompt length.
        chunk: of Block-Sparse, tokens.
        page: of Quest, tokens.
    """
    taxonomy = [
        ("Vertical-Slash", "prefill", "columns and diagonals", "fixed, equal for heads"),
        ("FlexPrefill", "prefill", "columns and diagonals", "coverage of mass, per head and input"),
        ("Block-Sparse", "prefill", f"chunks of {chunk}", "fixed, per query chunk"),
        ("SnapKV", "decoding", "cache entries, once", "fixed, equal for heads"),
        ("Ada-SnapKV", "decoding", "cache entries, once", "shared by the heads of a layer"),
        ("Quest", "decoding", f"pages of {page}, for every token", "fixed, equal for heads"),
    ]
    table = pd.DataFrame(taxonomy, columns=["method", "phase", "unit", "budget"])
    for c in compressions:
        found = results[results.compression == c].groupby("method")
        for label, column in (("density", "density"), ("score", "probability")):
            table[f"{label}, 1/{c:g}"] = table.method.map(found[column].mean())
        table[f"placebo's score, 1/{c:g}"] = table.method.map(PLACEBOS).map(
            found.probability.mean()
        )
    return table.dropna(axis=1, how="all")


def tasks_table(results: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """Answer probability and share of right answers of dense attention by task and prompt length."""
    dense = results[results.method == "dense"]
    means = dense.groupby(["task", "length"])[["probability", "right"]].mean()
    table = means.unstack("length").loc[list(tasks)]
    names = {"probability": "answer probability", "right": "share right"}
    table.columns = [f"{names[measure]}, {length}" for measure, length in table.columns]
    return table.reset_index()


# Small Llamas at equal cost -----------------------------------------------------------------------

SMALL = Sizes(last_queries=16, sink=2, local=2)


def shape_of(model: nn.Module) -> ModelShape:
    """Its shape without embedding and output layer, which would take most of the cost at this width."""
    return replace(ModelShape.of(model.config), vocabulary=0)


def small_llamas_at(
    models: Mapping[int, nn.Module],
    length: int,
    compressions: Sequence[float],
    prompts: int,
    asked: int,
    page: int,
    seed: int,
    placebo: bool = False,
) -> tuple[pd.DataFrame, dict[tuple, Float[np.ndarray, " prompts"]]]:
    """Cost and answer probability of models by width under Vertical-Slash (reading) and Quest (writing).

    The number of lines is set on one calibration prompt for each model.

    Args:
        placebo: read with random lines of the same densities as well.

    Returns:
        One row a cell, and by (method, width, length, compression) the answer probability of each prompt.
    """
    generator = torch.Generator().manual_seed(seed + length)
    every, answers = fact_rows(prompts + 1, length, length // 8, asked, generator)
    rows, scores = [], {}
    for width, model in models.items():
        shape, given = shape_of(model), answers[1:].to(model.device)
        calibration, tokens = Calibration(model, every[:1], SMALL), every[1:].to(model.device)
        whole = read_prompt(model, tokens)
        for c in (1.0, *compressions):
            lines = AttentionMethod() if c == 1 else calibration.vertical_slash(c)
            read = _small_read(model, tokens, given, lines)
            if placebo and c > 1:
                chance = calibration.random_lines(c, seed)
                scores["random lines", width, length, c] = _small_read(model, tokens, given, chance)
            quest = "dense" if c == 1 else Quest(budget=max(round(length / c), page), page=page)
            done = decode(model, whole, quest, given=given).log_likelihood[:, ::2]
            written = done.exp().mean(1).cpu().numpy()
            rho, choosing = (1.0, 1.0), (0.0, 0.0)
            if c > 1:
                rho = lines.density(), quest.density("decode")
                kept = float(lines.kept)
                strip = vertical_slash_overhead(shape, length, SMALL.last_queries, kept, kept)
                choosing = strip, quest_overhead(shape, length, page)
            costs = (
                prefill_flops(shape, length, rho[0], choosing[0]),
                decode_transfers(shape, length, rho[1], choosing[1]),
            )
            found = zip(("Vertical-Slash", "Quest"), (read, written), rho, costs, strict=True)
            for method, score, share, cost in found:
                scores[method, width, length, c] = score
                row = {"method": method, "width": width, "length": length, "compression": c}
                rows.append(row | {"density": share, "cost": cost, "score": score.mean()})
    return pd.DataFrame(rows), scores


@dataclass(frozen=True)
class Exchange:
    """A smaller model read densely against a larger, sparse one of the same cost.

    Attributes:
        compression: of the larger one, at the largest budget that costs no more than the smaller one read
            densely; where none is so cheap, at the smallest budget, which favours the larger one.
        affordable: whether one is.
        offered: (width, compression) of every reading of the two that costs no more.
    """

    length: int
    smaller: int
    larger: int
    compression: float
    affordable: bool
    offered: tuple[tuple[int, float], ...]


def exchanges(small: pd.DataFrame, length: int, method: str = "Vertical-Slash") -> list[Exchange]:
    """The exchange of each model for the next larger one; `small` has costs, from `small_llamas_at`."""
    here = small[(small.method == method) & (small.length == length)]
    cost = here.set_index(["width", "compression"]).cost
    found = []
    for less, more in itertools.pairwise(sorted(here.width.unique().tolist())):
        offered = tuple(
            (w, c) for w in (less, more) for c in cost[w].index if cost[w, c] <= cost[less, 1.0]
        )
        budgets = [c for w, c in offered if w == more]
        taken = min(budgets, default=cost[more].index.max())
        found.append(Exchange(length, less, more, taken, bool(budgets), offered))
    return found


def exchange_scores(
    exchange: Exchange,
    scores: Mapping[tuple, Float[np.ndarray, " prompts"]],
    apart: Mapping[tuple, Float[np.ndarray, " others"]],
    method: str = "Vertical-Slash",
) -> dict[str, Float[np.ndarray, " prompts"]]:
    """Scores of the readings that an exchange compares; what is best among those offered is chosen on `apart`.

    Args:
        scores, apart: (method, width, length, compression) -> one score a prompt, of different prompts.
    """
    e = exchange

    def read(width: int, compression: float, of: Mapping = scores, method: str = method):
        return of[method, width, e.length, compression]

    def best(cells: Iterable[tuple[int, float]]) -> np.ndarray:
        return read(*max(cells, key=lambda cell: read(*cell, apart).mean()))

    made = {
        "smaller, dense": read(e.smaller, 1.0),
        "larger, dense": read(e.larger, 1.0),
        "larger, sparse": read(e.larger, e.compression),
        "smaller, best": best(cell for cell in e.offered if cell[0] == e.smaller),
        "best sparse": best(cell for cell in e.offered if cell[1] > 1),
    }
    if ("random lines", e.larger, e.length, e.compression) in scores:
        made["larger, random lines"] = read(e.larger, e.compression, method="random lines")
    return made


@torch.inference_mode()
def _small_read(
    model: nn.Module, prompts: Tensor, answers: Tensor, method: AttentionMethod
) -> np.ndarray:
    """Probability of each prompt's answers; prompt, keys and answers are read in one pass with `method`."""
    asked = prompts.shape[1] - 1 + torch.arange(0, answers.shape[1], 2, device=prompts.device)
    with attach(model, method):
        logits = model(torch.cat([prompts, answers[:, :-1]], dim=1), logits_to_keep=asked).logits
    return logits.softmax(-1).gather(-1, answers[:, ::2, None]).mean((1, 2)).cpu().numpy()


class LawCells:
    """The cells that a scaling law is fitted to, all but those of the largest compression."""

    def __init__(
        self, models: Mapping[int, nn.Module], lengths: Sequence[int], compressions: Sequence[float]
    ) -> None:
        self.cells = [(w, n, c) for w in models for n in lengths for c in (1.0, *compressions)]
        self.seen = np.array([c < max(compressions) for *_, c in self.cells])
        shapes = {width: shape_of(model) for width, model in models.items()}
        sizes = {w: s.layers * (4 * w**2 + 3 * w * s.feed_forward) for w, s in shapes.items()}
        columns = [sizes[w] for w, *_ in self.cells], *list(zip(*self.cells, strict=True))[1:]
        self.features = [np.array(column, dtype=float) for column in columns]

    def fit(self, scores: Float[np.ndarray, " cells"]) -> dict[str, float]:
        """The law's constants, and R^2 of logits on the cells that it is fitted to and on the held-out ones."""
        law = fit_scaling_law(*(x[self.seen] for x in self.features), scores[self.seen])
        guess, truth = logit(law.predict(*self.features)), logit(scores)
        return {
            "b_0": law.constant,
            "b_N": law.size,
            "b_L": law.length,
            "b_C": law.compression,
            "R^2, fitted": r_squared(guess[self.seen], truth[self.seen]),
            "R^2, held out": r_squared(guess[~self.seen], truth[~self.seen]),
        }
