"""Multiple choice: scores are log-probabilities of the options' words; order, ties and lengths."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch

from reattend.trunks.vlm import VisionLanguageModel, VLMShape
from reattend.trunks.vlm_options import choose

BOS, PAD = 1, 0
SHAPE = VLMShape(vocabulary=23, grid=(3, 5), tower=7, width=24, layers=3, heads=3, hidden=20)
QUESTIONS = torch.tensor([[[5, 6, 7, 8]], [[9, 8, PAD, PAD]], [[4, 9, 8, PAD]]])
OPTIONS = ([10], [11, 12], [13, 14, 15], [16])


def model_of(seed=0):
    torch.manual_seed(seed)
    model = VisionLanguageModel(SHAPE).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def prompt_of(model, questions=QUESTIONS):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 15, 7, generator=generator, dtype=torch.float64)
    return model.prompt(BOS, model.project(tokens), questions, PAD)


def whole_answer(model, picture, option):
    """Log-probabilities of an option's words, each predicted by a prompt that is read anew as one question."""
    question = [word for word in QUESTIONS[picture, 0].tolist() if word != PAD]
    found = []
    for count, word in enumerate(option):
        text = torch.tensor([[[*question, *option[:count]]]])
        prompt = prompt_of(model, text.expand(3, -1, -1))
        scores = model.answers(model.read(prompt))[picture]
        found.append(scores.log_softmax(0)[word].item())
    return found


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_log_probabilities_of_the_words(seed):
    model = model_of(seed)
    mean = choose(model, prompt_of(model), OPTIONS)
    total = choose(model, prompt_of(model), OPTIONS, per_word=False)
    for picture in range(3):
        for place, option in enumerate(OPTIONS):
            expected = sum(whole_answer(model, picture, option))
            assert total.scores[picture, place].item() == pytest.approx(expected, abs=1e-9)
            expected /= len(option)
            assert mean.scores[picture, place].item() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(mean.best, mean.scores.argmax(1))
    assert mean.letters == ["ABCD"[place] for place in mean.best.tolist()]


def test_the_order_of_the_options_does_not_change_the_chosen_words():
    said = set()
    for seed in range(4):
        model, chosen = model_of(seed), set()
        for order in permutations(OPTIONS):
            found = choose(model, prompt_of(model), order)
            chosen.add(tuple(tuple(order["ABCD".index(letter)]) for letter in found.letters))
        assert len(chosen) == 1
        said |= set(chosen.pop())
    assert len(said) > 1  # models differ in what they choose


def test_equal_scores_go_to_the_smaller_numbers_wherever_they_stand():
    model = model_of()
    with torch.no_grad():
        model.words.weight[10:17] = model.words.weight[10].clone()  # words that nothing tells apart
    for order in permutations(([10], [13], [16])):
        found = choose(model, prompt_of(model), order)
        assert (found.scores == found.scores[:, :1]).all()
        assert [order[place] for place in found.best.tolist()] == [[10]] * 3


def test_length_is_a_handicap_of_sums_alone():
    """A model that knows nothing: every word has one of 23."""
    model = model_of()
    with torch.no_grad():
        model.words.weight.zero_()
    mean = choose(model, prompt_of(model), OPTIONS)
    total = choose(model, prompt_of(model), OPTIONS, per_word=False)
    nats = -torch.tensor(23.0, dtype=torch.float64).log()
    torch.testing.assert_close(mean.scores, nats.expand(3, 4))
    torch.testing.assert_close(total.scores, nats * torch.tensor([1, 2, 3, 1]).expand(3, 4))


def test_what_is_dropped_before_a_layer_is_not_seen_by_options():
    model = model_of()
    kept = torch.tensor([[0, 7, 9], [2, 3, 14], [1, 5, 6]])

    def drop(number, prompt, _):
        return prompt.keep_patches(kept) if number == 0 else prompt

    found = choose(model, prompt_of(model), OPTIONS, before_layer=drop)
    before = prompt_of(model).keep_patches(kept)
    torch.testing.assert_close(found.scores, choose(model, before, OPTIONS).scores)
    assert not torch.allclose(found.scores, choose(model, prompt_of(model), OPTIONS).scores)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([[10]], "2 to 26 options, not 1"),
        ([[10 + n % 13] for n in range(27)], "not 27"),
        ([[10], []], "words of its own"),
        ([[10], [11, 12], [10]], "words of its own"),
    ],
)
def test_options_that_cannot_be_told_apart_are_refused(options, said):
    model = model_of()
    with pytest.raises(ValueError, match=said):
        choose(model, prompt_of(model), options)


def test_packed_questions_are_refused():
    model = model_of()
    prompt = prompt_of(model, QUESTIONS.expand(-1, 2, -1))
    with pytest.raises(ValueError, match="one question each"):
        choose(model, prompt, OPTIONS)
    nothing = replace(prompt_of(model), asked=torch.zeros(3, prompt_of(model).length).bool())
    with pytest.raises(ValueError, match="one question each"):
        choose(model, nothing, OPTIONS)
