"""What three black boxes say of the texts of CrossTune's study, asked once; nothing is trained.

MiniLM's vectors of five sets and of their label descriptions; all-mpnet-base-v2's vectors of the
questions, for the teacher of the switch; and of SmolLM2, on questions: the state of the last token, the
logits of label words under several prompts, and questions that it writes itself after four examples.

Files: `texts.json` and `vectors.safetensors`; see `load`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from reattend.backbones.pretrained import minilm, mpnet, smollm2
from reattend.backbones.store import backbone_path
from reattend.data.label_texts import descriptions, names, padded_names
from reattend.data.shots import balanced, draw_shots
from reattend.data.texts import (
    TextSet,
    bbc_topics,
    movie_reviews,
    newsgroups,
    sms_spam,
    trec_questions,
)
from reattend.trunks.decoders import pool_tokens
from reattend.trunks.encoders import BiEncoder, TextEncoder, tokenise

SETS: dict[str, Callable[[], TextSet]] = {
    "questions": trec_questions,
    "news": bbc_topics,
    "newsgroups": newsgroups,
    "messages": sms_spam,
    "reviews": movie_reviews,
}
QUESTIONS = "questions"  # the set that is asked of SmolLM2 and of the teacher
LABEL_KINDS = {"descriptions": descriptions, "names": names, "padded names": padded_names}
LENGTH = 40  # tokens of a text or description
CHARACTERS = 400  # of a text, cut before it is tokenised
EXAMPLES = 4  # that SmolLM2 sees when it writes

PROMPTS = (
    "Question: {}\nThe answer is a",
    "{}\nThis question asks for a",
    "Question: {}\nType of answer:",
    "{} Tell me the",
    "Classify the question by what it asks for.\n{}\nIt asks for a",
    "Question: {}\nThe answer is the name of a",
)
WORDS = (
    (" abbreviation", " description", " thing", " person", " place", " number"),
    (" acronym", " definition", " object", " human", " location", " date"),
    (" name", " reason", " animal", " man", " country", " year"),
)


@dataclass(frozen=True)
class Setting:
    """How much is asked in one profile.

    Attributes:
        sets: names of the sets.
        pool, test: texts of each class that shots are drawn from, and of all classes to test on.
        asked_pool, asked_test: the same for what SmolLM2 is asked.
        prompts: of PROMPTS.
        seeds: draws for which SmolLM2 writes, behind those of all other questions.
        per_class: texts that it writes for each class.
        teacher_layers: of all-mpnet-base-v2.
    """

    sets: tuple[str, ...]
    pool: int
    test: int
    asked_pool: int
    asked_test: int
    prompts: int
    seeds: tuple[int, ...]
    per_class: int
    teacher_layers: int = mpnet.LAYERS


SETTINGS = {
    "smoke": Setting((QUESTIONS, "messages"), 24, 48, 16, 12, 2, (3, 4, 5), 2, 2),
    "cpu": Setting(tuple(SETS), 64, 400, 48, 300, len(PROMPTS), tuple(range(24, 72)), 8),
    "gpu": Setting(tuple(SETS), 256, 2_000, 59, 600, len(PROMPTS), tuple(range(48, 96)), 16),
}


@dataclass(frozen=True)
class Asked:
    """A set with what the black boxes said of it.

    Attributes:
        texts, labels: of "pool" and "test".
        vectors: MiniLM's unit vectors of both.
        label_vectors: by kind ("descriptions", "names", "padded names"), unit, mean over tokens; and
            "descriptions, max" with the maximum over tokens.
    """

    texts: dict[str, list[str]]
    labels: dict[str, Int[Tensor, " items"]]
    vectors: dict[str, Float[Tensor, "items width"]]
    label_vectors: dict[str, Float[Tensor, "classes width"]]


@dataclass(frozen=True)
class Questions:
    """What the other two black boxes said of questions.

    Attributes:
        teacher: all-mpnet-base-v2's unit vectors of the pool, read in bfloat16.
        states: SmolLM2's last-token states of its "pool" and "test".
        labels: of those.
        logits: of its label words, [prompts x words, items, classes], for both.
        label_states: its states of the descriptions: "last", "mean" and "max" over tokens.
        written: by draw, what it wrote after that draw's first examples: texts, labels, MiniLM's and
            the teacher's unit vectors.
    """

    teacher: Float[Tensor, "items wide"]
    states: dict[str, Float[Tensor, "items model"]]
    labels: dict[str, Int[Tensor, " items"]]
    logits: dict[str, Float[Tensor, "prompts items classes"]]
    label_states: dict[str, Float[Tensor, "classes model"]]
    written: dict[int, tuple[list[str], Tensor, Tensor, Tensor]]


# Encoders -----------------------------------------------------------------------------------------


class SentenceEncoder:
    """Unit vectors of texts by a frozen sentence encoder, in batches of similar length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model) -> None:
        self.tokenizer, self.encoder = tokenizer, BiEncoder(TextEncoder(model)).eval()

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str]) -> Float[Tensor, "items width"]:
        """Mean over all tokens, as these encoders were trained."""
        tokens = self._tokens(sentences)
        vectors = torch.zeros(len(sentences), self.encoder.encoder.width)
        for rows in tokens.mask.sum(1).argsort(stable=True).split(32):
            vectors[rows] = self.encoder(tokens[rows]).float()
        return F.normalize(vectors, dim=-1)

    @torch.inference_mode()
    def maximum(self, sentences: Sequence[str]) -> Float[Tensor, "items width"]:
        """Maximum over the tokens of the text itself."""
        tokens = self._tokens(sentences)
        special = (tokens.ids == self.tokenizer.cls_token_id) | (
            tokens.ids == self.tokenizer.sep_token_id
        )
        states = self.encoder.encoder(tokens)[-1]
        return F.normalize(pool_tokens(states, tokens.mask & ~special, "max"), dim=-1)

    def _tokens(self, sentences: Sequence[str]):
        return tokenise(self.tokenizer, [s[:CHARACTERS] for s in sentences], length=LENGTH)


@torch.inference_mode()
def last_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]
) -> Float[Tensor, "items width"]:
    """State of the last token of each text at a causal model's last layer.

    Padding on the right is not seen by what stands before it.
    """
    rows = [tokenizer(sentence).input_ids for sentence in sentences]
    states = torch.zeros(len(rows), model.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for part in torch.tensor(order).split(32):
        ids, mask = _padded([rows[i] for i in part.tolist()])
        states[part] = pool_tokens(model.model(ids).last_hidden_state.float(), mask, "last")
    return states


def _padded(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "rows length"], Bool[Tensor, "rows length"]]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[n < len(row) for n in range(longest)] for row in rows])


# Writing ------------------------------------------------------------------------------------------


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    count: int,
    generator: Generator,
    longest: int = 20,
) -> list[list[str]]:
    """`count` lines that a causal model writes behind each prompt, sampled from its 50 likeliest tokens
    at temperature 0.8.

    Lines that have ended are not read on; they leave together, since every time the cache is copied.
    """
    rows = [tokenizer(prompt).input_ids for prompt in prompts]
    ids, mask = _padded([row[::-1] for row in rows])
    # Padded on the left: every prompt ends where writing begins.
    ids, mask = ids.flip(1), mask.flip(1)
    cache = DynamicCache(config=model.config)
    states = _read(model, ids, mask, cache)
    cache.batch_repeat_interleave(count)
    states, mask = (part.repeat_interleave(count, 0) for part in (states, mask))
    written: list[list[int]] = [[] for _ in mask]
    places, open_ = torch.arange(len(mask)), torch.ones(len(mask), dtype=torch.bool)
    for step in range(longest):
        likeliest = (model.lm_head(states[:, -1]).float() / 0.8).topk(50)
        drawn = torch.multinomial(likeliest.values.softmax(-1), 1, generator=generator)
        tokens = likeliest.indices.gather(1, drawn)
        for place, token in zip(places.tolist(), tokens[:, 0].tolist(), strict=True):
            written[place].append(token)
        open_ &= torch.tensor(["\n" not in tokenizer.decode(token) for token in tokens])
        if step == longest - 1 or not open_.any():
            break
        if open_.double().mean() <= 0.75:
            cache.batch_select_indices(open_.nonzero()[:, 0])
            places, mask, tokens, open_ = (x[open_] for x in (places, mask, tokens, open_))
        mask = F.pad(mask, (0, 1), value=True)
        states = _read(model, tokens, mask, cache)
    decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
    lines = [line.split("\n")[0].strip() for line in decoded]
    return [lines[start : start + count] for start in range(0, len(lines), count)]


def _read(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """States of new tokens behind what is in the cache; positions count real tokens only."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model.model(
        ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache
    ).last_hidden_state


def writing_prompt(description: str, examples: Sequence[str]) -> str:
    """A numbered list of examples below the description of their class, with the next number open."""
    lines = [f"{number}. {text}" for number, text in enumerate(examples, 1)]
    return "\n".join([description, "", *lines, f"{len(examples) + 1}."])


def fresh(lines: Sequence[str], known: Sequence[str], count: int) -> list[str]:
    """The first `count` lines of two words or more that are neither known nor repeated."""
    plain = {_plain(text) for text in known}
    kept = {}
    for line in lines:
        form = _plain(line)
        if len(form.split()) > 1 and form not in plain:
            kept.setdefault(form, line)
    return list(kept.values())[:count]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# The build ----------------------------------------------------------------------------------------


def build(target: Path, profile: str) -> None:
    """Ask all three and write what they say into the empty directory `target`."""
    setting, facts, tensors = SETTINGS[profile], {}, {}
    encode = SentenceEncoder(*minilm.load())
    for name in setting.sets:
        data = SETS[name]()
        sizes = {"pool": ("train", setting.pool * max(1, 6 // len(data.classes)))}
        sizes["test"] = ("test", setting.test // len(data.classes))
        for side, (split, per_class) in sizes.items():
            sentences, labels = balanced(data, split, per_class)
            facts[f"{name}/{side}"] = sentences
            tensors[f"{name}/{side}/labels"] = labels
            tensors[f"{name}/{side}/vectors"] = encode(sentences)
        for kind, of in LABEL_KINDS.items():
            tensors[f"{name}/{kind}"] = encode(of(name))
        tensors[f"{name}/descriptions, max"] = encode.maximum(descriptions(name))
        print(f"{name}: {len(facts[f'{name}/pool'])} + {len(facts[f'{name}/test'])}", flush=True)
    written = _ask_smollm2(tensors, setting)
    tokenizer, teacher = mpnet.load(setting.teacher_layers)
    teach = SentenceEncoder(tokenizer, teacher.bfloat16())  # a quarter of the time
    tensors["teacher"] = teach(facts[f"{QUESTIONS}/pool"])
    for seed, (lines, labels) in written.items():
        facts[f"written/{seed}"] = lines
        tensors[f"written/{seed}/labels"] = labels
        tensors[f"written/{seed}/vectors"] = encode(lines)
        tensors[f"written/{seed}/teacher"] = teach(lines)
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "vectors.safetensors")
    (target / "texts.json").write_text(json.dumps(facts), encoding="utf8")


def _ask_smollm2(
    tensors: dict[str, Tensor], setting: Setting
) -> dict[int, tuple[list[str], Int[Tensor, " items"]]]:
    """Fill in SmolLM2's states and logits; what it writes, by draw."""
    model, tokenizer = smollm2.load(dtype=torch.bfloat16)
    data = trec_questions()
    sizes = {"pool": ("train", setting.asked_pool), "test": ("test", setting.asked_test // 6)}
    words = torch.tensor(
        [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(w)) for w in sum(WORDS, ())]
    )
    for side, (split, per_class) in sizes.items():
        sentences, labels = balanced(data, split, per_class)
        tensors[f"asked/{side}/labels"] = labels
        logits = []
        for prompt in PROMPTS[: setting.prompts]:
            states = last_states(model, tokenizer, [prompt.format(s) for s in sentences])
            tensors.setdefault(f"asked/{side}/states", states)
            scores = states @ model.lm_head.weight[words[:, 0]].float().T
            logits.append(scores.unflatten(1, (len(WORDS), -1)).transpose(0, 1))
        tensors[f"asked/{side}/logits"] = torch.cat(logits)
    ids, mask = _padded([tokenizer(text).input_ids for text in descriptions(QUESTIONS)])
    with torch.inference_mode():
        states = model.model(ids).last_hidden_state.float()
    for how in ("last", "mean", "max"):
        tensors[f"asked/descriptions/{how}"] = pool_tokens(states, mask, how)
    pool, labels = balanced(data, "train", setting.pool)
    return {seed: _written(model, tokenizer, pool, labels, seed, setting) for seed in setting.seeds}


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: list[str],
    labels: Int[Tensor, " items"],
    seed: int,
    setting: Setting,
) -> tuple[list[str], Int[Tensor, " lines"]]:
    """What SmolLM2 writes for each class behind the first examples of one draw."""
    rows = [[pool[i] for i in row] for row in draw_shots(labels, EXAMPLES, seed).tolist()]
    prompts = [writing_prompt(d, r) for d, r in zip(descriptions(QUESTIONS), rows, strict=True)]
    generator, spare = Generator().manual_seed(seed), setting.per_class * 3 // 2
    tried = write(model, tokenizer, prompts, spare, generator)
    lines, classes = [], []
    for c, own in enumerate(tried):
        kept = fresh(own, [*sum(rows, []), *lines], setting.per_class)  # noqa: RUF017
        lines += kept
        classes += [c] * len(kept)
    return lines, torch.tensor(classes)


def load(profile: str = "cpu") -> tuple[dict[str, Asked], Questions]:
    """All that was asked in a profile; builds it first when it is missing."""
    directory = backbone_path("crosstune", profile)
    facts = json.loads((directory / "texts.json").read_text(encoding="utf8"))
    tensors = load_file(directory / "vectors.safetensors")
    setting, sides = SETTINGS[profile], ("pool", "test")

    def each(pattern: str, keys: Sequence[str] = sides) -> dict[str, Tensor]:
        return {key: tensors[pattern.format(key)] for key in keys}

    sets = {
        name: Asked(
            {side: facts[f"{name}/{side}"] for side in sides},
            each(name + "/{}/labels"),
            each(name + "/{}/vectors"),
            each(name + "/{}", [*LABEL_KINDS, "descriptions, max"]),
        )
        for name in setting.sets
    }
    written = {
        seed: (
            facts[f"written/{seed}"],
            *(tensors[f"written/{seed}/{part}"] for part in ("labels", "vectors", "teacher")),
        )
        for seed in setting.seeds
    }
    asked = [each("asked/{}/" + part) for part in ("states", "labels", "logits")]
    label_states = each("asked/descriptions/{}", ("last", "mean", "max"))
    return sets, Questions(tensors["teacher"], *asked, label_states, written)
