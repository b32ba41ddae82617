"""Adversarial training of attention scores, Attention AT and Attention iAT (arXiv 2009.12064).

A BiLSTM reads a text, additive attention weighs its states, a linear layer classifies their mean:

    a_t = v^T tanh(W h_t + b),   c = sum_t softmax(a)_t h_t,   logits = U c

With a second text its last state h^q takes part: a_t = v^T tanh(W_1 h_t + W_2 h^q + b) and
logits = U [c; h^q]. Training adds the loss under a perturbation r of the scores *before* softmax,

    L_total = L(0) + lambda L(r),   r constant,

where r of length epsilon is random (RP), the gradient of the loss (AT), or a combination of the
score differences d_t = (a_t - a_k)_k with coefficients along the gradient of the loss (iAT). Word AT
(arXiv 1605.07725) and Word iAT (arXiv 1805.02917) do the same with word embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

PAD = 0
Norm = Literal["none", "unit", "per_word"]

# Perturbations ------------------------------------------------------------------------------------


def scaled(direction: Float[Tensor, "batch ..."], size: float) -> Float[Tensor, "batch ..."]:
    """`direction` of every example with Euclidean length `size`; zero stays zero."""
    flat = direction.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    length = flat.norm(dim=1, keepdim=True)  # at least 1 unless all is zero: nothing underflows
    return (size * flat / length.clamp_min(0.5)).view_as(direction)


def adversarial(gradient: Float[Tensor, "batch ..."], size: float) -> Float[Tensor, "batch ..."]:
    """AT: r = epsilon g / ||g||, the norm over the whole text."""
    return scaled(gradient, size)


def random_perturbation(
    mask: Bool[Tensor, "batch length"], size: float, generator: torch.Generator
) -> Float[Tensor, "batch length"]:
    """RP: r = epsilon n / ||n|| with n ~ N(0, I) on the words, 0 on padding."""
    noise = torch.randn(mask.shape, generator=generator, device=mask.device)
    return scaled(noise * mask, size)


def score_differences(
    scores: Float[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch length length"]:
    """d_tk = a_t - a_k between the words of a text, 0 where t or k is padding."""
    both = mask.unsqueeze(2) & mask.unsqueeze(1)
    return (scores.unsqueeze(2) - scores.unsqueeze(1)).masked_fill(~both, 0)


def interpretable(
    gradient: Float[Tensor, "batch length"],
    scores: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    size: float,
    norm: Norm = "none",
) -> Float[Tensor, "batch length"]:
    """iAT in closed form: r_t = alpha_t . d_t with alpha = epsilon g_alpha / ||g_alpha||.

    The gradient with respect to alpha_tk at alpha = 0 is g_t d_tk with g_t = dL/dr_t, hence
    r_t is proportional to g_t ||d_t||^2; d counts as constant.

    Args:
        gradient: g, zero on padding.
        scores: a, before softmax.
        size: epsilon, the length of r.
        norm: "none" takes the raw differences and rescales r to length epsilon; "unit" takes
            d_t / ||d_t||, which makes iAT equal AT on words whose score differs from another's;
            "per_word" normalises alpha for every word, r_t = epsilon sign(g_t), rescaled.

    Raises:
        ValueError: unknown norm.
    """
    squares = score_differences(scores.detach(), mask).square().sum(-1)
    if norm == "none":
        return scaled(gradient * squares, size)
    if norm == "unit":
        return scaled(gradient * (squares > 0), size)
    if norm == "per_word":
        return scaled(gradient.sign() * (squares > 0), size)
    raise ValueError(f"norm must be 'none', 'unit' or 'per_word', not {norm!r}")


def official_interpretable(
    gradient: Float[Tensor, "batch length"], size: float
) -> Float[Tensor, "batch length"]:
    """What the published layer for iAT computes: r = -epsilon g / ||g||, which lowers the loss.

    Its differences (between texts of the batch) multiply a variable that is zero in the first pass,
    and the second pass normalises minus the gradient of that variable.
    """
    return scaled(-gradient, size)


def word_directions(
    words: Float[Tensor, "batch length width"],
    neighbours: Float[Tensor, "batch length near width"],
) -> Float[Tensor, "batch length near width"]:
    """Unit vectors from each word's embedding to those of its neighbours in the vocabulary."""
    return functional.normalize(neighbours - words.unsqueeze(2), dim=-1)


def interpretable_word(
    gradient: Float[Tensor, "batch length width"],
    directions: Float[Tensor, "batch length near width"],
    size: float,
) -> Float[Tensor, "batch length width"]:
    """Word iAT: r_t = sum_k alpha_tk d_tk with alpha = epsilon g_alpha / ||g_alpha||.

    g_alpha,tk = (dL/dw_t) . d_tk; it is alpha that has length epsilon, as published.
    """
    coefficients = torch.einsum("btd,btkd->btk", gradient, directions)
    return torch.einsum("btk,btkd->btd", scaled(coefficients, size), directions)


# Model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """A batch: token numbers, PAD at the end, and the class of each text.

    `second` is the other text of a pair; attention reads `first`.
    """

    first: Int[Tensor, "batch length"]
    targets: Int[Tensor, " batch"]
    second: Int[Tensor, "batch length2"] | None = None

    @property
    def mask(self) -> Bool[Tensor, "batch length"]:
        """True on the words of the first text."""
        return self.first != PAD

    def take(self, rows: Int[Tensor, " rows"]) -> Texts:
        """Some of the texts, cut to the longest of them."""
        second = None if self.second is None else _cut(self.second[rows])
        return Texts(_cut(self.first[rows]), self.targets[rows], second)

    def to(self, device: torch.device) -> Texts:
        """The batch on another device."""
        second = None if self.second is None else self.second.to(device)
        return Texts(self.first.to(device), self.targets.to(device), second)

    def __len__(self) -> int:
        return len(self.targets)


def _cut(tokens: Int[Tensor, "batch length"]) -> Int[Tensor, "batch shorter"]:
    return tokens[:, : int((tokens != PAD).sum(1).max())]


def normalised(
    table: Float[Tensor, "words width"], frequency: Float[Tensor, " words"]
) -> Float[Tensor, "words width"]:
    """Embeddings with mean 0 and variance 1 in every channel, weighted by word frequency."""
    centred = table - frequency @ table
    return centred / (frequency @ centred.square()).sqrt()


def nearest_words(table: Float[Tensor, "words width"], count: int) -> Int[Tensor, "words count"]:
    """The most similar other words by cosine; PAD is nobody's neighbour.

    Raises:
        ValueError: when the vocabulary has too few words.
    """
    if len(table) < count + 2:
        raise ValueError(f"a vocabulary of {len(table)} has no {count} neighbours for every word")
    directions = functional.normalize(table, dim=-1)
    similarity = (directions @ directions.T).fill_diagonal_(-torch.inf)
    similarity[:, PAD] = -torch.inf
    return similarity.topk(count, dim=-1).indices


def reversal(mask: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Positions that reverse the words of each text and leave its padding in place."""
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - place, place)


class BiLSTM(nn.Module):
    """Two LSTMs, the second on the reversed text: padding comes last for both and is never read."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.onward = nn.LSTM(inputs, hidden, batch_first=True)
        self.back = nn.LSTM(inputs, hidden, batch_first=True)

    def train(self, mode: bool = True) -> BiLSTM:
        """As of any module, but the LSTMs, which have no dropout, always train: cuDNN asks for it.

        It gives no gradients in evaluation mode, and importance is one.
        """
        super().train(mode)
        self.onward.train()
        self.back.train()
        return self

    def forward(
        self, words: Float[Tensor, "batch length width"], mask: Bool[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch length states"], Float[Tensor, "batch states"]]:
        """States of all words (garbage on padding), and the last state of both directions."""
        order = reversal(mask).unsqueeze(2)
        onward, _ = self.onward(words)
        back, _ = self.back(words.gather(1, order.expand_as(words)))
        rows, last = torch.arange(len(mask), device=mask.device), mask.sum(1) - 1
        end = torch.cat([onward[rows, last], back[rows, last]], -1)
        return torch.cat([onward, back.gather(1, order.expand_as(back))], -1), end


@dataclass(frozen=True)
class Encoded:
    """What the encoder hands to attention; `question` is the last state of the second text."""

    states: Float[Tensor, "batch length states"]
    scores: Float[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    question: Float[Tensor, "batch states"] | None


class AttentionClassifier(nn.Module):
    """BiLSTM, additive attention and a linear classifier, for texts or pairs of texts.

    Args:
        table: normalised embeddings; row PAD stands for padding.
        hidden: LSTM units per direction; attention has as many.
        classes: number of logits.
        paired: whether there is a second text, with an encoder of its own.
        trainable: whether training changes the embeddings.
        neighbours: for Word iAT, the nearest words of each word.
    """

    def __init__(
        self,
        table: Float[Tensor, "words width"],
        hidden: int,
        classes: int,
        paired: bool = False,
        trainable: bool = False,
        neighbours: Int[Tensor, "words near"] | None = None,
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone() if trainable else table, requires_grad=trainable)
        self.register_buffer("neighbours", neighbours)
        self.encoder = BiLSTM(table.shape[1], hidden)
        self.second_encoder = BiLSTM(table.shape[1], hidden) if paired else None
        self.keys = nn.Linear(2 * hidden, hidden)
        self.query = nn.Linear(2 * hidden, hidden, bias=False) if paired else None
        self.score = nn.Linear(hidden, 1, bias=False)
        self.output = nn.Linear(2 * hidden * (1 + paired), classes)

    def embed(self, texts: Texts) -> Float[Tensor, "batch length width"]:
        """Embeddings of the first text."""
        return functional.embedding(texts.first, self.table)

    def directions(
        self, texts: Texts, words: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length near width"]:
        """Constant unit vectors from each word of the first text to its neighbours.

        Raises:
            ValueError: when the model was made without neighbours.
        """
        if self.neighbours is None:
            raise ValueError("Word iAT needs a model with the `neighbours` of every word")
        near = functional.embedding(self.neighbours[texts.first], self.table.detach())
        return word_directions(words.detach(), near)

    def encode(self, texts: Texts, words: Float[Tensor, "batch length width"]) -> Encoded:
        """States and attention scores of the first text, given its embeddings."""
        mask = texts.mask
        states, _ = self.encoder(words, mask)
        inner, question = self.keys(states), None
        if self.second_encoder is not None:
            second = functional.embedding(texts.second, self.table)
            _, question = self.second_encoder(second, texts.second != PAD)
            inner = inner + self.query(question).unsqueeze(1)
        return Encoded(states, self.score(inner.tanh()).squeeze(-1), mask, question)

    def read(
        self,
        encoded: Encoded,
        perturbation: Float[Tensor, "batch length"] | None = None,
        fixed: bool = False,
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch length"]]:
        """Logits and attention weights under a perturbation of the scores.

        `fixed` cuts the gradient through the weights, as Jain and Wallace (2019) do.
        """
        scores = encoded.scores if perturbation is None else encoded.scores + perturbation
        weights = scores.masked_fill(~encoded.mask, -torch.inf).softmax(-1)
        weights = weights.detach() if fixed else weights
        context = torch.einsum("bt,bth->bh", weights, encoded.states)
        if encoded.question is not None:
            context = torch.cat([context, encoded.question], -1)
        return self.output(context), weights

    def forward(
        self, texts: Texts
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch length"]]:
        """Logits and attention weights, unperturbed."""
        return self.read(self.encode(texts, self.embed(texts)))


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Technique:
    """How the training loss is perturbed.

    `place` is "nothing" (Vanilla), "scores" or "words"; `direction` is "random", "adversarial",
    "interpretable" or "official" (scores only, with `norm`); `size` is epsilon, `weight` lambda.
    """

    place: Literal["nothing", "scores", "words"] = "nothing"
    direction: Literal["random", "adversarial", "interpretable", "official"] = "adversarial"
    size: float = 1.0
    weight: float = 1.0
    norm: Norm = "none"


def training_loss(
    model: AttentionClassifier,
    texts: Texts,
    technique: Technique,
    class_weights: Float[Tensor, " classes"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """L(0) + lambda L(r). r is a constant: no gradient passes through it.

    Raises:
        ValueError: a direction that the place does not have.
    """

    def loss(encoded: Encoded, perturbation: Tensor | None = None) -> Tensor:
        logits, _ = model.read(encoded, perturbation)
        return functional.cross_entropy(logits, texts.targets, weight=class_weights)

    words = model.embed(texts)
    if technique.place == "words" and not words.requires_grad:
        words.requires_grad_()
    encoded = model.encode(texts, words)
    if technique.place == "nothing":
        return loss(encoded)
    if technique.place == "scores":
        zero = torch.zeros_like(encoded.scores, requires_grad=True)
        clean = loss(encoded, zero)
        (gradient,) = torch.autograd.grad(clean, zero, retain_graph=True)
        r = score_perturbation(technique, gradient, encoded, generator)
        return clean + technique.weight * loss(encoded, r)
    clean = loss(encoded)
    (gradient,) = torch.autograd.grad(clean, words, retain_graph=True)
    r = word_perturbation(technique, model, texts, words, gradient)
    return clean + technique.weight * loss(model.encode(texts, words + r))


def score_perturbation(
    technique: Technique,
    gradient: Float[Tensor, "batch length"],
    encoded: Encoded,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch length"]:
    """r of a technique that perturbs attention scores, given g = dL/dr at r = 0."""
    size, scores, mask = technique.size, encoded.scores, encoded.mask
    if technique.direction == "random":
        return random_perturbation(mask, size, generator)
    if technique.direction == "adversarial":
        return adversarial(gradient, size)
    if technique.direction == "interpretable":
        return interpretable(gradient, scores, mask, size, technique.norm)
    if technique.direction == "official":
        return official_interpretable(gradient, size)
    raise ValueError(f"unknown direction {technique.direction!r}")


def word_perturbation(
    technique: Technique,
    model: AttentionClassifier,
    texts: Texts,
    words: Float[Tensor, "batch length width"],
    gradient: Float[Tensor, "batch length width"],
) -> Float[Tensor, "batch length width"]:
    """r of a technique that perturbs embeddings, given g = dL/dw."""
    if technique.direction == "adversarial":
        return adversarial(gradient, technique.size)
    if technique.direction == "interpretable":
        return interpretable_word(gradient, model.directions(texts, words), technique.size)
    raise ValueError(f"words have no perturbation {technique.direction!r}")


# Measurements -------------------------------------------------------------------------------------


def log_odds(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Log-odds of the predicted class: its logit minus logsumexp of the others."""
    best = logits.argmax(-1, keepdim=True)
    others = logits.scatter(1, best, -torch.inf)
    return logits.gather(1, best).squeeze(1) - others.logsumexp(-1)


def word_importance(
    output: Callable[[Tensor], Tensor],
    words: Float[Tensor, "batch length width"],
    times_input: bool = False,
) -> Float[Tensor, "batch length"]:
    """Size of the gradient of `output(words)`, one number per text, at every word.

    The L1 norm over the channels, or with `times_input` |sum over channels of gradient x input|.
    """
    words = words.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(output(words).sum(), words)
    if times_input:
        return (gradient * words.detach()).sum(-1).abs()
    return gradient.abs().sum(-1)


def pearson(
    x: Float[Tensor, "batch length"],
    y: Float[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
) -> Float[Tensor, " batch"]:
    """Pearson correlation over the words of each text; NaN where one of the two is constant."""
    weight = mask.double()
    count = weight.sum(1, keepdim=True)
    x, y = ((z.double() - (z * weight).sum(1, keepdim=True) / count) * weight for z in (x, y))
    return (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()


def total_variation(
    p: Float[Tensor, "batch classes"], q: Float[Tensor, "batch classes"]
) -> Float[Tensor, " batch"]:
    """Half the L1 distance of two distributions over classes."""
    return (p - q).abs().sum(-1) / 2
