"""TextMonkey (arXiv 2403.04473): attention across the borders of crops, and a shorter sequence of visual tokens.

A large page is cut into crops, and a vision transformer reads each crop alone. Two modules mend what
that costs:

    cross-window attention    before some blocks the crops' tokens are stitched into the page's map, attend
                              within shifted windows that lie over the borders, and are cut apart again;
                              the last matrix is zero at the start, so that the page begins as plain crops
    token resampler           of all tokens those are kept that are least similar to any *later* token;
                              the kept ones then attend to all, which again changes nothing at the start

Maps are [batch, height, width, channels], crops [batch, crops, tokens, channels], row by row. Parameters
have the names of the official code, so that its checkpoints load.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -1e4
"""Added to the score of a pair that may not see each other, so that its weight is zero. The official code adds -100:
e^-100 is subnormal in single precision, and a CPU multiplies by such numbers several times more slowly."""


# Crops and windows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropGrid:
    """How a page's map of tokens falls into crops.

    Attributes:
        rows, columns: crops down and across.
        height, width: of one crop, in tokens.
    """

    rows: int
    columns: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the page, in tokens."""
        return self.rows * self.height, self.columns * self.width

    def stitch(
        self, crops: Float[Tensor, "batch crops tokens channels"]
    ) -> Float[Tensor, "batch height width channels"]:
        """The map of the page.

        Raises:
            ValueError: when number or size of the crops is not the grid's.
        """
        expected = (self.rows * self.columns, self.height * self.width)
        if tuple(crops.shape[1:3]) != expected:
            found = f"{crops.shape[1]} crops of {crops.shape[2]} tokens"
            raise ValueError(
                f"the grid has {expected[0]} crops of {expected[1]} tokens, not {found}"
            )
        tiles = crops.unflatten(2, (self.height, self.width)).unflatten(1, (self.rows, -1))
        return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def cut(
        self, page: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch crops tokens channels"]:
        """The inverse of `stitch`."""
        return partition(page, (self.height, self.width))


def partition(
    page: Float[Tensor, "batch height width channels"], window: tuple[int, int]
) -> Float[Tensor, "batch windows tokens channels"]:
    """Windows of a map, row by row; their height and width divide the map's."""
    rows = page.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join(
    windows: Float[Tensor, "batch windows tokens channels"],
    window: tuple[int, int],
    size: tuple[int, int],
) -> Float[Tensor, "batch height width channels"]:
    """The map of `size` whose `partition` these windows are."""
    return CropGrid(size[0] // window[0], size[1] // window[1], *window).stitch(windows)


def visible_along(
    size: int, window: int, shift: int, *, official: bool = False
) -> Bool[Tensor, "windows queries keys"]:
    """Along one axis: which places of each window of the rolled, padded axis may see each other.

    The axis is rolled by `-shift` and padded at its end to a multiple of the window. Two places see each
    other when both come from before the roll's seam or both from behind it, and padding is seen by none.

    Args:
        official: the mask of the official code (and of timm). It is cut out of the *padded* axis, so the
            seam is masked in the wrong place where the window does not divide the size, and padding is
            a key like any other.
    """
    padded = math.ceil(size / window) * window
    places = torch.arange(padded)
    region = (places >= (padded if official else size) - shift).int()
    if not official:
        region += (places >= size).int()
    region = region.view(-1, window)
    seen = region[:, :, None] == region[:, None, :]
    return seen if official else seen & (places < size).view(-1, 1, window)


def visible_pairs(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    official: bool = False,
) -> Bool[Tensor, "windows queries keys"]:
    """Which tokens of each window of a rolled map may see each other: both of `visible_along`."""
    rows, columns = (
        visible_along(*axis, official=official) for axis in zip(size, window, shift, strict=True)
    )
    pairs = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    return pairs.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def relative_index(window: tuple[int, int]) -> Int[Tensor, "queries keys"]:
    """Row of the bias table for every query and key of a window, from query - key along both axes."""
    rows, columns = (torch.arange(n)[:, None] - torch.arange(n) + n - 1 for n in window)
    index = rows[:, None, :, None] * (2 * window[1] - 1) + columns[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


class WindowAttention(nn.Module):
    """Multi-head self-attention in every window, with a bias for each offset of query and key."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        table = torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.register_buffer("index", relative_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def scores(
        self,
        windows: Float[Tensor, "batch windows tokens dim"],
        visible: Bool[Tensor, "windows tokens tokens"],
    ) -> tuple[
        Float[Tensor, "batch windows heads tokens tokens"],
        Float[Tensor, "batch windows heads tokens head_dim"],
    ]:
        """Scores before the softmax, and the values they weigh."""
        parts = self.qkv(windows).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in parts)
        bias = self.relative_position_bias_table[self.index].movedim(-1, 0)
        hidden = MASKED * ~visible[:, None]
        return q * q.shape[-1] ** -0.5 @ k.mT + bias + hidden, v

    def forward(
        self,
        windows: Float[Tensor, "batch windows tokens dim"],
        visible: Bool[Tensor, "windows tokens tokens"],
    ) -> Float[Tensor, "batch windows tokens dim"]:
        scores, v = self.scores(windows, visible)
        return self.proj((scores.softmax(-1) @ v).transpose(2, 3).flatten(3))


# Zero-initialised branches ------------------------------------------------------------------------


class ScaledMLP(nn.Module):
    """s W2 GELU(W1 x) without biases, the last layer of both modules' branches.

    Args:
        zero: W2 starts at zero (the paper, "zero initialisation"); else it starts as any linear layer.
        dropout: rate after the GELU.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, zero: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(inputs, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, outputs, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        if zero:
            nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return self.scale * self.fc2(hidden)


class ShiftedWindowBlock(nn.Module):
    """What the branch of `CrossWindowAttention` does with a map: narrow, attend in windows, MLP.

    D = U W_down;  D' = D + Attention(LN(D)) in windows of the map rolled by `shift`;  s W2 GELU(W1 LN(D')).
    Along an axis that is no longer than the window, the window is the axis and nothing is shifted.

    Args:
        official_mask: see `visible_along`.
    """

    def __init__(
        self,
        size: tuple[int, int],
        dim: int,
        hidden: int,
        heads: int,
        window: int,
        shift: int,
        *,
        zero: bool,
        dropout: float,
        official_mask: bool,
    ) -> None:
        super().__init__()
        self.size = size
        self.window = tuple(min(window, n) for n in size)
        self.shift = tuple(shift if n > window else 0 for n in size)
        self.downsample = nn.Linear(dim, hidden, bias=False)
        self.norm1 = nn.LayerNorm(hidden)
        self.attn = WindowAttention(hidden, heads, self.window)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = ScaledMLP(hidden, 2 * hidden, dim, zero=zero, dropout=dropout)
        visible = visible_pairs(size, self.window, self.shift, official=official_mask)
        self.register_buffer("visible", visible, persistent=False)

    def windows(
        self, page: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch windows tokens channels"]:
        """Windows of a map after it was rolled and padded with zeros."""
        rolled = page.roll([-s for s in self.shift], (1, 2))
        height, width = (-n % w for n, w in zip(self.size, self.window, strict=True))
        return partition(F.pad(rolled, (0, 0, 0, width, 0, height)), self.window)

    def unwindowed(
        self, windows: Float[Tensor, "batch windows tokens channels"]
    ) -> Float[Tensor, "batch height width channels"]:
        """The inverse of `windows`."""
        padded = tuple(math.ceil(n / w) * w for n, w in zip(self.size, self.window, strict=True))
        page = join(windows, self.window, padded)[:, : self.size[0], : self.size[1]]
        return page.roll(self.shift, (1, 2))

    def forward(
        self, page: Float[Tensor, "batch height width channels"]
    ) -> Float[Tensor, "batch height width channels"]:
        narrow = self.downsample(page)
        read = self.attn(self.windows(self.norm1(narrow)), self.visible)
        return self.mlp(self.norm2(narrow + self.unwindowed(read)))


class CrossWindowAttention(nn.Module):
    """Attention between the crops of a page within shifted windows (section 3.1): X + branch(X + P).

    Put one before each of a few blocks of a vision transformer that reads crops alone:

        crops = module(crops)    # [batch, crops, tokens, dim], without a class token

    Args:
        grid: of the crops.
        dim, hidden: channels of the tokens, and within the branch (the paper: 128 to 1,024 of 1,664).
        heads: of the attention; the paper has 32 channels a head.
        window: side of a window in tokens.
        shift: how far windows lie off the page's corner; half a window by default. With 0 and windows as
            large as a crop the module cannot cross a border (a placebo).
        zero: zero initialisation of the last matrix.
        dropout: within the MLP.
        official_mask: reproduce the official mask, see `visible_along`; it matters only where the window
            does not divide the page.

    Raises:
        ValueError: when the heads do not divide `hidden`.
    """

    def __init__(
        self,
        grid: CropGrid,
        dim: int,
        hidden: int,
        heads: int,
        *,
        window: int = 12,
        shift: int | None = None,
        zero: bool = True,
        dropout: float = 0.05,
        official_mask: bool = False,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"{heads} heads do not divide {hidden} channels: choose a multiple")
        self.grid = grid
        positions = torch.empty(1, math.prod(grid.size), dim)
        self.position_embedding = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))
        self.shift_attn = ShiftedWindowBlock(
            grid.size,
            dim,
            hidden,
            heads,
            window,
            window // 2 if shift is None else shift,
            zero=zero,
            dropout=dropout,
            official_mask=official_mask,
        )

    def placed(
        self, page: Float[Tensor, "batch height width dim"]
    ) -> Float[Tensor, "batch height width dim"]:
        """What the branch reads: the map with learned positions."""
        return page + self.position_embedding.view(1, *self.grid.size, -1)

    def forward(
        self, crops: Float[Tensor, "batch crops tokens dim"]
    ) -> Float[Tensor, "batch crops tokens dim"]:
        page = self.grid.stitch(crops)
        return self.grid.cut(page + self.shift_attn(self.placed(page)))

    @torch.no_grad()
    def weights(
        self, crops: Float[Tensor, "batch crops tokens dim"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Attention between all tokens of the page, row by row: zero outside of windows. For looking at."""
        block = self.shift_attn
        page = block.norm1(block.downsample(self.placed(self.grid.stitch(crops))))
        found = block.attn.scores(block.windows(page), block.visible)[0].softmax(-1)
        height, width = self.grid.size
        numbers = torch.arange(1.0, height * width + 1, device=page.device)
        # Padding becomes place -1, which is dropped at the end.
        places = block.windows(numbers.view(1, height, width, 1))[0, :, :, 0].long() - 1
        whole = found.new_zeros(len(page), found.shape[2], height * width + 1, height * width + 1)
        for window, place in enumerate(places):
            whole[:, :, place[:, None], place] = found[:, window]
        return whole[:, :, :-1, :-1]


# Token resampler ----------------------------------------------------------------------------------


def later_similarity(tokens: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n"]:
    """Largest cosine of every token to a *later* one; -1 for the last.

    Looking one way only keeps one of two alike tokens, the later; looking both ways would drop both.
    """
    unit = F.normalize(tokens, dim=-1)
    cosine = unit @ unit.mT
    earlier = torch.ones_like(cosine[0], dtype=torch.bool).tril()
    return cosine.masked_fill(earlier, -1.0).amax(-1)


def least_similar(tokens: Float[Tensor, "batch n dim"], keep: int) -> Int[Tensor, "batch keep"]:
    """Positions of the `keep` tokens that are least similar to a later one, in their order (section 3.2).

    Raises:
        ValueError: when there are no `keep` tokens.
    """
    if not 1 <= keep <= tokens.shape[1]:
        raise ValueError(f"keep must lie in 1..{tokens.shape[1]}, the number of tokens, not {keep}")
    with torch.no_grad():
        return later_similarity(tokens).topk(keep, largest=False).indices.sort(-1).values


def gather_tokens(
    tokens: Float[Tensor, "batch n dim"], places: Int[Tensor, "batch keep"]
) -> Float[Tensor, "batch keep dim"]:
    """The tokens at these places."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


class LatentAttention(nn.Module):
    """Latents read the tokens and each other: queries of LN(latents), keys of both; no residual around it."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "batch n dim"], latents: Float[Tensor, "batch keep dim"]
    ) -> Float[Tensor, "batch keep dim"]:
        latents = self.norm_latents(latents)
        both = torch.cat([self.norm_media(tokens), latents], 1)
        parts = (self.to_q(latents), *self.to_kv(both).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        read = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(read.transpose(1, 2).flatten(2))


class FeedForward(ScaledMLP):
    """LN before a `ScaledMLP`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, zero: bool = True) -> None:
        super().__init__(inputs, hidden, outputs, zero=zero)
        self.norm = nn.LayerNorm(inputs)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return super().forward(self.norm(x))


class TokenResampler(nn.Module):
    """Fewer visual tokens: some of them, each plus what it reads of all (section 3.2).

        kept + s W2 GELU(W1 LN(Attention(kept W_d, [x W_d, kept W_d])))

    Args:
        dim, inner: channels of the tokens, and within the branch (the paper: 4,096 and 1,024).
        heads, head_dim: of the attention (the paper: 8 of 128).
    """

    def __init__(self, dim: int, inner: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.downsample = nn.Linear(dim, inner, bias=False)
        attention = LatentAttention(inner, heads, head_dim)
        layer = nn.ModuleList([attention, FeedForward(inner, inner, dim)])
        self.layers = nn.ModuleList([layer])  # the official code allows for more than one

    def forward(
        self, tokens: Float[Tensor, "batch n dim"], latents: Float[Tensor, "batch keep dim"]
    ) -> Float[Tensor, "batch keep dim"]:
        """The kept tokens after they have read all.

        Args:
            latents: the kept tokens, `gather_tokens(tokens, least_similar(tokens, keep))` for the method.
        """
        attention, feed_forward = self.layers[0]
        read = attention(self.downsample(tokens), self.downsample(latents))
        return latents + feed_forward(read)


# Redundancy ---------------------------------------------------------------------------------------


def redundant_tokens(
    tokens: Float[Tensor, "batch n dim"], threshold: float = 0.8, candidates: int | None = None
) -> Float[Tensor, "batch n"]:
    """How redundant each token is: whether its largest cosine to another exceeds the threshold (figure 3).

    Args:
        candidates: look among so many of the others, drawn at random without repetition: then the value is
            the probability that one of them is over the threshold, exactly. None: among all others.

    Raises:
        ValueError: when there are fewer other tokens than candidates.
    """
    count = tokens.shape[1]
    if candidates is not None and not 1 <= candidates < count:
        raise ValueError(
            f"candidates must lie in 1..{count - 1}, the other tokens, not {candidates}"
        )
    unit = F.normalize(tokens.double(), dim=-1)
    alike = ((unit @ unit.mT) > threshold).sum(-1) - 1  # without the token itself
    if candidates is None:
        return (alike > 0).double()
    # None of the candidates is alike: C(others - alike, candidates) / C(others, candidates).
    others = torch.tensor(count - 1.0, dtype=torch.float64, device=tokens.device)
    left = others - alike - candidates
    logarithm = (
        torch.lgamma(others - alike + 1)
        - torch.lgamma(left.clamp(min=0) + 1)
        - torch.lgamma(others + 1)
        + torch.lgamma(others - candidates + 1)
    )
    return torch.where(left < 0, 1.0, 1 - logarithm.exp())
