"""Judging retrieval by vectors: likelihood at a fitted temperature, and the rank of the right document."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from reattend.metrics import ndcg, ranks_of_answers

COLDEST, HOTTEST = 0.002, 2.0


@dataclass(frozen=True)
class Found:
    """How well documents are found: mean log-likelihood of the right one in nats, nDCG@10, and the temperature."""

    log_likelihood: float
    ndcg: float
    temperature: float


def cosines(
    queries: Float[Tensor, "queries width"], documents: Float[Tensor, "documents width"]
) -> Float[Tensor, "queries documents"]:
    """Of every query with every document."""
    return F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T


def log_likelihood(scores: Float[Tensor, "queries queries"], temperature: float) -> float:
    """Mean over queries of log softmax(scores / temperature) at the right document, which is on the diagonal."""
    logits = scores.double() / temperature
    return (logits.diagonal() - logits.logsumexp(1)).mean().item()


def fitted_temperature(scores: Float[Tensor, "queries queries"]) -> float:
    """The temperature at which the right documents are likeliest, between .002 and 2."""
    found = minimize_scalar(
        lambda log: -log_likelihood(scores, math.exp(log)),
        bounds=(math.log(COLDEST), math.log(HOTTEST)),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return math.exp(found.x)


def judge(
    validation: Float[Tensor, "others others"], test: Float[Tensor, "queries queries"]
) -> Found:
    """Judge test scores; only the temperature comes from the validation scores.

    So a loss that merely shrinks or stretches all similarities changes nothing.
    """
    temperature = fitted_temperature(validation)
    return Found(
        log_likelihood(test, temperature),
        ndcg(ranks_of_answers(test)).mean().item(),
        temperature,
    )
