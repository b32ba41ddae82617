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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import rotate_half

from reattend.attention.dense import causal_sdpa, causal_token_mask, dense_attention
from reattend.backbones.pretrained import minilm, smollm2
from reattend.backbones.store import backbone_path
from reattend.backbones.trained.crosstune import SentenceEncoder
from reattend.data.verse_lists import NestedLists, VerseList, nested_lists, verse_lists
from reattend.text_matching.blockrank import (
    auxiliary_loss,
    head_scores,
    shared_positions,
    states_entering,
    visible,
)
from reattend.training.loop import TrainingLog, TrainingPlan, train
from reattend.trunks.encoders import index_batches

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
        self.plain = mask == "full" and bool(real.all())  # has a faster kernel
        self.allowed = visible(block)
        if mask == "full":
            self.allowed = causal_token_mask(*[block.shape[1]] * 2) & real[:, None]
        self.positions = shared_positions(block, OFFSET)
        if mask == "full":
            self.positions = (real.cumsum(1) - 1).clamp(min=0)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.plain:
            return causal_sdpa(query, key, value)
        allowed = random_blocks(self.block, self.generator) if self.random else self.allowed
        # A row of padding has nothing to see: it may see everything, and nobody sees it.
        allowed = (allowed | (self.block < 0)[:, :, None])[:, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)


# Readers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a reader of one layer is given: projections of document and signal tokens, and their inputs.

    Attributes:
        inputs, signal_inputs: normalised states that enter the layer, of document tokens (padded on the
            right) and of the signal tokens.
        key, query: the model's own projections of them, turned by their positions.
        turn, signal_turn: cosine and sine of each one's position.
        document: number of each document token's document, -1 for padding.
    """

    inputs: Float[Tensor, "prompts tokens width"]
    signal_inputs: Float[Tensor, "prompts signals width"]
    key: Float[Tensor, "prompts tokens key_heads dim"]
    query: Float[Tensor, "prompts signals query_heads dim"]
    turn: Float[Tensor, "prompts tokens 2 dim"]
    signal_turn: Float[Tensor, "prompts signals 2 dim"]
    document: Int[Tensor, "prompts tokens"]

    def __getitem__(self, index: Tensor) -> Seen:
        """Of some prompts; twice as fast as indexing."""
        return Seen(*(getattr(self, n).index_select(0, index) for n in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.document)

    @property
    def documents(self) -> int:
        """N, the same in every prompt."""
        return int(self.document.max()) + 1


@torch.no_grad()
def read(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[Sequence[int]]],
    mask: str,
    layers: Sequence[int],
    seed: int,
    names: Int[Tensor, " documents"] | None = None,
    batch: int = 8,
) -> tuple[dict[int, Seen], Float[Tensor, "prompts documents"] | None]:
    """What readers of `layers` are given of all prompts under one mask; the model's own answer, if asked for.

    Args:
        seed: of the random blocks.
        names: token ids of the documents' numbers, whose logits as the next token are wanted.
    """
    generator, end = Generator().manual_seed(seed), len(model.model.layers)
    parts: dict[int, list[Seen]] = {layer: [] for layer in layers}
    logits = []
    order = torch.tensor([sum(map(len, p)) for p in prompts]).argsort(stable=True)
    for rows in order.split(batch):
        ids, block = joined([prompts[i] for i in rows.tolist()])
        attend = Masked(mask, block, generator)
        asked = layers if names is None else [*layers, end]
        states = states_entering(model, ids, attend.positions, attend, asked)
        for layer in layers:
            parts[layer].append(_seen(model, layer, states[layer], block, attend.positions))
        if names is not None:
            last = model.model.norm(states[end][:, -1]).float()
            logits.append(last @ model.lm_head.weight[names].float().T)
    back = order.argsort()
    seen = {layer: _together(of_layer)[back] for layer, of_layer in parts.items()}
    return seen, torch.cat(logits)[back] if logits else None


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
    turns = turn[rows, chosen], turn[:, -SIGNALS:]
    normed = layer.input_layernorm(states)
    inputs = normed[rows, chosen], normed[:, -SIGNALS:]
    projections = layer.self_attn.k_proj(inputs[0]), layer.self_attn.q_proj(inputs[1])
    key, query = (
        _turned(x.float().unflatten(-1, (-1, layer.self_attn.head_dim)), of_x)
        for x, of_x in zip(projections, turns, strict=True)
    )
    return Seen(*inputs, key, query, *turns, document)


def _turned(x: Tensor, turn: Tensor) -> Float[Tensor, "prompts tokens heads dim"]:
    cosine, sine = turn[:, :, None, 0], turn[:, :, None, 1]
    return x * cosine + rotate_half(x) * sine


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


class Together:
    """Prompts of one instruction under the block mask, read at once.

    What a document's tokens become does not depend on the list that it stands in, so a document (with
    its number) that several prompts hold is read once; each prompt has a query segment of its own, which
    sees the documents of that prompt. The attention of a layer, as for `states_entering`.

    Attributes:
        ids, positions: instruction, all documents padded on the left to one length, all query segments.
        rows, blocks: of each prompt, which of these tokens are its own, in its order, and their block numbers.
    """

    def __init__(self, prompts: Sequence[Sequence[Sequence[int]]]) -> None:
        instruction = list(prompts[0][0])
        documents = list(dict.fromkeys(tuple(d) for prompt in prompts for d in prompt[1:-1]))
        number = {document: i for i, document in enumerate(documents)}
        self.first, self.length = len(instruction), max(map(len, documents))
        self.real = torch.tensor(
            [[False] * (self.length - len(d)) + [True] * len(d) for d in documents]
        )
        self.end = self.first + self.real.numel()
        ids = instruction + [t for d in documents for t in (*[0] * (self.length - len(d)), *d)]
        within = (self.real.cumsum(1) - 1 + self.first).masked_fill(~self.real, 0)
        positions = [torch.arange(self.first), within.flatten()]
        place = torch.arange(self.first, self.end).unflatten(0, self.real.shape)
        self.rows, self.blocks = [], []
        for prompt in prompts:
            held = [place[number[tuple(d)]][self.real[number[tuple(d)]]] for d in prompt[1:-1]]
            segment = torch.arange(len(ids), len(ids) + len(prompt[-1]))
            self.rows.append(torch.cat([torch.arange(self.first), *held, segment]))
            sizes = torch.tensor([len(block) for block in prompt])
            self.blocks.append(torch.arange(len(prompt)).repeat_interleave(sizes)[None])
            ids += prompt[-1]
            positions.append(OFFSET + torch.arange(len(prompt[-1])))
        self.ids, self.positions = torch.tensor([ids]), torch.cat(positions)[None]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first, end = slice(None, self.first), slice(self.first, self.end)
        count = len(self.real)

        def apart(x: Tensor) -> Float[Tensor, "documents heads tokens dim"]:
            return x[0, :, end].unflatten(1, (count, -1)).transpose(0, 1)

        def seen(x: Tensor) -> Float[Tensor, "documents heads tokens dim"]:
            return torch.cat([x[:, :, first].expand(count, -1, -1, -1), apart(x)], 2)

        own = causal_token_mask(self.length, self.length) & self.real[:, None]
        mask = F.pad(own, (self.first, 0), value=True) | ~self.real[..., None]
        of_documents = F.scaled_dot_product_attention(
            apart(query), seen(key), seen(value), attn_mask=mask[:, None], enable_gqa=True
        )
        output = [
            causal_sdpa(*(x[:, :, first] for x in (query, key, value))),
            of_documents.transpose(0, 1).flatten(1, 2)[None],
        ]
        for rows, block in zip(self.rows, self.blocks, strict=True):
            size = int((block == block.max()).sum())
            own = rows[-size:], rows, rows
            output.append(
                causal_sdpa(*(x[:, :, i] for x, i in zip((query, key, value), own, strict=True)))
            )
        return torch.cat(output, 2)


@torch.no_grad()
def read_together(
    model: PreTrainedModel, prompts: Sequence[Sequence[Sequence[int]]], layer: int
) -> list[Seen]:
    """What a reader of `layer` is given of each prompt under the block mask; see `Together`."""
    attend = Together(prompts)
    states = states_entering(model, attend.ids, attend.positions, attend, [layer])[layer]
    return [
        _seen(model, layer, states[:, rows], block, attend.positions[:, rows])
        for rows, block in zip(attend.rows, attend.blocks, strict=True)
    ]


class Reader(nn.Module):
    """Scores documents by a layer's attention, with low-rank changes of W_q and W_k.

    Starts at the model's own attention: the second factor of each change is 0.

    Args:
        seen: an example of what it will be given, for the widths and heads.
        rank: of both changes.
        generator: of the first factors.
    """

    def __init__(self, seen: Seen, rank: int, generator: Generator) -> None:
        super().__init__()
        width = seen.inputs.shape[-1]

        def factors(projected: Tensor) -> nn.ParameterList:
            heads, dim = projected.shape[2:]
            first = torch.randn(width, rank, generator=generator) / width**0.5
            return nn.ParameterList([first, torch.zeros(heads, rank, dim)])

        self.query, self.key = factors(seen.query), factors(seen.key)

    def by_head(self, seen: Seen) -> Float[Tensor, "prompts heads documents"]:
        """S of every head."""
        query = seen.query + _change(seen.signal_inputs, *self.query, seen.signal_turn)
        key = seen.key + _change(seen.inputs, *self.key, seen.turn)
        return head_scores(
            query.transpose(1, 2),
            key.transpose(1, 2),
            seen.document,
            seen.documents,
        )

    def forward(self, seen: Seen) -> Float[Tensor, "prompts documents"]:
        """S, mean over heads and signal tokens."""
        return self.by_head(seen).mean(1)


def _change(
    inputs: Tensor, first: Tensor, second: Tensor, turn: Tensor
) -> Float[Tensor, "prompts tokens heads dim"]:
    """What is added to a projection, turned; to turn small factors costs less than to turn all tokens."""
    narrow = (inputs @ first.to(inputs.dtype)).float()
    cosine, sine = turn[:, :, None, 0], turn[:, :, None, 1]
    straight, half = (
        (narrow @ factor.transpose(0, 1).flatten(1)).unflatten(-1, second.shape[::2])
        for factor in (second, rotate_half(second))
    )
    return cosine * straight + sine * half


def fit_reader(
    reader: Reader,
    seen: Seen,
    right: Int[Tensor, " prompts"],
    plan: TrainingPlan,
    batches: Iterator,
) -> TrainingLog:
    """Train a reader by L_aux on batches of positions among the prompts."""
    positive = F.one_hot(right, seen.documents).bool()

    def loss(reader: Reader, rows: Tensor) -> Tensor:
        return auxiliary_loss(reader(seen[rows]), positive[rows], TEMPERATURE)

    return train(reader, batches, loss, plan)


# Where the dense model looks ------------------------------------------------------------------------


class Shares:
    """Causal attention on one prompt that notes, layer by layer, where its rows look.

    Attributes:
        between: a layer, a row: attention of document tokens to other documents as a share of that to
            own and other documents, over the same share of uniform causal attention; for the documents,
            and for pseudo-documents that begin and end half a document later.
        segments: a layer, a row: mean attention of document tokens to the first token, the rest of the
            instruction, the own and the other documents; then of the signal tokens to the first token,
            the rest of the instruction, the right document, the others and the query segment.
    """

    def __init__(self, block: Int[Tensor, " tokens"], right: int) -> None:
        self.block, self.last, self.right = block, int(block.max()), right
        sizes = block.bincount()
        within = torch.cat([torch.arange(size) for size in sizes.tolist()])
        document = (block > 0) & (block < self.last)
        later = (2 * within >= sizes[block]) & document
        self.parts = [
            torch.where(document, block, 0),
            torch.where(document, block + later.long(), 0),
        ]
        self.uniform = [self._other_share(_uniform(len(block)), part) for part in self.parts]
        self.between: list[list[float]] = []
        self.segments: list[list[float]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, weights = dense_attention(query, key, value, causal=True, return_weights=True)
        mean = weights[0].mean(0)
        shares = [self._other_share(mean, part) for part in self.parts]
        self.between.append([s / u for s, u in zip(shares, self.uniform, strict=True)])
        self.segments.append(self._segments(mean))
        return output

    def _other_share(self, weights: Tensor, part: Int[Tensor, " tokens"]) -> float:
        among = weights * ((part > 0)[:, None] & (part > 0))
        own = (among * (part[:, None] == part)).sum()
        return float(1 - own / among.sum())

    def _segments(self, weights: Tensor) -> list[float]:
        mass = weights @ F.one_hot(self.block, self.last + 1).to(weights.dtype)
        sink = weights[:, 0]
        document = self.parts[0] > 0
        own = mass.gather(1, self.block[:, None])[:, 0]
        every = mass[:, 1 : self.last].sum(1)
        right = mass[:, self.right + 1]
        of_documents = [sink, mass[:, 0] - sink, own, every - own]
        of_signals = [sink, mass[:, 0] - sink, right, every - right, mass[:, self.last]]
        return [x[document].mean().item() for x in of_documents] + [
            x[-SIGNALS:].mean().item() for x in of_signals
        ]


def _uniform(tokens: int) -> Float[Tensor, "tokens tokens"]:
    seen = causal_token_mask(tokens, tokens).float()
    return seen / seen.sum(1, keepdim=True)


@torch.no_grad()
def shares(
    model: PreTrainedModel, prompts: Sequence[Sequence[Sequence[int]]], lists: Sequence[VerseList]
) -> tuple[Float[Tensor, "prompts layers 2"], Float[Tensor, "prompts layers 9"]]:
    """`between` and `segments` of every layer of the dense model (see `Shares`), prompt by prompt."""
    between, segments = [], []
    for prompt, item in zip(prompts, lists, strict=True):
        ids, block = joined([prompt])
        noted = Shares(block[0], item.right)
        places = torch.arange(ids.shape[1])[None]
        states_entering(model, ids, places, noted, [len(model.model.layers)])
        between.append(noted.between)
        segments.append(noted.segments)
    return torch.tensor(between), torch.tensor(segments)


# The build ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How much is read and trained in one profile.

    Attributes:
        train, test: prompts.
        documents: N of each.
        looked: test prompts of which all attention is looked at.
        seeds: readers under the full and the block mask; each trains on its own bootstrap draw of the
            training prompts.
        fewer: readers of every other kind.
        nested: queries whose lists grow.
        numbers: of documents in these lists, growing.
        dense_numbers: how many of these numbers are read under the full mask too.
        pool: texts from which their wrong documents are taken.
        layer: l*, under every mask.
        layers: further ones under the full mask.
        rank, steps, learning_rate, batch: of a reader and its training.
    """

    train: int
    test: int
    documents: int
    looked: int
    seeds: int
    fewer: int
    steps: int
    nested: int
    numbers: tuple[int, ...]
    dense_numbers: int
    pool: int = 2_400
    learning_rate: float = 3e-3
    rank: int = 8
    batch: int = 16
    layer: int = 16
    layers: tuple[int, ...] = (6, 11, 26)


SETTINGS = {
    "smoke": Setting(
        train=12,
        test=8,
        documents=4,
        looked=3,
        seeds=3,
        fewer=3,
        steps=4,
        nested=4,
        numbers=(3, 4, 16),
        dense_numbers=3,
        pool=60,
        batch=8,
    ),
    "cpu": Setting(
        train=240,
        test=220,
        documents=8,
        looked=24,
        seeds=8,
        fewer=4,
        steps=150,
        nested=40,
        numbers=(5, 8, 16, 32, 100),
        dense_numbers=4,
    ),
    "gpu": Setting(
        train=4_000,
        test=960,
        documents=8,
        looked=240,
        seeds=16,
        fewer=8,
        steps=1_000,
        nested=480,
        numbers=(5, 8, 16, 32, 100),
        dense_numbers=5,
        batch=32,
    ),
}
DEALT, LONGER = "block, documents at random", "full, twice the steps"
SHUFFLED, AS_IS = "block, another query's segment", "block, as it is"


def arms(setting: Setting) -> dict[str, tuple[str, int]]:
    """Mask and layer of every kind of reader.

    Two kinds are no other mask or layer: one learns to find a document drawn at random, one is trained
    twice as long.
    """
    here = {mask: (mask, setting.layer) for mask in MASKS}
    others = {f"full, layer {layer}": ("full", layer) for layer in setting.layers}
    return here | others | {DEALT: ("block", setting.layer), LONGER: ("full", setting.layer)}


def build(target: Path, profile: str) -> None:
    """Read all prompts, train all readers, and write their scores into the empty directory `target`."""
    setting = SETTINGS[profile]
    model, tokenizer = smollm2.load(dtype=torch.bfloat16)
    lists = verse_lists(setting.train, setting.documents, "train", 0)
    lists += verse_lists(setting.test, setting.documents, "test", 0)
    prompts = [prompt_blocks(tokenizer, item) for item in lists]
    right = torch.tensor([item.right for item in lists])
    tensors: dict[str, Tensor] = {}
    names = torch.tensor(
        [tokenizer.convert_tokens_to_ids(str(n)) for n in range(setting.documents)]
    )
    looked = slice(setting.train, setting.train + setting.looked)
    tensors["between"], tensors["segments"] = shares(model, prompts[looked], lists[looked])
    drawn = [_draw(setting, seed) for seed in range(setting.seeds)]
    tensors["drawn"] = torch.stack([d.bincount(minlength=setting.train) for d in drawn])
    kinds, readers = arms(setting), {}
    for mask in MASKS:
        layers = sorted({layer for other, layer in kinds.values() if other == mask})
        seen, answers = _read_all(model, prompts, mask, layers, names, setting.train)
        if answers is not None:
            tensors["decoded"] = answers
        print(f"{mask}: read", flush=True)
        for arm, (_, layer) in ((a, k) for a, k in kinds.items() if k[0] == mask):
            of_arm = drawn if arm in MASKS[:2] else drawn[: setting.fewer]
            readers[arm], losses = _readers(arm, seen[layer], right, of_arm, setting)
            tensors[f"{arm}/scores"] = torch.stack([_outputs(r, seen[layer]) for r in readers[arm]])
            tensors[f"{arm}/losses"] = losses
            as_it_is = Reader(seen[layer], setting.rank, Generator().manual_seed(0))
            tensors[f"{arm}/untrained"] = _outputs(as_it_is.by_head, seen[layer])
            if (arm, layer) == ("block", setting.layer):
                readers[AS_IS] = [as_it_is]
            print(f"{arm}: trained", flush=True)
    encode = SentenceEncoder(*minilm.load())
    nested, tensors["minilm"] = nested_lists(
        setting.nested, setting.numbers, "test", 1, encode, pool=setting.pool
    )
    tensors |= _scores_by_number(model, tokenizer, nested, readers, setting)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "scores.safetensors")
    facts = {"lists": [asdict(i) for i in lists], "nested": [asdict(i) for i in nested]}
    (target / "lists.json").write_text(json.dumps(facts), encoding="utf8")


def _read_all(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[Sequence[int]]],
    mask: str,
    layers: Sequence[int],
    names: Int[Tensor, " documents"],
    train: int,
) -> tuple[dict[int, Seen], Float[Tensor, "test documents"] | None]:
    """`read`; under the full mask test prompts are answered as well, and prompts are read one by one.

    Without padding dense attention has a faster kernel.
    """
    if mask != "full":
        return read(model, prompts, mask, layers, seed=0)
    seen, _ = read(model, prompts[:train], mask, layers, seed=0, batch=1)
    more, answers = read(model, prompts[train:], mask, layers, seed=0, names=names, batch=1)
    return {layer: _together([seen[layer], more[layer]]) for layer in layers}, answers


def _scores_by_number(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    nested: Sequence[NestedLists],
    readers: Mapping[str, Sequence[Reader]],
    setting: Setting,
) -> dict[str, Float[Tensor, "readers queries documents"]]:
    """S of nested lists by readers trained at one length, "arm/at number".

    Under the block mask also by readers whose query segment asks the next query in place of the own (the
    instruction and the documents are as they were), and by the layer's attention as it is.
    """
    found: dict[str, list[Tensor]] = {}

    def note(arm: str, seen: Seen, by: Sequence[Reader]) -> None:
        scores = torch.stack([_outputs(reader, seen)[0] for reader in by])
        found.setdefault(f"{arm}/at {seen.documents}", []).append(scores)

    for item, other in zip(nested, [*nested[1:], nested[0]], strict=True):
        lists = [prompt_blocks(tokenizer, item.at(number)) for number in setting.numbers]
        segment = prompt_blocks(tokenizer, other.at(setting.numbers[0]))[-1]
        shuffled = [[*prompt[:-1], segment] for prompt in lists]
        seen = read_together(model, [*lists, *shuffled], setting.layer)
        for own, another in zip(seen[: len(lists)], seen[len(lists) :], strict=True):
            for arm in ("block", DEALT, AS_IS):
                note(arm, own, readers[arm])
            note(SHUFFLED, another, readers["block"])
        for prompt in lists[: setting.dense_numbers]:
            dense, _ = read(model, [prompt], "full", [setting.layer], seed=0)
            note("full", dense[setting.layer], readers["full"])
    return {name: torch.stack(scores, 1) for name, scores in found.items()}


def _draw(setting: Setting, seed: int) -> Int[Tensor, " train"]:
    """A bootstrap draw of the training prompts."""
    generator = Generator().manual_seed(seed)
    return torch.randint(setting.train, (setting.train,), generator=generator)


def _readers(
    arm: str,
    seen: Seen,
    right: Int[Tensor, " prompts"],
    drawn: Sequence[Int[Tensor, " train"]],
    setting: Setting,
) -> tuple[list[Reader], Float[Tensor, "seeds steps"]]:
    """One trained reader a draw, and the losses of each."""
    steps = setting.steps * (2 if arm == LONGER else 1)
    plan = TrainingPlan(steps, setting.learning_rate, weight_decay=0.0, warmup=steps // 10)
    readers, losses = [], []
    for seed, rows in enumerate(drawn):
        generator = Generator().manual_seed(seed)
        reader = Reader(seen, setting.rank, generator)
        target = right
        if arm == DEALT:
            target = torch.randint(setting.documents, target.shape, generator=generator)
        order = index_batches(setting.train, setting.batch, seed)
        batches = (rows[index] for index in order)
        losses.append(fit_reader(reader, seen, target, plan, batches).losses)
        readers.append(reader)
    return readers, torch.tensor(losses)


@torch.no_grad()
def _outputs(score: Callable[[Seen], Tensor], seen: Seen) -> Tensor:
    return torch.cat([score(seen[rows]) for rows in torch.arange(len(seen)).split(32)])


@dataclass(frozen=True)
class Asked:
    """What was found in a profile; items are training prompts, then test prompts.

    Attributes:
        lists: the prompts' queries and documents.
        train, test: numbers of training prompts and of test prompts.
        scores: by kind of reader (see `arms`), S of every reader.
        untrained: by kind of reader, S of every head of the layer as it is.
        losses: by kind of reader, of every training step.
        drawn: how often each training prompt is in the draw of a seed.
        decoded: logits of the documents' numbers under the full mask, test prompts.
        nested: queries whose lists grow.
        cosines: MiniLM's cosine of each with its right document, then with the others in their order.
        by_number: S of their lists by kind of reader (also SHUFFLED and AS_IS) and number of documents.
        between, segments: see `Shares`, the first test prompts.
    """

    lists: list[VerseList]
    train: int
    test: int
    scores: dict[str, Float[Tensor, "seeds items documents"]]
    untrained: dict[str, Float[Tensor, "items heads documents"]]
    losses: dict[str, Float[Tensor, "seeds steps"]]
    drawn: Int[Tensor, "seeds train"]
    decoded: Float[Tensor, "test documents"]
    nested: list[NestedLists]
    cosines: Float[Tensor, "queries documents"]
    by_number: dict[tuple[str, int], Float[Tensor, "seeds queries documents"]]
    between: Float[Tensor, "looked layers 2"]
    segments: Float[Tensor, "looked layers 9"]


def load(profile: str = "cpu") -> Asked:
    """All that was found in a profile; builds it first when it is missing."""
    directory = backbone_path("blockrank", profile)
    facts = json.loads((directory / "lists.json").read_text(encoding="utf8"))
    lists = [VerseList(f["query"], tuple(f["documents"]), f["right"]) for f in facts["lists"]]
    nested = [
        NestedLists(f["query"], f["right"], *(tuple(f[n]) for n in ("others", "numbers", "places")))
        for f in facts["nested"]
    ]
    tensors = load_file(directory / "scores.safetensors")
    kinds = [name.removesuffix("/scores") for name in tensors if name.endswith("/scores")]
    by_kind = (
        {kind: tensors[f"{kind}/{part}"] for kind in kinds}
        for part in ("scores", "untrained", "losses")
    )
    grown = [name for name in tensors if "/at " in name]
    by_number = {(n.split("/at ")[0], int(n.split("/at ")[1])): tensors[n] for n in grown}
    setting = SETTINGS[profile]
    return Asked(
        lists,
        setting.train,
        setting.test,
        *by_kind,
        tensors["drawn"],
        tensors["decoded"],
        nested,
        tensors["minilm"],
        by_number,
        tensors["between"],
        tensors["segments"],
    )
