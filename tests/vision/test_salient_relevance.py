"""Oracles of salient relevance: LRP rules and their accounts, context-aware saliency, measures."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional

from reattend.vision.salient_relevance import (
    ALL_Z,
    EPSILON,
    PAPER,
    Context,
    Rules,
    as_layer,
    at_centres,
    components,
    context_aware_saliency,
    dissimilarity,
    distance_to,
    edges,
    explain,
    gini,
    grad_cam,
    gradient_times_input,
    intersection_over_union,
    lab,
    near_foci,
    patches,
    points_inside,
    regions_first,
    relevance_map,
    replace_regions,
    resize,
    salient_relevance,
    scale_saliency,
    share_inside,
    smooth,
    split_sum,
    to_unit,
    top_area,
    z_box_rule,
    z_plus,
    z_plus_rule,
    z_rule,
)

SEEDS = [0, 1, 2]
ONE = torch.ones(1, 1, 1, 1).double()
SMALL = Context(patch=5, stride=2, scales=(1.0, 0.6), neighbours=9)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed), dtype=torch.float64)


class Sum(nn.Module):
    def forward(self, first, second):
        return first + second


class Residual(nn.Module):
    """Convolutions with a residual sum, ReLU6 and a pooled head, all as modules."""

    def __init__(self, bias):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=bias)
        self.act = nn.ReLU6(inplace=True)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias)
        self.sum = Sum()
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(6, 4, bias=bias)

    def forward(self, images):
        hidden = self.act(self.stem(images))
        return self.head(self.flat(self.pool(self.sum(hidden, self.deep(hidden)))))


def plain(kind, bias, size, seed):
    """A small trained-looking network in float64 and an image batch of odd size."""
    torch.manual_seed(seed)
    conv = partial(nn.Conv2d, bias=bias)
    width, height = size
    bodies = {
        "overlapping pool": [
            conv(3, 5, 5, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
            conv(5, 7, 3, padding=1), nn.ReLU(),
        ],
        "even pool": [
            conv(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
            conv(6, 6, 3, padding=1, groups=2), nn.ReLU(), nn.AvgPool2d(2),
        ],
    }  # fmt: skip
    body = nn.Sequential(*bodies[kind], nn.Flatten())
    features = body(torch.zeros(1, 3, height, width)).shape[1]
    head = [
        nn.Linear(features, 11, bias=bias),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(11, 4, bias=bias),
    ]
    model = nn.Sequential(*body, *head).double().eval()
    return model, normal(3, 3, height, width, seed=seed)


KINDS = ["overlapping pool", "even pool"]
SIZES = [(21, 17), (16, 19)]
NETWORKS = [(kind, size, seed) for kind in KINDS for size in SIZES for seed in SEEDS]
IDS = [f"{k}-{w}x{h}-{s}".replace(" ", "_") for k, (w, h), s in NETWORKS]


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Rules of one layer -------------------------------------------------------------------------------


def linear(weight, bias=None):
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return as_layer(module)


def linear_case(seed, rows=4, inputs=6, outputs=5, signed=True):
    values = normal(rows, inputs, seed=seed) if signed else uniform(rows, inputs, seed=seed)
    weight, bias = normal(outputs, inputs, seed=seed + 10), normal(outputs, seed=seed + 20)
    return values, weight, bias, normal(rows, outputs, seed=seed + 30)


@pytest.mark.parametrize("seed", SEEDS)
def test_z_rule_term_by_term(seed):
    x, w, b, r = linear_case(seed)
    leaving, kept = z_rule(linear(w, b), x, x @ w.T + b, r)
    parts = x[:, None, :] * w  # [rows, outputs, inputs]
    z = parts.sum(-1) + b
    assert_close(leaving, (parts * (r / z)[..., None]).sum(1), 1e-6)
    assert_close(kept, b * r / z, 1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_epsilon_moves_outputs_away_from_zero(seed):
    x, w, b, r = linear_case(seed)
    leaving, kept = z_rule(linear(w, b), x, x @ w.T + b, r, epsilon=0.25)
    z = x @ w.T + b
    z = z + 0.25 * z.square().mean(1, keepdim=True).sqrt() * z.sign()
    parts = x[:, None, :] * w
    assert_close(leaving, (parts * (r / z)[..., None]).sum(1), 1e-8)
    assert_close(leaving.sum(1) + kept.sum(1), r.sum(1))
    tiny = torch.full((1, 1), -1e-12).double()
    one = torch.ones(1, 1).double()
    guarded, _ = z_rule(linear(one), tiny, tiny, one)
    assert guarded.abs().max() < 1e-2  # without the sign of the output this could be anything


@pytest.mark.parametrize("seed", SEEDS)
def test_z_plus_rule_term_by_term_with_signed_inputs_and_outputs(seed):
    x, w, b, r = linear_case(seed)
    leaving, kept = z_plus_rule(linear(w, b), x, x @ w.T + b, r)
    parts = x[:, None, :] * w
    sign = torch.where(parts.sum(-1) + b >= 0, 1.0, -1.0)[..., None]
    same = torch.where(parts * sign > 0, parts, 0)
    assert_close(leaving, (same / same.sum(-1, keepdim=True) * r[..., None]).sum(1), 1e-7)
    assert kept.abs().max() < 1e-7


@pytest.mark.parametrize("seed", SEEDS)
def test_z_plus_rule_is_the_authors_rule_of_linear_layers(seed):
    x, w, _, r = linear_case(seed, signed=False)
    w = w + 0.5  # outputs are positive, as where a ReLU lets relevance through
    r = torch.where(x @ w.T > 0, r, 0)
    positive = w.clamp(min=0)
    share = r / (x @ positive.T + 1e-9)
    leaving, _ = z_plus_rule(linear(w), x, x @ w.T, r)
    assert_close(leaving, x * (share @ positive), 1e-7)


def test_z_plus_keeps_what_has_no_contribution():
    x, w = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[-1.0, -1.0]]).double()
    bias = torch.tensor([9.0]).double()
    leaving, kept = z_plus_rule(linear(w, bias), x, x @ w.T + bias, ONE[0, 0])
    assert leaving.abs().max() == 0
    assert kept.item() == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_z_box_term_by_term_and_conserving(seed):
    x = uniform(2, 3, 7, 6, seed=seed) * 3 - 1
    low, high = torch.full((3, 1, 1), -1.0).double(), torch.full((3, 1, 1), 2.0).double()
    w, r = normal(4, 3, 3, 3, seed=seed), uniform(2, 4, 5, 4, seed=seed)
    module = nn.Conv2d(3, 4, 3, bias=False).double()
    module.weight = nn.Parameter(w)
    leaving, kept = z_box_rule(as_layer(module), x, module(x), r, low=low, high=high)
    unfold = partial(functional.unfold, kernel_size=3)
    flat = w.flatten(1)[None, :, :, None]  # [1, outputs, taps, places]
    parts = unfold(x)[:, None] * flat
    parts = parts - unfold(low.expand_as(x))[:, None] * flat.clamp(min=0)
    parts = parts - unfold(high.expand_as(x))[:, None] * flat.clamp(max=0)
    assert parts.min() >= 0
    shared = (parts / parts.sum(2, keepdim=True) * r.flatten(2)[:, :, None]).sum(1)
    assert_close(leaving, functional.fold(shared, (7, 6), 3), 1e-7)
    assert leaving.min() >= 0
    assert_close(leaving.sum(), r.sum(), 1e-7)
    assert kept.abs().max() < 1e-7


@pytest.mark.parametrize("by_size", [False, True])
def test_split_of_a_sum(by_size):
    first, second, relevance = (
        normal(2, 3, 4, 4),
        normal(2, 3, 4, 4, seed=1),
        normal(2, 3, 4, 4, seed=2),
    )
    (left, right), kept = split_sum(first, second, relevance, by_size)
    a, b = (first.abs(), second.abs()) if by_size else (first, second)
    assert_close(left, a / (a + b) * relevance, 1e-5)
    assert_close(left + right + kept, relevance)


# Relevance of networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("kind", "size", "seed"), NETWORKS, ids=IDS)
def test_all_z_equals_gradient_times_input(kind, size, seed, bias):
    model, images = plain(kind, bias, size, seed)
    found = explain(model, images, ALL_Z)
    expected = gradient_times_input(model, images, found.classes)
    assert (found.relevance - expected).abs().max() < 1e-5 * expected.abs().max()
    assert_close(found.unaccounted, torch.zeros(3).double(), 1e-9)
    if not bias:
        assert_close(found.relevance.sum((1, 2, 3)), found.logits, 1e-4)


@pytest.mark.parametrize("rules", [PAPER, EPSILON], ids=["paper", "epsilon"])
@pytest.mark.parametrize(("kind", "size", "seed"), NETWORKS, ids=IDS)
def test_every_layer_accounts_for_its_relevance(kind, size, seed, rules):
    model, images = plain(kind, True, size, seed)
    found = explain(model, images, rules)
    assert found.balances[0].layer == str(len(model) - 1)
    assert_close(found.balances[0].arriving, found.logits)
    for balance in found.balances:
        assert_close(balance.arriving, balance.leaving + balance.kept, 1e-8)
    assert_close(found.unaccounted, torch.zeros(3).double(), 1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_authors_rule_as_in_their_code(seed):
    model, images = plain("overlapping pool", True, (21, 17), seed)
    values = [images]
    for layer in model:
        values.append(layer(values[-1].clone()))
    found = explain(model, images)
    logits = values[-1]
    relevance = torch.zeros_like(logits).scatter(1, found.classes[:, None], logits.amax(1)[:, None])
    for layer, x, y in zip(reversed(model), values[-2::-1], values[:0:-1], strict=True):
        if isinstance(layer, nn.Linear):
            positive = layer.weight.clamp(min=0)
            relevance = x * ((relevance / (x @ positive.T + 1e-9)) @ positive)
        elif isinstance(layer, nn.Conv2d):
            padding = [have - n for have, n in zip(x.shape[2:], functional.conv_transpose2d(
                y, layer.weight, stride=layer.stride, padding=layer.padding).shape[2:], strict=True)]  # fmt: skip
            relevance = x * functional.conv_transpose2d(
                relevance / (y + 1e-9), layer.weight, stride=layer.stride, padding=layer.padding,
                output_padding=padding,
            )  # fmt: skip
        elif isinstance(layer, nn.MaxPool2d):
            held = (
                x.detach().requires_grad_()
            )  # adds where windows overlap; unpooling would overwrite
            relevance = x * torch.autograd.grad(layer(held), held, relevance / (y + 1e-9))[0]
        elif isinstance(layer, nn.Flatten):
            relevance = relevance.view_as(x)
    assert (found.relevance - relevance).abs().max() < 1e-4 * relevance.abs().max()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_z_plus_network_is_not_negative_and_conserves(kind, seed):
    model, _ = plain(kind, False, (21, 17), seed)
    images = uniform(3, 3, 17, 21, seed=seed)
    with torch.no_grad():
        model[-1].weight.abs_()  # the logits shall be positive
    rules = z_plus(torch.zeros(3, 1, 1).double(), torch.ones(3, 1, 1).double())
    found = explain(model, images, rules)
    assert (found.logits > 0).all()
    assert found.relevance.min() >= 0
    assert_close(found.relevance.sum((1, 2, 3)), found.logits, 1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_model(seed):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)).double().eval()
    images = normal(2, 3, 2, 2, seed=seed)
    found = explain(model, images, ALL_Z)
    expected = images * model[1].weight[found.classes].view(2, 3, 2, 2)
    assert_close(found.relevance, expected.detach(), 1e-7)


def test_missing_part_is_the_relevance_of_the_biases():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double().eval()
    found = explain(model, normal(2, 3, 2, 2), ALL_Z)
    bias = model[1].bias.detach()[found.classes]
    assert_close(found.relevance.sum((1, 2, 3)), found.logits - bias, 1e-7)
    assert_close(found.balances[0].kept, bias, 1e-7)


def test_max_pool_gives_to_the_winner_and_adds():
    images = torch.arange(9.0).view(1, 1, 3, 3).double()
    head = nn.Linear(4, 1, bias=False).double()
    nn.init.ones_(head.weight)
    separate = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), head).eval()
    expected = torch.tensor([[0, 0, 0], [0, 4.0, 5], [0, 7, 8]]).double()
    assert_close(explain(separate, images, ALL_Z).relevance[0, 0], expected, 1e-7)
    images[0, 0, 1, 1] = 10  # wins all four overlapping windows
    overlapping = nn.Sequential(nn.MaxPool2d(2, 1), nn.Flatten(), head).eval()
    found = explain(overlapping, images, ALL_Z).relevance[0, 0]
    assert found[1, 1].item() == pytest.approx(40)
    assert found.sum().item() == pytest.approx(40)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_residual_network_accounts_and_saturation(seed, bias):
    torch.manual_seed(seed)
    model = Residual(bias).double().eval()
    images = normal(2, 3, 15, 13, seed=seed)
    box = z_plus(*(v * torch.ones(3, 1, 1).double() for v in (-5, 5)))
    for rules in (ALL_Z, PAPER, EPSILON, box):
        found = explain(model, images, rules, sums=(Sum,))
        assert_close(found.unaccounted, torch.zeros(2).double(), 1e-7)
        assert model.act.inplace
    small = explain(model, 0.1 * images, ALL_Z, sums=(Sum,))
    gradient = gradient_times_input(model, 0.1 * images, small.classes)
    assert (small.relevance - gradient).abs().max() < 1e-5 * gradient.abs().max()
    with torch.no_grad():
        model.stem.weight.mul_(40)  # drives ReLU6 into saturation, where the gradient is blind
    large = explain(model, images, ALL_Z, sums=(Sum,))
    blind = gradient_times_input(model, images, large.classes)
    assert (large.relevance - blind).abs().max() > 0.1 * blind.abs().max()
    if not bias:
        assert_close(large.relevance.sum((1, 2, 3)), large.logits, 1e-6)


def test_start_is_the_logit_of_the_predicted_class():
    model, images = plain("even pool", True, (16, 19), 3)
    found = explain(model, images)
    logits = model(images).detach()
    assert_close(found.logits, logits.amax(1))
    assert (found.classes == logits.argmax(1)).all()
    other = explain(model, images, classes=(found.classes + 1) % 4)
    assert not torch.allclose(other.relevance, found.relevance)
    assert_close(other.logits, logits.gather(1, (found.classes[:, None] + 1) % 4)[:, 0])
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter.mul_(2)
    assert_close(explain(model, images).relevance, 2 * found.relevance, 1e-6)


def test_images_of_a_batch_do_not_meet():
    model, images = plain("even pool", True, (16, 19), 1)
    for rules in (PAPER, EPSILON):
        together = explain(model, images, rules).relevance
        alone = torch.cat([explain(model, image[None], rules).relevance for image in images])
        assert_close(together, alone, 1e-6)


def test_model_is_left_as_it_was():
    model, images = plain("overlapping pool", True, (21, 17), 0)
    before = model(images)
    explain(model, images)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(images), before)
    assert model[1].inplace


def test_layers_without_a_rule_are_refused():
    images = normal(2, 3, 8, 8).float()
    head = (nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    with pytest.raises(TypeError, match=r"'1' \(BatchNorm2d\): fold it into its convolution first"):
        explain(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *head).eval(), images)
    with pytest.raises(TypeError, match=r"'0' \(Sigmoid\)"):
        explain(nn.Sequential(nn.Sigmoid(), *head).eval(), images)
    with pytest.raises(TypeError, match=r"'sum' \(Sum\): is it a sum"):
        explain(Residual(True).eval(), images)
    mirrored = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    with pytest.raises(TypeError, match="padding with 'reflect'"):
        explain(nn.Sequential(mirrored, *head).eval(), images)
    with pytest.raises(ValueError, match="evaluation mode"):
        explain(nn.Sequential(*head), images)


def test_first_rule_is_for_the_layer_that_sees_the_pixels():
    model, images = plain("even pool", True, (16, 19), 0)
    silent = lambda _layer, inputs, _outputs, relevance: (0 * inputs, relevance)  # noqa: E731
    found = explain(model, images, Rules(first=silent))
    assert found.relevance.abs().max() == 0
    assert found.balances[-1].layer == "0"
    assert_close(found.balances[-1].kept, found.balances[-1].arriving)
    assert all(b.leaving.abs().min() > 0 for b in found.balances[:-1])


# Context-aware saliency ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(31, 40), (37, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_map_has_no_saliency(size, dtype):
    maps = torch.full((2, 1, *size), 0.7, dtype=dtype)
    assert scale_saliency(maps, 1.0, Context()).abs().max() == 0
    assert context_aware_saliency(maps).abs().max() == 0


@pytest.mark.parametrize("place", [(5, 30), (20, 11), (28, 36)])
@pytest.mark.parametrize("context", [Context(), SMALL], ids=["full", "small"])
def test_an_odd_patch_stands_out(place, context):
    row, column = place
    maps = torch.zeros(1, 1, 41, 47).double()
    maps[..., row - 2 : row + 3, column - 2 : column + 3] = 1
    saliency = context_aware_saliency(maps, context)[0]
    top = divmod(int(saliency.argmax()), 47)
    assert max(abs(top[0] - row), abs(top[1] - column)) <= context.patch // 2 + context.stride
    assert saliency.max() == 1
    assert saliency[0 if row > 20 else 40, 0 if column > 23 else 46] < 0.1


def test_distance_excuses_likeness():
    values, odd = torch.zeros(1, 1, 9).double(), torch.ones(1, 2, 9).double()
    centres = torch.tensor([[0.1, 0.1]]).double()
    others = torch.tensor([[0.1, 0.2], [0.1, 0.9]]).double()
    near, far = dissimilarity(values, centres, odd, others)[0, 0].tolist()
    assert near == pytest.approx(1 / 1.3)
    assert far == pytest.approx(1 / 3.4)
    near, far = dissimilarity(values, centres, odd, others, position=0.0)[0, 0].tolist()
    assert near == far == 1


def test_of_two_alike_but_not_equal_patches_the_near_pair_is_more_salient():
    context = Context(scales=(1.0,), neighbours=1, smallest=1.0)

    def saliency_of_pair(column):
        maps = torch.zeros(1, 1, 25, 70).double()
        maps[..., 9:16, 9:16] = 1.0
        maps[..., 9:16, column : column + 7] = 0.8
        return scale_saliency(maps, 1.0, context)[0, 3, 3]

    assert saliency_of_pair(21) > saliency_of_pair(60) > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_scale_saliency_patch_by_patch(seed, channels):
    maps = uniform(2, channels, 23, 18, seed=seed)
    values, centres, grid = patches(maps, 0.9, SMALL)
    finer = [patches(maps, 0.45, SMALL), patches(maps, 0.225, SMALL)]
    for image in range(2):
        everything = [
            (v, c)
            for f in [(values, centres), *finer]
            for v, c in zip(f[0][image], f[1], strict=True)
        ]
        table = torch.tensor(
            [[(a - b).norm() for b, _ in everything] for a in values[image]]
        ).double()
        apart = torch.tensor([[(p - q).norm() for _, q in everything] for p in centres]).double()
        table = table / table.max() / (1 + 3 * apart)
        expected = []
        for own, row in enumerate(table.tolist()):
            nearest = sorted(row[:own] + row[own + 1 :])[: SMALL.neighbours]
            expected.append(1 - math.exp(-sum(nearest) / SMALL.neighbours))
        found = scale_saliency(maps, 0.9, SMALL)[image]
        assert found.shape == grid
        assert_close(found.flatten(), torch.tensor(expected).double(), 1e-6)


def test_a_patch_is_not_its_own_neighbour():
    context = Context(neighbours=1, scales=(1.0,))
    assert scale_saliency(uniform(1, 1, 40, 40), 1.0, context).min() > 0


@pytest.mark.parametrize(("scale", "levels"), [(1.0, 3), (0.8, 3), (0.5, 2), (0.3, 1)])
def test_scales_below_a_fifth_are_dropped(scale, levels, monkeypatch):
    from reattend.vision import salient_relevance as module

    asked = []
    monkeypatch.setattr(module, "patches", lambda m, s, c: asked.append(s) or patches(m, s, c))
    module.scale_saliency(uniform(1, 1, 50, 50), scale, Context())
    assert asked == [scale / 2**k for k in range(levels)]


@pytest.mark.parametrize("size", [(31, 44), (37, 37)])
@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_flips_and_foci(seed, size):
    maps = uniform(2, 1, *size, seed=seed) ** 4
    level = scale_saliency(maps, 1.0, Context())
    assert level.min() >= 0
    assert level.max() < 1
    saliency = context_aware_saliency(maps)
    for axes in ((2,), (3,), (2, 3)):
        flipped = context_aware_saliency(maps.flip(axes))
        assert_close(flipped, saliency.flip([axis - 1 for axis in axes]), 1e-6)
    before = context_aware_saliency(maps, Context(foci=None))
    assert before.amax((1, 2)).tolist() == [1, 1]
    assert (saliency <= before).all()
    foci = before > 0.8
    assert torch.equal(saliency[foci], before[foci])
    assert (saliency[~foci] < before[~foci] + 1e-12).all()


def test_without_a_focus_the_maximum_is_one():
    saliency = torch.zeros(1, 5, 5).double()
    saliency[0, 2, 1] = 0.5
    saliency[0, 4, 4] = 0.4
    found = near_foci(saliency)
    assert found[0, 2, 1] == 0.5
    farthest = math.hypot(2, 3)
    assert found[0, 4, 4].item() == pytest.approx(0.4 * (1 - math.hypot(2, 3) / farthest), abs=1e-7)
    assert torch.equal(near_foci(torch.ones(1, 4, 4)), torch.ones(1, 4, 4))


@pytest.mark.parametrize("seed", SEEDS)
def test_distances_equal_scipy(seed):
    chosen = uniform(3, 19, 26, seed=seed) > 0.97
    chosen[:, 3, 5] = True
    expected = np.stack([ndimage.distance_transform_edt(~image) for image in chosen.numpy()])
    assert_close(distance_to(chosen).double(), torch.from_numpy(expected), 1e-6)


def test_patches_lie_where_their_centres_say():
    maps = (
        torch.arange(25.0).view(1, 1, 5, 5).repeat_interleave(5, 2).repeat_interleave(5, 3).double()
    )
    context = Context(patch=5, stride=5)
    values, centres, grid = patches(maps, 1.0, context)
    assert grid == (5, 5)
    assert_close(values[0], torch.arange(25.0).double()[:, None].expand(25, 25))
    assert_close(centres[7], torch.tensor([7.5, 12.5]).double() / 25)
    spread = at_centres(torch.arange(25.0).view(1, 5, 5).double(), (25, 25), context)[0]
    assert_close(spread[2::5, 2::5], torch.arange(25.0).view(5, 5).double())
    assert_close(spread[:3, :3], torch.zeros(3, 3).double())


def test_maps_too_small_for_patches():
    with pytest.raises(ValueError, match=r"28 x 40 are too small for patches of 7 at scale 0\.3"):
        context_aware_saliency(torch.zeros(1, 1, 28, 40))


def test_relevance_map_sums_channels_before_the_absolute_value():
    relevance = torch.zeros(1, 3, 20, 20).double()
    relevance[0, :, 0, 0] = torch.tensor([1.0, -1.0, 0.0])
    relevance[0, :, 1, 1] = torch.tensor([-1.0, -1.0, 0.0])
    found = relevance_map(relevance, quantile=1.0)
    assert found[0, 0, 0] == 0
    assert found[0, 1, 1] == 1
    relevance[0, 0, 5:7, 5:7] = 1.0
    relevance[0, 0, 9, 9] = 1e6
    found = relevance_map(relevance)[0]
    assert found[1, 1] > 0.1  # one giant does not hide the rest
    assert found.max() == found[9, 9] == 1
    assert relevance_map(torch.zeros(1, 3, 9, 9)).max() == 0


def test_salient_relevance_puts_the_steps_together():
    relevance = normal(2, 3, 50, 44)
    direct = context_aware_saliency(resize(relevance_map(relevance)[:, None], (25, 22)), SMALL)
    assert torch.equal(salient_relevance(relevance, (25, 22), SMALL), direct)
    assert_close(salient_relevance(-3 * relevance, (25, 22), SMALL), direct)


# Other maps and measures --------------------------------------------------------------------------


def test_grad_cam_of_a_network_known_by_heart():
    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Identity()

        def forward(self, images):
            return self.body(images).mean((2, 3)) @ torch.tensor([[1.0, -1], [-2, 0], [0, 3]])

    images = torch.randn(2, 3, 4, 4, generator=rng())
    model = Known()
    found = grad_cam(model, model.body, images, torch.tensor([0, 1]))
    assert_close(found[0], functional.relu(images[0, 0] - 2 * images[0, 1]) / 16, 1e-6)
    assert_close(found[1], functional.relu(3 * images[1, 2] - images[1, 0]) / 16, 1e-6)
    for parameter in (frozen := nn.Conv2d(3, 2, 1)).parameters():
        parameter.requires_grad_(False)
    net = nn.Sequential(frozen, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert grad_cam(net, net[0], images, torch.tensor([0, 1])).shape == (2, 4, 4)


@pytest.mark.parametrize("sigma", [0.7, 1.5, 3.0])
def test_smooth_equals_scipy(sigma):
    maps = uniform(2, 33, 27)
    reach = math.ceil(3 * sigma)
    expected = [
        ndimage.gaussian_filter(m, sigma, mode="mirror", radius=reach) for m in maps.numpy()
    ]
    assert_close(smooth(maps, sigma), torch.from_numpy(np.stack(expected)), 1e-10)
    assert smooth(torch.ones(1, 5, 5), 20.0).allclose(torch.ones(1, 5, 5))


def test_edges_of_a_step():
    images = torch.zeros(1, 3, 6, 8)
    images[..., 4:] = 1
    found = edges(images)[0]
    assert (found[:, 3:5] == 4).all()
    assert (found[:, :3] == 0).all()
    assert torch.equal(edges(images.mT)[0], found.T)


def test_lab_of_known_colours():
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    known = torch.tensor(
        [[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [53.39, 0, 0]]
    )
    found = 100 * lab(colours[:, :, None, None].double())[..., 0, 0]
    assert_close(found, known.double(), 0.05)


def test_shares_and_pointing():
    maps = torch.zeros(2, 6, 6)
    maps[0, 2, 2], maps[0, 5, 5] = 3, 1
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[:, 3:, 3:] = True
    assert share_inside(maps, masks).tolist() == [0.25, 0]
    assert points_inside(maps, masks).tolist() == [False, False]
    assert points_inside(maps, masks, tolerance=1).tolist() == [True, False]
    assert intersection_over_union(masks, masks.roll(1, 1)).tolist() == pytest.approx([0.5] * 2)


def test_top_area_gini_and_components():
    maps = torch.arange(40.0).view(1, 5, 8)
    chosen = top_area(maps, 0.2)
    assert chosen[0].nonzero().tolist() == [[4, column] for column in range(8)]
    assert top_area(torch.zeros(2, 5, 8), 0.25).sum((1, 2)).tolist() == [10, 10]
    assert gini(torch.ones(1, 7, 5)).item() == pytest.approx(0, abs=1e-6)
    single = torch.zeros(1, 5, 8)
    single[0, 1, 1] = 2
    assert gini(single).item() == pytest.approx(1 - 1 / 40)
    scattered = torch.zeros(6, 9, dtype=torch.bool)
    scattered[0, 0] = scattered[1, 1] = scattered[2, 1] = scattered[5, 8] = True
    assert components(scattered) == (2, 0.75)
    assert components(torch.zeros(3, 3, dtype=torch.bool)) == (0, 0.0)


def test_regions_are_replaced_in_the_order_of_the_map():
    maps = torch.zeros(1, 12, 12)
    maps[0, :4, 8:], maps[0, 4:8, :4] = 2, 1
    order = regions_first(maps, 3)
    assert order[0].tolist() == [2, 3, 0, 1, 4, 5, 6, 7, 8]
    images, fill = torch.ones(1, 3, 6, 6), torch.zeros(1, 3, 6, 6)
    for count in range(10):
        left = replace_regions(images, fill, order, count)
        assert left.sum().item() == 3 * 4 * (9 - count)
    once = replace_regions(images, fill, order, 1)
    assert once[0, 0, :2, 4:].sum() == 0
    both = once + replace_regions(fill, images, order, 1)
    assert torch.equal(both, images)


def test_unit_range():
    maps = torch.tensor([[[1.0, 3], [2, 5]], [[4, 4], [4, 4]]])
    assert to_unit(maps).flatten(1).tolist() == [[0, 0.5, 0.25, 1], [0, 0, 0, 0]]
