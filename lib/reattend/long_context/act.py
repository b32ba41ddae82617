"""ACT: attention calibration, which weakens attention sinks behind the first token.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
Training through Attention Calibration", ICML 2024, arXiv 2406.15765.

A *sink* is a key that the queries behind it attend to far more than evenly. In chosen heads the
attention paid to sinks other than the first token is multiplied by beta, and what is freed goes to
the other keys in proportion to the attention they have (Section 4 of the paper). No weight of the
model changes.

    weights = softmax(...)                                   [..., queries, keys]
    found = sinks(column_score(weights), alpha=5.0)          [..., keys]
    calibrated = calibrate(weights, found, beta=0.4)         [..., queries, keys]
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reattend.attention.dense import (
    causal_sdpa,
    causal_token_mask,
    masked_softmax,
    repeat_key_heads,
    widened,
)
from reattend.attention.method import AttentionMethod, check_count, per_sequence

Heads = Iterable[tuple[int, int]]


class ACT(AttentionMethod):
    """Calibrates chosen heads while a prompt is read, for any model that `attach` accepts.

    The other heads, and chosen heads in which a prompt has no sink, keep the output of dense
    attention bit by bit. A chunk behind a cache is calibrated on its own rows, since the rows before
    it are gone. Decoding one token is dense: a single row has no column to average, and the
    official code has no cache either.
    """

    def __init__(
        self,
        *,
        heads: Heads | None = None,
        alpha: float = 5.0,
        beta: float = 0.4,
        threshold: float | None = None,
        min_rows: int = 1,
    ) -> None:
        """
        Args:
            heads: the (layer, head) pairs to calibrate; None is every head of every layer.
            alpha: a sink has more than `alpha` times the even share of attention, 1 / keys.
            beta: what remains of the attention to a sink; 0 removes it, above 1 amplifies it.
            threshold: a fixed threshold on the column score instead of alpha / keys; the official
                code uses 0.1.
            min_rows: fewest queries that must see a key before it can be a sink. The paper has no
                such limit (1), so its last columns are means over very few rows.

        Raises:
            ValueError: a value is out of its range.
        """
        super().__init__()
        self.alpha, self.threshold = _check_positive("alpha", alpha), threshold
        if threshold is not None:
            _check_positive("threshold", threshold)
        self.beta = _check_beta(beta)
        self.min_rows = check_count("min_rows", min_rows, at_least=1)
        self.heads = None if heads is None else _by_layer(heads)

    def prefill(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        value: Float[Tensor, "batch key_heads keys value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch query_heads queries value_dim"]:
        """Dense attention, with the chosen heads of this layer calibrated.

        Raises:
            ValueError: a chosen head does not exist in this layer.
        """
        chosen = self._heads_of(layer, query.shape[1])
        if not chosen:
            return super().prefill(query, key, value, scale=scale, layer=layer, padding=padding)
        self.record(layer, query.new_ones(query.shape[:2]))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            dense = causal_sdpa(query, key, value, scale=scale)
            weights = attention_map(query, key, scale, heads=chosen)
            found = sinks(
                column_score(weights),
                alpha=self.alpha,
                threshold=self.threshold,
                min_rows=self.min_rows,
            )
            values = widened(repeat_key_heads(value, query.shape[1])[:, chosen])
            output = (calibrate(weights, found, self.beta) @ values).to(value.dtype)
            # Nothing to calibrate: the fused kernel's own numbers, so that nothing changes at all.
            output = output.where(found.any(dim=-1)[..., None, None], dense[:, chosen])
            index = torch.tensor(chosen, device=query.device)
            return dense.index_copy(1, index, output)

        return per_sequence(attend, query, key, value, padding)

    def _heads_of(self, layer: int, count: int) -> list[int]:
        """The heads to calibrate in one layer of `count` heads, rising."""
        if self.heads is None:
            return list(range(count))
        chosen = self.heads.get(layer, [])
        if chosen and chosen[-1] >= count:
            raise ValueError(f"layer {layer} has {count} heads, so there is no head {chosen[-1]}")
        return chosen


class SinkSurvey(AttentionMethod):
    """Dense attention that keeps the column scores of every head, to find sinks in (Section 3).

    `scores[layer]` is `Float[Tensor, "batch query_heads keys"]` of the last prompt. Prompts of
    unequal lengths need one call each: the survey refuses padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[int, Tensor] = {}

    def prefill(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        value: Float[Tensor, "batch key_heads keys value_dim"],
        *,
        scale: float,
        layer: int,
        padding: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch query_heads queries value_dim"]:
        """Dense attention.

        Raises:
            ValueError: the batch is padded.
        """
        if padding is not None:
            raise ValueError("column scores of a padded batch have no common length")
        self.scores[layer] = column_score(attention_map(query, key, scale))
        return super().prefill(query, key, value, scale=scale, layer=layer)

    def stacked(self) -> Float[Tensor, "batch layers query_heads keys"]:
        """The scores of all layers.

        Raises:
            ValueError: no prompt has been read.
        """
        if not self.scores:
            raise ValueError("no prompt was surveyed: run the model first")
        return torch.stack([self.scores[layer] for layer in sorted(self.scores)], dim=1)


def attention_map(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    scale: float,
    heads: list[int] | None = None,
) -> Float[Tensor, "batch chosen queries keys"]:
    """Causal attention weights of the chosen query heads (all for None), in float32 at least."""
    key = repeat_key_heads(key, query.shape[1])
    if heads is not None:
        query, key = query[:, heads], key[:, heads]
    # In half precision the non-sinks of a row could underflow together.
    scores = scale * widened(query) @ widened(key).transpose(-2, -1)
    return masked_softmax(scores, causal_token_mask(*scores.shape[-2:], device=scores.device))


def column_score(
    weights: Float[Tensor, "*batch queries keys"],
) -> Float[Tensor, "*batch keys"]:
    """a[k] = mean of A[i, k] over the rows i >= k, those that can see key k (Equation 2).

    The last query stands at the last key; with fewer queries than keys the mean is over the queries
    that are there.
    """
    return weights.sum(dim=-2) / visible_rows(*weights.shape[-2:], device=weights.device)


def visible_rows(
    queries: int, keys: int, device: torch.device | str | None = None
) -> Int[Tensor, " keys"]:
    """How many queries see each key under the causal mask."""
    return torch.arange(keys, 0, -1, device=device).clamp_max(queries)


def sinks(
    score: Float[Tensor, "*batch keys"],
    *,
    alpha: float = 5.0,
    threshold: float | None = None,
    min_rows: int = 1,
) -> Bool[Tensor, "*batch keys"]:
    """The sinks behind the first token, S = {k >= 1: a[k] > alpha / keys}.

    The first token is never among them, whatever its score: its attention helps (the official code
    drops the first sink that it detects instead, which is another token where the first has none).

    Args:
        score: column scores, see `column_score`.
        alpha: multiple of the even share.
        threshold: used in place of alpha / keys when given.
        min_rows: keys that fewer queries see are no sinks.
    """
    keys = score.shape[-1]
    found = score > (alpha / keys if threshold is None else threshold)
    position = torch.arange(keys, device=score.device)
    return found & (position >= 1) & (position <= keys - min_rows)


def calibrate(
    weights: Float[Tensor, "*batch queries keys"],
    found: Bool[Tensor, "*batch keys"],
    beta: float = 0.4,
) -> Float[Tensor, "*batch queries keys"]:
    """The calibrated map A', whose rows sum to 1 like those of A (Equations 3 and 4).

        A'[i, s] = beta A[i, s]                                   for sinks s
        A'[i, j] = A[i, j] + (1 - beta) m_i A[i, j] / r_i         for the others

    m_i and r_i are the row's attention to sinks and to the others. With the sinks in S the first
    token, which every row sees, is among the others; it receives the largest part in most heads.
    Rows whose others have no attention at all stay as they are, and beta > 1 is limited in each row
    to 1 / m_i, so that no weight turns negative.

    Args:
        weights: attention weights; rows sum to 1.
        found: the sinks of each map.
        beta: what remains of the attention to a sink, at least 0.

    Raises:
        ValueError: beta is negative.
    """
    _check_beta(beta)
    columns = found[..., None, :]
    on_sinks = (weights * columns).sum(dim=-1, keepdim=True)
    on_others = (weights * ~columns).sum(dim=-1, keepdim=True)
    tiny = torch.finfo(weights.dtype).tiny
    remaining = (1 / on_sinks.clamp_min(tiny)).clamp_max(beta)
    remaining = remaining.where(on_others > 0, 1.0)
    growth = 1 + (1 - remaining) * on_sinks / on_others.clamp_min(tiny)
    return weights * remaining.where(columns, growth.clamp_min(0))


def improving_heads(
    calibrated: Float[Tensor, "candidates items"],
    baseline: Float[Tensor, " items"],
    candidates: list[tuple[int, int]],
    margin: float = 0.0,
) -> list[tuple[int, int]]:
    """The candidates whose calibration alone raises the mean score by more than `margin` (Sec. 4.2).

    Args:
        calibrated: score of every item with that one head calibrated, such as 1 for a right answer.
        baseline: score of the same items without calibration.
        candidates: the (layer, head) of each row.
        margin: what the gain must exceed, in units of the score.

    Raises:
        ValueError: not one row for each candidate.
    """
    if len(calibrated) != len(candidates):
        raise ValueError(f"{len(candidates)} candidates, but scores of {len(calibrated)}")
    gain = (calibrated.double() - baseline.double()).mean(dim=-1)
    return [head for head, kept in zip(candidates, (gain > margin).tolist(), strict=True) if kept]


def _by_layer(heads: Heads) -> dict[int, list[int]]:
    """Heads by layer, rising, each once."""
    layers: dict[int, set[int]] = {}
    for layer, head in heads:
        check_count("the layer of a head", layer)
        layers.setdefault(layer, set()).add(check_count("a head", head))
    return {layer: sorted(chosen) for layer, chosen in layers.items()}


def _check_positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return value


def _check_beta(beta: float) -> float:
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, got {beta!r}")
    return beta
