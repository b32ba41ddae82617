"""The build of pretrained arms: equal starts, equal pictures and masks, the arms' targets, reading back."""

from dataclasses import replace

import pytest
import torch

from reattend.backbones.trained import dmt_jepa as build
from reattend.backbones.trained.dmt_jepa import (
    ARMS,
    SETTINGS,
    centred,
    fit,
    jepa_loss,
    masked_mosaics,
    spread_over_pictures,
    untrained,
)

SMOKE = SETTINGS["smoke"]


def garments(count=40):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(count) % 10


def test_arms_of_one_seed_start_alike_on_both_sides_and_seeds_do_not():
    first = untrained("I-JEPA", SMOKE, 3)
    for arm in ARMS:
        model = untrained(arm, SMOKE, 3)
        for part in ("encoder", "predictor"):
            state = getattr(model, part).state_dict()
            for name, weights in getattr(first, part).state_dict().items():
                assert torch.equal(state[name], weights), (arm, name)
        for name, weights in model.encoder.state_dict().items():
            assert torch.equal(model.target_encoder.state_dict()[name], weights)
    heads = [untrained(arm, SMOKE, 3).head.state_dict() for arm in ARMS[1:3]]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    other = untrained("I-JEPA", SMOKE, 4)
    assert not torch.equal(
        other.encoder.patch_embed.proj.weight, first.encoder.patch_embed.proj.weight
    )


def test_a_patch_of_unit_variance_keeps_it():
    model = untrained("I-JEPA", SETTINGS["cpu"], 0)
    images = torch.randn(20, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert model.encoder.patch_embed(images).std().item() == pytest.approx(1, rel=0.1)


def test_arms_are_what_their_names_say():
    batch = next(masked_mosaics(*garments(), SMOKE, 0))
    images, _, _, scores = batch
    losses = {}
    for arm in ARMS:
        model = untrained(arm, SMOKE, 0)
        assert (model.head is not None) == (arm in ("DMT-JEPA", "random neighbours"))
        assert model.averaged == (4 if arm == "averaged neighbours" else 0)
        losses[arm] = jepa_loss(arm, model, batch).item()
        chosen = scores if arm == "random neighbours" else None
        wanted = model.loss(*batch[:3], chosen).item()
        assert losses[arm] == pytest.approx(wanted, rel=1e-6)
    assert len({round(loss, 7) for loss in losses.values()}) == 4
    model = untrained("DMT-JEPA", SMOKE, 0)
    assert not torch.allclose(model.targets(images), model.targets(images, scores), atol=1e-7)


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="unknown arm 'MAE'; there are: I-JEPA, DMT-JEPA"):
        untrained("MAE", SMOKE, 0)


def test_pictures_and_masks_of_a_seed_come_again():
    first, again = (masked_mosaics(*garments(), SMOKE, 5) for _ in range(2))
    for _ in range(3):
        for left, right in zip(next(first), next(again), strict=True):
            assert torch.equal(left, right)
    context, targets = next(first)[1:3]
    assert not set(context[0].tolist()) & set(targets[0].flatten().tolist())


def test_arms_of_one_seed_read_the_same(monkeypatch):
    seen = {arm: [] for arm in ARMS[:2]}

    def watch(arm, model, batch):
        seen[arm].append(batch)
        return model.loss(*batch[:3])

    monkeypatch.setattr(build, "jepa_loss", watch)
    watched = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    for arm in seen:
        fit(arm, SMOKE, *garments(), watched, seed=1)
    for left, right in zip(*seen.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_spread_is_that_over_pictures_and_not_over_patches():
    place = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    assert spread_over_pictures(place.expand(5, -1, -1)) < 1e-6
    free = torch.randn(400, 4, 64, generator=torch.Generator().manual_seed(1))
    assert spread_over_pictures(7 * free + 3) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("arm", ["I-JEPA", "DMT-JEPA"])
def test_training_moves_the_target_side_and_lowers_the_loss(arm):
    setting = replace(SMOKE, steps=60, rate=5e-3, momentum=0.9, looks=6, batch=8)
    watched = torch.randint(0, 256, (6, 1, 64, 64), dtype=torch.uint8)
    start = untrained(arm, setting, 0)
    model, losses, spreads = fit(arm, setting, *garments(), watched, seed=0)
    assert losses.shape == (60,)
    assert spreads.shape == (7,)
    assert losses[-10:].mean() < 0.8 * losses[:5].mean()
    assert spreads[0].item() == pytest.approx(
        spread_over_pictures(start.targets(centred(watched))), rel=1e-5
    )
    moved, trained = (
        (part.blocks[0].mlp.fc1.weight - start.encoder.blocks[0].mlp.fc1.weight).abs().mean()
        for part in (model.target_encoder, model.encoder)
    )
    assert 0 < moved < trained


def test_building_and_reading_back(tmp_path, monkeypatch):
    setting = replace(SMOKE, seeds=2)
    monkeypatch.setitem(SETTINGS, "smoke", setting)
    monkeypatch.setattr(build, "backbone_path", lambda name, profile: tmp_path)
    build.build(tmp_path, "smoke")
    trained = build.load("smoke")
    assert list(trained.models) == list(ARMS)
    data = build.fashion_mnist(limit=setting.garments)
    train = data.indices("train")
    for arm, models in trained.models.items():
        assert trained.losses[arm].shape == (2, 3)
        assert trained.spreads[arm].shape == (2, 4)
        watched = trained.pixels["test"][:64]
        again, losses, _ = fit(arm, setting, data.pixels[train, 0], data.labels[train], watched, 1)
        assert torch.equal(losses, trained.losses[arm][1])
        for name, weights in again.state_dict().items():
            assert torch.equal(weights, models[1].state_dict()[name]), name
        assert not any(p.requires_grad for p in models[1].parameters())
    assert trained.pixels["train"].shape == (8, 1, 64, 64)
    assert trained.labels["test"].shape == (4, 64)
