"""Tasks on long contexts beside the needles: several questions, counting, documents, plain prose.

After RULER (arXiv 2404.06654) and sparse-frontier (arXiv 2504.17768), reduced to what a small
language model can do by continuing a text. Samples are those of `reattend.data.needles`: prompts of
an exact length in tokens, scored by the greedy continuation.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reattend.data.needles import (
    KEYS,
    TASKS,
    Facts,
    Haystack,
    NeedleSample,
    hide,
    needle_samples,
)

# A document must leave at least this many tokens to fill its share of a prompt.
SHORTEST_DOCUMENT = 24


def multi_query(
    haystack: Haystack,
    length: int,
    count: int,
    seed: int = 0,
    distractors: int = 4,
    queries: int = 4,
) -> Iterator[NeedleSample]:
    """Associative recall in words with several questions, one after the other.

    Pairs of words are hidden in prose. The partners of some are asked in turn; each question
    follows the right answer to the one before, so that a mistake costs one answer, not the rest.

    Args:
        length: exact length of every prompt with its first question, in tokens.
        distractors: pairs that are not asked.
        queries: pairs that are asked.

    Raises:
        ValueError: when there are no questions, more pairs than words, or no room for them.
    """
    if queries < 1 or 2 * (queries + distractors) > len(KEYS):
        raise ValueError(
            f"{queries} questions and {distractors} distractors: between 1 question and "
            f"{len(KEYS) // 2} pairs in all"
        )
    random_state = random.Random(f"multi_query {length} {seed} {distractors} {queries}")
    for number in range(count):
        words = random_state.sample(KEYS, 2 * (queries + distractors))
        pairs = list(zip(words[::2], words[1::2], strict=True))
        facts = Facts(
            needles=tuple(f" The partner of {key} is {value}." for key, value in pairs),
            target=0,
            question=f"\n\nThe partner of {pairs[0][0]} is",
            answer=f" {pairs[0][1]}",
        )
        sample = hide(haystack, "multi_query", facts, length, (number + 0.5) / count, random_state)
        pieces = [(sample.answer, True)]
        for key, value in pairs[1:queries]:
            pieces.append((haystack.encode(f". The partner of {key} is"), False))
            pieces.append((haystack.encode(f" {value}"), True))
        yield dataclasses.replace(
            sample,
            answer=tuple(token for tokens, _ in pieces for token in tokens),
            scored=tuple(counts for tokens, counts in pieces for _ in tokens),
        )


def common_words(
    haystack: Haystack,
    length: int,
    count: int,
    seed: int = 0,
    distractors: int = 4,
    times: int = 3,
) -> Iterator[NeedleSample]:
    """Common-word extraction: a list of words, of which one occurs more often than the others.

    SmolLM2 with 135M parameters does not count: it stays near chance here, in this and in other
    wordings. The task is for larger models.

    Args:
        length: exact length of every prompt, in tokens; the list is filled up to it.
        distractors: words beside the common one.
        times: how many times as often the common word occurs as each of the others.

    Raises:
        ValueError: when there are no or too many distractors, or no room for the list.
    """
    if not 1 <= distractors < len(KEYS) or times < 2:
        raise ValueError(
            f"{distractors} distractors, {times} times: 1 to {len(KEYS) - 1} distractors, "
            "at least twice as often"
        )
    opening, question = (haystack.encode(text) for text in ("Words:", _COMMON_QUESTION))
    room = length - len(opening) - len(question)
    # A word and its comma are two tokens or more.
    if room < 2 * (times + distractors):
        raise ValueError(f"a list of words does not fit into {length} tokens")
    random_state = random.Random(f"common_words {length} {seed} {distractors} {times}")
    for _ in range(count):
        common, *others = random_state.sample(KEYS, distractors + 1)
        listed: list[int] = []
        while len(listed) < room:
            block = [common] * times + others
            random_state.shuffle(block)
            for word in block:
                listed += haystack.encode(f" {word},")
        # Cut at the front, so that the list ends with a whole word.
        prompt = opening + listed[len(listed) - room :] + question
        answer = haystack.encode(f" {common}")
        yield NeedleSample(
            task="common_words",
            prompt=tuple(prompt),
            answer=tuple(answer),
            scored=(True,) * len(answer),
            prose=(False,) * length,
            depth=0.5,
        )


_COMMON_QUESTION = "\n\nThe most frequent of these words is"


def document_opening(
    haystack: Haystack,
    documents: Sequence[str],
    length: int,
    count: int,
    seed: int = 0,
    distractors: int = 4,
    quoted: int = 8,
) -> Iterator[NeedleSample]:
    """Document question answering on real prose: how does the document with this title begin?

    The prompt holds several documents, each cut to an equal share; the title of one is repeated at
    the end, and the answer is the beginning of its text.

    Args:
        documents: texts whose first line is a title.
        length: exact length of every prompt, in tokens.
        distractors: documents beside the one that is asked for.
        quoted: tokens of the answer.

    Raises:
        ValueError: when too few documents are long enough for their share.
    """
    random_state = random.Random(f"document_opening {length} {seed} {distractors} {quoted}")
    titled = [_title_and_text(text) for text in documents]
    for number in range(count):
        order = random_state.sample(range(len(titled)), len(titled))
        yield _document_sample(
            haystack, (titled[i] for i in order), length, distractors, quoted, number / count
        )


def _title_and_text(document: str) -> tuple[str, str]:
    title, _, text = document.strip().partition("\n")
    return title.strip(), " ".join(text.split())


def _document_sample(
    haystack: Haystack,
    candidates: Iterator[tuple[str, str]],
    length: int,
    distractors: int,
    quoted: int,
    depth: float,
) -> NeedleSample:
    share = length // (distractors + 2)
    if share < SHORTEST_DOCUMENT + quoted:
        raise ValueError(f"{distractors + 1} documents do not fit into {length} tokens")
    chosen: list[tuple[list[int], list[int]]] = []
    for title, text in candidates:
        head, body = haystack.encode(f"Title: {title}\nText:"), haystack.encode(f" {text}")
        # Long enough to fill a prompt that the other documents leave room in.
        if len(head) + quoted <= share and len(body) >= 2 * share:
            chosen.append((head, body))
        if len(chosen) == distractors + 1:
            break
    else:
        raise ValueError(f"fewer than {distractors + 1} documents of {2 * share} tokens")
    asked = int(depth * len(chosen))
    between = haystack.encode("\n\n")
    question = between + chosen[asked][0]
    room = length - len(question)
    prompt: list[int] = []
    prose: list[bool] = []
    for place, (head, body) in enumerate(chosen):
        if place == asked:
            found_at = len(prompt)
        ends_at = room * (place + 1) // len(chosen)
        taken = body[: ends_at - len(prompt) - len(head) - len(between)]
        if place + 1 == len(chosen):
            between = []
            taken = body[: ends_at - len(prompt) - len(head)]
        prompt += head + taken + between
        prose += [False] * len(head) + [True] * len(taken) + [False] * len(between)
    return NeedleSample(
        task="document_opening",
        prompt=tuple(prompt + question),
        answer=tuple(chosen[asked][1][:quoted]),
        scored=(True,) * quoted,
        prose=tuple(prose + [False] * len(question)),
        depth=found_at / length,
    )


LONG_TASKS = (*TASKS, "multi_query", "common_words", "document_opening")


def long_samples(
    haystack: Haystack,
    task: str,
    length: int,
    count: int,
    *,
    seed: int = 0,
    distractors: int = 4,
    documents: Sequence[str] = (),
) -> list[NeedleSample]:
    """Samples of any task by its name; `distractors` is the knob of difficulty in all of them.

    Raises:
        ValueError: for an unknown task, or a length that the task does not fit into.
    """
    settings = {"seed": seed, "distractors": distractors}
    if task in TASKS:
        samples = needle_samples(haystack, task, length, count, **settings)
    elif task == "multi_query":
        samples = multi_query(haystack, length, count, **settings)
    elif task == "common_words":
        samples = common_words(haystack, length, count, **settings)
    elif task == "document_opening":
        samples = document_opening(haystack, documents, length, count, **settings)
    else:
        raise ValueError(f"unknown task '{task}'; there are: {', '.join(LONG_TASKS)}")
    return list(samples)


def stack_samples(
    samples: Sequence[NeedleSample],
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch answer"], Bool[Tensor, "batch answer"]]:
    """Prompts of equal length, answers, and which tokens of them count, as one batch.

    Shorter answers are filled up with a repeated last token that does not count.

    Raises:
        ValueError: when the prompts differ in length.
    """
    lengths = {len(sample.prompt) for sample in samples}
    if len(lengths) != 1:
        raise ValueError(f"prompts of one batch must have one length, got {sorted(lengths)}")
    longest = max(len(sample.answer) for sample in samples)
    answers, scored = [], []
    for sample in samples:
        missing = longest - len(sample.answer)
        answers.append([*sample.answer, *sample.answer[-1:] * missing])
        scored.append([*sample.scored, *[False] * missing])
    prompts = torch.tensor([sample.prompt for sample in samples])
    return prompts, torch.tensor(answers), torch.tensor(scored)


def share_right(
    choices: Int[Tensor, "batch answer"],
    answers: Int[Tensor, "batch answer"],
    scored: Bool[Tensor, "batch answer"],
) -> Float[Tensor, " batch"]:
    """Share of the tokens that count which the greedy choice hits; an exact match has 1."""
    return ((choices == answers) & scored).sum(dim=-1) / scored.sum(dim=-1)


def prose_windows(
    haystack: Haystack, length: int, count: int, seed: int = 0
) -> Int[Tensor, "count length"]:
    """Stretches of prose that start after a sentence's end, for perplexity by position.

    Raises:
        ValueError: when the prose is shorter than that.
    """
    random_state = random.Random(f"prose {length} {seed}")
    return torch.tensor([haystack.window(length, random_state)[0] for _ in range(count)])


@torch.inference_mode()
def position_nll(
    model: nn.Module, tokens: Int[Tensor, "batch length"], every: int = 1
) -> Float[Tensor, "batch positions"]:
    """Negative log-likelihood of the tokens after positions 0, `every`, 2 `every`, ..., in nats.

    Call it inside `attach` for the loss of a prefill method. With `every` above 1 the products with
    the vocabulary at the other positions are saved, a fifth of the time of a small model.
    """
    asked = torch.arange(0, tokens.shape[1] - 1, every, device=tokens.device)
    logits, following = model(tokens, logits_to_keep=asked).logits.float(), tokens[:, asked + 1]
    # Flat, with the classes last: over another axis torch sums tens of thousands of them naively.
    nll = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return nll.view_as(following)
