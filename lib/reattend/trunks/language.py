"""A small causal language model whose sequence mixer is a parameter.

A mixer is a module from `[batch, length, width]` to the same shape, causal over `length`, with a
method `state_size(length)`: how many numbers it must remember to continue a text of that length.
Optional:

* `reads_tokens = True`: the mixer is called as `mixer(x, tokens)`;
* `reads_embeddings = True`: it is called with the keyword `embeddings`, the states before the first layer;
* `auxiliary_loss`: set in each training forward pass, summed by `Trunk.auxiliary_loss`;
* a keyword `cache`: a dictionary that starts empty and that the mixer fills with what it must remember;
  called again with it, the mixer continues the text (keys and values of attention, the state of a
  recurrence).

A mixer around another mixer is a `MixerWrapper`, which hands all of this on.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

ModuleFactory = Callable[[int], nn.Module]
"""Called with the width of the trunk; returns a mixer or a feed-forward module."""

Norm = Literal["layer", "rms", "simple_rms"]
"""LayerNorm; RMSNorm (arXiv 1910.07467); RMSNorm without a gain (SRMSNorm of arXiv 2307.14995)."""


def norm_layer(norm: str, width: int) -> nn.Module:
    """A normalisation over the last `width` numbers, by its name in `Norm`.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    layers = {
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width, eps=1e-6),
        "simple_rms": lambda: nn.RMSNorm(width, eps=1e-6, elementwise_affine=False),
    }
    if norm not in layers:
        raise ValueError(f"unknown norm '{norm}'; there are: {', '.join(layers)}")
    return layers[norm]()


def parameter_count(model: nn.Module) -> int:
    """Number of trained scalars; tied tensors count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def same_size(models: Mapping[str, nn.Module], tolerance: float = 0.01) -> int:
    """Check that models to be compared have equally many parameters; return the largest count.

    Args:
        models: by name.
        tolerance: how much smaller than the largest a model may be, as a share.

    Raises:
        ValueError: names the smallest and the largest model with their sizes.
    """
    counts = {name: parameter_count(model) for name, model in models.items()}
    least, most = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[least] < (1 - tolerance) * counts[most]:
        raise ValueError(
            f"models of different size: {least} has {counts[least]:,} parameters, "
            f"{most} {counts[most]:,}; more than {tolerance:.0%} apart"
        )
    return counts[most]


def sinusoids(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sines and cosines of the position, at angles from pi down to pi / length a token.

    A shift by one token is a rotation of them, so attention to the previous token is quickly learned.
    """
    pairs = (width + 1) // 2
    rates = math.pi * (1 / length) ** ((torch.arange(pairs) + 0.5) / pairs)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class FeedForward(nn.Module):
    """Position-wise two-layer network with GELU; `ratio` = hidden width / width."""

    def __init__(self, width: int, ratio: int = 4):
        super().__init__()
        self.widen = nn.Linear(width, ratio * width)
        self.narrow = nn.Linear(ratio * width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        return self.narrow(F.gelu(self.widen(x)))


class GatedFeedForward(nn.Module):
    """(activation(gate x) * up x) down, without biases (arXiv 2002.05202).

    Args:
        hidden: width between; at 2 / 3 of a `FeedForward`'s it has as many parameters.
        activation: of the gate: `F.silu` is SwiGLU, `nn.Identity()` the bilinear form.
    """

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class MixerWrapper(nn.Module):
    """A mixer around the mixer `self.mixer`: asks for what that one asks for and offers what it offers.

    A subclass changes what goes in or comes out in its own `forward`, and calls `inner`.
    """

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.mixer = mixer

    @property
    def reads_tokens(self) -> bool:
        return getattr(self.mixer, "reads_tokens", False)

    @property
    def reads_embeddings(self) -> bool:
        return getattr(self.mixer, "reads_embeddings", False)

    @property
    def auxiliary_loss(self) -> Tensor:
        """The inner mixer's; AttributeError where it has none."""
        return self.mixer.auxiliary_loss

    def inner(
        self, x: Float[Tensor, "batch length width"], *read: Tensor, cache: dict | None, **more: Any
    ) -> Float[Tensor, "batch length width"]:
        """The inner mixer, with a cache of its own inside `cache`."""
        if cache is not None:
            more["cache"] = cache.setdefault("mixer", {})
        return self.mixer(x, *read, **more)

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        *read: Tensor,
        cache: dict | None = None,
        **more: Any,
    ) -> Float[Tensor, "batch length width"]:
        return self.inner(x, *read, cache=cache, **more)

    def state_size(self, length: int) -> int:
        """The inner mixer's."""
        return self.mixer.state_size(length)


def innermost(mixer: nn.Module) -> nn.Module:
    """The mixer inside all its wrappers."""
    while isinstance(mixer, MixerWrapper):
        mixer = mixer.mixer
    return mixer


@dataclass
class TrunkCache:
    """What each layer's mixer remembers of the text so far, and how long it is in tokens."""

    layers: list[dict]
    length: int = 0


class Block(nn.Module):
    """Pre-norm residual layer: x + mixer(norm(x)), then, if asked for, x + feed_forward(norm(x)).

    `tokens` and `embeddings` are for mixers that read them; None where there are none, as in vision.
    """

    def __init__(
        self, width: int, mixer: nn.Module, feed_forward: nn.Module | None, norm: Norm = "layer"
    ):
        super().__init__()
        self.mixer_norm = norm_layer(norm, width)
        self.mixer = mixer
        self.feed_forward_norm = None if feed_forward is None else norm_layer(norm, width)
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        tokens: Int[Tensor, "batch length"] | None = None,
        cache: dict | None = None,
        embeddings: Float[Tensor, "batch length width"] | None = None,
    ) -> Float[Tensor, "batch length width"]:
        read = (tokens,) if getattr(self.mixer, "reads_tokens", False) else ()
        more = {} if cache is None else {"cache": cache}
        if getattr(self.mixer, "reads_embeddings", False):
            more["embeddings"] = embeddings
        x = x + self.mixer(self.mixer_norm(x), *read, **more)
        if self.feed_forward is not None:
            x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


class Trunk(nn.Module):
    """Token embedding, residual layers, final norm, head.

    The head is the token embedding (`tied`), or a matrix of its own.
    `mixers` holds one factory per layer, so a hybrid is a list of different factories.
    `positions` is the longest length with a learned absolute position; None: no positions. They start
    as sinusoids of half the tokens' standard deviation, `embedding_std`.
    `feed_forward=lambda width: nn.Identity()` gives the published Zoology stack, whose second
    half-layer adds LN(x) to x; None leaves the second half-layer out. `norm` is the kind of all norms.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        mixers: Sequence[ModuleFactory],
        *,
        positions: int | None = None,
        feed_forward: ModuleFactory | None = None,
        dropout: float = 0.0,
        embedding_std: float = 0.02,
        tied: bool = True,
        norm: Norm = "layer",
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=embedding_std)
        self.positions = None
        if positions is not None:
            start = embedding_std / math.sqrt(2) * sinusoids(positions, width)
            self.positions = nn.Embedding(positions, width, _weight=start)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, mixer(width), None if feed_forward is None else feed_forward(width), norm)
            for mixer in mixers
        )
        self.norm = norm_layer(norm, width)
        self.head = self.tokens
        if not tied:
            self.head = nn.Embedding(vocabulary, width)
            nn.init.normal_(self.head.weight, std=embedding_std)

    def start_cache(self) -> TrunkCache:
        """An empty cache: hand it to each call, and the calls continue one text.

        Raises ValueError when a mixer has no cached form.
        """
        for block in self.blocks:
            mixer = innermost(block.mixer)
            if "cache" not in inspect.signature(mixer.forward).parameters:
                raise ValueError(f"{type(mixer).__name__} has no cached form")
        return TrunkCache([{} for _ in self.blocks])

    def embed(
        self, tokens: Int[Tensor, "batch length"], start: int = 0
    ) -> Float[Tensor, "batch length width"]:
        """States before the first layer, of a text whose first token here stands at place `start`.

        Raises ValueError when the text is longer than the learned positions.
        """
        x, end = self.tokens(tokens), start + tokens.shape[1]
        if self.positions is not None:
            if end > self.positions.num_embeddings:
                raise ValueError(f"{end} tokens, but positions for {self.positions.num_embeddings}")
            x = x + self.positions.weight[start:end]
        return self.dropout(x)

    def hidden(
        self, tokens: Int[Tensor, "batch length"], cache: TrunkCache | None = None
    ) -> Float[Tensor, "batch length width"]:
        """States after the last layer and its norm.

        Raises ValueError when the text is longer than the learned positions.
        """
        x = embeddings = self.embed(tokens, 0 if cache is None else cache.length)
        for layer, block in enumerate(self.blocks):
            x = block(x, tokens, None if cache is None else cache.layers[layer], embeddings)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "*places width"]) -> Float[Tensor, "*places vocabulary"]:
        """Scores over the vocabulary: the head, on all states or on selected ones."""
        return hidden @ self.head.weight.T

    def forward(
        self, tokens: Int[Tensor, "batch length"], cache: TrunkCache | None = None
    ) -> Float[Tensor, "batch length vocabulary"]:
        return self.logits(self.hidden(tokens, cache))

    def auxiliary_loss(self) -> Float[Tensor, ""]:
        """Sum of the mixers' own losses of the last forward pass in training.

        Zero in evaluation, where mixers set none and the last one would be stale, and without such mixers.
        """
        losses = [b.mixer.auxiliary_loss for b in self.blocks if hasattr(b.mixer, "auxiliary_loss")]
        if not losses or not self.training:
            return self.tokens.weight.new_zeros(())
        return torch.stack(losses).sum()

    def state_size(self, length: int) -> int:
        """Numbers to remember, over all layers, to continue a text of `length` tokens."""
        return sum(block.mixer.state_size(length) for block in self.blocks)


def labelled_loss(
    model: Trunk, tokens: Int[Tensor, "batch length"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the labels that are not -100, plus the mixers' auxiliary loss.

    The head is computed at labelled positions only: with few labels it is most of the cost.
    """
    asked = labels != -100
    answers = model.logits(model.hidden(tokens)[asked])
    return F.cross_entropy(answers, labels[asked]) + model.auxiliary_loss()
