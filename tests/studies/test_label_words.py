"""Banks of items against the whole model, their measures, and extremes that noise does not make."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import t
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from reattend.attention.host import attach
from reattend.data.texts import TextSet
from reattend.long_context.act import ACT, sinks
from reattend.studies.label_words import (
    Bank,
    Item,
    LabelTask,
    Survey,
    accuracy_table,
    behind_examples,
    class_items,
    drawn_examples,
    extremes_on_other_half,
    first_sentence,
    flipped_means,
    heads_table,
    heads_to_search,
    held_out_mean,
    sink_rates,
)

LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        initializer_range=0.5,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def items():
    draw = torch.Generator().manual_seed(1)
    lengths, options = (12, 9, 12, 9), ([3, 5], [3, 5, 7], [3, 5], [3, 5, 7])
    return [
        Item("toy", torch.randint(0, 41, (n,), generator=draw).tolist(), some, i % 2)
        for i, (n, some) in enumerate(zip(lengths, options, strict=True))
    ]


@pytest.fixture(scope="module")
def bank(model, items):
    return Bank(model, items, keep=range(LAYERS), survey=Survey())


def alone(model, item, method=None):
    """Log-probabilities of the label words from the whole model on one prompt."""
    prompt = torch.tensor([item.tokens])
    with torch.inference_mode():
        if method is None:
            logits = model(prompt).logits
        else:
            with attach(model, method):
                logits = model(prompt).logits
    return logits[0, -1, item.options].log_softmax(-1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_bank_answers_as_the_whole_model_does(model, items, bank, calibrated):
    method = ACT(heads=[(1, 0), (1, 2), (2, 3)], threshold=0.05) if calibrated else None
    scores = bank.run(method, 1) if calibrated else bank.dense
    for item, row in zip(items, scores, strict=True):
        expected = alone(model, item, method)
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)
    assert calibrated == (not torch.equal(scores, bank.dense))


def test_measures(items, bank):
    nll = bank.nll(bank.dense)
    assert nll[1].item() == pytest.approx(-bank.dense[1, items[1].answer].item())
    assert bank.chance.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 3])
    likelier = bank.dense.argmax(-1) == torch.tensor([item.answer for item in items])
    assert bank.right(bank.dense).bool().tolist() == likelier.tolist()


def test_items_without_a_sink_keep_their_answers(bank):
    rows = torch.tensor([True, False, False, True])
    scores = bank.run(ACT(heads=[(1, 0), (1, 1)], threshold=0.05), 1, rows)
    assert torch.equal(scores[1:3], bank.dense[1:3])


class Words(PreTrainedTokenizerBase):
    """A tokenizer whose token n is a line break, a full stop or a word."""

    def __init__(self):
        pass

    def decode(self, tokens):
        return ("\n", ".", "word")[tokens[0] % 3]


def test_shares_of_classes(items, bank):
    shares = bank.token_classes(Words(), slice(0, LAYERS), threshold=0.01)
    assert sum(share[0] for share in shares.values()) == pytest.approx(100)
    # Of the 2 x 11 + 2 x 8 tokens behind the first, three a prompt are the last three.
    assert shares["last three"][1] == pytest.approx(100 * 12 / 38)
    words = [token % 3 == 2 for item in items for token in item.tokens[1:-3]]
    assert shares["word"][1] == pytest.approx(100 * sum(words) / 38)


def test_heads_to_search_are_the_first_of_their_layers():
    order = [(1, 3), (0, 2), (1, 0), (1, 1), (2, 2), (2, 0)]
    assert heads_to_search(order, range(1, 3), per_layer=2, count=9) == [
        (1, 0),
        (1, 3),
        (2, 0),
        (2, 2),
    ]
    assert heads_to_search(order, range(3), per_layer=1, count=2) == [(0, 2), (1, 3)]


def test_flipped_signs_keep_the_size_and_lose_the_direction():
    changes = np.full((2, 400), 3.0)
    changes[1, ::2] = 0
    null = flipped_means(changes, seed=0)
    assert null.shape == (2000, 2)
    assert np.abs(null.mean(axis=0)).max() < 0.02
    assert null.std(axis=0) == pytest.approx([3 / 20, 3 / 20 / np.sqrt(2)], rel=0.1)
    # One draw of signs serves all heads: where they agree, so does chance.
    assert np.corrcoef(null.T)[0, 1] == pytest.approx(np.sqrt(0.5), abs=0.05)


def test_sink_rates_are_those_of_the_survey(model, items):
    prompts = torch.tensor([items[0].tokens, items[2].tokens])
    definitions = {"low": {"threshold": 0.3}, "never": {"threshold": 1.0}}
    rates = sink_rates(model, prompts, definitions, slice(1, None))
    with torch.inference_mode(), attach(model, Survey()) as survey:
        model(prompts)
    found = sinks(survey.stacked()[:, 1:], threshold=0.3).any(dim=-1)
    assert rates == {"low": pytest.approx(found.double().mean().item()), "never": 0.0}
    assert 0 < rates["low"] < 1


def test_extremes_of_noise_vanish_and_real_ones_stay():
    noise = np.random.default_rng(0).normal(size=(30, 4000))
    half = np.arange(4000) // 2000
    highest, lowest = extremes_on_other_half(noise, 3, half)
    assert noise.mean(axis=1).max() > 0.02  # ranked on the items themselves there are extremes
    assert abs(highest.mean()) < 0.025
    assert abs(lowest.mean()) < 0.025
    noise[4] += 0.5
    noise[7] -= 0.5
    highest, lowest = extremes_on_other_half(noise, 1, half)
    assert highest.mean() == pytest.approx(0.5, abs=0.06)
    assert lowest.mean() == pytest.approx(-0.5, abs=0.06)


def test_extremes_are_ranked_on_the_other_half_alone():
    changes = np.array([[9.0, 9.0, 0.0, 1.0], [0.0, 1.0, 9.0, 9.0]])
    highest, lowest = extremes_on_other_half(changes, 1, np.array([0, 0, 1, 1]))
    assert highest.tolist() == [0, 1, 0, 1]
    assert lowest.tolist() == [9, 9, 9, 9]


def test_a_list_is_never_measured_on_the_half_that_chose_it():
    values = np.array([[np.nan, 2.0, 4.0, np.nan], [1.0, np.nan, 6.0, 3.0]])
    got = held_out_mean(values, np.array([0, 1, 2, 0]))
    assert got.tolist() == [1, 2, 5, 3]


def test_drawn_examples_take_classes_in_turn_and_no_item_twice():
    pool = [Item("toy", [n], [0, 1, 2], n % 3, str(n)) for n in range(12)]
    firsts, texts = set(), set()
    for seed in range(200):
        examples = drawn_examples(pool, 7, random.Random(seed))
        answers = [example.answer for example in examples]
        assert sorted(answers[:3]) == [0, 1, 2]
        assert answers[3:6] == answers[:3]
        assert answers[6] == answers[0]
        assert len({example.text for example in examples}) == 7
        firsts.add(answers[0])
        texts.add(examples[0].text)
    assert firsts == {0, 1, 2}
    assert texts == {str(n) for n in range(12)}


class Letters(PreTrainedTokenizerBase):
    """A tokenizer with one token for each letter."""

    def __init__(self):
        pass

    def __call__(self, text, **_):
        return BatchEncoding({"input_ids": [ord(letter) for letter in text]})


def toy_task():
    texts = tuple(f"{n:02d}" for n in range(20))
    labels, sides = torch.arange(20) % 2, ("train", "train", "test", "test") * 5
    return LabelTask(
        TextSet(texts, labels, ("even", "odd"), sides), "<{}>", {"even": "e", "odd": "o"}, [4, 4]
    )


def test_a_longer_draw_begins_with_the_shorter_one():
    task = toy_task()
    everything = class_items(Letters(), "toy", task, "train", 10)
    assert [item.answer for item in everything] == [0, 1] * 5
    assert class_items(Letters(), "toy", task, "train", 4) == everything[:4]
    with pytest.raises(ValueError, match="toy, train: only 10 balanced items"):
        class_items(Letters(), "toy", task, "train", 12)


def test_an_item_stands_behind_its_solved_examples():
    task = toy_task()
    first, second, asked = class_items(Letters(), "toy", task, "train", 3)
    got = behind_examples(Letters(), task, [first, second], asked)
    prompt = "".join(map(chr, got.tokens))
    assert prompt == f"<{first.text}>e\n\n<{second.text}>o\n\n<{asked.text}>"
    assert (got.answer, got.options, got.text) == (asked.answer, asked.options, asked.text)


def test_the_first_sentence_is_the_one_behind_the_headline():
    article = "Rates rise. Again\nThe bank  raised\nrates by 0.5 points. Shares fell! Then rose."
    assert first_sentence(article) == "The bank raised rates by 0.5 points."


def test_measures_against_dense_are_differences_by_item(items, bank):
    answers = torch.tensor([item.answer for item in items])
    scores = bank.dense.clone()
    scores[0] = scores[0].flip(0) if bank.absent[0, -1] else scores[0].roll(1)
    scores[0, : len(items[0].options)] = bank.dense[0, : len(items[0].options)].flip(0)
    found = bank.against_dense(scores)
    nll = [-(scores[i, a] - bank.dense[i, a]).item() for i, a in enumerate(answers)]
    before = bank.dense.argmax(-1) == answers
    after = scores.argmax(-1) == answers
    assert before[0] != after[0]
    assert found["accuracy"] == pytest.approx(100 * after.double().mean().item())
    assert found["accuracy - dense"] == pytest.approx(25 * (int(after[0]) - int(before[0])))
    assert found["NLL - dense, nats"] == pytest.approx(np.mean(nll), abs=1e-6)
    assert found["standard error"] == pytest.approx(np.std(nll, ddof=1) / 2, abs=1e-6)


def test_over_chance_is_right_minus_a_guess(bank):
    expected = 100 * (bank.right(bank.dense).numpy() - np.array([1 / 2, 1 / 3, 1 / 2, 1 / 3]))
    np.testing.assert_allclose(bank.over_chance, expected)


def test_heads_table_has_a_row_a_head():
    rates = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    changes = np.array([[100.0, -100.0, 0.0, 100.0], [0.0, 0.0, 0.0, -100.0]])
    losses = np.array([[0.1, 0.2, 0.3, 0.4], [-0.4, 0.0, 0.0, 0.0]])
    kept = [[(0, 1)], [(0, 1), (5, 5)]]
    table = heads_table([(1, 0), (0, 1)], rates, changes, losses, np.array([2.0, 3.0]), kept)
    assert table["prompts with a sink, %"].tolist() == pytest.approx([30, 20])
    assert table["accuracy change, points"].tolist() == [25, -25]
    assert table["answers that changed to right or wrong, %"].tolist() == [75, 25]
    assert table["NLL change, nats"].tolist() == pytest.approx([0.25, -0.1])
    assert table["s.d. by chance"].tolist() == [2, 3]
    assert table["lists that keep it"].tolist() == [0, 2]


def test_accuracy_table_pairs_act_with_dense():
    dense, ours = np.array([0.0, 100, 100, 0]), np.array([100.0, 100, 100, 0])
    groups = {
        ("news", 2): {"dense": dense, "ACT": ours},
        ("review", 0): {"dense": ours, "ACT": dense, "all heads": dense},
        ("news", 0): {"dense": dense, "ACT": dense + 1, "all heads": ours},
    }
    table = accuracy_table(groups, ["dense", "ACT", "all heads"])
    assert list(zip(table["task"], table["examples"], strict=True)) == [
        ("news", 0),
        ("review", 0),
        ("news", 2),
    ]
    assert table["ACT - dense"].tolist() == [1, -25, 25]
    assert table["all heads"].isna().tolist() == [False, False, True]
    half = t.ppf(0.975, 3) * 50 / 2
    assert table["high"].iloc[2] - 25 == pytest.approx(half)
    assert 25 - table["low"].iloc[2] == pytest.approx(half)
