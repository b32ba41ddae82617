"""CrossTune: label-enhanced cross-attention on a frozen language model (arXiv 2403.12468).

A language model that can only be queried gives a vector h for a text and a vector for the description
of each of C labels, the rows of H. One query attends to the C labels in M heads; there is no value
projection, so the attention weights are the class distribution:

    q^m = h W_q^m        K^m = H W_k^m        a^m = softmax_c(s q^m K^mT)        p = mean over m of a^m

Only W_q, W_k and the scale s are trained, on -log p_y. The paper's full text was not at hand: what is
ours rather than the paper's is said at each function. Texts that a language model wrote as further
training data pass a `switch`, which asks a teacher.

Names of shapes: `items` (texts), `classes`, `width` (of the vectors), `heads`, `shots` (labelled texts).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional

Teacher = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(texts' vectors, labels, other texts' vectors) -> class probabilities of the others."""


class CrossTune(nn.Module):
    """Cross-attention of one text to the labels, whose weights are the class distribution.

    W_q and W_k are `width` x `width` and start at the identity plus small noise, so that training starts
    at the similarity of text and description (our choice: with a random start the descriptions are
    forgotten). The scale is learned as its logarithm. With unit vectors and `heads` slices of them,
    `scale` multiplies cosine-like numbers; 1 / sqrt(width / heads) would leave the attention uniform.

    Args:
        width: of the vectors.
        heads: M; divides `width`.
        scale: that of the logits at the start.
        noise: standard deviation of what is added to the identity.
        generator: of that noise.

    Raises:
        ValueError: when `heads` does not divide `width`, or for a scale that is not positive.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        scale: float = 10.0,
        noise: float = 0.01,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got {heads} heads for width {width}")
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.heads = heads
        self.query = nn.Parameter(_near_identity(width, noise, generator))
        self.key = nn.Parameter(_near_identity(width, noise, generator))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def attention(
        self, texts: Float[Tensor, "items width"], labels: Float[Tensor, "classes width"]
    ) -> Float[Tensor, "items heads classes"]:
        """The weights a^m of every head; each sums to 1 over the labels."""
        queries = (texts @ self.query).unflatten(-1, (self.heads, -1))
        keys = (labels @ self.key).unflatten(-1, (self.heads, -1))
        logits = torch.einsum("imd,cmd->imc", queries, keys)
        return (self.log_scale.exp() * logits).softmax(-1)

    def forward(
        self, texts: Float[Tensor, "items width"], labels: Float[Tensor, "classes width"]
    ) -> Float[Tensor, "items classes"]:
        """Class probabilities: the mean of the heads' weights, not of their logarithms."""
        return self.attention(texts, labels).mean(1)


def _near_identity(width: int, noise: float, generator: Generator | None) -> Tensor:
    return torch.eye(width) + noise * torch.randn(width, width, generator=generator)


def label_loss(
    probabilities: Float[Tensor, "items classes"], labels: Int[Tensor, " items"]
) -> Float[Tensor, ""]:
    """Mean of -log p_y in nats; p_y + 1e-9, since one confident wrong head caps p_y at (M - 1) / M."""
    right = probabilities.gather(1, labels[:, None])[:, 0]
    return -(right + 1e-9).log().mean()


def zero_shot(
    texts: Float[Tensor, "items width"], labels: Float[Tensor, "classes width"]
) -> Float[Tensor, "items classes"]:
    """Cosine of each text and each label: what the scorer ranks by before training, with one head."""
    return functional.normalize(texts, dim=-1) @ functional.normalize(labels, dim=-1).T


# The switch ---------------------------------------------------------------------------------------


def intended(
    teacher: Teacher,
    shots: Float[Tensor, "shots width"],
    labels: Int[Tensor, " shots"],
    more: Float[Tensor, "items width"],
    more_labels: Int[Tensor, " items"],
    least: float,
) -> Bool[Tensor, " items"]:
    """Which generated texts the teacher, trained on the shots, gives their intended label.

    With a probability of at least `least` (our rule: the paper's was not found).
    """
    probabilities = teacher(shots, labels, more)
    return probabilities.gather(1, more_labels[:, None])[:, 0] >= least


def cross_validated(
    teacher: Teacher,
    shots: Float[Tensor, "shots width"],
    labels: Int[Tensor, " shots"],
    folds: Int[Tensor, " shots"],
    more: Float[Tensor, "items width"],
    more_labels: Int[Tensor, " items"],
) -> float:
    """Mean log-probability of the right label of each shot, by a teacher without the shot's fold.

    The further texts are in every training set.
    """
    right = torch.zeros(len(shots), dtype=torch.float64)
    for fold in folds.unique():
        inside, outside = folds == fold, folds != fold
        probabilities = teacher(
            torch.cat([shots[outside], more]),
            torch.cat([labels[outside], more_labels]),
            shots[inside],
        )
        right[inside] = probabilities.gather(1, labels[inside, None])[:, 0].double()
    return (right + 1e-9).log().mean().item()


def switch(
    teacher: Teacher,
    shots: Float[Tensor, "shots width"],
    labels: Int[Tensor, " shots"],
    folds: Int[Tensor, " shots"],
    more: Float[Tensor, "items width"],
    more_labels: Int[Tensor, " items"],
    least: float = 0.5,
) -> Bool[Tensor, " items"]:
    """Which generated texts to train on: none, or those to which the teacher gives their label.

    Two levels (our reading): texts that the teacher would label otherwise go; what is left is used only
    if the teacher's cross-validated log-probability on the real shots does not drop with it. The
    teacher must not read the vectors that the scorer is trained on.

    Args:
        folds: fold of each shot, at least two; every class should be in each training set.
        least: see `intended`.

    Raises:
        ValueError: for fewer than two folds: nothing could be held out.
    """
    if len(folds.unique()) < 2:
        raise ValueError("the switch holds out shots: give at least two folds (two shots a class)")
    kept = intended(teacher, shots, labels, more, more_labels, least)
    without = cross_validated(teacher, shots, labels, folds, more[:0], more_labels[:0])
    with_it = cross_validated(teacher, shots, labels, folds, more[kept], more_labels[kept])
    return kept & (with_it >= without)
