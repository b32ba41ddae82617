"""Scenes: the annotations say exactly what is in the pictures."""

import numpy as np
import pytest
import torch

from reattend.data.scene_language import (
    NUMBERS,
    OPPOSITES,
    caption,
    described,
    present,
    questions,
    referring_phrases,
    relation,
)
from reattend.data.scenes import (
    CLASSES,
    COLOURS,
    MODES,
    WORDS,
    dominant_colour,
    held_out_pair,
    make_scenes,
    object_name,
    split_names,
)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_consistent(mode):
    scenes = make_scenes(6, mode, split="test", seed=1, size=96)
    settings = MODES[mode]
    frames = (settings.frames,) if settings.frames > 1 else ()
    assert scenes.pixels.shape == (6, *frames, 3, 96, 96)
    assert scenes.masks.shape == (6, *frames, settings.objects[1], 96, 96)
    assert (scenes.masks.long().sum(-3) <= 1).all(), "a pixel belongs to one object"
    for scene in range(6):
        count = len(present(scenes, scene))
        assert settings.objects[0] <= count <= settings.objects[1]
        assert len(scenes.identities[scene]) == count
        assert (scenes.labels[scene, count:] == -1).all()
        assert (scenes.words[scene] in WORDS) == settings.word
        masks = scenes.masks[scene].reshape(-1, settings.objects[1], 96, 96)
        boxes = scenes.boxes[scene].reshape(-1, settings.objects[1], 4)
        for mask, box in zip(
            masks[:, :count].flatten(0, 1), boxes[:, :count].flatten(0, 1), strict=True
        ):
            rows, columns = mask.nonzero(as_tuple=True)
            assert box.tolist() == [
                columns.min(), rows.min(), columns.max() + 1, rows.max() + 1,
            ]  # fmt: skip
        assert not masks[:, count:].any()
        assert not boxes[:, count:].any()


def test_the_same_arguments_give_the_same_bytes():
    first, second = (make_scenes(5, "several", seed=3) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert first.identities == second.identities
    assert not torch.equal(first.pixels, make_scenes(5, "several", seed=4).pixels)


def test_masks_are_where_the_picture_differs_from_the_photograph():
    """Inside the mask a stamp has replaced the photograph; a hole would show as smooth background."""
    scenes = make_scenes(20, "single", seed=2)
    for scene in range(20):
        mask = scenes.masks[scene, 0]
        share = mask.float().mean().item()
        assert 0.01 < share < 0.4


def test_sides_share_no_cut_out_and_every_class_is_on_all():
    seen = {}
    for split in ("train", "validation", "test"):
        scenes = make_scenes(400, "single", split=split, size=32)
        seen[split] = {
            name.removesuffix("_mirror") for names in scenes.identities for name in names
        }
        assert set(scenes.labels.flatten().tolist()) == set(range(len(CLASSES)))
    # Two classes may use one file name, for instance of a toy and an animal: compare by class.
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]


def test_mirrored_copies_stay_on_one_side():
    sides = split_names([f"picture {i}" for i in range(20)] + ["picture 3_mirror"])
    assert sides["picture 3"] == sides["picture 3_mirror"]
    assert [list(sides.values())[:20].count(s) for s in ("train", "validation", "test")] == [
        12,
        3,
        5,
    ]


def test_classes_are_equally_frequent_and_biased_when_asked():
    labels = make_scenes(1200, "single", size=32).labels.flatten()
    counts = torch.bincount(labels, minlength=12)
    assert counts.min() > 60
    pairs = make_scenes(400, "biased", size=32).labels
    partners = ((pairs[:, 0] + 1) % 12 == pairs[:, 1]).float().mean()
    assert 0.85 < partners < 0.97
    free = make_scenes(400, "biased", size=32, bias=0.0).labels
    assert ((free[:, 0] + 1) % 12 == free[:, 1]).float().mean() < 0.15


@pytest.mark.parametrize("compositions", ["seen", "held_out"])
def test_held_out_compositions(compositions):
    labels = make_scenes(60, "several", size=64, compositions=compositions).labels
    for row in labels.tolist():
        row = [label for label in row if label >= 0]
        unseen = any(held_out_pair(a, b) for i, a in enumerate(row) for b in row[:i])
        assert unseen == (compositions == "held_out")
    share = np.mean([held_out_pair(a, b) for a in range(12) for b in range(a)])
    assert 0.1 < share < 0.35


def test_objects_of_a_video_move_as_they_say():
    scenes = make_scenes(20, "video", seed=5)
    centres = (scenes.boxes[..., :2] + scenes.boxes[..., 2:]) / 2
    for scene in range(20):
        for index in present(scenes, scene):
            moved = centres[scene, -1, index] - centres[scene, 0, index]
            direction = torch.tensor(
                [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)][scenes.motions[scene, index]]
            )
            torch.testing.assert_close(moved, direction * 0.3 * 96, atol=2.1, rtol=0)


def test_colours_of_plain_patches():
    wanted = {
        "red": (220, 20, 20),
        "green": (20, 180, 40),
        "blue": (30, 60, 220),
        "white": (250, 250, 250),
        "black": (10, 10, 10),
        "grey": (120, 122, 121),
        "brown": (120, 70, 20),
        "yellow": (240, 220, 20),
    }
    for name, colour in wanted.items():
        patch = np.full((4, 4, 4), 255, np.uint8)
        patch[..., :3] = colour
        assert COLOURS[dominant_colour(patch)] == name
    patch[:, :3] = (250, 20, 20, 0)  # transparent pixels do not count
    assert COLOURS[dominant_colour(patch)] == "yellow"


def test_bad_settings_name_what_is_allowed():
    with pytest.raises(ValueError, match="unknown mode 'many'"):
        make_scenes(1, "many")
    with pytest.raises(ValueError, match="unknown split"):
        make_scenes(1, split="all")
    with pytest.raises(ValueError, match="fewest, most"):
        make_scenes(1, objects=(3, 2))
    with pytest.raises(ValueError, match="scale"):
        make_scenes(1, scale=(0.5, 1.5))
    with pytest.raises(ValueError, match="two objects"):
        make_scenes(1, compositions="held_out")


def test_names_are_readable():
    assert object_name("heron_greatblue2") == "heron greatblue"


# Language -----------------------------------------------------------------------------------------


def test_relations_are_antisymmetric():
    scenes = make_scenes(20, "several")
    for scene in range(20):
        first, second = present(scenes, scene)[:2]
        where = relation(scenes, scene, first, second)
        assert relation(scenes, scene, second, first) == OPPOSITES[where]
        boxes = scenes.boxes[scene]
        if where == "left of":
            assert boxes[first, 0] < boxes[second, 0]


def test_phrases_name_one_object_each():
    scenes = make_scenes(60, "several", objects=(3, 4), scale=(0.2, 0.3))
    told = 0
    for scene in range(60):
        phrases = referring_phrases(scenes, scene)
        told += len(phrases)
        assert len({phrase for phrase, _ in phrases}) == len(phrases)
        for phrase, index in phrases:
            assert described(scenes, scene, index, colour=False) in phrase
    assert told > 0.9 * sum(len(present(scenes, scene)) for scene in range(60))


def test_answers_are_true():
    scenes = make_scenes(60, "several")
    balance = {"yes": 0, "no": 0}
    for scene in range(60):
        names = [described(scenes, scene, i, colour=False) for i in present(scenes, scene)]
        for question in questions(scenes, scene):
            if question.kind == "exist":
                noun = question.text.removesuffix(" ?").split()[-1]
                assert (question.answer == "yes") == (noun in names)
            if question.text == "how many objects are there ?":
                assert question.answer == NUMBERS[len(names)]
            if question.kind == "colour":
                assert question.answer == COLOURS[scenes.colours[scene, question.about]]
            if question.answer in balance:
                balance[question.answer] += 1
        assert questions(scenes, scene) == questions(scenes, scene)
    assert balance["yes"] == balance["no"]


def test_captions_say_what_is_there():
    scenes = make_scenes(10, "text")
    for scene in range(10):
        text = caption(scenes, scene)
        assert all(described(scenes, scene, i) in text for i in present(scenes, scene))
        assert text.endswith(f"a sign that says {scenes.words[scene].lower()}")
    moving = make_scenes(10, "video", objects=(1, 1))
    assert any(", the first moving" in caption(moving, scene) for scene in range(10))
    asked = {q.kind for scene in range(10) for q in questions(moving, scene)}
    assert "motion" in asked
