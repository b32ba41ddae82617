"""Students of pair tasks: scores by hand, unit logits, the placebo's labels, the chosen rate."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from reattend.backbones.trained.pair_teachers import TeacherTask
from reattend.studies.distilled_pairs import (
    EXCHANGED,
    Fit,
    PairTask,
    SentenceEncoder,
    TrainedPair,
    best_rate,
    glove_means,
)
from reattend.text_matching.dse import PairHead, teacher_targets

NOUNS = ("dog", "cat", "river", "bank", "song", "stone", "king")


def made(kind="binary", pairs=15, seed=0):
    """Two nouns a pair; the label says whether they are the same."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {"binary": 2, "regression": 1, "multiclass": 3}[kind]
    splits = {}
    for side in ("train", "validation", "test"):
        drawn = torch.randint(len(NOUNS), (2, pairs), generator=generator)
        same = torch.rand(pairs, generator=generator) < 0.5
        drawn[1] = torch.where(same, drawn[0], (drawn[0] + 1) % len(NOUNS))
        first, second = ([f"the {NOUNS[i]} is here" for i in row] for row in drawn.tolist())
        splits[side] = (
            first,
            second,
            same.float(),
            7 * torch.randn(pairs, outputs, generator=generator),
        )
    return TeacherTask(kind, ("other", "same"), splits, {})


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder(2, trained=0, top=2, length=16, projection=8)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_logits_have_unit_spread_over_the_training_pairs_and_rows_find_their_texts(encoder, kind):
    teacher = made(kind)
    task = PairTask(teacher, (13, 9, 11), encoder)
    assert task.teacher["train"].std().item() == pytest.approx(1)
    raw = teacher_targets(teacher.of("train")[3][:13], kind).std()
    expected = teacher_targets(teacher.of("test")[3][:11], kind) / raw
    torch.testing.assert_close(task.teacher["test"], expected)
    first, second = task.rows["test"]
    assert [task.sentences[i] for i in first] == teacher.of("test")[0][:11]
    assert [task.sentences[i] for i in second] == teacher.of("test")[1][:11]
    assert len(task.stored) == len(set(task.sentences)) == len(task.sentences)


def test_scores_by_hand(encoder):
    task = PairTask(made(), (13, 9, 11), encoder)
    right = task.decided(torch.where(task.labels["test"] == 1, 2.0, -2.0)[:, None])
    assert right.tolist() == [1.0] * 11
    right[:3] = 0
    assert task.score(right) == pytest.approx([800 / 11])
    ones = task.labels["test"].sum().item()
    assert task.trivial() == pytest.approx(100 * max(ones, 11 - ones) / 11)
    regression = PairTask(made("regression"), (13, 9, 11), encoder)
    said = np.random.default_rng(0).normal(size=(11, 2))
    expected = [100 * pearsonr(column, regression.labels["test"]).statistic for column in said.T]
    assert regression.score(said) == pytest.approx(expected)
    assert regression.trivial() == 0


def test_the_cosine_alone_tells_equal_sentences(encoder):
    task = PairTask(made(pairs=40), (40, 40, 40), encoder)
    found = task.by_threshold(encoder.untrained(task.stored))
    assert task.score(found["test"]).item() == 100


def test_students_start_from_the_generic_encoder_and_repeat(encoder):
    task, fit = PairTask(made(), (13, 9, 11), encoder), Fit(2.0, 4)
    before = encoder.model.encoder.layer[0].output.dense.weight.clone()
    one, two, other = (fit.student(encoder, task, 0.5, 1e-3, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one.logits(task), two.logits(task), rtol=0, atol=0)
    assert not torch.equal(one.logits(task), other.logits(task))
    torch.testing.assert_close(encoder.model.encoder.layer[0].output.dense.weight, before)


def test_the_placebo_reads_labels_and_alpha_zero_no_teacher(encoder):
    teacher = made()
    task, fit = PairTask(teacher, (13, 9, 11), encoder), Fit(1.0, 4)
    labels_only = fit.student(encoder, task, 0.0, 1e-3, 0).logits(task)
    placebo = fit.student(encoder, task, EXCHANGED, 1e-3, 0).logits(task)
    task.teacher["train"] = task.teacher["train"] + 5
    torch.testing.assert_close(
        fit.student(encoder, task, 0.0, 1e-3, 0).logits(task), labels_only, rtol=0, atol=0
    )
    assert not torch.equal(fit.student(encoder, task, EXCHANGED, 1e-3, 0).logits(task), placebo)


def test_the_rate_with_the_best_validation_score_is_chosen(encoder):
    task = PairTask(made(), (13, 9, 11), encoder)
    means = torch.eye(len(task.sentences))

    class Fixed(PairHead):
        """Right on validation pairs where told to be."""

        def __init__(self, right):
            super().__init__(1, 1)
            self.right = right

        def forward(self, u, v):
            sign = 2 * task.labels["validation"][: len(u)] - 1
            return (sign if self.right else -sign)[:, None]

    asked = []

    def make(rate, seed):
        asked.append((rate, seed))
        return TrainedPair(Fixed(rate == 0.2), means)

    assert best_rate(make, task, (0.1, 0.2, 0.3))[0] == 0.2
    assert asked == [(0.1, 0), (0.2, 0), (0.3, 0)]


def test_glove_means_leave_out_unknown_words():
    alone, twice, none = glove_means(["Dog!", "dog xqzzv dog", "xqzzv"])
    torch.testing.assert_close(alone, twice)
    assert alone.norm() > 1
    assert none.norm() == 0
    both = glove_means(["dog cat", "dog", "cat"])
    torch.testing.assert_close(both[0], (both[1] + both[2]) / 2)
