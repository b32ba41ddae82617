"""Efficient Content-Based Sparse Attention with Routing Transformers (arXiv 2003.05997).

Online spherical k-means assigns the tokens of a sequence to clusters; attention is computed inside
clusters only. Every centroid takes its `window` best tokens of the whole sequence, so all clusters
have one size and a head costs clusters * window^2 products. Strided and random sets of keys of as many
members go through the same code; they do without the products of tokens with centroids.

Shapes: `[batch, heads, length, dim]` for queries, keys and values, `[heads, clusters, dim]` for
centroids. Members are positions, ascending inside each cluster.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.attention.dense import causal_token_mask, dense_attention, masked_softmax
from reattend.attention.positions import rotary
from reattend.attention.statistics import js_divergence

Kind = Literal["routing", "same_centroid", "random", "strided"]
Rule = Literal["whole", "past"]

# --- clusters ------------------------------------------------------------------------------------


def unit_variance(x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
    """LN0: layer norm without scale and bias, so that every vector has the norm sqrt(dim)."""
    return F.layer_norm(x, x.shape[-1:])


def centroid_scores(
    r: Float[Tensor, "batch heads length dim"], centroids: Float[Tensor, "heads clusters dim"]
) -> Float[Tensor, "batch heads length clusters"]:
    """r . mu. With equal norms the largest product is the nearest centroid (MIPS equivalence)."""
    return r @ centroids.mT


def balanced_members(
    scores: Float[Tensor, "batch heads length clusters"], window: int
) -> Int[Tensor, "batch heads clusters members"]:
    """The min(window, length) best tokens of each centroid, over the whole sequence (algorithm 1).

    A token may be in several clusters or in none. Of equal scores the earlier token is taken.
    """
    by_cluster = scores.mT
    window = min(window, by_cluster.shape[-1])
    least = by_cluster.topk(window, dim=-1).values[..., -1:]
    above, equal = by_cluster > least, by_cluster == least
    room = window - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1) <= room))
    return taken.nonzero()[:, -1].view(*by_cluster.shape[:-1], window)


def random_members(
    batch: int, heads: int, length: int, clusters: int, window: int, device: torch.device | None
) -> Int[Tensor, "batch heads clusters members"]:
    """Fresh random disjoint sets of positions: the Random Transformer of the paper's ablation.

    Raises:
        ValueError: when the sets do not fit into the sequence.
    """
    if clusters * window > length:
        raise ValueError(f"{clusters} disjoint sets of {window} positions > {length} tokens")
    order = torch.rand(batch, heads, length, device=device).argsort(-1)
    return order[..., : clusters * window].unflatten(-1, (clusters, window)).sort(-1).values


def strided_members(
    batch: int, heads: int, length: int, clusters: int, device: torch.device | None
) -> Int[Tensor, "batch heads clusters members"]:
    """Positions of equal remainder modulo `clusters`: the strided pattern of Sparse Transformers.

    Raises:
        ValueError: when the length is no multiple of `clusters`.
    """
    if length % clusters:
        raise ValueError(f"{length} tokens are no multiple of the stride {clusters}")
    places = torch.arange(length, device=device).view(-1, clusters).T
    return places.expand(batch, heads, -1, -1)


def membership(
    members: Int[Tensor, "batch heads clusters members"], length: int
) -> Int[Tensor, "batch heads length"]:
    """In how many clusters each token is."""
    flat = members.flatten(2)
    counts = flat.new_zeros(*flat.shape[:2], length)
    return counts.scatter_add(2, flat, torch.ones_like(flat))


# --- attention inside clusters -------------------------------------------------------------------


def gather_members(
    x: Float[Tensor, "batch heads length dim"], members: Int[Tensor, "batch heads clusters members"]
) -> Float[Tensor, "batch heads clusters members dim"]:
    """The vectors of each cluster's tokens."""
    index = members.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, index).unflatten(2, members.shape[2:])


def scatter_mean(
    x: Float[Tensor, "batch heads clusters members dim"],
    members: Int[Tensor, "batch heads clusters members"],
    length: int,
    eps: float = 1e-5,
) -> Float[Tensor, "batch heads length dim"]:
    """Sum over the clusters a token is in / (their number + eps); zero for a token in none.

    The official code has eps 1e-2.
    """
    index = members.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    total = x.new_zeros(*x.shape[:2], length, x.shape[-1]).scatter_add(2, index, x.flatten(2, 3))
    return total / (membership(members, length)[..., None].to(x.dtype) + eps)


def without_self(
    allowed: Bool[Tensor, "*lead queries keys"],
) -> Bool[Tensor, "*lead queries keys"]:
    """A square mask without its diagonal, except in rows that allow nothing else.

    With shared queries and keys every token is its own best match.
    """
    others = allowed & ~torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
    return others | (allowed & ~others.any(-1, keepdim=True))


def routed_attention(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch heads length dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    members: Int[Tensor, "batch heads clusters members"],
    *,
    scale: float,
    attend_self: bool = True,
) -> Float[Tensor, "batch heads length value_dim"]:
    """Causal softmax attention inside each cluster, averaged over the clusters of a token.

    Members are in ascending order, so the lower triangle inside a cluster is the causal mask.
    With `attend_self=False` a token meets itself only where it meets no other.
    """
    q, k, v = (gather_members(x, members).flatten(0, 1) for x in (query, key, value))
    if attend_self:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        seen = without_self(causal_token_mask(q.shape[-2], q.shape[-2], q.device))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return scatter_mean(mixed.unflatten(0, members.shape[:2]), members, query.shape[2])


def routed_weights(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch heads length dim"],
    members: Int[Tensor, "batch heads clusters members"],
    *,
    scale: float,
    attend_self: bool = True,
    eps: float = 1e-5,
) -> Float[Tensor, "batch heads queries keys"]:
    """The weights behind `routed_attention` as one dense matrix, for statistics and pictures."""
    length = query.shape[2]
    q, k = gather_members(query, members), gather_members(key, members)
    seen = causal_token_mask(q.shape[-2], q.shape[-2], q.device)
    inside = masked_softmax(scale * (q @ k.mT), seen if attend_self else without_self(seen))
    places = members[..., :, None] * length + members[..., None, :]
    dense = inside.new_zeros(*members.shape[:2], length * length)
    dense = dense.scatter_add(2, places.flatten(2), inside.flatten(2))
    counts = membership(members, length)[..., None].to(dense.dtype)
    return dense.unflatten(2, (length, length)) / (counts + eps)


def past_weights(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch heads length dim"],
    scores: Float[Tensor, "batch heads length clusters"],
    window: int,
    *,
    scale: float,
    attend_self: bool = True,
    eps: float = 1e-5,
) -> Float[Tensor, "batch heads queries keys"]:
    """Strictly causal routing: row i is what `routed_attention` gives token i when the row ends at i.

    Query i takes part in a cluster when it is among the `window` best of tokens 0 .. i, and meets the
    others of those. This is how the official decoder works, which puts future tokens at distance
    1e9. It is computed densely here: O(length^2 clusters).
    """
    by_cluster = scores.mT
    length = by_cluster.shape[-1]
    one, other = by_cluster[..., :, None], by_cluster[..., None, :]
    past = causal_token_mask(length, length, scores.device)
    # Token `one` beats token `other`; of equal scores the earlier token wins.
    beats = (one > other) | ((one == other) & past.mT & ~past)
    rank = beats.cumsum(-2, dtype=torch.int32)  # over tokens 0 .. i: rank of `other` at time i
    seen = (rank < window) & past
    chosen = seen.diagonal(dim1=-2, dim2=-1)[..., None]
    logits = (scale * (query @ key.mT))[:, :, None].expand(seen.shape)
    seen = seen & chosen
    inside = masked_softmax(logits, seen if attend_self else without_self(seen))
    return inside.sum(2) / (chosen.sum(2).to(inside.dtype) + eps)


def same_centroid_mask(
    scores: Float[Tensor, "batch heads length clusters"],
) -> Bool[Tensor, "batch heads queries keys"]:
    """True for earlier tokens of the same nearest centroid: strictly causal, of unbounded cost."""
    nearest = scores.argmax(-1)
    past = causal_token_mask(scores.shape[2], scores.shape[2], scores.device)
    return (nearest[..., :, None] == nearest[..., None, :]) & past


def local_mask(length: int, block: int) -> Bool[Tensor, "queries keys"]:
    """True for earlier keys of the query's own block and the one before."""
    place = torch.arange(length) // block
    return (place[:, None] - place <= 1) & causal_token_mask(length, length)


def local_attention(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch heads length dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    block: int,
) -> Float[Tensor, "batch heads length value_dim"]:
    """Block-local causal attention with one block of look-back, scaled by 1 / sqrt(dim)."""
    batch, heads, length, _ = query.shape
    missing = -length % block
    parts = [F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, block)) for x in (query, key, value)]
    q, (k, v) = parts[0], (torch.cat([F.pad(x, (0, 0) * 2 + (1, -1)), x], 3) for x in parts[1:])
    seen = causal_token_mask(block, 2 * block, query.device).repeat(q.shape[2], 1, 1)
    seen[0, :, :block] = False  # the first block has none before it
    mixed = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=seen
    )
    return mixed.reshape(batch, heads, length + missing, -1)[:, :, :length]


# --- online k-means ------------------------------------------------------------------------------


def cluster_sums(
    r: Float[Tensor, "batch heads length dim"],
    nearest: Int[Tensor, "batch heads length"],
    clusters: int,
) -> tuple[Float[Tensor, "heads clusters dim"], Float[Tensor, "heads clusters"]]:
    """Sum and number of the vectors of each nearest centroid, over the batch."""
    one_hot = F.one_hot(nearest, clusters).to(r.dtype)
    return torch.einsum("bhnk,bhnd->hkd", one_hot, r), one_hot.sum((0, 2))


def ema_step(
    centroids: Float[Tensor, "heads clusters dim"],
    sums: Float[Tensor, "heads clusters dim"],
    counts: Float[Tensor, "heads clusters"],
    decay: float,
    rule: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, "heads clusters dim"]:
    """One update of the centroids by an exponential moving average.

    Args:
        sums, counts: of queries and keys together.
        rule: "mean": decay mu + (1 - decay) sum / count, empty clusters stay (as in the codes);
            "sum": decay mu + (1 - decay) / 2 (sum over queries + sum over keys), as printed.
    """
    if rule == "sum":
        return decay * centroids + (1 - decay) / 2 * sums
    mean = sums / counts.clamp_min(1)[..., None]
    return torch.where(counts[..., None] > 0, centroids.lerp(mean, 1 - decay), centroids)


def spherical(x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
    """Scale to the norm sqrt(dim) of the vectors that are clustered; zero stays zero."""
    return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])


def spherical_kmeans(
    r: Float[Tensor, "batch heads length dim"], clusters: int, iterations: int = 10
) -> Float[Tensor, "heads clusters dim"]:
    """Centroids of a first batch: random tokens, then `iterations` of k-means on the sphere.

    Raises:
        ValueError: for fewer tokens than clusters.
    """
    pool = r.transpose(0, 1).flatten(1, 2)  # [heads, tokens, dim]
    if pool.shape[1] < clusters:
        raise ValueError(f"{pool.shape[1]} tokens for {clusters} clusters")
    first = torch.rand(pool.shape[:2], device=r.device).topk(clusters, dim=1).indices
    centroids = pool.gather(1, first[..., None].expand(-1, -1, r.shape[-1]))
    for _ in range(iterations):
        nearest = centroid_scores(r, centroids).argmax(-1)
        centroids = spherical(ema_step(centroids, *cluster_sums(r, nearest, clusters), 0.0))
    return centroids


def commitment_loss(
    r: Float[Tensor, "batch heads length dim"],
    nearest: Int[Tensor, "batch heads length"],
    centroids: Float[Tensor, "heads clusters dim"],
    weight: float,
) -> Float[Tensor, ""]:
    """weight * mean (r - sg(mu of the nearest centroid))^2, over all entries of r."""
    heads = torch.arange(len(centroids), device=r.device)[:, None]
    return weight * (r - centroids.detach()[heads, nearest]).square().mean()


# --- the mixer -----------------------------------------------------------------------------------


class RoutingAttention(nn.Module):
    """Local heads beside heads of another kind; a mixer of `reattend.trunks.language`.

    * "routing": balanced clusters. With `rule = "whole"` they are chosen from the whole row, as in
      training and in the published evaluation; with `rule = "past"` from the past alone.
    * "same_centroid": all earlier tokens of the same nearest centroid, causal in training too.
    * "random" and "strided": the baselines of equal cost.

    Local heads have queries, keys and values; the others share queries and keys, which are
    normalised. Both are turned by their position (rotary); clusters are of the unturned vectors. In training a
    forward pass notes the sums of its clusters, and `move_centroids`, called once after an optimiser
    step, applies them. The first one sets the centroids by k-means.

    Args:
        width: of the trunk.
        heads: number of heads, of which `far_heads` are not local.
        block: tokens in a block of the local heads.
        clusters, window: number and size of the sets.
        decay: of the centroids' moving average.
        commitment: weight of the auxiliary loss.
        scaled: logits r . r / sqrt(dim); the official code has r . r.
        attend_self: as in the official code; False: only where there is no other (lucidrains).

    Raises:
        ValueError: when the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        far_heads: int,
        kind: Kind = "routing",
        *,
        block: int,
        clusters: int,
        window: int,
        decay: float = 0.999,
        commitment: float = 1e-4,
        scaled: bool = True,
        attend_self: bool = True,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        dim = width // heads
        self.near_heads, self.far_heads, self.kind = heads - far_heads, far_heads, kind
        self.block, self.clusters, self.window = block, clusters, window
        self.decay, self.commitment = decay, commitment
        self.scale = dim**-0.5 if scaled else 1.0
        self.attend_self = attend_self
        self.rule: Rule = "whole"
        self.near = (
            nn.Linear(width, 3 * self.near_heads * dim, bias=False) if self.near_heads else None
        )
        self.far = nn.Linear(width, 2 * far_heads * dim, bias=False) if far_heads else None
        self.out = nn.Linear(width, width, bias=False)
        self.register_buffer("centroids", torch.zeros(far_heads, clusters, dim))
        self.register_buffer("started", torch.tensor(False))
        self.noted: tuple[Tensor, Tensor] | None = None

    @property
    def routes(self) -> bool:
        """Whether there are heads that use the centroids."""
        return self.far_heads > 0 and self.kind in ("routing", "same_centroid")

    def heads_of(self, x: Tensor, project: nn.Linear, parts: int, heads: int) -> tuple[Tensor, ...]:
        """`parts` tensors [batch, heads, length, dim]."""
        return project(x).unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        mixed = []
        if self.near_heads:
            q, k, v = self.heads_of(x, self.near, 3, self.near_heads)
            mixed.append(local_attention(rotary(q), rotary(k), v, self.block))
        if self.far_heads:
            r, v = self.heads_of(x, self.far, 2, self.far_heads)
            mixed.append(self.far_attention(unit_variance(r), v))
        return self.out(torch.cat(mixed, 1).transpose(1, 2).flatten(2))

    def far_attention(
        self, r: Float[Tensor, "batch heads length dim"], v: Float[Tensor, "batch heads length dim"]
    ) -> Float[Tensor, "batch heads length dim"]:
        """Outputs of the heads that are not local."""
        scores, turned = self.scores(r), rotary(r)
        options = {"scale": self.scale, "attend_self": self.attend_self}
        if self.kind == "same_centroid":
            seen = self.same_centroid(scores)
            return F.scaled_dot_product_attention(
                turned, turned, v, attn_mask=seen, scale=self.scale
            )
        if self.kind == "routing" and self.rule == "past" and not self.training:
            return past_weights(turned, turned, scores, self.window, **options) @ v
        return routed_attention(turned, turned, v, self.members(scores), **options)

    def same_centroid(
        self, scores: Float[Tensor, "batch heads length clusters"]
    ) -> Bool[Tensor, "batch heads queries keys"]:
        """The mask of the kind "same_centroid"."""
        seen = same_centroid_mask(scores)
        return seen if self.attend_self else without_self(seen)

    def scores(
        self, r: Float[Tensor, "batch heads length dim"]
    ) -> Float[Tensor, "batch heads length clusters"]:
        """Scores to the centroids; in training also notes the clusters and the auxiliary loss."""
        if not self.routes:
            return r.new_zeros(*r.shape[:3], self.clusters)
        if self.training and not self.started:
            self.centroids.copy_(spherical_kmeans(r.detach(), self.clusters))
            self.started.fill_(True)
        scores = centroid_scores(r, self.centroids)
        if self.training:
            nearest = scores.argmax(-1)
            self.noted = cluster_sums(r.detach(), nearest, self.clusters)
            self.auxiliary_loss = commitment_loss(r, nearest, self.centroids, self.commitment)
        return scores

    def far_vectors(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length dim"]:
        """Normalised queries, which are also the keys, of the heads that are not local."""
        return unit_variance(self.heads_of(x, self.far, 2, self.far_heads)[0])

    def routed_scores(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length clusters"]:
        """Scores to the centroids of a layer's input."""
        return self.scores(self.far_vectors(x))

    def members(
        self, scores: Float[Tensor, "batch heads length clusters"]
    ) -> Int[Tensor, "batch heads clusters members"]:
        """The sets of tokens that meet."""
        batch, heads, length, clusters = scores.shape
        if self.kind == "random":
            return random_members(batch, heads, length, clusters, self.window, scores.device)
        if self.kind == "strided":
            return strided_members(batch, heads, length, clusters, scores.device)
        return balanced_members(scores.detach(), self.window)

    @torch.no_grad()
    def move_centroids(self) -> None:
        """Apply the clusters of the last training forward pass, once; without one, do nothing."""
        if self.noted is not None:
            self.centroids.copy_(spherical(ema_step(self.centroids, *self.noted, self.decay)))
            self.noted = None

    @torch.no_grad()
    def weights(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Attention of all heads, local ones first, as dense matrices."""
        found = []
        if self.near_heads:
            q, k, v = self.heads_of(x, self.near, 3, self.near_heads)
            seen = local_mask(x.shape[1], self.block).to(x.device)[None, None]
            turned = rotary(q), rotary(k)
            found.append(dense_attention(*turned, v, mask=seen, return_weights=True)[1])
        if self.far_heads:
            scores, turned = self.routed_scores(x), rotary(self.far_vectors(x))
            if self.kind == "same_centroid":
                logits = self.scale * (turned @ turned.mT)
                found.append(masked_softmax(logits, self.same_centroid(scores)))
            else:
                options = {"scale": self.scale, "attend_self": self.attend_self}
                found.append(routed_weights(turned, turned, self.members(scores), **options))
        return torch.cat(found, 1)

    def state_size(self, length: int) -> int:
        """Keys and values: of two blocks for a local head, of all tokens for the others."""
        dim = self.out.in_features // (self.near_heads + self.far_heads)
        near = 2 * min(length, 2 * self.block) * self.near_heads
        return dim * (near + 2 * length * self.far_heads)


def query_key_products(length: int, *, clusters: int, window: int) -> int:
    """Products of a query with a key that one routing head computes: clusters * window^2."""
    return clusters * min(window, length) ** 2


# --- what the experiments measure ----------------------------------------------------------------


def pair_divergences(
    weights: Float[Tensor, "batch heads queries keys"], near_heads: int, first_query: int = 0
) -> dict[str, Float[Tensor, " places"]]:
    """Jensen-Shannon divergence of every two heads at every query that both serve, in nats.

    A query in no cluster has no distribution and is left out, as are those before `first_query`.
    Keys: "local, local", "local, far" and "far, far"; the first `near_heads` heads are local.
    """
    found: dict[str, list[Tensor]] = {}
    served = weights.sum(-1) > 0.5
    served[..., :first_query] = False
    for a, b in itertools.combinations(range(weights.shape[1]), 2):
        kind = ", ".join("local" if head < near_heads else "far" for head in (a, b))
        both = served[:, a] & served[:, b]
        found.setdefault(kind, []).append(js_divergence(weights[:, a], weights[:, b])[both])
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def repeated_pairs(
    rows: int, length: int, keys: int, pools: Sequence[int], generator: torch.Generator
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Rows `key value key value ...` in which a key always has the value that its row gave it.

    Keys are tokens 0 .. keys - 1, values keys .. 2 keys - 1. Each row draws how many different keys
    it has from `pools`, then every key at random from those.

    Returns:
        tokens; labels, the value at every key that came before in its row, else -100; distance, the
        tokens since that key came last, else 0.

    Raises:
        ValueError: when the length is odd or a row is to have more than `keys` different keys.
    """
    if length % 2 or max(pools) > keys:
        raise ValueError(f"pairs of {max(pools)} out of {keys} keys in {length} tokens")
    slots = length // 2
    pool = torch.tensor(pools)[torch.randint(len(pools), (rows, 1), generator=generator)]
    names = torch.rand(rows, keys, generator=generator).argsort(1)
    values = keys + torch.randint(keys, (rows, keys), generator=generator)
    which = (torch.rand(rows, slots, generator=generator) * pool).long()
    tokens = torch.stack([names.gather(1, which), values.gather(1, which)], -1).flatten(1)
    same = (which[:, :, None] == which[:, None, :]).tril(-1)
    last = (same * torch.arange(1, slots + 1)).amax(-1)  # 1 + slot of the last occurrence
    gap = torch.where(last > 0, 2 * (torch.arange(1, slots + 1) - last), 0)
    labels, distance = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    labels[:, ::2] = torch.where(gap > 0, tokens[:, 1::2], -100)
    distance[:, ::2] = gap
    return tokens, labels, distance
