"""The generator of multi-query associative recall."""

import itertools

import pytest
import torch

from reattend.data.mqar import (
    FILLER,
    IGNORED,
    RecallTask,
    draw_without_replacement,
    recall_accuracy,
    recall_batch,
)

TASKS = [
    RecallTask(vocabulary=64, length=32, pairs=8),
    RecallTask(vocabulary=41, length=33, pairs=5),
    RecallTask(vocabulary=40, length=16, pairs=4, queries=1),
    RecallTask(vocabulary=512, length=17, pairs=1),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dictionary_predictions(tokens, task):
    """The exact solver: read the pairs into a dictionary, look every token up."""
    predictions = torch.zeros_like(tokens)
    for row, guess in zip(tokens.tolist(), predictions, strict=True):
        memory = dict(zip(row[: 2 * task.pairs : 2], row[1 : 2 * task.pairs : 2], strict=True))
        guess[:] = torch.tensor([memory.get(token, 0) for token in row])
    return predictions


@pytest.mark.parametrize("task", TASKS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_row_is_as_described(task, seed):
    tokens, labels = recall_batch(task, 50, generator(seed))
    half, pairs = task.vocabulary // 2, task.pairs
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    assert ((keys >= 1) & (keys < half)).all()
    assert ((values >= half) & (values < task.vocabulary)).all()
    for row in (*keys, *values):
        assert len(row.unique()) == pairs

    asked = labels != IGNORED
    assert (asked.sum(1) == (task.queries or pairs)).all()
    positions = asked.nonzero()[:, 1]
    assert (positions >= 2 * pairs).all()
    assert (positions % 2 == 0).all()
    assert (tokens[:, 2 * pairs :][~asked[:, 2 * pairs :]] == FILLER).all()
    for row, label, key, value in zip(tokens, labels, keys, values, strict=True):
        where = label != IGNORED
        wanted = dict(zip(key.tolist(), value.tolist(), strict=True))
        assert label[where].tolist() == [wanted[token] for token in row[where].tolist()]
        assert len(row[where].unique()) == where.sum()


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_dictionary_solves_it(task):
    tokens, labels = recall_batch(task, 20, generator())
    assert (recall_accuracy(dictionary_predictions(tokens, task), labels) == 1).all()


def test_accuracy_is_averaged_within_a_row():
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [IGNORED, IGNORED, 7, IGNORED]])
    predictions = torch.tensor([[IGNORED, 5, 0, 0], [7, 7, 7, 7]])
    assert recall_accuracy(predictions, labels).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("vocabulary", [40, 41])
def test_chance_is_one_over_the_number_of_values(vocabulary):
    task = RecallTask(vocabulary, 16, 4)
    half = vocabulary // 2
    assert task.chance == 1 / len(range(half, vocabulary))
    tokens, labels = recall_batch(task, 4000, generator())
    guesses = torch.randint(half, vocabulary, tokens.shape, generator=generator(1))
    # 16,000 guesses at 5 %: three standard errors are 0.5 points.
    assert recall_accuracy(guesses, labels).mean().item() == pytest.approx(task.chance, abs=0.006)


def test_the_seed_decides():
    task = TASKS[0]
    first, again, other = (recall_batch(task, 4, generator(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_draws_follow_successive_weighted_draws():
    weights = torch.tensor([5.0, 3.0, 1.0, 1.0])
    drawn = draw_without_replacement(weights, 100_000, 2, generator())
    p = (weights / weights.sum()).tolist()
    for i, j in itertools.permutations(range(4), 2):
        expected = p[i] * p[j] / (1 - p[i])
        observed = ((drawn[:, 0] == i) & (drawn[:, 1] == j)).double().mean().item()
        assert observed == pytest.approx(expected, abs=0.006)


def test_gaps_follow_the_power_law():
    task = RecallTask(vocabulary=64, length=42, pairs=1, power=0.3)
    _, labels = recall_batch(task, 100_000, generator())
    gaps = ((labels != IGNORED).nonzero()[:, 1] - 2) // 2
    weights = torch.arange(1, 21) ** (task.power - 1.0)
    observed = torch.bincount(gaps, minlength=20) / len(gaps)
    torch.testing.assert_close(observed, weights / weights.sum(), atol=0.006, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 64, "length": 31, "pairs": 8}, "need 32 tokens"),
        ({"vocabulary": 16, "length": 64, "pairs": 8}, "distinct keys"),
        ({"vocabulary": 64, "length": 32, "pairs": 4, "queries": 5}, "5 queries for 4 pairs"),
    ],
)
def test_impossible_tasks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecallTask(**arguments)
