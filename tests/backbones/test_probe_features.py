"""The extracted features of the probing studies: written whole, read back by encoder and layer."""

import pytest
import torch

from reattend.assets.store import AssetError
from reattend.backbones.trained import probe_features
from reattend.data.images import emoji, patch_coverage


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Features of a few emoji through two stand-in encoders that return their pictures' means."""
    try:
        emoji(64, 1)
    except AssetError as error:
        pytest.skip(str(error))

    def states(_model, pixels, layers, size=64):
        grid = size // 14 if size != 64 else 8
        tokens = pixels.float().mean((2, 3))[:, None].expand(-1, 1 + grid * grid, -1) / 255
        return torch.stack([layer * tokens for layer in layers])

    for module in (probe_features.vit, probe_features.mae):
        monkeypatch.setattr(module, "load", lambda *_: None)
        monkeypatch.setattr(module, "hidden_states", states)
    monkeypatch.setattr(probe_features, "backbone_path", lambda *_: tmp_path)
    probe_features.build(tmp_path, "smoke")
    return probe_features.load("smoke")


def test_features_are_those_of_the_pictures_in_order(built):
    pictures = emoji(64, probe_features.SETTINGS["smoke"].pictures)
    assert built.identities == pictures.identities
    assert torch.equal(built.labels, pictures.labels)
    means = pictures.pixels.float().mean((2, 3)) / 255
    tokens = built.tokens("vit", 10)
    assert tokens.shape == (len(pictures), 65, 3)
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(tokens[:, 5].float(), 10 * means, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(built.coverage["mae"], patch_coverage(pictures.alpha, 8))


def test_sides_of_the_split_are_those_of_the_pictures(built):
    sides = [built.indices(side) for side in ("train", "validation", "test")]
    assert torch.cat(sides).sort().values.tolist() == list(range(len(built.labels)))


def test_unknown_layers_and_encoders_are_named(built):
    assert built.layers("vit") == [4, 10]
    assert built.layers("mae") == [2, 4]
    with pytest.raises(ValueError, match=r"no features of layer 7 of 'vit'; layers: \[4, 10\]"):
        built.tokens("vit", 7)
    with pytest.raises(ValueError, match="unknown encoder 'clip'"):
        built.layers("clip")
