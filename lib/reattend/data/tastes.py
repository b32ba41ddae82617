"""Simulated tastes over real things: recommendation data whose items have real pictures and words.

Who likes what is drawn, not observed. An item has two latent vectors, the leading principal components of its
picture's and of its words' features, mixed with a part of its own that no feature shows, and a popularity. A user has a
random weight for each component. What a user interacts with is drawn by utility, so the utility itself is the best
score there can be (`World.utility`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Taste:
    """How interactions are drawn.

    Attributes:
        users, items: how many; items are drawn from the catalogue.
        components: principal components of each modality that matter.
        shown: share of an item's latent variance that its features show.
        appeal, popularity: standard deviation of a user's own taste, and of what all users like.
        noise: scale of the Gumbel noise of a choice, in units of utility.
        counts: interactions of each user for training, validation and test.
    """

    users: int = 500
    items: int = 400
    components: int = 12
    shown: float = 0.7
    appeal: float = 1.6
    popularity: float = 0.5
    noise: float = 2 / 3
    counts: tuple[int, int, int] = (8, 2, 12)


@dataclass(frozen=True)
class World:
    """One drawn set of data, or several of one size along a leading axis.

    Attributes:
        catalogue: which things of the catalogue are the items.
        utility: what a user's choices are drawn by.
        parts: interactions for training, validation and test, disjoint.
    """

    catalogue: Int[Tensor, "*worlds items"]
    utility: Float[Tensor, "*worlds users items"]
    parts: Mapping[str, Bool[Tensor, "*worlds users items"]]


def principal_scores(
    features: Float[Tensor, "items dim"], components: int
) -> Float[Tensor, "items components"]:
    """Leading principal components of centred features, each with mean 0 and variance 1 over the items.

    Raises:
        ValueError: where there are not more items, and as many numbers, as components.
    """
    if not 1 <= components < len(features) or components > features.shape[1]:
        raise ValueError(f"{components} components need more items, and features as many")
    centred = (features - features.mean(0)).double()
    left = torch.linalg.svd(centred, full_matrices=False).U[:, :components]
    return (left * len(features) ** 0.5).to(features.dtype)


def draw_world(
    features: Mapping[str, Float[Tensor, "things dim"]], taste: Taste, seed: int
) -> World:
    """Items, users and interactions of one seed.

    Raises:
        ValueError: when the catalogue has fewer things than the taste has items, or a user chooses more
            items than there are.
    """
    things = len(next(iter(features.values())))
    if taste.items > things:
        raise ValueError(f"{taste.items} items asked of a catalogue of {things}")
    if sum(taste.counts) > taste.items:
        raise ValueError(f"a user cannot choose {sum(taste.counts)} of {taste.items} items")
    generator = Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    chosen = torch.randperm(things, generator=generator)[: taste.items]
    utility = taste.popularity * normal(1, taste.items).expand(taste.users, -1)
    scale = taste.appeal / (len(features) * taste.components) ** 0.5
    for table in features.values():
        seen = principal_scores(table, taste.components)[chosen]
        own = normal(*seen.shape)
        latent = taste.shown**0.5 * seen + (1 - taste.shown) ** 0.5 * own
        utility = utility + scale * normal(taste.users, taste.components) @ latent.T
    uniform = torch.rand(utility.shape, generator=generator).clamp(1e-12, 1 - 1e-7)
    gumbel = -(-uniform.log()).log()
    ranked = (utility + taste.noise * gumbel).topk(sum(taste.counts), dim=1).indices
    # The best of the choices are no better for training than the rest.
    order = torch.rand(ranked.shape, generator=generator).argsort(1)
    pieces = ranked.gather(1, order).split(list(taste.counts), dim=1)
    empty = torch.zeros(utility.shape, dtype=torch.bool)
    parts = {p: empty.scatter(1, c, True) for p, c in zip(PARTS, pieces, strict=True)}
    return World(chosen, utility, parts)


def stack(worlds: Sequence[World]) -> World:
    """Worlds of one size side by side."""
    parts = {part: torch.stack([w.parts[part] for w in worlds]) for part in PARTS}
    catalogue = torch.stack([w.catalogue for w in worlds])
    return World(catalogue, torch.stack([w.utility for w in worlds]), parts)
