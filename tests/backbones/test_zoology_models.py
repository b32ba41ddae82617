"""The build of Zoology's models: its cells, its text, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import zoology as build
from reattend.backbones.trained.zoology import SETTINGS, Passages, accuracy, untrained
from reattend.data.mqar import RecallTask
from reattend.data.word_tokens import Vocabulary, token_stream
from reattend.trunks.language import Trunk, parameter_count

SENTENCE = "in the beginning was the word and the word was here . "


def made_up_passages(setting):
    texts = [SENTENCE * 20] * 3
    words = Vocabulary(texts)
    stream = token_stream(texts, words)
    return Passages(words, stream, stream[: setting.length + 1].repeat(4, 1))


@pytest.mark.parametrize("profile", SETTINGS)
def test_sizes_on_text_are_those_the_claims_compare(profile):
    setting = SETTINGS[profile].text
    count = {
        name: parameter_count(build.untrained_text(setting, name, 0)) for name in setting.models
    }
    assert 0.9 < count["BaseConv"] / count["Attention"] <= 1
    assert count["BaseConv, large"] >= 4 * count["Attention"]


def test_cells_are_a_grid_and_the_look_ups_of_the_last_task():
    cells = SETTINGS["cpu"].cells()
    assert len(set(cells)) == len(cells) == 2 * 2 * 2 + 4
    assert ("learned", 1, 32) in cells


def test_batches_are_text_and_recall_over_its_symbols():
    setting = SETTINGS["smoke"].text
    tokens, labels = next(made_up_passages(setting).batches(setting, 0))
    assert tokens.shape == labels.shape == (2 * setting.rows, setting.length)
    text, recall = tokens.split(setting.rows)
    assert torch.equal(text[:, 1:], labels[: setting.rows, :-1])
    symbols = range(setting.common, setting.common + setting.symbols)
    assert all(token in symbols for token in recall.unique().tolist())
    asked = labels[setting.rows :] != -100
    assert asked.any()
    assert torch.equal(labels[setting.rows :][asked], recall.roll(-1, 1)[asked])


def test_accuracy_is_a_percentage_of_the_questions():
    task = RecallTask(16, 12, 2)

    class Oracle(Trunk):
        def forward(self, tokens):
            answers = torch.zeros(*tokens.shape, 16)
            for row, r in enumerate(tokens.tolist()):
                for place, token in enumerate(r):
                    known = dict(zip(r[0:4:2], r[1:4:2], strict=True))
                    answers[row, place, known.get(token, 0)] = 1
            return answers

    assert accuracy(Oracle(16, 2, []), task, 20, 3) == 100
    assert accuracy(untrained("baseconv", 16, 8, 12, 0).eval(), task, 200, 3) < 50


def test_unknown_mixers_are_refused():
    with pytest.raises(
        ValueError, match="unknown mixer 'rwkv'; there are: attention, baseconv, full"
    ):
        build.mixers("rwkv", 8)


def test_training_and_reading_back(tmp_path, monkeypatch):
    small = replace(SETTINGS["smoke"], seeds=1, widths=(8,))
    small = replace(small, text=replace(small.text, seeds=1))
    monkeypatch.setitem(SETTINGS, "smoke", small)
    monkeypatch.setattr(build, "passages", lambda profile: made_up_passages(small.text))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build.build(tmp_path / name, "smoke")
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path / "first")
    recall, text = build.load("smoke")
    assert list(recall) == small.cells()
    assert list(text) == list(small.text.models)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    fresh = untrained("attention", small.vocabulary, 8, 16, 0)
    trained = recall["attention", 0, 8][0]
    assert not torch.equal(fresh.tokens.weight, trained.tokens.weight)
    assert not trained.training
