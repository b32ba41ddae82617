"""The small vision classifier: shapes, strides, counts, and a training that learns."""

import dataclasses

import pytest
import torch
from torch import Generator, nn

from reattend.training.vision import (
    Recipe,
    augment,
    batches,
    correct,
    fit,
    predictions,
)
from reattend.trunks.language import parameter_count
from reattend.trunks.vision import (
    BottleneckBlock,
    ChannelNorm,
    Stage,
    VisionTrunk,
    convolution,
    multiply_adds,
    stem,
)


def trunk(block="transformer", **settings):
    torch.manual_seed(0)
    stages = [Stage(8, 1, convolution), Stage(12, 2, convolution, stride=2)]
    return VisionTrunk(5, stages, block=block, **settings)


@pytest.mark.parametrize("block", ["transformer", "bottleneck"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_map_shrinks_as_asked(block, stride):
    model = trunk(block, stem_stride=stride)
    pixels = torch.randint(256, (2, 3, 24, 16), dtype=torch.uint8)
    assert model.features(pixels).shape == (2, 12, 12 // stride, 8 // stride)
    assert model(pixels).shape == (2, 5)


def test_a_stem_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        stem(3, 8, 3)


def test_channel_norm_is_layer_norm_of_each_position():
    norm, x = ChannelNorm(6), torch.randn(2, 6, 3, 4)
    expected = nn.functional.layer_norm(x[1, :, 2, 3], (6,))
    torch.testing.assert_close(norm(x)[1, :, 2, 3], expected)


def test_multiply_adds_of_a_convolution_and_a_product():
    layer = nn.Conv2d(3, 5, 3, padding=1)
    assert multiply_adds(layer, torch.zeros(2, 3, 8, 6)) == 2 * 8 * 6 * 5 * 3 * 9


class Attention(nn.Module):
    def forward(self, x):
        fused = nn.functional.scaled_dot_product_attention(x, x, x)
        return fused + (x @ x.mT).softmax(-1) @ x


def test_multiply_adds_of_attention_fused_or_not():
    assert multiply_adds(Attention(), torch.zeros(2, 3, 16, 8)) == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_the_bottleneck_is_that_of_resnet():
    block = BottleneckBlock(8, 16, convolution, 2, expansion=2.0)
    convolutions = 8 * 8 + 8 * 8 * 9 + 8 * 16 + 8 * 16
    norms = 2 * (8 + 8 + 16 + 16)
    assert parameter_count(block) == convolutions + norms


def test_augmentation_moves_and_mirrors_whole_pictures():
    pixels = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).repeat(200, 1, 1, 1)
    moved = augment(pixels, True, 1, Generator().manual_seed(0))
    inner = {tuple(picture[0, 2:4, 2:4].flatten().tolist()) for picture in moved}
    whole = pixels[0, 0]
    expected = set()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            for picture in (whole, whole.flip(1)):
                rows, columns = slice(2 + dy, 4 + dy), slice(2 + dx, 4 + dx)
                expected.add(tuple(picture[rows, columns].flatten().tolist()))
    # Mirroring reads the columns backwards, so a move to the right is one to the left: same set.
    assert inner == expected
    unmoved = augment(pixels, False, 0, Generator().manual_seed(0))
    assert torch.equal(unmoved, pixels)


def test_pictures_are_mirrored_only_when_asked():
    pixels = torch.zeros(64, 1, 4, 6, dtype=torch.uint8)
    pixels[..., 0] = 200
    labels = torch.zeros(64, dtype=torch.long)
    plain = Recipe(steps=1, batch=64, shift=0)
    seen, _ = next(batches(pixels, labels, plain, seed=0))
    assert torch.equal(seen, pixels)
    seen, _ = next(batches(pixels, labels, dataclasses.replace(plain, flip=True), seed=0))
    assert 16 < (seen[:, 0, 0, 0] == 0).sum() < 48


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_labels_are_smoothed_as_the_recipe_says(smoothing):
    """One batch of all pictures: the first loss is cross-entropy with (1 - s) on the label, s spread evenly."""
    generator = Generator().manual_seed(1)
    pixels = torch.randint(256, (32, 1, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (32,), generator=generator)
    torch.manual_seed(0)
    model = VisionTrunk(3, [Stage(4, 1, convolution)], channels=1)
    torch.nn.init.normal_(model.classify.weight)
    model.train()
    logs = model(pixels).log_softmax(1).detach()
    of_label = -logs.gather(1, labels[:, None]).mean()
    expected = (1 - smoothing) * of_label - smoothing * logs.mean()
    recipe = Recipe(steps=1, batch=32, shift=0, label_smoothing=smoothing)
    log = fit(model, pixels, labels, recipe)
    assert log.losses == pytest.approx([expected.item()], rel=1e-5)


@pytest.mark.parametrize(("byte", "value"), [(0, -1.0), (255, 1.0), (51, -0.6)])
def test_the_stem_sees_pixels_centred_between_minus_and_plus_one(byte, value):
    model, seen = trunk(), []
    model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.features(torch.full((1, 3, 8, 8), byte, dtype=torch.uint8))
    torch.testing.assert_close(seen[0], torch.full((1, 3, 8, 8), value))


def test_every_picture_comes_once_before_any_comes_again():
    pixels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(10)
    source = batches(pixels, labels, Recipe(steps=1, batch=5), seed=0)
    seen = torch.cat([next(source)[1] for _ in range(2)])
    assert sorted(seen.tolist()) == list(range(10))
    with pytest.raises(ValueError, match="do not fill a batch of 64"):
        next(batches(pixels, labels, Recipe(steps=1), seed=0))


@pytest.mark.parametrize("average", [0.0, 0.8])
def test_it_learns_where_the_bright_half_is(average):
    generator = Generator().manual_seed(0)
    labels = torch.randint(2, (200,), generator=generator)
    pixels = torch.randint(100, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    pixels[labels == 1, :, :4] += 100
    torch.manual_seed(0)
    model = VisionTrunk(2, [Stage(8, 1, convolution)], channels=1)
    recipe = Recipe(steps=30, batch=32, warmup=2, average=average)
    log = fit(model, pixels, labels, recipe, seed=1)
    assert log.steps == 30
    assert not model.training
    assert correct(model, pixels, labels).float().mean() > 0.95
    assert torch.equal(predictions(model, pixels, 7), predictions(model, pixels))


def test_averaged_weights_are_kept():
    pixels = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    labels = torch.randint(2, (64,))
    kept = {}
    for average in (0.0, 0.9):
        torch.manual_seed(0)
        model = VisionTrunk(2, [Stage(4, 1, convolution)], channels=1)
        start = model.classify.weight.detach().clone()
        fit(model, pixels, labels, Recipe(steps=5, batch=32, warmup=0, average=average))
        kept[average] = (model.classify.weight - start).norm().item()
    # The average of few steps lags behind the weights.
    assert 0 < kept[0.9] < kept[0.0]
