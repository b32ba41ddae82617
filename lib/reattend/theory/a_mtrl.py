"""Improved Active Multi-Task Representation Learning via Lasso (arXiv 2306.02556).

M source tasks and a target share a linear representation: y = x^T B* w_m + z, with B* of orthonormal
columns [d, k], heads W* = [w_1 .. w_M], noise of standard deviation sigma. A *relevance* nu solves
W* nu = w_target; the target's risk is bounded through sum_m nu_m^2 / n_m for any such nu. Which nu
the samples n_m follow is the question: the one of least L1 norm (this paper), the one of least L2
norm (Chen et al. 2022), or none at all (passive, uniform).

All functions take leading batch dimensions (repetitions, or targets) where the annotation has a `*`
or "runs". Heads are columns: `heads[..., :, m]` belongs to source m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linprog
from torch import Tensor
from torch.nn import functional

Rule = Literal["l1", "l2", "l2_absolute"]
Cost = Literal["linear", "fixed", "concave"]
Instance = Literal["separating", "blocks", "random", "identical"]

# --- relevance: which sources matter for the target ----------------------------------------------


def l2_relevance(
    heads: Float[Tensor, "*runs k sources"], target: Float[Tensor, "*runs k"]
) -> Float[Tensor, "*runs sources"]:
    """nu^2 = argmin ||nu||_2 with W nu = w_target, that is W^+ w_target."""
    return (torch.linalg.pinv(heads) @ target[..., None]).squeeze(-1)


def basis_pursuit(
    heads: Float[Tensor, "k sources"], target: Float[Tensor, " k"]
) -> Float[Tensor, " sources"]:
    """nu^1 = argmin ||nu||_1 with W nu = w_target, as a linear programme in nu = p - q, p, q >= 0.

    The simplex method returns a basic solution: at most k sources are non-zero. Ties between equally
    good solutions are broken by the solver.

    Raises:
        ValueError: when the target is not in the span of the heads.
    """
    w, sources = heads.cpu().numpy(), heads.shape[1]
    solved = linprog(
        np.ones(2 * sources),
        A_eq=np.hstack([w, -w]),
        b_eq=target.cpu().numpy(),
        bounds=(0, None),
        method="highs-ds",
    )
    if not solved.success:
        raise ValueError(f"no relevance reproduces the target's head: {solved.message}")
    return torch.as_tensor(solved.x[:sources] - solved.x[sources:]).to(heads)


def lasso(
    heads: Float[Tensor, "*runs k sources"],
    target: Float[Tensor, "*runs k"],
    penalty: Float[Tensor, "*runs"],
    start: Float[Tensor, "*runs sources"] | None = None,
    iterations: int = 2000,
    tolerance: float = 1e-9,
) -> Float[Tensor, "*runs sources"]:
    """argmin_nu 1/2 ||W nu - w_target||_2^2 + penalty ||nu||_1, by accelerated proximal gradient.

    The squared error is summed over the k rows, not averaged: scikit-learn's `alpha` is penalty / k.
    Momentum restarts where the step points uphill. Stops when no entry moves by more than `tolerance`
    of the largest one.
    """
    rate = 1 / torch.linalg.matrix_norm(heads, ord=2)[..., None] ** 2
    threshold = rate * penalty[..., None]
    nu = torch.zeros_like(heads[..., 0, :]) if start is None else start
    ahead, momentum = nu, nu.new_ones((*nu.shape[:-1], 1))
    for _ in range(iterations):
        residual = (heads @ ahead[..., None]).squeeze(-1) - target
        step = ahead - rate * (heads.mT @ residual[..., None]).squeeze(-1)
        new = step.sign() * (step.abs() - threshold).relu()
        uphill = ((ahead - new) * (new - nu)).sum(-1, keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum**2).sqrt()) / 2
        ahead = new + torch.where(uphill, 0.0, (momentum - 1) / following) * (new - nu)
        moved = (new - nu).abs().amax()
        nu, momentum = new, following
        if moved <= tolerance * nu.abs().amax():
            break
    return nu


def lasso_steps(
    heads: Float[Tensor, "*runs k sources"],
    target: Float[Tensor, "*runs k"],
    steps: int = 25,
    smallest: float = 1e-3,
) -> Iterator[tuple[Float[Tensor, "*runs"], Float[Tensor, "*runs sources"]]]:
    """Penalties falling geometrically from just below ||W^T w||_inf, where nu = 0, each with its solution.

    Each solution starts at the one before.

    Args:
        smallest: last penalty, as a share of ||W^T w||_inf.
    """
    largest = (heads.mT @ target[..., None]).abs().amax((-2, -1))
    nu = None
    for share in torch.logspace(np.log10(0.99), np.log10(smallest), steps).to(heads):
        nu = lasso(heads, target, largest * share, start=nu, iterations=400, tolerance=1e-6)
        yield largest * share, nu


def lasso_path(
    heads: Float[Tensor, "*runs k sources"], target: Float[Tensor, "*runs k"]
) -> tuple[Float[Tensor, "*runs steps"], Float[Tensor, "*runs steps sources"]]:
    """All penalties and solutions of `lasso_steps`."""
    penalties, solutions = zip(*lasso_steps(heads, target), strict=True)
    return torch.stack(penalties, dim=-1), torch.stack(solutions, dim=-2)


def l1_relevance(
    heads: Float[Tensor, "*runs k sources"],
    target: Float[Tensor, "*runs k"],
    allowed: Float[Tensor, "*runs"],
) -> Float[Tensor, "*runs sources"]:
    """The Lasso estimate of nu^1: largest penalty on the path with ||W nu - w_target|| <= allowed.

    `allowed` is the size of the error of the estimated target head (`head_error`): explaining the
    head any better means explaining noise. Where even the smallest penalty leaves more, that one
    is taken. The path ends where every run has its penalty.
    """
    chosen, within = None, torch.zeros_like(allowed, dtype=torch.bool)
    for _, nu in lasso_steps(heads, target):
        chosen = nu if chosen is None else torch.where(within[..., None], chosen, nu)
        within = ((heads @ chosen[..., None]).squeeze(-1) - target).norm(dim=-1) <= allowed
        if within.all():
            break
    return chosen


# --- allocation: how many samples each source gives ------------------------------------------------


def sampling_weights(
    relevance: Float[Tensor, "*runs sources"], rule: Rule
) -> Float[Tensor, "*runs sources"]:
    """Shares that add up to 1: |nu| for "l1" and "l2_absolute", nu^2 for "l2" (Chen et al. 2022).

    n ~ |nu| minimises sum nu^2 / n for a given nu; n ~ nu^2 does not.
    """
    weights = relevance**2 if rule == "l2" else relevance.abs()
    return weights / weights.sum(-1, keepdim=True)


def allocate(
    weights: Float[Tensor, "*runs sources"], total: int, floor: Int[Tensor, "*runs sources"]
) -> Int[Tensor, "*runs sources"]:
    """Whole numbers n_m = max(floor_m, c weight_m) that add up to `total`.

    Args:
        floor: samples that every source gives anyway, or has given already.

    Raises:
        ValueError: when the floors alone exceed the total, or weights are negative or all zero.
    """
    if (floor.sum(-1) > total).any():
        raise ValueError(f"the floors take {int(floor.sum(-1).max())} samples of {total}")
    if (weights < 0).any() or (weights.sum(-1) <= 0).any():
        raise ValueError("weights must be non-negative and not all zero")
    weights = weights / weights.sum(-1, keepdim=True)
    low = weights.new_zeros((*weights.shape[:-1], 1))
    high = low + total
    for _ in range(80):  # the sum grows with c: bisection to the last bit
        middle = (low + high) / 2
        over = torch.maximum(floor, middle * weights).sum(-1, keepdim=True) > total
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    exact = torch.maximum(floor, low * weights)
    whole = exact.floor().long()
    # The samples lost to rounding go to the largest remainders, one each.
    missing = total - whole.sum(-1, keepdim=True)
    rank = (exact - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return whole + (rank < missing)


def bound_value(
    relevance: Float[Tensor, "*runs sources"], samples: Float[Tensor, "*runs sources"]
) -> Float[Tensor, "*runs"]:
    """sum_m nu_m^2 / n_m over the sources with nu_m != 0: the factor of the risk bound."""
    used = relevance != 0
    return torch.where(used, relevance**2 / samples.where(used, 1.0), 0.0).sum(-1)


def bound_constants(
    l1: Float[Tensor, " sources"], l2: Float[Tensor, " sources"]
) -> dict[str, float]:
    """N_tot times the bound's factor for nu^1 `l1` and nu^2 `l2` (the paper's sample complexities).

    "l1": ||nu^1||_1^2. "l2": s ||nu^2||_2^2 with s non-zeros of nu^2. "uniform": M ||nu^2||_2^2.
    """
    square = float((l2**2).sum())
    used = int((l2.abs() > 1e-9 * l2.abs().max()).sum())
    norm = float(l1.abs().sum())
    return {"l1": norm**2, "l2": used * square, "uniform": len(l2) * square}


def erm_constant(
    heads: Float[Tensor, "k sources"],
    target: Float[Tensor, " k"],
    shares: Float[Tensor, " sources"],
) -> float:
    """N_tot times the factor that least squares really attains, to first order.

    With isotropic inputs the error of B in the d - k directions outside span(B*) solves a weighted
    regression on the heads, so that the target's representation error is

        sigma^2 (d - k) w^T (sum_m n_m w_m w_m^T)^{-1} w = sigma^2 (d - k) min_nu sum_m nu_m^2 / n_m

    with the minimum over all nu with W nu = w: least squares finds the best relevance for the samples
    it is given. This is ||nu^1||_1^2 at n ~ |nu^1| and M ||nu^2||_2^2 for uniform n, but it may lie
    far below s ||nu^2||_2^2 at n ~ (nu^2)^2. (Our derivation, of the kind of c-optimal design.)
    """
    information = (heads * shares) @ heads.T
    return float(target @ torch.linalg.pinv(information, hermitian=True) @ target)


def total_cost(samples: Float[Tensor, " sources"], kind: Cost, opening: float) -> float:
    """Cost of an allocation in samples: sum_m f(n_m).

    "linear": f = n. "fixed": f = opening + n for every source that is used. "concave": f = sqrt(n
    opening), which is n at n = opening and rises ever more slowly.
    """
    used = samples[samples > 0]
    if kind == "linear":
        return float(used.sum())
    if kind == "fixed":
        return float((opening + used).sum())
    return float((opening * used).sqrt().sum())


# --- data, kept as the sums that least squares needs -------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """X^T X, X^T y, y^T y and the number of samples of every task: all that least squares needs."""

    gram: Float[Tensor, "*runs tasks d d"]
    moment: Float[Tensor, "*runs tasks d"]
    energy: Float[Tensor, "*runs tasks"]
    samples: Int[Tensor, "*runs tasks"]

    def __add__(self, more: Statistics) -> Statistics:
        return Statistics(
            self.gram + more.gram,
            self.moment + more.moment,
            self.energy + more.energy,
            self.samples + more.samples,
        )


def draw(
    random: np.random.Generator,
    samples: Int[Tensor, "*runs tasks"],
    predictors: Float[Tensor, "*runs tasks d"],
    noise: float,
) -> Statistics:
    """Statistics of fresh samples with x ~ N(0, I_d) and y = x^T predictor + noise N(0, 1).

    Drawn directly, in the same distribution as from the samples themselves: X = Q R gives X^T X = R^T
    R with independent normal entries above, and chi_{n-i} ones on, the diagonal of R (Bartlett), and
    Q^T z is again normal. So 10 samples cost as much as a million.
    """
    counts = samples.cpu().numpy()
    d = predictors.shape[-1]
    freedom = counts[..., None] - np.arange(d)
    exists = freedom > 0  # R has min(n, d) rows
    lower = np.tril(random.standard_normal((*counts.shape, d, d)), -1)
    place = np.arange(d)
    lower[..., place, place] = np.sqrt(random.chisquare(np.maximum(freedom, 1)))
    lower *= exists[..., None, :]
    seen = noise * random.standard_normal((*counts.shape, d)) * exists
    unseen = random.chisquare(np.maximum(counts - d, 1)) * (counts > d) * noise**2
    lower, seen = torch.as_tensor(lower).to(predictors), torch.as_tensor(seen).to(predictors)
    fitted = (lower.mT @ predictors[..., None]).squeeze(-1) + seen  # Q^T y
    return Statistics(
        gram=lower @ lower.mT,
        moment=(lower @ fitted[..., None]).squeeze(-1),
        energy=(fitted**2).sum(-1) + torch.as_tensor(unseen).to(predictors),
        samples=samples,
    )


def concatenated(parts: Sequence[Statistics]) -> Statistics:
    """Tasks of several statistics side by side."""
    return _joined(parts, torch.cat)


def stacked(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several runs, one above the other."""
    return _joined(parts, torch.stack)


def _joined(parts: Sequence[Statistics], join: Callable[[list[Tensor]], Tensor]) -> Statistics:
    return Statistics(*(join([getattr(p, f.name) for p in parts]) for f in fields(Statistics)))


def statistics_of(x: Float[Tensor, "samples d"], y: Float[Tensor, " samples"]) -> Statistics:
    """Statistics of given samples of one task, in float64."""
    x, y = x.double(), y.double()
    count = torch.tensor([len(y)], device=y.device)
    return Statistics((x.T @ x)[None], (x.T @ y)[None], (y @ y)[None], count)


# --- learning --------------------------------------------------------------------------------------


def fit_heads(
    basis: Float[Tensor, "*runs d k"], data: Statistics
) -> Float[Tensor, "*runs k tasks"]:
    """Least squares in X B for every task: w_m = (B^T G_m B)^+ B^T c_m.

    The pseudo-inverse gives the shortest head to a task with fewer than k samples, zero to one without.
    """
    b = basis[..., None, :, :]
    inner = b.mT @ data.gram @ b
    right = b.mT @ data.moment[..., None]
    return (torch.linalg.pinv(inner, hermitian=True) @ right).squeeze(-1).mT


def fit_basis(
    heads: Float[Tensor, "*runs k tasks"], data: Statistics
) -> Float[Tensor, "*runs d k"]:
    """The B that minimises sum_m ||y_m - X_m B w_m||^2 for given heads, orthonormalised.

    Normal equations sum_m (w_m w_m^T kron G_m) vec(B) = vec(sum_m c_m w_m^T), vec by columns. Sums run over samples,
    so a task weighs as much as it has samples.
    """
    d, k = data.gram.shape[-1], heads.shape[-2]
    # Blocks [d, d] of the lower triangle, one for every pair of directions: the factor reads no others.
    row, column = torch.tril_indices(k, k, device=heads.device)
    blocks = (heads[..., row, :] * heads[..., column, :]) @ data.gram.flatten(-2)
    normal = blocks.new_zeros((*blocks.shape[:-2], k, d, k, d))
    normal[..., row, :, column, :] = blocks.unflatten(-1, (d, d)).movedim(-3, 0)
    normal = normal.flatten(-4, -3).flatten(-2, -1)
    right = (heads @ data.moment).flatten(-2)
    # A hair of ridge: a direction that no source uses would make the system singular.
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-12 * diagonal.mean(-1, keepdim=True)
    solved = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(normal))
    return torch.linalg.qr(solved.squeeze(-1).unflatten(-1, (k, d)).mT)[0]


def fit_representation(
    data: Statistics, rank: int, iterations: int = 30, tolerance: float = 1e-5
) -> tuple[Float[Tensor, "*runs d k"], Float[Tensor, "*runs k tasks"]]:
    """(B, W) = argmin sum_m ||y_m - X_m B w_m||^2, by alternating least squares.

    Starts at the leading left singular vectors of the tasks' ridge estimates, weighted by sqrt(n_m).
    Stops when no subspace turns by more than `tolerance` (sine of the largest angle, Frobenius).
    """
    basis = _spectral_start(data, rank)
    for _ in range(iterations):
        new = fit_basis(fit_heads(basis, data), data)
        turned = (new - basis @ (basis.mT @ new)).flatten(-2).norm(dim=-1).max()
        basis = new
        if turned <= tolerance:
            break
    return basis, fit_heads(basis, data)


def _spectral_start(data: Statistics, rank: int) -> Float[Tensor, "*runs d k"]:
    count = data.samples.clamp(min=1)[..., None].to(data.moment)
    ridge = data.gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / count + 1e-12
    own = torch.linalg.solve(
        data.gram + torch.diag_embed(ridge.expand_as(data.moment)), data.moment
    )
    left = torch.linalg.svd((count.sqrt() * own).mT, full_matrices=True)[0]
    return left[..., :rank]


def head_error(
    basis: Float[Tensor, "*runs d k"], head: Float[Tensor, "*runs k 1"], target: Statistics
) -> Float[Tensor, "*runs"]:
    """Expected size of the error of the target's head: sqrt(s^2 trace (B^T X^T X B)^{-1}).

    s^2 is the residual variance of the target's samples, so nothing unknown enters.

    Raises:
        ValueError: when the target has no more samples than the representation has directions.
    """
    k = basis.shape[-1]
    if (target.samples <= k).any():
        raise ValueError(f"the target needs more than {k} samples")
    inner = basis.mT @ target.gram.squeeze(-3) @ basis
    right = basis.mT @ target.moment.squeeze(-2)[..., None]
    residual = target.energy.squeeze(-1) - (head * right).sum((-2, -1))
    variance = residual.clamp(min=0) / (target.samples.squeeze(-1) - k)
    trace = torch.linalg.inv(inner).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (variance * trace).sqrt()


def estimate_relevance(
    basis: Float[Tensor, "*runs d k"],
    heads: Float[Tensor, "*runs k sources"],
    target: Statistics,
    rule: Rule,
) -> Float[Tensor, "*runs sources"]:
    """nu-hat from the estimated heads and the target's head in the *same* estimated basis."""
    head = fit_heads(basis, target)
    if rule == "l1":
        return l1_relevance(heads, head.squeeze(-1), head_error(basis, head, target))
    return l2_relevance(heads, head.squeeze(-1))


@dataclass(frozen=True)
class Learned:
    """What active sampling ends with: basis, samples of each source, and the last relevance used."""

    basis: Float[Tensor, "*runs d k"]
    samples: Int[Tensor, "*runs sources"]
    relevance: Float[Tensor, "*runs sources"]


def active_sampling(
    explored: Statistics,
    first: tuple[Float[Tensor, "*runs d k"], Float[Tensor, "*runs k sources"]],
    draw_more: Callable[[Int[Tensor, "*runs sources"]], Statistics],
    target: Statistics,
    totals: list[int],
    rule: Rule,
) -> Learned:
    """After exploring: estimate the relevance, sample by it, learn from all data.

    L1-A-MTRL does this once; L2-A-MTRL repeats it with growing totals. Samples already drawn are the
    floor of every later allocation and count towards it.

    Args:
        explored: statistics of the same number of samples from every source.
        first: basis and heads learned from them (`fit_representation`).
        draw_more: gives the statistics of that many fresh samples of each source.
        totals: all source samples so far after each phase, exploration included.
    """
    data, (basis, heads) = explored, first
    for total in totals:
        relevance = estimate_relevance(basis, heads, target, rule)
        wanted = allocate(sampling_weights(relevance, rule), total, data.samples)
        data = data + draw_more(wanted - data.samples)
        basis, heads = fit_representation(data, basis.shape[-1])
    return Learned(basis, data.samples, relevance)


def predictor(basis: Float[Tensor, "*runs d k"], target: Statistics) -> Float[Tensor, "*runs d"]:
    """B w with w fitted on the target's own samples."""
    return (basis @ fit_heads(basis, target)).squeeze(-1)


def excess_risk(
    found: Float[Tensor, "*runs d"], truth: Float[Tensor, "*runs d"]
) -> Float[Tensor, "*runs"]:
    """E (x^T found - x^T truth)^2 for isotropic inputs."""
    return ((found - truth) ** 2).sum(-1)


def representation_error(
    basis: Float[Tensor, "*runs d k"], truth: Float[Tensor, "*runs d"]
) -> Float[Tensor, "*runs"]:
    """Part of the target outside the learned representation: the risk with endless target samples."""
    inside = (basis @ (basis.mT @ truth[..., None])).squeeze(-1)
    return ((truth - inside) ** 2).sum(-1)


def ridge_predictor(
    x: Float[Tensor, "samples d"], y: Float[Tensor, " samples"], strengths: list[float]
) -> Float[Tensor, " d"]:
    """Target only, no sources: ridge regression of the strength with the least leave-one-out error."""
    x, y = x.double(), y.double()
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    best, found = float("inf"), None
    for strength in strengths:
        kept = values**2 / (values**2 + strength)
        leverage = (left**2 * kept).sum(1)
        residual = y - left @ (kept * (left.T @ y))
        error = float(((residual / (1 - leverage)) ** 2).mean())
        if error < best:
            best, found = error, right.T @ (kept / values * (left.T @ y))
    return found


# --- instances with known answers --------------------------------------------------------------------


def separating_heads(sources: int, exponent: float = 0.5) -> Float[Tensor, "1 sources"]:
    """k = 1: one strong source, w_1 = 1, and M - 1 weak ones, w_m = M^-exponent. The target is 1."""
    heads = torch.full((1, sources), float(sources) ** -exponent, dtype=torch.float64)
    heads[0, 0] = 1.0
    return heads


def separating_constants(sources: int) -> dict[str, float]:
    """Closed form of `bound_constants` for `separating_heads(M)`: 1 against M^2 / (2 M - 1)."""
    weak = sources**2 / (2 * sources - 1)
    return {"l1": 1.0, "l2": weak, "uniform": weak}


def separating_erm_constant(sources: int, exponent: float = 0.5) -> float:
    """Closed form of `erm_constant` at n ~ (nu^2)^2 for `separating_heads`.

    sum w^2 / sum w^4, about 2 for weak sources of M^-1/2, and (1 + sqrt M) / 2 for M^-1/4.
    """
    square = float(sources) ** (-2 * exponent)
    return (1 + (sources - 1) * square) / (1 + (sources - 1) * square**2)


def block_heads(rank: int, sources: int) -> Float[Tensor, "rank sources"]:
    """k copies of the separating instance side by side, one for every direction.

    Sources 0 .. k-1 are strong and orthonormal; the others, in turn, lie weakly along one of them, with
    norm (M / k)^-1/2.

    Raises:
        ValueError: when the sources do not divide evenly.
    """
    if sources % rank:
        raise ValueError(f"{sources} sources do not divide into {rank} blocks")
    heads = torch.eye(rank, dtype=torch.float64).repeat(1, sources // rank)
    heads[:, rank:] *= (sources / rank) ** -0.5
    return heads


@dataclass(frozen=True)
class Problem:
    """Repetitions of one synthetic instance with everything known.

    Attributes:
        heads: W*.
        target: the target's head.
        basis: B*, orthonormal.
        nu1, nu2: relevances of least L1 and L2 norm.
    """

    heads: Float[Tensor, "runs k sources"]
    target: Float[Tensor, "runs k"]
    basis: Float[Tensor, "runs d k"]
    nu1: Float[Tensor, "runs sources"]
    nu2: Float[Tensor, "runs sources"]

    @property
    def rank(self) -> int:
        """k."""
        return self.heads.shape[1]

    @property
    def predictors(self) -> Float[Tensor, "runs sources d"]:
        """B* w_m of every source."""
        return (self.basis @ self.heads).mT.contiguous()

    @property
    def truth(self) -> Float[Tensor, "runs d"]:
        """B* w of the target."""
        return (self.basis @ self.target[..., None]).squeeze(-1)

    def weights(self) -> dict[str, Float[Tensor, "runs sources"]]:
        """Sampling weights of every allocation that may know the relevance."""
        return {
            "L1": sampling_weights(self.nu1, "l1"),
            "L2": sampling_weights(self.nu2, "l2"),
            "L2, |nu2|": sampling_weights(self.nu2, "l2_absolute"),
            "uniform": torch.full_like(self.nu2, 1 / self.nu2.shape[1]),
        }


def make_problem(
    name: Instance, runs: int, sources: int, dimension: int, rank: int, random: np.random.Generator
) -> Problem:
    """Repetitions of an instance in fresh bases; heads differ between repetitions where random.

    "separating" and "identical" (all heads 1) have k = 1 whatever `rank` is. Targets have norm 1;
    that of "blocks" uses all directions alike.
    """
    if name == "random":
        heads = torch.as_tensor(random.standard_normal((runs, rank, sources)))
        target = functional.normalize(torch.as_tensor(random.standard_normal((runs, rank))), dim=-1)
        nu1 = torch.stack([basis_pursuit(h, t) for h, t in zip(heads, target, strict=True)])
    else:
        if name == "blocks":
            one = block_heads(rank, sources)
        else:
            one = separating_heads(sources, 0.0 if name == "identical" else 0.5)
        heads = one.expand(runs, *one.shape)
        target = torch.full(heads.shape[:2], len(one) ** -0.5, dtype=torch.float64)
        nu1 = basis_pursuit(one, target[0]).expand(runs, sources)
    normal = torch.as_tensor(random.standard_normal((runs, dimension, heads.shape[1])))
    basis = torch.linalg.qr(normal)[0]
    return Problem(heads, target, basis, nu1, l2_relevance(heads, target))


# --- real tasks: one class against the rest, under one corruption ------------------------------------

CORRUPTIONS = ("noise", "blur", "rotate", "shear", "scale", "stripe", "fog", "dotted line")


def corrupt(
    images: Float[Tensor, "items size size"], kind: str, generator: torch.Generator
) -> Float[Tensor, "items size size"]:
    """Pictures in [0, 1] (0 is background) under one corruption, in the manner of MNIST-C.

    Raises:
        ValueError: for an unknown corruption.
    """
    size = images.shape[-1]
    if kind == "noise":
        return (images + 0.4 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    if kind == "blur":
        return functional.avg_pool2d(images[:, None], 7, stride=1, padding=3).squeeze(1)
    if kind == "rotate":
        return _warp(images, [[0.82, -0.57, 0.0], [0.57, 0.82, 0.0]])
    if kind == "shear":
        return _warp(images, [[1.0, 0.6, 0.0], [0.0, 1.0, 0.0]])
    if kind == "scale":
        return _warp(images, [[1.7, 0.0, 0.0], [0.0, 1.7, 0.0]])
    if kind == "stripe":
        middle = slice(size // 2 - size // 8, size // 2 + size // 8)
        striped = images.clone()
        striped[:, :, middle] = 1 - striped[:, :, middle]
        return striped
    if kind == "fog":
        haze = torch.rand(len(images), 1, 4, 4, generator=generator)
        haze = functional.interpolate(haze, size=size, mode="bicubic").squeeze(1)
        return (0.5 * images + 0.7 * haze).clamp(0, 1)
    if kind == "dotted line":
        return _dotted(images, generator)
    raise ValueError(f"unknown corruption '{kind}'; there are: {', '.join(CORRUPTIONS)}")


def _warp(
    images: Float[Tensor, "items size size"], matrix: list[list[float]]
) -> Float[Tensor, "items size size"]:
    """Affine map from output to input coordinates, both in [-1, 1]; background outside."""
    theta = torch.tensor(matrix).expand(len(images), 2, 3)
    grid = functional.affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False).squeeze(1)


def _dotted(
    images: Float[Tensor, "items size size"], generator: torch.Generator
) -> Float[Tensor, "items size size"]:
    """A white dotted line between random points of the left and the right edge."""
    size = images.shape[-1]
    ends = torch.rand(len(images), 2, generator=generator) * (size - 1)
    columns = torch.arange(0, size, 2)
    rows = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * columns / (size - 1)
    dotted = images.clone()
    item = torch.arange(len(images))[:, None]
    dotted[item, rows.round().long(), columns] = 1.0
    return dotted


def balanced_order(
    labels: Int[Tensor, " items"], positive: int, random: np.random.Generator
) -> Int[Tensor, " order"]:
    """A random order of items in which members of the class and others alternate.

    Every prefix of even length is balanced, so a task's first n samples are a fair draw without
    replacement. Ends when either side runs out.
    """
    flags = labels.cpu().numpy() == positive
    inside = random.permutation(np.flatnonzero(flags))
    outside = random.permutation(np.flatnonzero(~flags))
    length = min(len(inside), len(outside))
    return torch.as_tensor(np.stack([inside[:length], outside[:length]], axis=1).ravel())


def whitening(
    x: Float[Tensor, "items pixels"], components: int
) -> tuple[Float[Tensor, " pixels"], Float[Tensor, "pixels components"], float]:
    """Centre and matrix that turn pictures into leading principal components of variance 1.

    The third value is the share of the variance that these components keep.
    """
    centre = x.mean(0)
    centred = x - centre
    values, vectors = torch.linalg.eigh((centred.T @ centred).double() / len(x))
    matrix = vectors[:, -components:] / values[-components:].sqrt()
    return centre, matrix.to(x), float(values[-components:].sum() / values.sum())


def balanced_error(scores: Float[Tensor, " items"], member: Bool[Tensor, " items"]) -> float:
    """Mean of the error rates on members (score above 0 is right) and on the others, %."""
    wrong = (scores > 0) != member
    return 50 * float(wrong[member].double().mean() + wrong[~member].double().mean())
