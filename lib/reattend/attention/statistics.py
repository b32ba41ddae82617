"""Statistics of attention weights that the papers report, head by head."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def covered_mass(
    weights: Float[Tensor, "*batch queries keys"],
    token_mask: Bool[Tensor, "*#batch #queries #keys"],
) -> Float[Tensor, "*batch"]:
    """Recall of a selection: the share of attention mass that it covers, mean over the queries.

    Args:
        weights: dense attention weights; each row sums to 1.
        token_mask: True for selected tokens.
    """
    return (weights * token_mask).sum(dim=-1).mean(dim=-1)


def block_mass(
    weights: Float[Tensor, "*batch queries keys"], block_size: int
) -> Float[Tensor, "*batch query_blocks key_blocks"]:
    """Attention mass inside each block, summed over its queries and keys.

    On the grid of `reattend.attention.blocks`: the last query stands at the last key.
    """
    queries, keys = weights.shape[-2:]
    front, back = (keys - queries) % block_size, -keys % block_size
    padded = F.pad(weights, (0, back, front, back))
    blocks = padded.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size))
    return blocks.sum(dim=(-3, -1))


def js_divergence(
    p: Float[Tensor, "*batch n"], q: Float[Tensor, "*batch n"], *, eps: float = 1e-12
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, 0.5 KL(p || m) + 0.5 KL(q || m) with m = (p + q) / 2, in nats.

    Args:
        eps: floor under the probabilities inside the logarithms, so that zeros contribute 0 rather
            than NaN.
    """
    log_middle = (0.5 * (p + q)).clamp_min(eps).log()
    divergences = [(x * (x.clamp_min(eps).log() - log_middle)).sum(dim=-1) for x in (p, q)]
    return (0.5 * sum(divergences)).clamp_min(0.0)


def entropy(p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy in nats, with 0 log 0 = 0."""
    return torch.special.entr(p).sum(dim=-1)


def sink_mass(
    weights: Float[Tensor, "*batch queries keys"], sink: int = 1
) -> Float[Tensor, "*batch"]:
    """Share of the attention mass on the first `sink` keys, mean over the queries."""
    return weights[..., :sink].sum(dim=-1).mean(dim=-1)
