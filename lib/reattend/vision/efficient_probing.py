"""Efficient probing (EP) of frozen vision transformers, and the probes it is compared with.

Psomas et al., "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling"
(arXiv 2506.10178). Official code: billpsomas/efficient-probing; its checkpoints load with the name map
`cls_token[0] -> queries`, `v.weight -> v.weight`.

A probe is a pooling of N patch tokens into one vector, then batch normalisation without parameters,
then a linear classifier. Every pooling here attends with *directions*: a query that has been carried
through the key projection is one vector of token space, and its map is the softmax over the tokens of
its products with them. EP learns these directions; other probes compose them from projections.

All arithmetic is written for a leading `*stack` axis of the parameters, so that
`torch.func.functional_call` can train many probes on the same batch of tokens at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

# Attention with directions ----------------------------------------------------------------------------


def attention_maps(
    tokens: Float[Tensor, "batch tokens dim"], directions: Float[Tensor, "*stack queries dim"]
) -> Float[Tensor, "*stack batch queries tokens"]:
    """softmax over the tokens of <direction, token>; the scale is part of the direction."""
    return torch.einsum("bnd,...qd->...bqn", tokens, directions).softmax(-1)


def pool_tokens(
    maps: Float[Tensor, "*stack batch queries tokens"], tokens: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "*stack batch queries dim"]:
    """Average of the tokens under every map."""
    return torch.einsum("...bqn,bnd->...bqd", maps, tokens)


def project_groups(
    pooled: Float[Tensor, "*stack batch queries dim"], weight: Float[Tensor, "*stack out dim"]
) -> Float[Tensor, "*stack batch out"]:
    """Give pooled vector j the j-th group of output channels: concat_j W^(j) pooled_j."""
    groups = weight.unflatten(-2, (pooled.shape[-2], -1))
    return torch.einsum("...bqd,...qcd->...bqc", pooled, groups).flatten(-2)


def project(
    features: Float[Tensor, "*lead batch width"], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`torch.nn.functional.linear` for a stack of weights [*stack, out, width]."""
    out = features @ weight.mT
    return out if bias is None else out + bias.unsqueeze(-2)


# The method -------------------------------------------------------------------------------------------


class EfficientProbing(nn.Module):
    """EP_Q: Q learned queries on raw tokens; query j pools the j-th group of value channels.

        A = softmax_N((U / sqrt(D)) X^T)         Q x N, no query and no key projection
        V = X W_V                                N x D/d_out, in Q groups of channels
        y = concat_j sum_n A_jn V_n^(j)          D/d_out, no output projection

    Args:
        dim: width D of the tokens.
        queries: number Q of queries; must divide D/d_out.
        d_out: how many times narrower than the tokens the output is.

    Raises:
        ValueError: when Q does not divide D/d_out, or d_out does not divide D.
    """

    def __init__(self, dim: int, queries: int = 32, d_out: int = 1) -> None:
        super().__init__()
        if dim % d_out:
            raise ValueError(f"d_out = {d_out} must divide the width {dim}")
        if (dim // d_out) % queries:
            raise ValueError(f"{queries} queries must divide the output width {dim // d_out}")
        self.width = dim // d_out
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.v = nn.Linear(dim, self.width, bias=False)

    def maps(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch queries tokens"]:
        """The attention map of every query; rows sum to 1."""
        # One head over the full width: the scale is D^-1/2, not (D/Q)^-1/2.
        return attention_maps(tokens, self.queries / math.sqrt(tokens.shape[-1]))

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch out"]:
        """Pool, then project: equal to `project_then_pool`, at Q N D + D^2 instead of N D^2 + N D."""
        return project_groups(pool_tokens(self.maps(tokens), tokens), self.v.weight)

    def project_then_pool(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch out"]:
        """The paper's order: project every token, then let each query pool its channels."""
        maps = self.maps(tokens)
        values = self.v(tokens).unflatten(-1, (maps.shape[1], -1))
        return torch.einsum("bqn,bnqc->bqc", maps, values).flatten(1)


# The probes it is compared with -----------------------------------------------------------------------


class MeanPooling(nn.Module):
    """Linear probing: the mean of the tokens (GAP), or one token such as [CLS] given alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        return tokens.mean(1)


class CrossAttention(nn.Module):
    """Multi-head cross-attention of learned queries to the tokens; several queries are averaged.

    Head h of query i attends with direction W_K^h q_i^h / sqrt(d_head): keys need not be computed,
    and pooling may precede the value projection, exactly as in EP. `forward` uses that;
    `project_then_pool` is the usual order, with keys and values of all tokens.

    Args:
        dim: width D of the tokens.
        heads: number of heads; must divide D.
        queries: number of learned queries.
        query_projection, output_projection: whether W_Q and W_O exist (both in MHCA, neither in AIM).

    Raises:
        ValueError: when the heads do not divide D.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        queries: int = 1,
        query_projection: bool = True,
        output_projection: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads must divide the width {dim}")
        self.width, self.heads = dim, heads
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.q = nn.Linear(dim, dim, bias=False) if query_projection else None
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False) if output_projection else None

    def projected_queries(self) -> Float[Tensor, "*stack queries dim"]:
        """The learned queries after W_Q, over sqrt(d_head)."""
        queries = self.queries if self.q is None else project(self.queries, self.q.weight)
        return queries / math.sqrt(self.width // self.heads)

    def directions(self) -> Float[Tensor, "*stack directions dim"]:
        """Every (query, head) as one direction in token space, heads running fastest."""
        queries = self.projected_queries().unflatten(-1, (self.heads, -1))
        keys = self.k.weight.unflatten(-2, (self.heads, -1))
        return torch.einsum("...qhc,...hcd->...qhd", queries, keys).flatten(-3, -2)

    def maps(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch directions tokens"]:
        """The attention map of every head (of every query); rows sum to 1."""
        return attention_maps(tokens, self.directions())

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        gain: Float[Tensor, "*stack dim"] | None = None,
        shift: Float[Tensor, "*stack dim"] | None = None,
    ) -> Float[Tensor, "*stack batch dim"]:
        """Attend, with `tokens * gain + shift` in place of the tokens when those are given.

        The shift moves all scores of a direction equally, so it leaves the maps alone.
        """
        directions = self.directions()
        if gain is not None:
            directions = directions * gain.unsqueeze(-2)
        pooled = pool_tokens(attention_maps(tokens, directions), tokens)
        if gain is not None:
            pooled = pooled * gain[..., None, None, :] + shift[..., None, None, :]
        pooled = pooled.unflatten(-2, (-1, self.heads)).mean(-3)  # values are linear: average first
        out = project_groups(pooled, self.v.weight)
        return out if self.o is None else project(out, self.o.weight)

    def project_then_pool(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch dim"]:
        """The usual order: keys and values of all tokens, then attention head by head."""
        queries = self.projected_queries().unflatten(-1, (self.heads, -1)).transpose(0, 1)
        keys, values = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        maps = (queries @ keys.mT).softmax(-1)
        out = (maps @ values).transpose(1, 2).flatten(2)
        return (out if self.o is None else self.o(out)).mean(1)


class AimProbe(nn.Module):
    """AIM's probe: batch-normalised tokens, key and value projections, one unprojected query."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.width = dim
        self.norm = BatchStandardisation(dim)
        self.attention = CrossAttention(dim, heads, query_projection=False, output_projection=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch dim"]:
        standardised = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        return self.attention(standardised)


class SimPool(nn.Module):
    """SimPool: the mean token, projected, attends with one head to normalised tokens, unprojected."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)

    def maps(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch 1 tokens"]:
        """One map per image; its direction depends on the image through the mean token."""
        query = project(tokens.mean(1), self.q.weight) / math.sqrt(self.width)
        direction = (query @ self.k.weight) * self.norm.weight.unsqueeze(-2)
        scores = torch.einsum("bnd,...bd->...bn", standardise(tokens), direction)
        return scores.softmax(-1).unsqueeze(-2)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch dim"]:
        pooled = pool_tokens(self.maps(tokens), standardise(tokens)).squeeze(-2)
        return pooled * self.norm.weight.unsqueeze(-2) + self.norm.bias.unsqueeze(-2)


class AbMilp(nn.Module):
    """AbMILP: a two-layer perceptron scores every token; softmax; weighted mean of raw tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.hidden = nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1)

    def maps(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch 1 tokens"]:
        hidden = torch.einsum("bnd,...ed->...bne", tokens, self.hidden.weight)
        hidden = (hidden + self.hidden.bias[..., None, None, :]).tanh()
        scores = torch.einsum("...bne,...qe->...bqn", hidden, self.score.weight)
        return (scores + self.score.bias[..., None, :, None]).softmax(-1)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch dim"]:
        return pool_tokens(self.maps(tokens), tokens).squeeze(-2)


class CrossAttentionBlock(nn.Module):
    """V-JEPA's probe: query + attention to normalised tokens, then query + MLP(LN(query))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.width = dim
        self.norm_tokens = nn.LayerNorm(dim, eps=1e-6)
        self.attention = CrossAttention(dim, heads)
        self.norm_query = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch dim"]:
        attended = self.attention(
            standardise(tokens), self.norm_tokens.weight, self.norm_tokens.bias
        )
        state = self.attention.queries + attended  # one query: [*stack, 1, dim] to every image
        inner = standardise(state) * self.norm_query.weight.unsqueeze(-2)
        inner = inner + self.norm_query.bias.unsqueeze(-2)
        inner = functional.gelu(project(inner, self.fc1.weight, self.fc1.bias))
        return state + project(inner, self.fc2.weight, self.fc2.bias)


def standardise(tokens: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
    """Layer normalisation before its gain and shift."""
    return functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


# The head ---------------------------------------------------------------------------------------------


class BatchStandardisation(nn.Module):
    """`torch.nn.BatchNorm1d(width, affine=False, eps=1e-6)` for a stack of probes: no parameters.

    MIM features have channels of very different sizes; without this every probe on them trains badly.
    """

    def __init__(self, width: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(
        self, features: Float[Tensor, "*stack batch width"]
    ) -> Float[Tensor, "*stack batch width"]:
        """Standardise by the batch when training, else by the running statistics.

        Raises:
            ValueError: when training on a single item, which has no variance.
        """
        mean, variance = self.running_mean, self.running_var
        if self.training:
            items = features.shape[-2]
            if items < 2:
                raise ValueError("batch normalisation needs at least two items to train on")
            mean = features.mean(-2)
        centred = features - mean.unsqueeze(-2)
        if self.training:
            variance = centred.square().mean(-2)
            with torch.no_grad():
                self.running_mean.lerp_(mean.expand_as(self.running_mean), self.momentum)
                unbiased = (variance * items / (items - 1)).expand_as(self.running_var)
                self.running_var.lerp_(unbiased, self.momentum)
        return centred * (variance + self.eps).rsqrt().unsqueeze(-2)


class Probe(nn.Module):
    """A pooling with its head: BatchNorm without parameters, then a linear classifier.

    Args:
        pooling: a module that maps tokens to one vector of width `pooling.width`.
        classes: number of classes.
    """

    def __init__(self, pooling: nn.Module, classes: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = BatchStandardisation(pooling.width)
        self.classifier = nn.Linear(pooling.width, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "*stack batch classes"]:
        """Class scores (logits)."""
        features = self.norm(self.pooling(tokens))
        return project(features, self.classifier.weight, self.classifier.bias)


def poolings(dim: int, heads: int, queries: list[int]) -> dict[str, Callable[[], nn.Module]]:
    """All attentive poolings of the comparison by the name they have in its tables."""
    others = {
        "AbMILP": lambda: AbMilp(dim),
        "SimPool": lambda: SimPool(dim),
        "AIM": lambda: AimProbe(dim, heads),
        "MHCA": lambda: CrossAttention(dim, heads),
        "V-JEPA": lambda: CrossAttentionBlock(dim, heads),
    }
    ours = {f"EP_{q}": lambda q=q: EfficientProbing(dim, q) for q in queries}
    return others | ours


# Costs ------------------------------------------------------------------------------------------------


def ep_parameters(dim: int, queries: int, classes: int, d_out: int = 1) -> int:
    """Trainable parameters of EP with its head: Q D + D^2/d_out + (D/d_out + 1) classes."""
    return queries * dim + dim * dim // d_out + (dim // d_out + 1) * classes


def linear_parameters(dim: int, classes: int) -> int:
    """Trainable parameters of linear probing: (D + 1) classes."""
    return (dim + 1) * classes


def ep_macs(tokens: int, dim: int, queries: int, d_out: int = 1) -> int:
    """Multiply-adds of EP per image in the paper's order: scores, values, pooling."""
    return queries * tokens * dim + tokens * dim * dim // d_out + tokens * dim // d_out


def ep_pool_first_macs(tokens: int, dim: int, queries: int, d_out: int = 1) -> int:
    """Multiply-adds of EP per image when pooling comes first: scores, pooling, values."""
    return 2 * queries * tokens * dim + dim * dim // d_out


def mhca_macs(tokens: int, dim: int, queries: int) -> int:
    """Multiply-adds of MHCA with Q learned queries per image; the number of heads does not matter.

    Keys and values N D^2 each, query and output projections Q D^2 each, scores and pooling Q N D each.
    Counted per image, as the paper does, although the query projection is the same for all images.
    """
    return 2 * tokens * dim**2 + 2 * queries * dim**2 + 2 * queries * tokens * dim


# What the maps look like ------------------------------------------------------------------------------


def mean_pairwise_cosine(
    maps: Float[Tensor, "batch queries tokens"],
) -> Float[Tensor, " batch"]:
    """Mean cosine similarity over all pairs of an image's maps: low when queries specialise.

    Raises:
        ValueError: for a single map, which has no pair.
    """
    count = maps.shape[1]
    if count < 2:
        raise ValueError("complementarity needs at least two maps")
    unit = functional.normalize(maps, dim=-1)
    return (unit.sum(1).square().sum(-1) - count) / (count * (count - 1))


def mean_pairwise_correlation(
    maps: Float[Tensor, "batch queries tokens"],
) -> Float[Tensor, " batch"]:
    """Mean Pearson correlation over all pairs of an image's maps.

    Unlike the cosine it does not count how flat the maps are: nearly uniform maps are alike by their
    cosine whatever they look at.

    Raises:
        ValueError: for a single map, which has no pair.
    """
    return mean_pairwise_cosine(maps - maps.mean(-1, keepdim=True))


def mean_correlation_across(
    first: Float[Tensor, "batch queries tokens"], second: Float[Tensor, "batch others tokens"]
) -> Float[Tensor, " batch"]:
    """Mean Pearson correlation of a map of `first` with a map of `second`, over all pairs of an image.

    mean_ij corr(a_i, b_j) = < mean_i u_i, mean_j v_j >,   u, v: centred maps of length 1
    """
    middle = [
        functional.normalize(maps - maps.mean(-1, keepdim=True), dim=-1).mean(1)
        for maps in (first, second)
    ]
    return (middle[0] * middle[1]).sum(-1)


def foreground_mass(
    maps: Float[Tensor, "batch queries tokens"], coverage: Float[Tensor, "batch tokens"]
) -> Float[Tensor, " batch"]:
    """Attention mass on the object, averaged over the maps.

    Args:
        coverage: share of each token's patch that the object covers, in [0, 1].
    """
    return torch.einsum("bqn,bn->bq", maps, coverage).mean(-1)


# k nearest neighbours ---------------------------------------------------------------------------------


def knn_predict(
    train: Float[Tensor, "items dim"],
    labels: Int[Tensor, " items"],
    queries: Float[Tensor, "queries dim"],
    neighbours: int,
    temperature: float,
) -> Int[Tensor, " queries"]:
    """Weighted vote of the nearest neighbours by cosine; a vote weighs exp(cosine / temperature).

    Features are centred on the training mean before they are normalised: a common offset of all
    features would bring every cosine close to 1.

    Raises:
        ValueError: when there are fewer training items than neighbours.
    """
    if neighbours > len(train):
        raise ValueError(f"{neighbours} neighbours of only {len(train)} training items")
    centre = train.mean(0)
    bank, probe = (functional.normalize(x - centre, dim=-1) for x in (train, queries))
    cosine, nearest = (probe @ bank.T).topk(neighbours)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=train.dtype, device=train.device)
    return votes.scatter_add_(1, labels[nearest], (cosine / temperature).exp()).argmax(1)
