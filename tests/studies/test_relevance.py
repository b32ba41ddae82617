"""Maps of relevance on scenes: the object in use, curves, scores and planted marks, on cases with known answers."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from reattend.studies import relevance as study
from reattend.studies.relevance import SIX, Atlas, Curves, SceneClassifier
from reattend.vision import salient_relevance as method
from reattend.vision.salient_relevance import Context


class Brightness(nn.Module):
    """Class 1 by the mean of the first channel over the left half of the picture, class 0 by nothing."""

    def forward(self, images):
        left = images[:, 0, :, : images.shape[-1] // 2].mean((1, 2))
        return torch.stack([torch.zeros_like(left), 8 * left], 1)


def pictures(seed=0, count=3, side=16):
    """Noise about zero; a bright patch in the left half and another in the right, and their masks."""
    images = 0.01 * torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    masks = torch.zeros(count, 2, side, side, dtype=torch.bool)
    masks[:, 0, 4:8, 1:7] = True
    masks[:, 1, 4:8, 9:15] = True
    return images + 2.0 * masks.any(1, keepdim=True), masks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_object_in_use_is_the_one_whose_loss_costs_most(seed):
    images, masks = pictures(seed)
    classes = torch.ones(3, dtype=torch.long)
    model = Brightness()
    used, cost = study.object_in_use(model, images, masks, classes)
    assert used.tolist() == [0, 0, 0]
    before = model(images).softmax(1)[:, 1]
    mean = images.mean((2, 3), keepdim=True)
    after = model(torch.where(masks[:, :1], mean, images)).softmax(1)[:, 1]
    torch.testing.assert_close(cost, 1 - after / before)


@pytest.mark.parametrize("seed", [0, 1])
def test_curves_fall_fast_only_for_the_map_that_points_at_what_is_used(seed):
    images, masks = pictures(seed)
    classes = torch.ones(3, dtype=torch.long)
    curves = Curves(4, (0.25, 0.5), (0.25,))
    falls = {}
    for name, maps in {"used": masks[:, 0], "unused": masks[:, 1]}.items():
        down, areas = curves.of(Brightness(), images, classes, maps.float())
        assert down.shape == (3, 3)
        whole = Brightness()(images).softmax(1)[:, 1].numpy()
        np.testing.assert_allclose(down[0], whole, rtol=1e-5)
        # Trapezia over 0, .25, .5: half weights at the ends.
        np.testing.assert_allclose(
            areas["deletion"], (down[0] + 2 * down[1] + down[2]) / 4, rtol=1e-5
        )
        falls[name] = areas
    assert (falls["used"]["deletion"] < falls["unused"]["deletion"]).all()
    assert (falls["used"]["insertion"] > falls["unused"]["insertion"]).all()
    _, without = Curves(4, (0.25,)).of(Brightness(), images, classes, masks[:, 0].float())
    assert set(without) == {"deletion"}


def test_scores_of_a_map_that_is_its_mask():
    _, masks = pictures(side=20)
    mask = masks[:, 0]
    scores = study.shape_scores(mask.float(), mask)
    assert scores["energy"].tolist() == [100.0] * 3
    assert scores["pointing"].tolist() == [100.0] * 3
    inside = mask[0].sum().item()
    np.testing.assert_allclose(scores["overlap"], 100 * inside / (0.2 * 400))
    assert set(scores) == {"components", "largest", "Gini", "energy", "pointing", "overlap"}


def test_lrp_sr_and_blur_are_those_of_the_method():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 3)
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    atlas = Atlas(48, Context(stride=4, scales=(1.0, 0.5)))
    found = atlas.lrp_and_sr(model, images, suffix="!")
    lrp = method.relevance_map(method.explain(model, images).relevance)
    expected = method.resize(lrp[:, None], (48, 48))
    torch.testing.assert_close(found["LRP!"], expected[:, 0])
    saliency = method.context_aware_saliency(expected, atlas.context)
    torch.testing.assert_close(found["SR!"], saliency)
    torch.testing.assert_close(found["blur!"], method.smooth(expected[:, 0], 0.04 * 48))
    halves = study.in_batches(lambda part: atlas.lrp_and_sr(model, part), images, size=1)
    torch.testing.assert_close(halves["SR"], saliency, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_marks_tint_a_square_and_nothing_else(seed):
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (5, 3, 20, 20), generator=draw, dtype=torch.uint8)
    colours = torch.arange(5)
    marked, masks = study.with_marks(pixels, colours, seed)
    assert masks.flatten(1).sum(1).tolist() == [study.MARK**2] * 5
    outside = ~masks[:, None].expand_as(pixels)
    assert torch.equal(marked[outside], pixels[outside])
    for number in range(5):
        inside = marked[number][:, masks[number]].int()
        half = (
            pixels[number][:, masks[number]].int() + torch.tensor(study.MARKS)[number][:, None]
        ) // 2
        assert torch.equal(inside, half)


def test_misleading_marks_are_as_frequent_as_asked():
    labels = torch.randint(6, (4000,), generator=torch.Generator().manual_seed(0))
    marks = study.misleading(labels, 0.7, seed=1)
    # A colour drawn at random is the right one in a sixth of the cases.
    assert (marks == labels).float().mean() == pytest.approx(0.7 + 0.3 / 6, abs=0.02)


def test_outcomes_say_which_network_is_right():
    right_a = np.array([True, True, False, False, True])
    right_b = np.array([True, False, True, False, True])
    groups = study.by_outcome(right_a, right_b, most=1)
    found = {name: members.tolist() for name, members in groups.items()}
    assert found == {"both": [0], "only A": [1], "only B": [2], "neither": [3]}
    assert study.by_outcome(right_a, right_b, most=9)["both"].tolist() == [0, 4]


@pytest.mark.parametrize(("build", "convolutions"), [(study.network_a, 3), (study.network_b, 6)])
def test_the_networks_are_plain_and_differ_in_depth(build, convolutions):
    model = SceneClassifier(build(), 40, seed=0)
    kinds = [type(layer) for layer in model.layers]
    assert kinds.count(nn.Conv2d) == convolutions
    assert set(kinds) == {nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear}
    pixels = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    assert model(pixels).shape == (2, len(SIX))
    other = SceneClassifier(build(), 40, seed=1)
    assert not torch.equal(other.layers[0].weight, model.layers[0].weight)


def test_scenes_of_six_kinds():
    pixels, masks, labels = study.scenes_of_six(60, 40, seed=0)
    assert pixels.shape[1:] == (3, 40, 40)
    assert masks.shape == (len(labels), 40, 40)
    assert 10 < len(labels) < 50
    assert set(labels.tolist()) <= set(range(6))


def test_a_photograph_is_the_middle_of_its_file(tmp_path, monkeypatch):
    picture = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    (tmp_path / "skimage/data").mkdir(parents=True)
    study.Image.fromarray(picture).save(tmp_path / "skimage/data/one.png")
    monkeypatch.setattr(study, "asset_path", lambda name: tmp_path)
    found = study.photograph("one.png", side=40)
    np.testing.assert_array_equal(found.movedim(0, -1), picture[:, 10:50])
    assert study.photograph("one.png", side=20).shape == (3, 20, 20)


def test_means_table_has_a_row_a_map_and_empty_measures():
    scores = {"SR": {"energy": np.array([1.0, 3.0]), "deletion": np.array([0.5, 0.7])}}
    table = study.means_table(scores | {"LRP": {"energy": np.array([4.0])}})
    assert table["map"].tolist() == ["SR", "LRP"]
    assert table["energy"].tolist() == [2, 4]
    assert table["deletion"][0] == pytest.approx(0.6)
    assert np.isnan(table["deletion"][1])


def test_stand_ins_stand_beside_their_networks_with_every_training():
    reported = pd.DataFrame({"network": ["VGG-16", "AlexNet"], "top1": [71.5, 57.1]})
    right = {(n, s): np.array([True, s == 1, n == "B", False]) for n in "AB" for s in range(2)}
    right["A with marks", 0] = np.zeros(4, dtype=bool)
    table = study.stand_ins_table(reported, right).set_index("network")
    assert table.loc["AlexNet", "stand-in"] == "A"
    assert table.loc["AlexNet", "accuracy of the stand-in, %"] == "25.0 50.0"
    assert table.loc["VGG-16", "accuracy of the stand-in, %"] == "50.0 75.0"


def test_tables_of_outcomes_and_marks_name_every_training():
    gaps = {("SR", "both"): np.array([[4.0, 30.0, 40.0, 10.0], [6.0, 50.0, 45.0, -5.0]])}
    row = study.outcomes_table(gaps).iloc[0]
    assert row.tolist() == ["SR", "both", 5, 40, 42.5, "+10.0 -5.0"]
    table = study.marks_table({("A", "LRP"): np.array([[10.0, 20.0], [0.0, 50.04]])})
    assert table["energy on the mark, %, each training"].tolist() == ["10.0 20.0"]
    assert table["pointing on the mark, %, each training"].tolist() == ["0.0 50.0"]
