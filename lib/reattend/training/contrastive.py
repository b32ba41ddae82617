"""Contrastive losses: InfoNCE with hard negatives, CLIP's two directions, and SDM.

InfoNCE sets queries against the answers and the mined negatives of a whole batch.

The candidates of a batch are its answers, one a query and in the order of the queries, and behind them
the mined negatives of all queries. What comes again of a query's own answer among the candidates is not
counted against it.

Names of shapes: `batch` (queries), `mined` (negatives of one query), `candidates` (batch + batch * mined),
`width`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def counted_candidates(
    answers: Int[Tensor, " batch"], negatives: Int[Tensor, "batch mined"]
) -> Bool[Tensor, "batch candidates"]:
    """Which candidates stand in a query's denominator: all but further copies of its own answer.

    Two queries may share an answer, and one query's answer may be mined as a negative of another.

    Args:
        answers: identity of each query's answer.
        negatives: identities of each query's mined negatives.

    Raises:
        ValueError: when a query's own answer is among its own negatives, which is an error of the mining.
    """
    if (negatives == answers[:, None]).any():
        raise ValueError("a query's own answer is among its negatives: leave it out when mining")
    candidates = torch.cat([answers, negatives.flatten()])
    counted = answers[:, None] != candidates
    counted.diagonal().fill_(True)
    return counted


def cosine_logits(
    queries: Float[Tensor, "batch width"],
    candidates: Float[Tensor, "candidates width"],
    temperature: float,
    counted: Bool[Tensor, "batch candidates"] | None = None,
) -> Float[Tensor, "batch candidates"]:
    """Cosine / temperature; minus infinity for what is not counted. Vectors of any length.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T / temperature
    return logits if counted is None else logits.masked_fill(~counted, -torch.inf)


def answer_log_probability(logits: Float[Tensor, "batch candidates"]) -> Float[Tensor, " batch"]:
    """log p_i, in nats, of candidate i for query i among all candidates.

    InfoNCE is the mean of its negative.
    """
    return logits.diagonal() - logits.logsumexp(1)


def shared_targets(identities: Int[Tensor, " batch"]) -> Float[Tensor, "batch batch"]:
    """Where to find each item's positives in its batch: items of one identity share the target evenly.

    A caption that comes twice in a batch fits both pictures; counted as negatives they would be false ones.
    """
    same = (identities[:, None] == identities).double()
    return same / same.sum(1, keepdim=True)


def symmetric_info_nce(
    image_to_text: Float[Tensor, "batch batch"],
    text_to_image: Float[Tensor, "batch batch"],
    targets: Float[Tensor, "batch batch"] | None = None,
) -> Float[Tensor, ""]:
    """Half the cross-entropy of rows of one matrix and half that of columns of the other, in nats (CLIP).

    Both matrices hold logits of picture i and text j at [i, j]; CLIP's are one and the same. Each picture
    is sought among texts in its row of `image_to_text`, each text among pictures in its column of
    `text_to_image`.

    Args:
        targets: distribution over texts in each row, symmetric (`shared_targets`); the diagonal where not given.
    """
    if targets is None:
        rows = answer_log_probability(image_to_text)
        columns = answer_log_probability(text_to_image.T)
        return -(rows + columns).mean() / 2
    targets = targets.to(image_to_text)
    rows = (targets * image_to_text.log_softmax(1)).sum(1)
    columns = (targets * text_to_image.T.log_softmax(1)).sum(1)
    return -(rows + columns).mean() / 2


def similarity_distribution_matching(
    logits: Float[Tensor, "batch batch"],
    targets: Float[Tensor, "batch batch"],
    floor: float = 1e-8,
) -> Float[Tensor, ""]:
    """SDM: KL divergence of the matching probabilities from the targets, pictures and texts in turn summed, in nats.

    KL(p || q + floor) with p a softmax of the logits, mean over rows, plus the same of the columns (Jiang and Ye
    2023, IRRA). InfoNCE is the cross-entropy of the targets and asks p to cover them; here what is probable and no
    target costs about -log(floor), 18.4 nats: p is pushed off all false matches.

    Args:
        logits: cosines of picture i and text j over the temperature (.02 in the paper) at [i, j].
        targets: distribution over texts in each row, symmetric (`shared_targets`).
        floor: added to the targets, whose logarithm is taken.
    """
    expected = (targets.to(logits) + floor).log()
    log_p = torch.stack([logits.log_softmax(1), logits.T.log_softmax(1)])
    return (log_p.exp() * (log_p - expected)).sum(2).mean(1).sum()
