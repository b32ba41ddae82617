"""The real ViT: built from the ONNX graph without a missing or a left-over parameter, and it sees."""

import pytest
import torch
from torch.nn import functional
from transformers import Dinov2Model

from reattend.assets.store import AssetError, asset_path
from reattend.backbones.pretrained import vit
from reattend.data.images import stamps


@pytest.fixture(scope="module")
def weights():
    try:
        path = asset_path("vit_focus") / vit.ONNX_FILE
    except AssetError as error:
        pytest.skip(str(error))
    return vit.read_weights(path)


@pytest.fixture(scope="module")
def model(weights):
    model = Dinov2Model(vit.configuration())
    model.load_state_dict(weights, strict=False)
    torch.nn.init.zeros_(model.embeddings.mask_token)
    return model.eval().requires_grad_(False)


def test_graph_holds_exactly_the_parameters_of_the_model(weights):
    expected = Dinov2Model(vit.configuration()).state_dict()
    assert set(expected) - set(weights) == {"embeddings.mask_token"}
    assert set(weights) <= set(expected)
    assert all(weights[name].shape == expected[name].shape for name in weights)
    counted = sum(tensor.numel() for tensor in weights.values())
    assert 22.0e6 < counted < 22.1e6


def test_matrices_belong_to_their_layers(weights):
    """A transposed or swapped matrix would still load where shapes agree, so pin what layers do.

    Layer-scales of a trained model are small and differ, and queries and keys meet only in products:
    no two square matrices of the graph may be the same one found twice.
    """
    square = [name for name in weights if name.endswith("_proj.weight") and weights[name].ndim == 2]
    assert len(square) == 4 * vit.LAYERS
    sums = {round(weights[name].double().abs().sum().item(), 6) for name in square}
    assert len(sums) == len(square)
    assert weights["encoder.layer.0.mlp.fc1.weight"].shape == (1536, 384)


def test_build_is_byte_deterministic(weights, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        vit.build(tmp_path / name, "smoke")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    stored = Dinov2Model.from_pretrained(tmp_path / "a", local_files_only=True)
    for name, tensor in weights.items():
        assert torch.equal(stored.state_dict()[name], tensor), name


def test_prepare_normalises_as_in_training():
    white = torch.full((1, 3, 30, 30), 255, dtype=torch.uint8)
    prepared = vit.prepare(white, 28)
    expected = [(1 - m) / s for m, s in zip(vit.MEAN, vit.STD, strict=True)]
    assert prepared.shape == (1, 3, 28, 28)
    torch.testing.assert_close(prepared[0, :, 5, 5], torch.tensor(expected))
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        vit.prepare(white, 30)


def test_hidden_states_are_those_of_the_layers_asked_for(model):
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    states = vit.hidden_states(model, pixels, [3, 12], 56)
    assert states.shape == (2, 2, 1 + 16, 384)
    assert states.isfinite().all()
    final = model(vit.prepare(pixels, 56)).last_hidden_state
    torch.testing.assert_close(model.layernorm(states[1]), final)
    torch.testing.assert_close(vit.hidden_states(model, pixels, [3], 56)[0], states[0])
    with pytest.raises(ValueError, match=r"layers must lie in 1\.\.12"):
        vit.hidden_states(model, pixels, [13], 56)


def test_nearest_neighbours_beat_raw_pixels(model):
    """A wrongly rebuilt network is no better than a random one, which loses to raw pixels here."""
    try:
        kinds = ("animals/birds", "town/houses", "food/fruit", "plants/flowers", "animals/insects")
        pictures = stamps(70, smallest_class=19, limit=18)
    except AssetError as error:
        pytest.skip(str(error))
    numbers = torch.tensor([pictures.classes.index(kind) for kind in kinds])
    pictures = pictures.subset(torch.isin(pictures.labels, numbers).nonzero()[:, 0])
    features = vit.hidden_states(model, pictures.pixels, [10], 70)[0, :, 0]
    raw = functional.adaptive_avg_pool2d(pictures.pixels.float(), 14).flatten(1)

    def leave_one_out(x):
        unit = functional.normalize(x - x.mean(0), dim=-1)
        similar = unit @ unit.T - 2 * torch.eye(len(unit))
        return (pictures.labels[similar.argmax(1)] == pictures.labels).float().mean().item()

    assert leave_one_out(features) > leave_one_out(raw) + 0.1
    assert leave_one_out(features) > 0.6
