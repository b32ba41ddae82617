"""The build of Zoology's models: its cells, its text, reading back."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from reattend.backbones.trained import zoology as build
from reattend.backbones.trained.zoology import SETTINGS, Passages, Together, accuracy, untrained
from reattend.data.mqar import RecallTask, recall_batch
from reattend.data.word_tokens import Vocabulary, token_stream
from reattend.training.loop import TrainingPlan, train
from reattend.trunks.language import Trunk, labelled_loss, parameter_count

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


@pytest.mark.parametrize("profile", SETTINGS)
def test_arms_that_are_compared_share_seeds_from_the_first_on(profile):
    setting = SETTINGS[profile]
    seeds = {cell: setting.seeds_of(cell) for cell in setting.cells()}
    for cell, found in seeds.items():
        assert found.start == build.FIRST_SEED
        assert len(found) >= setting.seeds
        if cell[0] != "baseconv":
            assert len(found) == setting.seeds
    assert [len(seeds["baseconv", 0, width]) for width in setting.widths] == [
        *setting.convolution_seeds
    ]


def convolutions_and_rows(task, seeds=3):
    """Models of BaseConv with different weights, and for each of them an endless stream of its own rows."""

    def rows(seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield recall_batch(task, 6, generator)

    models = [untrained("baseconv", task.vocabulary, 8, task.length, seed) for seed in range(seeds)]
    return [model.double() for model in models], list(map(rows, range(seeds)))


@pytest.mark.parametrize("bound", [0.3, 1e6])
def test_together_each_model_has_the_loss_and_the_gradient_it_has_alone(bound):
    task = RecallTask(16, 20, 3)
    models, streams = convolutions_and_rows(task)
    batches = [next(stream) for stream in streams]
    losses, norms = [], []
    for model, batch in zip(models, batches, strict=True):
        losses.append(labelled_loss(model, *batch))
        losses[-1].backward()
        norms.append(clip_grad_norm_(model.parameters(), bound).item())
    together = Together(models, bound)
    loss = together.loss(*(torch.stack(parts) for parts in zip(*batches, strict=True)))
    torch.testing.assert_close(loss, sum(losses))
    loss.backward()
    assert all(0.3 < norm < 1e6 for norm in norms)
    assert len(together.names) == len(list(models[0].parameters()))
    for name, weights in zip(together.names, together.weights, strict=True):
        alone = [model.get_parameter(name.removeprefix("trunk.")).grad for model in models]
        torch.testing.assert_close(weights.grad, torch.stack(alone))


@pytest.fixture
def double_precision():
    """Adam's first steps make a gradient's rounding as large as a step."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
def test_together_models_train_as_they_do_alone():
    task = RecallTask(16, 20, 3)
    setting = replace(
        SETTINGS["smoke"], vocabulary=16, tasks=((20, 3),), widths=(8,), steps=6, batch=6
    )
    seeds, cell = range(3, 6), ("baseconv", 0, 8)
    found = build._convolutions(setting, cell, seeds, "cpu")
    for seed, trained in zip(seeds, found, strict=True):
        alone = untrained("baseconv", 16, 8, 20, seed)
        start = alone.tokens.weight.clone()
        rows = build._rows(task, setting, seed)
        plan = TrainingPlan(6, setting.rate, warmup=3, fused=True)
        train(alone, rows, lambda m, b: labelled_loss(m, *b), plan)
        assert not trained.training
        assert (start - alone.tokens.weight).abs().max() > 0.01
        for name, weight in alone.state_dict().items():
            torch.testing.assert_close(trained.state_dict()[name], weight, atol=1e-6, rtol=1e-6)


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
    small = replace(SETTINGS["smoke"], seeds=1, widths=(8,), convolution_seeds=(5,))
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
    assert [len(recall[mixer, 0, 8]) for mixer in ("attention", "baseconv")] == [1, 5]
    for mixer in ("attention", "baseconv"):
        for seed, trained in enumerate(recall[mixer, 0, 8], build.FIRST_SEED):
            fresh = untrained(mixer, small.vocabulary, 8, 16, seed)
            moved = (fresh.tokens.weight - trained.tokens.weight).abs().max()
            assert 0 < moved < 0.05  # trained from this seed's start, and no other's
            assert not trained.training
