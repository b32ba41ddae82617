"""Block selections of a prompt: dense maps to compare them on, equal densities, a random placebo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reattend.attention.baselines.block_topk import exact_block_mass
from reattend.attention.blocks import causal_block_mask, density
from reattend.attention.host import attach
from reattend.attention.method import AttentionMethod, BlockSparseMethod


class Capture(AttentionMethod):
    """Dense attention that keeps `seen`: query, key and scale of every `stride`-th layer."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.seen = stride, {}

    def prefill(self, query, key, value, *, scale, layer, padding=None):
        if layer % self.stride == 0:
            self.seen[layer] = (query, key, scale)
        return super().prefill(query, key, value, scale=scale, layer=layer, padding=padding)


class RandomLike(BlockSparseMethod):
    """Placebo: as many blocks in every head as `method` takes, at random.

    The first column and the diagonal are always among them; a method that takes fewer blocks than these
    gets a part of them.
    """

    def __init__(self, method: BlockSparseMethod, seed: int) -> None:
        super().__init__(block_size=method.block_size)
        self.method = method
        self.generator = torch.Generator().manual_seed(seed)

    def select(
        self,
        query: Float[Tensor, "batch query_heads queries dim"],
        key: Float[Tensor, "batch key_heads keys dim"],
        *,
        scale: float,
        layer: int,
    ) -> Bool[Tensor, "batch query_heads query_blocks key_blocks"]:
        chosen = self.method.block_mask(query, key, scale=scale, layer=layer)
        rows, columns = chosen.shape[-2:]
        causal = causal_block_mask(rows, columns, device=chosen.device)
        forced = causal & ~causal.tril(columns - rows - 1)
        forced[:, 0] = True
        luck = torch.rand(chosen.shape, generator=self.generator).to(chosen.device)
        luck = luck.masked_fill(forced, 2.0).masked_fill(~causal, -1.0).flatten(-2)
        kept = torch.arange(rows * columns, device=chosen.device) < chosen.sum((-2, -1))[..., None]
        order = luck.argsort(dim=-1, descending=True)
        return torch.zeros_like(kept).scatter(-1, order, kept).view_as(chosen)


class DenseMaps:
    """Dense queries, keys and block masses of one prompt, on which selections are compared."""

    def __init__(self, model: nn.Module, prompt: Sequence[int], block_size: int) -> None:
        tokens = torch.tensor([list(prompt)], device=model.device)
        with torch.inference_mode(), attach(model, Capture()) as captured:
            model(tokens, logits_to_keep=1)
        self.length, self.layers = len(prompt), captured.seen
        self.masses = {
            n: exact_block_mass(q, k, block_size, s) for n, (q, k, s) in self.layers.items()
        }

    def select(
        self, method: BlockSparseMethod
    ) -> dict[int, Bool[Tensor, "batch heads rows columns"]]:
        """The blocks that `method` selects in every layer."""
        return {
            n: method.block_mask(q, k, scale=s, layer=n) for n, (q, k, s) in self.layers.items()
        }

    def density(self, method: BlockSparseMethod) -> float:
        """Share of the causal blocks that it selects, mean over layers and heads."""
        shares = [density(mask).mean() for mask in self.select(method).values()]
        return torch.stack(shares).mean().item()

    def covered(self, method: BlockSparseMethod) -> float:
        """Share of the attention mass of all queries on its blocks, mean over layers and heads."""
        chosen = self.select(method)
        mass = [(self.masses[n] * mask).sum((-2, -1)).mean() for n, mask in chosen.items()]
        return torch.stack(mass).mean().item() / self.length

    def match(
        self, make: Callable[[int], BlockSparseMethod], target: float, most: int
    ) -> BlockSparseMethod:
        """`make(size)`, 1 <= size <= `most`, whose density is nearest to `target`.

        The density has to rise with the size.
        """
        low, high = 1, most
        while high - low > 1:
            middle = (low + high) // 2
            above = self.density(make(middle)) >= target
            low, high = (low, middle) if above else (middle, high)
        return min((make(low), make(high)), key=lambda made: abs(self.density(made) - target))
