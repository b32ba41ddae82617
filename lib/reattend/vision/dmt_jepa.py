"""DMT-JEPA: discriminative masked targets for a joint-embedding predictive architecture (I-JEPA).

Mo et al., "DMT-JEPA: Discriminative Masked Targets for Joint-Embedding Predictive Architecture"
(arXiv 2405.17995). Official code: DMTJEPA/DMTJEPA, a small change of facebookresearch/ijepa. Parameters
bear the names of both, so that their checkpoints load.

I-JEPA: an encoder reads the patches of one context block; a narrow predictor guesses, from those and from
positions alone, what an average of the encoder over past steps (the target encoder) says of the patches of
four other blocks. DMT-JEPA changes the target. A patch's target is no longer its own feature but what a
small head makes of the neighbours most similar to it:

    h    = LN(fbar(x))                                features of the whole picture, no gradient
    K_i  = the 4 of the 8 neighbours of patch i whose cosine with h_i is largest
    t_i  = head(query: mean of all h, keys: query and K_i)

Note what it leaves out: h_i chooses its neighbours and is neither query nor key. The head's trained twin
stands behind the context encoder, there in a mode in which one query reads all context tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of all layer norms in encoder, predictor and head

# Neighbours -------------------------------------------------------------------------------------------


def neighbour_table(
    height: int, width: int, window: int = 3, wrap: bool = False
) -> tuple[Int[Tensor, "patches slots"], Bool[Tensor, "patches slots"]]:
    """For each patch of a grid, row by row: positions in the window around it, and which of them exist.

    The patch itself is left out, so there are window^2 - 1 slots. A slot beyond the border does not exist
    (it holds the patch's own position); with `wrap` it holds the patch at the opposite border, as in the
    official code.

    Raises:
        ValueError: for an even window, or one that wraps onto itself.
    """
    if window < 3 or window % 2 == 0:
        raise ValueError(f"the window must be odd and at least 3, got {window}")
    if wrap and window > min(height, width):
        raise ValueError(f"a window of {window} wraps onto itself on a {height} x {width} grid")
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    reach = torch.arange(window) - window // 2
    down, right = torch.meshgrid(reach, reach, indexing="ij")
    beside = (down != 0) | (right != 0)
    to_rows = rows.reshape(-1, 1) + down[beside]
    to_columns = columns.reshape(-1, 1) + right[beside]
    inside = (to_rows >= 0) & (to_rows < height) & (to_columns >= 0) & (to_columns < width)
    table = to_rows % height * width + to_columns % width
    if wrap:
        return table, torch.ones_like(inside)
    own = torch.arange(height * width)[:, None]
    return torch.where(inside, table, own), inside


def gather_patches(
    tokens: Float[Tensor, "batch patches dim"], index: Int[Tensor, " batch *chosen"]
) -> Float[Tensor, "batch *chosen dim"]:
    """Tokens at the positions that each picture asks for."""
    flat = index.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, flat).unflatten(1, index.shape[1:])


def neighbour_similarity(
    tokens: Float[Tensor, "batch patches dim"], table: Int[Tensor, "patches slots"]
) -> Float[Tensor, "batch patches slots"]:
    """Cosine of each patch with each of its neighbours."""
    unit = F.normalize(tokens, dim=-1)
    return torch.einsum("bnd,bnsd->bns", unit, unit[:, table])


def choose_neighbours(
    scores: Float[Tensor, "batch patches slots"],
    table: Int[Tensor, "patches slots"],
    present: Bool[Tensor, "patches slots"],
    k: int,
) -> tuple[Int[Tensor, "batch patches k"], Bool[Tensor, "batch patches k"]]:
    """Positions of the k neighbours with the highest scores, and which of them exist.

    Random scores give the placebo. A corner has three neighbours: of four chosen, one does not exist.

    Raises:
        ValueError: when there are fewer than k slots.
    """
    if not 1 <= k <= table.shape[1]:
        raise ValueError(f"k must lie in 1..{table.shape[1]}, the slots of the window; got {k}")
    best = scores.masked_fill(~present, -math.inf).topk(k, -1).indices
    spread = best.shape[:1] + table.shape
    return table.expand(spread).gather(-1, best), present.expand(spread).gather(-1, best)


def mean_of_chosen(
    tokens: Float[Tensor, "batch patches dim"],
    index: Int[Tensor, "batch patches k"],
    exists: Bool[Tensor, "batch patches k"],
) -> Float[Tensor, "batch patches dim"]:
    """Plain average of the chosen neighbours that exist: the target without a head."""
    weight = exists / exists.sum(-1, keepdim=True)
    return torch.einsum("bnk,bnkd->bnd", weight.to(tokens.dtype), gather_patches(tokens, index))


# The local aggregation head -----------------------------------------------------------------------------


class Mlp(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        return self.fc2(F.gelu(self.fc1(x)))


class ClassAttention(nn.Module):
    """Multi-head attention of one query: the first token reads all tokens, itself included.

    Raises:
        ValueError: when the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads must divide the width {width}")
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        exists: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch 1 width"]:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(x[:, :1]), self.k(x), self.v(x))
        )
        mask = None if exists is None else exists[:, None, None]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(read.transpose(1, 2).flatten(2))


class AggregationBlock(nn.Module):
    """state + attention of a query over [query; others], then state + MLP(LN(state)).

    The state is the query itself on the target side, and every context token on the context side.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.mlp = ClassAttention(width, heads), Mlp(width)

    def forward(
        self,
        state: Float[Tensor, "batch states width"],
        query: Float[Tensor, "batch 1 width"],
        others: Float[Tensor, "batch others width"],
        exists: Bool[Tensor, "batch others"] | None = None,
    ) -> Float[Tensor, "batch states width"]:
        if exists is not None:
            exists = F.pad(exists, (1, 0), value=True)
        state = state + self.attn(self.norm1(torch.cat([query, others], 1)), exists)
        return state + self.mlp(self.norm2(state))


class LocalAggregationHead(nn.Module):
    """Two class-attention blocks and a layer norm, used in two ways: `targets` and `context`.

    Args:
        width, heads: those of the encoder.
        k: neighbours that a target reads.
        window: side of the window from which they are chosen.
        wrap: let windows wrap around the picture's border, as the official code does.
        own: let the target read the patch's own token too (not in the paper).
        swapped_queries: pair patches with mean tokens as the official code does, which gives most patches
            the mean of another picture of the batch: row i of all patches, pictures one after another, gets
            the mean of picture i mod batch.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        k: int = 4,
        window: int = 3,
        wrap: bool = False,
        own: bool = False,
        swapped_queries: bool = False,
    ) -> None:
        super().__init__()
        self.k, self.window, self.wrap = k, window, wrap
        self.own, self.swapped_queries = own, swapped_queries
        self.cls_blocks = nn.ModuleList(AggregationBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.apply(draw_linear_weights)

    def targets(
        self,
        tokens: Float[Tensor, "batch patches width"],
        grid: tuple[int, int],
        scores: Float[Tensor, "batch patches slots"] | None = None,
    ) -> Float[Tensor, "batch patches width"]:
        """Local aggregation targets of all patches of a picture.

        Args:
            tokens: layer-normalised features of the whole picture.
            grid: height and width in patches.
            scores: by which neighbours are chosen; None: cosine similarity.
        """
        table, present = (t.to(tokens.device) for t in self._table(grid))
        if scores is None:
            scores = neighbour_similarity(tokens, table)
        index, exists = choose_neighbours(scores, table, present, self.k)
        chosen = gather_patches(tokens, index)
        if self.own:
            chosen = torch.cat([tokens[:, :, None], chosen], 2)
            exists = F.pad(exists, (1, 0), value=True)
        others, exists = chosen.flatten(0, 1), exists.flatten(0, 1)
        mean, patches = tokens.mean(1, keepdim=True), tokens.shape[1]
        swapped = self.swapped_queries
        query = mean.repeat(patches, 1, 1) if swapped else mean.repeat_interleave(patches, 0)
        for block in self.cls_blocks:
            query = block(query, query, others, exists)
        return self.norm(query.view_as(tokens))

    def context(
        self, tokens: Float[Tensor, "batch context width"]
    ) -> Float[Tensor, "batch context width"]:
        """What the predictor reads: what the mean token reads of all tokens is added to each of them."""
        for block in self.cls_blocks:
            tokens = block(tokens, tokens.mean(1, keepdim=True), tokens)
        return self.norm(tokens)

    def _table(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return neighbour_table(*grid, self.window, self.wrap)


def draw_linear_weights(module: nn.Module) -> None:
    """Normals of .02 and no bias for a linear layer (the official truncation at 2 cuts nothing)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# Masks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockMasks:
    """I-JEPA's masks: target blocks, and one context block without the patches of any target.

    Sizes are drawn once a batch, places for each picture. Corners are drawn so that a block may touch the
    lower and right border; the official code's bound is exclusive, and its last row and column lie in no
    block at all.

    Attributes:
        height, width: of the grid, in patches.
        blocks: target blocks of a picture.
        target_scale, context_scale: smallest and largest share of the grid that a block covers.
        target_aspect: smallest and largest height over width of a target block; the context's is 1.
        fewest: patches that a context must exceed.
    """

    height: int
    width: int
    blocks: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    context_scale: tuple[float, float] = (0.85, 1.0)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    fewest: int = 10

    def block_size(
        self, share: float, scale: tuple[float, float], aspect: tuple[float, float]
    ) -> tuple[int, int]:
        """Height and width of a block; one number in [0, 1) sets scale and aspect alike, as in I-JEPA.

        A block is lower and narrower than the grid.
        """
        area = int(self.height * self.width * (scale[0] + share * (scale[1] - scale[0])))
        ratio = aspect[0] + share * (aspect[1] - aspect[0])
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(rows, self.height - 1), min(columns, self.width - 1)

    def sample(
        self, batch: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch blocks target"]]:
        """Positions of context patches and of target patches of each picture, ascending.

        Contexts differ in size; all are cut to the smallest of the batch, from the end. A picture whose
        context is too small has all its blocks drawn anew.

        Raises:
            ValueError: when a hundred draws leave a context too small.
        """
        share = torch.rand(2, generator=generator).tolist()
        target = self.block_size(share[0], self.target_scale, self.target_aspect)
        context = self.block_size(share[1], self.context_scale, (1.0, 1.0))
        targets = self._blocks(target, (batch, self.blocks), generator)
        seen = self._blocks(context, (batch,), generator) & ~targets.any(1)
        for _ in range(100):
            poor = seen.sum(1) <= self.fewest
            if not poor.any():
                break
            again = self._blocks(target, (int(poor.sum()), self.blocks), generator)
            targets[poor] = again
            seen[poor] = self._blocks(context, (len(again),), generator) & ~again.any(1)
        else:
            raise ValueError(f"no context of more than {self.fewest} patches: lower 'fewest'")
        kept = int(seen.sum(1).min())
        # A stable sort puts the positions of a block first, in their order.
        order = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
        inside = (~targets).to(torch.uint8).argsort(dim=2, stable=True)[..., : math.prod(target)]
        return order, inside

    def _blocks(
        self, size: tuple[int, int], shape: tuple[int, ...], generator: torch.Generator
    ) -> Bool[Tensor, "*shape patches"]:
        """Blocks of one size at random places, as masks over the patches of the grid."""
        inside = []
        for side, length in zip((self.height, self.width), size, strict=True):
            first = torch.randint(0, side - length + 1, (*shape, 1), generator=generator)
            place = torch.arange(side)
            inside.append((first <= place) & (place < first + length))
        return (inside[0][..., :, None] & inside[1][..., None, :]).flatten(-2)


# Encoder and predictor ----------------------------------------------------------------------------------


def sine_positions(height: int, width: int, dim: int) -> Float[Tensor, "1 patches dim"]:
    """Fixed positions: sines and cosines of the column, then of the row, a quarter of `dim` each.

    Raises:
        ValueError: when `dim` is no multiple of four.
    """
    if dim % 4:
        raise ValueError(f"two-dimensional sine positions need a width divisible by 4, got {dim}")
    rates = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def waves(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1).float()

    columns, rows = waves(width).repeat(height, 1), waves(height).repeat_interleave(width, 0)
    return torch.cat([columns, rows], 1)[None]


class Attention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-normalised transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Linear map of each patch."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch patches dim"]:
        return self.proj(images).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class JepaSize:
    """Sizes of encoder and predictor; the predictor has the encoder's heads.

    Attributes:
        image, patch: sides in pixels.
        width, layers, heads: of the encoder.
        predictor_width, predictor_layers: of the predictor.
        channels: of the pictures.
    """

    image: int = 224
    patch: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    predictor_width: int = 384
    predictor_layers: int = 6
    channels: int = 3

    @property
    def side(self) -> int:
        """Side of the grid in patches."""
        return self.image // self.patch


class Encoder(nn.Module):
    """Vision transformer without class token, with fixed positions, over all patches or the kept ones."""

    def __init__(self, size: JepaSize) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(size.patch, size.channels, size.width)
        positions = sine_positions(size.side, size.side, size.width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, eps=EPS)
        self.apply(draw_linear_weights)
        nn.init.normal_(self.patch_embed.proj.weight, std=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        kept: Int[Tensor, "batch kept"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        x = self.patch_embed(images) + self.pos_embed
        if kept is not None:
            x = gather_patches(x, kept)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    """Narrow transformer that guesses the targets of each block from the context tokens."""

    def __init__(self, size: JepaSize) -> None:
        super().__init__()
        inner = size.predictor_width
        self.predictor_embed = nn.Linear(size.width, inner)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, inner))
        positions = sine_positions(size.side, size.side, inner)
        self.predictor_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            Block(inner, size.heads) for _ in range(size.predictor_layers)
        )
        self.predictor_norm = nn.LayerNorm(inner, eps=EPS)
        self.predictor_proj = nn.Linear(inner, size.width)
        self.apply(draw_linear_weights)

    def forward(
        self,
        tokens: Float[Tensor, "batch context dim"],
        context: Int[Tensor, "batch context"],
        targets: Int[Tensor, "batch blocks target"],
    ) -> Float[Tensor, "batch blocks target dim"]:
        batch, blocks, count = targets.shape
        places = self.predictor_pos_embed.expand(batch, -1, -1)
        seen = self.predictor_embed(tokens) + gather_patches(places, context)
        asked = self.mask_token + gather_patches(places, targets).flatten(0, 1)
        # Every target block is predicted apart, from the same context.
        x = torch.cat([seen.repeat_interleave(blocks, 0), asked], 1)
        for block in self.predictor_blocks:
            x = block(x)
        x = self.predictor_norm(x[:, -count:])
        return self.predictor_proj(x).unflatten(0, (batch, blocks))


# The architectures --------------------------------------------------------------------------------------


class Jepa(nn.Module):
    """I-JEPA, DMT-JEPA, or I-JEPA with averaged neighbours as targets.

    Args:
        size: of encoder and predictor.
        head: DMT-JEPA's head, or None.
        averaged: without head: number of similar neighbours of a 3 x 3 window whose mean is the target;
            0: the patch's own feature (I-JEPA).

    Raises:
        ValueError: for both a head and averaged targets.
    """

    def __init__(
        self, size: JepaSize, head: LocalAggregationHead | None = None, averaged: int = 0
    ) -> None:
        super().__init__()
        if head is not None and averaged:
            raise ValueError("targets are either averaged or made by a head, not both")
        self.grid, self.averaged = (size.side, size.side), averaged
        self.encoder, self.predictor, self.head = Encoder(size), Predictor(size), head
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_head = None if head is None else copy.deepcopy(head).requires_grad_(False)

    @torch.no_grad()
    def targets(
        self,
        images: Float[Tensor, "batch channels height width"],
        scores: Float[Tensor, "batch patches slots"] | None = None,
    ) -> Float[Tensor, "batch patches dim"]:
        """Targets of all patches; `scores` choose the neighbours where there are any (None: cosine)."""
        tokens = self.target_encoder(images)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        if self.target_head is not None:
            return self.target_head.targets(tokens, self.grid, scores)
        if self.averaged:
            table, present = (t.to(tokens.device) for t in neighbour_table(*self.grid))
            if scores is None:
                scores = neighbour_similarity(tokens, table)
            return mean_of_chosen(tokens, *choose_neighbours(scores, table, present, self.averaged))
        return tokens

    def predictions(
        self,
        images: Float[Tensor, "batch channels height width"],
        context: Int[Tensor, "batch context"],
        targets: Int[Tensor, "batch blocks target"],
    ) -> Float[Tensor, "batch blocks target dim"]:
        """What the predictor says of the target patches, having seen the context patches."""
        tokens = self.encoder(images, context)
        if self.head is not None:
            tokens = self.head.context(tokens)
        return self.predictor(tokens, context, targets)

    def loss(
        self,
        images: Float[Tensor, "batch channels height width"],
        context: Int[Tensor, "batch context"],
        targets: Int[Tensor, "batch blocks target"],
        scores: Float[Tensor, "batch patches slots"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean smooth-L1 (beta 1) between predictions and targets at the target patches."""
        wanted = gather_patches(self.targets(images, scores), targets)
        return F.smooth_l1_loss(self.predictions(images, context, targets), wanted)

    @torch.no_grad()
    def update_targets(self, momentum: float) -> None:
        """Target side <- momentum x target side + (1 - momentum) x trained side; after each step."""
        pairs = [(self.encoder, self.target_encoder)]
        if self.head is not None:
            pairs.append((self.head, self.target_head))
        for trained, average in pairs:
            for new, old in zip(trained.parameters(), average.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)


def momentum_at(step: int, steps: int, first: float = 0.996, last: float = 1.0) -> float:
    """Momentum of the target side at a step: on a line from `first` to `last` over all steps."""
    return first + step * (last - first) / steps


# Costs --------------------------------------------------------------------------------------------------


def step_multiply_adds(
    size: JepaSize, context: int, blocks: int, target: int, head: bool, k: int = 4
) -> int:
    """Multiply-adds of one training step for one picture, from the products of matrices alone.

    Forward on the target side; forward and backward (twice the forward; the first layer's inputs too) for
    the rest.

    Args:
        context: patches of the context.
        blocks, target: number of target blocks, and patches of each.
        head: with DMT-JEPA's head that reads `k` neighbours.
    """
    patches, pixels = size.side**2, size.channels * size.patch**2

    def transformer(tokens: int, width: int, layers: int) -> int:
        return layers * (12 * tokens * width**2 + 2 * tokens**2 * width)

    def class_block(keys: int, states: int) -> int:
        projected = (2 * keys + 2) * size.width**2 + 8 * states * size.width**2
        return projected + 2 * keys * size.width

    embed = patches * pixels * size.width
    frozen = embed + transformer(patches, size.width, size.layers)
    trained = embed + transformer(context, size.width, size.layers)
    inner, width = size.predictor_width, size.width
    trained += context * inner * width + blocks * target * inner * width
    trained += blocks * transformer(context + target, inner, size.predictor_layers)
    if head:
        frozen += patches * 2 * class_block(k + 1, 1)
        trained += 2 * class_block(context + 1, context)
    return frozen + 3 * trained
