"""A-STAR's losses by their formulae, and updates that do what they say and nothing else."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from reattend.generation import a_star
from reattend.generation.a_star import (
    LatentUpdates,
    active_regions,
    excitement_loss,
    half_height_regions,
    of_concepts,
    processed_maps,
    retention_loss,
    scrambled,
    segregation_loss,
    step_sizes,
)
from reattend.generation.word_maps import smooth
from reattend.trunks.diffusion import DiffusionShape, DiffusionUNet, MapRecorder, sample

IDS = torch.tensor([[1, 4, 7, 2, 0], [1, 5, 6, 8, 2], [1, 9, 3, 2, 0]])
EMPTY = torch.tensor([[1, 2, 0, 0, 0]]).expand(3, -1)
WORDS = IDS > 2


def random_maps(batch=3, concepts=2, side=5, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, concepts, side, side, generator=generator, dtype=torch.double)


def small_unet() -> DiffusionUNet:
    """A model in float64 in which every branch adds something."""
    torch.manual_seed(0)
    shape = DiffusionShape(vocabulary=11, length=5, side=12, width=16, heads=2, text_width=12)
    model = DiffusionUNet(shape).double()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def latent(seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 12, 12, generator=generator, dtype=torch.double)


def updates(model, loss, sizes=(0.5,) * 4, **settings) -> LatentUpdates:
    concepts = torch.tensor([[1, 2], [1, 3], [1, 2]])
    blocks = model.blocks_of_side(3)
    return LatentUpdates(model, loss, concepts, WORDS, blocks, sizes, **settings)


def segregate(maps, masks):
    return segregation_loss(maps)


def everything(maps, masks):
    return segregation_loss(maps) + (0 if masks is None else retention_loss(maps, masks))


# --- segregation -----------------------------------------------------------------------------------


def test_segregation_is_the_sum_over_unordered_pairs():
    maps = random_maps(concepts=4)
    expected = [
        sum(np.minimum(m[a], m[b]).sum() / (m[a] + m[b]).sum() for a in range(4) for b in range(a))
        for m in maps.numpy()
    ]
    torch.testing.assert_close(segregation_loss(maps), torch.tensor(expected))
    alike = maps[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(segregation_loss(alike), torch.full((3,), 3.0).double())


def test_segregation_ignores_a_common_scale_and_rewards_a_vanishing_map():
    maps = random_maps()
    torch.testing.assert_close(segregation_loss(7 * maps), segregation_loss(maps))
    faint = maps * torch.tensor([1.0, 1e-6]).double()[:, None, None]
    assert (segregation_loss(faint) < 1e-5).all()
    assert (segregation_loss(maps) > 0.2).all()


def test_a_single_concept_has_nothing_to_be_parted_from():
    assert (segregation_loss(random_maps(concepts=1)) == 0).all()


# --- retention -------------------------------------------------------------------------------------


def test_retention_of_a_map_that_is_its_mask_is_one_half_for_each_concept():
    masks = (random_maps() > 0.6).double()
    torch.testing.assert_close(retention_loss(masks, masks), torch.ones(3).double())
    torch.testing.assert_close(retention_loss(0.01 * masks, masks), torch.ones(3).double())


def test_retention_of_nothing_or_of_the_rest_is_one_for_each_concept():
    masks = (random_maps() > 0.6).double()
    for maps in (torch.zeros_like(masks), 1 - masks):
        torch.testing.assert_close(retention_loss(maps, masks), torch.full((3,), 2.0).double())


def test_retention_inside_its_mask_follows_the_formula():
    maps = random_maps()
    maps = maps / maps.amax((-2, -1), keepdim=True)
    everywhere = torch.ones_like(maps)
    total = maps.sum((-2, -1))
    expected = (1 - total / (total + 25)).sum(1)
    torch.testing.assert_close(retention_loss(maps, everywhere), expected)


# --- Attend-and-Excite -----------------------------------------------------------------------------


def test_excitement_is_what_the_weakest_concept_lacks():
    maps = random_maps()
    weakest = maps.flatten(2).amax(2).amin(1)
    torch.testing.assert_close(excitement_loss(maps), 1 - weakest)
    assert (excitement_loss(2 + maps) == 0).all()


# --- maps ------------------------------------------------------------------------------------------


def test_processed_maps_of_words_sum_to_one_and_others_are_empty():
    model, recorder = small_unet(), MapRecorder(("cross",), ("down3", "mid3", "up3"))
    model(latent(), torch.rand(3).double(), model.encode(IDS), recorder.hooks)
    weights = recorder.mean("cross")
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 9).double())
    maps = processed_maps(weights, WORDS)
    torch.testing.assert_close(maps.sum(1), torch.ones(3, 3, 3).double())
    assert (maps[~WORDS] == 0).all()
    raw = weights[1, :, 2] / weights[1, :, 1:4].sum(-1)
    torch.testing.assert_close(maps[1, 2], smooth(raw.view(1, 1, 3, 3))[0, 0])


def test_concepts_are_picked_by_position_in_each_caption():
    maps = random_maps(concepts=5)
    picked = of_concepts(maps, torch.tensor([[1, 2], [3, 1], [0, 4]]))
    assert torch.equal(picked[1], maps[1, [3, 1]])
    assert torch.equal(picked[2], maps[2, [0, 4]])


# --- regions ---------------------------------------------------------------------------------------


def test_active_region_is_the_component_of_the_peak_through_edges_only():
    maps = torch.zeros(1, 2, 5, 5).double()
    maps[0, 0, 0, :4] = torch.tensor([0.8, 0.9, 1.0, 0.9]).double()
    maps[0, 0, 1, 3] = 0.8  # joined below the fourth
    maps[0, 0, 2, 4] = 0.9  # touches a corner only
    maps[0, 0, 4, 0] = 0.95  # apart
    maps[0, 1] = maps[0, 0].T * 0.01
    regions = active_regions(maps)
    expected = torch.zeros(5, 5).double()
    expected[0, :4], expected[1, 3] = 1, 1
    assert torch.equal(regions[0, 0], expected)
    assert torch.equal(regions[0, 1], expected.T)  # whatever the scale


def test_half_height_keeps_what_reaches_half_of_the_peak():
    maps = random_maps()
    regions = half_height_regions(maps)
    for part, region in zip(maps.flatten(0, 1), regions.flatten(0, 1), strict=True):
        assert torch.equal(region.bool(), part >= part.max() / 2)


@pytest.mark.parametrize("regions", [active_regions, half_height_regions])
def test_masks_carry_no_gradient(regions):
    maps = random_maps().requires_grad_()
    assert not regions(maps).requires_grad


# --- updates ---------------------------------------------------------------------------------------


def drawn(model, before_step, steps=4):
    return sample(model, latent(), IDS, EMPTY, steps=steps, before_step=before_step)


def test_steps_of_size_zero_reproduce_the_model_bit_for_bit():
    model = small_unet()
    still = updates(model, everything, (0.0,) * 4, regions=active_regions)
    assert torch.equal(drawn(model, still), drawn(model, None))
    assert not torch.equal(drawn(model, updates(model, everything)), drawn(model, None))


def test_a_small_step_lowers_the_loss_to_first_order():
    model, time = small_unet(), torch.tensor([0.3, 0.6, 0.9]).double()
    text, z = model.encode(IDS), latent()
    size = 1e-4

    def losses(x):
        recorder = MapRecorder(("cross",), model.blocks_of_side(3))
        model(x, time, text, recorder.hooks)
        maps = processed_maps(recorder.mean("cross"), WORDS)
        return segregation_loss(of_concepts(maps, torch.tensor([[1, 2], [1, 3], [1, 2]])))

    moved = updates(model, segregate, (size,))(0, z, time, text)
    gradient = (z - moved) / size
    fall = losses(z) - losses(moved)
    assert (fall > 0).all()
    torch.testing.assert_close(fall, size * gradient.square().sum((1, 2, 3)), rtol=1e-2, atol=0)
    direction = latent(5)
    slope = (losses(z + 1e-5 * direction) - losses(z - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-12)


def test_samples_are_steered_each_by_its_own_loss():
    model, time = small_unet(), torch.tensor([0.3, 0.6, 0.9]).double()
    text, z = model.encode(IDS), latent()
    together = updates(model, segregate)(0, z, time, text)
    other = z.clone()
    other[0] = latent(7)[0]
    again = updates(model, segregate)(0, other, time, text)
    torch.testing.assert_close(together[1:], again[1:])


def test_masks_are_of_the_step_before_own_or_borrowed_and_none_at_the_first():
    model, seen = small_unet(), []

    def watch(maps, masks):
        seen.append((maps.detach().clone(), None if masks is None else masks.clone()))
        return everything(maps, masks)

    drawn(model, updates(model, watch, regions=active_regions))
    assert len(seen) == 4
    assert seen[0][1] is None
    for (before, _), (_, masks) in pairwise(seen):
        assert torch.equal(masks, active_regions(before))
    seen.clear()
    turned = torch.tensor([2, 0, 1])
    drawn(model, updates(model, watch, regions=active_regions, lenders=turned))
    assert torch.equal(seen[1][1], active_regions(seen[0][0])[turned])
    seen.clear()
    drawn(model, updates(model, watch))
    assert all(masks is None for _, masks in seen)


def test_scrambled_gradients_keep_lengths_and_angles_and_lose_their_direction():
    first, second = random_maps(side=30, seed=1) - 0.5, random_maps(side=30, seed=2) - 0.3
    turned = [scrambled(some, 4) for some in (first, second)]
    for one, other in ((0, 0), (0, 1), (1, 1)):
        before = ((first, second)[one] * (first, second)[other]).sum((1, 2, 3))
        torch.testing.assert_close((turned[one] * turned[other]).sum((1, 2, 3)), before)
    assert torch.equal(
        turned[0].abs().flatten(1).sort().values, first.abs().flatten(1).sort().values
    )
    along = torch.nn.functional.cosine_similarity(turned[0].flatten(1), first.flatten(1))
    assert along.abs().max() < 0.1
    alike = scrambled(first[:1].expand(3, -1, -1, -1), 4)  # each sample has a turn of its own
    assert not torch.equal(alike[0], alike[1])
    assert not torch.equal(scrambled(first, 5), turned[0])


def test_updates_take_the_scrambled_gradient_when_told():
    model, time = small_unet(), torch.tensor([0.3, 0.6, 0.9]).double()
    text, z = model.encode(IDS), latent()
    plain = updates(model, segregate)(0, z, time, text)
    turned = updates(model, segregate, scramble=4)(0, z, time, text)
    torch.testing.assert_close(z - turned, scrambled(z - plain, 4))


def test_a_second_picture_starts_without_the_masks_of_the_first():
    model = small_unet()
    steered = updates(model, everything, regions=active_regions)
    assert torch.equal(drawn(model, steered), drawn(model, steered))


def test_refinement_goes_on_until_the_peak_is_reached_or_the_patience_is_spent():
    model = small_unet()

    def excite(maps, masks):
        return excitement_loss(maps)

    def weakest(z):
        recorder = MapRecorder(("cross",), model.blocks_of_side(3))
        model(z, torch.ones(3).double(), model.encode(IDS), recorder.hooks)
        maps = processed_maps(recorder.mean("cross"), WORDS)
        return of_concepts(maps, torch.tensor([[1, 2], [1, 3], [1, 2]])).amax((-2, -1)).amin(1)

    z, time, text = latent(), torch.ones(3).double(), model.encode(IDS)
    before = weakest(z)
    target = before.min().item() + 0.005  # the others have reached it
    assert (before >= target).sum() == 2
    patient = updates(model, excite, (0.5,), refine={0: target}, most=200)
    raised = patient._refined(0, z, time, text)
    assert (weakest(raised) >= target).all()
    assert torch.equal(raised[before >= target], z[before >= target])
    hasty = updates(model, excite, (2.0,), refine={0: 9.9}, most=3)
    hasty(0, z, time, text)
    assert hasty.passes == 3 * 3 + 3
    idle = updates(model, excite, (0.0,), refine={0: 9.9}, most=3)
    idle(0, z, time, text)
    assert idle.passes == 3 * 3  # a step of size zero takes no gradient
    none = updates(model, excite, (2.0,), refine={0: 0.0}, most=3)
    assert torch.equal(none._refined(0, z, time, text), z)


def test_history_keeps_the_maps_that_each_step_starts_from():
    model = small_unet()
    steered = updates(model, segregate, track=True)
    drawn(model, steered)
    assert len(steered.history) == 4
    recorder = MapRecorder(("cross",), model.blocks_of_side(3))
    model(latent(), torch.ones(3).double(), model.encode(IDS), recorder.hooks)
    torch.testing.assert_close(steered.history[0], processed_maps(recorder.mean("cross"), WORDS))


def test_step_sizes_fall_as_in_the_published_code():
    sizes = step_sizes(20.0, 50)
    assert sizes[0] == 20
    assert sizes[-1] == pytest.approx(20 * 0.5**0.5)
    assert sizes[10] == pytest.approx(20 * (1 - 0.5 * 10 / 49) ** 0.5)
    assert a_star.step_sizes(0.0, 3) == [0, 0, 0]
