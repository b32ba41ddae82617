"""The further tasks on long contexts: exact lengths, answers that can be found, batches."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tests.data.test_needles import PROSE, Characters, text_of
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.data.long_tasks import (
    LONG_TASKS,
    common_words,
    document_opening,
    long_samples,
    multi_query,
    position_nll,
    prose_windows,
    share_right,
    stack_samples,
)
from reattend.data.needles import Haystack

DOCUMENTS = [f"Title {n}\n\n" + f"Body {n} goes on. " * 60 for n in range(9)]


@pytest.fixture
def haystack():
    return Haystack(Characters(), PROSE)


def all_samples(haystack, task, length=900, count=4, **settings):
    return long_samples(haystack, task, length, count, documents=DOCUMENTS, **settings)


@pytest.mark.parametrize("task", LONG_TASKS)
@pytest.mark.parametrize("length", [800, 901])
@pytest.mark.parametrize("distractors", [1, 4])
def test_prompts_have_the_exact_length(haystack, task, length, distractors):
    for sample in all_samples(haystack, task, length, distractors=distractors):
        assert len(sample.prompt) == len(sample.prose) == length
        assert len(sample.answer) == len(sample.scored)
        assert any(sample.scored)
        assert sample.task == task


@pytest.mark.parametrize("task", LONG_TASKS)
def test_seeds_decide_the_prompts(haystack, task):
    assert all_samples(haystack, task, seed=1) == all_samples(haystack, task, seed=1)
    assert all_samples(haystack, task, seed=1) != all_samples(haystack, task, seed=2)


def test_every_question_of_multi_query_has_its_answer_in_the_prompt(haystack):
    for sample in multi_query(haystack, 900, 3, queries=3, distractors=2):
        body, first = text_of(sample.prompt).rsplit("\n\n", 1)
        asked = (first + text_of(sample.answer)).split(". ")
        assert len(asked) == 3
        assert all(body.count(f" {question}.") == 1 for question in asked)
        pairs = zip(sample.answer, sample.scored, strict=True)
        counted = text_of(token for token, counts in pairs if counts)
        assert counted == "".join(" " + question.split(" is ")[1] for question in asked)
        assert body.count("The partner of") == 5


def test_the_common_word_is_the_most_frequent(haystack):
    for sample in common_words(haystack, 900, 3, distractors=5, times=3):
        body = text_of(sample.prompt).rsplit("\n\n", 1)[0]
        # The first word of the list may be cut.
        words = body.removeprefix("Words:").rstrip(",").split(", ")[1:]
        counts = sorted((words.count(word), word) for word in set(words))
        assert " " + counts[-1][1] == text_of(sample.answer)
        assert counts[-1][0] > 2 * counts[-2][0]
        assert body.endswith(",")


def test_the_document_asked_for_begins_with_the_answer(haystack):
    depths = []
    for sample in document_opening(haystack, DOCUMENTS, 700, 4, distractors=3, quoted=11):
        body, question = text_of(sample.prompt).rsplit("\n\n", 1)
        assert body.count("Title: ") == 4
        assert body.count(question + text_of(sample.answer)) == 1
        assert body.index(question) == round(sample.depth * 700)
        assert text_of(sample.answer)[:6] == " Body "
        prose = text_of(t for t, real in zip(sample.prompt, sample.prose, strict=True) if real)
        assert "Title" not in prose
        depths.append(sample.depth)
    assert depths == sorted(depths)
    assert depths[0] == 0
    assert depths[-1] > 0.6


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("nothing", {}, "unknown task 'nothing'"),
        ("multi_query", {"distractors": 30}, "pairs in all"),
        ("common_words", {"distractors": 0}, "1 to 51 distractors"),
        ("common_words", {"length": 55}, "does not fit"),
        ("document_opening", {"length": 150}, "do not fit"),
        ("document_opening", {"distractors": 9}, "fewer than 10 documents"),
    ],
)
def test_impossible_requests_are_refused(haystack, task, settings, message):
    with pytest.raises(ValueError, match=message):
        all_samples(haystack, task, **settings)


def test_batches_fill_short_answers_with_tokens_that_do_not_count(haystack):
    samples = all_samples(haystack, "word_pairs", count=5)
    prompts, answers, scored = stack_samples(samples)
    assert prompts.shape == (5, 900)
    for sample, answer, counts in zip(samples, answers.tolist(), scored, strict=True):
        assert tuple(answer[: len(sample.answer)]) == sample.answer
        assert int(counts.sum()) == len(sample.answer)
    shorter = dataclasses.replace(samples[0], prompt=samples[0].prompt[1:])
    with pytest.raises(ValueError, match="one length"):
        stack_samples([shorter, *samples])


def test_share_right_counts_scored_tokens_only():
    answers = torch.tensor([[1, 2, 3, 3], [4, 5, 6, 7]])
    choices = torch.tensor([[1, 0, 3, 0], [4, 5, 6, 7]])
    scored = torch.tensor([[True, True, True, False], [False, True, True, True]])
    torch.testing.assert_close(share_right(choices, answers, scored), torch.tensor([2 / 3, 1.0]))


def test_prose_windows_are_prose(haystack):
    windows = prose_windows(haystack, 40, 3, seed=2)
    assert windows.shape == (3, 40)
    assert all(text_of(row) in text_of(haystack.ids) for row in windows.tolist())
    assert torch.equal(windows, prose_windows(haystack, 40, 3, seed=2))


def test_position_nll_is_the_loss_of_each_next_token():
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16}
    config = LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (3, 9))
    nll = position_nll(model, tokens)
    logits = model(tokens).logits.detach()
    assert nll.shape == (3, 8)
    for row, place in ((0, 0), (2, 7), (1, 3)):
        expected = F.cross_entropy(logits[row, place], tokens[row, place + 1])
        torch.testing.assert_close(nll[row, place], expected)
    torch.testing.assert_close(position_nll(model, tokens, every=3), nll[:, ::3])
    torch.testing.assert_close(position_nll(model, tokens[:, :8], every=3), nll[:, :7:3])
