"""What SmolLM2 says of candidate lists under three attention masks, and readers trained on it.

The language model stays as it is (training it takes seconds a step). It reads every prompt up to some
layers under a mask: "full" causal attention, BlockRank's "block" mask with shared positions, or "random"
blocks in place of the instruction and the document itself. On the states that enter a layer a reader is
trained: low-rank changes of that layer's query and key projections, by the auxiliary loss, so that the
attention of the signal tokens ranks the documents. The next-token loss is not trained.

Files: `lists.json` and `scores.safetensors`; see `load`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import rotate_half

from reattend.attention.dense import causal_token_mask
from reattend.backbones.pretrained import smollm2
from reattend.backbones.store import backbone_path
from reattend.data.verse_lists import VerseList, verse_lists
from reattend.text_matching.blockrank import (
    auxiliary_loss,
    head_scores,
    shared_positions,
    states_entering,
    visible,
)
from reattend.training.loop import TrainingLog, TrainingPlan, train

MASKS = ("full", "block", "random")
OFFSET = 1_024  # position of the query segment under the last two masks
TEMPERATURE = 0.05
SIGNALS = 2  # tokens that end the prompt: ":" and " ["


# Prompts ------------------------------------------------------------------------------------------


def prompt_blocks(tokenizer: PreTrainedTokenizerBase, item: VerseList) -> list[list[int]]:
    """Token ids of the instruction, each document and the query segment, tokenised apart.

    The paper's prompt, shortened, in SmolLM2's chat format; the answer's first token is the last one.
    """
    texts = [
        "<|im_start|>user\nFind the document that says the same as the query.\n"
        f"Query: {item.query}\nDocuments:"
    ]
    texts += [
        f"\nID: {number} | CONTENT: {text} | END ID: {number}"
        for number, text in enumerate(item.documents)
    ]
    texts.append(
        f"\nQuery: {item.query}\nThe following document can help answer the query:<|im_end|>\n"
        "<|im_start|>assistant\nFinal Answer: ["
    )
    return [tokenizer(text).input_ids for text in texts]


def joined(
    prompts: Sequence[Sequence[Sequence[int]]],
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Token ids and block numbers of prompts, block behind block, padded on the left with block -1."""
    rows = [[token for block in prompt for token in block] for prompt in prompts]
    numbers = [[m for m, block in enumerate(prompt) for _ in block] for prompt in prompts]
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    return torch.tensor(ids), torch.tensor([[-1] * (longest - len(n)) + n for n in numbers])


# Masks --------------------------------------------------------------------------------------------


def random_blocks(
    block: Int[Tensor, "batch tokens"], generator: Generator
) -> Bool[Tensor, "batch tokens tokens"]:
    """The placebo: every document sees two blocks drawn from the instruction and all documents.

    As many blocks as BlockRank gives it, and always its own token; own blocks stay causal. Instruction
    and query segment see what they see there.
    """
    last = int(block.max())
    luck = torch.rand(len(block), last, last, generator=generator)
    chosen = torch.zeros(len(block), last + 1, last + 1, dtype=torch.bool)
    chosen[:, 1:last, :last] = F.one_hot(luck.topk(2).indices[:, 1:], last).sum(2).bool()
    rows = torch.arange(len(block))[:, None, None]
    seen = chosen[rows, block.clamp(min=0)[:, :, None], block.clamp(min=0)[:, None, :]]
    own = block[:, :, None] == block[:, None, :]
    causal = causal_token_mask(block.shape[1], block.shape[1])
    itself = torch.eye(block.shape[1], dtype=torch.bool)
    document = ((block > 0) & (block < last))[:, :, None]
    seen = (seen & (~own | causal)) | itself
    return torch.where(document, seen & (block >= 0)[:, None], visible(block))


class Masked:
    """Attention of the trunk under one of MASKS; "random" draws anew in every layer."""

    def __init__(self, mask: str, block: Int[Tensor, "batch tokens"], generator: Generator) -> None:
        self.block, self.random, self.generator = block, mask == "random", generator
        real = block >= 0
        self.allowed = visible(block)
        if mask == "full":
            self.allowed = causal_token_mask(*[block.shape[1]] * 2) & real[:, None]
        self.positions = shared_positions(block, OFFSET)
        if mask == "full":
            self.positions = (real.cumsum(1) - 1).clamp(min=0)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        allowed = random_blocks(self.block, self.generator) if self.random else self.allowed
        # A row of padding has nothing to see: it may see everything, and nobody sees it.
        allowed = (allowed | (self.block < 0)[:, :, None])[:, None]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, enable_gqa=True
        )


# Readers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a reader of one layer is given: projections of document and signal tokens, and their inputs.

    Attributes:
        inputs, signal_inputs: normalised states that enter the layer, of document tokens (padded on the
            right) and of the signal tokens.
        key, query: the model's own projections of them, before the rotary embedding.
        turn, signal_turn: cosine and sine of each one's position.
        document: number of each document token's document, -1 for padding.
    """

    inputs: Float[Tensor, "prompts tokens width"]
    signal_inputs: Float[Tensor, "prompts signals width"]
    key: Float[Tensor, "prompts tokens key_width"]
    query: Float[Tensor, "prompts signals query_width"]
    turn: Float[Tensor, "prompts tokens 2 dim"]
    signal_turn: Float[Tensor, "prompts signals 2 dim"]
    document: Int[Tensor, "prompts tokens"]

    def __getitem__(self, index: Tensor) -> Seen:
        return Seen(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.document)


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[Sequence[int]]],
    mask: str,
    layers: Sequence[int],
    seed: int,
    batch: int = 8,
) -> dict[int, Seen]:
    """What readers of `layers` are given of all prompts under one mask; longest prompts last."""
    order = sorted(range(len(prompts)), key=lambda i: sum(map(len, prompts[i])))
    generator = Generator().manual_seed(seed)
    parts: dict[int, list[Seen]] = {layer: [] for layer in layers}
    for rows in torch.tensor(order).split(batch):
        ids, block = joined([prompts[i] for i in rows.tolist()])
        attend = Masked(mask, block, generator)
        states = states_entering(model, ids, attend.positions, attend, layers)
        for layer, entering in states.items():
            parts[layer].append(_seen(model, layer, entering, block, attend.positions))
    back = torch.tensor(order).argsort()
    return {layer: _together(seen)[back] for layer, seen in parts.items()}


def _seen(
    model: PreTrainedModel, number: int, states: Tensor, block: Tensor, positions: Tensor
) -> Seen:
    layer = model.model.layers[number]
    last = block.amax(1, keepdim=True)
    document = torch.where((block > 0) & (block < last), block - 1, -1)
    # Document tokens first, in order, then the rest, which is cut off as far as possible.
    chosen = (document < 0).long().argsort(dim=1, stable=True)
    chosen = chosen[:, : int((document >= 0).sum(1).max())]
    document = document.gather(1, chosen)
    rows = torch.arange(len(block))[:, None]
    turn = torch.stack(model.model.rotary_emb(states.float(), positions), 2)
    normed = layer.input_layernorm(states)
    inputs, signals = normed[rows, chosen], normed[:, -SIGNALS:]
    key, query = layer.self_attn.k_proj(inputs), layer.self_attn.q_proj(signals)
    return Seen(inputs, signals, key, query, turn[rows, chosen], turn[:, -SIGNALS:], document)


def _together(parts: Sequence[Seen]) -> Seen:
    """Batches behind each other, padded to the longest."""
    longest = max(part.document.shape[1] for part in parts)

    def one(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        if name in ("inputs", "key", "turn", "document"):
            fill = -1 if name == "document" else 0
            sizes = [longest - x.shape[1] for x in tensors]
            tensors = [
                F.pad(x, (0, 0) * (x.dim() - 2) + (0, size), value=fill)
                for x, size in zip(tensors, sizes, strict=True)
            ]
        return torch.cat(tensors)

    return Seen(*map(one, Seen.__dataclass_fields__))


class Reader(nn.Module):
    """Scores documents by a layer's attention, with low-rank changes of W_q and W_k.

    Starts at the model's own attention: the second factor of each change is 0.

    Args:
        seen: an example of what it will be given, for the widths.
        heads, key_heads: of the layer.
        documents: N.
        rank: of both changes.
        generator: of the first factors.
    """

    def __init__(
        self, seen: Seen, heads: int, key_heads: int, documents: int, rank: int, generator: Generator
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.documents = heads, key_heads, documents
        width = seen.inputs.shape[-1]

        def factors(outputs: int) -> nn.ParameterList:
            first = torch.randn(width, rank, generator=generator) / width**0.5
            return nn.ParameterList([first, torch.zeros(rank, outputs)])

        self.query, self.key = factors(seen.query.shape[-1]), factors(seen.key.shape[-1])

    def by_head(self, seen: Seen) -> Float[Tensor, "prompts heads documents"]:
        """S of every head."""
        query = seen.query.float() + seen.signal_inputs.float() @ self.query[0] @ self.query[1]
        key = seen.key.float() + seen.inputs.float() @ self.key[0] @ self.key[1]
        return head_scores(
            _turned(query, self.heads, seen.signal_turn),
            _turned(key, self.key_heads, seen.turn),
            seen.document,
            self.documents,
        )

    def forward(self, seen: Seen) -> Float[Tensor, "prompts documents"]:
        """S, mean over heads and signal tokens."""
        return self.by_head(seen).mean(1)


def _turned(x: Tensor, heads: int, turn: Tensor) -> Float[Tensor, "prompts heads tokens dim"]:
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    cosine, sine = turn[:, None, :, 0], turn[:, None, :, 1]
    return x * cosine + rotate_half(x) * sine


def fit_reader(
    reader: Reader, seen: Seen, right: Int[Tensor, " prompts"], plan: TrainingPlan, batches: Iterator
) -> TrainingLog:
    """Train a reader by L_aux on batches of positions among the prompts."""
    positive = F.one_hot(right, reader.documents).bool()

    def loss(reader: Reader, rows: Tensor) -> Tensor:
        return auxiliary_loss(reader(seen[rows]), positive[rows], TEMPERATURE)

    return train(reader, batches, loss, plan)
