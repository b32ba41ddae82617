"""Classifiers under perturbed attention: tasks, runs that are done once, measurements by hand."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score

from reattend.attention.statistics import entropy
from reattend.studies import perturbed_attention
from reattend.studies.perturbed_attention import (
    SIDES,
    Task,
    Trainer,
    accuracy,
    importance,
    measure,
    numbered,
    read_tasks,
    shift,
)
from reattend.text_matching.attention_iat import (
    PAD,
    AttentionClassifier,
    Technique,
    Texts,
    log_odds,
    nearest_words,
)
from reattend.training.loop import train

SIZES = dict(zip(SIDES, (40, 20, 30), strict=True))


def made(classes=2, seed=0):
    """Texts of 4 to 7 words whose first word tells the class."""
    generator = torch.Generator().manual_seed(seed)
    sides = {}
    for side, count in SIZES.items():
        targets = torch.randint(classes, (count,), generator=generator)
        first = torch.randint(2, 12, (count, 7), generator=generator)
        lengths = torch.randint(4, 8, (count,), generator=generator)
        first[torch.arange(7) >= lengths[:, None]] = PAD
        first[:, 0] = 2 + targets
        sides[side] = Texts(first, targets)
    table = torch.randn(12, 50, generator=generator)
    table[0] = 0
    names = tuple("abc"[:classes])
    return Task(names, sides, list("_?uvwxyzklmn"), table, nearest_words(table, 3), None)


def trainer(**tasks):
    made = Trainer(tasks, hidden=6, trainable=False, steps=12, batch=8)
    made.rates.update(dict.fromkeys(tasks, 0.02))
    return made


def test_points_are_f1_for_two_classes_and_accuracy_for_more():
    targets, said = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([0, 1, 0, 1, 1])
    assert made(2).points(targets, said) == pytest.approx(100 * f1_score(targets, said))
    assert made(3).points(targets, said) == pytest.approx(60)
    assert accuracy(targets, said) == pytest.approx(60)


def test_numbers_of_words():
    assert numbered([["a", "b", "q"], ["b"]], {"a": 2, "b": 3}).tolist() == [[2, 3, 1], [3, 0, 0]]


def test_real_tasks_are_read():
    tasks = read_tasks(["reviews", "questions"], SIZES)
    for name, longest in (("reviews", 24), ("questions", 16)):
        task = tasks[name]
        assert {side: len(texts) for side, texts in task.sides.items()} == SIZES
        assert task.sides["train"].first.shape[1] <= longest
        assert len(task.vocabulary) == len(task.table)
        assert task.table[0].abs().max() == 0
    assert tasks["questions"].class_weights is None
    assert 50 < tasks["reviews"].linear_score() <= 100


def test_a_training_is_done_once_and_depends_on_its_seed():
    runs = trainer(toy=made())
    at = Technique("scores", "adversarial", size=2.0)
    one = runs.run("toy", at, 1)
    assert runs.run("toy", replace(at), 1) is one
    assert runs.run("toy", Technique(size=3.0), 1) is runs.run("toy", Technique(), 1)
    again = trainer(toy=made()).run("toy", at, 1)
    torch.testing.assert_close(again.model.score.weight, one.model.score.weight, rtol=0, atol=0)
    other = runs.run("toy", at, 2)
    assert not torch.equal(other.model.score.weight, one.model.score.weight)
    assert not torch.equal(
        runs.run("toy", replace(at, size=0.1), 1).model.score.weight, one.model.score.weight
    )


def test_asked_once_a_run_keeps_its_last_state(monkeypatch):
    """By hand: the state after every step, of which three checks score every fourth, one the twelfth."""
    states = []

    def watched(*arguments, **options):
        def note(step):
            states.append(arguments[0].score.weight.detach().clone())

        return train(*arguments, after_step=note, **options)

    monkeypatch.setattr(perturbed_attention, "train", watched)
    runs = trainer(toy=made(seed=1))
    runs.rates["toy"] = 0.1  # fast enough for this seed to be best before its end
    at = Technique("scores", "adversarial", size=2.0)
    kept, last = (runs.run("toy", at, 1, checks=checks) for checks in (3, 1))
    torch.testing.assert_close(states[:12], states[12:], rtol=0, atol=0)
    assert torch.equal(last.model.score.weight, states[11])
    assert next(k for k in range(12) if torch.equal(kept.model.score.weight, states[k])) in (3, 7)
    assert kept.validation > last.validation


def test_it_learns_what_a_linear_model_learns():
    task = made()
    runs = trainer(toy=task)
    runs.steps = 60
    assert runs.run("toy", Technique(), 0).accuracy > 95


def test_measurements_by_hand():
    task = made()
    torch.manual_seed(0)
    model = AttentionClassifier(task.table, 6, 2, False, False, task.neighbours)
    probe = task.sides["test"]
    found = measure(model, probe, [1.0, 3.0], seed=0)
    assert len(found) == 1 + 3 + 2 * 2
    weights = model(probe)[1].detach()
    assert found["entropy"] == pytest.approx(entropy(weights).mean().item())
    embedded = model.embed(probe).detach().requires_grad_()
    log_odds(model.read(model.encode(probe, embedded))[0]).sum().backward()
    by_hand = embedded.grad.abs().sum(-1)
    torch.testing.assert_close(importance(model, probe), by_hand)
    rows = [torch.stack([weights[i], by_hand[i]])[:, probe.mask[i]] for i in range(len(probe))]
    expected = torch.stack([torch.corrcoef(row)[0, 1] for row in rows]).mean()
    assert found["correlation, gradient"] == pytest.approx(expected.item(), abs=1e-5)


def test_shifts_grow_with_their_size_and_are_worse_when_adversarial():
    task = made()
    torch.manual_seed(0)
    model = AttentionClassifier(task.table, 6, 2, False, False, task.neighbours)
    probe = task.sides["test"]
    found = {s: shift(model, probe, "adversarial", s, 0) for s in (0.0, 0.5, 3.0)}
    assert found[0.0] == 0 < found[0.5] < found[3.0] <= 1
    assert shift(model, probe, "random", 0.5, 0) < found[0.5]
