"""FILIP's arms: equal starts, and each similarity by its definition."""

import pytest
import torch
from torch.nn import functional as F

from reattend.backbones.trained import filip
from reattend.backbones.trained.filip import (
    ARMS,
    SETTINGS,
    build,
    contrastive_loss,
    fit,
    paired,
    untrained,
)

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
    by_patches, by_words = ARMS["quarter"].train(image, text, mask)
    for i in range(8):
        worker = range(i // 2 * 2, i // 2 * 2 + 2)
        others = torch.cat([text[j, mask[j]] for j in worker])
        kept = (image[i, 1:] @ others.T).amax(1).topk(2).indices
        for j in range(8):
            products = image[i, 1:][kept] @ text[j, mask[j]].T
            assert by_patches[i, j].item() == pytest.approx(products.amax(1).mean().item())
            assert by_words[i, j].item() == pytest.approx(products.amax(0).mean().item())
    for one, two in zip(
        ARMS["quarter"].test(image, text, mask), ARMS["late"].test(image, text, mask), strict=True
    ):
        assert torch.equal(one, two)


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
    assert {arm: len(found) for arm, found in trained.models.items()} == SMOKE.arms
    assert trained.losses["late"].shape == (SMOKE.arms["late"], SMOKE.steps)
    assert trained.losses["late"].isfinite().all()
    start, end = untrained(SMOKE.shape, 1), trained.models["late"][1]
    assert not torch.equal(start.text_map.weight, end.text_map.weight)
