"""Needle tasks: facts hidden in real prose, asked for at the end of a long prompt.

The tasks follow RULER (arXiv 2404.06654): retrieval of one needle, of one among several keys, and
variable tracking. Everything is built in tokens, so a prompt has exactly the length asked for. The
prose between the needles is known position by position, which gives a second, continuous measure
from the same forward pass: how well the model predicts ordinary text late in the context.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

# fmt: off
KEYS = [
    "apple", "river", "garden", "window", "candle", "mountain", "forest", "bridge", "market",
    "island", "silver", "copper", "marble", "velvet", "hammer", "ladder", "basket", "mirror",
    "pocket", "ribbon", "saddle", "teapot", "violin", "walnut", "anchor", "blanket", "cabinet",
    "dragon", "engine", "feather", "guitar", "harbor", "jacket", "kettle", "lantern", "magnet",
    "needle", "orange", "pepper", "rabbit", "shadow", "ticket", "umbrella", "valley", "wagon",
    "yellow", "button", "castle", "desert", "eagle", "falcon", "ginger",
]
# fmt: on
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = 5
LISTED = 8


@runtime_checkable
class Tokenizer(Protocol):
    """The two calls that are needed of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...


@dataclass(frozen=True)
class Facts:
    """What one task hides and asks: `needles[target]` holds the answer to `question`."""

    needles: tuple[str, ...]
    target: int
    question: str
    answer: str


@dataclass(frozen=True)
class NeedleSample:
    """One prompt with its answer.

    Attributes:
        task: name of the task.
        prompt: token ids of prose, needles and question.
        answer: token ids that a correct greedy continuation starts with.
        scored: for each token of the answer, whether it counts. Tokens between two answers, which
            no model can know, do not.
        prose: for each prompt position, whether it belongs to the prose.
        depth: where the answer's needle starts, as a share of the prompt.
    """

    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    scored: tuple[bool, ...]
    prose: tuple[bool, ...]
    depth: float

    def late_prose(self, share: float = 0.25) -> list[int]:
        """Positions of prose in the last `share` of the prompt (the prompt's token to predict)."""
        start = round(len(self.prompt) * (1 - share))
        return [i for i in range(max(start, 1), len(self.prompt)) if self.prose[i]]


def magic_numbers(random_state: random.Random, distractors: int) -> Facts:
    """One needle and `distractors` more of the same wording with other keys and numbers."""
    keys = random_state.sample(KEYS, distractors + 1)
    numbers = _distinct_numbers(random_state, distractors + 1)
    needles = [
        f" The special magic number for {k} is {n}." for k, n in zip(keys, numbers, strict=True)
    ]
    question = f"\n\nThe special magic number for {keys[0]} is"
    return _shuffled(random_state, needles, question, f" {numbers[0]}")


def variable_value(random_state: random.Random, distractors: int) -> Facts:
    """Assignments of numbers to variables; the value of one is asked."""
    names = _distinct_names(random_state, distractors + 1)
    numbers = _distinct_numbers(random_state, distractors + 1)
    needles = [f" VAR {name} = {number}." for name, number in zip(names, numbers, strict=True)]
    return _shuffled(random_state, needles, f"\n\nVAR {names[0]} =", f" {numbers[0]}")


def variable_link(random_state: random.Random, distractors: int) -> Facts:
    """Assignments of variables to variables; the source of one is asked."""
    names = _distinct_names(random_state, 2 * (distractors + 1))
    pairs = list(zip(names[::2], names[1::2], strict=True))
    needles = [f" VAR {name} = VAR {source}." for name, source in pairs]
    name, source = pairs[0]
    return _shuffled(random_state, needles, f"\n\nVAR {name} = VAR", f" {source}")


def word_pairs(random_state: random.Random, distractors: int) -> Facts:
    """Word-level associative recall: pairs of words, the partner of one is asked."""
    words = random_state.sample(KEYS, 2 * (distractors + 1))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    needles = [f" The partner of {key} is {value}." for key, value in pairs]
    key, value = pairs[0]
    return _shuffled(random_state, needles, f"\n\nThe partner of {key} is", f" {value}")


def word_list(random_state: random.Random, distractors: int) -> Facts:
    """Named lists of words; the words of one are asked, which is an answer of some length."""
    names = random_state.sample(KEYS, distractors + 1)
    lists = [", ".join(random_state.sample(KEYS, LISTED)) for _ in names]
    needles = [f" The {n} list: {words}." for n, words in zip(names, lists, strict=True)]
    return _shuffled(random_state, needles, f"\n\nThe {names[0]} list:", f" {lists[0]}")


TASKS = {
    "magic_numbers": magic_numbers,
    "variable_value": variable_value,
    "variable_link": variable_link,
    "word_pairs": word_pairs,
    "word_list": word_list,
}


class Haystack:
    """Real prose as one stream of tokens, with the places where a sentence ends.

    Args:
        tokenizer: of the model that will read the prompts.
        documents: texts; they are joined in their order by a blank line.
    """

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        break_between = self.encode("\n\n")
        self.ids: list[int] = []
        for text in documents:
            self.ids += self.encode(text) + break_between
        pieces = tokenizer.convert_ids_to_tokens(self.ids)
        self.sentence_ends = [i + 1 for i, piece in enumerate(pieces) if piece[-1] in ".?!"]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def window(self, length: int, random_state: random.Random) -> tuple[list[int], list[int]]:
        """A random stretch of `length` tokens that starts after a sentence's end.

        Returns:
            The token ids, and the positions in them right after a sentence's end.

        Raises:
            ValueError: when the prose is shorter than that.
        """
        starts = [end for end in self.sentence_ends if end + length <= len(self.ids)]
        if not starts or length < 1:
            raise ValueError(f"no stretch of {length} tokens in {len(self.ids)} tokens of prose")
        start = random_state.choice(starts)
        ends = [end - start for end in self.sentence_ends if start < end <= start + length]
        return self.ids[start : start + length], ends


def needle_samples(
    haystack: Haystack,
    task: str,
    length: int,
    count: int,
    seed: int = 0,
    distractors: int = 4,
) -> Iterator[NeedleSample]:
    """Prompts of one task; the answer's depth runs evenly through the context.

    Args:
        haystack: the prose.
        task: a name in `TASKS`.
        length: exact length of every prompt, in tokens.
        count: how many prompts.
        seed: the same seed gives the same prompts.
        distractors: needles of the same form whose content is not asked.

    Raises:
        ValueError: for an unknown task, or a length that the needles do not fit into.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}'; there are: {', '.join(TASKS)}")
    # A string seed is hashed by random.Random itself and does not vary between processes.
    random_state = random.Random(f"{task} {length} {seed} {distractors}")
    for number in range(count):
        facts = TASKS[task](random_state, distractors)
        yield hide(haystack, task, facts, length, (number + 0.5) / count, random_state)


@dataclass(frozen=True)
class Score:
    """How a model did on one sample.

    Attributes:
        exact_match: whether the greedy continuation starts with the answer, at every token that
            counts.
        answer_nll: mean negative log-likelihood of the answer's tokens that count, in nats.
        prose_nll: the same of the prose late in the prompt; not a number where there is none.
    """

    exact_match: bool
    answer_nll: float
    prose_nll: float


@torch.inference_mode()
def score_sample(
    model: nn.Module,
    sample: NeedleSample,
    prefill: AbstractContextManager,
    late_share: float = 0.25,
) -> Score:
    """Read the prompt inside the context `prefill`, then decode the answer with dense attention.

    One forward pass over the given answer behind the prompt's cache decides about the greedy
    continuation: greedy decoding emits the answer exactly when each of its tokens is the most
    likely one after the tokens before it.

    Args:
        model: a causal language model of transformers.
        sample: the prompt and its answer.
        prefill: for example `attach(model, method)`; `contextlib.nullcontext()` is dense.
        late_share: share of the prompt, at its end, whose prose is scored.
    """
    prompt = torch.tensor(sample.prompt, device=model.device)
    answer = torch.tensor(sample.answer, device=model.device)
    scored = torch.tensor(sample.scored, device=model.device)
    late = torch.tensor(sample.late_prose(late_share), device=model.device)
    # A token is predicted one position before it; the last position predicts the answer's first.
    asked = torch.cat([late - 1, late.new_tensor([len(prompt) - 1])])
    with prefill:
        read = model(prompt[None], use_cache=True, logits_to_keep=asked)
    logits = read.logits[0, -1:]
    if len(answer) > 1:
        decoded = model(answer[None, :-1], past_key_values=read.past_key_values, use_cache=True)
        logits = torch.cat([logits, decoded.logits[0]])
    return Score(
        exact_match=bool((logits.argmax(dim=-1) == answer)[scored].all()),
        answer_nll=F.cross_entropy(logits.float()[scored], answer[scored]).item(),
        prose_nll=F.cross_entropy(read.logits[0, :-1].float(), prompt[late]).item(),
    )


def hide(
    haystack: Haystack,
    task: str,
    facts: Facts,
    length: int,
    depth: float,
    random_state: random.Random,
) -> NeedleSample:
    """Insert the needles after sentence ends, the target near `depth`, the others anywhere.

    Args:
        length: exact length of the prompt with the question, in tokens.
        depth: where the target should stand, as a share of the prose.

    Raises:
        ValueError: when the needles do not fit.
    """
    needles = [haystack.encode(needle) for needle in facts.needles]
    question = haystack.encode(facts.question)
    room = length - sum(map(len, needles)) - len(question)
    if room < 1:
        raise ValueError(f"{len(needles)} needles and a question do not fit into {length} tokens")
    prose, ends = haystack.window(room, random_state)
    places = sorted(set(ends) | {0})
    if len(places) < len(needles):
        raise ValueError(f"too few sentences in {length} tokens for {len(needles)} needles")
    target = min(places, key=lambda place: abs(place - depth * room))
    others = random_state.sample([p for p in places if p != target], len(needles) - 1)
    others.insert(facts.target, target)

    prompt: list[int] = []
    is_prose: list[bool] = []
    start, found_at = 0, 0
    for place, index in sorted(zip(others, range(len(needles)), strict=True)):
        prompt += prose[start:place]
        is_prose += [True] * (place - start)
        if index == facts.target:
            found_at = len(prompt)
        prompt += needles[index]
        is_prose += [False] * len(needles[index])
        start = place
    prompt += prose[start:] + question
    is_prose += [True] * (room - start) + [False] * len(question)
    answer = haystack.encode(facts.answer)
    return NeedleSample(
        task=task,
        prompt=tuple(prompt),
        answer=tuple(answer),
        scored=(True,) * len(answer),
        prose=tuple(is_prose),
        depth=found_at / length,
    )


def _shuffled(random_state: random.Random, needles: list[str], question: str, answer: str) -> Facts:
    """Facts whose first needle is the target, in a random order."""
    order = random_state.sample(range(len(needles)), len(needles))
    return Facts(tuple(needles[i] for i in order), order.index(0), question, answer)


def _distinct_numbers(random_state: random.Random, count: int) -> list[int]:
    return random_state.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)


def _distinct_names(random_state: random.Random, count: int) -> list[str]:
    names: set[str] = set()
    ordered = []
    while len(ordered) < count:
        name = "".join(random_state.choices(LETTERS, k=3))
        if name not in names:
            names.add(name)
            ordered.append(name)
    return ordered
