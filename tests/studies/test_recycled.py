"""Decoding in one pass against the decode loop, coverage, and one window from each document."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend.attention.baselines.h2o import H2O
from reattend.attention.decoding import decode, read_prompt
from reattend.long_context.recycled_attention import RecycledAttention
from reattend.studies.recycled import Coverage, Oracle, document_windows, follow

LENGTH, STEPS, LAYERS, KEY_HEADS = 40, 14, 2, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KEY_HEADS,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 61, (2, LENGTH + STEPS), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompt(model, text):
    return read_prompt(model, text[:, :LENGTH])


@pytest.mark.parametrize(
    "method", [RecycledAttention(budget=8, stride=4), H2O(budget=8)], ids=["recycled", "h2o"]
)
def test_one_pass_equals_the_decode_loop(model, text, prompt, method):
    given = text[:, LENGTH:]
    loop = decode(model, prompt, method, given=given)
    followed = follow(model, method, prompt, given)
    torch.testing.assert_close(-followed.nll, loop.log_likelihood.cpu(), atol=1e-5, rtol=0)
    heads = LAYERS * KEY_HEADS
    assert sum(followed.reads) * heads * (STEPS - 1) == pytest.approx(sum(loop.kv_reads))


def test_the_oracle_with_room_for_everything_is_dense(model, text, prompt):
    given = text[:, LENGTH:]
    dense = decode(model, prompt, "dense", given=given)
    followed = follow(model, Oracle(budget=LENGTH + STEPS), prompt, given)
    torch.testing.assert_close(-followed.nll, dense.log_likelihood.cpu(), atol=1e-5, rtol=0)


def test_fresh_entries_cover_most_and_random_ones_their_share(model, text, prompt):
    budget = 10
    selections = {"recycled": RecycledAttention(budget=budget, stride=None)}
    reader = Coverage(selections, budget, prompt, seed=0)
    follow(model, reader, prompt, text[:, LENGTH:])
    fresh, random, recycled = (
        (reader.covered[name] / LAYERS) for name in (Coverage.FRESH, Coverage.RANDOM, "recycled")
    )
    assert ((fresh >= recycled - 1e-6) & (fresh <= 1 + 1e-6)).all()
    assert random.mean().item() == pytest.approx(budget / (LENGTH + STEPS / 2), abs=0.05)


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text, add_special_tokens=False):
        return [ord(letter) for letter in text]

    def convert_ids_to_tokens(self, ids):
        return [chr(number) for number in ids]


def test_every_window_is_of_another_document():
    texts = ["x.", *(f"{letter * 3}.{letter * 30}" for letter in "abcd")]
    windows = document_windows(Letters(), texts, 20, 4)
    assert sorted(chr(row[0]) for row in windows.tolist()) == list("abcd")
    assert all(len(set(row)) == 1 for row in windows.tolist())
    with pytest.raises(ValueError, match="4 documents hold a stretch of 20 tokens, not 5"):
        document_windows(Letters(), texts, 20, 5)
