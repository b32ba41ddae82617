"""The causal trunk, with a toy mixer whose output can be computed by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reattend.trunks.language import (
    FeedForward,
    GatedFeedForward,
    Trunk,
    labelled_loss,
    norm_layer,
    parameter_count,
    sinusoids,
)


class RunningMean(nn.Module):
    """Mean of all states so far."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x):
        return self.scale * x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]

    def state_size(self, length):
        return len(self.scale) + 1


class ReadsTokens(RunningMean):
    """Adds the token's number, and has a loss of its own."""

    reads_tokens = True

    def forward(self, x, tokens):
        self.auxiliary_loss = 0.25 * self.scale.sum()
        return x + tokens[..., None]


def tokens(rows=3, length=7, vocabulary=11, seed=0):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return Trunk(
        11, 5, [RunningMean, ReadsTokens], positions=9, feed_forward=lambda w: FeedForward(w, 3)
    ).double()


def test_the_layers_are_pre_norm_and_residual(trunk):
    ids = tokens()
    x = trunk.tokens.weight[ids] + trunk.positions.weight[:7]
    for block in trunk.blocks:
        normed = F.layer_norm(x, (5,), block.mixer_norm.weight, block.mixer_norm.bias)
        x = x + (
            block.mixer(normed, ids)
            if isinstance(block.mixer, ReadsTokens)
            else block.mixer(normed)
        )
        x = x + block.feed_forward(F.layer_norm(x, (5,)))
    expected = F.layer_norm(x, (5,)) @ trunk.tokens.weight.T
    torch.testing.assert_close(trunk(ids), expected)


def test_an_identity_second_half_adds_the_norm():
    torch.manual_seed(0)
    model = Trunk(11, 5, [RunningMean], feed_forward=lambda width: nn.Identity()).double()
    x = model.tokens.weight[tokens()]
    x = x + model.blocks[0].mixer(F.layer_norm(x, (5,)))
    expected = F.layer_norm(x + F.layer_norm(x, (5,)), (5,))
    torch.testing.assert_close(model.hidden(tokens()), expected)


@pytest.mark.parametrize(("length", "width"), [(8, 6), (33, 5), (1, 1)])
def test_sinusoids_of_equal_distance_have_equal_products(length, width):
    positions = sinusoids(length, width)
    assert positions.shape == (length, width)
    if width % 2 == 0:
        products = positions @ positions.T
        for distance in range(length):
            diagonal = products.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_embeddings_start_at_the_given_size():
    torch.manual_seed(0)
    model = Trunk(500, 40, [RunningMean], positions=64, embedding_std=0.3)
    assert model.tokens.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.positions.weight.square().mean().sqrt().item() == pytest.approx(0.15, rel=0.05)
    assert model.positions.weight.requires_grad


def test_parameters_are_counted_once_though_the_head_is_tied(trunk):
    feed_forward = 5 * 15 + 15 + 15 * 5 + 5
    layer = 2 * 5 + 5 + 2 * 5 + feed_forward
    assert parameter_count(trunk) == 11 * 5 + 9 * 5 + 2 * layer + 2 * 5
    trunk.positions.weight.requires_grad_(False)
    assert parameter_count(trunk) == 11 * 5 + 2 * layer + 2 * 5


def test_the_tied_embedding_learns_from_both_ends(trunk):
    ids = torch.zeros(1, 3, dtype=torch.long)
    labels = torch.full((1, 3), 4)
    labelled_loss(trunk, ids, labels).backward()
    gradient = trunk.tokens.weight.grad
    assert gradient[0].abs().sum() > 0  # as input
    assert (gradient.abs().sum(1) > 0).all()  # as head: every word is a candidate


def test_the_future_does_not_matter(trunk):
    ids = tokens()
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    before, after = trunk(ids), trunk(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=0, rtol=0)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_texts_longer_than_the_positions_are_refused(trunk):
    with pytest.raises(ValueError, match="10 tokens, but positions for 9"):
        trunk(tokens(length=10))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_is_cross_entropy_on_labels_plus_the_mixers_losses(trunk, seed):
    ids, labels = tokens(seed=seed), tokens(seed=seed + 10)
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.5] = -100
    expected = F.cross_entropy(trunk(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected = expected + 0.25 * trunk.blocks[1].mixer.scale.sum()
    torch.testing.assert_close(labelled_loss(trunk, ids, labels), expected)


def test_the_loss_in_evaluation_is_cross_entropy_alone(trunk):
    """Mixers set their own loss in training only; the last one must not go on counting."""
    ids = tokens()
    assert labelled_loss(trunk, ids, ids) > F.cross_entropy(trunk(ids).flatten(0, 1), ids.flatten())
    trunk.eval()
    expected = F.cross_entropy(trunk(ids).flatten(0, 1), ids.flatten())
    torch.testing.assert_close(labelled_loss(trunk, ids, ids), expected)
    assert trunk.auxiliary_loss().item() == 0


def test_no_mixer_loss_is_zero():
    model = Trunk(11, 5, [RunningMean])
    model(tokens())
    assert model.auxiliary_loss().item() == 0


def test_state_sizes_add_up(trunk):
    assert trunk.state_size(100) == 2 * 6


def test_dropout_is_only_for_training():
    model = Trunk(11, 5, [RunningMean], dropout=0.5)
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


@pytest.mark.parametrize(("norm", "parameters"), [("layer", 2), ("rms", 1), ("simple_rms", 0)])
def test_norms_by_name(norm, parameters):
    layer = norm_layer(norm, 6)
    x = 3 + 2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    expected = centred / centred.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert len(list(layer.parameters())) == parameters
    model = Trunk(11, 6, [RunningMean], feed_forward=FeedForward, norm=norm)
    assert {type(m) for m in model.modules() if "Norm" in type(m).__name__} == {type(layer)}


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="unknown norm 'batch'; there are: layer, rms, simple_rms"):
        norm_layer("batch", 4)


@pytest.mark.parametrize("activation", [F.silu, nn.Identity()])
def test_a_gated_feed_forward_multiplies_two_maps(activation):
    torch.manual_seed(0)
    module = GatedFeedForward(6, 4, activation).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up, down = (m.weight for m in (module.gate, module.up, module.down))
    torch.testing.assert_close(module(x), (activation(x @ gate.T) * (x @ up.T)) @ down.T)
    assert parameter_count(module) == 3 * 6 * 4
    assert (
        parameter_count(GatedFeedForward(6, 16)) == 2 * 6 * 24
    )  # as many as FeedForward's matrices
