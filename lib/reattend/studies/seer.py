"""Gates distilled from a frozen model, methods of equal density beside them, and what each covers and costs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from reattend.attention.baselines.block_topk import BlockTopK, exact_block_mass
from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.baselines.vertical_slash import (
    VerticalSlash,
    last_weights,
    vertical_slash_blocks,
    vertical_slash_mass,
)
from reattend.attention.blocks import block_count, density, top_k_blocks
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod, BlockSparseMethod
from reattend.data.long_tasks import position_nll
from reattend.data.needles import NeedleSample
from reattend.long_context.seer_attention import (
    AttentionGates,
    Distillation,
    Example,
    SeerAttention,
    distillation_loss,
    unrotate,
)
from reattend.studies.prefill import Capture, RandomLike
from reattend.training.loop import TrainingPlan, train

EVERY = 4  # essays are scored at every fourth token
HEURISTICS = ("block top-k", "StreamingLLM", "vertical-slash")
LAST_QUERIES = 64  # that rank the lines of vertical-slash


def kept(share: float, blocks: int) -> int:
    """Blocks of each row whose measured density is nearest to `share`."""
    counts = np.arange(1, blocks + 1)
    return int(counts[np.abs(rows_density(counts, blocks) - share).argmin()])


def rows_density(k: int | np.ndarray, blocks: int) -> float | np.ndarray:
    """Share of the causal blocks when each row keeps `k`: k(k+1)/2 + (n-k)k of n(n+1)/2."""
    return (k * (k + 1) / 2 + (blocks - k) * k) / (blocks * (blocks + 1) / 2)


@dataclass
class GatedModel:
    """A frozen model, the gates that were distilled from it, and methods of equal density.

    Attributes:
        trained: gates of all layers, by seed.
        unplaced: gates of the layers `thinned`, trained without the rotary embedding of the blocks.
        budgets: columns and diagonals of vertical-slash, by density.
    """

    model: nn.Module
    block_size: int
    thinned: Sequence[int]
    trained: list[AttentionGates] = field(default_factory=list)
    unplaced: list[AttentionGates] = field(default_factory=list)
    budgets: dict[float, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rotary = self.model.model.rotary_emb
        self.inv_freq, self.scaling = rotary.inv_freq, rotary.attention_scaling
        self.reference = self.new_gates(0)  # says how to pool

    def new_gates(self, seed: int, positions: bool = True) -> AttentionGates:
        """Untrained gates of all layers, or of the thinned ones without positions."""
        torch.manual_seed(seed)
        config = self.model.config
        gates = AttentionGates(
            layers=config.num_hidden_layers if positions else len(self.thinned),
            query_heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            dim=2 * len(self.inv_freq),
            block_size=self.block_size,
            rotary_base=config.rope_parameters["rope_theta"] if positions else None,
        )
        return gates.to(self.model.device)

    @torch.no_grad()
    def collect(self, tokens: Int[Tensor, " length"]) -> Example:
        """Pooled vectors and truth of one sequence, all layers."""
        collector = Distillation(self.reference, self.inv_freq, rotary_scaling=self.scaling)
        with attach(self.model, collector):
            self.model(tokens[None].to(self.model.device), logits_to_keep=1)
        return collector.example()

    def thin(self, example: Example) -> Example:
        """The thinned layers of an example."""
        return Example(*(part[:, list(self.thinned)] for part in example))

    @torch.no_grad()
    def set_budgets(
        self, tokens: Int[Tensor, " length"], shares: Iterable[float], stride: int
    ) -> None:
        """Gives vertical-slash the smallest budget of at least each density on one text."""
        with attach(self.model, Capture(stride)) as captured:
            self.model(tokens[None].to(self.model.device), logits_to_keep=1)
        masses, maps = [], []
        for q, k, s in captured.seen.values():
            weights = last_weights(q, k, LAST_QUERIES, s)
            masses.append(vertical_slash_mass(weights, self.block_size))
            maps.append(exact_block_mass(q, k, self.block_size, s))
        joined = [torch.cat(x, dim=1) for x in zip(*masses, strict=True)], torch.cat(maps, dim=1)
        blocks = block_count(len(tokens), self.block_size)
        for share in shares:
            self.budgets[share] = covering(*joined, rows_density(kept(share, blocks), blocks))

    def build(self, name: str, share: float, length: int, seed: int = 0) -> BlockSparseMethod:
        """A method at one density for prompts of a length; gates, or random blocks, of a seed."""
        k, size = kept(share, block_count(length, self.block_size)), self.block_size
        if name == "gates":
            gates = self.trained[seed]
            scaling = {"inv_freq": self.inv_freq, "rotary_scaling": self.scaling}
            return SeerAttention(gates=gates, k=k, **scaling)
        if name == "vertical-slash":
            lines = dict(zip(("verticals", "slashes"), self.budgets[share], strict=True))
            return VerticalSlash(**lines, last_queries=LAST_QUERIES, block_size=size)
        if name == "StreamingLLM":
            return StreamingLLM(sink=size, window=max(k - 1, 1) * size, block_size=size)
        top = BlockTopK(k=k, sink=1, block_size=size)
        return top if name == "block top-k" else RandomLike(top, seed)

    @torch.no_grad()
    def recall(
        self,
        captured: Capture,
        length: int,
        shares: Iterable[float],
        seed: int,
        stride: int,
        heuristics: Sequence[str] = (),
    ) -> list[dict]:
        """Recall (%) of attention mass and measured density of every method on one text, cut to a length.

        A dense pass over a text is, cut short, a dense pass over its beginning: attention is causal.
        """
        found: dict[tuple, list] = {}
        blocks = block_count(length, self.block_size)
        for layer in (n for n in captured.seen if n % stride == 0):
            query, key, scale = captured.seen[layer]
            query, key = query[:, :, :length], key[:, :, :length]
            mass = exact_block_mass(query, key, self.block_size, scale) / length
            scores = {"best possible": mass, **self._gate_scores(query, key, layer, seed)}
            for share in shares:
                k = kept(share, blocks)
                chosen = {n: top_k_blocks(x, k, diagonal=False) for n, x in scores.items()}
                for name in ("random", *heuristics):
                    method = self.build(name, share, length)
                    chosen[name] = method.block_mask(query, key, scale=scale, layer=layer)
                for name, mask in chosen.items():
                    covered = (mass * mask).sum((-2, -1)).mean().item()
                    found.setdefault((name, share), []).append(
                        (covered, density(mask).mean().item())
                    )
        rows = []
        for (name, share), values in found.items():
            covered, measured = np.mean(values, axis=0)
            row = {"length": length, "method": name, "density": share, "recall": 100 * covered}
            rows.append(row | {"measured": measured})
        return rows

    def _gate_scores(self, query: Tensor, key: Tensor, layer: int, seed: int) -> dict[str, Tensor]:
        before = [unrotate(x, 0, self.inv_freq, self.scaling) for x in (query, key)]
        pooled = [
            self.reference.pool_queries(before[0])[:, None],
            self.reference.pool_keys(before[1])[:, None],
        ]
        scores = {"gates": self.trained[seed](*pooled, layers=slice(layer, layer + 1))[:, 0]}
        if layer in self.thinned:
            place = list(self.thinned).index(layer)
            gates = self.unplaced[seed % len(self.unplaced)]
            scores["no positions"] = gates(*pooled, layers=slice(place, place + 1))[:, 0]
        return scores


def covering(
    masses: Sequence[Float[Tensor, "batch heads blocks"]],
    maps: Float[Tensor, "batch heads rows columns"],
    target: float,
) -> tuple[int, int]:
    """Numbers (verticals, slashes) of at least a density that cover most attention mass of one text.

    Args:
        masses: of columns and of diagonals of blocks, which rank them.
        maps: attention mass of every block.
    """

    def best(mass: Tensor, count: int) -> Tensor:
        first = F.pad(mass[..., 1:], (1, 0), value=torch.inf)
        return first.argsort(dim=-1, descending=True).argsort(dim=-1) < count

    found, blocks = {}, maps.shape[-1]
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        for size in range(2, 2 * blocks + 1):
            columns = min(max(1, round(share * size)), size - 1)
            lines = best(masses[0], columns), best(masses[1], size - columns)
            selected = vertical_slash_blocks(*lines, blocks)
            if density(selected).mean() >= target:
                found[columns, size - columns] = (maps * selected).sum().item()
                break
    return max(found, key=found.get)


def gate_loss(gates: AttentionGates, example: Example) -> Tensor:
    """The paper's loss: 10 times the divergence from the truth."""
    return 10 * distillation_loss(gates(*example[:2]), example.truth)


@torch.no_grad()
def found_blocks(gates: AttentionGates, example: Example, k: int) -> float:
    """Share of the truth's k best blocks of each row that the gates select too."""
    maps = gates(*example[:2]), example.truth
    ours, best = (top_k_blocks(x.flatten(1, 2), k, diagonal=False)[..., k:, :] for x in maps)
    return ((ours & best).sum() / best.sum()).item()


def distil(
    gates: AttentionGates,
    examples: Sequence[Example],
    plan: TrainingPlan,
    seed: int,
    after_step: Callable[[int], None] = lambda step: None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[float]:
    """Trains gates on the examples, one a step, in an order of their own; the loss of every step."""
    order = random.Random(seed)
    shuffled = (x for _ in itertools.count() for x in order.sample(examples, len(examples)))
    log = train(gates, shuffled, gate_loss, plan, after_step=after_step, progress=progress)
    gates.requires_grad_(False)
    return log.losses


@dataclass(frozen=True)
class Reading:
    """A prompt read with a method and its questions answered densely.

    Attributes:
        essay_nll: mean over every fourth token of the prompt's prose, nats.
        answers: log-probabilities at the answers' tokens, [tokens, vocabulary].
        tokens: those tokens.
    """

    essay_nll: float
    answers: Tensor
    tokens: Tensor

    def compared(self, dense: Reading) -> dict[str, float]:
        """What is kept of a reading; the divergence is that from `dense`, mean over tokens."""
        kl = F.kl_div(self.answers, dense.answers, reduction="batchmean", log_target=True).item()
        right = (self.answers.argmax(-1) == self.tokens).float().mean().item()
        answer = F.nll_loss(self.answers, self.tokens).item()
        scores = {"essay NLL": self.essay_nll, "answer NLL": answer, "answer KL": kl}
        return scores | {"tokens right, %": 100 * right}


@torch.inference_mode()
def read(
    model: nn.Module, method: AttentionMethod, sample: NeedleSample, question: Sequence[int]
) -> Reading:
    """Reads a prompt up to the first question with a method, and the questions and answers densely.

    Args:
        question: the tokens that the question behind the prompt starts with.
    """
    prompt = torch.tensor(sample.prompt, device=model.device)
    starts = range(len(prompt) - len(question))
    cut = max(i for i in starts if list(sample.prompt[i : i + len(question)]) == list(question))
    context, rest = prompt[:cut], torch.cat([prompt[cut:], prompt.new_tensor(sample.answer)])
    cache = DynamicCache(config=model.config)
    prose = torch.tensor(sample.prose[1:cut], device=model.device)
    asked = prose.nonzero().flatten()[::EVERY]
    with attach(model, method):
        logits = model(context[None], past_key_values=cache, logits_to_keep=asked).logits[0]
    essay_nll = F.cross_entropy(logits.float(), context[1:][asked]).item()
    counts = [False] * (len(prompt) - cut - 1) + list(sample.scored)
    scored = torch.tensor(counts, device=model.device)
    logits = model(rest[None], past_key_values=cache, use_cache=True).logits[0, :-1].float()
    return Reading(essay_nll, logits[scored].log_softmax(-1), rest[1:][scored])


@torch.inference_mode()
def window_nll(
    model: nn.Module, window: Int[Tensor, " length"], method: AttentionMethod
) -> Float[Tensor, " positions"]:
    """NLL at every fourth position of one text read with a method."""
    with attach(model, method):
        return position_nll(model, window[None], every=EVERY)[0]


def leads(
    table: Mapping, names: Iterable[str], shares: Iterable[float], sign: int
) -> dict[str, Tensor]:
    """Advantage of the gates over each method at each density, by prompt; `sign` -1: lower is better."""
    pairs = itertools.product(names, shares)
    return {f"{n} {d}": sign * (table["gates", d] - table[n, d]) for n, d in pairs}
