"""MambaRec (Ren et al. 2025, arXiv 2509.09114): multimodal recommendation with DREAM and two alignment losses.

Items have features in several modalities (a picture, words) and users have interacted with items. MambaRec is the
graph recommender MGCN with a refinement of the projected features in front (DREAM, "multi-scale bilateral
attention"), a reduction of wide features, and a loss that brings the distributions of the modalities
together (MMD). No state-space layer is involved: "Mamba" is a name.

Every module holds `copies` independent models of one shape side by side, one for each generator it is given, along a
leading axis of parameters and inputs; one copy is the ordinary case. What a copy computes does
not depend on the others. All propagation is linear and has no parameters, so it is done once, as
matrices (`Graphs`), and a step is a handful of batched matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as F

# Layers with several copies -----------------------------------------------------------------------


def _uniform(generators: Sequence[Generator], bound: float, *shape: int) -> nn.Parameter:
    """Uniform in [-bound, bound], one draw of `shape` for each generator."""
    drawn = [torch.rand(shape, generator=generator) for generator in generators]
    return nn.Parameter(bound * (2 * torch.stack(drawn) - 1))


class Linear(nn.Module):
    """Linear layers side by side, each drawn as torch.nn.Linear draws its own."""

    def __init__(
        self, generators: Sequence[Generator], inputs: int, outputs: int, bias: bool = True
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = _uniform(generators, bound, inputs, outputs)
        self.bias = _uniform(generators, bound, 1, outputs) if bias else None

    def forward(
        self, x: Float[Tensor, "copies rows inputs"]
    ) -> Float[Tensor, "copies rows outputs"]:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of every copy over its rows.

    Args:
        uses: how often a training step normalises the same rows: the running statistics move as often.
    """

    def __init__(self, copies: int, width: int, uses: int = 1) -> None:
        super().__init__(copies * width, momentum=1 - 0.9**uses)

    def forward(self, x: Float[Tensor, "copies rows width"]) -> Float[Tensor, "copies rows width"]:
        copies, rows, width = x.shape
        flat = super().forward(x.transpose(0, 1).reshape(rows, copies * width))
        return flat.view(rows, copies, width).transpose(0, 1)


class LayerNorm(nn.Module):
    """Layer normalisation with a gain and an offset for every copy."""

    def __init__(self, copies: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(copies, 1, width))
        self.bias = nn.Parameter(torch.zeros(copies, 1, width))

    def forward(self, x: Float[Tensor, "copies rows width"]) -> Float[Tensor, "copies rows width"]:
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


# DREAM: local alignment ---------------------------------------------------------------------------

DILATIONS = (6, 12, 18)
BRANCHES = 2 + len(DILATIONS)  # a 1 x 1 convolution, the dilated ones, the global average


class ReleasedDream(nn.Module):
    """DREAM in the geometry of the released code: convolutions over maps of 1 x 1 pixels.

    The multi-scale branches are 3 x 3 convolutions with dilations of 6, 12 and 18. A map of one pixel shows them
    zeros at all places but the centre, whatever the dilation; `Dream` is the same function without the
    zeros. Biases in front of batch norms, which cancel them, are left out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = BRANCHES * width
        self.branches = nn.ModuleList(
            [
                nn.Conv2d(width, width, 1, bias=False),
                *(nn.Conv2d(width, width, 3, padding=d, dilation=d, bias=False) for d in DILATIONS),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1, bias=False)),
            ]
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in self.branches)
        self.channel = nn.Conv2d(wide, 1, 1, bias=False)
        self.spatial = nn.Conv2d(wide, 1, 1, bias=False)
        self.out, self.out_norm = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "items width"]) -> Float[Tensor, "items width"]:
        maps = x[:, :, None, None]
        parts = [
            F.relu(n(b(maps))).expand(-1, -1, *maps.shape[2:])
            for b, n in zip(self.branches, self.norms, strict=True)
        ]
        c = torch.cat(parts, 1)
        by_channel = c * F.relu(self.channel(F.adaptive_avg_pool2d(c, 1)))
        by_place = c * torch.sigmoid(self.spatial(c))
        attended = torch.maximum(by_channel, by_place)
        return F.relu(self.out_norm(self.out(attended * c)))[:, :, 0, 0]


Gate = Literal["released", "figure", "square", "none"]


class Dream(nn.Module):
    """Dilated refinement attention module (section 3.2) as what it is on single pixels: a gated hidden layer.

    With c = ReLU(BN(W x)), five times as wide as x, the output is ReLU(BN(V (A * c))). The attention A is the larger of
    c times a channel gate and c times a spatial gate. Both gates are one number per item and c is not negative, so
    A * c = g c^2 with a single number g per item.

    Args:
        generators: one per copy.
        width: of input and output.
        gate: "released", as in the code; "figure", the channel gate of the paper's drawing (one number per
            channel, by a bottleneck of half the width and a sigmoid); "square", g = 1; "none", A = 1, which
            is a plain hidden layer.
        uses: how often the released code runs the module in one training step, see `BatchNorm`.
    """

    def __init__(
        self, generators: Sequence[Generator], width: int, gate: Gate = "released", uses: int = 2
    ) -> None:
        super().__init__()
        wide, copies = BRANCHES * width, len(generators)
        self.gate_kind = gate
        self.branches = Linear(generators, width, wide, bias=False)
        # A 3 x 3 convolution has nine times the inputs, and starts with weights a third as large.
        with torch.no_grad():
            self.branches.weight[..., width : (1 + len(DILATIONS)) * width] /= 3
        self.norm = BatchNorm(copies, wide, uses)
        self.out, self.out_norm = (
            Linear(generators, wide, width, bias=False),
            BatchNorm(copies, width, uses),
        )
        if gate in ("released", "figure"):
            self.spatial = Linear(generators, wide, 1, bias=False)
        if gate == "released":
            self.channel = Linear(generators, wide, 1, bias=False)
        if gate == "figure":
            self.squeeze = Linear(generators, wide, wide // 2, bias=False)
            self.excite = Linear(generators, wide // 2, wide, bias=False)

    def forward(
        self, x: Float[Tensor, "copies items width"]
    ) -> Float[Tensor, "copies items width"]:
        c = self.hidden(x)
        return F.relu(self.out_norm(self.out(self.attention(c) * c)))

    def hidden(self, x: Float[Tensor, "copies items width"]) -> Float[Tensor, "copies items wide"]:
        """c: all branches side by side."""
        return F.relu(self.norm(self.branches(x)))

    def attention(self, c: Float[Tensor, "copies items wide"]) -> Tensor:
        """A, what c is multiplied by once more (equations 5 to 8)."""
        if self.gate_kind == "none":
            return torch.ones_like(c[..., :1])
        return c if self.gate_kind == "square" else c * self.gates(c)

    def gates(self, c: Float[Tensor, "copies items wide"]) -> Tensor:
        """The larger of channel and spatial gate: one number per item, in the figure's form one per channel."""
        if self.gate_kind == "released":
            channel = F.relu(self.channel(c))
        else:
            channel = torch.sigmoid(self.excite(F.relu(self.squeeze(c))))
        return torch.maximum(channel, torch.sigmoid(self.spatial(c)))

    @torch.no_grad()
    def load_released(self, released: ReleasedDream) -> Dream:
        """Take over the weights of a module in released geometry, as the only copy: centre taps alone."""

        def centre(conv: nn.Conv2d) -> Tensor:
            return conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2].T

        convs = [b if isinstance(b, nn.Conv2d) else b[1] for b in released.branches]
        self.branches.weight.copy_(torch.cat([centre(conv) for conv in convs], 1)[None])
        for name in ("channel", "spatial", "out"):
            getattr(self, name).weight.copy_(centre(getattr(released, name))[None])
        for ours, theirs in ((self.norm, released.norms), (self.out_norm, [released.out_norm])):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(ours, name).copy_(torch.cat([getattr(norm, name) for norm in theirs]))
        return self


# Losses: global alignment -------------------------------------------------------------------------

Rows = Int[Tensor, "copies batch"]


def occurrences(rows: Rows, count: int) -> Int[Tensor, "copies count"]:
    """How often each of `count` rows of a table is in a batch."""
    found = torch.zeros(len(rows), count, dtype=torch.long, device=rows.device)
    return found.scatter_add_(1, rows, torch.ones_like(rows))


def mmd(
    x: Float[Tensor, "copies items width"],
    y: Float[Tensor, "copies items width"],
    weights: Float[Tensor, "copies items"],
    bandwidth: float,
) -> Float[Tensor, " copies"]:
    """Squared maximum mean discrepancy of two weighted sets of unit vectors, biased (equation 13).

    mean K(x, x') + mean K(y, y') - 2 mean K(x, y) with K = exp(-d^2 / (2 s^2)) on rows of length 1. A batch
    that holds an item n times is the table's row with n times the weight.

    Args:
        weights: sum to 1, the same items for both.
        bandwidth: s.
    """
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        kernel = torch.exp((a @ b.mT - 1) / bandwidth**2)
        return (weights[:, None] @ kernel @ weights[..., None])[:, 0, 0]

    return similarity(x, x) + similarity(y, y) - 2 * similarity(x, y)


def info_nce(
    views: Float[Tensor, "copies rows width"],
    others: Float[Tensor, "copies rows width"],
    rows: Rows,
    partners: Rows,
    temperature: float,
) -> Float[Tensor, " copies"]:
    """InfoNCE from one view to another in the batch, one direction (equation 14).

    Batch member b is row `rows[b]` of `views`; its positive is row `partners[b]` of `others`, its candidates are
    those of the whole batch. An item that occurs n times in the batch counts n times among them.

    Args:
        partners: equal to `rows`, unless pairs are permuted as a placebo.
    """
    count = views.shape[1]
    logits = F.normalize(views, dim=-1) @ F.normalize(others, dim=-1).mT / temperature
    # A candidate that occurs n times adds n equal terms; one that is not in the batch adds none.
    counts = occurrences(rows, count).to(logits.dtype)
    normaliser = torch.logsumexp(logits + counts.log()[:, None], -1)
    positives = logits.flatten(1).gather(1, rows * count + partners)
    return (normaliser.gather(1, rows) - positives).mean(1)


def bpr(
    scores: Float[Tensor, "copies users items"], users: Rows, positives: Rows, negatives: Rows
) -> Float[Tensor, " copies"]:
    """Bayesian personalised ranking: -mean log sigmoid(score of the positive minus that of the negative)."""
    flat, first = scores.flatten(1), users * scores.shape[2]
    return -F.logsigmoid(
        flat.gather(1, first + positives) - flat.gather(1, first + negatives)
    ).mean(1)


# Graphs, as matrices ------------------------------------------------------------------------------


def bipartite(
    interactions: Bool[Tensor, "copies users items"],
) -> Float[Tensor, "copies nodes nodes"]:
    """Symmetric normalised adjacency D^-1/2 A D^-1/2 of users and items, users first.

    Nodes without an interaction have a row of zeros.
    """
    block = interactions.float()
    ends = [block.sum(dim, keepdim=True).clamp_min(1).rsqrt() for dim in (2, 1)]
    block = block * ends[0] * ends[1]
    users, items = block.shape[1:]
    whole = block.new_zeros(len(block), users + items, users + items)
    whole[:, :users, users:], whole[:, users:, :users] = block, block.mT
    return whole


def layer_mean(
    adjacency: Float[Tensor, "copies nodes nodes"], layers: int
) -> Float[Tensor, "copies nodes nodes"]:
    """P with P x = the mean of x, A x, ..., A^layers x: all of LightGCN's propagation in one matrix."""
    power = torch.eye(adjacency.shape[-1], device=adjacency.device).expand_as(adjacency)
    total = power
    for _ in range(layers):
        power = adjacency @ power
        total = total + power
    return total / (layers + 1)


def neighbour_graph(
    features: Float[Tensor, "copies items dim"], k: int
) -> Float[Tensor, "copies items items"]:
    """Frozen graph of the k most similar items, itself among them, by the cosine of raw features.

    Edges weigh their cosine, divided by the square root of the summed weights of both ends' outgoing edges.

    Raises:
        ValueError: for a k that is not in 1..items.
    """
    items = features.shape[1]
    if not 1 <= k <= items:
        raise ValueError(f"k must lie in 1..{items}, the number of items, got {k}")
    unit = F.normalize(features, dim=-1)
    similar = (unit @ unit.mT).topk(k, dim=-1)
    edges = torch.zeros(len(unit), items, items, device=unit.device)
    edges = edges.scatter(2, similar.indices, similar.values)
    scale = edges.sum(2, keepdim=True).clamp_min(1e-7).rsqrt()
    return scale * edges * scale.mT


@dataclass(frozen=True)
class Graphs:
    """All propagation of one set of data.

    Attributes:
        behaviour: from users and items to users and items, by interactions.
        similar: by modality, from items to users and items, by likeness of features.
    """

    behaviour: Float[Tensor, "copies nodes nodes"]
    similar: Mapping[str, Float[Tensor, "copies nodes items"]]

    @staticmethod
    def of(
        interactions: Bool[Tensor, "copies users items"],
        features: Mapping[str, Float[Tensor, "copies items dim"]],
        layers: int = 4,
        k: int = 10,
    ) -> Graphs:
        """From training interactions and raw features (sections 3.1 and 3.4)."""
        adjacency, users = bipartite(interactions), interactions.shape[1]
        similar = {}
        for name, table in features.items():
            among = neighbour_graph(table, k)
            similar[name] = torch.cat([adjacency[:, :users, users:] @ among, among], 1)
        return Graphs(layer_mean(adjacency, layers), similar)


# The model ----------------------------------------------------------------------------------------


Refine = Literal["dream", "figure", "square", "plain", "off"]


@dataclass(frozen=True)
class Design:
    """What a model is made of; the defaults are MambaRec's, and `refine="off"` gives MGCN in its surroundings.

    Attributes:
        refine: what stands between projection and layer norm: `Dream` with one of its gates, or nothing ("off").
        wide: modalities that two linear layers project, the first to a width divided by `factor`.
        factor: of that reduction.
        norm: whether layer norm (one for all modalities) and dropout follow.
        width: of all embeddings.
    """

    refine: Refine = "dream"
    wide: tuple[str, ...] = ("picture",)
    factor: int = 8
    norm: bool = True
    width: int = 64


@dataclass(frozen=True)
class Views:
    """What a forward pass gives.

    Attributes:
        content: users and items, from the graph of interactions.
        side: users and items, fused from the modalities; None where a model has no modalities.
        refined: items by modality, before layer norm: what MMD compares.
        users: number of users among the rows.
        tables: embeddings before any graph, where the regulariser is about them and not about `final`.
    """

    content: Float[Tensor, "copies nodes width"]
    side: Float[Tensor, "copies nodes width"] | None
    refined: Mapping[str, Float[Tensor, "copies items width"]]
    users: int
    tables: Float[Tensor, "copies nodes width"] | None = None

    @property
    def final(self) -> Float[Tensor, "copies nodes width"]:
        """Embeddings whose products are the scores."""
        return self.content if self.side is None else self.content + self.side

    def scores(self) -> Float[Tensor, "copies users items"]:
        """Of every item for every user."""
        final = self.final
        return final[:, : self.users] @ final[:, self.users :].mT


def embeddings(generators: Sequence[Generator], rows: int, width: int) -> nn.Parameter:
    """Xavier-uniform embeddings of users or items."""
    return _uniform(generators, math.sqrt(6 / (rows + width)), rows, width)


class Projection(nn.Module):
    """Features of one modality to embeddings, then DREAM or what stands in its place."""

    def __init__(
        self, generators: Sequence[Generator], inputs: int, wide: bool, design: Design
    ) -> None:
        super().__init__()
        inner, width = max(1, inputs // design.factor), design.width
        self.reduce = Linear(generators, inputs, inner) if wide else nn.Identity()
        self.project = Linear(generators, inner if wide else inputs, width)
        self.refine = _refinement(generators, design)

    def forward(self, features: Float[Tensor, "copies items dim"]) -> Tensor:
        return self.refine(self.project(self.reduce(features)))


def _refinement(generators: Sequence[Generator], design: Design) -> nn.Module:
    if design.refine == "off":
        return nn.Identity()
    gate = {"dream": "released", "plain": "none"}.get(design.refine, design.refine)
    return Dream(generators, design.width, gate)


class MambaRec(nn.Module):
    """The whole recommender (section 3); with `Design(refine="off")` and no MMD it is MGCN in equal surroundings.

    Args:
        generators: one per copy, for all initial values.
        features: raw features of the items by modality; they are trained, as in the released code.
        graphs: all propagation.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        features: Mapping[str, Float[Tensor, "copies items dim"]],
        graphs: Graphs,
        design: Design = Design(),
    ) -> None:
        super().__init__()
        copies, width = len(generators), design.width
        items = next(iter(features.values())).shape[1]
        self.graphs, self.users = graphs, graphs.behaviour.shape[1] - items
        self.user_table = embeddings(generators, self.users, width)
        self.item_table = embeddings(generators, items, width)
        self.features = nn.ParameterDict({m: nn.Parameter(f.clone()) for m, f in features.items()})
        self.projections, self.gates, self.preferences = (nn.ModuleDict() for _ in range(3))
        for name, table in features.items():
            wide = name in design.wide
            self.projections[name] = Projection(generators, table.shape[2], wide, design)
            self.gates[name] = Linear(generators, width, width)
            self.preferences[name] = Linear(generators, width, width)
        self.norm = LayerNorm(copies, width) if design.norm else nn.Identity()
        self.query = nn.Sequential(
            Linear(generators, width, width), nn.Tanh(), Linear(generators, width, 1, bias=False)
        )

    def forward(self, keep: Float[Tensor, "copies modalities items width"] | None = None) -> Views:
        """Embeddings of all users and items.

        Args:
            keep: dropout's factors for the normalised features (0 or 1 / share kept), in training.
        """
        content = self.graphs.behaviour @ torch.cat([self.user_table, self.item_table], 1)
        refined = {name: self.refined(name, table) for name, table in self.features.items()}
        views = []
        for place, (name, x) in enumerate(refined.items()):
            x = self.norm(x) if keep is None else self.norm(x) * keep[:, place]
            gated = self.item_table * torch.sigmoid(self.gates[name](x))
            views.append(self.graphs.similar[name] @ gated)
        preferences = [torch.sigmoid(layer(content)) for layer in self.preferences.values()]
        return Views(content, fuse(views, self.query, preferences), refined, self.users)

    def refined(self, name: str, features: Float[Tensor, "copies items dim"]) -> Tensor:
        """Projected and refined features of one modality, of any items."""
        return self.projections[name](features)


def fuse(
    views: Sequence[Float[Tensor, "copies nodes width"]],
    query: nn.Module,
    preferences: Sequence[Float[Tensor, "copies nodes width"]],
) -> Float[Tensor, "copies nodes width"]:
    """Side embedding (section 3.5): what the modalities share, and what each has of its own as far as behaviour asks.

    common = sum_m a_m z_m with a softmax of query(z_m) over modalities; side = the mean of common and of
    preference_m * (z_m - common) for all m.
    """
    weights = torch.softmax(torch.stack([query(z) for z in views]), 0)
    common = sum(w * z for w, z in zip(weights, views, strict=True))
    special = sum(p * (z - common) for p, z in zip(preferences, views, strict=True))
    return (special + common) / (1 + len(views))


# The objective ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One training batch of every copy.

    Attributes:
        users, positives: interactions.
        negatives: an item for each that the user has no training interaction with.
    """

    users: Rows
    positives: Rows
    negatives: Rows


@dataclass(frozen=True)
class Weights:
    """What the terms of the objective count for.

    Attributes:
        contrast: of InfoNCE between side and content.
        align: of MMD.
        bandwidth: of MMD's kernel.
        temperature: of InfoNCE.
        decay: of the squared length of the embeddings in a batch.
    """

    contrast: float = 0.01
    align: float = 0.1
    bandwidth: float = 1.0
    temperature: float = 0.2
    decay: float = 1e-4


def recommendation_loss(views: Views, batch: Batch, decay: float) -> Float[Tensor, " copies"]:
    """BPR and the regulariser, on final embeddings (on tables where the method says so, see `Views`)."""
    loss = bpr(views.scores(), batch.users, batch.positives, batch.negatives)
    size = batch.users.shape[1]
    lengths = (views.final if views.tables is None else views.tables).square().sum(2)
    for rows in (batch.users, views.users + batch.positives, views.users + batch.negatives):
        loss = loss + 0.5 * decay / size * lengths.gather(1, rows).sum(1)
    return loss


def contrastive_loss(
    views: Views, users: tuple[Rows, Rows], items: tuple[Rows, Rows], temperature: float
) -> Float[Tensor, " copies"]:
    """InfoNCE from side to content, over the users and over the items of a batch.

    Args:
        users, items: rows and their partners, see `info_nce`.
    """
    split = [(v[:, : views.users], v[:, views.users :]) for v in (views.side, views.content)]
    of_users, of_items = zip(*split, strict=True)
    return info_nce(*of_users, *users, temperature) + info_nce(*of_items, *items, temperature)


def alignment_loss(views: Views, items: Rows, bandwidth: float) -> Float[Tensor, " copies"]:
    """MMD between the first two modalities over the items of a batch."""
    x, y = list(views.refined.values())[:2]
    return mmd(x, y, occurrences(items, x.shape[1]) / items.shape[1], bandwidth)


def objective(views: Views, batch: Batch, weights: Weights) -> Float[Tensor, " copies"]:
    """All terms (equation 16)."""
    users, items = (batch.users, batch.users), (batch.positives, batch.positives)
    return (
        recommendation_loss(views, batch, weights.decay)
        + weights.contrast * contrastive_loss(views, users, items, weights.temperature)
        + weights.align * alignment_loss(views, batch.positives, weights.bandwidth)
    )
