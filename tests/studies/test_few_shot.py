"""Few-shot classifiers on frozen vectors: against hand counts and the libraries they stand on."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from reattend.studies.few_shot import (
    ScorerPlan,
    accuracy,
    exchanged,
    fit_scorer,
    judge,
    neighbours,
    probe,
    probe_teacher,
    prototypes,
    random_units,
    search_prompt,
    shuffled,
)
from reattend.studies.few_shot_figures import (
    draw_against_shots,
    draw_class_heads,
    draw_gains,
    spread,
)
from reattend.studies.few_shot_tables import (
    asked_table,
    labels_table,
    main_table,
    means_of_draws,
    switch_table,
    with_reported,
)
from reattend.text_matching.crosstune import CrossTune


def units(items, width, seed):
    drawn = torch.randn(items, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1)


SHOTS, LABELS = units(12, 20, 0), torch.arange(12) % 3
OTHERS, DESCRIPTIONS = units(7, 20, 1), units(3, 20, 2)


def test_prototypes_are_cosines_with_class_means():
    means = SHOTS.unflatten(0, (4, 3)).mean(0)  # classes in turn
    expected = F.cosine_similarity(OTHERS[:, None], means, dim=-1)
    torch.testing.assert_close(prototypes(SHOTS, LABELS, OTHERS), expected)


def test_a_description_counts_for_as_many_examples_as_its_weight():
    twice = torch.cat([SHOTS, DESCRIPTIONS, DESCRIPTIONS])
    expected = prototypes(twice, torch.cat([LABELS, *[torch.arange(3)] * 2]), OTHERS)
    torch.testing.assert_close(prototypes(SHOTS, LABELS, OTHERS, DESCRIPTIONS, 2.0), expected)


def test_neighbours_vote_with_their_cosines():
    shots = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
    labels = torch.tensor([0, 1, 1, 1])
    scores = neighbours(shots, labels, torch.tensor([[1.0, 0.0]]), sizes=[2])
    torch.testing.assert_close(scores, torch.tensor([[10.0, 8.0]]).exp())


def test_the_number_of_neighbours_is_chosen_on_the_shots():
    # Two tight classes with one stray of the other class in each: one neighbour is misled, three not.
    angles = torch.tensor([0.0, 0.02, 0.04, 0.05, 1.0, 1.02, 1.04, 1.05])
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
    shots = torch.stack([angles.cos(), angles.sin()], 1)
    stray = torch.tensor([[0.041, 1.041]]).T
    others = torch.cat([stray.cos(), stray.sin()], 1)
    assert neighbours(shots, labels, others, sizes=[1]).argmax(1).tolist() == [1, 0]
    assert neighbours(shots, labels, others, sizes=[1, 3]).argmax(1).tolist() == [0, 1]
    assert neighbours(shots[:1], labels[:1], others, sizes=[1, 3]).argmax(1).tolist() == [0, 0]


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_probe_is_the_logistic_regression_on_all_vectors(weight):
    folds = torch.zeros(12, dtype=torch.long)
    ours = probe(SHOTS, LABELS, folds, OTHERS, [1.0, 30.0, 900.0], DESCRIPTIONS, weight)
    weights = np.r_[np.ones(12), np.full(3, weight)]
    x, y = torch.cat([SHOTS, DESCRIPTIONS]), torch.cat([LABELS, torch.arange(3)])
    model = LogisticRegression(C=30.0, tol=1e-8, max_iter=1000).fit(x.double(), y, weights)
    np.testing.assert_allclose(ours, model.predict_proba(OTHERS.double()), atol=1e-4)


def test_probe_chooses_the_penalty_on_held_out_shots():
    folds = torch.arange(12) % 4
    strengths = [0.01, 1.0, 1e4]
    scores = []
    for strength in strengths:
        right = []
        for fold in range(4):
            outside, inside = folds != fold, folds == fold
            p = probe(
                SHOTS[outside], LABELS[outside], folds[outside] * 0, SHOTS[inside], [strength]
            )
            right.append(p.gather(1, LABELS[inside, None]).log().mean())
        scores.append(float(torch.stack(right).mean()))
    best = strengths[int(np.argmax(scores))]
    chosen = probe(SHOTS, LABELS, folds, OTHERS, strengths)
    torch.testing.assert_close(chosen, probe(SHOTS, LABELS, folds * 0, OTHERS, [best]))
    assert len(set(scores)) == 3
    torch.testing.assert_close(probe_teacher(best)(SHOTS, LABELS, OTHERS), chosen)


def test_scorer_learns_the_shots_and_is_the_same_for_one_seed():
    plan = ScorerPlan(heads=4, scale=10.0, steps=150, learning_rate=3e-3)
    scorer, log = fit_scorer(SHOTS, LABELS, DESCRIPTIONS, plan, 3)
    assert log.losses[-1] < 0.3 * log.losses[0]
    assert (scorer(SHOTS, DESCRIPTIONS).argmax(1) == LABELS).all()
    again, _ = fit_scorer(SHOTS, LABELS, DESCRIPTIONS, plan, 3)
    other, _ = fit_scorer(SHOTS, LABELS, DESCRIPTIONS, plan, 4)
    assert torch.equal(scorer.query, again.query)
    assert not torch.equal(scorer.query, other.query)


def test_copies_of_the_shots_change_nothing():
    """So further texts have no placebo of equal size but to have none: the loss is a mean over full batches."""
    plan = ScorerPlan(heads=4, scale=10.0, steps=40, learning_rate=1e-3)
    alone, _ = fit_scorer(SHOTS, LABELS, DESCRIPTIONS, plan, 0)
    thrice, _ = fit_scorer(SHOTS.repeat(3, 1), LABELS.repeat(3), DESCRIPTIONS, plan, 0)
    other, _ = fit_scorer(SHOTS.repeat(3, 1), LABELS.roll(1).repeat(3), DESCRIPTIONS, plan, 0)
    torch.testing.assert_close(
        thrice(OTHERS, DESCRIPTIONS), alone(OTHERS, DESCRIPTIONS), rtol=0, atol=1e-3
    )
    assert (other(OTHERS, DESCRIPTIONS) - alone(OTHERS, DESCRIPTIONS)).abs().max() > 1e-2


def test_prompt_search_takes_what_fits_the_shots():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    noise = torch.randn(30, 3, generator=rng)
    informed = 2.0 * F.one_hot(labels, 3)
    shots = torch.arange(12)
    scores, prompt, calibrated = search_prompt(torch.stack([noise, informed]), shots, labels[:12])
    assert (prompt, calibrated) == (1, False)
    torch.testing.assert_close(scores, informed.log_softmax(-1))
    # A constant in favour of one word is what calibration takes away.
    biased = informed + torch.tensor([8.0, 0.0, 0.0])
    scores, prompt, calibrated = search_prompt(torch.stack([noise, biased]), shots, labels[:12])
    assert (prompt, calibrated) == (1, True)
    assert (scores.argmax(1) == labels).double().mean() > (
        biased.argmax(1) == labels
    ).double().mean()
    prior = biased[:12].softmax(-1).mean(0).log()
    torch.testing.assert_close(scores, (biased.log_softmax(-1) - prior).log_softmax(-1))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_exchanged_labels(share):
    labels = torch.arange(40) % 4
    wrong = exchanged(labels, share, 0)
    assert (wrong != labels).sum() == round(share * 40)
    assert wrong.min() >= 0
    assert wrong.max() <= 3
    assert torch.equal(wrong, exchanged(labels, share, 0))


@pytest.mark.parametrize("seed", range(6))
def test_placebo_label_vectors(seed):
    moved = shuffled(DESCRIPTIONS, seed)
    assert (moved != DESCRIPTIONS).any(1).all()
    torch.testing.assert_close(moved.sum(0), DESCRIPTIONS.sum(0))
    drawn = random_units(5, 16, seed)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(5))
    with pytest.raises(ValueError, match="one label vector"):
        shuffled(DESCRIPTIONS[:1], seed)


def test_accuracy_and_judgement_of_a_scorer():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    assert accuracy(scores, torch.tensor([0, 1, 1])) == pytest.approx(200 / 3)
    texts = F.one_hot(torch.tensor([0, 1, 1]), 4).float()
    scorer = CrossTune(4, 1, scale=2.0, noise=0.0)
    right, log_probability = judge(scorer, texts, torch.eye(4)[:2], torch.tensor([0, 1, 0]))
    assert right == pytest.approx(200 / 3)
    p = torch.tensor([2.0, 0.0]).softmax(0)
    expected = (2 * p[0].log() + p[1].log()) / 3
    assert log_probability == pytest.approx(expected.item(), abs=1e-5)


def test_figures_show_what_they_are_given():
    rows = [
        (name, k, draw, "ours", 50.0 + k + draw)
        for name in ("one", "two")
        for k in (1, 4)
        for draw in range(3)
    ]
    scores = pd.DataFrame(rows, columns=["set", "k", "draw", "method", "accuracy"])
    fig = draw_against_shots(scores, {"ours": "black"})
    assert [axis.get_title() for axis in fig.axes] == ["mean of 2 sets", "one", "two"]
    assert list(fig.axes[0].containers[0][0].get_ydata()) == [52.0, 55.0]
    fig = draw_gains({("clean", "always"): [1.0, 2.0, 3.0], ("clean", "switch"): [0.0, 0.0, 3.0]})
    means = [float(np.ravel(bar[0].get_ydata())[0]) for bar in fig.axes[0].containers]
    assert means == pytest.approx([2.0, 1.0])
    plt.close("all")


def test_spread_is_the_interval_of_students_t():
    centre, half = spread([1.0, 2.0, 3.0])
    assert centre == pytest.approx(2.0)
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def few_shot_scores():
    """Two sets, two k, three draws; what CrossTune gains over the rival is 1, 2 and 3 points."""
    rows = []
    for name, level in (("one", 60.0), ("two", 80.0)):
        for k in (1, 4):
            for draw in range(3):
                rows.append((name, k, draw, "CrossTune", level + k + draw + 1, -1.0))
                rows.append((name, k, draw, "rival", level + k, -2.0))
            rows.append((name, 4, 0, "names", level, -3.0))
    columns = ["set", "k", "draw", "method", "accuracy", "log_probability"]
    return pd.DataFrame(rows, columns=columns)


def test_the_main_table_is_paired_by_draw():
    table = main_table(few_shot_scores(), ["CrossTune", "rival"])
    assert list(zip(table["k"], table["method"], strict=True)) == [
        (1, "CrossTune"),
        (1, "rival"),
        (4, "CrossTune"),
        (4, "rival"),
    ]
    assert table["one"].tolist() == [63, 61, 66, 64]
    assert table["mean"].tolist() == [73, 71, 76, 74]
    assert table["CrossTune minus it"].tolist() == [0, 2, 0, 2]
    assert table["± (95 %)"].tolist() == pytest.approx([4.302653 / 3**0.5, 0] * 2, rel=1e-5)
    below = with_reported(table, 3.5).iloc[-1]
    assert below[["k", "CrossTune minus it"]].tolist() == [16, 3.5]
    assert np.isnan(below["mean"])


def test_the_table_of_one_set_is_paired_by_draw():
    scores = few_shot_scores()
    asked = scores[(scores.set == "one") & (scores.method != "names")]
    table = asked_table(asked[["k", "draw", "method", "accuracy"]])
    assert table["accuracy, %"].tolist() == [63, 61, 66, 64]
    assert table["CrossTune minus it"].tolist() == [0, 2, 0, 2]


def test_arms_of_labels_are_left_out_where_they_were_not_trained():
    means = means_of_draws(few_shot_scores().replace({"method": {"rival": "random vectors"}}))
    table = labels_table(means, ["CrossTune", "random vectors", "padded names"])
    assert list(zip(table["k"], table["labels"], strict=True)) == [
        (1, "descriptions"),
        (1, "random vectors"),
        (4, "descriptions"),
        (4, "random vectors"),
    ]
    assert table["descriptions minus it"].tolist() == [0, 2, 0, 2]
    assert table["log-probability, nats"].tolist() == [-1, -2, -1, -2]


def test_further_data_are_set_against_none_draw_by_draw():
    rows = []
    for draw, start in enumerate((50.0, 60.0, 70.0)):
        rows.append(("clean", draw, "never", start, -1.0, 0.0, 8))
        rows.append(("clean", draw, "switch", start + 1 + draw, -0.5, 0.5, 8))
    columns = ["data", "draw", "use", "accuracy", "log_probability", "kept", "texts"]
    table = switch_table(pd.DataFrame(rows, columns=columns))
    assert table["used"].tolist() == ["never", "switch"]
    assert table["minus never"].tolist() == pytest.approx([0, 2])
    assert table["± (95 %)"][1] == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert table["of them used, %"].tolist() == [0, 50]
    assert table["draws"].tolist() == [3, 3]
    assert table["accuracy, %"].tolist() == pytest.approx([60, 62])


def test_heads_are_averaged_over_the_texts_of_a_class():
    weights = torch.zeros(3, 2, 2)
    weights[0, 0, 0], weights[1, 0, 0], weights[2, 1, 1] = 1.0, 0.5, 0.7
    fig = draw_class_heads(weights, torch.tensor([0, 0, 1]), ["x", "y"], ["first", "second"])
    assert [axis.get_title() for axis in fig.axes] == ["first", "second"]
    np.testing.assert_allclose(fig.axes[0].images[0].get_array(), [[0.75, 0], [0, 0]])
    np.testing.assert_allclose(fig.axes[1].images[0].get_array(), [[0, 0], [0, 0.7]])
    plt.close("all")
