"""Distilled sentence embedding: pooling, pair features, objective, scoring (arXiv 1908.05161).

A cross-attentive teacher T reads `[CLS] A [SEP] B [SEP]` and gives logits z^T. The student encodes A
and B apart with one encoder, pools each to a vector, and a small head reads the pair:

    u, v = mean over tokens of [H^(n-k+1); ...; H^(n)]           (`concat_top_mean`)
    f    = [u; v; u * v; |u - v|]                                z = W2 relu(W1 f + b1) + b2
    L    = (1 - alpha) L_task(z, y) + alpha ||z - z^T||^2

Names of shapes: `pairs`, `rows` (sentences), `length` (tokens), `width` (of one layer), `embedding`
(of u: `top` times `width`), `outputs` (K logits).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

Kind = Literal["binary", "multiclass", "regression"]
"""Of a task: K = 1 logit for binary and regression, one for each class for multiclass."""

# Student ------------------------------------------------------------------------------------------


def pool_mean(
    states: Float[Tensor, "rows length width"], mask: Bool[Tensor, "rows length"]
) -> Float[Tensor, "rows width"]:
    """Mean over the real tokens of a sentence but the first (CLS); SEP counts.

    Raises:
        ValueError: when a sentence has no token besides CLS.
    """
    kept = mask.clone()
    kept[:, 0] = False
    counts = kept.sum(1, keepdim=True)
    if (counts == 0).any():
        raise ValueError("a sentence has no token besides CLS to average")
    # A product would turn NaN in padding into NaN in the mean.
    return states.masked_fill(~kept.unsqueeze(-1), 0).sum(1) / counts


def concat_top_mean(
    layers: Sequence[Float[Tensor, "rows length width"]],
    mask: Bool[Tensor, "rows length"],
    top: int = 4,
) -> Float[Tensor, "rows embedding"]:
    """The student's pooling: the last `top` layers side by side, averaged over tokens without CLS.

    Args:
        layers: hidden states of every layer, the last one last.
        mask: True on real tokens.
        top: how many layers are joined; embedding = top * width.

    Raises:
        ValueError: for fewer than `top` layers, or a sentence with nothing to average.
    """
    if not 1 <= top <= len(layers):
        raise ValueError(f"top = {top} of {len(layers)} layers")
    return pool_mean(torch.cat(list(layers[-top:]), -1), mask)


@dataclass(frozen=True)
class StoredSentences:
    """What frozen layers say of sentences, computed once.

    Averaging acts on every layer by itself, so the frozen layers' share of u is a vector.

    Attributes:
        states: output of the last frozen layer, the input of the first trained one.
        mask: True on real tokens.
        pooled: the frozen layers' share of u, lower = (number of them in u) * width.
    """

    states: Float[Tensor, "sentences length width"]
    mask: Bool[Tensor, "sentences length"]
    pooled: Float[Tensor, "sentences lower"]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Int[Tensor, " rows"]) -> "StoredSentences":
        """Some sentences, without padding that all of them have."""
        longest = int(self.mask[rows].sum(1).max())
        parts = self.states[rows, :longest], self.mask[rows, :longest], self.pooled[rows]
        return StoredSentences(*parts)

    def batches(self, size: int = 128) -> Sequence[Int[Tensor, " rows"]]:
        """All rows in batches of sentences of similar length."""
        return self.mask.sum(1).argsort(stable=True).split(size)


def _additive(mask: Bool[Tensor, "rows length"], like: Tensor) -> Float[Tensor, "rows 1 1 length"]:
    """0 on real tokens, the least number on padding: what a layer of transformers adds to scores."""
    hidden = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return hidden.masked_fill(~mask, torch.finfo(like.dtype).min)[:, None, None]


@torch.no_grad()
def store_frozen(
    model: BertModel,
    ids: Int[Tensor, "sentences length"],
    mask: Bool[Tensor, "sentences length"],
    *,
    trained: int,
    top: int,
    dtype: torch.dtype = torch.float16,
    batch: int = 128,
) -> StoredSentences:
    """Run the layers below the `trained` uppermost ones over all sentences, without dropout.

    Args:
        model: the encoder, in evaluation mode; no segment ids: every sentence stands alone.
        trained: layers that will be trained; with 0 no states are stored, u itself is in `pooled`.
        top: layers that u is made of, frozen ones among them.
        dtype: of the stored states.

    Raises:
        ValueError: when the model has fewer layers than `trained` or `top`.
    """
    depth, width = len(model.encoder.layer), model.config.hidden_size
    if not (0 <= trained <= depth and 1 <= top <= depth):
        raise ValueError(f"{trained} trained and top = {top} of {depth} layers")
    lower = max(0, top - trained)
    stored = StoredSentences(
        torch.zeros(*mask.shape, width if trained else 0, dtype=dtype, device=mask.device),
        mask,
        torch.zeros(len(mask), lower * width, dtype=model.dtype, device=mask.device),
    )
    for rows in stored.batches(batch):
        part = mask[rows, : int(mask[rows].sum(1).max())]
        layers = [model.embeddings(input_ids=ids[rows, : part.shape[1]])]
        for layer in model.encoder.layer[: depth - trained]:
            layers.append(layer(layers[-1], _additive(part, layers[-1])))
        if trained:
            stored.states[rows, : part.shape[1]] = layers[-1].to(dtype)
        if lower:
            stored.pooled[rows] = concat_top_mean(layers, part, lower)
    return stored


class Siamese(nn.Module):
    """The student of one task: the trained layers of the encoder, pooling, and the head.

    Args:
        model: a generic pretrained encoder (not the teacher's); its uppermost layers are trained.
        outputs: K.
        trained, top: as in `store_frozen`.
        projection: width of a linear layer on top of the pooling (off in the paper, an option of its
            code); None leaves it out.
    """

    def __init__(
        self,
        model: BertModel,
        outputs: int,
        *,
        trained: int,
        top: int,
        projection: int | None = None,
    ) -> None:
        super().__init__()
        depth, self.pooled = len(model.encoder.layer), top * model.config.hidden_size
        self.layers = model.encoder.layer[depth - trained :]
        self.embedding = projection or self.pooled
        self.projection = nn.Linear(self.pooled, projection) if projection else nn.Identity()
        self.head = PairHead(self.embedding, outputs)

    def embed(self, stored: StoredSentences) -> Float[Tensor, "sentences embedding"]:
        """u of every sentence."""
        states = stored.states.to(stored.pooled.dtype)
        pooled, hidden = [stored.pooled], _additive(stored.mask, states)
        for layer in self.layers:
            states = layer(states, hidden)
            pooled.append(pool_mean(states, stored.mask))
        return self.projection(torch.cat(pooled, -1)[:, -self.pooled :])

    @torch.no_grad()
    def embed_all(self, stored: StoredSentences) -> Float[Tensor, "sentences embedding"]:
        """u of many sentences, in batches, without dropout; leaves the module in evaluation mode."""
        self.eval()
        out = stored.pooled.new_zeros(len(stored), self.embedding)
        for rows in stored.batches():
            out[rows] = self.embed(stored[rows])
        return out

    def forward(
        self, first: StoredSentences, second: StoredSentences
    ) -> Float[Tensor, "pairs outputs"]:
        """z of each pair; the sentences are encoded apart."""
        return self.head(self.embed(first), self.embed(second))


def pair_features(
    u: Float[Tensor, "*pairs embedding"], v: Float[Tensor, "*pairs embedding"]
) -> Float[Tensor, "*pairs features"]:
    """f = [u; v; u * v; |u - v|], features = 4 * embedding."""
    return torch.cat([u, v, u * v, (u - v).abs()], -1)


class PairHead(nn.Module):
    """Two layers on the pair features; it is not symmetric in u and v.

    Args:
        embedding: width of u and v.
        outputs: K.
        hidden: width between the layers (512 in the paper).
    """

    def __init__(self, embedding: int, outputs: int, hidden: int = 512) -> None:
        super().__init__()
        self.first = nn.Linear(4 * embedding, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(
        self, u: Float[Tensor, "*pairs embedding"], v: Float[Tensor, "*pairs embedding"]
    ) -> Float[Tensor, "*pairs outputs"]:
        """z = W2 relu(W1 f + b1) + b2."""
        return self.second(functional.relu(self.first(pair_features(u, v))))

    def blocks(self) -> tuple[Float[Tensor, "hidden embedding"], ...]:
        """W_a, W_b, W_c, W_d with W1 f = W_a u + W_b v + W_c (u * v) + W_d |u - v|."""
        return self.first.weight.chunk(4, dim=1)

    def catalogue(
        self, v: Float[Tensor, "candidates embedding"]
    ) -> Float[Tensor, "candidates hidden"]:
        """W_b v of every candidate: computed once, like the embeddings themselves."""
        return functional.linear(v, self.blocks()[1])

    def score(
        self,
        u: Float[Tensor, "queries embedding"],
        v: Float[Tensor, "candidates embedding"],
        prepared: Float[Tensor, "candidates hidden"],
    ) -> Float[Tensor, "queries candidates outputs"]:
        """Logits of every query with every candidate; `prepared` is `catalogue(v)`.

        Per pair only two of the four blocks are left, and W_c (u * v) = (W_c diag(u)) v is one matrix
        product for a query.
        """
        w_a, _, w_c, w_d = self.blocks()
        own = functional.linear(u, w_a, self.first.bias)
        logits = []
        # All queries at once would hold queries x embedding x candidates.
        for query, start in zip(u, own, strict=True):
            hidden = prepared + start + v @ (w_c * query).T + (v - query).abs() @ w_d.T
            logits.append(self.second(functional.relu(hidden)))
        return torch.stack(logits)


# Objective ----------------------------------------------------------------------------------------


def teacher_targets(logits: Float[Tensor, "pairs classes"], kind: Kind) -> Tensor:
    """z^T [pairs, K]: of a binary teacher's two logits the difference z_1 - z_0, otherwise as they are.

    sigmoid(z_1 - z_0) is the teacher's probability of class 1.

    Raises:
        ValueError: when the number of logits does not fit the kind.
    """
    classes = logits.shape[-1]
    wanted = {"binary": classes == 2, "multiclass": classes > 2, "regression": classes == 1}
    if not wanted[kind]:
        raise ValueError(f"a {kind} teacher with {classes} logits")
    return logits[:, 1:] - logits[:, :1] if kind == "binary" else logits


def task_loss(
    logits: Float[Tensor, "pairs outputs"],
    targets: Float[Tensor, " pairs"] | Int[Tensor, " pairs"],
    kind: Kind,
) -> Float[Tensor, ""]:
    """L_task, mean over pairs: logistic loss, cross-entropy or squared error."""
    if kind == "multiclass":
        return functional.cross_entropy(logits, targets.long())
    targets = targets.to(logits.dtype)
    if kind == "binary":
        return functional.binary_cross_entropy_with_logits(logits[:, 0], targets)
    return functional.mse_loss(logits[:, 0], targets)


def distillation_loss(
    logits: Float[Tensor, "pairs outputs"], teacher: Float[Tensor, "pairs teacher_outputs"]
) -> Float[Tensor, ""]:
    """||z - z^T||^2, summed over the K logits and then averaged over pairs.

    Raises:
        ValueError: for different shapes, which would broadcast.
    """
    if logits.shape != teacher.shape:
        raise ValueError(f"student {tuple(logits.shape)} and teacher {tuple(teacher.shape)} differ")
    return (logits - teacher).square().sum(-1).mean()


def dse_loss(
    logits: Float[Tensor, "pairs outputs"],
    targets: Float[Tensor, " pairs"] | Int[Tensor, " pairs"],
    teacher: Float[Tensor, "pairs outputs"],
    alpha: float,
    kind: Kind,
) -> Float[Tensor, ""]:
    """(1 - alpha) L_task(z, y) + alpha ||z - z^T||^2.

    alpha = 0 is the siamese network on labels, 1 pure distillation (no label is read), 0.5 the paper.

    Raises:
        ValueError: for alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha:g}")
    # A term of weight 0 is left out, not multiplied: its NaN or infinity would survive.
    loss = logits.new_zeros(())
    if alpha < 1:
        loss = loss + (1 - alpha) * task_loss(logits, targets, kind)
    if alpha > 0:
        loss = loss + alpha * distillation_loss(logits, teacher)
    return loss


def exchange_equal(
    teacher: Float[Tensor, "pairs outputs"], targets: Float[Tensor, " pairs"], kind: Kind, seed: int
) -> Float[Tensor, "pairs outputs"]:
    """The teacher's logits, exchanged at random among pairs of equal target.

    A placebo: every pair keeps logits that fit its label, but those of another pair. Similarities have
    no equal targets; there ten neighbours in rank count as equal.
    """
    places = targets if kind != "regression" else targets.argsort().argsort() // 10
    out, generator = teacher.clone(), torch.Generator().manual_seed(seed)
    for value in places.unique():
        rows = (places == value).nonzero()[:, 0]
        out[rows] = teacher[rows[torch.randperm(len(rows), generator=generator).to(rows.device)]]
    return out


def relative_degradation(teacher: Sequence[float], student: Sequence[float]) -> float:
    """Mean over tasks of (teacher - student) / teacher, each task in its own metric (0.046 reported)."""
    return sum((t - s) / t for t, s in zip(teacher, student, strict=True)) / len(teacher)


# Costs --------------------------------------------------------------------------------------------
# Floating-point operations, a multiply-add counts 2; softmax, norms and activations are not counted.


def encoder_flops(tokens: int, width: int, layers: int) -> int:
    """F(n) of Transformer layers with a feed-forward of 4 widths: layers (24 n d^2 + 4 n^2 d)."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def head_flops(embedding: int, outputs: int, hidden: int = 512, split: bool = False) -> int:
    """Of the head for one pair; `split`: only what is left when W_a u and W_b v are precomputed."""
    return 2 * (2 if split else 4) * embedding * hidden + 2 * hidden * outputs


def cross_flops(queries: int, candidates: int, tokens: int, width: int, layers: int) -> int:
    """Scoring every pair with a cross-encoder; `tokens` of a joint sequence."""
    return queries * candidates * encoder_flops(tokens, width, layers)


def student_flops(
    queries: int,
    candidates: int,
    tokens: int,
    width: int,
    layers: int,
    top: int,
    outputs: int = 1,
    *,
    hidden: int = 512,
    projection: int | None = None,
    split: bool = False,
    encode_catalogue: bool = False,
) -> int:
    """Scoring every pair with the student; `tokens` of one sentence.

    The catalogue is encoded beforehand, unless `encode_catalogue`. With `split`, W_a u of every query
    is counted, and W_b v only with `encode_catalogue`.
    """
    embedding = projection or top * width
    sentences = queries + (candidates if encode_catalogue else 0)
    once = encoder_flops(tokens, width, layers) + (2 * embedding * hidden if split else 0)
    once += 2 * top * width * projection if projection else 0
    return sentences * once + queries * candidates * head_flops(embedding, outputs, hidden, split)
