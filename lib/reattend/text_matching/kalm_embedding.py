"""KaLM-Embedding-V2: training techniques of an embedding model (arXiv 2506.20923).

A decoder language model without its causal mask embeds queries and documents as means of its last states.
It is trained by InfoNCE against the answers and mined negatives of the batch (`reattend.training.contrastive`),

    p_i = exp(s(q_i, d_i) / tau) / Z_i                                                     InfoNCE: -log p_i
    w_i = (1 - p_i)^gamma                                  L = mean_i(-w_i log p_i)        focal reweighting
    h_i = lambda n_ij + (1 - lambda) n_ik,   g_i = sum_m lambda_m n_im    added to Z_i     online mixing
    L_KL = KL(softmax(teacher's cosines / tau) || softmax(the student's))                  distillation
    sum_d weight_d L(first d numbers of each vector)                                       Matryoshka

The official code holds InfoNCE, Matryoshka and the mining; focal reweighting, mixing and distillation are
reconstructed from summaries of the paper that agree with each other. What is ours is said at each function.

Names of shapes: `batch` (queries), `mined` (negatives of one query), `candidates`, `width`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from reattend.trunks.decoders import decoder_states, pool_tokens

# The encoder --------------------------------------------------------------------------------------


def instruct(task: str, query: str) -> str:
    """The text of a query; documents stay bare, and in symmetric tasks both sides are queries."""
    return f"Instruct: {task} Query: {query}"


def embed(
    model: PreTrainedModel,
    ids: Int[Tensor, "texts length"],
    mask: Bool[Tensor, "texts length"],
    *,
    causal: bool = False,
    pooling: str = "mean",
) -> Float[Tensor, "texts width"]:
    """Vectors of texts, not normalised: Matryoshka slices them first.

    The paper: no causal mask, "mean" over all real tokens, those of the instruction included. A
    decoder's own way is `causal` with pooling "last".
    """
    return pool_tokens(decoder_states(model, ids, mask, causal=causal), mask, pooling)


# Focal reweighting --------------------------------------------------------------------------------


def focal_weights(
    log_p: Float[Tensor, " batch"], gamma: float = 0.5, *, detach: bool = True
) -> Float[Tensor, " batch"]:
    """w_i = (1 - p_i)^gamma, from log p_i; 1 for gamma = 0.

    Whether the gradient flows through w_i is not stated in the paper; by default it does not.

    Raises:
        ValueError: for a negative gamma.
    """
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    missing = -torch.expm1(log_p.detach() if detach else log_p)
    # The root has no slope at 0, where an answer is certain.
    return missing.clamp(min=torch.finfo(missing.dtype).tiny) ** gamma


def weighted_loss(
    log_p: Float[Tensor, " batch"], weights: Float[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """-sum_i w_i log p_i / batch: divided by the batch and not by sum w_i, which would undo the shrinking."""
    return -(weights * log_p).mean()


# Online mixing ------------------------------------------------------------------------------------


def pair_weights(batch: int, mined: int, generator: Generator) -> Float[Tensor, "{batch} {mined}"]:
    """Of pair-wise mixtures: lambda and 1 - lambda on two different negatives of each query, 0 elsewhere.

    lambda ~ Beta(2, 2): the median of three uniform numbers.

    Raises:
        ValueError: for fewer than two negatives.
    """
    if mined < 2:
        raise ValueError(f"mixing takes two negatives a query, got {mined}")
    two = torch.rand(batch, mined, generator=generator).argsort(1)[:, :2]
    share = torch.rand(batch, 3, generator=generator).median(1).values
    return torch.zeros(batch, mined).scatter(1, two, torch.stack([share, 1 - share], 1))


def list_weights(
    queries: Float[Tensor, "batch width"],
    negatives: Float[Tensor, "batch mined width"],
    temperature: float = 0.05,
) -> Float[Tensor, "batch mined"]:
    """Of list-wise mixtures: softmax(cosine / temperature) over all negatives of each query.

    Our choice: the paper weights by similarity, in a form that was not found. Constants, so that
    gradients reach a mixture's negatives only.
    """
    cosines = F.cosine_similarity(queries.detach()[:, None], negatives.detach(), dim=-1)
    return (cosines / temperature).softmax(1)


def mix(
    negatives: Float[Tensor, "batch mined width"], weights: Float[Tensor, "batch more mined"]
) -> Float[Tensor, "batch more width"]:
    """Mixtures of unit vectors, of length 1 again: as they come they would be shorter, and easier."""
    return F.normalize(weights @ F.normalize(negatives, dim=-1), dim=-1)


def add_own(
    logits: Float[Tensor, "batch candidates"],
    queries: Float[Tensor, "batch width"],
    own: Float[Tensor, "batch more width"],
    temperature: float,
) -> Float[Tensor, "batch more_candidates"]:
    """Logits with further negatives that stand in their own query's denominator alone."""
    cosines = F.normalize(own, dim=-1) @ F.normalize(queries, dim=-1)[..., None]
    return torch.cat([logits, cosines[..., 0] / temperature], 1)


# Distillation and Matryoshka ----------------------------------------------------------------------


def distillation_loss(
    teacher: Float[Tensor, "batch candidates"], student: Float[Tensor, "batch candidates"]
) -> Float[Tensor, ""]:
    """Mean over queries of KL(P_teacher || P_student), from logits, in nats.

    What is minus infinity for the teacher is no candidate, and must be so for the student.
    """
    p, q = teacher.log_softmax(1), student.log_softmax(1)
    terms = (p.exp() * (p - q)).masked_fill(teacher.isneginf(), 0)
    return terms.sum(1).mean()


def matryoshka_loss(
    loss: Callable[..., Float[Tensor, ""]],
    vectors: Sequence[Tensor],
    dims: Sequence[int],
    weights: Sequence[float],
) -> Float[Tensor, ""]:
    """Weighted sum of the losses of the first numbers of all vectors.

    Slices are taken before normalisation; `loss` normalises each, as all losses of cosines here do.

    Args:
        loss: called with as many tensors as `vectors` has, of [..., dim].
        dims, weights: the paper: 896 / 512 / 256 / 128 / 64 with 1 / .3 / .2 / .1 / .1.

    Raises:
        ValueError: when dims and weights differ in number, or a dim is not in 1..width.
    """
    width = vectors[0].shape[-1]
    if len(dims) != len(weights) or not all(1 <= dim <= width for dim in dims):
        raise ValueError(f"one weight for each dim in 1..{width}, got {dims} and {weights}")
    parts = (w * loss(*(v[..., :d] for v in vectors)) for d, w in zip(dims, weights, strict=True))
    return sum(parts)


# Data rules ---------------------------------------------------------------------------------------


def mine_negatives(
    scores: Float[Tensor, "queries documents"],
    answers: Int[Tensor, " queries"],
    count: int,
    ranks: tuple[int, int],
    generator: Generator,
) -> Int[Tensor, "queries count"]:
    """Negatives drawn from a range of ranks of an earlier model's scores, the answer left out.

    Args:
        answers: the right document of each query.
        count: negatives a query; 7 in the paper.
        ranks: first rank and the one behind the last, from 0; 50 and 100 in the paper.

    Raises:
        ValueError: when the range holds fewer than `count` documents.
    """
    first, end = ranks
    if not 0 <= first <= end - count or end >= scores.shape[1]:
        raise ValueError(
            f"{count} negatives do not fit ranks {ranks} of {scores.shape[1]} documents"
        )
    others = scores.scatter(1, answers[:, None], -torch.inf)
    ranked = others.topk(end, dim=1).indices[:, first:]
    drawn = torch.rand(ranked.shape, generator=generator).argsort(1)[:, :count]
    return ranked.gather(1, drawn.to(ranked.device))


def ranking_consistent(
    scores: Float[Tensor, "queries documents"], answers: Int[Tensor, " queries"], k: int = 50
) -> Bool[Tensor, " queries"]:
    """Which pairs the consistency filter keeps: those whose answer is among an earlier model's first k."""
    right = scores.gather(1, answers[:, None])
    return (scores > right).sum(1) < k
