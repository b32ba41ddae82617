"""BlockRank: in-context ranking with block-sparse attention (arXiv 2510.05396).

A prompt is an instruction (with the query), N documents, and a query segment whose answer names a
document. Documents see themselves and the instruction, never each other; the query segment sees all
(section 4.1). All documents start at the same position, so their order carries no information. At a
middle layer the attention of the answer's first tokens to the documents is their score, and an
auxiliary loss trains it (section 4.2):

    S(q, d_k) = mean over heads and signal tokens of sum_{j in d_k} softmax_j(q_i k_j / sqrt d)
    L_aux = -log(sum_{k positive} exp(S_k / tau) / sum_k exp(S_k / tau))

Names of shapes: `tokens` of a prompt, in order; `blocks` M = N + 2 (instruction, documents, query
segment), each of `length` H where they are padded to be equal; `documents` N; `signals`. A tensor `block`
holds the number of each token's block, 0 .. N + 1, and -1 for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reattend.attention.dense import (
    causal_token_mask,
    masked_softmax,
    repeat_key_heads,
    widened,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer: (query, key, value), [batch, heads, tokens, dim] with fewer key heads, -> output."""


# Layout -------------------------------------------------------------------------------------------


def pack_blocks(
    prompts: Sequence[Sequence[Sequence[int]]], multiple: int = 16, pad: int = 0
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Token ids and block numbers of prompts whose blocks are padded to one length, on the left.

    Args:
        prompts: token ids of each block of each prompt: instruction, documents, query segment.
        multiple: the length is rounded up to a multiple of this (16 in the official code).
        pad: id of the padding, which is never read.

    Raises:
        ValueError: prompts of different numbers of blocks, or fewer than three; an empty block.
    """
    numbers = {len(prompt) for prompt in prompts}
    if len(numbers) != 1 or min(numbers) < 3:
        raise ValueError(
            "every prompt needs an instruction, the same number of documents (one at least) and a query segment"
        )
    sizes = [len(block) for prompt in prompts for block in prompt]
    if min(sizes) == 0:
        raise ValueError("a block without any token cannot be attended to: leave it out")
    length = -(-max(sizes) // multiple) * multiple
    ids = [[pad] * (length - len(b)) + list(b) for p in prompts for b in p]
    block = [[-1] * (length - len(b)) + [m] * len(b) for p in prompts for m, b in enumerate(p)]
    shape = (len(prompts), -1)
    return torch.tensor(ids).reshape(shape), torch.tensor(block).reshape(shape)


def shared_positions(
    block: Int[Tensor, "batch tokens"], offset: int
) -> Int[Tensor, "batch tokens"]:
    """Positions under which documents can change places.

    The instruction takes 0 .. L - 1, every document starts at L, the query segment at `offset` (8,192 in
    the paper; any value beyond the longest document). Padding gets 0.
    """
    real = block >= 0
    member = F.one_hot(block.clamp(min=0), int(block.max()) + 1) * real[..., None]
    within = member.cumsum(1).gather(2, block.clamp(min=0)[..., None])[..., 0] - 1
    first = member[..., 0].sum(1, keepdim=True)
    last = block == block.amax(1, keepdim=True)
    start = torch.where(block == 0, 0, first).masked_fill(last, offset)
    return (start + within).masked_fill(~real, 0)


# Attention ----------------------------------------------------------------------------------------


def visible(block: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens tokens"]:
    """The mask of section 4.1, token by token: True where a query (row) sees a key.

    A block sees itself causally, documents see the whole instruction, the last block sees everything.
    Padding sees nothing and is not seen.
    """
    query, key = block[:, :, None], block[:, None, :]
    causal = causal_token_mask(block.shape[1], block.shape[1], block.device)
    last = block.amax(1)[:, None, None]
    own = causal & ((query == key) | (query == last))
    return (own | ((key == 0) & (query > 0))) & (query >= 0) & (key >= 0)


def block_attention(
    query: Float[Tensor, "batch query_heads tokens dim"],
    key: Float[Tensor, "batch key_heads tokens dim"],
    value: Float[Tensor, "batch key_heads tokens dim"],
    real: Bool[Tensor, "batch tokens"],
    blocks: int,
    scale: float | None = None,
) -> Float[Tensor, "batch query_heads tokens dim"]:
    """The same attention, computed block by block: O(N H^2) in place of O(N^2 H^2).

    The instruction attends in H x H, all documents at once in H x 2H, the query segment in H x MH.

    Args:
        real: False for padding, whose rows are zeros.
        blocks: M; tokens are those of the first block, the second, and so on, equally many each.
        scale: of the scores; 1 / sqrt(dim) when None.

    Raises:
        ValueError: fewer than three blocks, or tokens that do not divide into them.
    """
    batch, heads, tokens = query.shape[:3]
    if blocks < 3 or tokens % blocks:
        raise ValueError(f"{tokens} tokens are no {blocks} equal blocks, of which three are needed")
    length, documents = tokens // blocks, blocks - 2
    key, value = (repeat_key_heads(x, heads) for x in (key, value))
    causal = causal_token_mask(length, length, query.device)

    def attend(q, k, v, mask, rows):
        # A padded row may look anywhere, since a row without any key would be NaN; it is zeroed below.
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=(mask | ~rows[..., None])[:, None], scale=scale
        )

    def of_documents(x):
        """[batch, heads, N H, dim] -> [batch N, heads, H, dim]: documents side by side in the batch."""
        x = x[:, :, length:-length].unflatten(2, (documents, length))
        return x.transpose(1, 2).flatten(0, 1)

    def with_instruction(x):
        shared = x[:, None, :, :length].expand(-1, documents, -1, -1, -1).flatten(0, 1)
        return torch.cat([shared, of_documents(x)], 2)

    first = real[:, :length]
    own = real[:, length:-length].reshape(-1, length)
    seen = first.repeat_interleave(documents, 0)[:, None].expand(-1, length, -1)
    inside = torch.cat([seen, causal & own[:, None]], 2)
    everything = real[:, None] & causal_token_mask(length, tokens, query.device)
    at_first, at_last = slice(None, length), slice(-length, None)
    output = [
        attend(*(x[:, :, at_first] for x in (query, key, value)), causal & first[:, None], first),
        attend(of_documents(query), with_instruction(key), with_instruction(value), inside, own)
        .unflatten(0, (batch, documents))
        .transpose(1, 2)
        .flatten(2, 3),
        attend(query[:, :, at_last], key, value, everything, real[:, at_last]),
    ]
    return torch.cat(output, 2).masked_fill(~real[:, None, :, None], 0.0)


def multiply_adds(documents: int, length: int) -> tuple[int, int]:
    """Scores of one head: (block by block, dense over the same padded tokens)."""
    block_by_block = length**2 + documents * 2 * length**2 + (documents + 2) * length**2
    return block_by_block, ((documents + 2) * length) ** 2


# Scores -------------------------------------------------------------------------------------------


def head_scores(
    query: Float[Tensor, "batch query_heads signals dim"],
    key: Float[Tensor, "batch key_heads tokens dim"],
    document: Int[Tensor, "batch tokens"],
    documents: int,
    scale: float | None = None,
) -> Float[Tensor, "batch query_heads documents"]:
    """S of every head: the attention of the signal tokens, normalised over document tokens alone.

    Sums to 1 over the documents. Instruction and query segment take no part in the softmax.

    Args:
        document: number of each token's document, 0 .. N - 1; -1 for any other token.
        scale: 1 / sqrt(dim) when None (the official SDPA back-end leaves it out; the others have it).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # The query heads that share a key head stand side by side, so that no key is copied.
    shared = widened(query).reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    logits = scale * (shared @ widened(key).transpose(-2, -1))
    logits = logits.reshape(*query.shape[:3], key.shape[2])
    weights = masked_softmax(logits, (document >= 0)[:, None, None]).mean(2)
    place = document.clamp(min=0)[:, None].expand_as(weights)
    return weights.new_zeros(*weights.shape[:2], documents).scatter_add(2, place, weights)


def document_scores(
    query: Float[Tensor, "batch query_heads signals dim"],
    key: Float[Tensor, "batch key_heads tokens dim"],
    document: Int[Tensor, "batch tokens"],
    documents: int,
) -> Float[Tensor, "batch documents"]:
    """S(q, d_k) (section 4.2): `head_scores`, mean over heads (the code's mean; the paper writes sums)."""
    return head_scores(query, key, document, documents).mean(1)


def auxiliary_loss(
    scores: Float[Tensor, "batch documents"],
    positive: Bool[Tensor, "batch documents"],
    temperature: float = 0.05,
) -> Float[Tensor, ""]:
    """L_aux (section 4.2): InfoNCE over the documents with any number of positives, in nats.

    Raises:
        ValueError: a prompt without a positive, or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    if not positive.any(1).all():
        raise ValueError("every prompt needs a right document: leave out those without")
    logits = scores / temperature
    right = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
    return (logits.logsumexp(1) - right).mean()


# In a language model ------------------------------------------------------------------------------


def states_entering(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    positions: Int[Tensor, "batch tokens"],
    attend: Attend,
    layers: Collection[int],
) -> dict[int, Float[Tensor, "batch tokens width"]]:
    """States that enter some layers of a Llama-like model; nothing beyond the last of them is computed.

    Args:
        model: a causal model of transformers with Llama's layers (SmolLM2, Mistral).
        attend: the attention of every layer, on queries and keys turned by `positions`.
        layers: numbers from 0; the number of layers itself asks for what leaves the last one.

    Raises:
        ValueError: a layer that the model does not have.
    """
    stack = model.model.layers
    if not layers or min(layers) < 0 or max(layers) > len(stack):
        raise ValueError(f"layers must lie in 0..{len(stack)}, got {sorted(layers)}")
    states = model.model.embed_tokens(ids)
    turn = model.model.rotary_emb(states, positions)
    seen = {}
    for number in range(max(layers) + 1):
        if number in layers:
            seen[number] = states
        if number < max(layers):
            layer = stack[number]
            heads = projections(layer, states, turn)
            mixed = attend(*heads).transpose(1, 2).flatten(2)
            states = states + layer.self_attn.o_proj(mixed)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
    return seen


def projections(
    layer: nn.Module,
    states: Float[Tensor, "batch tokens width"],
    turn: tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens dim"]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a Llama layer, [batch, heads, tokens, dim], turned by their positions.

    Args:
        turn: cosines and sines that the model's rotary embedding gives for the positions.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    query, key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return *apply_rotary_pos_emb(query, key, *turn), value
