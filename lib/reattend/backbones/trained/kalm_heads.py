"""Linear heads trained by every loss of KaLM-Embedding, many seeds each.

The task is to find the definition of a noun (`reattend.data.retrieval.word_glosses`) by fixed vectors, means
of MiniLM's input word pieces, without an encoder. A head is a linear map of them, trained in two
seconds. A seed draws training pairs, negatives, batches and mixtures, the same for all of its arms. The
teacher is another and larger model, all-mpnet-base-v2.

Files: `texts.json`, `vectors.safetensors` and `heads.safetensors`; see `load`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from reattend.backbones.pretrained import minilm, mpnet
from reattend.backbones.store import backbone_path
from reattend.data.retrieval import word_glosses
from reattend.text_matching.kalm_embedding import (
    add_own,
    distillation_loss,
    focal_weights,
    list_weights,
    matryoshka_loss,
    mine_negatives,
    mix,
    pair_weights,
    weighted_loss,
)
from reattend.training.contrastive import (
    answer_log_probability,
    cosine_logits,
    counted_candidates,
)
from reattend.training.loop import TrainingLog, TrainingPlan, train
from reattend.trunks.encoders import (
    BiEncoder,
    TextEncoder,
    index_batches,
    tokenise,
)

BATCH, MINED, RANKS = 64, 7, (5, 55)
TEMPERATURE = 0.05
SIDES = ("train", "validation", "test")
PARTS = ("queries", "documents", "taught_queries", "taught_documents")


# Heads --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One loss.

    Attributes:
        rate: learning rate at the start, tuned for this arm on other seeds.
        gamma: of the focal weights.
        permuted: whether the weights change places in the batch.
        more: further negatives: none, a query's own "mixed" ones or the pair-wise ones of them ("pairs"), or
            as many "duplicates" of its mined ones.
        contrast, distil: what the contrastive loss and that of distillation count for.
        teacher: its "own" probabilities, or those of the wrong candidates "dealt" anew.
        temperature, soft: of the contrastive loss, and of distillation.
        matryoshka: whether slices are trained too.
        steps: as many times the steps of the setting.
        on_axes: whether the head starts at a rotation onto the principal axes instead of the identity. That
            changes no cosine, but the first numbers then hold most.
    """

    rate: float
    gamma: float = 0.0
    permuted: bool = False
    more: Literal["", "mixed", "pairs", "duplicates"] = ""
    contrast: float = 1.0
    distil: float = 0.0
    teacher: Literal["own", "dealt"] = "own"
    temperature: float = TEMPERATURE
    soft: float = 0.05
    matryoshka: bool = False
    steps: int = 1
    on_axes: bool = False


@dataclass(frozen=True)
class Pairs:
    """Fixed vectors of queries and of their documents, and the teacher's."""

    queries: Float[Tensor, "pairs width"]
    documents: Float[Tensor, "pairs width"]
    taught_queries: Float[Tensor, "pairs taught"]
    taught_documents: Float[Tensor, "pairs taught"]

    def __getitem__(self, rows: Tensor | slice) -> Pairs:
        return Pairs(*(getattr(self, name)[rows] for name in PARTS))


@dataclass(frozen=True)
class Draw:
    """What a seed draws: training pairs, and the mined negatives of each."""

    pairs: Pairs
    negatives: Int[Tensor, "pairs mined"]


def draw(pool: Pairs, count: int, seed: int) -> Draw:
    """`count` pairs of the pool, with negatives that the untrained vectors rank 6th to 55th."""
    generator = Generator().manual_seed(seed)
    pairs = pool[torch.randperm(len(pool.queries), generator=generator)[:count]]
    scores = F.normalize(pairs.queries, dim=-1) @ F.normalize(pairs.documents, dim=-1).T
    return Draw(pairs, mine_negatives(scores, torch.arange(count), MINED, RANKS, generator))


def dims_of(width: int) -> tuple[int, ...]:
    """Slices of Matryoshka: the width halved four times."""
    return tuple(width // 2**k for k in range(5))


SLICE_WEIGHTS = (1.0, 0.3, 0.2, 0.1, 0.1)


class Batch:
    """One batch with what is drawn for it; the losses of an arm on what a head makes of it."""

    def __init__(self, drawn: Draw, rows: Int[Tensor, " batch"], generator: Generator) -> None:
        mined = drawn.negatives[rows]
        self.pairs, self.rows = drawn.pairs, rows
        self.candidates = torch.cat([rows, mined.flatten()])
        self.counted = counted_candidates(rows, mined)
        self.queries = drawn.pairs.queries[rows]
        self.documents = drawn.pairs.documents[self.candidates]
        self.pair = pair_weights(len(rows), MINED, generator)
        self.order = torch.randperm(len(rows), generator=generator)
        self.noise_seed = int(torch.randint(2**31, (), generator=generator))

    def loss(self, head: nn.Module, arm: Arm) -> Float[Tensor, ""]:
        """Of one arm, on all slices if it trains them."""
        vectors = head(self.queries), head(self.documents)
        if not arm.matryoshka:
            return self._loss(*vectors, arm)
        dims = dims_of(vectors[0].shape[1])
        return matryoshka_loss(lambda q, d: self._loss(q, d, arm), vectors, dims, SLICE_WEIGHTS)

    def _loss(self, queries: Tensor, documents: Tensor, arm: Arm) -> Float[Tensor, ""]:
        total = queries.new_zeros(())
        if arm.contrast:
            log_p = answer_log_probability(self.logits(queries, documents, arm))
            weights = focal_weights(log_p, arm.gamma)
            if arm.permuted:
                weights = weights[self.order]
            total = total + arm.contrast * weighted_loss(log_p, weights)
        if arm.distil:
            student = cosine_logits(queries, documents, arm.soft, self.counted)
            total = total + arm.distil * distillation_loss(self.teacher_logits(arm), student)
        return total

    def logits(self, queries: Tensor, documents: Tensor, arm: Arm) -> Float[Tensor, "batch all"]:
        """Of the contrastive loss, with an arm's further negatives behind."""
        logits = cosine_logits(queries, documents, arm.temperature, self.counted)
        if not arm.more:
            return logits
        negatives = documents[len(queries) :].unflatten(0, (len(queries), MINED))
        if arm.more == "duplicates":
            weights = F.one_hot(self.pair.topk(2).indices, MINED).to(negatives.dtype)
        elif arm.more == "pairs":
            weights = self.pair[:, None]
        else:
            weights = torch.stack([self.pair, list_weights(queries, negatives)], 1)
        return add_own(logits, queries, mix(negatives, weights), arm.temperature)

    def teacher_logits(self, arm: Arm) -> Float[Tensor, "batch candidates"]:
        """Of the teacher; dealt: the right answer keeps its own, the rest change places among themselves."""
        queries = self.pairs.taught_queries[self.rows]
        documents = self.pairs.taught_documents[self.candidates]
        logits = cosine_logits(queries, documents, arm.soft, self.counted)
        if arm.teacher == "own":
            return logits
        kept = ~self.counted
        kept.diagonal().fill_(True)
        noise = torch.rand(kept.shape, generator=Generator().manual_seed(self.noise_seed))
        # What changes places comes first in both orders, what keeps its place in its own order behind.
        to = kept.int().argsort(dim=1, stable=True)
        of = noise.masked_fill(kept, 2.0).argsort(dim=1, stable=True)
        return logits.scatter(1, to, logits.gather(1, of))


def head_batches(drawn: Draw, seed: int) -> Iterator[Batch]:
    """Endless batches of a draw, the same for every arm of a seed."""
    generator = Generator().manual_seed(10_000 + seed)
    for rows in index_batches(len(drawn.negatives), BATCH, seed):
        yield Batch(drawn, rows, generator)


def untrained_head(width: int) -> nn.Linear:
    """The identity."""
    head = nn.Linear(width, width, bias=False)
    nn.init.eye_(head.weight)
    return head


def principal_axes(
    vectors: Float[Tensor, "items width"],
) -> Float[Tensor, "width width"]:
    """Rows: the axes on which unit vectors are largest, the largest first, about the origin as cosines are."""
    unit = F.normalize(vectors, dim=-1).double()
    return torch.linalg.eigh(unit.T @ unit).eigenvectors.flip(1).T.to(vectors.dtype).contiguous()


def fit_head(drawn: Draw, arm: Arm, steps: int, seed: int) -> tuple[nn.Linear, TrainingLog]:
    """A head trained by one arm on the draw of a seed."""
    head = untrained_head(drawn.pairs.queries.shape[1])
    if arm.on_axes:
        head.weight.data = principal_axes(drawn.pairs.documents)
    plan = TrainingPlan(arm.steps * steps, arm.rate, weight_decay=0.0, fused=True)
    return head, train(head, head_batches(drawn, seed), lambda h, b: b.loss(h, arm), plan)


# Vectors ------------------------------------------------------------------------------------------


LENGTH = 32  # tokens of a text


@torch.no_grad()
def piece_means(
    tokenizer: PreTrainedTokenizerBase, table: Float[Tensor, "pieces width"], texts: list[str]
) -> Float[Tensor, "texts width"]:
    """Mean of the input vectors of a text's word pieces: a bag of words, without an encoder."""
    rows = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=LENGTH).input_ids
    return torch.stack([table[torch.tensor(row)].mean(0) for row in rows])


@torch.inference_mode()
def taught_vectors(
    tokenizer: PreTrainedTokenizerBase, model, texts: list[str]
) -> Float[Tensor, "texts width"]:
    """The teacher's vectors: means over its last states.

    Texts of similar length are read together, and in the precision of the model's weights. In bfloat16
    all-mpnet-base-v2 takes a quarter of the time, and its vectors have cosines above .9998 with the exact ones.
    """
    encoder = BiEncoder(TextEncoder(model)).eval()
    tokens = tokenise(tokenizer, texts, length=LENGTH)
    order = tokens.mask.sum(1).argsort(stable=True)
    found = [encoder(tokens[rows]).float() for rows in order.split(32)]
    return torch.cat(found)[order.argsort()]


# The build ----------------------------------------------------------------------------------------

ARMS = {
    "InfoNCE": Arm(3e-4),
    "focal": Arm(3e-4, gamma=0.5),
    "permuted weights": Arm(3e-4, gamma=0.5, permuted=True),
    "mixing": Arm(3e-4, more="mixed"),
    "duplicates": Arm(3e-4, more="duplicates"),
    "KL": Arm(6e-4, contrast=0.0, distil=1.0),
    "CL + KL": Arm(3e-4, distil=1.0),
    "CL + KL, dealt": Arm(3e-4, distil=0.03, teacher="dealt"),
    "InfoNCE on axes": Arm(6e-4, on_axes=True),
    "Matryoshka on axes": Arm(6e-4, matryoshka=True, on_axes=True),
    "InfoNCE, twice the steps": Arm(3e-4, steps=2),
}
"""Trained with the seeds of the setting; DISTILLED with the further seeds too."""
DISTILLED = ("InfoNCE", "KL", "CL + KL")
"""What the claim about distillation compares: heads whose seeds differ most."""
MORE_ARMS = {
    "pair-wise mixtures": Arm(3e-4, more="pairs"),
    "InfoNCE at .01": Arm(1e-4, temperature=0.01),
    "focal at .01": Arm(1e-4, gamma=0.5, temperature=0.01),
    "KL, twice the steps": Arm(6e-4, contrast=0.0, distil=1.0, steps=2),
    "KL at .01": Arm(3e-4, contrast=0.0, distil=1.0, soft=0.01),
    "KL at .2": Arm(6e-4, contrast=0.0, distil=1.0, soft=0.2),
    "focal + mixing + KL": Arm(3e-4, gamma=0.5, more="mixed", distil=1.0),
    "mixing + KL": Arm(3e-4, more="mixed", distil=1.0),
    "focal + KL": Arm(3e-4, gamma=0.5, distil=1.0),
    "focal + mixing": Arm(3e-4, gamma=0.5, more="mixed"),
}
"""Trained with the first seeds only, for tables and the plateau of KL."""


@dataclass(frozen=True)
class Setting:
    """How much is trained in one profile.

    Attributes:
        pool: pairs that the seeds draw from, and that the teacher reads.
        drawn: pairs of one seed.
        asked: queries to validate, and as many to test.
        steps: of training.
        seeds, further, few: of ARMS, further ones of DISTILLED, and of MORE_ARMS; the first is FIRST_SEED.
        teacher_layers: of all-mpnet-base-v2.
    """

    pool: int
    drawn: int
    asked: int
    steps: int
    seeds: int
    further: int
    few: int
    teacher_layers: int = mpnet.LAYERS


FIRST_SEED = 12  # the seeds before it were looked at under another teacher
SETTINGS = {
    "smoke": Setting(120, 80, 40, 2, 3, 1, 3, 2),
    "cpu": Setting(5_000, 2_000, 1_000, 300, 5, 7, 3),
    "gpu": Setting(10_000, 2_000, 2_000, 300, 32, 0, 8),
}


def arms_of(seed: int, setting: Setting) -> dict[str, Arm]:
    """What is trained with a seed."""
    number = seed - FIRST_SEED
    if number >= setting.seeds:
        return {name: ARMS[name] for name in DISTILLED}
    return ARMS | (MORE_ARMS if number < setting.few else {})


@dataclass(frozen=True)
class Heads:
    """All that was trained in a profile.

    Attributes:
        queries, documents: texts of "train", "validation" and "test".
        pairs: their fixed vectors and the teacher's.
        heads: by arm and seed.
    """

    queries: dict[str, list[str]]
    documents: dict[str, list[str]]
    pairs: dict[str, Pairs]
    heads: dict[tuple[str, int], nn.Linear]


def build(target: Path, profile: str) -> None:
    """Train all heads of a profile and write them into the empty directory `target`."""
    setting = SETTINGS[profile]
    counts = dict(zip(SIDES, (setting.pool, setting.asked, setting.asked), strict=True))
    sets = {side: word_glosses(side, count) for side, count in counts.items()}
    tokenizer, model = minilm.load()
    table = model.embeddings.word_embeddings.weight.detach()
    teacher_tokenizer, teacher = mpnet.load(setting.teacher_layers)
    teacher.bfloat16()
    pairs, tensors = {}, {}
    for side, found in sets.items():
        texts = [list(part) for part in (found.queries, found.documents)]
        fixed = [piece_means(tokenizer, table, part) for part in texts]
        taught = [taught_vectors(teacher_tokenizer, teacher, part) for part in texts]
        pairs[side] = Pairs(*fixed, *taught)
        tensors |= {f"{side}/{n}": getattr(pairs[side], n).contiguous() for n in PARTS}
    print(f"vectors of {sum(counts.values())} pairs", flush=True)
    heads = {}
    for seed in range(FIRST_SEED, FIRST_SEED + setting.seeds + setting.further):
        drawn = draw(pairs["train"], setting.drawn, seed)
        for name, arm in arms_of(seed, setting).items():
            head, _ = fit_head(drawn, arm, setting.steps, seed)
            heads[f"{name}/{seed}"] = head.weight.detach().clone()
        print(f"seed {seed}: {len(heads)} heads so far", flush=True)
    save_file(heads, target / "heads.safetensors")
    save_file(tensors, target / "vectors.safetensors")
    texts = {side: [found.queries, found.documents] for side, found in sets.items()}
    (target / "texts.json").write_text(json.dumps(texts), encoding="utf8")


def load(profile: str = "cpu") -> Heads:
    """All heads of a profile with their data; builds them first when they are missing."""
    directory = backbone_path("kalm_heads", profile)
    texts = json.loads((directory / "texts.json").read_text(encoding="utf8"))
    vectors = load_file(directory / "vectors.safetensors")
    heads = {}
    for key, weight in load_file(directory / "heads.safetensors").items():
        arm, _, seed = key.rpartition("/")
        heads[arm, int(seed)] = untrained_head(len(weight))
        heads[arm, int(seed)].weight = nn.Parameter(weight, requires_grad=False)
    return Heads(
        {side: parts[0] for side, parts in texts.items()},
        {side: parts[1] for side, parts in texts.items()},
        {side: Pairs(*(vectors[f"{side}/{part}"] for part in PARTS)) for side in SIDES},
        heads,
    )
