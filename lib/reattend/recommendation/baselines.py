"""Recommenders beside which MambaRec is set: popularity, matrix factorisation, LightGCN, VBPR, FREEDOM.

Like `MambaRec` they hold several copies side by side, and give `Views`, so that one training loop serves all.
An item's bias is one more number of its embedding, which meets a constant 1 in a user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from reattend.recommendation.mambarec import (
    Batch,
    Linear,
    Views,
    bipartite,
    bpr,
    embeddings,
    layer_mean,
)


def popularity(
    interactions: Bool[Tensor, "worlds users items"],
) -> Float[Tensor, "worlds users items"]:
    """Scores of the recommender that knows how often each item occurs in training."""
    return interactions.float().sum(1, keepdim=True).expand(interactions.shape)


class MatrixFactorisation(nn.Module):
    """A product of two embeddings and an item's bias, score = p_u . q_i + b_i (Rendle et al. 2009; Koren et al.).

    Trained by BPR it is BPR-MF. A bias of users would change no order of items.
    """

    def __init__(
        self, generators: Sequence[Generator], users: int, items: int, width: int = 64
    ) -> None:
        super().__init__()
        self.users = users
        self.user_table = embeddings(generators, users, width)
        self.item_table = embeddings(generators, items, width)
        self.bias = nn.Parameter(torch.zeros(len(generators), items, 1))

    def forward(self, keep: Tensor | None = None) -> Views:
        """Embeddings of all users and items; there is no dropout."""
        return Views(biased(self.user_table, self.item_table, self.bias), None, {}, self.users)


def biased(
    users: Float[Tensor, "copies users width"],
    items: Float[Tensor, "copies items width"],
    bias: Float[Tensor, "copies items 1"],
) -> Float[Tensor, "copies nodes wider"]:
    """Users and items one behind the other, whose products are p_u . q_i + b_i."""
    ones = torch.ones_like(users[..., :1])
    return torch.cat([torch.cat([users, ones], 2), torch.cat([items, bias], 2)], 1)


class LightGCN(nn.Module):
    """Embeddings averaged over the layers of the interaction graph (He et al. 2020).

    What is penalised is the table, before any layer.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        interactions: Bool[Tensor, "copies users items"],
        layers: int,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.users, items = interactions.shape[1:]
        self.register_buffer("paths", layer_mean(bipartite(interactions), layers))
        self.user_table = embeddings(generators, self.users, width)
        self.item_table = embeddings(generators, items, width)

    def forward(self, keep: Tensor | None = None) -> Views:
        """Embeddings of all users and items; there is no dropout."""
        tables = torch.cat([self.user_table, self.item_table], 1)
        return Views(self.paths @ tables, None, {}, self.users, tables)


class VBPR(nn.Module):
    """Matrix factorisation whose items also have projected features (He and McAuley 2016).

    score = p_u . q_i + t_u . (E f_i) + b_i + e . f_i: both parts of the bias, of the item and of its features.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        features: Mapping[str, Float[Tensor, "copies items dim"]],
        users: int,
        width: int = 64,
    ) -> None:
        super().__init__()
        joined = torch.cat(list(features.values()), 2)
        self.users = users
        self.register_buffer("features", joined)
        # One half of a user meets an item's own embedding, the other its features.
        self.user_table = embeddings(generators, users, 2 * width)
        self.item_table = embeddings(generators, joined.shape[1], width)
        self.project = Linear(generators, joined.shape[2], width)
        self.bias = nn.Parameter(torch.zeros(len(generators), joined.shape[1], 1))
        self.seen_bias = nn.Parameter(torch.zeros(len(generators), joined.shape[2], 1))

    def forward(self, keep: Tensor | None = None) -> Views:
        """Embeddings of all users and items; there is no dropout."""
        items = torch.cat([self.item_table, self.project(self.features)], 2)
        bias = self.bias + self.features @ self.seen_bias
        return Views(biased(self.user_table, items, bias), None, {}, self.users)


def even_neighbour_graph(
    features: Float[Tensor, "copies items dim"], k: int
) -> Float[Tensor, "copies items items"]:
    """Frozen graph of the k most similar items by the cosine of raw features, itself among them, each with 1 / k.

    Raises:
        ValueError: for a k that is not in 1..items.
    """
    items = features.shape[1]
    if not 1 <= k <= items:
        raise ValueError(f"k must lie in 1..{items}, the number of items, got {k}")
    unit = F.normalize(features, dim=-1)
    nearest = (unit @ unit.mT).topk(k, dim=-1).indices
    empty = torch.zeros(len(unit), items, items, device=unit.device)
    return empty.scatter(2, nearest, 1 / k)


def thinned(
    interactions: Bool[Tensor, "copies users items"],
    dropped: float,
    generators: Sequence[Generator],
) -> Bool[Tensor, "copies users items"]:
    """Interactions without a share of them, drawn without replacement; those of popular ends go first.

    An interaction is kept with a chance that follows 1 / sqrt(degree of its user x degree of its item).

    Args:
        dropped: share in 0..1; the number kept is rounded down.
        generators: one per copy, on the CPU.
    """
    kept = torch.zeros_like(interactions)
    for copy, generator in enumerate(generators):
        users, items = interactions[copy].nonzero(as_tuple=True)
        degrees = [interactions[copy].sum(dim).float() for dim in (1, 0)]
        chances = (degrees[0][users] * degrees[1][items]).rsqrt().cpu()
        chosen = torch.multinomial(chances, int((1 - dropped) * len(users)), generator=generator)
        kept[copy, users[chosen], items[chosen]] = True
    return kept


class FREEDOM(nn.Module):
    """LightGCN on a thinned graph, beside a frozen graph of items that are alike (Zhou and Shen 2023).

    An item is its mean over the layers of the interaction graph plus the mean embedding of its nearest items, by
    pictures and by words. In training the interaction graph is thinned anew every epoch (`thin`); in
    evaluation it is whole.

    Args:
        generators: one per copy, for all initial values.
        interactions: of training.
        features: raw features of the items by modality; they are trained, as in the released code. The graph of
            items is that of their first values.
        shares: of the modalities in the graph of items, in their order; the released code has .1 for the picture.
        layers: of the interaction graph.
        k: nearest items, itself among them.
        width: of all embeddings.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        interactions: Bool[Tensor, "copies users items"],
        features: Mapping[str, Float[Tensor, "copies items dim"]],
        shares: Sequence[float] = (0.1, 0.9),
        layers: int = 2,
        k: int = 10,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.layers, (self.users, items) = layers, interactions.shape[1:]
        self.register_buffer("interactions", interactions)
        self.register_buffer("whole", bipartite(interactions))
        self.register_buffer("edges", self.whole)
        alike = [
            share * even_neighbour_graph(table, k)
            for share, table in zip(shares, features.values(), strict=True)
        ]
        self.register_buffer("alike", sum(alike))
        self.user_table = embeddings(generators, self.users, width)
        self.item_table = embeddings(generators, items, width)
        self.features = nn.ParameterDict({m: nn.Parameter(f.clone()) for m, f in features.items()})
        self.projections = nn.ModuleDict(
            {m: Linear(generators, f.shape[2], width) for m, f in features.items()}
        )

    def thin(self, dropped: float, generators: Sequence[Generator]) -> None:
        """Draw the graph on which the next epoch is trained, see `thinned`."""
        self.edges = bipartite(thinned(self.interactions, dropped, generators))

    def forward(self, keep: Tensor | None = None) -> Views:
        """Embeddings of all users and items, and projected features; features are not dropped."""
        mixed = self.mixed(self.edges if self.training else self.whole)
        items = mixed[:, self.users :] + self.alike @ self.item_table
        refined = {name: self.refined(name, table) for name, table in self.features.items()}
        return Views(torch.cat([mixed[:, : self.users], items], 1), None, refined, self.users)

    def mixed(self, edges: Float[Tensor, "copies nodes nodes"]) -> Tensor:
        """LightGCN's mean over layers, layer by layer: a graph of one epoch is not worth its powers."""
        states = [torch.cat([self.user_table, self.item_table], 1)]
        for _ in range(self.layers):
            states.append(edges @ states[-1])
        return torch.stack(states).mean(0)

    def refined(self, name: str, features: Float[Tensor, "copies items dim"]) -> Tensor:
        """Projected features of one modality, of any items."""
        return self.projections[name](features)


def feature_loss(views: Views, batch: Batch) -> Float[Tensor, " copies"]:
    """FREEDOM's second term: BPR of users with the projected features of items, summed over modalities."""
    users = views.content[:, : views.users]
    rows = (batch.users, batch.positives, batch.negatives)
    return sum(bpr(users @ table.mT, *rows) for table in views.refined.values())
