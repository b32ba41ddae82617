from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained.modality_interference import (
    ARMS,
    PADDING,
    SETTINGS,
    SIDE,
    UNKNOWN,
    Arm,
    Data,
    Labelled,
    Maker,
    SmallVLM,
    Words,
    arm_batches,
    base_batches,
    fit_arm,
    fit_base,
    pooled,
    swapped,
)
from reattend.multimodal_llm.modality_interference import IGNORED, js_consistency

SMALL = replace(SETTINGS["smoke"], base_steps=3, steps=2, groups=2)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    roles = ("train", "test", "noise", "black", "white", "words", "screens")
    features = {role: torch.randn(9, SIDE**2, 8, generator=generator) for role in roles}
    kinds = ["bird", "bird", "bird", "fish", "fish", "fish", "tool", "tool", "house"]
    places = ["topleft", "topright", "bottomleft"] * 3
    scenes = Labelled(kinds, ["red", "blue", "grey"] * 3, places, list("aabbccdde"))
    return Data(SMALL, features, scenes, scenes)


def text_of(data, rows, row):
    words = [data.words.entries[t] for t in rows.tokens[row].tolist() if t != PADDING]
    return " ".join(words)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_batch_has_two_two_four_items_as_six_eight_four_sequences(data, seed):
    rows = next(arm_batches(Maker(data, seed), Arm()))
    assert [rows.kinds.count(k) for k in ("image_heavy", "text_heavy", "vqa")] == [12, 16, 8]
    items = [rows.kinds[row] for row in rows.origins.tolist()]
    assert [items.count(k) for k in ("image_heavy", "text_heavy", "vqa")] == [4, 4, 8]
    assert rows.items.bincount().tolist() == 2 * ([3, 3, 4, 4] + 4 * [1])


def test_versions_keep_the_question_and_change_the_other_modality(data):
    rows = next(arm_batches(Maker(data, 0), Arm()))
    for item, origin in enumerate(rows.origins.tolist()):
        mine = (rows.items == item).nonzero().flatten().tolist()
        assert mine[0] == origin
        texts = [text_of(data, rows, row) for row in mine]
        pictures = [rows.pictures[row] for row in mine]
        assert all(text.endswith(texts[0]) for text in texts)
        if rows.kinds[origin] == "image_heavy":
            assert len(set(texts)) == 3
            assert all(torch.equal(p, pictures[0]) for p in pictures)
            assert len(texts[2].split()) == len(texts[0].split()) + 8 * SMALL.paragraph
        if rows.kinds[origin] == "text_heavy":
            assert len(set(texts)) == 1
            assert all(not torch.equal(pictures[0], p) for p in pictures[1:])
        assert (rows.tokens[mine, -1] == rows.options[origin, rows.right[origin]]).all()


def test_unperturbed_versions_are_copies(data):
    rows = next(arm_batches(Maker(data, 0), ARMS["clean"]))
    origins = rows.origins[rows.items]
    assert len(rows.kinds) == 36
    assert torch.equal(rows.tokens, rows.tokens[origins])
    assert torch.equal(rows.pictures, rows.pictures[origins])


def test_arms_that_differ_in_the_loss_read_the_same_items(data):
    first, second = (next(arm_batches(Maker(data, 3), ARMS[a])) for a in ("D_AUG", "full"))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.pictures, second.pictures)


def test_vqa_alone_reads_as_many_sequences(data):
    assert next(arm_batches(Maker(data, 0), ARMS["D_VQA"])).kinds == ("vqa",) * 36


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_placebo_exchanges_origins_of_equal_answer_and_options(data, seed):
    rows = next(arm_batches(Maker(data, seed), Arm()))
    references = swapped(rows)
    for item, (own, other) in enumerate(
        zip(rows.origins.tolist(), references.tolist(), strict=True)
    ):
        assert rows.kinds[own] == rows.kinds[other]
        if rows.kinds[own] == "vqa":
            assert own == other
            continue
        assert own != other
        assert other in rows.origins.tolist()
        assert torch.equal(rows.options[own], rows.options[other])
        assert rows.right[own] == rows.right[other]
        assert int(references[int(rows.items[other])]) == own, item


@pytest.mark.parametrize("truthful", [0.9, 0.25])
def test_sentences_of_the_base_are_truthful_at_their_rate(data, truthful):
    batches, hinted, right, asked = base_batches(Maker(data, 0), truthful), 0, 0, 0
    for _ in range(60):
        rows = next(batches)
        for row, kind in enumerate(rows.kinds):
            if kind != "image_heavy":
                continue
            asked += 1
            words = text_of(data, rows, row).split()
            if words[0] == "this":
                hinted += 1
                right += words[6] == words[-1]
    assert hinted / asked == pytest.approx(SMALL.hinted, abs=0.06)
    assert right / hinted == pytest.approx(truthful, abs=0.06)


def test_texts_end_at_one_place_and_unknown_words_are_unknown():
    words = Words(["one two"])
    assert len(words.encode("one two", 5)) == 5
    assert words.encode("one two", 5)[:3] == [PADDING] * 3
    assert words.encode("zebra", 1) == [UNKNOWN]
    with pytest.raises(ValueError, match="a text of 2 words, but 1 places"):
        words.encode("one two", 1)


def test_pooled_tokens_are_means_of_regions_without_cls():
    states = torch.arange(1 + 64.0)[None, :, None]  # 8 x 8 patches after [CLS]
    found = pooled(states)[0, :, 0]
    assert found.shape == (16,)
    assert found[0] == torch.tensor([1.0, 2, 9, 10]).mean()  # the first region: rows 0 and 1
    assert found[-1] == torch.tensor([55.0, 56, 63, 64]).mean()


def test_padding_of_short_texts_is_not_read(data):
    torch.manual_seed(0)
    model = SmallVLM(len(data.words), SMALL, 8).eval()
    rows = next(arm_batches(Maker(data, 0), Arm()))
    batch, reader = rows.batch(model), rows.reader(model)
    logits = reader(batch.embeddings)
    long = [
        i
        for i, k in enumerate(rows.kinds)
        if k == "image_heavy" and (rows.tokens[i] == PADDING).sum() < 20
    ]
    assert len(long) == 4  # the unrelated versions
    moved = batch.embeddings.clone()
    padding = moved[:, SIDE**2 : -1 - SMALL.short]
    padding += torch.randn(padding.shape, generator=torch.Generator().manual_seed(1))
    change = (reader(moved) - logits)[:, -2].abs().amax(1)
    short = [i for i in range(len(rows.kinds)) if i not in long]
    assert (change[short] == 0).all()
    assert (change[long] > 1e-3).all()


def test_short_rows_equal_a_model_of_their_places_alone(data):
    torch.manual_seed(1)
    model = SmallVLM(len(data.words), SMALL, 8).double().eval()
    x = torch.randn(2, SIDE**2 + SMALL.length + 1, SMALL.width, dtype=torch.float64)
    found = model(x, torch.zeros(2, dtype=torch.bool))
    kept = [*range(SIDE**2), *range(SIDE**2 + SMALL.length - SMALL.short, x.shape[1])]
    part = x[:, kept] + model.language.positions.weight[kept]
    for block in model.language.blocks:
        part = block(part)
    expected = model.language.logits(model.language.norm(part))
    torch.testing.assert_close(found[:, kept], expected)


def test_picture_tokens_start_as_large_as_words(data):
    torch.manual_seed(0)
    model = SmallVLM(len(data.words), SMALL, 8)
    embedded = model.embed(data.features["train"], torch.randint(2, 40, (9, 5)))
    pictures, words = (part.square().mean().sqrt() for part in embedded.split([SIDE**2, 5], 1))
    assert pictures.item() == pytest.approx(words.item(), rel=0.1)


def test_labels_are_the_answers_alone(data):
    rows = next(arm_batches(Maker(data, 0), Arm()))
    batch = rows.batch(SmallVLM(len(data.words), SMALL, 8))
    assert (batch.labels[:, :-1] == IGNORED).all()
    assert torch.equal(batch.labels[:, -1], rows.options.gather(1, rows.right[:, None])[:, 0])
    assert batch.visual.sum(1).unique().tolist() == [SIDE**2]


def test_arms_have_the_terms_that_they_name(data):
    base, losses = fit_base("base", data, 0)
    assert losses.shape == (3,)
    for name in ARMS:
        model, terms = fit_arm(name, base, data, 0)
        arm = ARMS[name]
        assert terms.shape == (2, 3)
        for term, there in ((1, arm.attack), (2, arm.consistency)):
            found = terms[:, term]
            assert (found == 0).all() if there is None else (found > 0).all(), name
        changed = [
            not torch.equal(a, b)
            for a, b in zip(model.parameters(), base.parameters(), strict=True)
        ]
        assert any(changed)
    with pytest.raises(ValueError, match="unknown arm 'KL'; there are: D_VQA"):
        fit_arm("KL", base, data, 0)


@pytest.mark.parametrize("name", ["JS", "JS released", "JS swapped"])
def test_consistency_of_an_arm_compares_with_the_origins_that_it_names(data, name):
    base, _ = fit_base("base", data, 0)
    terms = fit_arm(name, base, data, 0)[1]
    rows = next(arm_batches(Maker(data, 1000), ARMS[name]))  # the first batch, before any step
    batch, released = rows.batch(base), name == "JS released"
    logits = rows.reader(base)(batch.embeddings)[:, -1 if released else -2]
    partners = [1, 0, 3, 2] if name == "JS swapped" else [0, 1, 2, 3]
    parts = [
        js_consistency(
            logits[rows.origins[first + partner]][None],
            logits[rows.origins[first + item] + 1 : rows.origins[first + item + 1]][:, None],
        )
        for first in (0, 8)
        for item, partner in enumerate(partners)
    ]
    assert terms[0, 2].item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-4)


def test_objectives_of_placebos_keep_the_ball_and_drop_the_idea(data):
    base, _ = fit_base("base", data, 0)
    real, noise = (ARMS[a].objective(SMALL, base).attack for a in ("ADV", "noise"))
    assert real.radius == noise.radius
    assert real.rate == SMALL.attack_rate > 0
    assert (real.steps, noise.steps) == (SMALL.attack_steps, 0)
    size = base.language.tokens.weight.square().mean().sqrt().item()
    assert real.radius == pytest.approx(SMALL.radius * size)
    assert ARMS["JS released"].objective(SMALL, base).released
    assert not ARMS["JS"].objective(SMALL, base).released


def test_training_repeats(data):
    first, second = (fit_base("control", data, 5)[1] for _ in range(2))
    assert torch.equal(first, second)
