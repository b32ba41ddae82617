import pytest
import torch

from reattend.backbones.trained.modality_interference import (
    PADDING,
    SETTINGS,
    SIDE,
    Data,
    Labelled,
    SmallVLM,
)
from reattend.data.interference_items import NOUNS
from reattend.multimodal_llm.modality_interference import answer_loss
from reattend.studies.modality_interference import (
    Answers,
    answers,
    ask_all,
    attack_slopes,
    by_group,
    image_heavy,
    score_table,
    text_heavy,
    vqa,
)

SMALL = SETTINGS["smoke"]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    roles = ("train", "test", "noise", "black", "white", "words", "screens")
    features = {role: torch.randn(9, SIDE**2, 8, generator=generator) for role in roles}
    kinds = ["bird", "bird", "bird", "fish", "fish", "fish", "tool", "tool", "house"]
    places = ["topleft", "topright", "bottomleft"] * 3
    scenes = Labelled(kinds, ["red", "blue", "grey"] * 3, places, list("aabbccdde"))
    return Data(SMALL, features, scenes, scenes)


@pytest.fixture(scope="module")
def model(data):
    torch.manual_seed(0)
    return SmallVLM(len(data.words), SMALL, 8).eval()


def words_of(data, sequences, row):
    return [data.words.entries[t] for t in sequences.tokens[row].tolist() if t != PADDING]


def test_answers_by_hand():
    scores = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -0.5, -4.0]])
    found = Answers(scores, torch.tensor([0, 1]))
    assert found.choices.tolist() == [0, 2]
    assert found.correct.tolist() == [100.0, 0.0]
    assert found.log_odds.tolist() == [1.0, -1.5]


def test_answers_do_not_depend_on_the_answer_or_on_other_rows(data, model):
    asked = image_heavy(data, 1, seed=1).conditions["unrelated"]
    before = answers(model, asked).scores
    asked.tokens[:, -1] = 3
    torch.testing.assert_close(answers(model, asked).scores, before)


@pytest.mark.parametrize("condition", ["origin", "unrelated"])
def test_answers_of_many_items_are_put_together_in_their_order(data, model, condition):
    asked = image_heavy(data, 5, seed=1).conditions[condition]
    logits = asked.reader(model)(model.embed(asked.pictures, asked.tokens))[:, -2]
    expected = logits.log_softmax(-1).gather(1, asked.options)
    assert len(expected) == 45  # more than are computed together
    for rows in (32, 7, 45):
        found = answers(model, asked, rows)
        torch.testing.assert_close(found.scores, expected)
        assert torch.equal(found.right, asked.right)
    assert torch.equal(answers(model, asked).scores, answers(model, asked, 32).scores)


def test_answers_are_read_where_training_predicts_them(data, model):
    asked = image_heavy(data, 1, seed=1).conditions["misleading"]
    batch = asked.batch(model)
    loss = answer_loss(asked.reader(model)(batch.embeddings), batch.labels)
    found = answers(model, asked).scores.gather(1, asked.right[:, None])
    assert -found.mean().item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("seed", [1, 2])
def test_image_heavy_conditions_differ_in_text_alone(data, seed):
    test = image_heavy(data, 2, seed)
    clean = test.conditions["origin"]
    assert len(test.groups) == len(clean.tokens) == 18
    for name in ("misleading", "hearsay", "unrelated", "other corpus"):
        asked = test.conditions[name]
        assert torch.equal(asked.pictures, clean.pictures), name
        assert torch.equal(asked.options, clean.options)
        assert torch.equal(asked.right, clean.right)
        assert not torch.equal(asked.tokens, clean.tokens)
    for row in range(18):
        options = [data.words.entries[t] for t in clean.options[row].tolist()]
        told = words_of(data, test.conditions["misleading"], row)[6]
        assert told in options
        assert told != options[int(clean.right[row])]
        assert words_of(data, test.conditions["hearsay"], row)[7] == told
    blind = test.conditions["blind"]
    assert torch.equal(blind.tokens, clean.tokens)
    assert not torch.equal(blind.pictures, clean.pictures)


def test_text_heavy_conditions_differ_in_the_picture_alone(data):
    test = text_heavy(data, 2, seed=1)
    clean = test.conditions["origin"]
    assert sorted(set(test.groups)) == sorted(NOUNS)
    for asked in test.conditions.values():
        assert torch.equal(asked.tokens, clean.tokens)
    assert {role for role, _ in test.pictures["origin"]} == {"noise"}
    for row, (role, index) in enumerate(test.pictures["real"]):
        options = [data.words.entries[t] for t in clean.options[row].tolist()]
        shown = data.test.colours[index]
        assert role == "test"
        assert shown in options
        assert shown != options[int(clean.right[row])] == NOUNS[test.groups[row]]


def test_vqa_asks_colour_and_place_of_every_scene(data):
    test = vqa(data, 1, seed=1)
    found = test.conditions["origin"]
    for index in range(9):
        for row, truth in ((2 * index, data.test.colours), (2 * index + 1, data.test.places)):
            answer = found.options[row, found.right[row]]
            assert data.words.entries[int(answer)] == truth[index]


def test_groups_are_averaged():
    assert by_group(torch.tensor([1.0, 2.0, 6.0]), ["b", "a", "b"]) == {"a": 2.0, "b": 3.5}


def test_score_table_compares_with_the_origin(data, model):
    tests = {"image_heavy": image_heavy(data, 1, seed=1)}
    found = ask_all({"base": [model, model]}, tests)
    table = score_table(found).set_index(["seed", "condition"])
    assert (table.xs("origin", level="condition").delta_cp == 0).all()
    one, other = (found["base", 0, "image_heavy", c].choices for c in ("origin", "misleading"))
    expected = (one != other).double().mean().item()
    assert table.delta_cp[0, "misleading"] == pytest.approx(expected)
    assert table.accuracy[1, "origin"] == pytest.approx(
        found["base", 1, "image_heavy", "origin"].correct.mean().item()
    )


def test_slopes_are_those_of_attacked_places(data, model):
    found = attack_slopes(model, data, 2, seed=0)
    text = SMALL.length + 1 - 1  # all words but the answer
    assert len(found["text_heavy"]) == 2 * 8 * SIDE**2 * SMALL.width
    assert len(found["image_heavy"]) == 2 * 6 * text * SMALL.width
    assert all((slopes >= 0).all() and slopes.max() > 0 for slopes in found.values())
