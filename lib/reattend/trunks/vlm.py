"""A small vision-language model: tokens of a frozen vision tower -> trained projector -> causal LM over words.

What the language model reads is a `Prompt`: states with everything that is known of each token, so that tokens
can be dropped before the LM or between two of its layers, and put back. A sequence is `<bos>`, the picture's
patches in raster order (of a second picture after it), then words. Several questions about one picture may be
packed behind it: each sees the picture and itself, never another question, so the picture is read once.

Attention is `scaled_dot_product_attention`; only where rows of weights are asked for (`Rows`) is a softmax
computed, for these queries alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from reattend.trunks.language import GatedFeedForward

COMMON, PADDING = 0, -1
"""Segments: what every question sees (`<bos>` and pictures), and what nobody sees; questions count from 1."""
NO_PATCH = -1
"""`Prompt.patches` of a word."""


@dataclass(frozen=True)
class VLMShape:
    """Sizes of the model.

    Attributes:
        vocabulary: number of words.
        grid: rows and columns of patches of a picture.
        tower: width of the tower's tokens.
        hidden: inner width of the gated feed-forward networks and of the projector.
        base: of the rotary angles (RoPE, arXiv 2104.09864).
    """

    vocabulary: int
    grid: tuple[int, int]
    tower: int = 384
    width: int = 192
    layers: int = 6
    heads: int = 6
    hidden: int = 512
    base: float = 10_000.0

    @property
    def patches(self) -> int:
        """Tokens of one picture."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Prompt:
    """What the language model reads, token by token in causal order; every field but `states` moves with it.

    Attributes:
        states: embedded words and projected patches, or states between two layers.
        positions: rotary position of each token; packed questions all start behind the picture.
        segments: COMMON, PADDING, or the number of the question, from 1.
        patches: place of a picture's token in raster order (a second picture counts on), or NO_PATCH.
        asked: tokens after which an answer is wanted.
    """

    states: Float[Tensor, "batch length width"]
    positions: Int[Tensor, "batch length"]
    segments: Int[Tensor, "batch length"]
    patches: Int[Tensor, "batch length"]
    asked: Bool[Tensor, "batch length"]

    @property
    def length(self) -> int:
        return self.states.shape[1]

    def picture_tokens(self) -> Int[Tensor, "batch patches"]:
        """Where the picture's tokens stand in the sequence.

        Raises:
            ValueError: when prompts of the batch have different numbers of them.
        """
        counts = (self.patches != NO_PATCH).sum(1)
        if (counts != counts[0]).any():
            raise ValueError(f"prompts of one batch with {counts.tolist()} picture tokens")
        return (self.patches != NO_PATCH).nonzero()[:, 1].view(len(counts), -1)

    def take(self, index: Int[Tensor, "batch kept"]) -> Prompt:
        """The tokens that stand at `index`, in that order, with their position ids as they are."""
        taken = {
            "states": self.states.gather(1, index[..., None].expand(-1, -1, self.states.shape[2]))
        }
        taken |= {f.name: getattr(self, f.name).gather(1, index) for f in fields(self)[1:]}
        return Prompt(**taken)

    def keep_patches(self, kept: Int[Tensor, "batch kept"]) -> Prompt:
        """Drop all picture tokens but those whose `patches` are in `kept` (any order; raster order stays).

        Position ids stay as they are; `compacted` closes the gaps.

        Raises:
            ValueError: when a patch of `kept` is not there, or is named twice.
        """
        found = (self.patches[:, :, None] == kept[:, None]).any(2)
        if (found.sum(1) != kept.shape[1]).any():
            raise ValueError("a patch to keep is not in the prompt, or is named twice")
        stays = found | (self.patches == NO_PATCH)
        return self.take(stays.nonzero()[:, 1].view(len(kept), -1))

    def compacted(self) -> Prompt:
        """Position ids without gaps: common tokens count from 0, and every question on from there."""
        common = (self.segments == COMMON).sum(1, keepdim=True)
        index = torch.arange(self.length, device=self.segments.device)
        first = (self.segments[:, :, None] == self.segments[:, None]).to(torch.uint8).argmax(2)
        places = index - first + torch.where(self.segments == COMMON, 0, common)
        return replace(self, positions=places)

    def recover(self, full: Prompt) -> Prompt:
        """The tokens of `full`, an earlier stage of this prompt, with the states of those that are still here.

        The dropped ones keep the states that they have in `full`. Tokens are told apart by segment, patch and
        position, so position ids must not have been compacted in between.
        """
        same = torch.stack(
            [
                getattr(full, n)[:, :, None] == getattr(self, n)[:, None]
                for n in ("segments", "patches", "positions")
            ]
        ).all(0)
        found, place = same.any(2, keepdim=True), same.to(torch.uint8).argmax(2)
        now = self.states.gather(1, place[..., None].expand(-1, -1, self.states.shape[2]))
        return replace(full, states=torch.where(found, now, full.states))


def _sees(
    queries: Int[Tensor, "batch queries"], keys: Int[Tensor, "batch keys"]
) -> Bool[Tensor, "batch queries keys"]:
    """By segments alone."""
    return (keys == COMMON)[:, None] | (keys[:, None] == queries[:, :, None]) & (keys != PADDING)[
        :, None
    ]


def _visible(prompt: Prompt, past: LayerCache | None) -> Bool[Tensor, "batch length keys"]:
    """Whether a token (row) sees another (column): none behind it, none of another question, no padding.

    Each sees itself, so that no row is empty; all that a layer has read before (`past`) lies ahead.
    """
    square = torch.ones(
        prompt.length, prompt.length, dtype=torch.bool, device=prompt.segments.device
    )
    itself = square.tril() & square.triu()
    visible = _sees(prompt.segments, prompt.segments) & square.tril() | itself
    if past is None:
        return visible
    return torch.cat([_sees(prompt.segments, past.segments), visible], 2)


@dataclass
class Rows:
    """Attention weights to record: `layers`, and which queries; `found[layer]` is filled by the model.

    Attributes:
        layers: which, counted from 0.
        queries: of a prompt, the places in the sequence of the queries wanted.
        found: layer -> [batch, heads, queries, length], in single precision or finer.
    """

    layers: Sequence[int]
    queries: Callable[[Prompt], Int[Tensor, "batch queries"]]
    found: dict[int, Tensor] = field(default_factory=dict)


def last_asked(prompt: Prompt) -> Int[Tensor, "batch 1"]:
    """The last token after which an answer is wanted: of a prompt with one question, its final token."""
    return prompt.length - 1 - prompt.asked.flip(1).to(torch.uint8).argmax(1, keepdim=True)


def turns(
    positions: Int[Tensor, "batch length"], dim: int, base: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch 1 length half"], Float[Tensor, "batch 1 length half"]]:
    """Cosines and sines of the rotary angles position * base ^ (-2 i / dim), i < dim / 2 (arXiv 2104.09864)."""
    rates = base ** (-torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
    angles = positions[:, None, :, None] * rates
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads length dim"],
    turn: tuple[Float[Tensor, "batch 1 length half"], Float[Tensor, "batch 1 length half"]],
) -> Float[Tensor, "batch heads length dim"]:
    """Pairs (i, i + dim / 2) turned by the angles whose cosines and sines are given."""
    cos, sin = (part.to(x.dtype) for part in turn)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass
class LayerCache:
    """Rotated keys, values and segments of what one layer has read."""

    keys: Float[Tensor, "batch heads length dim"]
    values: Float[Tensor, "batch heads length dim"]
    segments: Int[Tensor, "batch length"]

    def extended(self, keys: Tensor, values: Tensor, segments: Tensor) -> LayerCache:
        """With the keys, values and segments of further tokens."""
        return LayerCache(
            torch.cat([self.keys, keys], 2),
            torch.cat([self.values, values], 2),
            torch.cat([self.segments, segments], 1),
        )


class LanguageLayer(nn.Module):
    """Pre-norm layer of the LM: rotary multi-head attention, then a gated feed-forward network."""

    def __init__(self, shape: VLMShape):
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.q, self.k, self.v, self.o = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )
        self.feed_forward_norm = nn.LayerNorm(shape.width)
        self.feed_forward = GatedFeedForward(shape.width, shape.hidden)

    def forward(
        self,
        prompt: Prompt,
        turn: tuple[Tensor, Tensor],
        visible: Bool[Tensor, "batch length keys"],
        cache: LayerCache | None = None,
        queries: Int[Tensor, "batch queries"] | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], LayerCache, Tensor | None]:
        """New states, what the layer has read so far, and the attention rows of `queries` if there are any."""
        x = self.attention_norm(prompt.states)
        q, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, turn), rotate(k, turn)
        read = LayerCache(k, v, prompt.segments)
        if cache is not None:
            read = cache.extended(k, v, prompt.segments)
        mixed = F.scaled_dot_product_attention(q, read.keys, read.values, visible[:, None])
        states = prompt.states + self.o(mixed.transpose(1, 2).flatten(2))
        states = states + self.feed_forward(self.feed_forward_norm(states))
        rows = None if queries is None else _rows(q, read.keys, visible, queries)
        return states, read, rows


def _rows(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads keys dim"],
    visible: Bool[Tensor, "batch length keys"],
    queries: Int[Tensor, "batch queries"],
) -> Float[Tensor, "batch heads queries keys"]:
    """Softmax weights of some queries."""
    q = q.gather(2, queries[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    seen = visible.gather(1, queries[..., None].expand(-1, -1, visible.shape[2]))
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(
        -1, torch.promote_types(q.dtype, torch.float32)
    )


BeforeLayer = Callable[[int, Prompt, Mapping[int, Tensor]], Prompt]
"""Called before each layer with its number, what it would read, and the rows recorded so far; returns what it
shall read (`Prompt.keep_patches`, `Prompt.recover`). Position ids are read anew where tokens go or come back:
whoever compacts them does so in the same step."""


class VisionLanguageModel(nn.Module):
    """Projector and language model; the tower's tokens come in ready-made.

    A patch is projector(token) plus a trained vector of its row and one of its column: where a patch lies is a
    property of its token, as in towers with position embeddings, not of its position id in the LM.
    The head is the word embedding, transposed.
    """

    def __init__(self, shape: VLMShape):
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.tower_norm = nn.LayerNorm(shape.tower)
        self.projector = nn.Sequential(
            nn.Linear(shape.tower, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, shape.width)
        )
        self.rows = nn.Embedding(shape.grid[0], shape.width)
        self.columns = nn.Embedding(shape.grid[1], shape.width)
        self.layers = nn.ModuleList(LanguageLayer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for table in (self.words, self.rows, self.columns):
            nn.init.normal_(table.weight, std=shape.width**-0.5)

    def place(self, patches: Int[Tensor, "*any"]) -> Float[Tensor, "*any width"]:
        """Vectors of the rows and columns of patches; those of a second picture count on from the first."""
        patches = patches % self.shape.patches
        columns = self.shape.grid[1]
        return self.rows(patches // columns) + self.columns(patches % columns)

    def project(
        self,
        tokens: Float[Tensor, "batch patches tower"],
        patches: Int[Tensor, "batch patches"] | None = None,
    ) -> Float[Tensor, "batch patches width"]:
        """What the LM sees of a picture's tokens; `patches` are their raster places (default: all, in order)."""
        if patches is None:
            patches = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
        tokens = tokens.to(self.words.weight.dtype)
        return self.projector(self.tower_norm(tokens)) + self.place(patches)

    def prompt(
        self,
        bos: int,
        pictures: Float[Tensor, "batch patches width"] | None,
        questions: Int[Tensor, "batch questions words"],
        pad: int,
        patches: Int[Tensor, "batch patches"] | None = None,
    ) -> Prompt:
        """`<bos>`, projected pictures (None: blind), and questions packed behind them, each padded on the right.

        Answers are wanted after the last word of each question.

        Args:
            patches: raster places of the picture's tokens (default: all, in order); position ids have no gaps.
        """
        batch, count, words = questions.shape
        device = questions.device
        start = torch.full((batch, 1), bos, device=device)
        parts = [self.words(start)] + ([] if pictures is None else [pictures])
        common = sum(part.shape[1] for part in parts)
        if patches is None:
            patches = torch.arange(common - 1, device=device).expand(batch, -1)
        flat = questions.flatten(1)
        states = torch.cat([*parts, self.words(flat)], 1)
        within = torch.arange(words, device=device).repeat(count)
        positions = torch.cat([torch.arange(common, device=device), common + within]).expand(
            batch, -1
        )
        number = torch.arange(1, count + 1, device=device).repeat_interleave(words)
        real = flat != pad
        end = within == (questions != pad).sum(2).repeat_interleave(words, 1) - 1
        none = torch.full((batch, 1), NO_PATCH, device=device)
        return Prompt(
            states,
            positions,
            torch.cat(
                [torch.full((batch, common), COMMON, device=device), number.where(real, PADDING)], 1
            ),
            torch.cat([none, patches, none.expand(-1, flat.shape[1])], 1),
            torch.cat([torch.zeros(batch, common, dtype=torch.bool, device=device), end & real], 1),
        )

    def turn(self, positions: Int[Tensor, "batch length"]) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of position ids."""
        dim = self.shape.width // self.shape.heads
        return turns(positions, dim, self.shape.base, self.words.weight.dtype)

    def read(
        self,
        prompt: Prompt,
        *,
        cache: dict[int, LayerCache] | None = None,
        rows: Rows | None = None,
        before_layer: BeforeLayer | None = None,
        first: int = 0,
    ) -> Prompt:
        """Run the layers from `first` on; the prompt after the last of them (and the final norm).

        Args:
            cache: empty: filled with what each layer reads; filled: the prompt continues it.
            rows: attention weights to record.
            before_layer: may drop or put back tokens.
        """
        visible = turn = of = None  # the same for all layers that read the same tokens
        for number in range(first, len(self.layers)):
            if before_layer is not None:
                prompt = before_layer(number, prompt, {} if rows is None else rows.found)
            past = None if cache is None else cache.get(number)
            if past is not None or of is not prompt.segments:
                visible, of = _visible(prompt, past), prompt.segments
                turn = self.turn(prompt.positions)
            wanted = rows.queries(prompt) if rows is not None and number in rows.layers else None
            states, read, found = self.layers[number](prompt, turn, visible, past, wanted)
            prompt = replace(prompt, states=states)
            if cache is not None:
                cache[number] = read
            if found is not None:
                rows.found[number] = found
        return replace(prompt, states=self.norm(prompt.states))

    def answers(self, prompt: Prompt) -> Float[Tensor, "asked vocabulary"]:
        """Scores of every word after each asked token of a prompt that was read, in the order of the batch."""
        return prompt.states[prompt.asked] @ self.words.weight.T

    @torch.no_grad()
    def generate(
        self, prompt: Prompt, steps: int, before_layer: BeforeLayer | None = None
    ) -> Int[Tensor, "batch steps"]:
        """Words that follow each prompt (of one question each), the likeliest one at a time, with a cache.

        `before_layer` works on the prompt alone; what a layer did not read there it never sees.

        Raises:
            ValueError: when a prompt does not ask exactly one question.
        """
        if (prompt.asked.sum(1) != 1).any():
            raise ValueError("generation continues prompts of one question each")
        cache: dict[int, LayerCache] = {}
        end = last_asked(prompt)
        position, segment = prompt.positions.gather(1, end), prompt.segments.gather(1, end)
        word = self.answers(self.read(prompt, cache=cache, before_layer=before_layer)).argmax(
            1, keepdim=True
        )
        said = [word]
        for step in range(1, steps):
            one = Prompt(
                self.words(word),
                position + step,
                segment,
                torch.full_like(word, NO_PATCH),
                torch.ones_like(word, dtype=torch.bool),
            )
            word = self.answers(self.read(one, cache=cache)).argmax(1, keepdim=True)
            said.append(word)
        return torch.cat(said, 1)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of low rank (LoRA, arXiv 2106.09685): W x + (alpha / r) B A x.

    B starts at zero, so nothing changes before training.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False).to(linear.weight)
        self.up = nn.Linear(rank, linear.out_features, bias=False).to(linear.weight)
        nn.init.zeros_(self.up.weight)
        self.scale = alpha / rank

    def forward(self, x: Float[Tensor, "*any before"]) -> Float[Tensor, "*any after"]:
        return self.linear(x) + self.scale * self.up(self.down(x))


def add_lora(
    model: nn.Module, rank: int, alpha: float, names: Sequence[str] = ("q", "v")
) -> list[nn.Parameter]:
    """Freeze a model and put a `LoRALinear` around its linear layers of these names; the new parameters.

    Raises:
        ValueError: when there is no such layer.
    """
    model.requires_grad_(False)
    added = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, adapter := LoRALinear(child, rank, alpha))
                added += [adapter.down.weight, adapter.up.weight]
    if not added:
        raise ValueError(f"no linear layers named {', '.join(names)}")
    return added
