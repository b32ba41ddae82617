"""Recommenders beside which MambaRec is set: popularity, matrix factorisation, LightGCN, VBPR.

Like `MambaRec` they hold several copies side by side, and give `Views`, so that one training loop serves all.
Matrix factorisation is LightGCN with no layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from reattend.recommendation.mambarec import (
    Linear,
    Views,
    bipartite,
    embeddings,
    layer_mean,
)


def popularity(
    interactions: Bool[Tensor, "worlds users items"],
) -> Float[Tensor, "worlds users items"]:
    """Scores of the recommender that knows how often each item occurs in training."""
    return interactions.float().sum(1, keepdim=True).expand(interactions.shape)


class LightGCN(nn.Module):
    """Embeddings averaged over the layers of the interaction graph (He et al. 2020); none: BPR-MF."""

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
        return Views(
            self.paths @ torch.cat([self.user_table, self.item_table], 1), None, {}, self.users
        )


class VBPR(nn.Module):
    """Matrix factorisation whose items also have projected features (He and McAuley 2016)."""

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

    def forward(self, keep: Tensor | None = None) -> Views:
        """Embeddings of all users and items; there is no dropout."""
        items = torch.cat([self.item_table, self.project(self.features)], 2)
        return Views(torch.cat([self.user_table, items], 1), None, {}, self.users)
