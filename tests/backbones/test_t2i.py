"""The text-to-image backbone and its judge at their smallest, and what is measured of them."""

import math

import pytest
import torch
from torch import Generator
from torch.nn import functional as F

from reattend.backbones import scene_judge
from reattend.backbones.scene_judge import (
    CLIP,
    Judgement,
    SceneJudge,
    asked_surely,
    bent,
    judge_loss,
    judge_scenes,
    roughened,
    train_judge,
    true_contents,
)
from reattend.backbones.trained.t2i import (
    SETTINGS,
    batches,
    build,
    draw,
    fit,
    map_quality,
    picture_quality,
    untrained,
)
from reattend.data.prompt_scenes import (
    COLOURS,
    NOUNS,
    Prompts,
    empty_captions,
    paint,
    paint_things,
    pair_prompts,
)

SMOKE = SETTINGS["smoke"]


def told(counts: torch.Tensor, pairs: torch.Tensor) -> Judgement:
    """A judgement that is sure of these contents."""
    return Judgement(20 * F.one_hot(counts.clamp(max=2), 3).float(), 40 * pairs - 20)


def test_contents_count_nouns_and_pair_them_with_their_colours():
    colours, nouns = torch.tensor([[1, 1, 3], [0, -1, -1]]), torch.tensor([[4, 4, 0], [7, -1, -1]])
    counts, pairs = true_contents(paint_things(colours, nouns, 24, Generator().manual_seed(0)))
    assert counts.nonzero().tolist() == [[0, 0], [0, 4], [1, 7]]
    assert counts[0, 4] == 2
    assert pairs.nonzero().tolist() == [[0, 0, 3], [0, 4, 1], [1, 7, 0]]


def test_judgement_of_what_a_prompt_asks_for():
    prompts = Prompts(torch.tensor([[1, 3], [0, -1]]), torch.tensor([[4, 0], [7, -1]]))
    counts, pairs = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, 4)
    counts[0, 4], counts[0, 2], counts[1, 7] = 2, 1, 1
    pairs[0, 4, 1] = pairs[0, 2, 3] = pairs[1, 7, 2] = 1
    said = told(counts, pairs)
    assert said.asked_presence(prompts).tolist() == [[CLIP, -CLIP], [CLIP, torch.inf]]
    assert said.asked_pairs(prompts).tolist() == [[CLIP, -CLIP], [-CLIP, torch.inf]]
    assert said.number()[0].tolist() == counts[0].tolist()
    assert said.surplus(prompts).tolist() == [2, 0]  # one too many of noun 4, and noun 2


def test_presence_is_the_log_odds_of_any_count_above_none():
    logits = torch.randn(5, 8, 3, generator=Generator().manual_seed(0))
    said = Judgement(logits, torch.zeros(5, 8, 4))
    share = logits.softmax(-1)[..., 1:].sum(-1)
    torch.testing.assert_close(said.presence(), share.logit())


def test_loss_of_a_sure_judge_is_small_when_right_and_large_when_wrong():
    scenes = judge_scenes(40, 24, Generator().manual_seed(1))
    counts, pairs = true_contents(scenes)
    assert judge_loss(told(counts, pairs), scenes) < 1e-6
    assert judge_loss(told(counts.flip(1), pairs), scenes) > 1
    assert judge_loss(told(counts, pairs.flip(2)), scenes) > 1
    flat = Judgement(torch.zeros(40, 8, 3), torch.zeros(40, 8, 4))
    expected = math.log(3) + len(COLOURS) * math.log(2)
    assert judge_loss(flat, scenes).item() == pytest.approx(expected)


def test_judge_scenes_hold_none_to_three_things_and_repeats():
    scenes = judge_scenes(2000, 24, Generator().manual_seed(2))
    number = (scenes.nouns >= 0).sum(1)
    assert sorted(set(number.tolist())) == [0, 1, 2, 3]
    assert 0.1 < (true_contents(scenes)[0].amax(1) > 1).double().mean() < 0.4


def test_bending_moves_pictures_by_whole_pixels_of_either_parity(monkeypatch):
    monkeypatch.setattr(scene_judge, "BEND", 0.0)
    pixels = judge_scenes(40, 24, Generator().manual_seed(3)).pixels
    moved = bent(pixels, Generator().manual_seed(4))
    framed, seen = F.pad(pixels, (2, 2, 2, 2), "replicate"), set()
    for before, after in zip(framed, moved, strict=True):
        fits = [
            (x, y)
            for y in range(5)
            for x in range(5)
            if torch.allclose(before[:, y : y + 24, x : x + 24], after, atol=1e-4)
        ]
        assert fits
        seen.add(fits[0])
    assert len(seen) > 15


def test_bending_is_slight_and_another_one_for_each_picture():
    pixels = judge_scenes(1, 24, Generator().manual_seed(3)).pixels.expand(30, -1, -1, -1)
    moved = bent(pixels, Generator().manual_seed(4))
    assert moved.shape == pixels.shape
    assert len({tuple(some.flatten().tolist()) for some in moved}) == 30
    torch.testing.assert_close(moved.mean((1, 2, 3)), pixels.mean((1, 2, 3)), atol=0.08, rtol=0)


def asking_all(count):
    """Prompts that ask for the eight nouns, two a prompt; rows are scenes x 4."""
    nouns = torch.arange(8).reshape(4, 2).repeat(count, 1)
    return Prompts(torch.zeros_like(nouns), nouns)


def test_the_rule_is_right_where_it_is_sure_even_of_much_bent_scenes(monkeypatch):
    monkeypatch.setattr(scene_judge, "BEND", 0.6)
    scenes = judge_scenes(300, 24, Generator().manual_seed(5))
    pixels = bent(scenes.pixels, Generator().manual_seed(6)).repeat_interleave(4, 0)
    said, sure = asked_surely(pixels, asking_all(300))
    truth = (true_contents(scenes)[0] > 0).reshape(-1, 2)
    assert (said == truth)[sure].double().mean() > 0.99
    assert (said == truth)[~sure].double().mean() < 0.95
    assert sure.double().mean() > 0.5
    assert (said & sure).double().sum() > 100


def test_the_rule_is_never_sure_of_what_was_not_asked_for():
    prompts = Prompts(torch.tensor([[0, -1]]), torch.tensor([[3, -1]]))
    blank = torch.ones(1, 3, 24, 24)
    said, sure = asked_surely(blank, prompts)
    assert said.tolist() == [[False, False]]
    assert sure.tolist() == [[True, False]]


def test_roughening_keeps_shapes_and_brightness():
    pixels = judge_scenes(60, 24, Generator().manual_seed(3)).pixels
    rough = roughened(pixels, Generator().manual_seed(4))
    assert rough.shape == pixels.shape
    torch.testing.assert_close(rough.mean((1, 2, 3)), pixels.mean((1, 2, 3)), atol=0.03, rtol=0)
    change = (rough - pixels).flatten(1).std(1)
    assert change.min() < 0.05 < change.median() < 0.2 < change.max() < 0.5


def test_a_short_training_teaches_the_judge_something():
    judge = train_judge(24, 60, 32, seed=0)
    scenes = judge_scenes(200, 24, Generator().manual_seed(5))
    trained, fresh = (judge_loss(j(scenes.pixels), scenes).item() for j in (judge, SceneJudge()))
    assert trained < 0.7 * fresh
    assert not any(p.requires_grad for p in judge.parameters())


def test_batches_repeat_by_seed_and_drop_a_tenth_of_the_captions():
    first, again, other = (next(batches(SETTINGS["cpu"], seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    stream = batches(SETTINGS["cpu"], 2)
    empty = empty_captions(1)[0]
    dropped = [(next(stream)[1] == empty).all(1) for _ in range(20)]
    assert torch.cat(dropped).double().mean().item() == pytest.approx(0.1, abs=0.03)


def test_what_is_kept_is_a_running_mean_of_the_weights():
    kept, losses = fit(SMOKE, 0)
    again, same = fit(SMOKE, 0)
    assert losses == same
    assert len(losses) == SMOKE.steps
    start = untrained(SMOKE, 0)
    name = "leave.2.bias"
    assert torch.equal(kept.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(kept.state_dict()[name], start.state_dict()[name])
    assert not any(p.requires_grad for p in kept.parameters())


def test_drawing_repeats_by_seed_and_does_not_depend_on_the_chunk():
    model, prompts = untrained(SMOKE, 0), pair_prompts(5)
    whole = draw(model, prompts, 3, steps=2, guidance=3.0)
    parts = draw(model, prompts, 3, steps=2, guidance=3.0, chunk=2)
    torch.testing.assert_close(whole, parts)
    assert not torch.equal(whole, draw(model, prompts, 4, steps=2, guidance=3.0))


class Oracle(SceneJudge):
    """Says what was painted, whatever it is shown."""

    def __init__(self, scenes):
        super().__init__()
        self.contents = true_contents(scenes)

    def forward(self, pixels):
        return told(*self.contents)


def test_quality_of_painted_pictures_is_perfect_and_of_others_is_not():
    prompts = pair_prompts(28)
    scenes = paint(prompts, 24, Generator().manual_seed(6))
    found = picture_quality(scenes.pixels, Oracle(scenes), prompts, "x")
    assert found == {
        "x, present": 1.0,
        "x, present in its colour": 1.0,
        "x, more than asked": 0.0,
        "x, judge agrees where the rule is sure": 1.0,
    }
    turned = Prompts(prompts.colours.flip(1), prompts.nouns)
    found = picture_quality(scenes.pixels, Oracle(scenes), turned, "x")
    assert found["x, present"] == 1
    assert found["x, present in its colour"] == 0
    lone = Prompts(
        prompts.colours.clone().index_fill_(1, torch.tensor([1]), -1),
        prompts.nouns.clone().index_fill_(1, torch.tensor([1]), -1),
    )
    assert picture_quality(scenes.pixels, Oracle(scenes), lone, "x")["x, more than asked"] == 1


def test_map_quality_names_every_side_and_the_chance_level():
    found = map_quality(untrained(SMOKE, 0), 40)
    assert list(found) == [
        "maps of side 6 in the box",
        "maps of side 12 in the box",
        "share of the box",
    ]
    assert 0.1 < found["share of the box"] < 0.2


def test_build_writes_models_judge_and_quality(tmp_path):
    build(tmp_path, "smoke")
    assert {path.name for path in tmp_path.iterdir()} == {
        "unet-0.safetensors", "judge.safetensors", "quality.json",
    }  # fmt: skip
    assert (tmp_path / "quality.json").read_text().startswith("[\n {")


def test_vocabulary_of_the_shapes_is_that_of_the_prompts():
    for setting in SETTINGS.values():
        assert setting.shape.vocabulary == 5 + len(COLOURS) + len(NOUNS)
