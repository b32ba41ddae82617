"""The vision-language backbone at its smallest: its three stages, its exam and its report."""

from dataclasses import fields, replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from reattend.backbones.reports.vlm import (
    accuracy_table,
    by_picture,
    commonest,
    depth_table,
    draw_looks,
    lettered,
    looked_at,
    loss_table,
    one_of_each,
    options_table,
    right_answers,
)
from reattend.backbones.trained.vlm import (
    SETTINGS,
    Exam,
    Material,
    alignment_loss,
    answer,
    choices,
    draw_word_pictures,
    exam,
    fit,
    picture_loss,
    untrained,
    word_loss,
    word_sums,
)
from reattend.data.scenes import CLASSES, COLOURS
from reattend.data.vlm_questions import (
    BOS,
    IDS,
    NOTHING,
    PAD,
    TYPES,
    Question,
    encode,
    patch_contents,
    scene_questions,
)

SMOKE = SETTINGS["smoke"]


@pytest.fixture(scope="module")
def scenes():
    return SMOKE.make_scenes(12, "train", 5)


@pytest.fixture(scope="module")
def material(scenes):
    """Tokens that hold nothing of the pictures: no tower is needed."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(12, SMOKE.shape.patches, 384, generator=generator).half()
    return Material(scenes, patch_contents(scenes, 4), tokens)


@pytest.fixture(scope="module")
def given(scenes, material):
    random = np.random.default_rng(0)
    return Exam(scenes, material.tokens, [scene_questions(scenes, i, random) for i in range(12)])


def test_training_ends_with_three_stages_of_finite_losses_and_repeats(material):
    model, losses = fit(SMOKE, material)
    again, same = fit(SMOKE, material)
    assert {name: len(values) for name, values in losses.items()} == {
        "words": 4,
        "alignment": 4,
        "answers": 4,
    }
    assert losses == same
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    start = untrained(SMOKE.shape)
    moved = {
        n
        for (n, a), b in zip(model.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved == {name for name, _ in model.named_parameters()}


def test_keys_start_as_queries_from_the_third_layer_on():
    layers = untrained(SMOKE.shape).layers
    assert [torch.equal(layer.q.weight, layer.k.weight) for layer in layers] == [False, False, True]


def test_pictures_of_words_show_each_object_where_it_lies(scenes, material):
    setting = replace(SMOKE, words=replace(SMOKE.words, batch=120))
    drawn = draw_word_pictures(setting, scenes, material.contents, np.random.default_rng(1))
    assert drawn.patches.shape == (120, SMOKE.read)
    assert (drawn.patches.diff(dim=1) > 0).all()
    background = (drawn.shown == IDS[NOTHING]).all(2)
    assert torch.equal(background, (drawn.shown == IDS[NOTHING]).any(2))
    right, total = 0, 0
    for b, asked in enumerate(drawn.asked):
        there = {
            CLASSES.index(w)
            for q in asked
            if q.answer == "yes" and q.type == "exist"
            for w in [q.text.split()[2]]
        }
        seen = {int(i) - IDS[CLASSES[0]] for i in drawn.shown[b, ~background[b], 0]}
        right, total = right + len(there & seen), total + len(there)
    assert (
        right / total > 0.9
    )  # some objects have one patch alone, and a twentieth of those is mistaken


def test_a_twentieth_of_the_patches_is_mistaken(scenes, material):
    """Scenes of one object: patches that do not show its commonest kind are mistaken."""
    alone = [i for i in range(12) if (scenes.labels[i] >= 0).sum() == 1]
    assert alone
    setting, random = (
        replace(SMOKE, words=replace(SMOKE.words, batch=200)),
        np.random.default_rng(2),
    )
    part = replace_scenes(scenes, alone)
    drawn = draw_word_pictures(setting, part, material.contents[alone], random)
    wrong, total = 0, 0
    for asked, shown in zip(drawn.asked, drawn.shown, strict=True):
        name = next(q.text.split()[2] for q in asked if q.type == "exist" and q.answer == "yes")
        objects = shown[shown[:, 0] != IDS[NOTHING], 0]
        wrong, total = wrong + int((objects != IDS[name]).sum()), total + len(objects)
    assert wrong / total == pytest.approx(0.05 * 11 / 12, abs=4 * (0.05 / total) ** 0.5)


def replace_scenes(scenes, index):
    """Some of the scenes."""
    parts = {}
    for part in fields(scenes):
        values = getattr(scenes, part.name)
        parts[part.name] = (
            tuple(values[i] for i in index) if isinstance(values, tuple) else values[index]
        )
    return type(scenes)(**parts)


def test_sums_of_words_weigh_what_patches_show(scenes, material):
    model = untrained(SMOKE.shape)
    sums = word_sums(model, scenes, material.contents[[3, 7]], np.array([3, 7]))
    table = model.words.weight
    for row, scene in enumerate((3, 7)):
        for patch in (0, 5, 10, 15):
            expected, rest = torch.zeros(32), 1.0
            for i, label in enumerate(scenes.labels[scene].tolist()):
                share = material.contents[scene, i, patch]
                words = (
                    table[IDS[CLASSES[label]]] + table[IDS[COLOURS[int(scenes.colours[scene, i])]]]
                )
                expected, rest = expected + share * words, rest - share
            torch.testing.assert_close(
                sums[row, patch], expected + 2 * rest * table[IDS[NOTHING]], atol=1e-5, rtol=0
            )


def test_alignment_has_no_loss_where_the_projector_makes_the_sums(scenes, material):
    model = untrained(SMOKE.shape)
    chosen = np.array([0, 4])
    aim = word_sums(model, scenes, material.contents[chosen], chosen)
    model.projector.forward = lambda x: aim
    assert alignment_loss(model, material, chosen) == 0
    model.projector.forward = lambda x: aim + 0.5
    weights = 1 + 4 * (material.contents[chosen].sum(1) > 0.3)
    torch.testing.assert_close(
        alignment_loss(model, material, chosen), 32 * 0.25 * weights.float().mean()
    )


def test_losses_read_what_they_should(scenes, material):
    """Words: gaps of position ids make a difference. Pictures: the blind prompt does not see its tokens."""
    model, random = untrained(SMOKE.shape), np.random.default_rng
    drawn = draw_word_pictures(SMOKE, scenes, material.contents, random(0))
    values = {round(word_loss(model, drawn, random(seed)).item(), 5) for seed in range(8)}
    assert len(values) == 8
    chosen = np.array([3, 4, 5, 6])
    other = replace(material, tokens=material.tokens.clone())
    other.tokens[3] = 1
    loss = picture_loss(model, SMOKE, material, chosen, random(0))
    assert picture_loss(model, SMOKE, other, chosen, random(0)) == loss
    other.tokens[4] = 1
    assert picture_loss(model, SMOKE, other, chosen, random(0)) != loss


def test_choices_are_probabilities_over_the_answers_of_the_type(given):
    model = untrained(SMOKE.shape)
    found = answer(model, given, batch=5)
    questions = [q for asked in given.asked for q in asked]
    assert [len(values) for values in found] == [len(TYPES[q.type]) for q in questions]
    assert all(abs(values.exp().sum() - 1) < 1e-5 for values in found)
    asked = given.asked[7]
    prompt = model.prompt(IDS[BOS], model.project(given.tokens[7:8]), encode([asked])[0], IDS[PAD])
    alone = choices(model.answers(model.read(prompt)), asked)
    start = sum(map(len, given.asked[:7]))
    for one, other in zip(alone, found[start : start + len(asked)], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    blind = answer(model, given, blind=True)
    assert max((a - b).abs().max() for a, b in zip(found, blind, strict=True)) > 1e-3


def test_an_exam_is_no_training_material():
    with pytest.raises(ValueError, match="seed 0 of the training side was trained on"):
        exam("smoke", 4, 0)


def test_accuracy_by_type_counts_right_answers_of_each_picture(given):
    questions = [q for asked in given.asked for q in asked]
    told = [torch.tensor([float(a == q.answer) for a in TYPES[q.type]]) for q in questions]
    right = right_answers(given, told)
    assert all(all(hits) for hits in right)
    assert not any(any(hits) for hits in right_answers(given, [-values for values in told]))
    found = by_picture(given, right, "exist")
    assert found["b"].tolist() == [sum(q.type == "exist" for q in asked) for asked in given.asked]
    assert np.array_equal(found["a"], found["b"])
    constant = by_picture(given, commonest(given), "exist")
    assert constant["a"].sum() / constant["b"].sum() == 0.5


def test_depth_keeps_all_patches_up_to_the_layer_at_which_they_go(given):
    model = untrained(SMOKE.shape)
    table = depth_table(model, given, 2)
    assert list(table["patches"]) == [f"2 from layer {layer}" for layer in range(3)] + ["all"]
    whole = right_answers(given, answer(model, given))
    for kind in TYPES:
        counts = by_picture(given, whole, kind)
        assert table[kind].iloc[-1] == pytest.approx(100 * counts["a"].sum() / counts["b"].sum())
    assert (table[list(TYPES)].iloc[0] != table[list(TYPES)].iloc[-1]).any()


def test_letters_stand_for_the_answer_and_three_others():
    random, question = np.random.default_rng(0), Question("where", "where is bird ?", "lower-left")
    drawn = [lettered(question, random) for _ in range(40)]
    assert all(set(words) == set(TYPES["where"]) for words in drawn)
    assert {words.index("lower-left") for words in drawn} == {0, 1, 2, 3}
    kinds = [
        lettered(Question("kind", "what is upper-left ?", CLASSES[0]), random) for _ in range(40)
    ]
    assert all(len(set(words)) == 4 and CLASSES[0] in words for words in kinds)
    assert set().union(*kinds) == set(CLASSES)


def test_the_right_letter_is_that_of_the_likeliest_words(given):
    model = untrained(SMOKE.shape)
    first = Exam(given.scenes, given.tokens[:4], given.asked[:4])
    table = options_table(model, first).set_index("type")
    assert list(table.index) == ["kind", "largest", "count", "colour", "where"]
    assert (table[[f"says {a}" for a in "ABCD"]].sum(axis=1) - 100).abs().max() < 1e-9
    asked = [[q.type == "where" for q in of] for of in first.asked]
    assert table.questions["where"] == sum(map(sum, asked))
    # All options of "where" are always offered: then the letter says what the answer in words says.
    hits = right_answers(first, answer(model, first))
    counts = by_picture(first, hits, "where")
    expected = 100 * counts["a"].sum() / counts["b"].sum()
    assert float(table["right letter"]["where"].split()[0]) == pytest.approx(expected, rel=5e-3)


def test_the_report_says_what_was_asked_answered_and_looked_at(given):
    model = untrained(SMOKE.shape)
    table = accuracy_table({"train": given, "test": given}, model)
    assert list(table["type"][:7]) == list(TYPES)
    assert table["questions"][:7].sum() == sum(map(len, given.asked))
    losses = loss_table({"words": torch.linspace(2, 1, 20)})
    assert losses["change, %"][0] == pytest.approx(100 * (1.0263158 / 1.1315789 - 1), abs=1e-3)
    chosen = one_of_each(given, [*TYPES, *TYPES])
    assert [q.type for _, q in chosen] == [*TYPES, *TYPES]
    assert chosen[0][0] != chosen[7][0]
    places, asked = [p for p, _ in chosen], [q for _, q in chosen]
    seen, said = looked_at(model, given.tokens[places], asked)
    assert seen.shape == (14, 16)
    assert (seen.amax(1) == 1).all()
    assert (seen > 0).all()
    told = iter(answer(model, given))
    by_question = {
        (i, q): TYPES[q.type][next(told).argmax()] for i, of in enumerate(given.asked) for q in of
    }
    assert said == [by_question[place, question] for place, question in chosen]
    figure = draw_looks(given.scenes.pixels[places], seen, asked, said)
    assert figure.axes[0].get_title() == asked[0].text
    plt.close(figure)
