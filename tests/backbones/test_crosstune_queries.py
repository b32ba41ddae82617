"""What is asked of the black boxes: vectors do not depend on their batch, and what is written is kept clean."""

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reattend.backbones.pretrained import minilm
from reattend.backbones.trained import crosstune
from reattend.backbones.trained.crosstune import (
    SETTINGS,
    WORDS,
    SentenceEncoder,
    fresh,
    last_states,
    write,
    writing_prompt,
)
from reattend.project import load_yaml

SENTENCES = [
    "Who built it ?",
    "What does the word paradox mean in a long sentence about logic ?",
    "Where ?",
]


def letters():
    """A tokenizer of single characters."""
    known = dict(
        zip("\n?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ", range(1, 60), strict=False)
    )
    made = Tokenizer(WordLevel(known | {"#": 0}, unk_token="#"))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="#")


LETTERS = letters()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def test_sentence_vectors_are_those_of_each_text_alone():
    tokenizer, model = minilm.load(2)
    encode = SentenceEncoder(tokenizer, model)
    together = encode(SENTENCES)
    with torch.inference_mode():
        for sentence, vector in zip(SENTENCES, together, strict=True):
            states = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
            expected = F.normalize(states.mean(0), dim=-1)
            torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
            largest = F.normalize(states[1:-1].amax(0), dim=-1)  # without [CLS] and [SEP]
            found = encode.maximum([sentence, SENTENCES[1]])[0]
            torch.testing.assert_close(found, largest, rtol=0, atol=1e-5)


def test_last_states_are_those_of_each_text_alone(tiny):
    states = last_states(tiny, LETTERS, SENTENCES)
    for sentence, state in zip(SENTENCES, states, strict=True):
        ids = torch.tensor([LETTERS(sentence).input_ids])
        with torch.no_grad():
            alone = tiny.model(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(state, alone, rtol=0, atol=1e-5)


def test_writing_continues_its_own_prompt(tiny):
    """With one likeliest token at every step, each prompt gets what the model says behind it alone."""
    sharp = LlamaForCausalLM(tiny.config)
    sharp.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        sharp.lm_head.weight.mul_(1e4)
    lines = write(sharp.eval(), LETTERS, SENTENCES, 2, torch.Generator().manual_seed(0), longest=6)
    for sentence, own in zip(SENTENCES, lines, strict=True):
        ids = LETTERS(sentence).input_ids
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(sharp(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = LETTERS.decode(ids[-6:], skip_special_tokens=True).split("\n")[0].strip()
        assert own == [expected, expected]


def test_lines_that_have_ended_are_not_read_on(tiny, monkeypatch):
    """What the others say does not change, and it is what the model says behind each prompt alone."""
    sharp = LlamaForCausalLM(tiny.config)
    sharp.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        sharp.lm_head.weight.mul_(1e4)
        sharp.lm_head.weight[LETTERS.convert_tokens_to_ids("\n")] *= 1.5  # some lines end
    read, rows = crosstune._read, []
    monkeypatch.setattr(crosstune, "_read", lambda m, *a: rows.append(len(a[0])) or read(m, *a))
    prompts = [*SENTENCES, "a", "who", "what is", "B", "Why not ?"]
    lines = write(sharp.eval(), LETTERS, prompts, 2, torch.Generator().manual_seed(0), longest=8)
    ended = 0
    for prompt, own in zip(prompts, lines, strict=True):
        ids = LETTERS(prompt).input_ids
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(sharp(torch.tensor([ids])).logits[0, -1].argmax()))
        whole = LETTERS.decode(ids[-8:], skip_special_tokens=True)
        ended += "\n" in whole
        assert own == [whole.split("\n")[0].strip()] * 2
    assert 0 < ended < len(prompts)
    assert rows[0] == len(prompts)
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] <= 2 * (len(prompts) - 2)


def test_what_is_written_is_new():
    lines = [
        "Who is he ?",
        "who is HE",
        "One",
        "",
        "Who are they ?",
        "What is it ?",
        "Why is that ?",
    ]
    assert fresh(lines, ["what is it?"], 2) == ["Who is he ?", "Who are they ?"]
    assert fresh(lines, [], 9) == ["Who is he ?", "Who are they ?", "What is it ?", "Why is that ?"]


def test_the_prompt_leaves_the_next_number_open():
    assert writing_prompt("Kind.", ["a b", "c d"]) == "Kind.\n\n1. a b\n2. c d\n3."


def test_settings_and_words_fit(root):
    assert all(len(words) == 6 for words in WORDS)
    parameters = load_yaml((root / "params.yaml").read_text())["papers"]["crosstune"]
    for profile, setting in SETTINGS.items():
        first, count = (parameters[profile][name] for name in ("draws", "written"))
        assert setting.seeds == tuple(
            range(first, first + count)
        )  # none of the other claims' draws
