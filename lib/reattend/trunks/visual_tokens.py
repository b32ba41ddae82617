"""Fewer visual tokens behind one interface: select -> keep -> recover; and what a language model saves by it.

A picture is a grid of n tokens in raster order. Whoever reduces them says which kept token each one becomes
part of (`Reduction`): a subset has groups of one and drops the rest, pooling and merging drop nothing.
`Reduction.keep` makes the shorter sequence, in raster order; `Reduction.recover` spreads it over the grid again.

Selections: the best by a score (`top_tokens`; random scores are the placebo), an even grid
(`uniform_tokens`), pooling around that grid (`pooled_tokens`), merging of similar tokens
(`merged_tokens`, after ToMe, arXiv 2210.09461). Costs are exact counts of multiply-adds and of bytes in the cache.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

DROPPED = -1


@dataclass(frozen=True)
class Reduction:
    """Which kept token each token of a picture becomes part of.

    Attributes:
        places: where each kept token stands in the full sequence, ascending: its position, where positions
            are not counted anew.
        groups: for each token the number of the kept token that it becomes part of, or `DROPPED`. Every
            kept token has at least one member.
    """

    places: Int[Tensor, "batch kept"]
    groups: Int[Tensor, "batch tokens"]

    @property
    def sizes(self) -> Int[Tensor, "batch kept"]:
        """How many tokens each kept one stands for."""
        counts = torch.zeros(len(self.places), self.places.shape[1] + 1, dtype=torch.long)
        counts = counts.to(self.groups.device)
        ones = torch.ones_like(self.groups)
        return counts.scatter_add(1, self._slots(), ones)[:, :-1]

    def keep(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch kept width"]:
        """The shorter sequence: the mean of each group's members, the token itself where it is alone."""
        slots = self._slots()[..., None].expand(x.shape)
        sums = x.new_zeros(len(x), self.places.shape[1] + 1, x.shape[2]).scatter_add(1, slots, x)
        return sums[:, :-1] / self.sizes[..., None]

    def recover(
        self, kept: Float[Tensor, "batch kept width"], fill: float = 0.0
    ) -> Float[Tensor, "batch tokens width"]:
        """The full sequence: every token takes what its group has; dropped ones are `fill`."""
        filled = torch.cat([kept, torch.full_like(kept[:, :1], fill)], 1)
        return filled.gather(1, self._slots()[..., None].expand(-1, -1, kept.shape[2]))

    def to(self, device: torch.device | str) -> "Reduction":
        """The same on another device."""
        return Reduction(self.places.to(device), self.groups.to(device))

    def _slots(self) -> Int[Tensor, "batch tokens"]:
        """Groups, with the dropped tokens in one more group at the end."""
        return self.groups.masked_fill(self.groups == DROPPED, self.places.shape[1])


# --- select ------------------------------------------------------------------------------------------------


def kept_count(tokens: int, removed: float) -> int:
    """Tokens that are left of `tokens` when the share `removed` goes: round(n (1 - R)).

    Raises:
        ValueError: for a share outside [0, 1].
    """
    if not 0 <= removed <= 1:
        raise ValueError(f"the removed share must lie between 0 and 1, not {removed}")
    return round(tokens * (1 - removed))


def subset(places: Int[Tensor, "batch kept"], tokens: int) -> Reduction:
    """Keep the tokens at these places, in raster order whatever the order given, and drop the rest."""
    places = places.sort(1).values
    groups = torch.full((len(places), tokens), DROPPED, device=places.device)
    order = torch.arange(places.shape[1], device=places.device).expand(places.shape)
    return Reduction(places, groups.scatter(1, places, order))


def top_tokens(scores: Float[Tensor, "batch tokens"], kept: int) -> Reduction:
    """Keep the tokens of the highest scores; of equal ones those that come first, so always exactly `kept`.

    Raises:
        ValueError: when more are to be kept than there are.
    """
    if not 0 <= kept <= scores.shape[1]:
        raise ValueError(f"cannot keep {kept} of {scores.shape[1]} tokens")
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
    return subset(best, scores.shape[1])


def even_places(grid: tuple[int, int], kept: int) -> Int[Tensor, " kept"]:
    """Places of `kept` tokens spread evenly over a grid of (rows, columns), ascending.

    About sqrt(kept) rows at equal distances share the tokens as evenly as whole numbers allow; each row
    spaces its own evenly. A constant stride in raster order would fall on the same few columns.

    Raises:
        ValueError: when the grid does not hold so many at different places.
    """
    rows, columns = grid
    if not 0 <= kept <= rows * columns:
        raise ValueError(f"a grid of {rows} x {columns} does not hold {kept} tokens")
    lines = min(rows, max(math.ceil(kept / columns), round(math.sqrt(kept * rows / columns))))
    places = []
    for line in range(lines):
        share = kept * (line + 1) // lines - kept * line // lines
        row = math.floor((line + 0.5) * rows / lines)
        places += [row * columns + math.floor((i + 0.5) * columns / share) for i in range(share)]
    return torch.tensor(places, dtype=torch.long)


def uniform_tokens(grid: tuple[int, int], kept: int, batch: int) -> Reduction:
    """Keep an even subsample of the grid, the same in every picture."""
    return subset(even_places(grid, kept).expand(batch, -1), grid[0] * grid[1])


def pooled_tokens(grid: tuple[int, int], kept: int, batch: int) -> Reduction:
    """Average each token into the nearest one of an even subsample (ties: into the first), nothing is dropped."""
    rows, columns = grid
    places = even_places(grid, kept)
    at = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    at = at.view(-1, 2).double()
    groups = torch.cdist(at, at[places]).argmin(1)
    return Reduction(places.expand(batch, -1), groups.expand(batch, -1))


def merged_tokens(x: Float[Tensor, "batch tokens width"], kept: int) -> Reduction:
    """Merge similar tokens until `kept` are left (bipartite soft matching, arXiv 2210.09461).

    Each round compares the tokens at even places with those at odd places by cosine, and joins the most
    similar pairs, at most half of the tokens a round. A joined token is the mean of its members, and stands where
    its target stood.

    Raises:
        ValueError: when no token is to be kept, or more than there are.
    """
    if not 1 <= kept <= x.shape[1]:
        raise ValueError(f"cannot merge {x.shape[1]} tokens into {kept}")
    batch, tokens = x.shape[:2]
    places = torch.arange(tokens, device=x.device).expand(batch, tokens)
    reduction = Reduction(places, places)
    while reduction.places.shape[1] > kept:
        reduction = _merge_round(reduction, reduction.keep(x), kept)
    return reduction


def _merge_round(
    reduction: Reduction, now: Float[Tensor, "batch tokens width"], kept: int
) -> Reduction:
    batch, length = now.shape[:2]
    unit = F.normalize(now, dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT
    best, target = similarity.max(-1)
    number = min(length - kept, similarity.shape[2], similarity.shape[1])
    joining = best.argsort(dim=1, descending=True, stable=True)[:, :number]
    goes = torch.arange(length, device=now.device).repeat(batch, 1)
    goes.scatter_(1, 2 * joining, 2 * target.gather(1, joining) + 1)
    stays = goes == torch.arange(length, device=now.device)
    number_of = stays.cumsum(1) - 1  # of a staying token among those that stay
    places = reduction.places[stays].view(batch, -1)
    return Reduction(places, number_of.gather(1, goes.gather(1, reduction.groups)))


# --- cost --------------------------------------------------------------------------------------------------


def prefill_multiply_adds(
    lengths: Sequence[int], width: int, hidden: int, *, gated: bool = True, earlier: int = 0
) -> int:
    """Multiply-adds of a decoder over a prompt: 4 n d^2 + 2 n^2 d + 3 n d m a layer (a flop count is twice that).

    Every query is counted against every key, as the papers do; norms, softmax and the output layer are left
    out.

    Args:
        lengths: n, tokens in each layer.
        width, hidden: d and m, of the states and inside the feed-forward part.
        gated: whether the feed-forward part has three matrices (with a gate) or two.
        earlier: keys that lie in the cache already, seen by every query.
    """
    matrices = 3 if gated else 2
    return sum(
        4 * n * width**2 + 2 * n * (n + earlier) * width + matrices * n * width * hidden
        for n in lengths
    )


def cache_bytes(lengths: Sequence[int], width: int, bytes_each: int = 2) -> int:
    """Bytes of keys and values in the cache: 2 n d numbers a layer.

    Args:
        lengths: n, tokens in each layer.
        width: of all key heads together.
        bytes_each: of one number, 2 in half precision.
    """
    return sum(2 * n * width * bytes_each for n in lengths)


def reduced_lengths(tokens: int, kept: int, layers: int, full: int = 0) -> list[int]:
    """Tokens in each of `layers` layers when only the first `full` see all of them (0: reduced before the model).

    Raises:
        ValueError: when there are fewer layers than `full`.
    """
    if not 0 <= full <= layers:
        raise ValueError(f"{full} of {layers} layers cannot see all tokens")
    return [tokens] * full + [kept] * (layers - full)
