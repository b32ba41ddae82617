"""Trained gates, methods that compute equally many blocks beside them, and what each covers and costs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from reattend.attention.baselines.block_topk import BlockTopK, OracleTopK, exact_block_mass
from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.baselines.vertical_slash import last_weights, vertical_slash_mass
from reattend.attention.blocks import block_count, density, top_k_blocks
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod, BlockSparseMethod
from reattend.backbones.trained.seer_attention import (
    THINNED,
    Trained,
    kept,
    map_correlation,
    rows_blocks,
)
from reattend.data.long_tasks import position_nll
from reattend.data.needles import NeedleSample
from reattend.long_context.seer_attention import (
    AttentionGates,
    SeerAttention,
    truth_map,
    unrotate,
)
from reattend.studies.prefill import Capture, RandomLike

EVERY = 4  # prose is scored at every fourth token
HEURISTICS = ("block top-k", "StreamingLLM", "vertical-slash")
LAST_QUERIES = 64  # that rank the lines of vertical-slash
COLUMN_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of its lines, tried for every head
STRETCHED = "stretched positions"
ARMS = {
    "gates": "gates",
    "other seed": "other",
    "half the steps": "half",
    "half the text": "fewer",
    "no positions": "unplaced",
}


def stretched(gates: AttentionGates, factor: float) -> AttentionGates:
    """The same gates with the position of every block multiplied by `factor`.

    With training length / length they see every text as if it were as long as those of the training.
    """
    twin = copy.deepcopy(gates)
    twin.inv_freq = factor * gates.inv_freq
    return twin


def line_order(
    columns: Float[Tensor, "batch heads blocks"],
    diagonals: Float[Tensor, "batch heads blocks"],
    share: Float[Tensor, " heads"],
) -> Float[Tensor, "batch heads blocks blocks"]:
    """When vertical-slash takes each block if lines come one after the other; inf in the future.

    Columns and diagonals are ranked by their mass, r = 0, 1, 2, ..., the first column and the main
    diagonal before all. Of the lines a share s are columns, so that the column of rank r comes at r / s
    and the diagonal of rank r at r / (1 - s), and a block with the first of its two lines:

        T_ij = min(r_j / s, r'_(i-j) / (1 - s))
    """
    blocks = columns.shape[-1]

    def ranks(mass: Tensor) -> Tensor:
        first = F.pad(mass[..., 1:], (1, 0), value=torch.inf)
        return first.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).double()

    place = torch.arange(blocks, device=columns.device)
    distance = place[:, None] - place
    by_column = ranks(columns) / share[:, None]
    by_diagonal = (ranks(diagonals) / (1 - share[:, None]))[..., distance.clamp_min(0)]
    return torch.minimum(by_column[..., None, :], by_diagonal).masked_fill(distance < 0, torch.inf)


def earliest(
    order: Float[Tensor, "batch heads blocks blocks"], count: int
) -> Bool[Tensor, "batch heads blocks blocks"]:
    """The `count` blocks that come first; of a line that does not fit whole, its lowest rows."""
    late = torch.arange(order.shape[-2] - 1, -1, -1, device=order.device, dtype=order.dtype)
    ranked = (order + 1e-6 * late[:, None]).flatten(-2)
    first = ranked.topk(count, dim=-1, largest=False).indices
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, first, True).view(order.shape)


class EqualVerticalSlash(BlockSparseMethod):
    """Vertical-slash with exactly as many blocks in every head as k a row are.

    The pattern of MInference for whole prompts: the last queries rank columns and diagonals of blocks.
    """

    def __init__(self, k: int, shares: Mapping[int, Float[Tensor, " heads"]], block_size: int):
        """
        Args:
            shares: of the columns among the lines of each head, by layer.
        """
        super().__init__(block_size=block_size)
        self.k, self.shares = k, shares

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads blocks blocks"]:
        weights = last_weights(query, key, LAST_QUERIES, scale)
        masses = vertical_slash_mass(weights, self.block_size)
        order = line_order(*masses, self.shares[layer])
        return earliest(order, rows_blocks(self.k, order.shape[-1]))


@dataclass
class GatedModel:
    """A frozen model, gates that were distilled from it, and methods of as many blocks.

    Attributes:
        shares: of the columns among the lines of vertical-slash, [heads], by density and layer.
    """

    model: nn.Module
    trained: Trained
    shares: dict[float, dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rotary = self.model.model.rotary_emb
        self.inv_freq, self.scaling = rotary.inv_freq, rotary.attention_scaling
        self.block_size = self.trained.setting.block_size

    def gates(self, name: str, length: int) -> AttentionGates:
        """Gates by name, for prompts of a length."""
        if name == STRETCHED:
            return stretched(self.trained.gates["gates"], self.trained.setting.tokens / length)
        return self.trained.gates[ARMS[name]]

    @torch.no_grad()
    def set_lines(self, tokens: Int[Tensor, " length"], densities: Iterable[float]) -> None:
        """Gives every head the division into columns and diagonals that covers most attention of one text."""
        with attach(self.model, Capture()) as captured:
            self.model(tokens[None].to(self.model.device), logits_to_keep=1)
        for layer, (query, key, scale) in captured.seen.items():
            masses = vertical_slash_mass(
                last_weights(query, key, LAST_QUERIES, scale), self.block_size
            )
            truth = exact_block_mass(query, key, self.block_size, scale)
            tried = torch.tensor(COLUMN_SHARES, device=query.device).double()
            orders = [line_order(*masses, share.expand(query.shape[1])) for share in tried]
            for d in densities:
                count = rows_blocks(kept(d, truth.shape[-1]), truth.shape[-1])
                covered = [(truth * earliest(order, count)).sum((0, -2, -1)) for order in orders]
                best = torch.stack(covered).argmax(dim=0)
                self.shares.setdefault(d, {})[layer] = tried[best]

    def build(self, name: str, share: float, length: int, seed: int = 0) -> BlockSparseMethod:
        """A method at one density for prompts of a length; random blocks of a seed."""
        k, size = kept(share, block_count(length, self.block_size)), self.block_size
        if name in ("gates", STRETCHED):
            scaling = {"inv_freq": self.inv_freq, "rotary_scaling": self.scaling}
            return SeerAttention(gates=self.gates(name, length), k=k, **scaling)
        if name == "vertical-slash":
            return EqualVerticalSlash(k, self.shares[share], size)
        if name == "StreamingLLM":
            return StreamingLLM(sink=size, window=max(k - 1, 1) * size, block_size=size)
        if name == "best possible":
            return OracleTopK(k=k, block_size=size)
        top = BlockTopK(k=k, sink=1, block_size=size)
        return top if name == "block top-k" else RandomLike(top, seed)

    @torch.no_grad()
    def recall(
        self,
        captured: Capture,
        length: int,
        shares: Iterable[float],
        arms: Sequence[str],
        others: Sequence[str] = ("random",),
    ) -> list[dict]:
        """Recall (%) of attention mass and measured density of every method on one text, cut to a length.

        A dense pass over a text is, cut short, a dense pass over its beginning: attention is causal.

        Args:
            captured: every fifth layer, those that all gates have.
            arms: the gates, by name.
            others: heuristics and random blocks.
        """
        found: dict[tuple, list] = {}
        blocks = block_count(length, self.block_size)
        gates = {name: self.gates(name, length) for name in arms}
        for layer in captured.seen:
            query, key, scale = self._cut(captured, layer, length)
            mass = exact_block_mass(query, key, self.block_size, scale) / length
            scores = {"best possible": mass}
            for name, one in gates.items():
                place = layer if name in ("gates", STRETCHED) else layer // THINNED
                scores[name] = self._scores(one, query, key, place)
            for share in shares:
                k = kept(share, blocks)
                chosen = {n: top_k_blocks(x, k, diagonal=False) for n, x in scores.items()}
                for name in others:
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

    @torch.no_grad()
    def follows(
        self, captured: Capture, length: int, shares: Iterable[float], seed: int
    ) -> tuple[float, float]:
        """How well the gates follow what they learn on one text: their choice, and their map.

        Returns:
            How far they go from random blocks to the k best ones of each row of the map M that they
            learn, in the mass of M on them, as a share, mean over the densities; and the correlation of
            their map with M, mean over heads. Both over the captured layers.
        """
        correlations, masses = [], []
        for layer in captured.seen:
            query, key, scale = self._cut(captured, layer, length)
            scores = self._scores(self.gates("gates", length), query, key, layer)
            truth = truth_map(query, key, self.block_size, scale)
            correlations.append(map_correlation(scores.softmax(-1), truth))
            for share in shares:
                k = kept(share, truth.shape[-1])
                chosen = [top_k_blocks(x, k, diagonal=False) for x in (scores, truth)]
                luck = self.build("random", share, length, seed)
                chosen.append(luck.block_mask(query, key, scale=scale, layer=layer))
                masses.append([(truth * mask).sum().item() for mask in chosen])
        ours, best, luck = np.array(masses).reshape(len(correlations), -1, 3).sum(axis=0).T
        return float(np.mean((ours - luck) / (best - luck))), float(np.mean(correlations))

    def _cut(self, captured: Capture, layer: int, length: int) -> tuple[Tensor, Tensor, float]:
        query, key, scale = captured.seen[layer]
        return query[:, :, :length], key[:, :, :length], scale

    def _scores(self, gates: AttentionGates, query: Tensor, key: Tensor, place: int) -> Tensor:
        """The map of the gates' layer `place`, from vectors after the rotary embedding."""
        before = [unrotate(x, 0, self.inv_freq, self.scaling) for x in (query, key)]
        pooled = gates.pool_queries(before[0])[:, None], gates.pool_keys(before[1])[:, None]
        return gates(*pooled, layers=slice(place, place + 1))[:, 0]


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
