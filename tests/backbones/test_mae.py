"""The masked autoencoder trained here: what it sees, what it predicts, and that it learns."""

import pytest
import torch

from reattend.backbones.trained import mae

SHAPE = mae.Shape(width=32, layers=2, heads=2, decoder_width=16, decoder_layers=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mae.MaskedAutoencoder(SHAPE)


def test_patches_run_row_by_row():
    images = torch.rand(2, 3, 64, 64)
    patches = mae.patchify(images)
    assert patches.shape == (2, 64, 192)
    corner = images[1, :, 8:16, 24:32]  # second row, fourth column
    torch.testing.assert_close(patches[1, 11], corner.permute(1, 2, 0).flatten())


def test_positions_are_all_different():
    positions = mae.sine_positions(32)
    distance = torch.cdist(positions, positions) + 10 * torch.eye(64)
    assert positions.shape == (64, 32)
    assert distance.min() > 0.1


def test_encoder_sees_visible_patches_only(model):
    patches = torch.rand(2, 64, 192)
    order = torch.rand(2, 64).argsort(1)
    visible, hidden = order[:, :16], order[:, 16:]
    changed = patches.scatter(1, hidden[..., None].expand(-1, -1, 192), 9.0)
    torch.testing.assert_close(
        model.encode(changed, visible)[-1], model.encode(patches, visible)[-1]
    )
    assert len(model.encode(patches)) == 2
    assert model.encode(patches)[0].shape == (2, 65, 32)


def test_reconstruction_puts_visible_tokens_at_their_places(model):
    """The prediction must not depend on the order in which the visible patches are listed."""
    patches = torch.rand(1, 64, 192)
    visible = torch.randperm(64)[None, :16]
    shuffled = visible[:, torch.randperm(16)]
    first, second = model.reconstruct(patches, visible), model.reconstruct(patches, shuffled)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_loss_counts_hidden_patches_only(model):
    images, order = torch.rand(3, 3, 64, 64), torch.rand(3, 64).argsort(1)
    loss = mae.reconstruction_loss(model, images, order)
    patches = mae.patchify(images)
    target = (patches - patches.mean(-1, keepdim=True)) / patches.std(-1, keepdim=True)
    predicted = model.reconstruct(patches, order[:, :16])
    errors = [
        (predicted[i, n] - target[i, n]).square().mean() for i in range(3) for n in order[i, 16:]
    ]
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-4, atol=1e-4)


def test_augmentation_keeps_shape_and_range_and_is_seeded():
    images = torch.rand(4, 3, 64, 64)
    first, second = (mae.augment(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == images.shape
    assert torch.equal(first, second)
    assert first.min() >= -1e-6
    assert first.max() <= 1 + 1e-6


def test_it_learns_to_predict_hidden_patches():
    torch.manual_seed(0)
    model = mae.MaskedAutoencoder(SHAPE)
    ramp = torch.linspace(-1, 1, 64)
    images = torch.stack([ramp.expand(3, 64, 64), ramp[:, None].expand(3, 64, 64)]).repeat(
        8, 1, 1, 1
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        order = torch.rand(16, 64).argsort(1)
        loss = mae.reconstruction_loss(model, images, order)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 0.8
    assert losses[-1] < 0.3


def test_hidden_states_refuse_unknown_layers(model):
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert mae.hidden_states(model, pixels, [1, 2]).shape == (2, 1, 65, 32)
    with pytest.raises(ValueError, match=r"layers must lie in 1\.\.2"):
        mae.hidden_states(model, pixels, [3])
