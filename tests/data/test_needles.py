"""The needle tasks: exact lengths, answers in place, the same prompts for the same seed."""

import dataclasses
import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.streaming_llm import StreamingLLM
from reattend.attention.host import attach
from reattend.data.needles import TASKS, Haystack, needle_samples, score_sample

PROSE = ["The river ran on. It was late? Yes! " * 40, "A second text begins here. It ends. " * 40]


class Characters:
    """A tokenizer with one token for each character."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def convert_ids_to_tokens(self, ids):
        return [chr(token) for token in ids]


def text_of(tokens):
    return "".join(map(chr, tokens))


@pytest.fixture
def haystack():
    return Haystack(Characters(), PROSE)


def samples(haystack, task, length=900, count=4, **settings):
    return list(needle_samples(haystack, task, length, count, **settings))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [700, 901])
def test_prompts_have_the_exact_length(haystack, task, length):
    for sample in samples(haystack, task, length):
        assert len(sample.prompt) == len(sample.prose) == length


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("distractors", [0, 4])
def test_the_answer_follows_the_question_in_exactly_one_needle(haystack, task, distractors):
    for sample in samples(haystack, task, distractors=distractors):
        text, answer = text_of(sample.prompt), text_of(sample.answer)
        body, question = text.rsplit("\n\n", 1)
        assert body.count(question + answer) == 1
        assert body.count(question) == 1
        start = body.index(" " + question + answer)
        assert sample.depth == start / len(sample.prompt)


@pytest.mark.parametrize("task", TASKS)
def test_needles_stand_after_sentence_ends_and_leave_the_prose_whole(haystack, task):
    for sample in samples(haystack, task):
        prompt, prose = sample.prompt, sample.prose
        assert text_of(t for t, real in zip(prompt, prose, strict=True) if real) in text_of(
            haystack.ids
        )
        starts = [i for i in range(1, len(prompt)) if prose[i - 1] and not prose[i]]
        assert starts
        # The last of them is the question, which may follow the prose anywhere.
        assert all(chr(prompt[start - 1]) in ".?!" for start in starts[:-1])


def test_distractors_are_distinct_and_of_the_same_form(haystack):
    (sample,) = samples(haystack, "magic_numbers", count=1, distractors=6)
    body = text_of(sample.prompt).rsplit("\n\n", 1)[0]
    parts = body.split("The special magic number for ")[1:]
    assert len(parts) == 7
    assert len({part.split(" is ")[0] for part in parts}) == 7
    assert len({part.split(" is ")[1][:5] for part in parts}) == 7


def test_depth_runs_through_the_context(haystack):
    depths = [s.depth for s in samples(haystack, "magic_numbers", count=5)]
    assert depths == sorted(depths)
    assert depths[0] < 0.25
    assert depths[-1] > 0.7


@pytest.mark.parametrize("task", TASKS)
def test_seeds_decide_the_prompts(haystack, task):
    assert samples(haystack, task, seed=1) == samples(haystack, task, seed=1)
    assert samples(haystack, task, seed=1) != samples(haystack, task, seed=2)


def test_late_prose_holds_prose_positions_of_the_end(haystack):
    (sample,) = samples(haystack, "magic_numbers", 800, 1)
    late = sample.late_prose(0.25)
    assert late
    assert min(late) >= 600
    assert all(sample.prose[i] for i in late)
    assert late == [i for i in range(600, 800) if sample.prose[i]]


def test_impossible_requests_are_refused(haystack):
    with pytest.raises(ValueError, match="magic_numbers"):
        samples(haystack, "nothing")
    with pytest.raises(ValueError, match="do not fit"):
        samples(haystack, "magic_numbers", 100)
    with pytest.raises(ValueError, match="no stretch"):
        samples(haystack, "magic_numbers", 10_000)
    without_ends = Haystack(Characters(), ["word " * 300 + ". " + "word " * 300])
    with pytest.raises(ValueError, match="too few sentences"):
        samples(without_ends, "magic_numbers", 500)


def test_windows_start_after_a_sentence(haystack):
    ids, ends = haystack.window(50, random.Random(0))
    assert len(ids) == 50
    whole = text_of(haystack.ids)
    assert whole[whole.index(text_of(ids)) - 1] in ".?!"
    assert all(chr(ids[end - 1]) in ".?!" for end in ends)


# Scoring ------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def window():
    return StreamingLLM(sink=16, window=16, block_size=16)


def generated(model, sample, method, count=6):
    """Greedy tokens: prompt with the method, new tokens with dense attention (its decode)."""
    prompt = torch.tensor([sample.prompt])
    with attach(model, method):
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return tuple(tokens[0, len(sample.prompt) :].tolist())


def test_exact_match_is_greedy_decoding_behind_a_sparse_prefill(haystack, model):
    for sample in samples(haystack, "magic_numbers", length=400, count=3, distractors=1):
        answer = generated(model, sample, window())
        right = dataclasses.replace(sample, answer=answer, scored=(True,) * 6)
        assert score_sample(model, right, attach(model, window())).exact_match
        for place in (0, 3, 5):
            wrong = [*answer]
            wrong[place] = (wrong[place] + 1) % 128
            other = dataclasses.replace(right, answer=tuple(wrong))
            assert not score_sample(model, other, attach(model, window())).exact_match
            uncounted = tuple(i != place for i in range(6))
            spared = dataclasses.replace(other, scored=uncounted)
            # Behind the wrong token the model sees another text, so only what precedes is sure.
            if place == 5:
                assert score_sample(model, spared, attach(model, window())).exact_match


def test_the_prefill_context_matters_and_ends(haystack, model):
    (sample,) = samples(haystack, "variable_link", length=400, count=1, distractors=1)
    dense = score_sample(model, sample, nullcontext())
    sparse = score_sample(model, sample, attach(model, window()))
    assert sparse.prose_nll != dense.prose_nll
    assert score_sample(model, sample, nullcontext()) == dense


def test_likelihoods_are_those_of_one_dense_pass(haystack, model):
    (sample,) = samples(haystack, "magic_numbers", length=400, count=1, distractors=1)
    score = score_sample(model, sample, nullcontext())
    tokens = torch.tensor([*sample.prompt, *sample.answer])
    with torch.no_grad():
        nll = F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
    assert score.answer_nll == pytest.approx(nll[399:].mean().item(), rel=1e-4)
    late = torch.tensor(sample.late_prose()) - 1
    assert score.prose_nll == pytest.approx(nll[late].mean().item(), rel=1e-4)
