"""OptiPrune: noise optimised by attention (InitNO) and tokens pruned by similarity (SiTo) (arXiv 2507.00789).

A text-to-image model loses or mixes the objects of a prompt for some initial noises and not for others.
LatentMapper reads two scores of a noise off the attention maps of one pass at the noisiest step, and moves
the noise until both are low, while its mean and variance stay near those of a standard normal:

    neglect    S_cross = 1 - min_i max A^{y_i}     the weakest of the objects has no strong response anywhere
    conflict   S_self  = mean over pairs of f      the objects' strongest positions attend to the same place
    z = z_T exp(log_variance / 2) + mean,  KL(N(mean, variance) || N(0, 1)) <= 1e-3

SimPrune makes self-attention cheaper: tokens that resemble a typical token of their neighbourhood are left
out, and get a copy of the output of the token they resemble most.

Maps are square and already processed: [batch, concepts, side, side] of the words that name the objects,
averaged over layers and heads. No code of OptiPrune is public; the two parts follow the released code of
the methods that it combines, and how they are combined is our reading.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import combinations
from math import isqrt
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reattend.generation.word_maps import joined_to_peak, otsu_threshold, overlap, smooth
from reattend.trunks.diffusion import AttentionHooks, Kind, Reduction

Maps = Float[Tensor, "batch concepts side side"]

LEVELS = 256
"""Grey levels of Otsu's threshold."""

# Scores of a noise ----------------------------------------------------------------------------------


def neglect(maps: Maps) -> Float[Tensor, " batch"]:
    """S_cross = 1 - min over concepts of the maximum of their cross-attention map."""
    return 1 - maps.flatten(2).amax(-1).amin(-1)


def conflict(
    maps: Maps, self_maps: Float[Tensor, "batch positions positions"]
) -> Float[Tensor, " batch"]:
    """S_self: mean over pairs of concepts of f, the overlap of the smoothed self-attention maps at their peaks.

    Args:
        maps: cross-attention; only the places of their maxima count, which carry no gradient.
        self_maps: rows are queries, positions row by row.

    Raises:
        ValueError: for a single concept, which has nothing to be in conflict with.
    """
    batch, concepts, side, _ = maps.shape
    if concepts < 2:
        raise ValueError("conflict needs two concepts or more; score a single one by neglect alone")
    peaks = maps.flatten(2).argmax(-1)
    rows = self_maps.gather(1, peaks[..., None].expand(-1, -1, side**2))
    seen = smooth(rows.reshape(batch, concepts, side, side))
    pairs = combinations(range(concepts), 2)
    return torch.stack([overlap(seen[:, i], seen[:, j], 1e-6) for i, j in pairs]).mean(0)


@torch.no_grad()
def foreground(maps: Maps) -> Bool[Tensor, "batch concepts side side"]:
    """Positions at or above Otsu's threshold that hang together (4 neighbours) with the map's maximum.

    As in the released code, by way of OpenCV, the threshold is one of 256 grey levels and its own level counts
    as above. Values are at most 1.
    """
    levels = (maps * (LEVELS - 1)).long().double()
    threshold = (otsu_threshold(levels.flatten(-2)) / (LEVELS - 1)).to(maps.dtype)
    return joined_to_peak(maps, maps >= threshold[..., None, None])


def stray(maps: Maps) -> Float[Tensor, " batch"]:
    """The clean loss: sum over concepts of the maximum outside the foreground, where it exceeds its minimum."""
    inside = foreground(maps)
    outside = maps.masked_fill(inside, 0.0).flatten(2).amax(-1)
    least = maps.masked_fill(~inside, 1.0).flatten(2).amin(-1)
    return torch.where(outside > least, outside, 0 * outside).sum(-1)


@dataclass(frozen=True)
class Scores:
    """Scores of a batch of noises; low is good.

    Args:
        neglect, conflict, stray: see the functions of these names.
        gate: conflict does not count while neglect is above it: peaks of an object that is not there mean nothing.
    """

    neglect: Float[Tensor, " batch"]
    conflict: Float[Tensor, " batch"]
    stray: Float[Tensor, " batch"]
    gate: float = 0.5

    @classmethod
    def of(
        cls,
        maps: Maps,
        self_maps: Float[Tensor, "batch positions positions"],
        gate: float = 0.5,
    ) -> "Scores":
        """Scores of processed cross-attention maps, which are smoothed here, and self-attention maps."""
        smoothed = smooth(maps)
        return cls(neglect(smoothed), conflict(smoothed, self_maps), stray(smoothed), gate)

    @property
    def loss(self) -> Float[Tensor, " batch"]:
        """What is minimised: neglect + conflict (once neglect is below the gate) + stray."""
        return self.neglect + self.conflict * (self.neglect <= self.gate) + self.stray

    @property
    def rank(self) -> Float[Tensor, " batch"]:
        """What orders candidates: neglect + conflict, with 1 for a conflict that the gate has closed."""
        closed = self.neglect > self.gate
        return self.neglect + torch.where(closed, torch.ones_like(self.conflict), self.conflict)

    def valid(self, limits: tuple[float, float]) -> Bool[Tensor, " batch"]:
        """Neglect and conflict both below their limits (.2 and .3 in Stable Diffusion)."""
        return (self.neglect < limits[0]) & (self.conflict < limits[1])


Scorer = Callable[[Tensor, Tensor], Scores]
"""Called with noises [rows, ...] and the numbers of these rows in the batch, which tell their prompts."""

# LatentMapper ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift:
    """Mean and log-variance of the distribution that a noise is moved to, each as large as the noise."""

    mean: Float[Tensor, "batch ..."]
    log_variance: Float[Tensor, "batch ..."]

    def applied(self, noise: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """z = z_T exp(log_variance / 2) + mean."""
        return noise * torch.exp(self.log_variance / 2) + self.mean

    def divergence(self) -> Float[Tensor, " batch"]:
        """KL(N(mean, variance) || N(0, 1)) in nats, mean over elements."""
        log_variance = self.log_variance
        each = -0.5 * (1 + log_variance - self.mean**2 - log_variance.exp())
        return each.flatten(1).mean(-1)

    def rephased(self, generator: torch.Generator) -> "Shift":
        """The placebo: as smooth, as large and in the same colours, but elsewhere.

        Shifts are [batch, channels, rows, columns]. Every spatial frequency keeps its power, in each channel and
        between channels, and gets a random phase,

            F(mean') = F(mean) e^{i phi},   phi(-f) = -phi(f),

        the same for all channels and for the log-variance, whose average stays as it is. sum mean'^2 = sum mean^2
        (Parseval), and the divergence is the same to second order; a factor near one makes it equal.
        """
        means, logs = self.mean.cpu().double(), self.log_variance.cpu().double()
        white = torch.randn(len(means), 1, *means.shape[2:], generator=generator).double()
        turn = torch.fft.fft2(white)
        turn = turn / turn.abs()
        means = torch.fft.ifft2(torch.fft.fft2(means) * turn).real
        turn[..., 0, 0] = 1
        logs = torch.fft.ifft2(torch.fft.fft2(logs) * turn).real
        asked = Shift(self.mean.double(), self.log_variance.double()).divergence().cpu()
        factor = torch.ones_like(asked)[:, None, None, None]
        for _ in range(20):
            now = Shift(factor * means, factor * logs).divergence().clamp(min=1e-30)
            factor = factor * (asked / now).sqrt()[:, None, None, None]
        return Shift(*((factor * part).to(self.mean) for part in (means, logs)))


class RowAdam:
    """Adam whose rows are independent optimisers: each has its own count of steps (beta .9 and .999).

    Args:
        values: [2, batch, ...], changed in place.
    """

    def __init__(self, values: Tensor, rate: float, epsilon: float) -> None:
        self.values, self.rate, self.epsilon = values, rate, epsilon
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)
        self.steps = torch.zeros(values.shape[1], dtype=torch.long, device=values.device)

    def step(self, rows: Int[Tensor, " rows"], gradient: Float[Tensor, "2 rows ..."]) -> None:
        """One step of these rows."""
        self.steps[rows] += 1
        self.first[:, rows] = 0.9 * self.first[:, rows] + 0.1 * gradient
        self.second[:, rows] = 0.999 * self.second[:, rows] + 0.001 * gradient**2
        count = self.steps[rows].to(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 2))
        mean = self.first[:, rows] / (1 - 0.9**count)
        root = (self.second[:, rows] / (1 - 0.999**count)).sqrt()
        self.values[:, rows] -= self.rate * mean / (root + self.epsilon)


@dataclass(frozen=True)
class Descent:
    """How a noise is moved.

    Args:
        limits: of neglect and conflict; a noise below both is valid and is left alone.
        rate, epsilon: of Adam. Epsilon is large: below it, steps are proportional to the gradient.
        bound: of the KL divergence, nats an element; None leaves it free.
        longest: Adam steps on the divergence alone after one step on the scores, at most.
    """

    limits: tuple[float, float] = (0.2, 0.3)
    rate: float = 1e-2
    epsilon: float = 1e-3
    bound: float | None = 1e-3
    longest: int = 5000


@dataclass(frozen=True)
class Optimised:
    """A batch of noises after optimisation.

    Args:
        start: the noises as they were drawn.
        shift: how they were moved.
        scores: of the last pass of each row: of the noise as it is where it is valid, else one step earlier.
        valid: rows whose last pass was below both limits.
        passes, steps: scoring passes, and steps with a gradient, each row's.
    """

    start: Tensor
    shift: Shift
    scores: Scores
    valid: Bool[Tensor, " batch"]
    passes: Int[Tensor, " batch"]
    steps: Int[Tensor, " batch"]

    @property
    def noise(self) -> Tensor:
        """The noise to begin sampling with."""
        return self.shift.applied(self.start)


def divergence_gradient(values: Float[Tensor, "2 rows ..."]) -> Float[Tensor, "2 rows ..."]:
    """Gradient of each row's divergence with respect to mean and log-variance."""
    mean, log_variance = values
    return torch.stack([mean, (log_variance.exp() - 1) / 2]) / mean[0].numel()


def optimise(noise: Tensor, score: Scorer, how: Descent, steps: int) -> Optimised:
    """Move each noise of a batch until it is valid, by at most `steps` steps.

    Rows do not influence each other: valid ones are left out of later passes. After a step the divergence
    alone is minimised, with the same state of Adam, until it is within its bound.

    Raises:
        RuntimeError: when the divergence does not come back within its bound.
    """
    batch = len(noise)
    values = torch.zeros(2, *noise.shape, dtype=noise.dtype, device=noise.device)
    adam = RowAdam(values, how.rate, how.epsilon)
    found = [torch.zeros(batch, dtype=noise.dtype, device=noise.device) for _ in range(3)]
    valid = torch.zeros(batch, dtype=torch.bool, device=noise.device)
    passes = torch.zeros(batch, dtype=torch.long, device=noise.device)
    rows, gate = torch.arange(batch, device=noise.device), 0.5
    for _ in range(steps):
        moved = values[:, rows].requires_grad_()
        scores = score(Shift(*moved).applied(noise[rows]), rows)
        gate = scores.gate
        for kept, new in zip(found, (scores.neglect, scores.conflict, scores.stray), strict=True):
            kept[rows] = new.detach()
        passes[rows] += 1
        valid[rows] = scores.valid(how.limits)
        unfinished = ~valid[rows]
        if not unfinished.any():
            break
        [gradient] = torch.autograd.grad(scores.loss[unfinished].sum(), moved)
        rows = rows[unfinished]
        adam.step(rows, gradient[:, unfinished])
        if how.bound is not None:
            _bring_back(adam, rows, how)
    return Optimised(
        noise, Shift(*values), Scores(*found, gate), valid, passes, passes - valid.long()
    )


def _bring_back(adam: RowAdam, rows: Tensor, how: Descent) -> None:
    """Steps on the divergence alone, for the rows that are over the bound."""
    for _ in range(how.longest):
        rows = rows[Shift(*adam.values[:, rows]).divergence() > how.bound]
        if not len(rows):
            return
        adam.step(rows, divergence_gradient(adam.values[:, rows]))
    raise RuntimeError(
        f"the divergence stays above {how.bound} after {how.longest} steps: lower the rate"
    )


def latent_mapper(
    candidates: Float[Tensor, "candidates batch ..."],
    score: Scorer,
    how: Descent,
    steps: int,
    last: int,
) -> Optimised:
    """InitNO's search: `steps` steps for each candidate until one is valid, else `last` for the most promising.

    Each row stops at its first valid candidate. Where none is, the candidate of lowest rank starts again
    from its raw noise. With one candidate the noise is never drawn anew.

    Returns:
        of each row the noise that was taken; passes and steps count all of its candidates.
    """
    batch = candidates.shape[1]
    rows = torch.arange(batch, device=candidates.device)
    best = torch.full((batch,), float("inf"), dtype=candidates.dtype, device=candidates.device)
    chosen, result = candidates[0].clone(), None
    for noise in candidates:
        tried = optimise(noise[rows], _among(score, rows), how, steps)
        result = tried if result is None else _merged(result, tried, rows)
        better = torch.where(tried.valid, -torch.ones_like(tried.scores.rank), tried.scores.rank)
        ahead = better < best[rows]
        chosen[rows[ahead]], best[rows[ahead]] = noise[rows][ahead], better[ahead]
        rows = rows[~tried.valid]
        if not len(rows):
            return result
    again = optimise(chosen[rows], _among(score, rows), how, last)
    return _merged(result, again, rows)


def _among(score: Scorer, rows: Tensor) -> Scorer:
    """The scorer of these rows."""
    return lambda noise, numbers: score(noise, rows[numbers])


def _merged(old: Optimised, new: Optimised, rows: Tensor) -> Optimised:
    """`old` with `rows` replaced by `new`; passes and steps add up."""

    def put(whole: Tensor, part: Tensor) -> Tensor:
        whole = whole.clone()
        whole[rows] = part
        return whole

    def add(whole: Tensor, part: Tensor) -> Tensor:
        return whole.index_add(0, rows, part)

    was, now = old.scores, new.scores
    shift = Shift(
        put(old.shift.mean, new.shift.mean), put(old.shift.log_variance, new.shift.log_variance)
    )
    scores = Scores(
        put(was.neglect, now.neglect),
        put(was.conflict, now.conflict),
        put(was.stray, now.stray),
        was.gate,
    )
    return Optimised(
        put(old.start, new.start),
        shift,
        scores,
        put(old.valid, new.valid),
        add(old.passes, new.passes),
        add(old.steps, new.steps),
    )


@torch.no_grad()
def best_of(
    candidates: Float[Tensor, "candidates batch ..."], score: Scorer
) -> Float[Tensor, "batch ..."]:
    """The placebo of the search: of fresh noises the one of lowest rank, nothing moved."""
    rows = torch.arange(candidates.shape[1], device=candidates.device)
    ranks = torch.stack([score(noise, rows).rank for noise in candidates])
    return candidates[ranks.argmin(0), rows]


# SimPrune -------------------------------------------------------------------------------------------

Rule = Literal["typical", "random", "corner", "typical anywhere", "random anywhere"]
"""How base tokens are found: the best of each 2 x 2 patch, a random one, its first; or the best or random of all."""

Order = Literal["similar", "random", "dissimilar"]
"""Which of the other tokens are pruned: the most similar to a base token, random ones, the least similar."""

RELEASED_NOISE = 0.1 / 4096
"""Noise on the mean similarity that equals .1 on its sum over the 4,096 tokens of Stable Diffusion."""


@dataclass(frozen=True)
class Selection:
    """Tokens that go through attention and tokens that get a copy; indices on the full grid.

    Args:
        kept: the tokens that stay: first those that were not pruned, then the base tokens.
        pruned: the tokens that are left out.
        source: for each pruned token the place in `kept` whose output it copies.
    """

    kept: Int[Tensor, "batch kept"]
    pruned: Int[Tensor, "batch pruned"]
    source: Int[Tensor, "batch pruned"]

    def of(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch kept width"]:
        """The kept tokens."""
        return _rows(x, self.kept)

    def merged(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch kept width"]:
        """The kept tokens, each the mean of itself and the pruned ones that copy it (ToMe's merging)."""
        kept, gone = self.of(x), _rows(x, self.pruned)
        place = self.source[..., None]
        sums = kept.scatter_add(1, place.expand(-1, -1, x.shape[-1]), gone)
        counts = torch.ones_like(kept[..., :1]).scatter_add(
            1, place, torch.ones_like(gone[..., :1])
        )
        return sums / counts

    def recovered(
        self, y: Float[Tensor, "batch kept width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """All tokens: kept ones in their places, pruned ones a copy of their source."""
        whole = y.new_empty(len(y), self.kept.shape[1] + self.pruned.shape[1], y.shape[-1])
        whole = whole.scatter(1, self.kept[..., None].expand_as(y), y)
        copies = _rows(y, self.source)
        return whole.scatter(1, self.pruned[..., None].expand_as(copies), copies)


def _rows(x: Float[Tensor, "batch tokens width"], index: Int[Tensor, "batch some"]) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def typicality(unit: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens"]:
    """SimScore over the number of tokens: x_i . mean_j x_j, which needs no graph of similarities."""
    return (unit @ unit.mean(1)[..., None]).squeeze(-1)


def patches(tokens: int, device: torch.device) -> Int[Tensor, "patches 4"]:
    """The tokens of each 2 x 2 patch of a square grid.

    Raises:
        ValueError: when the tokens are no square grid of even side.
    """
    side = isqrt(tokens)
    if side**2 != tokens or side % 2:
        raise ValueError(f"tokens must form a square grid of even side, got {tokens}")
    grid = torch.arange(tokens, device=device).reshape(side // 2, 2, side // 2, 2)
    return grid.transpose(1, 2).reshape(-1, 4)


def base_tokens(
    score: Float[Tensor, "batch tokens"], rule: Rule, draw: Float[Tensor, "batch tokens"]
) -> Bool[Tensor, "batch tokens"]:
    """A quarter of the tokens, to which the others are compared.

    Args:
        score: typicality with its noise.
        draw: random numbers, for the rules that ignore the score.
    """
    cells = patches(score.shape[1], score.device)
    by = draw if rule.startswith("random") else score
    if rule.endswith("anywhere"):
        chosen = by.topk(len(cells), -1).indices
    elif rule == "corner":
        chosen = cells[:, 0].expand(len(score), -1)
    else:
        best = by[:, cells].argmax(-1)
        chosen = cells.expand(len(score), -1, -1).gather(2, best[..., None]).squeeze(-1)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, chosen, True)


@dataclass(frozen=True)
class SimPrune:
    """Self-attention on the tokens that SimPrune keeps.

    Args:
        ratio: share of all tokens that is pruned, at most .75 (the base tokens stay).
        noise: standard deviation of the noise on the mean similarity.
        rule, order: how base tokens are found, and which of the others are pruned.
        copy: where a pruned token's output comes from: any kept token (as released) or base tokens alone.
        merge: average instead of pruning. With rule "random" and copy "base" this is ToMe for Stable Diffusion.
        generator: of the noise, on the CPU. None draws none: then noise must be 0 and nothing random.
    """

    ratio: float
    noise: float = RELEASED_NOISE
    rule: Rule = "typical"
    order: Order = "similar"
    copy: Literal["kept", "base"] = "kept"
    merge: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 0.75:
            raise ValueError(f"ratio must lie in 0 to .75 (base tokens stay), got {self.ratio}")
        chance = self.noise or "random" in self.rule or self.order == "random"
        if chance and self.generator is None:
            raise ValueError("noise and random rules need a generator; give one, or noise=0")

    @torch.no_grad()
    def select(self, x: Float[Tensor, "batch tokens width"]) -> Selection:
        """Which tokens of the hidden states before the block's norm are kept, and what the others copy.

        Similarities are formed where they are needed: of the other tokens to the base tokens, and of pruned
        to spared ones.
        """
        unit = F.normalize(x, dim=-1)
        tokens = x.shape[1]
        pruned = int(self.ratio * tokens)
        score = typicality(unit)
        if self.noise:
            score = score + self.noise * self._draw(score, torch.randn)
        draw = self._draw(score, torch.rand) if "random" in self.rule else score
        is_base = base_tokens(score, self.rule, draw)
        order = is_base.long().argsort(dim=-1, stable=True)
        others, base = order.split([tokens - tokens // 4, tokens // 4], -1)
        similarity = _rows(unit, others) @ _rows(unit, base).mT
        nearest, place = similarity.max(-1)
        ranked = self._ranked(nearest)
        gone, spared = ranked[:, :pruned], ranked[:, pruned:]
        kept = torch.cat([others.gather(1, spared), base], 1)
        source = place.gather(1, gone) + spared.shape[1]
        if self.copy == "kept" and spared.shape[1] and pruned:
            between = _rows(unit, others.gather(1, gone)) @ _rows(unit, others.gather(1, spared)).mT
            closest, where = between.max(-1)
            source = torch.where(closest > nearest.gather(1, gone), where, source)
        return Selection(kept, others.gather(1, gone), source)

    def reduction(self, x: Float[Tensor, "batch tokens width"]) -> Reduction | None:
        """The selection as a UNet's self-attention takes it; None where nothing is pruned."""
        if int(self.ratio * x.shape[1]) == 0:
            return None
        selection = self.select(x)
        return Reduction(selection.merged if self.merge else selection.of, selection.recovered)

    def hooks(
        self, blocks: Container[str], on_map: Callable[[str, Kind, Tensor], None] | None = None
    ) -> AttentionHooks:
        """Pruning in the blocks of these names (those of the highest resolution), anew at every pass.

        Args:
            on_map: also called with every attention map, see `AttentionHooks`.
        """
        return AttentionHooks(on_map, lambda name, x: self.reduction(x) if name in blocks else None)

    def _draw(self, like: Tensor, distribution: Callable[..., Tensor]) -> Tensor:
        return distribution(like.shape, generator=self.generator).to(like)

    def _ranked(self, nearest: Float[Tensor, "batch others"]) -> Int[Tensor, "batch others"]:
        """The other tokens, those first that are to be pruned."""
        by = self._draw(nearest, torch.rand) if self.order == "random" else nearest
        return by.argsort(dim=-1, descending=self.order != "dissimilar", stable=True)


# Cost -----------------------------------------------------------------------------------------------


def attention_multiply_adds(tokens: int, width: int) -> int:
    """Of self-attention with its four projections: 2 n^2 C + 4 n C^2."""
    return 2 * tokens**2 * width + 4 * tokens * width**2


def selection_multiply_adds(tokens: int, width: int, ratio: float) -> int:
    """Of SimPrune's similarities: n C for typicality, and (3/16 + r (3/4 - r)) n^2 C for those that are formed."""
    pruned, base = int(ratio * tokens), tokens // 4
    others = tokens - base
    return (tokens + others * base + pruned * (others - pruned)) * width
