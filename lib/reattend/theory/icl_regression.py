"""In-context linear regression with one layer of multi-head attention (arXiv 2503.12734).

Tokens z_l = [x_l; y_l] of L labelled examples and a query token z_q = [x_q; 0]; every head has the
full width of a token, no biases, no positions, and the query does not attend to itself:

    y_hat = sum_h O_h V_h Z softmax(Z^T K_h^T Q_h z_q / sqrt(width))

A head enters only through two circuits, KQ_h = K_h^T Q_h / sqrt(width) and OV_h = O_h V_h; in trained
models they shrink to one number each, omega_h and mu_h (the reduced model). Models are written for a
leading `*stack` axis of seeds, and the heads of several models lie side by side on one axis: they see
the same tasks, and an optimiser that works weight by weight trains each as if it were alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn import functional

# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regressions:
    """A batch of contexts, each with a query. `tasks` counts the labels of one covariate (usually 1)."""

    inputs: Float[Tensor, "*stack batch length dim"]
    labels: Float[Tensor, "*stack batch length tasks"]
    query: Float[Tensor, "*stack batch dim"]
    target: Float[Tensor, "*stack batch tasks"]

    @property
    def tokens(self) -> Float[Tensor, "*stack batch length width"]:
        """z_l = [x_l; y_l]."""
        return torch.cat([self.inputs, self.labels], -1)

    @property
    def query_token(self) -> Float[Tensor, "*stack batch width"]:
        """z_q = [x_q; 0]."""
        return functional.pad(self.query, (0, self.labels.shape[-1]))


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)


def sample_regressions(
    shape: Sequence[int],
    length: int,
    dim: int,
    noise: float,
    generator: torch.Generator,
    *,
    root: Float[Tensor, "*stack dim dim"] | None = None,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Regressions:
    """x ~ N(mean, Sigma), beta ~ N(0, I/d), y = beta^T x + eps, eps ~ N(0, noise); y_q is noisy too.

    Args:
        shape: (*stack, batch).
        noise: variance of the label noise.
        root: any R with R R^T = Sigma, for every member of the stack; the identity without it.
        mean: of every covariate (0 in the paper).
    """
    covariates = _normal(generator, *shape, length + 1, dim, dtype=dtype)
    if root is not None:
        covariates = covariates @ root.mT.unsqueeze(-3)
    covariates = covariates + mean
    beta = _normal(generator, *shape, dim, 1, dtype=dtype) / math.sqrt(dim)
    errors = _normal(generator, *shape, length + 1, 1, dtype=dtype)
    labels = covariates @ beta + math.sqrt(noise) * errors
    return Regressions(
        covariates[..., :-1, :], labels[..., :-1, :], covariates[..., -1, :], labels[..., -1, :]
    )


def sample_multitask(
    shape: Sequence[int],
    length: int,
    supports: Bool[Tensor, "tasks dim"],
    noise: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Regressions:
    """Several tasks on the same x ~ N(0, I); task n uses the coordinates S_n with its own beta_n.

    As in the authors' code: beta has unit variance on its support, the noise variance is |S_n| times
    `noise` (so `noise` is the same share of the signal as for one task), and y_q is noiseless.
    """
    tasks, dim = supports.shape
    covariates = _normal(generator, *shape, length + 1, dim, dtype=dtype)
    beta = _normal(generator, *shape, dim, tasks, dtype=dtype) * supports.T
    clean = covariates @ beta
    errors = _normal(generator, *shape, length, tasks, dtype=dtype)
    spread = (noise * supports.sum(-1)).sqrt().to(dtype)
    labels = clean[..., :-1, :] + spread * errors
    return Regressions(covariates[..., :-1, :], labels, covariates[..., -1, :], clean[..., -1, :])


def kac_murdock(dim: int, correlation: float) -> Float[Tensor, "dim dim"]:
    """Sigma_ij = correlation^|i - j|."""
    index = torch.arange(dim)
    return correlation ** (index[:, None] - index).abs().double()


# Attention ----------------------------------------------------------------------------------------


def attend(
    tokens: Float[Tensor, "*stack batch length width"],
    query: Float[Tensor, "*stack batch width"],
    kq: Float[Tensor, "*stack heads width width"],
    linear_length: int | None = None,
) -> Float[Tensor, "*stack batch heads width"]:
    """Z softmax(Z^T KQ_h z_q): what every head reads from the context, before OV.

    With `linear_length`, attention is linear: the scores themselves over that constant replace the
    softmax. The constant is the training length, whatever the length of the context.
    """
    directions = torch.einsum("...hij,...bj->...bhi", kq, query)
    scores = directions @ tokens.mT
    weights = scores.softmax(-1) if linear_length is None else scores / linear_length
    return weights @ tokens


class MultiHeadAttention(nn.Module):
    """A stack of one-layer attention models, `seeds` independent copies of each head count.

    Weights are initialised like those of `torch.nn.Linear`: Q, K, V with `width` inputs, O as one
    projection from the concatenated heads of its model.

    Args:
        heads: number of heads of every model, for example (1, 2, 4); their heads lie side by side.
        dim: number of covariates d.
        tasks: number of labels of a token, and of outputs; the width of a token is dim + tasks.
        seeds: independent initialisations (the leading axis of the tasks it is given).
        generator: of the initialisation.
        linear_length: training length, for linear attention; None for softmax attention.
    """

    def __init__(
        self,
        heads: Sequence[int],
        dim: int,
        tasks: int,
        seeds: int,
        generator: torch.Generator,
        linear_length: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.dim, self.linear_length = tuple(heads), dim, linear_length
        width, total = dim + tasks, sum(heads)
        bound = width**-0.5
        self.q = nn.Parameter(_uniform((seeds, total, width, width), bound, generator))
        self.k = nn.Parameter(_uniform((seeds, total, width, width), bound, generator))
        self.v = nn.Parameter(_uniform((seeds, total, width, width), bound, generator))
        self.o = nn.Parameter(_uniform((seeds, total, tasks, width), bound, generator))
        model = torch.arange(len(heads)).repeat_interleave(torch.tensor(self.heads))
        member = functional.one_hot(model, len(heads)).to(self.q)
        self.register_buffer("member", member)
        with torch.no_grad():
            self.o /= (member @ torch.tensor(self.heads).to(member)).sqrt()[:, None, None]

    def kq(self) -> Float[Tensor, "seeds heads width width"]:
        """KQ_h = K_h^T Q_h / sqrt(width)."""
        return self.k.mT @ self.q / math.sqrt(self.q.shape[-1])

    def ov(self) -> Float[Tensor, "seeds heads tasks width"]:
        """OV_h = O_h V_h."""
        return self.o @ self.v

    def forward(self, data: Regressions) -> Float[Tensor, "seeds batch models tasks"]:
        """Prediction of every model: the sum over its heads of OV_h Z softmax(...)."""
        read = attend(data.tokens, data.query_token, self.kq(), self.linear_length)
        by_head = torch.einsum("...hoi,...bhi->...bho", self.ov(), read)
        return torch.einsum("...bho,hm->...bmo", by_head, self.member)

    def losses(self, data: Regressions) -> Float[Tensor, "seeds models"]:
        """(y_hat - y_q)^2 of every model, mean over the batch, sum over the tasks of a token."""
        return (self(data) - data.target.unsqueeze(-2)).square().sum(-1).mean(-2)

    def of_model(self, model: int) -> slice:
        """Where the heads of a model lie on the axis of heads."""
        start = sum(self.heads[:model])
        return slice(start, start + self.heads[model])


def _uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    draws = torch.rand(*shape, generator=generator, device=generator.device)
    return (2 * draws - 1) * bound


@torch.no_grad()
def monte_carlo_risk(
    losses: Callable[[Regressions], Float[Tensor, "*shape"]],
    draw: Callable[[int], Regressions],
    count: int,
    chunk: int = 2_000,
) -> Float[Tensor, "*shape"]:
    """Mean of `losses` (means over a batch, of any shape) over `count` contexts drawn in chunks."""
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    return sum(losses(draw(size)) * (size / count) for size in sizes)


# Patterns of the circuits -------------------------------------------------------------------------


def mean_diagonal(kq: Float[Tensor, "*heads width width"], dim: int) -> Float[Tensor, "*heads"]:
    """omega_h: mean of the first `dim` diagonal entries of KQ_h."""
    return kq.diagonal(dim1=-2, dim2=-1)[..., :dim].mean(-1)


def last_entries(
    ov: Float[Tensor, "*heads tasks width"],
) -> Float[Tensor, "*heads tasks"]:
    """mu_h: the entry of OV_h from every task's label to its own output."""
    tasks = ov.shape[-2]
    return ov[..., -tasks:].diagonal(dim1=-2, dim2=-1)


def off_diagonal(kq: Float[Tensor, "*heads width width"], dim: int) -> Float[Tensor, "*heads"]:
    """Largest entry of KQ_h off the diagonal, over the mean size of its first `dim` diagonal entries.

    Columns after `dim` multiply the empty labels of the query token, so they do not count.
    """
    columns = kq[..., :dim]
    size = columns.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    identity = torch.eye(*columns.shape[-2:], dtype=torch.bool, device=kq.device)
    return columns.masked_fill(identity, 0).abs().amax((-2, -1)) / size


def diagonal_spread(kq: Float[Tensor, "*heads width width"], dim: int) -> Float[Tensor, "*heads"]:
    """Standard deviation of the first `dim` diagonal entries of KQ_h over the size of their mean."""
    diagonal = kq.diagonal(dim1=-2, dim2=-1)[..., :dim]
    return diagonal.std(-1) / diagonal.mean(-1).abs()


def other_entries(ov: Float[Tensor, "*heads 1 width"]) -> Float[Tensor, "*heads"]:
    """Largest entry of OV_h but the last, over the last (one task)."""
    row = ov.squeeze(-2).abs()
    return row[..., :-1].amax(-1) / row[..., -1]


def imbalance(mu: Float[Tensor, "*lead heads"]) -> Float[Tensor, "*lead"]:
    """|sum_h mu_h| / sum_h |mu_h|: 0 when the heads' outputs sum to zero, 1 for a single head."""
    return mu.sum(-1).abs() / mu.abs().sum(-1)


def in_eigenbasis(
    kq: Float[Tensor, "*heads width width"], covariance: Float[Tensor, "dim dim"]
) -> Float[Tensor, "*heads width width"]:
    """U^T KQ U with the eigenvectors of the covariance, by rising eigenvalue; labels stay in place."""
    vectors = torch.linalg.eigh(covariance).eigenvectors
    basis = torch.eye(kq.shape[-1], dtype=kq.dtype, device=kq.device)
    basis[: len(vectors), : len(vectors)] = vectors.to(kq)
    return basis.T @ kq @ basis


def shared_heads(
    mu: Float[Tensor, "*lead heads tasks"], threshold: float = 0.2
) -> Float[Tensor, "*lead"]:
    """Number of heads that serve every task: all |mu_hn| above a share of the model's largest."""
    size = mu.abs()
    largest = size.amax((-2, -1), keepdim=True)
    return (size > threshold * largest).all(-1).sum(-1).to(mu)


# The reduced model and its approximate risk -------------------------------------------------------


def reduced_features(
    data: Regressions, omega: Float[Tensor, " heads"]
) -> Float[Tensor, "*stack batch heads"]:
    """sum_l y_l softmax_l(omega_h x_l . x_q): kernel regression with an exponential kernel."""
    products = torch.einsum("...ld,...d->...l", data.inputs, data.query)
    weights = (omega[:, None] * products.unsqueeze(-2)).softmax(-1)
    return (weights @ data.labels).squeeze(-1)


def best_combination(
    features: Float[Tensor, "batch heads"], target: Float[Tensor, " batch"]
) -> Float[Tensor, " heads"]:
    """Least-squares weights of features: the best mu for given omega, or the best size of a step."""
    return torch.linalg.solve(features.T @ features, features.T @ target)


def interaction(
    omega: Float[Tensor, "*lead heads"], dim: int, length: int, noise: float
) -> Float[Tensor, "*lead heads heads"]:
    """M = omega omega^T + (1 + noise) / L * exp(d omega omega^T), exp elementwise."""
    outer = omega.unsqueeze(-1) * omega.unsqueeze(-2)
    return outer + (1 + noise) / length * (dim * outer).exp()


def approximate_risk(
    mu: Float[Tensor, "*lead heads"],
    omega: Float[Tensor, "*lead heads"],
    dim: int,
    length: int,
    noise: float,
) -> Float[Tensor, "*lead"]:
    """R = 1 + noise - 2 mu . omega + mu^T M mu, for large L and small omega^2 d."""
    matrix = interaction(omega, dim, length, noise)
    quadratic = torch.einsum("...h,...hk,...k->...", mu, matrix, mu)
    return 1 + noise - 2 * (mu * omega).sum(-1) + quadratic


def risk_gradients(
    mu: Float[Tensor, "*lead heads"],
    omega: Float[Tensor, "*lead heads"],
    dim: int,
    length: int,
    noise: float,
) -> tuple[Float[Tensor, "*lead heads"], Float[Tensor, "*lead heads"]]:
    """Gradients of `approximate_risk`.

    dR/dmu / 2    = -omega + M mu
    dR/domega / 2 = -mu + (mu . omega) mu + d (1 + noise) / L * (exp(d omega omega^T) o mu mu^T) omega
    """
    outer = omega.unsqueeze(-1) * omega.unsqueeze(-2)
    kernel = (1 + noise) / length * (dim * outer).exp()
    agreement = (mu * omega).sum(-1, keepdim=True)
    half_mu = -omega + agreement * omega + (kernel @ mu.unsqueeze(-1)).squeeze(-1)
    pull = (kernel @ (mu * omega).unsqueeze(-1)).squeeze(-1)
    half_omega = -mu + agreement * mu + dim * mu * pull
    return 2 * half_mu, 2 * half_omega


def gradient_flow(
    mu: Float[Tensor, " heads"],
    omega: Float[Tensor, " heads"],
    horizon: float,
    dim: int,
    length: int,
    noise: float,
) -> Callable[[np.ndarray], np.ndarray]:
    """Solve d(mu, omega)/dt = -grad R from t = 0 to `horizon`.

    Returns:
        A function from times, [n], to the states [mu; omega], [2 heads, n].

    Raises:
        RuntimeError: when the integration fails.
    """
    heads = len(mu)

    def velocity(_time: float, state: np.ndarray) -> np.ndarray:
        both = torch.from_numpy(np.ascontiguousarray(state))
        gradients = risk_gradients(both[:heads], both[heads:], dim, length, noise)
        return -torch.cat(gradients).numpy()

    start = torch.cat([mu, omega]).double().cpu().numpy()
    solved = solve_ivp(
        velocity, (0.0, horizon), start, method="LSODA", rtol=1e-6, atol=1e-9, dense_output=True
    )
    if not solved.success:
        raise RuntimeError(f"the gradient flow could not be followed: {solved.message}")
    return solved.sol


def single_head_limit(dim: int, length: int, noise: float) -> float:
    """Least approximate risk of one head, at omega = 1 / sqrt(d)."""
    return 1 + noise - 1 / (1 + math.e * dim * (1 + noise) / length)


def two_head_limit(dim: int, length: int, noise: float) -> float:
    """Infimum of the approximate risk of two heads, for omega -> 0 at eta = mu . omega fixed."""
    return 1 + noise - 1 / (1 + dim * (1 + noise) / length)


# Predictors ---------------------------------------------------------------------------------------


def gradient_step(data: Regressions, *, debiased: bool) -> Float[Tensor, "*stack batch tasks"]:
    """One step of gradient descent from 0, of unit size: 1/L sum_l y_l (x_l - mean x)^T x_q.

    The mean of the context is subtracted only when `debiased`.
    """
    inputs = data.inputs
    if debiased:
        inputs = inputs - inputs.mean(-2, keepdim=True)
    products = torch.einsum("...ld,...d->...l", inputs, data.query)
    return torch.einsum("...l,...lt->...t", products, data.labels) / inputs.shape[-2]


def ridge(data: Regressions, penalty: float) -> Float[Tensor, "*stack batch tasks"]:
    """x_q^T (X X^T + penalty I)^-1 X y; penalty = d * noise is the Bayes predictor (Sigma = I)."""
    gram = data.inputs.mT @ data.inputs
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    beta = torch.linalg.solve(gram + penalty * identity, data.inputs.mT @ data.labels)
    return torch.einsum("...d,...dt->...t", data.query, beta)


def ridge_limit(dim: int, length: int, noise: float) -> float:
    """Risk of Bayes ridge, noise included, for d and L growing at xi = d / L."""
    ratio = dim / length
    inner = 4 * noise + (noise + (1 - ratio) / ratio) ** 2
    return 0.5 * (noise + (ratio - 1) / ratio + math.sqrt(inner))


def best_preconditioner(
    variances: Float[Tensor, " dim"], length: int, noise: float
) -> Float[Tensor, " dim"]:
    """Eigenvalues of the matrix Gamma that makes 1/L sum_l y_l x_l^T Gamma x_q best.

    Gamma^-1 = (1 + 1/L) Sigma + (tr Sigma + d noise) / L, by Gaussian fourth moments; `variances` are
    the eigenvalues of Sigma, beta ~ N(0, I/d).
    """
    shrinkage = (variances.sum() + len(variances) * noise) / length
    return 1 / ((1 + 1 / length) * variances + shrinkage)
