"""The small CLIP: what its maps compute, that training finds what there is to find, and what the report counts."""

import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from torch.nn import functional as F

from reattend.assets.store import AssetError
from reattend.backbones.pretrained.vit import hidden_states
from reattend.backbones.pretrained.vit import load as load_vit
from reattend.backbones.reports import clip as clip_report
from reattend.backbones.reports.clip import (
    WAYS,
    Gallery,
    Guesses,
    all_scores,
    chance,
    cosines,
    draw_found,
    found_ranks,
    gallery,
    hits_by_concept,
    recall_table,
    source_table,
    telling_words,
    word_cosines,
)
from reattend.backbones.reports.page import write_report
from reattend.backbones.trained import clip
from reattend.backbones.trained.clip import (
    SAID,
    SEEN,
    SETTINGS,
    CaptionedTokens,
    Heads,
    Setting,
    dealt_out,
    fit,
    pooled,
    read_captions,
    see_pictures,
)
from reattend.data.captioned_pictures import CaptionedPictures, captioned_pictures
from reattend.plots import COLOURS
from reattend.trunks.encoders import CachedStates, index_batches, masked_mean

PATCHES, WORDS = 9, 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained_heads(joint=7):
    """Maps of double precision with means and spreads of their own."""
    torch.manual_seed(0)
    heads = Heads(joint)
    heads.standardise_by(
        cls=3 + 2 * random(50, SEEN), patch=random(50, SEEN, seed=1) - 1, word=5 * random(50, SAID)
    )
    return heads.eval()


def toy(concepts=60, seed=0) -> CaptionedTokens:
    """Two pictures of each concept, whose caption is a rotation of what the pictures have in common."""
    hidden = random(concepts, 8, seed=seed)
    to_picture, to_caption = random(8, SEEN, seed=1), random(8, SAID, seed=2)
    caption_of = torch.arange(concepts).repeat(2)
    seen = (hidden @ to_picture)[caption_of][:, None].repeat(1, 1 + PATCHES, 1)
    seen = seen + random(2 * concepts, 1 + PATCHES, SEEN, seed=3)
    said = (hidden @ to_caption)[:, None].repeat(1, WORDS, 1)
    mask = torch.arange(WORDS) < (2 + torch.arange(concepts) % 4)[:, None]
    names = tuple(f"c{i:03}" for i in range(concepts))
    sides = ["train"] * (2 * concepts // 3) + ["test"] * (concepts - 2 * concepts // 3)
    splits = [*sides, *(["vendor"] * 3), *sides[3:]]
    return CaptionedTokens(
        seen.half(),
        CachedStates(said.half(), mask),
        torch.zeros(concepts, WORDS, dtype=torch.long),
        caption_of,
        names,
        names * 2,
        ("google",) * concepts + ("twitter",) * concepts,
        tuple(splits),
    )


# The maps -----------------------------------------------------------------------------------------


def test_all_rows_have_length_one():
    heads, tokens = trained_heads(), random(4, 1 + PATCHES, SEEN)
    for rows in (
        heads.picture_tokens(tokens),
        heads.word_tokens(random(3, WORDS, SAID)),
        heads.pictures(pooled(tokens)),
        heads.captions(random(3, SAID)),
    ):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))
    assert heads.picture_tokens(tokens).shape == (4, 1 + PATCHES, 7)


def test_a_picture_is_the_direction_of_cls_and_the_mean_of_its_patches():
    heads, tokens = trained_heads(), random(4, 1 + PATCHES, SEEN)
    # By hand: standardise, map, add; the mean of mapped patches is the map of their mean.
    cls = (tokens[:, 0] - heads.cls_mean) / heads.cls_spread @ heads.cls.weight.T + heads.cls.bias
    patches = (tokens[:, 1:] - heads.patch_mean) / heads.patch_spread @ heads.patch.weight.T
    near = {"atol": 1e-5, "rtol": 0}
    wanted = F.normalize(cls + patches.mean(1), dim=-1)
    torch.testing.assert_close(heads.pictures(pooled(tokens)), wanted, **near)
    joint = heads.picture_tokens(tokens)
    torch.testing.assert_close(joint[:, 0], F.normalize(cls, dim=-1), **near)
    torch.testing.assert_close(joint[:, 1:], F.normalize(patches, dim=-1), **near)


def test_a_caption_of_one_word_is_that_word():
    heads, means = trained_heads(), random(3, SAID)
    torch.testing.assert_close(heads.captions(means), heads.word_tokens(means[:, None])[:, 0])


def test_padding_and_other_captions_do_not_change_a_score():
    kept, heads = toy(), trained_heads()
    asked = gallery(kept, "test")
    scores = cosines(heads, kept, asked)
    padded = kept.words.states.masked_fill(~kept.words.mask[..., None], 77.0)
    other = replace(kept, words=CachedStates(padded, kept.words.mask))
    torch.testing.assert_close(cosines(heads, other, asked), scores)
    picture, caption = pooled(kept.tokens[asked.pictures[3:4]]), int(asked.captions[2])
    real = kept.words.states[caption, : int(kept.words.mask[caption].sum())].float().mean(0)
    alone = heads.pictures(picture)[0] @ heads.captions(real[None])[0]
    assert scores[3, 2].item() == pytest.approx(alone.item(), abs=1e-5)


def test_channels_are_standardised_by_the_given_states():
    heads, states = Heads(SEEN), 3 + 2 * random(100, SEEN)
    heads.standardise_by(cls=states)
    with torch.no_grad():
        heads.cls.weight.copy_(torch.eye(SEEN))
        heads.cls.bias.zero_()
    mapped = heads._mapped("cls", states)
    torch.testing.assert_close(mapped.mean(0), torch.zeros(SEEN), atol=1e-5, rtol=0)
    torch.testing.assert_close(mapped.std(0), torch.ones(SEEN), atol=1e-4, rtol=0)


def test_channels_are_left_out_in_training_alone():
    torch.manual_seed(0)
    heads, states = Heads(SAID, dropped=0.25), torch.ones(40, SAID)
    with torch.no_grad():
        heads.word.weight.copy_(torch.eye(SAID))
        heads.word.bias.zero_()
    left_out = (heads.word_tokens(states[:, None]) == 0).double().mean().item()
    assert left_out == pytest.approx(0.25, abs=0.02)
    assert (heads.eval().word_tokens(states[:, None]) != 0).all()


def test_the_scale_is_a_hundred_at_most():
    heads = Heads(4)
    assert heads.scale.item() == pytest.approx(20)
    heads.log_scale.data.fill_(9.0)
    assert heads.scale.item() == pytest.approx(100)


# The tokens ---------------------------------------------------------------------------------------


def test_tokens_lie_in_the_order_of_the_patches():
    side, places = 4, (0, 3, 6, 9, 13)
    pixels = torch.full((1 + len(places), 3, 56, 56), 255, dtype=torch.uint8)
    for number, place in enumerate(places, 1):
        row, column = divmod(place, side)
        pixels[number, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 0
    try:
        tokens = see_pictures(pixels, 56).float()
    except AssetError as error:
        pytest.skip(str(error))
    assert tokens.shape == (6, 1 + side**2, SEEN)
    changed = (tokens[1:, 1:] - tokens[0, 1:]).norm(dim=-1).argmax(1)
    assert changed.tolist() == list(places)


def test_tokens_are_the_states_after_the_seventh_and_after_the_tenth_layer():
    pixels = (255 * torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))).byte()
    try:
        seventh, tenth = hidden_states(load_vit(), pixels, (7, 10), 56)
        found = see_pictures(pixels, 56).float()
    except AssetError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(found[..., :384], seventh, atol=0.02, rtol=2e-3)
    torch.testing.assert_close(found[..., 384:], tenth, atol=0.02, rtol=2e-3)
    assert (seventh - tenth).abs().mean() > 0.1


def test_a_caption_is_read_alike_alone_and_among_longer_ones():
    try:
        pieces, words = read_captions(["a red car", "a very small boat on a large lake"])
    except AssetError as error:
        pytest.skip(str(error))
    alone = read_captions(["a red car"])[1].states
    assert pieces.mask.sum(1).tolist() == [5, 10]
    torch.testing.assert_close(words.states[0, :5].float(), alone[0].float(), atol=2e-3, rtol=0)
    assert torch.equal(words.mask, pieces.mask)


# Training -----------------------------------------------------------------------------------------


def test_every_concept_is_dealt_the_caption_of_another():
    concepts = ["a", "b", "b", "c", "d", "d", "e"]
    caption_of = torch.tensor([0, 1, 2, 3, 4, 4, 5])
    for seed in range(5):
        dealt = dealt_out(caption_of, concepts, seed)
        assert len({*dealt.tolist()}) == 5  # each concept's first caption is given away once
        assert dealt[1] == dealt[2]
        own = {
            name: {int(caption_of[i]) for i, c in enumerate(concepts) if c == name}
            for name in concepts
        }
        assert all(int(d) not in own[c] for d, c in zip(dealt, concepts, strict=True))


def test_training_finds_unseen_captions_and_the_placebo_does_not():
    kept, setting = toy(120), Setting(42, None, 16, 64, 60, 3e-3, 0.0, 0.0)
    asked = gallery(kept, "test")
    first = {}
    for arm in ("paired", "shuffled"):
        heads, losses = fit(arm, setting, kept)
        assert losses[-1] < losses[0]
        ranks = found_ranks(cosines(heads, kept, asked), asked)
        first[arm] = [(r == 1).double().mean().item() for r in ranks]
    assert min(first["paired"]) > 0.9
    assert max(first["shuffled"]) < 0.25


def test_the_first_loss_by_hand():
    """Of the start: channels standardised by training pictures and their captions, copies sharing a target."""
    kept, setting = toy(), Setting(42, None, 8, 32, 1, 1e-3, 0.0, 0.0)
    padded = kept.words.states.masked_fill(~kept.words.mask[..., None], 9.0)
    kept = replace(kept, words=CachedStates(padded, kept.words.mask))
    rows = kept.indices("train")
    caption_of, tokens = kept.caption_of[rows], kept.tokens[rows].double()
    assert not (caption_of.bincount() == caption_of.bincount()[0]).all()
    said = torch.stack(
        [s[m].double().mean(0) for s, m in zip(padded, kept.words.mask, strict=True)]
    )
    torch.manual_seed(0)
    heads, standard = Heads(8), lambda x: (x - x.mean(0)) / (x.std(0) + 1e-6)
    cls, patch = standard(tokens[:, 0]), standard(tokens[:, 1:].mean(1))
    pictures = cls @ heads.cls.weight.double().T + heads.cls.bias
    pictures = F.normalize(pictures + patch @ heads.patch.weight.double().T, dim=-1)
    captions = standard(said[caption_of]) @ heads.word.weight.double().T + heads.word.bias
    captions = F.normalize(captions, dim=-1)
    index = next(index_batches(len(rows), 32, seed=0))
    logits = 20 * pictures[index] @ captions[index].T
    same = (caption_of[index][:, None] == caption_of[index]).double()
    assert same.sum() > 32
    both = (logits.log_softmax(1) + logits.log_softmax(0)) * same / same.sum(1, keepdim=True)
    wanted = -both.sum().item() / 64
    assert fit("paired", setting, kept)[1] == pytest.approx([wanted], abs=1e-4)


def test_copies_of_a_caption_share_their_target():
    """They differ by the channels that are left out: with their own diagonal the loss would be another."""
    kept, setting = toy(), Setting(42, None, 8, 32, 1, 1e-3, 0.0, 0.5)
    rows = kept.indices("train")
    caption_of, seen = kept.caption_of[rows], pooled(kept.tokens[rows])
    said = masked_mean(kept.words.states.float(), kept.words.mask)
    index = next(index_batches(len(rows), 32, seed=0))
    chosen = caption_of[index]
    torch.manual_seed(0)
    heads = Heads(8, 0.5)
    heads.standardise_by(cls=seen[:, 0], patch=seen[:, 1], word=said[caption_of])
    logits = heads.scale * heads.pictures(seen[index]) @ heads.captions(said[chosen]).T
    same = (chosen[:, None] == chosen).float()
    both = (logits.log_softmax(1) + logits.log_softmax(0)) / 64
    wanted = -(both * same / same.sum(1, keepdim=True)).sum().item()
    assert wanted != pytest.approx(-both.diagonal().sum().item(), abs=1e-2)
    assert fit("paired", setting, kept)[1] == pytest.approx([wanted], abs=1e-4)


def test_matrices_alone_decay():
    kept, setting = toy(), Setting(42, None, 8, 32, 1, 1e-3, 0.0, 0.0)
    free = fit("paired", setting, kept)[0].state_dict()
    decayed = fit("paired", replace(setting, decay=100.0), kept)[0].state_dict()
    for name, value in free.items():
        assert torch.equal(decayed[name], value) != name.endswith("weight"), name


def test_the_rate_is_warmed_up_over_a_tenth_of_the_steps():
    plan = SETTINGS["cpu"].plan
    assert plan.rate(0) == pytest.approx(plan.learning_rate / (plan.steps // 10))
    assert plan.rate(plan.steps // 10) == pytest.approx(plan.learning_rate)


def test_training_looks_at_nothing_but_the_training_side():
    kept, setting = toy(), Setting(42, None, 8, 32, 3, 1e-3, 0.1, 0.5)
    outside = torch.tensor([split != "train" for split in kept.splits])
    other = replace(kept, tokens=kept.tokens.masked_fill(outside[:, None, None], 9.0))
    unseen = sorted(
        set(kept.caption_of[outside].tolist()) - set(kept.caption_of[~outside].tolist())
    )
    states = kept.words.states.clone()
    states[unseen] = 9.0
    other = replace(other, words=CachedStates(states, kept.words.mask))
    one, two = (fit("paired", setting, k)[0].state_dict() for k in (kept, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


# What the report counts ---------------------------------------------------------------------------


def test_a_gallery_holds_each_caption_once_and_training_captions_beside_held_out_drawings():
    kept = toy(6)  # captions 0 to 3 are on the training side
    test, vendor = gallery(kept, "test"), gallery(kept, "vendor")
    assert test.pictures.tolist() == [4, 5, 10, 11]
    assert test.captions.tolist() == [4, 5]
    assert test.right.int().tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert test.concepts == (("c004", "c005", "c004", "c005"), ("c004", "c005"))
    assert vendor.pictures.tolist() == [6, 7, 8]
    assert vendor.captions.tolist() == [0, 1, 2, 3]
    assert vendor.concepts[1] == ("c000", "c001", "c002")
    assert str(vendor) == "3 pictures, 4 captions"


def test_ranks_both_ways_by_hand():
    right = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
    asked = Gallery(torch.arange(3), torch.arange(3), right, (("x", "x", "y"), ("x", "y")))
    scores = torch.tensor([[0.2, 0.5, 0.9], [0.8, 0.1, 0.1], [0.3, 0.3, 0.1]])
    captions, pictures = found_ranks(scores, asked)
    assert captions.tolist() == [3, 1, 2]  # a tie counts against
    assert pictures.tolist() == [1, 2]  # the third caption has no picture


def test_hits_are_counted_by_concept():
    hits = hits_by_concept(torch.tensor([1, 7, 2, 1]), ["b", "a", "b", "b"], k=1)
    assert hits["a"].tolist() == [0, 200]
    assert hits["b"].tolist() == [1, 3]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_chance_is_the_mean_over_all_orders(k):
    right = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]).bool()
    right[3] = torch.tensor([False, True, False])
    right[2] = torch.tensor([True, False, False])
    found = []
    for order in itertools.permutations(range(4)):
        first = right[list(order[:k])].any(0)[:2]
        found.append(first.double().mean().item())
    asked = Gallery(torch.arange(4), torch.arange(3), right, ((), ()))
    captions, pictures = chance(asked, k)
    assert pictures == pytest.approx(100 * np.mean(found))
    assert captions == pytest.approx(100 * min(k, 3) / 3)


def test_guesses_recover_a_linear_relation_and_copies():
    kept = toy(120)
    guesses, asked = Guesses(kept), gallery(kept, "test")
    ranks = found_ranks(guesses.least_squares(asked, 100.0), asked)[0]
    assert (ranks == 1).double().mean() > 0.9
    held_out = gallery(kept, "vendor")
    tokens = kept.tokens.clone()
    tokens[held_out.pictures] = tokens[
        kept.caption_of[held_out.pictures]
    ]  # the other drawing itself
    copies = Guesses(replace(kept, tokens=tokens)).neighbours(held_out, 0.02)
    assert found_ranks(copies, held_out)[0].tolist() == [1, 1, 1]


def test_guesses_by_hand():
    """Vectors of captions are centred by those of training; pictures outside of training count nothing."""
    kept = toy(30)
    rows, asked = kept.indices("train"), gallery(kept, "test")
    said = torch.stack([s[m].double().mean(0) for s, m in zip(*_parts(kept.words), strict=True)])
    said = F.normalize(said, dim=-1)
    said = said - said[kept.caption_of[rows]].mean(0)
    seen = pooled(kept.tokens).flatten(1).double()
    seen = (seen - seen[rows].mean(0)) / (seen[rows].std(0) + 1e-6)
    x, y = seen[rows], said[kept.caption_of[rows]]
    candidates = F.normalize(said[asked.captions], dim=-1)
    # Ridge regression in its dual form.
    kernel = torch.linalg.solve(x @ x.T + 50 * torch.eye(len(rows)), y)
    fitted = F.normalize(seen[asked.pictures] @ x.T @ kernel, dim=-1) @ candidates.T
    near = {"atol": 1e-3, "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(Guesses(kept).least_squares(asked, 50.0), fitted, **near)
    unit = F.normalize(seen, dim=-1)
    weights = (unit[asked.pictures] @ unit[rows].T / 0.1).softmax(1)
    wanted = F.normalize(weights @ y, dim=-1) @ candidates.T
    torch.testing.assert_close(Guesses(kept).neighbours(asked, 0.1), wanted, **near)


def _parts(words):
    return words.states, words.mask


def with_validation(kept):
    """Half of the test side is the validation side."""
    splits = [
        "validation" if s == "test" and int(c) % 2 else s
        for s, c in zip(kept.splits, kept.caption_of, strict=True)
    ]
    return replace(kept, splits=tuple(splits))


def test_settings_of_guesses_are_the_best_of_the_validation_side(monkeypatch):
    kept, chosen = with_validation(toy(30)), []
    best = clip_report._best

    def watched(settings, scored, asked):
        chosen.append((asked.pictures.tolist(), best(settings, scored, asked)))
        return chosen[-1][1]

    monkeypatch.setattr(clip_report, "_best", watched)
    monkeypatch.setattr(Guesses, "PENALTIES", (1e2, 1e5))
    heads = {"paired": trained_heads(7), "shuffled": trained_heads(5)}
    found = all_scores(kept, heads, ["test"])["test"]
    asked = gallery(kept, "test")
    assert [pictures for pictures, _ in chosen] == [kept.indices("validation").tolist()] * 2
    (_, temperature), (_, penalty) = chosen
    guesses = Guesses(kept)
    assert torch.equal(found["neighbours"], guesses.neighbours(asked, temperature))
    assert torch.equal(found["least squares"], guesses.least_squares(asked, penalty))
    assert torch.equal(found["model"], cosines(heads["paired"], kept, asked))
    shuffled = found["model, shuffled captions"]
    assert torch.equal(shuffled, cosines(heads["shuffled"], kept, asked))
    right = asked.right.float()
    assert best((-1.0, 2.0, 0.5), lambda _, setting: setting * right, asked) == 2.0


def of_row(table, **cells):
    """R@1 of the one row that says so, without its interval."""
    for name, cell in cells.items():
        table = table[table[name] == cell]
    (text,) = table["R@1"]
    return float(str(text).split()[0])


def test_tables_of_recall_by_hand():
    kept = toy(6)  # asked: pictures 4, 5, 10, 11, whose captions are 4, 5, 4, 5
    model = torch.tensor([[0.9, 0.7], [0.8, 0.2], [0.3, 0.1], [0.1, 0.5]])
    held_out = torch.eye(4)[:3]
    scores = {
        "test": {"model": model, "other": -model},
        "vendor": {"model": held_out, "other": -held_out},
    }
    recalls, leads = recall_table(kept, scores)
    seen, drawings = {"asked": "captions never seen"}, {"asked": "drawings held out"}
    of_picture, of_caption = ({"sought": way} for way in WAYS)
    # Three pictures find their caption; of the captions one finds a picture of its own.
    assert of_row(recalls, method="model", **seen, **of_picture) == 75
    assert of_row(recalls, method="model", **seen, **of_caption) == 50
    assert of_row(recalls, method="other", **seen, **of_picture) == 25
    assert of_row(recalls, method="other", **seen, **of_caption) == 0
    assert of_row(recalls, method="chance", **drawings, **of_picture) == 25
    assert of_row(recalls, method="chance", **drawings, **of_caption) == pytest.approx(33.3)
    assert of_row(leads, **seen, **of_picture) == 50
    assert of_row(leads, **drawings, **of_picture) == 100
    assert set(leads["model minus"]) == {"other"}
    table = source_table(kept, model).set_index("source")
    assert table.pictures.to_dict() == {"google": 2, "twitter": 2}
    assert {source: float(text) for source, text in table["R@1"].items()} == {
        "google": 50,
        "twitter": 100,
    }


def test_the_figure_shows_what_is_put_first_and_what_is_right():
    kept = toy(9)
    asked = gallery(kept, "test")
    assert len(asked.captions) == 3
    white = torch.full((18, 3, 8, 8), 255, dtype=torch.uint8)
    said = tuple(kept.captions[c] for c in kept.caption_of)
    shown = CaptionedPictures(white, white[:, 0], said, kept.concepts, kept.sources, kept.splits)
    scores = random(len(asked.pictures), len(asked.captions))
    ranks, order = found_ranks(scores, asked)[0], scores.argsort(1, descending=True)
    by_caption = {}
    for i, picture in enumerate(asked.pictures.tolist()):
        names = [kept.captions[asked.captions[n]] for n in order[i]]
        by_caption.setdefault(f"{said[picture]}: {ranks[i]}", []).append(names)
    for axis in draw_found(kept, scores, shown).axes:
        if title := axis.get_title():
            names = [text.get_text() for text in axis.texts]
            assert names in by_caption[title]
            bold = [text.get_text() for text in axis.texts if text.get_weight() == "bold"]
            assert bold == [title.split(":")[0]]


def test_patches_on_the_object_alone_are_painted():
    figure, axis = plt.subplots()
    axis.imshow(np.zeros((28, 28, 3)))
    alpha = torch.zeros(28, 28, dtype=torch.uint8)
    alpha[14:, :14] = 255
    clip_report._paint_patches(axis, torch.tensor([0, 1, 2, 3]), alpha)
    painted = axis.get_images()[1].get_array()
    assert painted[..., 3].tolist() == [[0, 0], [0.65, 0]]
    assert tuple(painted[1, 0, :3]) == pytest.approx(to_rgb(COLOURS[2]))
    plt.close(figure)


def test_words_are_joined_from_their_pieces():
    pieces = ["[CLS]", "a", "tam", "##wor", "##th", "pig", "##let", "2", "[SEP]", "[PAD]"]
    assert telling_words(pieces) == {"tamworth": [2, 3, 4], "piglet": [5, 6]}


def test_a_patch_prefers_the_word_that_it_was_made_of():
    kept, heads = toy(6), Heads(SAID)
    with torch.no_grad():
        heads.patch.weight.copy_(torch.eye(SAID, SEEN))
        heads.word.weight.copy_(torch.eye(SAID))
        heads.word.bias.zero_()
    words = {"two": [1, 2], "one": [3]}
    states, tokens = kept.words.states.clone(), kept.tokens.clone()
    states[0, 1:4] = random(3, SAID).half()
    tokens[0, 1:, :SAID] = states[0, 3]
    tokens[0, 4, :SAID] = F.normalize(states[0, 1:3].float(), dim=-1).mean(0).half()
    kept = replace(kept, tokens=tokens, words=CachedStates(states, kept.words.mask))
    found = word_cosines(heads, kept, 0, words)
    assert found.argmax(1).tolist() == [1, 1, 1, 0, *[1] * 5]
    assert found[3, 0].item() == pytest.approx(1, abs=1e-3)
    assert found[0, 1].item() == pytest.approx(1, abs=1e-3)


# The build ----------------------------------------------------------------------------------------


def test_build_can_be_read_again_and_reports_on_itself(tmp_path, monkeypatch):
    target = tmp_path / "clip"
    target.mkdir()
    try:
        clip.build(target, "smoke")
    except AssetError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(clip, "backbone_path", lambda name, profile: target)
    kept, setting = clip.load_tokens("smoke"), SETTINGS["smoke"]
    pictures, side = captioned_pictures(setting.size, setting.limit), setting.size // 14
    assert tuple(kept.captions[c] for c in kept.caption_of) == pictures.captions
    assert (kept.concepts, kept.sources, kept.splits) == (
        *(pictures.concepts, pictures.sources),
        pictures.splits,
    )
    assert kept.tokens.shape == (len(kept.caption_of), 1 + side**2, SEEN)
    assert kept.tokens.dtype == kept.words.states.dtype == torch.float16
    assert len(kept.words) == len(kept.captions) == len(set(kept.captions))
    assert len(kept.splits) == len(kept.sources) == len(kept.concepts) == len(kept.tokens)
    again, losses = fit("paired", setting, kept)
    assert len(losses) == setting.steps
    for arm, same in (("paired", True), ("shuffled", False)):
        heads = clip.load("smoke", arm=arm)
        assert not any(p.requires_grad for p in heads.parameters())
        assert torch.equal(heads.word.weight, again.word.weight) == same
    directory = write_report("clip", "smoke", tmp_path)
    assert {p.name for p in directory.iterdir()} == {
        *("recalls.csv", "leads.csv", "sources.csv"),
        *("patches.png", "found.png", "results.json"),
    }
