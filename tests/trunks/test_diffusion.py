"""The diffusion trunk: the process by its definitions, and hooks that watch without touching."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from reattend.trunks.diffusion import (
    NO_HOOKS,
    AttentionHooks,
    DiffusionShape,
    DiffusionUNet,
    EncodedText,
    MapRecorder,
    Reduction,
    alpha_sigma,
    ddim_step,
    guided_velocity,
    keep_and_copy,
    noised,
    predicted_picture,
    sample,
    sampling_times,
    velocity_loss,
)

SHAPE = DiffusionShape(vocabulary=11, length=5, side=12, width=16, heads=2, text_width=12)
IDS = torch.tensor([[1, 4, 7, 2, 0], [1, 5, 6, 8, 2], [1, 9, 2, 0, 0]])
EMPTY = torch.tensor([[1, 2, 0, 0, 0]]).expand(3, -1)


def small_unet(seed=0, shape=SHAPE) -> DiffusionUNet:
    """A model in float64 in which every branch adds something."""
    torch.manual_seed(seed)
    model = DiffusionUNet(shape)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double().eval().requires_grad_(False)


def latents(seed=0, batch=3, side=12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, side, side, generator=generator, dtype=torch.double)


# --- the process -----------------------------------------------------------------------------------


def test_share_of_the_picture_falls_from_one_to_zero_and_variance_is_kept():
    alpha, sigma = (part.flatten() for part in alpha_sigma(torch.linspace(0, 1, 41).double()))
    assert (alpha.square().diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert alpha[0] == 1
    assert alpha[-1].abs() < 1e-15
    assert alpha[20].item() == pytest.approx(0.5**0.5)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(41).double())


def test_velocity_gives_back_picture_and_noise():
    picture, noise = latents(1), latents(2)
    time = torch.tensor([0.07, 0.5, 0.93]).double()
    x, velocity = noised(picture, noise, time)
    alpha, sigma = alpha_sigma(time)
    torch.testing.assert_close(predicted_picture(x, velocity, time), picture)
    torch.testing.assert_close(sigma * x + alpha * velocity, noise)


def test_true_velocity_leads_ddim_to_the_picture_from_any_start():
    picture, noise = latents(1).clamp(-1, 1), latents(2)
    for steps in (1, 3, 20):
        times = sampling_times(steps).double()
        x = noise
        for now, then in pairwise(times):
            time = now.expand(3)
            velocity = noised(picture, noise, time)[1]
            x = ddim_step(x, velocity, time, then.expand(3))
            torch.testing.assert_close(x, noised(picture, noise, then.expand(3))[0])
        torch.testing.assert_close(x, picture)


def test_clipping_holds_the_picture_and_moves_the_noise_with_it():
    picture, noise = 3 * latents(1), latents(2)
    time, target = torch.full((3,), 0.6).double(), torch.full((3,), 0.4).double()
    x, velocity = noised(picture, noise, time)
    clipped = ddim_step(x, velocity, time, target, (-1.0, 1.0))
    alpha, sigma = alpha_sigma(time)
    implied = (x - alpha * picture.clamp(-1, 1)) / sigma
    torch.testing.assert_close(clipped, noised(picture.clamp(-1, 1), implied, target)[0])
    free = ddim_step(x, velocity, time, target)
    torch.testing.assert_close(free, noised(picture, noise, target)[0])


def test_latents_are_pictures_of_mean_zero_and_variance_one_and_back():
    shape = replace(SHAPE, centre=0.8, spread=0.4)
    model = DiffusionUNet(shape).double()
    one = torch.ones(1, 3, 12, 12).double()
    torch.testing.assert_close(model.latent_of(0.4 * one), -one)
    assert model.range == pytest.approx((-4.5, 0.5))
    picture = latents(1).clamp(-1, 1)
    torch.testing.assert_close(model.picture_of(model.latent_of(picture)), picture)
    noise, time = latents(2), torch.tensor([0.2, 0.5, 0.9]).double()
    expected = (
        noised((picture - 0.8) / 0.4, noise, time)[1].square().mean()
    )  # it predicts nothing yet
    torch.testing.assert_close(velocity_loss(model, picture, IDS, noise, time), expected)
    drawn = sample(model, noise, IDS, EMPTY, steps=1)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.8))


def test_sampling_times_run_evenly_from_noise_to_picture():
    torch.testing.assert_close(sampling_times(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


# --- guidance --------------------------------------------------------------------------------------


def test_guidance_of_one_is_the_captioned_pass_and_of_zero_the_empty_one():
    model, x, time = small_unet(), latents(), torch.tensor([0.3, 0.6, 0.9]).double()
    text, empty = model.encode(IDS), model.encode(EMPTY)
    assert torch.equal(guided_velocity(model, x, time, text, empty, 1.0), model(x, time, text))
    plain, captioned = model(x, time, empty), model(x, time, text)
    assert (plain - captioned).abs().max() > 1e-4
    torch.testing.assert_close(guided_velocity(model, x, time, text, empty, 0.0), plain)
    strong = guided_velocity(model, x, time, text, empty, 3.0)
    torch.testing.assert_close(strong, plain + 3 * (captioned - plain))


def test_padding_is_read_by_nothing():
    model, x, time = small_unet(), latents(batch=1), torch.tensor([0.4]).double()
    short = torch.tensor([[1, 9, 2]])
    padded = torch.tensor([[1, 9, 2, 0, 0]])
    torch.testing.assert_close(
        model(x, time, model.encode(short)), model(x, time, model.encode(padded))
    )


def test_samples_of_a_batch_do_not_touch_each_other():
    model, x, time = small_unet(), latents(), torch.tensor([0.3, 0.6, 0.9]).double()
    together = model(x, time, model.encode(IDS))
    alone = model(x[1:2], time[1:2], model.encode(IDS[1:2]))
    torch.testing.assert_close(together[1:2], alone)


# --- hooks -----------------------------------------------------------------------------------------


def test_hooks_that_do_nothing_change_no_bit():
    model, x = small_unet(), latents()
    recorder = MapRecorder()
    watching = AttentionHooks(on_map=recorder.hooks.on_map, reduce=lambda name, tokens: None)
    pictures = [sample(model, x, IDS, EMPTY, steps=3, hooks=h) for h in (NO_HOOKS, watching)]
    same = sample(model, x, IDS, EMPTY, steps=3, before_step=lambda step, z, time, text: z)
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], same)


@pytest.mark.parametrize(("side", "multiples"), [(12, (1, 1)), (24, (1, 2, 1))])
def test_every_attention_hands_out_a_map_whose_rows_sum_to_one(side, multiples):
    shape = DiffusionShape(
        vocabulary=11, length=5, side=side, width=16, multiples=multiples, heads=2, text_width=12
    )
    model, recorder = small_unet(shape=shape), MapRecorder()
    text = model.encode(IDS)
    model(latents(side=side), torch.rand(3).double(), text, recorder.hooks)
    assert len(model.blocks) == 2 * len(multiples) + 1
    assert list(recorder.maps) == [(n, k) for n in model.blocks for k in ("self", "cross")]
    for (name, kind), weights in recorder.maps.items():
        places = model.blocks[name] ** 2
        assert weights.shape == (3, 2, places, places if kind == "self" else 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        if kind == "cross":
            assert (weights.transpose(1, 3).transpose(2, 3)[~text.mask] == 0).all()


def test_recorder_keeps_what_it_is_asked_for_and_averages_it():
    model = small_unet()
    assert model.blocks == {"down6": 6, "down3": 3} | {"mid3": 3, "up3": 3, "up6": 6}
    assert list(model.blocks) == ["down6", "down3", "mid3", "up3", "up6"]
    recorder = MapRecorder(("cross",), model.blocks_of_side(3))
    model(latents(), torch.rand(3).double(), model.encode(IDS), recorder.hooks)
    assert set(recorder.maps) == {(n, "cross") for n in ("down3", "mid3", "up3")}
    mean = recorder.mean("cross")
    assert mean.shape == (3, 9, 5)
    torch.testing.assert_close(mean, sum(m.sum(1) for m in recorder.maps.values()) / 6)


def test_maps_carry_gradients_to_the_latent_as_finite_differences_say():
    model, time = small_unet(), torch.tensor([0.3, 0.6, 0.9]).double()
    text, recorder = model.encode(IDS), MapRecorder(("cross",), ("mid3", "up3"))

    def heaviest(x):
        model(x, time, text, recorder.hooks)
        return recorder.mean("cross")[:, 4, 1].sum()

    x = latents().requires_grad_()
    (gradient,) = torch.autograd.grad(heaviest(x), x)
    direction = latents(seed=5)
    with torch.no_grad():
        step = 1e-5 * direction
        numeric = (heaviest(x + step) - heaviest(x - step)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-6)
    assert gradient.abs().max() > 0


def test_maps_of_a_guided_pass_hold_the_captioned_half_first():
    model, x, time = small_unet(), latents(), torch.tensor([0.3, 0.6, 0.9]).double()
    text, empty, recorder = model.encode(IDS), model.encode(EMPTY), MapRecorder(("cross",))
    guided_velocity(model, x, time, text, empty, 3.0, recorder.hooks)
    both = dict(recorder.maps)
    model(x, time, text, recorder.hooks)
    for key, weights in recorder.maps.items():
        torch.testing.assert_close(both[key][:3], weights)


def reduced(model, x, reduction):
    time, text = torch.full((len(x),), 0.5).double(), model.encode(IDS[: len(x)])
    recorder = MapRecorder(("self",))
    hooks = AttentionHooks(
        recorder.hooks.on_map, lambda name, tokens: reduction if name == "down6" else None
    )
    return model(x, time, text, hooks), recorder.maps


def test_keeping_every_token_changes_nothing_and_in_any_order():
    model, x = small_unet(), latents()
    full, _ = reduced(model, x, None)
    kept = torch.stack([torch.randperm(36) for _ in range(3)])
    shuffled, maps = reduced(model, x, keep_and_copy(kept, kept.argsort(1)))
    torch.testing.assert_close(shuffled, full)
    assert maps["down6", "self"].shape == (3, 2, 36, 36)


def test_pruned_tokens_take_the_output_of_their_source_and_keep_their_own_residual():
    model, seen = small_unet(), {}
    block = model.down[0].transformer
    tokens = latents(batch=2, side=6).repeat(1, 6, 1, 1)[:, :16].double()
    text = EncodedText(torch.zeros(2, 5, 12).double(), torch.ones(2, 5).bool())
    kept = torch.tensor([[0, 3, 5, 35], [8, 1, 2, 20]])
    source = torch.arange(36).expand(2, -1) % 4
    source = source.scatter(1, kept, torch.arange(4).expand(2, -1))

    def reduce(name, hidden):
        seen[name] = hidden
        return keep_and_copy(kept, source)

    states = tokens.flatten(2).transpose(1, 2)
    added = block._attend_to_self(states, AttentionHooks(reduce=reduce))
    normed = block.norm1(states)
    few = normed.gather(1, kept[..., None].expand(-1, -1, 16))
    attended, _ = block.self_attention(few, few)
    assert torch.equal(seen["down6"], states)  # before the first norm
    for item in range(2):
        for token in range(36):
            torch.testing.assert_close(added[item, token], attended[item, source[item, token]])
    assert block(tokens, text, torch.zeros(2, 5).double(), AttentionHooks(reduce=reduce)).shape == (
        2, 16, 6, 6,
    )  # fmt: skip


def test_exact_duplicates_can_be_pruned_when_keys_weigh_their_number():
    model = small_unet()
    attention = model.down[0].transformer.self_attention
    few = latents(batch=2, side=6).flatten(2).transpose(1, 2).repeat(1, 1, 6)[:, :5, :16].double()
    copies = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4])
    number = torch.bincount(copies).double().log().expand(2, -1)
    full, _ = attention(few[:, copies], few[:, copies])
    pruned, _ = attention(few, few, number)
    torch.testing.assert_close(pruned[:, copies], full)


def test_bias_of_a_reduction_reaches_the_attention():
    model, x = small_unet(), latents()
    everything = torch.arange(36).expand(3, -1)
    reduction = keep_and_copy(everything, everything)
    first_only = torch.full((3, 36), -torch.inf).double().index_fill(1, torch.tensor([4]), 0.0)
    _, maps = reduced(model, x, Reduction(reduction.reduce, reduction.recover, first_only))
    assert (maps["down6", "self"][..., 4] == 1).all()


def test_bad_sizes_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="a side of 18 pixels does not halve 1 times after 2"):
        DiffusionUNet(DiffusionShape(11, 5, side=18))
    with pytest.raises(ValueError, match="a width of 48 does not divide into 5 heads"):
        DiffusionUNet(DiffusionShape(11, 5, heads=5, text_width=60))
