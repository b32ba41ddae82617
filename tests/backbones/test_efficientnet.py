"""The ImageNet classifier: folding is exact, and it knows what is on real photographs."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from reattend.assets.store import asset_path
from reattend.backbones.pretrained.efficientnet import EPSILON, fold_batch_norm, load, prepare
from reattend.trunks.language import parameter_count


@pytest.fixture(scope="module")
def model():
    return load()


def photo(name, box=None):
    with Image.open(asset_path("sample_photos") / "skimage" / "data" / name) as opened:
        picture = opened.convert("RGB").crop(box) if box else opened.convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("name", "box", "expected"),
    [
        ("chelsea.png", (70, 0, 370, 300), {281, 282, 283, 284, 285}),  # cats
        ("coffee.png", (100, 0, 500, 400), {504, 967, 968}),  # mug, espresso, cup
        ("rocket.jpg", (100, 0, 527, 427), {657, 744, 812}),  # missile, projectile, space shuttle
        ("motorcycle_left.png", None, {665, 670, 671}),  # moped, scooter, mountain bike
    ],
)
def test_it_recognises_photographs(model, name, box, expected):
    best = model(prepare(photo(name, box))).topk(3).indices[0].tolist()
    assert set(best) & expected, best


def test_folding_a_batch_norm_is_exact():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 3, bias=False).double()
    norm = nn.BatchNorm2d(5, eps=EPSILON).double().eval()
    for parameter in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(parameter)
    nn.init.uniform_(norm.running_var, 0.1, 3)
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    weight, bias = fold_batch_norm(convolution.weight, *statistics)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), norm(convolution(x)))


def test_its_size_is_the_published_one(model):
    count = sum(p.numel() for p in model.parameters())
    assert abs(count - 4.65e6) < 0.1e6
    assert parameter_count(model) == 0  # frozen


def test_maps_shrink_by_32(model):
    assert model.features(torch.zeros(1, 3, 64, 96)).shape == (1, 1280, 2, 3)


def test_sizes_must_fit_the_padding():
    with pytest.raises(ValueError, match="multiple of 32"):
        prepare(torch.zeros(1, 3, 50, 50, dtype=torch.uint8), 100)
