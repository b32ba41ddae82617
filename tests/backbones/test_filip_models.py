"""FILIP's arms: equal starts, and each similarity by its definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.backbones.trained import filip
from reattend.backbones.trained.filip import (
    ARMS,
    PER_WORKER,
    SETTINGS,
    AnytimeMean,
    build,
    contrastive_loss,
    fit,
    moved_on,
    paired,
    some_patches,
    untrained,
)
from reattend.training.loop import decay_matrices, train
from reattend.trunks.encoders import index_batches

SMOKE = SETTINGS["smoke"]


def tokens(pairs=8, patches=8, words=6, joint=5):
    """[CLS] and patches, words, and captions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(pairs, 1 + patches, joint, generator=generator), dim=-1)
    text = F.normalize(torch.randn(pairs, words, joint, generator=generator), dim=-1)
    mask = torch.arange(words) < (2 + torch.arange(pairs) % (words - 1))[:, None]
    return image.double(), text.double(), mask


def test_arms_of_a_seed_start_alike_and_see_the_same_pairs():
    first, again, other = (untrained(SMOKE.shape, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image_map.weight"], other["image_map.weight"])
    pairs = paired(SMOKE.shape.scenes(24, "train", 0))
    losses = [fit(arm, SMOKE, pairs, 0)[1] for arm in ("global", "global", "late")]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_global_is_the_cosine_of_cls_and_eos():
    image, text, mask = tokens()
    cosines, same = ARMS["global"].train(image, text, mask)
    for j in range(8):
        last = text[j, int(mask[j].sum()) - 1]
        torch.testing.assert_close(cosines[:, j], image[:, 0] @ last)
    assert torch.equal(cosines, same)


def test_mean_mean_is_the_mean_over_real_pairs():
    image, text, mask = tokens()
    means, _ = ARMS["mean-mean"].train(image, text, mask)
    for i in range(8):
        for j in range(8):
            products = image[i, 1:] @ text[j, mask[j]].T
            assert means[i, j].item() == pytest.approx(products.mean().item(), abs=1e-12)


def test_late_leaves_cls_out_and_unmasked_reads_padding():
    image, text, mask = tokens()
    late = ARMS["late"].train(image, text, mask)
    other = image.clone()
    other[:, 0] = -other[:, 0]
    for one, two in zip(late, ARMS["late"].train(other, text, mask), strict=True):
        assert torch.equal(one, two)
    unmasked = ARMS["unmasked"].train(image, text, mask)
    for one, two in zip(late, unmasked, strict=True):
        assert (one != two).any()
    everything = torch.ones_like(mask)
    for one, two in zip(
        ARMS["late"].train(image, text, everything),
        ARMS["unmasked"].train(image, text, mask),
        strict=True,
    ):
        assert torch.equal(one, two)


def test_quarter_keeps_what_the_local_batch_tells_and_tests_on_all():
    image, text, mask = tokens()
    by_patches, by_words = some_patches(0.25, local=2)(image, text, mask)
    for i in range(8):
        worker = range(i // 2 * 2, i // 2 * 2 + 2)
        others = torch.cat([text[j, mask[j]] for j in worker])
        kept = (image[i, 1:] @ others.T).amax(1).topk(2).indices
        for j in range(8):
            products = image[i, 1:][kept] @ text[j, mask[j]].T
            assert by_patches[i, j].item() == pytest.approx(products.amax(1).mean().item())
            assert by_words[i, j].item() == pytest.approx(products.amax(0).mean().item())
    arm, whole = ARMS["quarter"], some_patches(0.25, local=PER_WORKER)
    wider = tokens(pairs=3 * PER_WORKER)
    for one, two in zip(arm.train(*wider), whole(*wider), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(
        arm.test(image, text, mask), ARMS["late"].test(image, text, mask), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.25, 2), (0.125, 1)])
def test_a_share_keeps_so_many_patches_and_all_of_them_is_late(share, count):
    image, text, mask = tokens()
    image.requires_grad_()
    by_patches, by_words = some_patches(share)(image, text, mask)
    (by_patches.sum() + by_words.sum()).backward()
    assert (image.grad.abs().sum(-1) > 0).sum(1).tolist() == [count] * 8
    for one, two in zip(
        some_patches(1.0)(image, text, mask), ARMS["late"].train(image, text, mask), strict=True
    ):
        assert torch.equal(one, two)


def test_anytime_mean_of_weights_by_hand():
    """Weights 1, 2, 3, ... have the mean (9 t + 1) / 10 after t steps; weights that stay are their own mean."""
    model = nn.Linear(1, 1).double()
    nn.init.constant_(model.bias, 7.0)
    average = AnytimeMean(model)
    for step in range(1, 60):
        nn.init.constant_(model.weight, float(step))
        average.take(step)
        assert average.mean.weight.item() == pytest.approx((9 * step + 1) / 10, rel=1e-12)
        assert average.mean.bias.item() == pytest.approx(7.0, rel=1e-12)
    assert model.weight.item() == 59.0


def test_the_first_steps_of_a_long_training_are_a_short_one():
    pairs = paired(SMOKE.shape.scenes(24, "train", 0))
    long, losses = fit("late", SMOKE, pairs, 0)
    assert list(long) == list(SMOKE.marks)
    assert len(losses) == SMOKE.marks[-1]
    short, _ = fit("late", replace(SMOKE, marks=SMOKE.marks[:3]), pairs, 0)
    for mark, model in short.items():
        other = long[mark].state_dict()
        assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    assert not torch.equal(long[1].text_map.weight, long[4].text_map.weight)


def test_what_is_kept_is_the_mean_of_the_weights_so_far():
    pairs, seen = paired(SMOKE.shape.scenes(24, "train", 0)), []
    model = untrained(SMOKE.shape, 0)
    train(
        model,
        index_batches(24, SMOKE.batch, 1000),
        lambda model, index: contrastive_loss(model, pairs[index], ARMS["late"].train),
        SMOKE.plan("late"),
        groups=decay_matrices,
        after_step=lambda step: seen.append(model.text_map.weight.detach().clone()),
    )
    kept, _ = fit("late", SMOKE, pairs, 0)
    mean = seen[0]
    for step, weight in enumerate(seen, start=1):
        mean = mean + 9 / (step + 8) * (weight - mean)
        if step in SMOKE.marks:
            torch.testing.assert_close(kept[step].text_map.weight, mean)
    assert (mean - seen[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_reaches_both_towers(arm):
    model, pairs = untrained(SMOKE.shape, 0), paired(SMOKE.shape.scenes(8, "train", 0))
    contrastive_loss(model, pairs, ARMS[arm].train).backward()
    for name in ("image.patches.weight", "text.words", "image_map.weight", "log_scale"):
        assert model.get_parameter(name).grad.abs().max() > 0, name


def test_build_can_be_read_again(tmp_path, monkeypatch):
    build(tmp_path, "smoke")
    monkeypatch.setattr(filip, "backbone_path", lambda name, profile: tmp_path)
    trained = filip.load("smoke")
    assert list(trained.models) == list(ARMS)
    counts = {arm: len(models) for arm, models in trained.at(SMOKE.marks[-1]).items()}
    assert counts == SMOKE.seeds
    for arm, losses in trained.losses.items():
        assert losses.shape == (SMOKE.seeds[arm], SMOKE.marks[-1])
    # The second seed of an arm that has fewer is the second seed of all.
    pairs = paired(SMOKE.shape.scenes(SMOKE.scenes, "train", SMOKE.first + 1))
    assert torch.equal(
        trained.losses["quarter"][1], fit("quarter", SMOKE, pairs, SMOKE.first + 1)[1]
    )
    assert trained.losses["late"].isfinite().all()
    first, last = (trained.at(mark)["late"][1] for mark in (SMOKE.marks[0], SMOKE.marks[-1]))
    start = untrained(SMOKE.shape, SMOKE.first + 1)
    assert not torch.equal(start.text_map.weight, last.text_map.weight)
    assert not torch.equal(first.text_map.weight, last.text_map.weight)


@pytest.mark.parametrize("profile", SETTINGS)
def test_marks_hold_the_half_and_pairs_at_equal_time(profile):
    setting = SETTINGS[profile]
    assert list(setting.marks) == sorted(setting.marks)
    assert 2 * (setting.marks[-1] // 2) == setting.marks[-1]
    assert setting.marks[-1] // 2 in setting.marks
    pairs = setting.in_the_same_time
    assert setting.marks[-1] in pairs
    for steps, late in pairs.items():
        assert late * setting.longer <= steps < (late + 1) * setting.longer
    assert len(pairs) == (1 if profile == "smoke" else 2)
    assert set(setting.seeds) == set(ARMS)
    assert max(setting.seeds.values()) == setting.seeds["late"] == setting.seeds["global"]


def test_moved_on_counts_towards_the_side_on_which_the_difference_lies():
    half, end = np.array([1.0, 4.0, -1.0]), np.array([3.0, 3.0, 3.0])
    assert moved_on(half, end, 0.6).tolist() == [2, -1, 4]  # ahead: a rise leads on
    assert moved_on(half, end, 3.5).tolist() == [-2, 1, -4]  # short of it: a rise leads back
    # A lag that is made up and a lead that is lost both count against, by as much.
    assert moved_on(-half, -end, -0.6).tolist() == [2, -1, 4]
    assert moved_on(-end, -half, -0.6).tolist() == [-2, 1, -4]
